"""Training of both stages: how many subjects or steps per second, and how soon a held-out figure is reached.

Both sides take turns of a few steps, so that a busy minute of the machine falls on both; where the peer is far behind
it gets more time. After each turn the held-out figure is measured, off the clock.  The level that decides is the best
that the peer reached in its time; the ratio is the peer's seconds to that level over ours.  Ours is also looked at
before its first step, when its denoiser already knows the effects of covariates, and its learning rate runs through its
schedule in the time it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from monai.inferers import LatentDiffusionInferer
from torch import Tensor

from benchmarks import measure, peer
from benchmarks.places import SEED, OurTraining, Place, Setting, latent_data, load_weights, save_weights, write_latents
from meddiff_steps.core.random_streams import philox
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.latent_statistics import Standardisation
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.statistics.bootstrap import rounded
from meddiff_steps.training.latent_data import LatentData
from meddiff_steps.training.loop import batch_rows
from meddiff_steps.training.tasks.autoencoder import AutoencoderTask
from meddiff_steps.training.tasks.diffusion import DiffusionTask

#: Seconds of training of ours and of the peer, and repetitions with other seeds, by size.
BUDGETS = {
    "autoencoder": {"32x40x32": ((20.0, 60.0), 2), "64x64x64": ((30.0, 80.0), 2)},
    "diffusion": {"32x40x32": ((25.0, 25.0), 2), "64x64x64": ((40.0, 40.0), 2)},
}
QUICK_BUDGET = ((0.2, 0.2), 1)

#: Held-out scans at most that a look is at, and evenly spread timesteps at which the latent of each is judged: a look
#: costs what a training step does, or more.
JUDGED_SCANS, JUDGED_TIMESTEPS = 3, 6


@dataclass
class Side:
    """One side's training: what it does per step, how it is judged, and what it has reached."""

    step: Callable[[], None]
    judge: Callable[[], float]
    clock: measure.Clock = field(default_factory=measure.Clock)
    steps: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)
    seconds_per_step: list[tuple[float, float]] = field(default_factory=list)

    def turn(self, steps: int) -> None:
        """Train some steps on the clock, then look off it."""
        before = measure.Clock(self.clock.wall, self.clock.cpu)
        with self.clock.running():
            for _ in range(steps):
                self.step()
        self.steps += steps
        self.seconds_per_step.append(((self.clock.wall - before.wall) / steps, (self.clock.cpu - before.cpu) / steps))
        self.look()

    def look(self) -> None:
        """Measure the held-out figure."""
        self.curve.append((self.clock.wall, self.judge()))


def race(ours: Side, theirs: Side, seconds: tuple[float, float]) -> None:
    """Train each for its seconds, in turns; looks become rarer as training goes on."""
    budgets, steps = {id(ours): seconds[0], id(theirs): seconds[1]}, {id(ours): 1, id(theirs): 1}
    while True:
        # Whoever has used the smaller share of its time; at least two turns each.
        side = min(
            (ours, theirs),
            key=lambda runner: (len(runner.seconds_per_step) >= 2, runner.clock.wall / budgets[id(runner)]),
        )
        if len(side.seconds_per_step) >= 2 and side.clock.wall >= budgets[id(side)]:
            return
        side.turn(steps[id(side)])
        per_step = max(side.seconds_per_step[-1][0], 1e-9)
        wanted = max(budgets[id(side)] / 25, min(budgets[id(side)] / 8, side.clock.wall / 4))
        steps[id(side)] = max(1, round(min(wanted, budgets[id(side)] - side.clock.wall) / per_step))


def seconds_to(curve: Sequence[tuple[float, float]], level: float, higher: bool) -> float | None:
    """Seconds at which a curve first reached a level, linear between two looks; None if never."""
    before: tuple[float, float] | None = None
    for seconds, value in curve:
        if (value >= level) if higher else (value <= level):
            if before is None or before[1] == value:
                return seconds
            return before[0] + (seconds - before[0]) * (level - before[1]) / (value - before[1])
        before = (seconds, value)
    return None


