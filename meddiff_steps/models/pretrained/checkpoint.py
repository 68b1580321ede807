"""Tensors of a file that somebody else wrote: never anything but tensors, whatever else is in it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from meddiff_steps.core.errors import UserError

#: Where trainers keep the weights in what they save.
NESTED = (
    "state_dict",
    "model_state_dict",
    "unet_state_dict",
    "autoencoder_state_dict",
    "diffusion_state_dict",
    "network",
    "model",
    "diffusion",
    "autoencoder",
)
#: What wrappers put before each name; several in any order.
WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one network, and the scale factor of its latents where the file holds one (MAISI's do)."""

    tensors: dict[str, Tensor]
    scale_factor: float | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Weights of a .pt, .pth or .safetensors file; nothing of a pickle is run.

    Raises
    ------
    UserError
        There is no such file, it holds more than tensors, or no weights.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file. Bundles are often published without their weights: download these, too"
            " (docs/pretrained.md)."
        )
    content: Any
    if path.suffix == ".safetensors":
        try:
            content = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not readable as safetensors ({error}). Download it again.") from None
    else:
        content = _of_pickle(path)
    scale = content.get("scale_factor") if isinstance(content, Mapping) else None
    tensors = _weights(content)
    if not tensors:
        found = sorted(map(str, content))[:5] if isinstance(content, Mapping) else type(content).__name__
        raise UserError(
            f"{path}: no weights were found in it; it holds {found}. Expected tensors by name, or these under one of"
            f" {', '.join(NESTED)}. Save them so: torch.save(network.state_dict(), PATH)."
        )
    return Checkpoint(tensors, None if scale is None else float(scale))


def _of_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}: not a file of tensors alone ({reason}). A pickle can run any code, so nothing else of it is"
            " read. On a machine where you trust it, with the code that it needs, save the weights alone:"
            " torch.save(network.state_dict(), PATH), or safetensors.torch.save_file; then name that file."
        ) from None


def _weights(content: Any) -> dict[str, Tensor]:
    """The tensors of what was saved, without what wrappers put before their names."""
    if not isinstance(content, Mapping):
        return {}
    for name in NESTED:
        if isinstance(content.get(name), Mapping):
            return _weights(content[name])
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if len(tensors) < len(content):
        tensors.pop("scale_factor", None)
    while tensors and (wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in tensors)), None)):
        tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors
