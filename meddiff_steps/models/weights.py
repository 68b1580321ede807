"""Weights on disk: safetensors, and a card that says what they are and how to build their network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from meddiff_steps import __version__
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, write_json
from meddiff_steps.core.folders import CARD, WEIGHTS


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Identity of a model: SHA-256 over its sorted tensors (name, dtype, shape, bytes), not over file bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_model(
    module: nn.Module, folder: Path, content: Mapping[str, Any], weights: str = WEIGHTS, card: str = CARD
) -> None:
    """Write weights and, last, a card of `content` with their digest: a card on disk means that its weights are
    whole.
    """
    save_tensors(module.state_dict(), folder, content, weights, card)


def save_tensors(
    tensors: Mapping[str, Tensor], folder: Path, content: Mapping[str, Any], weights: str = WEIGHTS, card: str = CARD
) -> None:
    """`save_model` of tensors that no network holds."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(folder / weights) as path:
        save_file(tensors, path)
    parameters = sum(value.numel() for value in tensors.values())
    digest = {"weights_sha256": weights_digest(tensors), "parameters": parameters}
    write_json(folder / card, {"version": __version__} | dict(content) | digest)


def ingredient(base: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the card of a network tells of the one that its training started from; `base`: the card of that."""
    if base is None:
        return {}
    said = dict(base.get("base", {}))
    return {"base": {**said, "source_sha256": said.get("weights_sha256"), "weights_sha256": base["weights_sha256"]}}


def start_from(module: nn.Module, base: nn.Module, key: str, state: Mapping[str, Tensor] | None = None) -> None:
    """Give a network that is to be trained the weights of a base; `state`: where they are not just all of its own.

    Raises
    ------
    UserError
        They are of another network.
    """
    given = base.state_dict() if state is None else state
    try:
        module.load_state_dict(given)
    except RuntimeError as error:
        others = sorted(module.state_dict().keys() ^ given.keys())
        reason = f"{len(others)} tensors, such as {others[0]}" if others else str(error).splitlines()[-1].strip()
        raise UserError(
            f"{key}: the weights to start from are of another network than the study's ({reason}). Set what it is as"
            " the base has it: `python -m meddiff_steps read_bundle` shows it."
        ) from None


def load_tensors(folder: Path, card: Mapping[str, Any], name: str = WEIGHTS) -> dict[str, Tensor]:
    """The weights of a folder.

    Raises
    ------
    UserError
        The file is not readable, or holds other weights than the card says.
    """
    weights = folder / name
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{weights}: not readable as safetensors ({error}). Train again, or give the right file."
        ) from None
    found = weights_digest(tensors)
    if found != card["weights_sha256"]:
        raise UserError(
            f"{weights}: its digest {found[:12]} is not the one its card names ({card['weights_sha256'][:12]}). Take"
            " both from the same training."
        )
    return tensors


def load_weights(module: nn.Module, folder: Path, card: Mapping[str, Any], name: str = WEIGHTS) -> None:
    """Load the weights of a folder into a network, which is then frozen and in evaluation mode.

    Raises
    ------
    UserError
        The file is not readable, holds other weights than the card says, or those of another network.
    """
    tensors, weights = load_tensors(folder, card, name), folder / name
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        others = sorted(module.state_dict().keys() ^ tensors.keys())
        reason = f"{len(others)} tensors, such as {others[0]}" if others else str(error).splitlines()[-1].strip()
        raise UserError(
            f"{weights}: not the weights of this version's network ({reason}). Install meddiff-steps"
            f" {card.get('version', '0.1.0')}, which trained them, or train again."
        ) from None
    module.requires_grad_(False).eval()
