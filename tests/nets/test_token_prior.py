"""An autoregressive prior: what a token can see, and draws with and without a cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sfumato.core.types import Conditioning, Level
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.guidance import CFG, LogitCFG
from sfumato.diffusion.parameterization import PARAMETERIZATIONS
from sfumato.diffusion.schedules import Flow
from sfumato.nets.prior import Prior, PriorConfig
from sfumato.nets.token_prior import TokenPrior, TokenPriorConfig

SHAPE = {"dim": 8, "text_dim": 6, "context": 4, "width": 16, "depth": 2, "heads": 2}
KEPT, BUCKETS = 5, 7
NOISE = Level(*(torch.tensor(v, dtype=torch.float64) for v in (1.0, 0.0, 1.0)))


def net(kept: int = KEPT, buckets: int = BUCKETS) -> TokenPrior:
    """With logits far apart, and ranges as of data."""
    torch.manual_seed(0)
    made = TokenPrior(TokenPriorConfig(**SHAPE, kept=kept, buckets=buckets))
    torch.nn.init.normal_(made.out.weight, std=0.7)
    torch.nn.init.normal_(made.positions, std=0.5)
    images = torch.randn(50, 8)
    made.quantizer.fit(images, images + torch.randn(50, 8))
    return made.eval().requires_grad_(False)


def told(n: int, seed: int = 1) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[True] * (2 + i % 3) + [False] * (2 - i % 3) for i in range(n)])
    tokens, pooled = torch.randn(n, 4, 6, generator=generator), torch.randn(n, 8, generator=generator)
    return Conditioning(tokens=tokens, mask=mask, pooled=pooled)


def test_no_logits_depend_on_their_own_token_or_on_later_ones():
    own, cond = net(), told(2)
    tokens = torch.randint(BUCKETS, (2, 1 + KEPT))
    before = own.logits(tokens, cond)
    assert before.shape == (2, KEPT, BUCKETS)
    for k in range(1 + KEPT):
        changed = tokens.clone()
        changed[:, k] = (changed[:, k] + 1) % BUCKETS
        differs = (own.logits(changed, cond) - before).abs().amax((0, 2)) > 1e-6
        assert differs.tolist() == [j >= k for j in range(KEPT)]  # logits j are of token j + 1


def test_padding_of_the_text_is_not_read():
    own, cond = net(), told(3)
    tokens = torch.randint(BUCKETS, (3, 1 + KEPT))
    noisy = torch.where(cond.mask[..., None], cond.tokens, torch.randn_like(cond.tokens))
    expected = own.logits(tokens, cond)
    torch.testing.assert_close(own.logits(tokens, replace(cond, tokens=noisy)), expected)
    assert not torch.allclose(own.logits(tokens, replace(cond, mask=None)), expected)


@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (3.0, 1.0), (0.0, 0.7)])
def test_a_draw_is_that_of_a_net_that_reads_everything_again_for_each_token(scale, temperature):
    own, cond, null = net(), told(6), told(6, seed=2)
    noise = torch.randn(6, 8)
    uniform = 0.5 * (1 + torch.erf(noise.double() / 2**0.5))
    tokens = torch.zeros(6, 1 + KEPT, dtype=torch.int64)
    tokens[:, 0] = own.quantizer.matching(uniform[:, 0])
    for k in range(KEPT):
        a, b = (own.logits(tokens, c)[:, k].double() for c in (cond, null))
        shares = ((b + scale * (a - b)) / temperature).softmax(1)
        for row in range(6):
            total, token = 0.0, -1
            while total < float(uniform[row, k + 1]):
                token += 1
                total += float(shares[row, token])
            tokens[row, k + 1] = token
    left = None if scale == 1 else null
    drawn = own.draw(noise, cond, left, scale=scale, temperature=temperature)
    torch.testing.assert_close(drawn, own.quantizer.decode(tokens))


def test_the_same_alone_and_in_a_batch():
    own, cond, null = net(), told(5), told(5, seed=2)
    noise = torch.randn(5, 8)
    both = own.draw(noise, cond, null, scale=2.0)
    for i in range(5):
        alone = own.draw(
            noise[i : i + 1], *(c.map(lambda v, i=i: v[i : i + 1]) for c in (cond, null)), scale=2.0
        )
        torch.testing.assert_close(alone, both[i : i + 1])
    assert len(both.unique(dim=0)) == 5


def test_tokens_are_drawn_as_often_as_they_are_likely():
    own, n = net(kept=1, buckets=4), 5000
    own.quantizer.below.fill_(1.0)  # token 0 is 0
    cond = told(1).map(lambda v: v.expand(n, *v.shape[1:]))
    drawn = own.quantizer.encode(own.draw(torch.randn(n, 8), cond), torch.ones(n, 8))[:, 1]
    shares = own.logits(torch.zeros(1, 2, dtype=torch.int64), told(1))[0, 0].softmax(0)
    assert float(shares.max() - shares.min()) > 0.2
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / n, shares, rtol=0, atol=0.03)  # 4 errors
    cold = own.draw(torch.randn(50, 8), cond.map(lambda v: v[:50]), temperature=1e-3)
    assert set(own.quantizer.encode(cold, torch.ones(50, 8))[:, 1].tolist()) == {int(shares.argmax())}


def test_guidance_draws_once_in_a_walk():
    own, cond, null = net(), told(2), told(2, seed=2)
    denoiser = Denoiser(own, Flow(), PARAMETERIZATIONS["x0"])
    x = torch.randn(2, 8)
    denoise = LogitCFG(2.0, 0.8).bind(denoiser, cond, null)
    first = denoise(x, NOISE)
    assert torch.equal(first.x0, own.draw(x, cond, null, scale=2.0, temperature=0.8))
    assert torch.equal(first.eps, x)
    later = denoise(0.5 * first.x0 + 0.5 * x, NOISE._replace(alpha=NOISE.sigma / 2, sigma=NOISE.sigma / 2))
    assert torch.equal(later.x0, first.x0)
    torch.testing.assert_close(later.eps, x)


def test_wrong_use_is_one_line():
    own, cond, x = net(), told(2), torch.randn(2, 8)
    denoiser = Denoiser(own, Flow(), PARAMETERIZATIONS["x0"])
    diffusion = replace(denoiser, net=Prior(PriorConfig(**SHAPE)))
    uses = {
        r"x has shape \(2, 9\); this prior draws vectors \(B, 8\)": lambda: own.draw(torch.randn(2, 9), cond),
        r"reads cond.pooled of shape \(8,\) for each picture and got \(9,\): its CLIP is": lambda: own.draw(
            x, replace(cond, pooled=torch.randn(2, 9))
        ),
        "sample it with guidance of kind logits": lambda: CFG(2.0).bind(denoiser, cond, told(2, 2))(x, NOISE),
        "for a net that draws tokens; take cfg": lambda: LogitCFG().bind(diffusion, cond, cond),
        "temperature is 0; allowed: above 0": lambda: LogitCFG(temperature=0.0),
        "kept is 8 and buckets 4; allowed: 1 to 7 coordinates": lambda: net(kept=8, buckets=4),
    }
    for message, use in uses.items():
        with pytest.raises(ValueError, match=message) as error:
            use()
        assert "\n" not in str(error.value)
