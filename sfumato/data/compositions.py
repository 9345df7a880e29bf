"""Which compositions of known words are held out of training, decided by the captions alone.

A picture may be held out if its caption is the fourth corner of an analogy whose other three stay in
training: "man detective" from "woman detective", "man fairy", "woman fairy". So each of its words is seen in
training, and in that very role, but not their combination.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence

__all__ = ["concept", "hold_out", "without_skin_tone"]

Words = tuple[str, ...]

TONE = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone")
PLAIN = re.compile(r"[a-z][a-z\u2019-]*")  # lower-case: neither names of places nor letters on buttons
EMPTY = frozenset({"a", "and", "in", "no", "not", "of", "on", "the", "with", "without"})
MIRRORED = " facing right"  # the picture is a mirror image of the one whose caption lacks these words

SALT = "sfumato openmoji held-out"  # the order of candidates is that of sha256(salt, newline, caption)
TONES = 5


def concept(caption: str) -> str:
    """The caption without its skin tones: what the tone variants of a picture have in common."""
    return " ".join(TONE.sub("", caption).split())


def without_skin_tone(captions: Sequence[str]) -> list[str]:
    """The captions that name no skin tone, in their order."""
    return [caption for caption in captions if concept(caption) == caption]


def hold_out(
    captions: Collection[str],
    *,
    count: int = 200,
    whole_concepts: int = 12,
    toneless: int = 36,
    keep: Collection[str] = (),
) -> list[str]:
    """`count` captions whose every word, but not whose combination of words, occurs in the others; sorted.

    Three kinds, each taken in the order of a hash of its captions.

    Args:
        captions: distinct ones; their order does not matter.
        count: how many in all; what the next two leave is one tone of a concept that is otherwise trained.
        whole_concepts: concepts held out without tone and in all five, so six captions each.
        toneless: concepts held out that have no tone variants.
        keep: concepts that stay in training.

    Raises: ValueError if the captions do not have so many compositions.
    """
    draw = _Draw(captions, keep)
    variants: dict[str, list[str]] = defaultdict(list)
    for caption in sorted(draw.words):
        variants[concept(caption)].append(caption)
    complete = [own for own, all_ in variants.items() if own in all_ and len(all_) == TONES + 1]
    draw.take([[own, *(c for c in variants[own] if c != own)] for own in complete], whole_concepts)
    draw.take([[own] for own, all_ in variants.items() if all_ == [own]], toneless)
    draw.take([[c] for c in draw.words if concept(c) != c], count - len(draw.held))
    if len(draw.held) != count:
        found = len(draw.held)
        raise ValueError(f"{len(captions)} captions have {found} such compositions to hold out, not {count}")
    return sorted(draw.held)


class _Draw:
    """The captions held so far, and those that must stay in training for their sake."""

    def __init__(self, captions: Collection[str], keep: Collection[str]) -> None:
        self.keep = frozenset(keep)
        self.words = {caption: _words(caption) for caption in sorted(captions)}
        self.caption_of = {words: caption for caption, words in self.words.items()}
        self.concepts = {concept(caption) for caption in captions}
        self.bags = Counter(tuple(sorted(words)) for words in self.words.values())
        self.fillers: dict[tuple[Words, Words], list[str]] = defaultdict(list)
        for words in self.words.values():
            for i, word in enumerate(words):
                self.fillers[words[:i], words[i + 1 :]].append(word)
        self.held: set[str] = set()
        self.corners: set[str] = set()

    def take(self, groups: Sequence[list[str]], count: int) -> None:
        """Hold out up to `count` of the groups, each whole."""
        for group in sorted(groups, key=lambda g: hashlib.sha256(f"{SALT}\n{g[0]}".encode()).digest()):
            if count < 1:
                return
            count -= self._hold(group)

    def _hold(self, group: list[str]) -> bool:
        if any(c in self.corners or c in self.held or not self._eligible(c) for c in group):
            return False
        gone = self.held.union(group)
        corners: set[str] = set()
        for caption in group:
            found = next((c for c in self._analogies(self.words[caption]) if not gone.intersection(c)), None)
            if found is None:
                return False
            corners.update(found)
        self.held.update(group)
        self.corners |= corners
        return True

    def _eligible(self, caption: str) -> bool:
        words, own = self.words[caption], concept(caption)
        content = [w for w in words if TONE.fullmatch(w) or (PLAIN.fullmatch(w) and w not in EMPTY)]
        mirrored = own.endswith(MIRRORED) or own + MIRRORED in self.concepts
        one_order = (
            self.bags[tuple(sorted(words))] == 1
        )  # else training may have these words in another order
        return len(content) >= 2 and one_order and not mirrored and own not in self.keep

    def _analogies(self, words: Words) -> Iterator[tuple[str, str, str]]:
        """Captions that differ in one word, in another word, and in both."""
        for i in range(len(words)):
            for j in range(i + 1, len(words)):
                before, between, after = words[:i], words[i + 1 : j], words[j + 1 :]
                for a in self.fillers[before, words[i + 1 :]]:
                    for b in self.fillers[words[:j], after]:
                        both = self.caption_of.get((*before, a, *between, b, *after))
                        if a != words[i] and b != words[j] and both is not None:
                            one = self.caption_of[(*before, a, *words[i + 1 :])]
                            yield one, self.caption_of[(*words[:j], b, *after)], both


def _words(caption: str) -> Words:
    """The words of a caption, a skin tone counting as one."""
    joined = TONE.sub(lambda tone: tone.group().replace(" ", "_"), caption)
    return tuple(word.replace("_", " ") for word in joined.split())
