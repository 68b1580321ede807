"""Whatever contrast is missing, from those that are there: what is absent has no say, and the simple way is least
squares.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from meddiff_steps import config
from meddiff_steps.applications import translation
from meddiff_steps.applications.image_to_image import Drawer
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.models.image_to_image import ImageToImage
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.image_to_image import ImageToImageTask

SPATIAL = (8, 8)
NAMES = ("image", "b", "c")


class Scans:
    """Stands for shards: b is the negative of the image, c its half; scan 1 has no c."""

    def __init__(self, count: int = 24) -> None:
        image = np.random.default_rng(0).uniform(0.1, 0.9, (count, 1, 4, 4)).astype(np.float32)
        image = image.repeat(2, 2).repeat(2, 3)
        self.images = {"image": image, "b": 1 - image, "c": image / 2}
        self.images["c"][1] = 0
        self.schema = [SimpleNamespace(name=name, metadata={b"kind": b"contrast"}) for name in "bc"]
        self.schema += [SimpleNamespace(name="m", metadata={b"kind": b"mask"})]

    def tensors(self, name: str, rows: Any, dtype: str | None = "float32") -> np.ndarray:
        return self.images[name][np.asarray(rows)]

    def shape(self, name: str) -> tuple[int, ...]:
        return (1, *SPATIAL)


@pytest.fixture(scope="module")
def fabric() -> Any:
    return make_fabric(config.Compute(device="cpu", precision="32-true"), threads=1)


def settings_of(**changes: Any) -> config.Translation:
    optimiser = {"steps": 150, "batch_size": 8, "warmup_steps": 5, "validate_every": 150}
    return config.Translation.model_validate(
        {
            **{"source": NAMES, "target": NAMES, "missing": True, "block": 2, "channels": [24], "num_res_blocks": 1},
            **{"samples": 2, "num_inference_steps": 4, "optimiser": optimiser},
            **changes,
        }
    )


def pairs_of(shards: Any) -> Pairs:
    return Pairs.of(shards, NAMES, NAMES, [0], "translation", missing=True)


def test_every_choice_that_leaves_something_to_draw_is_a_pattern() -> None:
    pairs = pairs_of(Scans())
    assert pairs.patterns().astype(int).tolist() == [
        *([0, 0, 1], [0, 1, 0], [1, 0, 0]),
        *([0, 1, 1], [1, 0, 1], [1, 1, 0]),
    ]
    assert pairs.asked(np.array([True, False, True])).tolist() == [False, True, False]
    other = Pairs(pairs.shards, ("image", "b"), ("c",), "contrast", missing=True)
    assert other.patterns().astype(int).tolist() == [[0, 1], [1, 0], [1, 1]]
    given, known = pairs.there([0, 1])
    assert given.tolist() == known.tolist() == [[True, True, True], [True, True, False]]


def drawer(shards: Any, fabric: Any) -> Drawer:
    torch.manual_seed(0)
    settings = settings_of()
    model = ImageToImage(settings, SPATIAL, 3, 3, missing=True).eval()
    for weight in model.parameters():  # a fresh network says nothing
        torch.nn.init.normal_(weight, std=0.2)
    return Drawer(model, model, pairs_of(shards), settings, "x", fabric, {})


def test_what_is_absent_has_no_say_and_what_is_present_has(fabric: Any) -> None:
    one, other = Scans(), Scans()
    other.images["b"] = np.random.default_rng(1).uniform(-5, 5, other.images["b"].shape).astype(np.float32)
    absent, present = np.array([True, False, True]), np.array([True, True, True])
    for say in (lambda made, left: made.guess(0, left), lambda made, left: made.draws(0, "a", present=left)):
        assert np.array_equal(say(drawer(one, fabric), absent), say(drawer(other, fabric), absent))
        assert not np.allclose(say(drawer(one, fabric), present), say(drawer(other, fabric), present))
    # A contrast that is grey everywhere is not one that is missing
    one.images["b"][:] = 0.5
    assert not np.allclose(drawer(one, fabric).guess(0, absent), drawer(one, fabric).guess(0, present))
    # What a scan lacks is absent without being said
    assert np.array_equal(
        drawer(one, fabric).draws(1, "a"), drawer(one, fabric).draws(1, "a", present=np.array([True, True, False]))
    )


def test_one_model_draws_any_contrast_from_any_other(fabric: Any, tmp_path: Path) -> None:
    pairs = pairs_of(Scans())
    settings = settings_of()
    task = ImageToImageTask("regression", settings, config.Variants(), pairs, range(20), range(20, 24), "x", fabric)
    fit(task, settings.optimiser, fabric, tmp_path, "x")
    model: Any = task.modules["average"].eval()
    made = Drawer(model, model, pairs, settings, "x", fabric, {})
    truth = pairs.truths(range(20, 24))
    for present in pairs.patterns():
        guesses = np.stack([pairs.decoded(made.guess(row, present)[None])[0] for row in range(20, 24)])
        error = np.abs(guesses - truth).mean((0, 2, 3))
        assert (error[pairs.asked(present)] < 0.06).all(), (present, error)


def test_a_target_that_a_scan_lacks_is_not_learnt(fabric: Any) -> None:
    task = ImageToImageTask(
        "regression", settings_of(), config.Variants(), pairs_of(Scans()), range(8), [], "x", fabric
    )
    drawn = task._batch(np.arange(4), np.random.default_rng(0), varied=False)
    sources, targets, noise, timesteps, weights = (torch.from_numpy(one) for one in drawn)
    expected = torch.tensor([[1.0] * 3, [1.0, 1.0, 0.0], [1.0] * 3, [1.0] * 3]) * 12 / 11
    torch.testing.assert_close(weights, expected)
    there = sources.isfinite().flatten(2).all(2)
    assert there.any(1).all() and not there.all(1).any() and not there[1, 2]
    changed = targets.clone()
    changed[1, 2] = 0.3
    losses = [task._loss(task.model, sources, t, noise, timesteps, weights) for t in (targets, changed)]
    assert torch.equal(*losses)


def test_each_pattern_is_looked_at_as_often(fabric: Any) -> None:
    task = ImageToImageTask(
        "regression", settings_of(), config.Variants(), pairs_of(Scans()), range(8), [], "x", fabric
    )
    given = np.ones((3000, 3), bool)
    left = task._left(given, given, np.random.default_rng(0))
    counts = np.unique(left, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and counts.min() > 420 and counts.max() < 580


def test_the_simple_way_is_least_squares_of_what_is_there() -> None:
    pairs, present = pairs_of(Scans(12)), np.array([False, True, False])
    found = translation.PatchRegression.of(pairs, range(12), np.random.default_rng(0), present)
    assert found is not None
    rows = [row for row in range(12) if row != 1]  # that has no c
    x = np.concatenate([translation.patches(pairs.sources([r])[0][present]).reshape(25, -1) for r in rows], 1).T
    x = np.concatenate([x, np.ones((len(x), 1))], 1).astype(np.float64)
    y = np.concatenate([pairs.truths([r])[0].reshape(3, -1) for r in rows], 1).T
    ridge = np.sqrt(translation.RIDGE * np.square(x).sum(0).mean())
    rest = np.linalg.lstsq(np.concatenate([x, ridge * np.eye(26)]), np.concatenate([y, np.zeros((26, 3))]), rcond=None)
    np.testing.assert_allclose(found.weights, rest[0], atol=1e-6)
    ways = translation.without_a_network(pairs, present, found, 0)
    assert list(ways) == ["copy_of_b", "patches"]
    hidden = Scans(12)
    hidden.images["image"][:] = 0.77
    again = translation.without_a_network(pairs_of(hidden), present, found, 0)
    assert np.array_equal(again["patches"], ways["patches"])


def test_the_simple_way_is_left_out_where_no_scan_has_all_of_it(caplog: pytest.LogCaptureFixture) -> None:
    """No scan has both image and c; some have image and b."""
    shards = Scans(6)
    shards.images["c"][:3], shards.images["image"][3:] = 0, 0
    pairs = Pairs(shards, ("image", "c"), ("b",), "contrast", missing=True)  # type: ignore[arg-type]
    fitted = [
        translation.PatchRegression.of(pairs, range(6), np.random.default_rng(0), present)
        for present in (np.array([True, False]), np.array([True, True]))
    ]
    assert fitted[0] is not None and fitted[1] is None
    assert "no training scan has image and c and all that is drawn from it" in caplog.text
    assert list(translation.without_a_network(pairs, np.array([True, True]), None, 0)) == ["copy_of_image", "copy_of_c"]


def test_what_can_be_missing_is_said_at_the_door() -> None:
    with pytest.raises(ValueError, match="missing: true needs two sources or more"):
        settings_of(source=["image"])
    for other, value in {"lesion": "m", "cycle": True, "volume_steps": 3, "patch": [8, 8], "unpaired": {}}.items():
        with pytest.raises(ValueError, match=f"missing and {other} do not go together"):
            settings_of(**{other: value})
    with pytest.raises(ValueError, match="source and target share"):
        settings_of(missing=False)
    with pytest.raises(UserError, match=r"translation.source: m is no contrast"):
        Pairs.of(Scans(), ["image", "m"], ["b"], [0], "translation", missing=True)  # type: ignore[arg-type]
