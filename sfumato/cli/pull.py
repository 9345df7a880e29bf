"""The verb that fetches from the model hub: pull."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from sfumato.cli.parsing import parse

__all__ = ["pull"]


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Fetch a system from the model hub into the hub's cache; ORG/NAME stands for it from then on.

    Prints the folder, and the SHA-256 of each file of weights.
    """

    name: Positional[str]
    """ORG/NAME, or ORG/NAME@REVISION: a branch, tag or commit."""
    variant: Literal["fp16"] | None = None
    """Take half precision where a net has it."""


def pull(args: list[str]) -> int:
    """`sfumato pull`."""
    from sfumato.checkpoints.pulling import pull as fetch

    flags = parse(Pull, "pull", args)
    pulled = fetch(flags.name, flags.variant)
    print(pulled.folder)
    for file, digest in pulled.weights.items():
        print(f"{digest}  {file}")
    return 0
