#!/usr/bin/env bash
# pandas 3.1.1: a column of strings has a dtype that equals "str", but not the type str.
#
# For numbers and truth values both ways to ask agree: dtype == float and dtype == "float64". A column
# of strings, whose dtype prints as str, says False to dtype == str, also right behind astype(str),
# though select_dtypes(include=str) finds it. No warning is given, so code that listed text columns
# by dtype == object and is moved to dtype == str lists none. Names do not decide it, either:
# "string" equals both kinds of string dtype, which are not equal to each other.
#
# Seen: {'float': True, 'int': True, 'bool': True, 'str': False}, astype(str): False, by name: True,
#       select_dtypes: ['text'], "string" equals both: True, they each other: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv --without-pip "$work/venv"
python3 -m pip --python "$work/venv/bin/python" install -q pandas==3.1.1
cd "$work"
cat > columns.py <<'PY'
import pandas as pd

table = pd.DataFrame({"text": ["a", "b"], "n": [1, 2]})
text = table["text"].dtype
values = {float: 1.5, int: 1, bool: True, str: "a"}
same = {kind.__name__: bool(pd.Series([x]).dtype == kind) for kind, x in values.items()}
other = pd.Series(["a"], dtype="string").dtype
asked = bool(table["text"].astype(str).dtype == str)
found = table.select_dtypes(include=str).columns.tolist()
both = bool(text == "string" and other == "string")
print(f"{same}, astype(str): {asked}, by name: {text == 'str'},")
print(f'select_dtypes: {found}, "string" equals both: {both}, they each other: {text == other}')
assert same == {"float": True, "int": True, "bool": True, "str": False}, "it has changed"
assert (asked, text == "str", found) == (False, True, ["text"]), "it has changed"
assert both and text != other, "it has changed"
PY
"$work/venv/bin/python" columns.py
