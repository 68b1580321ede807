"""A network that measures volumes of structures in images; see `evaluation.segmenter` for its training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.networks.nets import BasicUNet
from monai.networks.utils import pixelshuffle, pixelunshuffle
from torch import Tensor, nn
from torch.nn import functional

#: Images are reduced until their longest side is at most this many voxels; volumes need no finer grid, and time stays bounded.
LONGEST_SIDE = 96
#: Smaller images are padded: each side is halved five times.
SMALLEST_SIDE = 32


class Segmenter(nn.Module):
    """Reduced images (b, 1, *spatial) in [0, 1] to logits of each structure's share of each voxel, (b, structures, *spatial).

    A U-Net on blocks of 2 x 2 x 2 voxels, taken for channels: convolutions of one channel at full resolution would take eight times as long.

    Parameters
    ----------
    structures
        Names, in the order of the channels.
    shape
        Of whole images.
    channels
        Features at half, quarter, eighth, 1/16 and 1/32 of the resolution.
    """

    def __init__(self, structures: Sequence[str], shape: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        self.structures = tuple(structures)
        self.factor = -(-max(shape) // LONGEST_SIDE)
        self.reduced_shape = tuple(-(-n // self.factor) for n in shape)
        self.net = BasicUNet(3, 8, 8 * len(structures), features=(*channels, channels[0]), norm="BATCH")

    def grid(self, affine: np.ndarray) -> np.ndarray:
        """Affine (4, 4) of the reduced grid of an image with this affine."""
        step = np.diag([self.factor] * 3 + [1.0])
        step[:3, 3] = (self.factor - 1) / 2
        return affine @ step

    def reduce(self, images: Tensor) -> Tensor:
        """Block means (b, 1, *reduced_shape); what a last block has beyond the image counts as 0."""
        missing = [whole * self.factor - n for whole, n in zip(self.reduced_shape, images.shape[2:], strict=True)]
        return functional.avg_pool3d(functional.pad(images, [end for m in reversed(missing) for end in (0, m)]), self.factor)

    def forward(self, reduced: Tensor) -> Tensor:
        shape = reduced.shape[2:]
        padded = functional.pad(reduced, [end for n in reversed(shape) for end in (0, max(n + n % 2, SMALLEST_SIDE) - n)])
        logits = pixelshuffle(self.net(pixelunshuffle(padded * 2.0 - 1.0, 3, 2)), 3, 2)
        return logits[:, :, : shape[0], : shape[1], : shape[2]]

    @torch.inference_mode()
    def volumes(self, images: Tensor, voxel_ml: float) -> np.ndarray:
        """Volume of each structure in whole images, float64 (b, structures): the sum of its shares, so that a voxel may count in part.

        `voxel_ml` is the volume of a voxel of the whole images.
        """
        shares = torch.sigmoid(self(self.reduce(images))).double()
        return shares.sum(dim=(2, 3, 4)).cpu().numpy() * voxel_ml * self.factor**3
