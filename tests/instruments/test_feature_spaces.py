"""Feature spaces: texture against scikit-image and against the definition, networks from files, bounded memory."""

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from monai.networks.nets import resnet10
from safetensors.torch import save_file
from skimage.feature import graycomatrix, graycoprops

from meddiff_steps.config import FeatureNetwork
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import philox
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.instruments.embedder import Embedder
from meddiff_steps.instruments.feature_spaces import base, own_network, radiomics
from meddiff_steps.instruments.feature_spaces import random as random_weights
from meddiff_steps.instruments.feature_spaces.assemble import spaces
from meddiff_steps.instruments.feature_spaces.base import Context
from meddiff_steps.models.weights import save_model


def test_texture_agrees_with_scikit_image_in_2d() -> None:
    levels = philox("test", "glcm").integers(0, 6, size=(3, 13, 9))
    levels[2, :, 4:] = 5
    ours = radiomics.cooccurrence(levels, np.ones(levels.shape, bool), 6)
    for image, matrix, row in zip(levels, ours, radiomics.texture(ours), strict=True):
        counts = graycomatrix(
            image.astype(np.uint8), [1], [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4], levels=6, symmetric=True
        ).sum((2, 3))
        np.testing.assert_allclose(matrix, counts / counts.sum(), atol=1e-14)
        together = (counts / counts.sum())[:, :, None, None]
        expected = [
            graycoprops(together, name)[0, 0]
            for name in ("contrast", "dissimilarity", "homogeneity", "energy", "correlation", "entropy")
        ]
        np.testing.assert_allclose(row, expected, atol=1e-10)


def test_masked_3d_cooccurrence_follows_the_definition() -> None:
    rng = philox("test", "glcm 3D")
    levels, mask = rng.integers(0, 4, size=(2, 4, 3, 5)), rng.random((2, 4, 3, 5)) < 0.7
    ours = radiomics.cooccurrence(levels, mask, 4)
    for image, inside, matrix in zip(levels, mask, ours, strict=True):
        counts = np.zeros((4, 4))
        for here in itertools.product(*map(range, image.shape)):
            for there in itertools.product(
                *(range(max(0, h - 1), min(n, h + 2)) for h, n in zip(here, image.shape, strict=True))
            ):
                if here != there and inside[here] and inside[there]:
                    counts[image[here], image[there]] += 1
        np.testing.assert_allclose(matrix, counts / counts.sum(), atol=1e-14)


def test_images_without_foreground_have_finite_features() -> None:
    images = torch.zeros(2, 1, 8, 8)
    images[1] = 0.5
    found = radiomics.radiomic_features(images)
    assert found.shape == (2, 49)
    assert torch.isfinite(found).all()
    assert found[1, 0] == 1.0  # all of it is foreground
    assert found[1, 1] == pytest.approx(0.5)


