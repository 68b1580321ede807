"""Names of tensors in older packages, as MONAI's networks have them today.

Three dialects: MONAI core since 1.4; MONAI GenerativeModels (monai-generative), whose attention blocks and upsampling
convolutions have other names; and MAISI's autoencoder, which wraps each convolution once more.  Every tensor must be
used and every weight given: `missing` and `unexpected` names are refused, not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from meddiff_steps.core.errors import UserError

#: Names of monai-generative and what they are in MONAI core; tried where a network does not have the name as it is.
OF_GENERATIVE: Sequence[tuple[str, str]] = (
    # Self-attention of a level without conditioning, and of the autoencoder
    (r"\.to_(q|k|v)\.(weight|bias)$", r".attn.to_\1.\2"),
    (r"\.proj_attn\.(weight|bias)$", r".attn.out_proj.\1"),
    # Attention within transformer blocks
    (r"\.to_out\.0\.(weight|bias)$", r".out_proj.\1"),
    # Upsampling: a convolution after the interpolation
    (r"\.conv\.conv\.(weight|bias)$", r".postconv.conv.\1"),
    (r"\.conv\.conv\.conv\.(weight|bias)$", r".postconv.conv.\1"),
    # MAISI: a convolution of a convolution
    (r"\.conv\.conv\.(weight|bias)$", r".conv.\1"),
    (r"\.conv\.conv\.conv\.(weight|bias)$", r".conv.conv.\1"),
)
#: Layer that self-attention of monai-generative makes and never applies, so that trained weights hold its random start.
#: `load_old_state_dict` of MONAI's UNet (monai 1.6) takes it for `attn.out_proj`, which is applied.
NEVER_APPLIED = ".proj_attn."
#: Names that a message shows.
SHOWN = 5


def renamed(
    tensors: Mapping[str, Tensor], network: nn.Module, origin: str, include_fc: bool = True
) -> dict[str, Tensor]:
    """Tensors by the names of `network`, each of the shape that it has there.

    A projection after attention that the weights' own network does not apply is the identity here.

    Parameters
    ----------
    tensors
        By the names of any dialect.
    network
        Of MONAI.
    origin
        Where the tensors come from, for messages.
    include_fc
        Whether the network that the weights are of has projections after attention (MONAI's `include_fc`).

    Raises
    ------
    UserError
        Tensors are missing or unexpected, or of another shape: another architecture than the settings say.
    """
    wanted = network.state_dict()
    found: dict[str, Tensor] = {}
    unexpected = []
    for name, value in tensors.items():
        place = next((other for other in _readings(name) if other in wanted and other not in found), None)
        if place is None:
            unexpected.append(name)
        else:
            found[place] = _identity(value) if NEVER_APPLIED in name else value
    if not include_fc:
        left_out = [name for name in wanted if ".out_proj." in name and name not in found]
        found |= {name: _identity(wanted[name]) for name in left_out}
    missing = [name for name in wanted if name not in found]
    if missing or unexpected:
        said = "; ".join(
            f"{len(names)} {kind}, such as {_some(names)}"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        )
        raise UserError(
            f"{origin}: not the weights of this network ({said}). Its settings are another architecture's, or the file"
            " is of another network: compare with `python -m meddiff_steps read_bundle`."
        )
    wrong = [
        f"{name} is {list(value.shape)}, expected {list(wanted[name].shape)}"
        for name, value in found.items()
        if value.shape != wanted[name].shape
    ]
    if wrong:
        raise UserError(
            f"{origin}: {len(wrong)} tensors have another shape ({_some(wrong, 3)}). The settings of the study are"
            " another size of network: compare with `python -m meddiff_steps read_bundle`."
        )
    return {name: value.to(wanted[name].dtype) for name, value in found.items()}


def _identity(value: Tensor) -> Tensor:
    """Weight or bias of a linear layer that changes nothing, in the shape of `value`."""
    return torch.eye(*value.shape) if value.ndim == 2 else torch.zeros_like(value)


def _readings(name: str) -> Iterable[str]:
    yield name
    for pattern, replacement in OF_GENERATIVE:
        other, count = re.subn(pattern, replacement, name)
        if count:
            yield other


def _some(names: Sequence[str], shown: int = SHOWN) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
