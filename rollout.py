"""Sample completions from a causal language model, and score them again for training.

A group is one prompt and the G completions sampled from it. The usual code copies the prompt G
times and fills all rows up to the longest; here a prompt goes through the model once, followed by
its completions, and scoring fills up nothing. A token of a completion attends to its prompt and to
its own past,

    attention(q) = softmax([q K_prompt^T , q K_own^T]) [V_prompt ; V_own]

and no product joins two siblings, so none sees another. Three forwards, one attention function:

    prefill   [prompt]                        the prompt's keys and values go to the cache, once
    decode    [1 token of each of G samples]  the group's queries meet K_prompt in ONE matrix
                                              product, [G*rep, D] @ [D, P]: read once, not G times
    score     [prompt | G completions | next  all groups in one row without padding; a fused kernel
               prompt | G completions | ...]  for each text, because gradients would else need all
                                              scores kept. It wants K_prompt copied beside each
                                              K_own, which is cheap: the model's work is saved

It enters any transformers model through the attention interface (`attending`): no mask is built,
no transformers cache is used, and the model's own attention is put back afterwards.

Known elsewhere: Hydragen (arXiv 2402.05099) for decoding, nanochat's engine (prefill once, copy),
verl's PrefixGrouper for training. Left out: paged caches, continuous batching, CUDA graphs,
drafting, windows shorter than the text, ALiBi, linear and hybrid attention, encoder-decoders,
several modalities. A model that needs one of those raises ValueError (`check_model`).

Shapes: B prompts (= groups), G samples a prompt, N = B*G, P prompt and T completion length,
V vocabulary, C hidden width, H query heads, K key heads (rep = H / K), D head width, S tokens of
each sample in the cache, L tokens of a row.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

LOGITS = 2**24  # most logits made at a time in scoring: 64 MB in float32


@dataclass
class Rollout:
    """What was sampled. Only `mask` says which tokens were chosen: the pad id may be an end id."""

    prompts: list[list[int]]  # B lists of token ids, not padded
    tokens: Tensor  # long [B, G, T]; any id where the mask is False
    mask: Tensor  # bool [B, G, T]; True up to the end token, the end token included
    logp: Tensor  # float32 [B, G, T]; log-softmax at the sampling temperature, 0 where masked
    length: Tensor  # long [B, G]; tokens chosen
    truncated: Tensor  # bool [B, G]; True where max_new_tokens came before an end token

    def pick(self, groups: list[int]) -> "Rollout":
        """These groups alone."""
        rest = (self.tokens, self.mask, self.logp, self.length, self.truncated)
        return Rollout([self.prompts[b] for b in groups], *(x[groups] for x in rest))


def join(parts: list[Rollout]) -> Rollout:
    """One rollout of the groups of all parts; where a part ends short of the longest T, masked."""
    T = max(part.tokens.shape[2] for part in parts)

    def together(name: str) -> Tensor:  # [B', G, T'] or [B', G] of each part -> [B, G, T] or [B, G]
        found = [getattr(part, name) for part in parts]
        return torch.cat([F.pad(x, (0, T - x.shape[2])) if x.ndim == 3 else x for x in found])

    prompts = [prompt for part in parts for prompt in part.prompts]
    names = ("tokens", "mask", "logp", "length", "truncated")
    return Rollout(prompts, *map(together, names))


# ------------------------------------------------------------------------------------------------
# Attention: one row per group
# ------------------------------------------------------------------------------------------------


@dataclass
class Cache:
    """Keys and values of every layer: a prompt's once per group, and each sample's own."""

    prompt: list[tuple] = field(default_factory=list)  # (k, v) a layer, each [B, K, P, D]
    own: list[tuple] = field(default_factory=list)  # (k, v) a layer, each [B, K, G, room, D]
    step: int = 0  # S: tokens of each sample in `own`

    def write(self, layer: int, new: tuple) -> list[Tensor]:
        """Put one token's keys and values [B, K, G, D] behind the S old: -> [B, K, G, S + 1, D]."""
        S = self.step
        if layer == len(self.own):
            self.own.append(tuple(x[:, :, :, None, :] for x in new))
        if S >= self.own[layer][0].shape[3]:  # out of room: double it
            self.own[layer] = tuple(self._moved(x, max(64, 2 * S)) for x in self.own[layer])
        for buffer, x in zip(self.own[layer], new, strict=True):
            buffer[:, :, :, S] = x  # in place: nothing is concatenated
        return [buffer[:, :, :, : S + 1] for buffer in self.own[layer]]

    def keep(self, groups: Tensor, order: Tensor) -> None:
        """Keep these groups [B'], and of each the samples in `order` [B', G']; forget the rest."""
        self.prompt = [(k[groups], v[groups]) for k, v in self.prompt]
        for layer, pair in enumerate(self.own):
            # the two index tensors meet as [B', G'], in front: -> [B', G', K, S, D]
            live = (x[:, :, :, : self.step][groups[:, None], :, order] for x in pair)
            room = pair[0].shape[3]
            self.own[layer] = tuple(self._moved(x.transpose(1, 2), room) for x in live)

    def _moved(self, x: Tensor, room: int) -> Tensor:
        """Copy the S tokens of x into a fresh buffer with room for more."""
        buffer = x.new_empty(*x.shape[:3], room, x.shape[4])
        buffer[:, :, :, : self.step] = x[:, :, :, : self.step]
        return buffer


