"""Attention of a group over its shared prompt, and how it enters any transformers model.

A group is one prompt and the G completions sampled from it. The usual code copies the prompt G
times and fills all rows up to the longest. Here a token of a completion attends to the one copy of
its prompt and to its own past,

    attention(q) = softmax([q K_prompt^T , q K_own^T]) [V_prompt ; V_own]

and no product joins two siblings, so none sees another. Three forwards, one attention function:

    prefill   [prompt]                        the prompt's keys and values go to the cache, once
    decode    [1 token of each of G samples]  the group's queries meet K_prompt in ONE matrix
                                              product, [G*rep, D] @ [D, P]: read once, not G times
    train     [prompt | G completions | next  all groups in one row without padding; a fused kernel
               prompt | G completions | ...]  for each text, because gradients would else need all
                                              logits kept. It wants K_prompt copied beside each
                                              K_own, which is cheap: the model's work is saved

`forward` runs a model so, through transformers' attention interface, without its masks and caches.

Known elsewhere: Hydragen (arXiv 2402.05099) for decoding, nanochat's engine (prefill once, copy),
verl's PrefixGrouper for training. Left out: paged caches, and what `check_architecture` refuses.
Sliding windows are masked, at the end of this file; a window saves no memory here.

Shapes: B prompts (= groups), G samples a prompt, P prompt and T completion length, C hidden width,
H query heads, K key heads (rep = H / K), D head width, S tokens of each sample in the cache, L
tokens of a row.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass
class Cache:
    """Keys and values of every layer: a prompt's once per group, and each sample's own."""

    start: Tensor  # [B]; length of each prompt, where its samples begin
    bias: Tensor | None  # [B, 1, 1, P]; -inf on the logits of the prompts' padding, else 0
    prompt: list[tuple] = field(default_factory=list)  # (k, v) a layer, each [B, K, P, D]
    own: list[tuple] = field(default_factory=list)  # (k, v) a layer, each [B, K, G, room, D]
    length: int = 0  # S: tokens of each sample in `own`

    def write(self, layer: int, new: tuple) -> list[Tensor]:
        """Put one token's keys and values [B, K, G, D] behind the S old: -> [B, K, G, S + 1, D]."""
        S = self.length
        if layer == len(self.own):
            self.own.append(tuple(x[:, :, :, None, :] for x in new))
        if S >= self.own[layer][0].shape[3]:  # out of room: double it
            self.own[layer] = tuple(self.roomy(x, max(64, 2 * S)) for x in self.own[layer])
        for buffer, x in zip(self.own[layer], new, strict=True):
            buffer[:, :, :, S] = x  # in place: nothing is concatenated
        return [buffer[:, :, :, : S + 1] for buffer in self.own[layer]]

    def keep(self, groups: Tensor, order: Tensor) -> None:
        """Keep these groups [B'], and of each the samples in `order` [B', G']; forget the rest."""
        self.start = self.start[groups]
        self.bias = None if self.bias is None else self.bias[groups]
        self.prompt = [(k[groups], v[groups]) for k, v in self.prompt]
        for layer, pair in enumerate(self.own):
            # the two index tensors meet as [B', G'], in front: -> [B', G', K, S, D]
            kept = (x[:, :, :, : self.length][groups[:, None], :, order] for x in pair)
            room = pair[0].shape[3]
            self.own[layer] = tuple(self.roomy(x.transpose(1, 2), room) for x in kept)

    def roomy(self, x: Tensor, room: int) -> Tensor:
        """The S tokens of x with room for more: of zeros, for NaN in fresh memory shows through."""
        return F.pad(x[:, :, :, : self.length], (0, 0, 0, room - self.length))


