"""How good a policy is: its greedy answers, graded one by one, and its programs, run.

    python evaluate.py updates --model runs/grpo-seed0/checkpoint --split test
    python evaluate.py updates --answers runs/grpo-seed0/after.jsonl --run --envs envs
    python evaluate.py codeupdatearena --data FILE --model FOLDER --n 5 --k 1,5
    python evaluate.py humaneval --data HumanEval.jsonl.gz --predictions reference

An answer is graded once; tables, sample pages and curves (`report.py`) are views of the records.
"""

import argparse
import sys

COMMANDS = {
    "updates": "our own splits, or a file in our format or the paper's: greedy exact match",
    "codeupdatearena": "CodeUpdateArena, unit tests with and without the update",
    "humaneval": "HumanEval or HumanEval+, unit tests",
}
LONGEST = {"updates": 384, "codeupdatearena": 512, "humaneval": 768}  # answers, in tokens


def parser() -> argparse.ArgumentParser:
    """Three commands with the flags that each reads."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        flag = commands.add_parser(name, help=text, description=text).add_argument
        longest, dtypes = LONGEST[name], ("auto", "float32", "bfloat16")
        flag("--model", default="", help="folder, run's checkpoint or hub id (default: bundled)")
        flag("--out", default="", help="JSON-lines file, a line an answer or item")
        flag("--max-new-tokens", type=int, default=longest, help="longest answer (%(default)s)")
        flag("--device", default="auto", help="cpu, cuda, mps ... (auto: the GPU if there is one)")
        flag("--dtype", default="auto", choices=dtypes, help="auto: the faster one here")
        flag("--sandbox", default="", metavar="bwrap|plain", help="default: the better at hand")
        if name == "updates":
            flag("--data", default="", help="the file (default: the bundled one; several: a,b)")
            flag("--split", default="", help="such as test,test_2026 (default: all but test_2026)")
            flag("--rows", type=int, default=0, help="of each split, at most; 0 is all")
            flag("--answers", default="", metavar="FILE", help="answers of a run, not a model's")
            flag("--run", action="store_true", help="judge them by execution, too (needs uv)")
            flag("--envs", default="", metavar="FOLDER", help="keep the releases' environments")
            continue
        flag("--data", required=True, help="its file")
        flag("--n", type=int, default=5, help="samples of each (%(default)s)")
        flag("--k", default="1", metavar="K,K", help="which Pass@k, such as 1,5 (default 1)")
        flag("--temperature", type=float, help="of these samples (0.8; 0, greedy, for --n 1)")
        flag("--top-p", type=float, default=0.7, help="of these samples (0.7)")
        flag("--seed", type=int, default=0, help="of sampling")
        flag("--predictions", default="", metavar="FILE", help="samples, or: reference")
        flag("--python", default=sys.executable, metavar="PATH", help="interpreter to run in")
    commands.choices["codeupdatearena"].set_defaults(ask="think")
    flag, asks = commands.choices["humaneval"].add_argument, ("plain", "think")
    text = "plain: as anybody asks a chat model, think: as the paper does (%(default)s)"
    flag("--ask", default="plain", choices=asks, help=text)
    return parser


if __name__ == "__main__":  # --help and a wrong flag are answered before torch is loaded
    parser().parse_args()

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import data
import reward
from policy import Policy, chosen_device, load
from strip import same

ROWS = 64  # rows that are decoded together
HARD = 100  # rows of test_hard in a run's report, to save time: its programs are long
Rows = dict[str, list[data.Example]]  # of each split
Report = dict[str, list["Graded"]]  # the graded answers of each split


@dataclass(frozen=True)
class Graded:
    """One answer and what it is worth."""

    example: data.Example
    text: str  # the completion, from right after the prompt's <think>
    format: float  # +1 or -1
    exact: bool  # the code equals the target's, comments and blank lines aside
    em: float  # EM*: 2, -1.5 or -2
    es: float  # ES*, in [-2, 2]
    copied: bool  # the code equals the old code, comments and blank lines aside
    exact_any: bool  # as exact and copied, of code in any form: see reward.any_code
    copied_any: bool
    asked: bool  # there is code that parses, in the form that was asked for
    run: str = ""  # by execution, in any form: right, wrong or could-not-run; "": not asked for
    reason: str = ""  # why it is not right by execution


def grade(examples: list[data.Example], texts: list[str], device: str = "cpu") -> list[Graded]:
    """One record an answer, in order. Code in any form is looked for where the asked one lacks."""
    new, old = ([getattr(e, name) for e in examples] for name in ("new_code", "old_code"))
    verdicts = reward.verdicts(texts, new, old)
    em, es = (reward.price(verdicts, rule, device).tolist() for rule in ("em_star", "es_star"))
    graded = []
    for example, text, verdict, *worth in zip(examples, texts, verdicts, em, es, strict=True):
        layout, (_, _, asked, exact, copied) = reward.format_reward(text), verdict
        loose = exact, copied
        if not asked:
            code = reward.any_code(text)
            loose = same(code, example.new_code), same(code, example.old_code)
        graded.append(Graded(example, text, layout, exact, *worth, copied, *loose, asked))
    return graded


def shares(graded: list[Graded]) -> dict[str, list[bool]]:
    """Of each row: is it a copy, is it exact, and the same of code in any form.

    `copies` is the laziness that the paper is about: the old code, where something was to be done.
    """
    return {
        "copies": [g.copied and not g.exact for g in graded],
        "exact": [g.exact for g in graded],
        "copies_any": [g.copied_any and not g.exact_any for g in graded],
        "exact_any": [g.exact_any for g in graded],
    }


def means(graded: list[Graded]) -> dict[str, float]:
    """Means over the rows: EM* and ES* in [-2, 2]; format and `shares` in percent."""

    def mean(values) -> float:
        return torch.tensor(values, dtype=torch.float32).mean().item()

    worth = {"em_star": mean([g.em for g in graded]), "es_star": mean([g.es for g in graded])}
    worth["format"] = 50 * (mean([g.format for g in graded]) + 1)
    return worth | {name: 100 * mean(column) for name, column in shares(graded).items()}


def greedy(
    policy: Policy, examples: list[data.Example], max_new_tokens: int, title="", quiet=False
) -> list[Graded]:
    """The graded greedy answer to every example, in order, under a progress bar."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].old_code))
    graded: dict[int, Graded] = {}
    with tqdm(total=len(order), desc=title, disable=quiet, unit="row", dynamic_ncols=True) as bar:
        for start in range(0, len(order), ROWS):  # like lengths together
            places = order[start : start + ROWS]
            rows = [examples[i] for i in places]
            texts = policy.complete(rows, max_new_tokens=max_new_tokens)
            graded |= zip(places, grade(rows, texts, policy.model.device), strict=True)
            exact = sum(g.exact for g in graded.values()) / len(graded)
            bar.set_postfix_str(f"exact {exact:.0%}", refresh=False)
            bar.update(len(rows))
    return [graded[i] for i in range(len(examples))]


