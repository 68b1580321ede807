"""A second instrument for volumes: a segmenter that learnt from label maps of real training scans.

The predictors (`predictors`) see how grey values are distributed; the segmenter finds the structure itself.  Where both
say that a synthetic brain has the ventricles that were asked for, the answer does not hang on one of them.
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses import DiceLoss
from monai.metrics import compute_dice
from monai.networks.nets import BasicUNet
from monai.networks.utils import pixelshuffle, pixelunshuffle
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from meddiff_steps import config
from meddiff_steps.core.files import read_json
from meddiff_steps.core.folders import CARD
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.imaging.background import head_of
from meddiff_steps.imaging.channels import filled_in
from meddiff_steps.imaging.label_maps import read_labels
from meddiff_steps.imaging.masks import on_head
from meddiff_steps.imaging.reading import Image, ScanError
from meddiff_steps.imaging.resampling import sampled_labels
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.weights import load_weights
from meddiff_steps.statistics.bootstrap import Bootstrap
from meddiff_steps.statistics.measures import mean_of, pearson
from meddiff_steps.training.loop import batch_rows, learning_rate_scale, update_average

#: Images are reduced until their longest side is at most this many voxels; volumes need no finer grid, and time stays
#: bounded.
LONGEST_SIDE = 96
#: Smaller images are padded: each side is halved five times.
SMALLEST_SIDE = 32


class Segmenter(nn.Module):
    """Reduced images (b, 1, *spatial) in [0, 1] to logits of each structure's share of each voxel, (b, structures,
    *spatial).

    A U-Net on blocks of 2 x 2 x 2 voxels, taken for channels: convolutions of one channel at full resolution would take
    eight times as long.

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
        return functional.avg_pool3d(
            functional.pad(images, [end for m in reversed(missing) for end in (0, m)]), self.factor
        )

    def forward(self, reduced: Tensor) -> Tensor:
        shape = reduced.shape[2:]
        padded = functional.pad(
            reduced, [end for n in reversed(shape) for end in (0, max(n + n % 2, SMALLEST_SIDE) - n)]
        )
        logits = pixelshuffle(self.net(pixelunshuffle(padded * 2.0 - 1.0, 3, 2)), 3, 2)
        return logits[:, :, : shape[0], : shape[1], : shape[2]]

    @torch.inference_mode()
    def label_map(self, image: Tensor) -> np.ndarray:
        """The structure of each voxel of one whole image (1, 1, *shape), uint8 (*shape): 1 for the first structure and
        so on, 0 where none has more than half of the voxel; of several that do, the one with the largest share.
        """
        value, place = self._logits(image).max(dim=0)
        return torch.where(value > 0, place + 1, 0).to(torch.uint8).numpy()

    @torch.inference_mode()
    def doubt(self, image: Tensor, labels: np.ndarray) -> np.ndarray:
        """By how much the logit of each voxel's label is less than that of the label which `label_map` gives it,
        float32 (*shape), at least 0; that of no label is 0.

        0 for `label_map` itself, and next to 0 for one of another machine: it differs where logits are all but equal.
        """
        logits = self._logits(image)
        logits = torch.cat([torch.zeros_like(logits[:1]), logits])
        told = logits.gather(0, torch.from_numpy(labels.astype(np.int64))[None])[0]
        return (logits.amax(dim=0) - told).numpy()

    def _logits(self, image: Tensor) -> Tensor:
        """Those of one whole image (1, 1, *shape), (structures, *shape)."""
        logits = self(self.reduce(image))
        if self.factor > 1:
            logits = functional.interpolate(logits, scale_factor=self.factor, mode="trilinear", align_corners=False)
        return logits[0, :, : image.shape[2], : image.shape[3], : image.shape[4]]

    @torch.inference_mode()
    def volumes(self, images: Tensor, voxel_ml: float) -> np.ndarray:
        """Volume of each structure in whole images, float64 (b, structures): the sum of its shares, so that a voxel may
        count in part.

        `voxel_ml` is the volume of a voxel of the whole images.
        """
        shares = torch.sigmoid(self(self.reduce(images))).double()
        return shares.sum(dim=(2, 3, 4)).cpu().numpy() * voxel_ml * self.factor**3


logger = logging.getLogger(__name__)

#: Training and held-out scans whose label maps are read, at most of each.
MAX_SCANS = 500
#: Training scans with a label map that a segmenter needs.
MIN_SCANS = 10
#: Resamples of held-out subjects.
RESAMPLES = 1000
#: Training images get another contrast (grey values to a power between 1 / GAMMA and GAMMA) and noise, because
#: synthetic images are not the scanner's.
GAMMA, NOISE = 1.25, 0.02
#: Images segmented at once.
BATCH = 8


