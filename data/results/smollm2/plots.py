import csv
from statistics import mean

from bokeh.layouts import column
from bokeh.plotting import figure, save


def read(path):
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return [row["day"] for row in rows], [float(row["sales"]) for row in rows]


def smooth(values, width=7):
    out = []
    for i in range(len(values)):
        part = values[max(0, i - width + 1) : i + 1]
        out.append(mean(part))
    return out


def line_chart(days, sales):
    plot = figure(plot_width=800, plot_height=300, x_range=days)
    plot.line(days, sales, legend_label="sales")
    plot.line(days, smooth(sales), line_width=3, legend_label="week")
    return plot


def bar_chart(days, sales):
    best = max(sales)
    colors = ["orange" if value == best else "gray" for value in sales]
    plot = figure(plot_width=800, plot_height=200, x_range=days)
    plot.vbar(x=days, top=sales, width=0.8, color=colors)
    return plot


def main(path="sales.csv"):
    days, sales = read(path)
    print(len(days), "days,", round(sum(sales)), "sold")
    save(column(line_chart(days, sales), bar_chart(days, sales)))


main()
