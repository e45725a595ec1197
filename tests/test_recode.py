"""The experiment end to end on a tiny random model, and the parts of its loop."""

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import settings
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

import dapo
import data
import evaluate
import grpo
import lora
import recode
from config import Config, parse
from policy import load, untrained
from recode import Batch
from rollout import packs, written
from upkeep import checkpoint, metrics, report, run


def fake(reward, exact=None, algo=dapo):
    """A rollout of one-token completions, and the scores of its groups."""
    reward = torch.tensor(reward)
    B, G = reward.shape
    by = reward if exact is None else torch.tensor(exact)
    scores = {"total": reward, "exact": by, "copied": 0 * by, "format": torch.ones(B, G)}
    rollout = written([[1]] * B, [[[1]] * G] * B, pad_id=0, device="cpu")
    return rollout, scores | {"dead": grpo.dead(by), "keep": algo.keep(by)}


def dead_share(*batches):
    """What the log says of these batches."""
    log = metrics.Log()
    for batch in batches:
        log.sampled(*batch)
    return log.close()["dead"]


@pytest.mark.parametrize(
    ("floor", "rates"),
    # warm-up 1/2, 1, 1, 1 times floor + (1 - floor) * (1 + cos(pi * step / 4)) / 2, where the last
    # factor is 1, (1 + sqrt(1/2)) / 2 = 0.853553, 0.5, 0.146447
    [
        (0.1, [0.5, 0.868198, 0.55, 0.231802]),
        (1.0, [0.5, 1, 1, 1]),
        (0.0, [0.5, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate_by_hand(small, floor, rates):
    """Prevents: a floor that shifts the peak, or a constant rate that is not one."""
    config = settings(small, steps=4, warmup=2, lr=1.0, lr_floor=floor)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    state = checkpoint.State(optimizer, torch.Generator())
    for step, rate in enumerate(rates):
        state.step = step
        optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
        recode.step(state, config, 0.0)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, abs=1e-6)


# ---------------------------------------------------------------- the run


@pytest.mark.parametrize("algo", ["grpo", "dapo", "drgrpo", "gspo", "cispo", "sft"])
def test_run_leaves_a_whole_folder(small, algo, capsys):
    """Prevents: an algorithm that trains but leaves no report, or a checkpoint nobody can load."""
    run.run(settings(small, algo=algo), recode.LOOPS)
    folder = Path(small["out"])
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "curves.png", "samples.md", "before.jsonl", "after.jsonl",
        "checkpoint", "checkpoint-0",
    }  # fmt: skip
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m.get("step") for m in lines] == [1, 2, None] and lines[2]["grade"]["after"]["test"]
    assert AutoModelForCausalLM.from_pretrained(folder / "checkpoint").num_parameters() > 0
    assert AutoTokenizer.from_pretrained(folder / "checkpoint").chat_template
    shown = capsys.readouterr().out
    assert shown.count("copy the old code") == 3 and "held-out" in shown


def test_no_rows_are_no_table_and_the_run_is_done(small, capsys):
    """Prevents: --eval-rows 0 that grades for minutes, or whose run never counts as done."""
    run.run(settings(small, eval_rows=0), recode.LOOPS)
    folder = Path(small["out"])
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "curves.png", "checkpoint", "checkpoint-0",
    }  # fmt: skip
    told = capsys.readouterr()
    assert "grading" not in told.err and "everything is in" in told.out and "|" not in told.out
    run.run(parse(["--resume", small["out"]]), recode.LOOPS)
    assert "is done, 2 steps" in capsys.readouterr().out
    table = runpy.run_path(str(data.HERE / "results" / "runs.py"))["results"]
    assert table([folder]).splitlines()[2].startswith("| GRPO | 0 | - | - | - |")
    (folder / "metrics.jsonl").write_text("")  # as of a run that was stopped before its first step
    assert len(table([folder]).splitlines()) == 2


def test_the_table_of_a_run_names_any_split():
    """Prevents: a KeyError after hours of training, for rows whose split has no name there."""
    answers = {split: evaluate.copied(data.load(split=split)[:1]) for split in data.SPLITS}
    table = report.table(answers, answers).splitlines()
    assert len(table) == 2 + 3 * len(data.SPLITS)
    assert table[-1].startswith("| updates of 2026 | 1 | trained | -1.50 | ")


