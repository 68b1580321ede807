"""Training of both stages: subjects or steps per second, and what a held-out scan looks like after some minutes.

Each stage is timed in more ways than two, which take turns of a few steps, so that a busy minute of the machine falls
on all of them: ours with the networks that studies have by default; ours with the peer's network, which shows what the
training alone is worth; and the peers, each by its own script (`peer.Recipe`).

How good an autoencoder becomes is not put into one ratio.  Ours starts as a reduction of the image, and its first guess
is better than what the peer reaches in minutes; seconds to such a level say nothing.  So the page says where each side
starts, what it reaches and when, and beside it what the mean training image gets, which a network that has learnt
nothing about a subject gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from monai.inferers import LatentDiffusionInferer
from safetensors.torch import load_file, save_file

from benchmarks import measure, peer
from benchmarks.places import SEED, OurTraining, Place, Setting, latent_data, load_weights, save_weights, write_latents
from meddiff_steps import config
from meddiff_steps.core.files import atomic_path
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.drawing.base import DrawingDecoder
from meddiff_steps.models.first_stage.base import FirstStage
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.statistics.bootstrap import rounded
from meddiff_steps.training.latent_data import LatentData
from meddiff_steps.training.loop import batch_rows
from meddiff_steps.training.tasks.autoencoder import AutoencoderTask
from meddiff_steps.training.tasks.decoder import DecoderTask
from meddiff_steps.training.tasks.diffusion import DiffusionTask

#: Steps of a turn, and turns, by size.
STEPS = {"autoencoder": {"32x40x32": (3, 7), "64x64x64": (1, 5)}, "diffusion": {"32x40x32": (5, 7), "64x64x64": (2, 5)}}
QUICK_STEPS = (1, 1)
#: Seconds of training behind each curve of held-out PSNR, at the smallest size.
BUDGETS = {"ours": 45.0, "same": 60.0, "peer": 90.0, "raised": 150.0}
QUICK_BUDGET = 0.2
#: Held-out scans at most that a look is at: a look costs what a training step does.
JUDGED_SCANS = 3
#: How far below the best that a peer reached a level lies at which seconds are compared, in dB: on the last decibels a
#: training spends most of its time, and a benchmark does not wait for them.
SHORT_OF_BEST = 3.0

#: Weights of our autoencoder, on which all that follows is made.
FIRST = "ours-autoencoder.safetensors"

#: How ours trains, for a table.
OURS_SAID = "Muon at {rate:g}, {warmup} steps of warm-up, cosine decay, clipping, averaged weights"


# ------------------------------------------------------------------------------------------------ first stage


def autoencoder(setting: Setting) -> dict[str, Any]:
    """Autoencoder: ours (Haar stem, local layers), and MONAI's AutoencoderKL in our training, beside the tutorial's
    training of it.
    """
    rows: list[dict[str, Any]] = []
    for size in setting.sizes:
        rows += _autoencoder_steps(setting.place(size), setting.either(STEPS["autoencoder"].get(size.name), None))
    reached, curve = _autoencoder_reach(setting.place(setting.sizes[0]))
    return {"rows": rows, "curves": [curve], "reached": reached}


def _our_autoencoder(place: Place, settings: config.Autoencoder, seconds: float | None = None) -> OurTraining:
    looked_at = place.rows("val")[:JUDGED_SCANS]
    task = AutoencoderTask(
        settings, place.study.variants, place.images, place.rows("train"), looked_at, f"{SEED}/0", place.fabric
    )
    return OurTraining(task, settings.optimiser, seconds)


def _their_autoencoder(place: Place, recipe: peer.Recipe) -> tuple[Any, Callable[[], float]]:
    """The network, and a step of the tutorial's training of it; images lie in memory before."""
    settings = place.study.autoencoder
    torch.manual_seed(0)
    network = peer.peer_autoencoder(settings, "cpu")
    optimiser = peer.peer_optimiser(network, recipe.learning_rate)
    loader = peer.peer_loader(
        place.files("train"), place.study.preprocess, settings.optimiser.batch_size, cache="memory"
    )
    batches = _endless(loader)

    def step() -> float:
        images = next(batches)["image"].as_tensor()
        return peer.peer_autoencoder_step(network, optimiser, images, settings.kl_weight)

    return network, step


