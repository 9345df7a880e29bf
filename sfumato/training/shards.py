"""A state that is spread over processes: how its tensors go to files, and come back to any number of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfumato.core.world import World, whole
from sfumato.training.durable import Entry, entry_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "SHARDS",
    "distribute",
    "gathered",
    "join",
    "like",
    "load_into",
    "read_shards",
    "split",
    "write_shards",
]

SHARDS = "shards"  # folder within a checkpoint
MARK = "sfumato-shard:"  # stands in a state for a tensor that is in the shards, before its name there


def distribute(module: nn.Module, source: nn.Module) -> None:
    """Spread the parameters of a module as those of its source are, in place."""
    theirs = dict(source.named_parameters())
    for name, parameter in list(module.named_parameters()):
        home, _, leaf = name.rpartition(".")
        spread = like(theirs[name], parameter.data)
        module.get_submodule(home)._parameters[leaf] = nn.Parameter(spread, parameter.requires_grad)


def gathered(module: nn.Module) -> nn.Module:
    """A module with whole parameters: itself if it has them, else a copy; all processes must call."""
    parameters = list(module.parameters())
    if not any(_is_sharded(p) for p in parameters):
        return module
    memo: dict[int, Any] = {id(p): nn.Parameter(whole(p.data), p.requires_grad) for p in parameters}
    return copy.deepcopy(module, memo)


def like(target: Tensor, value: Tensor) -> Tensor:
    """A tensor spread as another of its shape is, or whole as that one is."""
    if not _is_sharded(target):
        return whole(value)
    if _is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    # Every process has all of it, so each takes its part and nothing is sent.
    mesh, placements = target.device_mesh, target.placements
    return distribute_tensor(value.to(target.device).contiguous(), mesh, placements, src_data_rank=None)


def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state, spread or whole, into a module that is spread or whole."""
    mine = module.state_dict()
    module.load_state_dict({k: like(mine[k], v) if k in mine else v for k, v in state.items()})


def split(state: object, prefix: str = "") -> tuple[object, dict[str, Tensor]]:
    """A state with marks in the places of sharded tensors, and these by name."""
    if isinstance(state, Tensor) and _is_sharded(state):
        return f"{MARK}{prefix}", {prefix: state}
    if isinstance(state, Mapping):
        pairs = {k: split(v, f"{prefix}/{k}") for k, v in state.items()}
        return {k: plain for k, (plain, _) in pairs.items()}, _merged(pairs.values())
    if isinstance(state, list | tuple):
        items = [split(v, f"{prefix}/{i}") for i, v in enumerate(state)]
        return type(state)(plain for plain, _ in items), _merged(items)
    return state, {}


def join(state: object, shards: Mapping[str, Tensor]) -> object:
    """Inverse of `split`."""
    if isinstance(state, str) and state.startswith(MARK):
        return shards[state.removeprefix(MARK)]
    if isinstance(state, Mapping):
        return {k: join(v, shards) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(join(v, shards) for v in state)
    return state


def write_shards(folder: Path, shards: Mapping[str, Tensor], world: World) -> dict[str, Entry]:
    """Write each process's part of every tensor as a safetensors file of its own; all must call.

    Returns: what every file must be, by its path in `folder`.
    Raises: OSError if one of the processes could not write.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    if not shards:
        return {}
    try:
        dcp.save(
            dict(shards), storage_writer=HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
        )
    except dcp.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((c for c in causes if isinstance(c, OSError)), OSError(str(causes[0]))) from None
    mine = (folder / SHARDS).glob(f"shard-{world.rank + 1:05d}-*")
    entries = {f"{SHARDS}/{path.name}": entry_of(path) for path in sorted(mine)}
    return {name: entry for part in world.gather(entries) for name, entry in part.items()}


def read_shards(folder: Path, mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """The tensors that any number of processes wrote, spread over `mesh`, or whole on the CPU without one.

    Raises: OSError, RuntimeError or ValueError if they cannot be read.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor import empty as empty_shard

    if not (folder / SHARDS).is_dir():
        return {}
    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    shards: dict[str, Tensor] = {}
    for name, about in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(about, TensorStorageMetadata)
        size, dtype = tuple(about.size), about.properties.dtype
        if mesh is None:
            shards[name] = torch.empty(size, dtype=dtype)
        else:
            shards[name] = empty_shard(size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process may read too
        dcp.load(shards, storage_reader=reader, no_dist=mesh is None)
    return shards


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _merged(items: Any) -> dict[str, Tensor]:
    return {name: tensor for _, shards in items for name, tensor in shards.items()}
