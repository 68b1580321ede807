"""Training, sampling and decoding on a GPU beside the peers' way: `make bench-gpu`, or `python -m benchmarks.gpu
--help`.

Networks are those of config/studies/ixi_2mm.yaml (80 x 96 x 80) and config/studies/ukb.yaml (160 x 224 x 160); images
are smooth noise, for time does not depend on what they show.  Both sides run in turns in one process; a ratio is the
median over turns, with the smallest and the largest turn.  Each side of each part may fail (out of memory, a compiler
that is not there): that is written down, and the others go on.  A side that does not fit at the study's batch size
takes half of it, and so on; figures are per image.

`gpu.json` is written again after every figure, so that a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from lightning_fabric import Fabric
from monai.inferers import LatentDiffusionInferer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peer
from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.compilation import speed_up
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.files import write_json
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.core.registries import default_steps, evaluations
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn, in_background
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.first_stage.base import latent_shape
from meddiff_steps.models.trained import DenoiserCard, TrainedModel
from meddiff_steps.synthesis.generate import CohortGenerator
from meddiff_steps.training.latent_data import LatentData
from meddiff_steps.training.loop import update_average
from meddiff_steps.training.tasks.autoencoder import AutoencoderTask
from meddiff_steps.training.tasks.diffusion import DiffusionTask

ROOT = Path(__file__).parents[1]
#: Dense bf16 rate of the data sheet, FLOP/s, by what the name of the device begins with (NVIDIA's data sheets, SXM).
NOMINAL = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989.4e12, "NVIDIA H200": 989.4e12, "NVIDIA A100": 312e12}
#: Turns that the two sides take at most, and seconds that one turn of one side shall last.
TURNS, TURN_SECONDS = 5, 4.0
#: The side that others are divided by: the first of these that was timed.
REFERENCES = ("ours compiled", "ours eager")
#: Images on disk that trainings read.
IMAGES = 16

#: A study that a processor runs in seconds, for `--quick`.
QUICK = {
    "study": "quick",
    "cohort": {"source": "simulated"},
    "covariates": {"age": {"unit": "year", "range": [40, 90]}, "sex": {"levels": ["F", "M"]}},
    "preprocess": {"shape": [16, 16, 16]},
    "autoencoder": {
        "channels": [8, 16],
        "norm_num_groups": 4,
        "latent_channels": 4,
        "optimiser": {"steps": 9, "batch_size": 2, "learning_rate": 0.001},
    },
    "diffusion": {
        "network": "unet",
        "channels": [8, 16],
        "norm_num_groups": 4,
        "num_head_channels": 8,
        "num_res_blocks": 1,
        "optimiser": {"steps": 9, "batch_size": 4, "learning_rate": 0.001},
    },
    "plan": [{"name": "syn", "subjects": 4}],
    "generate": {"batch_size": 2, "num_inference_steps": 2, "decode_batch_size": 1},
}


class OutOfTime(Exception):
    """The time of a part is used up."""


# ---------------------------------------------------------------------------------------------------- the record


@dataclass
class Record:
    """What was measured so far, on disk after every figure."""

    path: Path
    deadline: float
    content: dict[str, Any] = field(default_factory=lambda: {"machine": {}, "results": [], "failures": []})

    def add(self, **result: Any) -> None:
        self.content["results"].append(result)
        self._write()
        print(json.dumps(result), flush=True)

    def fail(self, where: str, error: BaseException) -> None:
        reason = (
            "out of memory"
            if isinstance(error, torch.OutOfMemoryError)
            else f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        )
        self.content["failures"].append({"where": where, "reason": reason})
        self._write()
        print(f"{where}: {reason}", file=sys.stderr, flush=True)

    def machine(self, **facts: Any) -> None:
        self.content["machine"] |= facts
        self._write()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def _write(self) -> None:
        self.content["seconds_left"] = round(self.left(), 1)
        write_json(self.path, self.content)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in this block after so many seconds; in the main thread only."""

    def ring(number: int, frame: object) -> None:
        raise OutOfTime(f"after {seconds:.0f} s")

    if seconds <= 1:
        raise OutOfTime("no time was left to begin")
    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def figure(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"value": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


# ---------------------------------------------------------------------------------------------------- the machine


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free() -> None:
    """Give back memory that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def matrix_rate(device: torch.device, side: int) -> float:
    """FLOP/s of bf16 products (on a processor, which may emulate them, float32) of random matrices, median of ten after
    three.
    """
    a, b = (
        torch.randn(side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        for _ in range(2)
    )
    seconds = []
    for turn in range(13):
        synchronise(device)
        begun = time.perf_counter()
        a @ b
        synchronise(device)
        if turn >= 3:
            seconds.append(time.perf_counter() - begun)
    return 2 * side**3 / statistics.median(seconds)


def copy_rate(device: torch.device, count: int) -> float:
    """Bytes per second, read and written, of a copy within the device's memory."""
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    seconds = []
    for turn in range(13):
        synchronise(device)
        begun = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        if turn >= 3:
            seconds.append(time.perf_counter() - begun)
    return 8 * count / statistics.median(seconds)


def describe(record: Record, device: torch.device, quick: bool) -> None:
    record.machine(
        device=(
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        ),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if device.type == "cuda" else None,
        processors=os.cpu_count(),
        begun=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    rate = matrix_rate(device, 512 if quick else 8192)
    name = str(record.content["machine"]["device"])
    nominal = next((value for start, value in NOMINAL.items() if name.startswith(start)), None)
    record.machine(
        matrix_flops=rate,
        matrix_flops_nominal=nominal,
        copy_bytes_per_second=copy_rate(device, 2**20 if quick else 2**29),
    )


# ------------------------------------------------------------------------------------------------------- one size


class Case:
    """One image size: a study, images and latents on disk, and how many operations its networks take.

    Parameters
    ----------
    study
        Its networks, batch sizes and sampler.
    folder
        For its shards.
    """

    def __init__(self, study: config.Study, folder: Path, device: str, images: int) -> None:
        self.study, self.folder = study, folder
        # Neither discriminator nor perceptual loss: the other side has none, and the published one begins after a tenth
        # of the steps.
        self.first = study.autoencoder.model_copy(
            update={"adversarial": config.Adversarial(), "perceptual": config.Perceptual()}
        )
        self.shape = tuple(study.preprocess.shape)
        self.name = "x".join(map(str, self.shape))
        self.latent_shape = latent_shape(self.first, (1, *self.shape))
        self.device = torch.device(device)
        rng = np.random.default_rng(0)
        count = max(images, 4)
        with ShardWriter(
            folder / "images.arrow", {"scan_id": pa.string(), "image": TensorColumn("float16", (1, *self.shape))}
        ) as shard:
            for i in range(count):
                shard.append(scan_id=str(i), image=self._smooth(rng))
        numbers = np.zeros(len(self.latent_shape) + 1, np.float32)
        columns = {
            "mean": TensorColumn("float16", self.latent_shape),
            "numbers": TensorColumn("float32", numbers.shape),
        }
        with ShardWriter(folder / "latents.arrow", columns) as shard:
            for _ in range(4 * count):
                shard.append(mean=rng.standard_normal(self.latent_shape, dtype=np.float32), numbers=numbers)
        self.images, self.count = Shards([folder / "images.arrow"]), count
        table = pd.DataFrame({name: self._values(covariate, rng, 64) for name, covariate in study.covariates.items()})
        self.encoding = CovariateEncoding.fit(table, study.covariates)
        self.table = table
        self.operations = self._operations()

    def _smooth(self, rng: np.random.Generator) -> np.ndarray:
        coarse = torch.from_numpy(rng.random((1, 1, *(max(2, n // 8) for n in self.shape)), dtype=np.float32))
        return torch.nn.functional.interpolate(coarse, size=self.shape, mode="trilinear")[0].numpy()

    @staticmethod
    def _values(
        covariate: config.ContinuousCovariate | config.CategoricalCovariate, rng: np.random.Generator, count: int
    ) -> np.ndarray:
        if isinstance(covariate, config.CategoricalCovariate):
            return rng.choice(covariate.levels, count)
        return rng.uniform(*covariate.range, count)

    def _operations(self) -> dict[str, float]:
        """Floating-point operations per image, recomputed blocks counted once; counted on tensors without values."""
        plain = {"gradient_checkpointing": False}
        # The products with covariates' effects are a few megaflops beside teraflops: counting leaves them out.
        with torch.device("meta"):
            settings = self.study.diffusion.model_copy(update=plain)
            network = DenoiserCard(settings, self.latent_shape, self.encoding, variants=0).build().network
            first = build_first_stage(self.first.model_copy(update=plain), 3)
            condition = Condition(torch.zeros(1, len(self.encoding.level_counts)))
            timesteps, amplitude = torch.zeros(1), torch.zeros(1, 1, 1, 1, 1)
        image, z = torch.zeros(1, 1, *self.shape, device="meta"), torch.zeros(1, *self.latent_shape, device="meta")

        def counted(call: Callable[[], Any], backward: bool) -> float:
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
                result = call()
                if backward:
                    parts = result if isinstance(result, tuple) else (result,)
                    sum(part.sum() for part in parts if part is not None).backward()
            return float(counter.get_total_flops())

        def denoise() -> Any:
            return network(z, timesteps, condition)

        return {
            "denoise": counted(denoise, False),
            "train_diffusion": counted(denoise, True),
            "encode": counted(lambda: first.encode(image), False),
            "decode": counted(lambda: first.decode(z), False),
            "train_autoencoder": counted(lambda: first(image, z, amplitude), True),
        }

    def fabric(self, precision: str = "auto") -> Fabric:
        return make_fabric(
            config.Compute(device=self.device.type, precision=precision), threads=torch.get_num_threads()
        )

    def compute(self, compiled: bool, **changes: Any) -> config.Compute:
        return config.Compute(device=self.device.type, compile=compiled, **changes)

    def batch(self, size: int) -> torch.Tensor:
        """Images on the host (size, 1, *shape), as CacheDataset would hand them out."""
        return torch.from_numpy(self.images.tensors("image", np.arange(size) % self.count))

    def prior(self) -> dict[str, torch.Tensor]:
        """Latents that need no standardisation, and do not depend on covariates."""
        return {"offset": torch.zeros(1, *self.latent_shape), "scale": torch.ones(())}


def case_of(name: str, folder: Path, device: str) -> Case:
    """A size by the name of its study, or `quick`."""
    folder = folder / name
    folder.mkdir()
    if name == "quick":
        return Case(config.parse_study(QUICK, "quick"), folder, device, 4)
    return Case(config.load_study(ROOT / f"config/studies/{name}.yaml"), folder, device, IMAGES)


# ------------------------------------------------------------------------------------------------------ the sides

#: One unit of work, begun at least; returns how many images it was.
Work = Callable[[], int]


def our_autoencoder(case: Case, compiled: bool) -> Callable[[int], Work]:
    def make(batch: int) -> Work:
        fabric = case.fabric()
        settings = case.first.model_copy(
            update={"optimiser": case.first.optimiser.model_copy(update={"batch_size": batch})}
        )
        task = AutoencoderTask(settings, config.Variants(), case.images, range(case.count), range(2), "bench", fabric)
        speed_up(task.costly, case.compute(compiled), fabric, training=True)
        return stepping(task, settings.optimiser, batch)

    return make


def our_diffusion(case: Case, compiled: bool) -> Callable[[int], Work]:
    def make(batch: int) -> Work:
        fabric = case.fabric()
        settings = case.study.diffusion.model_copy(
            update={"optimiser": case.study.diffusion.optimiser.model_copy(update={"batch_size": batch})}
        )
        shards = Shards([case.folder / "latents.arrow"])
        rows = np.arange(len(shards))
        covariates = case.encoding.encode(case.table.iloc[rows % len(case.table)].reset_index(drop=True))
        task = DiffusionTask(
            settings,
            LatentData(shards, case.prior(), covariates, rows, rows[:2]),
            case.encoding,
            "bench",
            fabric,
        )
        speed_up(task.costly, case.compute(compiled), fabric, training=True)
        return stepping(task, settings.optimiser, batch)

    return make


def stepping(task: AutoencoderTask | DiffusionTask, settings: config.Optimiser, batch: int) -> Work:
    """Steps as `training.loop.fit` takes them, reading of images and averaging of weights included."""
    step = iter(range(sys.maxsize))

    def work() -> int:
        number = next(step)
        task.train_step(number)
        update_average(task.modules["average"], task.modules["model"], settings.averaging, number)
        return batch

    return work


def peer_autoencoder(case: Case) -> Callable[[int], Work]:
    def make(batch: int) -> Work:
        network = peer.peer_autoencoder(case.first, case.device)
        optimiser = peer.peer_optimiser(network, peer.LEARNING_RATE)
        images = case.batch(batch)

        def work() -> int:
            peer.peer_autoencoder_step(network, optimiser, images.to(case.device), case.first.kl_weight)
            return batch

        return work

    return make


def peer_diffusion(case: Case, autocast: torch.dtype | None) -> Callable[[int], Work]:
    def make(batch: int) -> Work:
        settings = case.study.diffusion
        first = peer.peer_autoencoder(case.first, case.device)
        network = peer.peer_unet(settings, case.first.latent_channels, len(case.study.covariates), case.device)
        optimiser = peer.peer_optimiser(network, peer.LEARNING_RATE)
        images = case.batch(batch)
        inferer = LatentDiffusionInferer(
            peer.peer_scheduler(settings), scale_factor=peer.peer_scale_factor(first, images[:1].to(case.device))
        )
        context = peer.peer_context(
            case.encoding.encode(case.table.iloc[:1].reset_index(drop=True)).repeat(batch, 0), case.device
        )

        def work() -> int:
            peer.peer_diffusion_step(
                network,
                first,
                inferer,
                optimiser,
                images.to(case.device),
                context,
                case.latent_shape,
                settings.condition_dropout,
                autocast,
            )
            return batch

        return work

    return make


def autotuned(make: Callable[[int], Work]) -> Callable[[int], Work]:
    """The same with `compute.autotune`, whose switch is global: on while this side works."""

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


def our_sampling(
    case: Case, compute: config.Compute, precision: str = "auto", keep: dict[str, np.ndarray] | None = None
) -> Callable[[int], Work]:
    """Two batches, from keys to a shard on disk; `keep` receives the first images."""

    def make(batch: int) -> Work:
        fabric = case.fabric(precision)
        torch.manual_seed(0)
        card = DenoiserCard(case.study.diffusion, case.latent_shape, case.encoding, variants=len(case.latent_shape) + 1)
        denoiser = card.build()
        denoiser.load_state_dict(case.prior(), strict=False)
        first = build_first_stage(case.first, 3)
        for network in (denoiser, first):
            network.requires_grad_(False).eval()
            for weight in network.parameters():
                if weight.ndim > 1 and not weight.any():  # layers that begin at zero would hide what comes before them
                    torch.nn.init.normal_(weight, std=0.05)
        parts = min(case.study.generate.decode_batch_size or batch, batch)
        settings = case.study.generate.model_copy(update={"batch_size": batch, "decode_batch_size": parts})
        generator = CohortGenerator(TrainedModel(first, denoiser, card, fabric, compute), settings)
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


def peer_sampling(case: Case, steps: int) -> Callable[[int], Work]:
    """One volume: DDIM with two passes per step, fp32, decoded whole, copied to the host."""

    def make(batch: int) -> Work:
        first = peer.peer_autoencoder(case.first, case.device).requires_grad_(False).eval()
        network = (
            peer.peer_unet(case.study.diffusion, case.first.latent_channels, len(case.study.covariates), case.device)
            .requires_grad_(False)
            .eval()
        )
        scheduler = peer.peer_ddim(case.study.diffusion, steps, case.device)
        context = peer.peer_context(case.encoding.encode(case.table.iloc[:1].reset_index(drop=True)), case.device)
        noise = torch.randn(1, *case.latent_shape, generator=torch.Generator().manual_seed(0))

        def work() -> int:
            peer.peer_sample(
                network, first.decode_stage_2_outputs, scheduler, noise.to(case.device), context, 1.0
            ).cpu()
            return 1

        return work

    return make


# ---------------------------------------------------------------------------------------------------- measuring


@dataclass
class Side:
    """Somebody's way of one part: made, warmed up, and timed in turns."""

    name: str
    make: Callable[[int], Work]
    batch: int
    work: Work = field(init=False)
    first_seconds: float = 0.0
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    def prepare(self, device: torch.device) -> None:
        """Make it and work twice, at the largest batch, of the one given or half of it and so on, that fits.

        The first call compiles, where that is asked for, and makes the optimiser's state; the second is what memory is
        read from.
        """
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        while True:
            try:
                begun = time.perf_counter()
                self.work = self.make(self.batch)
                self.work()
                synchronise(device)
                self.first_seconds = time.perf_counter() - begun
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                self.work()
                synchronise(device)
                if device.type == "cuda":
                    self.peak_bytes = torch.cuda.max_memory_allocated(device) - held
                return
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
            self.batch //= 2
            if hasattr(self, "work"):
                del self.work
            free()

    def turn(self, device: torch.device, seconds: float) -> None:
        """Work for about `seconds`, at least once; remembers seconds per image."""
        synchronise(device)
        images, begun, before = 0, time.perf_counter(), None
        while True:
            images += self.work()
            if device.type == "cuda":
                if before is not None:
                    # One unit ahead at most, as a training that writes its curve is not much further
                    before.synchronize()
                before = torch.cuda.current_stream(device).record_event()
            if time.perf_counter() - begun >= seconds:
                break
        synchronise(device)
        self.seconds.append((time.perf_counter() - begun) / images)


def compare(
    record: Record,
    case: Case,
    part: str,
    sides: list[Side],
    operations: float,
    limit: float,
    turns: int,
    turn_seconds: float,
) -> set[str]:
    """Prepare sides, let them take turns, and write down seconds per image, operations per second, memory and ratios to
    `REFERENCES`.

    Returns the names of the sides that were timed.
    """
    ready = []
    end = time.monotonic() + limit
    for side in sides:
        where = f"{case.name} {part}: {side.name}"
        try:
            with time_limit(min(end - 0.3 * limit - time.monotonic(), record.left())):  # the rest is for turns
                side.prepare(case.device)
            ready.append(side)
        except Exception as error:  # noqa: BLE001 - one side's failure must not cost the others their figures
            record.fail(where, error)
            free()
    for turn in range(turns):
        for side in list(ready):
            if turn and min(end - time.monotonic(), record.left()) < 2 * turn_seconds:
                break
            try:
                with time_limit(max(record.left(), 2.0)):
                    side.turn(case.device, turn_seconds)
            except Exception as error:  # noqa: BLE001 - as above
                record.fail(f"{case.name} {part}: {side.name}", error)
                ready.remove(side)
    timed = [side for side in ready if side.seconds]
    machine = record.content["machine"]
    for side in timed:
        ours = side.name.startswith("ours")
        result = {
            "part": part,
            "shape": case.name,
            "side": side.name,
            "batch": side.batch,
            "seconds_per_image": figure(side.seconds),
        }
        result |= {"first_seconds": round(side.first_seconds, 2), "peak_gib": round(side.peak_bytes / 2**30, 2)}
        if ours:
            rate = [operations / seconds for seconds in side.seconds]
            result |= {
                "teraflop_per_image": operations / 1e12,
                "utilisation_measured": figure([value / machine["matrix_flops"] for value in rate]),
            }
            if machine.get("matrix_flops_nominal"):
                result["utilisation_nominal"] = figure([value / machine["matrix_flops_nominal"] for value in rate])
        record.add(**result)
    reference = next((side for name in REFERENCES for side in timed if side.name == name), None)
    for side in timed:
        if reference is not None and side is not reference:
            pairs = [other / own for other, own in zip(side.seconds, reference.seconds, strict=False)]
            record.add(part=part, shape=case.name, ratio=f"{side.name} / {reference.name}", times=figure(pairs))
    return {side.name for side in timed}


def compare_ours(
    record: Record,
    case: Case,
    part: str,
    peers: list[Side],
    ours: dict[str, Side],
    operations: float,
    limit: float,
    turns: int,
    turn_seconds: float,
) -> None:
    """`compare`, with as many of the sides as there is time and memory for.

    On a processor nothing is compiled.  At the published scale only the first peer and the compiled way are compared,
    and the plain way where that fails; else all.
    """
    if case.device.type == "cpu":
        compare(record, case, part, [*peers, ours["ours eager"]], operations, limit, turns, turn_seconds)
    elif case.study.study != "ukb":
        compare(record, case, part, [*peers, *ours.values()], operations, limit, turns, turn_seconds)
    elif "ours compiled" not in compare(
        record, case, part, [peers[0], ours["ours compiled"]], operations, limit, turns, turn_seconds
    ):
        compare(record, case, part, [ours["ours eager"]], operations, limit, turns, turn_seconds)


def agreement(record: Record, case: Case, part: str, images: dict[str, dict[str, np.ndarray]]) -> None:
    """How far images of the same subjects, made in other ways, are from those made in fp32 without compiling."""
    plain = images.get("plain", {})
    for way, made in images.items():
        shared = sorted(set(made) & set(plain))
        if way != "plain" and shared:
            difference = np.stack([made[name] for name in shared]) - np.stack([plain[name] for name in shared])
            spread = float(np.std(np.stack([plain[name] for name in shared])))
            error = np.abs(difference)
            record.add(
                part=part,
                shape=case.name,
                way=way,
                largest_difference=float(error.max()),
                mean_difference=float(error.mean()),
                spread=spread,
            )


# -------------------------------------------------------------------------------------------------------- the run


def our_steps(case: Case) -> int:
    """Sampler steps of the study."""
    generate, diffusion = case.study.generate, case.study.diffusion
    return generate.num_inference_steps or default_steps(generate.sampler, diffusion.num_train_timesteps)


def sampling(record: Record, case: Case, limit: float, turns: int, seconds: float) -> None:
    generate, operations = case.study.generate, case.operations
    passes = evaluations(generate.sampler, our_steps(case)) * (1 if generate.guidance_scale in (0.0, 1.0) else 2)
    images: dict[str, dict[str, np.ndarray]] = {"eager": {}, "compiled": {}}
    steps = 2 if case.study.study == "quick" else 50
    peers = [Side(f"peer DDIM-{steps}", peer_sampling(case, steps), 1)]
    ours = {
        f"ours {way}": Side(
            f"ours {way}", our_sampling(case, case.compute(way == "compiled"), keep=kept), generate.batch_size
        )
        for way, kept in images.items()
    }
    compare_ours(
        record,
        case,
        "sampling",
        peers,
        ours,
        passes * operations["denoise"] + operations["decode"],
        limit,
        turns,
        seconds,
    )
    del peers, ours
    free()
    # The same subjects in fp32, at a small batch: what bf16 and compiling change.
    images["plain"] = {}
    plain = Side("plain", our_sampling(case, case.compute(False), "32-true", keep=images["plain"]), 2)
    try:
        with time_limit(min(60.0, record.left())):
            plain.work = plain.make(2)
            plain.work()
        agreement(record, case, "sampling", images)
    except Exception as error:  # noqa: BLE001 - a check beside the figures
        record.fail(f"{case.name} sampling: plain", error)


def ddim_200(record: Record, case: Case, limit: float, turns: int, seconds: float) -> None:
    compare(record, case, "sampling", [Side("peer DDIM-200", peer_sampling(case, 200), 1)], 0.0, limit, 1, 0.0)


def latency(record: Record, case: Case, limit: float, turns: int, seconds: float) -> None:
    """One volume at a time: where a GPU waits for its processor, if anywhere."""
    operations = case.operations
    ways = {
        "ours eager": case.compute(False),
        "ours compiled": case.compute(True),
        "ours graphs": case.compute(True, cuda_graphs=True),
    }
    sides = [Side(name, our_sampling(case, compute), 1) for name, compute in ways.items()]
    needed = our_steps(case) * operations["denoise"] + operations["decode"]
    compare(record, case, "latency", sides, needed, limit, turns, seconds)


def trainings(make: Callable[[Case, bool], Callable[[int], Work]], case: Case, batch: int) -> dict[str, Side]:
    """Our ways of a training by name."""
    ways = {
        "ours eager": make(case, False),
        "ours compiled": make(case, True),
        "ours compiled, autotune": autotuned(make(case, True)),
    }
    return {name: Side(name, way, batch) for name, way in ways.items()}


def diffusion_training(record: Record, case: Case, limit: float, turns: int, seconds: float) -> None:
    batch = case.study.diffusion.optimiser.batch_size
    # The published model was trained in batches of 4; beyond 8, encoding images in fp32 fits no GPU at that scale.
    theirs = min(batch, 8) if case.study.study == "ukb" else batch
    peers = [
        Side("peer", peer_diffusion(case, None), theirs),
        Side("peer bf16", peer_diffusion(case, torch.bfloat16), theirs),
    ]
    compare_ours(
        record,
        case,
        "diffusion training",
        peers,
        trainings(our_diffusion, case, batch),
        case.operations["train_diffusion"],
        limit,
        turns,
        seconds,
    )


def autoencoder_training(record: Record, case: Case, limit: float, turns: int, seconds: float) -> None:
    batch, operations = case.first.optimiser.batch_size, case.operations["train_autoencoder"]
    compare_ours(
        record,
        case,
        "autoencoder training",
        [Side("peer", peer_autoencoder(case), batch)],
        trainings(our_autoencoder, case, batch),
        operations,
        limit,
        turns,
        seconds,
    )


Part = Callable[[Record, Case, float, int, float], None]

#: Parts in the order of what matters most, with the share of the whole time that each may take.
PARTS: list[tuple[str, Part, float]] = [
    ("ukb", sampling, 0.3),
    ("ukb", diffusion_training, 0.3),
    ("ukb", autoencoder_training, 0.3),
    ("ixi_2mm", sampling, 0.15),
    ("ixi_2mm", diffusion_training, 0.15),
    ("ixi_2mm", autoencoder_training, 0.15),
    ("ukb", ddim_200, 0.1),
    ("ixi_2mm", ddim_200, 0.1),
    ("ixi_2mm", latency, 0.2),
]
QUICK_PARTS: list[tuple[str, Part, float]] = [
    ("quick", part, 1.0) for part in (sampling, diffusion_training, autoencoder_training)
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="everything ends within this time, measured or not")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT", "results/bench-gpu")),
        help="folder of gpu.json (default: $OUT)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks on the processor: whether everything runs")
    parser.add_argument(
        "--only", default="", help="parts whose `STUDY FUNCTION` contains this text, for example `ukb sampling`"
    )
    chosen = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() and not chosen.quick else "cpu"
    if device == "cpu" and not chosen.quick:
        print(
            "No GPU is visible. Run this on a machine that has one, or with --quick to see whether everything runs.",
            file=sys.stderr,
        )
        return 1
    end = time.monotonic() + 60 * chosen.minutes
    record = Record(chosen.out / "gpu.json", end)
    chosen.out.mkdir(parents=True, exist_ok=True)
    describe(record, torch.device(device), chosen.quick)
    torch._dynamo.config.recompile_limit = 64  # every side, at every batch size that it tries, compiles the same code
    turns, seconds = (1, 0.0) if chosen.quick else (TURNS, TURN_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, Case] = {}
        for study, part, share in QUICK_PARTS if chosen.quick else PARTS:
            where = f"{study} {part.__name__}"
            if chosen.only not in where:
                continue
            try:
                with time_limit(record.left()):
                    if study not in cases:
                        cases[study] = case_of(study, Path(folder), device)
                part(record, cases[study], share * 60 * chosen.minutes, turns, seconds)
            except Exception as error:  # noqa: BLE001 - one part's failure must not cost the others
                record.fail(where, error)
            free()
            torch._dynamo.reset()
    print(summary(record.content))
    return 0


def summary(content: dict[str, Any]) -> str:
    """A table of what was measured, for the end of a log."""
    machine = content["machine"]
    rates = (
        f"matrix products {machine['matrix_flops'] / 1e12:.3g} TFLOP/s, copies"
        f" {machine['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    )
    lines = [f"{machine['device']}, torch {machine['torch']}: {rates}"]
    for result in content["results"]:
        where = f"{result['shape']:>12} {result['part']:22}"
        if "seconds_per_image" in result:
            time_of, use = result["seconds_per_image"], result.get("utilisation_measured")
            used = f", {100 * use['value']:.1f} % of the measured rate" if use else ""
            spread = f"{time_of['value']:9.4f} s/image ({time_of['low']:.4f} to {time_of['high']:.4f})"
            lines.append(
                f"{where} {result['side']:24} {spread}, batch {result['batch']}, {result['peak_gib']} GiB{used}"
            )
        elif "times" in result:
            times = result["times"]
            lines.append(
                f"{where} {result['ratio']:40} {times['value']:.2f} ({times['low']:.2f} to {times['high']:.2f}, n ="
                f" {times['n']})"
            )
        elif "way" in result:
            differs = (
                f"largest {result['largest_difference']:.4f}, mean {result['mean_difference']:.5f}, of a spread of"
                f" {result['spread']:.3f}"
            )
            lines.append(f"{where} {result['way']} against fp32: {differs}")
    lines += [f"FAILED {failure['where']}: {failure['reason'][:150]}" for failure in content["failures"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
