"""A release of more subjects than a dataset may hold: several datasets, each complete by itself, under one seal."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_tampering import Attack, Target, _edit_tsv, seen, stand_alone
from tiny_release import GIVEN_UP, Place

from meddiff_steps.audit import explain as story
from meddiff_steps.audit.request import Request
from meddiff_steps.audit.run import audit
from meddiff_steps.config import PlanGroup, Release
from meddiff_steps.core.files import sha256_file
from meddiff_steps.imaging.encoding import read_mark
from meddiff_steps.provenance import verify
from meddiff_steps.release import crate, croissant, seal
from meddiff_steps.release.layout import Layout
from meddiff_steps.release.regeneration import regenerate
from meddiff_steps.release.sealed import open_release
from meddiff_steps.steps import export

FIRST, SECOND, LAST = "syn000000", "syn000003", "syn000005"
A, B = "shard-syn-0000", "shard-syn-0001"
MEMBERS = {
    A: {"syn000000", "syn000001"},
    B: {"syn000003", "syn000005"},
    "shard-cf-0000": {"cf000000", "cf000001", "cf000002"},
    "shard-cf-0001": {"cf000003"},
}


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


# -------------------------------------------------------------------------------------------------- layout


def test_nobody_moves_when_a_group_grows_or_another_is_added():
    def folders(*groups: tuple[str, int]) -> dict[tuple[str, int], str]:
        layout = Layout.of(3, [PlanGroup(name=name, subjects=count) for name, count in groups], Release(shard_size=100))
        return {(name, i): layout.folder(name, i) for name, count in groups for i in range(count)}

    before, after = folders(("a", 150)), folders(("new", 250), ("a", 1000))
    assert before == {key: after[key] for key in before}
    counts: dict[str, int] = {}
    for folder in after.values():
        counts[folder] = counts.get(folder, 0) + 1
    assert max(counts.values()) == 100 and len(counts) == 13


def test_a_release_within_the_limit_is_one_dataset(place):
    assert Layout.of(3, [PlanGroup(name="a", subjects=1000)], Release()).folder("a", 999) == ""
    assert Layout.of(3, [PlanGroup(name="a", subjects=1001)], Release()).folder("a", 1000) == "shard-a-0001"
    assert not list(place.release.glob("shard-*")) and (place.release / "participants.tsv").is_file()
    assert "Datasets" not in json.loads((place.release / "dataset_description.json").read_text())


def test_images_are_the_same_in_both_layouts(place, large):
    flat, several = ({path.name: path.read_bytes() for path in one.release.rglob("*.nii.gz")} for one in (place, large))
    assert flat == several and len(flat) == 8 + 8, "with their label maps"


def test_each_dataset_is_complete_by_itself(large, tmp_path):
    assert json.loads((large.release / "dataset_description.json").read_text())["Datasets"] == sorted(MEMBERS)
    assert not (large.release / "participants.tsv").exists() and not (large.release / ".bidsignore").exists()
    for folder, members in MEMBERS.items():
        alone = Path(shutil.copytree(large.release / folder, tmp_path / folder))
        assert {path.name for path in alone.glob("sub-*")} == {f"sub-{name}" for name in members}
        table = (alone / "participants.tsv").read_text().splitlines()
        assert {line.split("\t")[0] for line in table[1:]} == {f"sub-{name}" for name in members}
        description = json.loads((alone / "dataset_description.json").read_text())
        assert (
            description["Name"] == f"Tiny, {folder}"
            and description["Synthetic"] is True
            and description["DatasetType"] == "derivative"
        )
        assert (
            f"{len(members)} synthetic subjects, of a cohort of 8" in (alone / "README.md").read_text()
            and (alone / "LICENSE").stat().st_size
        )
        done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=alone, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(done.stdout.splitlines()) == len(files(alone)) - 1, "every file but the checksums themselves"
        root = json.loads((large.release / seal.ROOT).read_text())
        assert root["files"][f"{folder}/SHA256SUMS"]["sha256"] == sha256_file(alone / "SHA256SUMS"), (
            "which the seal holds"
        )


def test_bids_validator_accepts_each_dataset(large, bids_report):
    for folder, members in MEMBERS.items():
        report = bids_report(large.release / folder)
        known = {"TOO_FEW_AUTHORS", "SINGLE_SOURCE_CITATION_FIELDS", "SIDECAR_KEY_RECOMMENDED"}  # see test_dataset
        assert {issue["code"] for issue in report["issues"]["issues"]} <= known, "neither errors nor other warnings"
        assert set(report["summary"]["subjects"]) == members


def test_completing_again_under_another_limit_leaves_nothing_of_the_first(large, place, tmp_path):
    """Also from several datasets to one and back; what is left is what a fresh run writes."""
    root = Path(shutil.copytree(large.results.parents[1], tmp_path / "study"))
    again = object.__new__(Place)
    again.__dict__ |= large.__dict__ | {"results": root / "results/tiny", "release": root / "results/tiny/release"}
    again.tables = [again.results / table.relative_to(large.results) for table in large.tables]
    other = place.study.model_copy(update={"release": place.study.release.model_copy(update={"shard_size": 1000})})
    for study, wanted in ((other, place.release), (large.study, large.release)):
        again.study = study
        shutil.rmtree(again.release / "provenance", ignore_errors=True)
        again.write_images()
        again.complete()
        sealed = ("provenance/", "croissant.json", "ro-crate-metadata.json")
        found, expected = (
            {name: content for name, content in files(one).items() if not name.startswith(sealed)}
            for one in (again.release, wanted)
        )
        (
            expected.pop(".bidsignore", None),
            found.pop(".bidsignore", None),
        )  # of a single dataset, written when it is sealed
        assert found == expected


# ------------------------------------------------------------------------------------------------ programs


def test_the_clean_release_passes_every_level(large):
    report = audit(
        Request(large.release, key=Path(f"{large.key}.pub"), private=large.private, models=large.results, sample=3)
    )
    assert [(check.name, check.text, check.examples) for check in report.checks if check.outcome == "finding"] == []
    assert [report.status(level) for level in range(8)] == ["PASS"] * 7 + ["NOT RUN"]
    assert (
        next(check.text for check in report.checks if check.name == "datasets")
        == "4 datasets are complete, each with its checksums"
    )
    done = stand_alone(large.release.parent / "release", "--key", f"{large.key}.pub")
    assert (
        done.returncode == 0
        and "participants.tsv of 4 datasets, with its suggested split, and the ledger agree on 8" in done.stdout
    ), done.stdout + done.stderr


def test_pictures_are_cut_into_datasets_too(tmp_path):
    place = Place(tmp_path, dims=2, sign=False, limit=3)
    report = audit(Request(place.release, private=place.private))
    assert [(check.name, check.text, check.examples) for check in report.checks if check.outcome == "finding"] == []
    assert (place.release / A / "images/syn000001.png").is_file() and not (place.release / A / ".bidsignore").exists()
    assert "images/syn000001.png" in (place.release / A / "participants.tsv").read_text()


def test_metadata_lead_to_the_datasets(large):
    content = json.loads((large.release / croissant.NAME).read_text())
    included = {entry["@id"]: entry["includes"] for entry in content["distribution"] if "includes" in entry}
    assert {name: len(list(large.release.glob(pattern))) for name, pattern in included.items()} == {
        "participants-table": 4,
        "images-files": 8,
        "labels-files": 8,
    }
    entities = {entity["@id"]: entity for entity in json.loads((large.release / crate.NAME).read_text())["@graph"]}
    for folder in MEMBERS:
        assert (
            entities[f"{folder}/"]["@type"] == "Dataset"
            and {"@id": f"{folder}/participants.tsv"} in entities[f"{folder}/"]["hasPart"]
        )
        assert {"@id": f"{folder}/"} in entities["./"]["hasPart"]


def test_commands_that_read_a_release_read_this_one(large, place, tmp_path):
    assert f"image {B}/sub-{SECOND}/anat" in "\n".join(story.explain(large.release, SECOND))
    proof = story.prove(large.release, SECOND)
    assert verify.proven(proof, verify.read_root(large.release)["ledger"]["root"])
    differ = [line for line in story.compare(place.release, large.release) if not line.startswith(("step ", "files:"))]
    assert [line.split(":")[0] for line in differ] == ["config release.shard_size", "image.path", "labels.path"], (
        "the images themselves do not"
    )
    release = open_release(large.release)
    rows = release.rows_of([SECOND, "cf000003"])
    assert [c.same_file for c in regenerate(release, rows, large.results, tmp_path / "again", 1)] == [True, True]
    assert all(content == (large.release / name).read_bytes() for name, content in files(tmp_path / "again").items())
    tar = tmp_path / "shard-0000.tar"
    export.run(large.frozen("export"), large.release / seal.ROOT, large.tables[0], tar)
    assert tar.stat().st_size > 1000


# ----------------------------------------------------------------------------------------------- tampering


class Several(Target):
    def path(self, name: str) -> Path:
        return next(
            self.folder.glob(f"shard-*/sub-{name}/anat/*_T1w.nii.gz"),
            self.folder / A / f"sub-{name}/anat/sub-{name}_T1w.nii.gz",
        )

    def table(self, folder: str) -> SimpleNamespace:
        return SimpleNamespace(folder=self.folder / folder)

    def checksums(self) -> None:
        """What somebody who changes a dataset can repair of its checksums."""
        for folder in self.folder.glob("shard-*"):
            names = [name for name in files(folder) if name != "SHA256SUMS"]
            (folder / "SHA256SUMS").write_text(
                "".join(f"{sha256_file(folder / name)}  {name}\n" for name in sorted(names))
            )


def _move(target: Several, repair: bool = False) -> None:
    """A subject's folder moved to another dataset, with its row of the table."""
    shutil.move(target.folder / A / f"sub-{FIRST}", target.folder / B / f"sub-{FIRST}")
    line = next(
        line
        for line in (target.folder / A / "participants.tsv").read_text().splitlines()
        if line.startswith(f"sub-{FIRST}")
    )
    _edit_tsv(target.table(A), lambda lines: [other for other in lines if other != line])
    _edit_tsv(target.table(B), lambda lines: [*lines, line])
    if repair:
        rows = target.rows()
        row = next(row for row in rows if row["sample_id"] == FIRST)
        for part in ("image", "labels"):
            row[part]["path"] = row[part]["path"].replace(A, B)
        target.checksums()
        target.seal(rows)