@dataclass
class Layout:
    """What the running forward works on, for the attention function to know."""

    # sampling: a cache, and for each prompt its length, which is where its samples begin, [B]
    cache: Cache | None = None
    start: Tensor | None = None
    bias: Tensor | None = None  # -inf on the scores of padding, else 0: [B, 1, 1, P]
    # scoring: for each group in the row the length P of its prompt, and for each of its completions
    # what to add to its scores, 0 or -inf on what comes later: [T, P + T] with its own T
    packed: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    calls: int = 0  # attention calls so far: the layer index, and proof that every layer came by


LAYOUT: ContextVar[Layout] = ContextVar("layout")
# arguments of the attention interface that change no number here (windows: see check_model)
HARMLESS = set("dropout is_causal position_ids sliding_window use_cache output_attentions".split())


def shared_prefix_attention(module, q, k, v, attention_mask=None, scaling=None, **extra):
    """transformers' attention interface: q [B, H, L, D], k and v [B, K, L, D] -> [B, L, H, D].

    Raises ValueError if the layer asks for more than causal softmax attention (a mask of its own,
    soft-capped scores, sinks, ...). Attention dropout is not applied: the old and the new policy
    must be the same function.
    """
    asked = {name for name, value in extra.items() if value is not None} - HARMLESS
    if attention_mask is not None or extra.get("is_causal") is False or asked:
        what = ", ".join(sorted(asked)) or "a mask of its own"
        raise ValueError(f"{type(module).__name__} needs {what}, which rollout.py does not have.")
    layout, scale = LAYOUT.get(), q.shape[-1] ** -0.5 if scaling is None else scaling
    layer, layout.calls = layout.calls, layout.calls + 1
    if layout.cache is None:
        return score_attention(q, k, v, layout.packed, scale), None
    if layer < len(layout.cache.prompt):  # the prompts have been here
        return decode_attention(q * scale, k, v, layout, layer), None
    layout.cache.prompt.append((k.contiguous(), v.contiguous()))
    # padding is right of the prompt, so causal attention inside the prompt needs no mask
    return fused_attention(q, k, v, scale, is_causal=True).transpose(1, 2), None  # [B, P, H, D]


def decode_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, layer: int) -> Tensor:
    """Every sample's newest token attends to the cache: q [B, H, G, D] -> [B, G, H, D]."""
    k_prompt, v_prompt = layout.cache.prompt[layer]  # [B, K, P, D]
    k_own, v_own = layout.cache.write(layer, (k, v))  # [B, K, G, S, D]
    (K, G, S), P = k_own.shape[1:4], k_prompt.shape[2]
    # the rep query heads of one key head become query rows, so no key is ever repeated
    q = q.unflatten(1, (K, -1)).transpose(2, 3)  # [B, H, G, D] -> [B, K, G, rep, D]
    to_prompt = q.flatten(2, 3) @ k_prompt.mT  # the group in one product -> [B, K, G*rep, P]
    if layout.bias is not None:
        to_prompt += layout.bias
    to_own = q @ k_own.mT  # [B, K, G, rep, S]
    score = torch.cat([to_prompt.unflatten(2, (G, -1)), to_own], dim=-1)  # -> [.., rep, P + S]
    prob = score.softmax(-1, dtype=torch.float32).to(v.dtype)
    to_prompt, to_own = prob.split([P, S], dim=-1)
    out = (to_prompt.flatten(2, 3) @ v_prompt).unflatten(2, (G, -1)) + to_own @ v_own
    return out.transpose(1, 2).flatten(2, 3)  # [B, K, G, rep, D] -> [B, G, H, D]


