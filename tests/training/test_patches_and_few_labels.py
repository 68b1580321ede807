"""Patches that know where they lie, and weights that a pretraining without labels leaves to a segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from meddiff_steps import config
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.compute.recompute import kept_for_gradients
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.image_to_image import ImageToImage, load_image_to_image, part
from meddiff_steps.training.image_to_image import Network, labelled_subjects, train
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.image_to_image import ImageToImageTask, Way, cropped

SHAPE = (1, 16, 12)


@pytest.fixture(scope="module")
def fabric() -> Any:
    return make_fabric(config.Compute(device="cpu", precision="32-true"), threads=1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Two spots that look alike; the upper one is marked, the lower one is not. Only their place tells them apart."""
    path = tmp_path_factory.mktemp("places") / "shard.arrow"
    columns = {"scan_id": pa.string(), "image": TensorColumn("float16", SHAPE)}
    columns |= {"mask": TensorColumn("uint8", SHAPE, "mask")}
    rng = np.random.default_rng(0)
    with ShardWriter(path, columns) as shard:
        for i in range(16):
            image, mask = np.full(SHAPE, 0.2), np.zeros(SHAPE)
            for top in (0, 8):
                row, column = top + rng.integers(1, 4), rng.integers(0, 9)
                image[0, row : row + 3, column : column + 3] = 0.8
                if top == 0:
                    mask[0, row : row + 3, column : column + 3] = 1
            shard.append(scan_id=str(i), image=image, mask=mask)
    return Shards([path])


def settings_of(**changes: Any) -> config.ImageToImage:
    optimiser = {"steps": 6, "batch_size": 8, "warmup_steps": 2} | changes.pop("optimiser", {})
    given = {"target": ["mask"], "block": 2, "channels": [16], "num_res_blocks": 1, "optimiser": optimiser}
    return config.ImageToImage(**given | changes)


def task(way: Way, shards: Shards, fabric: Any, more: dict[str, Any] | None = None, **changes: Any) -> ImageToImageTask:
    pairs = Pairs.of(shards, ["image"], ["mask"], range(12), "x")
    rows = range(12), range(12, 16)
    return ImageToImageTask(
        way, settings_of(**changes), config.Variants(flip=False), pairs, *rows, "x", fabric, **(more or {})
    )


# ------------------------------------------------------------------------------------------------------- patches