def test_soft_histograms_are_regional_shares() -> None:
    images = torch.zeros(1, 1, 4, 4)
    images[:, :, :2, :2] = 1.0
    shares = radiomics.soft_histograms(images).reshape(radiomics.HISTOGRAM_LEVELS, 2, 2)
    torch.testing.assert_close(shares.sum(0), torch.ones(2, 2))
    assert shares[-1].tolist() == [[1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(("dims", "width"), [(2, 49), (3, 81)])
def test_built_in_spaces_are_the_same_every_time(dims: int, width: int) -> None:
    images = torch.from_numpy(philox("test", "images").random((3, 1, *(12, 8, 10)[:dims]), dtype=np.float32))
    for build, size in ((random_weights.build, 112), (radiomics.build, width)):
        first, second = build(Context(dims)), build(Context(dims))
        assert first.digest == second.digest
        assert first.extract(images).shape == (3, size)
        torch.testing.assert_close(first.extract(images), second.extract(images), rtol=0, atol=0)
        torch.testing.assert_close(
            first.extract(images)[1:2], first.extract(images[1:2]), rtol=1e-4, atol=1e-5
        )  # batches do not matter


def test_random_weights_have_a_known_digest() -> None:
    """What metrics.json names must not change unnoticed: figures of different digests cannot be compared."""
    assert tuple(random_weights.build(Context(dims)).digest for dims in (2, 3)) == DIGESTS


DIGESTS = ("88d44bafd19f557f", "21ac298b45bacd3f")


def write_images(path: Path, count: int, shape: tuple[int, ...]) -> Shards:
    rng = philox("test", "shard")
    with ShardWriter(path, {"sample_id": pa.string(), "image": TensorColumn("float16", (1, *shape))}) as shard:
        for i in range(count):
            shard.append(sample_id=f"{i}", image=rng.random((1, *shape)))
    return Shards([path])


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BATCH_VALUES", 16 * 16 * 16)
    largest = []

    def counted(images: torch.Tensor) -> torch.Tensor:
        largest.append(len(images))
        return radiomics.soft_histograms(images)

    space = base.FeatureSpace("counted", "0", "", counted)
    peaks = []
    for count in (100, 1000):
        shards = write_images(tmp_path / f"{count}.arrow", count, (16, 16))
        base.extract([space], shards, np.arange(32))  # views into the memory map are made once
        tracemalloc.start()
        found = base.extract([space], shards, np.arange(count))["counted"]
        peaks.append(tracemalloc.get_traced_memory()[1] - found.nbytes)
        tracemalloc.stop()
        assert len(found) == count
    assert max(largest) == 16
    assert peaks[1] < peaks[0] + 100_000  # 900 more images are 920 kB


def test_images_may_be_changed_before_they_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_images(tmp_path / "images.arrow", 5, (8, 8))
    space = base.FeatureSpace("mean", "0", "", lambda images: images.flatten(1).mean(1, keepdim=True))
    plain = base.extract([space], shards, [4, 1, 2])["mean"]
    monkeypatch.setattr(base, "BATCH_VALUES", 2 * 8 * 8)
    changed = base.extract(
        [space], shards, [4, 1, 2], change=lambda images, rows: images + rows[:, None, None, None].astype(np.float32)
    )["mean"]
    np.testing.assert_allclose(changed - plain, [[4], [1], [2]], rtol=1e-5)


def network(**changes: object) -> FeatureNetwork:
    return FeatureNetwork.model_validate({"name": "mine", "weights": "nowhere.pt"} | changes)


def test_torchscript_from_a_path(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    path = tmp_path / "net.pt"
    torch.jit.trace(net, torch.zeros(1, 3, 8, 8)).save(str(path))
    space = own_network.network_space(network(weights=str(path), channels=3, zscore=True), 2)
    shards = write_images(tmp_path / "images.arrow", 5, (8, 8))
    found = base.extract([space], shards, range(5))["mine"]
    images = torch.from_numpy(shards.tensors("image"))
    scaled = torch.stack([(image - image.mean()) / image.std(correction=0) for image in images])
    torch.testing.assert_close(
        torch.from_numpy(found), net(scaled.repeat(1, 3, 1, 1)).mean((2, 3)), rtol=1e-4, atol=1e-5
    )
    other = own_network.network_space(network(weights=str(path), channels=3), 2)
    assert space.digest != other.digest
    with pytest.raises(UserError, match="does not take images"):
        base.extract([own_network.network_space(network(weights=str(path)), 2)], shards, range(5))


def test_resnet_from_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = resnet10(spatial_dims=3, n_input_channels=1, num_classes=2, shortcut_type="B").eval()
    path = tmp_path / "resnet.safetensors"
    save_file({f"module.{name}": value for name, value in net.state_dict().items()}, path)
    space = own_network.network_space(network(weights=str(path), architecture="resnet10"), 3)
    images = torch.rand(2, 1, 16, 16, 16)
    net.fc = torch.nn.Identity()
    torch.testing.assert_close(space.extract(images), net(images))
    with pytest.raises(UserError, match="does not hold a 3D resnet18"):
        own_network.network_space(network(weights=str(path), architecture="resnet18"), 3)


def test_unusable_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file nowhere.pt.*Nothing is downloaded"):
        own_network.network_space(network(), 2)
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"not a network")
    with pytest.raises(UserError, match="no TorchScript"):
        own_network.network_space(network(weights=str(junk)), 2)
    with pytest.raises(UserError, match="safetensors"):
        own_network.network_space(network(weights=str(junk), architecture="resnet10"), 2)
    shards = write_images(tmp_path / "images.arrow", 3, (8, 8))
    flat = base.FeatureSpace("flat", "0", "", lambda images: images.mean((1, 2, 3)))
    with pytest.raises(UserError, match=r"gave shape \(3,\) for 3 images"):
        base.extract([flat], shards, range(3))
    broken = base.FeatureSpace("broken", "0", "", lambda images: images.flatten(1) / 0)
    with pytest.raises(UserError, match="not finite"):
        base.extract([broken], shards, range(3))


def with_embedder(folder: Path, shape: tuple[int, ...]) -> Context:
    torch.manual_seed(0)
    save_model(Embedder(shape), folder / "embedder", {"image_shape": [1, *shape]})
    return Context(len(shape), folder / "embedder")


def test_chosen_spaces_are_those_of_all_of_them(tmp_path: Path) -> None:
    context, images = with_embedder(tmp_path, (12, 8, 10)), torch.rand(3, 1, 12, 8, 10)
    every = {space.name: space for space in spaces(None, context)}
    assert list(every) == ["random", "radiomics", "embedder", "structure"]
    some = spaces(["embedder", "random"], context)
    assert [space.name for space in some] == ["random", "embedder"]
    for space in some:
        assert (space.digest, space.description) == (every[space.name].digest, every[space.name].description)
        with torch.inference_mode():
            assert torch.equal(space.extract(images), every[space.name].extract(images))


def test_a_space_that_is_not_chosen_loads_nothing_and_one_that_cannot_be_built_is_refused(tmp_path: Path) -> None:
    nowhere = Context(2, tmp_path / "nowhere")
    assert [space.name for space in spaces(["radiomics"], nowhere)] == ["radiomics"]
    assert [space.name for space in spaces(None, Context(2))] == ["random", "radiomics", "structure"]
    with pytest.raises(UserError, match=r"evaluate.spaces: embedder needs the study's instruments/embedder"):
        spaces(["random", "embedder"], Context(2))
    with pytest.raises(UserError, match=r"evaluate.spaces: there is no fid"):
        spaces(["fid"], Context(2))
    assert spaces(None, Context(1)) == []  # none is of one dimension


def test_own_networks_come_last_whatever_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.trace(torch.nn.Conv2d(1, 4, 3).eval(), torch.zeros(1, 1, 8, 8)).save(str(path))
    found = spaces(["random"], Context(2), [network(weights=str(path))])
    assert [space.name for space in found] == ["random", "mine"]
