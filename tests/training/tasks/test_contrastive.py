"""InfoNCE by its formula, in several processes as in one, and what towers learn from it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sfumato.core.world import World
from sfumato.evaluation.retrieval import recalls, zero_shot
from sfumato.nets.clip import CLIPConfig, CLIPTextConfig
from sfumato.training.tasks.contrastive import ContrastiveConfig, info_nce

WHOLE = iter(())


def test_the_loss_is_the_mean_of_both_cross_entropies():
    pictures, texts = torch.randn(2, 5, 4, dtype=torch.float64)
    scale, total = torch.tensor(3.0, dtype=torch.float64), 0.0
    table = [[3 * float(F.cosine_similarity(p, t, dim=0)) for t in texts] for p in pictures]
    for i in range(5):
        row, column = table[i], [line[i] for line in table]
        total += sum(math.log(sum(map(math.exp, v))) - v[i] for v in (row, column))
    assert float(info_nce(pictures, texts, scale)) == pytest.approx(total / 10)


class Split(World):
    """One of two processes, which is told all texts and then all pictures."""

    def joined(self, rows: torch.Tensor) -> torch.Tensor:
        return next(WHOLE)


def test_the_mean_over_processes_is_the_loss_of_the_whole_batch(monkeypatch):
    pictures, texts = (F.normalize(v, dim=1) for v in torch.randn(2, 4, 3, dtype=torch.float64))
    scale, parts = torch.tensor(2.0, dtype=torch.float64), []
    for rank in range(2):
        rows = slice(2 * rank, 2 * rank + 2)
        monkeypatch.setitem(globals(), "WHOLE", iter([texts, pictures]))
        parts.append(info_nce(pictures[rows], texts[rows], scale, Split(rank=rank, size=2)))
    torch.testing.assert_close(sum(parts) / 2, info_nce(pictures, texts, scale))


def test_towers_of_different_widths_are_refused():
    with pytest.raises(ValueError, match="embed in 768 and 512 dimensions"):
        ContrastiveConfig(net=CLIPConfig(text=CLIPTextConfig(embed=512)))


def test_recall_and_zero_shot():
    pictures = torch.eye(4)
    texts = pictures[[1, 0, 2, 3]]  # the first two captions are exchanged
    found = recalls(pictures, texts, ["a", "b", "c", "d"], ks=(1, 2))
    assert found["text@1"] == found["picture@1"] == 0.5
    assert recalls(pictures, texts, ["a", "a", "c", "d"], ks=(1,))["text@1"] == 1.0
    assert zero_shot(pictures, pictures[:3], torch.tensor([0, 1, 2, 2])) == 0.75
    with pytest.raises(ValueError, match="of widths 4 and 3: they are of different CLIPs"):
        recalls(pictures, texts[:, :3], ["a", "b", "c", "d"])
