"""The BIDS reader: what it finds, and what it says when a dataset is not as it should be."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meddiff_steps.cohort.bids import BidsName, read_bids
from meddiff_steps.config import BidsSource, CategoricalCovariate, ContinuousCovariate, Covariates
from meddiff_steps.core.errors import UserError

COVARIATES: Covariates = {
    "age": ContinuousCovariate(unit="year", range=(18, 100)),
    "sex": CategoricalCovariate(levels=["F", "M"]),
}

IXI = Path(os.environ.get("MEDDIFF_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "ixi"


def touch(path: Path) -> None:
    """The reader looks at names only, so empty files will do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two subjects: one image, and two sessions of which one has two runs; age changes between the sessions."""
    top = tmp_path / "study"
    write(top / "participants.tsv", "participant_id\tsex\tage\nsub-01\tF\t50\nsub-02\tn/a\t60\n")
    touch(top / "sub-01/anat/sub-01_T1w.nii.gz")
    touch(top / "sub-01/anat/sub-01_T1w.json")
    touch(top / "sub-01/anat/._sub-01_T1w.nii.gz")
    touch(top / "sub-01/anat/sub-01_T2w.nii.gz")
    touch(top / "sub-01/func/sub-01_task-rest_bold.nii.gz")
    touch(top / "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii")
    touch(top / "sub-02/ses-2/anat/sub-02_ses-2_acq-mprage_run-1_T1w.nii.gz")
    touch(top / "sub-02/ses-2/anat/sub-02_ses-2_acq-mprage_run-2_T1w.nii.gz")
    write(top / "sub-02/sub-02_sessions.tsv", "session_id\tage\nses-1\tn/a\nses-2\t63\n")
    touch(top / "derivatives/masks/sub-01/anat/sub-01_T1w.nii.gz")
    return top


def read(root: Path, covariates: Covariates = COVARIATES, **fields: Any) -> Any:
    return read_bids(BidsSource.model_validate({"source": "bids", "root": str(root), **fields}), covariates)


def test_sessions_and_runs_are_scans_and_sessions_tsv_overrides_participants_tsv(root: Path) -> None:
    frame = read(root)
    assert list(frame.columns) == ["scan_id", "subject_id", "session_id", "path", "age", "sex"]
    assert frame.drop(columns="path").to_numpy().tolist() == [
        ["sub-01", "sub-01", None, "50", "F"],
        ["sub-02_ses-1", "sub-02", "ses-1", "60", "n/a"],  # n/a of a session says nothing against a value
        ["sub-02_ses-2_acq-mprage_run-1", "sub-02", "ses-2", "63", "n/a"],
        ["sub-02_ses-2_acq-mprage_run-2", "sub-02", "ses-2", "63", "n/a"],
    ]
    assert frame["path"][0] == f"{root}/sub-01/anat/sub-01_T1w.nii.gz"


def test_a_level_that_looks_like_a_missing_value_overrides_participants_tsv(root: Path) -> None:
    write(root / "participants.tsv", "participant_id\tregion\nsub-01\tEU\nsub-02\tEU\n")
    write(root / "sub-02/sub-02_sessions.tsv", "session_id\tregion\nses-1\tNA\nses-2\tnull\n")
    frame = read(root, {"region": CategoricalCovariate(levels=["EU", "NA"])})
    assert frame["region"].tolist() == ["EU", "NA", "EU", "EU"]


def test_filters(root: Path) -> None:
    assert read(root, suffix="T2w")["scan_id"].tolist() == ["sub-01"]
    assert read(root, datatype="func", suffix="bold")["scan_id"].tolist() == ["sub-01_task-rest"]
    assert read(root, entities={"acq": "mprage", "run": "2"})["scan_id"].tolist() == ["sub-02_ses-2_acq-mprage_run-2"]


def test_paths_start_as_the_root_was_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    assert read(Path("study"))["path"][0] == "study/sub-01/anat/sub-01_T1w.nii.gz"


def test_covariate_may_have_another_column_and_live_in_sessions_tsv_only(root: Path) -> None:
    write(root / "sub-02/sub-02_sessions.tsv", "session_id\tmmse score\nses-2\t28\n")
    frame = read(root, {"mmse": ContinuousCovariate(unit="point", range=(0, 30), column="mmse score")})
    assert frame["mmse"].tolist() == [None, None, "28", "28"]


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_read(root: Path) -> None:
    (root / "participants.tsv").write_bytes(
        b"\xef\xbb\xbfparticipant_id\tage\tsex\r\nsub-01\t50\tF\r\nsub-02\t60\tM\r\n\r\n"
    )
    assert read(root)["sex"].tolist() == ["F", "M", "M", "M"]


def test_rows_without_directory_and_sessions_without_row_are_warnings(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(root / "participants.tsv", "participant_id\tsex\tage\nsub-01\tF\t50\nsub-02\tM\t60\nsub-99\tM\t60\n")
    write(root / "sub-02/sub-02_sessions.tsv", "session_id\tage\nses-1\t61\n")
    with caplog.at_level(logging.WARNING):
        frame = read(root)
    assert frame["age"].tolist() == ["50", "61", "60", "60"]
    assert "sub-99" in caplog.text and "sub-02_ses-2_acq-mprage_run-1" in caplog.text


def test_a_subject_without_matching_image_is_left_out_and_needs_no_row(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(root / "sub-emptyroom/meg/sub-emptyroom_meg.nii.gz")
    with caplog.at_level(logging.WARNING):
        assert read(root, suffix="T2w")["subject_id"].tolist() == ["sub-01"]
    assert "sub-02" in caplog.text and "left out" in caplog.text


@pytest.mark.parametrize(
    "name", ["README", "sub-01_T1w.json", "sub-01_T1w.nii.gz.part", ".sub-01_T1w.nii.gz", "T1w.nii.gz"]
)
def test_other_files_are_no_images(name: str) -> None:
    assert BidsName.parse(name) is None


# ------------------------------------------------------------------------------------------------ mixtures


def test_run_numbers_compare_as_numbers_and_labels_as_text(root: Path) -> None:
    (root / "sub-01/anat/sub-01_T1w.nii.gz").rename(root / "sub-01/anat/sub-01_run-01_T1w.nii.gz")
    found = read(root, entities={"run": 1})["scan_id"].tolist()
    assert found == ["sub-01_run-01", "sub-02_ses-2_acq-mprage_run-1"]
    assert not BidsName("", {"acq": "01"}, "T1w").carries({"acq": "1"})


def test_entities_ask_for_absence_and_for_several(root: Path) -> None:
    assert read(root, entities={"acq": None})["scan_id"].tolist() == ["sub-01", "sub-02_ses-1"]
    assert len(read(root, entities={"acq": [None, "mprage"]})) == 4
    with pytest.raises(UserError, match=r"Entities of these: acq-mprage \(2\)"):
        read(root, entities={"acq": ["spgr", "memprage"]})


def test_labels_that_are_nearly_asked_for_are_told(root: Path) -> None:
    with pytest.raises(UserError, match=r"Labels count to the letter: acq-mprage is not acq-MPRAGE\."):
        read(root, entities={"acq": "MPRAGE"})
    with pytest.raises(UserError, match=r"Labels count to the letter: ses-1 is not ses-01\."):
        read(root, entities={"ses": "01"})


def test_an_empty_root_was_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"directory is empty: with DataLad .*`datalad get -n`"):
        read(tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        "space-MNI152NLin2009cAsym",
        "desc-preproc",
        "part-phase",
        "rec-norm",
        "echo-2",
        "inv-1",
        "ce-gad",
        "acq-defaced",
        "defaced",
    ],
)
def test_images_of_several_kinds_are_not_mixed(root: Path, other: str) -> None:
    """Beside each other in a session: two versions of one scan."""
    touch(root / f"sub-01/anat/sub-01_{other}_T1w.nii.gz")
    key, _, label = other.partition("-")
    with pytest.raises(UserError) as refusal:
        read(root)
    assert f"  {key}: none (" in str(refusal.value) and f"{{{key}: null}}" in str(refusal.value)
    assert read(root, entities={key: None})["scan_id"][0] == "sub-01"
    kept = read(root, entities={key: [None, label]} | ({"acq": [None, "mprage", label]} if key == "acq" else {}))
    assert len(kept) == 5 - 2 * (key == "acq" and label != "defaced")


def test_kinds_that_lie_in_different_subjects_are_a_mixture_too(root: Path) -> None:
    (root / "sub-01/anat/sub-01_T1w.nii.gz").rename(root / "sub-01/anat/sub-01_space-MNI_T1w.nii.gz")
    with pytest.raises(UserError, match=r"space: none \(3\), 'MNI' \(1\)"):
        read(root)


def test_the_choice_that_is_shown_is_one_that_matches(root: Path) -> None:
    """No image is without the entity, so that null would leave none."""
    for number, path in enumerate(sorted(root.glob("sub-*/**/anat/*_T1w.nii*"))):
        ending = path.name.removeprefix(path.name.partition("_T1w")[0])
        stem = path.name.removesuffix(ending).split("_acq-")[0].split("_run-")[0]
        path.rename(path.with_name(f"{stem}_space-{'MNI' if number % 2 else 'T1w'}{ending}"))
    with pytest.raises(UserError) as refusal:
        read(root)
    assert "{space: MNI}" in str(refusal.value) and "--entity space=MNI" in str(refusal.value)
    assert "null" not in str(refusal.value)
    assert len(read(root, entities={"space": "MNI"})) > 0


def test_what_was_found_is_told_per_entity(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        read(root)
    assert "entities of the 4 images: acq: none (2), 'mprage' (2); run: none (2), '1' (1), '2' (1)" in caplog.text


# ------------------------------------------------------------------------------ ids, and files that look missing


def test_tables_and_directories_spell_ids_alike_or_are_joined(root: Path) -> None:
    write(root / "participants.tsv", "participant_id\tsex\tage\nsub-1\tF\t50\nsub-02\tM\t60\n")
    write(root / "sub-02/sub-02_sessions.tsv", "session_id\tage\nses-01\t61\nses-02\t63\n")
    with pytest.raises(UserError, match=r"participants\.tsv: 1 row.* sub-1 for sub-01.* leading zeros.*alike_ids"):
        read(root)
    assert read(root, alike_ids="join")["age"].tolist() == ["50", "61", "63", "63"]
    with pytest.raises(UserError, match=r"lists ses-01, ses-02, but the directories are ses-1, ses-2"):
        read(root, alike_ids="distinct")


def test_capitals_of_extensions_do_not_matter(root: Path) -> None:
    (root / "sub-01/anat/sub-01_T1w.nii.gz").rename(root / "sub-01/anat/sub-01_T1w.NII.GZ")
    frame = read(root)
    assert len(frame) == 4 and frame["path"][0].endswith("sub-01_T1w.NII.GZ") and frame["scan_id"][0] == "sub-01"


def test_who_is_left_out_is_told_with_what_there_is_instead(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "sub-01/anat/sub-01_T1w.nii.gz").rename(root / "sub-01/anat/sub-01_t1w.nii.gz")
    with caplog.at_level(logging.WARNING):
        read(root)
    assert "Seen there: anat/T2w, anat/t1w, func/task-rest_bold" in caplog.text
    for file in (root / "sub-01").rglob("*.nii.gz"):
        file.unlink()
    caplog.clear()
    read(root)
    assert "Their directories hold no image; with DataLad, run `datalad get`" in caplog.text


def test_bids_quotes_around_cells_are_read(root: Path) -> None:
    write(
        root / "participants.tsv",
        '"participant_id"\t"age"\tnote\t"sex"\n"sub-01"\t50\t"moved\ta lot"\t"F"\nsub-02\t60\t5" tall\tM\n\t\t\t\n',
    )
    assert read(root)["sex"].tolist() == ["F", "M", "M", "M"]


def participants(text: str) -> Callable[[Path], object]:
    return lambda root: write(root / "participants.tsv", text)


def sessions(text: str) -> Callable[[Path], object]:
    return lambda root: write(root / "sub-02/sub-02_sessions.tsv", text)


#: How the dataset is spoilt, and what the message must contain: the file or field, what was found, and the remedy.
SPOILT: list[tuple[str, Callable[[Path], object], list[str]]] = [
    (
        "root is missing",
        lambda r: r.rename(r.parent / "elsewhere"),
        ["cohort.root", "study", "does not exist", "Set it to"],
    ),
    ("no participants.tsv", lambda r: (r / "participants.tsv").unlink(), ["participants.tsv", "not there", "Add it"]),
    ("empty participants.tsv", participants(""), ["participants.tsv", "empty", "header"]),
    (
        "participants.tsv with commas",
        participants("participant_id,age,sex\nsub-01,50,F\n"),
        ["participants.tsv", "participant_id,age,sex", "tabs"],
    ),
    (
        "no participant_id",
        participants("id\tage\tsex\nsub-01\t50\tF\n"),
        ["participants.tsv", "no column 'participant_id'", "id, age, sex", "Add the column"],
    ),
    (
        "participant without prefix",
        participants("participant_id\tage\tsex\n01\t50\tF\n"),
        ["participants.tsv, line 2", "'01'", "Write sub-01"],
    ),
    (
        "participant without prefix and zero",
        participants("participant_id\tage\tsex\n1\t50\tF\n"),
        ["participants.tsv, line 2", "'1'", "Write sub-01"],
    ),
    (
        "row without participant",
        participants("participant_id\tage\tsex\nsub-01\t50\tF\n\t60\tM\n"),
        ["participants.tsv, line 3", "''", "remove the row"],
    ),
    (
        "participant_id with capitals",
        participants("Participant_ID\tage\tsex\nsub-01\t50\tF\n"),
        ["no column 'participant_id'", "Rename 'Participant_ID'"],
    ),
    (
        "Participants.tsv",
        lambda r: (r / "participants.tsv").rename(r / "Participants.tsv"),
        ["participants.tsv: not there", "There is Participants.tsv: rename it"],
    ),
    (
        "participant twice, spelt in two ways",
        participants("participant_id\tage\tsex\nsub-01\t50\tF\nsub-02\t60\tM\nsub-2\t61\tM\n"),
        ["participants.tsv", "sub-2 for sub-02", "alike_ids"],
    ),
    (
        "participants without directory, spelt in two ways",
        participants("participant_id\tage\tsex\nsub-01\t50\tF\nsub-02\t60\tM\nsub-A\t61\tM\nsub-a\t61\tM\n"),
        ["participants.tsv", "sub-A and sub-a differ in spelling alone"],
    ),
    (
        "sessions spelt in another way",
        sessions("session_id\tage\nses-01\t50\nses-02\t51\n"),
        ["sub-02_sessions.tsv", "ses-01 for ses-1, ses-02 for ses-2", "alike_ids"],
    ),
    (
        "sessions that do not exist",
        sessions("session_id\tage\nses-baseline\t50\n"),
        ["sub-02_sessions.tsv", "lists ses-baseline", "ses-1, ses-2", "as the directories are called"],
    ),
    (
        "one run under two numbers",
        lambda r: touch(r / "sub-02/ses-2/anat/sub-02_ses-2_acq-mprage_run-01_T1w.nii.gz"),
        ["run-01 and sub-02_ses-2_acq-mprage_run-1", "one image", "Remove or rename"],
    ),
    (
        "directory of a subject in capitals",
        lambda r: (r / "sub-02").rename(r / "SUB-02"),
        ["SUB-02", "capitals count", "Rename it sub-02"],
    ),
    (
        "participants.tsv not fetched",
        participants("/annex/objects/MD5E-s12--0123.tsv\n"),
        ["participants.tsv", "pointer of git-annex", "datalad get"],
    ),
    (
        "participants.tsv is a link to nothing",
        lambda r: ((r / "participants.tsv").unlink(), (r / "participants.tsv").symlink_to(".git/annex/objects/x")),
        ["participants.tsv", "link to nothing", "datalad get"],
    ),
    (
        "duplicate participant",
        participants("participant_id\tage\tsex\nsub-01\t50\tF\nsub-02\t60\tM\nsub-01\t51\tF\n"),
        ["participants.tsv", "sub-01 occurs more than once", "Keep one row", "sessions.tsv"],
    ),
    (
        "short row",
        participants("participant_id\tage\tsex\nsub-01\t50\n"),
        ["participants.tsv, line 2", "2 cells", "header has 3", "n/a"],
    ),
    (
        "long row",
        participants("participant_id\tage\tsex\nsub-01\t50\tF\t\n"),
        ["participants.tsv, line 2", "4 cells", "header has 3", "a delimiter at the end counts"],
    ),
    (
        "another Unicode form",
        lambda r: write(
            r / "participants.tsv", "participant_id\tage\tsex\nsub-01\t50\tF\nsub-02\t60\tM\nsub-\uff10\uff11\t60\tM\n"
        ),
        [r"'sub-\uff10\uff11'", "for sub-01"],
    ),
    (
        "repeated column",
        participants("participant_id\tage\tage\nsub-01\t50\t50\n"),
        ["participants.tsv", "column age", "more than once", "Rename"],
    ),
    (
        "not UTF-8",
        lambda r: (r / "participants.tsv").write_bytes(b"participant_id\tage\xff\n"),
        ["participants.tsv", "UTF-8", "Save it"],
    ),
    (
        "subject without row",
        participants("participant_id\tage\tsex\nsub-01\t50\tF\n"),
        ["participants.tsv", "no row for 1 subject(s)", "sub-02", "Add the rows"],
    ),
    (
        "covariate column missing",
        participants("participant_id\tAge\nsub-01\t50\nsub-02\t60\n"),
        ["participants.tsv", "covariates.sex", "Age", "column"],
    ),
    (
        "no session_id",
        sessions("session\tage\nses-1\t50\n"),
        ["sub-02_sessions.tsv", "no column 'session_id'", "session, age", "ses-01"],
    ),
    (
        "duplicate session",
        sessions("session_id\tage\nses-1\t50\nses-1\t51\n"),
        ["sub-02_sessions.tsv", "ses-1 occurs more than once", "Keep one row"],
    ),
    (
        "wrong directory",
        lambda r: touch(r / "sub-01/anat/sub-02_T1w.nii.gz"),
        ["sub-01/anat/sub-02_T1w.nii.gz", "must start with sub-01", "rename"],
    ),
    (
        "wrong session",
        lambda r: touch(r / "sub-02/ses-1/anat/sub-02_T1w.nii.gz"),
        ["sub-02_T1w.nii.gz", "must start with sub-02_ses-1", "rename"],
    ),
    (
        "both .nii and .nii.gz",
        lambda r: touch(r / "sub-01/anat/sub-01_T1w.nii"),
        ["sub-01", "both as .nii and as .nii.gz", "Remove one"],
    ),
]


@pytest.mark.parametrize(("spoil", "expected"), [pytest.param(s, e, id=name) for name, s, e in SPOILT])
def test_spoilt_datasets_are_refused_with_a_remedy(
    root: Path, spoil: Callable[[Path], object], expected: list[str]
) -> None:
    spoil(root)
    with pytest.raises(UserError) as refusal:
        read(root)
    for part in expected:
        assert part in str(refusal.value)


def test_a_root_that_is_a_file_is_refused(root: Path) -> None:
    with pytest.raises(
        UserError, match=r"cohort\.root: .*participants\.tsv is a file, expected the directory .* Name the directory"
    ):
        read(root / "participants.tsv")


def test_the_parent_of_a_dataset_points_to_the_dataset(root: Path) -> None:
    with pytest.raises(UserError, match=r"There is one in study: set cohort\.root to that directory"):
        read(root.parent)


def test_no_match_lists_the_suffixes_seen(root: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"cohort\.suffix 'FLAIR'.* Seen: anat/T1w \(4\), anat/T2w \(1\), func/bold \(1\)\. Set the filter",
    ):
        read(root, suffix="FLAIR")


def test_no_match_lists_the_entities_seen(root: Path) -> None:
    with pytest.raises(
        UserError, match=r"\{'acq': 'spgr'\}.* Entities of these: acq-mprage \(2\), run-1 \(1\), run-2 \(1\)"
    ):
        read(root, entities={"acq": "spgr"})


def test_a_dataset_without_images_says_so(tmp_path: Path) -> None:
    write(tmp_path / "participants.tsv", "participant_id\tage\tsex\nsub-01\t50\tF\n")
    with pytest.raises(UserError, match=r"no sub-\* directories.*Set cohort\.root"):
        read(tmp_path)
    (tmp_path / "sub-01/anat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no \.nii or \.nii\.gz image in any of the 1 sub-\* directories.*downloaded"):
        read(tmp_path)
    touch(tmp_path / "sub-01/anat/sub-01_T1w.mgz")
    with pytest.raises(UserError, match=r"Seen: \.mgz \(1\)\. Convert the images to NIfTI"):
        read(tmp_path)


def test_reading_takes_far_less_than_a_millisecond_per_subject(tmp_path: Path) -> None:
    """10,000 subjects in a second or two; the bound leaves room for a busy machine."""
    subjects = [f"sub-{i:04}" for i in range(1000)]
    write(tmp_path / "participants.tsv", "participant_id\tage\tsex\n" + "".join(f"{s}\t50\tF\n" for s in subjects))
    for subject in subjects:
        touch(tmp_path / f"{subject}/anat/{subject}_T1w.nii.gz")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert len(read(tmp_path)) == 1000
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


@pytest.mark.skipif(not IXI.is_dir(), reason=f"real data not found at {IXI}; set MEDDIFF_SHARED_DATA")
def test_the_real_dataset() -> None:
    frame = read(
        IXI, COVARIATES | {"brain_ml": ContinuousCovariate(unit="mL", range=(500, 2500), column="total_brain_ml")}
    )
    assert len(frame) == frame["subject_id"].nunique() == 185
    assert (frame["age"] == "n/a").sum() == (frame["sex"] == "n/a").sum() == 4