def test_a_patch_has_the_coordinates_of_the_same_voxels_in_the_whole() -> None:
    for shape, corners in (((8, 6), [[0, 0], [3, 2], [4, 3]]), ((4, 5, 6), [[2, 1, 0], [0, 3, 3]])):
        model = ImageToImage(config.ImageToImage(block=1, channels=[8]), shape, 1, 1)
        cut = tuple(n // 2 for n in shape)
        found = part(model.place, torch.tensor(corners), cut)
        assert found.shape == (len(corners), len(shape), *cut)
        for corner, one in zip(corners, found, strict=True):
            where = (slice(None), *(slice(a, a + n) for a, n in zip(corner, cut, strict=True)))
            assert torch.equal(one, model.place[0][where])
    assert part(model.place, None, cut) is model.place


def test_a_patch_is_predicted_as_within_the_whole() -> None:
    """But for what the network does not see beyond its edges."""
    torch.manual_seed(0)
    model = ImageToImage(config.ImageToImage(block=2, channels=[8], num_res_blocks=1), (40, 40), 1, 1)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model.offset.copy_(torch.randn_like(model.offset))
    sources, x, level = torch.rand(2, 1, 40, 40), torch.randn(2, 4, 20, 20), torch.tensor([300.0, 700.0])
    corners, size, reach = np.array([[2, 5], [6, 1]]), 12, model.network.reach
    cut = torch.from_numpy(cropped(sources.numpy(), 2 * corners, (2 * size, 2 * size)))
    state = torch.from_numpy(cropped(x.numpy(), corners, (size, size)))
    inner = (slice(None), slice(reach, size - reach), slice(reach, size - reach))
    with torch.no_grad():
        pairs = [
            (model(model.told(sources), x, level), model(model.told(cut), state, level, torch.from_numpy(corners))),
            (model.in_blocks(model.guess(sources)), model.in_blocks(model.guess(cut, torch.from_numpy(corners)))),
        ]
    for whole, patch in pairs:
        for i, corner in enumerate(corners):
            there = (slice(None), *(slice(a + reach, a + size - reach) for a in corner))
            torch.testing.assert_close(patch[i][inner], whole[i][there], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(patch[0][inner], patch[1][inner])


def test_batches_are_patches_at_places_all_over_and_held_out_scans_are_whole(shards: Shards, fabric: Any) -> None:
    made = task("diffusion", shards, fabric, patch=[8, 6])
    rng, seen = np.random.default_rng(0), set()
    for _ in range(40):
        sources, targets, noise, _, _, corners = made._batch(np.arange(8), rng, varied=True)
        assert sources.shape == targets.shape == (8, 1, 8, 6) and noise.shape == (8, 4, 4, 3)
        seen |= {tuple(corner) for corner in corners.tolist()}
        # What is marked is bright: source and target are cut at the same place
        assert (sources[targets > 0] > 0.7).all()
    assert seen == {(a, b) for a in range(5) for b in range(4)}
    assert [one.shape[1:] for one in made._batch(np.arange(8), rng, varied=False)[:2]] == [SHAPE, SHAPE]


@pytest.mark.parametrize("patch", [None, [8, 6]])
def test_place_tells_what_intensities_cannot(
    patch: list[int] | None, shards: Shards, fabric: Any, tmp_path: Path
) -> None:
    found = {}
    for coordinates in (True, False):
        made = task(
            "regression",
            shards,
            fabric,
            patch=patch,
            coordinates=coordinates,
            optimiser={"steps": 150, "batch_size": 8},
        )
        fit(made, made.settings.optimiser, fabric, tmp_path / str(coordinates), "x")
        with torch.no_grad():
            model: Any = made.modules["average"]
            guess = model.guess(torch.from_numpy(made.pairs.sources(range(12, 16))))
        truth, bright = made.pairs.truths(range(12, 16)), made.pairs.sources(range(12, 16)) > 0.5
        marked = made.pairs.decoded(guess.numpy()) > 0
        found[coordinates] = [(marked == (truth > 0))[bright & upper].mean() for upper in (truth > 0, truth == 0)]
    assert min(found[True]) > 0.9
    if patch:  # whole, a network sees the image's edge, which tells it something, too
        assert min(found[False]) < 0.5


def test_without_coordinates_the_mean_tells_no_place_either(shards: Shards, fabric: Any) -> None:
    told, untold = (task("diffusion", shards, fabric, coordinates=given).model for given in (True, False))
    assert told.offset.std((2, 3)).max() > 0.1 and untold.offset.std((2, 3)).max() < 1e-5
    torch.testing.assert_close(told.offset.mean((2, 3)), untold.offset.mean((2, 3)))
    assert untold.place.abs().max() == 0 < told.place.abs().max()


def test_whole_scans_are_validated_in_the_memory_of_patches(shards: Shards, fabric: Any) -> None:
    made, seen = task("diffusion", shards, fabric, patch=[8, 6]), []
    made.modules["average"].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    made.validate()
    assert seen == [2, 2]  # a batch is eight quarters of a scan


def test_a_patch_keeps_its_share_of_the_memory(shards: Shards, fabric: Any) -> None:
    whole, patch = (task("diffusion", shards, fabric, patch=cut).kept() for cut in (None, [8, 6]))
    # The vector of the noise level (a few hundred numbers) is as long for both
    assert 0.25 <= patch / whole < 0.3


def test_what_is_kept_is_counted_once() -> None:
    layer, x = torch.nn.Linear(10, 5, bias=False), torch.ones(7, 10)
    assert kept_for_gradients(lambda: layer(x).sum()) == x.nbytes
    # Of two squares of one tensor it is kept once; the product keeps both of its factors
    y = torch.ones(7, 10, requires_grad=True)
    assert kept_for_gradients(lambda: (y.square() * y.square()).sum()) == 3 * y.nbytes
    # A convolution keeps its input and its weights, also where oneDNN lays them out in its own way
    fold, image = torch.nn.Conv2d(1, 1, 3, bias=False), torch.ones(1, 1, 8, 8)
    kept = kept_for_gradients(lambda: fold(image.to_mkldnn()).to_dense().sum())
    assert kept >= image.nbytes + fold.weight.nbytes == kept_for_gradients(lambda: fold(image).sum())


def test_whole_scans_at_the_cost_of_patches() -> None:
    section = config.SegmentationEnsemble(target=["m"], patch=[8, 8, 8], optimiser={"steps": 100})
    whole = section.compared("whole", (16, 16, 16))
    assert (whole.patch, whole.optimiser.steps, whole.optimiser.batch_size) == (None, 13, 16)
    unplaced = section.compared("unplaced", (16, 16, 16))
    assert unplaced.model_copy(update={"coordinates": True}) == section and not unplaced.coordinates


# ---------------------------------------------------------------------------------------------------- few labels


def test_few_labelled_subjects_are_part_of_more() -> None:
    names = [f"s{i}" for i in range(30)]
    five, ten, twenty, everyone = (labelled_subjects(names, n, "x", "k") for n in (5, 10, 20, None))
    assert set(five) < set(ten) < set(twenty) < set(everyone) == set(names) and len(set(five)) == 5
    assert five == labelled_subjects([*reversed(names), *names], 5, "x", "k")  # whatever the order of scans
    assert five != labelled_subjects(names, 5, "y", "k")
    with pytest.raises(UserError, match=r"segmentation_ensemble.labelled: 31 of 30 training subjects. Take fewer"):
        labelled_subjects(names, 31, "x", "segmentation_ensemble.labelled")


@pytest.mark.parametrize("network", ["resnet", "unet"])
def test_pretrained_weights_are_taken_over_but_for_the_last_layer(
    network: str, shards: Shards, fabric: Any, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"network": network, "channels": [32] if network == "unet" else [16]}
    settings, rows = settings_of(**changes), (np.arange(12), np.arange(12, 16))
    pairs = Pairs.of(shards, ["image"], ["mask"], range(12), "x")
    pretraining = Network("pretraining", "diffusion", pairs.of_sources(), tmp_path / "base")
    train([pretraining], settings, config.Variants(), config.Compute(), rows, "x/s", fabric, tmp_path / "state")
    base, card = load_image_to_image(tmp_path / "base", "model.safetensors", "card.json")
    assert (card["source"], card["target"], card["marks"]) == ([], ["image"], 0)
    more = {"labelled": np.array([3, 5])}
    pretrained = task("regression", shards, fabric, more | {"base": base}, **changes).modules
    scratch = task("regression", shards, fabric, more, **changes).modules
    given, head = base.state_dict(), ("network.last", "network.out.2")
    for modules in (pretrained["model"], pretrained["average"]):
        for name, value in modules.state_dict().items():
            assert name.startswith(head) or torch.equal(value, given[name]), name
    # From scratch all but the standardisation, which is measured on all scans, differs; shapes do not
    apart = [
        name
        for name, value in scratch["model"].state_dict().items()
        if not name.startswith(head) and value.ndim > 1 and not torch.equal(value, given[name])
    ]
    assert any("first" in name or "conv_in" in name for name in apart)
    assert torch.equal(scratch["model"].state_dict()["offset"], given["offset"])
    assert [v.shape for v in scratch["model"].parameters()] == [v.shape for v in pretrained["model"].parameters()]


def test_features_of_a_pretrained_network_are_those_of_its_denoiser(shards: Shards, fabric: Any) -> None:
    """Asked for marks it sees the clean scan as its denoiser sees one with hardly any noise."""
    pairs = Pairs.of(shards, ["image"], ["mask"], range(12), "x")
    drawn = ImageToImageTask(
        *("diffusion", settings_of(), config.Variants(), pairs.of_sources(), range(12), range(12, 16), "x", fabric)
    ).model
    marking = task("regression", shards, fabric, {"labelled": np.arange(3), "base": drawn}).model
    seen: list[torch.Tensor] = []
    for model in (drawn, marking):
        model.network.last.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    image = torch.from_numpy(pairs.sources([0]))
    with torch.no_grad():
        clean = drawn.standardisation(drawn.in_blocks(image * 2 - 1))
        levels = drawn.levels
        level = torch.tensor([float(drawn.process.timesteps_at(np.array(levels.mean - 2 * levels.deviation)))])
        drawn(drawn.told(image[:, :0]), clean, level)
        marking.guess(image)
    torch.testing.assert_close(*seen)


def test_only_labelled_scans_are_looked_at(shards: Shards, fabric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = task("regression", shards, fabric, {"labelled": np.array([3, 5])})
    asked: set[int] = set()
    truths = Pairs.truths
    monkeypatch.setattr(Pairs, "truths", lambda self, rows: asked.update(map(int, rows)) or truths(self, rows))
    for step in range(4):
        made.train_step(step)
    assert asked == {3, 5}


def test_a_base_of_another_network_is_refused(shards: Shards, fabric: Any) -> None:
    other = ImageToImage(settings_of(channels=[8]), SHAPE[1:], 0, 1)
    with pytest.raises(UserError, match="segmentation_ensemble: the weights to start from are of another network"):
        task("regression", shards, fabric, {"labelled": np.arange(3), "base": other})
