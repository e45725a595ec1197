"""Sample completions from a causal language model, and find their log-probabilities for training.

    sample      B prompts -> a Rollout: G completions of each, token by token, with a KV cache
    token_logp  a Rollout -> the log-probability of every sampled token, with gradients
    packs       which groups go through the model together

A group is one prompt and its G completions. The prompt goes through the model once, in sampling and
in training, and its keys and values are shared by the group; `attention.py` has how. Not here:
continuous batching, CUDA graphs. Drafts are in `drafts.py`; a `Tail` is what they get.

Shapes: B prompts (= groups), G samples a prompt, N = B*G, P prompt and T completion length,
V vocabulary, C hidden width, L tokens of a row of several groups, one behind the other.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from attention import Cache, Layout, as_bias, check_architecture, forward, unsupported

LOGITS = 2**24  # most logits made at a time in training: 64 MB in float32


@dataclass
class Rollout:
    """What was sampled. Only `mask` says which tokens were chosen: the pad id may be an end id."""

    prompts: list[list[int]]  # B lists of token ids, not padded
    tokens: Tensor  # long [B, G, T]; any id where the mask is False
    mask: Tensor  # bool [B, G, T]; True up to the end token, the end token included
    logp: Tensor  # float32 [B, G, T]; log-softmax at the sampling temperature, 0 where masked
    length: Tensor  # long [B, G]; tokens chosen
    truncated: Tensor  # bool [B, G]; True where max_new_tokens came before an end token
    forwards: Tensor  # long [B, G]; passes of the model that it took: `length`, or less by drafts

    def pick(self, groups: list[int]) -> "Rollout":
        """These groups alone."""
        prompts, *tensors = vars(self).values()
        return Rollout([prompts[b] for b in groups], *(x[groups] for x in tensors))


@dataclass
class Tail:
    """A rollout whose last rows still run, for `finish` to go on with: N = B*G rows."""

    prompts: list[list[int]]  # B
    row: Tensor  # long [B', G']; which row of the N each sample in the cache is
    running: Tensor  # bool [B', G']; it has no end token yet
    tokens: Tensor  # long [N, T]
    logp: Tensor  # float32 [N, T]
    length: Tensor  # long [N]; tokens drawn. The newest one is not in the cache yet
    uniform: Tensor  # [T, N]; the numbers to draw with
    eos: Tensor  # long [E]


# ---- Sampling ------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompts: list[list[int]], *, group_size: int, max_new_tokens: int,
    eos_ids: Iterable[int], pad_id: int, temperature: float = 1.0, top_p: float = 1.0,
    generator: torch.Generator | None = None, uniform: Tensor | None = None,
    finish: Callable | None = None, few: int = 8,
) -> Rollout:  # fmt: skip
    """Sample group_size completions of every prompt, in eval(); every module's mode comes back.

    temperature 0 is greedy (its logp is at temperature 1). `logp` is the log-softmax over the whole
    vocabulary even where top_p < 1 cuts the draw, so only top_p = 1 may be trained on. A seeded
    generator, or the same `uniform` numbers in its place, give the same rollout again. `finish`
    (drafts.finish, the same tokens sooner) takes over when no more than `few` rows run.
    """
    check_request(model, prompts, group_size, max_new_tokens, temperature, top_p)
    device, B, G, T = model.device, len(prompts), group_size, max_new_tokens
    uniform = numbers(T, B, G, generator, device) if uniform is None else uniform  # [T, B, G]
    uniform = uniform.flatten(1).to(device)  # [T, N]
    eos = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    row = torch.arange(B * G, device=device).view(B, G)  # of `tokens`, for each running sample
    tokens, length = row.new_zeros(B * G, T), row.new_zeros(B * G)  # [N, T], [N]
    logp = torch.zeros(tokens.shape, device=device)
    forwards = length  # one tensor: a pass of the model for each token, unless `finish` counts
    running = torch.ones_like(row, dtype=torch.bool)  # [B, G]: no end token yet
    pick = partial(draw, temperature=temperature, top_p=top_p)
    with evaluating(model):
        hidden, layout = prefill(model, prompts, G)  # [B, G, C]
        for t in range(T):
            token, chosen = pick(head(model, hidden), uniform[t][row])
            tokens[row, t], logp[row, t] = token, chosen  # past the end too: masked below
            length[row] += running
            running = running & ~torch.isin(token, eos)
            if t % sync_every(device) == 0:
                row, running, token = trim(layout.cache, row, running, token)  # [B, G] -> [B', G']
                if finish and int(running.sum()) <= few:
                    tail = Tail(prompts, row, running, tokens, logp, length, uniform, eos)
                    forwards = finish(model, layout, tail, pick)  # [N]
                    break
            if t + 1 == T or not row.numel():
                break
            hidden = decode(model, token, layout)  # [B', G', C]
    return closed(prompts, tokens, logp, length, forwards, ends=eos, pad_id=pad_id)


def closed(prompts, tokens, logp, length, forwards, *, ends: Tensor, pad_id: int) -> Rollout:
    """The rollout of N = B*G rows: tokens and logp [N, T], length and forwards [N]."""
    mask = torch.arange(int(length.max()), device=length.device) < length[:, None]  # [N, longest]
    tokens = tokens[:, : mask.shape[1]].where(mask, pad_id)
    truncated = ~torch.isin(tokens.gather(1, length[:, None] - 1), ends)  # no end token at the end
    logp = logp[:, : mask.shape[1]].where(mask, 0.0)
    rows = tokens, mask, logp, length, truncated[:, 0], forwards
    return Rollout(prompts, *(x.unflatten(0, (len(prompts), -1)) for x in rows))  # -> [B, G, ..]


def numbers(T: int, B: int, G: int, generator: torch.Generator | None, device="cpu") -> Tensor:
    """The uniform random numbers of a rollout, [T, B, G], drawn where the generator lives."""
    device = generator.device if generator else device
    return torch.rand(T, B, G, generator=generator, device=device)


def prefill(model: PreTrainedModel, prompts: list[list[int]], G: int) -> tuple[Tensor, Layout]:
    """Run every prompt once: -> its last token's hidden state for each sample [B, G, C]."""
    texts, device = [torch.tensor(prompt) for prompt in prompts], model.device
    ids = pad_sequence(texts, batch_first=True).to(device)  # [B, P], filled up with id 0
    start = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [B]
    position = torch.arange(ids.shape[1], device=device).expand_as(ids)
    padding = position >= start[:, None]  # [B, P]
    bias = as_bias(padding)[:, None, None] if padding.any() else None  # [B, 1, 1, P]
    layout = Layout(Cache(start, bias))
    hidden = forward(model, ids, position, layout)  # [B, P] -> [B, P, C]
    last = hidden[torch.arange(len(prompts), device=device), start - 1]  # [B, C]
    return last[:, None].expand(-1, G, -1), layout