def results(
    races: Sequence[tuple[Side, Side]],
    per_step: float,
    what: tuple[str, str],
    unit: str,
    higher: bool,
    size: str,
    **more: Any,
) -> list[dict[str, Any]]:
    """Rows of throughput and of time to the peer's best figure.

    Parameters
    ----------
    races
        (ours, peer), one per seed.
    per_step
        Units of work per step.
    what
        Titles of both rows.
    higher
        Whether the held-out figure is better when higher.
    """
    turns = measure.Turns()
    for ours, theirs in races:
        # The first step of each holds what later ones do not: choosing kernels, first allocations.
        for side, runner in (("ours", ours), ("peer", theirs)):
            for wall, cpu in runner.seconds_per_step[1:] or runner.seconds_per_step:
                turns.add(side, measure.Clock(wall, cpu), per_step)
    rows = [turns.row(what[0], size, unit, **more)]
    needed: dict[str, list[float]] = {"ours": [], "peer": []}
    notes, levels = [], []
    for ours, theirs in races:
        level = (max if higher else min)(value for _, value in theirs.curve)
        levels.append(level)
        mine, other = seconds_to(ours.curve, level, higher), seconds_to(theirs.curve, level, higher)
        assert other is not None
        if mine is None:
            needed["ours"].append(ours.clock.wall)
            notes.append("ours did not get there in its time: the ratio is an upper bound")
        else:
            needed["ours"].append(mine)
            if mine <= ours.curve[0][0]:
                notes.append("ours was there before its network had learnt anything")
        needed["peer"].append(other)
    pairs = np.array(needed["peer"]) / np.maximum(needed["ours"], 1e-9)
    rows.append(
        {
            "what": what[1],
            "size": size,
            "unit": "s",
            "level": rounded(float(np.median(levels))),
            "reached": {
                "ours": rounded(
                    float(np.median([(max if higher else min)(v for _, v in ours.curve) for ours, _ in races]))
                ),
                "peer": rounded(float(np.median(levels))),
            },
            "ours": measure.median_figure(needed["ours"], what[1]),
            "peer": measure.median_figure(needed["peer"], what[1]),
            "ratio": (
                measure.median_figure(pairs, what[1])
                | {"range": [rounded(float(pairs.min())), rounded(float(pairs.max()))]}
            ),
            "note": "; ".join(sorted(set(notes))),
        }
    )
    return rows


def curves(races: Sequence[tuple[Side, Side]], name: str, label: str) -> dict[str, Any]:
    """The held-out figure against seconds, for the figure on the page."""
    series = [
        {
            "label": side if number == 0 else "",
            "side": side,
            "x": [rounded(s) for s, _ in runner.curve],
            "y": [rounded(v) for _, v in runner.curve],
        }
        for number, pair in enumerate(races)
        for side, runner in zip(("ours", "peer"), pair, strict=True)
    ]
    return {"name": name, "x_label": "seconds of training", "y_label": label, "series": series}


# ------------------------------------------------------------------------------------------------ first stage


def autoencoder(setting: Setting) -> dict[str, Any]:
    """Autoencoder: ours (Haar stem, local layers, Muon, channels-last) beside MONAI's AutoencoderKL of the same widths,
    whose first level is at full resolution.
    """
    rows, drawn = [], []
    for size in setting.sizes:
        place = setting.place(size)
        seconds, seeds = QUICK_BUDGET if setting.quick else BUDGETS["autoencoder"][size.name]
        races, facts = [], {}
        for seed in range(seeds):
            ours, theirs, facts = _autoencoder_race(place, seed, seconds)
            races.append((ours, theirs))
        rates = measure.matmul_rates()
        what = ("autoencoder training", "autoencoder: seconds to the peer's best held-out PSNR (dB)")
        found = results(
            races,
            place.study.autoencoder.optimiser.batch_size,
            what,
            "subjects/s",
            True,
            size.name,
            parameters=facts["parameters"],
        )
        batch = place.study.autoencoder.optimiser.batch_size
        found[0]["floor"] = {
            side: measure.floor(facts["flops"][side] / batch, rates[side], 1.0 / found[0][side]["value"])
            for side in ("ours", "peer")
            if found[0][side]["value"]
        }
        rows += found
        drawn.append(curves(races, f"autoencoder {size.name}", "held-out PSNR (dB)"))
    return {"rows": rows, "curves": drawn}


