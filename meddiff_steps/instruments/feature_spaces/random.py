"""The space `random`: a network with fixed random weights."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps.core.random_streams import philox
from meddiff_steps.instruments.feature_spaces.base import Context, FeatureSpace, digest_of

ENTRY = {
    "order": 1,
    "title": "general look",
    "summary": (
        "A convolutional network with fixed random weights: sees sharpness, noise, contrast and texture; may miss"
        " where in the image something is."
    ),
    "source": "Naeem et al. 2020 (random embeddings for precision, recall, density and coverage)",
    "spatial_dims": [2, 3],
    "needs": "nothing",
}


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


def build(context: Context) -> FeatureSpace:
    """The space `random`: `RandomNetwork`, float32 (b, 112)."""
    network = RandomNetwork(context.spatial_dims)
    weights = hashlib.sha256(b"".join(kernel.numpy().tobytes() for kernel in network.kernels)).hexdigest()
    return FeatureSpace(
        "random",
        digest_of("random", weights),
        f"{context.spatial_dims}D convolutional network with fixed random weights",
        network,
    )
