"""Copies hidden among candidates, changed in ways that the embedder was not trained for."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.stats import binom

from meddiff_steps import config
from meddiff_steps.core.registries import DETECTORS
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.instruments.embedder import train_embedder
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.latent_statistics import Standardisation
from meddiff_steps.privacy.calibration import calibrate
from meddiff_steps.privacy.detectors.base import Context, TrainingImages, references, score
from meddiff_steps.privacy.reference import any_flag, make_detectors
from meddiff_steps.simulation.brains import load_template, make_lattice, simulate_subject

SHAPE, SPACING = (24, 32, 24), 7.0
TRAIN, CALIBRATION, STRANGERS, COPIES, SYNTHETIC = 240, 120, 40, 40, 120
LEVEL = 0.05


def blurred(image, rng):
    return gaussian_filter(image, rng.uniform(0.5, 0.8))


def warped(image, rng):
    shift = np.stack([gaussian_filter(rng.normal(size=image.shape), 4) for _ in range(3)])
    return map_coordinates(image, np.indices(image.shape) + 0.7 * shift / np.abs(shift).max(), order=1)


def posterised(image, rng):
    levels = rng.integers(8, 16)
    return np.round(image * levels) / levels


def ringing(image, rng):
    """The outer part of k-space is lost."""
    distance = np.sqrt(
        sum(
            (axis / axis.max()) ** 2
            for axis in np.meshgrid(*[np.abs(np.fft.fftfreq(n)) for n in image.shape], indexing="ij")
        )
    )
    return np.fft.ifftn(np.fft.fftn(image) * (distance < rng.uniform(0.7, 0.9))).real


def mirrored_with_other_contrast(image, rng):
    flipped = image[::-1]
    return flipped * (0.5 + flipped / (flipped + rng.uniform(0.4, 0.8)))


PERTURBATIONS = [blurred, warped, posterised, ringing, mirrored_with_other_contrast]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Flags of the 200 candidates, and what each is."""
    source = config.SimulatedSource(source="simulated", subjects=TRAIN, shape=SHAPE, spacing_mm=SPACING)
    lattice = make_lattice(SHAPE, SPACING)
    template = load_template(lattice.blur_mm)
    images = (
        np.stack(
            [
                simulate_subject(source, "planted", i, lattice, template).images["T1w"]
                for i in range(TRAIN + CALIBRATION + STRANGERS)
            ]
        )
        / 255.0
    )
    images = np.clip(images / np.quantile(images, 0.995, axis=(1, 2, 3), keepdims=True), 0, 1).astype(np.float32)[
        :, None
    ]
    train, calibration, strangers = np.split(images, [TRAIN, TRAIN + CALIBRATION])
    path = tmp_path_factory.mktemp("planted") / "shard.arrow"
    with ShardWriter(path, {"scan_id": pa.string(), "image": TensorColumn("float16", (1, *SHAPE))}) as shard:
        for number, image in enumerate(train):
            shard.append(scan_id=str(number), image=image)
    training = TrainingImages(Shards([path]), np.arange(TRAIN))

    embedder, _ = train_embedder(
        config.Embedder(
            optimiser=config.EmbedderOptimiser(steps=100, batch_size=48, learning_rate=1e-3, warmup_steps=10)
        ),
        training.shards,
        training.rows,
        None,
        "planted",
    )
    torch.manual_seed(0)
    autoencoder = build_first_stage(config.Autoencoder(channels=[8, 16], latent_channels=8), 3).eval()
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(batch).mode() for batch in training.batches()])
    mean = train.mean(0)
    context = Context(
        mean,
        training,
        embedder=lambda: embedder,
        first_stage=lambda: autoencoder,
        standardisation=lambda: Standardisation(latents.mean(0, keepdim=True), latents.std()),
        directions={},
    )
    vectors = {detector.name: references(detector, training) for detector in make_detectors(context)}
    detectors = make_detectors(replace(context, directions=vectors))
    assert [detector.name for detector in detectors] == list(DETECTORS.names())
    thresholds = calibrate(score(detectors, torch.from_numpy(calibration))[0], np.zeros(CALIBRATION), LEVEL)
    assert thresholds is not None

    rng = np.random.default_rng(7)
    originals = rng.permutation(TRAIN)[:COPIES]
    copies = np.stack([PERTURBATIONS[i % len(PERTURBATIONS)](train[row, 0], rng) for i, row in enumerate(originals)])[
        :, None
    ]
    # Synthetic images that copy nobody: draws from the Gaussian of the training images, with the noise of a scan.
    _, deviations, axes = np.linalg.svd((train - mean).reshape(TRAIN, -1), full_matrices=False)
    weights = rng.normal(size=(SYNTHETIC, TRAIN)) * deviations / np.sqrt(TRAIN)
    synthetic = mean + (weights @ axes).reshape(-1, 1, *SHAPE)
    candidates = np.clip(np.concatenate([copies, strangers, synthetic]), 0, 1).astype(np.float32)
    kind = np.repeat(["copy", "stranger", "synthetic"], [COPIES, STRANGERS, SYNTHETIC])
    order = rng.permutation(len(candidates))
    scores, nearest = score(detectors, torch.from_numpy(candidates[order]))
    flags = any_flag(thresholds.flags(scores, np.zeros(len(candidates))))
    back = np.argsort(order)
    return kind, flags[back], {name: index[back] for name, index in nearest.items()}, originals


def test_the_set_has_200_candidates(planted):
    kind, flags, _, _ = planted
    assert len(kind) == len(flags) == 200
    assert (kind == "copy").sum() == (kind == "stranger").sum() == 40


def test_copies_are_found(planted):
    kind, flags, _, _ = planted
    assert flags[kind == "copy"].mean() >= 0.95


def test_the_copied_subject_is_named(planted):
    kind, _, nearest, originals = planted
    assert (nearest["aligned"][kind == "copy"] == originals).mean() >= 0.95


def test_strangers_are_flagged_no_oftener_than_the_level_says(planted):
    kind, flags, _, _ = planted
    low, high = binom.interval(0.99, STRANGERS, LEVEL)
    assert low <= flags[kind == "stranger"].sum() <= high


def test_synthetic_images_that_copy_nobody_mostly_pass(planted):
    """They are mixtures of all training images, and so nearer to them than a stranger is."""
    kind, flags, _, _ = planted
    assert flags[kind == "synthetic"].mean() < 0.4
