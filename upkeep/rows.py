"""Before a run begins: can each of its rows be answered rightly, and in the tokens it has?"""

import math

import data
from evaluate import grade
from policy import Policy


def check_rows(policy: Policy, path: str, max_new_tokens: int) -> None:
    """ValueError names the first row whose true answer is not worth 3, or that is too long."""
    for split in dict.fromkeys(["train", *data.splits(path)]):  # "train" must be there
        rows = data.load(path, split)
        for example, prompt in zip(rows, policy.prompts(rows), strict=True):
            if fault := row_fault(example, len(prompt), policy, max_new_tokens):
                raise ValueError(f"{data.where(path, example)}: {fault}, or drop the row")


def row_fault(example: data.Example, prompt: int, policy: Policy, new: int) -> str:
    """Why nobody can be right about this row; "" if one can. Lengths in tokens."""
    ids = data.encoded(data.completion(example), policy.tokenizer)
    length, answer = len(ids) + 1, policy.tokenizer.decode(ids)
    try:
        (graded,) = grade([example], [answer])
        right = graded.exact and graded.format == 1
    except ValueError:  # too long a statement
        right = False
    room = getattr(policy.model.config, "max_position_embeddings", None) or math.inf
    if not right:
        return (
            "its true answer would not score 3 (a fence, a tag or a statement of over 20,000 "
            "tokens in new_code, or what the tokenizer does not give back): mend it"
        )
    if length > new and example.split in ("", "train"):  # what is graded may be longer
        return f"its true answer has {length} tokens, --max-new-tokens is {new}: raise that"
    if prompt + max(new, length) > room:
        return (
            f"its prompt of {prompt} tokens and --max-new-tokens {new} (or its true answer of "
            f"{length}) exceed the model's context of {room}: lower that"
        )
    return ""
