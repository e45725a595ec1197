"""Write `together.yaml`: which releases of the rows of 2026 one environment can hold.

    python -m data.together       then prove all rows --again in the environments that it names

The new releases begin with one group that takes all with which uv finds versions for all packages;
those left over form the next group, and so on. Then the old releases do the same.
"""

import subprocess
import sys

from data import build, verify
from data.verify import Release

FILE = "updates_2026"
HEAD = "# Releases that share an environment; `python -m data.together` writes this.\n"


def sides() -> tuple[list[Release], list[Release]]:
    """The new releases of all rows and the old ones, each once."""
    found = [path for paths in build.sources(FILE).values() for path in paths]
    rows = [row for path in found for row in verify.rows(path)]
    return sorted({row.new_release for row in rows}), sorted({row.old_release for row in rows})


def fit(release: Release) -> bool:
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


def join(group: Release, releases: list[Release]) -> tuple[Release, list[Release]]:
    """The group with all that goes with it, halving what does not; and what is left over."""
    both = tuple(dict.fromkeys(sum(releases, group)))
    if both == group or fit(both):
        return both, []
    if len(releases) == 1:
        return group, releases
    half = len(releases) // 2
    group, left = join(group, releases[:half])
    group, more = join(group, releases[half:])
    return group, left + more


def together(releases: list[Release]) -> list[Release]:
    """Groups of these releases, of one Python each."""
    groups = []
    while releases:
        others = [release for release in releases[1:] if release[0] == releases[0][0]]
        group, left = join(releases[0], others)
        groups.append(group)
        releases = left + [release for release in releases if release[0] != group[0]]
    return groups


def main() -> None:
    groups = [group for side in sides() for group in together(side)]
    lines = ["- - " + "\n  - ".join(f'"{package}"' for package in group) for group in groups]
    verify.TOGETHER.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    for group in groups:
        print(", ".join(group), file=sys.stderr)


if __name__ == "__main__":
    main()
