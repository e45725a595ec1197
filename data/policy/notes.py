"""The sentences in which made-up updates are told, in the manner of release notes.

    notes = Notes(rng, grammar)
    notes.tell("load", "read", "function")   -> "The function `load` is now called `read`."

Each method draws one of many wordings; names stand in backticks.
"""

import random
import re

from data.policy.programs import WORD, Grammar

# Parts of sentences for `Notes.tell`.
BECOMES = [
    "was renamed to", "has been renamed", "has been renamed to", "is now called", "is called",
    "became", "has become", "turned into", "was replaced by", "has been replaced with",
    "gives way to", "is superseded by", "is deprecated in favor of", "was removed in favour of",
    "is now spelled", "should be written", "should now be written as", "is now", "lives on as",
    "now goes by the name", "was an alias of", "was changed to", "is deprecated for", "moved to",
    "has moved to", "is available as", "must be spelled", "is only an old name of",
]  # fmt: skip
GONE = [
    "was removed", "has been removed", "is gone", "no longer exists", "is deprecated",
    "was dropped", "is not supported any more", "will go away", "is no longer available",
    "raises an error now", "emits a warning", "was retired", "is obsolete",
    "is no longer accepted", "can no longer be used", "was removed after a deprecation period",
]  # fmt: skip
REPLACES = [
    "replaces", "is the new name of", "takes the place of", "supersedes", "is the new spelling of",
    "is the successor of", "must be used for", "used to be called", "was called", "was formerly",
    "has replaced", "is what remains of", "is now used for", "does the work of",
]  # fmt: skip
INSTEAD = ["instead of", "in place of", "rather than", "where you had", "for", "and no longer"]
STOPS = [". ", "; ", ", ", ": "]
FORMERLY = ["formerly", "previously", "before:", "was"]
MUST = ["should", "must", "has to"]
USE = ["use", "use", "write", "call", "pass", "prefer", "switch to", "take", "spell", "choose"]
ENDS = [
    "", "", "", "", " now", ", with the same meaning", "; nothing else changes", " since {n}",
    ", which behaves the same", " for consistency", ", as in `{o}`", " everywhere", " from now on",
]  # fmt: skip
# Whole sentences for `Notes.say`, by what happens.
SAYINGS = {
    "value": [
        "`{q}{f}` does not accept `{old}={value}` any more. Use `{old}={new}`.",
        "The value `{value}` of `{old}` in `{q}{f}` is deprecated, write `{new}`.",
        "For `{q}{f}`, `{old}={value}` was replaced by `{old}={new}`.",
    ],
    "positional": [
        "The arguments of `{q}{f}` from the {nth} on are keyword-only: {all}.",
        "In `{q}{f}`, {all} must be passed by keyword now.",
        "`{q}{f}`: the {nth} argument is keyword-only, so name {all}.",
        "Passing {all} to `{q}{f}` by position is no longer allowed. Write `{k}=...`.",
    ],
    "argument": [
        "`{q}{f}` now requires `{k}`. Pass `{k}={value}` to keep the old behavior.",
        "The default of `{k}` in `{q}{f}` changed; write `{k}={value}` for the old one.",
        "`{k}` became a required argument of `{q}{f}`: add `{k}={value}`.",
        "The default of `{k}` in `{q}{f}` is no longer `{value}`. Give `{k}={value}`.",
        "`{q}{f}` takes a new argument `{k}`. Old calls add `{k}={value}` at the end.",
    ],
    "method": [
        "`{q}{n}` is now a method. Call `{q}{n}()`.",
        "The property `{q}{n}` became a method: write `{n}()`.",
        "`{q}{n}` was turned from an attribute into a method: call it, `{n}()`.",
    ],
    "property": [
        "`{q}{n}()` is now a property. Use `{q}{n}` without parentheses.",
        "The method `{q}{n}` became a property: drop the parentheses.",
        "`{q}{n}` was turned from a method into a property, so `{n}()` is written `{n}`.",
    ],
    "moved": [
        "`{n}` has moved from `{old}` to `{new}`.",
        "`{old}.{n}` was moved to `{new}.{n}`.",
        "`{n}` must now be imported from `{new}`; `{old}.{n}` is gone.",
        "Use `from {new} import {n}`: `{old}` no longer exports it.",
        "`{old}.{n}` is deprecated. Import `{n}` from `{new}` instead.",
    ],
    "form": [
        "`{a}` was removed. Write `{b}` instead.",
        "`{a}` is deprecated, use `{b}`.",
        "`{a}` is replaced by `{b}`.",
        "Instead of `{a}`, write `{b}`.",
        "`{l}` is gone: `{a}` becomes `{b}`.",
        "`{l}` has been removed in favor of `{b}`.",
        "The old form `{a}` no longer works. The same is now written `{b}`.",
    ],
}


def quoted(note: str) -> set[str]:
    """The words between the backticks of a note."""
    return set(WORD.findall(" ".join(re.findall(r"`([^`]*)`", note))))


def sentence(text: str) -> str:
    """`text` with a capital at its beginning, unless it begins with a name in backticks."""
    return text[0].upper() + text[1:]


