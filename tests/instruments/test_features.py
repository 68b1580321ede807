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
from meddiff_steps.instruments import features


def test_texture_agrees_with_scikit_image_in_2d() -> None:
    levels = philox("test", "glcm").integers(0, 6, size=(3, 13, 9))
    levels[2, :, 4:] = 5
    ours = features.cooccurrence(levels, np.ones(levels.shape, bool), 6)
    for image, matrix, row in zip(levels, ours, features.texture(ours), strict=True):
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
    ours = features.cooccurrence(levels, mask, 4)
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
    found = features.radiomic_features(images)
    assert found.shape == (2, 49)
    assert torch.isfinite(found).all()
    assert found[1, 0] == 1.0  # all of it is foreground
    assert found[1, 1] == pytest.approx(0.5)


def test_soft_histograms_are_regional_shares() -> None:
    images = torch.zeros(1, 1, 4, 4)
    images[:, :, :2, :2] = 1.0
    shares = features.soft_histograms(images).reshape(features.HISTOGRAM_LEVELS, 2, 2)
    torch.testing.assert_close(shares.sum(0), torch.ones(2, 2))
    assert shares[-1].tolist() == [[1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(("dims", "width"), [(2, 49), (3, 81)])
def test_built_in_spaces_are_the_same_every_time(dims: int, width: int) -> None:
    images = torch.from_numpy(philox("test", "images").random((3, 1, *(12, 8, 10)[:dims]), dtype=np.float32))
    for make, size in ((lambda: features.random_space(dims), 112), (features.radiomic_space, width)):
        first, second = make(), make()
        assert first.digest == second.digest
        assert first.extract(images).shape == (3, size)
        torch.testing.assert_close(first.extract(images), second.extract(images), rtol=0, atol=0)
        torch.testing.assert_close(
            first.extract(images)[1:2], first.extract(images[1:2]), rtol=1e-4, atol=1e-5
        )  # batches do not matter


def test_random_weights_have_a_known_digest() -> None:
    """What metrics.json names must not change unnoticed: figures of different digests cannot be compared."""
    assert (features.random_space(2).digest, features.random_space(3).digest) == DIGESTS


DIGESTS = ("88d44bafd19f557f", "21ac298b45bacd3f")


def write_images(path: Path, count: int, shape: tuple[int, ...]) -> Shards:
    rng = philox("test", "shard")
    with ShardWriter(path, {"sample_id": pa.string(), "image": TensorColumn("float16", (1, *shape))}) as shard:
        for i in range(count):
            shard.append(sample_id=f"{i}", image=rng.random((1, *shape)))
    return Shards([path])


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BATCH_VALUES", 16 * 16 * 16)
    largest = []

    def counted(images: torch.Tensor) -> torch.Tensor:
        largest.append(len(images))
        return features.soft_histograms(images)

    space = features.FeatureSpace("counted", "0", "", counted)
    peaks = []
    for count in (100, 1000):
        shards = write_images(tmp_path / f"{count}.arrow", count, (16, 16))
        features.extract([space], shards, np.arange(32))  # views into the memory map are made once
        tracemalloc.start()
        found = features.extract([space], shards, np.arange(count))["counted"]
        peaks.append(tracemalloc.get_traced_memory()[1] - found.nbytes)
        tracemalloc.stop()
        assert len(found) == count
    assert max(largest) == 16
    assert peaks[1] < peaks[0] + 100_000  # 900 more images are 920 kB


def network(**changes: object) -> FeatureNetwork:
    return FeatureNetwork.model_validate({"name": "mine", "weights": "nowhere.pt"} | changes)


def test_torchscript_from_a_path(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    path = tmp_path / "net.pt"
    torch.jit.trace(net, torch.zeros(1, 3, 8, 8)).save(str(path))
    space = features.network_space(network(weights=str(path), channels=3, zscore=True), 2)
    shards = write_images(tmp_path / "images.arrow", 5, (8, 8))
    found = features.extract([space], shards, range(5))["mine"]
    images = torch.from_numpy(shards.tensors("image"))
    scaled = torch.stack([(image - image.mean()) / image.std(correction=0) for image in images])
    torch.testing.assert_close(
        torch.from_numpy(found), net(scaled.repeat(1, 3, 1, 1)).mean((2, 3)), rtol=1e-4, atol=1e-5
    )
    other = features.network_space(network(weights=str(path), channels=3), 2)
    assert space.digest != other.digest
    with pytest.raises(UserError, match="does not take images"):
        features.extract([features.network_space(network(weights=str(path)), 2)], shards, range(5))


def test_resnet_from_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = resnet10(spatial_dims=3, n_input_channels=1, num_classes=2, shortcut_type="B").eval()
    path = tmp_path / "resnet.safetensors"
    save_file({f"module.{name}": value for name, value in net.state_dict().items()}, path)
    space = features.network_space(network(weights=str(path), architecture="resnet10"), 3)
    images = torch.rand(2, 1, 16, 16, 16)
    net.fc = torch.nn.Identity()
    torch.testing.assert_close(space.extract(images), net(images))
    with pytest.raises(UserError, match="does not hold a 3D resnet18"):
        features.network_space(network(weights=str(path), architecture="resnet18"), 3)


def test_unusable_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file nowhere.pt.*Nothing is downloaded"):
        features.network_space(network(), 2)
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"not a network")
    with pytest.raises(UserError, match="no TorchScript"):
        features.network_space(network(weights=str(junk)), 2)
    with pytest.raises(UserError, match="safetensors"):
        features.network_space(network(weights=str(junk), architecture="resnet10"), 2)
    shards = write_images(tmp_path / "images.arrow", 3, (8, 8))
    flat = features.FeatureSpace("flat", "0", "", lambda images: images.mean((1, 2, 3)))
    with pytest.raises(UserError, match=r"gave shape \(3,\) for 3 images"):
        features.extract([flat], shards, range(3))
    broken = features.FeatureSpace("broken", "0", "", lambda images: images.flatten(1) / 0)
    with pytest.raises(UserError, match="not finite"):
        features.extract([broken], shards, range(3))
