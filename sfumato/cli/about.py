"""The verb that describes a system: info."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from sfumato.cli.parsing import parse

if TYPE_CHECKING:
    from sfumato.systems.config import StageConfig
    from sfumato.systems.stage import Stage
    from sfumato.systems.system import System

__all__ = ["describe", "info"]


@dataclass(frozen=True, kw_only=True)
class Info:
    """Say what a system consists of, and under which license."""

    system: Positional[Path | None] = None
    """Folder of the system, or a file or folder of another program; by default the one that comes with
    sfumato.
    """
    layout: str | None = None
    """Of another program's file: dit, sit ...; by default found by its tensors."""
    config: Path | None = None
    """JSON file with settings of another program's net that its file does not say."""
    json: bool = False
    """Print JSON."""


def info(args: list[str]) -> int:
    """`sfumato info`."""
    from sfumato.api import load

    flags = parse(Info, "info", args)
    if flags.system is not None and _lacks_system(flags.system):
        return _nets(flags.system, flags)
    system = load(flags.system, layout=flags.layout, config=flags.config)
    if flags.json:
        print(json.dumps(describe(system), indent=1))
    else:
        print("\n".join(_lines(system)))
    return 0


def _lacks_system(path: Path) -> bool:
    """Whether it is a file of networks, of which the settings can be told before there is a system."""
    return path.is_file()


def _nets(path: Path, flags: Info) -> int:
    """Say what networks a file of another program holds, and with which settings they were read."""
    from sfumato.checkpoints.foreign import read_foreign, read_json
    from sfumato.families import ASSEMBLIES
    from sfumato.families.assembly import system_of

    given = {} if flags.config is None else read_json(flags.config)
    found = read_foreign(path, layout=flags.layout, config=given)
    settings = {part: _known(told) for part, told in found.settings.items()}
    system = system_of(found) if found.layouts.get("net") in ASSEMBLIES else None
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in found.nets.items()}
    if flags.json:
        said = {"parameters": counts} if system is None else describe(system)
        print(json.dumps({**said, "layouts": dict(found.layouts), "settings": settings}, indent=1))
        return 0
    lines = [] if system is None else _lines(system)
    for name, told in settings.items():
        lines.append(f"{name:<14}layout {found.layouts[name]}, {counts[name] / 1e6:.2f}M parameters")
        lines += [f"  {setting:<28}{value}" for setting, value in told.items()]
    print("\n".join(lines))
    return 0


def _known(settings: Mapping[str, object]) -> dict[str, object]:
    """Without those that nothing told."""
    return {name: value for name, value in settings.items() if value not in (None, "")}


def describe(system: System) -> dict[str, object]:
    """JSON data: name, license, parameters of every network, settings of every stage."""
    from sfumato.core.config import to_json

    height, width = system.size or (0, 0)
    return {
        **asdict(system.about),
        "fingerprint": system.fingerprint,
        "size": [width, height],
        "parameters": _parameters(system),
        "stages": to_json(system.config)["stages"],
    }


def _parameters(system: System) -> dict[str, int]:
    return {name: sum(p.numel() for p in net.parameters()) for name, net in system.parts.nets.items()}


def _lines(system: System) -> list[str]:
    from sfumato.nets import NETS

    about, counts = system.about, _parameters(system)
    rows = [("system", about.name), ("summary", about.summary), ("license", about.license)]
    rows += [("attribution", about.attribution), ("data", about.data), ("fingerprint", system.fingerprint)]
    if system.size is not None:
        rows.append(("pictures", f"{system.size[1]}x{system.size[0]} pixels"))
    lines = [f"{name:<14}{text}" for name, text in rows if text]
    lines.append(f"networks      {len(counts)}, {sum(counts.values()) / 1e6:.2f}M parameters")
    for name, net in system.parts.nets.items():
        convention = getattr(getattr(net, "config", None), "convention", None)
        whose = f", {convention} convention" if convention else ""
        lines.append(f"  {name:<12}{NETS.tag(net)}, {counts[name] / 1e6:.2f}M parameters{whose}")
    for config, stage in zip(system.config.stages, system.stages, strict=True):
        lines += [f"stage         {config.name}", *(f"  {a:<12}{b}" for a, b in _stage_rows(config, stage))]
    return lines


def _stage_rows(config: StageConfig, stage: Stage) -> list[tuple[str, str]]:
    options = config.defaults
    told = " + ".join(c.kind for c in config.conditioners) or "nothing"
    variance = ", learned variance" if config.learned_var else ""
    return [
        ("network", config.net),
        ("schedule", _short(config.schedule)),
        ("prediction", f"{config.parameterization}{variance}"),
        ("told", told),
        *[("classes", ", ".join(names)) for names in _names(config)],
        ("codec", f"{config.codec.kind}, factor {stage.codec.factor}, sides in multiples of {stage.factor}"),
        ("works on", "x".join(map(str, config.shape))),
        ("sampler", f"{options.sampler}, {options.steps} steps, spacing {options.spacing}"),
        ("guidance", _short(options.guidance)),
    ]


def _names(config: StageConfig) -> list[tuple[str, ...]]:
    """Of the classes, where they have any."""
    return [names for c in config.conditioners if (names := getattr(c, "names", ()))]


def _short(settings: object) -> str:
    """A settings dataclass as "kind, name value" without what is unset."""
    from sfumato.core.config import to_json

    data = to_json(settings)
    kind = str(data.pop("kind"))
    shown = {k: v for k, v in data.items() if v not in (None, False, [], "") and k != "values"}
    return ", ".join([kind, *(f"{k} {v}" for k, v in shown.items())])
