"""A policy: a causal language model with its tokenizer. Load it, ask it.

    policy = load("", "cpu")                                # the bundled one, 1.9 M parameters
    policy.complete(data.load(split="test")[:1], max_new_tokens=384)
        -> ["\\nReplace `...` by `...`.\\n</think>\\n<answer>\\n```python\\n..."]

Not here: how tokens are drawn and trained on (`rollout.py`), what an answer is worth (`reward.py`),
the state of a run (`upkeep/checkpoint.py`).
Shapes: B prompts, G samples a prompt, T completion length.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

import data
import drafts
import lora
import packed
import weights
from rollout import Rollout, check_model, sample, token_logp, written

# Large tensors take memory in pages of 2 MB, where Linux lets a program ask for them: with those of
# 4 KB a tenth of a training step went into fetching pages. Torch looks here at its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@dataclass
class Policy:
    """A model, its tokenizer, the ids that end its answers and the one that pads them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: list[int]
    pad_id: int
    dtype: torch.dtype = torch.float32  # of matrix products; trained weights are always float32
    adapted: bool = False  # adapters are trained, and the base is frozen
    began: dict[str, Tensor] = field(default_factory=dict)  # adapters that the run began with

    def precision(self) -> torch.autocast:
        """Inside, matrix products run in `dtype`: those of a base under adapters do so anyway."""
        low = self.dtype != torch.float32 and not self.adapted
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=low)

    def decoding(self) -> contextlib.AbstractContextManager:
        """Inside, tokens are sampled fast; nothing is trained."""
        if packed.available(self.model):
            return packed.packed(self.model, self.dtype)
        return lora.merged(self.model)

    def sample(self, prompts: list[list[int]], *, plain: bool = False, **how) -> Rollout:
        """rollout.sample with this model and its ends; `how` has group_size, max_new_tokens, ...

        `plain` keeps away from packed.py and drafts.py: the sampled log-probabilities are those of
        training to the last digits.
        """
        check_model(self.model, length=1)  # while its layers are plain
        how |= {"eos_ids": self.eos_ids, "pad_id": self.pad_id}
        how |= {} if plain else drafts.pace(self.model)
        with self.precision(), contextlib.nullcontext() if plain else self.decoding():
            return sample(self.model, prompts, **how)

    def logp(self, rollout: Rollout, groups: list[int], temperature: float = 1.0) -> Tensor:
        """Log-probability of every token of these groups, differentiable: -> [b, G, T]."""
        with self.precision():
            return token_logp(self.model, rollout, groups, temperature=temperature)

    @torch.no_grad()
    def base_logp(self, rollout: Rollout, groups: list[int], temperature: float = 1.0) -> Tensor:
        """The same of the policy that the run began with: without the adapters, if there are any,
        or with those that it loaded."""
        inside = contextlib.nullcontext()
        if self.began:
            inside = lora.swapped(self.model, self.began)
        elif self.adapted:
            inside = lora.disabled(self.model)
        with inside:
            return self.logp(rollout, groups, temperature)

    def complete(self, examples: list[data.Example], *, max_new_tokens: int) -> list[str]:
        """The greedy answer to each example, as text; all of them in one batch."""
        how = dict(group_size=1, max_new_tokens=max_new_tokens, temperature=0.0)
        return self.texts(self.sample(self.prompts(examples), **how))

    def prompts(self, examples: list[data.Example]) -> list[list[int]]:
        """Token ids of each example's conversation, open after `<think>`."""
        return [data.prompt(example, self.tokenizer) for example in examples]

    def length(self, answer: str) -> int:
        """Tokens of an answer, the end token included."""
        return len(data.encoded(answer, self.tokenizer)) + 1

    def texts(self, rollout: Rollout) -> list[str]:
        """The B*G completions as text, without the token that ended them."""
        pairs = zip(rollout.tokens.flatten(0, 1), rollout.length.flatten(), strict=True)
        rows = [row[:length].tolist() for row, length in pairs]
        rows = [row[:-1] if row[-1] in self.eos_ids else row for row in rows]
        return self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)

    def adapt(self, adapter: lora.Adapter, generator: torch.Generator) -> None:
        """Freeze the model, in `dtype`, and put fresh adapters on it."""
        lora.attach(self.model.to(self.dtype), adapter, generator)
        self.adapted = True

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """The adapters alone if there are any, else the model, or these weights of it; and the
        tokenizer."""
        if self.adapted:
            lora.save(self.model, folder)
        else:
            self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)

    def imitate(self, examples: list[data.Example], *, max_new_tokens: int) -> Rollout:
        """The true answers, as if the policy had sampled them once per prompt: G = 1."""
        answers = [data.encoded(data.completion(e), self.tokenizer) for e in examples]
        answers = [[(ids + self.eos_ids[:1])[:max_new_tokens]] for ids in answers]
        return written(self.prompts(examples), answers, self.pad_id, self.model.device)


