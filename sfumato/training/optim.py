"""Optimizers of a phase: parameter roles, learning rates over images, clipping, the finite check."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sfumato.core.registry import Registry
from sfumato.core.world import whole
from sfumato.nets.tags import Role, parts_of, role_of_layer
from sfumato.training.muon import Muon
from sfumato.training.shards import like
from sfumato.training.torch_optim import Option, check_options, optimizer_class, takes_decay

__all__ = ["LR_SCHEDULES", "OptimConfig", "PhaseOptimizer", "Trained", "lr_factor", "roles"]

LrSchedule = Callable[["OptimConfig", int, int], float]  # images seen, images of the run
LR_SCHEDULES: Registry[LrSchedule] = Registry("learning-rate schedule")
CLIP_EPS = 1e-6  # that torch adds to a norm before it divides by it
MIN_SIDE = (
    32  # channels below which a weight counts as the edge of a net (pixels, latents, logits), not as hidden
)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How one phase is optimised.

    Attributes:
        kind: "adamw"; "muon", which is Muon for hidden matrices and AdamW for all else; or the name of any
            optimizer of torch that needs no closure ("sgd", "radam", "adafactor"); upper or lower case.
        lr: peak learning rate, but for what Muon moves.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of matrices and edges, see `nets.tags`; nothing else decays.
        muon_lr: peak learning rate of Muon.
        momentum: of Muon.
        options: of an optimizer of torch, under the names that torch gives them.
        lr_schedule: "constant", "cosine", "inverse_sqrt", or "wsd" (warm-up, stable, linear decay).
        warmup: images over which the learning rate rises linearly.
        final: share of the peak at which "cosine" and "wsd" end, and below which "inverse_sqrt" never falls.
        decay: share of the run over which "wsd" decays.
        hold: images until "inverse_sqrt" begins to fall; 0 = the warm-up.
        clip: largest gradient norm of the phase; 0 = no clipping.

    Raises: ValueError in one line for an impossible value, or an optimizer or an option that torch lacks.
    """

    kind: str = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    muon_lr: float = 0.01
    momentum: float = 0.95
    options: Mapping[str, Option] = field(default_factory=dict)
    lr_schedule: Literal["constant", "cosine", "inverse_sqrt", "wsd"] = "cosine"
    warmup: int = 0
    final: float = 0.0
    decay: float = 0.2
    hold: int = 0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.muon_lr <= 0:
            raise ValueError(f"lr is {self.lr} and muon_lr {self.muon_lr}; both must be positive")
        if self.warmup < 0 or self.hold < 0 or not 0 < self.decay <= 1 or not 0 <= self.final <= 1:
            raise ValueError(
                f"warmup {self.warmup}, hold {self.hold}, decay {self.decay}, final {self.final}: warmup and "
                "hold must be 0 images or more, decay in (0, 1], final in [0, 1]"
            )
        if self.lr_schedule == "inverse_sqrt" and not (self.hold or self.warmup):
            raise ValueError("hold and warmup are 0; one must be positive for lr_schedule inverse_sqrt")
        if not self.builtin:
            check_options(self.kind, self.options, self.weight_decay)
        elif self.options:
            raise ValueError(
                f"options {dict(self.options)} are for torch's optimizers; {self.kind} is set by "
                "optim.betas, optim.eps, optim.muon_lr and optim.momentum"
            )

    @property
    def builtin(self) -> bool:
        """Whether the optimizer is one that this package sets up, and not torch's by name."""
        return self.kind.lower() in ("adamw", "muon")


@LR_SCHEDULES("constant")
def constant(config: OptimConfig, images: int, total: int) -> float:
    """1 throughout."""
    return 1.0


