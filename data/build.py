"""Build `updates.jsonl` from the YAML files `updates/<library>.yaml`.

    python -m data.build          writes data/updates.jsonl and prints its counts

One row is one usage of one update, with one wording of its note. The same sources give the same
bytes.
"""

import collections
import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from data import DEFAULT, HERE

# Whole libraries that training never sees.
TEST = {"bokeh", "gensim", "jax", "seaborn", "statsmodels", "xarray"}
ROWS = 4  # of a training update at most: other updates teach more than more of the same


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
    """The rows of one library; the wordings of a note take turns."""
    source = yaml.safe_load(path.read_text(encoding="utf-8"))
    library = source["library"]
    for update in source["updates"]:
        split = "test" if library in TEST else update.get("split", "train")
        chosen = usages(update, ROWS if split == "train" else None)
        for place, (number, old, new) in enumerate(chosen):
            yield {
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


def build() -> str:
    """The whole file as text: one JSON object a line, sorted by id."""
    found = [row for path in sorted((HERE / "updates").glob("*.yaml")) for row in rows(path)]
    found.sort(key=lambda row: row["id"])
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)


def main() -> None:
    text = build()
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


if __name__ == "__main__":
    main()