def score_attention(q: Tensor, k: Tensor, v: Tensor, packed: list, scale: float) -> Tensor:
    """Completions attend to their prompt and themselves: q [1, H, L, D] -> [1, L, H, D].

    One kernel a text, each over its real tokens alone: with all completions of a group filled up
    to the longest and one kernel for them all, the bundled policy's update took 1.6 times as long.
    """
    widths = [n for P, own in packed for n in (P, *(len(bias) for bias in own))]
    texts = zip(*(x.split(widths, dim=2) for x in (q, k, v)), strict=True)  # (q, k, v) of each
    out = []
    for _, own in packed:
        q, *prompt = next(texts)
        out.append(fused_attention(q, *prompt, scale, is_causal=True))
        for bias in own:
            q, *kv = next(texts)
            kv = (torch.cat(pair, dim=2) for pair in zip(prompt, kv, strict=True))  # [.., P + T, D]
            out.append(fused_attention(q, *kv, scale, attn_mask=bias.to(q.dtype)))
    return torch.cat(out, dim=2).transpose(1, 2)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, **how) -> Tensor:
    """PyTorch's kernels, which never store the scores: q [B, H, L, D] -> [B, H, L, D]."""
    rep = q.shape[1] // k.shape[1]
    if rep > 1 and q.is_cuda:  # some GPU kernels cannot share key heads; without them PyTorch
        k, v = (x.repeat_interleave(rep, dim=1) for x in (k, v))  # would store the scores
        rep = 1
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=rep > 1, **how)


NAME = "shared_prefix"  # no mask function goes by this name, so transformers builds no mask
AttentionInterface.register(NAME, shared_prefix_attention)


@contextmanager
def attending(model: PreTrainedModel, layout: Layout) -> Iterator[None]:
    """Inside, the model's attention is `shared_prefix_attention`; afterwards its own is back."""
    own, token = model.config._attn_implementation, LAYOUT.set(layout)
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = own
        LAYOUT.reset(token)


@contextmanager
def replaying(model: PreTrainedModel, layout: Layout) -> Iterator[None]:
    """Make gradient checkpointing replay each layer under `attending`.

    The replay runs in backward, when this forward is long over: left alone it would take the
    model's own attention, and the gradient would silently be another one.
    """

    def replay(checkpointing, layer, *args):
        return checkpointing(attending(model, layout)(layer), *args)

    modules = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    kept = [m._gradient_checkpointing_func for m in modules]
    try:
        for m, own in zip(modules, kept, strict=True):
            m._gradient_checkpointing_func = partial(replay, own)
        yield
    finally:
        for m, own in zip(modules, kept, strict=True):
            m._gradient_checkpointing_func = own


def forward(model: PreTrainedModel, ids: Tensor, position: Tensor, layout: Layout) -> Tensor:
    """One pass of the model without its head: ids and position [B, L] -> hidden [B, L, C]."""
    layout.calls = 0
    with attending(model, layout):
        out = model.get_decoder()(input_ids=ids, position_ids=position, use_cache=False)
    if layout.calls != model.config.num_hidden_layers:
        raise ValueError(
            f"{type(model).__name__} ran this attention in {layout.calls} of its "
            f"{model.config.num_hidden_layers} layers: all must be softmax attention."
        )
    return out.last_hidden_state