def _autoencoder_race(place: Place, seed: int, seconds: tuple[float, float]) -> tuple[Side, Side, dict[str, Any]]:
    study, settings = place.study, place.study.autoencoder
    place.images  # noqa: B018 made before any clock runs
    looked_at = place.rows("val")[:JUDGED_SCANS]
    held_out = torch.from_numpy(place.images.tensors("image", looked_at))
    clock = measure.Clock()
    with clock.running():
        task = AutoencoderTask(
            settings, study.variants, place.images, place.rows("train"), looked_at, f"{SEED}/{seed}", place.fabric
        )
    training = OurTraining(task, settings.optimiser, seconds[0])

    torch.manual_seed(seed)
    network = peer.peer_autoencoder(settings, "cpu")
    optimiser = peer.peer_optimiser(network, peer.LEARNING_RATE)
    loader = peer.peer_loader(
        place.files("train"), study.preprocess, settings.optimiser.batch_size, cache="memory"
    )  # filled off the clock
    batches = _endless(loader)

    ours = Side(training.step, lambda: task.validate()["val/psnr"], clock)
    theirs = Side(
        lambda: peer.peer_autoencoder_step(network, optimiser, next(batches)["image"].as_tensor(), settings.kl_weight),
        lambda: peer.peer_psnr(network, held_out),
    )
    ours.look()
    race(ours, theirs, seconds)
    if seed == 0:
        save_weights(task.average, place.folder / "ours-autoencoder.safetensors")
        save_weights(network, place.folder / "peer-autoencoder.safetensors")
    images = place.tensors("train")[: settings.optimiser.batch_size]
    facts = {
        "parameters": {"ours": _weights(task.modules["model"]), "peer": _weights(network)},
        "flops": {
            "ours": measure.flops(lambda: task.train_step(10**6)),
            "peer": measure.flops(lambda: peer.peer_autoencoder_step(network, optimiser, images, settings.kl_weight)),
        },
    }
    return ours, theirs, facts


def _endless(loader: Any) -> Any:
    while True:
        yield from loader


