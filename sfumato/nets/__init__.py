"""The networks: plain modules `net(x, t, cond)` that know nothing of diffusion mathematics.

`NETS` names them for configs; a module is imported when its tag is first looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn

from sfumato.core.registry import unknown

__all__ = ["NETS", "NetKind", "NetTable"]


class NetKind(NamedTuple):
    """A config dataclass and the module that takes it."""

    config: type[Any]
    net: type[nn.Module]


class NetTable(Mapping[str, NetKind]):
    """Tag -> NetKind from a fixed list of our own modules; nothing that a file says is ever imported.

    Args:
        homes: tag -> (module below sfumato.nets, config class, network class).
    """

    def __init__(self, homes: Mapping[str, tuple[str, str, str]]) -> None:
        self._homes = homes

    def __getitem__(self, tag: str) -> NetKind:
        if tag not in self._homes:
            raise ValueError(unknown("network", tag, list(self._homes)))
        module, config, net = self._homes[tag]
        home = import_module(f"sfumato.nets.{module}")
        return NetKind(getattr(home, config), getattr(home, net))

    def __contains__(self, tag: object) -> bool:
        return tag in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def tag(self, net: nn.Module) -> str:
        """The tag of the class of `net`. Raises: ValueError if the table has no such class."""
        for tag, (module, _, name) in self._homes.items():
            if (type(net).__module__, type(net).__qualname__) == (f"sfumato.nets.{module}", name):
                return tag
        raise ValueError(f"no tag for network {type(net).__name__}: list it in sfumato.nets.NETS to save it")


NETS = NetTable(
    {
        "autoencoder": ("autoencoder", "AutoencoderConfig", "Autoencoder"),
        "class_map": ("told", "ClassMapConfig", "ClassMap"),
        "class_token": ("told", "ClassTokenConfig", "ClassToken"),
        "clip": ("clip", "CLIPConfig", "CLIP"),
        "clip_text": ("clip", "CLIPTextConfig", "CLIPText"),
        "clip_vision": ("clip", "CLIPVisionConfig", "CLIPVision"),
        "controlnet": ("controlnet", "ControlNetConfig", "ControlNet"),
        "discriminator": ("discriminator", "DiscriminatorConfig", "Discriminator"),
        "dit": ("dit", "DiTConfig", "DiT"),
        "edm2": ("edm2", "EDM2Config", "EDM2"),
        "embedding_moments": ("clip", "EmbeddingMomentsConfig", "EmbeddingMoments"),
        "last_step": ("unclip", "LastStepConfig", "LastStep"),
        "mlp": ("mlp", "MLPConfig", "MLP"),
        "noised_text": ("noised_clip", "NoisedTextConfig", "NoisedText"),
        "noised_vision": ("noised_clip", "NoisedVisionConfig", "NoisedVision"),
        "noisy_classifier": ("classifier", "NoisyClassifierConfig", "NoisyClassifier"),
        "null_image": ("unclip", "NullImageConfig", "NullImage"),
        "perceptual": ("perceptual", "PerceptualConfig", "PerceptualNet"),
        "perceptual_squeeze": ("perceptual", "SqueezeConfig", "SqueezePerceptualNet"),
        "prior": ("prior", "PriorConfig", "Prior"),
        "t2i_adapter": ("t2i_adapter", "T2IAdapterConfig", "T2IAdapter"),
        "t5": ("t5", "T5Config", "T5Encoder"),
        "text_transformer": ("text", "TextTransformerConfig", "TextTransformer"),
        "token_prior": ("token_prior", "TokenPriorConfig", "TokenPrior"),
        "unet": ("unet", "UNetConfig", "UNet"),
    }
)
