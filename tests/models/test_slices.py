"""Networks of slices: they see no other slice, layers across slices change nothing until they are trained, and then
they mix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meddiff_steps import config
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.evaluation.completion import texture
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.models.image_to_image import ImageToImage, load_image_to_image
from meddiff_steps.models.slices import solid_width
from meddiff_steps.training.image_to_image import train, volume_wise, with_noise_and_without
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.image_to_image import ImageToImageTask

SHAPE = (8, 8, 6)


def settings_of(**changes: Any) -> config.Translation:
    optimiser = {"steps": 4, "batch_size": 4, "warmup_steps": 2, "validate_every": 1000, **changes.pop("optimiser", {})}
    given = {"target": ["post"], "block": 2, "channels": [16], "num_res_blocks": 2, "samples": 2, "volume_steps": 3}
    return config.Translation.model_validate({**given, "optimiser": optimiser, **changes})


def awake(slices: Any) -> ImageToImage:
    torch.manual_seed(0)
    model = ImageToImage(settings_of(), SHAPE, 1, 1, slices=slices).eval()
    for weight in model.parameters():  # a fresh network says nothing
        torch.nn.init.normal_(weight, std=0.1)
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(2, 1, *SHAPE), torch.randn(2, 1, *SHAPE)


def test_blocks_are_of_one_slice_and_exact() -> None:
    model, (sources, _) = awake("alone"), inputs()
    blocks = model.in_blocks(sources)
    assert blocks.shape == (2, 4, 4, 4, 6) and model.blocks_shape == (4, 4, 4, 6)
    torch.testing.assert_close(model.in_voxels(blocks), sources)
    changed = sources.clone()
    changed[..., 2] += 1
    assert (model.in_blocks(changed) != blocks).any((0, 1, 2, 3)).tolist() == [k == 2 for k in range(6)]


@torch.no_grad()
def test_a_slice_is_drawn_and_guessed_without_the_others() -> None:
    model, (sources, noise) = awake("alone"), inputs()
    other, other_noise = sources.clone(), noise.clone()
    other[..., 3], other_noise[..., 3] = 0.1, 0.2
    for a, b in (
        (model.guess(sources), model.guess(other)),
        (model.draw(sources, noise, 3), model.draw(other, other_noise, 3)),
    ):
        assert ((a - b).abs().amax((0, 1, 2, 3)) > 1e-4).tolist() == [k == 3 for k in range(6)]


@torch.no_grad()
def test_inserted_layers_change_nothing_until_they_are_trained_and_mix_then() -> None:
    alone, (sources, noise) = awake("alone"), inputs()
    joined = ImageToImage(settings_of(), SHAPE, 1, 1, slices="joined").eval()
    missing, unexpected = joined.load_state_dict(alone.state_dict(), strict=False)
    assert not unexpected and missing and all(".across." in name for name in missing)
    assert torch.equal(joined.guess(sources), alone.guess(sources))
    assert torch.equal(joined.draw(sources, noise, 4), alone.draw(sources, noise, 4))
    for name, weight in joined.named_parameters():
        if ".across." in name:
            torch.nn.init.normal_(weight, std=0.1)
    other = sources.clone()
    other[..., 3] = 0.1
    seen = ((joined.guess(sources) - joined.guess(other)).abs().amax((0, 1, 2, 3)) > 1e-6).tolist()
    assert seen == [False, True, True, True, True, True]  # two blocks reach two slices to either side


def test_the_3d_network_beside_it_costs_as_much() -> None:
    def cost(slices: Any) -> int:
        with torch.device("meta"):
            settings = settings_of(channels=[48], num_res_blocks=3, block=4)
            model = ImageToImage(settings, (32, 32, 32), 1, 1, slices=slices)
            with FlopCounterMode(display=False) as counter:
                model.guess(torch.empty(1, 1, 32, 32, 32))
        return counter.get_total_flops()

    assert cost("solid") == pytest.approx(cost("joined"), rel=0.04)
    assert cost("alone") < 0.9 * cost("joined")
    assert 0.55 * 48 < solid_width(35, 16, 48, 3) < 0.65 * 48


class Scans:
    """Stands for shards: slices of one grey value each, and the value of the slice above it."""

    def __init__(self, count: int = 40) -> None:
        values = np.random.default_rng(0).uniform(0.1, 0.9, (count, 1, 1, 1, SHAPE[2])).astype(np.float32)
        image = np.broadcast_to(values, (count, 1, *SHAPE))
        self.images = {"image": image, "post": np.roll(image, -1, -1)}

    def tensors(self, name: str, rows: Any, dtype: str | None = "float32") -> np.ndarray:
        return self.images[name][np.asarray(rows)]

    def shape(self, name: str) -> tuple[int, ...]:
        return (1, *SHAPE)


@pytest.fixture(scope="module")
def fabric() -> Any:
    return make_fabric(config.Compute(device="cpu", precision="32-true"), threads=1)


@pytest.fixture
def pairs() -> Pairs:
    shards: Any = Scans()
    return Pairs(shards, ("image",), ("post",), "contrast")


def test_what_only_another_slice_says_is_learnt_by_the_inserted_layers(
    fabric: Any, pairs: Pairs, tmp_path: Path
) -> None:
    settings = settings_of(optimiser={"steps": 120, "validate_every": 120, "ema_decay": 0.9, "learning_rate": 0.02})
    start, losses = None, {}
    for slices in ("alone", "joined"):
        task = ImageToImageTask(
            "regression",
            *(settings, config.Variants(), pairs, range(32), range(32, 40), "x", fabric),
            base=start,
            slices=slices,  # type: ignore[arg-type]
        )
        if start is not None:
            assert task.validate()["val/loss"] == pytest.approx(losses["alone"], rel=1e-5)
        fit(task, settings.optimiser, fabric, tmp_path / slices, "x")
        losses[slices], start = task.validate()["val/loss"], task.modules["average"]
    assert losses["joined"] < 0.6 * losses["alone"]


def test_what_is_written_is_what_was_begun_and_goes_on(fabric: Any, pairs: Pairs, tmp_path: Path) -> None:
    settings = settings_of()
    folders = [tmp_path / name for name in ("out", "volume", "solid")]
    networks = with_noise_and_without(pairs, folders[0], "alone") + volume_wise(pairs, *folders, 4, 3)
    rows = (np.arange(32), np.arange(32, 40))
    train(networks, settings, config.Variants(), config.Compute(), rows, "x/translation", fabric, tmp_path / "state")
    found = {}
    for name, folder in zip(("alone", "joined", "solid"), folders, strict=True):
        found[name], card = load_image_to_image(folder, "model.safetensors", "card.json")
        assert card["slices"] == name and card["optimiser"]["steps"] == {"alone": 4, "joined": 3, "solid": 7}[name]
        assert found[name].draw(*inputs(), 2).shape == (2, 1, *SHAPE)
    assert torch.equal(found["alone"].offset, found["joined"].offset)
    moved = [
        (found["alone"].state_dict()[k] - v).abs().max()
        for k, v in found["joined"].state_dict().items()
        if ".across." not in k and v.is_floating_point()
    ]
    assert 0 < max(moved) < 0.05


def test_flicker_is_texture_across_slices() -> None:
    ramp = np.broadcast_to(np.linspace(0, 1, 6), (1, *SHAPE)) + np.linspace(0, 1, 8)[:, None, None]
    flickers = ramp + 0.1 * (np.arange(6) % 2)
    region = np.ones(SHAPE, bool)
    assert texture(ramp, flickers, region, (0, 1)) == pytest.approx(1.0)
    steps = np.array([0.3, 0.1] * 2 + [0.3])
    assert texture(ramp, flickers, region, (2,)) == pytest.approx(np.sqrt(np.square(steps).mean()) / 0.2)


def test_slices_are_of_volumes_and_light_networks() -> None:
    with pytest.raises(ValueError, match="volume_steps needs network: resnet"):
        settings_of(network="unet", channels=[32])
    with pytest.raises(ValueError, match="volume_steps and patch do not go together"):
        settings_of(patch=[8, 8])
    with pytest.raises(ValueError, match="volume_steps and cycle do not go together"):
        settings_of(cycle=True)
    study = {
        "study": "x",
        "cohort": {"source": "simulated"},
        "covariates": {"age": {"unit": "year", "range": [0, 120]}},
        "plan": [{"name": "syn", "subjects": 3}],
        "preprocess": {"channels": {"post": {"path": "x"}}, "shape": [32, 40, 31], "spacing_mm": 5},
        "translation": {"target": ["post"], "volume_steps": 5},
        "autoencoder": {"channels": [16]},
    }
    said = ""
    try:
        config.parse_study(study, "x")
    except Exception as error:  # noqa: BLE001 other sections may not like the shape
        said = str(error)
    assert "translation.block" not in said  # blocks are of slices: 31 of them will do
    flat = study | {"preprocess": {"channels": {"post": {"path": "x"}}, "shape": [32, 32], "spacing_mm": None}}
    with pytest.raises(Exception, match=r"translation.volume_steps: needs a 3D preprocess.shape, found \[32, 32\]"):
        config.parse_study(flat, "x")
