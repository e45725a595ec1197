"""A run's life around its loop: start or go on, grade, train, save, grade again, and the command.

The loop itself, what a step is, comes from `recode.py`, which hands it over.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import data
import evaluate
import lora
from attention import recompute
from config import Config
from policy import Policy, chosen_device, load
from rollout import check_model
from upkeep import checkpoint, machine, metrics, ranks, report, terminal
from upkeep.checkpoint import State
from upkeep.machine import write
from upkeep.rows import check_rows

Loop = Callable[[Config, Policy, State], Iterator[dict]]  # one step a turn, its metrics


def start(config: Config) -> tuple[Policy, State]:
    """The policy and a fresh state, or those of the checkpoint that the run goes on from."""
    if config.shard and ranks.world() == 1:
        raise ValueError("--shard needs ranks to share among: start torchrun, or give --no-shard")
    device, kept = ranks.begin(chosen_device(config.device)), None
    if config.resume:  # rank 0 may have to mend what a kill left
        mine = None if ranks.rank() else checkpoint.newest(Path(config.resume))
        kept = ranks.gather([mine])[0]
    policy = load(str(kept or config.model), device, config.dtype)
    # On the CPU, so that a run of one device can go on on another.
    generator = torch.Generator().manual_seed(config.seed)
    if not kept:
        adapt(config, policy, generator)
    if config.recompute:
        recompute(policy.model)
    if config.shard:
        check_model(policy.model, length=1)  # once, and while its weights are whole
        policy.logp = ranks.shard(policy.model, policy.logp)
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay)
    state = State(optimizer, generator)
    state.data, state.model = data.fingerprint(config.data), checkpoint.fingerprint(config.model)
    if kept:
        checkpoint.restore(kept, policy, state)
    return policy, state


def adapt(config: Config, policy: Policy, generator: torch.Generator) -> None:
    """Put fresh adapters on the policy, if asked for. ValueError if it came with other ones."""
    dora, targets = config.adapter == "dora", tuple(filter(None, config.targets.split(",")))
    adapter = lora.Adapter(config.rank, config.alpha, dora=dora, targets=targets)
    if not policy.adapted:
        if config.adapter != "none":
            policy.adapt(adapter, generator)
        return
    if config.shard:
        raise ValueError(f"--model {config.model} has adapters: leave --shard away")
    if config.adapter != "none" and not lora.same(policy.model, adapter):
        raise ValueError(
            f"--model {config.model} has other adapters: leave --adapter, --rank, --alpha and "
            f"--targets away, or give them as its {lora.CONFIG} does"
        )
    if config.with_kl:
        policy.began = lora.frozen(policy.model)


def run(config: Config, loops: dict[str, Loop]) -> None:
    """Grade, train, grade again, and write the run folder."""
    begin, folder = time.time(), Path(config.out)
    with checkpoint.claimed(folder):
        if not (config.resume or ranks.rank() or checkpoint.is_empty(folder)):
            raise ValueError(f"{folder} is not empty: give another --out, or --resume {folder}")
        config = replace(config, threads=machine.use_threads(config.threads))
        torch.manual_seed(config.seed)
        policy, state = start(config)
        config = replace(config, dtype=str(policy.dtype).removeprefix("torch."))
        state.begin = begin
        ended = state.step >= config.steps or state.idle >= config.patience
        if ended and any("grade" in row for row in metrics.rows(folder)[-1:]):
            more = "--patience" if state.idle >= config.patience else "--steps"
            print(f"{folder} is done, {state.step} steps; give a larger {more} to train on")
            return
        check_rows(policy, config.data, config.max_new_tokens)
        file = metrics.Metrics(folder, config.tensorboard, state.step)
        if not ranks.rank():
            # First what --resume asks for: a kill must not leave a folder that cannot go on.
            write(folder / "config.json", json.dumps(config.record(), indent=1) + "\n")
            metrics.rewind(folder, state.step)
        if state.step == 0:
            # A full disk shows now, and whatever ends the run leaves a checkpoint.
            checkpoint.save(folder, policy, state)
        print(f"{config.algo} on {policy.model.device} (threads: {config.threads}) in {folder}")
        before = graded_base(config, policy, state)
        follow(loops[config.algo](config, policy, state), config, policy, state, file)
        finish(config, policy, state, before)


def graded_base(config: Config, policy: Policy, state: State) -> evaluate.Report:
    """The base policy's graded answers; a resumed run has them in its folder. {} of no rows."""
    rows = evaluate.chosen(config.data, config.eval_rows)
    kept = evaluate.read(Path(config.out, "before.jsonl"), rows) if rows else {}
    if kept is not None:
        return kept
    base = policy if state.step == 0 else load(config.model, policy.model.device, config.dtype)
    return graded(config, base, "before")


