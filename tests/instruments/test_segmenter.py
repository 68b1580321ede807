"""The segmenter: shares of voxels from label maps, training through its step, what it refuses."""

import copy
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from meddiff_steps.audit.measurements import DOUBT
from meddiff_steps.cohort.manifest import write_manifest
from meddiff_steps.config import Structure, Variants, freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.channels import filled_in
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.instruments.segmenter import Segmenter, label_shares, load_segmenter
from meddiff_steps.report.names import Names
from meddiff_steps.report.sections import _second_instrument
from meddiff_steps.steps import segmenter as step

SHAPE, SPACING = (16, 20, 16), 2.0
STRUCTURES = {"core": Structure(labels=[3, 7]), "whole": Structure(all_but=[1])}


def written(path: Path, labels: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(labels.astype(np.int16), affine).to_filename(path)
    return path


def random_labels(seed: int = 0) -> np.ndarray:
    """A label map of 24 x 28 x 24 voxels with two voxels of margin."""
    labels = np.zeros((24, 28, 24), dtype=int)
    labels[2:-2, 2:-2, 2:-2] = np.random.default_rng(seed).choice([0, 1, 3, 7, 9], size=(20, 24, 20))
    return labels


def test_shares_of_aligned_grids_are_block_means(tmp_path):
    labels = random_labels()
    path = written(tmp_path / "labels.nii.gz", labels, np.diag([2.0, 2.0, 2.0, 1.0]))
    grid = np.diag([4.0, 4.0, 4.0, 1.0])
    grid[:3, 3] = 1.0  # the centre of the first block of 2 x 2 x 2 voxels
    found = label_shares(path, STRUCTURES, grid, (12, 14, 12))
    for share, mask in zip(found, (np.isin(labels, [3, 7]), (labels > 0) & (labels != 1)), strict=True):
        np.testing.assert_allclose(share, mask.reshape(12, 2, 14, 2, 12, 2).mean(axis=(1, 3, 5)), atol=1e-6)


def test_what_lies_between_two_voxels_counts_half_for_each(tmp_path):
    labels = np.zeros((21, 21, 21), dtype=int)
    labels[7:14, 7:14, 7:14] = 3
    path = written(tmp_path / "l.nii.gz", labels, np.eye(4))
    grid = np.diag([2.0, 2.0, 2.0, 1.0])
    grid[:3, 3] = 1.0  # places of a voxel: half a voxel of the label map before and behind one's centre
    share = label_shares(path, {"core": STRUCTURES["core"]}, grid, (10, 10, 10))[0]
    middle = (np.indices(share.shape) * share).sum(axis=(1, 2, 3)) / share.sum() * 2 + 1
    assert middle == pytest.approx([10, 10, 10], abs=1e-4)


def test_the_outer_half_of_a_label_maps_voxels_counts(tmp_path):
    path = written(tmp_path / "l.nii.gz", np.full((10, 10, 10), 3), np.eye(4))
    finer = np.diag([0.5, 0.5, 0.5, 1.0])
    finer[:3, 3] = -0.25
    assert label_shares(path, {"core": STRUCTURES["core"]}, finer, (20, 20, 20)).min() == 1


@pytest.mark.parametrize("spacing", [1.0, 2.0, 3.1, 5.0])
def test_volumes_survive_another_grid(tmp_path, spacing):
    """Also turned and with other axes: what the label map holds in mm3, the grid holds."""
    labels = np.zeros((30, 34, 30), dtype=int)
    labels[8:22, 6:25, 9:23] = 3
    turn = nib.eulerangles.euler2mat(0.2, 0.1, 0.3)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.5, 1.2, 1.5])
    affine[:3, 3] = 20, -15, -20
    middle = nib.affines.apply_affine(affine, (np.array(labels.shape) - 1) / 2)
    shape = tuple(int(np.ceil(70 / spacing)) for _ in range(3))
    grid = np.diag([spacing] * 3 + [1.0])
    grid[:3, 3] = middle - spacing * (np.array(shape) - 1) / 2
    found = label_shares(written(tmp_path / "l.nii", labels, affine), {"core": STRUCTURES["core"]}, grid, shape)
    assert found.sum() * spacing**3 == pytest.approx((labels == 3).sum() * 1.5 * 1.2 * 1.5, rel=0.02)


