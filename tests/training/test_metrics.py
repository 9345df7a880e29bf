from __future__ import annotations

import json

import pytest
import torch

from sfumato.training.log import RunLog
from sfumato.training.metrics import summary


def test_a_number_gives_its_mean():
    assert summary("loss", torch.tensor(6.0), 4) == {"loss": 1.5}


def test_a_histogram_gives_the_share_that_occurs_and_the_perplexity():
    assert summary("codes", torch.tensor([5, 5, 0, 5, 5, 0, 0, 0]), 3) == {
        "codes_used": 0.5,
        "codes_perplexity": pytest.approx(4.0),
    }
    uneven = summary("codes", torch.tensor([3, 1]), 1)
    assert uneven["codes_perplexity"] == pytest.approx(4 / 3**0.75)  # exp(-3/4 ln 3/4 - 1/4 ln 1/4)


def test_a_log_line_speaks_of_all_codes_of_its_window_and_not_of_the_mean_batch(tmp_path):
    """Two batches of one code each use two of four codes; a mean over batches would say one."""
    log = RunLog(tmp_path / "log.jsonl", 8, 4, quiet=True)
    log.begin(0)
    for i, code in enumerate((0, 1, 3, 3)):
        log.step(2 * i + 2, {"g/codes": torch.bincount(torch.tensor([code] * 6), minlength=4)})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["g/codes_used"] for row in rows] == [0.5, 0.25]
    assert [row["g/codes_perplexity"] for row in rows] == [2.0, 1.0]
