"""The sentences in which made-up updates are told, in the manner of release notes.

    tell(grammar, "load", "read", "function")  -> "The function `load` is now called `read`."
    tell_gone(grammar, "axis", "np.sum")       -> "Removed `axis` of `np.sum`."
    say(rng, "method", attribute="a.size", name="size")
                                               -> "`a.size` is now a method. Call `a.size()`."
    dress(note, grammar)                       -> "API change: ... Several bugs were fixed."

Each call draws one of many wordings; names stand in backticks.
"""

import random
import re

from data.policy.programs import WORD, Grammar

# Parts of sentences for `tell` and `tell_gone`.
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
    "", "", "", "", " now", ", with the same meaning", "; nothing else changes",
    " since {release}", ", which behaves the same", " for consistency", ", as in `{other}`",
    " everywhere", " from now on",
]  # fmt: skip
# The sentences of `tell`, with the words that their empty braces take. The keys:
#   {old} {new}      the two names in backticks
#   {named} {fresh}  the same with what they are: "the function `load`", "the new name `read`"
#   {back}           where a keyword belongs: " of `np.sum`"
#   {gone} {use}     one of GONE and of USE; {Use} begins a sentence
#   {end}            one of ENDS
TELLINGS = [
    ("{named} {} {new}{back}{end}.", BECOMES),
    ("{named} {} {new}{back}{end}.", BECOMES),
    ("{named}{back} {gone}{}{use} {fresh} instead{end}.", STOPS),
    ("{named}{back} {gone}. {Use} {fresh}{end}.",),
    ("{fresh} {} {named}{back}{end}.", REPLACES),
    ("{use} {fresh} {} {named}{back}{end}.", INSTEAD),
    ("{} {named}, {use} {fresh}{back}{end}.", INSTEAD[:3]),
    ("{} {old} to {new}{back}{end}.", ["renamed", "replaced", "changed"]),
    ("replace {named} {} {fresh}{back}{end}.", ["by", "with"]),
    ("{new} ({} {old}){back}{end}.", FORMERLY),
    ("code with {named} {} {use} {fresh}{back}{end}.", MUST),
    ("{named}{back} {gone}, since {new} does the same{end}.",),
    ("{old} {} {new}{back}{end}.", ["->", "=>", "becomes", "is now"]),
]
# Whole sentences for `say`, by what happens. The keys:
#   {function}     the function as the note names it: "np.sum"
#   {keyword}      a keyword argument, {keywords} several: "`axis` and `out`"
#   {old} {new}    a keyword's values, or two modules
#   {value}        the value that an added argument takes
#   {nth}          the place of a positional argument: "second"
#   {attribute}    the attribute as the note names it: "a.size"
#   {name}         the last part of a function's, class's or attribute's name: "size"
#   {before} {after}  a call in its old and its new form
SAYINGS = {
    "value": [
        "`{function}` does not accept `{keyword}={old}` any more. Use `{keyword}={new}`.",
        "The value `{old}` of `{keyword}` in `{function}` is deprecated, write `{new}`.",
        "For `{function}`, `{keyword}={old}` was replaced by `{keyword}={new}`.",
    ],
    "positional": [
        "The arguments of `{function}` from the {nth} on are keyword-only: {keywords}.",
        "In `{function}`, {keywords} must be passed by keyword now.",
        "`{function}`: the {nth} argument is keyword-only, so name {keywords}.",
        "Passing {keywords} to `{function}` by position is no longer allowed. "
        "Write `{keyword}=...`.",
    ],
    "argument": [
        "`{function}` now requires `{keyword}`. Pass `{keyword}={value}` to keep the old behavior.",
        "The default of `{keyword}` in `{function}` changed; "
        "write `{keyword}={value}` for the old one.",
        "`{keyword}` became a required argument of `{function}`: add `{keyword}={value}`.",
        "The default of `{keyword}` in `{function}` is no longer `{value}`. "
        "Give `{keyword}={value}`.",
        "`{function}` takes a new argument `{keyword}`. "
        "Old calls add `{keyword}={value}` at the end.",
    ],
    "method": [
        "`{attribute}` is now a method. Call `{attribute}()`.",
        "The property `{attribute}` became a method: write `{name}()`.",
        "`{attribute}` was turned from an attribute into a method: call it, `{name}()`.",
    ],
    "property": [
        "`{attribute}()` is now a property. Use `{attribute}` without parentheses.",
        "The method `{attribute}` became a property: drop the parentheses.",
        "`{attribute}` was turned from a method into a property, "
        "so `{name}()` is written `{name}`.",
    ],
    "moved": [
        "`{name}` has moved from `{old}` to `{new}`.",
        "`{old}.{name}` was moved to `{new}.{name}`.",
        "`{name}` must now be imported from `{new}`; `{old}.{name}` is gone.",
        "Use `from {new} import {name}`: `{old}` no longer exports it.",
        "`{old}.{name}` is deprecated. Import `{name}` from `{new}` instead.",
    ],
    "form": [
        "`{before}` was removed. Write `{after}` instead.",
        "`{before}` is deprecated, use `{after}`.",
        "`{before}` is replaced by `{after}`.",
        "Instead of `{before}`, write `{after}`.",
        "`{name}` is gone: `{before}` becomes `{after}`.",
        "`{name}` has been removed in favor of `{after}`.",
        "The old form `{before}` no longer works. The same is now written `{after}`.",
    ],
}
# What `dress` puts around a note; {other} and {another} are functions, {owner} is a class.
BEFORE = [
    "API change: ", "Deprecated: ", "Removed: ", "Breaking change: ", "Changed: ",
    "Removal of deprecated code: ", "Expired deprecations: ", "Backwards incompatible: ",
    "This release cleans up the public API. ", "Several names were changed. ",
    "`{other}` is faster now. ", "`{other}` was renamed to `{another}`. ",
]  # fmt: skip
AFTER = [
    "`{other}` was renamed to `{another}` as well.",
    "`{other}()` is deprecated, use `{another}()`.",
    "The `{other}` argument of `{owner}.{another}` has been removed.",
    "`{other}` now accepts `{another}`.",
    "`{owner}` gained a `{other}` argument.",
    "The old name still worked with a warning before.",
    "The arguments are the same.",
    "The behavior does not change.",
    "This completes a deprecation that began earlier.",
    "Code that uses the old spelling raises an error.",
    "Several bugs were fixed.",
]


