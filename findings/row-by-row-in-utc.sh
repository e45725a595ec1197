#!/usr/bin/env bash
# pandas 2.3.3 with python-dateutil 4.0.0: tz_convert of one Timestamp keeps the hour of UTC, without zone.
#
# pandas 2 knows a zone of dateutil by private attributes, one of which is gone since the rewrite in
# dateutil 3.0.0. pandas asks for 2.8.2 or newer, so a fresh install of 2.3.3 gets 4.0.0, and a zone from
# gettz() is taken for a fixed offset. A whole index raises an AttributeError. On a single Timestamp that
# error is lost in compiled code (stderr tells of an ignored exception): the result has no zone and the
# hour and date of UTC, so what is done row by row ends well and is wrong. ZoneInfo works with both.
#
# Seen: 2.9.0.post0: hours [0, 11], day 2, zone True, equal True, index [0, 11], ZoneInfo [0, 11]
#       4.0.0: hours [22, 10], day 1, zone False, equal False, index AttributeError, ZoneInfo [0, 11]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv --without-pip "$work/venv"
cd "$work"
cat > zones.py <<'PY'
from zoneinfo import ZoneInfo

import dateutil
import pandas as pd
from dateutil.tz import gettz

times = pd.to_datetime(["2026-07-01 22:30", "2026-01-15 10:00"], utc=True)
berlin = gettz("Europe/Berlin")
hours = [time.tz_convert(berlin).hour for time in times]
right = [time.tz_convert(ZoneInfo("Europe/Berlin")).hour for time in times]
one = times[0].tz_convert(berlin)
try:
    index = times.tz_convert(berlin).hour.tolist()
except AttributeError:
    index = "AttributeError"
found = (hours, one.day, one.tzinfo is not None, one == times[0], index)
print("{}: hours {}, day {}, zone {}, equal {}, index {}".format(dateutil.__version__, *found), end="")
print(f", ZoneInfo {right}")
bad = ([22, 10], 1, False, False, "AttributeError")
wanted = bad if dateutil.__version__ == "4.0.0" else ([0, 11], 2, True, True, [0, 11])
assert (found, right) == (wanted, [0, 11]), "the behaviour has changed"
PY
for version in 2.9.0.post0 4.0.0; do
  packages="pandas==2.3.3 numpy==2.4.6 python-dateutil==$version"
  python3 -m pip --python "$work/venv/bin/python" install -q $packages
  "$work/venv/bin/python" zones.py 2>"$work/ignored" || { cat "$work/ignored"; exit 1; }
done
grep -q "Exception ignored" "$work/ignored"
