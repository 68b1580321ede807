"""The learned copy detector: an embedding in which a scan and its changed copies are near and other subjects far.

Contrastive learning without labels (SimCLR: Chen et al. 2020), trained on the train split only, as Dar et al. 2025 do
to find copies.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.losses import ContrastiveLoss
from monai.networks.blocks import Convolution
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from meddiff_steps import config
from meddiff_steps.core.files import read_json
from meddiff_steps.core.folders import CARD
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.imaging.perturbations import augment
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.weights import load_weights
from meddiff_steps.training.loop import batch_rows, learning_rate_scale

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
        #: Voxels that become one, along each axis: as many along all, but for a side that is shorter.
        self.factors = [min(-(-max(shape) // LONGEST_SIDE[dims]), n) for n in shape]
        layers: list[nn.Module] = []
        for before, after in zip((1, *CHANNELS), CHANNELS, strict=False):
            layers.append(
                Convolution(
                    dims, before, after, strides=2, kernel_size=3, norm=("GROUP", {"num_groups": 8}), act="LEAKYRELU"
                )
            )
        side = [-(-(n // factor) // 2 ** len(CHANNELS)) for n, factor in zip(shape, self.factors, strict=True)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS[-1] * int(np.prod(side)), DIM))

    def reduce(self, images: Tensor) -> Tensor:
        """Block means, (b, 1, *spatial / factors)."""
        return (functional.avg_pool3d if images.ndim == 5 else functional.avg_pool2d)(images, self.factors)

    def embed(self, reduced: Tensor) -> Tensor:
        """Directions of images that were reduced already."""
        return functional.normalize(self.layers(reduced * 2.0 - 1.0), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(self.reduce(images))


def train_embedder(
    settings: config.Embedder, shards: Shards, rows: np.ndarray, spacing: Sequence[float] | None, root: str
) -> tuple[Embedder, list[float]]:
    """Train on `rows`; every batch is two changed copies of the same images (NT-Xent).

    Parameters
    ----------
    shards
        Preprocessed images.
    rows
        Of the train split, at least two.
    spacing
        Voxel size in mm along each axis; None of pictures.
    root
        The study's seed.

    Returns
    -------
    embedder, losses
        In evaluation mode; the loss of every step.
    """
    torch.manual_seed(int(step_generator(root, "embedder/weights", 0).integers(2**31)))
    schedule = settings.optimiser
    model = Embedder(shards.shape("image")[1:])
    optimiser = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=1e-4)
    criterion = ContrastiveLoss(temperature=settings.temperature)
    size, losses = min(schedule.batch_size, len(rows)), []
    for step in tqdm(range(schedule.steps), desc="embedder", mininterval=5, file=sys.stderr):
        generator = step_generator(root, "embedder/batch", step)
        # Where two epochs meet, an image may be drawn twice; it would be pushed away from itself.
        chosen = np.unique(batch_rows(f"{root}/embedder", step, size, len(rows)))
        images = model.reduce(torch.from_numpy(shards.tensors("image", rows[chosen])))
        for group in optimiser.param_groups:
            group["lr"] = schedule.learning_rate * learning_rate_scale(step, schedule)
        loss = criterion(*(model.embed(augment(images, generator, spacing)) for _ in range(2)))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.gradient_clip)
        optimiser.step()
        losses.append(float(loss.detach()))
    return model.requires_grad_(False).eval(), losses


def load_embedder(folder: Path) -> Embedder:
    """The trained copy detector, in evaluation mode on the CPU."""
    card = read_json(folder / CARD)
    model = Embedder(card["image_shape"][1:])
    load_weights(model, folder, card)
    return model
