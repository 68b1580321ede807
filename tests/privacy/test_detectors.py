import numpy as np
import pyarrow as pa
import pytest
import torch
from monai.metrics.regression import compute_ssim_and_cs
from scipy.ndimage import gaussian_filter

from meddiff_steps import config
from meddiff_steps.imaging import perturbations
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.instruments.embedder import Embedder, train_embedder
from meddiff_steps.privacy import size
from meddiff_steps.privacy.detectors.aligned import Aligned, extent, ssim_map
from meddiff_steps.privacy.detectors.base import TrainingImages, directions, references
from meddiff_steps.privacy.detectors.embedding import Embedding

SHAPE = (1, 16, 18, 14)


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> TrainingImages:
    """Smooth blobs inside a common outline: strangers are alike, as brains are."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("scans") / "shard.arrow"
    outline = np.zeros(SHAPE[1:])
    outline[2:-2, 2:-2, 2:-2] = 0.6
    outline = gaussian_filter(outline, 1)
    with ShardWriter(path, {"scan_id": pa.string(), "image": TensorColumn("float16", SHAPE)}) as shard:
        for i in range(80):
            texture = gaussian_filter(rng.normal(size=SHAPE[1:]), 1.2)
            shard.append(scan_id=str(i), image=np.clip(outline * (1 + 0.35 * texture / texture.std()), 0, 1)[None])
    return TrainingImages(Shards([path]), np.arange(60))


@pytest.mark.parametrize("shape", [(2, 1, 12, 13, 14), (2, 1, 20, 17)])
def test_the_ssim_is_that_of_monai(shape):
    a, b = torch.rand(2, *shape)
    dims = len(shape) - 2
    expected, _ = compute_ssim_and_cs(a, b, dims, [7] * dims, [1.5] * dims, kernel_type="uniform")
    assert torch.allclose(ssim_map(a, b, 7), expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 160, 160, 8), (1, 512, 8)])
def test_images_much_longer_than_wide_can_be_reduced(shape):
    assert Aligned(np.full(shape, 0.5, np.float32), None).vectors(torch.rand(2, *shape)).shape[1] > 0


def test_structures_thinner_than_a_coarse_cell_are_seen():
    mean = np.zeros((1, 64, 64), np.float32)
    mean[0, ::4] = 0.8
    assert Aligned(mean, None).vectors(torch.rand(3, 1, 64, 64) * torch.from_numpy(mean)).shape[1] > 0


def strangers_and_copies(detector, scans, others=range(60, 80)):
    strangers = torch.from_numpy(scans.shards.tensors("image", np.array(others)))
    originals = torch.from_numpy(scans[np.arange(12)])
    highest = detector.similarity(strangers)[0].max()
    copies = perturbations.perturbed_copies(originals, np.random.default_rng(0))
    return highest, {kind: detector.similarity(images) for kind, images in copies.items()}


def test_the_aligned_detector_finds_copies_and_whose_they_are(scans):
    detector = Aligned(scans[np.arange(60)].mean(0), scans)
    detector.references = references(detector, scans)
    highest, copies = strangers_and_copies(detector, scans)
    for kind in ("mirrored", "noised", "recontrasted", "cropped"):
        assert (copies[kind][0] > highest).all(), kind
        assert copies[kind][1].tolist() == list(range(12))


@pytest.mark.parametrize("shift", [(1, 0, -1), (-1, 1, 1), (2, 2, 2), (-2, 0, 2), (2, -3, 0)])
def test_the_aligned_detector_finds_copies_that_were_shifted(scans, shift):
    detector = Aligned(scans[np.arange(60)].mean(0), scans)
    detector.references = references(detector, scans)
    highest = detector.similarity(torch.from_numpy(scans.shards.tensors("image", np.arange(60, 80))))[0].max()
    shifted = np.stack([perturbations.moved(scan[0], shift)[None] for scan in scans[np.arange(12)]])
    for copies in (torch.from_numpy(shifted), perturbations.flip(torch.from_numpy(shifted))):
        similarity, index = detector.similarity(copies)
        assert (similarity > highest).all() and index.tolist() == list(range(12))


def test_directions_of_mirror_images_are_those_of_flipped_ones(scans):
    detector = Aligned(scans[np.arange(60)].mean(0), scans)
    found = directions([detector], scans.shards, np.arange(5), mirrored=True)["aligned"]
    flipped = perturbations.flip(torch.from_numpy(scans[np.arange(5)]))
    np.testing.assert_array_equal(found, detector.vectors(flipped))


def test_the_extent_is_the_bounding_box_of_what_is_not_zero():
    image = torch.zeros(2, 1, 6, 7)
    image[0, 0, 1, 2] = image[0, 0, 3, 5] = 0.5
    inside = extent(image)
    assert inside[0, 0].nonzero().tolist() == [[i, j] for i in (1, 2, 3) for j in (2, 3, 4, 5)]
    assert inside[1].sum() == 0


def test_copies_of_pictures_that_fill_the_frame_are_found_when_their_borders_are_cut_off(tmp_path):
    rng = np.random.default_rng(0)
    # Like radiographs: mostly the same anatomy, with little that is a person's own.
    common = gaussian_filter(rng.normal(size=(48, 48)), 2) / 0.14
    pictures = [0.5 + 0.1 * common + 0.02 * gaussian_filter(rng.normal(size=(48, 48)), 1.5) / 0.19 for _ in range(60)]
    with ShardWriter(tmp_path / "x.arrow", {"image": TensorColumn("float16", (1, 48, 48))}) as shard:
        for picture in pictures:
            shard.append(image=np.clip(picture, 0.01, 1)[None])
    scans = TrainingImages(Shards([tmp_path / "x.arrow"]), np.arange(40))
    detector = Aligned(scans[np.arange(40)].mean(0), scans)
    detector.references = references(detector, scans)
    highest, copies = strangers_and_copies(detector, scans, range(40, 60))
    for kind in ("cropped", "moved"):
        assert (copies[kind][0] > highest).all(), kind
        assert copies[kind][1].tolist() == list(range(12))


@pytest.mark.parametrize(
    ("shape", "expected"), [((48, 64, 60), (2, 3, 2)), ((160, 224, 10), (6, 9, 1)), ((512, 40), (20, 2))]
)
def test_planted_copies_are_moved_along_every_axis_by_whole_voxels(shape, expected):
    image = torch.zeros(6, 1, *shape)
    middle = tuple(n // 2 for n in shape)
    image[(slice(None), 0, *middle)] = 1.0
    found = perturbations.perturbed_copies(image, np.random.default_rng(0))["moved"]
    steps = found.nonzero()[:, 2:] - torch.tensor(middle)
    assert (steps.abs() == torch.tensor(expected)).all() and len(steps.unique(dim=0)) > 1
    again = perturbations.perturbed_copies(image, np.random.default_rng(0))["moved"]
    assert torch.equal(found, again)


def test_the_learned_detector_finds_rotated_copies(scans):
    settings = config.Embedder(
        optimiser=config.EmbedderOptimiser(steps=120, batch_size=30, learning_rate=1e-3, warmup_steps=5)
    )
    embedder, losses = train_embedder(settings, scans.shards, scans.rows, None, "seed")
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    detector = Embedding("learned", embedder)
    detector.references = references(detector, scans)
    highest, copies = strangers_and_copies(detector, scans)
    for kind in ("rotated", "mirrored", "noised"):
        assert (copies[kind][0] > highest).mean() > 0.9, kind
        assert (copies[kind][1] == np.arange(12)).mean() > 0.9


@pytest.mark.parametrize(
    ("shape", "factors"),
    [((160, 224, 160), [7, 7, 7]), ((320, 320, 4), [10, 10, 4]), ((2, 200, 48), [2, 7, 7]), ((300, 3), [5, 3])],
)
def test_the_learned_detector_takes_grids_with_a_short_side(shape, factors):
    embedder = Embedder(shape)
    assert embedder.factors == factors
    assert embedder(torch.rand(2, 1, *shape)).shape == (2, 64)


def test_constant_images_are_similar_to_nobody(scans):
    detector = Embedding("plain", torch.nn.Flatten())
    detector.references = references(detector, scans)
    assert np.all(detector.similarity(torch.full((2, *SHAPE), 0.5))[0] == 0)


class Spy(torch.nn.Module):
    """An encoder that remembers how many images it saw together."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(len(images))
        return images[:, :, ::2]


