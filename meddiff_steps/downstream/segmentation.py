"""The segmentation study: does a segmenter that also learns from synthetic pairs draw better on real scans?

Arms differ in what they learn from and in nothing else: the same network, steps, batches and seeds.  What is compared,
and what the verdict is about, follows from the study's `segmentation_study` section alone, which is frozen before
anything is trained; no validation decides which weights are tested.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.losses import DiceCELoss
from monai.metrics import compute_average_surface_distance, compute_dice
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from meddiff_steps.config import SegmentationStudy
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.downstream.comparison import TRANSFER, Draws, Resampling, verdict
from meddiff_steps.imaging.variants import Variant
from meddiff_steps.models.first_stage.stem import Stem
from meddiff_steps.statistics.bootstrap import Figure, Statistic, figure
from meddiff_steps.training.loop import batch_rows, learning_rate_scale, update_average

# MONAI 1.6 warns of an argument of its own functions, once per scan and structure.
warnings.filterwarnings("ignore", message="monai.metrics.utils get_mask_edges:always_return_as_numpy")

#: Scans segmented at once.
PREDICT_BATCH = 8
#: What is measured of each structure of each scan.
MEASURES = ("dice", "surface_distance_mm")

#: Rows to images (rows, 1, *spatial), float32 in [0, 1], and label maps (rows, *spatial), uint8.
Reader = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Arm:
    """What segmenters learn from.

    Attributes
    ----------
    name
        `real_10`: of 10 % of the real training subjects; `both_10`: and of all synthetic pairs; `synthetic`.
    real, synthetic
        Rows of pairs, as the reader knows them; either may be empty.
    """

    name: str
    real: np.ndarray
    synthetic: np.ndarray


class SegmentationNetwork(nn.Module):
    """MONAI's U-Net on blocks of 2 x 2 (x 2) voxels, taken for channels: at the resolution of the image, a level of the
    same width would take eight times as long.

    Parameters
    ----------
    spatial_dims
        2 or 3.
    classes
        Structures and what lies outside.
    channels
        Features by level; sides of images are divisible by 2 for each.
    """

    def __init__(self, spatial_dims: int, classes: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.stem = Stem(spatial_dims, "space_to_depth")
        strides = (2,) * (len(channels) - 1)
        inputs, outputs = self.stem.channels(1), self.stem.channels(classes)
        self.net = UNet(spatial_dims, inputs, outputs, channels, strides, num_res_units=1, norm="INSTANCE")

    def forward(self, images: Tensor) -> Tensor:
        """(b, 1, *spatial) -> logits (b, classes, *spatial)."""
        return self.stem.inverse(self.net(self.stem(images)))


def arms(settings: SegmentationStudy, subjects: Sequence[str], synthetic: np.ndarray, root: str) -> list[Arm]:
    """All arms, in the order of the shares, `synthetic` last.

    Subjects of a smaller share are among those of a larger one.  A share is at least one subject.

    Parameters
    ----------
    subjects
        Of each real training pair, whose row is its place.
    synthetic
        Rows of synthetic pairs.
    """
    names = np.array(sorted(set(subjects)))
    names = names[step_generator(f"{root}/segmentation", "subjects", 0).permutation(len(names))]
    whose, found = np.array(subjects), []
    for share in settings.shares:
        chosen = names[: max(1, round(share * len(names)))]
        real = np.flatnonzero(np.isin(whose, chosen))
        found += [Arm(f"real_{_percent(share)}", real, synthetic[:0]), Arm(f"both_{_percent(share)}", real, synthetic)]
    return [*found, Arm("synthetic", np.arange(0), synthetic)]


def _percent(share: float) -> str:
    return f"{100 * share:g}".replace(".", "_")


def contrasts(settings: SegmentationStudy) -> list[tuple[str, str]]:
    """Pairs of arms that are compared, (arm, reference); the verdict is about the first."""
    added = [(f"both_{_percent(share)}", f"real_{_percent(share)}") for share in settings.shares]
    return [*added, ("synthetic", f"real_{_percent(max(settings.shares))}")]


def draw_batch(arm: Arm, settings: SegmentationStudy, root: str, number: int, step: int) -> np.ndarray:
    """Rows of one batch, (size,): shuffled epochs of real and of synthetic pairs, a coin for every place of it."""
    size, stream = settings.optimiser.batch_size, f"{root}/segmentation/{number}"
    if not len(arm.synthetic) or not len(arm.real):
        rows = arm.real if len(arm.real) else arm.synthetic
        return rows[batch_rows(stream, step, size, len(rows))]
    coins = step_generator(stream, "coins", step).random(size) < settings.synthetic
    real = arm.real[batch_rows(f"{stream}/real", step, size, len(arm.real))]
    made = arm.synthetic[batch_rows(f"{stream}/synthetic", step, size, len(arm.synthetic))]
    return np.where(coins, made, real)


def train(
    arm: Arm,
    number: int,
    network: SegmentationNetwork,
    settings: SegmentationStudy,
    read: Reader,
    root: str,
    device: str,
) -> SegmentationNetwork:
    """Train one segmenter for the configured number of steps, whatever it learns from; the running average of its
    weights, in evaluation mode.
    """
    schedule = settings.optimiser
    network.to(device).train()
    average = copy.deepcopy(network).requires_grad_(False).eval()
    optimiser = torch.optim.AdamW(network.parameters(), lr=schedule.learning_rate)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    for step in range(schedule.steps):
        images, labels = read(draw_batch(arm, settings, root, number, step))
        generator = step_generator(f"{root}/segmentation/{number}", "shifts", step)
        both = np.concatenate([images, labels[:, None]], 1)
        limit = settings.max_shift_voxels
        shifts = generator.integers(-limit, limit + 1, (len(both), both.ndim - 2))
        moved = [Variant(False, tuple(map(int, s)))(one) for one, s in zip(both, shifts, strict=True)]
        x = torch.from_numpy(np.stack(moved).astype(np.float32)).to(device)
        for group in optimiser.param_groups:
            group["lr"] = schedule.learning_rate * learning_rate_scale(step, schedule)
        loss = loss_of(network(x[:, :1]), x[:, 1:])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), schedule.gradient_clip)
        optimiser.step()
        update_average(average, network, schedule.averaging, step)
    return average


@torch.no_grad()
def segment(network: SegmentationNetwork, images: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Label maps of images (n, 1, *spatial), uint8 (n, *spatial)."""
    parts = [images[start : start + PREDICT_BATCH] for start in range(0, len(images), PREDICT_BATCH)]
    found = [network(torch.from_numpy(part).to(device)).argmax(1).byte().cpu().numpy() for part in parts]
    return np.concatenate(found)