def test_a_reduced_grid_covers_the_same_space(tmp_path):
    """Images of 200 voxels are reduced by 3; volumes stay, whatever does not divide."""
    model = Segmenter(["core"], (200, 20, 16), (4, 4, 4, 4, 4))
    assert model.factor == 3 and model.reduced_shape == (67, 7, 6)
    images = torch.rand(1, 1, 200, 20, 16)
    assert model.reduce(images).sum() * 27 == pytest.approx(float(images.sum()), rel=1e-5)
    labels = np.zeros((200, 20, 16), dtype=int)
    labels[30:170, 4:17, 3:14] = 7
    path = written(tmp_path / "l.nii", labels, np.eye(4))
    shares = label_shares(path, {"core": STRUCTURES["core"]}, model.grid(np.eye(4)), model.reduced_shape)
    assert shares.sum() * 27 == pytest.approx((labels == 7).sum())


def test_what_is_no_label_map_is_refused(tmp_path):
    blurred = nib.Nifti1Image(np.full((4, 4, 4), 0.5, np.float32), np.eye(4))
    blurred.to_filename(tmp_path / "blurred.nii")
    with pytest.raises(UserError, match="expected labels"):
        label_shares(tmp_path / "blurred.nii", STRUCTURES, np.eye(4), (4, 4, 4))
    with pytest.raises(UserError, match="Known fields"):
        filled_in("{subject}/x.nii", {"subject_id": "sub-01"}, "segmentation.labels")


