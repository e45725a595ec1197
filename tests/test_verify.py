"""The proof by execution: the outcomes of a run, the verdict on a row, and the record."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from data import HERE, build, verify
from data.verify import MISSING, Run

NEW = "print(sum([1, 2]))"
WARN = "import warnings\nwarnings.warn('add is old', DeprecationWarning)\n"
OLD = WARN + NEW
RELEASE = ("Python new",)
ROW = verify.Row("toy-0", "toy", "print(add([1, 2]))", NEW, RELEASE, RELEASE)


async def install(release, folder):
    """In place of the real one: the running interpreter, or nothing for a release "absent"."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    if not python.exists():
        python.symlink_to(os.path.realpath(sys.executable))
    return "no such release" if "absent" in release[0] else ""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a program in the running interpreter."""
    monkeypatch.setattr(verify, "install", install)
    return lambda code: asyncio.run(verify.run(RELEASE, tmp_path / "envs", code))


def record_of():
    return verify.RECORDS["updates"]


@pytest.fixture
def prove(tmp_path, monkeypatch):
    """Proves a data set of one row in a folder of its own; returns exit status and record."""
    monkeypatch.setattr(verify, "install", install)
    monkeypatch.setattr(verify.shutil, "which", lambda name: name)
    monkeypatch.setattr(build, "HERE", tmp_path)
    for file in verify.RECORDS:
        monkeypatch.setitem(verify.RECORDS, file, tmp_path / f"record_{file}.jsonl")
    monkeypatch.setattr(verify, "EXACT", tmp_path / "verified_exact.jsonl")

    def call(old, new, *options, old_version="old", new_version="new", kind="any", **more):
        folder = more.pop("folder", "updates")
        update = {"id": "toy", "old_version": old_version, "new_version": new_version, **more}
        update |= {"kind": kind, "description": "any", "notes": ["no import of warnings"]}
        update["usages"] = [{"old": old, "new": new}]
        updates = json.dumps([update])  # JSON is YAML as well
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "python.yaml").write_text(f"library: python\nupdates: {updates}")
        record = verify.RECORDS["updates" if folder == "hard" else folder]
        return verify.main(list(options)), verify.read(record).get("toy-0")

    return call


# ---------------------------------------------------------------- the verdict on a row


def test_clean_pair_is_proved(prove, capsys):
    """Prevents: a right row is refused."""
    status, record = prove(OLD, NEW)
    assert status == 0 and record["reason"] == ""
    assert [record[name] for name in verify.RUNS] == ["ok", "warns: DeprecationWarning", "ok"]
    assert "1 proved three ways" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (OLD, "print(1 / 0)", "new_on_new: fails: ZeroDivisionError"),
        (OLD, "import sys\nsys.exit(1)", "new_on_new: fails: SystemExit"),
        (OLD, "import os\nos._exit(0)", "new_on_new: killed"),
        (OLD, WARN.replace("add", "sum") + NEW, "new_on_new: warns: DeprecationWarning"),
        (OLD, "total = 3", "new_on_new: prints nothing; old_on_old: differs"),
        ("print(3)", NEW, "old_on_new: same as new"),
        ("print(4)", NEW, "old_on_old: differs"),
        ("print(add)", NEW, "old_on_old: fails: NameError"),
    ],
)
def test_each_fault_is_told_apart(prove, old, new, reason):
    """Prevents: a wrong row is counted as proved, or its reason misleads."""
    status, record = prove(old, new)
    assert status == 1 and record["reason"] == reason


def test_a_note_that_does_not_apply_is_proved_by_sameness(prove):
    """Prevents: a row that is right to copy is refused, or its record says that nothing was run."""
    status, record = prove(NEW, NEW, kind=build.UNCHANGED)
    assert status == 0 and record["reason"] == "" and record["kind"] == build.UNCHANGED
    assert [record[name] for name in verify.RUNS] == ["ok", "same as new", "ok"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (OLD, "new_on_new: warns: DeprecationWarning"),
        ("total = 3", "new_on_new: prints nothing"),
        ("print(1 / 0)", "new_on_new: fails: ZeroDivisionError; "
         "old_on_new: fails: ZeroDivisionError; old_on_old: fails: ZeroDivisionError"),
        ("import os\nprint(os.getpid())", "old_on_new: differs; old_on_old: differs"),
    ],
)  # fmt: skip
def test_code_that_needs_a_change_is_not_proved_unchanged(prove, code, reason):
    """Prevents: a row whose code must change, or shows nothing, teaches to leave it."""
    status, record = prove(code, code, kind=build.UNCHANGED)
    assert status == 1 and record["reason"] == reason


def test_a_fault_of_a_source_is_one_sentence(prove, capsys):
    """Prevents: an unchanged row that is no such kind is run for nothing, or a traceback."""
    status, record = prove(NEW, NEW)
    assert status == 2 and record is None
    assert "python.yaml, toy-0: the new code is the old code if" in capsys.readouterr().err


def test_a_program_that_does_not_end_is_ended(prove, monkeypatch):
    """Prevents: one endless loop holds everything up, or counts as an old program that fails."""
    monkeypatch.setattr(verify, "LIMIT", 1)
    status, record = prove("while True:\n    pass", NEW)
    assert status == 1 and record["reason"] == "old_on_new: timeout; old_on_old: timeout"


@pytest.mark.parametrize(
    ("old_version", "new_version", "state"),
    [
        ("absent", "new", "1 proved two ways (no old release)"),
        ("old", "absent", "1 no new release"),
    ],
)
def test_a_missing_release_is_counted(prove, capsys, old_version, new_version, state):
    """Prevents: what could not be installed is passed over in silence, or called a failure."""
    status, record = prove(OLD, NEW, old_version=old_version, new_version=new_version)
    said = capsys.readouterr().out
    assert status == 0 and state in said
    assert record["reason"] == "Python absent is not installed: no such release"
    assert "1 x Python absent is not installed: no such release" in said


@pytest.mark.parametrize(
    ("warned", "outcome"),
    [
        (["FutureWarning", True, "keep_dims will change"], "warns: FutureWarning"),
        (["ToyDeprecated", False, "`add` is deprecated"], "warns: ToyDeprecated"),
        (["FutureWarning", False, "another library is old"], "same as new"),
        (["FutureWarning", True, "of both"], "same as new"),
    ],
)
def test_a_warning_counts_only_where_it_is_about_the_change(warned, outcome):
    """Prevents: any warning from deep inside a library proves that the old API is deprecated."""
    both = ["FutureWarning", True, "of both"]
    changed = Run("ok", "", "3\n", [warned, both])
    record = verify.judge(ROW, Run("ok", "", "3\n", [both]), changed, Run(MISSING))
    assert record["old_on_new"] == outcome


# ---------------------------------------------------------------- running a program


def test_programs_run_apart_and_under_the_same_conditions(run):
    """Prevents: a program sees the files, names or input of another, or a hash that changes."""
    code = (
        "import os, sys\n"
        "print(os.listdir('.'), os.environ['MPLBACKEND'], hash('word'), sys.stdin.read())\n"
        "print('made' in globals(), 'toy' in sys.modules)\n"
        "made = open('left', 'w').write('x')\nsys.modules['toy'] = sys\n"
    )
    first, second = run(code), run(code)
    assert first.printed.startswith("[] Agg ") and first.printed.endswith("False False\n")
    assert first == second and first.outcome == "ok"


def test_the_category_of_a_library_is_a_deprecation(run):
    """Prevents: only the built-in categories count, and a plain UserWarning counts too."""
    code = "import warnings\nclass OddDeprecation(UserWarning): pass\n"
    code += "for kind in OddDeprecation, UserWarning, PendingDeprecationWarning:\n"
    got = run(code + "    warnings.warn('x', kind)")
    assert [kind for kind, _, _ in got.warned] == ["OddDeprecation", "PendingDeprecationWarning"]
    assert all(here for _, here, _ in got.warned)


def test_only_modules_of_both_sides_are_imported_beforehand():
    """Prevents: a warning at the import of the old module is lost in the import beforehand."""
    row = ROW._replace(
        old_code="import numpy as np\nimport toyold\nimport os",
        new_code="from numpy import sum\nimport toynew\nimport os",
    )
    assert verify.modules(row) == ("numpy",)


def test_rows_of_the_standard_library_run_here(run):
    """Prevents: the committed rows and this verifier drift apart."""
    here = (f"Python {sys.version_info.major}.{sys.version_info.minor}",)
    found = [
        row for row in verify.rows(HERE / "updates" / "python.yaml") if row.new_release == here
    ]
    for row in found[::5]:
        got = run(row.new_code)
        record = verify.judge(row, got, Run(MISSING), Run(MISSING))
        assert record["new_on_new"] == "ok", (row.id, got)


# ---------------------------------------------------------------- releases and environments


def test_the_fields_of_an_update_choose_the_releases():
    """Prevents: a row is proved in another release than its file says."""
    update = {"old_version": "1", "new_version": "2", "run_version": "2.5", "requires": ["b"]}
    source = {"library": "toy", "python": "3.9", "requires": ["a"]}
    old, new = verify.releases(source, update | {"old_python": "3.8"})
    assert old == ("Python 3.8", "toy==1", "a", "b") and new == ("Python 3.9", "toy==2.5", "a", "b")
    old, _ = verify.releases(source, update | {"old_requires": ["c"]})
    assert old == ("Python 3.9", "toy==1", "c")
    assert verify.releases({"library": "python"}, update) == (("Python 1",), ("Python 2.5",))


def test_an_exact_release_is_the_new_version_under_a_python_that_has_it():
    """Prevents: --exact proves run_version again, or an old one with packages too new for it."""
    update = {"old_version": "1", "new_version": "2", "run_version": "2.5", "old_requires": ["c"]}
    source = {"library": "toy", "python": "3.9", "requires": ["a"]}
    old, new = verify.releases(source, update, [])
    assert old == ("Python 3.9", "toy==1", "c") and new == ("Python 3.9", "toy==2", "a")
    old, new = verify.releases(source, update, ["3.7", "d<4"])
    assert old == ("Python 3.9", "toy==1", "c") and new == ("Python 3.7", "toy==2", "d<4")
    assert verify.releases(source, update, ["3.7"])[1] == ("Python 3.7", "toy==2", "c")


@pytest.mark.parametrize(
    ("complaint", "reason"),
    [
        (
            "x Because there is no\n  version of toy==9 and you require",
            "there is no version of toy==9",
        ),
        ("error: Failed to build `toy==9`\n at /home/me/x", "cannot build toy==9"),
        ("error: https://index.example/toy: no route to 10.0.0.1", "uv cannot install it"),
    ],
)
def test_the_reason_is_the_same_on_every_machine(tmp_path, monkeypatch, complaint, reason):
    """Prevents: a path or a host of one machine is committed with the record."""
    (tmp_path / "uv").write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{complaint}\nEND\nexit 1\n")
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert asyncio.run(verify.uv("pip", "install", "toy==9")) == reason


def test_ctrl_c_ends_who_waits_for_another_s_environment(tmp_path):
    """Prevents: a thread that waits for the lock keeps a stopped program alive for ever."""
    (tmp_path / "uv").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "uv").chmod(0o755)
    code = (
        "import asyncio, signal\nfrom pathlib import Path\nfrom data import verify\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "async def main():\n"
        f"    folders = [Path({str(tmp_path)!r}, 'envs', str(i)) for i in range(3)]\n"
        "    jobs = [verify.install(('Python 3', str(f)), f) for f in folders]\n"
        "    asyncio.get_running_loop().call_later(1, lambda: print('waiting', flush=True))\n"
        "    await asyncio.gather(*jobs)\n"
        "asyncio.run(main())\n"
    )
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "cwd": HERE.parent}
    with subprocess.Popen([sys.executable, "-c", code], env=env, **how) as process:
        try:
            assert process.stdout.readline() == b"waiting\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(20)
        finally:
            process.kill()


def test_environments_go_unless_they_are_kept(prove, tmp_path, monkeypatch):
    """Prevents: a disk full of environments, or --envs that keeps nothing."""
    made = []

    async def noted(release, folder):
        made.append(folder)
        return await install(release, folder)

    monkeypatch.setattr(verify, "install", noted)
    prove(OLD, NEW)
    assert made and not any(folder.exists() for folder in made)
    prove(OLD, NEW, "--again", "--envs", str(tmp_path / "envs"))
    assert len(list((tmp_path / "envs").iterdir())) == 2


def test_releases_that_go_together_share_an_environment(prove, tmp_path, monkeypatch):
    """Prevents: an environment for each library, or a row proved beside a release it did not ask
    for, or records that fall when another library joins."""
    group = ("Python new", "toy==2", "Python old")
    monkeypatch.setattr(verify, "groups", lambda: [("Python new", "toy==1"), group])
    assert verify.home(("Python new", "toy==2")) == group
    assert verify.home(("Python new", "toy==3")) == ("Python new", "toy==3")
    envs = tmp_path / "envs"
    _, record = prove(OLD, NEW, "--envs", str(envs), new_version="old")
    assert [folder.name for folder in envs.iterdir()] == [verify.digest(*group)]
    assert record["new_release"] == record["old_release"] == "Python old"


def test_an_environment_lives_until_its_last_row_is_done(prove, tmp_path, monkeypatch):
    """Prevents: a shared environment goes while another library's rows run in it, or stays on the
    disk until all rows are proved."""
    there, real = [], verify.run

    async def noted(release, envs, *program):
        there.append((release[0], len(list(envs.iterdir()))))
        return await real(release, envs, *program)

    monkeypatch.setattr(verify, "run", noted)
    prove(OLD, NEW)
    other = (tmp_path / "updates" / "python.yaml").read_text().replace("toy", "zoo")
    other = other.replace("python", "zoo")
    (tmp_path / "updates" / "zoo.yaml").write_text(other)
    (tmp_path / "updates" / "last.yaml").write_text(other.replace("zoo", "last"))
    group = ("A", "Python new", "Python old", "Python 3.11", "zoo==new", "zoo==old")
    monkeypatch.setattr(verify, "groups", lambda: [group])
    there.clear()
    prove(OLD, NEW, "--again", "--jobs", "1")
    assert there == [("A", n) for n in (0, 1, 1, 1, 1, 1)] + [("Python 3.11", n) for n in (0, 1, 1)]


# ---------------------------------------------------------------- the record


@pytest.fixture
def programs(monkeypatch):
    """The programs that were run, in their order."""
    seen, real = [], verify.run

    async def noted(release, envs, code, modules):
        seen.append(code)
        return await real(release, envs, code, modules)

    monkeypatch.setattr(verify, "run", noted)
    return seen


def test_only_new_changed_and_failed_rows_are_run(prove, programs):
    """Prevents: an hour of work is done twice, or a changed row keeps its old proof."""
    prove(OLD, NEW)
    whole = record_of().read_bytes()
    prove(OLD, NEW)
    assert programs == [NEW, OLD, OLD]
    prove(OLD, NEW, "--again")
    assert len(programs) == 6 and record_of().read_bytes() == whole
    _, record = prove(WARN + "print(4)", NEW)
    assert len(programs) == 9 and record["reason"] == "old_on_old: differs"
    prove(WARN + "print(4)", NEW)
    assert len(programs) == 12
    prove(OLD, NEW)
    prove(OLD, NEW, new_version="newer")
    assert len(programs) == 18


def test_records_of_rows_that_are_gone_go_and_others_stay(prove):
    """Prevents: the record proves rows that nobody has, or --library forgets the others."""
    _, record = prove(OLD, NEW)
    other = record | {"id": "other-0", "dependency": "other"}
    verify.write(record_of(), {"toy-7": record | {"id": "toy-7"}, "other-0": other})
    prove(OLD, NEW)
    assert list(verify.read(record_of())) == ["other-0", "toy-0"]
    assert record_of().read_bytes().endswith(b"}\n")


def test_each_file_of_rows_has_a_record_of_its_own(prove):
    """Prevents: the rows of 2026 are written into the record of the others, or are not asked for
    by name."""
    prove(OLD, NEW)
    whole = record_of().read_bytes()
    new = {"folder": "updates_2026", "released": "2026-03-01"}
    status, record = prove(OLD, NEW, "--file", "updates_2026", **new)
    assert status == 0 and record["file"] == "updates_2026" and record_of().read_bytes() == whole
    assert prove(OLD, NEW, "--file", "updates", **new)[1] == record


@pytest.mark.parametrize("missing", ["old_version", "new_version"])
def test_what_is_not_installed_proves_nothing_new(prove, missing, capsys):
    """Prevents: a row of 2026 counts as proved where one of its releases could not be had."""
    new = {"folder": "updates_2026", "released": "2026-03-01", missing: "absent"}
    status, record = prove(OLD, NEW, **new)
    assert status == 1 and "Python absent is not installed" in record["reason"]
    assert "1 FAILED" in capsys.readouterr().out


def test_two_proofs_at_once_keep_each_other_s_records(prove, monkeypatch):
    """Prevents: a second process writes back what it read before the first was done."""
    _, record = prove(OLD, NEW)
    real = verify.read

    def slow(path):
        found = real(path)
        time.sleep(0.2)  # time for the other one to write
        return found

    monkeypatch.setattr(verify, "read", slow)
    both = [
        threading.Thread(target=verify.write, args=(record_of(), {name: record | {"id": name}}))
        for name in ("ant-0", "bee-0")
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert list(real(record_of())) == ["ant-0", "bee-0", "toy-0"]


def test_the_files_of_one_library_are_proved_together(prove, programs, tmp_path):
    """Prevents: hard/ is passed over, or two files of one library make one environment at once."""
    prove(OLD, NEW)
    (tmp_path / "hard").mkdir()
    other = (tmp_path / "updates" / "python.yaml").read_text().replace("toy", "hard")
    (tmp_path / "hard" / "python-several.yaml").write_text(other)
    assert list(build.sources()) == ["python"]
    prove(OLD, NEW, "--library", "python")
    assert programs == [NEW, OLD, OLD] * 2 and list(verify.read(record_of())) == [
        "hard-0",
        "toy-0",
    ]


def test_exact_proves_one_row_in_new_version_and_keeps_what_is_proved(prove, programs):
    """Prevents: an update is run in the wrong release, or anew for each Python; or --exact writes
    over the record of the rows."""
    prove(OLD, NEW, run_version="later")
    whole = record_of().read_bytes()
    prove(OLD, "print(4)", "--exact", run_version="later")
    [failed] = verify.read(verify.EXACT).values()
    assert failed["new_release"] == "Python new" and failed["old_on_old"] == "differs"
    assert prove(OLD, NEW, "--exact", "3.7", run_version="later")[0] == 0
    assert prove(OLD, NEW, "--exact", "3.8", run_version="later")[0] == 0
    assert programs == [NEW, OLD, OLD, "print(4)", OLD, OLD, NEW, OLD, OLD]
    assert record_of().read_bytes() == whole
    prove(OLD, NEW, "--exact", run_version="new")  # its row is proved there anyway
    assert verify.read(verify.EXACT) == {}


def test_an_interrupt_leaves_a_whole_record_and_no_litter(prove, programs, tmp_path, monkeypatch):
    """Prevents: Ctrl-C leaves environments, programs or half a record behind."""
    prove(OLD, NEW)
    whole = record_of().read_bytes()
    other = (tmp_path / "updates" / "python.yaml").read_text().replace("python", "other")
    (tmp_path / "updates" / "other.yaml").write_text(other.replace("toy", "other"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(verify.tempfile, "tempdir", str(tmp_path / "temporary"))
    real = verify.run

    async def interrupted(*program):
        await real(*program)
        if len(programs) == 5:  # both rows are at work
            os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(9)

    monkeypatch.setattr(verify, "run", interrupted)
    # a job in the background is started with Ctrl-C ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    status, _ = prove(OLD, NEW, "--again", "--jobs", "2")
    signal.signal(signal.SIGINT, before)
    assert status == 130 and record_of().read_bytes() == whole
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--library", "nope"], "invalid choice: 'nope'"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
    ],
)
def test_wrong_input_is_one_sentence(prove, capsys, options, sentence):
    """Prevents: a typing mistake is answered by a traceback."""
    with pytest.raises(SystemExit):
        prove(OLD, NEW, *options)
    assert sentence in capsys.readouterr().err


def test_a_machine_without_uv_is_told_what_to_do(prove, monkeypatch, capsys):
    """Prevents: every release is recorded as not installed because a tool is missing."""
    monkeypatch.setattr(verify.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        prove(OLD, NEW)
    assert "pip install uv" in capsys.readouterr().err


def test_a_broken_record_is_told_in_one_sentence(prove, capsys):
    """Prevents: a merge conflict in the record ends in a traceback."""
    prove(OLD, NEW)
    record_of().write_text("<<<<<<< HEAD\n")
    assert verify.main([]) == 2
    assert "record_updates.jsonl, line 1: not a JSON object" in capsys.readouterr().err


def test_the_loader_needs_no_development_tools():
    """Prevents: training asks for PyYAML or uv."""
    code = "import sys; sys.modules['yaml'] = None; import data; print(len(data.load()))"
    subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, check=True, capture_output=True)
