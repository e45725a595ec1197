#!/usr/bin/env bash
# pandas 2.3.3: a Timestamp of positional year, month and day puts hour= into the minutes.
#
# The first parameter is the value to convert. Numbers by position take the names that follow it, one
# field too far, so a keyword after them fills the field below its name: hour= becomes minutes, minute=
# becomes seconds. Beside a datetime the same keyword is dropped. No warning is given, and the time looks
# like a time. All by keyword is right. 3.1.1 raises a ValueError in both cases, so code that moves there
# must look at the times that it has already written.
#
# Seen: 2.3.3: 2020-12-31 00:05:00, datetime and hour: 2020-12-31 00:00:00, keywords: 2020-12-31 05:00:00
#       3.1.1: ValueError, datetime and hour: ValueError, keywords: 2020-12-31 05:00:00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv --without-pip "$work/venv"
cd "$work"
cat > fields.py <<'PY'
from datetime import datetime

import pandas as pd


def made(*fields, **named):
    try:
        return str(pd.Timestamp(*fields, **named))
    except ValueError:
        return "ValueError"


place, value = made(2020, 12, 31, hour=5), made(datetime(2020, 12, 31), hour=5)
named = made(year=2020, month=12, day=31, hour=5)
print(f"{pd.__version__}: {place}, datetime and hour: {value}, keywords: {named}")
old = pd.__version__ == "2.3.3"
wanted = ("2020-12-31 00:05:00", "2020-12-31 00:00:00") if old else ("ValueError", "ValueError")
assert (place, value, named) == (*wanted, "2020-12-31 05:00:00"), "the behaviour has changed"
PY
for version in 2.3.3 3.1.1; do
  python3 -m pip --python "$work/venv/bin/python" install -q pandas==$version numpy==2.4.6
  "$work/venv/bin/python" fields.py
done