def measure(made: np.ndarray, truth: np.ndarray, structures: int, spacing_mm: Sequence[float]) -> dict[str, np.ndarray]:
    """`MEASURES` of label maps (n, *spatial) against true ones, (n, structures) each.

    NaN where a scan has not got the structure.  A structure that is there and was not found at all has a Dice of 0 and
    the grid's diagonal for a distance, which is more than any other can be.
    """
    found, real = (_one_hot(labels, structures) for labels in (made, truth))
    dice = compute_dice(found, real, include_background=False).numpy()
    spacing = list(spacing_mm)
    distance = compute_average_surface_distance(found, real, symmetric=True, spacing=spacing).numpy()
    there = real[:, 1:].flatten(2).any(2).numpy()
    diagonal = float(np.linalg.norm(np.array(spacing) * truth.shape[1:]))
    distance = np.where(np.isfinite(distance), distance, diagonal)
    return {
        "dice": np.where(there, np.nan_to_num(dice), np.nan),
        "surface_distance_mm": np.where(there, distance, np.nan),
    }


def _one_hot(labels: np.ndarray, structures: int) -> Tensor:
    return functional.one_hot(torch.from_numpy(labels.astype(np.int64)), structures + 1).movedim(-1, 1)


def commonest(labels: np.ndarray, structures: int) -> np.ndarray:
    """The commonest label at each voxel of label maps (n, *spatial), uint8 (*spatial): it sees no image."""
    return np.stack([(labels == number).sum(0) for number in range(structures + 1)]).argmax(0).astype(np.uint8)


def run_study(
    settings: SegmentationStudy,
    compared: Sequence[Arm],
    read: Reader,
    test: tuple[np.ndarray, np.ndarray],
    structures: Sequence[str],
    spacing_mm: Sequence[float],
    root: str,
    device: str,
    workers: int,
) -> pd.DataFrame:
    """Train and test every segmenter of all arms, `workers` at a time with a thread each; their number changes no bit.

    Parameters
    ----------
    test
        Images (n, 1, *spatial) and label maps (n, *spatial) of the test scans.

    Returns
    -------
    DataFrame
        arm, seed, scan (its number in `test`), structure, and `MEASURES`; a row for each structure that a scan has.
    """
    torch.set_num_threads(1)
    classes, dims = len(structures) + 1, test[0].ndim - 2
    jobs = [(arm, number) for arm in compared for number in range(settings.seeds)]

    def network(number: int) -> SegmentationNetwork:
        torch.manual_seed(int(step_generator(f"{root}/segmentation", "weights", number).integers(2**31)))
        return SegmentationNetwork(dims, classes, settings.channels)

    def done(job: tuple[tuple[Arm, int], SegmentationNetwork]) -> pd.DataFrame:
        (arm, number), fresh = job
        trained = train(arm, number, fresh, settings, read, root, device)
        return cases(arm.name, number, segment(trained, test[0], device), test[1], structures, spacing_mm)

    found: list[pd.DataFrame] = []
    workers = workers if device == "cpu" else 1
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(jobs), desc="segmenters", unit="segmenter", mininterval=5, file=sys.stderr) as progress,
    ):
        for start in range(0, len(jobs), workers):
            batch = jobs[start : start + workers]
            # Weights are drawn from torch's global generator, so never in two threads at once.
            for table in pool.map(done, [(job, network(job[1])) for job in batch]):
                found.append(table)
                progress.update()
    return pd.concat(found, ignore_index=True)


