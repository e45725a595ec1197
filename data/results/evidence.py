"""Which reward, which loss, which settings: the ablations of this page, three seeds a row.

    python data/results/evidence.py [TABLE ...]         trains what is missing, prints the tables
    python data/results/evidence.py TABLE --row NAME    trains one row again

Each run is `recode.py` with the bundled policy. A reward or a loss that has no flag is handed to
its loop from here. One process a run, with one thread, so that the digits do not depend on the
cores; what is done stands in `evidence/runs.jsonl`, so that a stopped command goes on.
"""

import argparse
import contextlib
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

import dapo  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import grpo  # noqa: E402
import recode  # noqa: E402
import reward  # noqa: E402
import sandbox  # noqa: E402
import variants  # noqa: E402
from config import Config  # noqa: E402
from policy import Policy, load  # noqa: E402
from rollout import Rollout, packs, written  # noqa: E402
from upkeep import checkpoint, machine, metrics, report, run  # noqa: E402
from variants import Variant  # noqa: E402

FOLDER = Path(__file__).parent / "evidence"
SEEDS = (0, 1, 2)

# Of each table its rows, and what of a default GRPO run differs there: flags of recode.py, and by
# name a "reward" or a "loss" from below. Equal rows of two tables are one run.
NO_KL, FOUR, SMALL = {"beta": 0.0}, {"minibatches": 4}, {"lr": 1e-4, "steps": 48}
OVERLONG = {"algo": "dapo", "overlong_buffer": 96}
TABLES: dict[str, dict[str, dict]] = {
    "reward": {
        "EM*": {},
        "ES*": {"correctness": "es_star"},
        "EM_copy": {"correctness": "em_copy"},
        "EM: -1.5 also where nothing parses": {"reward": "em"},
        "ES: also of code that does not parse": {"reward": "es"},
        "(ES + EM) / 2, the mix of GAPO": {"reward": "half"},
        "control: form alone": {"reward": "form"},
        "control: random": {"reward": "random"},
        "control: random, 1 minibatch": {"reward": "random", "minibatches": 1},  # nothing to clip
        "EM*, small steps": SMALL,
        "control: random, small steps": {"reward": "random"} | SMALL,
    },
    "loss": {
        "SFT": {"algo": "sft"},
        "GRPO": {},
        "Dr. GRPO": {"algo": "drgrpo"},
        "GSPO": {"algo": "gspo"},
        "CISPO": {"algo": "cispo"},
        "GRPO without KL": NO_KL,
        "GRPO without KL, dynamic sampling alone": {"algo": "dapo", "loss": "filter"},
        "GRPO without KL, token mean alone": {"algo": "dapo", "loss": "token mean"},
        "GRPO without KL, overlong penalty alone": OVERLONG | {"loss": "overlong"},
        "GRPO without KL, 4 minibatches": NO_KL | FOUR,  # with 2 the clip hardly ever acts
        "... and clip-higher alone": {"algo": "dapo", "loss": "clip-higher"} | FOUR,
        "DAPO": OVERLONG,
        "DAPO, but for the overlong penalty": {"algo": "dapo"},
        "... and filter on the reward": {"algo": "dapo", "filter": "reward"},
    },
    "group": {
        "G = 2, 64 prompts": {"group_size": 2, "prompts": 64},
        "G = 4, 32 prompts": {"group_size": 4, "prompts": 32},
        "G = 8, 16 prompts": {},
        "G = 16, 8 prompts": {"group_size": 16, "prompts": 8},
        "1 minibatch": {"minibatches": 1},
        "2 minibatches": {},
        "4 minibatches": FOUR,
    },
    "kl": {
        "beta = 0": NO_KL,
        "beta = 0.001": {},
        "beta = 0.01": {"beta": 0.01},
        "beta = 0.04": {"beta": 0.04},
        "beta = 0.1": {"beta": 0.1},
        "k3 in the loss, 1": {"beta": 1.0},
        "k2 in the loss, 1": {"beta": 1.0, "loss": "k2"},
        "k1 in the loss, 1": {"beta": 1.0, "loss": "k1"},
        "... and token mean": {"beta": 1.0, "loss": "k1, token mean"},
        "k1 in the reward, 1": {"beta": 0.0, "reward": "k1"},
    },
    "long": {
        "untrained": {"algo": "none"},
        "GRPO, 12 steps": {},
        "GRPO, 100 steps": {"steps": 100},
        "SFT, 100 steps": {"algo": "sft", "steps": 100},
        "SFT, 400 steps": {"algo": "sft", "steps": 400},
    },
}

