"""Both sides' ways of every part, as functions that make a unit of work for a batch."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from monai.inferers import LatentDiffusionInferer

from benchmarks import peer
from benchmarks.gpu.case import Case
from meddiff_steps import config
from meddiff_steps.compute.compilation import speed_up
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn, in_background
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.latent_statistics import Standardisation
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.privacy.detectors import latent
from meddiff_steps.privacy.detectors.base import Context, TrainingImages
from meddiff_steps.synthesis.generate import CohortGenerator
from meddiff_steps.training.encoding import encode_shard
from meddiff_steps.training.latent_data import LatentData
from meddiff_steps.training.loop import update_average
from meddiff_steps.training.tasks.autoencoder import AutoencoderTask
from meddiff_steps.training.tasks.decoder import DecoderTask
from meddiff_steps.training.tasks.diffusion import DiffusionTask

#: One unit of work, begun at least; returns how many images it was.
Work = Callable[[], int]
#: Makes it for a batch size.
Make = Callable[[int], Work]


def autotuned(make: Make) -> Make:
    """The same where cuDNN times its convolutions and takes the fastest: `compute.autotune`, and what tutorials set.

    The switch is global: on while this side works.
    """

    def made(batch: int) -> Work:
        work = make(batch)

        def switched() -> int:
            torch.backends.cudnn.benchmark = True
            try:
                return work()
            finally:
                torch.backends.cudnn.benchmark = False

        return switched

    return made


# ----------------------------------------------------------------------------------------------------- trainings


def stepping(task: AutoencoderTask | DiffusionTask | DecoderTask, settings: config.Optimiser, batch: int) -> Work:
    """Steps as `training.loop.fit` takes them, reading of images and averaging of weights included."""
    step = iter(range(sys.maxsize))

    def work() -> int:
        number = next(step)
        task.train_step(number)
        update_average(task.modules["average"], task.modules["model"], settings.averaging, number)
        return batch

    return work


def _sized(settings: Any, batch: int) -> Any:
    """A section of a study with another batch size."""
    return settings.model_copy(update={"optimiser": settings.optimiser.model_copy(update={"batch_size": batch})})


def our_autoencoder(case: Case, compiled: bool, section: config.Autoencoder | None = None) -> Make:
    def make(batch: int) -> Work:
        fabric, settings = case.fabric(), _sized(section or case.first, batch)
        task = AutoencoderTask(settings, config.Variants(), case.images, range(case.count), range(2), "bench", fabric)
        speed_up(task.costly, case.compute(compiled), fabric, training=True)
        return stepping(task, settings.optimiser, batch)

    return make


def our_diffusion(case: Case, compiled: bool, section: config.Diffusion | None = None) -> Make:
    def make(batch: int) -> Work:
        fabric, settings = case.fabric(), _sized(section or case.study.diffusion, batch)
        shards = Shards([case.folder / "latents.arrow"])
        rows = np.arange(len(shards))
        covariates = case.encoding.encode(case.table.iloc[rows % len(case.table)].reset_index(drop=True))
        data = LatentData(shards, case.prior(), covariates, rows, rows[:2])
        task = DiffusionTask(settings, data, case.encoding, "bench", fabric)
        speed_up(task.costly, case.compute(compiled), fabric, training=True)
        return stepping(task, settings.optimiser, batch)

    return make


def our_drawing(case: Case, compiled: bool) -> Make:
    """Crops of the drawing decoder, the images that they are cut from encoded and decoded at every step."""

    def make(batch: int) -> Work:
        fabric, settings = case.fabric(), _sized(case.study.decoder, batch)
        first = build_first_stage(case.first, 3).requires_grad_(False).eval()
        rows = range(case.count)
        task = DecoderTask(settings, config.Variants(), first, case.images, rows, range(2), "bench", fabric)
        speed_up(task.costly, case.compute(compiled), fabric, training=True)
        return stepping(task, settings.optimiser, batch)

    return make


def peer_autoencoder(case: Case) -> Make:
    """The tutorial's, fp32 and cuDNN's choice by the clock."""

    def make(batch: int) -> Work:
        network = peer.peer_autoencoder(case.first, case.device)
        optimiser = peer.peer_optimiser(network, peer.AUTOENCODER.learning_rate)
        images = case.batch(batch)

        def work() -> int:
            peer.peer_autoencoder_step(network, optimiser, images.to(case.device), case.first.kl_weight)
            return batch

        return work

    return autotuned(make)


def _context(case: Case, batch: int) -> torch.Tensor:
    rows = case.encoding.encode(case.table.iloc[:1].reset_index(drop=True)).repeat(batch, 0)
    return peer.peer_context(rows, case.device)


def peer_tutorial(case: Case) -> Make:
    """The tutorial's diffusion training: fp16 under a GradScaler, every image encoded at every step."""

    def make(batch: int) -> Work:
        settings = case.study.diffusion
        first = peer.peer_autoencoder(case.first, case.device).requires_grad_(False).eval()
        network = peer.peer_unet(settings, case.first.latent_channels, len(case.study.covariates), case.device)
        optimiser = peer.peer_optimiser(network, peer.DIFFUSION.learning_rate)
        precision, images, context = (
            peer.Precision(case.device, peer.DIFFUSION.half),
            case.batch(batch),
            _context(case, batch),
        )
        with precision.autocast():
            factor = peer.peer_scale_factor(first, images[:1].to(case.device))
        inferer = LatentDiffusionInferer(peer.peer_scheduler(settings), scale_factor=factor)

        def work() -> int:
            told = peer.dropped(context, settings.condition_dropout)
            peer.peer_diffusion_step(
                network, first, inferer, optimiser, images.to(case.device), told, case.latent_shape, precision
            )
            return batch

        return work

    return autotuned(make)


def peer_cached(case: Case) -> Make:
    """MAISI's diffusion training: a rectified flow on cached latents on the host, fp16 under a GradScaler."""

    def make(batch: int) -> Work:
        settings = case.study.diffusion
        network = peer.peer_unet(settings, case.first.latent_channels, len(case.study.covariates), case.device)
        optimiser = peer.peer_optimiser(network, peer.CACHED.learning_rate)
        precision, scheduler = peer.Precision(case.device, peer.CACHED.half), peer.peer_flow(settings)
        latents, context = torch.randn(batch, *case.latent_shape), _context(case, batch)

        def work() -> int:
            told = peer.dropped(context, settings.condition_dropout)
            peer.peer_cached_step(network, scheduler, optimiser, latents.to(case.device), told, precision)
            return batch

        return work

    return make


# ------------------------------------------------------------------------------------------------------ sampling


def our_sampling(
    case: Case,
    compute: config.Compute,
    precision: str = "auto",
    keep: dict[str, np.ndarray] | None = None,
    drawn: bool = True,
) -> Make:
    """Two batches, from keys to a shard on disk, with the study's drawing decoder or without; `keep` receives the first
    images.
    """

    def make(batch: int) -> Work:
        fabric = case.fabric(precision)
        first, denoiser, card, decoder = case.networks()
        parts = min(case.study.generate.decode_batch_size or batch, batch)
        settings = case.study.generate.model_copy(update={"batch_size": batch, "decode_batch_size": parts})
        model = TrainedModel(first, denoiser, card, fabric, compute, decoder=decoder if drawn else None)
        generator = CohortGenerator(model, settings)
        index = np.arange(2 * batch)
        subjects = case.table.iloc[index % len(case.table)].reset_index(drop=True)
        subjects = subjects.assign(
            sample_id=[f"syn{i}" for i in index], index=index, noise_index=index, attempt=0, cohort_root="bench/syn"
        )
        subjects["seed_key"] = [seed_key("bench/syn", int(i), 0, "noise") for i in index]
        columns = {"sample_id": pa.string(), "image": TensorColumn("float16", (1, *case.shape))}

        def work() -> int:
            with ShardWriter(case.folder / "made.arrow", columns) as writer, in_background(writer.append) as append:
                for name, image in generator.images(subjects, "bench"):
                    append(sample_id=name, image=image)
                    if keep is not None and len(keep) < 2:
                        keep[name] = image.copy()
            return len(index)

        return work

    return make


def peer_sampling(case: Case, scheduler: str, steps: int) -> Make:
    """One volume by `DDIM` or `RFlow`, guided as the study is, fp16 under autocast, decoded and copied to the host."""

    def make(batch: int) -> Work:
        first = peer.peer_autoencoder(case.first, case.device).requires_grad_(False).eval()
        settings, covariates = case.study.diffusion, len(case.study.covariates)
        network = peer.peer_unet(settings, case.first.latent_channels, covariates, case.device)
        network.requires_grad_(False).eval()
        chosen = peer.peer_flow(settings, steps) if scheduler == "RFlow" else peer.peer_ddim(settings, steps)
        precision, context = peer.Precision(case.device, peer.DIFFUSION.half), _context(case, 1)
        noise = torch.randn(1, *case.latent_shape, generator=torch.Generator().manual_seed(0))

        def work() -> int:
            with precision.autocast():
                peer.peer_sample(
                    network, first.decode_stage_2_outputs, chosen, noise.to(case.device), context, case.guidance
                ).float().cpu()
            return 1

        return work

    return autotuned(make)


# ------------------------------------------------------------------------------------------------------ encoding


def our_latents(case: Case, compiled: bool) -> Make:
    """A shard of scans to rows of a latent shard, as the step `latents` makes them."""

    def make(batch: int) -> Work:
        fabric = case.fabric()
        first = build_first_stage(case.first, 3).requires_grad_(False).eval()
        ids = list(case.images.column("scan_id"))

        def work() -> int:
            rows = encode_shard(
                first, case.images, ids, config.Variants(), batch, "bench", fabric, case.compute(compiled)
            )
            return sum(1 for _ in rows)

        return work

    return make


def our_detector(case: Case) -> Make:
    """Directions of images by the detector `latent`, which `filter` and `calibrate` spend most on."""

    def make(batch: int) -> Work:
        fabric = case.fabric()
        first = build_first_stage(case.first, 3).requires_grad_(False).eval()
        # Where detectors can be told a device, they are.
        told = {"device": case.device, "autocast": fabric.autocast}
        told = {field.name: told[field.name] for field in dataclasses.fields(Context) if field.name in told}
        where = case.device if "device" in told else torch.device("cpu")
        prior = {name: value.to(where) for name, value in case.prior().items()}
        context = Context(
            mean=case.images.tensor("image", 0).astype(np.float32),
            training=TrainingImages(case.images, np.arange(case.count)),
            embedder=torch.nn.Identity,
            first_stage=lambda: first.to(where),
            standardisation=lambda: Standardisation(prior["offset"], prior["scale"]),
            directions={},
            **told,  # type: ignore[arg-type]
        )
        detector, images = latent.build(context), case.batch(batch)

        def work() -> int:
            return len(detector.vectors(images))

        return work

    return make
