"""What training has cost elsewhere: nats a token of programs that know of no API update.

    python tests/bench_forgotten.py HumanEval.jsonl.gz smollm2 runs/cold/checkpoint ...

Every model reads the 164 problems of HumanEval as plain text, a signature with its docstring, and
is asked how likely it finds the reference solution behind it: -log p, mean over all tokens, and its
difference to the first model with a standard error over problems. No sampling; bf16 products.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import json_lines  # noqa: E402
from policy import load  # noqa: E402
from rollout import packs, written  # noqa: E402


@torch.no_grad()
def surprise(name: str, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p of each solution, and its tokens: [N], [N]."""
    policy = load(name, "cpu", torch.bfloat16)
    ask = [policy.tokenizer.encode(row["prompt"]) for row in rows]
    said = [policy.tokenizer.encode(row["canonical_solution"]) for row in rows]
    texts = written(ask, [[ids] for ids in said], policy.pad_id, "cpu")
    nats = torch.zeros(len(rows))
    for pack in packs(texts, 2048):
        nats[pack] = -policy.logp(texts, pack).sum(dim=(1, 2))
    return nats, texts.length[:, 0]


def main(path: str, *names: str) -> None:
    rows = [row for _, row in json_lines(path)]
    first = None
    for name in names:
        nats, tokens = surprise(name, rows)
        each = nats / tokens.float().mean()  # its mean over problems is the mean over tokens
        first = each if first is None else first
        gap = each - first
        error = gap.std().item() / len(rows) ** 0.5
        print(f"{name}: {each.mean():.3f} nats a token, {gap.mean():+.3f} +- {error:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
