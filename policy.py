"""A policy: a causal language model with its tokenizer. Load it, ask it, keep a run's state.

    policy = load("", "cpu")                                # the bundled one, 1.9 M parameters
    policy.complete(data.load(split="test")[:1], max_new_tokens=384)
        -> ["\\nReplace `...` by `...`.\\n</think>\\n<answer>\\n```python\\n..."]

Not here: how tokens are drawn and scored (`rollout.py`), what an answer is worth (`reward.py`).
Shapes: B prompts, G samples a prompt, T completion length.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import data
from rollout import Rollout, sample, written


@dataclass
class Policy:
    """A model, its tokenizer, the ids that end its answers and the one that pads them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: list[int]
    pad_id: int

    def sample(
        self,
        examples: list[data.Example],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Rollout:
        """group_size completions of each example's prompt, at most max_new_tokens tokens each."""
        return sample(
            self.model,
            self.prompts(examples),
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            temperature=temperature,
            generator=generator,
        )

    def complete(self, examples: list[data.Example], *, max_new_tokens: int) -> list[str]:
        """The greedy answer to each example, as text; all of them in one batch."""
        return self.texts(
            self.sample(examples, group_size=1, max_new_tokens=max_new_tokens, temperature=0.0)
        )

    def prompts(self, examples: list[data.Example]) -> list[list[int]]:
        """Token ids of each example's conversation, open after `<think>`."""
        return [data.prompt(example, self.tokenizer) for example in examples]

    def texts(self, rollout: Rollout) -> list[str]:
        """The B*G completions as text, without the token that ended them."""
        pairs = zip(rollout.tokens.flatten(0, 1), rollout.length.flatten(), strict=True)
        rows = [row[:length].tolist() for row, length in pairs]
        rows = [row[:-1] if row[-1] in self.eos_ids else row for row in rows]
        return self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)

    def imitate(self, examples: list[data.Example], *, max_new_tokens: int) -> Rollout:
        """The true answers, as if the policy had sampled them once per prompt: G = 1."""
        answers = [data.completion(example) for example in examples]
        answers = self.tokenizer(answers, add_special_tokens=False)["input_ids"]
        answers = [[(ids + self.eos_ids[:1])[:max_new_tokens]] for ids in answers]
        return written(self.prompts(examples), answers, self.pad_id, self.model.device)


def load(name: str, device: str) -> Policy:
    """A causal language model in float32, its tokenizer, and every id that may end an answer.

    `name` is a folder or a hub id, "" the bundled policy. ValueError in one sentence if it is not
    to be had.
    """
    name = name or str(data.POLICY)
    if not Path(name).exists() and (name.startswith((".", "/")) or name.count("/") != 1):
        raise ValueError(f"--model {name}: no such folder; data.policy.make makes the bundled one")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"--model {name}: {str(error).splitlines()[0]}") from None
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    eos_ids = [i for i in dict.fromkeys([tokenizer.eos_token_id, *ends]) if i is not None]
    if not eos_ids:
        raise ValueError(f"--model {name}: neither tokenizer nor model names an end token")
    pad_id = eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Policy(model, tokenizer, eos_ids, pad_id)


# ------------------------------------------------------------------------------------------------
# A run's state
# ------------------------------------------------------------------------------------------------


@dataclass
class State:
    """What changes while training, beside the weights."""

    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # draws the samples
    step: int = 0
    drawn: int = 0  # examples taken from the endless, shuffled training data
    live: int = 0  # groups that the last step was trained on
    idle: int = 0  # steps in a row without one

    def count(self, drawn: int, live: int) -> None:
        """A step is done. One that Ctrl-C cuts short is not counted, and its prompts come again."""
        self.step, self.drawn, self.live = self.step + 1, self.drawn + drawn, live
        self.idle = 0 if live else self.idle + 1


def save(folder: Path, policy: Policy, state: State) -> None:
    """Write folder/checkpoint. The last one stays until the new one is whole."""
    fresh, final, old = (folder / f"checkpoint{end}" for end in (".new", "", ".old"))
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    policy.model.save_pretrained(fresh)
    policy.tokenizer.save_pretrained(fresh)
    counts = {"step": state.step, "drawn": state.drawn}  # a resumed run has its patience anew
    kept = {"optimizer": state.optimizer.state_dict(), "generator": state.generator.get_state()}
    torch.save(counts | kept, fresh / "state.pt")
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path, state: State) -> State:
    """The state that `save` wrote, put into this one's optimizer and generator."""
    file = folder / "checkpoint" / "state.pt"
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError):
        raise ValueError(f"{file} is damaged: start a new run") from None
    state.optimizer.load_state_dict(saved.pop("optimizer"))
    state.generator.set_state(saved.pop("generator"))
    return replace(state, **saved)