def head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The language model head: [.., C] -> logits [.., V]."""
    return model.get_output_embeddings()(hidden)


# ------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    eos_ids: Iterable[int],
    pad_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Sample group_size completions of every prompt, in eval(); every module's mode comes back.

    temperature 0 is greedy (its logp is at temperature 1). `logp` is the log-softmax over the whole
    vocabulary even where top_p < 1 cuts the draw, so only top_p = 1 may be trained on. A seeded
    generator gives the same rollout again.
    """
    check_request(model, prompts, group_size, max_new_tokens, (temperature, top_p))
    check_model(model, max(map(len, prompts)) + max_new_tokens)
    device, B, G, T = model.device, len(prompts), group_size, max_new_tokens
    eos = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    home = generator.device if generator else device
    uniform = torch.rand(T, B * G, generator=generator, device=home).to(device)  # [T, N]
    tokens = torch.full((B * G, T), pad_id, device=device)  # [N, T]
    logp = torch.zeros(B * G, T, device=device)
    length = torch.zeros(B * G, dtype=torch.long, device=device)  # [N]
    row = torch.arange(B * G, device=device).view(B, G)  # of `tokens`, for each running sample
    live = torch.ones_like(row, dtype=torch.bool)  # [B, G]: no end token yet
    with evaluating(model):
        hidden, layout = prefill(model, prompts, G)  # [B, G, C]
        for step in range(T):
            token, chosen = draw(head(model, hidden), uniform[step][row], temperature, top_p)
            tokens[row, step], logp[row, step] = token, chosen  # past the end too: masked below
            length[row] += live
            live = live & ~torch.isin(token, eos)
            if step % sync_every(device) == 0:
                row, live, token = trim(layout, row, live, token)  # [B, G] -> [B', G']
            if step + 1 == T or not row.numel():
                break
            hidden = decode(model, token, layout)  # [B', G', C]
    mask = torch.arange(int(length.max()), device=device) < length[:, None]  # [N, longest]
    tokens = tokens[:, : mask.shape[1]].where(mask, pad_id)
    truncated = ~torch.isin(tokens.gather(1, length[:, None] - 1), eos)  # no end token at the end
    out = tokens, mask, logp[:, : mask.shape[1]].where(mask, 0.0), length, truncated[:, 0]
    return Rollout(prompts, *(x.unflatten(0, (B, G)) for x in out))  # [N, ..] -> [B, G, ..]


def prefill(model: PreTrainedModel, prompts: list[list[int]], G: int) -> tuple[Tensor, Layout]:
    """Run every prompt once: -> its last token's hidden state for each sample [B, G, C]."""
    ids, start, padding = padded(prompts, model.device)
    bias = as_bias(padding)[:, None, None] if padding.any() else None  # [B, 1, 1, P]
    layout = Layout(cache=Cache(), start=start, bias=bias)
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    hidden = forward(model, ids, position, layout)  # [B, P] -> [B, P, C]
    last = hidden[torch.arange(len(prompts), device=ids.device), start - 1]  # [B, C]
    return last[:, None].expand(-1, G, -1), layout


def decode(model: PreTrainedModel, token: Tensor, layout: Layout) -> Tensor:
    """Run every sample's newest token: [B, G] -> hidden [B, G, C]."""
    position = (layout.start + layout.cache.step)[:, None].expand_as(token)  # [B] -> [B, G]
    hidden = forward(model, token, position, layout)
    layout.cache.step += 1
    return hidden


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple:
    """logits [B, G, V], a uniform number in [0, 1) per row [B, G] -> token and its logp [B, G].

    Inverse distribution: the token is where the cumulative sum first exceeds uniform * total, e.g.
    p = [.2, .5, .3] and uniform .6 give token 1, since .2 <= .6 < .7.
    """
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    token = best = logp.argmax(-1, keepdim=True)  # [B, G, 1]
    if temperature > 0:
        prob = nucleus(logp.exp(), top_p) if top_p < 1 else logp.exp()
        total = prob.cumsum(-1)
        token = torch.searchsorted(total, uniform[..., None] * total[..., -1:], right=True)
        token = token.clamp(max=prob.shape[-1] - 1)
        # a GPU's parallel sum may round onto an impossible token: take the likeliest instead
        token = token.where(prob.gather(-1, token) > 0, best)
    return token[..., 0], logp.gather(-1, token)[..., 0]


def nucleus(prob: Tensor, top_p: float) -> Tensor:
    """Keep the fewest likeliest tokens that reach top_p together, zero the others: [.., V]."""
    ranked, order = prob.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked  # mass of the likelier tokens: 0 for the first, kept always
    return torch.zeros_like(prob).scatter(-1, order, ranked.where(before < top_p, 0.0))