def decode(model: PreTrainedModel, token: Tensor, layout: Layout) -> Tensor:
    """Run every sample's newest token: [B, G] -> hidden [B, G, C]."""
    cache = layout.cache
    position = (cache.start + cache.length)[:, None].expand_as(token)  # [B] -> [B, G]
    hidden = forward(model, token, position, layout)
    cache.length += 1
    return hidden


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple:
    """logits [B, G, V], a uniform number in [0, 1) per row [B, G] -> token and its logp [B, G].

    Inverse distribution: the token is where the cumulative sum first exceeds uniform * total, e.g.
    p = [.2, .5, .3] and uniform .6 give token 1, since .2 <= .6 < .7.
    """
    logits = logits.float() if temperature in (0, 1) else logits.float() / temperature
    logp = logits.log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1, keepdim=True)  # [B, G, 1]
    else:
        prob = nucleus(logp.exp(), top_p) if top_p < 1 else logp.exp()
        total = prob.cumsum(-1)
        token = torch.searchsorted(total, uniform[..., None] * total[..., -1:], right=True)
        token = token.clamp(max=prob.shape[-1] - 1)  # [B, G, 1]
        impossible = ~(prob.gather(-1, token) > 0)  # sums are rounded: then take the likeliest
        if impossible.is_cuda or impossible.any():  # to look makes a GPU wait, and a CPU saves time
            token = token.where(~impossible, prob.argmax(-1, keepdim=True))
    return token[..., 0], logp.gather(-1, token)[..., 0]


