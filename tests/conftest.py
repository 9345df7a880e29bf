"""What holds for every test: no network, one thread, seeded, and the same examples on every run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: pytest-xdist already keeps every core busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that asks a hub for a file must fail here as it would on a machine without a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Commands that tests start must not color or wrap what the tests read.
os.environ.update(NO_COLOR="1", COLUMNS="120")

# No deadline: a loaded machine is slow, not wrong. Derandomized: a failure is there again on the next run.
settings.register_profile(
    "sfumato", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("sfumato")

ROOT = Path(__file__).resolve().parent.parent
LOCAL = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds pyproject.toml."""
    return ROOT


@pytest.fixture
def in_two(repository: Path) -> Callable[..., list[tuple[int, str, str]]]:
    """Runs a Python program in two processes, as torchrun would: exit code, output and errors of each."""

    def run(*args: object) -> list[tuple[int, str, str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "PYTHONWARNINGS": "ignore",
        }
        started = [
            subprocess.Popen(
                [sys.executable, *map(str, args)],
                env={**os.environ, **shared, "RANK": str(i), "PYTHONPATH": str(repository)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        said = [process.communicate(timeout=300) for process in started]
        return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]

    return run


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
            raise RuntimeError(f"tests must not use the network, and this one connects to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test draws the same numbers whatever ran before it, and leaves the default dtype as it was."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def tiny_system() -> object:
    """A latent text-to-image system of a few thousand parameters with random weights; pictures are 16x16."""
    import torch

    from sfumato.checkpoints.native import Parts
    from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig
    from sfumato.nets.dit import DiT, DiTConfig
    from sfumato.nets.text import TextTransformer, TextTransformerConfig
    from sfumato.systems.conditioning import TokenTextConfig
    from sfumato.systems.config import About, LatentsConfig, StageConfig, SystemConfig
    from sfumato.systems.options import SampleOptions
    from sfumato.systems.system import assemble
    from sfumato.text.tokenizers import Tokenizer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        captions = ["red heart", "blue heart", "woman astronaut", "man firefighter dark skin tone"]
        tokenizer = Tokenizer.train(captions, vocab_size=80, context=8)
        autoencoder = Autoencoder(
            AutoencoderConfig(channels=8, mults=(1, 2), blocks=1, mid_attention=False, norm_groups=4)
        )
        text = TextTransformer(
            TextTransformerConfig(vocab_size=tokenizer.vocab_size, context=8, width=16, depth=1, heads=2)
        )
        dit = DiT(DiTConfig(width=32, depth=2, heads=2, text_dim=16, pooled_dim=16))
        for p in dit.parameters():  # a fresh DiT says zero whatever it is told
            torch.nn.init.normal_(p, std=0.15)
    from sfumato.diffusion.guidance import CFG
    from sfumato.diffusion.schedules import Flow

    stage = StageConfig(
        schedule=Flow(multiplier=1000.0),
        parameterization="flow",
        conditioners=(TokenTextConfig(),),
        codec=LatentsConfig(std=(0.5,)),
        shape=(4, 8, 8),
        defaults=SampleOptions(sampler="euler", steps=4, guidance=CFG(2.0)),
    )
    parts = Parts({"denoiser": dit, "text": text, "autoencoder": autoencoder}, {"text": tokenizer})
    about = About(name="tiny", summary="Random weights for tests.", license="CC0-1.0", data="none")
    return assemble(SystemConfig(stages=(stage,)), parts, about=about)


@pytest.fixture(scope="session")
def tiny_folder(tiny_system: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny system as a checkpoint; copy it before changing anything."""
    from sfumato.systems.system import save_system

    path = tmp_path_factory.mktemp("tiny") / "system"
    save_system(tiny_system, path)
    return path