def sync_every(device: torch.device) -> int:
    """Steps between two looks at who has finished: on a GPU each look makes the host wait."""
    return 16 if device.type == "cuda" else 1


def trim(layout: Layout, row: Tensor, live: Tensor, token: Tensor) -> tuple:
    """Stop computing finished samples: [B, G] -> [B', G'], in each group the live ones first.

    B' groups have a live sample and G' is the most live in any. Where that saves less than an
    eighth of the rows nothing moves: copying the cache would cost more.
    """
    groups, G = live.any(1).nonzero()[:, 0], int(live.sum(1).max())  # [B']
    if len(groups) * G > 0.875 * live.numel():
        return row, live, token
    order = live[groups].int().argsort(dim=1, descending=True, stable=True)[:, :G]  # [B', G']
    layout.cache.keep(groups, order)
    layout.start = layout.start[groups]
    layout.bias = None if layout.bias is None else layout.bias[groups]
    return tuple(x[groups].gather(1, order) for x in (row, live, token))


# ------------------------------------------------------------------------------------------------
# Scoring
# ------------------------------------------------------------------------------------------------


def token_logp(
    model: PreTrainedModel, rollout: Rollout, groups: list[int], *, temperature: float = 1.0
) -> Tensor:
    """Log-probability of every sampled token of these groups, differentiable: -> [b, G, T].

    log softmax(logits / temperature), 0 where the mask is False. The model runs in the mode the
    caller set: keep dropout at 0, or the model in eval(), for this to equal `rollout.logp`.
    """
    longest = max(len(rollout.prompts[b]) for b in groups)
    check_model(model, longest + rollout.tokens.shape[2])
    return score(model, rollout, groups, temperature or 1.0)


def score(
    model: PreTrainedModel, rollout: Rollout, groups: list[int], temperature: float
) -> Tensor:
    """token_logp without the checks: one packed forward, then the head at sampled tokens only."""
    device, mask = model.device, rollout.mask[groups].to(model.device)  # [b, G, T]
    length = mask.sum(-1).tolist()  # [b][G]
    token = rollout.tokens[groups].to(device)[mask]  # [M], one sample behind the other
    said = token.split([sum(lengths) for lengths in length])  # of each group
    ids, position, before, packed = [], [], [], []  # of the row; `before` for the M sampled tokens
    for b, lengths, tokens in zip(groups, length, said, strict=True):
        P, own = len(rollout.prompts[b]), []
        ids += [torch.tensor(rollout.prompts[b], device=device), tokens]
        position += range(P)
        last = len(position) - 1  # the prompt's last token predicts every completion's first
        for T in filter(None, lengths):
            before += [last, *range(len(position), len(position) + T - 1)]
            position += range(P, P + T)  # each completion restarts behind the prompt
            later = torch.ones(T, P + T, dtype=torch.bool, device=device).triu(P + 1)
            own.append(as_bias(later))
        packed.append((P, own))
    layout = Layout(packed=packed)
    row, position = torch.cat(ids)[None], torch.tensor([position], device=device)  # [1, L]
    with replaying(model, layout):
        hidden = forward(model, row, position, layout)  # [1, L, C]
    logp = head_logp(model, hidden[0, before], token, temperature)  # [M]
    return torch.zeros(mask.shape, device=device).masked_scatter(mask, logp)  # -> [b, G, T]


def head_logp(model: PreTrainedModel, hidden: Tensor, token: Tensor, temperature: float) -> Tensor:
    """hidden [M, C], token [M] -> log-probability [M] in float32.

    The logits [M, V] are the largest tensor of all, so many of them are made in parts, which are
    thrown away and made again in backward.
    """

    def part(hidden: Tensor, token: Tensor) -> Tensor:
        logits = head(model, hidden).float() / temperature
        return -F.cross_entropy(logits, token, reduction="none")  # NLL = -logp, so we negate

    rows = max(1, LOGITS // model.config.vocab_size)
    if len(token) <= rows:
        return part(hidden, token)
    pairs = zip(hidden.split(rows), token.split(rows), strict=True)
    return torch.cat([checkpoint(part, h, t, use_reentrant=False) for h, t in pairs])


# ------------------------------------------------------------------------------------------------
# Small parts, and the checks
# ------------------------------------------------------------------------------------------------


def padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """-> ids [B, P] filled up on the right with id 0, lengths [B], padding bool [B, P]."""
    P = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (P - len(p)) for p in prompts], device=device)
    length = torch.tensor([len(p) for p in prompts], device=device)
    return ids, length, torch.arange(P, device=device) >= length[:, None]


