from __future__ import annotations

import pytest
import torch

from sfumato.core.device import device_of


def test_names_and_devices():
    assert device_of("cpu") == torch.device("cpu")
    assert device_of(torch.device("cpu")) == torch.device("cpu")
    assert device_of("auto").type in {"cpu", "cuda", "mps", "xpu"}


@pytest.mark.parametrize("name", ["gpu", "", "cuda:999"])
def test_what_is_no_device(name):
    with pytest.raises(ValueError, match=rf"^device '{name}' cannot be used \(.+\); try cpu or auto$"):
        device_of(name)
