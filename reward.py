"""Rule-based rewards of ReCode (arXiv 2506.20495): format, and EM*, ES* or EM_copy.

    total = format (+1 / -1) + correctness, in [-3, 3]
    EM*   = 2 equal to the target | -1.5 parses but differs | -2 no code, or it does not parse
    ES*   = 3.5 * ES - 1.5, ES = 1 - distance / max(len)    | -2 no code, or it does not parse
    EM_copy = 2 equal to the target | 0 parses but differs  | -2 a copy of the old code, or as above

EM* and ES* are the paper's, and pay a copy of the old code like any other wrong answer, or better:
where its samples are worse than a copy, a lazy model learns to copy. EM_copy is ours.
Compared are the characters that `strip.py` leaves: no comments, docstrings or blank lines. Nothing
here runs the code. (The release scored fences in <think>, and its regular expressions ate code.)
"""

import re
from typing import NamedTuple

import torch
from torch import FloatTensor

from edit_distance import Device, levenshtein
from strip import does_something, strip_comments

PYTHON = ("", "python", "py")  # what may stand behind the ``` that opens a fence of code
MAX_TEXT = 2**17  # characters: no code is sought in more, for a megabyte takes seconds

# ---- rewards ------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What the code of an answer is, comments, docstrings and blank lines aside."""

    code: str | None  # stripped; None: there is none in the asked form, or it does not parse
    target: str  # stripped
    parses: bool
    equal: bool  # the target
    copied: bool  # the old code: False if that was not given, and beside equal if both are one


PRICES = {  # of a verdict; es: how like the target its code is, 0 to 1
    "em_star": lambda v, es: 2.0 if v.equal else -1.5 if v.parses else -2.0,
    "es_star": lambda v, es: 3.5 * es - 1.5 if v.parses else -2.0,
    "em_copy": lambda v, es: 2.0 if v.equal else -2.0 * v.copied if v.parses else -2.0,
}


def score(
    completions: list[str],
    targets: list[str],
    correctness: str = "es_star",
    device: Device = "cpu",
    old_codes: list[str] | None = None,
) -> dict[str, FloatTensor]:
    """{"format", "correctness", "exact", "total"}, with `old_codes` "copied": float32 [N] each.

    `correctness` is "es_star", "em_star" or, with `old_codes`, "em_copy", anything else a
    ValueError; `exact` is 1.0 where the stripped code equals the target's, else 0.0, and `copied`
    where it equals the old code; total = format + correctness.
    """
    if correctness not in PRICES:
        raise ValueError(f"correctness must be em_star, es_star or em_copy, got {correctness!r}")
    if correctness == "em_copy" and old_codes is None:
        raise ValueError("correctness em_copy compares with the old code: give old_codes")
    answers = verdicts(completions, targets, old_codes)
    right = price(answers, correctness, device)
    layout = torch.tensor([format_reward(text) for text in completions], device=device).float()
    exact = torch.tensor([v.equal for v in answers], device=device).float()
    scores = {"format": layout, "correctness": right, "exact": exact, "total": layout + right}
    copied = torch.tensor([v.copied for v in answers], device=device).float()
    return scores if old_codes is None else scores | {"copied": copied}


def es_star(completions: list[str], targets: list[str], device: Device = "cpu") -> FloatTensor:
    """ES*, list[N], list[N] -> float32 [N] on `device`; raises like `verdicts`."""
    return price(verdicts(completions, targets, None), "es_star", device)


def em_star(completions: list[str], targets: list[str]) -> FloatTensor:
    """EM*, list[N], list[N] -> float32 [N] on the CPU; raises like `verdicts`."""
    return price(verdicts(completions, targets, None), "em_star")


def price(answers: list[Verdict], rule: str, device: Device = "cpu") -> FloatTensor:
    """What these answers are worth by a rule of `PRICES`: -> float32 [N] on `device`."""
    likeness = similarity(answers, device) if rule == "es_star" else [0.0] * len(answers)
    return torch.tensor(list(map(PRICES[rule], answers, likeness)), device=device).float()


def similarity(answers: list[Verdict], device: Device) -> list[float]:
    """ES = 1 - distance / max(len), of the code of each answer ("" if there is none)."""
    pairs = [(v.code or "", v.target) for v in answers]
    distance = levenshtein([code for code, _ in pairs], [goal for _, goal in pairs], device)
    rows = zip(distance.tolist(), pairs, strict=True)
    return [1 - d / max(1, *map(len, pair)) for d, pair in rows]  # two empty sides: 1 - 0 / 1