def chosen(path: str, most: int) -> Rows:
    """At most `most` rows of each split of a data file, of test_hard `HARD`; {} if that is 0."""
    return {
        name: some(data.load(path, name), min(most, HARD) if name == "test_hard" else most)
        for name in data.splits(path)
        if most
    }


def some(rows: list[data.Example], most: int) -> list[data.Example]:
    """A fixed choice: by a run's seed they would be the rows that it trains on first."""
    return random.Random("report").sample(rows, min(most, len(rows)))


def report(policy: Policy, rows: Rows, max_new_tokens: int, title: str, quiet=False) -> Report:
    """Graded greedy answers of a policy to the rows of each split.

    An answer may have max_new_tokens, or as many as the longest true answer of its split.
    """
    graded = {}
    for name, examples in rows.items():
        most = max([max_new_tokens, *(policy.length(data.completion(e)) for e in examples)])
        graded[name] = greedy(policy, examples, most, f"{title}, {name}", quiet)
    return graded


def lines(report: Report) -> str:
    """One JSON object an answer: its split, its row's id and digest, its text, its worth."""
    rows = []
    for split, g in ((split, g) for split, graded in report.items() for g in graded):
        name = {"split": split, "id": g.example.id, "row": data.digest(g.example)}
        worth = {key: value for key, value in vars(g).items() if key != "example"}
        rows.append(json.dumps(name | worth) + "\n")
    return "".join(rows)


