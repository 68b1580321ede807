"""An embedding in which a scan and its changed copies are near and other subjects far; see `privacy.embedder` for its training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from monai.networks.blocks import Convolution
from torch import Tensor, nn
from torch.nn import functional

#: Copies are found by their coarse shape; images are reduced until their longest side is at most this many voxels.
LONGEST_SIDE = {2: 64, 3: 32}

CHANNELS = (16, 32, 64)
DIM = 64


class Embedder(nn.Module):
    """Images (b, 1, *spatial) in [0, 1] to directions, float32 (b, 64), norm 1.

    Strided convolutions and one linear layer over the last, coarse map: place is kept, since it tells subjects apart.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        dims = len(shape)
        self.factor = -(-max(shape) // LONGEST_SIDE[dims])
        layers: list[nn.Module] = []
        for before, after in zip((1, *CHANNELS), CHANNELS, strict=False):
            layers.append(Convolution(dims, before, after, strides=2, kernel_size=3, norm=("GROUP", {"num_groups": 8}), act="LEAKYRELU"))
        side = [-(-(n // self.factor) // 2 ** len(CHANNELS)) for n in shape]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS[-1] * int(np.prod(side)), DIM))

    def reduce(self, images: Tensor) -> Tensor:
        """Block means, (b, 1, *spatial / factor)."""
        return (functional.avg_pool3d if images.ndim == 5 else functional.avg_pool2d)(images, self.factor)

    def embed(self, reduced: Tensor) -> Tensor:
        """Directions of images that were reduced already."""
        return functional.normalize(self.layers(reduced * 2.0 - 1.0), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(self.reduce(images))
