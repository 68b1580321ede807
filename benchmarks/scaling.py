"""How cost grows with voxels, with subjects and with sampler steps; exponents, and where the growth changes."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure, peer
from benchmarks.places import Setting
from benchmarks.sampling import Samplers
from benchmarks.training import our_model
from meddiff_steps import config
from meddiff_steps.compute.device import channels_last, to_channels_last
from meddiff_steps.core.random_streams import philox
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.imaging.shards import Shards, ShardWriter
from meddiff_steps.imaging.shards import TensorColumn as Column
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.privacy.search import nearest, unit_rows
from meddiff_steps.statistics.bootstrap import rounded
from meddiff_steps.synthesis.plan import build_plan
from meddiff_steps.training.latent_data import LatentData

SIDES = (32, 48, 64, 96, 128)
SUBJECTS = (1_000, 3_000, 10_000, 30_000, 100_000)
STEPS = (2, 4, 8, 16, 32, 64)
#: Seconds that one point may take, of voxels and of subjects: a larger one is left out when it would, by the growth so
#: far, take longer.
POINT_SECONDS, SUBJECT_SECONDS = 20.0, 90.0
#: Width of the vectors that the copy search compares, and shape of the latents that are read at random.
SEARCHED, LATENT = 64, (4, 4, 4, 4)


def grow(points: Sequence[int], run: Callable[[int], float], limit: float) -> tuple[list[int], list[float]]:
    """Seconds at growing points until the next would take longer than `limit`; the run times itself, its preparations
    uncounted.
    """
    x: list[int] = []
    y: list[float] = []
    for point in points:
        if len(x) > 1 and y[-1] * (point / x[-1]) ** max(1.0, measure.exponent(x[-2:], y[-2:])) > limit:
            break
        x.append(point)
        y.append(run(point))
    return x, y


def _best(run: Callable[[], Any], turns: int) -> float:
    """Seconds of the quickest of some calls: others on the machine only ever make it slower."""
    found = []
    for _ in range(turns):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def scaling(setting: Setting) -> dict[str, Any]:
    """Scaling: seconds against voxels, subjects and sampler steps; the quickest of the tries at each point."""
    return {"rows": [], "curves": [_voxels(setting), _subjects(setting), _steps(setting)]}


def _curve(
    name: str, x_label: str, x_of: Callable[[int], float], lines: dict[str, tuple[list[int], list[float]]], **more: Any
) -> dict[str, Any]:
    series = []
    for label, (points, seconds) in lines.items():
        x = [x_of(point) for point in points]
        entry = {"label": label, "x": x, "y": [rounded(value) for value in seconds]}
        if len(x) > 1:
            entry |= {
                "exponent": rounded(measure.exponent(x, seconds)),
                "local_exponents": measure.local_exponents(x, seconds),
            }
        series.append(entry)
    return {"name": name, "x_label": x_label, "y_label": "seconds", "log": True, "series": series} | more


# ----------------------------------------------------------------------------------------------------- voxels


def _voxels(setting: Setting) -> dict[str, Any]:
    """One subject through each stage at growing size, with the demo's networks."""
    settings, diffusion = config.Autoencoder(latent_channels=12), config.Diffusion()
    sides, turns = setting.either((SIDES, 2), ((16, 24), 1))
    torch.manual_seed(0)
    ours, theirs = build_first_stage(settings, 3), peer.peer_autoencoder(settings, "cpu")
    to_channels_last(ours, 3)
    optimiser = peer.peer_optimiser(theirs, 1e-3)

    def image(side: int) -> torch.Tensor:
        return torch.rand(1, 1, *(side,) * 3)

    def our_step(side: int) -> float:
        x = image(side).contiguous(memory_format=channels_last(3))
        noise = torch.randn(1, settings.latent_channels, *(side // settings.downsampling,) * 3)

        def step() -> None:
            ours.zero_grad(set_to_none=True)
            (ours(x, noise, torch.full((1, 1, 1, 1, 1), 0.1))[0] - x).abs().mean().backward()

        return _best(step, turns)

    def their_step(side: int) -> float:
        x = image(side)
        return _best(lambda: peer.peer_autoencoder_step(theirs, optimiser, x, 1e-7), turns)

    @torch.no_grad()
    def decode(side: int) -> float:
        z = torch.randn(1, settings.latent_channels, *(side // settings.downsampling,) * 3).contiguous(
            memory_format=channels_last(3)
        )
        return _best(lambda: ours.decode(z), turns)

    def denoiser_step(side: int) -> float:
        network, inputs = _denoiser(diffusion, (settings.latent_channels, *(side // settings.downsampling,) * 3))
        return _best(lambda: network(*inputs).square().mean().backward(), turns)

    runs = {
        "autoencoder step": our_step,
        "autoencoder step, peer": their_step,
        "decoding": decode,
        "diffusion step": denoiser_step,
    }
    lines = {label: grow(sides, run, POINT_SECONDS) for label, run in runs.items()}
    return _curve("voxels", "voxels per image", lambda side: side**3, lines)


def _denoiser(settings: config.Diffusion, shape: tuple[int, ...]) -> tuple[Denoiser, tuple[Any, ...]]:
    torch.manual_seed(0)
    network = Denoiser(settings, shape, [0, 2, 2, 0, 0])
    to_channels_last(network, 3)
    x = torch.randn(1, *shape).contiguous(memory_format=channels_last(3))
    return network, (x, torch.full((1,), 500.0), Condition(torch.zeros(1, 5)))


# --------------------------------------------------------------------------------------------------- subjects


def _subjects(setting: Setting) -> dict[str, Any]:
    """What touches every subject besides the networks: planning, the latent cache, the search for copies."""
    place = setting.place(setting.sizes[0])
    training = place.table[place.table["split"] == "train"]
    group = config.PlanGroup(name="syn", subjects=1)
    points = setting.either(SUBJECTS, (100, 200))

    def plan(count: int) -> float:
        return _best(
            lambda: build_plan(
                [group.model_copy(update={"subjects": count})], place.study.covariates, training, "benchmarks", 250
            ),
            1,
        )

    def search(count: int) -> float:
        queries, references = (
            unit_rows(philox("benchmarks", label).standard_normal((n, SEARCHED), dtype=np.float32))
            for label, n in (("queries", count), ("references", count))
        )
        return _best(lambda: nearest(queries, references, 1), 1)

    folder = Path(tempfile.mkdtemp(dir=setting.work))
    try:
        writes, reads = {}, {}
        for count in points:
            path = folder / f"{count}.arrow"
            writes[count] = _best(lambda count=count, path=path: _write(count, path), 1)
            reads[count] = _read(path, count)
            path.unlink()
    finally:
        shutil.rmtree(folder)
    lines = {
        "planning": grow(points, plan, SUBJECT_SECONDS),
        "search for copies, as many references": grow(points, search, SUBJECT_SECONDS),
        "writing the latent cache": (list(writes), list(writes.values())),
        "1,000 random batches of 8 from it": (list(reads), list(reads.values())),
    }
    return _curve("subjects", "subjects", float, lines, latent_shape=list(LATENT))


def _write(count: int, path: Path) -> None:
    numbers = np.zeros(len(LATENT) + 1, np.float32)
    columns = {"mean": Column("float16", LATENT), "numbers": Column("float32", numbers.shape)}
    values = np.zeros(LATENT, np.float16)
    with ShardWriter(path, columns) as shard:
        for _ in range(count):
            shard.append(mean=values, numbers=numbers)


def _read(path: Path, count: int) -> float:
    shards = Shards([path])
    prior = {"offset": torch.zeros(1, *LATENT), "scale": torch.ones(())}
    data = LatentData(shards, prior, np.zeros((count, 1), np.float32), np.arange(count), np.arange(0))
    rng = np.random.default_rng(0)
    batches = rng.integers(count, size=(1000, 8))
    return _best(lambda: [data.draw(rows, rng) for rows in batches], 2)


# ------------------------------------------------------------------------------------------------------ steps


def _steps(setting: Setting) -> dict[str, Any]:
    """Sampler steps: seconds per volume, with decoding, at the smallest size."""
    place = setting.place(setting.sizes[0])
    samplers = Samplers(place, our_model(place, setting.either(45.0, 0.2)))
    rows = np.arange(setting.either(8, 2))
    steps = setting.either(STEPS, (2, 3))
    samplers.ours(rows, steps[0])
    line = grow(
        steps, lambda count: _best(lambda: samplers.ours(rows, count), setting.either(2, 1)) / len(rows), POINT_SECONDS
    )
    slope, start = np.polyfit(line[0], line[1], 1) if len(line[0]) > 1 else (line[1][0] / line[0][0], 0.0)
    return _curve(
        "sampler steps",
        "network evaluations per volume",
        float,
        {place.size.name: line},
        per_step=rounded(float(slope)),
        at_zero=rounded(float(start)),
    )
