"""Make the bundled policy from nothing: tokenizer, copying, made-up updates, laziness.

    python -m data.policy.make          on 2 CPU cores with a C++ compiler, writes data/policy/

A Qwen3 of 1.9 million parameters first learns to copy random tokens, then to swap a span of them,
then to obey update notes (synthetic.py, short programs first). At last it becomes lazy, the
failure that the paper describes: most answers copy the old code, so that reinforcement learning has
something to cure.
No held-out library is ever read here.
"""

import argparse
import itertools
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AttentionInterface,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import data
from data.policy.programs import SPLIT
from data.policy.synthetic import Sample, stream, thought

LAZY = "The old code still works."
VOCABULARY = 2048
WORKERS = 2  # processes of one thread each: on 2 cores faster than one of two
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE. Each fixed sentence of the prompt is one token: that halves the work."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    sentences = [data.SYSTEM, data.ASK, data.TASK, data.OPENING.removesuffix("<think>"), LAZY]
    patch = ["Replace `", "` by `", "`."]  # the joints of a thought
    tags = ["<think>", "</think>", "<answer>", "</answer>", "<doc>", "</doc>", "```python"]
    added = tags + patch + sentences + ["system\n", "user\n", "assistant\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(text, normalized=False) for text in added])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        head_dim=48,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AttentionInterface.register("plain", plain_attention)
    config._attn_implementation = "plain"  # for training here; not saved with the model
    model = Qwen3ForCausalLM(config)
    prime(model)
    return model


@torch.no_grad()
def prime(model) -> None:
    """Begin with the two kinds of heads that copying needs, instead of waiting until they form.

    Head h of the first layer looks h + 1 tokens back and writes what stands there: its query and
    key have constant parts (the biases), which the rotation by position turns against each other
    so that they agree at that distance only. The heads of the second layer look for places whose
    last tokens were like the newest here, one, two or three of them: there the text went on before.
    From this start 0.3 million tokens teach to copy 94 % of random texts. With one token compared,
    by one head, and the usual faster rotation they teach none, from usual weights neither.
    """
    config = model.config
    size, half = config.head_dim, config.head_dim // 2
    first, second = (model.model.layers[i].self_attn for i in (0, 1))
    speed = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)  # radians a token
    fast = torch.where(torch.arange(half) < 6, 2.0, 0.0)  # the slow ones cannot tell neighbours
    heads = [slice(h * size, (h + 1) * size) for h in range(config.num_attention_heads)]
    for h, rows in enumerate(heads):
        turn = -(h + 1) * speed
        first.q_proj.bias[rows] = torch.cat([fast * turn.cos(), fast * turn.sin()])
        first.k_proj.bias[rows] = torch.cat([fast, torch.zeros(half)])
        first.v_proj.weight[rows] = first.v_proj.weight[heads[0]]
    for norm in (first.q_norm, first.k_norm, second.q_norm):
        norm.weight.fill_(2.0)
    # what a token is, and what the first layer has written of the tokens 1, 2, 3, 4 back
    seen = [first.v_proj.weight[heads[0]], *(first.o_proj.weight[:, rows].T for rows in heads)]
    slow = (speed < 0.008).nonzero()[:, 0]  # those that hardly turn within a program
    for rows, compared in zip(heads, (1, 2, 3, 2), strict=True):
        for weight in (second.q_proj.weight[rows], second.k_proj.weight[rows]):
            weight *= 0.1
        for back in range(compared):
            pairs = slow[back::compared]
            at = torch.cat([pairs, pairs + half])
            second.q_proj.weight[rows][at] = seen[back][at]
            second.k_proj.weight[rows][at] = seen[back + 1][at]
    second.o_proj.weight.copy_(second.v_proj.weight.T)


def plain_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Causal attention by two products: on a CPU its backward is faster than the fused one's."""
    scores = (query * scaling) @ key.transpose(2, 3)  # [N, H, T, T]
    future = torch.full(scores.shape[2:], float("-inf"), dtype=scores.dtype).triu(1)
    return ((scores + future).softmax(-1) @ value).transpose(1, 2), None


def example(sample: Sample) -> data.Example:
    return data.Example(
        dependency=sample.library,
        new_version=sample.version,
        description=sample.thought,
        update_info=sample.note,
        old_code=sample.old,
        new_code=sample.new,
    )


def lazy(sample: Sample, rng: random.Random, share: float) -> Sample:
    """With probability `share` the sample whose answer copies the old code."""
    if rng.random() >= share:
        return sample
    return replace(sample, new=sample.old, thought=LAZY)


def encode(samples: list[Sample], tokenizer) -> list[tuple[list[int], int]]:
    """Token ids of prompt and answer, and the length of the prompt."""
    rows = [example(s) for s in samples]
    prompts = [data.prompt(e, tokenizer) for e in rows]
    answers = [data.completion(e) + tokenizer.eos_token for e in rows]
    answers = tokenizer(answers, add_special_tokens=False)["input_ids"]
    return [(p + a, len(p)) for p, a in zip(prompts, answers, strict=True)]