# ---- rewards: of the code of each answer, [N]; the form counts as ever -------------------------


def without_parsing(texts: list[str], examples: list[data.Example]) -> list[reward.Verdict]:
    """The verdicts; code that does not parse is compared as it stands."""
    found = reward.verdicts(texts, [e.new_code for e in examples], None)
    pairs = zip(found, texts, strict=True)
    return [v if v.parses else v._replace(code=reward.extract_code(text)) for v, text in pairs]


def em(texts, examples, **_) -> list[float]:
    return [2.0 if v.equal else -1.5 for v in without_parsing(texts, examples)]


def es(texts, examples, **_) -> list[float]:
    return [3.5 * s - 1.5 for s in reward.similarity(without_parsing(texts, examples), "cpu")]


def half(texts, examples, **_) -> list[float]:
    """GAPO's release (github.com/TsingZ0/verl-GAPO): the mean of likeness and exact match."""
    both = zip(es(texts, examples), em(texts, examples), strict=True)
    return [(a + b) / 2 for a, b in both]


def form(texts, examples, **_) -> list[float]:
    return [0.0] * len(texts)


# EM* means -0.97 in the first steps of GRPO's seeds 0, 1 and 2: so does 2 p - 1.5 (1 - p).
CHANCE = 0.15


def chance(texts, examples, *, seed: int, step: int, often=CHANCE, **_) -> list[float]:
    """2 or -1.5 by a hash, with EM*'s mean at the start: it knows nothing of the code."""
    names = (f"{seed} {step} {row}".encode() for row in range(len(texts)))
    parts = (int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64 for name in names)
    return [2.0 if part < often else -1.5 for part in parts]


def k1(texts, examples, *, rollout: Rollout, base: Policy, **_) -> list[float]:
    """EM* less k1 = logp - ref_logp, summed over the answer, as verl has it (`use_kl_in_reward`).

    The advantage divides by the group's spread: where all are equally right, k1 is all there is.
    """
    right = reward.em_star(texts, [e.new_code for e in examples])
    gap = (rollout.logp - scored(base, rollout)).sum(dim=-1)  # [B, G]
    return (right - gap.flatten()).tolist()


REWARDS = {"em": em, "es": es, "half": half, "form": form, "random": chance, "k1": k1}


@torch.no_grad()
def scored(policy: Policy, rollout: Rollout) -> Tensor:  # -> [B, G, T]
    parts = packs(rollout, 2048)
    return torch.cat([policy.logp(rollout, part) for part in parts])


def scoring(rule, seed: int, base: Policy | None, first: int = 0):
    """`recode.score` with another reward of the code, from this step on."""
    plain, turn = recode.score, itertools.count(first)

    def score(algo, texts, rollout, examples, config) -> dict[str, Tensor]:
        scores = plain(algo, texts, rollout, examples, config)
        each = [e for e in examples for _ in range(config.group_size)]
        worth = rule(texts, each, rollout=rollout, base=base, seed=seed, step=next(turn))
        right = torch.tensor(worth).view_as(scores["total"])  # [B, G]
        total = scores["total"] - scores["correctness"] + right  # the overlong penalty stays
        return {**scores, "correctness": right, "total": total, "dead": grpo.dead(total)}

    return score


# ---- losses ------------------------------------------------------------------------------------


