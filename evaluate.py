"""How good a policy is: its greedy answers, graded one by one, and its programs, run.

    python evaluate.py updates --model runs/grpo-seed0/checkpoint --split test
    python evaluate.py updates --answers runs/grpo-seed0/after.jsonl --run --envs envs
    python evaluate.py codeupdatearena --data FILE --model FOLDER --n 5 --k 1,5
    python evaluate.py humaneval --data HumanEval.jsonl.gz --predictions reference

    answers = greedy(load("", "cpu"), data.load(split="test"), max_new_tokens=384)
    means(answers)   -> {"em_star": -1.47, "es_star": 1.81, "format": 99.7, "exact": 1.0, ...}

An answer is graded once; tables, sample pages and curves (`report.py`) are views of the records.
"""

import argparse
import sys

DTYPES = ("auto", "float32", "bfloat16")


def parser() -> argparse.ArgumentParser:
    """Three commands with the flags that each reads."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = {
        "updates": "our own splits, or a file in our format or the paper's: greedy exact match",
        "codeupdatearena": "CodeUpdateArena, unit tests with and without the update",
        "humaneval": "HumanEval or HumanEval+, unit tests",
    }
    for name, text in about.items():
        flag = commands.add_parser(name, help=text, description=text).add_argument
        own = name == "updates"
        flag("--model", default="", help="folder, run's checkpoint or hub id (default: bundled)")
        flag(
            "--data",
            required=not own,
            default="",
            help="the file (updates: or several, a,b; default bundled)",
        )
        flag("--out", default="", help="JSON-lines file, a line an answer or item")
        flag("--n", type=int, default=1 if own else 5, help="samples of each (default %(default)s)")
        flag("--k", default="1", metavar="K,K", help="which Pass@k, such as 1,5 (default 1)")
        flag("--temperature", type=float, help="of these samples (0.8; 0, greedy, for --n 1)")
        flag("--top-p", type=float, default=0.7, help="of these samples (0.7)")
        longest = {"updates": 384, "codeupdatearena": 512, "humaneval": 768}[name]
        flag("--max-new-tokens", type=int, default=longest, help="longest answer (%(default)s)")
        flag("--seed", type=int, default=0, help="of sampling")
        flag("--device", default="auto", help="cpu, cuda, mps ... (auto: the GPU if there is one)")
        flag("--dtype", default="auto", choices=DTYPES, help="auto: the faster one here")
        if own:
            flag("--split", default="", help="such as test,test_2026 (default: all but test_2026)")
            flag("--rows", type=int, default=0, help="of each split, at most; 0 is all")
            flag("--answers", default="", metavar="FILE", help="answers of a run, not a model's")
            flag("--run", action="store_true", help="judge them by execution, too (needs uv)")
            flag("--envs", default="", metavar="FOLDER", help="keep the releases' environments")
        else:
            flag("--predictions", default="", metavar="FILE", help="samples, or: reference")
            flag("--python", default=sys.executable, metavar="PATH", help="interpreter to run in")
        if name == "humaneval":
            text = "plain: as anybody asks a chat model, think: as the paper does (%(default)s)"
            flag("--ask", default="plain", choices=("plain", "think"), help=text)
        flag("--sandbox", default="", metavar="bwrap|plain", help="default: the better at hand")
    commands.choices["codeupdatearena"].set_defaults(ask="think")
    return parser


if __name__ == "__main__":  # --help and a wrong flag are answered before torch is loaded
    parser().parse_args()

import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
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
        loose = (exact, copied) if asked else in_any_form(example, text)
        graded.append(Graded(example, text, layout, exact, *worth, copied, *loose, asked))
    return graded


def in_any_form(example: data.Example, text: str) -> tuple[bool, bool]:
    """Whether the code of an answer, in whatever form, is the true code, and the old code."""
    code = reward.any_code(text)
    return same(code, example.new_code), same(code, example.old_code)


def means(graded: list[Graded]) -> dict[str, float]:
    """Means over the rows: EM* and ES* in [-2, 2]; format, exact match and copies in percent.

    `copies` is the laziness that the paper is about: the old code, where something was to be done.
    `exact_any` and `copies_any` are the same of code in any form.
    """

    def mean(values) -> float:
        return torch.tensor(values, dtype=torch.float32).mean().item()

    return {
        "em_star": mean([g.em for g in graded]),
        "es_star": mean([g.es for g in graded]),
        "format": 50 * (mean([g.format for g in graded]) + 1),
        "exact": 100 * mean([g.exact for g in graded]),
        "copies": 100 * mean([g.copied and not g.exact for g in graded]),
        "exact_any": 100 * mean([g.exact_any for g in graded]),
        "copies_any": 100 * mean([g.copied_any and not g.exact_any for g in graded]),
    }


def greedy(
    policy: Policy, examples: list[data.Example], max_new_tokens: int, bar: tqdm | None = None
) -> list[Graded]:
    """The graded greedy answer to every example, in order; like lengths are decoded together.

    `bar` moves on by a row for each answer, and shows the share of exact ones so far.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].old_code))
    graded: dict[int, Graded] = {}
    for start in range(0, len(order), ROWS):
        places = order[start : start + ROWS]
        rows = [examples[i] for i in places]
        texts = policy.complete(rows, max_new_tokens=max_new_tokens)
        graded |= zip(places, grade(rows, texts, policy.model.device), strict=True)
        if bar is not None:
            share = sum(g.exact for g in graded.values()) / len(graded)
            bar.set_postfix_str(f"exact {share:.0%}", refresh=False)
            bar.update(len(rows))
    return [graded[i] for i in range(len(examples))]


