"""What is known of a study before it runs."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.command.check import findings
from meddiff_steps.config import load_study, parse_study
from meddiff_steps.core.files import read_json
from meddiff_steps.operations import check
from meddiff_steps.operations.check import Finding
from meddiff_steps.operations.expected import Expected
from meddiff_steps.operations.machine import Machine, free_bytes, this_machine
from meddiff_steps.operations.survey import read_header, spread
from meddiff_steps.release import shipping

SUBJECTS = 60


def volume(path: Path, size=(8, 10, 6), spacing=(2.0, 2.0, 3.0), order=(0, 1, 2)) -> None:
    """A NIfTI file whose voxel axes are some of the world's."""
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, list(order)] * np.take(spacing, order)
    image = nib.Nifti1Image(np.zeros(np.take(size, order), dtype=np.int16), affine)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "bids"
    volume(tmp_path / "one.nii.gz")
    content = (tmp_path / "one.nii.gz").read_bytes()
    rows = ["participant_id\tage\tsex"]
    for number in range(SUBJECTS):
        name = f"sub-{number:02d}"
        (folder / name / "anat").mkdir(parents=True)
        (folder / name / "anat" / f"{name}_T1w.nii.gz").write_bytes(content)
        rows.append(f"{name}\t{20 + number}\t{'FM'[number % 2]}")
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")
    return folder


def study(root: Path, **changed):
    content = {
        "study": "s",
        "cohort": {"source": "bids", "root": str(root)},
        "covariates": {"age": {"unit": "year", "range": [18, 95]}, "sex": {"levels": ["F", "M"]}},
        "splits": {"train": 0.6, "val": 0.1, "calibration": 0.15, "test": 0.15},
        "preprocess": {"shape": [16, 16, 16], "spacing_mm": 2},
        "plan": [{"name": "syn", "subjects": 10}],
    }
    return parse_study(content | changed, "test")


def told(found: list[Finding], topic: str) -> list[tuple[str, str]]:
    return [(one.state, one.text) for one in found if one.topic == topic]


def test_more_covariates_than_training_subjects_can_teach_are_warned_of(root):
    counts = {"train": 60, "val": 1, "calibration": 1, "test": 1}
    found = check._splits(counts, study(root))  # age and sex: four numbers
    assert found.state == "ok"
    more = study(root, covariates={name: {"unit": "year", "range": [0, 99]} for name in ("age", "height", "weight")})
    found = check._splits(counts, more)
    assert found.state == "warning" and "told by 6 numbers" in found.text and "can teach 4, at 15" in found.text


def test_a_cohort_that_fits_is_told_in_figures(root):
    found, cohort = check.cohort(study(root))
    ((state, few),) = told(found, "splits")
    assert {one.state for one in found if one.topic != "splits"} == {"ok"}
    assert state == "warning" and "So few to learn from" in few and "Plan for 60 or more" in few
    assert told(found, "cohort") == [("ok", "60 scans of 60 subjects.")]
    assert told(found, "covariates.sex") == [("ok", "30 F, 30 M.")]
    assert told(found, "covariates.age")[0][1].startswith("20 to 79 year")
    assert sum(cohort.splits.values()) == SUBJECTS and set(cohort.frame["split"]) == set(cohort.splits)


def test_levels_are_compared_both_ways(root):
    undeclared = {"age": {"unit": "year", "range": [18, 70]}, "sex": {"levels": ["F", "X"]}}
    found, _ = check.cohort(study(root, covariates=undeclared))
    (sex,), (age,) = told(found, "covariates.sex"), told(found, "covariates.age")
    assert sex[0] == "fail" and "the data have 'M' (30), which `levels` ['F', 'X'] does not name" in sex[1]
    assert age[0] == "fail" and "9 value(s)" in age[1] and "[18, 70]" in age[1]
    never_seen = {"sex": {"levels": ["F", "M", "X"]}}
    found, _ = check.cohort(
        study(root, covariates=never_seen, plan=[{"name": "x", "subjects": 1, "where": {"sex": "X"}}])
    )
    assert told(found, "covariates.sex")[1] == (
        "warning",
        "no scan has X, which is declared: nothing can be learnt of it.",
    )
    assert told(found, "plan.x") == [("fail", "asks for sex X, which no training scan has.")]