def with_kl(logp, old_logp, adv, weight, *, estimate, clip, beta, ref_logp):
    """grpo.loss with another estimate of the KL in it than k3."""
    value, info = grpo.loss(logp, old_logp, adv, weight, clip, ref_logp, beta=0.0)
    logp, ref_logp = grpo.clean(weight, logp, ref_logp)
    return value + beta * (weight * estimate(logp - ref_logp)).sum(), info


K1 = partial(with_kl, estimate=lambda gap: gap)  # gap = logp - ref_logp
K2 = partial(with_kl, estimate=lambda gap: gap.square() / 2)
LOSSES = {
    "k1": Variant(grpo.KNOBS, loss=K1),
    "k2": Variant(grpo.KNOBS, loss=K2),
    "k1, token mean": Variant(grpo.KNOBS, loss=K1, token_weight=dapo.token_weight),
    # DAPO's parts, each by itself on GRPO with its clip of 0.2
    "clip-higher": Variant((), loss=partial(dapo.loss, dual_clip=None)),
    "filter": Variant((), keep=dapo.keep),
    "token mean": Variant((), token_weight=dapo.token_weight),
    "overlong": Variant((), overlong_penalty=dapo.overlong_penalty),
}

# ---- one run -----------------------------------------------------------------------------------


@contextlib.contextmanager
def handed(row: dict, config: Config, base: Policy):
    """Inside, the loop has the row's own reward and loss."""
    with contextlib.ExitStack() as stack:
        if name := row.get("reward"):
            rule = scoring(REWARDS[name], config.seed, base)
            stack.enter_context(patch.object(recode, "score", rule))
        if name := row.get("loss"):
            mine = {config.algo: LOSSES[name]}
            stack.enter_context(patch.object(variants, "of", lambda _: mine))
        yield


def trained(row: dict, seed: int, base: Policy, folder: str, fewer: dict) -> tuple[Policy, dict]:
    """The policy after a row's run, and of the run its settings, steps and samples."""
    if row.get("algo") == "none":
        return base, {"config": {}, "steps": [], "samples": 0}
    flags = {name: value for name, value in row.items() if name not in ("reward", "loss")}
    how = {"seed": seed, "threads": 1, "device": "cpu", "eval_rows": 0, "out": f"{folder}/run"}
    config = Config(**flags | how | fewer)
    with handed(row, config, base):
        run.run(config, recode.LOOPS)
    last = Path(config.out, "checkpoint")
    drawn = checkpoint.read_state(last)["drawn"]
    about = {
        "config": {name: x for name, x in config.record().items() if name != "out"},
        "steps": metrics.history(Path(config.out)),
        "samples": drawn * (1 if config.algo == "sft" else config.group_size),
    }
    return load(str(last), "cpu", "float32"), about


def made(row: dict, seed: int, answers: str = "", most: int = 0, **fewer) -> dict:
    """Train a row with a seed, and measure what came of it: the line of runs.jsonl.

    `answers` is a file for its greedy answers; at most `most` rows of a split are graded (0: all);
    `fewer` are flags of recode.py for a short run.
    """
    machine.use_threads(1)
    torch.manual_seed(seed)
    begin, base = time.time(), load(fewer.get("model", ""), "cpu", "float32")
    with tempfile.TemporaryDirectory() as folder:
        policy, about = trained(row, seed, base, folder, fewer)
        rows = {name: evaluate.some(found, most or len(found)) for name, found in graded().items()}
        longest = fewer.get("max_new_tokens", 384)
        answered = evaluate.report(policy, rows, longest, "", quiet=True)
    if answers:
        Path(answers).write_bytes(gzip.compress(evaluate.lines(answered).encode(), mtime=0))
    return {
        "run": named(row),
        "seed": seed,
        "grade": {name: evaluate.means(found) for name, found in answered.items()},
        "rows": {name: "".join(map(letter, found)) for name, found in answered.items()},
        **sampled(policy, base, rows["test"][:64], longest),
        "nats": nats(policy, rows["test"]),
        **about,
        "machine": f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}",
        "minutes": (time.time() - begin) / 60,
    }


