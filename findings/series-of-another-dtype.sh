#!/usr/bin/env bash
# polars 0.20.31: one string makes a Series of another dtype than was asked for, and drops the numbers.
#
# Series(values, dtype=Int64) with a string among the numbers is neither an error nor a null: it is a
# String series in which the string stays and every number is null, with strict=True as well. Only
# strict=False keeps dtype and numbers. DataFrame with the same schema raises. 1.0.0 raises a
# TypeError, so a pipeline that ran on 0.20 may stop at rows which it had been losing.
#
# Seen: 0.20.31: String [None, None, 'three', None], strict=False: Int64 [1, 2, None, 4]
#       1.0.0: TypeError, strict=False: Int64 [1, 2, None, 4]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv --without-pip "$work/venv"
cd "$work"
cat > series.py <<'PY'
import polars as pl


def made(strict):
    try:
        series = pl.Series("n", [1, 2, "three", 4], dtype=pl.Int64, strict=strict)
        return f"{series.dtype} {series.to_list()}"
    except TypeError:
        return "TypeError"


print(f"{pl.__version__}: {made(True)}, strict=False: {made(False)}")
old = pl.__version__ == "0.20.31"
wanted = "String [None, None, 'three', None]" if old else "TypeError"
assert made(True) == wanted, "the behaviour has changed"
assert made(False) == "Int64 [1, 2, None, 4]", "the behaviour has changed"
PY
for version in 0.20.31 1.0.0; do
  python3 -m pip --python "$work/venv/bin/python" install -q polars==$version
  "$work/venv/bin/python" series.py
done
