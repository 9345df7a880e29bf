"""Networks from files of other programs, and back: which layout it is, the nets by part, their settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.checkpoints.files import COPY_AGAIN, read_safetensors, read_weights, write_safetensors
from sfumato.checkpoints.kinds import looks_like
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.checkpoints.layouts.layout import Part, Settings
from sfumato.checkpoints.native import staging
from sfumato.checkpoints.weights import assign, floating, parameter_free
from sfumato.text.bert import bert_tokenizer
from sfumato.text.clip import clip_tokenizer, clip_vocabulary
from sfumato.text.glide import glide_tokenizer
from sfumato.text.t5 import t5_tokenizer
from sfumato.text.tokenizers import Tokenizer

__all__ = ["CONFIG", "INDEX", "Foreign", "read_foreign", "read_json", "read_text", "write_nets"]

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS = ("diffusion_pytorch_model", "model")  # names of weights in a diffusers folder, without their ending
SHARDED = ("index.json", "index.fp16.json", "fp16.index.json")  # endings of lists of shards
# Folders of a pipeline whose net is "net" or "vae"; of other folders it has the folder's name.
DENOISERS, FIRST_STAGES = ("unet", "transformer", "decoder"), ("vae", "vqvae")
WRITTEN = (".pt", ".safetensors")
AVERAGES = "model_ema."  # what latent diffusion keeps beside the net, names without dots
AVERAGED = f"{AVERAGES}diffusion_model"
INSIDE = ("ema", "model", "state_dict")  # where training checkpoints keep the net, the best first
TOLERANCE = 2e-3  # of constants: files in half precision hold them rounded


@dataclass(frozen=True)
class Foreign:
    """What a file or folder of another program held.

    Attributes:
        nets: by part: "net" is the denoiser, "vae" the first stage.
        layouts: name of the layout, by part.
        settings: by part, in the names of the reference's constructor.
        extras: other JSON files of a diffusers folder by their subfolder ("scheduler"), and its
            model_index.json as "".
        tokenizers: of a diffusers folder by their subfolder.
    """

    nets: Mapping[str, nn.Module]
    layouts: Mapping[str, str]
    settings: Mapping[str, Settings]
    extras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizers: Mapping[str, Tokenizer] = field(default_factory=dict)

    def __add__(self, other: Foreign) -> Foreign:
        """The parts of both; of a part that both have, the other's."""
        return Foreign(
            {**self.nets, **other.nets},
            {**self.layouts, **other.layouts},
            {**self.settings, **other.settings},
            {**self.extras, **other.extras},
            {**self.tokenizers, **other.tokenizers},
        )

    def named(self, name: str) -> Foreign:
        """The same one part under another name."""
        (old,) = self.nets
        return Foreign({name: self.nets[old]}, {name: self.layouts[old]}, {name: self.settings[old]})


