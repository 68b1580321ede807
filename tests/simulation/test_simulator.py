"""The simulated cohort: its covariates, its images against its table, and its files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from meddiff_steps.config import SimulatedSource
from meddiff_steps.core.errors import UserError
from meddiff_steps.simulation.brains import (
    draw_traits,
    load_template,
    make_lattice,
    simulate_subject,
    subject_generator,
)
from meddiff_steps.simulation.dataset import simulate_cohort

SUBJECTS = 100


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj).astype(float)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame, np.ndarray, float]:
    """Root, table, images (n, x, y, z) and seconds of a small cohort."""
    load_template(4.0)
    root = tmp_path_factory.mktemp("simulated")
    start = time.process_time()
    table = simulate_cohort(SimulatedSource(subjects=SUBJECTS), "test", root, threads=2)
    seconds = time.process_time() - start
    frame = pd.read_csv(table, sep="\t", na_values="n/a")
    images = np.stack(
        [np.asarray(nib.load(root / s / "anat" / f"{s}_T1w.nii.gz").dataobj) for s in frame.participant_id]
    )
    return root, frame, images, seconds


def test_covariates_have_the_spreads_of_a_cohort() -> None:
    source = SimulatedSource(subjects=20)
    traits = [draw_traits(source, subject_generator("any", i)) for i in range(4000)]
    age = np.array([t.age for t in traits])
    case = np.array([t.diagnosis == "case" for t in traits])
    assert age.min() >= 44 and age.max() <= 82 and 8 < age.std() < 10
    assert case.mean() == pytest.approx(0.2, abs=0.02)
    assert age[case].mean() > age[~case].mean() + 1
    assert np.mean([t.sex == "M" for t in traits]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([t.age_missing for t in traits]) == pytest.approx(0.02, abs=0.008)
    head = {sex: np.mean([t.head_ml for t in traits if t.sex == sex]) for sex in "FM"}
    assert 1.08 < head["M"] / head["F"] < 1.15


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_extreme_shares_of_cases(share: float) -> None:
    traits = [draw_traits(SimulatedSource(case_share=share), subject_generator("any", i)) for i in range(200)]
    assert {t.diagnosis for t in traits} == {"case" if share else "control"}


def test_volumes_follow_age_and_diagnosis(cohort: tuple[Path, pd.DataFrame, np.ndarray, float]) -> None:
    _, frame, _, _ = cohort
    assert frame.brain_ml.between(900, 1800).all() and 1200 < frame.brain_ml.mean() < 1400
    assert frame.ventricles_ml.between(6, 90).all() and frame.ventricles_ml.quantile(
        0.9
    ) > 1.8 * frame.ventricles_ml.quantile(0.1)
    assert 0.35 < frame.age.corr(frame.ventricles_ml) < 0.75
    # At equal age, cases have wider ventricles and less brain, but the groups overlap.
    older = frame[frame.age > 55]
    case, control = (older[older.diagnosis == d].ventricles_ml for d in ("case", "control"))
    auc = np.mean(case.to_numpy()[:, None] > control.to_numpy()[None])
    assert 0.55 < auc < 0.97


def test_table_is_measured_in_the_image(cohort: tuple[Path, pd.DataFrame, np.ndarray, float]) -> None:
    """Volumes recovered from intensities alone agree with the table."""
    _, frame, images, _ = cohort
    brain, fluid = [], []
    for image in images:
        inside = image > 0
        white = np.percentile(image[inside], 95)
        brain.append((image > 0.55 * white).sum() * 0.125)
        # Ventricles are what is dark and far from the surface.
        deep = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1, 1:-1] > 6
        fluid.append(np.clip(1 - image[deep] / (0.75 * white), 0, None).sum() * 0.125)
    assert np.corrcoef(brain, frame.brain_ml)[0, 1] > 0.95
    assert np.corrcoef(fluid, frame.ventricles_ml)[0, 1] > 0.85


def test_images_are_brains_that_fit(cohort: tuple[Path, pd.DataFrame, np.ndarray, float]) -> None:
    _, _, images, _ = cohort
    assert images.dtype == np.uint8 and images.shape == (SUBJECTS, 32, 40, 32)
    assert images.max() < 255, "bright tissue is clipped"
    share = (images > 0).mean((1, 2, 3))
    assert (share > 0.2).all() and (share < 0.5).all()
    at_edge = [any((image.take((0, -1), axis) > 60).any() for axis in range(3)) for image in images]
    assert np.mean(at_edge) < 0.1
    middle = np.array([ndimage.center_of_mass(image) for image in images]) * 5 - np.array([77.5, 97.5, 77.5])
    assert np.abs(middle).max() < 12
    # Individuals: no two are nearly the same image.
    flat = images.reshape(SUBJECTS, -1).astype(np.float32)
    correlation = np.corrcoef(flat)[np.triu_indices(SUBJECTS, 1)]
    assert correlation.max() < 0.99
    assert correlation.min() > 0.6


def test_subject_does_not_depend_on_the_number_of_subjects_or_threads(tmp_path: Path) -> None:
    simulate_cohort(SimulatedSource(subjects=22), "s", tmp_path / "many", threads=2)
    simulate_cohort(SimulatedSource(subjects=20), "s", tmp_path / "few", threads=1)
    many, few = files(tmp_path / "many"), files(tmp_path / "few")
    assert len(few) == 25 and len(many) == 27
    assert all(many[name] == few[name] for name in few if name != "participants.tsv")
    assert many["participants.tsv"].startswith(few["participants.tsv"])
    # A smaller cohort in the same place leaves no subject of the larger one behind.
    simulate_cohort(SimulatedSource(subjects=20), "s", tmp_path / "many", threads=2)
    assert files(tmp_path / "many") == few


def test_seed_changes_everyone() -> None:
    source = SimulatedSource()
    lattice = make_lattice(source.shape, source.spacing_mm)
    a, b = (simulate_subject(source, seed, 0, lattice, load_template(lattice.blur_mm)) for seed in ("a", "b"))
    assert np.mean(a.images["T1w"] != b.images["T1w"]) > 0.2 and a.brain_ml != b.brain_ml


def test_anatomy_does_not_depend_on_the_grid() -> None:
    subjects = []
    for spacing in (5.0, 2.5):
        shape = (round(160 / spacing), round(200 / spacing), round(160 / spacing))
        lattice = make_lattice(shape, spacing)
        subjects.append(
            simulate_subject(
                SimulatedSource(shape=shape, spacing_mm=spacing), "s", 3, lattice, load_template(lattice.blur_mm)
            )
        )
    coarse, fine = subjects
    assert coarse.traits == fine.traits
    assert fine.brain_ml == pytest.approx(coarse.brain_ml, rel=0.005)
    assert fine.ventricles_ml == pytest.approx(coarse.ventricles_ml, rel=0.03)
    pooled = fine.images["T1w"].reshape(32, 2, 40, 2, 32, 2).astype(float).mean((1, 3, 5))
    inside = coarse.images["T1w"] > 0
    assert np.corrcoef(pooled[inside], coarse.images["T1w"][inside])[0, 1] > 0.97


def test_layout_is_bids_and_says_simulated(cohort: tuple[Path, pd.DataFrame, np.ndarray, float]) -> None:
    root, frame, _, _ = cohort
    description = json.loads((root / "dataset_description.json").read_text())
    assert "SIMULATED" in description["Name"] and {"BIDSVersion", "DatasetType", "License"} <= set(description)
    assert "SIMULATED" in (root / "README").read_text() and "Copyright (C) 1993" in (root / "README").read_text()
    assert "SIMULATED" in json.loads((root / "T1w.json").read_text())["Description"]
    sidecar = json.loads((root / "participants.json").read_text())
    assert (
        set(sidecar) == set(frame.columns) == {"participant_id", "age", "sex", "diagnosis", "brain_ml", "ventricles_ml"}
    )
    assert sidecar["age"]["Units"] == "year" and sidecar["brain_ml"]["Units"] == "mL"
    assert set(sidecar["sex"]["Levels"]) == set(frame.sex) and set(sidecar["diagnosis"]["Levels"]) == set(
        frame.diagnosis
    )
    assert (
        list(frame.participant_id) == sorted(p.name for p in root.glob("sub-*"))
        and frame.participant_id[0] == "sub-0001"
    )
    image = nib.load(root / "sub-0001" / "anat" / "sub-0001_T1w.nii.gz")
    assert b"SIMULATED" in image.header["descrip"].tobytes()
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert np.allclose(image.affine @ [15.5, 19.5, 15.5, 1], [0, 0, 0, 1])
    assert image.header["qform_code"] == image.header["sform_code"] == 1
    raw = (root / "participants.tsv").read_text()
    assert "nan" not in raw and "\t\t" not in raw


def test_missing_ages_are_written_as_na(tmp_path: Path) -> None:
    table = simulate_cohort(SimulatedSource(subjects=20, missing_share=1.0), "s", tmp_path)
    assert pd.read_csv(table, sep="\t", keep_default_na=False).age.eq("n/a").all()


def test_further_contrasts_labels_and_lesions(tmp_path: Path) -> None:
    more = SimulatedSource(subjects=20, contrasts=["T2w", "FLAIR"], labels=True, lesion_share=0.6)
    table = pd.read_csv(simulate_cohort(more, "test", tmp_path / "more"), sep="\t", na_values="n/a")
    plain = pd.read_csv(
        simulate_cohort(SimulatedSource(subjects=20), "test", tmp_path / "plain"), sep="\t", na_values="n/a"
    )
    # The anatomy is that of the plain cohort, and so are scans without a lesion.
    assert plain.equals(table.drop(columns="lesion_ml"))
    ill = table.lesion_ml > 0
    assert 6 < ill.sum() < 18 and table.lesion_ml[ill].between(0.5, 40).all()
    names = (tmp_path / "more/derivatives/truth/dseg.tsv").read_text().splitlines()
    assert names == ["index\tname", "1\tsulcal CSF", "2\tventricles", "3\tgrey matter", "4\twhite matter"]
    grey_levels = []
    for subject, lesion_ml, ventricles_ml in zip(
        table.participant_id, table.lesion_ml, table.ventricles_ml, strict=True
    ):
        scans = {
            c: read(tmp_path / "more" / subject / "anat" / f"{subject}_{c}.nii.gz") for c in ("T1w", "T2w", "FLAIR")
        }
        truth = tmp_path / "more/derivatives/truth" / subject / "anat"
        tissue, lesion = read(truth / f"{subject}_dseg.nii.gz"), read(truth / f"{subject}_label-lesion_mask.nii.gz") > 0
        as_it_was = read(tmp_path / "plain" / subject / "anat" / f"{subject}_T1w.nii.gz")
        assert ((scans["T1w"] != as_it_was).sum() > 0) == (lesion_ml > 0)
        assert set(np.unique(tissue)) == {0, 1, 2, 3, 4} and not lesion[tissue == 0].any()
        assert (tissue == 2).sum() * 0.125 == pytest.approx(ventricles_ml, rel=0.5)
        if not lesion_ml:
            assert not lesion.any()
        elif lesion.sum() > 20:
            assert lesion.sum() * 0.125 == pytest.approx(lesion_ml, rel=0.5)
            white = (tissue == 4) & ~lesion
            grey_levels.append([scans[c][lesion].mean() / scans[c][white].mean() for c in scans])
        fluid, grey, white = ((tissue == value) & ~lesion for value in (2, 3, 4))
        assert scans["T2w"][fluid].mean() > scans["T2w"][grey].mean() > scans["T2w"][white].mean()
        assert scans["FLAIR"][fluid].mean() < scans["FLAIR"][white].mean() < scans["FLAIR"][grey].mean()
    t1, t2, flair = np.array(grey_levels).T
    assert len(t1) > 4 and (t1 < 0.8).all() and (t2 > 1.3).all() and (flair > 1.4).all()


def test_an_earlier_dataset_goes_with_what_was_true_of_it(tmp_path: Path) -> None:
    simulate_cohort(SimulatedSource(subjects=20, labels=True, contrasts=["T2w"]), "test", tmp_path)
    assert (tmp_path / "T2w.json").exists()
    simulate_cohort(SimulatedSource(subjects=20), "test", tmp_path)
    assert not (tmp_path / "derivatives/truth").exists() and not (tmp_path / "T2w.json").exists()
    assert {path.name for path in tmp_path.glob("*.json")} == {
        "dataset_description.json",
        "participants.json",
        "T1w.json",
    }


def test_what_nobody_says_is_simulated_stays(tmp_path: Path) -> None:
    """A folder without subjects may hold somebody's derivatives."""
    kept = tmp_path / "derivatives/truth/sub-99/anat/sub-99_dseg.nii.gz"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"real")
    simulate_cohort(SimulatedSource(subjects=20), "test", tmp_path)
    assert kept.read_bytes() == b"real"


def test_is_fast(cohort: tuple[Path, pd.DataFrame, np.ndarray, float]) -> None:
    """About 0.05 s of processor time per subject; the bound leaves room for a slow or busy machine."""
    *_, seconds = cohort
    assert seconds / SUBJECTS < 0.25


def test_a_grid_too_small_for_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cohort.shape \[16, 16, 16\].*80 x 80 x 80 mm.*\[32, 40, 32\]"):
        simulate_cohort(SimulatedSource(shape=(16, 16, 16)), "s", tmp_path)


def test_real_subjects_are_never_replaced(tmp_path: Path) -> None:
    scan = tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    scan.parent.mkdir(parents=True)
    scan.write_bytes(b"precious")
    (tmp_path / "dataset_description.json").write_text('{"Name": "Real people"}')
    with pytest.raises(UserError, match="sub-01"):
        simulate_cohort(SimulatedSource(subjects=20), "s", tmp_path)
    assert scan.read_bytes() == b"precious"