def load(name: str, device: str | torch.device, dtype: str = "float32") -> Policy:
    """A causal language model, its tokenizer, and every id that may end an answer.

    `name` is a folder (of a model, or of adapters, whose base is loaded too), a hub id, a GGUF
    file, a name of `weights.NAMES` or "" for the bundled policy. Weights are float32, a base under
    adapters has `dtype` ("auto" is the faster one here). ValueError in one sentence if it is not to
    be had, or is not whole: transformers would fill a gap with random weights.
    """
    name = name or str(data.POLICY)
    adapted = is_adapter(name)
    try:
        base, revision = base_of(name)
        model, tokenizer, loading = read(base, revision)
        tokenizer = own_speech(name, tokenizer) if adapted else tokenizer
    except Exception as error:  # libraries raise a dozen kinds for one broken folder or another
        raise unloadable(name, error) from None
    check_weights(base, model, loading)
    model.to(device)
    dtype = packed.faster_dtype(model) if dtype == "auto" else getattr(torch, dtype)
    if adapted:
        lora.load(model.to(dtype), name)
    eos_ids = end_ids(name, model, tokenizer)
    pad_id = eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    policy = Policy(model, tokenizer, eos_ids, pad_id, dtype, adapted)
    check_speech(name, policy)
    return policy


