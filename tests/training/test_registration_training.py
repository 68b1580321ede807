"""Training of registration networks: what they find, and that an interrupted one ends as an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss
from scipy import ndimage

from meddiff_steps import config
from meddiff_steps.applications.registration import deform, known_deformation
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.evaluation.registration import distance
from meddiff_steps.imaging.deformation import moved
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.registration import RegistrationTask, local_correlation

SHAPE, SCANS, SMOOTH = (16, 16, 16), 10, 0.25


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """One structured body, each time deformed in another known way."""
    path = tmp_path_factory.mktemp("shards") / "images.arrow"
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(SHAPE), 1.5)
    distances = np.linalg.norm(np.indices(SHAPE) - 7.5, axis=0)
    body = (distances < 6) * np.clip(0.5 + 0.25 * noise / noise.std(), 0.1, 1)
    image = torch.from_numpy(ndimage.gaussian_filter(body, 0.7).astype(np.float32))[None, None]
    with ShardWriter(path, {"scan_id": pa.string(), "image": TensorColumn("float32", (1, *SHAPE))}) as shard:
        for i in range(SCANS):
            away, _ = known_deformation(SHAPE, 4.0, np.random.default_rng(i), SMOOTH)
            shard.append(scan_id=f"s{i}", image=moved(image, torch.from_numpy(away)[None])[0].numpy())
    return Shards([path])


def task(shards: Shards, steps: int, *, score: bool) -> RegistrationTask:
    optimiser = {"steps": steps, "batch_size": 2, "checkpoint_every": 4, "log_every": 5, "validate_every": 100}
    settings = config.PairRegistration(
        channels=[16, 16],
        reduce=1,
        smoothness=0.02,
        window=3,
        optimiser=config.PairRegistration().optimiser.model_copy(update=optimiser),
    )
    fabric = make_fabric(config.Compute(device="cpu", precision="32-true"), 1)
    return RegistrationTask(settings, shards, range(8), range(8, SCANS), "x", fabric, score=score)


@pytest.mark.parametrize("window", [3, 5])
def test_the_correlation_is_that_of_monai(window: int) -> None:
    a, b = torch.rand(2, 1, 9, 10, 11), torch.rand(2, 1, 9, 10, 11)
    theirs = LocalNormalizedCrossCorrelationLoss(spatial_dims=3, kernel_size=window, reduction="none")
    inner = (slice(None), slice(None), *(slice(window // 2, n - window // 2) for n in a.shape[2:]))
    found = local_correlation(a, 0.5 * a + 0.5 * b, window, stride=1)
    expected = -theirs(a, 0.5 * a + 0.5 * b)[inner].mean()
    assert float(found) == pytest.approx(float(expected), abs=2e-3)
    assert float(local_correlation(a, 0.3 * a + 0.2, window)) == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("score", [True, False])
def test_a_trained_network_finds_a_known_deformation(shards: Shards, score: bool, tmp_path: Path) -> None:
    trained = task(shards, 150, score=score)
    curve = fit(trained, trained.settings.optimiser, trained.fabric, tmp_path, "x").set_index(["metric", "step"])[
        "value"
    ]
    assert curve["val/likeness"].iloc[-1] > curve["val/likeness"].iloc[0] + 0.1
    assert ("train/score" in curve.index.get_level_values(0)) == score
    if score:
        assert curve["train/score"].iloc[-1] < 0.95, "noise is told, though half of the steps have none"
    away, back = known_deformation(SHAPE, 4.0, np.random.default_rng(78), SMOOTH)
    fixed = shards.tensor("image", 9)
    moving = moved(torch.from_numpy(fixed.copy())[None], torch.from_numpy(away)[None])[0].numpy()
    found = deform(trained.modules["average"], moving, fixed)[0].displacement  # type: ignore[arg-type]
    head = fixed[0] > 0.1
    before = distance(np.zeros_like(back), back, head, (1.0, 1.0, 1.0))
    assert before > 2 and distance(found, back, head, (1.0, 1.0, 1.0)) < 0.75 * before


def test_an_interrupted_training_ends_as_an_undisturbed_one(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = task(shards, 6, score=True)
    fit(whole, whole.settings.optimiser, whole.fabric, tmp_path / "whole", "x")
    broken = task(shards, 6, score=True)
    honest = broken.train_step

    def dies(step: int) -> dict[str, torch.Tensor]:
        if step == 5:
            raise KeyboardInterrupt
        return honest(step)

    monkeypatch.setattr(broken, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, broken.settings.optimiser, broken.fabric, tmp_path / "broken", "x")
    resumed = task(shards, 6, score=True)
    fit(resumed, resumed.settings.optimiser, resumed.fabric, tmp_path / "broken", "x")
    for name, weights in whole.modules["average"].state_dict().items():
        torch.testing.assert_close(resumed.modules["average"].state_dict()[name], weights, atol=0, rtol=0)


def test_moving_and_fixed_scans_of_a_pair_differ(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    one, seen = task(shards, 6, score=False), []
    drawn = one._drawn

    def watched(moving: np.ndarray, fixed: np.ndarray, *rest: object) -> tuple[torch.Tensor, ...]:
        seen.extend(zip(moving.tolist(), fixed.tolist(), strict=True))
        return drawn(moving, fixed, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(one, "_drawn", watched)
    for step in range(12):
        one.train_step(step)
    assert all(a != b and {a, b} <= set(range(8)) for a, b in seen)
    assert sorted(b for _, b in seen[:8]) == list(range(8)), "each is fixed once in an epoch"
