"""A study that is proposed for a dataset: it loads, passes the check, and says what was found."""

import json
import sys
from dataclasses import replace
from types import ModuleType

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate, load_study
from meddiff_steps.config.yaml_files import parse_yaml
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.brain_extraction import load_deepbet
from meddiff_steps.operations import check
from meddiff_steps.operations.machine import Machine
from meddiff_steps.operations.proposal import Column, Heads, affordable, columns, covariate_name, division, grid, heads
from meddiff_steps.operations.propose import flow, propose
from meddiff_steps.operations.rates import CORE_FLOPS

SUBJECTS = 90
CORES, GPU = Machine(2, 24000), Machine(8, 64000, 1, 80000)
MM = 5.0


def brain() -> np.ndarray:
    """The average brain that registration knows, on coarse voxels, in the middle of a box."""
    from nilearn.datasets import load_mni152_template

    template = load_mni152_template(resolution=2).get_fdata(dtype=np.float32)
    small = ndimage.zoom(template, 2 / MM, order=1)
    return np.pad(np.where(small > 0.05 * small.max(), small, 0), 6)


def saved(path, array, shift=(0, 0, 0)):
    affine = np.diag([MM, MM, MM, 1.0])
    affine[:3, 3] = -MM * (np.array(array.shape) - 1) / 2 + shift
    image = nib.Nifti1Image(array.astype(np.float32), affine)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return str(path)


@pytest.fixture(autouse=True)
def speed(monkeypatch) -> dict[str, float]:
    """By how much networks take longer here: not at all, whatever machine tests run on."""
    slower = dict.fromkeys(CORE_FLOPS, 1.0)
    monkeypatch.setattr("meddiff_steps.operations.core_speed.slowness", lambda: slower)
    return slower


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """Brains at different angles."""
    folder, array = tmp_path_factory.mktemp("turned"), brain()
    return [
        saved(
            folder / f"{n}.nii",
            ndimage.rotate(array, 6 * n - 21, (1, 2), reshape=False, order=1).clip(0),
            (0, 4 * n, 0),
        )
        for n in range(8)
    ]


def dataset(root, images, suffix="T1w"):
    sidecar = {"age": {"Units": "year", "Description": "Age: at scan"}, "volume": {"Units": "mL"}}
    rows, random = ["participant_id\tage\tsex\tvolume\ttwin\tscore\tsite\tid code\tgroup"], np.random.default_rng(0)
    for n in range(SUBJECTS):
        name = f"sub-{n:03d}"
        file = root / name / "anat" / f"{name}_{suffix}.nii"
        file.parent.mkdir(parents=True)
        file.symlink_to(images[n % len(images)])
        volume = random.normal(1200, 100)
        group = "rare" if n == 0 else ("no" if n % 3 else "yes")
        cells = [
            name,
            20 + n * 0.5,
            1 + n % 2,
            f"{volume:.1f}",
            f"{volume * 2:.1f}",
            "n/a" if n % 4 else n,
            "A",
            f"x{n}",
            group,
        ]
        rows.append("\t".join(map(str, cells)))
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    (root / "participants.json").write_text(json.dumps(sidecar))
    return root


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, turned):
    return dataset(tmp_path_factory.mktemp("bids"), turned)


def test_as_many_covariates_as_subjects_can_teach():
    age, size = (Column(name, name, ContinuousCovariate(unit="", range=(0, 1))) for name in ("age", "size"))
    sex = Column("sex", "sex", CategoricalCovariate(levels=["F", "M", "X"]))
    gone = Column("site", "site", None, "has one value")
    for subjects, names in ((200, ["age", "sex", "size"]), (75, ["age", "sex"]), (60, ["age", "size"]), (8, ["age"])):
        found = affordable([age, sex, size, gone], subjects)
        assert [one.name for one in found if one.why_not is None] == names and len(found) == 4
        assert all(
            "training subjects, 15 for each number that" in one.why_not
            for one in found[len(names) :]
            if one.name != "site"
        )


