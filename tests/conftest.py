"""What several test files share: a tiny random model, and settings for a run of a second."""

import json
from dataclasses import asdict

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import data
from config import Config


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random two-layer model and the bundled tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(data.POLICY)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows() -> list[data.Example]:
    """Fourteen updates of one short line each: six to train on, four in either test split."""
    made = []
    for i, split in enumerate(["train"] * 6 + ["test_seen"] * 4 + ["test"] * 4):
        old, new = f"lib.old_{i}(x)", f"lib.new_{i}(x)"
        note = f"`old_{i}` is now `new_{i}`."
        fields = ("lib", "==2.0", "It is renamed.", note, old, new)
        made.append(data.Example(*fields, id=f"row-{i}", kind="function renamed", split=split))
    return made


@pytest.fixture
def small(tiny, tmp_path):
    """Keyword arguments of a Config that runs in a second, on these rows."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows()))
    return dict(
        model=str(tiny), data=str(file), out=str(tmp_path / "run"), device="cpu",
        steps=2, prompts=2, max_new_tokens=40, eval_rows=2,
    )  # fmt: skip


OWN = {"grpo": {"group_size": 2}, "sft": {}}
OWN["dapo"] = {"group_size": 2, "max_refills": 1, "live": "reward"}


def settings(small: dict, **more) -> Config:
    """A Config of `small`, with what its algorithm reads."""
    return Config(**small | OWN[more.get("algo", "grpo")] | more)


def short_rows() -> list[data.Example]:
    """The shortest bundled programs: sixty to train on, four of each split to be graded on."""
    by_length = [sorted(data.load(split=s), key=lambda e: len(e.new_code)) for s in data.SPLITS[:3]]
    return by_length[0][:60] + by_length[1][:4] + by_length[2][:4]