def read(path: Path, rows: Rows) -> Report | None:
    """What `lines` wrote of these very rows; None if the file is lost, damaged or of others."""
    try:
        graded = answered(path, rows)
    except ValueError:
        return None
    return graded if {k: [g.example for g in part] for k, part in graded.items()} == rows else None


def answered(path: str | Path, rows: Rows) -> Report:
    """The answers in a file that `lines` wrote, to some or all of these rows, graded anew.

    Rows are known by digest, in older files and where changed by id. ValueError names a bad line.
    """
    named: dict[tuple[str, str], list[data.Example]] = {}
    for split, example in ((split, e) for split, examples in rows.items() for e in examples):
        for name in (data.digest(example), example.id):
            named.setdefault((split, name), []).append(example)
    answers: dict[str, list[tuple[data.Example, str]]] = {}
    seen: Counter = Counter()
    for where, line in data.json_lines(path):
        try:
            split, name, text = (str(line[key]) for key in ("split", "id", "text"))
        except KeyError:
            raise ValueError(f"{where}: no answer with split, id and text") from None
        if split not in rows:
            continue
        meant = named.get((split, str(line.get("row")))) or named.get((split, name), [])
        fault = "" if meant else "the data has no such row"
        if len(set(meant)) > 1:
            fault = "several rows have this id, or none, and the line does not say which it answers"
        elif meant and seen[split, meant[0]] == len(meant):
            fault = "a second answer to the same row: leave one out"
        if fault:
            raise ValueError(f"{where}: {fault} (id '{name}' in {split})")
        seen[split, meant[0]] += 1
        answers.setdefault(split, []).append((meant[0], text))
    if not answers:
        raise ValueError(f"{path} has no answer to a row of {', '.join(rows)}")
    return {split: grade(*map(list, zip(*answers[split], strict=True))) for split in answers}


def copied(examples: list[data.Example]) -> list[Graded]:
    """What copying the old code is worth: every result must be read against it."""
    return grade(examples, [data.answer("", e.old_code) for e in examples])


# The commands. They alone import `sandbox`: training, which imports this file, does not need it.


def updates(options: argparse.Namespace) -> str:
    """Greedy answers to the rows of our own format, by split, library and kind."""
    if options.rows < 0:
        raise ValueError(f"--rows is {options.rows}: give how many of each split, or 0 for all")
    if options.answers and options.rows:
        raise ValueError("--answers says which rows: leave out --rows")
    names = options.split.split(",") if options.split else data.splits(options.data)
    rows = {name: data.load(options.data, name) for name in names}
    if options.rows:
        rows = {name: some(examples, options.rows) for name, examples in rows.items()}
    if options.answers:
        graded = answered(options.answers, rows)
        keep(graded, options.out)
    else:
        policy, graded = load(options.model, options.device, options.dtype), {}
        for name, part in rows.items():
            graded |= report(policy, {name: part}, options.max_new_tokens, "greedy answers")
            keep(graded, options.out)
    tables = executed(graded, options) if options.run else []
    libraries, kinds = grouped(graded, "dependency"), grouped(graded, "kind")
    tables += [breakdown(graded), breakdown(libraries, "library"), breakdown(kinds, "kind")]
    return "\n\n".join(tables)


def keep(graded: Report, out: str) -> None:
    """Write the answers, if a file is given: what comes next takes long, and may be stopped."""
    if out:
        Path(out).write_text(lines(graded), encoding="utf-8")


def grouped(graded: Report, field: str) -> Report:
    """The answers of all splits by a field of their rows."""
    groups: Report = {}
    for g in (g for part in graded.values() for g in part):
        groups.setdefault(getattr(g.example, field) or "unnamed", []).append(g)
    return dict(sorted(groups.items()))