def quoted(note: str) -> set[str]:
    """The words between the backticks of a note."""
    return set(WORD.findall(" ".join(re.findall(r"`([^`]*)`", note))))


def sentence(text: str) -> str:
    """`text` with a capital at its beginning, unless it begins with a name in backticks."""
    return text[0].upper() + text[1:]


def say(rng: random.Random, what: str, **names: str) -> str:
    """One of the sentences SAYINGS[what], its keys filled with `names`."""
    return rng.choice(SAYINGS[what]).format(**names)


def tell(grammar: Grammar, old: str, new: str, kind: str, owner: str = "") -> str:
    """One of many thousand ways to say that `old` is now `new`.

    `kind` names the thing; where it is empty, both are keyword arguments of `owner`.
    """
    rng = grammar.rng
    end = rng.choice(ENDS).format(other=grammar.name(), release=rng.randint(0, 30))
    if kind:
        old, new, noun, place = f"`{old}`", f"`{new}`", kind, ""
    else:
        old, new, noun, place = argument_of(grammar, owner, old, new)
    if rng.random() < 0.08:
        old, new = with_another(grammar, old, new)
        noun = ""
    named, fresh = with_noun(rng, old, new, noun, of_keyword=not kind)
    front = back = ""
    if place.startswith(" of") and named != old:
        named += place
    elif place and rng.random() < 0.5:
        back = place
    elif place:
        front = rng.choice(["In `{}`, ", "`{}`: ", "For `{}`, ", "`{}` now: "]).format(owner)
    names = dict(old=old, new=new, named=named, fresh=fresh, back=back, end=end)
    return sentence(front + telling(rng, names))


