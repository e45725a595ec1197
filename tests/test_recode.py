"""The experiment end to end on a tiny random model, and the parts of its loop."""

import json
import random
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import dapo
import data
import evaluate
import grpo
import policy as policies
import recode
import report
from recode import Batch, Config
from rollout import Rollout, written


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random two-layer model and the bundled tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(data.POLICY)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small(tiny, tmp_path):
    """Keyword arguments of a Config that runs in a second, on twelve rows."""
    rows = data.load(split="train")[::200] + data.load(split="test_seen")[::80]
    rows += data.load(split="test")[::60]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return dict(
        model=str(tiny), data=str(file), out=str(tmp_path / "run"), device="cpu",
        steps=2, prompts=2, group_size=2,
        max_new_tokens=4, eval_rows=2, max_refills=1, live="reward",
    )  # fmt: skip


def fake(reward, exact=None, algo=dapo):
    """A rollout of one-token completions, and the scores of its groups."""
    reward = torch.tensor(reward)
    B, G = reward.shape
    by = reward if exact is None else torch.tensor(exact)
    scores = {"total": reward, "exact": by, "format": torch.ones(B, G)}
    rollout = written([[1]] * B, [[[1]] * G] * B, pad_id=0, device="cpu")
    return rollout, scores | {"dead": grpo.dead(by), "keep": algo.keep(by)}


def dead_share(*batches):
    """What the log says of these batches."""
    log = report.Log()
    for batch in batches:
        log.sampled(*batch)
    return log.close()["dead"]


# ---------------------------------------------------------------- the run


@pytest.mark.parametrize("algo", ["grpo", "dapo", "sft"])
def test_run_leaves_a_whole_folder(small, algo, capsys):
    """Prevents: an algorithm that trains but leaves no report, or a checkpoint nobody can load."""
    recode.run(Config(algo=algo, **small))
    folder = recode.Path(small["out"])
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "curves.png", "samples.md", "checkpoint"
    }  # fmt: skip
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m.get("step") for m in lines] == [1, 2, None] and lines[2]["grade"]["after"]["test"]
    assert AutoModelForCausalLM.from_pretrained(folder / "checkpoint").num_parameters() > 0
    assert AutoTokenizer.from_pretrained(folder / "checkpoint").chat_template
    shown = capsys.readouterr().out
    assert shown.count("copy the old code") == 3 and "held-out" in shown


def test_same_seed_same_run(small, tmp_path):
    """Prevents: a source of chance outside the seed, so that no published figure can be re-made."""
    found = []
    for name in "ab":
        recode.run(Config(**small | {"out": str(tmp_path / name)}))
        text = (tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]
        found.append(
            {k: v for k, v in json.loads(text).items() if "second" not in k and "_s" not in k}
        )
    assert found[0] == found[1]