@pytest.mark.parametrize("call", [1, 4])  # of three splits before and three after
def test_ctrl_c_while_grading_loses_nothing(small, tmp_path, monkeypatch, capsys, call):
    """Prevents: steps that are lost, or made again, because nobody waited for the grades."""
    run.run(settings(small, out=str(tmp_path / "whole")), recode.LOOPS)
    real, calls, update, made = evaluate.greedy, [], recode.step, []
    monkeypatch.setattr(
        recode, "step", lambda *args, **how: made.append(args) or update(*args, **how)
    )

    def greedy(*args):
        calls.append(args)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(evaluate, "greedy", greedy)
    assert run.main(settings(small), recode.LOOPS) == 130
    assert f"--resume {small['out']}" in capsys.readouterr().err
    assert run.main(parse(["--resume", small["out"]]), recode.LOOPS) == 0
    whole, stopped = (tmp_path / "whole", Path(small["out"]))
    for name in ("before.jsonl", "after.jsonl", "samples.md"):
        assert (whole / name).read_text() == (stopped / name).read_text()
    steps = [[(m["step"], m["loss"]) for m in metrics.history(f)] for f in (whole, stopped)]
    assert steps[0] == steps[1] and len(made) == 2 * Config.minibatches  # of two steps, each once


def test_same_seed_same_run(small, tmp_path):
    """Prevents: a source of chance outside the seed, so that no published figure can be re-made."""
    found = []
    for name in "ab":
        run.run(settings(small, out=str(tmp_path / name)), recode.LOOPS)
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

    with pytest.raises(KeyboardInterrupt):
        run.run(settings(small), recode.LOOPS | {"grpo": stop_after_one})
    monkeypatch.setattr(recode, "train", real)
    run.run(parse(["--resume", small["out"]]), recode.LOOPS)
    lines = (Path(small["out"]) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text).get("step") for text in lines] == [1, 2, None]


def evenness(algo, texts, rollout, examples, config):
    """A judge of random models: the reward is the share of even ids."""
    share = ((rollout.tokens % 2 == 0) & rollout.mask).sum(-1) / rollout.length
    names = ("total", "exact", "format")
    return dict.fromkeys(names, share) | {"dead": grpo.dead(share), "keep": algo.keep(share)}


@pytest.mark.parametrize("algo", ["grpo", "dapo", "drgrpo", "gspo", "cispo"])
def test_loop_raises_the_reward(small, algo, monkeypatch):
    """Prevents: a wrong sign anywhere between reward and step. Reward here: share of even ids."""
    monkeypatch.setattr(recode, "score", evenness)
    more = dict(algo=algo, steps=20, prompts=4, group_size=16, lr=0.03, warmup=0, max_new_tokens=4)
    config = settings(small, **more, **({"beta": 0.0} if algo == "grpo" else {}))
    rewards = [m["reward"] for m in recode.train(config, *run.start(config))]
    assert rewards[0] < 0.65 and sum(rewards[-3:]) / 3 > 0.85


def test_finetuning_learns_the_answers(small):
    """Prevents: cross-entropy on the wrong positions. A model that may memorise must memorise."""
    config = settings(small, algo="sft", steps=30, lr=0.01)
    losses = [m["loss"] for m in recode.finetune(config, *run.start(config))]
    assert losses[-1] < 0.6 * losses[0]


# ---------------------------------------------------------------- dynamic sampling


def test_dead_groups_are_replaced(small):
    """Prevents: DAPO trains on groups whose advantage is 0, or on fewer prompts than asked."""
    batch = Batch(settings(small, algo="dapo", prompts=3, max_refills=5))
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
    batch = Batch(settings(small, algo="dapo", prompts=2, max_refills=2))
    for _ in range(3):
        assert batch.missing == 2
        batch.add(*fake([[1.0, 1.0], [0.0, 0.0]]))
    assert batch.missing == 0 and len(batch.close()[1]) == 0