def graded() -> dict[str, list[data.Example]]:
    """The splits that a run is graded on. Of the harder questions 100 as ever, without those whose
    note does not apply, for a policy that copies is right there: all of these are a split."""
    rows = {name: data.load(None, name) for name in ("test", "test_seen", "test_hard")}
    hard = rows["test_hard"]
    rows["test_hard"] = [e for e in evaluate.some(hard, evaluate.HARD) if not unchanged(e)]
    return rows | {"no_change": [e for e in hard if unchanged(e)]}


def unchanged(example: data.Example) -> bool:
    return example.old_code == example.new_code


def letter(answer: evaluate.Graded) -> str:
    """right, a copy of the old code, or wrong: so that rows can be compared one by one."""
    return "r" if answer.exact else "c" if answer.copied else "w"


def named(row: dict) -> str:
    return json.dumps(row, sort_keys=True)


def sampled(policy: Policy, base: Policy, examples: list[data.Example], longest: int) -> dict:
    """Of 8 samples of each prompt: the KL to the untrained policy (mean of k3 over tokens), and how
    often one of them, and one of all, is right (percent): what is likely, and what is possible."""
    how = {"group_size": 8, "max_new_tokens": longest, "temperature": 1.0, "plain": True}
    seed = torch.Generator().manual_seed(0)
    rollout = policy.sample(policy.prompts(examples), generator=seed, **how)
    targets = [e.new_code for e in examples for _ in range(8)]
    right = [v.equal for v in reward.verdicts(policy.texts(rollout), targets, None)]
    right = torch.tensor(right).view(-1, 8)  # [B, 8]
    return {
        "kl": grpo.kl(rollout.logp, scored(base, rollout))[rollout.mask].mean().item(),
        "pass@1": 100 * right.float().mean().item(),
        "pass@8": 100 * right.any(1).float().mean().item(),
    }


def nats(policy: Policy, examples: list[data.Example]) -> float:
    """How unlikely the old programs are as plain text, in nats a token: what is forgotten."""
    texts = [policy.tokenizer.encode(code) for code in dict.fromkeys(e.old_code for e in examples)]
    read = written([ids[:1] for ids in texts], [[ids[1:]] for ids in texts], policy.pad_id, "cpu")
    return -scored(policy, read)[read.mask].mean().item()


# ---- all runs, and what they say ---------------------------------------------------------------


def records() -> dict[tuple[str, int], dict]:
    """What is done, by run and seed; the newest line counts."""
    file = FOLDER / "runs.jsonl"
    lines = [row for _, row in data.json_lines(file, partial=True)] if file.exists() else []
    return {(line["run"], line["seed"]): line for line in lines}


def make(wanted: list[tuple[dict, int]], jobs: int) -> None:
    """Train these rows and seeds, `jobs` at a time, and write each down when it is done."""
    file = FOLDER / "runs.jsonl"
    if file.exists():  # a kill may have left half a line
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    # One that fails ends those that wait: they would train for hours, and nobody would note it.
    for _, line in tqdm(sandbox.at_once(apart, wanted, jobs), total=len(wanted), unit="run"):
        with open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def apart(job: tuple[dict, int]) -> dict:
    """`made`, in a process of its own."""
    row, seed = job
    name = hashlib.sha256(named(row).encode()).hexdigest()[:8]
    answers = "" if seed else str(FOLDER / f"{name}.jsonl.gz")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), quiet) as pool:
        return pool.submit(made, row, seed, answers).result()


def quiet() -> None:
    """A run's own bars and tables would mix with the other's."""
    sys.stdout = sys.stderr = open(os.devnull, "w")


