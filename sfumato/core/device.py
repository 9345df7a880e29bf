"""Where tensors live, by name."""

from __future__ import annotations

import torch

__all__ = ["device_of"]


def device_of(name: torch.device | str) -> torch.device:
    """The device named, or for "auto" the accelerator that torch sees, else the CPU.

    Raises: ValueError in one line if the name is no device or the device is not there.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device {str(name)!r} cannot be used ({reason}); try cpu or auto") from None
    return device
