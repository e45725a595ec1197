#!/usr/bin/env bash
# transformers 5.23.0: a function that is handed to a chat template arrives as a string.
#
# apply_chat_template passes further keyword arguments on to the template. Templates of several models
# call strftime_now(format) to write a date, and the library provides one that tells today. Handing over
# another one, so that a prompt is the same tomorrow, does not work: whatever can be called is made a
# string before the template sees it, and the template fails with "str object is not callable". Only a
# macro written in front of the template takes the place of the built-in function.
#
# Seen: own function: TypeError: 'str' object is not callable; macro: [25]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers jinja2
cd "$work"
cat > template.py <<'PY'
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
turns, template = [{"role": "user", "content": "hi"}], "[{{ strftime_now('%d') }}]"
how = {"tokenize": False}
try:
    tokenizer.apply_chat_template(
        turns, chat_template=template, strftime_now=lambda form: "25", **how
    )
    raise SystemExit("the behaviour has changed")
except TypeError as error:
    told = f"TypeError: {error}"
macro = "{% macro strftime_now(form) %}25{% endmacro %}"
shown = tokenizer.apply_chat_template(turns, chat_template=macro + template, **how)
print(f"own function: {told}; macro: {shown}")
assert shown == "[25]", "the behaviour has changed"
PY
"$work/venv/bin/python" template.py 2>errors || { tail -n 1 errors; exit 1; }