def graded(config: Config, policy: Policy, when: str) -> evaluate.Report:
    """The policy's graded answers, each rank its share of them, and the file of these."""
    rows = evaluate.chosen(config.data, config.eval_rows)
    mine = {name: ranks.share(examples) for name, examples in rows.items()}
    title, quiet = f"grading {when}", ranks.rank() > 0
    with ranks.gathered(policy.model):
        report = evaluate.report(policy, mine, config.max_new_tokens, title, quiet=quiet)
    report = {name: ranks.gather(answers) for name, answers in report.items()}
    if rows and not ranks.rank():
        write(Path(config.out, f"{when}.jsonl"), evaluate.lines(report))
    return report


def follow(
    steps: Iterator[dict], config: Config, policy: Policy, state: State, file: metrics.Metrics
) -> None:
    """Run the steps under a progress bar, a line of metrics.jsonl each, and save whole steps.

    Whatever ends them, the last whole one is saved; of shards only if all ranks agreed to stop.
    """
    folder, agreed = Path(config.out), not config.shard
    with (
        terminal.progress(config.algo, config.steps, state.step, quiet=ranks.rank() > 0) as bar,
        machine.noting_signals() as signals,
    ):
        try:
            for numbers in steps:
                machine.return_freed_memory()
                file.append({"step": state.step} | numbers)
                bar.set_postfix_str(terminal.line(numbers), refresh=False)
                bar.update()
                for sentence in complaints(numbers, state, config):
                    tqdm.write(sentence)
                if state.diverged:
                    raise ValueError(
                        f"stopped at step {state.step}: {state.skipped} optimizer steps in a row "
                        "were not finite, and not made. Lower --lr in a new run (--resume keeps it)"
                    )
                if any(ranks.gather([bool(signals)])):  # or one would wait for ever
                    agreed = True
                    raise KeyboardInterrupt
                if state.step % config.save_every == 0 and state.step < config.steps:
                    checkpoint.save(folder, policy, state)
            agreed = True
        finally:
            if agreed and state.complete and not state.diverged:
                checkpoint.save(folder, policy, state)


def complaints(metrics: dict, state: State, config: Config) -> Iterator[str]:
    """What a person should know of this step, if anything."""
    if metrics.get("format") == -1:
        yield f"step {state.step}: no sample has the form asked for: start with --algo sft"
    if count := metrics["skipped"]:
        yield f"step {state.step}: {count} optimizer steps skipped, their loss is not finite"
    if not state.teaching:
        yield f"step {state.step}: no group that teaches, every sample of a prompt scored the same"
    elif config.algo == "dapo" and state.teaching < config.prompts:
        groups = f"{state.teaching} of {config.prompts} groups"
        yield f"step {state.step}: trained on {groups} after {config.max_refills} refills"
    if state.idle >= config.patience:
        yield (
            f"stopped: in {state.idle} steps in a row every sample of a prompt scored the same. "
            "Try a larger --group-size, data less easy or less hard (and DAPO --filter reward)"
        )


def finish(config: Config, policy: Policy, state: State, before: evaluate.Report) -> None:
    """Grade the trained policy; write its answers, samples.md and curves.png, last the grades."""
    folder, shown = Path(config.out), ""
    after = graded(config, policy, "after")
    if ranks.rank():
        return
    if after:
        page, shown = report.samples(f"{config.algo}, seed {config.seed}", before, after)
        write(folder / "samples.md", page)
    report.curves(folder / "curves.png", metrics.history(folder))
    minutes, memory = state.elapsed() / 60, machine.peak_memory(policy.model.device)
    grades = {
        when: {split: evaluate.means(graded) for split, graded in splits.items()}
        for when, splits in {"before": before, "after": after}.items()
    }
    metrics.Metrics(folder).append({"grade": grades, "minutes": minutes, "memory_gb": memory})
    total = f"{minutes:.1f} minutes, {memory:.1f} GB at most; everything is in {folder}"
    print(*filter(None, [shown, total]), sep="\n\n")


def main(config: Config, loops: dict[str, Loop]) -> int:
    """The command. 0 done, 2 a sentence about what is wrong, 130 interrupted."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # an ASCII terminal must not end a run
    for polite in machine.POLITE:  # all save, like Ctrl-C
        if signal.getsignal(polite) is not signal.SIG_IGN:
            signal.signal(polite, signal.default_int_handler)
    if ranks.rank():  # rank 0 alone speaks
        sys.stdout = open(os.devnull, "w")
    try:
        run(config, loops)
        ranks.end()
    except (ValueError, OSError) as error:
        print(f"recode.py: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        cure = "lower --prompts, --group-size, --max-new-tokens or --pack-tokens, or --recompute"
        print(f"recode.py: out of memory: {cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        if Path(config.out, "config.json").exists():
            print(f"Go on with: python recode.py --resume {config.out}", file=sys.stderr)
        return 130
    return 0