def _double(target: Several, repair: bool = False) -> None:
    """A subject that is in two datasets."""
    shutil.copytree(target.folder / A / f"sub-{FIRST}", target.folder / B / f"sub-{FIRST}")
    line = next(
        line
        for line in (target.folder / A / "participants.tsv").read_text().splitlines()
        if line.startswith(f"sub-{FIRST}")
    )
    _edit_tsv(target.table(B), lambda lines: [*lines, line])
    if repair:
        target.checksums()
        target.seal()


def _remove(target: Several, repair: bool = False) -> None:
    shutil.rmtree(target.folder / B)
    if repair:
        target.edit("dataset_description.json", lambda content: content["Datasets"].remove(B))
        target.seal([row for row in target.rows() if not (row["image"] and row["image"]["path"].startswith(B))])


def _swap_tables(target: Several) -> None:
    a, b = (target.folder / folder / "participants.tsv" for folder in (A, B))
    x, y = a.read_bytes(), b.read_bytes()
    a.write_bytes(y), b.write_bytes(x)


def _swap_images(target: Several) -> None:
    a, b = target.path(FIRST), target.path(SECOND)
    x, y = a.read_bytes(), b.read_bytes()
    a.write_bytes(y), b.write_bytes(x)


def _checksum(target: Several) -> None:
    path = target.folder / A / "SHA256SUMS"
    path.write_text(path.read_text().replace(sha256_file(target.path(FIRST)), "0" * 64))
    target.seal()


