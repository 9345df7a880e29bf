"""Published weights of FID's Inception: the file that pytorch-fid and torch-fidelity both load.

It is TensorFlow's graph of 2015-12-05 as a torch file, whose names are those of torchvision's Inception.
"""

from __future__ import annotations

from pathlib import Path

from sfumato.checkpoints.files import read_tensors
from sfumato.checkpoints.weights import assign
from sfumato.nets.inception import InceptionV3

__all__ = ["FILES", "read_inception"]

FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
"""Names under which pytorch-fid and torch-fidelity keep it."""


def read_inception(path: Path) -> InceptionV3:
    """The network of a file. Raises: ValueError in one line with the file and what is wrong in it."""
    state = read_tensors(path)
    rows = state["fc.weight"].shape[0] if "fc.weight" in state else None
    if rows != 1008:
        what = "no layer 'fc'" if rows is None else f"{rows} classes, as torchvision's Inception"
        raise ValueError(f"{path} has {what}; FID needs the one with 1008: {FILES[0]} of pytorch-fid")
    net = InceptionV3()
    counted = {name: v for name, v in net.state_dict().items() if name.endswith("num_batches_tracked")}
    assign(net, state | counted, where=str(path))
    return net.eval()
