"""Build the files of rows from YAML files, of which each library has at least one.

    python -m data.build          writes the four files and prints their counts

    updates/, hard/               -> updates.jsonl: train, test_seen, test, and test_hard
    updates_2026/                 -> updates_2026.jsonl: test_2026, with the date of each release
    updates_behaviour/            -> updates_behaviour.jsonl: more to train on, for who asks for it
    train rows of both            -> updates_unaffected.jsonl: notes beside programs that need none

One row is one usage of one update, with one wording of its note. The same sources give the same
bytes. Rows that would measure the wrong thing are refused: a target that the note does not
determine, and an edit that is both trained on and asked.
"""

import ast
import collections
import io
import json
import random
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import yaml

from data import HERE

FOLDERS = {  # of each file of rows
    "updates": ("updates", "hard"),
    "updates_2026": ("updates_2026",),
    "updates_behaviour": ("updates_behaviour",),
}
# The split of a folder's rows, where neither library nor update says it.
SPLIT_OF = {"hard": "test_hard", "updates_2026": "test_2026"}
# When the new releases of a folder came out: no model knows the ones, all may know the others.
RELEASED = {
    "updates_2026": ("2025-12-02", "2100-01-01"),
    "updates_behaviour": ("1990-01-01", "2025-11-30"),
}
# Whole libraries that training never sees.
TEST = {"bokeh", "gensim", "jax", "seaborn", "statsmodels", "xarray"}
# Rows of a training update at most: other updates teach more than more of the same.
MOST = {"updates": 4, "updates_behaviour": 6}
FIELDS = "id", "kind", "old_version", "new_version", "description", "notes", "usages"
UNCHANGED = "note does not apply"  # the kind of a row whose right answer is its old code
UNTOUCHED = "The program uses nothing that the note changes, so it stays as it is."


def sources(file: str = "updates") -> dict[str, list[Path]]:
    """The YAML files that a file of rows is made from: of each library, in small letters."""
    found = collections.defaultdict(list)
    for path in (path for name in FOLDERS[file] for path in sorted((HERE / name).glob("*.yaml"))):
        says = re.search(r"(?m)^library: *[\"']?([\w.-]+)", path.read_text(encoding="utf-8"))
        if not says:
            raise ValueError(f"{named(path)}: no line 'library: NAME' says what it is about")
        found[says[1].lower()].append(path)
    return dict(sorted(found.items()))


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def read(path: Path) -> dict:
    """One file as it stands; ValueError says where it is no YAML or lacks a field."""
    try:
        source = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{named(path)} is not YAML: {' '.join(str(error).split())}") from None
    for update in source["updates"]:
        for field in FIELDS:
            if not update.get(field):
                raise ValueError(f"{named(path)}, {update.get('id')}: give it the field '{field}'")
    return source


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
    source, folder = read(path), path.parent.name
    library = source["library"]
    for update in source["updates"]:
        split = "test" if library in TEST else update.get("split", "train")
        split = SPLIT_OF.get(folder, split)
        chosen = usages(update, MOST.get(folder) if split == "train" else None)
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
            if folder in RELEASED:
                row["released"] = str(update.get("released", ""))
            if fault := check_folder(row, folder) or check(row):
                raise ValueError(f"{named(path)}, {row['id']}: {fault}")
            yield row


# ---------------------------------------------------------------- what is refused

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
Edit = tuple[set[str], set[str]]  # the tokens that an edit removes, and those that it adds


def check_folder(row: dict[str, str], folder: str) -> str:
    """Why a row may not stand in this folder, in the words that end a sentence; "" if it may."""
    first, last = RELEASED.get(folder, ("", ""))
    if not first <= row.get("released", "") <= last:
        return f"'released' must be the date of new_version, from {first} to {last}"
    if folder == "updates_behaviour" and row["split"] != "train":
        return f"this folder is trained on, and {row['split']} is held out: leave it out"
    return ""


def check(row: dict[str, str]) -> str:
    """What is wrong with one row, in the words that end a sentence; "" where nothing is."""
    old, new = row["old_code"], row["new_code"]
    try:
        (before, _), (after, of_names) = imports(old), imports(new)
    except (SyntaxError, ValueError) as error:
        return f"one side is not valid Python ({error})"
    if (row["kind"] == UNCHANGED) != (old == new):
        return f"the new code is the old code if, and only if, the kind is '{UNCHANGED}'"
    if wraps(new) > wraps(old):
        return "the new code breaks a line inside brackets where the old code does not: join it"
    lost = before - after - of_names
    if lost := [name for name in lost if not dismissed(name, row["update_info"])]:
        return f"'import {min(lost)}' goes, but the note does not say so: keep it, or let the note"
    return ""