def _weights(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def trained_peer_autoencoder(place: Place) -> Any:
    """The peer's autoencoder from `autoencoder`, or, where that was not run, one of a few steps."""
    settings = place.study.autoencoder
    torch.manual_seed(0)
    network = peer.peer_autoencoder(settings, "cpu")
    if not load_weights(network, place.folder / "peer-autoencoder.safetensors"):
        optimiser = peer.peer_optimiser(network, peer.LEARNING_RATE)
        images = place.tensors("train")
        for step in range(2 if place.setting.quick else 40):
            rows = batch_rows(SEED, step, settings.optimiser.batch_size, len(images))
            peer.peer_autoencoder_step(network, optimiser, images[rows], settings.kl_weight)
        save_weights(network, place.folder / "peer-autoencoder.safetensors")
    return network.requires_grad_(False).eval()


# ----------------------------------------------------------------------------------------------- second stage


def diffusion(setting: Setting) -> dict[str, Any]:
    """Latent diffusion: ours from the cache beside the tutorial's, which encodes every image again at every step.

    Both learn the latents of one autoencoder, the peer's, at one noise scale, so that the loss means the same on both
    sides: the mean squared error of the noise in held-out latents, the same timesteps and noise for both at every
    look.  Encoding the cohort once and fitting the effects of covariates are on our clock.
    """
    rows, drawn = [], []
    for size in setting.sizes:
        place = setting.place(size)
        seconds, seeds = QUICK_BUDGET if setting.quick else BUDGETS["diffusion"][size.name]
        races, facts = [], {}
        autoencoder, encoding = trained_peer_autoencoder(place), measure.Clock()
        with encoding.running():
            shards = write_latents(place.folder / "peer-latents.arrow", *_posteriors(autoencoder, place))
        for seed in range(seeds):
            clock = measure.Clock(
                encoding.wall, encoding.cpu
            )  # the cache serves any number of trainings; each pays for it here
            ours, theirs, facts = _diffusion_race(place, seed, seconds, autoencoder, shards, clock)
            races.append((ours, theirs))
        rates = measure.matmul_rates()
        what = ("diffusion training", "diffusion: seconds to the peer's best held-out loss (MSE of the noise)")
        found = results(races, 1.0, what, "steps/s", False, size.name, parameters=facts["parameters"])
        found[0]["floor"] = {
            side: measure.floor(facts["flops"][side], rates[side], 1.0 / found[0][side]["value"])
            for side in ("ours", "peer")
        }
        found[0]["note"] = (
            f"ours after encoding {len(shards)} scans once and fitting effects, {facts['before']:.1f} s, which the"
            " row below counts"
        )
        rows += found
        drawn.append(curves(races, f"diffusion {size.name}", "held-out MSE of the noise"))
    return {"rows": rows, "curves": drawn}


def _diffusion_race(
    place: Place, seed: int, seconds: tuple[float, float], autoencoder: Any, shards: Shards, clock: measure.Clock
) -> tuple[Side, Side, dict[str, Any]]:
    settings = place.study.diffusion
    images = place.tensors("train")
    batch = settings.optimiser.batch_size
    factor = peer.peer_scale_factor(autoencoder, images[: max(2, batch)])

    with clock.running():
        data = latent_data(place, shards, autoencoder.decode, scale=1.0 / factor)
        task = DiffusionTask(settings, data, place.encoding, f"{SEED}/{seed}", place.fabric)
    before, model, average = clock.wall, task.modules["model"], task.modules["average"]
    assert isinstance(model, Denoiser) and isinstance(average, Denoiser)
    training = OurTraining(task, settings.optimiser, seconds[0])

    torch.manual_seed(seed)
    network = peer.peer_unet(settings, place.latent_shape[0], len(place.study.covariates), "cpu")
    optimiser = peer.peer_optimiser(network, peer.LEARNING_RATE)
    inferer = LatentDiffusionInferer(peer.peer_scheduler(settings), scale_factor=factor)
    context, train = peer.peer_context(place.covariates, "cpu"), place.rows("train")
    counter = iter(range(10**9))

    def their_step() -> None:
        rows = batch_rows(f"{SEED}/{seed}", next(counter), batch, len(train))  # in memory, as CacheDataset has them
        peer.peer_diffusion_step(
            network,
            autoencoder,
            inferer,
            optimiser,
            images[rows],
            context[train[rows]],
            place.latent_shape,
            settings.condition_dropout,
        )

    judged = HeldOut(place, data, factor)
    ours = Side(training.step, lambda: judged.ours(average), clock)
    theirs = Side(their_step, lambda: judged.theirs(network))
    ours.look()  # what the effects of covariates alone give
    race(ours, theirs, (before + seconds[0], seconds[1]))
    facts = {
        "before": before,
        "parameters": {
            "ours": _weights(model.network),
            "peer": _weights(network),
        },
        "flops": {"ours": measure.flops(lambda: task.train_step(10**6)), "peer": measure.flops(their_step)},
    }
    return ours, theirs, facts


@torch.no_grad()
def _posteriors(autoencoder: Any, place: Place) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Posterior means and log-variances of the scans that training and its looks need, one at a time."""
    means, log_variances = [], []
    for row in range(place.size.train + place.size.val):
        mean, deviation = autoencoder.encode(torch.from_numpy(place.images.tensors("image", [row])))
        means.append(mean[0].numpy())
        log_variances.append(2.0 * deviation.clamp_min(1e-4).log()[0].numpy())
    return means, log_variances


class HeldOut:
    """Held-out latents with fixed timesteps and noise, on which both sides are judged alike."""

    def __init__(self, place: Place, data: LatentData, factor: float) -> None:
        rows = place.rows("val")[:JUDGED_SCANS]
        z = torch.from_numpy(data.shards.tensors("mean", rows)).repeat_interleave(JUDGED_TIMESTEPS, 0)
        self.process = NoiseProcess.of(place.study.diffusion)
        steps = np.linspace(0, self.process.last_timestep, JUDGED_TIMESTEPS + 2)[1:-1].round()
        self.timesteps = torch.from_numpy(np.tile(steps, len(rows))).float()
        self.noise = torch.from_numpy(philox(SEED, "held-out noise").standard_normal(z.shape, dtype=np.float32))
        covariates = np.repeat(place.covariates[rows], JUDGED_TIMESTEPS, 0)
        self.condition = Condition(torch.from_numpy(covariates))
        self.context = peer.peer_context(covariates, "cpu")
        # The same noise on the same latents; only the offset, which changes no error, differs.
        standardise = Standardisation(data.prior["offset"], data.prior["scale"])
        self.mine = self.process.add_noise(standardise(z), self.noise, self.timesteps)
        self.other = self.process.add_noise(z * factor, self.noise, self.timesteps)

    @torch.no_grad()
    def ours(self, denoiser: Denoiser) -> float:
        return self._error(
            lambda i: self.process.to_noise(
                denoiser(self.mine[i], self.timesteps[i], self.condition[i]), self.mine[i], self.timesteps[i]
            )
        )

    @torch.no_grad()
    def theirs(self, network: Any) -> float:
        network.eval()
        return self._error(lambda i: network(self.other[i], timesteps=self.timesteps[i], context=self.context[i]))

    def _error(self, noise: Callable[[slice], Tensor]) -> float:
        parts = [slice(start, start + JUDGED_TIMESTEPS) for start in range(0, len(self.noise), JUDGED_TIMESTEPS)]
        return float(np.mean([float((noise(part) - self.noise[part]).square().mean()) for part in parts]))


def our_model(place: Place, seconds: float) -> TrainedModel:
    """Our two stages, trained, each with its averaged weights: the autoencoder of `autoencoder` (a few steps where that
    was not run) and a denoiser of some seconds.
    """
    study = place.study
    first = AutoencoderTask(
        study.autoencoder,
        study.variants,
        place.images,
        place.rows("train"),
        place.rows("val"),
        f"{SEED}/0",
        place.fabric,
    )
    if not load_weights(first.average, place.folder / "ours-autoencoder.safetensors"):
        training = OurTraining(first, study.autoencoder.optimiser)
        for _ in range(2 if place.setting.quick else 40):
            training.step()
        save_weights(first.average, place.folder / "ours-autoencoder.safetensors")
    with torch.no_grad():
        means = [
            first.average.encode(torch.from_numpy(place.images.tensors("image", [row]))).mean[0].numpy()
            for row in range(len(place.images))
        ]
    latents = write_latents(place.folder / "ours-latents.arrow", means)
    data = latent_data(place, latents, first.average.decode)
    task = DiffusionTask(study.diffusion, data, place.encoding, f"{SEED}/0", place.fabric)
    denoiser, path = task.modules["average"], place.folder / "ours-diffusion.safetensors"
    assert isinstance(denoiser, Denoiser)
    if not load_weights(denoiser, path):
        training, clock = OurTraining(task, study.diffusion.optimiser), measure.Clock()
        while clock.wall < seconds and training.done < study.diffusion.optimiser.steps:
            with clock.running():
                training.step()
        save_weights(denoiser, path)
    return TrainedModel(first.average, denoiser, task.card, place.fabric)