@dataclass
class Layout:
    """What the running forward works on, for the attention function to know."""

    cache: Cache | None = None  # of sampling
    decode: Callable | None = None  # what takes the place of decode_attention (see drafts.py)
    # training: for each group in the row the length P of its prompt, and T of each completion
    texts: list[tuple[int, list[int]]] = field(default_factory=list)
    biases: dict[tuple, Tensor] = field(default_factory=dict)  # made by `bias`, for all layers
    calls: int = 0  # layers that came by so far: the index of the next one
    windows: int = 0  # of these, those with a sliding window

    def bias(self, T: int, L: int, window: int | None, q: Tensor) -> Tensor:
        """What to add to the logits of the last T of L tokens, [T, L]: -inf on the keys of later
        tokens and of those that the window has left behind, else 0.

        For T = 2, L = 4 and a window of 2 that is  x . . x      token 2 sees 1 and 2
                                                    x x . .      token 3 sees 2 and 3
        """
        key = T, L, window, q.dtype
        if key not in self.biases:
            token = torch.arange(L, device=q.device)
            back = token[L - T :, None] - token  # how far behind a key is
            self.biases[key] = as_bias((back < 0) | (back >= (window or L))).to(q.dtype)
        return self.biases[key]


LAYOUT: ContextVar[Layout] = ContextVar("layout")
# arguments of the attention interface that change no number here, or that are heeded
HARMLESS = set("dropout is_causal position_ids sliding_window use_cache output_attentions".split())


def shared_prefix_attention(module, q, k, v, attention_mask=None, scaling=None, **extra):
    """transformers' attention interface: q [B, H, L, D], k and v [B, K, L, D] -> [B, L, H, D].

    Raises ValueError if the layer asks for more than causal softmax attention (a mask of its own,
    soft-capped logits, sinks, ...). Attention dropout is not applied: the old and the new policy
    must be the same function.
    """
    asked = {name for name, value in extra.items() if value is not None} - HARMLESS
    if attention_mask is not None or extra.get("is_causal") is False or asked:
        need = ", ".join(sorted(asked)) or "a mask of its own"
        raise unsupported(module, f"needs {need}")
    # Under autocast rotary positions leave q and k in float32: a cache of those would be cast again
    # at every token.
    q, k = q.to(v.dtype), k.to(v.dtype)
    layout, scale = LAYOUT.get(), q.shape[-1] ** -0.5 if scaling is None else scaling
    window = extra.get("sliding_window") or None  # this layer's, None where it sees all
    layer, layout.calls = layout.calls, layout.calls + 1
    layout.windows += window is not None
    if layout.cache is None:
        return row_attention(q, k, v, layout, scale, window), None
    if layer < len(layout.cache.prompt):  # the prompts have been here
        attend = layout.decode or decode_attention
        return attend(q * scale, k, v, layout, layer, window), None
    layout.cache.prompt.append((k.contiguous(), v.contiguous()))
    # padding is right of the prompt, so causal attention inside the prompt needs no mask
    return causal_attention(q, k, v, layout, scale, window).transpose(1, 2), None  # [B, P, H, D]


def decode_attention(q, k, v, layout: Layout, layer: int, window: int | None) -> Tensor:
    """Every sample's newest token attends to the cache: q [B, H, G, D] -> [B, G, H, D]."""
    cache, prompt = layout.cache, layout.cache.prompt[layer]  # k and v, each [B, K, P, D]
    own = [x[:, :, :, -(window or 0) :] for x in cache.write(layer, (k, v))]  # the newest, or all
    bias = prompt_bias(cache, prompt[0].shape[2], window)
    # the rep query heads of one key head become query rows, so no key is ever repeated
    q = q.unflatten(1, (k.shape[1], -1)).transpose(2, 3)  # [B, H, G, D] -> [B, K, G, rep, D]
    out = group_attention(q, prompt, own, None if bias is None else bias[:, None])
    return out.transpose(1, 2).flatten(2, 3)  # [B, K, G, rep, D] -> [B, G, H, D]


