#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: a Trainer that evaluates in bf16 leaves its model in bf16.
#
# The option bf16_full_eval is said to act on evaluation only. But an evaluate() outside of train()
# casts the model itself, and nothing casts it back. So the usual evaluation before a training makes
# the whole training run on bf16 weights, of which small steps move few; and one behind it rounds what
# save_model() writes. No warning is given. The evaluations that train() makes itself do not cast.
#
# Seen: trained: torch.float32, 1.00 of the weights moved; evaluated behind it: torch.bfloat16
#       evaluated before: torch.bfloat16, 0.16 of the weights moved
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$work"
cat > rounds.py <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
rows = [{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(8)]
how = {"bf16_full_eval": True, "use_cpu": True, "max_steps": 4, "learning_rate": 1e-5}
how |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "output_dir": "out"}


def trained(first):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    trainer = Trainer(model, TrainingArguments(**how), train_dataset=rows, eval_dataset=rows)
    if first:
        trainer.evaluate()
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    after = model.lm_head.weight.detach()
    return str(after.dtype), (after != before).float().mean().item(), trainer


plain, moved, trainer = trained(first=False)
trainer.evaluate()
behind = str(trainer.model.dtype)
rounded, few, _ = trained(first=True)
print(f"trained: {plain}, {moved:.2f} of the weights moved; evaluated behind it: {behind}")
print(f"evaluated before: {rounded}, {few:.2f} of the weights moved")
assert (plain, behind, rounded) == ("torch.float32", "torch.bfloat16", "torch.bfloat16"), "it has changed"
assert few < moved / 2, "the behaviour has changed"
PY
"$work/venv/bin/python" rounds.py 2>errors || { tail -n 1 errors; exit 1; }
