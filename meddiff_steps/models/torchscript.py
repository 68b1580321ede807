"""Networks of the user's own, as TorchScript: code and weights in one file, from wherever they come."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from meddiff_steps.core.errors import UserError


def load_torchscript(path: Path, key: str) -> nn.Module:
    """The network of a file that the study names under `key`, on the processor and frozen.  Whoever gives the file is
    trusted: it holds code.

    Raises
    ------
    UserError
        The file is missing or no TorchScript.
    """
    if not path.is_file():
        raise UserError(
            f"{key}: there is no file {path}. Nothing is downloaded; put the network there or change the path."
        )
    try:
        network = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{key}: {path} is no TorchScript file ({reason}). Export the network with torch.jit.trace."
        ) from None
    for parameter in network.parameters():
        parameter.requires_grad = False
    return network