def test_what_was_excluded_cannot_be_asked_for(root, tmp_path):
    """All women are excluded by hand: a plan of women would be of nothing that was learnt."""
    _, cohort = check.cohort(study(root))
    women = cohort.frame.loc[cohort.frame["sex"] == "F", "scan_id"]
    table = tmp_path / "qc.tsv"
    table.write_text("scan_id\tdecision\n" + "".join(f"{name}\texclude\n" for name in women))
    asked = {
        "plan": [{"name": "x", "subjects": 3, "where": {"sex": "F"}}],
        "preprocess": {"shape": [16, 16, 16], "spacing_mm": 2, "exclude": str(table)},
    }
    found, _ = check.cohort(study(root, **asked))
    assert told(found, "plan.x") == [("fail", "asks for sex F, which no training scan has.")]
    assert "fail" in {state for state, _ in told(found, "covariates.sex")}
    table.write_text("scan_id\tdecision\nnobody\texclude\n")
    found, _ = check.cohort(study(root, **asked))
    ((state, text),) = told(found, "preprocess.exclude")
    assert state == "fail" and "nobody" in text


def test_given_weights_are_asked_which_covariates_they_know(root):
    """A few subjects suffice for what they know; with other covariates training would be refused after hours."""
    given = shipping.models_named("simulated-5mm")
    known = CovariateEncoding.from_json(read_json(given / "diffusion/card.json")["encoding"])
    start = {"init_from": {"path": str(given), "source": "x"}, "autoencoder": {"optimiser": {"steps": 0}}}
    found, _ = check.cohort(study(root, **start))
    ((state, text),) = told(found, "init_from")
    assert state == "fail" and all(name in text for name in known.names)
    assert "init_from.models: its network is then trained from nothing" in text
    theirs = read_json(given / "config.json")["covariates"]
    months = theirs | {"age": theirs["age"] | {"unit": "month", "range": [480, 1080]}}
    declared = {name: {key: value for key, value in each.items() if value is not None} for name, each in months.items()}
    simulated = {"cohort": {"source": "simulated"}, "covariates": declared}
    found, _ = check.cohort(study(root, **start | simulated))
    ((state, text),) = told(found, "init_from")
    assert state == "fail" and "covariates.age.unit: 'month'" in text and "learnt age in 'year'" in text
    alone = start["init_from"] | {"models": ["autoencoder"]}
    found, _ = check.cohort(study(root, **start | {"init_from": alone}))
    assert not told(found, "init_from")


def test_a_covariate_from_which_nothing_can_be_learnt(root):
    table = root / "participants.tsv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *(f"{line.split(chr(9))[0]}\tn/a\tF" for line in lines[1:])]) + "\n")
    found, _ = check.cohort(study(root))
    assert "fail" in {state for state, _ in told(found, "covariates.age")}
    assert "fail" in {state for state, _ in told(found, "covariates.sex")}


def test_the_column_of_texts_is_looked_for(root):
    found, cohort = check.cohort(study(root, text={"column": "report"}))
    assert cohort is None and found[0].state == "fail" and "'report'" in found[0].text
    table = root / "participants.tsv"
    first, *rows = table.read_text().splitlines()
    table.write_text("\n".join([f"{first}\treport", *(f"{row}\tNo mass." for row in rows)]) + "\n")
    _, cohort = check.cohort(study(root, text={"column": "report"}))
    assert (cohort.frame["text"] == "No mass.").all()


def test_what_is_missing_is_told_and_what_readers_warn_of(root):
    with open(root / "participants.tsv", "a") as table:
        table.write("sub-99\t30\tF\n")
    found, _ = check.cohort(study(root))
    assert any(state == "warning" and "sub-99" in text for state, text in told(found, "cohort"))
    found, cohort = check.cohort(study(root / "nowhere"))
    assert cohort is None and found[0].state == "fail" and "does not exist" in found[0].text
    found, _ = check.cohort(study(root, covariates={"iq": {"unit": "1", "range": [0, 1]}}))
    assert found[0].state == "fail" and "'iq'" in found[0].text and "age, sex" in found[0].text