def verdicts(completions: list[str], targets: list[str], olds: list[str] | None) -> list[Verdict]:
    """The verdict on each of N answers. Targets and old codes are bare code, without a fence.

    Raises ValueError if the lists differ in length, or a target or old code does not parse: that is
    the data's fault. No completion raises.
    """
    if len(completions) != len(targets):
        raise ValueError(f"got {len(completions)} completions for {len(targets)} targets")
    goals = [_stripped(text, "target") for text in targets]
    olds = [None] * len(goals) if olds is None else [_stripped(text, "old code") for text in olds]
    rows = zip(map(_stripped_code, completions), goals, olds, strict=True)
    return [_verdict(*row) for row in rows]


def _verdict(code: str | None, target: str, old: str | None) -> Verdict:
    parses = code is not None
    return Verdict(code, target, parses, code == target, parses and code == old)


def _stripped(program: str, what: str) -> str:
    try:
        return strip_comments(program)
    except SyntaxError as error:
        raise ValueError(f"{what} is no valid Python ({error}): {program[:500]!r}") from None


def _stripped_code(completion: str) -> str | None:
    code = extract_code(completion) if len(completion) <= MAX_TEXT else None
    try:
        return None if code is None else strip_comments(code)
    except SyntaxError:
        return None


# ---- format: one think block, one answer block; and the one fence in it ------------------------


def format_reward(completion: str) -> float:
    """+1.0 if "<think>" + completion is one think block, then one answer block, else -1.0.

    Only white space may stand between and after. A tag that code quotes counts as a tag.
    """
    text = "<think>" + completion  # the prompt ends with the opening tag
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return -1.0
    # Each tag stands once and <think> comes first, so the order of the other three is all that is
    # left. No regular expression: nothing can backtrack over a megabyte of almost-tags.
    rest = text.partition("</think>")[2].strip()
    return 1.0 if rest.startswith("<answer>") and rest.endswith("</answer>") else -1.0


def extract_code(completion: str) -> str | None:
    """The one fenced block of the one answer block after </think>; None if there is no such thing.

    What stands before </think> never counts, without </think> nothing has been answered, and with
    another think block around or before the answer neither. A line ``` closes the fence wherever
    it stands, in a string of the code too. Line ends of the code become LF, its last one goes.
    """
    rest = completion.partition("</think>")[2]
    before, _, after = rest.partition("<answer>")
    answer, closed, after = after.partition("</answer>")
    if not closed or any(tag in before + after for tag in ("<answer>", "</answer>")):
        return None
    if "<answer>" in answer or "<think>" in before or "</think>" in after:  # nested
        return None
    blocks = _fenced_blocks(answer)
    one = len(blocks) == 1 and blocks[0] is not None and blocks[0][0] in PYTHON
    return blocks[0][1] if one else None


def any_code(completion: str) -> str | None:
    """The code of an answer in whatever form; None if there is none. For reports, never training.

    The code in the asked form, if there is one. Else, of what stands after the last </think> (of
    everything, where nothing does) without answer tags: the last fence of Python, if no fence is
    left open (the answer was cut off); where there is no fence at all, the whole text, if it parses
    and imports, calls, defines or assigns something: a word of prose that parses is no code.
    """
    if len(completion) > MAX_TEXT:
        return None
    if (code := extract_code(completion)) is not None:
        return code
    thought, _, rest = re.sub("</?answer>", "\n", completion).rpartition("</think>")
    text = rest if rest.strip() else thought
    blocks = _fenced_blocks(text)
    if blocks:
        fences = [code for language, code in blocks if language in PYTHON] if blocks[-1] else []
        return fences[-1] if fences else None
    return text.strip("\n") if does_something(text) else None


def _fenced_blocks(text: str) -> list[tuple[str, str] | None]:
    """Every (language, code) between fences in column 0; a last None is a fence that never ends."""
    blocks, language, code = [], None, []
    for line in text.replace("\r\n", "\n").split("\n"):
        fence = line.rstrip()
        if language is None and fence.startswith("```") and "`" not in fence[3:]:
            language, code = fence[3:].lower(), []  # any language opens: its end is no start
        elif language is not None and fence == "```":
            blocks.append((language, "\n".join(code)))
            language = None
        else:
            code.append(line)
    return blocks if language is None else [*blocks, None]
