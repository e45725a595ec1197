"""Build `updates.jsonl` from the YAML files `updates/<library>.yaml` and `hard/*.yaml`.

    python -m data.build          writes data/updates.jsonl and prints its counts

One row is one usage of one update, with one wording of its note. The same sources give the same
bytes.
"""

import collections
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from data import DEFAULT, HERE

UPDATES = HERE / "updates"
HARD = HERE / "hard"  # the files of the split test_hard, any number for a library
# Whole libraries that training never sees.
TEST = {"bokeh", "gensim", "jax", "seaborn", "statsmodels", "xarray"}
ROWS = 4  # of a training update at most: other updates teach more than more of the same
UNCHANGED = "note does not apply"  # the kind of a row whose right answer is its old code


def sources() -> dict[str, list[Path]]:
    """The YAML files of each library, by its name in small letters."""
    found = collections.defaultdict(list)
    for path in sorted(UPDATES.glob("*.yaml")) + sorted(HARD.glob("*.yaml")):
        named = re.search(r"(?m)^library: *[\"']?([\w.-]+)", path.read_text(encoding="utf-8"))
        if not named:
            raise ValueError(f"{path.name}: no line 'library: NAME' says which library it is about")
        found[named[1].lower()].append(path)
    return dict(sorted(found.items()))


def usages(update: dict, most: int | None = None) -> list[tuple[int, str, str]]:
    """(number, old, new) of each usage as written and of its variations, at most `most`.

    Where that is too few for all, variations go first.
    """
    found = []
    for usage in update["usages"]:
        found.append((False, len(found), usage["old"], usage["new"]))
        for table in usage.get("vary", []):
            words = {str(word): str(other) for word, other in table.items()}
            old, new = (swapped(usage[side], words) for side in ("old", "new"))
            found.append((True, len(found), old, new))
    return sorted(row for _, *row in sorted(found)[:most])


def swapped(code: str, words: dict[str, str]) -> str:
    """`code` with whole words replaced, all at once."""
    pattern = r"\b(?:" + "|".join(map(re.escape, words)) + r")\b"
    return re.sub(pattern, lambda match: words[match[0]], code)


def rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of one file; the wordings of a note take turns.

    ValueError names file and row of the first fault.
    """
    source = yaml.safe_load(path.read_text(encoding="utf-8"))
    library = source["library"]
    for update in source["updates"]:
        split = "test" if library in TEST else update.get("split", "train")
        split = "test_hard" if path.parent == HARD else split
        chosen = usages(update, ROWS if split == "train" else None)
        for place, (number, old, new) in enumerate(chosen):
            row = {
                "id": f"{update['id']}-{number}",
                "dependency": library,
                "old_version": update["old_version"],
                "new_version": "==" + update["new_version"],
                "kind": update["kind"],
                "split": split,
                "description": update["description"].strip(),
                "update_info": update["notes"][place % len(update["notes"])].strip(),
                "old_code": old.strip("\n"),
                "new_code": new.strip("\n"),
            }
            if fault := check(row):
                raise ValueError(f"{path.parent.name}/{path.name}, {row['id']}: {fault}")
            yield row


def check(row: dict[str, str]) -> str:
    """What is wrong with one row, as the end of a sentence; "" where nothing is."""
    if (row["kind"] == UNCHANGED) != (row["old_code"] == row["new_code"]):
        return f"a row's new code is its old code if, and only if, its kind is '{UNCHANGED}'"
    return ""


def build() -> str:
    """The whole file as text: one JSON object a line, sorted by id. ValueError names a fault."""
    found: dict[str, dict[str, str]] = {}
    for path in (path for paths in sources().values() for path in paths):
        for row in rows(path):
            if row["id"] in found:
                raise ValueError(
                    f"{path.parent.name}/{path.name}, {row['id']}: a second row of this id"
                )
            found[row["id"]] = row
    return "".join(json.dumps(found[name], ensure_ascii=False) + "\n" for name in sorted(found))


def main() -> int:
    try:
        text = build()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    DEFAULT.write_text(text, encoding="utf-8", newline="\n")
    found = [json.loads(line) for line in text.split("\n")[:-1]]
    updates = {row["id"].rpartition("-")[0]: row for row in found}
    for field in ("split", "kind", "dependency"):
        counts = collections.Counter(row[field] for row in found)
        distinct = collections.Counter(row[field] for row in updates.values())
        for name in sorted(counts):
            print(f"{field:12} {name:20} {counts[name]:5} rows {distinct[name]:4} updates")
    print(
        f"{len(found)} rows of {len(updates)} updates, {len(text.encode())} bytes: {DEFAULT.name}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