def chosen(path: str, most: int) -> dict[str, list[data.Example]]:
    """A fixed choice of at most `most` rows of each split of a data file, of test_hard `HARD`.

    No split if that is 0.
    """
    # No run's seed: with that the rows here would be those that the run trains on first.
    splits = {name: data.load(path, name) for name in data.splits(path) if most}
    return {
        name: some(rows, min(most, HARD) if name == "test_hard" else most)
        for name, rows in splits.items()
    }


def some(rows: list[data.Example], most: int) -> list[data.Example]:
    """A fixed choice of at most `most` rows."""
    return random.Random("report").sample(rows, min(most, len(rows)))


def report(
    policy: Policy,
    rows: dict[str, list[data.Example]],
    max_new_tokens: int,
    title: str,
    quiet: bool = False,
) -> Report:
    """Graded greedy answers of a policy to the rows of each split, under a progress bar.

    An answer may have max_new_tokens, or as many as the longest true answer of its split.
    """
    if not rows:
        return {}
    longest = {
        name: max((policy.length(data.completion(e)) for e in examples), default=0)
        for name, examples in rows.items()
    }
    total, how = sum(map(len, rows.values())), {"disable": quiet, "unit": "row"}
    with tqdm(total=total, desc=title, dynamic_ncols=True, **how) as bar:
        graded = {}
        for name, examples in rows.items():
            most = max(max_new_tokens, longest[name])
            graded[name] = greedy(policy, examples, most, bar)
        return graded


WORTH = ("format", "exact", "em", "es", "copied", "exact_any", "copied_any")


def lines(report: Report) -> str:
    """One JSON object an answer: its split, its row's id and digest, its text, its worth."""
    rows = []
    for split, graded in report.items():
        for g in graded:
            worth = {name: getattr(g, name) for name in WORTH}
            worth |= {"run": g.run, "reason": g.reason} if g.run else {}
            row = {"split": split, "id": g.example.id, "row": data.digest(g.example)}
            rows.append(json.dumps(row | {"text": g.text} | worth))
    return "".join(row + "\n" for row in rows)


def read(path: Path, rows: dict[str, list[data.Example]]) -> Report | None:
    """What `lines` wrote of these very rows, graded anew: an older file lacks some of the worth.

    None if the file is lost, damaged or of others.
    """
    if not path.is_file():
        return None
    wanted = [(split, example) for split in rows for example in rows[split]]
    try:
        saved = [row for _, row in data.json_lines(path)]
        if [(row["split"], row["id"]) for row in saved] != [(split, e.id) for split, e in wanted]:
            return None
        texts = iter([row["text"] + "" for row in saved])
    except (ValueError, TypeError, KeyError):
        return None
    return {split: grade(rows[split], [next(texts) for _ in rows[split]]) for split in rows}


def copied(examples: list[data.Example]) -> list[Graded]:
    """What copying the old code is worth: every result must be read against it."""
    return grade(examples, [data.answer("", e.old_code) for e in examples])


# ------------------------------------------------------------------------------------------------
# The commands. They alone import `sandbox`: training, which imports this file, does not need it.
# ------------------------------------------------------------------------------------------------