def _autoencoder_steps(place: Place, plan: tuple[int, int] | None) -> list[dict[str, Any]]:
    settings, size = place.study.autoencoder, place.size.name
    steps, turns = plan or QUICK_STEPS
    batch = settings.optimiser.batch_size
    ours, same = _our_autoencoder(place, settings), _our_autoencoder(place, peer.same_network(settings))
    network, their_step = _their_autoencoder(place, peer.AUTOENCODER)
    sides = {"ours": ours.step, "same": same.step, "peer": their_step}
    timed = measure.rounds({name: _repeated(step, steps, batch) for name, step in sides.items()}, turns)
    operations = {name: measure.flops(step) / batch for name, step in sides.items()}
    weights = {
        "ours": _weights(ours.task.modules["model"]),
        "same": _weights(same.task.modules["model"]),
        "peer": _weights(network),
    }
    rates, found = measure.matmul_rates(), []
    for side, what in (
        ("ours", "autoencoder training, ours as studies have it"),
        ("same", "autoencoder training, the peer's network in our training"),
    ):
        row = timed.row(what, size, "subjects/s", ours=side, note=f"peer: {peer.AUTOENCODER.said}")
        found.append(row | _priced(row, operations, weights, rates, side))
    return found


def _repeated(step: Callable[[], Any], steps: int, units: float) -> Callable[[], float]:
    def run() -> float:
        for _ in range(steps):
            step()
        return steps * units

    return run


def _priced(
    row: dict[str, Any],
    operations: dict[str, float],
    weights: dict[str, int],
    rates: dict[str, float],
    side: str,
    other: str = "peer",
) -> dict[str, Any]:
    """What the operations of both sides alone would take, and how many weights they have."""
    return {
        "parameters": {"ours": weights[side], "peer": weights[other]},
        "floor": {
            "ours": measure.floor(operations[side], rates["ours"], 1.0 / row["ours"]["value"]),
            "peer": measure.floor(operations[other], rates["peer"], 1.0 / row["peer"]["value"]),
        },
    }


@dataclass
class Side:
    """One training that is looked at: what it does per step, how it is judged, and what it has reached."""

    step: Callable[[], Any]
    judge: Callable[[], float]
    seconds: float
    clock: measure.Clock = field(default_factory=measure.Clock)
    curve: list[tuple[float, float]] = field(default_factory=list)
    per_step: float = 0.0

    def turn(self, steps: int) -> None:
        """Train some steps on the clock, then look off it."""
        before = self.clock.wall
        with self.clock.running():
            for _ in range(steps):
                self.step()
        self.per_step = max((self.clock.wall - before) / steps, 1e-9)
        self.look()

    def look(self) -> None:
        """Measure the held-out figure."""
        self.curve.append((self.clock.wall, self.judge()))

    @property
    def best(self) -> float:
        return max(value for _, value in self.curve)


def race(sides: Sequence[Side]) -> None:
    """Train each for its seconds, in turns; looks become rarer as training goes on."""
    steps = {id(side): 1 for side in sides}
    while True:
        # Whoever has used the smallest share of its time.
        side = min(sides, key=lambda runner: runner.clock.wall / runner.seconds)
        if side.clock.wall >= side.seconds:
            return
        side.turn(steps[id(side)])
        wanted = max(side.seconds / 25, min(side.seconds / 8, side.clock.wall / 4))
        steps[id(side)] = max(1, round(min(wanted, side.seconds - side.clock.wall) / side.per_step))