def imports(code: str) -> tuple[set[str], set[str | None]]:
    """The modules of all `import module`, and of all `from module import name`."""
    nodes = list(ast.walk(ast.parse(code)))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return whole, {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def dismissed(module: str, note: str) -> bool:
    """Whether a note can mean that `import module` goes: it names the module itself, not only
    something in it, and speaks of modules or of importing."""
    alone = re.search(rf"(?<![\w.]){re.escape(module)}(?!\w|\.\w|\()", note)
    return bool(alone and re.search(r"(?i)\b(import|module)", note))


def tokens(code: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(code).readline)


def wraps(code: str) -> int:
    """The number of line breaks inside brackets."""
    depth = count = 0
    for token in tokens(code):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        count += depth > 0 and token.type == tokenize.NL
    return count


def edit(row: dict[str, str]) -> Edit:
    """The sets of tokens that a row's edit removes and adds."""
    old, new = (
        collections.Counter(t.string for t in tokens(row[side]) if t.type not in LAYOUT)
        for side in ("old_code", "new_code")
    )
    return set(old - new), set(new - old)


def taught(row: dict[str, str], other: dict[str, str], whole: Edit, part: Edit) -> bool:
    """Whether the edit of `other` answers `row`, which training does not see, from another split.

    test_hard asks about updates of the other test splits once more, but about none of train's, not
    even beside another update of the same library; so may test_2026.
    """
    if not {"test_hard", "test_2026"} & {row["split"], other["split"]}:
        return whole == part
    same = row["dependency"] == other["dependency"] and whole[0] >= part[0] and whole[1] >= part[1]
    return other["split"] == "train" and (same or whole == part)


def check_splits(found: list[tuple[str, dict[str, str]]]) -> None:
    """ValueError names the first edit that stands in two splits. Bare punctuation is no edit."""
    known = [(file, row, edit(row)) for file, row in found]
    known = [e for e in known if re.search(r"\w", " ".join(e[2][0] | e[2][1]))]
    for file, row, whole in (e for e in known if e[1]["split"] != "train"):
        for _, other, part in known:
            if row["split"] != other["split"] and taught(row, other, whole, part):
                says = f"split {other['split']} has this edit, too, in {other['id']}"
                raise ValueError(f"{file}, {row['id']}: {says}: take one of them out")


# ---------------------------------------------------------------- the file


def build() -> dict[str, str]:
    """Each file as text: one JSON object a line, sorted by id. ValueError names a fault."""
    found: dict[str, tuple[Path, dict[str, str]]] = {}
    for path in (path for file in FOLDERS for paths in sources(file).values() for path in paths):
        for row in rows(path):
            if row["id"] in found:
                other = named(found[row["id"]][0])
                raise ValueError(f"{named(path)}, {row['id']}: a row of {other} has this id, too")
            found[row["id"]] = path, row
    train = [row for _, row in found.values() if row["split"] == "train"]
    ordered = [found[name] for name in sorted(found)]
    check_splits([(named(path), row) for path, row in ordered])
    files = {
        file: [row for path, row in ordered if path.parent.name in folders]
        for file, folders in FOLDERS.items()
    }
    files["updates_unaffected"] = unaffected(train)
    return {
        file: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        for file, some in files.items()
    }


def unaffected(train: list[dict[str, str]]) -> list[dict[str, str]]:
    """For every second update a program of its library, already migrated, that the note does not
    concern: it has none of the words that the update's edit removes."""
    first = {row["id"].rpartition("-")[0]: row for row in sorted(train, key=lambda r: r["id"])}
    rng, found = random.Random(0), []
    for update, row in list(first.items())[::2]:
        gone = {word for word in edit(row)[0] if re.match(r"[^\W\d]", word)}
        codes = [other["new_code"] for other in train if other["dependency"] == row["dependency"]]
        fits = [code for code in codes if gone.isdisjoint(re.findall(r"\w+", code))]
        if gone and fits:
            code = rng.choice(fits)
            about = {"id": f"{update}-unaffected", "kind": UNCHANGED, "description": UNTOUCHED}
            found.append(row | about | {"old_code": code, "new_code": code})
    return found


def counts(found: list[dict[str, str]]) -> str:
    """Markdown: the number of updates and rows of each split, library and kind."""
    lines = []
    for field in ("split", "dependency", "kind"):
        lines += ["", f"| {field} | updates | rows |", "|---|---|---|"]
        for name in [*sorted({row[field] for row in found}), "all"]:
            of = [row["id"].rpartition("-")[0] for row in found if name in (row[field], "all")]
            label = f"{name} (held out)" if name in TEST else name
            lines.append(f"| {label} | {len(set(of))} | {len(of)} |")
    return "\n".join(lines[1:])


def main() -> int:
    try:
        texts = build()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for file, text in texts.items():
        path = HERE / f"{file}.jsonl"
        path.write_text(text, encoding="utf-8", newline="\n")
        print(counts([json.loads(line) for line in text.split("\n")[:-1]]))
        print(f"\n{path.name}: {len(text.encode())} bytes\n", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