def group_attention(q: Tensor, prompt: tuple, own: list[Tensor], bias: Tensor | None) -> Tensor:
    """R query rows of each sample attend to prompt and own tokens: q [B, K, G, R, D] -> the same.

    `bias` is added to the logits [B, K, G, R, P + S], or to the first of them, the prompt's.
    """
    (k_prompt, v_prompt), (k_own, v_own) = prompt, own
    G, P, S = q.shape[2], k_prompt.shape[2], k_own.shape[3]
    to_prompt = q.flatten(2, 3) @ k_prompt.mT  # the group in one product -> [B, K, G*R, P]
    logits = torch.cat([to_prompt.unflatten(2, (G, -1)), q @ k_own.mT], dim=-1)
    if bias is not None:
        logits[..., : bias.shape[-1]] += bias
    prob = logits.softmax(-1, dtype=torch.float32).to(v_own.dtype)
    to_prompt, to_own = prob.split([P, S], dim=-1)
    return (to_prompt.flatten(2, 3) @ v_prompt).unflatten(2, (G, -1)) + to_own @ v_own


def row_attention(q, k, v, layout: Layout, scale: float, window: int | None) -> Tensor:
    """Completions attend to their prompt and themselves: q [1, H, L, D] -> [1, L, H, D].

    One kernel a text, each over its real tokens alone: with all completions of a group filled up
    to the longest and one kernel for them all, the bundled policy's step took 1.6 times as long.
    """
    widths = [n for P, lengths in layout.texts for n in (P, *lengths)]
    parts = zip(*(x.split(widths, dim=2) for x in (q, k, v)), strict=True)  # (q, k, v) of each text
    out = []
    for _, lengths in layout.texts:
        q, *prompt = next(parts)
        out.append(causal_attention(q, *prompt, layout, scale, window))
        for _ in lengths:
            q, *kv = next(parts)
            kv = (torch.cat(pair, dim=2) for pair in zip(prompt, kv, strict=True))  # [.., P + T, D]
            out.append(causal_attention(q, *kv, layout, scale, window))
    return torch.cat(out, dim=2).transpose(1, 2)


def causal_attention(q, k, v, layout: Layout, scale: float, window: int | None) -> Tensor:
    """The last T of L tokens attend to themselves and what came before, by PyTorch's kernels, which
    never store the logits: q [B, H, T, D], k and v [B, K, L, D] -> [B, H, T, D]."""
    rep, T, L = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    if rep > 1 and q.is_cuda:  # some GPU kernels cannot share key heads; without them PyTorch
        k, v = (x.repeat_interleave(rep, dim=1) for x in (k, v))  # would store the logits
        rep = 1
    whole = T == L and (window is None or window >= L)  # needs no mask
    if not whole and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return product_attention(q * scale, k, v, layout.bias(T, L, window, q))
    how = {"is_causal": True} if whole else {"attn_mask": layout.bias(T, L, window, q)}
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=rep > 1, **how)


def product_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same with stored logits, as decoding does it; bias [T, L]. For bf16 on a CPU: there
    PyTorch's kernel takes 13 ms and this 3 (both ways, 120 tokens behind a prompt of 400)."""
    K, T = k.shape[1], q.shape[2]
    q = q.unflatten(1, (K, -1)).flatten(2, 3)  # [B, H, T, D] -> [B, K, rep*T, D]
    prob = ((q @ k.mT).unflatten(2, (-1, T)) + bias).softmax(-1)  # [B, K, rep, T, L]
    return (prob.flatten(2, 3) @ v).unflatten(2, (-1, T)).flatten(1, 2)


NAME = "shared_prefix"  # no mask function goes by this name, so transformers builds no mask
AttentionInterface.register(NAME, shared_prefix_attention)