def _slip_in_as_a_file(target: Several) -> None:
    """The image of a subject that was given up, sealed like a README."""
    path = target.folder / A / f"sub-{GIVEN_UP}/anat/sub-{GIVEN_UP}_T1w.nii.gz"
    path.parent.mkdir(parents=True)
    shutil.copy(target.path(FIRST), path)
    target.checksums()
    target.seal()


def _drop_file(target: Several, name: str) -> None:
    (target.folder / A / name).unlink()
    target.checksums()
    target.seal()


def _unmark(target: Several, name: str) -> None:
    target.edit(f"{A}/{name}", lambda content: (content.pop("Synthesis", None), content.pop("Synthetic", None)))
    target.checksums()
    target.seal()


def _table_of_all(target: Several) -> None:
    shutil.copy(target.folder / A / "participants.tsv", target.folder / "participants.tsv")
    target.seal()


ATTACKS = {
    "a subject moved to another dataset": Attack(_move, 2, "no-orphans"),
    "a subject moved, tables": Attack(_move, 2, "participants"),
    "a subject in two datasets": Attack(_double, 2, "no-orphans"),
    "a dataset removed": Attack(_remove, 2, "no-missing"),
    "a dataset renamed": Attack(lambda t: (t.folder / A).rename(t.folder / "shard-syn-0007"), 2, "no-missing"),
    "a dataset that is a link": Attack(
        lambda t: ((t.folder / A).rename(t.keep / "moved"), (t.folder / A).symlink_to(t.keep / "moved")), 2, "no-links"
    ),
    "a dataset of another release": Attack(
        lambda t: shutil.copytree(t.folder / A, t.folder / "shard-syn-0009"), 2, "no-orphans"
    ),
    "tables of two datasets swapped": Attack(_swap_tables, 2, "participants"),
    "images of two datasets swapped": Attack(_swap_images, 1, "images"),
    "a licence of one dataset": Attack(
        lambda t: (t.folder / B / "LICENSE").write_text("All rights reserved."), 1, "files"
    ),
    "checksums of one dataset": Attack(lambda t: (t.folder / B / "SHA256SUMS").write_text(""), 2, "datasets"),
}
SEALED_AGAIN = {
    "a subject moved to another dataset": Attack(lambda t: _move(t, True), 5, "format"),
    "a subject in two datasets": Attack(lambda t: _double(t, True), 2, "no-strangers"),
    "a subject in two tables": Attack(lambda t: _double(t, True), 2, "participants"),
    "a dataset forgotten": Attack(lambda t: _remove(t, True), 2, "indices"),
    "a checksum that is not the image's": Attack(_checksum, 2, "datasets"),
    "an image sealed like a text": Attack(_slip_in_as_a_file, 2, "no-strangers"),
    "a dataset without licence": Attack(lambda t: _drop_file(t, "LICENSE"), 2, "no-missing"),
    "a dataset without description": Attack(lambda t: _drop_file(t, "dataset_description.json"), 2, "no-missing"),
    "a table of no dataset": Attack(_table_of_all, 2, "no-strangers"),
    "datasets that the description does not name": Attack(
        lambda t: (t.edit("dataset_description.json", lambda c: c["Datasets"].pop()), t.seal()), 2, "datasets"
    ),
    "the mark of one sidecar": Attack(lambda t: _unmark(t, "T1w.json"), 5, "marks"),
    "the mark of one dataset": Attack(lambda t: _unmark(t, "dataset_description.json"), 5, "marks"),
}


@pytest.fixture
def target(large: Place, tmp_path: Path) -> Several:
    return Several(large, Path(shutil.copytree(large.release, tmp_path / "release")))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_changed_release_is_seen(target, name):
    attack = ATTACKS[name]
    attack.apply(target)
    assert (attack.level, attack.check) in seen(target.audit())
    done = stand_alone(target.folder, "--json", "--key", str(target.key))
    assert (attack.level, attack.check) in {
        (check["level"], check["name"]) for check in json.loads(done.stdout) if check["outcome"] == "finding"
    }


@pytest.mark.parametrize("name", SEALED_AGAIN)
def test_a_release_that_was_sealed_again_is_seen(target, name):
    attack = SEALED_AGAIN[name]
    attack.apply(target)
    found = seen(target.audit(key=False))
    assert (attack.level, attack.check) in found
    assert {level for level, _ in found} & {0, 1} == set(), "the seal itself is sound"


def test_sealing_again_alone_is_no_finding_without_the_key(target):
    target.checksums()
    target.seal()
    assert seen(target.audit(key=False)) == set()
    assert read_mark(target.path(LAST)) is not None