def test_grpo_keeps_dead_groups(small):
    """Prevents: dynamic sampling leaks into GRPO. Its dead groups are only counted."""
    batch, groups = Batch(settings(small)), fake([[1.0, 1.0], [0.0, 1.0]], algo=grpo)
    batch.add(*groups)
    assert batch.missing == 0 and len(batch.close()[1]) == 2 and dead_share(groups) == 0.5


@pytest.mark.parametrize(("filtered", "kept"), [("exact", 1), ("reward", 2)])
def test_filter_looks_at_what_the_config_says(small, filtered, kept, monkeypatch):
    """Prevents: all-wrong groups with differing rewards pass the paper's filter."""
    config = settings(small, algo="dapo", filter=filtered, max_refills=0)
    scores = {"total": [0.1, 0.7, 0.2, 2.0], "exact": [0.0, 0.0, 0.0, 1.0], "format": [1.0] * 4}
    scores = {name: torch.tensor(values) for name, values in scores.items()}
    monkeypatch.setattr(recode.rewards, "score", lambda *args: scores)
    rollout, _ = fake([[0.0, 0.0]] * 2)
    batch = Batch(config)
    batch.add(rollout, recode.score(dapo, [""] * 4, rollout, data.load()[:2], config))
    assert len(batch.close()[1]) == kept


@pytest.mark.parametrize("algo", ["grpo", "dapo"])
def test_a_run_with_nothing_to_learn_stops_with_advice(small, algo, monkeypatch, capsys):
    """Prevents: hours of sampling without one update, in silence."""

    def judge(algo, texts, rollout, examples, config):
        zero = torch.zeros_like(rollout.length).float()
        names = ("total", "exact", "format")
        return dict.fromkeys(names, zero) | {"dead": grpo.dead(zero), "keep": algo.keep(zero)}

    monkeypatch.setattr(recode, "score", judge)
    config = settings(small, algo=algo, steps=9, patience=3)
    run.run(config, recode.LOOPS)
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text).get("step") for text in lines] == [1, 2, 3, None]
    assert "in 3 steps in a row every sample of a prompt scored the same" in capsys.readouterr().out
    run.run(parse(["--resume", config.out]), recode.LOOPS)
    assert "is done, 3 steps; give a larger --patience" in capsys.readouterr().out
    after = AutoModelForCausalLM.from_pretrained(Path(config.out) / "checkpoint")
    before = AutoModelForCausalLM.from_pretrained(config.model)
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    if algo == "dapo":  # GRPO's KL still trains
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_model_without_the_form_is_told_to_imitate_first(small, capsys):
    """Prevents: a random model scores -3 throughout, trains on nothing, and nobody is told why."""
    run.run(settings(small, patience=1), recode.LOOPS)
    shown = capsys.readouterr().out
    assert "no sample has the form asked for: start with --algo sft" in shown