class Notes:
    """Draws sentences with `rng`, and other names for them from `grammar`."""

    def __init__(self, rng: random.Random, grammar: Grammar):
        self.rng, self.g = rng, grammar

    def say(self, what: str, **names: str) -> str:
        """One of the sentences of SAYINGS."""
        return self.rng.choice(SAYINGS[what]).format(**names)

    def tell(self, old: str, new: str, kind: str, owner: str = "") -> str:
        """One of many thousand ways to say that `old` is now `new`.

        `kind` names the thing; where it is empty, both are keyword arguments of `owner`.
        """
        r, end = self.rng, self.rng.choice(ENDS).format(o=self.g.name(), n=self.rng.randint(0, 30))
        if kind:
            old, new, noun, place = f"`{old}`", f"`{new}`", kind, ""
        else:
            old, new, noun, place = self.argument_of(owner, old, new)
        if r.random() < 0.08:  # two at once, in order
            other, another = self.g.name(), self.g.name()
            pairs = r.sample([(old, new), (f"`{other}`", f"`{another}`")], 2)
            old, new = (" and ".join(x) for x in zip(*pairs, strict=True))
            noun = ""
        named = r.choice([f"the {noun} {old}", f"the old {noun} {old}", f"{old}", f"{old}"])
        named = f"the {old} {noun}" if not kind and noun and r.random() < 0.4 else named
        fresh = r.choice([new, new, new, f"the {noun} {new}", f"the new {noun} {new}"])
        if not noun:
            named, fresh = old, new
        front = back = ""
        if place.startswith(" of") and named != old:
            named += place
        elif place and r.random() < 0.5:
            back = place
        elif place:
            front = r.choice(["In `{}`, ", "`{}`: ", "For `{}`, ", "`{}` now: "]).format(owner)
        use, gone = r.choice(USE), r.choice(GONE)
        text = r.choice(
            [
                f"{named} {r.choice(BECOMES)} {new}{back}{end}.",
                f"{named} {r.choice(BECOMES)} {new}{back}{end}.",
                f"{named}{back} {gone}{r.choice(STOPS)}{use} {fresh} instead{end}.",
                f"{named}{back} {gone}. {use.title()} {fresh}{end}.",
                f"{fresh} {r.choice(REPLACES)} {named}{back}{end}.",
                f"{use} {fresh} {r.choice(INSTEAD)} {named}{back}{end}.",
                f"{r.choice(INSTEAD[:3])} {named}, {use} {fresh}{back}{end}.",
                f"{r.choice(['renamed', 'replaced', 'changed'])} {old} to {new}{back}{end}.",
                f"replace {named} {r.choice(['by', 'with'])} {fresh}{back}{end}.",
                f"{new} ({r.choice(FORMERLY)} {old}){back}{end}.",
                f"code with {named} {r.choice(MUST)} {use} {fresh}{back}{end}.",
                f"{named}{back} {gone}, since {new} does the same{end}.",
                f"{old} {r.choice(['->', '=>', 'becomes', 'is now'])} {new}{back}{end}.",
            ]
        )
        return sentence(front + text)

    def tell_gone(self, old: str, owner: str) -> str:
        """One of some thousand ways to say that the keyword argument `old` of `owner` is gone."""
        r = self.rng
        old, _, noun, place = self.argument_of(owner, old, old)
        named = r.choice([f"the {noun} {old}", f"the {old} {noun}", old]) + place
        without = r.choice(["drop it", "leave it out", "remove it", "omit it", "do not pass it"])
        why = r.choice(["had no effect", "did nothing", "is always on", "was ignored for long"])
        text = r.choice(
            [
                f"{named} {r.choice(GONE)}{r.choice(STOPS)}{without}.",
                f"{named} {r.choice(GONE)}.",
                f"{named} {r.choice(GONE)}, since it {why}.",
                f"{named} {why} and {r.choice(GONE)}.",
                f"removed {named}{r.choice(['.', ', which ' + why + '.'])}",
                f"`{owner}` {r.choice(['no longer takes', 'lost', 'does not know'])} {old}"
                f"{r.choice(STOPS)}{without}.",
            ]
        )
        return sentence(text)

    def argument_of(self, owner: str, old: str, new: str) -> tuple[str, str, str, str]:
        """How a note shows two keywords, what it calls them, and where it says they belong."""
        r = self.rng
        noun = r.choice(["argument", "parameter", "keyword", "keyword argument", "option"])
        if r.random() < 0.2:
            call = owner + r.choice(["(", "(", "(..., ", "(x, "])
            value = r.choice(["...", "...", self.g.number(), self.g.string(), "True"])
            return f"`{call}{old}={value})`", f"`{call}{new}={value})`", noun, ""
        place = " " + r.choice(["of", "of", "in", "for", "when calling"]) + f" `{owner}`"
        if r.random() < 0.15:
            place += r.choice([" and ", ", "]) + f"`{self.g.name()}`"
        sign = "=" if r.random() < 0.15 else ""
        return f"`{old}{sign}`", f"`{new}{sign}`", noun, place


def dress(rng: random.Random, note: str, g: Grammar) -> str:
    """Add what release notes have around the one sentence that matters."""
    other, another, word = g.name(), g.name(), g.camel()
    after = [
        f"`{other}` was renamed to `{another}` as well.",
        f"`{other}()` is deprecated, use `{another}()`.",
        f"The `{other}` argument of `{word}.{another}` has been removed.",
        f"`{other}` now accepts `{another}`.",
        f"`{word}` gained a `{other}` argument.",
        "The old name still worked with a warning before.",
        "The arguments are the same.",
        "The behavior does not change.",
        "This completes a deprecation that began earlier.",
        "Code that uses the old spelling raises an error.",
        "Several bugs were fixed.",
    ]
    before = [
        "API change: ", "Deprecated: ", "Removed: ", "Breaking change: ", "Changed: ",
        "Removal of deprecated code: ", "Expired deprecations: ", "Backwards incompatible: ",
        "This release cleans up the public API. ", "Several names were changed. ",
        f"`{other}` is faster now. ", f"`{other}` was renamed to `{another}`. ",
    ]  # fmt: skip
    if rng.random() < 0.35:
        note = rng.choice(before) + note
    while rng.random() < 0.35:
        note = f"{note} {rng.choice(after)}"
    return note