def test_large_images_are_looked_at_few_at_a_time_with_the_same_result(scans, monkeypatch):
    images = torch.from_numpy(scans.shards.tensors("image", np.arange(60, 80)))
    found, seen = [], []
    for most in (size.BATCH_VALUES, 3 * images[0].numel(), 1):
        monkeypatch.setattr(size, "BATCH_VALUES", most)
        spy = Spy()
        detectors = [Aligned(scans.shards.tensors("image", scans.rows).mean(0), scans), Embedding("latent", spy)]
        for detector in detectors:
            detector.references = references(detector, scans)
        found.append([detector.similarity(images) for detector in detectors])
        seen.append(max(spy.seen))
    assert seen == [32, 3, 1]
    for other in found[1:]:
        for (similarity, index), (expected, of) in zip(other, found[0], strict=True):
            assert np.allclose(similarity, expected, atol=1e-6) and np.array_equal(index, of)


@pytest.mark.parametrize("dims", [2, 3])
def test_rotating_back_and_forth_gives_the_image_again(dims):
    block = np.zeros((1, 1, 24, 20, 28)[: dims + 2], np.float32)
    block[..., 9:15, 8:13] = 1.0
    image = torch.from_numpy(gaussian_filter(block, (0, 0, *[2] * dims)))
    none, zoom = torch.zeros(1, dims), torch.zeros(1)
    degrees = torch.zeros(1, 3 if dims == 3 else 1)
    degrees[0, 0] = 45.0
    there = perturbations.affine(image, degrees, none, zoom)
    back = perturbations.affine(there, -degrees, none, zoom)
    assert (back - image).abs().max() < 0.5 * (there - image).abs().max()  # interpolation smooths
    assert torch.allclose(perturbations.affine(image, 0 * degrees, none, zoom), image, atol=1e-4)


