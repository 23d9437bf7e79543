"""Where a trained model runs."""

import torch

from spikescale.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU if there is one, else the CPU.

    Raises UserError for a name that torch does not know or a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name}: not available ({str(error).splitlines()[0]})") from None
    if device.type == "meta":
        raise UserError("device meta: computes nothing; use cpu or cuda")
    return device
