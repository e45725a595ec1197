"""Files that are whole at any time."""

from pathlib import Path


def write(path: Path, text: str) -> None:
    """Replace a file at one stroke: whatever happens, it is the old one or the new one."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
