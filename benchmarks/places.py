"""What every comparison starts from: simulated subjects at one size, preprocessed once, and networks trained on them.

Everything is made by the product's own functions and kept in a work folder, so that one comparison can be run again
alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.files import atomic_path
from meddiff_steps.core.random_streams import philox
from meddiff_steps.imaging.preprocess import preprocess_shard
from meddiff_steps.imaging.shards import Shards, ShardWriter
from meddiff_steps.imaging.shards import TensorColumn as Column
from meddiff_steps.models.denoiser.effects import covariate_features
from meddiff_steps.models.latent_statistics import fit_effects, measure_standardisation
from meddiff_steps.simulation.dataset import simulate_cohort
from meddiff_steps.training.latent_data import LatentData
from meddiff_steps.training.loop import Task, learning_rate_scale, update_average

#: Root of every random number here.
SEED = "benchmarks"


@dataclass(frozen=True)
class Size:
    """One image size and how many simulated subjects stand behind it: `train`, then `val` (losses), then `test`
    (realism).
    """

    name: str
    shape: tuple[int, int, int]
    spacing_mm: float
    train: int
    val: int
    test: int

    @property
    def subjects(self) -> int:
        return self.train + self.val + self.test


#: The demo's size, and the largest at which two cores train in minutes.
SMALL = Size("32x40x32", (32, 40, 32), 5.0, train=96, val=16, test=64)
MEDIUM = Size("64x64x64", (64, 64, 64), 3.2, train=48, val=8, test=48)
#: Of `--quick`, which checks that everything runs and measures nothing.
TINY = Size("16x24x16", (16, 24, 16), 10.0, train=12, val=4, test=12)


@dataclass(frozen=True)
class Setting:
    """What a comparison is run with.

    Attributes
    ----------
    work
        Folder for cohorts and weights; nothing in it is a result.
    quick
        Smallest sizes and fewest turns, on made-up ellipsoids instead of simulated heads.
    threads
        Processor threads of both sides.
    """

    work: Path
    quick: bool = False
    threads: int = os.cpu_count() or 1

    @property
    def sizes(self) -> tuple[Size, ...]:
        return (TINY,) if self.quick else (SMALL, MEDIUM)

    def place(self, size: Size) -> Place:
        return Place(size, self)

    def either(self, full: Any, quick: Any) -> Any:
        return quick if self.quick else full


class Place:
    """The cohort of one size, on disk and preprocessed, and the study that both sides follow."""

    def __init__(self, size: Size, setting: Setting) -> None:
        self.size, self.setting = size, setting
        self.folder = setting.work / size.name
        steps = 2 if setting.quick else 200
        self.study = config.parse_study(
            {
                "study": "benchmarks",
                "seed": SEED,
                "cohort": {
                    "source": "simulated",
                    "subjects": max(20, size.subjects),
                    "shape": list(size.shape),
                    "spacing_mm": size.spacing_mm,
                },
                "covariates": {
                    "age": {"unit": "year", "range": [40, 90]},
                    "sex": {"levels": ["F", "M"]},
                    "diagnosis": {"levels": ["control", "case"]},
                    "brain_ml": {"unit": "mL", "range": [700, 2200]},
                    "ventricles_ml": {"unit": "mL", "range": [1, 150]},
                },
                "preprocess": {"shape": list(size.shape), "spacing_mm": size.spacing_mm, "shards": 1},
                # The demo's networks.
                "autoencoder": {
                    "channels": [16, 16] if setting.quick else [32, 64],
                    "latent_channels": 4 if setting.quick else 12,
                    "equivariance_weight": 0.25,
                    "norm_num_groups": 8 if setting.quick else 16,
                    "optimiser": {
                        "steps": steps,
                        "batch_size": 2,
                        "warmup_steps": 1 if setting.quick else 30,
                        "ema_decay": 0.97,
                    },
                },
                "diffusion": {
                    "channels": [16 if setting.quick else 64],
                    **({"num_res_blocks": 1} if setting.quick else {}),
                    "optimiser": {
                        "steps": 2 * steps,
                        "batch_size": 4,
                        "warmup_steps": 1 if setting.quick else 30,
                        "ema_decay": 0.99,
                    },
                },
                "decoder": {
                    "channels": 8 if setting.quick else 48,
                    "num_res_blocks": 1 if setting.quick else 3,
                    "optimiser": {"steps": 2 * steps, "batch_size": 4, "warmup_steps": 1 if setting.quick else 30},
                },
                "plan": [{"name": "syn", "subjects": max(20, size.test)}],
                "generate": {"guidance_scale": 1.5, "num_inference_steps": 16},
                "compute": {"device": "cpu"},
            },
            "the benchmarks",
        )

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row per subject: scan_id, subject_id, path, split and covariates; the cohort is made where it is not there
        yet.
        """
        root = self.folder / "cohort"
        if not (root / "participants.tsv").exists():
            source = self.study.cohort
            assert isinstance(source, config.SimulatedSource)
            if self.setting.quick:
                ellipsoids(root, source.subjects, self.size)
            else:
                simulate_cohort(source, SEED, root, self.setting.threads)
        table = pd.read_csv(root / "participants.tsv", sep="\t").head(self.size.subjects)
        splits = np.repeat(["train", "val", "test"], [self.size.train, self.size.val, self.size.test])
        ids = table["participant_id"]
        paths = [str(root / name / "anat" / f"{name}_T1w.nii.gz") for name in ids]
        return table.drop(columns="participant_id").assign(scan_id=ids, subject_id=ids, path=paths, split=splits)

    def files(self, split: str) -> list[Path]:
        """The `.nii.gz` files of a split."""
        return [Path(path) for path in self.table.loc[self.table["split"] == split, "path"]]

    @cached_property
    def images(self) -> Shards:
        """Preprocessed images, float16 (1, *shape), in the order of `table`."""
        path = self.folder / "images.arrow"
        if not path.exists():
            preprocess_shard(self.table, self.study.preprocess, path, self.setting.threads)
        return Shards([path])

    def rows(self, split: str) -> np.ndarray:
        """Rows of `images` and of `table` that belong to a split."""
        return np.flatnonzero(self.table["split"].to_numpy() == split)

    def tensors(self, split: str) -> Tensor:
        """Images of a split, float32 (n, 1, *shape)."""
        return torch.from_numpy(self.images.tensors("image", self.rows(split)))

    @cached_property
    def encoding(self) -> CovariateEncoding:
        return CovariateEncoding.fit(self.table, self.study.covariates)

    @cached_property
    def covariates(self) -> np.ndarray:
        """Encoded covariates of every row of `table`, float32 (n, k)."""
        return self.encoding.encode(self.table)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        settings = self.study.autoencoder
        return (settings.latent_channels, *(n // settings.downsampling for n in self.size.shape))

    @cached_property
    def fabric(self) -> Any:
        return make_fabric(self.study.compute, self.setting.threads)


class OurTraining:
    """A training of ours, stepped by hand: exactly the steps of `training.loop.fit`, without its checkpoints.

    With `seconds` the learning rate has run through its schedule when so much time was spent in steps, however many
    these were.
    """

    def __init__(self, task: Task, settings: config.Optimiser, seconds: float | None = None) -> None:
        self.task, self.settings, self.seconds, self.done, self.spent = task, settings, seconds, 0, 0.0
        self.rates = {
            name: [group["lr"] for group in optimiser.param_groups] for name, optimiser in task.optimisers.items()
        }

    def step(self) -> None:
        start = time.perf_counter()
        place = self.done if self.seconds is None else int(self.spent / self.seconds * self.settings.steps)
        scale = learning_rate_scale(min(place, self.settings.steps - 1), self.settings)
        for name, optimiser in self.task.optimisers.items():
            for group, rate in zip(optimiser.param_groups, self.rates[name], strict=True):
                group["lr"] = rate * scale
        self.task.train_step(self.done)
        update_average(self.task.modules["average"], self.task.modules["model"], self.settings.averaging, self.done)
        self.done += 1
        self.spent += time.perf_counter() - start


def write_latents(path: Path, means: Sequence[np.ndarray], log_variances: Sequence[np.ndarray] | None = None) -> Shards:
    """The product's latent cache from posteriors, each (c, *spatial); of scans as they are."""
    column, numbers = Column("float16", means[0].shape), np.zeros(means[0].ndim + 1, np.float32)
    columns = {"mean": column, "numbers": Column("float32", numbers.shape)}
    if log_variances is not None:
        columns["log_variance"] = column
    with ShardWriter(path, columns) as shard:
        for row, mean in enumerate(means):
            values = {} if log_variances is None else {"log_variance": log_variances[row]}
            shard.append(mean=mean, numbers=numbers, **values)
    return Shards([path])


def latent_data(place: Place, shards: Shards, decode: Callable[[Tensor], Tensor]) -> LatentData:
    """Standardisation and covariates' effects as the step `scale` fits them; `decode` gives images of latents."""
    rows = place.rows("train")
    standardise = measure_standardisation(shards.tensor("mean", int(row)) for row in rows)
    values, known = covariate_features(torch.from_numpy(place.covariates[rows]), place.encoding.level_counts)
    offset, size = torch.from_numpy(standardise.offset), float(standardise.scale)
    effects = fit_effects(
        lambda i: standardise(shards.tensors("mean", [int(rows[i])]))[0],
        values.numpy(),
        known.numpy(),
        place.table["subject_id"].to_numpy()[rows],
        lambda i: place.images.tensor("image", int(rows[i])).astype(np.float32),
        lambda standardised: decode(standardised * size + offset),
    )
    tensors = {"offset": standardise.offset, "scale": standardise.scale}
    tensors |= {f"effects.{name}": value for name, value in effects.items()}
    prior = {name: torch.from_numpy(np.asarray(value)) for name, value in tensors.items()}
    return LatentData(shards, prior, place.covariates, rows, place.rows("val"))


def save_weights(network: torch.nn.Module, path: Path) -> None:
    with atomic_path(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}, temporary)


def load_weights(network: torch.nn.Module, path: Path) -> bool:
    """Whether weights were there and are loaded."""
    if not path.exists():
        return False
    network.load_state_dict(load_file(path))
    return True


def ellipsoids(root: Path, subjects: int, size: Size) -> None:
    """A made-up cohort in the layout of the simulated one, in no time: ellipsoids whose size goes with age."""
    rows = ["participant_id\tage\tsex\tdiagnosis\tbrain_ml\tventricles_ml"]
    affine = np.diag([size.spacing_mm] * 3 + [1.0])
    affine[:3, 3] = -size.spacing_mm * (np.array(size.shape) - 1) / 2
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in size.shape), indexing="ij"))
    for index in range(subjects):
        rng, name = philox(SEED, f"ellipsoid {index}"), f"sub-{index:06d}"
        age = rng.uniform(45, 85)
        radius = np.sqrt((np.square(grid) / np.square(rng.uniform(0.6, 0.9, 3))[:, None, None, None]).sum(0))
        texture = ndimage.gaussian_filter(rng.standard_normal(size.shape), 1.0)
        # From nearly 0 at the surface, so that the smallest value inside, our black, is that of the background, the
        # peers'.
        image = np.where(radius < 1, 2 + 150 * (1 - radius**2) + 40 * (radius < (age - 30) / 80) + 4 * texture, 0)
        path = root / name / "anat" / f"{name}_T1w.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.clip(image, 0, 255).astype(np.uint8), affine), path)
        brain = 1000 + 500 * rng.random()
        rows.append(
            f"{name}\t{age:.1f}\t{'FM'[index % 2]}\t{('control', 'case')[index % 3 == 0]}\t{brain:.1f}\t{age / 2:.1f}"
        )
    (root / "participants.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