def study(root: Path, **segmentation: object) -> object:
    section = {
        "labels": f"{root}/labels/{{subject_id}}/{{scan_id}}_dseg.nii.gz",
        "structures": {"core_ml": {"labels": [3]}, "whole_ml": {"all_but": [1]}},
        "channels": [8, 8, 8, 8, 8],
        "optimiser": {"steps": 150, "batch_size": 6, "learning_rate": 0.01, "warmup_steps": 5, "ema_decay": 0.9},
    }
    return parse_study(
        {
            "study": "cores",
            "cohort": {"source": "bids", "root": "somewhere"},
            "covariates": {name: {"unit": "mL", "range": [0, 100]} for name in ("core_ml", "whole_ml")}
            | {"age": {"unit": "year", "range": [0, 100]}},
            "preprocess": {"shape": list(SHAPE), "spacing_mm": SPACING},
            "autoencoder": {"stem": "none", "channels": [16, 32]},
            "diffusion": {"channels": [16], "attention_levels": [False], "num_head_channels": 16},
            "plan": [{"name": "syn", "subjects": 4}],
            "segmentation": section | segmentation,
            "compute": {"device": "cpu"},
        },
        "test",
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Forty balls with a dark core of another size each; labels 3 (core), 5 (shell) and 1 (around it) on a grid twice
    as fine.
    """
    root = tmp_path_factory.mktemp("cores")
    rng = np.random.default_rng(3)
    half = (np.stack(np.meshgrid(*[np.arange(2 * n) for n in SHAPE], indexing="ij")) + 0.5) / 2 - 0.5
    rows, checks = [], []
    affine = np.diag([SPACING] * 3 + [1.0])
    fine = np.diag([SPACING / 2] * 3 + [1.0])
    fine[:3, 3] = -SPACING / 4
    with ShardWriter(
        root / "images.arrow", {"scan_id": pa.string(), "image": TensorColumn("float16", (1, *SHAPE))}
    ) as shard:
        for i in range(40):
            centre = (np.array(SHAPE) - 1) / 2 + rng.uniform(-0.7, 0.7, 3)
            distance = np.sqrt(np.square(half - centre.reshape(3, 1, 1, 1)).sum(0))
            radius = rng.uniform(1.5, 4.5)
            labels = np.select([distance < radius, distance < 6.5, distance < 7.0], [3, 5, 1], 0)
            grey = np.select([labels == 3, labels == 5, labels == 1], [0.2, 0.8, 0.5], 0.0)
            image = grey.reshape(SHAPE[0], 2, SHAPE[1], 2, SHAPE[2], 2).mean(axis=(1, 3, 5))
            subject = f"sub-{i:02d}"
            shard.append(scan_id=f"{subject}_T1w", image=np.clip(image + rng.normal(0, 0.02, SHAPE), 0, 1)[None])
            if i != 1:
                written(root / "labels" / subject / f"{subject}_T1w_dseg.nii.gz", labels, fine)
            split = ["train", "train", "train", "test"][i % 4]
            volumes = {"core_ml": (labels == 3).sum() / 1000, "whole_ml": np.isin(labels, [3, 5]).sum() / 1000}
            rows.append(
                {
                    "scan_id": f"{subject}_T1w",
                    "subject_id": subject,
                    "session_id": None,
                    "path": "x",
                    "split": split,
                    "age": 50.0,
                }
                | volumes
            )
            checks.append({"scan_id": f"{subject}_T1w", "target_affine": json.dumps(affine.ravel().tolist())})
    write_manifest(pd.DataFrame(rows).assign(sha256="0" * 64, content_sha256="0" * 64), root / "manifest.parquet")
    pd.DataFrame(checks).to_parquet(root / "qc.parquet")
    return root


def trained(root: Path, out: Path, **segmentation: object) -> dict[str, object]:
    frozen = freeze(study(root, **segmentation), "segmenter", out)
    step.run(frozen, root / "manifest.parquet", root / "qc.parquet", [root / "images.arrow"], out)
    return json.loads((out / "card.json").read_text())


def test_the_step_learns_to_measure_volumes(root, tmp_path):
    card = trained(root, tmp_path)
    assert card["training_scans"] == 29, "one training scan has no label map"
    held = card["held_out"]
    assert held["scans"] == 10
    assert held["core_ml"]["dice"]["value"] > 0.8 and held["core_ml"]["r"]["value"] > 0.97
    assert held["whole_ml"]["dice"]["value"] > 0.9
    for figure in (*held["core_ml"].values(), *held["whole_ml"].values()):
        assert figure["low"] < figure["value"] < figure["high"] and figure["n"] == 10
    assert "Dice 0." in (told := _second_instrument({"held_out": held}, Names())) and told.count(" [") == 4
    model, _ = load_segmenter(tmp_path)
    images = torch.from_numpy(Shards([root / "images.arrow"]).tensors("image", np.arange(40)))
    volumes = model.volumes(images, SPACING**3 / 1000)
    true = pd.read_parquet(root / "manifest.parquet").sort_values("scan_id")["core_ml"].to_numpy()
    assert np.corrcoef(volumes[:, 0], true)[0, 1] > 0.97 and np.abs(volumes[:, 0] - true).mean() < 0.15 * true.mean()

    labels = model.label_map(images[:1])
    moved = np.roll(labels, 1, axis=0)
    assert set(np.unique(labels)) == {0, 1, 2} and not model.doubt(images[:1], labels).any()
    doubt = model.doubt(images[:1], moved)
    assert np.array_equal(doubt > 0, moved != labels) and (doubt[moved != labels] > DOUBT).mean() > 0.95
    rounded = copy.deepcopy(model).double().label_map(images[:1].double())
    assert model.doubt(images[:1], rounded).max() < DOUBT / 10, "what rounding changes, it hardly doubts"


@pytest.mark.parametrize("flip", [False, True])
def test_only_a_study_that_mirrors_scans_mirrors_them_for_the_segmenter(root, tmp_path, monkeypatch, flip):
    """Else "left" would be learnt on the right."""
    mirrored = []
    plain = torch.Tensor.flip
    monkeypatch.setattr(torch.Tensor, "flip", lambda x, *axes: mirrored.append(axes) or plain(x, *axes))
    made = study(root, optimiser={"steps": 4}).model_copy(update={"variants": Variants(flip=flip)})
    frozen = freeze(made, "segmenter", tmp_path)
    step.run(frozen, root / "manifest.parquet", root / "qc.parquet", [root / "images.arrow"], tmp_path)
    assert bool(mirrored) == flip


def test_label_maps_beside_the_head_are_left_out(root, tmp_path):
    """Every second one is moved by half a head: the network never sees it."""
    for path in sorted((root / "labels").glob("*/*.nii.gz")):
        stored, moved = nib.Nifti1Image.from_filename(path), int(path.name[4:6]) % 2
        target = tmp_path / "labels" / path.parent.name / path.name
        affine = stored.affine + np.array([[0, 0, 0, 9 * SPACING * moved]] + [[0] * 4] * 3)
        written(target, np.asarray(stored.dataobj), affine)
    card = trained(root, tmp_path / "out", labels=f"{tmp_path}/labels/{{subject_id}}/{{scan_id}}_dseg.nii.gz")
    assert card["training_scans"] == 20 and card["held_out"]["scans"] == 0


def test_the_same_study_trains_the_same_network(root, tmp_path):
    short = {"optimiser": {"steps": 4, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 2}}
    assert (
        trained(root, tmp_path / "a", **short)["weights_sha256"]
        == trained(root, tmp_path / "b", **short)["weights_sha256"]
    )


def test_label_maps_that_are_not_there_are_named(root, tmp_path):
    with pytest.raises(UserError, match=r"0 of 30 training scans have a readable label map.*nowhere"):
        trained(root, tmp_path, labels="nowhere/{scan_id}.nii.gz")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"structures": {"age": {"labels": [3]}}}, "age is no covariate with unit mL"),
        ({"structures": {"core_ml": {"labels": [3], "all_but": [1]}}}, "either `labels` or `all_but`"),
        ({"optimiser": {"steps": 9, "batch_size": 1, "learning_rate": 0.01}}, "at least 2 for batch normalisation"),
    ],
)
def test_bad_sections_are_refused(tmp_path, section, words):
    with pytest.raises(UserError, match=words):
        study(tmp_path, **section)
