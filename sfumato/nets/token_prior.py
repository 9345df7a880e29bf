"""The autoregressive prior of unCLIP: a text -> a quantized image embedding, coordinate by coordinate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sfumato.core.types import Conditioning
from sfumato.nets.prior import Captioned, Past, PriorShape, read_causally
from sfumato.nets.quantizer import Quantizer

__all__ = ["TokenPrior", "TokenPriorConfig"]


@dataclass(frozen=True, kw_only=True)
class TokenPriorConfig(PriorShape):
    """Shape of the prior; the defaults are the paper's but for CLIP's, which are those of ViT-L/14.

    Attributes:
        kept: principal coordinates that are predicted, at most dim - 1.
        buckets: into which each is cut.
    """

    kind: Literal["token_prior"] = "token_prior"
    width: int = 1664
    depth: int = 24
    heads: int = 26
    kept: int = 319
    buckets: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.kept < self.dim or self.buckets < 2:
            raise ValueError(
                f"kept is {self.kept} and buckets {self.buckets}; allowed: 1 to {self.dim - 1} coordinates "
                f"of embeddings of {self.dim}, in at least 2 buckets"
            )


class TokenPrior(Captioned):
    """p(token k | text, token of the cosine to it, tokens before k), see `Quantizer`.

    A causal transformer over text tokens, text embedding, the cosine and the coordinates (Ramesh et al. 2022,
    arXiv:2204.06125, section 2.2). One table of vectors serves all coordinates; positions tell them apart.
    """

    entrances = ("logits",)  # what trains it, see `tags.entrances_of`

    def __init__(self, config: TokenPriorConfig) -> None:
        super().__init__(config, config.kept)
        c = self.config = config
        self.buckets = nn.Embedding(c.buckets, c.width)
        self.out = nn.Linear(c.width, c.buckets)
        self.quantizer = Quantizer(c.dim, c.kept, c.buckets)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Raises: ValueError, for it denoises nothing: its `draw` is what guidance of kind "logits" calls."""
        raise ValueError(
            "this prior draws tokens and denoises nothing: sample it with guidance of kind logits"
        )

    def logits(self, tokens: Tensor, cond: Conditioning) -> Tensor:
        """Of each coordinate by the true ones before it: tokens (B, 1 + kept) -> (B, kept, buckets).

        Raises: ValueError if the text is missing, or not of the length and widths of this prior.
        """
        cond = self.prepare(cond)
        assert cond.kv is not None
        return self._read(tokens[:, :-1], cond, cond.kv)[0]

    def draw(
        self,
        noise: Tensor,
        cond: Conditioning,
        null: Conditioning | None = None,
        *,
        scale: float = 1.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """An embedding (B, dim) for each text, by the inverse of its distribution function, token by token.

        Args:
            noise: (B, dim) normal numbers; the normal distribution function makes them uniform, and number k
                decides token k.
            null: without the text; of the logits null + scale (cond - null). None = scale is 1.
            temperature: by which logits are divided.

        Raises: ValueError for noise or texts of another width.
        """
        c = self.config
        self._check(noise, "draws")
        uniform = torch.special.ndtr(noise[:, : 1 + c.kept].double()).mT.contiguous()
        rows = self.prepare(cond if null is None else Conditioning.cat([cond, null]))
        assert rows.kv is not None
        past, tokens = rows.kv, [self.quantizer.matching(uniform[0])]
        for share in uniform[1:]:
            before = tokens[-1] if null is None else tokens[-1].repeat(2)
            logits, past = self._read(before[:, None], rows, past)
            last = logits[:, 0].double()
            if null is not None:
                told, untold = last.chunk(2)
                last = torch.lerp(untold, told, scale)
            below = (last / temperature).softmax(1).cumsum(1)
            tokens.append(torch.searchsorted(below, share[:, None])[:, 0].clamp_max(c.buckets - 1))
        return self.quantizer.decode(torch.stack(tokens, 1)).to(noise)

    def _read(
        self, tokens: Tensor, cond: Conditioning, past: tuple[Past, ...]
    ) -> tuple[Tensor, tuple[Past, ...]]:
        """Logits (B, n, buckets) of what follows each of tokens (B, n) behind `past`, and the new past."""
        before, n = past[0][0].shape[2], tokens.shape[1]
        h = self.buckets(tokens) + self.positions[before : before + n]
        visible = self._visible(cond, before + n - self.config.context)
        h, past = read_causally(self.blocks, h, visible, past)
        return self.out(self.norm(h)), past