def as_bias(unseen: Tensor) -> Tensor:
    """What to add to scores: -inf where a key must not be seen, else 0."""
    return torch.zeros(unseen.shape, device=unseen.device).masked_fill(unseen, -torch.inf)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """eval() inside, and every module back in its own mode afterwards."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def check_request(model, prompts, group_size: int, max_new_tokens: int, how: tuple) -> None:
    """Raise ValueError with one sentence that says what to change."""
    temperature, top_p = how
    if not prompts or not all(prompts):
        raise ValueError("Give at least one prompt, and in each at least one token id.")
    if group_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"Raise group_size {group_size}, max_new_tokens {max_new_tokens} to 1 or more."
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: give a number above 0 and at most 1 (all tokens).")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: give 0 for greedy or a positive number.")
    longest, room = max(map(len, prompts)), getattr(model.config, "max_position_embeddings", None)
    if room and longest + max_new_tokens > room:
        raise ValueError(
            f"A prompt of {longest} and {max_new_tokens} new tokens exceed the model's {room} "
            "positions: shorten the prompt or lower max_new_tokens."
        )


CHECKED: weakref.WeakSet = weakref.WeakSet()  # models that passed `check_numbers`


def check_model(model: PreTrainedModel, length: int) -> None:
    """Raise ValueError naming what is not supported, for texts of up to `length` tokens."""
    config = model.config
    window = getattr(config, "sliding_window", None) or length
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    backend = getattr(model, "_supports_attention_backend", False)
    lacking = {
        "an encoder-decoder": config.is_encoder_decoder,
        "several modalities": config.get_text_config() is not config,
        "attention outside transformers' attention interface (ALiBi?)": not backend,
        f"a window of {window} for a text of {length}": window < length
        and "sliding_attention" in kinds,
        f"layers of kinds {sorted(kinds)}": kinds - {"full_attention", "sliding_attention"},
        f"{rope} rotary positions": rope in ("dynamic", "longrope"),  # depend on batch neighbours
        "soft-capped logits": getattr(config, "final_logit_softcapping", None),
    }
    for what, wanted in lacking.items():
        if wanted:
            raise ValueError(
                f"{type(model).__name__} has {what}, which rollout.py does not support."
            )
    if model not in CHECKED:
        check_numbers(model)
        CHECKED.add(model)


@torch.no_grad()
def check_numbers(model: PreTrainedModel) -> None:
    """Once per model: its own plain forward must give the log-probabilities of the packed one."""
    device, V = model.device, model.config.vocab_size
    prompts = [[i * 7 % V for i in range(1, n)] for n in (4, 9)]
    tokens = torch.arange(3, 15, device=device).view(2, 2, 3) * 11 % V  # [B, G, T] = [2, 2, 3]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    rollout = Rollout(prompts, tokens, mask, tokens.float(), mask.sum(-1), mask[..., 0])
    plain = torch.zeros(tokens.shape, device=device)
    with evaluating(model), torch.autocast(device.type, enabled=False):
        packed = score(model, rollout, [0, 1], 1.0)
        for b, g in ((0, 0), (0, 1), (1, 0), (1, 1)):
            ids = torch.cat([torch.tensor(prompts[b], device=device), tokens[b, g]])[None]  # [1, L]
            logp = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)  # [L, V]
            plain[b, g] = logp[-4:-1].gather(-1, tokens[b, g][:, None])[:, 0]
    error = (packed - plain).abs().mean().item()
    exact = {p.dtype for p in model.parameters()} <= {torch.float32, torch.float64}
    if not error < (5e-3 if exact else 0.25):  # `not <`: a NaN is refused as well
        raise ValueError(
            f"{type(model).__name__} gives other log-probabilities here (off by {error:.1e}): its "
            "layers do more than causal softmax attention, which rollout.py does not support."
        )
