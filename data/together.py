"""Write `together.yaml`: which releases of the rows of 2026 one environment can hold.

    python -m data.together       then prove all rows --again in the environments that it names

Each new release joins the first group with which uv finds versions for all packages, or else begins
one of its own. Then the old releases do the same.
"""

import subprocess

from data import build, verify
from data.verify import Release

HEAD = "# Releases that share an environment; `python -m data.together` writes this.\n"


def fit(release: Release) -> bool:
    """Whether uv finds versions of all packages that go with each other."""
    python, *packages = release
    command = f"uv --quiet pip compile --no-header - --python {python.split()[1]}".split()
    asked = subprocess.run(command, input="\n".join(packages), text=True, capture_output=True)
    return not asked.returncode


def together(releases: set[Release]) -> list[Release]:
    """Groups of these releases, of one Python each."""
    groups: list[Release] = []
    for release in sorted(releases):
        for number, group in enumerate(groups):
            both = tuple(dict.fromkeys(group + release))
            if group[0] == release[0] and (both == group or fit(both)):
                groups[number] = both
                break
        else:
            groups.append(release)
    return groups


def main() -> None:
    found = [path for paths in build.sources("updates_2026").values() for path in paths]
    rows = [row for path in found for row in verify.rows(path)]
    groups = together({row.new_release for row in rows})
    groups += together({row.old_release for row in rows})
    lines = ["- - " + "\n  - ".join(f'"{package}"' for package in group) for group in groups]
    verify.TOGETHER.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