def telling(rng: random.Random, names: dict[str, str]) -> str:
    """One of TELLINGS with its words drawn. (They are drawn for all, then one is taken.)"""
    use, gone = rng.choice(USE), rng.choice(GONE)
    drawn = [(text, [rng.choice(words) for words in lists]) for text, *lists in TELLINGS]
    text, words = rng.choice(drawn)
    return text.format(*words, **names, gone=gone, use=use, Use=use.title())


def with_noun(
    rng: random.Random, old: str, new: str, noun: str, of_keyword: bool
) -> tuple[str, str]:
    """Both names, often with what they are: "the old function `load`", "the function `read`"."""
    named = rng.choice([f"the {noun} {old}", f"the old {noun} {old}", f"{old}", f"{old}"])
    if of_keyword and noun and rng.random() < 0.4:
        named = f"the {old} {noun}"
    fresh = rng.choice([new, new, new, f"the {noun} {new}", f"the new {noun} {new}"])
    return (named, fresh) if noun else (old, new)


def with_another(grammar: Grammar, old: str, new: str) -> tuple[str, str]:
    """Two renamings told at once: ("`load` and `dump`", "`read` and `write`"), in any order."""
    other, another = grammar.name(), grammar.name()
    pairs = grammar.rng.sample([(old, new), (f"`{other}`", f"`{another}`")], 2)
    olds, news = zip(*pairs, strict=True)
    return " and ".join(olds), " and ".join(news)


def tell_gone(grammar: Grammar, old: str, owner: str) -> str:
    """One of some thousand ways to say that the keyword argument `old` of `owner` is gone."""
    rng = grammar.rng
    old, _, noun, place = argument_of(grammar, owner, old, old)
    named = rng.choice([f"the {noun} {old}", f"the {old} {noun}", old]) + place
    without = rng.choice(["drop it", "leave it out", "remove it", "omit it", "do not pass it"])
    why = rng.choice(["had no effect", "did nothing", "is always on", "was ignored for long"])
    text = rng.choice(
        [
            f"{named} {rng.choice(GONE)}{rng.choice(STOPS)}{without}.",
            f"{named} {rng.choice(GONE)}.",
            f"{named} {rng.choice(GONE)}, since it {why}.",
            f"{named} {why} and {rng.choice(GONE)}.",
            f"removed {named}{rng.choice(['.', ', which ' + why + '.'])}",
            f"`{owner}` {rng.choice(['no longer takes', 'lost', 'does not know'])} {old}"
            f"{rng.choice(STOPS)}{without}.",
        ]
    )
    return sentence(text)


def argument_of(grammar: Grammar, owner: str, old: str, new: str) -> tuple[str, str, str, str]:
    """How a note shows two keywords, what it calls them, and where it says they belong.

    For example ("`axis`", "`dim`", "parameter", " of `np.sum`"), or, where the keywords come with
    their function, ("`np.sum(axis=...)`", "`np.sum(dim=...)`", "option", "").
    """
    rng = grammar.rng
    noun = rng.choice(["argument", "parameter", "keyword", "keyword argument", "option"])
    if rng.random() < 0.2:
        call = owner + rng.choice(["(", "(", "(..., ", "(x, "])
        value = rng.choice(["...", "...", grammar.number(), grammar.string(), "True"])
        return f"`{call}{old}={value})`", f"`{call}{new}={value})`", noun, ""
    place = " " + rng.choice(["of", "of", "in", "for", "when calling"]) + f" `{owner}`"
    if rng.random() < 0.15:
        place += rng.choice([" and ", ", "]) + f"`{grammar.name()}`"
    sign = "=" if rng.random() < 0.15 else ""
    return f"`{old}{sign}`", f"`{new}{sign}`", noun, place


def dress(note: str, grammar: Grammar) -> str:
    """Add what release notes have around the one sentence that matters."""
    rng, other, another, owner = grammar.rng, grammar.name(), grammar.name(), grammar.class_name()
    names = dict(other=other, another=another, owner=owner)
    if rng.random() < 0.35:
        note = rng.choice(BEFORE).format(**names) + note
    while rng.random() < 0.35:
        note = f"{note} {rng.choice(AFTER).format(**names)}"
    return note
