"""Feature spaces: images as rows of numbers that realism and diversity are measured on.

No figure of realism is comparable across feature spaces, so each has a digest of all that defines its numbers, which is
stored beside every figure made with it.  Three need nothing from outside: a network with fixed random weights, texture
and tissue measurements, and the embedding that the privacy stage trains on real training scans.  None of them is a part
of the generator, which would judge itself.  A fourth kind is weights that the user has on disk; nothing is ever
downloaded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets import resnet
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from meddiff_steps.config import FeatureNetwork
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import sha256_file
from meddiff_steps.core.random_streams import philox
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.torchscript import load_torchscript

#: Image values read at once; with `RandomNetwork` at eight channels it bounds memory to some hundred MB.
BATCH_VALUES = 2**21
#: Voxels brighter than this are looked at by first-order and texture features.
FOREGROUND = 0.05
#: Grey levels of the co-occurrence matrix (over [0, 1], fixed, so that images share them) and of the soft histograms.
GLCM_LEVELS, HISTOGRAM_LEVELS = 16, 8


@dataclass(frozen=True)
class FeatureSpace:
    """A named map from images to features.

    Attributes
    ----------
    name
        As it appears in metrics.json.
    digest
        First 16 hex digits of a SHA-256 over everything that defines the numbers.
    description
        One line for readers.
    extract
        float32 (b, 1, *spatial) in [0, 1] to (b, features).
    """

    name: str
    digest: str
    description: str
    extract: Callable[[Tensor], Tensor]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(["meddiff/features/v1", *parts], sort_keys=True).encode()).hexdigest()[:16]


def extract(
    spaces: Sequence[FeatureSpace], shards: Shards, rows: Sequence[int] | np.ndarray, task: str = "features"
) -> dict[str, np.ndarray]:
    """Features of selected images in every space, reading each image once.

    Parameters
    ----------
    spaces
        At least one; names are distinct.
    shards
        With a column `image`, (1, *spatial) in [0, 1].
    rows
        Of `shards`.
    task
        Name of the progress bar.

    Returns
    -------
    dict
        Per space float32 (rows, features).  Memory is that, plus one batch of `BATCH_VALUES` values, whatever the
        number of rows.

    Raises
    ------
    UserError
        A network gives something other than finite features, (b, d) or (b, d, *spatial).
    """
    numbers = np.asarray(rows, dtype=int)
    step = max(1, BATCH_VALUES // math.prod(shards.shape("image")))
    out: dict[str, np.ndarray] = {}
    with (
        torch.inference_mode(),
        tqdm(total=len(numbers), desc=task, unit="image", mininterval=5, file=sys.stderr) as progress,
    ):
        for start in range(0, len(numbers), step):
            chosen = numbers[start : start + step]
            images = torch.from_numpy(shards.tensors("image", chosen))
            for space in spaces:
                found = _checked(space, space.extract(images), len(images))
                if space.name not in out:
                    out[space.name] = np.empty((len(numbers), found.shape[1]), np.float32)
                out[space.name][start : start + len(images)] = found
            progress.update(len(chosen))
    return out


def _checked(space: FeatureSpace, found: Any, images: int) -> np.ndarray:
    if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != images:
        shown = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise UserError(
            f"evaluate.features.{space.name}: the network gave {shown} for {images} images, expected ({images},"
            " features). Export it so that it does."
        )
    rows = (found.float() if found.ndim == 2 else found.float().flatten(2).mean(2)).numpy()
    if not np.isfinite(rows).all():
        raise UserError(
            f"feature space {space.name}: features are not finite. Look at the images; for your own network, check"
            " `channels` and `zscore`."
        )
    return rows


# ------------------------------------------------------------------------------------------ a random network


class RandomNetwork(nn.Module):
    """Convolutions with fixed random weights; mean and spread of every channel at three scales, (b, 112).

    He-normal weights from a counter-based generator are the same on every machine.  Naeem et al. 2020 (PRDC) take
    random embeddings for images unlike the photographs that public networks learnt from; they see noise and blur, since
    nothing taught them to ignore either.
    """

    CHANNELS = (8, 16, 32)

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        self.convolve = functional.conv3d if spatial_dims == 3 else functional.conv2d
        widths = (1, *self.CHANNELS)
        self.kernels: list[Tensor] = []
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            values = philox("", f"random network {spatial_dims}D layer {i}").standard_normal(
                (after, before, *(3,) * spatial_dims), dtype=np.float32
            )
            self.kernels.append(torch.from_numpy(values * np.float32(math.sqrt(2.0 / (before * 3**spatial_dims)))))

    def forward(self, images: Tensor) -> Tensor:
        features, pooled = images * 2.0 - 1.0, []
        for i, kernel in enumerate(self.kernels):
            # The border is repeated: padding with any constant would draw a frame around images that do not end in it.
            features = functional.relu(
                self.convolve(
                    functional.pad(features, (1,) * 2 * (features.ndim - 2), "replicate"), kernel, stride=min(i + 1, 2)
                )
            )
            flat = features.flatten(2)
            pooled += [flat.mean(2), flat.std(2, correction=0)]
        return torch.cat(pooled, 1)


def random_space(spatial_dims: int) -> FeatureSpace:
    """The space `random`: `RandomNetwork`."""
    network = RandomNetwork(spatial_dims)
    weights = hashlib.sha256(b"".join(kernel.numpy().tobytes() for kernel in network.kernels)).hexdigest()
    return FeatureSpace(
        "random",
        _digest("random", weights),
        f"{spatial_dims}D convolutional network with fixed random weights",
        network,
    )


# ------------------------------------------------------------------------------------------ measured features


def offsets(spatial_dims: int) -> list[tuple[int, ...]]:
    """Neighbours at distance 1, one of each opposite pair: 4 in 2D, 13 in 3D."""
    every = itertools.product((-1, 0, 1), repeat=spatial_dims)
    return [offset for offset in every if offset > (0,) * spatial_dims]


def cooccurrence(levels: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """Grey-level co-occurrence matrices (Haralick, Shanmugam and Dinstein 1973), symmetric and normalised.

    Parameters
    ----------
    levels
        Whole numbers below `count`, (b, *spatial).
    mask
        Both voxels of a pair must be inside, bool (b, *spatial).
    count
        Grey levels.

    Returns
    -------
    numpy.ndarray
        float64 (b, count, count), summed over all directions; 0 everywhere for an image without a pair.
    """
    batch, spatial = levels.shape[0], levels.shape[1:]
    # A voxel outside counts as one more level, which is cut off at the end: cheaper than selecting pairs.
    plain = np.where(mask, levels, count).astype(np.int32)
    codes = plain + np.arange(batch, dtype=np.int32).reshape(-1, *(1,) * len(spatial)) * (count + 1)
    total = np.zeros(batch * (count + 1) ** 2)
    for offset in offsets(len(spatial)):
        here = (slice(None), *(slice(max(0, -o), n - max(0, o)) for o, n in zip(offset, spatial, strict=True)))
        there = (slice(None), *(slice(max(0, o), n - max(0, -o)) for o, n in zip(offset, spatial, strict=True)))
        total += np.bincount((codes[here] * (count + 1) + plain[there]).ravel(), minlength=len(total))
    matrices = total.reshape(batch, count + 1, count + 1)[:, :count, :count]
    matrices = matrices + matrices.transpose(0, 2, 1)
    return matrices / np.maximum(matrices.sum((1, 2), keepdims=True), 1.0)


def texture(matrices: np.ndarray) -> np.ndarray:
    """Contrast, dissimilarity, homogeneity, energy, correlation and entropy of co-occurrence matrices (b, k, k), (b,
    6).

    As scikit-image's `graycoprops` defines them (entropy in nats).  The correlation of a constant image is 1.
    """
    i, j = np.meshgrid(np.arange(matrices.shape[1]), np.arange(matrices.shape[1]), indexing="ij")

    def mean(values: np.ndarray) -> np.ndarray:
        return (matrices * values).sum((1, 2))

    centre = mean(i)
    variance = mean(i * i) - centre**2
    correlation = np.where(variance > 1e-12, (mean(i * j) - centre**2) / np.maximum(variance, 1e-12), 1.0)
    entropy = -(matrices * np.log(np.where(matrices > 0, matrices, 1.0))).sum((1, 2))
    squares = np.sqrt(np.square(matrices).sum((1, 2)))
    return np.stack(
        [mean((i - j) ** 2), mean(np.abs(i - j)), mean(1.0 / (1.0 + (i - j) ** 2)), squares, correlation, entropy],
        axis=1,
    )


def first_order(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Share of voxels inside, and mean, spread, skewness, excess kurtosis, quantiles and entropy of their values, (b,
    11).

    Parameters
    ----------
    images, mask
        (b, *spatial) float and bool.  An image without voxels inside gives zeros.
    """
    out = np.zeros((len(images), 11))
    for i, (image, inside) in enumerate(zip(images, mask, strict=True)):
        values = image[inside].astype(np.float64)
        if len(values) == 0:
            continue
        mean, spread = values.mean(), values.std()
        scaled = (values - mean) / max(spread, 1e-12)
        shares = np.histogram(values, 32, (0.0, 1.0))[0] / len(values)
        entropy = -float(np.sum(shares * np.log(np.where(shares > 0, shares, 1.0))))
        out[i] = [
            inside.mean(),
            mean,
            spread,
            np.mean(scaled**3),
            np.mean(scaled**4) - 3.0,
            *np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]),
            entropy,
        ]
    return out