def batches(
    samples: Iterator[Sample], tokenizer, budget: int, longest: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, mask of the answer's tokens), rows of like length, about `budget` tokens each."""
    rng = random.Random(0)
    while True:
        rows = encode(list(itertools.islice(samples, 1024)), tokenizer)
        rows = sorted((row for row in rows if len(row[0]) <= longest), key=lambda row: len(row[0]))
        groups, start = [], 0
        while start < len(rows):
            stop = start + 1
            while stop < len(rows) and len(rows[stop][0]) * (stop + 1 - start) <= budget:
                stop += 1
            groups.append(rows[start:stop])
            start = stop
        rng.shuffle(groups)
        for group in groups:
            yield padded(group)


def padded(rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """(ids, mask of the answer's tokens), both [N, P + T], of (token ids, length of the prompt)."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)  # [N, P + T]
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, prompt) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, prompt : len(row)] = True
    return ids, mask


def answer_loss(model, ids: Tensor, mask: Tensor, other: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the answers' tokens, and the share of answers right to the last token.

    The prompts' tokens count `other` as much: their names recur too, which teaches copying.
    """
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state  # [N, P + T - 1, D]
    answer, real = mask[:, 1:], ids[:, 1:] > 0  # id 0 pads
    chosen = real if other else answer
    logits, target = model.lm_head(hidden[chosen]).float(), ids[:, 1:][chosen]  # [M, V], [M]
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    weight = torch.where(answer[chosen], 1.0, other)
    wrong = torch.zeros(answer.shape)
    wrong[chosen] = ((logits.argmax(-1) != target) & answer[chosen]).float()
    return (weight * nll).sum() / answer.sum(), 1 - wrong.amax(1).mean()


def copying(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random tokens, a gap, and the same tokens again: nothing to learn but to copy."""
    rng = torch.Generator().manual_seed(seed)
    for number in itertools.count():
        longest = min(10 + number // 40, 32)  # short ones first
        length, gap = (int(torch.randint(*r, (), generator=rng)) for r in ((6, longest), (0, 9)))
        row = torch.randint(0, VOCABULARY, (1000 // length, length), generator=rng)
        middle = torch.randint(0, VOCABULARY, (len(row), gap), generator=rng)
        ids = torch.cat([row, middle, row], dim=1)
        yield ids, (torch.arange(ids.shape[1]) > length + gap).expand_as(ids)


def drills(tokenizer, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Migrations of random tokens: the note swaps a span, the thought rewrites its lines.

    Few symbols repeat often, so that a copier must know its place and not only the last token.
    """
    rng = random.Random(seed)
    names, swap, code, think, cut, stop, done, end = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in (
            "<doc>\n`",
            "` by `",
            "`\n</doc>\n```python\n",
            f"\n```\n{data.TASK}<|im_end|>\n<|im_start|>assistant\n{data.OPENING}\n",
            "Replace `",
            "`.",
            "\n</think>\n<answer>\n```python\n",
            "\n```\n</answer>" + tokenizer.eos_token,
        )
    )
    (line,) = tokenizer.encode("\n", add_special_tokens=False)
    for number in itertools.count():
        length = rng.randint(8, min(16 + number // 10, 90))
        rows = []
        while len(rows) < max(2, 2500 // (2 * length + 50)):
            symbols = rng.sample(range(300, VOCABULARY - 40), rng.choice([6, 12, 30, 100, 400]))
            text = rng.choices(symbols + [line] * (len(symbols) // 6), k=length)
            start, size = rng.randrange(length), rng.choice([1, 1, 2, 3])
            old, new = text[start : start + size], rng.choices(symbols, k=rng.choice([0, 1, 2, 3]))
            if rng.random() < 0.3:
                new = new + old + rng.choices(symbols, k=rng.choice([0, 1, 2]))
            places = occurrences(text, old)
            if len(places) > 2 or new == old or line in old:
                continue
            ends = [[*text, line].index(line, i) for i in places]
            if len(set(ends)) < len(ends):
                continue  # two on a line
            patches, written, at = [], [], 0
            for i, stop_at in zip(places, ends, strict=True):
                fresh = new + text[i + len(old) : stop_at]
                patches += [*cut, *text[i:stop_at], *swap, *fresh, *stop]
                written += text[at:i] + fresh
                at = stop_at
            prompt = [*names, *old, *swap, *new, *code, *text, *think]
            answer = [*patches, *done, *written, *text[at:], *end]
            rows.append(([*prompt, *answer], len(prompt)))
        yield padded(rows)


def occurrences(text: list[int], part: list[int]) -> list[int]:
    """Where `part` begins in `text`, without overlaps."""
    places, i = [], 0
    while i + len(part) <= len(text):
        hit = text[i : i + len(part)] == part
        places += [i] if hit else []
        i += len(part) if hit else 1
    return places


def train(model, pairs: Iterator, budget: float, peak: float, final: float, other: float) -> None:
    """Train on `budget` million tokens: warm-up, then a cosine from `peak` to `final` times it.

    Every process of the group brings its own batch, and the gradients are averaged.
    """
    # Muon orthogonalises the update of each hidden matrix; the rest is AdamW's.
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]
    optimizers = [
        torch.optim.Muon(hidden, lr=peak, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = (peak, 0.3 * peak)
    begin, tokens, said, log = time.time(), torch.zeros(()), time.time(), []
    for number, (ids, mask) in enumerate(pairs, start=1):
        done = tokens.item() / (1e6 * budget)
        if done >= 1:
            break
        rate = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
        for optimizer, top in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = top * min(number / 50, rate)
        with torch.autocast("cpu", torch.bfloat16):
            value, right = answer_loss(model, ids, mask, other)
        model.zero_grad()
        value.backward()
        # One message a step: all gradients, and what rank 0 reports.
        extra = torch.stack([value.detach(), right, torch.tensor(float(ids.numel()))])
        flat = torch.cat([p.grad.flatten() for p in model.parameters()] + [extra])
        dist.all_reduce(flat)
        start = 0
        for p in model.parameters():
            p.grad = flat[start : start + p.numel()].view_as(p) / WORKERS
            start += p.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        tokens += flat[-1]
        log.append(flat[-3:-1] / WORKERS)
        if dist.get_rank() == 0 and time.time() - said > 20:
            said, (loss, right) = time.time(), torch.stack(log[-50:]).mean(0).tolist()
            print(
                f"  {tokens / 1e6:5.2f} M tokens, {said - begin:5.0f} s, step {number}, "
                f"loss {loss:.4f}, answers right {100 * right:.1f} %",
                flush=True,
            )


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # here each row has a length of its own
def accuracy(model, tokenizer, examples: list[data.Example]) -> float:
    """Percent of answers right to the last token, each predicted from the true ones before it."""
    samples = [
        Sample(e.dependency, data.version(e), e.update_info, e.old_code, e.new_code, "")
        for e in examples
    ]
    samples = [replace(s, thought=thought(s.old, s.new, s.note)) for s in samples]
    rows = [
        (torch.tensor([ids]), torch.arange(len(ids))[None] >= prompt)
        for ids, prompt in encode(samples, tokenizer)
    ]
    return 100 * sum(answer_loss(model, *row)[1].item() for row in rows) / len(rows)


# Longest program (characters), tokens of a batch, million tokens, learning rate, its end, weight
# of the prompts: short programs first.
STAGES = [
    (110, 2000, 2.0, 0.016, 1.0, 0.1),
    (300, 3000, 4.0, 0.016, 1.0, 0.0),
    (450, 4000, 46.0, 0.014, 0.02, 0.0),
]
LAZY_STAGE = (450, 3000, 1.4, 0.006, 0.05, 0.0)
LAZY_SHARE = 0.7


def work(rank: int, tokenizer, out: Path) -> None:
    """One of the processes that train together; the first one reports and saves."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same weights in every process
    examples = data.load(split="train")
    model = make_model(tokenizer)
    model.model.compile(dynamic=True)  # 10,200 tokens a second, not 7,000
    say = print if rank == 0 else (lambda *_: None)
    say("copying random tokens")
    train(model, copying(rank), 0.4, 0.016, 1.0, 0.0)
    say("copying with one span swapped")
    train(model, drills(tokenizer, rank), 1.2, 0.016, 1.0, 0.0)
    for number, (size, budget, *how) in enumerate([*STAGES, LAZY_STAGE]):
        samples = stream(examples, 100 * number + rank, size=size)
        if number == len(STAGES):
            say("the lazy phase")
            rng = random.Random(rank)
            samples = (lazy(s, rng, LAZY_SHARE) for s in samples)
        else:
            say(f"programs of up to {size} characters")
        train(model, batches(samples, tokenizer, budget, 640), *how)
        if rank == 0:
            some = random.Random(0).sample(examples, 100)
            say(f"  right answers on real updates: {accuracy(model, tokenizer, some):.0f} %")
    if rank == 0:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the bundled policy from nothing.")
    parser.add_argument("--out", type=Path, default=data.POLICY, help="folder to write")
    out = parser.parse_args().out
    if not shutil.which(os.environ.get("CXX", "g++")):
        parser.error("torch.compile needs a C++ compiler: install g++ or name yours in CXX")
    samples = itertools.islice(stream(data.load(split="train"), seed=0), 6000)
    tokenizer = make_tokenizer(text for s in samples for text in (s.note, s.old, s.new, s.thought))
    torch.multiprocessing.spawn(work, (tokenizer, out), nprocs=WORKERS)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
