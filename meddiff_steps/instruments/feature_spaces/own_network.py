"""Spaces by networks of the user's own (`evaluate.features`), whose weights are on disk; nothing is downloaded.

They have names of the user's, so this module has no entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from monai.networks.nets import resnet
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from meddiff_steps.config import FeatureNetwork
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import sha256_file
from meddiff_steps.instruments.feature_spaces.base import FeatureSpace, digest_of
from meddiff_steps.models.torchscript import load_torchscript


def network_space(settings: FeatureNetwork, spatial_dims: int) -> FeatureSpace:
    """A space by weights that the user has on disk.

    Parameters
    ----------
    settings
        What the study's config says of it.
    spatial_dims
        Of the study's images; the network must take them.

    Raises
    ------
    UserError
        The file is missing, unreadable, or holds weights of another architecture.
    """
    path, key = Path(settings.weights), f"evaluate.features.{settings.name}"
    network = (
        load_torchscript(path, key) if settings.architecture == "torchscript" else _resnet(path, settings, spatial_dims)
    )
    network.eval()  # extraction runs without gradients

    def features(images: Tensor) -> Tensor:
        if settings.zscore:
            axes = tuple(range(1, images.ndim))
            images = (images - images.mean(axes, keepdim=True)) / images.std(
                axes, keepdim=True, correction=0
            ).clamp_min(1e-6)
        try:
            return network(images.expand(-1, settings.channels, *images.shape[2:]))
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"evaluate.features.{settings.name}: {path} does not take images {tuple(images.shape[1:])} with"
                f" channels {settings.channels} ({reason}). Give a network for these images, or change `channels`."
            ) from None

    weights = sha256_file(path)
    digest = digest_of("network", weights, settings.architecture, settings.channels, settings.zscore)
    return FeatureSpace(
        settings.name, digest, f"{settings.architecture} with the user's weights, sha256 {weights[:16]}", features
    )


def _resnet(path: Path, settings: FeatureNetwork, spatial_dims: int) -> nn.Module:
    """A MONAI ResNet without its last layer; what the name does not say is read from the weights."""
    try:
        tensors: Mapping[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"evaluate.features.{settings.name}: {path} is not readable as safetensors ({error}). Convert the"
            " checkpoint first."
        ) from None
    tensors = {
        name.removeprefix("module."): value
        for name, value in tensors.items()
        if not name.removeprefix("module.").startswith("fc.")
    }
    network = getattr(resnet, settings.architecture)(
        spatial_dims=spatial_dims,
        n_input_channels=settings.channels,
        feed_forward=False,
        shortcut_type="B" if any("downsample" in name for name in tensors) else "A",
        bias_downsample="layer2.0.downsample.0.bias" in tensors,
    )
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"evaluate.features.{settings.name}: {path} does not hold a {spatial_dims}D {settings.architecture}:"
            f" {reason}"
        ) from None
    return network
