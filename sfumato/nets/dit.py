"""DiT: a transformer over patches that is told time, class and text."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.types import Conditioning
from sfumato.nets.blocks import sinusoid
from sfumato.nets.dit_block import MODULATIONS, DiTBlock, DiTConfig, Told, modulate, zero_
from sfumato.nets.patches import patchify, rotation, sincos_positions, unpatchify
from sfumato.nets.tags import fused, tagged

__all__ = ["DiT", "DiTConfig", "PlannedDiT"]

TIME_FEATURES = 256  # width of the sinusoids of t, as published
CHUNK = 16  # steps whose modulations are computed together: most of the gain, little memory


class DiT(nn.Module):
    """Scalable diffusion transformer (Peebles & Xie 2023, arXiv:2212.09748), any size and aspect.

    A fresh net is zero everywhere: its last layer starts at zero. adaLN-Zero blocks start as the identity.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patches = tagged(nn.Linear(c.in_channels * c.patch**2, c.width), "edge")
        first, second = nn.Linear(TIME_FEATURES, c.width), nn.Linear(c.width, c.width)
        self.time = nn.Sequential(tagged(first, "edge"), nn.SiLU(), tagged(second, "edge"))
        self.label = nn.Embedding(c.label_rows, c.width) if c.label_rows else None
        self.pooled = tagged(nn.Linear(c.pooled_dim, c.width), "edge") if c.pooled_dim is not None else None
        self.registers = nn.Parameter(torch.zeros(c.registers, c.width)) if c.registers else None
        self.blocks = nn.ModuleList(DiTBlock(c) for _ in range(c.depth))
        parts = MODULATIONS[c.block]
        self.norm = nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=not parts)
        self.shared = fused(nn.Linear(c.width, parts * c.width), parts) if c.shared_modulation else None
        self.modulation = tagged(nn.Linear(c.width, 2 * c.width), "edge") if parts else None
        self.out = tagged(nn.Linear(c.width, (c.out_channels + c.spare_channels) * c.patch**2), "edge")
        self._initialize()

    def prepare(self, cond: Conditioning) -> Conditioning:
        """Keys and values of the text for every block, once per walk."""
        self._check_label(cond)
        if self.config.text_dim is None:
            return cond
        tokens = _need(cond.tokens, "tokens")
        return replace(
            cond, kv=tuple(block.cross.project(tokens) for block in self._blocks() if block.cross is not None)
        )

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C, H, W), t (B,) -> (B, out_channels, H, W).

        Raises: ValueError if a side is not a multiple of the patch, a class has no row, or a conditioning
            that the net needs is missing.
        """
        signals = self.signals(t, cond)
        return self.transform(x, cond, signals, self.modulations(signals))

    def signals(self, t: Tensor, cond: Conditioning) -> Tensor:
        """Time, with the pooled text added to it, and class: (B, 1 or 2, D)."""
        dtype = self.patches.weight.dtype
        time = self.time(sinusoid(t, TIME_FEATURES, shift=self.config.time_shift).to(dtype))
        if self.label is None:
            parts = [time]
        else:
            if (
                cond.label is None or cond.label.device.type == "cpu"
            ):  # elsewhere a look would stall the device
                self._check_label(cond)
            parts = [time, self.label(_need(cond.label, "label"))]
        if self.pooled is not None:
            parts[0] = parts[0] + self.pooled(_need(cond.pooled, "pooled").to(dtype))
        return torch.stack(parts, dim=1)

    def modulations(self, signals: Tensor) -> list[Tensor]:
        """What every block, and last the final norm, need of the signals; (B, parts * D) each.

        It depends on t and cond only, so the rows may be the steps of a whole walk.
        """
        if self.modulation is None:
            return [signals] * (self.config.depth + 1)  # no block reads it
        signal = F.silu(signals.sum(dim=1))
        to_blocks = signal if self.shared is None else self.shared(signal)
        return [*(block.modulated_by(to_blocks) for block in self._blocks()), self.modulation(signal)]

    def plan(self, times: Tensor) -> DiT | PlannedDiT:
        """The net for a walk over these times (n,), itself if there is no modulation to save; see `Net`."""
        known = times[~times.isnan()]
        return self if self.modulation is None or self.shared is not None else PlannedDiT(self, known)

    def transform(self, x: Tensor, cond: Conditioning, signals: Tensor, modulations: list[Tensor]) -> Tensor:
        """The net, given what it needs of time and class; see `forward`."""
        c = self.config
        grid = self._grid(x)
        h = self.patches(patchify(x, c.patch))
        h = h + sincos_positions(*grid, c.width, c.position_base).to(h)  # (B, N, D)
        front = self._front(signals)
        extra = sum(tokens.shape[1] for tokens in front)
        h = torch.cat([*front, h], dim=1) if front else h
        kv = None if c.text_dim is None else (cond.kv or self.prepare(cond).kv)
        turn = rotation(*grid, c.width // c.heads, extra) if c.rope else None
        told = Told(signals if c.block == "cross" else None, cond.mask, turn)
        for i, block in enumerate(self.blocks):
            h = block(h, modulations[i], None if kv is None else kv[i], told)
        h = self.norm(h[:, extra:])
        if self.modulation is not None:
            h = modulate(h, *modulations[-1][:, None].chunk(2, dim=-1))
        return unpatchify(self.out(h), grid, c.patch)[:, : c.out_channels]

    def _front(self, signals: Tensor) -> list[Tensor]:
        """Tokens that stand before the patches."""
        front = [signals] if self.config.block == "in_context" else []
        if self.registers is not None:
            front.append(self.registers.expand(len(signals), -1, -1))
        return front

    def _grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        c = self.config
        if x.ndim != 4 or x.shape[1] != c.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; this DiT needs (batch, {c.in_channels}, H, W)")
        if x.shape[-2] % c.patch or x.shape[-1] % c.patch:
            raise ValueError(f"{x.shape[-2]}x{x.shape[-1]} is not a multiple of the patch size {c.patch}")
        return x.shape[-2] // c.patch, x.shape[-1] // c.patch

    def _check_label(self, cond: Conditioning) -> None:
        rows = self.config.label_rows
        if not rows:
            return
        label = _need(cond.label, "label")
        wrong = label[(label < 0) | (label >= rows)]
        if len(wrong):
            null = f", and {rows - 1} is the null class" if self.config.null_label else ""
            classes = f"0..{rows - 1 - self.config.null_label}"
            raise ValueError(f"label {int(wrong[0])} is out of range: this DiT has classes {classes}{null}")

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in self.time:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for table in (self.registers, None if self.label is None else self.label.weight):
            if table is not None:
                nn.init.normal_(table, std=0.02)
        zero_(*(layer for layer in (self.out, self.modulation, self.shared) if layer is not None))
        for block in self._blocks():
            block.zero()

    def _blocks(self) -> list[DiTBlock]:
        return [block for block in self.blocks if isinstance(block, DiTBlock)]


class PlannedDiT:
    """A DiT on one walk: the modulations of several steps are computed in one batch.

    They depend on time and class alone and hold a third of the weights, which are so read once per CHUNK
    steps instead of once per step. At other times than the planned ones it is the net itself.
    """

    def __init__(self, net: DiT, times: Tensor) -> None:
        self.net, self.times = net, times.detach().float().cpu()
        self._place = {t: i for i, t in enumerate(self.times.tolist())}
        self._done: list[tuple[Conditioning, int, Tensor, list[Tensor]]] = []

    def prepare(self, cond: Conditioning) -> Conditioning:
        """As of the net."""
        return self.net.prepare(cond)

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """As of the net; x (B, C, H, W), t (B,)."""
        place = self._place.get(float(t[0]))
        if place is None or not bool((t == t[0]).all()):
            out: Tensor = self.net(x, t, cond)
            return out
        signals, modulations = self._chunk(place // CHUNK, cond, len(x))
        row = place % CHUNK
        return self.net.transform(x, cond, signals[row], [m[row] for m in modulations])

    def _chunk(self, index: int, cond: Conditioning, batch: int) -> tuple[Tensor, list[Tensor]]:
        """Signals (n, B, 1 or 2, D) and modulations (n, B, parts * D) of a chunk of steps."""
        for known, chunk, signals, modulations in self._done:
            if known is cond and chunk == index:
                return signals, modulations
        times = self.times[index * CHUNK : (index + 1) * CHUNK].to(self.net.out.weight.device)
        many = Conditioning(
            label=None if cond.label is None else cond.label.repeat(len(times)),
            pooled=None if cond.pooled is None else cond.pooled.repeat(len(times), 1),
        )
        signals = self.net.signals(times.repeat_interleave(batch), many)
        modulations = [m.unflatten(0, (len(times), batch)) for m in self.net.modulations(signals)]
        self._done = [*self._done[-1:], (cond, index, signals.unflatten(0, (len(times), batch)), modulations)]
        return self._done[-1][2:]


def _need(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"this DiT needs cond.{name}")
    return value