def read_foreign(
    path: str | Path,
    *,
    layout: str | None = None,
    config: Settings | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Foreign:
    """Read a weights file, a folder of one diffusers model, or a whole diffusers pipeline.

    Args:
        layout: a name in LAYOUTS; None, or "diffusers" = the first whose marks the tensors have.
        config: settings of the net in the reference's own names, beyond what the file says of itself.
        dtype: in which matrix and convolution weights are held; see `floating`.

    Raises: ValueError in one line naming the file, what was expected and what was found.
    """
    path = Path(path)
    if layout == "diffusers":
        layout = None  # which of its classes it is, the folder or the tensors say
    if layout is not None:
        LAYOUTS[layout]
    if (path / INDEX).is_file():
        found = _read_pipeline(path, config or {})
    elif (path / CONFIG).is_file():
        found = _read_folder(path, layout, config or {})
    elif path.is_dir():
        raise ValueError(
            f"{path} has no system.json, {INDEX} or {CONFIG}; give a system, a model or a weights file"
        )
    else:
        state, given = _unwrapped(path)
        found = _read_state(state, layout, given | dict(config or {}), path)
        found += Foreign({}, {}, {}, {}, _vocabulary(path.parent, found))
    for net in found.nets.values():
        assign(net, floating(net, net.state_dict(), dtype), where=str(path))
        net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        net.eval()
    return found


def read_text(path: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> Foreign:
    """The text encoder "text_encoder" and the tokenizer "tokenizer" of a pipeline, or of a folder of both.

    Raises: ValueError in one line if there is no T5 encoder.
    """
    path = Path(path)
    home, words = path / "text_encoder", path / "tokenizer"
    home, words = home if home.is_dir() else path, words if words.is_dir() else path
    found = read_foreign(home, layout="t5", device=device, dtype=dtype)
    return found + Foreign({}, {}, {}, {}, {"tokenizer": t5_tokenizer(words)})


def write_nets(
    nets: Mapping[str, nn.Module],
    path: str | Path,
    layout: str,
    *,
    extra: Settings | None = None,
    dtype: torch.dtype | None = None,
) -> Settings:
    """Write the nets of a layout as a file, or as a folder with config.json where it is a diffusers class.

    Args:
        nets: by any name; which part of the layout they are is told by their class.
        path: a .pt or .safetensors file, or the folder.
        extra: settings that the nets do not know, such as input_size.
        dtype: of the stored floating tensors; None keeps each tensor's own.

    Returns: the settings of what was written, in the reference's names.
    Raises: ValueError if the layout has no place for a net or lacks one, or its class would compute
        something else.
    """
    path, kind = Path(path), LAYOUTS[layout]
    state: dict[str, Tensor] = {}
    settings: dict[str, object] = {}
    for part, net in _placed(nets, layout):
        ours: Any = net.config
        told = part.published(ours, extra or {})
        tensors = part.rows(ours, told).save(net.state_dict(), where=type(net).__name__)
        state |= {part.prefix + name: v for name, v in (tensors | part.constants(told)).items()}
        settings |= told
    if not kind.diffusers and path.suffix not in WRITTEN:
        allowed = ", ".join(WRITTEN)
        raise ValueError(f"{path}: unknown ending {path.suffix!r}; allowed for layout {layout!r}: {allowed}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging(path) as new:
            file = new / path.name
            if kind.diffusers:
                path.mkdir(exist_ok=True)
                hub = kind.library == "transformers"
                named = {"architectures": [kind.diffusers]} if hub else {"_class_name": kind.diffusers}
                (new / CONFIG).write_text(json.dumps({**named, **settings}, indent=2) + "\n", "utf-8")
                file = new / f"{WEIGHTS[hub]}.safetensors"
            if path.suffix == ".pt" and not kind.diffusers:
                torch.save({name: _stored(v, dtype) for name, v in state.items()}, file)
            else:
                write_safetensors(file, state, dtype)
            for one in sorted(new.iterdir()):  # each whole, or as it was
                os.replace(one, path / one.name if kind.diffusers else path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    return settings


def _placed(nets: Mapping[str, nn.Module], layout: str) -> list[tuple[Part[Any], nn.Module]]:
    """Every part of the layout with its net."""
    parts = LAYOUTS[layout].parts
    classes = [part.build for part in parts if isinstance(part.build, type)]
    if len(set(classes)) < len(classes) and {part.name for part in parts} == set(nets):
        return [(part, nets[part.name]) for part in parts]
    for net in nets.values():
        if not isinstance(net, tuple(classes)):
            raise ValueError(f"layout {layout!r} has no place for a {type(net).__name__}")
    placed = [
        (part, net)
        for part in parts
        for name, net in nets.items()
        if isinstance(part.build, type)
        and isinstance(net, part.build)
        and (name == part.name or sum(other.build is part.build for other in parts) == 1)
    ]
    if len(placed) != len(parts) or len(nets) != len(parts):
        names, got = ", ".join(part.name for part in parts), ", ".join(nets) or "no network"
        raise ValueError(f"a file of layout {layout!r} holds {names} together; got {got}")
    return placed


def _stored(v: Tensor, dtype: torch.dtype | None) -> Tensor:
    v = v.detach().to("cpu", dtype if v.is_floating_point() else None)
    return v.clone(memory_format=torch.contiguous_format)  # a view would be written with all that it shows


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: ValueError in one line if it is none."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {COPY_AGAIN}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected a JSON object")
    return data


def _read_pipeline(path: Path, config: Settings) -> Foreign:
    """Every model of a diffusers pipeline whose class a layout has; the config goes to the denoiser."""
    index = read_json(path / INDEX)
    found = Foreign({}, {}, {}, {"": index})
    for name, entry in index.items():
        home = path / name if (path / name).is_dir() else path  # the oldest pipelines have no subfolders
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        if home == path and not (path / {"unet": CONFIG, "scheduler": SCHEDULER}.get(name, " ")).is_file():
            continue
        if name.endswith("scheduler") or (path / name / SCHEDULER).is_file():
            found += Foreign({}, {}, {}, {name: read_json(home / SCHEDULER)})
        elif name.startswith("tokenizer") and str(entry[1]).startswith("CLIPTokenizer"):
            found += Foreign({}, {}, {}, {}, {name: clip_tokenizer(path / name)})
        elif name.startswith("tokenizer") and str(entry[1]).startswith("T5Tokenizer"):
            found += Foreign({}, {}, {}, {}, {name: t5_tokenizer(path / name)})
        elif _of_class(str(entry[1])) is not None:
            part = _read_folder(home, None, config if name in DENOISERS else {})
            found += part if name in (*DENOISERS, *FIRST_STAGES) else part.named(name)
    if not found.nets:
        classes = [kind.diffusers for kind in LAYOUTS.values() if kind.diffusers]
        raise ValueError(f"{path / INDEX} names no model that sfumato reads; it reads {', '.join(classes)}")
    return found


def _read_folder(path: Path, layout: str | None, config: Settings) -> Foreign:
    told = read_json(path / CONFIG)
    name = str(told.get("_class_name") or (told.get("architectures") or [""])[0])
    layout = layout or _of_class(name)
    if layout is None:
        classes = [kind.diffusers for kind in LAYOUTS.values() if kind.diffusers]
        raise ValueError(f"{path / CONFIG}: class {name!r} is unknown; sfumato reads {', '.join(classes)}")
    state = _folder_weights(path)
    layout = _of_class(LAYOUTS[layout].diffusers, state) or layout
    known = LAYOUTS[layout].parts[0].known
    given = {k: v for k, v in told.items() if k in known} | dict(config)
    return _read_state(state, layout, given, path)


def _of_class(name: str, state: Mapping[str, Tensor] | None = None) -> str | None:
    """A layout of a class that folders name; of several the one that the tensors have."""
    kinds = [layout for layout, kind in LAYOUTS.items() if kind.diffusers == name]
    shapes = {n: tuple(v.shape) for n, v in (state or {}).items()}
    return next((kind for kind in kinds if LAYOUTS[kind].fits(shapes)), kinds[0] if kinds else None)


def _folder_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a diffusers folder, in one file or in shards; half precision if there is no other."""
    for stem in WEIGHTS:
        for index in (path / f"{stem}.safetensors.{name}" for name in SHARDED):
            if index.is_file():
                shards = sorted({path / Path(name).name for name in read_json(index)["weight_map"].values()})
                return {k: v for shard in shards for k, v in read_safetensors(shard).items()}
        for ending in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"):
            if (path / f"{stem}{ending}").is_file():
                return _tensors(read_weights(path / f"{stem}{ending}"), path)
    raise ValueError(f"{path} has a {CONFIG} but no {WEIGHTS[0]}.safetensors; {COPY_AGAIN}")


def _vocabulary(folder: Path, found: Foreign) -> dict[str, Tokenizer]:
    """The tokenizers of a file with text towers: a vocabulary beside it, or that of an installed package."""
    kind, places = LAYOUTS[next(iter(found.layouts.values()))], [folder / "tokenizer", folder]
    told: Any = found.settings.get("text")
    if kind.vocabulary == "gpt2":
        gpt2 = glide_tokenizer(Path(told["tokenizer"]) if told["tokenizer"] else places, told["text_ctx"])
        return {} if gpt2 is None else {"tokenizer": gpt2}
    if kind.vocabulary == "bert":
        bert = bert_tokenizer(places, told["max_seq_len"])
        return {} if bert is None else {"tokenizer": bert}
    length: Any = found.settings["clip_text"]["max_text_len"] if kind.vocabulary == "clip" else None
    pads = kind.pads or ({"tokenizer": ""} if kind.vocabulary == "clip" else {})
    place = clip_vocabulary(places) if pads else None
    return {} if place is None else {name: clip_tokenizer(place, pad, length) for name, pad in pads.items()}


def _unwrapped(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors of a weights file, and what the arguments of its training say of the net.

    A training checkpoint has the net inside, and its average, which is what one draws with.
    """
    content = read_weights(path)
    inside = next((content[name] for name in INSIDE if isinstance(content.get(name), Mapping)), None)
    if inside is None:
        return _tensors(content, path), {}
    assert isinstance(inside, Mapping)
    model = getattr(content.get("args"), "model", None)
    return _tensors(inside, path), {"model": model} if isinstance(model, str) and "/" in model else {}


def _tensors(content: Mapping[str, object], path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, v in content.items():
        if not isinstance(v, Tensor):
            hint = looks_like(content) or "expected names of tensors"
            raise ValueError(f"{path}: {name!r} is a {type(v).__name__}; {hint}")
        state[name] = v
    return state


def _read_state(state: Mapping[str, Tensor], layout: str | None, config: Settings, path: Path) -> Foreign:
    """The nets of a state whose parameters are still as the file has them."""
    name = _layout(state, layout, path)
    kind = LAYOUTS[name]
    marked = {k: v for mark, said in kind.markers.items() if mark in state for k, v in said.items()}
    config = {**kind.files.get(path.stem, {}), **marked, **config}
    averages = config.get("use_ema", kind.averages and any(n.startswith(AVERAGED) for n in state))
    config = {k: v for k, v in config.items() if k != "use_ema"}
    found = Foreign({}, {}, {}, kind.beside(state))
    prefixed = any(n.startswith(part.prefix) for part in kind.parts for n in state)
    for part in kind.parts if prefixed else [replace(part, prefix="") for part in kind.parts]:
        own = {n.removeprefix(part.prefix): v for n, v in state.items() if n.startswith(part.prefix)}
        if averages and part.name == "net":
            own = {n: _average(state, part.prefix + n, path) for n in own}
        own = {part.renamed(n): v for n, v in own.items()}
        of_all = part.name == "net" or len(kind.parts) == 1
        given = config if of_all else {k: v for k, v in config.items() if k in part.known}
        net, settings = _read_part(part, own, given, path)
        found += Foreign({part.name: net}, {part.name: name}, {part.name: settings})
    return found


def _average(state: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    """The running average of a parameter. Raises: ValueError if the file has none."""
    short = AVERAGES + name.removeprefix("model.").replace(".", "")
    if short not in state:
        raise ValueError(f"{path} has no averages of its net (no tensor {short!r}); leave out use_ema")
    return state[short]


def _read_part(
    part: Part[Any], state: Mapping[str, Tensor], given: Settings, path: Path
) -> tuple[nn.Module, Settings]:
    shapes = {name: tuple(v.shape) for name, v in state.items()}
    try:
        settings = part.settings(shapes, given)
        config = part.config(settings)
        net = parameter_free(part.build, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    constants = part.constants(settings)
    for name, expected in constants.items():
        found = state.get(name)
        if found is not None and (
            found.shape != expected.shape
            or not (found.is_meta or torch.allclose(found.float(), expected, rtol=0, atol=TOLERANCE))
        ):
            raise ValueError(
                f"{path}: {name!r} is not the fixed table that this layout has there; it was trained"
            )
    rest = {name: v for name, v in state.items() if name not in constants}
    assign(net, part.rows(config, settings).load(rest, where=str(path)), where=str(path))
    return net, settings


def _layout(state: Mapping[str, Tensor], wanted: str | None, path: Path) -> str:
    """The layout, or the kind of it that the tensors have: "adm" is also an "adm-classifier"."""
    shapes = {name: tuple(v.shape) for name, v in state.items()}
    if wanted is not None:
        kinds = [n for n, kind in LAYOUTS.items() if n.startswith(f"{wanted}-") and not kind.diffusers]
        return next((n for n in (wanted, *kinds) if LAYOUTS[n].fits(shapes)), wanted)
    for name, kind in LAYOUTS.items():
        if kind.fits(shapes):
            return name
    first = ", ".join(map(repr, list(state)[:2])) or "none"
    hint = looks_like(state) or f"allowed: {', '.join(LAYOUTS)}"
    raise ValueError(f"{path}: its tensors ({first}, ...) are of no known layout; {hint}")