def updates(options: argparse.Namespace) -> str:
    """Greedy answers to the rows of our own format, by split, library and kind."""
    from sandbox import passk

    passk.numbers(options.k, options.n)  # a slip of the hand shows now
    if options.rows < 0:
        raise ValueError(f"--rows is {options.rows}: give how many of each split, or 0 for all")
    names = options.split.split(",") if options.split else data.splits(options.data)
    rows = {name: data.load(options.data, name) for name in names}
    if options.answers and options.rows:
        raise ValueError("--answers says which rows: leave out --rows")
    if options.rows:
        rows = {name: some(examples, options.rows) for name, examples in rows.items()}
    if options.answers and options.n > 1:
        raise ValueError("--answers has one answer a row: leave out --n, or give --model")
    if options.answers:
        graded = answered(options.answers, rows)
    else:
        policy = load(options.model, options.device, options.dtype)
        graded = report(policy, rows, options.max_new_tokens, "greedy answers")
    save(graded, options.out)  # now: to run them takes long, and may be stopped
    tables = []
    if options.run:
        graded = executed(graded, options)
        save(graded, options.out)
        tables = by_execution(graded)
    tables.append(breakdown(graded))
    for title, of in (("library", "dependency"), ("kind", "kind")):
        tables.append(breakdown(grouped(graded, of), title))
    if options.n > 1:
        tables.append(sampled(policy, rows, options))
    return "\n\n".join(tables)


def check_out(out: str) -> None:
    """ValueError or OSError if the file cannot be written: before the work, not after it."""
    if out and not Path(out).absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no such folder, make it first")
    if out:
        open(out, "a").close()


def grouped(graded: Report, field: str) -> Report:
    """The answers of all splits by a field of their rows."""
    groups: Report = {}
    for g in (g for part in graded.values() for g in part):
        groups.setdefault(getattr(g.example, field) or "unnamed", []).append(g)
    return dict(sorted(groups.items()))


def save(graded: Report, out: str) -> None:
    """Write the answers to a file, if one is asked for."""
    if out:
        Path(out).write_text(lines(graded), encoding="utf-8")


