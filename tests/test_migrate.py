"""migrate.py with a policy that says what it is told to, and once with the bundled one."""

import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import data
import migrate
import policy
from rollout import written

ROOT = Path(__file__).parent.parent
OLD = "import lib\n\n\ndef f(x):\n    return lib.old(x)\n"
NEW = OLD.replace("old", "new")


@pytest.fixture
def run(tiny, tmp_path, monkeypatch, capsys):
    """run(answers, *arguments) -> exit code, stdout, stderr; answers are code, None or [text].

    With `run.cut` they all ran into the limit.
    """
    (tmp_path / "NOTE.md").write_text("`lib.old` is now `lib.new`.")
    (tmp_path / "a.py").write_text(OLD)
    monkeypatch.chdir(tmp_path)
    real = policy.load(str(tiny), "cpu")
    monkeypatch.setattr(migrate, "load", lambda name, device, dtype: real)
    capsys.readouterr()  # of loading

    def told(answers, *arguments):
        texts = [data.answer("", a) if isinstance(a, str) else (a or ["no"])[0] for a in answers]
        ids = real.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = [row + real.eos_ids[:1] for row in ids]

        def sample(prompts, *, group_size, max_new_tokens, temperature):
            assert group_size == len(ids) and (temperature > 0) == (group_size > 1)
            told.prompt = real.tokenizer.decode(prompts[0])
            rollout = written(prompts, [ids], real.pad_id, "cpu")
            return replace(rollout, truncated=rollout.truncated | told.cut)

        monkeypatch.setattr(real, "sample", sample)
        code = migrate.main(migrate.PARSER.parse_args(["--note", "NOTE.md", *arguments]))
        return code, *capsys.readouterr()

    told.cut = False
    return told


def test_the_diff_is_one_that_patch_applies(run):
    """Prevents: a diff that only a person can apply, or an exit code that a script misreads."""
    code, diff, said = run([NEW], "a.py", "--library", "lib", "--version", "2.0")
    assert code == 1 and said == ""
    lines = diff.splitlines()
    assert lines[:2] == ["--- a.py", "+++ a.py"] and Path("a.py").read_text() == OLD
    assert lines[-2:] == ["-    return lib.old(x)", "+    return lib.new(x)"]
    if shutil.which("patch"):
        subprocess.run(["patch", "-s", "a.py"], input=diff, text=True, check=True)
        assert Path("a.py").read_text() == NEW


def test_note_code_library_and_version_are_in_the_prompt(run):
    """Prevents: a migration without the note."""
    run([NEW], "a.py", "--library", "lib", "--version", "2.0")
    for part in ("`lib.old` is now `lib.new`.", OLD, "lib performed an API update in version 2.0"):
        assert part in run.prompt


@pytest.mark.parametrize("answer", [OLD, "# a remark\n" + OLD])
def test_the_same_program_is_no_difference(run, answer):
    """Prevents: exit code 1, and comments of the user's overwritten, where nothing was migrated."""
    assert run([answer], "a.py", "--write") == (0, "", "")
    assert Path("a.py").read_text() == OLD


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (OLD, NEW),
        (OLD.rstrip("\n"), NEW.rstrip("\n")),
        (OLD.replace("\n", "\r\n"), NEW.replace("\n", "\r\n")),
        ("\ufeff\n\n" + OLD + "\n\n", "\ufeff\n\n" + NEW + "\n\n"),
        (OLD + "  \r\n", NEW + "  \r\n"),
    ],
)
def test_write_keeps_ends_and_margins_and_permissions(run, old, new):
    """Prevents: a whole-file change in version control because of line ends or the last newline."""
    Path("a.py").write_bytes(old.encode())
    os.chmod("a.py", 0o750)
    os.symlink("a.py", "link.py")
    code, diff, _ = run([NEW], "link.py", "--write")
    assert code == 1 and Path("a.py").read_bytes() == new.encode()
    assert Path("a.py").stat().st_mode & 0o777 == 0o750 and Path("link.py").is_symlink()
    assert sorted(os.listdir()) == ["NOTE.md", "a.py", "link.py"]  # no draft is left
    assert diff.endswith("+    return lib.new(x)\n\\ No newline at end of file\n") == (
        old[-1] != "\n"
    )
    assert sum(line.startswith("+") for line in diff.split("\n")) == 2  # the header and one line


def test_most_samples_win_and_comments_do_not_split_the_vote(run):
    """Prevents: the first sample wins, answers without code vote, or remarks split equal ones."""
    other = OLD.replace("old", "other")
    answers = [other, NEW, None, "# so\n" + NEW, "def f(:", other, NEW]
    code, diff, said = run(answers, "a.py", "--samples", "7")
    assert code == 1 and "+    return lib.new(x)" in diff and "so" not in diff
    assert said == "a.py: 3 of 7 answers agree\n"