def label_shares(
    path: Path,
    structures: Mapping[str, config.Structure],
    affine: np.ndarray,
    shape: Sequence[int],
    head: Image | None = None,
) -> np.ndarray:
    """Which part of each voxel of a grid belongs to each structure.

    Parameters
    ----------
    path
        Label map: a volume of whole numbers, 0 outside all structures.
    structures
        Labels of each.
    affine, shape
        The grid: affine (4, 4) in mm, and shape.
    head
        That the labels are to lie on, as of `background.head_of`.

    Returns
    -------
    numpy.ndarray
        float32 (structures, *shape) in [0, 1]; 0 outside the label map.

    Raises
    ------
    ScanError
        The file cannot be read, or its labels lie beside the head.
    UserError
        It is no label map.
    """
    labels = read_labels(path)
    assert labels.affine is not None, "a volume has an affine"
    whole = labels.array
    on_head(path, head, labels, path)
    to_labels = np.linalg.inv(labels.affine) @ affine
    # What lies between two voxels of the label map counts half for each.
    shares = np.zeros((len(structures), *shape), np.float32)
    for sampled in sampled_labels(whole, to_labels, shape):
        for share, s in zip(shares, structures.values(), strict=True):
            held = np.isin(sampled, s.labels) if s.labels else (sampled > 0) & ~np.isin(sampled, s.all_but)
            share += held.mean(axis=-1, dtype=np.float32) / 2
    return shares


@contextmanager
def labelled(
    scans: Images, affines: Mapping[str, np.ndarray], settings: config.Segmentation, model: Segmenter
) -> Iterator[tuple[Images, Shards]]:
    """Scans that have a label map, and the shares of their voxels (`shares`), row by row; in a temporary file for as
    long as the block lasts.

    Scans without a readable label map, or with one that lies beside the head, are left out with a warning.
    """
    with tempfile.TemporaryDirectory(prefix="meddiff-labels-") as folder:
        path, kept, images = Path(folder) / "labels.arrow", [], scans.column()
        shape = (len(model.structures), *model.reduced_shape)
        with ShardWriter(path, {"shares": TensorColumn("float16", shape)}) as shard:
            for at, scan in enumerate(
                tqdm(scans.table.to_dict("records"), desc="label maps", unit="scan", mininterval=5, file=sys.stderr)
            ):
                try:
                    affine = affines[scan["scan_id"]]
                    head = head_of(Image(images[at : at + 1][0, 0], affine), "nonzero")
                    labels = filled_in(settings.labels, scan, "segmentation.labels")
                    grid = model.grid(affine)
                    shard.append(shares=label_shares(labels, settings.structures, grid, model.reduced_shape, head))
                except ScanError as error:
                    logger.warning("left out %s: %s", scan["scan_id"], error)
                    continue
                kept.append(at)
        yield scans.taken(kept), Shards([path])


def new_segmenter(settings: config.Segmentation, shape: Sequence[int], root: str) -> Segmenter:
    """An untrained segmenter for images of this shape; `root` is the study's seed."""
    torch.manual_seed(int(step_generator(root, "segmenter/weights", 0).integers(2**31)))
    return Segmenter(list(settings.structures), shape, settings.channels)


