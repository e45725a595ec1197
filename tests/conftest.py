"""What several test files share: a tiny random model, and settings for a run of a second."""

import json
import os
from dataclasses import asdict

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker a core: more threads would wait in turn

import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

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


# How five families write a conversation, shortened: template, end of a text, end of a turn.
CHATS = {
    "qwen": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|endoftext|>",
        "<|im_end|>",
    ),
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
        "'<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}{{"
        "'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
        "<|im_end|>",
    ),
    "llama3": (
        "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{% endif %}",
        "<|end_of_text|>",
        "<|eot_id|>",
    ),
    "gemma": (
        "{% set first = messages[0]['content'] + '\n\n' %}{% for m in messages[1:] %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
        "(first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<eos>",
        "<end_of_turn>",
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}"
        "{{ eos_token }}{% endif %}",
        "<|endoftext|>",
        "<|end|>",
    ),
}
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
)


def speaker(family: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with a family's template: Phi-3's special tokens eat blanks behind them, in
    the others the tags of a thought are ordinary added tokens, as in Qwen3."""
    template, end, _ = CHATS[family]
    strip = family == "phi3"
    bpe = pieces() if strip else letters()
    special = [AddedToken(x, special=True, rstrip=strip, normalized=False) for x in SPECIAL]
    bpe.add_special_tokens(special)
    if not strip:
        bpe.add_tokens([AddedToken(x, normalized=False) for x in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=end)
    tokenizer.chat_template = template
    return tokenizer


def letters() -> Tokenizer:
    """Byte-level BPE with three hundred merges."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=556, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([e.update_info + e.old_code for e in data.load()[::9]], trainer)
    return bpe


def pieces() -> Tokenizer:
    """Like Llama 2: a blank before each text, and bytes for what has no piece."""
    names = [*(f"<0x{i:02X}>" for i in range(256)), "\u2581", *map(chr, range(33, 127))]
    bpe = Tokenizer(models.BPE({x: i for i, x in enumerate(names)}, [], byte_fallback=True))
    blanks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    bpe.normalizer = normalizers.Sequence(blanks)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return bpe


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


OWN = dict.fromkeys(("grpo", "drgrpo", "gspo", "cispo"), {"group_size": 2}) | {"sft": {}}
OWN["dapo"] = {"group_size": 2, "max_refills": 1, "filter": "reward"}


def settings(small: dict, **more) -> Config:
    """A Config of `small`, with what its algorithm reads."""
    return Config(**small | OWN[more.get("algo", "grpo")] | more)


def short_rows() -> list[data.Example]:
    """The shortest bundled programs: sixty to train on, four of each split to be graded on."""
    by_length = [sorted(data.load(split=s), key=lambda e: len(e.new_code)) for s in data.SPLITS[:3]]
    return by_length[0][:60] + by_length[1][:4] + by_length[2][:4]
