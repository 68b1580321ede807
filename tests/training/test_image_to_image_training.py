"""Networks that draw images from images: what they learn, that a resumed training is an undisturbed one."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from meddiff_steps import config
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.folders import OF_IMAGE_TO_IMAGE
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.image_to_image import build, card_of, load_image_to_image
from meddiff_steps.training.image_to_image import rows_to_train_on, train, with_noise_and_without
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.image_to_image import ImageToImageTask, Way

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def fabric() -> Any:
    return make_fabric(config.Compute(device="cpu", precision="32-true"), threads=1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """A spot somewhere; readers mark it, one of them never anything; the other contrast is dark where it is."""
    path = tmp_path_factory.mktemp("pairs") / "shard.arrow"
    columns = {"scan_id": pa.string(), "image": TensorColumn("float16", SHAPE)}
    columns |= {name: TensorColumn("uint8", SHAPE, "mask") for name in ("first", "second")}
    columns |= {"other": TensorColumn("float16", SHAPE, "contrast"), "parts": TensorColumn("int16", SHAPE, "labels")}
    rng = np.random.default_rng(0)
    with ShardWriter(path, columns) as shard:
        for i in range(12):
            mask = np.zeros(SHAPE)
            row, column = rng.integers(0, 6, 2)
            mask[0, row : row + 3, column : column + 3] = 1
            image = 0.2 + 0.6 * mask
            shard.append(scan_id=str(i), image=image, first=mask, second=0 * mask, other=1 - image, parts=5 * mask)
    return Shards([path])


def task(way: Way, shards: Shards, target: list[str], fabric: Any, **changes: Any) -> ImageToImageTask:
    optimiser = {"steps": 6, "batch_size": 4, "warmup_steps": 2, "checkpoint_every": 3, "validate_every": 3}
    optimiser |= changes.pop("optimiser", {})
    settings = config.ImageToImage(
        **{"target": target, "block": 2, "channels": [16], "num_res_blocks": 1, "optimiser": optimiser, **changes}
    )
    pairs = Pairs.of(shards, ["image"], target, range(10), "x")
    return ImageToImageTask(
        way, settings, config.Variants(flip=True, max_shift_voxels=1), pairs, range(10), range(10, 12), "x", fabric
    )


@pytest.mark.parametrize("target", [["other"], ["first"], ["parts"]])
@pytest.mark.parametrize("way", ["diffusion", "regression"])
def test_the_held_out_loss_falls(way: Way, target: list[str], shards: Shards, fabric: Any, tmp_path: Path) -> None:
    made = task(way, shards, target, fabric, optimiser={"steps": 40, "validate_every": 40})
    curve = fit(made, made.settings.optimiser, fabric, tmp_path, "x")
    losses = curve[curve["metric"] == "val/loss"]["value"].tolist()
    assert losses[-1] < 0.9 * losses[0]


def test_a_regression_finds_what_is_marked(shards: Shards, fabric: Any, tmp_path: Path) -> None:
    made = task("regression", shards, ["first"], fabric, optimiser={"steps": 80})
    fit(made, made.settings.optimiser, fabric, tmp_path, "x")
    model: Any = made.modules["average"]
    with torch.no_grad():
        guess = model.guess(torch.from_numpy(made.pairs.sources([10, 11]))).numpy()
    assert (made.pairs.decoded(guess) == made.pairs.truths([10, 11])).mean() > 0.95


def test_of_several_readers_one_is_looked_at_at_a_time(shards: Shards, fabric: Any) -> None:
    made = task("diffusion", shards, ["first", "second"], fabric)
    rng = np.random.default_rng(0)
    marked = [(made._batch(np.arange(4), rng, varied=False)[1] > 0).any((1, 2, 3)) for _ in range(50)]
    assert 0.35 < np.mean(marked) < 0.65
    assert made.model.scale > 0 and float(made.model.offset[:, 0].mean()) > -2  # halves of one reader's, in Haar means


@pytest.mark.parametrize("coordinates", [True, False])
def test_targets_are_standardised_one_by_one(
    coordinates: bool, shards: Shards, fabric: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    truths = Pairs.truths

    def read(pairs: Pairs, rows: Any) -> np.ndarray:
        held.append(sum(isinstance(one, torch.Tensor) and one.shape[-3:] == (4, 4, 4) for one in gc.get_objects()))
        return truths(pairs, rows)

    monkeypatch.setattr(Pairs, "truths", read)
    made = task("diffusion", shards, ["first", "second"], fabric, coordinates=coordinates)
    assert len(held) == 10 and held[-1] <= held[1]
    blocks = torch.stack(
        [
            made.model.in_blocks(torch.from_numpy(made.pairs.encoded(truths(made.pairs, [row])[0][:, None]))).mean(0)
            for row in range(10)
        ]
    )
    mean = blocks.mean(0) if coordinates else blocks.mean((0, 2, 3))[:, None, None].expand(4, 4, 4)
    torch.testing.assert_close(made.model.offset[0], mean)
    assert float(made.model.scale) == pytest.approx(float((blocks - mean).square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("way", ["diffusion", "regression"])
@pytest.mark.parametrize("network", ["resnet", "unet"])
def test_a_resumed_training_is_an_undisturbed_one(
    way: Way, network: str, shards: Shards, fabric: Any, tmp_path: Path
) -> None:
    changes = {"network": network, "channels": [32] if network == "unet" else [16]}
    whole, begun, resumed = (task(way, shards, ["first"], fabric, **changes) for _ in range(3))
    full = whole.settings.optimiser
    curve = fit(whole, full, fabric, tmp_path / "whole", "x")
    steps = begun.train_step

    def killed(step: int) -> Any:
        if step == 4:
            raise KeyboardInterrupt
        return steps(step)

    begun.train_step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        fit(begun, full, fabric, tmp_path / "other", "x")
    again = fit(resumed, full, fabric, tmp_path / "other", "x")
    assert again.equals(curve)
    for name, value in whole.modules["average"].state_dict().items():
        assert torch.equal(value, resumed.modules["average"].state_dict()[name]), name


def test_what_is_written_draws_as_what_was_trained(shards: Shards, fabric: Any, tmp_path: Path) -> None:
    made = task("diffusion", shards, ["first"], fabric)
    networks = with_noise_and_without(made.pairs, tmp_path)
    rows = (np.arange(10), np.arange(10, 12))
    settings, variants = made.settings, config.Variants()
    train(networks, settings, variants, config.Compute(), rows, "x/segmentation", fabric, tmp_path / "state")
    sources, noise = torch.from_numpy(made.pairs.sources([0])), torch.randn(1, *SHAPE)
    drawn = []
    for network in networks:
        model, card = load_image_to_image(tmp_path, *network.files)
        assert card["way"] == network.way and card["target"] == ["first"] and card["labels"] == [0, 1]
        drawn.append(model.draw(sources, noise, 3))
        assert model.guess(sources).shape == drawn[-1].shape == (1, *SHAPE)
    assert not torch.equal(*drawn)


def test_contrasts_are_drawn_about_what_the_network_without_noise_says(
    shards: Shards, fabric: Any, tmp_path: Path
) -> None:
    made = task("diffusion", shards, ["other"], fabric)
    networks = with_noise_and_without(made.pairs, tmp_path)
    rows = (np.arange(10), np.arange(10, 12))
    train(networks, made.settings, config.Variants(), config.Compute(), rows, "x", fabric, tmp_path / "state")
    plain, _ = load_image_to_image(tmp_path, *OF_IMAGE_TO_IMAGE["regression"])
    model, card = load_image_to_image(tmp_path, *OF_IMAGE_TO_IMAGE["diffusion"])
    assert model.mean is not None and card["mean"]["sources"] == 1
    for name, value in plain.state_dict().items():
        assert torch.equal(model.mean.state_dict()[name], value), f"{name} was trained"
    with torch.no_grad():
        sources = torch.from_numpy(made.pairs.sources(rows[0]))
        guess, truths = plain.guess(sources), torch.from_numpy(made.pairs.encoded(made.pairs.truths(rows[0])))
        assert float(model.scale) == pytest.approx(float((truths - guess).square().mean().sqrt()), rel=1e-4)
        # A network that has learnt nothing draws white noise of that spread about the guess.
        for weight in model.network.last.parameters():
            weight.zero_()
        drawn = model.draw(sources[:1], torch.randn(2000, *SHAPE), 40)
    assert torch.allclose(drawn.mean(0), guess[0], atol=0.15 * float(model.scale))
    assert float((drawn - guess[:1]).std()) == pytest.approx(float(model.scale), rel=0.05)


def test_images_go_to_blocks_and_back_unrounded_whatever_the_precision() -> None:
    model = build(card_of(config.ImageToImage(block=2, channels=[8]), (8, 8), 1, 1))
    images = torch.rand(2, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model.in_voxels(model.in_blocks(images)), images)
        assert model.told(images).dtype == torch.float32
        assert torch.isfinite(model.guess(images)).all() and torch.isfinite(model.draw(images, images, 2)).all()


def test_without_training_scans_nothing_is_begun() -> None:
    with pytest.raises(UserError, match=r"translation: no preprocessed scan is in the train split"):
        rows_to_train_on({"train": np.array([]), "val": np.array([1])}, "translation")


def test_cards_that_say_nothing_of_later_settings_are_read() -> None:
    card = card_of(config.ImageToImage(block=1, channels=[8]), (8, 8), 2, 1)
    old = {name: value for name, value in card.items() if name not in ("marks", "missing", "slices")}
    old["settings"] = {name: v for name, v in card["settings"].items() if name not in ("patch", "coordinates")}
    shapes = [{name: v.shape for name, v in build(one).state_dict().items()} for one in (card, old)]
    assert shapes[0] == shapes[1] and build(old).place.any()