def end_ids(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that may end an answer: the tokenizer's, the model's, and the end of a turn."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ids = [i for i in (tokenizer.eos_token_id, *ends, turn_end(tokenizer)) if i is not None]
    if not ids or any(type(i) is not int for i in ids):
        raise ValueError(f"--model {name}: tokenizer and model must name end tokens by number")
    return list(dict.fromkeys(ids))


def untrained(policy: Policy, name: str) -> Policy:
    """The reference of the KL: the same model with the adapters that it began with (mostly none),
    or a copy of the one that it began as."""
    if policy.adapted:
        return policy
    reference = load(name, policy.model.device, str(policy.dtype).removeprefix("torch."))
    reference.model.eval().requires_grad_(False)
    return reference


def chosen_device(device: str) -> str:
    """The device asked for; auto takes the GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # as torch says of mps and of cuda
        raise ValueError(f"--device {device}: none on this machine; use --device cpu") from None
    return device


def unloadable(name: str, error: Exception) -> ValueError:
    """One sentence of whatever a library said of a model."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"--model {name} cannot be loaded: {reason}")


def is_adapter(name: str) -> bool:
    return Path(name, lora.CONFIG).is_file()


def base_of(name: str) -> tuple[str, str | None]:
    """The whole model of this name and its revision: what adapters were trained on, or itself."""
    if not is_adapter(name):
        return name, None
    config = json.loads(Path(name, lora.CONFIG).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str) or is_adapter(base):
        wrong = f"{base}, which has adapters itself" if base else "nothing"
        raise ValueError(
            f"its {lora.CONFIG} names {wrong}, as its base: write the name or folder of the whole "
            "model into base_model_name_or_path"
        )
    return base, config.get("revision")


def own_speech(folder: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template that lie with the adapters, where there are some."""
    if Path(folder, "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    template = Path(folder, "chat_template.jinja")
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def read(name: str, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict]:
    """Model in float32, tokenizer, and transformers' report of what fitted. No code of theirs."""
    where = weights.located(name) | {"trust_remote_code": False}
    where |= {"revision": revision} if revision else {}
    model, loading = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if "gguf_file" in where:
        # transformers has unpacked the weights, but still calls the model quantized, and would
        # refuse to save it at the first checkpoint.
        model.hf_quantizer.remove_quantization_config(model)
        # What adapters record as their base: not the folder, which alone is no model.
        model.name_or_path = str(Path(name).resolve()) if name.endswith(".gguf") else name
    return model, AutoTokenizer.from_pretrained(**where), loading


# What of a folder makes the model: weights, configs, tokenizer; not what a run keeps beside them.
PARTS = "*config.json model* pytorch_model* adapter_* *token* *.jinja *.model vocab* merges*"


def files(name: str) -> list[Path]:
    """The files that a policy of this name is read from, those of an adapter's base included."""
    name = name or str(data.POLICY)
    try:
        base, revision = base_of(name)
        where = weights.located(base)
        if not ("gguf_file" in where or Path(base).exists()):
            # the hub's: asked as from_pretrained asks, which takes the newest
            base = Path(cached_file(base, "config.json", revision=revision)).parent
    except Exception as error:
        raise unloadable(name, error) from None
    own = parts(name) if is_adapter(name) else []
    return ([Path(*where.values())] if "gguf_file" in where else parts(base)) + own


def parts(folder: str | Path) -> list[Path]:
    """The files of a folder that make the model."""
    paths = {file for pattern in PARTS.split() for file in Path(folder).glob(pattern)}
    return sorted(file for file in paths if file.is_file())


def check_weights(name: str, model: PreTrainedModel, loading: dict) -> None:
    """ValueError unless each weight came from the files, and is a number."""
    for fault in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, loading.get(f"{fault}_keys", ()))):
            raise ValueError(
                f"--model {name}: {len(keys)} {fault} weights for a {model.config.model_type} "
                f"({keys[0]}, ...): its config.json and its weights do not belong together"
            )
    for key, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise ValueError(f"--model {name}: {key} holds numbers that are not finite")


# A row that no template or tokenizer has reason to change.
PROBE = data.Example("lib", "==2.0", "", "Call `new_name(x=1)`.", "old_name(x=1)\n", "", "")


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes behind an assistant's turn, if it is one."""
    turns = [*data.messages(PROBE), {"role": "assistant", "content": "Done"}]
    try:
        behind = data.rendered(turns, tokenizer).rpartition("Done")[2]
    except ValueError:  # no such turn in this template
        return None
    ids = tokenizer.encode(behind.lstrip(), add_special_tokens=False)[:1]
    token = tokenizer.added_tokens_decoder.get(*ids) if ids else None
    return ids[0] if token and token.special else None


def check_speech(name: str, policy: Policy) -> None:
    """ValueError unless note and code reach the model through tokenizer and chat template; a line
    if nothing but the end of the text tells a policy where an answer ends."""
    tokenizer, rows = policy.tokenizer, policy.model.get_input_embeddings().num_embeddings
    ids, fault = data.prompt(PROBE, tokenizer), ""
    shown = "".join(tokenizer.decode(ids).split())
    if any("".join(text.split()) not in shown for text in (PROBE.update_info, PROBE.old_code)):
        fault = "its tokenizer or chat template loses the note or the code of a prompt"
    elif max(ids + policy.eos_ids) >= rows:
        fault = f"its tokenizer has more tokens than its {rows} embeddings"
    if fault:
        raise ValueError(f"--model {name}: {fault}; take the tokenizer that belongs to the model")
    if turn_end(tokenizer) is None:
        print(
            f"--model {name}: its chat template ends no assistant's turn with one special token; "
            f"answers end with {' or '.join(tokenizer.convert_ids_to_tokens(policy.eos_ids))}",
            file=sys.stderr,
        )
