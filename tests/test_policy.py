"""policy.py: what is loaded is whole, and what is said ends where the policy ended it."""

import contextlib
import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import data
import evaluate
import lora
import policy as policy_module
from policy import load
from rollout import written
from upkeep.rows import check_rows


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny model's folder to be spoilt."""
    return shutil.copytree(tiny, tmp_path / "model")


def test_texts_end_before_the_end_token(tiny):
    """Prevents: "<|im_end|>" in the text costs the format reward; or the last letter is cut."""
    policy = load(str(tiny), "cpu")
    ids = policy.tokenizer.encode("ok go", add_special_tokens=False)
    ended, cut = [*ids, policy.eos_ids[0]], [*ids, 5, 6]
    first, second = policy.texts(written([[1]], [[ended, cut]], pad_id=0, device="cpu"))
    assert first == "ok go" and second.startswith("ok go") and len(second) > len(first)


def test_imitated_answers_are_perfect_and_end(tiny):
    """Prevents: SFT learns an answer that the reward does not accept, or never to stop."""
    policy = load(str(tiny), "cpu")
    rows = data.load()[:20]
    rollout = policy.imitate(rows, max_new_tokens=400)
    last = rollout.tokens[:, 0].gather(1, rollout.length - 1)[:, 0]
    assert last.tolist() == [policy.eos_ids[0]] * 20
    means = evaluate.means(evaluate.grade(rows, policy.texts(rollout)))
    perfect = {"em_star": 2.0, "es_star": 2.0, "format": 100.0, "exact": 100.0, "copies": 0.0}
    assert means == perfect | {"exact_any": 100.0, "copies_any": 0.0}


def test_an_answer_that_spells_the_end_token_is_learnt_whole(tiny, tmp_path):
    """Prevents: SFT teaches to stop in the middle of a string, or a good row is refused."""
    policy = load(str(tiny), "cpu")
    row = replace(data.load()[0], new_code="s = new(x) + '<|im_end|>'\nprint(s)\n", split="")
    rollout = policy.imitate([row], max_new_tokens=200)
    assert rollout.tokens.flatten().tolist().count(policy.eos_ids[0]) == 1
    (graded,) = evaluate.grade([row], policy.texts(rollout))
    assert graded.exact and graded.format == 1
    (tmp_path / "rows.jsonl").write_text(json.dumps(asdict(row)))
    check_rows(policy, tmp_path / "rows.jsonl", 200)
    assert policy.length(data.completion(row)) == rollout.length.item()


def test_complete_is_greedy_and_needs_no_config(tiny):
    """Prevents: nobody can ask a trained policy without a run's settings."""
    policy = load(str(tiny), "cpu")
    rows = data.load()[:3]
    both = policy.complete(rows, max_new_tokens=8)
    assert both == policy.complete(rows, max_new_tokens=8) and len(both) == 3
    assert all(len(policy.tokenizer.encode(text)) <= 12 for text in both)


# ---------------------------------------------------------------- models that are not whole


def refused(folder, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        load(str(folder), "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "1 missing weights"),
        (lambda w: w.update({"model.extra": torch.ones(2)}), "1 unexpected weights"),
        (lambda w: w["model.norm.weight"].fill_(torch.nan), "not finite"),
        (lambda w: w.update({"model.norm.weight": torch.ones(5)}), "model.norm.weight"),
    ],
)
def test_weights_that_do_not_belong_are_refused(copy, fault, sentence):
    """Prevents: transformers fills a gap with random weights, and the run trains them, exit 0."""
    weights = load_file(copy / "model.safetensors")
    fault(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, sentence)


def test_another_model_type_is_refused(copy):
    """Prevents: a config.json of another family, whose own weights are random."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}))
    refused(copy, "--model")


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_a_cut_file_of_weights_is_one_sentence(copy, size):
    """Prevents: a broken download ends in a traceback of safetensors."""
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(copy, "cannot be loaded")


def test_a_pickle_of_weights_is_not_run(copy):
    """Prevents: a .bin file that runs its own code, or a traceback about it."""
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo harm'\ntR.")
    refused(copy, "cannot be loaded")


def test_a_missing_tokenizer_is_refused(copy):
    """Prevents: an empty tokenizer made up from the model's type: every prompt is one unknown."""
    for file in copy.glob("*token*"):
        file.unlink()
    refused(copy, "--model")


