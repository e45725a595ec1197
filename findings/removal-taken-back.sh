#!/usr/bin/env bash
# urllib3 2.5.0 to 2.8.0: two methods warned, were removed, and came back without a warning.
#
# In 2.5.0 HTTPResponse.getheader() and getheaders() warned that 2.6.0 would remove them, 2.6.0 did, and
# 2.6.1 brought them back as plain methods. So a table of API changes made from two releases depends
# on which two: removed (2.5.0 to 2.6.0), added (2.6.0 to 2.6.1), or nothing at all (2.5.0 to 2.8.0).
#
# Seen: 2.5.0: 1, DeprecationWarning; 2.6.0: AttributeError; 2.6.1: 1, no warning; 2.8.0: 1, no warning
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv --without-pip "$work/venv"
cd "$work"
cat > header.py <<'PY'
import warnings

import urllib3

response = urllib3.HTTPResponse(body=b"", headers={"X": "1"})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        told = response.getheader("X")
        warned = caught[0].category.__name__ if caught else "no warning"
        print(f"{urllib3.__version__}: {told}, {warned}")
    except AttributeError:
        print(f"{urllib3.__version__}: AttributeError")
PY
for version in 2.5.0 2.6.0 2.6.1 2.8.0; do
  python3 -m pip --python "$work/venv/bin/python" install -q urllib3==$version
  "$work/venv/bin/python" header.py
done | tee seen
diff seen - <<'SEEN' || { echo "the behaviour has changed"; exit 1; }
2.5.0: 1, DeprecationWarning
2.6.0: AttributeError
2.6.1: 1, no warning
2.8.0: 1, no warning
SEEN
