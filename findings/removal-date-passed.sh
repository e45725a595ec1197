#!/usr/bin/env bash
# cryptography 50.0.2: names are still there that its warnings announce as removed in 48.0.0 and 49.0.0.
#
# Old ciphers and modes have moved to hazmat.decrepit. Their old places warn with the release that will
# remove them; those releases have come, and the names work as before. So the number in a warning says
# when somebody meant to remove a name, not what a release lacks: a list of removed APIs has to be taken
# from the release itself. (The warning is a UserWarning, no DeprecationWarning.)
#
# Seen: 50.0.2 has ARC4 (48.0.0), TripleDES (48.0.0), Camellia (49.0.0), CFB (49.0.0), CFB8 (49.0.0),
#       OFB (49.0.0)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv --without-pip "$work/venv"
cd "$work"
python3 -m pip --python "$work/venv/bin/python" install -q cryptography==50.0.2
cat > dates.py <<'PY'
import re
import warnings

import cryptography
from cryptography.hazmat.primitives.ciphers import algorithms, modes

dates = {}
places = [(algorithms, "ARC4 TripleDES Camellia"), (modes, "CFB CFB8 OFB")]
for module, name in [(module, name) for module, names in places for name in names.split()]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(module, name)
    text = str(caught[0].message)
    assert not issubclass(caught[0].category, DeprecationWarning), "the behaviour has changed"
    dates[name] = re.search(r"will be removed from \S+ in (\d+)\.0\.0\.$", text).group(1)
told = ", ".join(f"{name} ({date}.0.0)" for name, date in dates.items())
print(f"{cryptography.__version__} has {told}")
assert all(int(date) < 50 for date in dates.values()), "the behaviour has changed"
PY
"$work/venv/bin/python" dates.py