COLUMNS = {  # and how many digits each has behind the point
    "held-out right": (1, lambda r: r["grade"]["test"]["exact"]),
    "held-out copies": (1, lambda r: r["grade"]["test"]["copies"]),
    "new updates right": (1, lambda r: r["grade"]["test_seen"]["exact"]),
    "new updates copies": (1, lambda r: r["grade"]["test_seen"]["copies"]),
    "harder right": (1, lambda r: r["grade"]["test_hard"]["exact"]),
    "no change needed: right": (1, lambda r: r["grade"]["no_change"]["exact"]),
    "pass@1": (1, lambda r: r["pass@1"]),
    "pass@8": (1, lambda r: r["pass@8"]),
    "form": (1, lambda r: r["grade"]["test"]["format"]),
    "samples": (0, lambda r: r["samples"]),
    "KL": (3, lambda r: r["kl"]),
    "nats": (3, lambda r: r["nats"]),
}


def seeds_of(row: dict, known: dict[tuple[str, int], dict]) -> list[dict]:
    return [known[key] for seed in SEEDS if (key := (named(row), seed)) in known]


def table(name: str, known: dict[tuple[str, int], dict]) -> str:
    """Markdown: mean over seeds ± standard error of that mean."""
    rows = []
    for title, row in TABLES[name].items():
        found = seeds_of(row, known)
        cells = [cell([value(r) for r in found], digits) for digits, value in COLUMNS.values()]
        rows.append((title, len(found), *cells))
    return report.markdown(", ".join([name, "seeds", *COLUMNS]), rows)


def cell(values: list[float], digits: int) -> str:
    text = f"{statistics.mean(values):.{digits}f}" if values else ""
    return text + (f" ± {error(values):.{digits}f}" if len(values) > 1 else "")


def error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def usual(known: dict[tuple[str, int], dict]) -> str:
    """Markdown: of each column the median ±, for a row's three seeds may lie together by luck."""
    rows = {named(row): seeds_of(row, known) for rows in TABLES.values() for row in rows.values()}
    whole = [found for found in rows.values() if len(found) == len(SEEDS)]
    cells = []
    for digits, value in COLUMNS.values():
        errors = [error([value(r) for r in found]) for found in whole]
        cells.append(f"{statistics.median(errors):.{digits}f}" if errors else "")
    return report.markdown(", ".join(["median ±", "rows", *COLUMNS]), [("", len(whole), *cells)])


def picture(known: dict[tuple[str, int], dict]) -> None:
    """Every seed of every row: right answers (filled) and copies (hollow) on held-out libraries."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [len(rows) for rows in TABLES.values()]
    figure, axes = pyplot.subplots(
        len(TABLES), 1, figsize=(8, 0.24 * sum(sizes) + 3), height_ratios=sizes, sharex=True
    )
    for axis, (name, rows) in zip(axes, TABLES.items(), strict=True):
        for place, row in enumerate(rows.values()):
            for line in seeds_of(row, known):
                grade = line["grade"]["test"]
                axis.plot(grade["exact"], place, "o", color="C0", alpha=0.7)
                axis.plot(grade["copies"], place, "o", mfc="none", color="C1")
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_title(name, fontsize=9, loc="left")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("held-out libraries, greedy, %: right (filled), copies (hollow)")
    figure.tight_layout()
    figure.savefig(FOLDER.parent / "evidence.png", dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--row", help="train this row of the table again, all seeds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--show", action="store_true", help="train nothing")
    options = parser.parse_args()
    names = options.tables or list(TABLES)
    if unknown := set(names) - TABLES.keys():
        parser.error(f"no table {unknown.pop()}: choose from {', '.join(TABLES)}")
    if options.row and (len(names) != 1 or options.row not in TABLES[names[0]]):
        parser.error("--row is the name of a row of one table, as it stands there")
    FOLDER.mkdir(exist_ok=True)
    known, rows = records(), [row for name in names for row in TABLES[name].values()]
    if options.row:
        rows, known = [TABLES[names[0]][options.row]], {}
    wanted = {(named(row), seed): (row, seed) for seed in SEEDS for row in rows}
    missing = [pair for key, pair in wanted.items() if key not in known]
    if missing and not options.show:
        make(missing, options.jobs)
    known = records()
    print("\n\n".join([*(table(name, known) for name in names), usual(known)]))
    picture(known)


if __name__ == "__main__":
    main()
