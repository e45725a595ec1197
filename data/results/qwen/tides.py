"""Water at a pier: a curve through four readings, and the hour of the highest one."""

import numpy as np
from scipy.interpolate import lagrange

HOURS = [0, 2, 4, 6]
DEPTHS = {"north": [2.0, 3.1, 4.0, 3.2], "south": [1.6, 2.2, 3.4, 3.1]}


def curve(readings):
    return lagrange(HOURS, readings)


def at(readings, hours):
    poly = curve(readings)
    return [round(float(poly(hour)), 3) for hour in hours]


def highest(readings):
    grid = np.linspace(HOURS[0], HOURS[-1], 61)
    values = curve(readings)(grid)
    return round(float(grid[np.argmax(values)]), 1)


def report(pier, readings):
    return f"{pier}: {at(readings, [1, 3, 5])}, highest at {highest(readings)}"


for pier, readings in DEPTHS.items():
    print(report(pier, readings))