def executed(report: Report, options: argparse.Namespace) -> list[str]:
    """Tables of what comes of running the answers in whatever form (an exact one is right without),
    and which ones to read; --out is written anew."""
    from sandbox import choose, rows

    kind, notice = choose(options.sandbox)
    print(notice, file=sys.stderr)
    unsure = [g for graded in report.values() for g in graded if not g.exact_any]
    codes = [(g.example, reward.any_code(g.text)) for g in unsure]
    ran = iter(rows.outcomes(codes, options.envs, kind))
    right = rows.Outcome(rows.RIGHT)
    report = {
        split: [replace(g, **(right if g.exact_any else next(ran))._asdict()) for g in graded]
        for split, graded in report.items()
    }
    keep(report, options.out)
    return [rows.table(report), rows.table(grouped(report, "kind"), "kind"), rows.remarks(report)]


def breakdown(groups: Report, title: str = "split") -> str:
    """Markdown: a row a group; its shares with 95 % bootstrap intervals."""
    from sandbox import passk

    def cells(graded: list[Graded]) -> list:
        m, intervals = means(graded), map(passk.bootstrap, shares(graded).values())
        return [f"{m['em_star']:.2f}", f"{m['es_star']:.2f}", f"{m['format']:.1f} %", *intervals]

    heads = "rows | EM* | ES* | format | copies | exact | copies, any form | exact, any form"
    return passk.markdown(f"| {title} | {heads} |", groups, cells)


def benchmark(options: argparse.Namespace) -> str:
    """Pass@k of a published benchmark, of a model's samples or of those in a file."""
    from sandbox import Box, benchmarks, choose, passk

    items = benchmarks.read(options.command, options.data)
    kind, notice = choose(options.sandbox)
    print(notice, file=sys.stderr)
    if options.predictions:
        source, both = passk.predictions(options.command, options.predictions, items), False
        if missing := len(items) - len(source):
            print(f"{missing} of {len(items)} items have no sample", file=sys.stderr)
        items = [item for item in items if item.id in source]
        ks = passk.numbers(options.k, min(map(len, source.values())))
    else:
        ks, both = passk.numbers(options.k, options.n), options.ask == "think"
        if options.temperature is None:
            options.temperature = 0.8 if options.n > 1 else 0.0
        policy = load(options.model, options.device, options.dtype)
        options.dtype = str(policy.dtype)[6:]  # not "auto": another machine may choose otherwise
        names = ("model", "ask", "n", "temperature", "top_p", "max_new_tokens", "seed", "dtype")
        source = {name: getattr(options, name) for name in names}

    def sampler(part: list) -> list[tuple[list, list]]:
        if not options.predictions:
            return codes(policy, options, part)
        return [(source[item.id], []) for item in part]  # they are code: no form was asked for

    box = Box(options.python, kind, passk.LIMITS)
    passk.check_interpreter(box, items)
    run = hashlib.sha256(repr((items, source, options.python, kind)).encode()).hexdigest()[:12]
    return passk.summary(passk.run_items(items, sampler, box, options.out, run), ks, both)


def codes(policy: Policy, options: argparse.Namespace, items: list) -> list[tuple[list, list]]:
    """The code of n sampled answers to each item, and whether each has the form asked for."""
    from sandbox import benchmarks

    # Seeded by the items, so that a run that goes on samples what it would have sampled.
    seed = random.Random(f"{options.seed} {items[0].id}").getrandbits(62)
    how = dict(group_size=options.n, max_new_tokens=options.max_new_tokens, top_p=options.top_p)
    how |= dict(temperature=options.temperature, generator=torch.Generator().manual_seed(seed))
    prompts = [benchmarks.prompt(item, policy.tokenizer, options.ask) for item in items]
    texts = policy.texts(policy.sample(prompts, **how))
    found = [reward.any_code(text) for text in texts]
    asked = [options.ask != "think" or reward.extract_code(text) is not None for text in texts]
    cuts = [slice(i, i + options.n) for i in range(0, len(found), options.n)]
    return [(found[cut], asked[cut]) for cut in cuts]


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 2 after one sentence on what is wrong with its input."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options = parser().parse_args(arguments)
    own, out = options.command == "updates", options.out
    try:
        options.device = chosen_device(options.device)
        if out and not Path(out).absolute().parent.is_dir():
            raise ValueError(f"--out {out}: there is no such folder, make it first")
        if out:
            open(out, "a").close()  # what cannot be written shows before the work
        print((updates if own else benchmark)(options))
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "the same command goes on where it was"
        again = "the answers are kept, and --answers reads them" if own else again
        print(f"\nstopped; with --out {again}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
