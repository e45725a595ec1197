"""How fast: ours and the alternative in turn, on the same model, prompts and settings.

    python tests/bench_speed.py rollout     sampling over transformers' generate
    python tests/bench_speed.py update      packed scoring and gradient over one row per sample
    python tests/bench_speed.py reward      edit distance over a pure-Python table (and RapidFuzz)
    python tests/bench_speed.py step        a whole GRPO step over TRL's (pip install trl)
    python tests/bench_speed.py memory      peak of the update at a vocabulary of 152 thousand
    python tests/bench_speed.py trees --against PATH --model RUN/checkpoint
                                            this tree over another checkout of the project

`--model` takes the bundled policy, a folder or a shape filled with random weights. After a warm-up
each pair runs `--repeats` times, alternating; the ratio is that of the medians.
"""

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import grpo  # noqa: E402
import recode  # noqa: E402
import reward  # noqa: E402
from rollout import Rollout, packs, sample, token_logp  # noqa: E402
from upkeep import run  # noqa: E402

# hidden size, width of the MLP, layers, query heads, key heads, vocabulary, tied head
SHAPES = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
    "wide-vocabulary": (192, 384, 4, 4, 4, 152064, True),
}


# ---------------------------------------------------------------- measuring


class Peak:
    """Peak memory inside the block above that at its start, bytes: of the GPU or the process."""

    def __init__(self, device: str):
        self.device, self.bytes = device, 0

    def __enter__(self):
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not count as held
        self.start, self.over = resident(), threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.002):
            self.bytes = max(self.bytes, resident() - self.start)

    def __exit__(self, *error):
        if self.device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.start
        else:
            self.over.set()
            self.watcher.join()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def timed(work: Callable, device: str) -> tuple[float, int, object]:
    """Seconds, peak memory in bytes, and what `work` returned."""
    with Peak(device) as peak:
        begin = time.perf_counter()
        result = work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return seconds, peak.bytes, result


def race(title: str, ours: Callable, theirs: Callable, args, size: Callable = lambda r: 1) -> float:
    """Run both in turn and print medians of seconds per unit of `size(result)` and their ratio."""
    lines = {"ours": ours, "theirs": theirs}
    costs, peaks = ({name: [] for name in lines} for _ in range(2))
    for turn in range(args.repeats + 1):
        for name, work in lines.items():
            seconds, peak, result = timed(work, args.device)
            if turn:  # the first is the warm-up
                costs[name].append(seconds / size(result))
                peaks[name].append(peak)
    median = {name: statistics.median(found) for name, found in costs.items()}
    ratio = median["theirs"] / median["ours"]
    print(f"| {title} | median | spread | peak memory |\n|---|---|---|---|")
    for name, found in costs.items():
        spread = f"{pretty(min(found))} to {pretty(max(found))}"
        memory = f"{max(peaks[name]) / 1e6:.0f} MB"
        print(f"| {name} | {pretty(median[name])} | {spread} | {memory} |")
    print(f"| **ratio** | **{ratio:.2f}** | | |\n")
    return median["ours"]


