"""Draft the next tokens from the prompt and let the policy check them: the same answer, sooner.

    rollout = sample(model, prompts, ..., finish=drafts.finish)

A migration repeats its prompt. So look up a row's newest tokens in note and old code, in the row
itself and in its siblings: what followed there is the draft. The newest token and the draft go
through the model in ONE forward, which costs little more than one token's while rows are few. Each
position is then drawn as ever, from the policy's own distribution with the uniform number that this
row has for this position, and the draws are kept up to the first that differs from the draft:

    draft   x   =   foo   (   x   )
    drawn   x   =   bar   (   x   )   \\n        kept: x = bar

What is kept saw the same tokens before it as without a draft, and so is the same, at any
temperature. A reader may skip this file: without it all is the same, but slower.

Not here: a draft model, trees of drafts, drafts while many rows of a large model run.
Shapes: B groups, G samples and P prompt length in the cache; R rows that run, each at a place b, g
of it; M tokens of a forward, n at most of a row; T most tokens of an answer; S as many of them as
are looked at; H query heads, K key heads (rep = H / K), D head width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from os.path import commonprefix  # of lists too

import torch
from torch import Tensor
from transformers import PreTrainedModel

import packed
from attention import Cache, Layout, as_bias, forward, group_attention
from rollout import Tail, head, trim

MATCH = 5, 3, 2  # tokens that are looked up, the longest match first
LONGEST = 16  # tokens of a draft


def pace(model: PreTrainedModel) -> dict:
    """`finish` and `few` for `sample`, as they pay on a CPU for a model of this size.

    Beyond 32 tokens of a forward each more takes longer than it saves; beyond 384 in a small model.
    """
    tokens, few = (384, 64) if packed.small(model) else (32, 8)
    return {"finish": partial(finish, tokens=tokens), "few": few}


@torch.no_grad()
def finish(
    model: PreTrainedModel, layout: Layout, tail: Tail, pick: Callable, tokens: int = 32
) -> Tensor:
    """Go on with the running rows to their end, in `tail` -> the forwards of all rows, [N].

    A forward takes at most so many tokens, or one of each row.
    `pick` draws: logits [1, M, V] and uniform numbers [1, M] -> tokens and their logp, [1, M].
    """
    forwards, ends, T = tail.length.clone(), set(tail.eos.tolist()), tail.tokens.shape[1]
    widen(layout.cache, tail.row.shape[1], T)
    rows = all_rows = begin(tail)
    while rows := [row for row in rows if row.length < T and row.text[-1] not in ends]:
        shrink(layout.cache, tail, rows)
        for row in rows:
            row.look_up(min(tokens // len(rows), T - row.length) - 1)
        for row, drawn, logp in zip(rows, *check(model, layout, tail, pick, rows), strict=True):
            old = row.length
            row.take(drawn.tolist(), ends)
            tail.logp[row.number, old : row.length] = logp[: row.length - old]
            forwards[row.number] += 1
    for row in all_rows:
        said = torch.tensor(row.text[row.begin :], device=forwards.device)
        tail.tokens[row.number, : row.length], tail.length[row.number] = said, row.length
    return forwards


def check(
    model: PreTrainedModel, layout: Layout, tail: Tail, pick: Callable, rows: list["Row"]
) -> list[tuple[Tensor, ...]]:
    """Run each row's newest token and its draft, and draw behind each: -> tokens and logp, of each
    row [n]."""
    table = [
        (token, row.number, *row.place, j, row.length - 1 + j)
        for row in rows
        for j, token in enumerate([row.text[-1], *row.draft])
    ]
    sizes = [1 + len(row.draft) for row in rows]
    S = max(row.length + len(row.draft) for row in rows)
    ids, number, b, g, j, at = torch.tensor(table, device=tail.tokens.device).T  # [M] each
    start, shape = layout.cache.start, (*tail.row.shape, max(sizes))
    layout.decode = Step((b, g, j), at, shape, S, start).attention
    hidden = forward(model, ids[None], (start[b] + at)[None], layout)  # [1, M, C]
    drawn = pick(head(model, hidden), tail.uniform[at + 1, number][None])
    return [x[0].split(sizes) for x in drawn]


def widen(cache: Cache, G: int, T: int) -> None:
    """Give each sample room for T tokens."""
    own = cache.own
    if not cache.length:  # no token was decoded yet
        own = [[x[:, :, None, :0].expand(-1, -1, G, -1, -1) for x in kv] for kv in cache.prompt]
    cache.own = [tuple(cache.roomy(x, T) for x in kv) for kv in own]
    cache.length = T  # all of it, for `keep`: a row's own length is known to `Row` alone


def shrink(cache: Cache, tail: Tail, rows: list["Row"]) -> None:
    """Forget rows that have ended, and tell the others their places."""
    running = torch.isin(tail.row, torch.tensor([row.number for row in rows]).to(tail.row))
    tail.row, tail.running, _ = trim(cache, tail.row, running, tail.row)
    place = {i: (b, g) for b, group in enumerate(tail.row.tolist()) for g, i in enumerate(group)}
    for row in rows:
        row.place = place[row.number]


# ------------------------------------------------------------------------------------------------
# Drafts
# ------------------------------------------------------------------------------------------------

Seen = dict[tuple[int, ...], tuple[list[int], int]]  # few tokens -> a text, the place behind them


@dataclass
class Row:
    """A running row, and the draft of its next tokens."""

    number: int  # of the rollout's N
    place: tuple[int, int]  # b, g
    text: list[int]  # its prompt and what it has said
    begin: int  # length of the prompt
    seen: Seen  # of its group
    size: int = 8  # tokens that a draft may have, by what proved right lately; 0 is off
    guess: list[int] = field(default_factory=list)  # what may come next,
    draft: list[int] = field(default_factory=list)  # and what of it goes through the model

    @property
    def length(self) -> int:
        """Tokens it has said. All but the newest are in the cache."""
        return len(self.text) - self.begin

    def look_up(self, most: int) -> None:
        """Draft what followed the newest tokens where they stood last, at most so many tokens."""
        found = (self.seen.get(tuple(self.text[-n:])) for n in MATCH)
        source, i = next(filter(None, found), ([], 0))
        self.guess = source[i : i + LONGEST]
        self.draft = self.guess[: min(most, self.size)]

    def take(self, drawn: list[int], ends: set[int]) -> None:
        """Say what was drawn, up to the first token that differs from the draft or ends."""
        right = len(commonprefix([self.draft, drawn]))
        kept = drawn[: right + 1]
        kept = kept[: next((i for i, token in enumerate(kept, 1) if token in ends), None)]
        if self.guess:
            # all right, or, where drafts are off, the next token would have been
            well = right == len(self.draft) and self.guess[0] == drawn[0]
            self.size = min(LONGEST, 2 * self.size or 1) if well else (self.size + right) // 2
        self.text += kept
        note(self.seen, self.text, len(self.text) - len(kept))


def begin(tail: Tail) -> list[Row]:
    """The running rows, with what all rows of their groups have said so far written down."""
    G, rows = len(tail.length) // len(tail.prompts), []
    for b, numbers in enumerate(tail.row.tolist()):
        group, seen = numbers[0] // G, {}
        prompt = tail.prompts[group]
        note(seen, prompt, 0)
        texts = {}
        for i in range(group * G, group * G + G):
            texts[i] = prompt + tail.tokens[i, : tail.length[i]].tolist()
            note(seen, texts[i], len(prompt))
        for g, (i, runs) in enumerate(zip(numbers, tail.running[b].tolist(), strict=True)):
            rows += [Row(i, (b, g), texts[i], len(prompt), seen)] if runs else []
    return rows


def note(seen: Seen, text: list[int], start: int) -> None:
    """Write down for each token of text[start:] which few stood before it."""
    end = len(text)
    for n in (n for n in MATCH if n <= end):
        first = max(start, n)
        before = zip(*(text[first - n + j : end - n + j] for j in range(n)), strict=True)
        seen.update(zip(before, zip(repeat(text), range(first, end)), strict=True))


# ------------------------------------------------------------------------------------------------
# Attention of rows that have lengths and drafts of their own
# ------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """Where the M tokens of one forward belong, and how they attend."""

    place: tuple[Tensor, Tensor, Tensor]  # b, g and which of its row's new tokens, j: [M] each
    at: Tensor  # long [M]: how many of the row's tokens are before it
    shape: tuple[int, int, int]  # B, G, n
    S: int  # most tokens of a sample, these included
    start: Tensor  # long [B]: length of the prompt
    bias: dict[int | None, Tensor] = field(default_factory=dict)  # by window: see `unseen`

    def attention(self, q, k, v, layout: Layout, layer: int, window: int | None) -> Tensor:
        """decode_attention for several tokens a row: q [1, H, M, D] -> [1, M, H, D]."""
        (b, g, _), prompt = self.place, layout.cache.prompt[layer]
        for buffer, x in zip(layout.cache.own[layer], (k, v), strict=True):
            buffer[b, :, g, self.at] = x[0].transpose(0, 1)  # [M, K, D]
        own = [x[:, :, :, : self.S] for x in layout.cache.own[layer]]  # [B, K, G, S, D]
        q = self.spread(q[0].transpose(0, 1).unflatten(1, (k.shape[1], -1)))  # [M, K, rep, D] ->
        rep = q.shape[4]  # [B, G, n, K, rep, D] -> [B, K, G, n*rep, D]
        q = q.permute(0, 3, 1, 2, 4, 5).flatten(3, 4)
        out = group_attention(q, prompt, own, self.unseen(prompt[0].shape[2], window, rep))
        out = out.unflatten(3, (-1, rep)).permute(0, 2, 3, 1, 4, 5)  # -> [B, G, n, K, rep, D]
        return out[self.place].flatten(1, 2)[None]

    def spread(self, x: Tensor) -> Tensor:
        """Give each row its own tokens: [M, ..] -> [B, G, n, ..], 0 where a row has fewer."""
        wide = x.new_zeros(*self.shape, *x.shape[1:])
        wide[self.place] = x
        return wide

    def unseen(self, P: int, window: int | None, rep: int) -> Tensor:
        """-inf on what a token must not see, else 0: [B, 1, G, n*rep, P + S]."""
        if window not in self.bias:
            start, i = self.start[:, None], torch.arange(P + self.S, device=self.at.device)
            padding = (i < P) & (i >= start)  # [B, P + S]
            own = self.spread(self.start[self.place[0]] + self.at)  # [B, G, n], positions
            back = own[..., None] - i.where(i < P, start + i - P)[:, None, None]
            gone = padding[:, None, None] | (back < 0)  # [B, G, n, P + S]
            gone |= back >= window if window else False
            self.bias[window] = as_bias(gone)[:, None].repeat_interleave(rep, dim=3)
        return self.bias[window]
