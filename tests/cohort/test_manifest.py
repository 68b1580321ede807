"""The manifest and the step that writes it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from meddiff_steps.cohort.manifest import build_manifest, content_digest, digest_file, read_manifest, write_manifest
from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate, Covariates, Splits, freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.channels import filled_in
from meddiff_steps.steps.cohort import run

COVARIATES: Covariates = {
    "age": ContinuousCovariate(unit="year", range=(18, 100)),
    "sex": CategoricalCovariate(levels=["F", "M"]),
}
HALVES = Splits(train=0.5, val=0.0, calibration=0.0, test=0.5)


def volume(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, (4, 5, 6)).astype(np.int16)


def nifti_bytes(array: np.ndarray, kind: type = nib.Nifti1Image, slope: float | None = None) -> bytes:
    image = kind(array, np.diag([2.0, 2.0, 2.0, 1.0]))
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    return image.to_bytes()


@pytest.fixture
def frame(tmp_path: Path) -> pd.DataFrame:
    """Twelve subjects with a scan each, in no particular order."""
    rows = []
    for i in np.random.default_rng(0).permutation(12).tolist():
        path = tmp_path / f"sub-{i:02}.nii.gz"
        path.write_bytes(gzip.compress(nifti_bytes(volume(i)), mtime=0))
        age = "n/a" if i == 3 else str(40 + i)
        rows.append(
            {
                "scan_id": f"sub-{i:02}",
                "subject_id": f"sub-{i:02}",
                "session_id": None,
                "path": str(path),
                "age": age,
                "sex": "FM"[i % 2],
            }
        )
    return pd.DataFrame(rows)


def build(frame: pd.DataFrame, splits: Splits = HALVES, **options: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
    return build_manifest(frame, COVARIATES, splits, "meddiff", source="bids", **options)


# ------------------------------------------------------------------------------------------------- digests


def test_content_is_the_same_whatever_the_container(tmp_path: Path) -> None:
    array = volume(0)
    plain = nifti_bytes(array)
    big_endian = nib.Nifti1Header(endianness=">")
    big_endian.set_data_dtype(np.int16)
    files = {
        "plain.nii": plain,
        "fast.nii.gz": gzip.compress(plain, 1, mtime=1),
        "best.nii.gz": gzip.compress(plain, 9, mtime=2),
        "unpacked.nii.gz": plain,
        "second.nii": nifti_bytes(array, nib.Nifti2Image),
        "scaled.nii": nifti_bytes(array, slope=2.0),
        "big.nii": nib.Nifti1Image(array, np.eye(4), big_endian).to_bytes(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    digests = {name: digest_file(str(tmp_path / name)) for name in files}
    assert files["big.nii"][:4] == (348).to_bytes(4, "big")
    assert {d.content_sha256 for d in digests.values()} == {content_digest(array)}
    assert digests["plain.nii"].sha256 == hashlib.sha256(plain).hexdigest() != digests["fast.nii.gz"].sha256


@pytest.mark.parametrize(
    "other",
    [volume(1), volume(0).astype(np.int32), volume(0).reshape(5, 4, 6), volume(0)[::-1], volume(0)[..., None]],
    ids=["values", "dtype", "shape", "flip", "axis"],
)
def test_content_differs_with_values_dtype_and_shape(other: np.ndarray) -> None:
    assert content_digest(volume(0)) != content_digest(other)


def test_content_does_not_depend_on_memory_layout_or_byte_order() -> None:
    array = volume(0)
    assert (
        content_digest(array)
        == content_digest(np.asfortranarray(array))
        == content_digest(array.astype(">i2"))
        == content_digest(array.repeat(2, 0)[::2])
    )


@pytest.mark.parametrize("empty", [np.zeros((0, 3)), np.zeros((), np.float32), np.zeros((2, 2), bool)])
def test_content_of_odd_arrays(empty: np.ndarray) -> None:
    assert len(content_digest(empty)) == 64


def test_pictures_are_decoded(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (8, 9), dtype=np.uint8)
    for level in (0, 9):
        Image.fromarray(array).save(tmp_path / f"{level}.png", compress_level=level)
    Image.fromarray(array).save(tmp_path / "x.JPG", format="JPEG")
    first, second, jpeg = (digest_file(str(tmp_path / name)) for name in ("0.png", "9.png", "x.JPG"))
    assert first.content_sha256 == second.content_sha256 == content_digest(array) and first.sha256 != second.sha256
    assert jpeg.content_sha256 not in (None, first.content_sha256)


def test_palettes_count(tmp_path: Path) -> None:
    indices = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P")
    for name, colours in (("a", range(256)), ("b", reversed(range(256)))):
        indices.putpalette([c for value in colours for c in (value, value, value)])
        indices.save(tmp_path / f"{name}.png")
    assert digest_file(str(tmp_path / "a.png")).content_sha256 != digest_file(str(tmp_path / "b.png")).content_sha256


def test_dicom_pixels_are_decoded(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="pydicom is optional")
    source = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    source.save_as(tmp_path / "a.dcm")
    assert digest_file(str(tmp_path / "a.dcm")).content_sha256 == content_digest(source.pixel_array)


def png_cut_short() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(stream, format="PNG")
    return stream.getvalue()[:-500]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.nii.gz", gzip.compress(nifti_bytes(volume(0)))[:-40]),
        ("cut.nii", nifti_bytes(volume(0))[:-10]),
        ("empty.nii.gz", b""),
        ("text.nii", b"not an image" * 100),
        ("cut.png", png_cut_short()),
        ("text.jpg", b"not an image"),
    ],
)
def test_damaged_files_have_bytes_but_no_content(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    digest = digest_file(str(tmp_path / name))
    assert digest.content_sha256 is None and digest.problem
    assert digest.sha256 == hashlib.sha256(data).hexdigest()


# --------------------------------------------------------------------------------------------------- build


def test_manifest_follows_the_contract(frame: pd.DataFrame) -> None:
    manifest, card = build(frame)
    assert list(manifest.columns) == [
        "scan_id",
        "subject_id",
        "session_id",
        "path",
        "sha256",
        "content_sha256",
        "split",
        "age",
        "sex",
    ]
    assert manifest["scan_id"].tolist() == [f"sub-{i:02}" for i in range(12)]
    for i, row in enumerate(manifest.itertuples()):
        assert row.sha256 == hashlib.sha256(Path(str(row.path)).read_bytes()).hexdigest()
        assert row.content_sha256 == content_digest(volume(i))
    assert manifest["age"].dtype == "float64" and manifest["age"].isna().sum() == 1
    assert card["scans"] == card["subjects"] == card["sessions"] == 12
    assert card["source"] == "bids" and card["simulated"] is False
    assert card["covariates"]["age"] | {"mean": 0, "std": 0} == {
        "kind": "continuous",
        "unit": "year",
        "range": [18.0, 100.0],
        "n": 11,
        "missing": 1,
        "min": 40.0,
        "max": 51.0,
        "mean": 0,
        "std": 0,
    }
    assert card["covariates"]["sex"]["levels"]["F"] == {"n": 6, "share": 0.5}
    assert sum(split["scans"] for split in card["splits"].values()) == 12
    assert card["duplicates"] == card["united_subjects"] == [] and card["undecodable"] == {}
    assert build_manifest(frame, COVARIATES, HALVES, "meddiff", source="simulated")[1]["simulated"] is True


def test_row_order_and_threads_do_not_matter(frame: pd.DataFrame) -> None:
    first, second = build(frame, threads=1), build(frame[::-1], threads=2)
    pd.testing.assert_frame_equal(first[0], second[0])
    assert json.dumps(first[1]) == json.dumps(second[1])


def test_people_who_share_an_image_share_a_split(frame: pd.DataFrame) -> None:
    manifest, _ = build(frame)
    trained = manifest[manifest["split"] == "train"].iloc[0]
    tested = manifest[manifest["split"] == "test"].iloc[0]
    Path(str(tested["path"])).write_bytes(gzip.compress(gzip.decompress(Path(str(trained["path"])).read_bytes()), 1))
    again, card = build(frame)
    pair = sorted([trained["scan_id"], tested["scan_id"]])
    assert card["duplicates"] == card["united_subjects"] == [pair]
    assert again.set_index("scan_id").loc[pair, "split"].tolist() == ["train", "train"]
    others = ~manifest["scan_id"].isin(pair)
    assert again["split"][others].tolist() == manifest["split"][others].tolist()


def test_copies_within_a_subject_are_reported_and_unite_nobody(frame: pd.DataFrame) -> None:
    copy = frame.assign(scan_id=frame["scan_id"] + "_run-2")
    manifest, card = build(pd.concat([frame, copy], ignore_index=True))
    assert (
        card["duplicates"] == [[f"sub-{i:02}", f"sub-{i:02}_run-2"] for i in range(12)]
        and card["united_subjects"] == []
    )
    assert manifest.groupby("subject_id")["split"].nunique().max() == 1


def test_undecodable_scans_stay_in_the_manifest_and_are_no_duplicates(frame: pd.DataFrame) -> None:
    for path in frame["path"][:2]:
        Path(path).write_bytes(b"damaged")
    manifest, card = build(frame)
    assert len(manifest) == 12 and manifest["content_sha256"].isna().sum() == 2
    assert sorted(card["undecodable"]) == sorted(frame["scan_id"][:2]) and card["duplicates"] == []


def test_ids_that_differ_in_spelling_alone_are_refused_joined_or_distinct(frame: pd.DataFrame) -> None:
    frame["subject_id"] = frame["subject_id"].replace({"sub-03": "SUB-02", "sub-04": "sub-2"})
    with pytest.raises(UserError, match=r"SUB-02, sub-02, sub-2\..*alike_ids: join.*alike_ids: distinct"):
        build(frame)
    manifest, card = build(frame, alike_ids="join")
    assert card["united_subjects"] == [["SUB-02", "sub-02", "sub-2"]]
    person = manifest[manifest["spelling"].isin(["SUB-02", "sub-02", "sub-2"])]
    assert len(person) == 3 and set(person["subject_id"]) == {"SUB-02"} and person["split"].nunique() == 1
    assert card["subjects"] == 10
    files = [filled_in("{subject_id}.nii", row, "mask").name for row in person.to_dict("records")]
    assert files == ["sub-02.nii", "SUB-02.nii", "sub-2.nii"]
    manifest, card = build(frame, alike_ids="distinct")
    assert card["united_subjects"] == [] and card["subjects"] == 12 and "spelling" not in manifest


def remove(path: Path) -> None:
    path.unlink()


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def pointer(content: bytes) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.write_bytes(content)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (remove, "not there"),
        (make_directory, "a directory, expected an image file"),
        (dangling_link, "not there (a link to nothing: with git-annex"),
        (
            pointer(b"/annex/objects/MD5E-s6747706--db99fa.nii.gz\n"),
            "a pointer of git-annex, not its content: run `datalad get",
        ),
        (pointer(b"../../.git/annex/objects/6k/q0/MD5E-s6.nii.gz"), "a pointer of git-annex"),
        (pointer(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"), "run `git lfs pull`"),
    ],
)
def test_files_that_cannot_be_read_are_refused(
    frame: pd.DataFrame, spoil: Callable[[Path], None], expected: str
) -> None:
    for path in frame["path"][:7]:
        spoil(Path(path))
    with pytest.raises(UserError) as refusal:
        build(frame)
    message = str(refusal.value)
    assert (
        "7 of 12 image files cannot be read" in message
        and expected in message
        and "and 2 more" in message
        and "Restore the files" in message
    )


def test_a_read_that_fails_midway_is_refused(frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "sub-05.nii.gz":
            raise OSError(5, "Input/output error")
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(
        UserError, match=r"1 of 12 image files cannot be read:\n  .*sub-05\.nii\.gz: Input/output error"
    ):
        build(frame)


def test_files_without_permission_are_refused(frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).endswith("sub-05.nii.gz")
    )  # chmod would not stop root
    with pytest.raises(
        UserError, match=r"1 of 12 image files cannot be read:\n  .*sub-05\.nii\.gz: no permission to read it"
    ):
        build(frame)


def test_dicom_without_its_package_is_refused(frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meddiff_steps.cohort.manifest.importlib.util.find_spec", lambda name: None)
    frame.loc[0, "path"] = "scan.dcm"
    with pytest.raises(UserError, match=r"\.dcm.* pydicom\. Install it"):
        build(frame)


def test_wrong_values_and_repeated_ids_are_refused_before_anything_is_read(frame: pd.DataFrame) -> None:
    absent = frame.assign(path="nowhere.nii.gz")
    with pytest.raises(UserError, match=r"scan sub-\d\d, column age: found '200'"):
        build(absent.assign(age="200"))
    with pytest.raises(UserError, match=r"covariates\.age: all \d+ training values are 50, so its effect cannot be"):
        build(absent.assign(age="50"))
    with pytest.raises(UserError, match=r"covariates\.sex: all \d+ training values are F"):
        build(absent.assign(sex="F"))
    with pytest.raises(UserError, match=r"scan_id same occurs more than once\. Rename"):
        build(absent.assign(scan_id="same"))
    with pytest.raises(UserError, match=r"splits\.val is 0\.0001"):
        build(absent, Splits(train=0.5, val=0.0001, calibration=0.0, test=0.4999))


# ----------------------------------------------------------------------------------------------------- read


def test_a_manifest_reads_back_as_it_was_written(frame: pd.DataFrame, tmp_path: Path) -> None:
    manifest, _ = build(frame)
    write_manifest(manifest, tmp_path / "manifest.parquet")
    pd.testing.assert_frame_equal(read_manifest(tmp_path / "manifest.parquet", COVARIATES), manifest)
    schema = pq.read_schema(tmp_path / "manifest.parquet")
    assert str(schema.field("session_id").type) == "string"  # a column of nulls keeps its type
    assert str(schema.field("age").type) == "double"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda m: m.drop(columns=["split"]), r"no column split; columns are: scan_id"),
        (lambda m: m.drop(columns=["age"]), r"no column for covariate age"),
        (lambda m: m[:0], r"no rows"),
        (lambda m: m.assign(scan_id="same"), r"scan_id same occurs more than once"),
        (lambda m: m.assign(split="training"), r"column split: found training, expected train, val, calibration, test"),
        (lambda m: m.assign(subject_id="one"), r"subject one is in more than one split.*leak"),
        (lambda m: m.assign(subject_id=None), r"column subject_id: expected text in every row"),
        (lambda m: m.assign(age=200.0), r"scan sub-00, column age: found '200'"),
    ],
)
def test_spoilt_manifests_are_refused(
    frame: pd.DataFrame, tmp_path: Path, spoil: Callable[[pd.DataFrame], pd.DataFrame], expected: str
) -> None:
    path = tmp_path / "manifest.parquet"
    spoil(build(frame)[0]).to_parquet(path)
    with pytest.raises(UserError, match=expected):
        read_manifest(path, COVARIATES)


def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.parquet: no such manifest\. Make it with the `cohort` step"):
        read_manifest(tmp_path / "manifest.parquet")
    (tmp_path / "manifest.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"manifest\.parquet: not a readable manifest .* run the `cohort` step again"):
        read_manifest(tmp_path / "manifest.parquet")


# ----------------------------------------------------------------------------------------------------- step


def frozen(tmp_path: Path, cohort: dict[str, Any]) -> Path:
    study = parse_study(
        {
            "study": "tiny",
            "cohort": cohort,
            "covariates": {name: c.model_dump(exclude_none=True) for name, c in COVARIATES.items()},
            "splits": HALVES.model_dump(),
            "plan": [{"name": "a", "subjects": 1}],
        },
        "tiny.yaml",
    )
    return freeze(study, "cohort", tmp_path / "config")


@pytest.fixture
def dataset(frame: pd.DataFrame, tmp_path: Path) -> Path:
    """The same twelve subjects as a BIDS dataset."""
    root = tmp_path / "bids"
    for row in frame.itertuples():
        folder = root / str(row.subject_id) / "anat"
        folder.mkdir(parents=True)
        Path(str(row.path)).rename(folder / f"{row.scan_id}_T1w.nii.gz")
    frame.rename(columns={"subject_id": "participant_id"})[["participant_id", "age", "sex"]].to_csv(
        root / "participants.tsv", sep="\t", index=False
    )
    return root


@pytest.mark.parametrize("simulated", [False, True])
def test_the_step_writes_the_same_bytes_every_time(dataset: Path, tmp_path: Path, simulated: bool) -> None:
    config = frozen(tmp_path, {"source": "simulated"} if simulated else {"source": "bids", "root": str(dataset)})
    for name in ("first", "second"):
        run(
            config,
            tmp_path / name / "manifest.parquet",
            tmp_path / name / "card.json",
            dataset if simulated else None,
            threads=2,
        )
    for name in ("manifest.parquet", "card.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    card = json.loads((tmp_path / "first/card.json").read_text())
    assert (
        card["simulated"] is simulated
        and card["source"] == ("simulated" if simulated else "bids")
        and card["scans"] == 12
    )
    assert len(read_manifest(tmp_path / "first/manifest.parquet", COVARIATES)) == 12


def test_the_step_says_for_which_level_the_calibration_split_suffices(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run(frozen(tmp_path, {"source": "bids", "root": str(dataset)}), tmp_path / "m.parquet", tmp_path / "c.json")
    assert "the calibration split has 0 subjects, too few at any privacy.level" in caplog.text


def test_the_step_reads_tables(frame: pd.DataFrame, tmp_path: Path) -> None:
    frame.to_csv(tmp_path / "table.csv", index=False)
    run(
        frozen(tmp_path, {"source": "table", "table": str(tmp_path / "table.csv")}),
        tmp_path / "m.parquet",
        tmp_path / "c.json",
    )
    assert read_manifest(tmp_path / "m.parquet")["scan_id"].tolist() == [f"sub-{i:02}" for i in range(12)]


def test_simulated_belongs_to_simulated_cohorts(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--simulated is needed: .*step `simulate`"):
        run(frozen(tmp_path, {"source": "simulated"}), tmp_path / "m.parquet", tmp_path / "c.json")
    with pytest.raises(UserError, match=r"--simulated belongs to simulated cohorts only.*'bids'"):
        run(
            frozen(tmp_path, {"source": "bids", "root": str(dataset)}),
            tmp_path / "m.parquet",
            tmp_path / "c.json",
            dataset,
        )
    assert not (tmp_path / "m.parquet").exists()
