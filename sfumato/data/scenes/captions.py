"""Captions of scenes by a small grammar: what a caption says is bound, what it leaves out is free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from sfumato.data.scenes.graph import INVERSE, RELATIONS, Object, Scene, Scenes, relation_of
from sfumato.data.scenes.sampling import uniforms
from sfumato.data.scenes.splits import Split, clear, wanted

__all__ = ["ATTRIBUTES", "Caption", "Phrase", "describe", "write"]

ATTRIBUTES = ("color", "shape", "size", "texture")
NUMBERS = ("one", "two", "three", "four")
WORDS = {  # each relation in the phrasings of training
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
SAID = {"color": 0.9, "shape": 0.92, "size": 0.35, "texture": 0.35, "background": 0.3, "relation": 0.7}
SAID_IN_LISTS = 0.15  # of size and texture, where three or four things are named


@dataclass(frozen=True, slots=True)
class Phrase:
    """One or several objects of one kind; None where the caption does not say."""

    count: int
    color: str | None = None
    shape: str | None = None
    size: str | None = None
    texture: str | None = None

    @property
    def said(self) -> tuple[str, ...]:
        """Names of the attributes that are said."""
        return tuple(name for name in ATTRIBUTES if getattr(self, name) is not None)

    def fits(self, item: Object) -> bool:
        """Whether an object has all attributes that are said."""
        return all(getattr(self, name) == getattr(item, name) for name in self.said)


@dataclass(frozen=True, slots=True)
class Caption:
    """A text and the facts that it binds.

    A caption names every object of the scene, so the number of objects is bound too.

    Attributes:
        phrases: in the order of the scene's objects, which need not be that of the text.
        relation: of the first phrase's object to the second's; None = not said.
        background: None = not said.
    """

    text: str
    phrases: tuple[Phrase, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def count(self) -> int:
        """Objects of the scene."""
        return sum(phrase.count for phrase in self.phrases)

    @property
    def difficulty(self) -> int:
        """Number of bound facts: attributes said, numbers above one, relation and background."""
        facts = sum(len(phrase.said) + (phrase.count > 1) for phrase in self.phrases)
        return facts + (self.relation is not None) + (self.background is not None)


def describe(scenes: Scenes, split: Split, *, seed: int = 0, first: int = 0) -> list[Caption]:
    """A caption for each of the scenes `first` and following of a split.

    Phrasings are those of training, except in the split "phrasings", whose captions all have one that
    training never sees; their words it has seen.
    """
    if not len(scenes):
        return []
    u = uniforms(f"{split}/{seed}/caption", first + np.arange(len(scenes)), 28)
    relations = relation_of(scenes.x[:, 1] - scenes.x[:, 0], scenes.y[:, 1] - scenes.y[:, 0])
    told = zip(scenes.unpack(), u.tolist(), clear(scenes).tolist(), relations.tolist(), strict=True)
    return [_caption(scene, dice, RELATIONS[r] if c else None, split) for scene, dice, c, r in told]


def write(caption: Caption, dice: Sequence[float], *, held_out: bool = False) -> str:
    """The text of a caption's facts.

    Args:
        dice: eight numbers in [0, 1) that choose among the phrasings.
        held_out: choose one that training never sees.
    """
    clause = held_out and caption.relation is not None and dice[0] < 0.5
    relative = held_out and not clause and dice[0] < 0.8 and any(_adjectives(p) for p in caption.phrases)
    names = [_name(p, die, relative) for p, die in zip(caption.phrases, dice[4:], strict=False)]
    verb = "is" if caption.phrases[0].count == 1 else "are"
    if caption.relation is not None:
        relation, (a, b) = caption.relation, names
        if dice[1] < 0.5:
            relation, a, b = RELATIONS[INVERSE[RELATIONS.index(relation)]], b, a
        words = WORDS[relation][dice[2] < 0.4]
        if clause:
            return _on(caption, f"{words} {b} there is {a}", dice[3], front=False)
        text = f"{a} is {words} {b}" if dice[0] < 0.3 and not held_out else f"{a} {words} {b}"
        if dice[0] < 0.3 and not held_out:
            return _on(caption, text, dice[3], front=False)
    else:
        text = " and ".join(names)
    if held_out and not relative:
        return _on(caption, f"there is a picture of {text}", dice[3], front=False)
    if caption.background is not None and dice[3] < 0.25:
        return f"on {caption.background} there {verb} {text}"
    opening = "" if dice[0] < 0.7 else f"there {verb} " if dice[0] < 0.85 else "a picture of "
    return _on(caption, opening + text, dice[3])


def _caption(scene: Scene, dice: Sequence[float], relation: str | None, split: Split) -> Caption:
    musts = wanted(split)
    groups = [list(group) for _, group in groupby(scene.objects, lambda item: item.kind)]
    phrases = []
    for k, group in enumerate(groups):
        item, u = group[0], dice[8 + 4 * k : 12 + 4 * k]
        rare = len(groups) > 2
        said = {name for name, die in zip(ATTRIBUTES, u, strict=True) if die < _share(name, rare)} | musts
        if not said & {"color", "shape"}:
            said |= {"color", "shape"}
        if item.size == "small":
            said -= {"texture"}
        phrases.append(Phrase(len(group), **{n: getattr(item, n) if n in said else None for n in ATTRIBUTES}))
    stated = len(groups) == 2 == len(scene.objects) and ("relation" in musts or dice[24] < SAID["relation"])
    caption = Caption(
        "",
        tuple(phrases),
        relation if stated else None,
        scene.background if dice[25] < SAID["background"] else None,
    )
    return replace(caption, text=write(caption, dice[:8], held_out=split == "phrasings"))


def _share(name: str, rare: bool) -> float:
    return SAID_IN_LISTS if rare and name in ("size", "texture") else SAID[name]


def _name(phrase: Phrase, die: float, relative: bool) -> str:
    """A noun phrase with its article or number."""
    noun = phrase.shape or "shape"
    if phrase.count > 1:
        noun += "es" if noun.endswith("s") else "s"
    words = _adjectives(phrase)
    tail = ""
    if relative and words:
        tail, words = f" that {'is' if phrase.count == 1 else 'are'} {' and '.join(words)}", []
    elif phrase.color is not None and die < 0.2:
        tail, words = f" in {phrase.color}", words[:-1]
    name = " ".join([*words, noun]) + tail
    if phrase.count > 1:
        return f"{NUMBERS[phrase.count - 1]} {name}"
    article = "one" if 0.2 <= die < 0.35 else "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}"


def _adjectives(phrase: Phrase) -> list[str]:
    return [word for word in (phrase.size, phrase.texture, phrase.color) if word is not None]


def _on(caption: Caption, text: str, die: float, *, front: bool = True) -> str:
    """A text with the background at its end."""
    if caption.background is None:
        return text
    low = 0.25 if front else 0.0
    share = (die - low) / (1 - low)
    forms = ("on {}", "on a {} background", "on a background that is {}")
    return f"{text} {forms[min(int(share * 3), 2)].format(caption.background)}"