def pretty(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def bandwidth(device: str) -> float:
    """Bytes a second that a copy reads and writes."""
    a = torch.empty(2**28, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    seconds = statistics.median(timed(lambda: b.copy_(a), device)[0] for _ in range(9))
    return 2 * a.numel() / seconds


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    side = 8192 if device == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    seconds = statistics.median(timed(lambda: a @ a, device)[0] for _ in range(9))
    return 2 * side**3 / seconds


# ---------------------------------------------------------------- what is measured


def load(args):
    """The model, and (for a folder) its tokenizer."""
    if args.model in SHAPES:
        hidden, mlp, layers, heads, keys, vocabulary, tied = SHAPES[args.model]
        config = Qwen2Config(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=keys,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
        )
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        with torch.device(args.device):
            return Qwen2ForCausalLM(config).to(dtype).eval(), None
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    return model.to(args.device).eval(), AutoTokenizer.from_pretrained(args.model)


def settings(args) -> tuple:
    """Model, prompts [B], end ids, pad id, samples a prompt, longest completion.

    Real prompts and end tokens where there is a tokenizer; else random ones that never end.
    """
    model, tokenizer = load(args)
    if tokenizer is None:
        numbers = random.Random(0)
        prompts = [[numbers.randrange(1000, 9000) for _ in range(256)] for _ in range(8)]
        return model, prompts, [model.config.vocab_size - 1], 0, 8, args.tokens
    rows = random.Random(0).sample(data.load(split="train"), 16)
    prompts = [data.prompt(e, tokenizer) for e in rows]
    return model, prompts, [tokenizer.eos_token_id], tokenizer.pad_token_id, 8, 384


def bench_rollout(args) -> None:
    model, prompts, eos, pad, G, T = settings(args)
    ids, attention = left_padded(prompts, pad, args.device)

    def ours() -> Rollout:
        return sample(model, prompts, group_size=G, max_new_tokens=T, eos_ids=eos, pad_id=pad)

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        return model.generate(
            input_ids=ids,
            attention_mask=attention,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=G,
            max_new_tokens=T,
            eos_token_id=eos,
            pad_token_id=pad,
            use_cache=True,
        )[:, ids.shape[1] :]

    def tokens(result) -> int:
        """Tokens chosen, up to and with the end token."""
        if isinstance(result, Rollout):
            return int(result.mask.sum())
        ends = torch.isin(result, torch.tensor(eos, device=result.device)).long()
        return int((ends.cumsum(1) - ends == 0).sum())

    cost = race(f"sampling, {len(prompts)} x {G}, time a token", ours, theirs, args, tokens)
    if args.device == "cuda":
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        share = weights / (len(prompts) * G * cost) / bandwidth(args.device)
        print(f"decoding reads the weights at {100 * share:.0f} % of the measured copy bandwidth")


def bench_update(args) -> None:
    model, prompts, eos, pad, G, T = settings(args)
    model.train()
    rollout = sample(model, prompts, group_size=G, max_new_tokens=T, eos_ids=eos, pad_id=pad)
    adv = torch.randn(len(prompts), G, 1, device=args.device)
    weight = grpo.token_weight(rollout.mask)

    def gradients(logp_of: Callable) -> list[torch.Tensor]:
        model.zero_grad()
        for groups in packs(rollout, 2048):
            logp = logp_of(groups)
            loss, _ = grpo.loss(logp, rollout.logp[groups], adv[groups], weight[groups])
            loss.backward()
        return [p.grad for p in model.parameters()]

    def ours() -> list[torch.Tensor]:
        return gradients(lambda groups: token_logp(model, rollout, groups))

    def theirs() -> list[torch.Tensor]:
        return gradients(lambda groups: padded_logp(model, rollout, groups, pad))

    mine = [g.clone() for g in ours()]  # the next run overwrites them
    far = max((a - b).abs().max().item() for a, b in zip(mine, theirs(), strict=True))
    print(f"largest difference of a gradient: {far:.1e}")
    cost = race("log-probabilities, loss and gradient", ours, theirs, args)
    if args.device == "cuda":
        work = 6 * sum(p.numel() for p in model.parameters())
        tokens = sum(map(len, prompts)) + int(rollout.mask.sum())
        share = work * tokens / cost / matrix_rate(args.device, next(model.parameters()).dtype)
        print(f"the update runs at {100 * share:.0f} % of the measured matrix rate")


def left_padded(prompts: list[list[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, P] filled up on the left, and 1 where a real token stands [B, P]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, seen


def padded_logp(model, rollout: Rollout, groups: list[int], pad: int) -> torch.Tensor:
    """What other trainers do: every sample a row with its own copy of the prompt. -> [b, G, T]"""
    mask = rollout.mask[groups]
    T = int(mask.sum(-1).max())
    prompts = left_padded([rollout.prompts[b] for b in groups], pad, model.device)
    left, seen = (x.repeat_interleave(mask.shape[1], dim=0) for x in prompts)  # [N, P]
    tokens = rollout.tokens[groups, :, :T].flatten(0, 1)  # [N, T]
    seen = torch.cat([seen, mask[:, :, :T].flatten(0, 1)], dim=1)
    logits = model(
        input_ids=torch.cat([left, tokens], dim=1), attention_mask=seen, logits_to_keep=T + 1
    ).logits[:, :-1]  # [N, T, V]
    logp = -F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none")
    logp = logp.view(len(groups), -1, T).where(mask[:, :, :T], 0.0)
    return F.pad(logp, (0, mask.shape[2] - T))


def table_distance(a: str, b: str) -> int:
    """The textbook table, one cell at a time."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    table[0] = list(range(len(b) + 1))
    for i in range(1, len(a) + 1):
        table[i][0] = i
        for j in range(1, len(b) + 1):
            change = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, change)
    return table[-1][-1]


def bench_reward(args) -> None:
    letters, numbers = "abcdefgh_(). =\n", random.Random(0)

    def pairs(count: int) -> tuple[list[str], list[str]]:
        texts = ["".join(numbers.choices(letters, k=1000)) for _ in range(2 * count)]
        return texts[::2], texts[1::2]

    few, many = pairs(64), pairs(4096)
    once = argparse.Namespace(**{**vars(args), "repeats": min(args.repeats, 3)})
    race(
        "64 pairs of 1,000 characters, over a Python table",
        lambda: reward.levenshtein(*few, device=args.device).tolist(),
        lambda: [table_distance(a, b) for a, b in zip(*few, strict=True)],
        once,
    )
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        print("RapidFuzz is not installed: `pip install rapidfuzz` to compare with it")
        return
    for name, some in (("64", few), ("4,096", many)):
        race(
            f"{name} pairs of 1,000 characters, over RapidFuzz on one core",
            lambda some=some: reward.levenshtein(*some, device=args.device).tolist(),
            lambda some=some: [Levenshtein.distance(a, b) for a, b in zip(*some, strict=True)],
            once,
        )


def bench_step(args) -> None:
    """128 samples, the reward, the reference, two optimizer steps: the default run's step."""
    config = recode.Config(model=args.model, steps=args.repeats + 1, device=args.device)
    policy, state = run.start(config)
    parts, judge = [], recode.score

    def timed_judge(*what):
        seconds, _, found = timed(lambda: judge(*what), args.device)
        parts.append(seconds)
        return found

    recode.score = timed_judge
    ours = [row["seconds"] for row in recode.train(config, policy, state)][1:]
    recode.score = judge
    share = sum(parts[1:]) / sum(ours)
    print(f"ours: {pretty(statistics.median(ours))} a step, the reward {100 * share:.2f} % of it")
    theirs = trl_steps(args, config)
    print("| one GRPO step | median | spread |\n|---|---|---|")
    for name, found in (("ours", ours), ("TRL", theirs)):
        spread = f"{pretty(min(found))} to {pretty(max(found))}"
        print(f"| {name} | {pretty(statistics.median(found))} | {spread} |")
    print(f"| **ratio** | **{statistics.median(theirs) / statistics.median(ours):.2f}** | |")


def trl_steps(args, config) -> list[float]:
    """Seconds of each of TRL's rollouts with its optimizer steps, on the same batch."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = random.Random(config.seed).sample(
        data.load(split="train"), config.prompts * config.steps
    )
    prompts = [tokenizer.decode(data.prompt(e, tokenizer)) for e in rows]
    dataset = Dataset.from_dict({"prompt": prompts, "target": [e.new_code for e in rows]})

    def score(completions: list[str], target: list[str], **_) -> list[float]:
        return reward.score(completions, target, config.correctness, args.device)["total"].tolist()

    begins = []

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            begins.append(time.perf_counter())
            return super()._generate_and_score_completions(inputs)

    batch = config.prompts * config.group_size
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            use_cpu=args.device == "cpu",
            bf16=False,
            per_device_train_batch_size=batch // config.minibatches,
            steps_per_generation=config.minibatches,
            num_generations=config.group_size,
            max_completion_length=config.max_new_tokens,
            max_steps=config.minibatches * config.steps,
            learning_rate=config.lr,
            beta=config.beta,
            temperature=config.temperature,
            gradient_checkpointing=False,
            loss_type="grpo",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        Timed(
            model=model,
            reward_funcs=score,
            args=settings,
            train_dataset=dataset,
            processing_class=tokenizer,
        ).train()
    ends = [*begins[1:], time.perf_counter()]
    return [end - begin for begin, end in zip(begins, ends, strict=True)][1:]


def bench_memory(args) -> None:
    """The update of 8 completions of 1,024 tokens, above model, gradients and what is sampled."""
    args.model = "wide-vocabulary"
    model, _ = load(args)
    tokens = torch.randint(0, 150_000, (1, 8, 1024), device=args.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    prompts = [list(range(128))]
    length, logp = mask.sum(-1), torch.zeros(mask.shape)
    rollout = Rollout(prompts, tokens, mask, logp, length, mask[..., 0], length)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def update() -> None:
        logp = token_logp(model, rollout, [0])
        loss, _ = grpo.loss(logp, logp.detach(), torch.ones(1, 8, 1).to(logp), mask / mask.sum())
        loss.backward()

    seconds, peak, _ = timed(update, args.device)
    logits = 4 * tokens.numel() * model.config.vocab_size
    print(f"peak of the update: {peak / 1e9:.2f} GB, in {seconds:.0f} s")
    print(f"all logits at once would be {logits / 1e9:.1f} GB, and their gradient as much")


# ---------------------------------------------------------------- this tree over another

TREES = ("sampling", "generate", "lengths", "greedy", "grading", "step", "toy")


def bench_trees(args) -> None:
    """Each tree's own defaults, every measurement in a process of its own, in turn."""
    print(f"{processor()}, {torch.get_num_threads()} threads, medians of {args.repeats}")
    print(
        "| what | this tree | the other | ratio | spread | peak memory, GB |\n" + "|---" * 6 + "|"
    )
    for what in args.only.split(",") if args.only else TREES:
        sides = (ROOT, what), (Path(args.against).resolve(), what)
        if what == "generate":  # transformers', in this tree
            sides = (ROOT, "sampling"), (ROOT, what)
        found = [[], []]
        for _ in range(args.repeats):
            for runs, (tree, work) in zip(found, sides, strict=True):
                runs.append(measured(tree, work, args.model))
        mine, other = ([seconds for seconds, _ in runs] for runs in found)
        peaks = " / ".join(f"{max(gb for _, gb in runs):.1f}" for runs in found)
        middle = [statistics.median(times) for times in (mine, other)]
        spread = f"{min(mine):.1f} to {max(mine):.1f}, {min(other):.1f} to {max(other):.1f}"
        row = f"| {what} | {middle[0]:.1f} s | {middle[1]:.1f} s | {middle[1] / middle[0]:.2f}"
        print(f"{row} | {spread} | {peaks} |", flush=True)


def measured(tree: Path, what: str, model: str) -> tuple[float, float]:
    """Seconds of one piece of work in a tree, and the peak memory of the process in GB."""
    with tempfile.TemporaryDirectory() as folder:
        program, command = str(tree / "recode.py"), ["--out", f"{folder}/run"]
        if what == "step":
            names = ("--minibatches", "--updates")
            once = names[not (tree / "packed.py").exists()]
            command += (
                f"--model {model} --steps 2 --prompts 6 --max-new-tokens 200 --beta 0".split()
            )
            command += ["--correctness", "em_copy", "--eval-rows", "1", once, "1"]
        elif what != "toy":
            program, command = str(ROOT / "tests" / "bench_tree.py"), [str(tree), what, model]
        begin = time.perf_counter()
        with open(f"{folder}/out", "w") as out:
            child = subprocess.Popen([sys.executable, program, *command], stdout=out)
            _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - begin
        if status:
            raise SystemExit(f"{what} failed in {tree}")
        if what == "step":  # the second one: the first meets cold caches
            lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
            seconds = json.loads(lines[1])["seconds"]
        elif what != "toy":
            seconds = float(Path(folder, "out").read_text().split()[-2])
        return seconds, used.ru_maxrss / 1e6


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return name + (", bf16 units" if any("avx512_bf16" in line for line in lines) else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices="rollout update reward step memory trees".split())
    parser.add_argument(
        "--model", default=str(data.POLICY), help=f"a folder or one of {', '.join(SHAPES)}"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--tokens", type=int, default=1024, help="per sample, for a shape")
    parser.add_argument("--against", metavar="PATH", help="trees: a checkout of another commit")
    parser.add_argument("--only", metavar="WHAT,WHAT", help=f"trees: of {', '.join(TREES)}")
    args = parser.parse_args()
    torch.manual_seed(0)
    globals()[f"bench_{args.what}"](args)


if __name__ == "__main__":
    main()
