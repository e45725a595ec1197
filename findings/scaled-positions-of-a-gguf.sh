#!/usr/bin/env bash
# transformers 5.24.0, gguf 0.19.0: RoPE scaling that stands in a GGUF file is dropped.
#
# A GGUF file says in two ways that positions are scaled: as metadata (linear, YaRN), and as the tensor
# rope_freqs.weight, which files of Llama 3.1 and later have. from_pretrained(gguf_file=) reads neither
# and warns of neither: the three files here, which differ in that alone, give one and the same model.
# llama.cpp (xllamacpp 2026.10.11549) reads both, so that it agrees on the file without scaling only.
#
# Seen: largest gap of a next token's log-probability, transformers to llama.cpp, in nats:
#       none 0.01, metadata 18.92, tensor 12.62; transformers' three answers are equal: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 \
    xllamacpp==2026.10.11549
cd "$work"
cat > scaled.py <<'PY'
import gguf
import numpy as np
import torch
import xllamacpp
from transformers import AutoModelForCausalLM

prompt = np.random.default_rng(1).integers(3, 40, 200).tolist()
shapes = {"token_embd": (40, 64), "output": (40, 64), "output_norm": (64,), "blk.0.attn_norm": (64,)}
shapes |= {f"blk.0.attn_{name}": (64, 64) for name in ("q", "k", "v", "output")}
shapes |= {"blk.0.ffn_norm": (64,), "blk.0.ffn_down": (64, 96)}
shapes |= {"blk.0.ffn_gate": (96, 64), "blk.0.ffn_up": (96, 64)}


def write(path, scaling):
    file, draw = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    file.add_context_length(512), file.add_embedding_length(64), file.add_feed_forward_length(96)
    file.add_block_count(1), file.add_head_count(2), file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-5), file.add_rope_dimension_count(32), file.add_rope_freq_base(1e4)
    file.add_tokenizer_model("llama"), file.add_token_list([f"t{i}" for i in range(40)])
    file.add_token_scores([0.0] * 40), file.add_token_types([2, 3, 3] + [1] * 37)
    file.add_add_bos_token(False)
    if scaling == "metadata":
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), file.add_rope_scaling_factor(8.0)
    if scaling == "tensor":
        file.add_tensor("rope_freqs.weight", np.repeat(np.float32([1, 8]), 8))
    for name, shape in shapes.items():
        scale = 1.0 if name in ("token_embd", "output") else 0.2
        drawn = np.ones(shape) if "norm" in name else draw.normal(size=shape, scale=scale)
        file.add_tensor(f"{name}.weight", drawn.astype(np.float32))
    file.write_header_to_file(), file.write_kv_data_to_file(), file.write_tensors_to_file(), file.close()


def llama_cpp(path):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = path, 512, 1, -1
    ask = {"prompt": prompt, "n_predict": 1, "n_probs": 40}
    answer = xllamacpp.Server(params).handle_completions(ask)["choices"][0]["logprobs"]["content"][0]
    return {x["id"]: x["logprob"] for x in answer["top_logprobs"]}


gaps, answers = {}, []
for scaling in ("none", "metadata", "tensor"):
    write(f"{scaling}.gguf", scaling)
    model = AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{scaling}.gguf")
    answers.append(model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).tolist())
    gaps[scaling] = max(abs(answers[-1][i] - x) for i, x in llama_cpp(f"{scaling}.gguf").items())
equal = answers[0] == answers[1] == answers[2]
print(", ".join(f"{name} {gap:.2f}" for name, gap in gaps.items()), end="; ")
print(f"transformers' three answers are equal: {equal}")
assert equal and gaps["none"] < 0.1 < 1 < min(gaps["metadata"], gaps["tensor"]), "it has changed"
PY
"$work/venv/bin/python" scaled.py 2>errors || { tail -n 1 errors; exit 1; }