def seconds_to(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    """Seconds at which a curve first reached a level, linear between two looks; None if never."""
    before: tuple[float, float] | None = None
    for seconds, value in curve:
        if value >= level:
            if before is None or before[1] == value:
                return seconds
            return before[0] + (seconds - before[0]) * (level - before[1]) / (value - before[1])
        before = (seconds, value)
    return None


def _autoencoder_reach(place: Place) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Held-out PSNR of each training against seconds, beside that of the mean training image."""
    settings = place.study.autoencoder
    held_out = torch.from_numpy(place.images.tensors("image", place.rows("val")[:JUDGED_SCANS]))
    mean = psnr(place.tensors("train").mean(0, keepdim=True).expand_as(held_out), held_out)
    budgets = dict.fromkeys(BUDGETS, QUICK_BUDGET) if place.setting.quick else BUDGETS
    mine = settings.optimiser
    said = OURS_SAID.format(rate=mine.learning_rate, warmup=mine.warmup_steps)
    sides: dict[str, Side] = {}
    names: dict[str, tuple[str, str]] = {}
    for name, title, section in (
        ("ours", "ours, as studies have it", settings),
        ("same", "ours, with the peer's network", peer.same_network(settings)),
    ):
        training = _our_autoencoder(place, section, budgets[name])
        task = training.task
        assert isinstance(task, AutoencoderTask)
        sides[name] = Side(training.step, lambda task=task: task.validate()["val/psnr"], budgets[name])
        names[name] = (title, said)
        if name == "ours":
            average = task.average
    for name, title, recipe in (
        ("peer", "peer, its script as it is", peer.AUTOENCODER),
        ("raised", "peer, at a rate that suits minutes", peer.AUTOENCODER_RAISED),
    ):
        network, step = _their_autoencoder(place, recipe)
        sides[name] = Side(step, lambda network=network: peer.peer_psnr(network, held_out), budgets[name])
        names[name] = (title, recipe.said)
    for side in sides.values():
        side.look()
    race(list(sides.values()))
    save_weights(average, place.folder / FIRST)
    reached = reaches(sides, names, place.size.name, mean, "val PSNR (dB)")
    return reached, curves(sides, names, mean, f"autoencoder {place.size.name}", "held-out PSNR (dB)")


def psnr(made: torch.Tensor, images: torch.Tensor) -> float:
    """Mean PSNR (dB, range 1) of images (n, 1, *spatial)."""
    errors = (made - images).square().flatten(1).mean(1).clamp_min(1e-12)
    return float((-10.0 * errors.log10()).mean())


def reaches(
    sides: dict[str, Side], names: dict[str, tuple[str, str]], size: str, mean: float, what: str
) -> list[dict[str, Any]]:
    """What each training started from and reached, and when it passed a level.

    The level lies `SHORT_OF_BEST` below the best that any peer reached.  Where that is not above `mean`, what the mean
    training image gets, no seconds are told: a network that ignores the subject has as much.
    """
    level: float | None = max(side.best for name, side in sides.items() if name in ("peer", "raised")) - SHORT_OF_BEST
    if level is not None and level <= mean:
        level = None
    found = []
    for name, side in sides.items():
        seconds = None if level is None else seconds_to(side.curve, level)
        found.append(
            {
                "size": size,
                "what": what,
                "side": names[name][0],
                "settings": names[name][1],
                "mean_image": rounded(mean),
                "start": rounded(side.curve[0][1]),
                "best": rounded(side.best),
                "minutes": rounded(side.clock.wall / 60),
                "level": None if level is None else rounded(level),
                "seconds_to_level": None if seconds is None else rounded(seconds),
            }
        )
    return found


def curves(
    sides: dict[str, Side], names: dict[str, tuple[str, str]], mean: float, name: str, label: str
) -> dict[str, Any]:
    """The held-out figure against seconds, for the figure on the page."""
    series = [
        {
            "label": names[key][0],
            "x": [rounded(s) for s, _ in side.curve],
            "y": [rounded(v) for _, v in side.curve],
        }
        for key, side in sides.items()
    ]
    longest = max(side.clock.wall for side in sides.values())
    series.append({"label": "mean training image", "x": [0.0, rounded(longest)], "y": [rounded(mean)] * 2})
    return {"name": name, "x_label": "seconds of training", "y_label": label, "series": series}


def _endless(loader: Any) -> Any:
    while True:
        yield from loader


def _weights(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# ----------------------------------------------------------------------------------------------- second stage


def diffusion(setting: Setting) -> dict[str, Any]:
    """Latent diffusion: ours, and MONAI's UNet in our training, beside the tutorial's, which encodes every image again
    at every step, and beside MAISI's, which caches latents.
    """
    rows: list[dict[str, Any]] = []
    for size in setting.sizes:
        rows += _diffusion_steps(setting.place(size), setting.either(STEPS["diffusion"].get(size.name), None))
    return {"rows": rows}


def _diffusion_steps(place: Place, plan: tuple[int, int] | None) -> list[dict[str, Any]]:
    settings, size = place.study.diffusion, place.size.name
    steps, turns = plan or QUICK_STEPS
    clock = measure.Clock()
    with clock.running():
        data = _latents(place, _first_stage(place))
    ours = OurTraining(_task(place, settings, data), settings.optimiser)
    same = OurTraining(_task(place, peer.unet_settings(settings), data), settings.optimiser)
    network, tutorial = _tutorial(place)
    cached = _cached(place, data)
    sides = {"ours": ours.step, "same": same.step, "tutorial": tutorial, "cached": cached}
    timed = measure.rounds({name: _repeated(step, steps, 1.0) for name, step in sides.items()}, turns)
    operations = {name: measure.flops(step) for name, step in sides.items()}
    weights = {
        "ours": _weights(ours.task.modules["model"].network),
        "same": _weights(same.task.modules["model"].network),
        "tutorial": _weights(network),
        "cached": _weights(network),
    }
    rates, found = measure.matmul_rates(), []
    before = f"ours after encoding {len(data.shards)} scans once and fitting effects, {clock.wall:.1f} s"
    for side, own in (("ours", "ours as studies have it"), ("same", "the peer's network in our training")):
        for other, recipe in (("tutorial", peer.DIFFUSION), ("cached", peer.CACHED)):
            what = f"diffusion training, {own}, beside the {'tutorial' if other == 'tutorial' else 'cached latents'}"
            note = f"peer: {recipe.said}" + (f"; {before}" if other == "tutorial" else "")
            row = timed.row(what, size, "steps/s", ours=side, peer=other, note=note)
            found.append(row | _priced(row, operations, weights, rates, side, other))
    return found


def _task(place: Place, settings: config.Diffusion, data: LatentData) -> DiffusionTask:
    return DiffusionTask(settings, data, place.encoding, f"{SEED}/0", place.fabric)


def _tutorial(place: Place) -> tuple[Any, Callable[[], float]]:
    """The tutorial's network, and its step, which encodes; with fresh weights, as time does not depend on them."""
    settings = place.study.diffusion
    batch, images = settings.optimiser.batch_size, place.tensors("train")
    torch.manual_seed(0)
    first = peer.peer_autoencoder(place.study.autoencoder, "cpu").requires_grad_(False).eval()
    network = peer.peer_unet(settings, place.latent_shape[0], len(place.study.covariates), "cpu")
    optimiser, precision = (
        peer.peer_optimiser(network, peer.DIFFUSION.learning_rate),
        peer.Precision("cpu", peer.DIFFUSION.half),
    )
    factor = peer.peer_scale_factor(first, images[: max(2, batch)])
    inferer = LatentDiffusionInferer(peer.peer_scheduler(settings), scale_factor=factor)
    context, train = peer.peer_context(place.covariates, "cpu"), place.rows("train")
    counter = iter(range(10**9))

    def step() -> float:
        rows = batch_rows(SEED, next(counter), batch, len(train))  # in memory, as CacheDataset has them
        told = peer.dropped(context[train[rows]], settings.condition_dropout)
        return peer.peer_diffusion_step(
            network, first, inferer, optimiser, images[rows], told, place.latent_shape, precision
        )

    return network, step


def _cached(place: Place, data: LatentData) -> Callable[[], float]:
    """MAISI's step on latents that lie in memory."""
    settings, rows = place.study.diffusion, place.rows("train")
    batch = settings.optimiser.batch_size
    torch.manual_seed(0)
    network = peer.peer_unet(settings, place.latent_shape[0], len(place.study.covariates), "cpu")
    optimiser, precision = (
        peer.peer_optimiser(network, peer.CACHED.learning_rate),
        peer.Precision("cpu", peer.CACHED.half),
    )
    latents = torch.from_numpy(data.shards.tensors("mean", rows))
    latents = latents / latents[: max(2, batch)].std()
    context, scheduler = peer.peer_context(place.covariates[rows], "cpu"), peer.peer_flow(settings)
    counter = iter(range(10**9))

    def step() -> float:
        chosen = batch_rows(SEED, next(counter), batch, len(rows))
        told = peer.dropped(context[chosen], settings.condition_dropout)
        return peer.peer_cached_step(network, scheduler, optimiser, latents[chosen], told, precision)

    return step


# ------------------------------------------------------------------------------------------------- all stages


def _first_stage(place: Place) -> FirstStage:
    """Our autoencoder's averaged weights: those of `autoencoder`, or of a few steps where that was not run."""
    training = _our_autoencoder(place, place.study.autoencoder)
    task = training.task
    assert isinstance(task, AutoencoderTask)
    if not load_weights(task.average, place.folder / FIRST):
        for _ in range(2 if place.setting.quick else 40):
            training.step()
        save_weights(task.average, place.folder / FIRST)
    average = task.average
    assert isinstance(average, FirstStage)
    return average


def _newer(place: Place, name: str) -> bool:
    """Whether a file of the work folder is there, and of the autoencoder that is there."""
    path, first = place.folder / name, place.folder / FIRST
    return path.exists() and first.exists() and path.stat().st_mtime_ns >= first.stat().st_mtime_ns


@torch.no_grad()
def _latents(place: Place, first: FirstStage) -> LatentData:
    """Latents of the scans that training and its looks need, one at a time, and what `scale` fits on them."""
    means = [
        first.encode(torch.from_numpy(place.images.tensors("image", [row]))).mean[0].numpy()
        for row in range(place.size.train + place.size.val)
    ]
    shards = write_latents(place.folder / "ours-latents.arrow", means)
    with torch.enable_grad():
        data = latent_data(place, shards, first.decode)
    with atomic_path(place.folder / "ours-prior.safetensors") as path:
        save_file(data.prior, path)
    return data


def _kept_latents(place: Place, first: FirstStage) -> LatentData:
    """The same, from the work folder where they are there."""
    if not all(_newer(place, name) for name in ("ours-latents.arrow", "ours-prior.safetensors")):
        return _latents(place, first)
    shards, prior = Shards([place.folder / "ours-latents.arrow"]), load_file(place.folder / "ours-prior.safetensors")
    return LatentData(shards, prior, place.covariates, place.rows("train"), place.rows("val"))


def our_model(place: Place, seconds: float) -> TrainedModel:
    """Our two stages, trained, each with its averaged weights: the autoencoder of `autoencoder` (a few steps where that
    was not run) and a denoiser of some seconds.
    """
    first = _first_stage(place)
    settings = place.study.diffusion
    task = _task(place, settings, _kept_latents(place, first))
    denoiser = task.modules["average"]
    _trained(OurTraining(task, settings.optimiser, seconds), place, "ours-diffusion", seconds)
    return TrainedModel(first, denoiser, task.card, place.fabric)


def our_decoder(place: Place, first_stage: FirstStage, seconds: float) -> DrawingDecoder:
    """Our drawing decoder of some seconds, with its averaged weights."""
    study = place.study
    task = DecoderTask(
        study.decoder,
        study.variants,
        first_stage,
        place.images,
        place.rows("train"),
        place.rows("val"),
        f"{SEED}/0",
        place.fabric,
    )
    _trained(OurTraining(task, study.decoder.optimiser, seconds), place, "ours-decoder", seconds)
    decoder = task.modules["average"]
    assert isinstance(decoder, DrawingDecoder)
    return decoder


def _trained(training: OurTraining, place: Place, name: str, seconds: float) -> None:
    """Train for some seconds, its whole schedule, where weights of this name are not there yet."""
    average, file = training.task.modules["average"], f"{name}.safetensors"
    if not (_newer(place, file) and load_weights(average, place.folder / file)):
        while training.spent < seconds:
            training.step()
        save_weights(average, place.folder / file)
