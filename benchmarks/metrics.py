"""How much of an evaluation is spent outside the feature net: `python benchmarks/metrics.py [N]`.

CPU seconds, which other work on the machine hardly changes, of the network with random weights and of every
formula. Each is measured on a small part and scaled to N (10,000 if not given): sums by samples, neighbors by
pairs, kernels by subsets. Both run with the same threads.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from sfumato.evaluation.metrics.frechet import GROUPS, Moments, frechet_distance
from sfumato.evaluation.metrics.inception_score import InceptionScore
from sfumato.evaluation.metrics.kernel import SUBSETS, kernel_distance
from sfumato.evaluation.metrics.manifold import manifold
from sfumato.evaluation.pictures import pixel_digest
from sfumato.evaluation.preparation import for_inception
from sfumato.nets.inception import InceptionV3

BATCH = 32
SUMS, NEIGHBORS, KERNELS = 320, 2000, 3  # samples, samples and subsets that are measured


def seconds(work: Callable[[], object]) -> float:
    """Of the CPU, for one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def network(pixels: torch.Tensor) -> float:
    """Seconds per picture of the forward alone."""
    net = InceptionV3().eval()
    x = for_inception(pixels)
    with torch.no_grad():
        net(x[:1])  # what the first call sets up
        return seconds(lambda: net(x)) / len(x)


def formulas(n: int, pixels: torch.Tensor) -> dict[str, float]:
    """Seconds of each part of our own, for n pictures on both sides."""
    fake, real = torch.randn(NEIGHBORS, 2048).abs(), torch.randn(NEIGHBORS, 2048).abs() + 0.05
    logits, score = torch.randn(SUMS, 1008), InceptionScore(SUMS, 1008)
    whole, parts = Moments(2048), [Moments(2048) for _ in range(GROUPS)]

    def sums(to: list[Moments]) -> None:
        for rows in torch.arange(SUMS).split(BATCH):
            to[int(rows[0]) // BATCH % len(to)].update(fake[rows])

    picture, sample = n / len(pixels), n / SUMS
    found = {
        "preparation": picture * seconds(lambda: for_inception(pixels)),
        "pixel digests": picture * seconds(lambda: pixel_digest(pixels)),
        "sums of fid or sfid": sample * seconds(lambda: sums([whole])),
        "sums of fid_inf": sample * seconds(lambda: sums(parts)),
        "sums of is": sample * seconds(lambda: score.update(logits, torch.arange(SUMS))),
    }
    gaussian = whole.gaussian()
    distance = seconds(lambda: frechet_distance(gaussian, gaussian))
    kernel = seconds(lambda: kernel_distance(fake, real, subsets=KERNELS))
    return found | {
        "fid": distance,
        "fid_inf": (GROUPS + 1) * distance,
        "kid": SUBSETS / KERNELS * kernel,
        "prdc": (n / NEIGHBORS) ** 2 * seconds(lambda: manifold(real, fake)),
    }


def main() -> None:
    """Print a table."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    pixels = torch.randint(256, (BATCH, 3, 64, 64), dtype=torch.uint8)
    net, own = network(pixels) * n, formulas(n, pixels)
    print(f"{n} pictures of 64x64, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'Inception forward':<28} {net:9.1f} s")
    for name, spent in own.items():
        print(f"{name:<28} {spent:9.1f} s  {spent / net:7.2%} of the forward")
    print(f"{'all of ours':<28} {sum(own.values()):9.1f} s  {sum(own.values()) / net:7.2%}")


if __name__ == "__main__":
    main()
