"""Write `together.yaml`: which releases of the rows of 2026 one environment can hold.

    python -m data.together       asks uv some hundred times; prove all rows --again after it

A release joins the first group of its Python with which uv finds versions for all packages, or
begins a new group. The new releases come first, since every answer is run in one of them.
"""

import subprocess
import sys

from data import build, verify

FILE = "updates_2026"
HEAD = "# Releases that share an environment; `python -m data.together` writes this.\n"


def wanted() -> list[verify.Release]:
    """The releases of all rows, each once: first the new ones, the newest Python first."""
    found = [path for paths in build.sources(FILE).values() for path in paths]
    rows = [row for path in found for row in verify.rows(path)]
    sides = {row.new_release for row in rows}, {row.old_release for row in rows}
    return [x for side in sides for x in sorted(side, key=lambda x: (python(x), x), reverse=True)]


def python(release: verify.Release) -> tuple[int, ...]:
    return tuple(map(int, release[0].split()[1].split(".")))


def fit(release: verify.Release) -> bool:
    """Whether uv finds versions of all packages that go with each other."""
    version, *packages = release
    command = [
        "uv",
        "--quiet",
        "pip",
        "compile",
        "--no-header",
        "-",
        "--python",
        version.split()[1],
    ]
    asked = subprocess.run(command, input="\n".join(packages), text=True, capture_output=True)
    return not asked.returncode


def together(releases: list[verify.Release]) -> list[verify.Release]:
    """Groups of two releases and more."""
    groups: list[verify.Release] = []
    for release in releases:
        for n, group in enumerate(groups):
            both = group + tuple(package for package in release if package not in group)
            if group[0] == release[0] and (both == group or fit(both)):
                groups[n] = both
                break
        else:
            groups.append(release)
    return [group for group in groups if group not in releases]


def main() -> None:
    lines = []
    for group in together(wanted()):
        lines.append("- - " + "\n  - ".join(f'"{package}"' for package in group) + "\n")
        print(len(group) - 1, *group, file=sys.stderr)
    verify.TOGETHER.write_text(HEAD + ("".join(lines) or "[]\n"), encoding="utf-8")


if __name__ == "__main__":
    main()