def test_a_lost_tensorboard_is_told_before_grading(small, monkeypatch):
    """Prevents: minutes of grading, and a folder that is taken, for a package that is not there."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(run, "graded_base", lambda *args: pytest.fail("it graded"))
    with pytest.raises(ValueError, match="pip install tensorboard"):
        run.run(settings(small, tensorboard=True), recode.LOOPS)
    assert not Path(small["out"]).exists()


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(small, fault):
    """Prevents: one NaN gradient makes NaN weights, and the run goes on to its end with them."""
    config = settings(small)
    policy, state = run.start(config)
    weights = [p.clone() for p in policy.model.parameters()]
    for p in policy.model.parameters():
        p.grad = torch.full_like(p, fault)
    assert recode.step(state, config, 0.0)[1] and state.skipped == 1
    for p in policy.model.parameters():
        p.grad = torch.ones_like(p)
    assert recode.step(state, config, fault)[1] and state.skipped == 2
    pairs = zip(weights, policy.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and state.complete
    for p in policy.model.parameters():
        p.grad = torch.ones_like(p)
    assert recode.step(state, config, 0.0) == (pytest.approx(norm_of_ones(policy)), False)
    assert state.skipped == 0 and not state.complete


def norm_of_ones(policy):
    return math.sqrt(sum(p.numel() for p in policy.model.parameters()))


def test_divergence_ends_the_run_and_keeps_the_last_good_checkpoint(small, monkeypatch, capsys):
    """Prevents: `--lr 1e3` runs to the end, exits 0, and its weights replace the good ones."""
    real = grpo.loss

    def diverging(*args, **knobs):
        value, info = real(*args, **knobs)
        return value * math.nan, info | {"kl": math.nan}

    monkeypatch.setattr(grpo, "loss", diverging)
    assert run.main(settings(small, steps=9), recode.LOOPS) == 2
    assert "Lower --lr" in capsys.readouterr().err
    folder = Path(small["out"])
    assert [p.name for p in checkpoint.complete(folder)] == ["checkpoint"]
    first, second = (json.loads(t) for t in (folder / "metrics.jsonl").read_text().splitlines())
    assert (first["loss"], first["kl"], first["skipped"], second["skipped"]) == (None, None, 2, 2)


def test_weights_that_are_not_finite_are_never_saved(small):
    """Prevents: a checkpoint of NaN takes the place of a good one."""
    policy, state = run.start(settings(small))
    folder = Path(small["out"])
    checkpoint.save(folder, policy, state)
    next(policy.model.parameters()).data[0] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        checkpoint.save(folder, policy, state)
    assert checkpoint.newest(folder).name == "checkpoint"


# ---------------------------------------------------------------- parts


def test_every_training_row_comes_once_an_epoch_and_resume_goes_on(small):
    """Prevents: a resumed run sees the first prompts twice."""
    config, rows = settings(small), data.load(small["data"])
    stream = data.endless(config.data, config.seed, 0)
    first = [next(stream).id for _ in rows]
    assert sorted(first) == sorted(e.id for e in rows) and first != [e.id for e in rows]
    again = data.endless(config.data, config.seed, 3)
    assert [next(again).id for _ in range(5)][:3] == first[3:6]


def test_a_step_that_is_cut_short_is_not_counted(small, monkeypatch):
    """Prevents: Ctrl-C while a step samples, after which --resume skips that step's prompts."""
    real, calls = recode.sample, []

    def once(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    config = settings(small)
    policy, state = run.start(config)
    monkeypatch.setattr(recode, "sample", once)
    with pytest.raises(KeyboardInterrupt):
        list(recode.train(config, policy, state))
    assert (state.step, state.drawn) == (1, 2)


def test_graded_rows_are_not_those_of_a_seed(small):
    """Prevents: one seed trains on most of the graded training rows, another on a few of them."""
    graded = {e.id for e in evaluate.chosen("", 300)["train"]}
    rows = len(data.load())
    assert len(graded) == 300
    for seed in range(5):
        first = data.endless("", seed)
        both = sum(next(first).id in graded for _ in range(192))
        assert both < 60, (seed, both, rows)  # by chance 192 * 300 / 1700 = 34, std 5


@pytest.mark.parametrize(("items", "count"), [(16, 2), (16, 7), (5, 2), (3, 8), (0, 2)])
def test_updates_have_nearly_equal_shares(small, items, count):
    """Prevents: seven updates asked, six made, the last of them on one group."""
    config = settings(small, minibatches=count)
    found = [groups for groups, _ in recode.portions(torch.ones(items, 2, 1), config)]
    assert sum(found, []) == list(range(items)) and len(found) == min(count, items)
    assert not found or max(map(len, found)) - min(map(len, found)) <= 1


def test_dead_groups_stay_out_of_the_model(small, monkeypatch):
    """Prevents: passes for groups that push nothing; or a gradient, weight or ratio without them,
    as if the batch were smaller."""
    total = torch.tensor([[0.0, 1], [1, 1], [0, 0], [1, 0]])  # groups 1 and 2 are dead
    names = ("total", "exact", "copied", "format")
    scores = {name: total for name in names}
    scores |= {"dead": grpo.dead(total), "keep": grpo.keep(total)}
    monkeypatch.setattr(recode, "score", lambda *_: scores)
    config = settings(small, beta=0.0, prompts=4, group_size=2, minibatches=1, steps=1, lr=0.1)
    found = []
    for moving in ([0, 3], [0, 1, 2, 3]):
        policy, state = run.start(config)
        state.optimizer = torch.optim.SGD(policy.model.parameters())  # AdamW would swell rounding
        seen, logp = [], policy.logp
        policy.logp = lambda *args, seen=seen, logp=logp: seen.extend(args[1]) or logp(*args)
        if len(moving) == 4:
            monkeypatch.setattr(recode, "portions", lambda *_: [([0, 1, 2, 3], [0, 1, 2, 3])])
        (metrics,) = recode.train(config, policy, state)
        assert seen == moving and metrics["ratio"] == pytest.approx(1)
        found.append(torch.cat([p.flatten() for p in policy.model.parameters()]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)
    everyone = [([0, 1, 2, 3], [0, 1, 2, 3])]
    monkeypatch.undo()
    adv = grpo.advantage(total)[..., None]
    assert recode.portions(adv, config) == [([0, 1, 2, 3], [0, 3])]
    assert recode.portions(adv, settings(small, minibatches=1)) == everyone  # the KL pulls at all
    assert recode.portions(0 * adv, config) == everyone  # zeros move AdamW, nothing does not


# ---------------------------------------------------------------- adapters and low precision


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_train_alone_and_go_on(small, kind, dtype):
    """Prevents: a base that moves, a checkpoint with all its weights, or a resumed run without
    its adapters."""
    more = dict(algo="sft", lr=0.01, dtype=dtype, adapter=kind, rank=4)
    whole = Path(small["out"] + "-whole")
    run.run(settings(small, out=str(whole), steps=3, **more), recode.LOOPS)
    run.run(settings(small, **more), recode.LOOPS)
    run.run(parse(["--resume", small["out"], "--steps", "3"]), recode.LOOPS)
    folder = Path(small["out"]) / "checkpoint"
    assert not (folder / "model.safetensors").exists()
    files = (f / "adapter_model.safetensors" for f in (folder, whole / "checkpoint"))
    ours, theirs = map(load_file, files)
    assert any(".lora_B" in key and tensor.any() for key, tensor in ours.items())
    # The learning rate of the first two steps knew another number of steps: only almost the same.
    assert ours.keys() == theirs.keys()
    trained, base = load(str(folder), "cpu"), load(small["model"], "cpu")
    lora.save_merged(trained.model, folder.parent / "merged")
    trained.tokenizer.save_pretrained(folder.parent / "merged")
    merged = load(str(folder.parent / "merged"), "cpu")
    rows = data.load(small["data"])[:2]
    with lora.disabled(trained.model):
        weights = dict(trained.model.named_parameters())
        for name, p in base.model.named_parameters():
            torch.testing.assert_close(p, weights[name], atol=0, rtol=0)
    close = 1e-4 if dtype == "float32" else 0.2
    rollout = base.imitate(rows, max_new_tokens=40)
    logp = trained.logp(rollout, [0, 1])
    torch.testing.assert_close(merged.logp(rollout, [0, 1]), logp, atol=close, rtol=0)
    assert (base.logp(rollout, [0, 1]) - logp).abs().max() > 0.01


def test_the_reference_of_adapters_is_the_model_without_them(small):
    """Prevents: a KL to the policy itself, 0 for ever; or a second copy of the weights."""
    config = settings(small, adapter="lora", rank=4)
    policy, _ = run.start(config)
    assert untrained(policy, config.model) is policy
    rollout = policy.imitate(data.load(small["data"])[:2], max_new_tokens=40)
    before = policy.logp(rollout, [0, 1]).detach()
    assert torch.equal(before, policy.base_logp(rollout, [0, 1]))  # B is 0: nothing has changed
    for p in policy.model.parameters():
        if p.requires_grad:
            p.data.add_(0.1)
    assert torch.equal(before, policy.base_logp(rollout, [0, 1]))
    assert not torch.equal(before, policy.logp(rollout, [0, 1]))


def adapters(small, **how):
    """A folder of adapters on the tiny model as training might leave them: B is not zero."""
    policy, generator = load(small["model"], "cpu"), torch.Generator().manual_seed(5)
    policy.adapt(lora.Adapter(rank=4, **how), generator)
    for p in policy.model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn(p.shape, generator=generator)
    folder = Path(small["out"] + "-adapters")
    policy.save(folder)
    return str(folder)


@pytest.mark.parametrize("dora", [False, True])
def test_the_reference_of_a_run_from_adapters_is_these_adapters(small, dora, monkeypatch):
    """Prevents: a KL to the bare base, 6 nats a token at step 1, that undoes the cold start; a
    resumed run with another reference, or one whose bits rotted."""
    monkeypatch.setattr(recode, "score", evenness)
    more = dict(beta=0.1, minibatches=1, lr=0.01, model=adapters(small, dora=dora))
    folder = Path(small["out"])
    run.run(settings(small, steps=3, save_every=1, **more), recode.LOOPS)
    whole = [row["kl"] for row in metrics.rows(folder) if "kl" in row]
    assert whole[0] == pytest.approx(0, abs=1e-6) and whole[1] > 1e-5
    began = load_file(folder / "checkpoint" / "reference.safetensors")
    given = load_file(Path(more["model"]) / "adapter_model.safetensors")
    assert began.keys() == given.keys()
    assert all(torch.equal(tensor, began[key]) for key, tensor in given.items())
    shutil.rmtree(folder / "checkpoint")
    run.run(parse(["--resume", small["out"]]), recode.LOOPS)  # from step 2
    assert [row["kl"] for row in metrics.rows(folder) if "kl" in row] == whole
    file = folder / "checkpoint" / "reference.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="reference.safetensors is damaged"):
        run.start(parse(["--resume", small["out"]]))


def test_a_run_without_a_kl_keeps_no_reference(small):
    """Prevents: a file that nobody reads in every checkpoint."""
    run.run(settings(small, beta=0.0, model=adapters(small)), recode.LOOPS)
    assert not list(Path(small["out"]).glob("*/reference.safetensors"))


@pytest.mark.parametrize(
    "other",
    [
        {"adapter": "lora", "rank": 8},
        {"adapter": "dora", "rank": 4},
        {"adapter": "lora", "rank": 4, "alpha": 16.0},
        {"adapter": "lora", "rank": 4, "targets": "q_proj"},
        {"shard": True},
    ],
)
def test_other_adapters_than_those_of_the_model_are_refused(small, other):
    """Prevents: `--rank 8` over ready adapters of rank 4, which train while 8 is recorded."""
    more = dict(model=adapters(small))
    policy = load(more["model"], "cpu")
    with pytest.raises(ValueError, match="-adapters has .*adapters.*: leave --"):
        run.adapt(settings(small, **more, **other), policy, torch.Generator())


@pytest.mark.parametrize("given", [{}, {"adapter": "lora", "rank": 4}])
def test_ready_adapters_go_on_with_their_own_settings_or_none(small, given):
    """Prevents: fresh adapters over ready ones, or a refusal of the settings that they have."""
    more = dict(model=adapters(small))
    policy, before = load(more["model"], "cpu"), lora.frozen(load(more["model"], "cpu").model)
    run.adapt(settings(small, **more, **given), policy, torch.Generator())
    after = lora.frozen(policy.model)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("more", [{}, {"adapter": "lora", "rank": 4}])
def test_in_bf16_the_first_ratio_is_one(small, more):
    """Prevents: other batch shapes in sampling and training, which bf16 takes for a new policy."""
    config = settings(small, dtype="bfloat16", prompts=4, minibatches=2, pack_tokens=100, **more)
    policy, state = run.start(config)
    rollout = recode.sample(policy, data.load(small["data"])[:4], config, state)
    adv = torch.ones(*rollout.length.shape, 1)
    (first, _), (second, _) = recode.minibatches(policy, rollout, adv, grpo, config)
    assert all(part.old_logp is None for part in first)  # the new ones, detached
    assert [part.groups for part in second] == packs(rollout, 100, [2, 3])
    for part in second:
        assert torch.equal(policy.logp(rollout, part.groups, 1.0), part.old_logp)
        assert (part.old_logp - rollout.logp[part.groups]).abs().max() < 0.5  # no other policy
    plain = settings(small)
    policy, state = run.start(plain)
    rollout = recode.sample(policy, data.load(small["data"])[:2], plain, state)
    for parts, _ in recode.minibatches(policy, rollout, adv[:2], grpo, plain):
        assert all(torch.equal(p.old_logp, rollout.logp[p.groups]) for p in parts)


@pytest.mark.parametrize("adapted", [False, True])
def test_checkpointing_changes_no_gradient(small, adapted):
    """Prevents: a replay with another attention, or without the adapters."""
    if adapted:
        small["model"] = adapters(small)
    gradients = []
    for recompute in (False, True):
        config = settings(small, recompute=recompute)
        policy, state = run.start(config)
        rollout = recode.sample(policy, data.load(small["data"])[:2], config, state)
        logp = policy.logp(rollout, [0, 1])
        torch.testing.assert_close(logp.detach(), rollout.logp, atol=1e-4, rtol=0)
        logp.sum().backward()
        gradients.append([p.grad for p in policy.model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointing_forgets_activations(small):
    """Prevents: a flag that does nothing, since transformers heeds its own in train() alone."""
    kept = {}
    for recompute in (False, True):
        policy, _ = run.start(settings(small, recompute=recompute))
        # answers of two tokens: the head keeps much of each that is scored
        rollout, sizes = policy.imitate(data.load(small["data"])[:2], max_new_tokens=2), []
        weights = {p.data_ptr() for p in policy.model.parameters()}

        def note(x, sizes=sizes, weights=weights):
            sizes.append(x.numel() * (x.data_ptr() not in weights))
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            policy.logp(rollout, [0, 1])
        kept[recompute] = sum(sizes)
    # Two layers keep their input, of 32 numbers a token, and no longer some twenty tensors of it.
    assert kept[True] < kept[False] / 4


def test_the_head_of_an_untied_model_can_have_adapters(small, tmp_path):
    """Prevents: a KeyError for `--targets q_proj,lm_head`."""
    config = AutoConfig.from_pretrained(small["model"], tie_word_embeddings=False)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "untied")
    AutoTokenizer.from_pretrained(small["model"]).save_pretrained(tmp_path / "untied")
    more = dict(model=str(tmp_path / "untied"), adapter="lora", rank=4, targets="q_proj,lm_head")
    run.run(settings(small, **more), recode.LOOPS)
    tensors = load_file(Path(small["out"]) / "checkpoint" / "adapter_model.safetensors")
    assert {key.split(".lora_")[0].rpartition(".")[2] for key in tensors} == {"q_proj", "lm_head"}


# ---------------------------------------------------------------- rows that cannot be learnt


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"new_code": 'text = """\n```\n"""'}, "would not score 3"),
        ({"new_code": 'tag = "</answer>"'}, "would not score 3"),
        ({"new_code": f"x = {list(range(24000))}"}, "would not score 3"),
        ({"new_code": "x = 1\n" * 60}, "--max-new-tokens is 40: raise that"),
        ({"update_info": "word " * 1100}, "exceed the model's context of 1024"),
    ],
)
def test_rows_that_no_answer_can_get_right_are_named(small, change, sentence):
    """Prevents: rows that count as wrong whatever the policy says, or end a run without a place."""
    file = Path(small["data"])
    lines = file.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | change)
    file.write_text("\n".join(lines) + "\n")
    config = settings(small)
    with pytest.raises(ValueError, match=f"rows.jsonl, line 3: .*{sentence}"):
        run.run(config, recode.LOOPS)
    assert not Path(small["out"]).exists()  # so that the same command can be given again


def test_a_terminal_of_ascii_does_not_end_a_run(small):
    """Prevents: hours of training that end in `'ascii' codec can't encode character`."""
    file = Path(small["data"])
    file.write_text(file.read_text().replace("is now", "is now \\u2014"))
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    flags = {name: small[name] for name in ("model", "data", "out")}
    arguments = [word for name, value in flags.items() for word in (f"--{name}", value)]
    arguments += ["--algo", "sft", "--steps", "1", "--prompts", "2"]
    done = subprocess.run(
        [sys.executable, "recode.py", *arguments],
        cwd=Path(__file__).parent.parent, env=os.environ | plain, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert b"\\u2014" in done.stdout
    assert "\u2014" in Path(small["out"], "samples.md").read_text(encoding="utf-8")
