"""Trips of a bicycle courier: which columns are text, and how far he went."""

import pandas as pd


def load():
    return pd.DataFrame(
        {
            "from": ["market", "station", "harbour", "market"],
            "to": ["station", "harbour", "market", "mill"],
            "km": [3.5, 8.0, 6.2, 1.4],
            "parcels": [2, 5, 1, 3],
        }
    )


def text_columns(frame):
    return [name for name in frame.columns if frame[name].dtype == object]


def totals(frame):
    by_start = frame.groupby("from")["km"].sum()
    return {start: round(float(km), 1) for start, km in by_start.items()}


def shouted(frame):
    copy = frame.copy()
    for name in copy.columns:
        if copy[name].dtype == object:
            copy[name] = copy[name].str.upper()
    return copy


trips = load()
print(text_columns(trips))
print(totals(trips))
print(shouted(trips)["to"].tolist())