def test_a_proposal_loads_and_passes_the_check(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr("meddiff_steps.operations.proposal.SUBJECTS_PER_NUMBER", 5)
    text = propose(cohort, "brains", CORES, 8.0)
    (tmp_path / "brains.yaml").write_text(text)
    study = load_study(tmp_path / "brains.yaml")
    found, read = check.cohort(study)
    found += check.images(study, check.headers(read.frame, lambda done, total: None))
    found.append(check.privacy(study, read.splits["calibration"]))
    assert not [one for one in found if one.state == "fail"]
    # What was found in the table, and why the rest was left.
    assert list(study.covariates) == ["age", "sex", "volume"]
    assert study.covariates["sex"].levels == ["1", "2"]
    assert study.covariates["age"].unit == "year" and study.covariates["age"].description == "Age: at scan"
    assert study.covariates["age"].range[0] <= 20 and study.covariates["age"].range[1] >= 64.5
    for why in (
        "nearly the same as volume",
        "74% of its values",
        "site: has one value",
        "90 different values",
        "rare (1)",
    ):
        assert why in text
    # What was found in the images: as large as heads are, at different angles.
    assert study.preprocess.registration is not None and study.release.skull_stripped
    box = np.multiply(study.preprocess.shape, study.preprocess.spacing_mm)
    assert (box >= [130, 165, 130]).all() and (box <= [200, 240, 200]).all()
    assert study.preprocess.spacing_mm == MM, "finer than the scans"
    assert study.privacy.level > 0.05 and "calibration subjects" in text
    assert study.plan[0].subjects == SUBJECTS


def test_fewer_hours_give_shorter_trainings_and_a_gpu_other_networks(cohort, monkeypatch):
    lie = Heads(8, (160.0, 192.0, 160.0), True, 0.9, 15.0, 18.0)
    monkeypatch.setattr("meddiff_steps.operations.propose.heads", lambda *_: lie)

    def content(machine, hours):
        return parse_yaml(propose(cohort, "brains", machine, hours))

    short, long, gpu = content(CORES, 0.3), content(CORES, 8.0), content(GPU, 8.0)
    steps = [one["autoencoder"]["optimiser"]["steps"] for one in (short, long)]
    assert 2000 <= steps[0] < steps[1] == 8000
    assert gpu["diffusion"]["channels"] == [192] and long["diffusion"]["channels"] == [96]


def test_slow_cores_get_shorter_trainings(cohort, monkeypatch, speed):
    lie = Heads(8, (160.0, 192.0, 160.0), True, 0.9, 15.0, 18.0)
    monkeypatch.setattr("meddiff_steps.operations.propose.heads", lambda *_: lie)
    fast = parse_yaml(propose(cohort, "brains", CORES, 0.5))["decoder"]["optimiser"]["steps"]
    speed.update(dict.fromkeys(speed, 3.0))
    text = propose(cohort, "brains", CORES, 0.5)
    assert parse_yaml(text)["decoder"]["optimiser"]["steps"] < fast / 2 and "cores like those here" in text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_what_the_dataset_says_of_itself_is_taken_over(cohort, monkeypatch, encoding):
    lie = Heads(8, (160.0, 192.0, 160.0), True, 0.9, 15.0, 18.0)
    monkeypatch.setattr("meddiff_steps.operations.propose.heads", lambda *_: lie)
    assert parse_yaml(propose(cohort, "brains", CORES, 8.0))["release"]["licence"] == "CC0"
    says = {"Name": "Brains: of\nBergen", "License": "CC BY-SA 3.0; ask", "Acknowledgements": "Thank us."}
    (cohort / "dataset_description.json").write_text(json.dumps(says), encoding)
    try:
        content = parse_yaml(propose(cohort, "brains", CORES, 8.0))
    finally:
        (cohort / "dataset_description.json").unlink()
    assert content["title"] == "T1w images of Brains: of Bergen"
    assert content["release"]["licence"] == "CC BY-SA 3.0; ask"
    assert content["release"]["acknowledgements"] == "Thank us."


@pytest.mark.parametrize(("suffix", "said"), [("T2w", ""), ("angio", "cannot have angio")])
def test_a_suffix_that_no_release_has_is_to_be_chosen(tmp_path, turned, monkeypatch, suffix, said):
    lie = Heads(8, (160.0, 192.0, 160.0), True, 0.9, 15.0, 18.0)
    monkeypatch.setattr("meddiff_steps.operations.propose.heads", lambda *_: lie)
    text = propose(dataset(tmp_path, turned, suffix), "x", CORES, 8.0)
    lines = [line for line in text.splitlines() if line.startswith("  suffix: ")]
    assert lines[0] == f"  suffix: {suffix}" and len(lines) == 2
    assert ("# <--" in lines[1]) == bool(said) and said in lines[1]


def test_too_few_hours_are_told(cohort, monkeypatch):
    lie = Heads(8, (160.0, 192.0, 160.0), True, 0.9, 15.0, 18.0)
    monkeypatch.setattr("meddiff_steps.operations.propose.heads", lambda *_: lie)
    told = "these are the shortest trainings"
    assert told in propose(cohort, "brains", CORES, 0.01) and told not in propose(cohort, "brains", CORES, 8.0)


# ------------------------------------------------------------------------------------------------------ heads


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Brains at different angles, with a dark skull and a bright scalp around them."""
    folder, array, files = tmp_path_factory.mktemp("whole"), brain(), []
    inside = ndimage.binary_fill_holes(array > 0)
    away = ndimage.distance_transform_edt(~inside)
    scalp = (away > 2) & (away <= 4)
    for n in range(2):
        head = np.where(scalp, 1.1 * array.max(), array)
        turned = ndimage.rotate(head, 8 * n - 12, (1, 2), reshape=False, order=1).clip(0)
        files.append(saved(folder / f"{n}.nii", turned, (0, 4 * n, 0)))
    return files


class Stand:
    """What deepbet's class is asked for: the largest part of the darker inside of a head."""

    def __init__(self, no_gpu):
        assert no_gpu

    def run(self, image):
        values = image.get_fdata()
        outside = ndimage.label(values < 0.02 * values.max())[0]
        dark = outside == outside[0, 0, 0]
        middle = ndimage.binary_erosion(~dark, iterations=5)
        return image, nib.Nifti1Image(middle.astype(np.float32), image.affine), 0.0


def test_brains_are_taken_out_of_whole_heads_where_that_can_be_done(cohort, whole, monkeypatch):
    monkeypatch.setattr("meddiff_steps.operations.proposal.extraction_installed", lambda: False)
    without = heads(whole, lambda done, total: None)
    assert without.skulls == 2 and not without.extract and not without.to_register, "the package is not there"
    monkeypatch.setattr("meddiff_steps.operations.propose.heads", lambda *_: without)
    text = propose(cohort, "heads", CORES, 8.0)
    content = parse_yaml(text)
    assert "meddiff-steps[brain-extraction]" in text and content["release"]["skull_stripped"] == "false"
    assert "registration" not in content["preprocess"] and "brain_extraction" not in content["preprocess"]

    module = ModuleType("deepbet")
    module.BrainExtraction = Stand
    monkeypatch.setitem(sys.modules, "deepbet", module)
    monkeypatch.setattr("meddiff_steps.operations.proposal.extraction_installed", lambda: True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    load_deepbet.cache_clear()
    found = heads(whole, lambda done, total: None)
    load_deepbet.cache_clear()
    assert found.extract and found.skulls == 2 and found.extent < without.extent
    assert not heads(whole, lambda done, total: None, may_extract=False).extract, "made for T1w alone"
    lie = replace(found, brains=True, turned=12.0)
    monkeypatch.setattr("meddiff_steps.operations.propose.heads", lambda *_: lie)
    text = propose(cohort, "heads", CORES, 8.0)
    content = parse_yaml(text)
    assert content["preprocess"]["brain_extraction"] == "deepbet" and "skull_stripped" not in content["release"]
    assert content["preprocess"]["registration"] == {"template": "mni152"}
    assert "2 of them show a head with its skull" in text


def test_how_heads_lie_is_seen(tmp_path, turned):
    steps = []
    lie = heads(turned, lambda done, total: steps.append(done))
    assert steps == list(range(1, 9))
    assert lie.brains and lie.to_register and lie.turned > 5
    array = brain()
    still = heads([saved(tmp_path / f"still{n}.nii", array) for n in range(3)], lambda done, total: None)
    assert still.brains and still.registered and not still.to_register
    extent = MM * (np.ptp(np.argwhere(array > 0), axis=0) + 1)
    assert (np.array(still.extent) >= extent - MM).all() and (np.array(still.extent) <= extent + 4 * MM).all()
    ball = (sum((x - 20) ** 2 for x in np.indices((41, 41, 41))) < 300) * np.random.default_rng(0).random((41, 41, 41))
    other = heads([saved(tmp_path / "ball.nii", ball)], lambda done, total: None)
    assert not other.brains and not other.to_register


def test_ct_is_recognised(cohort, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    inside = ndimage.binary_fill_holes(brain() > 0)
    away = ndimage.distance_transform_edt(~inside)

    def head():
        values = np.select([inside, away <= 2], [random.uniform(25, 40, inside.shape), 900], -1000)
        return values + random.normal(0, 8, inside.shape)

    scans = [saved(tmp_path / f"{n}.nii", head(), (0, 4 * n, 0)) for n in range(3)]
    others = [saved(tmp_path / "brain.nii", brain())]
    lie = heads([*scans, *others], lambda done, total: None)
    assert lie.ct and lie.looked_at == 3 and not (lie.brains or lie.skulls or lie.extract or lie.to_register)
    extent = MM * (np.ptp(np.argwhere(away <= 2), axis=0) + 1)
    assert (np.array(lie.extent) >= extent - MM).all() and (np.array(lie.extent) <= extent + 4 * MM).all()
    assert not heads([*others, *others, scans[0]], lambda done, total: None).ct
    monkeypatch.setattr("meddiff_steps.operations.propose.heads", lambda *_: lie)
    text = propose(cohort, "heads", CORES, 8.0)
    (tmp_path / "heads.yaml").write_text(text)
    study = load_study(tmp_path / "heads.yaml")
    assert study.preprocess.foreground == "ct" and study.preprocess.window == (0, 80)
    assert study.preprocess.registration is None and not study.release.skull_stripped
    assert not any(
        word in text for word in ("deepbet", "brain-extraction", "skull of", "suit brains", "look like brains")
    )


def test_scans_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of 1 scans can be read"):
        heads([str(tmp_path / "a.nii")], lambda done, total: None)


def test_the_grid_is_the_smallest_that_holds_them():
    assert grid((160, 192, 160), 4, 8) == (40, 48, 40)
    assert grid((160.1, 192, 160), 4, 8) == (48, 48, 40)


# ------------------------------------------------------------------------------------------- tables and splits


def test_names_that_no_covariate_may_have_are_changed():
    cells = pd.DataFrame({"Age (y)": ["30.5", "41", "52.5", "60"], "path": ["1.5", "2.5", "3.25", "4.75"]})
    found = columns(cells, {})
    assert [one.name for one in found] == ["Age_y", "path_value"]
    assert all(one.covariate.column == one.column for one in found)
    assert covariate_name("Größe") == "Gr_e"


def test_columns_that_would_have_one_name_do_not_mix(tmp_path, turned, monkeypatch):
    lie = Heads(8, (160.0, 192.0, 160.0), True, 0.9, 15.0, 18.0)
    monkeypatch.setattr("meddiff_steps.operations.propose.heads", lambda *_: lie)
    monkeypatch.setattr("meddiff_steps.operations.proposal.SUBJECTS_PER_NUMBER", 1)
    root = dataset(tmp_path, turned)
    random = np.random.default_rng(0)
    rows = ["participant_id\tage (y)\tage y\t年齢\t性別\tgroup"]
    for n in range(SUBJECTS):
        ages = (20 + n, f"{random.normal():.3f}", f"{random.normal(500):.2f}")
        rows.append("\t".join(map(str, (f"sub-{n:03d}", *ages, "男女"[n % 2], "ab"[n % 2]))))
    (root / "participants.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "x.yaml").write_text(propose(root, "x", CORES, 8.0), encoding="utf-8")
    covariates = load_study(tmp_path / "x.yaml").covariates
    assert {name: one.column for name, one in covariates.items()} == {
        "group_value": "group",
        "age_y": "age (y)",
        "age_y_2": "age y",
        "column": "年齢",
        "column_2": "性別",
    }
    assert covariates["age_y"].range[1] > 100 and covariates["age_y_2"].range[1] < 10
    assert covariates["column_2"].levels == ["女", "男"]


def test_a_sidecar_may_hold_texts():
    cells = pd.DataFrame({"age": [str(20.5 + n) for n in range(60)], "sex": ["F", "M"] * 30, "hand": ["l", "r"] * 30})
    found = {one.name: one for one in columns(cells, {"age": "in years", "sex": ["F"], "hand": {"Description": None}})}
    assert [found[name].covariate.description for name in cells] == ["in years", "", ""]


def test_units_are_written_in_one_way_and_ages_looked_at():
    ages = [f"{100.5 + 2 * n:g}" for n in range(60)]
    cells = pd.DataFrame(
        {"age": ages, "years_at_school": ages[::-1], "age_months": [f"{float(age) ** 2:g}" for age in ages]}
    )

    def told(sidecar):
        return {one.name: (one.covariate.unit, one.unsure) for one in columns(cells, sidecar)}

    months = told({"age": {"Units": "months"}, "years_at_school": {"Units": "Years"}})
    assert months["age"] == ("month", None) == months["age_months"] and months["years_at_school"] == ("year", None)
    assert told({"age": {"Units": "years"}})["age"] == ("year", "218.5 years of age?") == told({})["age"]


def test_columns_of_sessions_are_seen(tmp_path, monkeypatch):
    lie = Heads(8, (160.0, 192.0, 160.0), True, 0.9, 15.0, 18.0)
    monkeypatch.setattr("meddiff_steps.operations.propose.heads", lambda *_: lie)
    monkeypatch.setattr("meddiff_steps.operations.proposal.SUBJECTS_PER_NUMBER", 1)
    image = saved(tmp_path / "one.nii", brain())
    rows, root = ["participant_id\tsex"], tmp_path / "bids"
    for n in range(60):
        name = f"sub-{n:02d}"
        rows.append(f"{name}\t{'MF'[n % 2]}")
        for session in ("ses-1", "ses-2"):
            file = root / name / session / "anat" / f"{name}_{session}_T1w.nii"
            file.parent.mkdir(parents=True)
            file.symlink_to(image)
        table = f"session_id\tage\nses-1\t{20.5 + n}\nses-2\t{30.5 + n}\n"
        (root / name / f"{name}_sessions.tsv").write_text(table)
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    (root / "sessions.json").write_text(json.dumps({"age": {"Description": "Age at the scan"}}))
    (tmp_path / "x.yaml").write_text(propose(root, "x", CORES, 8.0))
    covariates = load_study(tmp_path / "x.yaml").covariates
    assert list(covariates) == ["age", "sex"] and covariates["age"].description == "Age at the scan"
    assert covariates["age"].range[0] <= 20.5 and 89.5 <= covariates["age"].range[1] < 100


def test_codes_that_the_sidecar_names_are_levels():
    cells = pd.DataFrame(
        {
            "diagnosis": [f"{n % 5}.0" for n in range(60)],
            "site": [str(n % 9) for n in range(60)],
            "age": [str(31 + n) for n in range(60)],
        }
    )
    sidecar = {
        "diagnosis": {"Levels": {"0": "CN", "1": "SCD", "2": "MCI", "3": "AD", "4": "FTD"}},
        "site": {"Levels": {str(n): f"Hospital {n}" for n in range(9)}},
        "age": {"Units": "year", "Levels": {"90": "90 or older"}},
    }
    found = {one.name: one for one in columns(cells, sidecar)}
    assert found["diagnosis"].covariate.levels == ["0.0", "1.0", "2.0", "3.0", "4.0"]
    assert found["diagnosis"].why_not is None
    assert "9 different values" in found["site"].why_not and found["site"].covariate is None
    assert isinstance(found["age"].covariate, ContinuousCovariate), "one of many values has a name"


@pytest.mark.parametrize(("subjects", "level"), [(1000, 0.05), (400, 0.05), (90, None), (30, None)])
def test_splits_leave_the_filter_what_it_needs(subjects, level):
    parts = division([f"sub-{n}" for n in range(subjects)], "seed")
    assert sum(parts.counts.values()) == subjects and all(parts.counts.values())
    if level is not None:
        assert parts.level == level and parts.counts["calibration"] >= 59
    elif parts.level is not None:
        assert 0.05 < parts.level < 0.5 and 3 / parts.level - 1 <= parts.counts["calibration"] + 1e-9


@pytest.mark.parametrize("subjects", [60, 90, 185])
def test_no_split_of_few_subjects_comes_out_far_too_small(subjects):
    parts = division([f"sub-{n:03d}" for n in range(subjects)], "heads")
    for name, share in parts.splits.model_dump().items():
        assert parts.counts[name] >= 0.6 * share * subjects


def test_too_few_subjects_are_refused():
    with pytest.raises(UserError, match="2 subjects are too few"):
        division(["a", "b"], "seed")


@pytest.mark.parametrize(
    "value",
    [
        "no",
        "1",
        "1e3",
        "01",
        "a: b",
        "- x",
        "#1",
        "",
        "true",
        "null",
        "~",
        "naïve",
        'quo"te',
        "a, b",
        "{x}",
        "2024-01-31",
    ],
)
def test_values_are_read_back_as_they_are(value):
    assert parse_yaml(f"a: {flow({'key': [value, 0.5, 3]})}  # end")["a"] == {"key": [value, 0.5, 3]}


def test_a_dataset_with_several_kinds_of_images_asks_which(tmp_path, turned):
    root = dataset(tmp_path, turned, "bold")
    (root / "sub-000/anat/sub-000_T2w.nii").symlink_to(turned[0])
    with pytest.raises(UserError, match="--suffix"):
        propose(root, "x", CORES, 1.0)


def test_what_is_no_bids_dataset_is_told(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        propose(tmp_path / "nowhere", "x", CORES, 1.0)
    with pytest.raises(UserError, match=r"no participants.tsv here.*meddiff init"):
        propose(tmp_path, "x", CORES, 1.0)
