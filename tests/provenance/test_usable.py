"""A release as who gets it uses it: its README's code runs, its tables say what they should, its licence is whole."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image as PilImage
from test_tampering import Target, _labels, _measured
from tiny_release import Place

from meddiff_steps.audit.request import Request
from meddiff_steps.audit.run import audit
from meddiff_steps.config import Release
from meddiff_steps.imaging.encoding import read_mark
from meddiff_steps.provenance import verify
from meddiff_steps.release import licences
from meddiff_steps.release.citation import citation_file
from meddiff_steps.release.regeneration import as_text, regenerate
from meddiff_steps.release.sealed import open_release


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("flat"), dims=2)


def code_of(folder: Path) -> dict[str, str]:
    """Python code in a README, by what stands above it."""
    text = (folder / verify.README).read_text(encoding="utf-8")
    return dict(re.findall(r"^([^\n]+):\n\n```python\n(.*?)\n```$", text, re.M | re.S))


#: Each piece of code by itself, in one process, for libraries take long to load.
RUN = """
import contextlib, io, json, sys
printed = {}
for title, code in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        exec(code, {})
    printed[title] = stream.getvalue()
print(json.dumps(printed))
"""


def run_code(folder: Path) -> dict[str, str]:
    """What the code of a README prints, run in its folder as somebody would; it leaves no file behind."""
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(code_of(folder))],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    assert sorted(folder.rglob("*")) == before
    return found


def table_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "participants.tsv", sep="\t", na_values="n/a", keep_default_na=False)


@pytest.mark.parametrize("parts", [False, True], ids=["a dataset", "parts"])
def test_levels_that_look_like_missing_values_are_read_as_levels(place, large, parts):
    """The line of code that reads the table, of either README."""
    (line,) = [
        one
        for one in code_of(large.release if parts else place.release)[
            "pandas, all datasets" if parts else "pandas"
        ].splitlines()
        if "read_csv" in one
    ]
    table = "participant_id\tage\trace\nsub-1\t61.5\tNone\nsub-2\tn/a\tNA\nsub-3\t50\tn/a\n"
    reads = re.sub(r'(folder / )?"participants.tsv"', "io.StringIO(table)", line.split("=", 1)[1].strip())
    found = eval(reads, {"pd": pd, "io": io, "table": table})
    assert found["race"].tolist()[:2] == ["None", "NA"] and found["race"].isna().tolist() == [False, False, True]
    assert found["age"].dtype == np.float64 and found["age"].isna().tolist() == [False, True, False]


def test_the_code_of_the_readme_runs(place):
    found = run_code(place.release)
    assert set(found) == {"pandas", "nilearn", "MONAI"}
    assert "train" in found["pandas"] and "age_measured" in found["pandas"]
    assert found["nilearn"].startswith("(8, 8, 8) [[")
    assert re.fullmatch(r"torch.Size\(\[4, 1, 8, 8, 8\]\) torch.Size\(\[4, 1, 8, 8, 8\]\)\s*", found["MONAI"])


def test_the_code_of_2d_and_of_several_datasets_runs(flat, large):
    found = run_code(flat.release)
    assert set(found) == {"pandas", "MONAI"} and "torch.Size([4, 1, 8, 8])" in found["MONAI"]
    assert set(code_of(large.release)) == {"pandas, all datasets"}
    assert "shard-syn-0000" in run_code(large.release)["pandas, all datasets"]
    parts = sorted(large.release.glob("shard-*"))
    assert set(code_of(parts[0])) == {"pandas", "nilearn", "MONAI"}


def test_the_picture_is_of_the_first_subjects_and_says_that_it_is_synthetic(place, large):
    for folder in (place.release, *large.release.glob("shard-*")):
        assert f"]({verify.PREVIEW})" in (folder / verify.README).read_text()
        assert (read_mark(folder / verify.PREVIEW) or {})["synthetic"] is True
        shown = np.asarray(PilImage.open(folder / verify.PREVIEW))
        first = nib.load(min(folder.glob("sub-*/anat/*_T1w.nii.gz"))).get_fdata()
        axial = np.rint(first[:, :, 4].T[::-1] * 255 / 1000)
        assert np.array_equal(shown[:128, :128][8::16, 8::16], axial), "left, posterior at the bottom left"
    assert re.search(r"\]\((shard-[^)]+/preview\.png)\)", (large.release / verify.README).read_text())


def test_measured_covariates_are_described_and_those_of_label_maps_are_their_volumes(place):
    table, told = table_of(place.release), json.loads((place.release / "participants.json").read_text())
    assert set(told) == {*table.columns, "Description"}
    columns = ["age_measured", "dark_ml_measured", "dark_ml_segmented", "sex_measured"]
    assert list(table.columns) == ["participant_id", "age", "dark_ml", "sex", *columns, "split"]
    assert told["dark_ml_segmented"]["Units"] == "mL" and set(told["sex_measured"]["Levels"]) == {"F", "M"}
    lookup = pd.read_csv(place.release / "dseg.tsv", sep="\t")
    assert lookup.to_dict("list") == {"index": [1], "name": ["dark_ml"]}
    for row in table.itertuples():
        stem = place.release / row.participant_id / "anat" / row.participant_id
        labels, image = nib.load(f"{stem}_dseg.nii.gz"), nib.load(f"{stem}_T1w.nii.gz")
        assert labels.get_data_dtype() == np.uint8 and np.array_equal(labels.affine, image.affine)
        assert labels.header.get_intent()[0] == "label" and (read_mark(Path(f"{stem}_dseg.nii.gz")) or {})["synthetic"]
        assert row.dark_ml_segmented == (labels.get_fdata() == 1).sum() * 8.0  # voxels of 20 mm


def test_images_of_one_subject_are_in_one_split(place):
    rows = [json.loads(line) for line in (place.release / verify.LINES).read_text().splitlines()]
    splits = table_of(place.release).set_index("participant_id")["split"]
    found: dict[tuple[str, int], set[str]] = {}
    for row in rows:
        if row["image"] is not None:
            found.setdefault((row["group"], row["noise_index"]), set()).add(splits[f"sub-{row['sample_id']}"])
    assert all(len(one) == 1 for one in found.values()) and len(found) < len(splits)


def splits_of(seed: str, count: int, group: str = "syn") -> list[tuple[str, str]]:
    """Level and split of each of `count` subjects, of whom every third is M."""
    splits = verify.Splits(seed)
    levels = ["M" if i % 3 == 0 else "F" for i in range(count)]
    return [(level, splits.of(group, i, {"sex": level, "age": 1.5 * i})) for i, level in enumerate(levels)]


def test_splits_are_stratified_keyed_and_do_not_change_when_a_cohort_grows():
    found = splits_of("a", 3000)
    assert Counter(found) == {
        (level, split): share * n
        for level, n in (("M", 100), ("F", 200))
        for split, share in (("train", 8), ("val", 1), ("test", 1))
    }
    assert splits_of("a", 1234) == found[:1234]
    other = splits_of("b", 3000)
    same = sum(a == b for a, b in zip(found, other, strict=True)) / 3000
    assert same == pytest.approx(0.66, abs=0.05), "0.8^2 + 2 * 0.1^2 by chance"
    assert splits_of("a", 3000, "other") != found


def test_who_is_left_open_is_split_too():
    splits = verify.Splits("a")
    found = Counter(splits.of("syn", i, {"sex": None, "age": None}) for i in range(100))
    assert found == {"train": 80, "val": 10, "test": 10}


@pytest.mark.parametrize("code", licences.KNOWN)
def test_the_licence_is_there_in_full(code):
    text = licences.text(Release(licence=code))
    name = licences.licence(code)[0]
    assert name in text and len(text) > 6000 and "NOT STATED" not in text
    words = {"NC": "NonCommercial", "SA": "ShareAlike"}
    for short, word in words.items():
        if code.startswith("CC-BY"):
            assert (word in text.split("-" * 80)[1]) == (short in code.split("-"))


def test_the_text_of_another_licence_comes_from_the_study(place):
    assert "NOT STATED" in licences.text(Release(licence="Ours"))
    assert licences.text(Release(licence="Ours", licence_text="Do as you like.")).endswith("\n\nDo as you like.\n")
    assert "CREATIVE COMMONS CORPORATION" in (place.release / "LICENSE").read_text(), "CC0 in full"


def test_the_citation_file_has_the_form_that_the_format_asks_for(place):
    """Fields and types of Citation File Format 1.2.0; its schema was fulfilled when this was written."""
    found = yaml.safe_load((place.release / "CITATION.cff").read_text())
    assert found["cff-version"] == "1.2.0" and found["type"] == "dataset" and found["license"] == "CC0-1.0"
    assert found["authors"] == [{"name": "A. Author"}, {"name": "B. Author"}]
    texts = ("cff-version", "message", "title", "abstract", "version", "license", "license-url")
    assert all(isinstance(found[name], str) and found[name] for name in texts)
    known = {*texts, "type", "authors", "keywords", "references", "date-released", "url"}
    assert set(found) <= known and all({"type", "title", "authors"} <= set(one) for one in found["references"])
    whole = yaml.safe_load(citation_file(Release(date="2026-01-31", url="https://example.org/x"), "X"))
    assert str(whole["date-released"]) == "2026-01-31" and whole["url"] == "https://example.org/x"
    bare = yaml.safe_load(citation_file(Release(licence="Ours", url="shelf 3"), "X"))
    assert bare["authors"] and not {"license", "license-url", "url", "date-released"} & set(bare)


def test_label_maps_are_made_again_where_the_segmenter_is(place, tmp_path):
    release = open_release(place.release)
    rows = release.rows_of(subjects=["syn000000", "syn000003"])
    found = regenerate(release, rows, place.results, tmp_path, 1)
    assert [one.labels for one in found] == ["same", "same"] and "2 label maps: 2 the same" in as_text(found, [])
    for row in rows:
        again, released = (folder / row["labels"]["path"] for folder in (tmp_path, place.release))
        assert again.read_bytes() == released.read_bytes()


def _exchange_two(labels: np.ndarray) -> None:
    """Two voxels, so that the volume stays."""
    a, b = (tuple(np.argwhere(labels == label)[0]) for label in (0, 1))
    labels[a], labels[b] = labels[b], labels[a]


def test_measurements_that_were_made_up_are_found_where_the_instruments_are(place, copied):
    """By whoever has them: nobody without can tell."""
    target = Target(place, copied)

    def findings() -> dict[str, list[str]]:
        report = audit(Request(copied, private=target.private, models=place.results, sample=99))
        return {check.name: check.examples for check in report.checks if check.outcome == "finding"}

    assert findings() == {}
    _labels(_exchange_two)(target)
    assert findings() == {"measurements": ["syn000000: 2 voxels of its label map have other labels"]}
    _measured("age_measured", 61.5)(target)
    _measured("sex_measured", "F")(target)
    assert {line.split(" ")[1] for line in findings()["measurements"]} >= {"age_measured", "sex_measured"}
    assert not {"labels", "measured", "participants", "described"} & findings().keys()
