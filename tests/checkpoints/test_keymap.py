from __future__ import annotations

import pytest
import torch

from sfumato.checkpoints.keymap import (
    SAME,
    SWAPPED,
    TRANSPOSED,
    KeyMap,
    Leaf,
    Row,
    regrouped,
    squeezed,
    stacked,
)

# A file with q, k and v as 1x1 convolutions, where ours is one linear layer; and with its rows by head.
TABLE = {
    "norm": "norm1",
    ("q", "k", "v"): Leaf("qkv", squeezed(2, 3).then(stacked(3))),
    "proj": Leaf("out", TRANSPOSED),
    "gain": Leaf("scale", tensors=()),
    "head": Leaf("head", tensors=("weight",)),
}
MAP = KeyMap.of(
    [("blocks.0.attn", "levels.0", TABLE), ("", "last", {"fin": "out"})], ignored=("loss.", "ema")
)


def theirs() -> dict[str, torch.Tensor]:
    shapes = {"norm.weight": (4,), "norm.bias": (4,), "gain": (), "head.weight": (2, 4)}
    shapes |= {f"{n}.weight": (4, 4, 1, 1) for n in "qkv"} | {f"{n}.bias": (4,) for n in "qkv"}
    shapes |= {"proj.weight": (3, 4), "proj.bias": (4,)}
    state = {f"blocks.0.attn.{name}": torch.randn(shape) for name, shape in shapes.items()}
    return state | {"fin.weight": torch.randn(2, 2), "fin.bias": torch.randn(2)}


def test_tables_give_names_and_ops_to_weights_and_biases():
    state = theirs()
    ours = MAP.load(state, where="f")
    block = "blocks.0.attn"
    assert set(ours) == {
        *(f"levels.0.{n}" for n in ("norm1.weight", "norm1.bias", "qkv.weight", "qkv.bias", "scale")),
        *(
            "levels.0.head.weight",
            "levels.0.out.weight",
            "levels.0.out.bias",
            "last.out.weight",
            "last.out.bias",
        ),
    }
    assert torch.equal(
        ours["levels.0.qkv.weight"], torch.cat([state[f"{block}.{n}.weight"][:, :, 0, 0] for n in "qkv"])
    )
    assert torch.equal(ours["levels.0.qkv.bias"], torch.cat([state[f"{block}.{n}.bias"] for n in "qkv"]))
    assert torch.equal(ours["levels.0.out.weight"], state[f"{block}.proj.weight"].T)
    assert torch.equal(ours["levels.0.out.bias"], state[f"{block}.proj.bias"])
    assert ours["levels.0.scale"] is state[f"{block}.gain"]
    assert ours["last.out.bias"] is state["fin.bias"]


def test_what_is_loaded_is_saved_as_it_was():
    state = theirs()
    back = MAP.save(MAP.load(state, where="f"), where="f")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], v) for name, v in state.items())


@pytest.mark.parametrize(
    ("op", "shapes", "becomes"),
    [
        (SAME, [(2, 3)], [(2, 3)]),
        (TRANSPOSED, [(2, 3)], [(3, 2)]),
        (SWAPPED, [(6, 3)], [(6, 3)]),
        (squeezed(0, 2, 3), [(1, 5, 1, 1)], [(5,)]),
        (squeezed(2), [(4, 5, 1)], [(4, 5)]),
        (stacked(2), [(2, 3), (2, 3)], [(4, 3)]),
        (stacked(3).inverse, [(6, 2)], [(2, 2)] * 3),
        (regrouped(2, 3), [(12, 2)], [(12, 2)]),
        (regrouped(2, 3).then(stacked(3).inverse), [(12,)], [(4,)] * 3),
        (squeezed(2).then(TRANSPOSED).inverse, [(3, 5)], [(5, 3, 1)]),
    ],
)
def test_every_op_goes_back_to_where_it_came_from(op, shapes, becomes):
    tensors = tuple(torch.randn(shape) for shape in shapes)
    there = op.load(tensors)
    assert [tuple(v.shape) for v in there] == becomes
    for one, two in ((op.save(there), tensors), (op.inverse.load(there), tensors)):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_orders_of_rows():
    rows = torch.arange(12)  # two heads of q, k and v with two channels each
    (grouped,) = regrouped(2, 3).load((rows,))
    assert grouped.tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    (swapped,) = SWAPPED.load((rows,))
    assert swapped.tolist() == [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5]


def test_biases_follow_orders_of_rows_and_not_shapes_of_kernels():
    bias = torch.arange(12.0)
    op = squeezed(2).then(regrouped(2, 3))
    assert torch.equal(op.on_bias.load((bias,))[0], regrouped(2, 3).load((bias,))[0])
    assert torch.equal(op.inverse.on_bias.load(op.on_bias.load((bias,)))[0], bias)
    assert torch.equal(TRANSPOSED.on_bias.load((bias,))[0], bias)


def test_names_that_are_missing_or_unexpected_are_listed():
    state = theirs()
    del state["fin.bias"]
    state |= {f"more.{i}": torch.zeros(1) for i in range(6)}
    with pytest.raises(
        ValueError, match=r"^f: 1 missing: 'fin\.bias'; 6 unexpected: 'more\.0', .* and 2 more;"
    ) as e:
        MAP.load(state, where="f")
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"net: 10 missing: 'levels\.0\.norm1\.weight', .* and 6 more"):
        MAP.save({}, where="net")


def test_ignored_names_may_be_there_and_others_may_not():
    state = theirs()
    extra = {"loss.weight": torch.zeros(1), "ema_decay": torch.zeros(1)}
    assert MAP.load(state | extra, where="f").keys() == MAP.load(state, where="f").keys()
    with pytest.raises(ValueError, match="1 unexpected: 'lossless'"):
        MAP.load(state | {"lossless": torch.zeros(1)}, where="f")


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        (
            "q.weight",
            (4, 4, 3, 3),
            r"'blocks\.0\.attn\.q\.weight' \(4, 4, 3, 3\), .*axes \(2, 3\) are not of length 1",
        ),
        ("q.weight", (4, 5, 1, 1), r"cannot become 'levels\.0\.qkv\.weight'"),
        (
            "proj.weight",
            (4,),
            r"'blocks\.0\.attn\.proj\.weight' \(4,\) cannot become 'levels\.0\.out\.weight'",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shape, said):
    state = theirs() | {f"blocks.0.attn.{name}": torch.zeros(shape)}
    with pytest.raises(ValueError, match=said) as error:
        MAP.load(state, where="f")
    assert "\n" not in str(error.value)


def test_rows_that_are_no_equal_parts_are_refused():
    for op, rows in ((SWAPPED, 5), (regrouped(2, 3), 8), (stacked(3).inverse, 7)):
        with pytest.raises(ValueError, match="equal parts"):
            op.load((torch.zeros(rows, 2),))


def test_maps_of_parts_make_one_of_a_file_that_holds_them_all():
    whole = MAP.under("first") + KeyMap((Row(("scale",), ("s",)),)).under("second", "b")
    state = {f"first.{name}": v for name, v in theirs().items()} | {"first.loss.x": torch.zeros(1)}
    ours = whole.load(state | {"second.scale": torch.ones(1)}, where="f")
    assert {"b.s", "last.out.weight"} < ours.keys()
    assert whole.save(ours, where="f").keys() == state.keys() - {"first.loss.x"} | {"second.scale"}


def test_a_table_that_names_a_tensor_twice_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="name 'a' twice"):
        KeyMap((Row(("x",), ("a",)), Row(("y",), ("a",))))