def test_interrupted_run_is_saved_and_goes_on(small, monkeypatch):
    """Prevents: Ctrl-C loses the weights, or --resume starts the count anew."""
    real = recode.train

    def stop_after_one(*args):
        yield next(real(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(recode, "train", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        recode.run(Config(**small))
    monkeypatch.setattr(recode, "train", real)
    recode.run(recode.parse(["--resume", small["out"]]))
    lines = (recode.Path(small["out"]) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text).get("step") for text in lines] == [1, 2, None]


@pytest.mark.parametrize("algo", ["grpo", "dapo"])
def test_loop_raises_the_reward(small, algo, monkeypatch):
    """Prevents: a wrong sign anywhere between reward and step. Reward here: share of even ids."""

    def judge(algo, texts, rollout, examples, config):
        share = ((rollout.tokens % 2 == 0) & rollout.mask).sum(-1) / rollout.length
        names = ("total", "exact", "format")
        return dict.fromkeys(names, share) | {"dead": grpo.dead(share), "keep": algo.keep(share)}

    monkeypatch.setattr(recode, "judge", judge)
    more = dict(algo=algo, steps=20, prompts=4, group_size=16, lr=0.03, beta=0.0, warmup=0)
    policy, state = recode.start(Config(**small | more))
    rewards = [m["reward"] for m in recode.train(Config(**small | more), policy, state)]
    assert rewards[0] < 0.65 and sum(rewards[-3:]) / 3 > 0.85


def test_finetuning_learns_the_answers(small):
    """Prevents: cross-entropy on the wrong positions. A model that may memorise must memorise."""
    config = Config(**small | {"algo": "sft", "steps": 30, "lr": 0.01, "max_new_tokens": 64})
    policy, state = recode.start(config)
    losses = [m["loss"] for m in recode.finetune(config, policy, state)]
    assert losses[-1] < 0.6 * losses[0]


# ---------------------------------------------------------------- dynamic sampling


def test_dead_groups_are_replaced(small):
    """Prevents: DAPO trains on groups whose advantage is 0, or on fewer prompts than asked."""
    batch = Batch(Config(**small | {"prompts": 3, "max_refills": 5}))
    first, second = fake([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]), fake([[0.5, 1.0], [0.0, 1.0]])
    assert batch.missing == 3
    batch.add(*first)
    assert batch.missing == 2
    batch.add(*second)
    rollout, reward = batch.close()
    assert batch.missing == 0 and reward.tolist() == [[0.0, 1.0], [0.5, 1.0], [0.0, 1.0]]
    assert len(rollout.prompts) == 3 and dead_share(first, second) == pytest.approx(2 / 5)


def test_refills_are_bounded(small):
    """Prevents: data that are all too hard sample for ever (and verl's cure: the run dies)."""
    batch = Batch(Config(**small | {"prompts": 2, "max_refills": 2}))
    for _ in range(3):
        assert batch.missing == 2
        batch.add(*fake([[1.0, 1.0], [0.0, 0.0]]))
    assert batch.missing == 0 and len(batch.close()[1]) == 0


def test_grpo_keeps_dead_groups(small):
    """Prevents: dynamic sampling leaks into GRPO. Its dead groups are only counted."""
    batch, groups = Batch(Config(**small)), fake([[1.0, 1.0], [0.0, 1.0]], algo=grpo)
    batch.add(*groups)
    assert batch.missing == 0 and len(batch.close()[1]) == 2 and dead_share(groups) == 0.5


@pytest.mark.parametrize(("live", "kept"), [("exact", 1), ("reward", 2)])
def test_filter_looks_at_what_the_config_says(small, live, kept, monkeypatch):
    """Prevents: all-wrong groups with differing rewards pass the paper's filter."""
    config = Config(**small | {"algo": "dapo", "live": live, "max_refills": 0})
    scores = {"total": [0.1, 0.7, 0.2, 2.0], "exact": [0.0, 0.0, 0.0, 1.0], "format": [1.0] * 4}
    scores = {name: torch.tensor(values) for name, values in scores.items()}
    monkeypatch.setattr(recode.rewards, "score", lambda *args: scores)
    rollout, _ = fake([[0.0, 0.0]] * 2)
    batch = Batch(config)
    batch.add(rollout, recode.judge(dapo, [""] * 4, rollout, data.load()[:2], config))
    assert len(batch.close()[1]) == kept


def test_a_run_with_nothing_to_learn_stops_with_advice(small, monkeypatch, capsys):
    """Prevents: hours of sampling without one update, in silence."""

    def judge(algo, texts, rollout, examples, config):
        zero = torch.zeros_like(rollout.length).float()
        names = ("total", "exact", "format")
        return dict.fromkeys(names, zero) | {"dead": grpo.dead(zero), "keep": algo.keep(zero)}

    monkeypatch.setattr(recode, "judge", judge)
    config = Config(**small | {"algo": "dapo", "steps": 9, "patience": 3})
    recode.run(config)
    lines = (recode.Path(config.out) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text).get("step") for text in lines] == [1, 2, 3, None]
    assert "in 3 steps in a row every sample of a prompt scored the same" in capsys.readouterr().out
    after = AutoModelForCausalLM.from_pretrained(recode.Path(config.out) / "checkpoint")
    before = AutoModelForCausalLM.from_pretrained(config.model)
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------- parts


def test_texts_end_before_the_end_token(tiny, small):
    """Prevents: "<|im_end|>" in the text costs the format reward; or the last letter is cut."""
    policy = policies.load(str(tiny), "cpu")
    ids = policy.tokenizer.encode("ok go", add_special_tokens=False)
    tokens = torch.tensor([[[*ids, policy.eos_ids[0], 0], [*ids, 5, 6]]])
    mask = torch.ones_like(tokens).bool()
    mask[0, 0, -1] = False
    length = mask.sum(-1)
    rollout = Rollout([[1]], tokens, mask, mask.float(), length, length == tokens.shape[2])
    first, second = policy.texts(rollout)
    assert first == "ok go" and second.startswith("ok go") and len(second) > len(first)


def test_imitated_answers_are_perfect_and_end(tiny, small):
    """Prevents: SFT learns an answer that the reward does not accept, or never to stop."""
    policy = policies.load(str(tiny), "cpu")
    rows = data.load()[:20]
    rollout = policy.imitate(rows, max_new_tokens=400)
    last = rollout.tokens[:, 0].gather(1, rollout.length - 1)[:, 0]
    assert last.tolist() == [policy.eos_ids[0]] * 20
    means = evaluate.means(evaluate.grade(rows, policy.texts(rollout)))
    assert means == {"em_star": 2.0, "es_star": 2.0, "format": 100.0, "exact": 100.0}


def test_every_training_row_comes_once_an_epoch_and_resume_goes_on(small):
    """Prevents: a resumed run sees the first prompts twice."""
    config, rows = Config(**small), data.load(small["data"])
    stream = recode.endless(config, 0)
    first = [next(stream).id for _ in rows]
    assert sorted(first) == sorted(e.id for e in rows) and first != [e.id for e in rows]
    again = recode.endless(config, 3)
    assert [next(again).id for _ in range(5)] == first[3:8]


def test_a_step_that_is_cut_short_is_not_counted(small, monkeypatch):
    """Prevents: Ctrl-C while a step samples, after which --resume skips that step's prompts."""
    real, calls = recode.draw, []

    def once(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    config = Config(**small)
    policy, state = recode.start(config)
    monkeypatch.setattr(recode, "draw", once)
    with pytest.raises(KeyboardInterrupt):
        list(recode.train(config, policy, state))
    assert (state.step, state.drawn) == (1, 2)


def test_metrics_after_the_checkpoint_are_made_again(small):
    """Prevents: a run that died between checkpoints has two lines for each step after --resume,
    and one that died inside a line of its metrics cannot go on at all."""
    recode.run(Config(**small))
    file = recode.Path(small["out"], "metrics.jsonl")
    one, two, grade = file.read_text().splitlines()
    file.write_text("\n".join([one, two, one.replace('"step": 1', '"step": 3'), grade, one[:9]]))
    recode.run(recode.parse(["--resume", small["out"], "--steps", "3"]))
    steps = [json.loads(text).get("step") for text in file.read_text().splitlines()]
    assert steps == [1, 2, None, 3, None]


def test_a_broken_save_leaves_the_last_checkpoint(small, monkeypatch):
    """Prevents: a full disk or a second Ctrl-C while saving leaves nothing to go on from."""
    config = Config(**small)
    policy, state = recode.start(config)
    folder = recode.Path(config.out)
    policies.save(folder, policy, state)
    policies.save(folder, policy, state)
    assert [p.name for p in folder.iterdir()] == ["checkpoint"]

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        policies.save(folder, policy, state)
    assert (folder / "checkpoint" / "state.pt").is_file()


def test_graded_rows_are_not_those_of_a_seed(small):
    """Prevents: one seed trains on most of the graded training rows, another on a few of them."""
    graded = {e.id for e in evaluate.chosen("", 300)["train"]}
    assert len(graded) == 300
    for seed in range(5):
        first = recode.endless(Config(**small | {"seed": seed, "data": ""}), 0)
        both = sum(next(first).id in graded for _ in range(192))
        assert both < 60, (seed, both)  # by chance 192 * 300 / 1731 = 33, standard deviation 5


@pytest.mark.parametrize(("items", "count"), [(16, 2), (16, 7), (5, 2), (3, 8), (0, 2)])
def test_updates_have_nearly_equal_shares(items, count):
    """Prevents: seven updates asked, six made, the last of them on one group."""
    found = recode.shares(items, count)
    assert sum(found, []) == list(range(items)) and len(found) == min(count, items)
    assert not found or max(map(len, found)) - min(map(len, found)) <= 1


def test_copying_scores_high_and_matches_nothing():
    """Prevents: the copy baseline is forgotten: ES* rewards it, exact match does not."""
    rows = random.Random(0).sample(data.load(split="test"), 50)
    means = evaluate.means(evaluate.copied(rows))
    assert means["exact"] == 0 and means["format"] == 100 and means["es_star"] > 1


def test_split_keeps_order_and_rest():
    """Prevents: the last, shorter micro-batch is dropped."""
    assert recode.split(5, 2) == [[0, 1], [2, 3], [4]]


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"algo": "ppo"}, "choose from grpo, dapo, sft"),
        ({"group_size": 1}, "an advantage compares samples"),
        ({"steps": 0}, "--steps is 0: give 1 or more"),
        ({"temperature": 0.0}, "greedy samples are all alike"),
        ({"warmup": -1}, "--warmup is -1: give 0 or more"),
        ({"dual_clip": 1.2}, "must exceed 1"),
        ({"correctness": "bleu"}, "choose from es_star, em_star"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm is -1.0: give more than 0"),
        ({"lr": float("nan")}, "--lr is nan: give 0 or more"),
        ({"temperature": float("inf")}, "greedy samples are all alike"),
        ({"clip": 1.0}, "less than 1"),
        ({"dual_clip": float("nan")}, "must exceed 1"),
        ({"overlong_buffer": 9999}, "must not exceed"),
    ],
)
def test_wrong_values_are_one_sentence(small, wrong, sentence):
    """Prevents: a slip on the command line shows a traceback after minutes of loading."""
    with pytest.raises(ValueError, match=sentence):
        Config(**small | wrong)