@LR_SCHEDULES("cosine")
def cosine(config: OptimConfig, images: int, total: int) -> float:
    """Half a cosine from 1 to `final` (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    progress = min(1.0, images / total)
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress))


@LR_SCHEDULES("inverse_sqrt")
def inverse_sqrt(config: OptimConfig, images: int, total: int) -> float:
    """1 until `hold`, then sqrt(hold / images); it does not depend on the length of the run.

    Vaswani et al. 2017 (arXiv:1706.03762, eq. 3) begin to fall where the warm-up ends, Karras et al. 2024
    (arXiv:2312.02696) long after it.
    """
    hold = config.hold or config.warmup
    return max(config.final, math.sqrt(hold / max(images, hold)))


@LR_SCHEDULES("wsd")
def wsd(config: OptimConfig, images: int, total: int) -> float:
    """1, then linear to `final` over the last `decay` of the run (Hu et al. 2024, arXiv:2404.06395)."""
    left = 1 - min(1.0, images / total)
    return 1.0 - (1 - config.final) * max(0.0, 1 - left / config.decay)


def lr_factor(config: OptimConfig, before: int, after: int, total: int) -> float:
    """Share of the peak learning rate for the step from `before` to `after` images of `total`.

    The rise and the schedule multiply, so that no schedule needs to know of the warm-up. The rise is taken
    at the end of the step and the schedule at its start: neither the first nor the last step is wasted on
    a rate of zero.
    """
    rise = min(1.0, after / config.warmup) if config.warmup else 1.0
    return rise * LR_SCHEDULES[config.lr_schedule](config, before, total)


class Trained(NamedTuple):
    """What the optimizer knows of a parameter.

    Attributes:
        role: see `nets.tags`.
        parts: matrices of equal size that lie upon each other in it.
    """

    role: Role
    parts: int


def roles(modules: Iterable[nn.Module]) -> dict[nn.Parameter, Trained]:
    """Every parameter that requires a gradient, each once, in the modules' own order.

    Without a tag, weights of linear and convolutional layers are matrices, or edges if they have fewer than
    32 channels on one side; other parameters of two or more axes are embeddings; the rest are vectors.
    """
    table: dict[nn.Parameter, Trained] = {}
    for root in modules:
        for module in root.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    table.setdefault(parameter, Trained(_role(module, parameter), parts_of(module)))
    return table


def _role(module: nn.Module, parameter: Tensor) -> Role:
    if parameter.ndim < 2:
        return "vector"
    if (tag := role_of_layer(module)) is not None:
        return tag
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return "matrix" if min(parameter.shape[:2]) >= MIN_SIDE else "edge"
    return "embedding"


class PhaseOptimizer:
    """The optimizers of one phase behind one step.

    Weight decay acts on matrices and edges only.

    Args:
        modules: what the phase trains.
        config: see OptimConfig.
    """

    def __init__(self, modules: Sequence[nn.Module], config: OptimConfig) -> None:
        self.config = config
        table = roles(modules)
        if not table:
            raise ValueError("a phase of the task has no parameter to train")
        self.parameters = list(table)
        muon = config.kind.lower() == "muon"
        hidden = {p: t.parts for p, t in table.items() if muon and t.role == "matrix"}
        rest = [(p, t.role in ("matrix", "edge")) for p, t in table.items() if p not in hidden]
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = []
        if rest:
            make = _adamw if config.builtin else _by_name
            self._optimizers.append((make(_groups(rest, config), config), config.lr))
        if hidden:
            decay = config.weight_decay
            self._optimizers.append(
                (Muon(hidden, config.muon_lr, momentum=config.momentum, weight_decay=decay), config.muon_lr)
            )

    def backward(self, loss: Tensor) -> None:
        """Gradients of this phase's parameters alone: no other module's `grad` is touched."""
        torch.autograd.backward(loss, inputs=self.parameters)

    def clip(self) -> Tensor:
        """Norm of the gradient before clipping, (); the gradient itself is clipped to `config.clip`."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        total = nn.utils.get_total_norm(gradients)  # sharded as they are
        norm = whole(total)
        limit = self.config.clip
        if limit and not bool(norm + CLIP_EPS <= limit):  # else torch would multiply all of them by 1
            nn.utils.clip_grads_with_norm_(self.parameters, limit, total)
        return norm

    def step(self, before: int, after: int, total: int) -> float:
        """Update, clear the gradients and return the learning rate used; arguments as of `lr_factor`."""
        factor = lr_factor(self.config, before, after, total)
        for optimizer, peak in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self.config.lr * factor

    def state_dict(self) -> list[dict[str, Any]]:
        """State of each optimizer, for an exact resume."""
        return [optimizer.state_dict() for optimizer, _ in self._optimizers]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Inverse of `state_dict`."""
        for (optimizer, _), one in zip(self._optimizers, state, strict=True):
            optimizer.load_state_dict(one)
            for parameter, values in optimizer.state.items():
                alike = {k: v for k, v in values.items() if getattr(v, "shape", None) == parameter.shape}
                values |= {k: like(parameter, v) for k, v in alike.items()}


def _groups(parameters: list[tuple[nn.Parameter, bool]], config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups of (parameter, whether it decays); a single one where no optimizer would decay."""
    if not config.builtin and not takes_decay(config.kind):
        return [{"params": [p for p, _ in parameters]}]
    groups = [
        {"params": [p for p, decayed in parameters if decayed is wanted], "weight_decay": decay}
        for wanted, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, fused where torch has it for the devices of the parameters."""
    fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _by_name(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """An optimizer of torch."""
    make: Callable[..., torch.optim.Optimizer] = optimizer_class(config.kind)
    return make(groups, lr=config.lr, **config.options)