def soft_histograms(images: Tensor) -> Tensor:
    """Share of each grey level in each half of every axis: regional tissue amounts, (b, 64) in 3D and (b, 32) in 2D.

    Every voxel is shared between the two nearest of `HISTOGRAM_LEVELS` levels over [0, 1], as for the predictors.
    """
    position = images.clamp(0.0, 1.0) * (HISTOGRAM_LEVELS - 1)
    pool = functional.adaptive_avg_pool3d if images.ndim == 5 else functional.adaptive_avg_pool2d
    parts = [pool((1.0 - (position - level).abs()).clamp_min(0.0), 2).flatten(1) for level in range(HISTOGRAM_LEVELS)]
    return torch.cat(parts, 1)


def radiomic_features(images: Tensor) -> Tensor:
    """`first_order`, `texture` and `soft_histograms` of images (b, 1, *spatial), (b, 81) in 3D and (b, 49) in 2D."""
    values = images[:, 0].numpy()
    mask = values > FOREGROUND
    levels = np.clip((values * GLCM_LEVELS).astype(np.int32), 0, GLCM_LEVELS - 1)
    measured = np.concatenate([first_order(values, mask), texture(cooccurrence(levels, mask, GLCM_LEVELS))], axis=1)
    return torch.cat([torch.from_numpy(measured.astype(np.float32)), soft_histograms(images)], 1)


def radiomic_space() -> FeatureSpace:
    """The space `radiomics`: `radiomic_features`."""
    # The definition above is fixed by a version, which has to be raised when it changes.
    digest = _digest("radiomics", 1, FOREGROUND, GLCM_LEVELS, HISTOGRAM_LEVELS)
    return FeatureSpace(
        "radiomics",
        digest,
        "grey-value statistics, co-occurrence texture and regional tissue amounts",
        radiomic_features,
    )


# ---------------------------------------------------------------------------------------------- networks


def embedder_space(network: nn.Module, weights_sha256: str) -> FeatureSpace:
    """The space `embedder`: what the privacy stage learnt, without labels, from real training scans."""
    return FeatureSpace(
        "embedder",
        _digest("embedder", weights_sha256),
        "embedding learnt without labels from real training scans",
        network,
    )


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
    digest = _digest("network", weights, settings.architecture, settings.channels, settings.zscore)
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