def forward(model: PreTrainedModel, ids: Tensor, position: Tensor, layout: Layout) -> Tensor:
    """One pass of the model without its head: ids and position [B, L] -> hidden [B, L, C]."""
    layout.calls = layout.windows = 0
    with attending(model, layout):
        out = model.get_decoder()(input_ids=ids, position_ids=position, use_cache=False)
    layers, windows = model.config.num_hidden_layers, windowed(model)
    if layout.calls != layers:
        raise unsupported(model, f"runs this attention in {layout.calls} of its {layers} layers")
    if layout.windows != windows:
        raise unsupported(model, f"hands its window over in {layout.windows} of {windows} layers")
    return out.last_hidden_state


@contextmanager
def attending(model: PreTrainedModel, layout: Layout) -> Iterator[None]:
    """Inside, the model's attention is `shared_prefix_attention`; afterwards its own is back."""
    before, token = model.config._attn_implementation, LAYOUT.set(layout)
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        LAYOUT.reset(token)


def recompute(model: PreTrainedModel) -> None:
    """Forget activations in forward and make them again in backward.

    transformers does so in train() alone, where dropout, the model's or its adapters', makes
    another function of it than the one that sampled: here the model stays in eval().
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(forgetful, model, layer.forward)


def forgetful(model: PreTrainedModel, forward: Callable, *args, **kwargs):
    """A layer's forward that keeps only its input for backward, and runs again there."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    layout = LAYOUT.get()  # backward comes when it is gone, and with it our attention
    how = dict(use_reentrant=False, preserve_rng_state=False)
    how["context_fn"] = lambda: (nullcontext(), attending(model, layout))  # forward's, backward's
    return checkpoint(forward, *args, **how, **kwargs)


def as_bias(unseen: Tensor) -> Tensor:
    """What to add to logits: -inf where a key must not be seen, else 0."""
    return torch.zeros(unseen.shape, device=unseen.device).masked_fill(unseen, -torch.inf)


def check_architecture(model: PreTrainedModel, length: int) -> None:
    """ValueError naming what is not supported, for texts of up to `length` tokens."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    backend = getattr(model, "_supports_attention_backend", False)
    lacking = {
        "an encoder-decoder": config.is_encoder_decoder,
        "several modalities": config.get_text_config() is not config,
        "attention outside transformers' attention interface (ALiBi?)": not backend,
        f"layers of kinds {sorted(kinds)}": kinds - {"full_attention", "sliding_attention"},
        f"rotary positions that change in texts of {length} tokens": rope_limit(config) < length,
        "soft-capped logits": getattr(config, "final_logit_softcapping", None),
    }
    for what, present in lacking.items():
        if present:
            raise unsupported(model, f"has {what}")


def unsupported(part: nn.Module, what: str) -> ValueError:
    """The complaint about a model, or a layer of it."""
    return ValueError(f"{type(part).__name__} {what}, which attention.py does not support.")


def rope_limit(config) -> float:
    """Tokens up to which a token's rotary angles depend on its position alone.

    Beyond it `dynamic` and `longrope` turn the whole text, and its batch, by other angles.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(x for x in rope.values() if isinstance(x, dict))]  # of all layers, or a kind
    moving = [x for x in kinds if x.get("rope_type") in ("dynamic", "longrope")]
    key = "original_max_position_embeddings"
    return min((x.get(key) or config.max_position_embeddings for x in moving), default=math.inf)


# ---- Sliding windows (Mistral, Gemma 3, ...): a token sees the `window` newest, itself included --


def windowed(model: PreTrainedModel) -> int:
    """How many layers have a window."""
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return kinds.count("sliding_attention") if getattr(config, "sliding_window", None) else 0


def prompt_bias(cache: Cache, P: int, window: int | None) -> Tensor | None:
    """The bias on the prompts' keys, with -inf also where the newest token's window has passed."""
    if window is None or window > P + cache.length:
        return cache.bias
    oldest = cache.start + cache.length - window + 1  # [B], the first position it sees
    gone = as_bias(torch.arange(P, device=oldest.device) < oldest[:, None])[:, None, None]
    return gone if cache.bias is None else cache.bias + gone  # [B, 1, 1, P]
