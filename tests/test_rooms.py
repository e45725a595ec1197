"""Who may know whom: every import of ours runs downwards, and training never meets the sandbox."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Room by room, lowest floor first. A room imports itself and lower ones; it need not exist yet.
FLOORS = [
    {"data", "lora", "attention", "weights", "grpo", "strip", "edit_distance"},
    {"packed", "dapo", "reward", "rollout"},
    {"variants", "drafts"},
    {"policy"},
    {"sandbox"},
    {"evaluate", "config"},
    {"upkeep"},
    {"recode", "migrate"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ONLY = {"config": set(), "sandbox": {"data"}}  # rooms that may know even less than what lies below


def names(tree: ast.AST) -> set[str]:
    """The first part of each module that is imported in a tree, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.fixture(scope="module")
def arrows() -> set[tuple[str, str]]:
    """(room, room that it imports) for all our files; tests and scripts of results know all."""
    command = ["git", "ls-files", "*.py", ":!tests", ":!data/results"]
    try:
        paths = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no clone: nobody can tell which files are ours")
    files = [Path(path) for path in paths.splitlines() if (ROOT / path).exists()]
    homes = {path: path.parts[0].removesuffix(".py") for path in files}
    found = set()
    for path, home in homes.items():
        imported = names(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        found |= {(home, other) for other in imported if other in homes.values() and other != home}
    assert set(homes.values()) <= FLOOR.keys(), "a room without a floor: put it into FLOORS"
    return found


def test_no_import_runs_upwards(arrows):
    """Prevents: a circle, or a room of the ground floor that cannot be read without the roof."""
    assert {(a, b) for a, b in arrows if FLOOR[b] >= FLOOR[a]} == set()


def test_some_rooms_know_even_less(arrows):
    """Prevents: a sandbox that knows rewards or models, settings that load torch."""
    assert {(a, b) for a, b in arrows if a in ONLY} <= {(a, b) for a in ONLY for b in ONLY[a]}
    assert ("sandbox", "data") in arrows  # they are read at all


def test_training_never_loads_the_sandbox():
    """Prevents: a run that starts with, or dies of, what only the benchmarks' commands need."""
    code = (
        "import recode, sys; print(*[m for m in sys.modules if m.partition('.')[0] == 'sandbox'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
    tree = ast.parse((ROOT / "evaluate.py").read_text(encoding="utf-8"))
    inside = [x for x in tree.body if isinstance(x, ast.FunctionDef)]
    outside = [x for x in tree.body if x not in inside]
    assert "sandbox" in set().union(*map(names, inside))
    assert "sandbox" not in set().union(*map(names, outside))


def test_help_is_answered_without_torch():
    """Prevents: seconds of loading before a person learns that a flag is wrong."""
    code = (
        "import runpy, sys; sys.modules['torch'] = None\n"
        "sys.argv = ['evaluate.py', 'humaneval', '--help']\n"
        "runpy.run_path('evaluate.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--predictions" in done.stdout, done.stderr
