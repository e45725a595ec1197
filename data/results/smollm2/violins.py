import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns


def load(path):
    frame = pd.read_csv(path)
    frame = frame.dropna(subset=["speed"])
    frame["knots"] = frame["speed"] * 1.94
    return frame


def summary(frame):
    groups = frame.groupby("ship")["knots"]
    for name, values in groups:
        print(name, len(values), values.mean().round(1))


def by_ship(frame, ax):
    sns.violinplot(data=frame, x="ship", y="knots", scale="count", inner=None, ax=ax)
    ax.set_title("by ship")
    ax.tick_params(axis="x", rotation=90)


def by_month(frame, ax):
    frame = frame.assign(month=pd.to_datetime(frame["day"]).dt.month)
    sns.violinplot(data=frame, x="month", y="knots", scale="width", ax=ax)
    ax.set_title("by month")
    ax.set_xlabel("")


def main():
    frame = load("ships.csv")
    summary(frame)
    fig, axes = plt.subplots(1, 2, figsize=(12, 4))
    by_ship(frame, axes[0])
    by_month(frame, axes[1])
    fig.tight_layout()
    fig.savefig("ships.png")


main()
