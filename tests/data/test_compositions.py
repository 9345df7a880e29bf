"""The held-out split, from captions alone."""

from __future__ import annotations

import hashlib
from itertools import product

import pytest

from sfumato.data.compositions import concept, hold_out, without_skin_tone
from sfumato.data.openmoji import captions, held_out

TONES = ["light", "medium-light", "medium", "medium-dark", "dark"]


@pytest.fixture(scope="module")
def named():
    return captions()


@pytest.fixture(scope="module")
def split(named):
    held = held_out(named)
    return [named[s] for s in sorted(held)], [c for s, c in named.items() if s not in held]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("woman astronaut dark skin tone", "woman astronaut"),
        ("woman astronaut", "woman astronaut"),
        ("man medium-light skin tone red hair", "man red hair"),
        ("kiss woman man light skin tone medium-dark skin tone", "kiss woman man"),
        ("light bulb", "light bulb"),
        ("medium skin tone", ""),
    ],
)
def test_concept(caption, expected):
    assert concept(caption) == expected


def test_without_skin_tone_keeps_the_order():
    assert without_skin_tone(["b", "a dark skin tone", "a"]) == ["b", "a"]


class TestOpenMoji:
    def test_counts(self, named, split):
        held, training = split
        assert len(named) == len(set(named.values())) == 3953
        assert len(held) == len(set(held)) == 200
        assert len(training) == 3753
        assert len(without_skin_tone(list(named.values()))) == 1918
        assert len(without_skin_tone(held)) == 48

    def test_is_the_published_list(self, named):
        """Figures measured on it, and weights trained without it, would mean nothing if it changed."""
        stems = "\n".join(sorted(held_out(named)))
        digest = "428bba302515303a48714caf635a74afdb08599bfb49821a957f9eba8d347793"
        assert hashlib.sha256(stems.encode()).hexdigest() == digest

    def test_every_word_occurs_in_training(self, split):
        held, training = split
        known = {word for caption in training for word in caption.split()}
        assert not [c for c in held if not known.issuperset(c.split())]

    def test_no_combination_of_words_occurs_in_training(self, split):
        held, training = split
        known = {tuple(sorted(caption.split())) for caption in training}
        assert not [c for c in held if tuple(sorted(c.split())) in known]

    def test_each_is_the_fourth_corner_of_an_analogy_in_training(self, split):
        """Found here by search over pairs of words, not by the table of the implementation."""
        held, training = split
        known, vocabulary = set(training), {w for c in training for w in joined(c)}
        for caption in held:
            words = joined(caption)
            at = {
                i: [w for w in vocabulary if w != words[i] and spoken(words, {i: w}) in known]
                for i in range(len(words))
            }
            assert any(
                spoken(words, {i: a, j: b}) in known
                for i in at
                for j in at
                if i < j
                for a, b in product(at[i], at[j])
            ), caption

    def test_three_kinds(self, named, split):
        held, training = split
        trained = {concept(c) for c in training}
        unseen = {concept(c) for c in held} - trained
        tones = [c for c in held if concept(c) in trained]
        assert len(unseen) == 48  # 12 whole concepts and 36 that have no tones
        assert len([c for c in held if concept(c) in unseen]) == 12 * 6 + 36
        assert len(tones) == 92
        assert all("skin tone" in c for c in tones)

    def test_what_stays_in_training(self, split):
        held, _ = split
        assert "red heart" not in held
        assert not {"cook", "man cook", "person walking", "family"} & {concept(c) for c in held}

    def test_does_not_depend_on_the_order_of_the_captions(self, named):
        assert held_out(dict(reversed(named.items()))) == held_out(named)


def joined(caption):
    return caption.replace(" skin tone", "_skin_tone").split()


def spoken(words, changes):
    return " ".join(changes.get(i, w) for i, w in enumerate(words)).replace("_", " ")


class TestHoldOut:
    def made(self):
        people = [f"{who} {job}" for who in ("man", "woman", "child") for job in ("baker", "diver", "judge")]
        things = [
            f"{color} {shape}" for color in ("red", "green", "blue") for shape in ("ball", "box", "ring")
        ]
        return things + people + [f"{p} {tone} skin tone" for p in people for tone in TONES]

    def test_small_world(self):
        everything = self.made()
        held = hold_out(everything, count=16, whole_concepts=1, toneless=2)
        assert held == sorted(set(held))
        assert len(held) == 16
        assert set(held) < set(everything)
        training = {w for c in everything if c not in held for w in c.split()}
        assert training.issuperset(w for c in held for w in c.split())

    def test_keep(self):
        held = hold_out(self.made(), count=10, whole_concepts=1, toneless=2)
        kept = {concept(c) for c in held[:3]}
        others = hold_out(self.made(), count=10, whole_concepts=1, toneless=2, keep=kept)
        assert not kept & {concept(c) for c in others}

    def test_too_few(self):
        with pytest.raises(ValueError, match=r"3 captions have 0 such compositions to hold out, not 200"):
            hold_out(["red ball", "red box", "blue ball"])

    def test_names_orders_and_mirrors_are_no_compositions(self):
        square = ["{} Korea", "{} Island"]
        names = [s.format(w) for s in square for w in ("North", "South")]
        orders = ["red ring ball", "ring red ball", "red box ball", "ring box ball"]
        mirrors = [
            f"{who} {way}{m}"
            for who in ("man", "boy")
            for way in ("runs", "sits")
            for m in ("", " facing right")
        ]
        for some in (names, orders, mirrors):
            with pytest.raises(ValueError, match="have 0 such compositions"):
                hold_out(some, count=1)
        assert hold_out([m for m in mirrors if "facing" not in m], count=1)
