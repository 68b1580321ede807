"""What the detectors leave undone: encoding twice, reading whole scans, loading the generator; results are the same."""

import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file
from test_bad_input import SHAPE, SPLITS, Cohort, strangers

from meddiff_steps.compute.device import full_float32
from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate, freeze
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.imaging.perturbations import flip, perturbed_copies
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.privacy import size, table_attacks
from meddiff_steps.privacy.calibration import thresholds_of
from meddiff_steps.privacy.detectors.aligned import Aligned
from meddiff_steps.privacy.detectors.base import TrainingImages, references, score
from meddiff_steps.privacy.detectors.embedding import Embedding
from meddiff_steps.privacy.duplicates import block_means, near_duplicates
from meddiff_steps.privacy.reference import ReferenceFiles, encodes_mirrors, load_detectors, write_scans
from meddiff_steps.privacy.search import nearest, unit_rows
from meddiff_steps.steps import calibrate, latents
from meddiff_steps.steps import filter as filter_step


class Encoded(Cohort):
    """A cohort of which the latents were kept, two variants of each scan."""

    def encode(self) -> Path:
        variants = self.study.variants.model_copy(update={"count": 2, "flip": True, "max_shift_voxels": 2})
        study = self.study.model_copy(update={"variants": variants})
        out = self.folder / "latents.arrow"
        latents.run(freeze(study, "latents", self.folder), self.images, self.folder / "autoencoder", out)
        return out

    def calibrate_with(self, kept: list[Path] | None, name: str, **files: Path) -> tuple[dict, dict[str, np.ndarray]]:
        f = self.folder
        calibrate.run(
            freeze(self.study, "calibrate", f),
            self.manifest,
            [self.images],
            **{"autoencoder": f / "autoencoder", "scale": f / "scale.safetensors", "embedder": f / "embedder"} | files,
            reference=f / f"{name}.safetensors",
            reference_scans=f / f"{name}.arrow",
            out=f / f"{name}.json",
            latents=kept,
        )
        return read_json(f / f"{name}.json"), load_file(f / f"{name}.safetensors")

    def detectors(self, name: str):
        f = self.folder
        files = ReferenceFiles(f / f"{name}.arrow", f / "autoencoder", f / "scale.safetensors", f / "embedder")
        card = read_json(f / f"{name}.json")
        return card, load_detectors(files, load_file(f / f"{name}.safetensors"), card["detectors"], card["mirrors"])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    made = Encoded(tmp_path_factory.mktemp("cohort"), strangers(len(SPLITS)), SPLITS)
    made.train_embedder()
    made.calibrate()  # writes the networks
    made.calibrate_with([made.encode()], "kept")
    return made


# ------------------------------------------------------------------------------------------------ latents


def test_directions_from_latents_are_those_of_encoding_again(cohort):
    """But for the half precision that latents are kept in; of scans as they are, not of their variants."""
    card, kept = read_json(cohort.folder / "kept.json"), load_file(cohort.folder / "kept.safetensors")
    again = cohort.calibrate_with(None, "again")
    assert kept["latent"].shape == again[1]["latent"].shape == (30, 4 * 4**3)
    assert (kept["latent"] * again[1]["latent"]).sum(1).min() > 1 - 1e-5
    assert not np.array_equal(kept["latent"], again[1]["latent"])  # they were read
    for name in ("mean", "rows", "aligned", "learned"):
        np.testing.assert_array_equal(kept[name], again[1][name])
    assert card["thresholds"] == pytest.approx(again[0]["thresholds"], abs=1e-3)


def test_training_scans_without_latents_are_refused(cohort):
    columns = {"scan_id": pa.string(), "variant": pa.int64(), "mean": TensorColumn("float16", (4, 4, 4, 4))}
    path = cohort.folder / "few.arrow"
    with ShardWriter(path, columns) as shard:
        for i in range(29):
            shard.append(scan_id=f"sub-{i:03d}", variant=0, mean=np.zeros((4, 4, 4, 4)))
        shard.append(scan_id="sub-029", variant=1, mean=np.zeros((4, 4, 4, 4)))
    with pytest.raises(UserError, match=r"few.arrow: no latents of sub-029, and of 1 training scan"):
        cohort.calibrate_with([path], "few")


# ------------------------------------------------------------------------------------------- mirror images