def answered(path: str, rows: dict[str, list[data.Example]]) -> Report:
    """The answers in a file that `lines` wrote, to some or all of these rows, graded anew.

    A row is known by its digest; in older files, and if it has changed since, by its id. ValueError
    names the first line that is no answer, or that does not say of which row, or says it again.
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
        if split in rows:
            same = named.get((split, str(line.get("row")))) or named.get((split, name), [])
            if fault := row_unknown(same, seen[split, same[0] if same else None]):
                raise ValueError(f"{where}: {fault} (id '{name}' in {split})")
            seen[split, same[0]] += 1
            answers.setdefault(split, []).append((same[0], text))
    if not answers:
        raise ValueError(f"{path} has no answer to a row of {', '.join(rows)}")
    return {split: grade(*map(list, zip(*answers[split], strict=True))) for split in answers}


def row_unknown(same: list[data.Example], answers: int) -> str:
    """Why an answer cannot be given to one of the rows of its name, which have so many; or ""."""
    if not same:
        return "the data has no such row"
    if any(example != same[0] for example in same):
        return "several rows have this id, or none, and the line does not say which it answers"
    return "a second answer to the same row: leave one out" if answers == len(same) else ""


def executed(report: Report, options: argparse.Namespace) -> Report:
    """The same answers with what came of them by execution; an exact one is right without.

    Code is run in whatever form it came: `asked` tells which answers have the form asked for.
    """
    from sandbox import choose, rows

    kind, notice = choose(options.sandbox)
    print(notice, file=sys.stderr)
    unsure = [g for graded in report.values() for g in graded if not g.exact_any]
    codes = [(g.example, reward.any_code(g.text)) for g in unsure]
    ran = iter(rows.outcomes(codes, options.envs, kind))
    right = rows.Outcome(rows.RIGHT)
    return {
        split: [replace(g, **(right if g.exact_any else next(ran))._asdict()) for g in graded]
        for split, graded in report.items()
    }


def by_execution(report: Report) -> list[str]:
    """Tables by split and by kind of what came of running the answers, and which ones to read."""
    from sandbox import rows

    return [rows.table(report), rows.table(grouped(report, "kind"), "kind"), rows.remarks(report)]


def breakdown(groups: Report, title: str = "split") -> str:
    """Markdown: one row a group; copies and exact match with 95 % bootstrap intervals, of code in
    the asked form and of code in any form."""
    from sandbox import passk

    heads = ("rows", "EM*", "ES*", "format", "copies", "exact", "copies, any form")
    table = [f"| {' | '.join([title, *heads, 'exact, any form'])} |", "|---" * 9 + "|"]
    for name, graded in groups.items():
        m = means(graded)
        columns = [
            [g.copied and not g.exact for g in graded],
            [g.exact for g in graded],
            [g.copied_any and not g.exact_any for g in graded],
            [g.exact_any for g in graded],
        ]
        shares = (passk.percent(passk.bootstrap(column)) for column in columns)
        table.append(
            f"| {name} | {len(graded)} | {m['em_star']:.2f} | {m['es_star']:.2f} "
            f"| {m['format']:.1f} % | {' | '.join(shares)} |"
        )
    return "\n".join(table)


def sampled(policy: Policy, rows: dict[str, list[data.Example]], options) -> str:
    """Markdown: Pass@k of sampled answers by exact match, of code as asked and in any form."""
    from sandbox import passk

    ks = passk.numbers(options.k, options.n)
    heads = [f"Pass@{k}{form}" for form in ("", ", any form") for k in ks]
    table = [f"| split | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    generator = torch.Generator().manual_seed(options.seed)
    for name, examples in rows.items():
        graded = []
        for start in tqdm(range(0, len(examples), passk.ROUND), desc=f"samples, {name}"):
            part = examples[start : start + passk.ROUND]
            texts = sample_texts(policy, policy.prompts(part), options, generator)
            graded += grade([e for e in part for _ in range(options.n)], texts)
        values = []
        for column in ([g.exact for g in graded], [g.exact_any for g in graded]):
            right = [sum(column[i : i + options.n]) for i in range(0, len(column), options.n)]
            shares = [[passk.pass_at_k(options.n, c, k) for c in right] for k in ks]
            values += [passk.percent(passk.bootstrap(share)) for share in shares]
        table.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(table)


def sample_texts(policy: Policy, prompts: list[list[int]], options, generator) -> list[str]:
    """n answers to each prompt, one behind the other, sampled as the options say."""
    how = dict(temperature=options.temperature, top_p=options.top_p, generator=generator)
    how |= dict(group_size=options.n, max_new_tokens=options.max_new_tokens)
    return policy.texts(policy.sample(prompts, **how))


def benchmark(options: argparse.Namespace) -> str:
    """Pass@k of a published benchmark, of a model's samples or of those in a file."""
    from sandbox import Box, benchmarks, choose, passk

    items = benchmarks.read(options.command, options.data)
    kind, notice = choose(options.sandbox)
    print(notice, file=sys.stderr)
    if options.predictions:
        source = passk.predictions(options.command, options.predictions, items)
        known = [item for item in items if item.id in source]
        if len(known) < len(items):
            missing = len(items) - len(known)
            print(f"{missing} of {len(items)} items have no sample", file=sys.stderr)
        ks, both = passk.numbers(options.k, min(map(len, source.values()))), False
        items, sampler = known, partial(given, source)
    else:
        ks, both = passk.numbers(options.k, options.n), options.ask == "think"
        policy = load(options.model, options.device, options.dtype)
        options.dtype = str(policy.dtype)[6:]  # not "auto": another machine may choose otherwise
        names = ("model", "ask", "n", "temperature", "top_p", "max_new_tokens", "seed", "dtype")
        source = {name: getattr(options, name) for name in names}
        sampler = partial(codes, policy, options)
    box = Box(options.python, kind, passk.LIMITS)
    passk.check_interpreter(box, items)
    run = passk.fingerprint(items=items, source=source, python=options.python, kind=kind)
    out = Path(options.out) if options.out else None
    return passk.summary(passk.run_items(items, sampler, box, out, run), ks, both)


def given(samples: dict[str, list], items: list) -> list[tuple[list, list]]:
    """The samples of a file, which are code: no form was asked for."""
    return [(samples[item.id], []) for item in items]


def codes(policy: Policy, options: argparse.Namespace, items: list) -> list[tuple[list, list]]:
    """The code of n sampled answers to each item, and whether each has the form asked for.

    Seeded by the items, so that a run that goes on samples what it would have sampled.
    """
    from sandbox import benchmarks, passk

    seed = int(passk.fingerprint(seed=options.seed, first=items[0].id), 16) % 2**62
    prompts = [benchmarks.prompt(item, policy.tokenizer, options.ask) for item in items]
    texts = sample_texts(policy, prompts, options, torch.Generator().manual_seed(seed))
    any_form = options.ask != "think"
    found = [reward.any_code(text) for text in texts]
    asked = [any_form or reward.extract_code(text) is not None for text in texts]
    cuts = [slice(i, i + options.n) for i in range(0, len(found), options.n)]
    return [(found[cut], asked[cut]) for cut in cuts]


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 2 after one sentence on what is wrong with its input."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options = parser().parse_args(arguments)
    if options.temperature is None:
        options.temperature = 0.8 if options.n > 1 else 0.0
    try:
        options.device = chosen_device(options.device)
        check_out(options.out)
        print((updates if options.command == "updates" else benchmark)(options))
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "" if options.command == "updates" else "the same command goes on where it was"
        again = again or "the answers are kept, and --answers reads them"
        print(f"\nstopped; with --out {again}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