@pytest.mark.parametrize("text", [f"Of course:\n```python\n{NEW}```\nDone.", "\n" + NEW])
def test_code_in_any_form_counts_unless_it_was_cut_off(run, text):
    """Prevents: an untrained model that is of no use; half a program that parses, written."""
    code, diff, said = run([[text]], "a.py")
    assert code == 1 and said == "" and "\n+    return lib.new(x)\n" in diff
    run.cut = True
    code, diff, said = run([[text]], "a.py", "--write")
    assert code == 2 and diff == "" and "no answer of at most 1024 tokens holds code" in said
    assert run([NEW], "a.py")[0] == 1  # in the asked form one sees where code ends


@pytest.mark.parametrize(
    ("old", "answer", "sentence"),
    [
        ("def f(:\n", NEW, "code does not parse"),
        (OLD, "def f(:", "no answer of at most 1024 tokens holds code that parses"),
        (OLD, None, "no answer of at most 1024 tokens holds code that parses"),
        (OLD, "# I would rather not", "no answer of at most 1024 tokens holds code"),
        ("x = 'é'\n".encode("latin-1"), NEW, "utf-8"),
    ],
)
def test_trouble_leaves_the_file_and_goes_on_with_the_next(run, old, answer, sentence):
    """Prevents: a file emptied or broken by a bad answer, or one bad file that ends the rest."""
    Path("bad.py").write_bytes(old if isinstance(old, bytes) else old.encode())
    kept = Path("bad.py").read_bytes()
    code, diff, said = run([answer], "bad.py", "none.py", "a.py", "--write")
    assert code == 2 and Path("bad.py").read_bytes() == kept
    first, second, *_ = said.splitlines()
    assert first.startswith("bad.py is left as it is: ") and sentence in first
    assert second.startswith("none.py is left as it is: ") and "No such file" in second
    assert ("+++ a.py" in diff) == (answer == NEW)


def test_an_empty_file_is_no_difference_and_asks_nobody(run):
    """Prevents: code invented for an empty __init__.py."""
    Path("a.py").write_text("\n")
    assert run([NEW], "a.py", "--write") == (0, "", "")


def test_standard_input(run, monkeypatch):
    """Prevents: a file called `-`, or one that --write makes."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(OLD.encode())))
    code, diff, said = run([NEW], "-", "--write")
    assert code == 1 and diff.startswith("--- -\n+++ -\n") and said == "" and not Path("-").exists()


def test_colour_only_where_it_is_wanted(run, monkeypatch):
    """Prevents: escape codes in a pipe, or in spite of NO_COLOR."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m+    return lib.new(x)" in run([NEW], "a.py")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run([NEW], "a.py")[1]


def test_a_file_too_long_for_the_context_is_left(tiny, tmp_path, capsys):
    """Prevents: an index error in the middle, or an answer to the half of a file."""
    (tmp_path / "NOTE.md").write_text("`lib.old` is now `lib.new`.")
    (tmp_path / "a.py").write_text(OLD * 200)
    arguments = ["--note", str(tmp_path / "NOTE.md"), str(tmp_path / "a.py"), "--model", str(tiny)]
    assert migrate.main(migrate.PARSER.parse_args(arguments)) == 2
    assert "exceed the model's 1024 positions" in capsys.readouterr().err


def test_help_and_wrong_flags_do_not_wait_for_torch():
    """Prevents: seconds before --help is answered."""
    for arguments, rc in ((["--help"], 0), (["--what"], 2), (["a.py"], 2)):
        shown = subprocess.run(
            [sys.executable, "-X", "importtime", "migrate.py", *arguments],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert shown.returncode == rc and "| torch\n" not in shown.stderr


def test_a_run_folder_is_its_checkpoint_and_the_bundled_policy_answers(tmp_path):
    """Prevents: a command that works with stand-ins only; RUN/checkpoint is not found."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").symlink_to(data.POLICY)
    (tmp_path / "NOTE.md").write_text("Renamed functions: `np.product` is now `np.prod`.")
    (tmp_path / "a.py").write_text("import numpy as np\n\nx = np.product([1, 2])\n")
    arguments = "--model run --note NOTE.md --library numpy --samples 4 --max-new-tokens 160 a.py"
    shown = subprocess.run(
        [sys.executable, str(ROOT / "migrate.py"), *arguments.split()],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert shown.returncode in (0, 1) and shown.stderr.endswith(" of 4 answers agree\n"), shown
    assert (shown.returncode == 1) == shown.stdout.startswith("--- a.py\n+++ a.py\n")