def nucleus(prob: Tensor, top_p: float) -> Tensor:
    """Keep the fewest likeliest tokens that reach top_p together, zero the others: [.., V].

    Tokens below (1 - top_p) / V do not reach 1 - top_p together, so those above half of it (sums
    are rounded) are ranked alone: to sort 152,000 takes longer than the model does.
    """
    flat = prob.flatten(0, -2)  # [N, V]
    row, token = (flat >= (1 - top_p) / flat.shape[1] / 2).nonzero(as_tuple=True)  # [M]
    count = row.bincount(minlength=len(flat))
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    likely = flat.new_zeros(len(flat), int(count.max()))
    likely[row, place] = flat[row, token]
    ranked, order = likely.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked  # mass of the likelier tokens: 0 for the first, kept always
    kept = torch.zeros_like(likely).scatter(-1, order, ranked.where(before < top_p, 0.0))
    return torch.zeros_like(flat).index_put((row, token), kept[row, place]).view_as(prob)


def sync_every(device: torch.device) -> int:
    """Steps between two looks at who has finished: on a GPU each look makes the host wait."""
    return 16 if device.type == "cuda" else 1


def trim(cache: Cache, row: Tensor, running: Tensor, token: Tensor) -> tuple:
    """Stop computing finished samples: [B, G] -> [B', G'], in each group the running ones first.

    B' groups have a running sample and G' is the most running in any. Where that saves less than an
    eighth of the rows nothing moves: copying the cache would cost more.
    """
    groups, G = running.any(1).nonzero()[:, 0], int(running.sum(1).max())  # [B']
    if len(groups) * G > 0.875 * running.numel():
        return row, running, token
    order = running[groups].int().argsort(dim=1, descending=True, stable=True)[:, :G]  # [B', G']
    cache.keep(groups, order)
    return tuple(x[groups].gather(1, order) for x in (row, running, token))


# ---- Log-probabilities, for training -------------------------------------------------------------


def token_logp(
    model: PreTrainedModel, rollout: Rollout, groups: list[int], *, temperature: float = 1.0
) -> Tensor:
    """Log-probability of every sampled token of these groups, differentiable: -> [b, G, T].

    log softmax(logits / temperature), 0 where the mask is False. The model runs in the mode the
    caller set: keep dropout at 0, or the model in eval(), for this to equal `rollout.logp`.
    """
    if model.training and model.is_gradient_checkpointing:  # its backward is another attention's
        raise ValueError("Take attention.recompute(model), not gradient checkpointing of its own.")
    longest = max(len(rollout.prompts[b]) for b in groups)
    check_model(model, longest + rollout.tokens.shape[2])
    return row_logp(model, rollout, groups, temperature or 1.0)


def row_logp(model, rollout: Rollout, groups: list[int], temperature: float) -> Tensor:
    """token_logp without the checks: all texts in one row, the head at sampled tokens only."""
    device, mask = model.device, rollout.mask[groups].to(model.device)  # [b, G, T]
    token = rollout.tokens[groups].to(device)[mask]  # [M], one sample behind the other
    texts = [(len(rollout.prompts[b]), rollout.length[b].tolist()) for b in groups]
    ids, position, before = [], [], []  # of the row; `before` for the M sampled tokens
    for b, (P, lengths) in zip(groups, texts, strict=True):
        ids += [torch.tensor(rollout.prompts[b]), rollout.tokens[b][rollout.mask[b]]]
        position += range(P)
        last = len(position) - 1  # the prompt's last token predicts every completion's first
        for T in lengths:
            before += [last, *range(len(position), len(position) + T - 1)]
            position += range(P, P + T)  # each completion restarts behind the prompt
    row = torch.cat([x.to(device) for x in ids])[None]  # [1, L]
    position = torch.tensor([position], device=device)
    hidden = forward(model, row, position, Layout(texts=texts))  # [1, L, C]
    logp = head_logp(model, hidden[0, before], token, temperature)  # [M]
    return torch.zeros(mask.shape, device=device).masked_scatter(mask, logp)  # -> [b, G, T]


def packs(rollout: Rollout, budget: int, groups: Iterable[int] | None = None) -> list[list[int]]:
    """These groups (all) in order, each pack of at most `budget` tokens, or of one larger group.

    A group's tokens are its prompt's, once, and its completions'.
    """
    size = rollout.length.sum(1).tolist()  # [B]
    filled, room = [], 0
    for b in range(len(size)) if groups is None else groups:
        tokens = len(rollout.prompts[b]) + size[b]
        if tokens > room:
            filled.append([])
            room = budget
        filled[-1].append(b)
        room -= tokens
    return filled


