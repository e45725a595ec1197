"""A trained policy at work: an API-update note and Python files in, a unified diff out.

    python migrate.py --model runs/grpo-seed0 --note NOTE.md --library numpy --version 2.0 FILE.py

Exit codes as `diff` has them: 0 no difference, 1 differences, 2 trouble, with a sentence on stderr
for each file that is left as it is. A known limit: comments and layout that the answer lost.
"""

import argparse
import sys

PARSER = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
flag = PARSER.add_argument
flag("files", nargs="+", metavar="FILE.py", help="- is standard input")
flag("--note", required=True, metavar="NOTE.md", help="file: what changed in the library")
flag("--model", default="", help="run folder or model folder (default: the bundled policy)")
flag("--library", default="the library", metavar="NAME", help="as people name it")
flag("--version", default="latest", metavar="V", help="the version that the note is about")
flag("--write", action="store_true", help="change the files too (not standard input)")
flag("--samples", type=int, default=1, metavar="N", help="take the answer that most agree on")
flag("--max-new-tokens", type=int, default=1024, metavar="T", help="longest answer (1024)")
OPTIONS = PARSER.parse_args() if __name__ == "__main__" else None  # answered before torch loads

import re
from contextlib import suppress
from difflib import unified_diff
from pathlib import Path

import torch
from transformers.utils import logging

import data
from policy import Policy, load
from reward import any_code, extract_code, strip_comments
from upkeep.machine import write
from upkeep.terminal import coloured


def answer(policy: Policy, row: data.Example, samples: int, most: int) -> str:
    """New code for the row's old code: greedy, or what most samples say."""
    how = dict(group_size=samples, max_new_tokens=most, temperature=float(samples > 1))
    torch.manual_seed(0)
    votes: dict[str, list[str]] = {}  # programs that differ only in comments vote together
    rollout = policy.sample(policy.prompts([row]), **how)
    for text, cut in zip(policy.texts(rollout), rollout.truncated.flatten(), strict=True):
        code = extract_code(text) if cut else any_code(text)  # half a program may parse, too
        with suppress(SyntaxError):
            votes.setdefault(strip_comments(code or "?"), []).append(code)
    votes.pop("", None)  # nothing but comments
    if not votes:
        raise ValueError(f"no answer of at most {most} tokens holds code that parses")
    same = max(votes.values(), key=len)  # of equally many the first
    if samples > 1:
        print(f"{row.id}: {len(same)} of {samples} answers agree", file=sys.stderr)
    return same[0]


def migrated(policy: Policy, name: str, old: str, options: argparse.Namespace) -> str:
    """A file's new text: byte order mark, blank margins and line ends stay (mixed ones: LF)."""
    end = "\r\n" if old.count("\r\n") == old.count("\n") > 0 else "\n"
    head, body, tail = re.fullmatch("(\ufeff?\\s*\n|\ufeff?)(.*?)(\\s*)", old, re.DOTALL).groups()
    if not body:
        return old
    note, body = Path(options.note).read_text("utf-8"), body.replace("\r\n", "\n")
    program = strip_comments(body)  # SyntaxError if it does not parse
    row = data.Example(options.library, options.version, "", note, body, "", id=name)
    code = answer(policy, row, options.samples, options.max_new_tokens).strip("\n")
    return old if strip_comments(code) == program else head + code.replace("\n", end) + tail


def migrate(policy: Policy, name: str, options: argparse.Namespace) -> int:
    """Show one file's diff, write its new text if asked to, and return its exit code."""
    path = Path(name).resolve()  # a link stays a link
    old = (sys.stdin.buffer.read() if name == "-" else path.read_bytes()).decode()
    new = migrated(policy, name, old, options)
    rows = (re.findall("[^\n]*\n|[^\n]+$", text) for text in (old, new))
    for line in unified_diff(*rows, name, name):
        print(coloured(line), end="" if line[-1] == "\n" else "\n\\ No newline at end of file\n")
    if options.write and name != "-" and new != old:
        mode = path.stat().st_mode
        write(path, new)
        path.chmod(mode)
    return int(new != old)


def main(options: argparse.Namespace) -> int:
    """The command: the worst exit code of all files."""
    logging.disable_progress_bar()
    run, device = Path(options.model, "checkpoint"), "cuda" if torch.cuda.is_available() else "cpu"
    policy, worst = None, 0
    for name in options.files:
        try:
            policy = policy or load(str(run) if run.is_dir() else options.model, device, "auto")
            worst = max(worst, migrate(policy, name, options))
        except (OSError, ValueError, SyntaxError) as error:
            print(f"{name} is left as it is: {error}", file=sys.stderr)
            worst = 2
    return worst


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