def cases(
    arm: str, seed: int, made: np.ndarray, truth: np.ndarray, structures: Sequence[str], spacing_mm: Sequence[float]
) -> pd.DataFrame:
    """What was measured of each structure of each scan, as rows of `run_study`."""
    found = measure(made, truth, len(structures), spacing_mm)
    scan, structure = np.indices((len(truth), len(structures)))
    names = np.array(structures)[structure.ravel()]
    table = pd.DataFrame({"arm": arm, "seed": seed, "scan": scan.ravel(), "structure": names})
    table = table.assign(**{name: values.ravel() for name, values in found.items()})
    return table.dropna(subset=list(MEASURES)).reset_index(drop=True)


def compare(table: pd.DataFrame, settings: SegmentationStudy, subjects: Sequence[str], root: str) -> dict[str, Any]:
    """Figures of all arms and of their differences, with intervals over subjects and seeds, and the verdict.

    A scan counts by the mean over the structures that it has.

    Parameters
    ----------
    table
        As of `run_study`; arms that are no contrast's, such as a baseline, may have one seed.
    subjects
        Of each test scan.

    Returns
    -------
    dict
        `verdict` and `verdict_text`, about `primary` (contrast, and the difference in Dice); `arms` and `differences`,
        with `MEASURES`; each figure as {value, low, high, n}.
    """
    names = list(dict.fromkeys(table["arm"]))
    out: dict[str, Any] = {"arms": [{"name": name} for name in names], "differences": []}
    held = sorted(set(table["scan"]))
    whose = [subjects[scan] for scan in held]
    # One label: the same resamples for both measures and all arms.
    resampling = Resampling(whose, settings.seeds, settings.bootstrap, root, "segmentation")
    for name in MEASURES:
        means = table.groupby(["arm", "seed", "scan"])[name].mean()
        draws = resampling.draws({arm: _of_seeds(means[arm], settings.seeds) for arm in names})
        for entry in out["arms"]:
            entry[name] = _figure(draws[entry["name"]])
        for place, (arm, reference) in enumerate(contrasts(settings)):
            if name == MEASURES[0]:
                out["differences"].append({"arm": arm, "reference": reference})
            out["differences"][place][name] = _figure(draws[arm].minus(draws[reference]))
    for entry in out["arms"]:
        of_arm = table[table["arm"] == entry["name"]]
        entry["structures"] = {
            structure: {name: float(part[name].mean()) for name in MEASURES}
            for structure, part in of_arm.groupby("structure")
        }
    primary = out["differences"][0]["dice"]
    word, non_inferior = verdict(primary, settings.margin)
    arm, reference = contrasts(settings)[0]
    told = {"arm": arm, "reference": reference, "margin": settings.margin, "non_inferior": non_inferior}
    said = {
        "helps": f"Segmenters of arm {arm} draw better than those of {reference}."
        + (f" {TRANSFER}" if settings.shares[0] < 1 else ""),
        "harms": f"Segmenters of arm {arm} draw worse than those of {reference}.",
        "no evidence": f"Segmenters of arms {arm} and {reference} do not differ measurably.",
        "not evaluated": f"The difference of {arm} and {reference} has no interval: too few test subjects.",
    }
    return {
        "verdict": word,
        "verdict_text": said[word],
        "primary": {"contrast": told, "difference": primary},
        **out,
    }


def _figure(draws: Draws) -> Figure:
    return figure(draws.value, draws.widened(), draws.n)


def _of_seeds(means: pd.Series, seeds: int) -> list[Statistic]:
    """The mean over scans, by (seed, scan), with each seed; what has one seed alone is the same with all."""
    each = [part.sort_index().to_numpy() for _, part in means.groupby(level="seed")]
    return [_mean(each[seed % len(each)]) for seed in range(seeds)]


def _mean(values: np.ndarray) -> Statistic:
    return lambda weights: weights @ values / weights.sum(1)
