#!/usr/bin/env bash
# urllib3 2.7.0 and 2.8.0: -W error::DeprecationWarning lets its deprecations pass.
#
# They are FutureWarnings since 2.7.0, which is no subclass of DeprecationWarning. A check that turns
# DeprecationWarning into an error, as many test suites do, stopped at format_header_param under 2.6.3 and
# is green under 2.8.0, where the function is as deprecated as before. FutureWarning has to be named too.
#
# Seen: 2.6.3: DeprecationWarning as error: raised, FutureWarning as error: passed
#       2.8.0: DeprecationWarning as error: passed, FutureWarning as error: raised
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv --without-pip "$work/venv"
cd "$work"
cat > call.py <<'PY'
from urllib3.fields import format_header_param

try:
    format_header_param("name", "a")
    print("passed")
except Warning as warning:
    assert "format_multipart_header_param" in str(warning), "another warning"
    print("raised")
PY
for version in 2.6.3 2.8.0; do
  python3 -m pip --python "$work/venv/bin/python" install -q urllib3==$version
  old=$("$work/venv/bin/python" -W ignore -W error::DeprecationWarning call.py)
  new=$("$work/venv/bin/python" -W ignore -W error::FutureWarning call.py)
  echo "$version: DeprecationWarning as error: $old, FutureWarning as error: $new"
done | tee seen
diff seen - <<'SEEN' || { echo "the behaviour has changed"; exit 1; }
2.6.3: DeprecationWarning as error: raised, FutureWarning as error: passed
2.8.0: DeprecationWarning as error: passed, FutureWarning as error: raised
SEEN
