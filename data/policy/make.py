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
from dataclasses import dataclass, replace
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
Row = tuple[list[int], int]  # token ids of prompt and answer, length of the prompt
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
    """A small Qwen3 with random weights, but for the heads that `prime` prepares."""
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
def prime(model: Qwen3ForCausalLM) -> None:
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
    """Causal attention by two products: on a CPU its backward is faster than the fused one's.

    Transformers gives query, key and value as [N, H, T, D] and takes back [N, T, H, D].
    """
    scores = (query * scaling) @ key.transpose(2, 3)  # [N, H, T, T]
    future = torch.full(scores.shape[2:], float("-inf"), dtype=scores.dtype).triu(1)
    return ((scores + future).softmax(-1) @ value).transpose(1, 2), None


def example(sample: Sample) -> data.Example:
    """The sample as a row of the data set, its thought as the description."""
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


def encode(samples: list[Sample], tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    """Token ids of prompt and answer, and the length of the prompt."""
    rows = [example(s) for s in samples]
    prompts = [data.prompt(e, tokenizer) for e in rows]
    answers = [data.completion(e) + tokenizer.eos_token for e in rows]
    answers = tokenizer(answers, add_special_tokens=False)["input_ids"]
    return [(p + a, len(p)) for p, a in zip(prompts, answers, strict=True)]


def batches(
    samples: Iterator[Sample], tokenizer: PreTrainedTokenizerFast, size: int, longest: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, mask of the answer's tokens), rows of like length, about `size` tokens each.

    Rows of more than `longest` tokens are left out.
    """
    rng = random.Random(0)
    while True:
        rows = encode(list(itertools.islice(samples, 1024)), tokenizer)
        groups = alike([row for row in rows if len(row[0]) <= longest], size)
        rng.shuffle(groups)
        for group in groups:
            yield padded(group)


def alike(rows: list[Row], size: int) -> list[list[Row]]:
    """The rows by length, cut into groups that hold about `size` tokens once they are padded."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if groups and len(row[0]) * (len(groups[-1]) + 1) <= size:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def padded(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """(ids, mask of the answer's tokens), both [N, P + T]; id 0 pads."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)  # [N, P + T]
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, prompt) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, prompt : len(row)] = True
    return ids, mask


def answer_loss(
    model: Qwen3ForCausalLM, ids: Tensor, mask: Tensor, prompts: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the answers' tokens, and the share of answers right to the last token.

    The prompts' tokens count `prompts` as much: their names recur too, which teaches copying.
    """
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state  # [N, P + T - 1, D]
    answer, real = mask[:, 1:], ids[:, 1:] > 0  # id 0 pads
    chosen = real if prompts else answer
    logits, target = model.lm_head(hidden[chosen]).float(), ids[:, 1:][chosen]  # [M, V], [M]
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    weight = torch.where(answer[chosen], 1.0, prompts)
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


# The fixed texts between the parts of a drill, as `data.prompt` and `data.completion` write them.
JOINTS = {
    "note": "<doc>\n`",  # then the old span
    "by": "` by `",  # then the new one
    "code": "`\n</doc>\n```python\n",  # then the program
    "thought": f"\n```\n{data.TASK}<|im_end|>\n<|im_start|>assistant\n{data.OPENING}\n",
    "patch": "Replace `",  # of the thought, one for each line that changes; `by` stands in it too
    "stop": "`.",
    "answer": "\n</think>\n<answer>\n```python\n",  # then the new program
    "end": "\n```\n</answer><|im_end|>",
    "line": "\n",
}


def drills(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Migrations of random tokens: the note swaps a span, the thought rewrites its lines."""
    rng = random.Random(seed)
    joint = {key: tokenizer.encode(text, add_special_tokens=False) for key, text in JOINTS.items()}
    for number in itertools.count():
        length = rng.randint(8, min(16 + number // 10, 90))  # short ones first
        rows: list[Row] = []
        while len(rows) < max(2, 2500 // (2 * length + 50)):
            row = drill(rng, joint, length)
            rows += [row] if row else []
        yield padded(rows)


def drill(rng: random.Random, joint: dict[str, list[int]], length: int) -> Row | None:
    """One migration of `length` random tokens; None where the swap is not clear.

    Few symbols repeat often, so that a copier must know its place and not only the last token.
    """
    (line,) = joint["line"]
    symbols = rng.sample(range(300, VOCABULARY - 40), rng.choice([6, 12, 30, 100, 400]))
    text = rng.choices(symbols + [line] * (len(symbols) // 6), k=length)
    old, new = swap(rng, text, symbols)
    places = occurrences(text, old)
    if len(places) > 2 or new == old or line in old:
        return None
    ends = [[*text, line].index(line, place) for place in places]
    if len(set(ends)) < len(ends):  # two on a line
        return None
    patches, written, done = [], [], 0
    for place, end in zip(places, ends, strict=True):
        fresh = new + text[place + len(old) : end]
        patches += joint["patch"] + text[place:end] + joint["by"] + fresh + joint["stop"]
        written += text[done:place] + fresh
        done = end
    written += text[done:]
    prompt = joint["note"] + old + joint["by"] + new + joint["code"] + text + joint["thought"]
    answer = patches + joint["answer"] + written + joint["end"]
    return prompt + answer, len(prompt)


def swap(rng: random.Random, text: list[int], symbols: list[int]) -> tuple[list[int], list[int]]:
    """A span of one to three tokens of `text`, and what replaces or surrounds it."""
    start, size = rng.randrange(len(text)), rng.choice([1, 1, 2, 3])
    old, new = text[start : start + size], rng.choices(symbols, k=rng.choice([0, 1, 2, 3]))
    if rng.random() < 0.3:
        new = new + old + rng.choices(symbols, k=rng.choice([0, 1, 2]))
    return old, new


def occurrences(text: list[int], part: list[int]) -> list[int]:
    """Where `part` begins in `text`, without overlaps."""
    places, i = [], 0
    while i + len(part) <= len(text):
        hit = text[i : i + len(part)] == part
        places += [i] if hit else []
        i += len(part) if hit else 1
    return places


@dataclass(frozen=True)
class Schedule:
    """How long one phase trains, and how fast."""

    tokens: float  # how many, in millions, prompts and padding included
    rate: float  # learning rate after the warm-up of 50 steps
    final: float = 1.0  # the share of it that a cosine leaves at the end
    prompts: float = 0.0  # how much the prompts' tokens count in the loss


def train(model: Qwen3ForCausalLM, pairs: Iterator[tuple[Tensor, Tensor]], plan: Schedule) -> None:
    """Train on pairs of (ids, mask of the answer's tokens) as `plan` says.

    Every process of the group brings its own batch, and the gradients are averaged.
    """
    optimizers = make_optimizers(model, plan.rate)
    begin, said, tokens, log = time.time(), time.time(), torch.zeros(()), []
    for number, (ids, mask) in enumerate(pairs, start=1):
        done = tokens.item() / (1e6 * plan.tokens)
        if done >= 1:
            break
        cosine = plan.final + (1 - plan.final) * 0.5 * (1 + math.cos(math.pi * done))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * min(number / 50, cosine)
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = answer_loss(model, ids, mask, plan.prompts)
        model.zero_grad()
        loss.backward()
        extra = torch.stack([loss.detach(), right, torch.tensor(float(ids.numel()))])
        extra = average_gradients(model, extra)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        tokens += extra[2]
        log.append(extra[:2] / WORKERS)
        if dist.get_rank() == 0 and time.time() - said > 20:
            said, (loss, right) = time.time(), torch.stack(log[-50:]).mean(0).tolist()
            print(
                f"  {tokens / 1e6:5.2f} M tokens, {said - begin:5.0f} s, step {number}, "
                f"loss {loss:.4f}, answers right {100 * right:.1f} %",
                flush=True,
            )


def make_optimizers(model: Qwen3ForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon, which orthogonalises the update of each hidden matrix, and AdamW for the rest."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]
    return [
        torch.optim.Muon(hidden, lr=rate, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=0.3 * rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def average_gradients(model: Qwen3ForCausalLM, extra: Tensor) -> Tensor:
    """Average the gradients over the processes. Returns the sum of their `extra` numbers, [K].

    One message holds all: that is faster than one a parameter.
    """
    parameters = list(model.parameters())
    flat = torch.cat([p.grad.flatten() for p in parameters] + [extra])
    dist.all_reduce(flat)
    *gradients, extra = flat.split([p.numel() for p in parameters] + [len(extra)])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter) / WORKERS
    return extra


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # here each row has a length of its own
def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[data.Example]
) -> float:
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


@dataclass(frozen=True)
class Stage:
    """One phase of made-up updates."""

    size: int  # about the longest program, in characters
    batch: int  # about how many tokens each process learns from in a step
    plan: Schedule


COPYING = Schedule(0.4, 0.016)
DRILLS = Schedule(1.2, 0.016)
STAGES = [  # short programs first
    Stage(110, 2000, Schedule(2.0, 0.016, prompts=0.1)),
    Stage(300, 3000, Schedule(4.0, 0.016)),
    Stage(450, 4000, Schedule(46.0, 0.014, final=0.02)),
]
LAZY_STAGE = Stage(450, 3000, Schedule(1.4, 0.006, final=0.05))
LAZY_SHARE = 0.7
LONGEST = 640  # tokens of prompt and answer


def work(rank: int, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
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
    train(model, copying(rank), COPYING)
    say("copying with one span swapped")
    train(model, drills(tokenizer, rank), DRILLS)
    for number, stage in enumerate([*STAGES, LAZY_STAGE]):
        samples = stream(examples, 100 * number + rank, size=stage.size)
        if stage is LAZY_STAGE:
            say("the lazy phase")
            rng = random.Random(rank)
            samples = (lazy(sample, rng, LAZY_SHARE) for sample in samples)
        else:
            say(f"programs of up to {stage.size} characters")
        train(model, batches(samples, tokenizer, stage.batch, LONGEST), stage.plan)
        if rank == 0:
            some = random.Random(0).sample(examples, 100)
            say(f"  right answers on real updates: {accuracy(model, tokenizer, some):.0f} %")
    if rank == 0:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    dist.destroy_process_group()


def main() -> None:
    """Read the command line, make the tokenizer, and train in WORKERS processes."""
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