@pytest.mark.parametrize(
    ("calibration", "enforce", "state"),
    [(59, "stop", "ok"), (59, "report", "warning"), (58, "stop", "fail"), (9, "report", "warning")],
)
def test_what_the_filter_can_promise(root, calibration, enforce, state):
    found = check.privacy(study(root, privacy={"enforce": enforce}), calibration)
    assert found.state == state
    assert ("FAIL would not stop" in found.text) is (calibration == 59 and enforce == "report")
    if calibration == 9:
        assert "Raise privacy.level to 0.3," in found.text
        raised = study(root, privacy={"level": 0.3})
        assert check.privacy(raised, calibration).state == "ok", "what is advised is not enough"


# ------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_a_header_is_told_along_the_axes_of_the_world(tmp_path, order):
    volume(tmp_path / "a.nii.gz", order=order)
    header = read_header(str(tmp_path / "a.nii.gz"))
    assert header.problem is None and header.size == (8, 10, 6) and header.spacing == pytest.approx((2, 2, 3))
    assert header.extent == pytest.approx([16, 20, 18])


def test_only_the_beginning_of_a_file_is_read(tmp_path):
    """A truncated image has a header; that the rest is gone is for preprocessing to find."""
    volume(tmp_path / "a.nii", size=(64, 64, 64))
    content = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content, 0)[:2000])
    assert read_header(str(tmp_path / "b.nii.gz")).size == (64, 64, 64)


def test_what_cannot_be_used_is_said(tmp_path):
    (tmp_path / "text.nii.gz").write_text("/annex/objects/SHA256E-s1--a.nii.gz\n")
    (tmp_path / "short.nii.gz").write_bytes(gzip.compress(b"x" * 1000)[:15])
    (tmp_path / "noise.nii.gz").write_bytes(b"x" * 1000)
    image = nib.Nifti1Image(np.zeros((4, 4, 4, 2), dtype=np.int16), np.eye(4))
    nib.save(image, tmp_path / "series.nii.gz")
    Image.new("L", (30, 20)).save(tmp_path / "picture.png")
    problems = [read_header(str(tmp_path / f"{name}.nii.gz")).problem for name in ("text", "short", "noise", "series")]
    for problem, said in zip(problems, ("datalad get", "not complete", "no format", "4 dimensions"), strict=True):
        assert problem is not None and said in problem
    assert "cannot be read" in (read_header(str(tmp_path / "none.nii.gz")).problem or "")
    assert read_header(str(tmp_path / "picture.png")).size == (20, 30)


def test_the_grid_is_compared_with_the_scans(root):
    _, cohort = check.cohort(study(root))
    steps = []
    found = check.headers(cohort.frame, lambda done, total: steps.append((done, total)))
    assert steps[-1] == (SUBJECTS, SUBJECTS) and not any(header.problem for header in found)

    def grid(**preprocess):
        return told(list(check.images(study(root, preprocess=preprocess), found)), "grid")

    assert grid(shape=[16, 16, 16], spacing_mm=2)[0][0] == "ok"
    assert grid(shape=[8, 8, 8], spacing_mm=1.3)[0][0] == "warning"
    state, text = grid(shape=[16, 16, 16], spacing_mm=0.2)[0]
    assert state == "fail" and text.startswith("3.2 x 3.2 x 3.2 mm") and "less than half" in text
    assert any("finer than" in text for _, text in grid(shape=[32, 32, 32], spacing_mm=1))
    assert grid(shape=[32, 32], spacing_mm=None)[0] == (
        "fail",
        f"preprocess.shape has 2 sides, but {found[0].path} and others are volumes.",
    )