def test_a_template_that_loses_the_note_is_refused(copy):
    """Prevents: training on prompts without the note, whose answers nobody can know."""
    (copy / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    refused(copy, "loses the note or the code")


def test_a_tokenizer_of_another_model_is_refused(copy):
    """Prevents: token ids beyond the embeddings, an IndexError in the middle of a run."""
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens([f"word{i}" for i in range(9)] + ["new_name"])
    tokenizer.save_pretrained(copy)
    refused(copy, "more tokens than its")


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("config.json", {"hidden_size": "a"}, "cannot be loaded"),
        ("config.json", {"num_attention_heads": 0}, "cannot be loaded"),
        ("config.json", {"num_hidden_layers": 1}, "cannot be loaded"),
        ("generation_config.json", {"eos_token_id": "x"}, "end tokens by number"),
        ("generation_config.json", {"eos_token_id": [[1]]}, "end tokens by number"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused(copy, file, change, sentence):
    """Prevents: a traceback of transformers for a config.json that somebody edited."""
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(config | change))
    refused(copy, sentence)


def test_a_cut_gguf_file_is_one_sentence(tmp_path):
    """Prevents: a struct.error for a download that broke off."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF\0\0")
    refused(tmp_path / "a.gguf", "cannot be loaded")


def test_a_missing_folder_is_one_sentence():
    """Prevents: forty lines from inside the hub client."""
    refused("/no/such/folder", "no such folder")


# ---------------------------------------------------------------- adapters, and what is beside them


@pytest.fixture
def adapters(copy):
    """A folder of adapters on a model that may be spoilt, with a tokenizer of their own."""
    policy, folder = load(str(copy), "cpu"), copy.with_name("adapters")
    policy.adapt(lora.Adapter(rank=2), torch.Generator())
    policy.save(folder)
    return folder


def described(folder, **change):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize("alone", [False, True])
def test_adapters_speak_with_their_own_tokenizer(adapters, alone):
    """Prevents: tokenizer and template of the base in place of those that the adapters were
    trained with, which lie beside them; `alone` the template is there without a tokenizer."""
    plain = load(str(adapters), "cpu").prompts(data.load()[:1])[0]
    template = (adapters / "chat_template.jinja").read_text()
    (adapters / "chat_template.jinja").write_text("Hello " + template)
    if alone:
        for file in adapters.glob("*token*"):
            file.unlink()
    policy = load(str(adapters), "cpu")
    assert policy.prompts(data.load()[:1])[0] != plain
    assert policy.tokenizer.chat_template.startswith("Hello ")


def test_adapters_without_a_tokenizer_have_that_of_their_base(adapters):
    """Prevents: a refusal of what PEFT itself writes, two files."""
    for file in adapters.iterdir():
        if not file.name.startswith("adapter_"):
            file.unlink()
    assert load(str(adapters), "cpu").tokenizer.chat_template


def test_end_and_padding_are_those_of_the_adapters(adapters):
    """Prevents: answers of another tokenizer that end where the base's would."""
    tokenizer = AutoTokenizer.from_pretrained(adapters)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(7)
    tokenizer.save_pretrained(adapters)
    assert load(str(adapters), "cpu").eos_ids[0] == 7


@pytest.mark.parametrize("base", [None, "", 5, "own", "other"])
def test_a_base_that_is_none_is_one_short_sentence(adapters, base):
    """Prevents: a recursion told in 41,726 characters, or the bundled policy under the adapters of
    another model."""
    known = {"own": str(adapters), "other": str(adapters.with_name("other"))}
    shutil.copytree(adapters, known["other"])
    described(adapters, base_model_name_or_path=known.get(base, base))
    with pytest.raises(ValueError, match="write the name or folder of the whole model") as error:
        load(str(adapters), "cpu")
    assert len(str(error.value)) < 200 + 2 * len(str(adapters))


def test_the_revision_of_the_base_is_heeded(adapters, monkeypatch):
    """Prevents: adapters over the newest weights of a base, not over those they belong to."""
    asked = []
    for auto in (policy_module.AutoModelForCausalLM, policy_module.AutoTokenizer):
        real = auto.from_pretrained

        def noted(*args, real=real, **options):
            asked.append(options.pop("revision", None))
            return real(*args, **options)

        monkeypatch.setattr(auto, "from_pretrained", noted)
    described(adapters, revision="v1.5")
    load(str(adapters), "cpu")
    assert asked == ["v1.5", "v1.5", None]  # the base's model and tokenizer; the adapters' own


@pytest.mark.parametrize("place", ["model", "tokenizer", "adapters"])
def test_no_code_of_a_model_runs_and_nobody_is_asked(adapters, copy, place, monkeypatch):
    """Prevents: a question of transformers on the terminal whose "y" runs the folder's own code."""
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
    asked, folder = [], adapters if place == "adapters" else copy
    name, kind = ("config.json", "model_type") if place == "model" else (
        "tokenizer_config.json", "tokenizer_class"
    )  # fmt: skip
    maps = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    maps = maps if place == "model" else {"AutoTokenizer": ["own.Own", None]}
    config = json.loads((folder / name).read_text()) | {kind: "Foreign", "auto_map": maps}
    (folder / name).write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass\n")
    with contextlib.suppress(ValueError):
        load(str(adapters), "cpu")
    assert not asked and not (folder / "ran").exists()