class Spy(torch.nn.Module):
    """An encoder that counts what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return images.flatten(1)


@pytest.mark.parametrize(("mirrors", "seen"), [(True, 10), (False, 5)])
def test_mirror_images_are_encoded_only_where_asked_for(mirrors, seen):
    images, spy = torch.from_numpy(strangers(5)), Spy()
    detector = Embedding("latent", spy, unit_rows(flip(images).flatten(1).numpy()), mirrors=mirrors)
    similarity, index = detector.similarity(images)
    assert spy.seen == seen
    assert (similarity.min() > 0.999 and index.tolist() == list(range(5))) == mirrors


def test_the_autoencoder_sees_mirror_images_of_mirrored_cohorts_or_where_nobody_else_does():
    assert encodes_mirrors(True, ["aligned", "learned", "latent"]) and encodes_mirrors(False, ["latent"])
    assert not encodes_mirrors(False, ["aligned", "latent"]) and not encodes_mirrors(False, ["latent", "learned"])


def test_a_mirrored_training_scan_is_found_though_it_is_not_encoded(cohort):
    card, detectors = cohort.detectors("kept")
    assert card["mirrors"] is False and card["controls"]["positive"]["mirrored"]["value"] == 1
    planted = flip(torch.from_numpy(Shards([cohort.images]).tensors("image", range(6))))
    similarity, index = score(detectors, planted)
    flags = thresholds_of(card).flags(similarity, np.array(["all"] * 6))
    assert flags["aligned"].all() and index["aligned"].tolist() == list(range(6))
    assert flags["latent"].mean() < 0.5


# ---------------------------------------------------------------------------------- what is compared in full


def test_small_scans_are_kept_as_they_are(cohort):
    kept, scans = Shards([cohort.folder / "kept.arrow"]), Shards([cohort.images])
    np.testing.assert_array_equal(kept.tensors("image"), scans.tensors("image", range(30)))


@pytest.mark.parametrize("shape", [(1, 40, 48, 36), (1, 70, 90)])
def test_copies_of_large_images_are_found_by_block_means(tmp_path, monkeypatch, shape):
    """And little more than these is kept and read."""
    monkeypatch.setattr(size, "COMPARED_VOXELS", 2**12)
    rng = np.random.default_rng(0)
    coarse = rng.random((40, *[-(-n // 6) for n in shape[1:]]))
    images = coarse
    for axis in range(1, len(shape)):
        images = images.repeat(6, axis)
    images = images[(slice(None), *(slice(n) for n in shape[1:]))][:, None].astype(np.float32)
    with ShardWriter(tmp_path / "all.arrow", {"image": TensorColumn("float16", shape)}) as shard:
        for image in images:
            shard.append(image=image)
    shards, rows = Shards([tmp_path / "all.arrow"]), np.arange(5, 30)
    mean = write_scans(shards, rows, tmp_path / "kept.arrow")
    assert mean.shape == shape
    np.testing.assert_allclose(mean, shards.tensors("image", rows).mean(0), atol=1e-5)
    kept = Shards([tmp_path / "kept.arrow"])
    assert len(kept) == 25 and np.prod(kept.shape("image")) <= 2**12 < np.prod(shape)
    training = TrainingImages(kept, np.arange(25))
    first = Aligned(mean, training)
    detector = Aligned(mean, training, references(first, TrainingImages(shards, rows)))
    unseen = np.array([0, 1, 2, 3, 4, *range(30, 40)])
    highest = detector.similarity(torch.from_numpy(shards.tensors("image", unseen)))[0].max()
    copies = perturbed_copies(torch.from_numpy(shards.tensors("image", rows[:8])), np.random.default_rng(1))
    for kind in ("mirrored", "noised", "recontrasted", "cropped", "moved"):
        similarity, index = detector.similarity(copies[kind])
        assert similarity.min() > highest and index.tolist() == list(range(8)), kind


# ------------------------------------------------------------------------------------------------ the filter


def run_filter(cohort: Encoded, name: str, folder: Path) -> tuple[Shards, pd.DataFrame]:
    """Five strangers are filtered by the calibration `name`; networks of the generator are nowhere."""
    plan = pd.DataFrame(
        {"sample_id": [f"s{i}" for i in range(5)], "group": "syn", "index": range(5), "attempt": 0, "shard": 0}
    )
    plan = plan.assign(noise_index=plan["index"], cohort_root="x/syn", age=50.0)
    plan["seed_key"] = [seed_key("x/syn", i, 0, "noise") for i in range(5)]
    plan.to_parquet(folder / "plan.parquet")
    with ShardWriter(
        folder / "made.arrow", {"sample_id": pa.string(), "image": TensorColumn("float16", SHAPE)}
    ) as shard:
        for i, image in enumerate(np.random.default_rng(9).random((5, *SHAPE))):
            shard.append(sample_id=f"s{i}", image=image)
    f = cohort.folder
    filter_step.run(
        freeze(cohort.study, "filter", folder),
        folder / "plan.parquet",
        0,
        folder / "made.arrow",
        autoencoder=f / "autoencoder",
        diffusion=folder / "nowhere",
        scale=f / "scale.safetensors",
        embedder=f / "embedder",
        reference=f / f"{name}.safetensors",
        reference_scans=f / f"{name}.arrow",
        calibration=folder / "calibration.json",
        out=folder / "kept.arrow",
        decisions=folder / "decisions.parquet",
    )
    return Shards([folder / "kept.arrow"]), pd.read_parquet(folder / "decisions.parquet")


def test_the_generator_is_loaded_only_to_draw_again(cohort, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(TrainedModel, "load", lambda *given, **more: loaded.append(given) or 1 / 0)
    card = read_json(cohort.folder / "kept.json")
    for limit in (2.0, -2.0):
        limits = card | {"thresholds": dict.fromkeys(card["detectors"], limit)}
        pd.Series(limits).to_json(tmp_path / "calibration.json")
        if limit < 0:
            with pytest.raises(ZeroDivisionError):
                run_filter(cohort, "kept", tmp_path)
            assert len(loaded) == 1
            continue
        kept, decisions = run_filter(cohort, "kept", tmp_path)
        assert not loaded and (decisions["decision"] == "accepted").all() and len(kept) == 5
        made = Shards([tmp_path / "made.arrow"]).tensors("image")
        np.testing.assert_array_equal(kept.tensors("image"), made)
        np.testing.assert_array_equal(kept.tensors("block_means"), block_means(made))


# ------------------------------------------------------------------------------------------------ duplicates


def test_duplicates_are_looked_for_without_reading_all_images(tmp_path, monkeypatch):
    images = strangers(12)
    images[7] = images[3] + 1e-3
    columns = {"sample_id": pa.string(), "image": TensorColumn("float32", SHAPE)}
    means = block_means(images)
    for name, more in (("plain", {}), ("kept", {"block_means": TensorColumn("float32", means.shape[1:])})):
        with ShardWriter(tmp_path / f"{name}.arrow", columns | more) as shard:
            for i, image in enumerate(images):
                shard.append(sample_id=f"s{i}", image=image, **({"block_means": means[i]} if more else {}))
    planned = pd.DataFrame({"sample_id": [f"s{i}" for i in range(12)], "cohort_root": "x", "noise_index": range(12)})
    assert near_duplicates(Shards([tmp_path / "plain.arrow"]), planned, 0.99) == ["s7"]
    read = []
    inner = Shards.tensor
    monkeypatch.setattr(
        Shards, "tensor", lambda self, column, row: read.append((column, row)) or inner(self, column, row)
    )
    assert near_duplicates(Shards([tmp_path / "kept.arrow"]), planned, 0.99) == ["s7"]
    assert {row for column, row in read if column == "image"} == {3, 7}


# ------------------------------------------------------------------------------------------------ the search


def test_a_search_is_the_same_wherever_references_are_kept():
    rng = np.random.default_rng(0)
    references, queries = (unit_rows(rng.normal(size=(n, 40))) for n in (9000, 700))
    found = [nearest(queries, kept, 3) for kept in (references, torch.from_numpy(references))]
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_full_float32_ends_with_its_block():
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32():
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_guesses_of_attributes_hold_a_block_of_distances_at_a_time(monkeypatch):
    """And are those of all distances at once (Gower 1971, written out)."""
    covariates = {
        "age": ContinuousCovariate(unit="year", range=(0, 120)),
        "sex": CategoricalCovariate(levels=["F", "M"]),
    }
    rng = np.random.default_rng(0)

    def people(count: int) -> pd.DataFrame:
        table = pd.DataFrame({"age": rng.integers(20, 80, count).astype(float), "sex": rng.choice(["F", "M"], count)})
        return table.mask(rng.random(table.shape) < 0.1)

    targets, donors = people(400), people(20_000)
    apart = np.zeros((400, 20_000))
    for name in covariates:
        a, b = (table[name].to_numpy()[where] for table, where in ((targets, np.s_[:, None]), (donors, np.s_[None])))
        if name == "sex":
            differ = (a != b).astype(float)
        else:
            differ = np.minimum(np.abs(a - b) / float(np.nanmax(b) - np.nanmin(b)), 1)
        apart += np.where(pd.isna(a) | pd.isna(b), pd.isna(a) != pd.isna(b), differ)
    monkeypatch.setattr(table_attacks, "BLOCK_DISTANCES", 2**16)
    tracemalloc.start()
    found = table_attacks._nearest_donors(targets, donors, covariates)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, apart.argmin(1))
    assert peak < apart.nbytes / 8