def head_logp(model: PreTrainedModel, hidden: Tensor, token: Tensor, temperature: float) -> Tensor:
    """hidden [M, C], token [M] -> log-probability [M] in float32.

    The logits [M, V] are the largest tensor of all, so many of them are made in parts, which are
    thrown away and made again in backward.
    """

    def part(hidden: Tensor, token: Tensor) -> Tensor:
        logits = head(model, hidden).float()
        logits = logits if temperature == 1 else logits / temperature
        return -F.cross_entropy(logits, token, reduction="none")  # NLL = -logp, so we negate

    rows = max(1, LOGITS // model.config.vocab_size)
    if len(token) <= rows:
        return part(hidden, token)
    pairs = zip(hidden.split(rows), token.split(rows), strict=True)
    return torch.cat([checkpoint(part, h, t, use_reentrant=False) for h, t in pairs])


# ---- Small parts, and the checks -----------------------------------------------------------------


def written(prompts: list[list[int]], completions: list, pad_id: int, device) -> Rollout:
    """A rollout of given completions, [b][g] a list of ids, that no policy sampled: logp is 0."""
    rows = [torch.tensor(ids) for group in completions for ids in group]  # N
    tokens = pad_sequence(rows, batch_first=True).to(device)  # [N, T]
    length = torch.tensor([len(ids) for ids in rows], device=device)
    logp = torch.zeros(tokens.shape, device=device)
    # as if each token had its forward, and any of them could end a row
    return closed(prompts, tokens, logp, length, length, ends=tokens, pad_id=pad_id)


def join(rollouts: list[Rollout]) -> Rollout:
    """One rollout of the groups of all; where one ends short of the longest T, it is masked."""
    T = max(rollout.tokens.shape[2] for rollout in rollouts)
    prompts, *fields = zip(*(vars(rollout).values() for rollout in rollouts), strict=True)
    # [B', G, T'] or [B', G] of each -> [B, G, T] or [B, G]
    wide = ([F.pad(x, (0, T - x.shape[2])) if x.ndim == 3 else x for x in xs] for xs in fields)
    return Rollout(sum(prompts, []), *map(torch.cat, wide))


def head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The language model head: [.., C] -> logits [.., V]."""
    return model.get_output_embeddings()(hidden)


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


def check_request(model, prompts, group_size, max_new_tokens, temperature, top_p) -> None:
    """Raise ValueError with one sentence that says what to change."""
    if not prompts or not all(prompts):
        raise ValueError("Give at least one prompt, and in each at least one token id.")
    if group_size < 1 or max_new_tokens < 1:
        raise ValueError("Give a group_size and a max_new_tokens of 1 or more.")
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
    check_model(model, longest + max_new_tokens)


CHECKED: weakref.WeakSet = weakref.WeakSet()  # models that passed `check_numbers`


def check_model(model: PreTrainedModel, length: int) -> None:
    """Raise ValueError unless this model can be sampled and trained here up to `length` tokens."""
    check_architecture(model, length)
    if model not in CHECKED:
        check_numbers(model)
        CHECKED.add(model)


@torch.no_grad()
def check_numbers(model: PreTrainedModel) -> None:
    """Once per model: its own forward, text by text, must give what `row_logp` gives."""
    device, V = model.device, model.config.vocab_size
    prompts = [[i * 7 % V for i in range(1, n)] for n in (4, 9)]
    tokens = (torch.arange(3, 15).view(2, 2, 3) * 11 % V).tolist()  # [B][G][T] = [2][2][3]
    rollout = written(prompts, tokens, pad_id=0, device=device)
    with evaluating(model), torch.autocast(device.type, enabled=False):
        error = row_logp(model, rollout, [0, 1], 1.0)  # [2, 2, 3]
        for b, g in ((0, 0), (0, 1), (1, 0), (1, 1)):
            ids = torch.tensor([prompts[b] + tokens[b][g]], device=device)  # [1, L]
            logits = model(input_ids=ids, use_cache=False).logits[0, -4:-1].float()  # [3, V]
            error[b, g] += F.cross_entropy(logits, ids[0, -3:], reduction="none")  # NLL = -logp
    error = error.abs().mean().item()
    exact = {p.dtype for p in model.parameters()} <= {torch.float32, torch.float64}
    if not error < (5e-3 if exact else 0.25):  # `not <`: a NaN is refused as well
        does = f"does more than causal softmax attention (log-probabilities differ by {error:.1e})"
        raise unsupported(model, does)
