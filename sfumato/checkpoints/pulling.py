"""From the model hub into its cache: those files of a repository that `load` reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, cast

from sfumato.checkpoints.files import sha256
from sfumato.checkpoints.foreign import CONFIG, INDEX, SHARDED, WEIGHTS, read_json
from sfumato.checkpoints.hub import REPOSITORY, hub_cache
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.checkpoints.native import CARD, MANIFEST

__all__ = ["Pulled", "pull", "wanted"]

Variant = Literal["fp16"]
TENSORS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Pulled:
    """What was fetched.

    Attributes:
        folder: of the revision in the hub's cache.
        weights: name of each file of weights -> its SHA-256.
    """

    folder: Path
    weights: Mapping[str, str]


def pull(name: str, variant: Variant | None = None) -> Pulled:
    """Fetch a repository, or what is missing of it.

    Args:
        name: ORG/NAME, or ORG/NAME@REVISION, which is a branch, tag or commit.
        variant: take half precision where a net has it.

    Raises: ValueError in one line if huggingface_hub is missing, the hub cannot be reached or refuses, there
        is no such repository, revision or variant, sfumato reads nothing of it, or a file came damaged.
    """
    match = REPOSITORY.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} names no repository of the model hub; expected ORG/NAME or ORG/NAME@REVISION"
        )
    repository, revision, cache = match[1], match[2] or "main", hub_cache()
    hub = _hub()
    with _told(repository, revision):
        found = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
        files = {one.rfilename: one.lfs.sha256 if one.lfs else None for one in found.siblings or ()}

        def read(file: str) -> Mapping[str, object]:
            return read_json(Path(hub.hf_hub_download(repository, file, revision=found.sha, cache_dir=cache)))

        chosen = wanted(files, read, variant, where=name)
        folder = Path(
            hub.snapshot_download(repository, revision=revision, allow_patterns=chosen, cache_dir=cache)
        )
    weights = {file: sha256(folder / file) for file in chosen if file.endswith(TENSORS)}
    for file, digest in weights.items():
        if files[file] not in (None, digest):
            raise ValueError(
                f"{folder / file} has SHA-256 {digest}, and the hub says {files[file]}: it came damaged; "
                "remove it and pull again"
            )
    return Pulled(folder, weights)


def wanted(
    files: Collection[str],
    read: Callable[[str], Mapping[str, object]],
    variant: Variant | None,
    *,
    where: str,
) -> list[str]:
    """The files of a repository that `load` reads.

    Args:
        files: all names in it.
        read: makes a JSON object of one of them.
        where: the repository, for errors.

    Raises: ValueError if there are none, or none of the variant.
    """
    if MANIFEST in files:
        chosen = [n for n in files if "/" not in n and (n.endswith((".json", ".safetensors")) or n == CARD)]
    elif INDEX in files:
        chosen = [INDEX]
        for part in _parts(read(INDEX)):
            inside = any(n.startswith(f"{part}/") for n in files)  # the oldest pipelines have no subfolders
            chosen += _folder(files, f"{part}/" if inside else "", variant)
    elif CONFIG in files:
        chosen = _folder(files, "", variant)
    else:
        raise ValueError(f"{where} holds nothing that sfumato loads: no {MANIFEST}, {INDEX} or {CONFIG}")
    weights = [n for n in chosen if n.endswith(TENSORS)]
    if not weights:
        raise ValueError(f"{where} holds no weights that sfumato loads: no {WEIGHTS[0]}.safetensors")
    if variant and not any(f".{variant}" in n for n in weights):
        raise ValueError(f"{where} holds no weights of variant {variant}; leave out --variant")
    return sorted(set(chosen))


def _parts(index: Mapping[str, object]) -> Iterator[str]:
    """The parts of a pipeline that `read_foreign` reads, too."""
    classes = {kind.diffusers for kind in LAYOUTS.values()} - {""}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[-1] is None:
            continue
        if name.endswith("scheduler") or name.startswith("tokenizer") or str(entry[-1]) in classes:
            yield name


def _folder(files: Collection[str], prefix: str, variant: Variant | None) -> list[str]:
    """Settings, vocabulary and one set of weights of a folder."""
    inside = [n.removeprefix(prefix) for n in files if n.startswith(prefix)]
    inside = [n for n in inside if "/" not in n]
    texts = [n for n in inside if n.endswith((".json", ".txt")) and ".index." not in n]
    full, half = (_weights(inside, half) for half in (False, True))
    return [f"{prefix}{n}" for n in (*texts, *((half or full) if variant else (full or half)))]


def _weights(inside: Collection[str], half: bool) -> list[str]:
    """A file, or shards with their list, in the order in which a folder is read."""
    for stem in WEIGHTS:
        for ending in SHARDED:
            index = f"{stem}.safetensors.{ending}"
            if index in inside and ("fp16" in ending) == half:
                shards = [n for n in inside if n.startswith(stem) and "-of-" in n and n.endswith(TENSORS[0])]
                return [index, *(n for n in shards if ("fp16" in n) == half)]
        for ending in TENSORS:
            if (file := f"{stem}.fp16{ending}" if half else f"{stem}{ending}") in inside:
                return [file]
    return []


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            'fetching from the model hub needs the package huggingface_hub: run pip install "sfumato[hub]"'
        ) from None
    return huggingface_hub


@contextmanager
def _told(repository: str, revision: str) -> Iterator[None]:
    """What goes wrong with the hub, in one line."""
    from huggingface_hub import errors

    # The base of all errors of the client for HTTP, which is not the same in all versions.
    client = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise ValueError("the model hub is switched off by HF_HUB_OFFLINE; unset it to pull") from None
    except errors.GatedRepoError:
        raise ValueError(
            f"{repository} is gated: accept its terms on its page, then log in with: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(
            f"{repository} has no revision {revision}; allowed: a branch, tag or commit"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if isinstance(error, errors.RepositoryNotFoundError) or status == 401:  # what is private is hidden so
            raise ValueError(
                f"the model hub has no repository {repository}, or it is private; check the name, or log in "
                "with: hf auth login"
            ) from None
        do = "check the login: hf auth login" if status == 403 else "try again later"
        raise ValueError(f"the model hub does not give {repository} (status {status}); {do}") from None
    except (client, OSError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the model hub cannot be reached for {repository}: {said[:200]}") from None