def test_rotations_are_of_lengths_not_of_voxels():
    """A bar along the second axis that turns into the third, whose voxels are four times as long."""
    thin = np.indices((9, 65, 17)).reshape(3, -1).T - [4, 32, 8]
    bar = (
        (np.abs(thin * [1, 1, 4] * [1 / 4, 1 / 28, 1 / 10]).max(axis=1) < 1).astype(np.float32).reshape(1, 1, 9, 65, 17)
    )
    degrees = torch.tensor([[10.0, 0, 0]])
    none, zoom = torch.zeros(1, 3), torch.zeros(1)
    angles = {}
    for name, spacing in (("lengths", (1.0, 1.0, 4.0)), ("voxels", None), ("alike", (3.0, 3.0, 3.0))):
        turned = perturbations.affine(torch.from_numpy(bar), degrees, none, zoom, spacing)[0, 0].numpy()
        spread = np.cov((thin * [1, 1, 4])[:, 1:].T, aweights=turned.ravel())
        along = np.linalg.eigh(spread)[1][:, -1]
        angles[name] = np.degrees(np.arctan(abs(along[1] / along[0])))
    assert angles["lengths"] == pytest.approx(10, abs=0.5)
    assert angles["voxels"] == angles["alike"] > 20


def test_a_mirror_image_is_mirrored_left_right():
    volume, picture = torch.zeros(1, 1, 4, 5, 6), torch.zeros(1, 1, 4, 5)
    volume[0, 0, 0, 2, 3] = picture[0, 0, 1, 0] = 1
    assert perturbations.flip(volume)[0, 0, 3, 2, 3] == 1
    assert perturbations.flip(picture)[0, 0, 1, 4] == 1
