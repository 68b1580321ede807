"""Points are drawn for a set: order and number do not matter, keys do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meddiff_steps import config
from meddiff_steps.applications import shape_completion
from meddiff_steps.applications.shape_completion import chosen, complete, most_typical, split
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.errors import UserError
from meddiff_steps.evaluation import shapes as judging
from meddiff_steps.imaging.points import Shapes, defect
from meddiff_steps.models.points import PointDenoiser, load_point_denoiser, told
from meddiff_steps.models.weights import save_model
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.shape_completion import ShapeTask

SETTINGS = config.ShapeCompletion(channels=16, blocks=2, known=12, drawn=8, samples=3, num_inference_steps=6)


def rods(count: int) -> Shapes:
    """Rods of several lengths along an axis, one end of each missing."""
    generator, points, missing = np.random.default_rng(0), [], []
    for i in range(count):
        along = np.linspace(-1, 1, 40) * (8 + 4 * generator.random())
        rod = np.stack([along, 0.3 * generator.standard_normal(40), 0.3 * generator.standard_normal(40)], 1)
        points.append(rod.astype(np.float32))
        missing.append(defect(rod, 0 if i % 2 else 39, 10))
    return Shapes(np.stack(points), np.stack(missing), [f"rod{i}" for i in range(count)])


def network() -> PointDenoiser:
    torch.manual_seed(0)
    model = PointDenoiser(SETTINGS).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


@torch.no_grad()
def test_the_network_does_not_know_an_order() -> None:
    model, generator = network(), torch.Generator().manual_seed(1)
    x, left = torch.randn(2, 3, 9, generator=generator), torch.randn(2, 3, 12, generator=generator)
    times, order, other = torch.tensor([10.0, 700.0]), torch.randperm(9), torch.randperm(12)
    found = model(x, times, told(left))
    assert found.shape == x.shape
    torch.testing.assert_close(
        model(x[..., order], times, told(left[..., other])), found[..., order], atol=1e-4, rtol=1e-4
    )
    assert (model(x, times, told(left + 0.5)) - found).abs().max() > 1e-3, "it looks at what is left"
    points = torch.randn(2, 5, 3)
    torch.testing.assert_close(model.millimetres(model.standardise(points)), points)


def test_draws_are_those_of_their_keys() -> None:
    model, left = network(), np.random.default_rng(0).standard_normal((2, 30, 3)).astype(np.float32)
    drawn = complete(model, left, 10, SETTINGS, ["a", "b"])
    assert drawn.shape == (2, 3, 10, 3)
    again = complete(model, left[1:, ::-1], 10, SETTINGS, ["b"])
    np.testing.assert_allclose(again[0], drawn[1], atol=1e-3, err_msg="in another order, alone")
    np.testing.assert_array_equal(complete(model, left[1:], 10, SETTINGS, ["b"])[0], drawn[1])
    assert np.abs(drawn[:, 0] - drawn[:, 1]).max() > 0.1
    np.testing.assert_array_equal(chosen(left[0], 12, "a"), chosen(left[0][::-1], 12, "a"))


def test_a_shape_is_a_batch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = shape_completion.sample

    def counted(model: Any, noise: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        sizes.append(len(noise))
        return plain(model, noise, *args, **more)

    monkeypatch.setattr(shape_completion, "sample", counted)
    left = np.random.default_rng(0).standard_normal((5, 30, 3)).astype(np.float32)
    assert complete(network(), left, 10, SETTINGS, list("abcde")).shape == (5, 3, 10, 3)
    assert sizes == [SETTINGS.samples] * 5


def test_the_typical_draw_is_in_the_middle_of_the_others() -> None:
    shape = np.random.default_rng(0).standard_normal((20, 3))
    assert most_typical(np.stack([shape + 10.0, shape, shape - 12.0])) == 1


def test_every_so_many_shapes_are_for_testing_alone() -> None:
    train, val, test = split(100, 4, "x")
    assert test.tolist() == list(range(0, 100, 4)) and len(val) == 7
    assert sorted([*train, *val, *test]) == list(range(100))
    with pytest.raises(UserError, match="shapes.npz: 10 shapes, of which 6 would be learnt from, at least 8"):
        split(10, 4, "shapes.npz")


def test_distances_and_overlaps_are_those_of_sets() -> None:
    first, second = np.zeros((4, 3)), np.zeros((4, 3))
    first[:, 0], second[:, 0] = [0, 1, 2, 3], [0, 1, 2, 5]
    assert judging.chamfer(first, second) == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert judging.farthest(first, second, 1.0) == 2.0
    masks = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], bool)
    assert judging.dice(*masks) == 0.5 and judging.dice(~masks[0] & masks[0], masks[0] & ~masks[0]) == 1.0


def test_a_trained_network_draws_the_end_that_is_missing(tmp_path: Path) -> None:
    shapes, fabric = rods(32), make_fabric(config.Compute(device="cpu", precision="32-true"), 1)
    optimiser = SETTINGS.optimiser.model_copy(update={"steps": 250, "batch_size": 16, "learning_rate": 5e-3})
    task = ShapeTask(
        SETTINGS.model_copy(update={"optimiser": optimiser}), shapes, np.arange(28), np.arange(28, 30), "x", fabric
    )
    curve = fit(task, optimiser, fabric, tmp_path / "state", "x").set_index("metric")["value"]
    assert curve["val/loss"].iloc[-1] < 0.7 * curve["val/loss"].iloc[0]
    save_model(
        task.modules["average"],
        tmp_path / "network",
        {"settings": SETTINGS.model_dump(mode="json", exclude={"points"})},
    )
    model, _ = load_point_denoiser(tmp_path / "network")
    drawn = complete(model, np.stack([shapes.left(i) for i in (30, 31)]), 10, SETTINGS, ["a", "b"])
    for i, draws in zip((30, 31), drawn, strict=True):
        side = np.sign(shapes.gone(i)[:, 0].mean())
        assert (side * draws[..., 0] > 0).mean() > 0.9, "at the end that is missing"
        other = shapes.left(i)[:10]
        assert judging.chamfer(draws[0], shapes.gone(i)) < 0.5 * judging.chamfer(other, shapes.gone(i))