def train_segmenter(
    model: Segmenter, settings: config.Segmentation, scans: Images, labels: Shards, flip: bool, root: str, device: str
) -> Segmenter:
    """Train with soft labels.

    The loss is cross entropy, which is least where shares and so volumes are right on average, in units of what it is
    when every voxel is given the mean share, so that small structures count as much as large ones; and Dice loss, which
    finds them sooner.

    Parameters
    ----------
    model
        Of `new_segmenter`.
    scans, labels
        Training scans and the shares of their voxels, as `labelled` gives them.
    flip
        Mirror half of the batches left-right, structures included: never where one of them has a side.
    root
        The study's seed.
    device
        "cpu" or "cuda".

    Returns
    -------
    Segmenter
        The average of the weights over the steps, in evaluation mode on the CPU.
    """
    schedule = settings.optimiser
    model, images = model.to(device).train(), scans.column()
    # Begin with each structure's mean share everywhere, not with a half.
    few = labels.tensors("shares", np.arange(min(len(labels), BATCH)))
    share = torch.from_numpy(few).mean(dim=(0, 2, 3, 4)).clamp(1e-6, 1 - 1e-6).to(device)
    at_first = functional.binary_cross_entropy(share, share, reduction="none")
    with torch.no_grad():
        model.net.final_conv.bias.copy_(torch.logit(share).repeat_interleave(8))
    average, overlap = copy.deepcopy(model), DiceLoss(sigmoid=True, batch=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=1e-4)
    for step in tqdm(range(schedule.steps), desc="segmenter", mininterval=5, file=sys.stderr):
        generator = step_generator(root, "segmenter/batch", step)
        rows = batch_rows(f"{root}/segmenter", step, min(schedule.batch_size, len(scans)), len(scans))
        seen = _varied(model.reduce(torch.from_numpy(images[rows])), generator)
        truth = torch.from_numpy(labels.tensors("shares", rows))
        if generator.integers(2) and flip:
            seen, truth = seen.flip(2), truth.flip(2)
        for group in optimiser.param_groups:
            group["lr"] = schedule.learning_rate * learning_rate_scale(step, schedule)
        logits, truth = model(seen.to(device)), truth.to(device)
        surprise = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(dim=(0, 2, 3, 4))
        loss = (surprise / at_first).mean() + overlap(logits, truth)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.gradient_clip)
        optimiser.step()
        update_average(average, model, schedule.averaging, step)
    return average.cpu().requires_grad_(False).eval()


def _varied(images: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Images in another contrast and with noise where they are not 0, each its own."""
    powers = torch.from_numpy(GAMMA ** generator.uniform(-1, 1, (len(images), 1, 1, 1, 1)).astype(np.float32))
    noise = torch.from_numpy(generator.normal(0, NOISE, images.shape).astype(np.float32))
    return (images**powers + noise * (images > 0)).clamp(0, 1)


def segmented_volumes(model: Segmenter, images: Images, voxel_ml: float, task: str) -> dict[str, np.ndarray]:
    """Volume in mL of each structure, (n,); `task` names the progress bar."""
    volumes = [
        model.volumes(torch.from_numpy(part), voxel_ml)
        for batch in images.batches(task)
        for part in np.split(batch, range(BATCH, len(batch), BATCH))
    ]
    return dict(zip(model.structures, np.concatenate(volumes).T, strict=True))


def agreement(model: Segmenter, scans: Images, labels: Shards, voxel_ml: float, root: str) -> dict[str, Any]:
    """How well the segmenter finds structures in scans that it did not learn from.

    Parameters
    ----------
    scans, labels
        Held-out scans and the shares of their voxels.
    voxel_ml
        Volume of a voxel of the scans.
    root
        The study's seed, of the resamples of subjects.

    Returns
    -------
    dict
        Per structure figures over subjects: `dice` (mean over scans of the Dice coefficient where more than half of a
        voxel belongs to it), and `r` (of three scans or more), `mae_ml` and `bias_ml` of its volume against that of the
        label map; `scans` is their number.
    """
    found = segmented_volumes(model, scans, voxel_ml, "segmenting held-out scans")
    images, overlaps, truths = scans.column(), [], []
    for at in range(len(scans)):
        truth = torch.from_numpy(labels.tensors("shares", np.array([at])))
        with torch.inference_mode():
            guess = model(model.reduce(torch.from_numpy(images[at : at + 1])))
        overlaps.append(compute_dice((guess > 0).float(), (truth > 0.5).float(), ignore_empty=False)[0].numpy())
        truths.append(truth.double().sum(dim=(0, 2, 3, 4)).numpy() * voxel_ml * model.factor**3)
    boot = Bootstrap(scans.units, RESAMPLES, root, "segmenter")
    card: dict[str, Any] = {"scans": len(scans)}
    for name, dice, true in zip(model.structures, np.transpose(overlaps), np.transpose(truths), strict=True):
        error = found[name] - true
        statistics = {
            "dice": mean_of(dice),
            "r": pearson(found[name], true) if len(scans) > 2 else mean_of(np.full(len(scans), np.nan)),
            "mae_ml": mean_of(np.abs(error)),
            "bias_ml": mean_of(error),
        }
        card[name] = {key: boot.figure(statistic) for key, statistic in statistics.items()}
    return card


def load_segmenter(folder: Path) -> tuple[Segmenter, dict[str, Any]]:
    """The trained segmenter, in evaluation mode on the CPU, and its card."""
    card = read_json(folder / CARD)
    model = Segmenter(card["structures"], card["image_shape"][1:], card["channels"])
    load_weights(model, folder, card)
    return model, card
