"""What a study will cost, from what another one did cost.

Every stage has an amount of work that follows from the study alone: floating-point operations of its networks, or
voxels that it touches.  A finished study tells how fast a machine does each stage's work (its benchmarks, its files on
disk); dividing the one by the other estimates the next study on such a machine.  Operations are counted by torch on
networks without data, so the largest networks are counted in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.utils.flop_counter import FlopCounterMode

from meddiff_steps.config import CategoricalCovariate, Study
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import default_steps, evaluations
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.guidance import is_within
from meddiff_steps.diffusion.sampling import levels_of
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.denoiser.effects import feature_count
from meddiff_steps.models.drawing.base import build as build_decoder
from meddiff_steps.models.first_stage.base import build
from meddiff_steps.models.latent_statistics import FOLDS
from meddiff_steps.operations.status import newest_study, seconds, stage_of
from meddiff_steps.synthesis.grey_levels import IMAGES as TONE_IMAGES
from meddiff_steps.synthesis.size import plan_shards, planned_subjects
from meddiff_steps.training.tasks.decoder import CROPS_PER_IMAGE

#: Seconds that a job takes before it begins to work: Python, torch and MONAI are loaded.
START_S = 8.0
#: Forward and backward pass over the forward pass.
TRAINING = 3.0
#: Images that the evaluation measures at most, of either kind.
MEASURED = 5_000


@dataclass(frozen=True)
class Work:
    """What a stage has to do.

    Attributes
    ----------
    jobs
        How many jobs share it.
    amount, unit
        All of them together.
    gpu
        Whether the stage asks for a GPU.
    folder
        Where in the results its files lie, None where they are small.
    voxels
        Voxels (or latent values) in these files.
    """

    jobs: int
    amount: float
    unit: Literal["FLOP", "voxel", "row"]
    gpu: bool = False
    folder: str | None = None
    voxels: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """One stage of the study that is planned: jobs, hours of one job, and bytes it leaves on disk."""

    stage: str
    jobs: int
    hours_each: float
    gpu: bool
    disk: float


def forward_flops(study: Study) -> tuple[float, float, float, float]:
    """Floating-point operations per image of encoder, decoder, denoiser and a step of the drawing decoder, forward."""
    dims, shape = study.spatial_dims, study.preprocess.shape
    levels = _levels(study)
    with torch.device("meta"):
        autoencoder = build(study.autoencoder, dims)
        image = torch.empty(1, 1, *shape)
        with FlopCounterMode(display=False) as encoding:
            latent = autoencoder.encode(image).mode()
        with FlopCounterMode(display=False) as decoding:
            autoencoder.decode(latent)
        denoiser = Denoiser(study.diffusion, latent.shape[1:], levels)
        with FlopCounterMode(display=False) as denoising:
            denoiser(latent, torch.empty(1), Condition(torch.empty(1, len(levels))))
        with FlopCounterMode(display=False) as drawing:
            if study.decoder.network:
                drawer = build_decoder(study.decoder, (1, *shape))
                drawer.step(image)
    return tuple(counter.get_total_flops() for counter in (encoding, decoding, denoising, drawing))


def _levels(study: Study) -> list[int]:
    """Per covariate: the number of levels, or 0 for a continuous one."""
    return [len(c.levels) if isinstance(c, CategoricalCovariate) else 0 for c in study.covariates.values()]


def work(study: Study, scans: int) -> dict[str, Work]:
    """The work of every stage that takes long, by the name that its benchmarks have.

    Parameters
    ----------
    study
        The study.
    scans
        In its cohort.
    """
    encoder, decoder, denoiser, drawing = forward_flops(study)
    voxels, planned = math.prod(study.preprocess.shape), planned_subjects(study.plan)
    latent = study.autoencoder.latent_channels * voxels / study.autoencoder.downsampling**study.spatial_dims
    train, shards = study.splits.train * scans, plan_shards(study.plan, study.generate.shard_size)
    first, second = study.autoencoder.optimiser, study.diffusion.optimiser
    settings = study.generate
    passes = passes_per_sample(study)
    drawn = (decoder + settings.drawing_steps * drawing) if study.decoder.network else decoder
    third = study.decoder.optimiser
    crops = third.steps * third.batch_size
    coarse = 2**-study.spatial_dims if study.autoencoder.equivariance_weight else 0
    crop = math.prod(min(study.decoder.crop, n) for n in study.preprocess.shape) / voxels
    encoded = scans + train * (study.variants.count - 1)
    embedding = 2 * study.privacy.embedder.optimiser.steps * study.privacy.embedder.optimiser.batch_size
    # Predictors look at all; feature spaces at four kinds of images, once more for each point of the curve, and at
    # scans that are spoilt in five ways.
    compared = 4 * min(study.evaluate.max_images, planned, scans) * (1 + len(study.evaluate.cutoffs))
    evaluated = min(planned, MEASURED) + min(scans, MEASURED) + compared + 5 * study.evaluate.sanity_images
    stages = {
        "preprocess": Work(
            study.preprocess.shards, scans * voxels, "voxel", folder="preprocessed", voxels=scans * voxels
        ),
        "autoencoder": Work(
            1,
            TRAINING * first.steps * first.batch_size * (encoder + decoder * (1 + coarse))
            + (encoder + decoder) * (scans - train),
            "FLOP",
            True,
            "autoencoder",
            (scans - train) * voxels,
        ),
        "latents": Work(study.preprocess.shards, encoder * encoded, "FLOP", True, "latents", encoded * latent),
        "scale": Work(1, 2.0 * decoder * (FOLDS + 1) * feature_count(_levels(study)), "FLOP", True),
        "diffusion": Work(1, denoiser * TRAINING * second.steps * second.batch_size, "FLOP", True),
        "tone": Work(1, TONE_IMAGES * (passes * denoiser + drawn), "FLOP", True),
        "embedder": Work(1, embedding * voxels, "voxel"),
        "calibrate": Work(1, scans * voxels, "voxel", folder="privacy", voxels=scans * voxels),
        "generate": Work(shards, planned * (passes * denoiser + drawn), "FLOP", True, "generated", planned * voxels),
        "filter": Work(shards, planned * voxels, "voxel", True, "filtered", planned * voxels),
        "privacy": Work(1, (planned + scans) * voxels, "voxel"),
        "evaluate": Work(1, evaluated * voxels, "voxel", folder="evaluation"),
        "images": Work(shards, planned * voxels, "voxel", folder="release", voxels=planned * voxels),
        "ledger": Work(1, planned, "row"),
    }
    if study.decoder.network:
        decoded = crops / CROPS_PER_IMAGE * (encoder + decoder)
        amount = crops * TRAINING * crop * drawing + decoded
        stages["decoder"] = Work(1, amount, "FLOP", True, "decoder", (scans - train) * voxels)
    if study.cohort.source == "simulated":
        stages["simulate"] = Work(1, scans * voxels, "voxel", folder="cohort", voxels=scans * voxels)
    return stages


def passes_per_sample(study: Study) -> float:
    """Passes of the denoiser for one image; guidance takes a second one at the levels where it acts."""
    settings = study.generate
    steps = settings.num_inference_steps or default_steps(settings.sampler, study.diffusion.num_train_timesteps)
    count = evaluations(settings.sampler, steps)
    if settings.guidance_scale in (0, 1):
        return count
    levels = levels_of(settings.sampler, NoiseProcess.of(study.diffusion), steps)
    ratios = [s / a if a else math.inf for a, s in zip(levels.alpha[:-1], levels.sigma[:-1], strict=True)]
    return count * (1 + float(np.mean([is_within(settings.guidance_interval, ratio) for ratio in ratios])))


def estimates(study: Study, scans: int, measured: Path) -> Iterator[Estimate]:
    """What each stage will take on a machine like the one that ran another study.

    Parameters
    ----------
    study, scans
        The study that is planned, and the scans in its cohort.
    measured
        Results folder of a finished study.

    Raises
    ------
    UserError
        The folder holds no finished study.
    """
    manifest = measured / "cohort/manifest.parquet"
    if not manifest.is_file():
        raise UserError(
            f"{measured}: no cohort/manifest.parquet, expected the results of a finished study to measure by, such as"
            " results/demo."
        )
    known = work(newest_study(measured), pq.read_metadata(manifest).num_rows)
    took: dict[str, list[float]] = {}
    for benchmark in sorted((measured / "benchmarks").rglob("*.tsv")):
        took.setdefault(stage_of(benchmark.relative_to(measured / "benchmarks")), []).append(seconds(benchmark))
    for stage, planned in work(study, scans).items():
        if stage not in known or not took.get(stage):
            continue
        before, times = known[stage], took[stage]
        # What starting took is not work; of a short job, a quarter at least is taken for work, so that no rate is
        # infinite.
        start = min(START_S, 0.75 * sum(times) / len(times))
        rate = before.amount / (sum(times) - start * len(times))
        disk = 0.0
        if planned.folder is not None and before.voxels:
            disk = (
                planned.voxels
                * sum(path.stat().st_size for path in (measured / planned.folder).rglob("*") if path.is_file())
                / before.voxels
            )
        yield Estimate(stage, planned.jobs, (start + planned.amount / planned.jobs / rate) / 3600, planned.gpu, disk)


def wall_hours(found: list[Estimate], at_once: int) -> float:
    """Hours from start to end when `at_once` jobs run at a time and stages wait for each other."""
    return sum(math.ceil(one.jobs / at_once) * one.hours_each for one in found)
