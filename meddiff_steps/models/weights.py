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

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, write_json


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Identity of a model: SHA-256 over its sorted tensors (name, dtype, shape, bytes), not over file bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_model(module: nn.Module, weights: Path, card: Path, content: dict[str, Any]) -> None:
    """Write the weights and, last, the card with their digest: a card on disk means that its weights are whole."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    with atomic_path(weights) as path:
        save_file(tensors, path)
    parameters = sum(value.numel() for value in tensors.values())
    write_json(card, content | {"weights_sha256": weights_digest(tensors), "parameters": parameters})


def load_weights(module: nn.Module, weights: Path, card: dict[str, Any]) -> None:
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
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{weights}: not the weights of this version's network ({reason}). Use the version that trained them, or"
            " train again."
        ) from None
    module.requires_grad_(False).eval()