def test_command_line_errors_have_no_traceback(small, capsys, monkeypatch, tmp_path):
    """Prevents: a missing model folder ends in forty lines from inside the hub client."""
    for arguments in (
        ["--model", "/no/such/folder", "--out", str(tmp_path / "x")],
        ["--data", "/no/such/file", "--out", str(tmp_path / "x")],
        ["--resume", "/no/such/run"],
        ["--model", small["model"], "--out", str(tmp_path / "y"), "--max-new-tokens", "5000"],
    ):
        monkeypatch.setattr("sys.argv", ["recode.py", *arguments])
        assert recode.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("recode.py: ") and error.count("\n") == 1, error


def test_resume_refuses_what_it_cannot_go_on_from(small):
    """Prevents: a traceback, or one run made of two configurations, whose record is then false."""
    folder = recode.Path(small["out"])
    recode.run(Config(**small))
    with pytest.raises(ValueError, match="leave --lr away"):
        recode.parse(["--resume", str(folder), "--lr", "1"])
    kept = (folder / "config.json").read_text()
    for other in ('{"what": 1}', "[]"):
        (folder / "config.json").write_text(other)
        with pytest.raises(ValueError, match="not a configuration of this version"):
            recode.parse(["--resume", str(folder)])
    (folder / "config.json").write_text(kept)
    state = folder / "checkpoint" / "state.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match="state.pt is damaged"):
        recode.start(recode.parse(["--resume", str(folder)]))


def test_a_used_run_folder_is_not_overwritten(small):
    """Prevents: the second run with the same --out destroys the first."""
    folder = recode.Path(small["out"])
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        recode.run(Config(**small))
    assert (folder / "metrics.jsonl").read_text() == "precious"


def test_every_field_is_a_flag_with_help(capsys):
    """Prevents: a setting that only an editor of the source can reach."""
    with pytest.raises(SystemExit):
        recode.parse(["--help"])
    shown = capsys.readouterr().out
    for name in asdict(Config(device="cpu")):
        assert "--" + name.replace("_", "-") in shown
