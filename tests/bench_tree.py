"""One measurement in one tree of this project, alone in its process; bench_speed.py calls it.

    python tests/bench_tree.py TREE WHAT MODEL         prints seconds, and what was done in them

The model is loaded before the clock starts; packing its weights counts.
"""

import sys
import time
from pathlib import Path

TREE, WHAT, MODEL = sys.argv[1:]
sys.path.insert(0, TREE)

import torch  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import lora  # noqa: E402
from policy import load  # noqa: E402

TODAY = (Path(TREE) / "packed.py").exists()  # its default dtype is chosen, once it was float32
ROWS = 32  # that are graded


def sampling(policy, ends: bool) -> int:
    """4 prompts x 8 samples of at most 200 tokens, or of just as many."""
    if not ends:
        policy.eos_ids = [policy.model.config.vocab_size - 1]  # which no answer has
    rows = data.load(split="train")[::400][:4]
    how = {"group_size": 8, "max_new_tokens": 200}
    generator = torch.Generator().manual_seed(0)
    return int(policy.sample(policy.prompts(rows), generator=generator, **how).length.sum())


def generate(policy) -> int:
    """The same 4 x 8 x 200 by transformers, adapters merged into the weights."""
    rows = policy.prompts(data.load(split="train")[::400][:4])
    width = max(map(len, rows))
    ids = torch.tensor([[policy.pad_id] * (width - len(row)) + row for row in rows])
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    how = {"do_sample": True, "top_k": 0, "num_return_sequences": 8, "eos_token_id": -1}
    with lora.merged(policy.model), torch.no_grad():
        out = policy.model.generate(
            ids, attention_mask=seen, max_new_tokens=200, pad_token_id=policy.pad_id, **how
        )
    return out[:, width:].numel()


def greedy(policy) -> int:
    """One answer to a file of 40 lines, as migrate.py asks for it."""
    rows = [e for e in data.load(split="test_hard") if e.old_code.count("\n") > 30]
    row = min(rows, key=lambda e: (abs(e.old_code.count("\n") - 39), e.id))
    how = {"group_size": 1, "max_new_tokens": 1024, "temperature": 0.0}
    return int(policy.sample(policy.prompts([row]), **how).length.sum())


def grading(policy) -> int:
    """Greedy answers of at most 200 tokens to held-out rows."""
    return len(evaluate.greedy(policy, data.load(split="test")[::9][:ROWS], 200))


def main() -> None:
    policy = load(MODEL, "cpu", *(["auto"] if TODAY else []))
    policy.sample([[1, 2, 3]], group_size=1, max_new_tokens=2)  # checks of a new model
    work = {
        "sampling": lambda: sampling(policy, ends=False),
        "lengths": lambda: sampling(policy, ends=True),
        "generate": lambda: generate(policy),
        "greedy": lambda: greedy(policy),
        "grading": lambda: grading(policy),
    }[WHAT]
    begin = time.perf_counter()
    count = work()
    print(time.perf_counter() - begin, count)


if __name__ == "__main__":
    main()
