from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.checkpoints.weights import assign, floating, parameter_free


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 3)
        self.norm = nn.LayerNorm(3)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))


class Table(nn.Module):
    """A buffer that no file holds."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 3)
        self.register_buffer("table", torch.arange(width), persistent=False)


def state():
    return {k: v.clone() for k, v in Net(4).state_dict().items()}


def test_assign_gives_every_tensor():
    given, net = state(), parameter_free(Net, 4)
    assert net.linear.weight.is_meta
    assign(net, given, where="f")
    assert all(torch.equal(net.state_dict()[k], v) for k, v in given.items())
    assert net.linear.weight.requires_grad


def test_buffers_that_no_file_holds_are_computed():
    net = parameter_free(Table, 5)
    assign(net, {k: v.clone() for k, v in Table(5).state_dict().items()}, where="f")
    assert net.table.tolist() == [0, 1, 2, 3, 4]


def wrong(**changes):
    return state() | changes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {k: v for k, v in state().items() if k != "norm.bias"},
            r"'norm\.bias' is missing, expected shape \(3,\)",
        ),
        (wrong(extra=torch.ones(2)), r"unexpected tensor 'extra' of shape \(2,\), Net has no such"),
        (
            wrong(**{"linear.weight": torch.ones(3, 5)}),
            r"'linear\.weight' has shape \(3, 5\), expected \(3, 4\)",
        ),
        (
            wrong(**{"norm.weight": torch.tensor([1, torch.nan, torch.inf])}),
            r"'norm\.weight' has 2 values that are NaN",
        ),
        (wrong(steps=torch.zeros(2)), r"'steps' is torch\.float32, expected torch\.int64"),
    ],
    ids=["missing", "unexpected", "shape", "nan", "dtype"],
)
def test_what_does_not_fit_is_named(given, said):
    with pytest.raises(ValueError, match=f"^f.safetensors: .*{said}") as error:
        assign(Net(4), given, where="f.safetensors")
    assert "\n" not in str(error.value)


def test_half_precision_is_for_matrices_only():
    cast = floating(
        Net(4), {k: v.half() if v.is_floating_point() else v for k, v in state().items()}, torch.bfloat16
    )
    assert cast["linear.weight"].dtype == torch.bfloat16
    assert cast["norm.weight"].dtype == torch.float32
    assert cast["steps"].dtype == torch.int64
    assert {v.dtype for v in floating(Net(4), state(), torch.float32).values()} == {
        torch.float32,
        torch.int64,
    }
