"""The updates of 2026, a test that no model has seen, and more rows to train on."""

import json
import re

import pytest

import data
from data import build, verify

SPECIAL = {"long program", "several updates", build.UNCHANGED}
FILES = ["updates_2026", "updates_behaviour"]


def read(file):
    lines = (data.HERE / f"{file}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def updates(rows):
    return {row["id"].rpartition("-")[0]: row["kind"] for row in rows}


def test_size_of_the_updates_of_2026():
    """Prevents: a slip in the builder drops a library, or the test is too small to tell."""
    rows = read("updates_2026")
    plain = [kind for kind in updates(rows).values() if kind not in SPECIAL]
    assert len(rows) >= 300 and len(plain) >= 120
    assert len({row["dependency"] for row in rows}) >= 45
    assert sum(row["old_code"].count("\n") >= 24 for row in rows) >= 40
    assert sum(row["kind"] == "several updates" for row in rows) >= 40
    assert sum(row["kind"] == build.UNCHANGED for row in rows) >= 40
    renamed = [kind for kind in plain if "renamed" in kind or "moved" in kind]
    assert len(renamed) <= len(plain) / 2


def test_size_of_the_rows_of_changed_behaviour():
    """Prevents: too few to learn from, or rows that are about something else."""
    rows = read("updates_behaviour")
    assert len(rows) >= 240 and len(updates(rows)) >= 60
    assert {row["split"] for row in rows} == {"train"}
    assert not {row["dependency"] for row in rows} & build.TEST
    names = [kind for kind in updates(rows).values() if "renamed" in kind or "moved" in kind]
    assert not names


def test_no_unaffected_program_has_a_word_that_its_update_removes():
    """Prevents: rows that teach to leave alone what the note wants changed, or held-out programs
    to train on."""
    rows, removed = read("updates_unaffected"), {}
    train = [row for file in build.FOLDERS for row in read(file) if row["split"] == "train"]
    for row in train:  # by any of the update's usages
        removed.setdefault(row["id"].rpartition("-")[0], set()).update(build.edit(row)[0])
    codes = {(row["dependency"], row["new_code"]) for row in train}
    assert len(rows) >= 150
    for row in rows:
        assert row["old_code"] == row["new_code"] and row["split"] == "train", row["id"]
        assert (row["dependency"], row["new_code"]) in codes and row["kind"] == build.UNCHANGED
        words = set(re.findall(r"[^\W\d]\w*", row["new_code"]))
        assert not words & removed[row["id"].rpartition("-")[0]], row["id"]
    assert not {row["dependency"] for row in rows} & build.TEST


@pytest.mark.parametrize("file", FILES)
def test_every_row_is_proved(file):
    """Prevents: a row that was never run, or that was changed after its proof."""
    records = verify.read(verify.RECORDS[file])
    paths = [path for paths in build.sources(file).values() for path in paths]
    rows = [row for path in paths for row in verify.rows(path, file=file)]
    bad = [row.id for row in rows if not verify.stands(row, records.get(row.id, {}), None)]
    assert bad == [] and records.keys() == {row.id for row in rows}


@pytest.mark.parametrize("file", FILES)
def test_the_counts_of_the_page_are_those_of_the_file(file):
    """Prevents: rows come and go, and data/README.md tells of the former ones."""
    page = (data.HERE / "README.md").read_text(encoding="utf-8")
    assert build.counts(read(file)) in page


def test_a_library_is_tried_in_one_release_and_few_environments():
    """Prevents: an hour goes by before the first answer is run."""
    paths = [path for paths in build.sources("updates_2026").values() for path in paths]
    rows = [row for path in paths for row in verify.rows(path)]
    assert len({verify.home(row.new_release) for row in rows}) <= 12
    for group in verify.groups():
        names = [package.partition("==")[0].lower() for package in group]
        assert len(set(names)) == len(names), group