def test_pictures_that_are_repeated_along_depth_are_volumes(root, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        Image.new("L", (64, 64)).save(path)
    found = [read_header(str(path)) for path in paths]
    shape = {"shape": [32, 32, 32], "spacing_mm": 2}
    deep = list(check.images(study(root, preprocess=shape | {"depth": 64}), found))
    assert {one.state for one in deep} == {"ok"} and "64x64x64 (3)" in told(deep, "scans")[0][1]
    assert "largest 64 x 64 x 64 mm" in told(deep, "grid")[0][1]
    ((state, text),) = told(list(check.images(study(root, preprocess=shape), found)), "grid")
    assert state == "fail" and "are pictures" in text


def test_damaged_scans_fail_where_too_many_are(root):
    _, cohort = check.cohort(study(root))
    for path in cohort.frame["path"][:2]:
        Path(path).write_bytes(b"nothing")
    found = check.headers(cohort.frame, lambda done, total: None)
    assert told(list(check.images(study(root), found)), "scans")[0][0] == "warning"
    strict = study(root, preprocess={"shape": [16, 16, 16], "spacing_mm": 2, "max_failed_share": 0.01})
    state, text = told(list(check.images(strict, found)), "scans")[0]
    assert state == "fail" and "2 of the 60" in text and "no format" in text


def test_masks_are_looked_for(root):
    pattern = str(root / "masks/{subject_id}.nii.gz")
    masked = study(root, preprocess={"shape": [16, 16, 16], "spacing_mm": 2, "brain_mask": pattern})
    _, cohort = check.cohort(masked)
    (missing,) = check.beside(masked, cohort.frame)
    assert missing.state == "fail" and "60 of 60" in missing.text and "sub-00.nii.gz" in missing.text
    (root / "masks").mkdir()
    for subject in cohort.frame["subject_id"]:
        (root / "masks" / f"{subject}.nii.gz").touch()
    (there,) = check.beside(masked, cohort.frame)
    assert there.state == "ok"


def test_the_package_that_takes_brains_out_is_looked_for(root, monkeypatch):
    heads = study(root, preprocess={"shape": [16, 16, 16], "spacing_mm": 2, "brain_extraction": "deepbet"})
    _, cohort = check.cohort(heads)
    monkeypatch.setattr(check, "extraction_installed", lambda: False)
    (missing,) = check.beside(heads, cohort.frame)
    assert missing.state == "fail" and "pip install 'meddiff-steps[brain-extraction]'" in missing.text
    monkeypatch.setattr(check, "extraction_installed", lambda: True)
    assert not list(check.beside(heads, cohort.frame))


def test_a_licence_without_a_text_is_warned_of(root):
    for release, state in (
        ({"licence": "CC-BY-4.0"}, "ok"),
        ({"licence": "Ours"}, "warning"),
        ({"licence": "Ours", "licence_text": "All may use it."}, "ok"),
    ):
        found = check.licence(study(root, release=release))
        assert found.state == state and release["licence"] in found.text
    given_away = check.licence(study(root))
    assert given_away.state == "warning" and given_away.text.startswith("CC0 gives all rights away")
    assert check.licence(study(root, cohort={"source": "simulated"})).state == "ok"


def test_a_sample_is_spread_over_all():
    assert spread(list(range(1000)), 5) == [0, 250, 500, 749, 999]
    assert spread([1, 2], 5) == [1, 2]


# ----------------------------------------------------------------------------------------------------- machine

JOBS = [
    {"rule": "cohort", "threads": 1, "mem_mb": 1000, "runtime": 60, "gpu": 0},
    {"rule": "diffusion", "threads": 8, "mem_mb": 9000, "runtime": 4320, "gpu": 1},
]


def states(study, here):
    return {one.topic: one.state for one in check.needs(study, JOBS, here)}


def test_jobs_are_compared_with_the_machine(root):
    small, large = Machine(2, 8000), Machine(16, 64000, 1, 80000)
    assert states(study(root), large) == {"jobs": "ok", "memory": "ok", "GPU": "ok"}
    assert states(study(root), small) == {"jobs": "ok", "memory": "fail", "GPU": "ok"}
    assert states(study(root, compute={"device": "cuda"}), small)["GPU"] == "fail"
    elsewhere = list(check.needs(study(root, compute={"device": "cuda"}), JOBS, None))
    assert {one.state for one in elsewhere} == {"ok"}
    assert any("72 h (diffusion)" in one.text for one in elsewhere)


def test_room_on_the_disk(root, tmp_path):
    asked = study(root, results=str(tmp_path))
    assert check.disk(asked, 60, 200, [], 10**9).state == "ok"
    short = check.disk(asked, 60, 200, [Expected("images", 2, 1.5, 2e9)], 10**9)
    assert short.state == "fail" and "about 2.00 GB" in short.text
    assert free_bytes(tmp_path / "not/there/yet") > 0
    assert this_machine().cores >= 1 and this_machine().memory_mb > 0


def test_hours_are_told_where_they_are_known(root):
    assert "not known" in check.time([], None).text
    assert "about 3.0 hours" in check.time([Expected("images", 2, 1.5, 0)], Path("results/demo")).text


def test_a_simulated_cohort_is_counted_about_and_has_its_own_levels(root):
    content = {
        "cohort": {"source": "simulated", "subjects": 1000},
        "covariates": {"diagnosis": {"levels": ["control", "case", "rare"]}},
    }
    found, _ = check.cohort(study(root, **content, plan=[{"name": "a", "subjects": 2, "where": {"diagnosis": "rare"}}]))
    assert told(found, "splits")[0][1].startswith("about 600 train")
    assert told(found, "plan.a") == [("fail", "asks for diagnosis rare, and simulated subjects are control or case.")]
    found, _ = check.cohort(study(root, **content, plan=[{"name": "a", "subjects": 2, "where": {"diagnosis": "case"}}]))
    assert not told(found, "plan.a")


def test_what_is_asked_for_is_what_is_checked(monkeypatch):
    """A study that releases nothing needs no filter, and takes what its targets take."""
    path = Path(__file__).parents[2] / "config/studies/simulated_lesions.yaml"
    monkeypatch.chdir(path.parents[2])
    asked = load_study(path)
    whole, part = (list(findings(asked, path, targets, None, True)) for targets in ([], ["segmentation"]))
    assert told(whole, "privacy") and told(whole, "release.licence")
    assert not told(part, "privacy") and not told(part, "release.licence")
    assert "translation_model" not in told(part, "time")[0][1] and "segmentation_model" in told(part, "time")[0][1]
    jobs = [int(told(found, "jobs")[0][1].split()[0]) for found in (whole, part)]
    assert jobs[1] == 6 < jobs[0]


def test_a_target_that_reads_no_scan_is_checked_without_a_cohort(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "shapes.yaml"
    path.write_text((Path(__file__).parents[2] / "config/studies/simulated_shapes.yaml").read_text())
    asked = load_study(path)
    (first, missing) = findings(asked, path, ["shape_completion"], None, True)
    assert first.state == "ok" and missing.state == "fail"
    assert missing.text.startswith("shape_completion.points: build/brains.npz is not there. Relative paths start at")
    (tmp_path / "build").mkdir()
    (tmp_path / "build/brains.npz").touch()
    broken = list(findings(asked, path, ["shape_completion"], None, True))
    assert told(broken, "shapes")[0][0] == "fail" and not told(broken, "time")
    points, missing = np.random.default_rng(0).uniform(0, 90, (40, 64, 3)), np.zeros((40, 64), bool)
    missing[:, :16] = True
    np.savez(tmp_path / "build/brains.npz", points_mm=points, missing=missing, ids=[f"shape{i}" for i in range(40)])
    found = list(findings(asked, path, ["shape_completion"], None, True))
    assert {one.topic for one in found} == {"study", "shapes", "time", "jobs", "memory", "GPU", "limits"}
    assert all(one.state == "ok" for one in found)
    assert told(found, "shapes")[0][1] == "40 of 64 points, 16 of them missing, in build/brains.npz."
    assert "shape_completion/train" in told(found, "time")[0][1]
