"""Text-to-image diffusion: one small core for every classic system, and one of them trained and bundled.

`import sfumato` costs milliseconds: a public name, and torch with it, is fetched on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfumato.api import cascade, generate, guided, load, load_nets, save, save_nets, train
    from sfumato.core.types import Inputs, Reading
    from sfumato.systems.system import System

__all__ = [
    "Inputs",
    "Reading",
    "System",
    "__version__",
    "cascade",
    "generate",
    "guided",
    "load",
    "load_nets",
    "save",
    "save_nets",
    "train",
]

__version__ = "0.1.0"

_HOMES = {
    "Inputs": "sfumato.core.types",
    "Reading": "sfumato.core.types",
    "System": "sfumato.systems.system",
    "cascade": "sfumato.api",
    "generate": "sfumato.api",
    "guided": "sfumato.api",
    "load": "sfumato.api",
    "load_nets": "sfumato.api",
    "save": "sfumato.api",
    "save_nets": "sfumato.api",
    "train": "sfumato.api",
}


def __getattr__(name: str) -> object:
    """A public name, imported on first use and then kept (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
