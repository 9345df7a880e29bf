"""Prompts for CLIP's towers: weights of words, pieces of 75 tokens, and what had to be cut."""

from __future__ import annotations

import re
from typing import NamedTuple

from sfumato.core.types import Reading
from sfumato.text.tokenizers import Tokenizer

__all__ = ["Rows", "prompt_rows", "weighted"]

BRACKETS = {"(": 1.1, "[": 1 / 1.1}  # what a pair without a number is worth
# An escaped bracket, an opening one, the end of a weighted part, a closing one, anything else.
PARTS = re.compile(
    r"\\(?P<plain>[()\[\]\\])|(?P<open>[(\[])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|[:\\])"
)


class Rows(NamedTuple):
    """A prompt as a tower reads it.

    Attributes:
        ids, weights: (chunks, context) each.
        rest: the end of the prompt that was cut, "" if all of it is read.
        lengths: (chunks), ids of each that are no filling.
    """

    ids: list[list[int]]
    weights: list[list[float]]
    rest: str
    lengths: list[int]


def prompt_rows(tokenizer: Tokenizer, prompt: str, reading: Reading) -> Rows:
    """Pieces of a prompt, each from start to end token, filled up; missing ones are empty texts."""
    start, end, *_, pad = tokenizer([""])[0][0].tolist()
    runs = weighted(prompt) if reading.weights else [(prompt, 1.0)]
    room, ids, weights, rest = tokenizer.context - 2, list[int](), list[float](), list[str]()
    for text, weight in runs:
        pieces = tokenizer.pieces(text)
        free = reading.chunks * room - len(ids)
        ids += [number for number, _ in pieces[:free]]
        weights += [weight] * len(pieces[:free])
        if len(pieces) > free:
            rest.append(text[pieces[free - 1][1] if free else 0 :])
    rows = Rows([], [], "".join(rest).strip(), [])
    for at in range(0, reading.chunks * room, room):
        own, worth = ids[at : at + room], weights[at : at + room]
        fill = room - len(own)
        rows.lengths.append(len(own) + 2)
        rows.ids.append([start, *own, end, *[pad] * fill])
        rows.weights.append([1.0, *worth, 1.0, *[1.0] * fill])
    return rows


def weighted(prompt: str) -> list[tuple[str, float]]:
    r"""Runs of a prompt and how much each counts: "a (red:1.3) [dull] (heart)", brackets within brackets.

    A backslash makes the bracket after it a letter. A bracket that is never closed acts to the end.
    """
    runs: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def scale(since: int, factor: float) -> None:
        runs[since:] = [(text, weight * factor) for text, weight in runs[since:]]

    for part in PARTS.finditer(prompt):
        closed = "(" if part["weight"] or part["close"] == ")" else "[" if part["close"] else ""
        if part["open"]:
            opened[part["open"]].append(len(runs))
        elif closed and opened[closed]:
            scale(opened[closed].pop(), float(part["weight"] or BRACKETS[closed]))
        else:
            runs.append((part["plain"] or part[0], 1.0))
    for bracket, factor in BRACKETS.items():
        for since in opened[bracket]:
            scale(since, factor)
    joined: list[tuple[str, float]] = []
    for text, weight in runs:  # neighbors that count the same are one text for the tokenizer
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]
