"""A released image made again, alone or with others, is the released file; and what is not the same is said to be."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_release import AGAIN, GIVEN_UP

from meddiff_steps import config
from meddiff_steps.cohort.manifest import read_manifest, write_manifest
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.encoding import Grid, encode
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.provenance.verify import labels_path
from meddiff_steps.release import regeneration
from meddiff_steps.release.regeneration import drawing_threads, regenerate, regenerate_more
from meddiff_steps.release.sealed import open_release
from meddiff_steps.steps import generate
from meddiff_steps.steps import plan as plan_step
from meddiff_steps.steps.regenerate import run as step

SNAKEMAKE = [sys.executable, "-m", "snakemake", "-s", str(Path(__file__).parents[2] / "Snakefile"), "--directory"]


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "meddiff_steps", *map(str, arguments)], capture_output=True, text=True)


def test_one_subject_alone_is_the_released_file(place, tmp_path):
    release = open_release(place.release)
    for name in (AGAIN, next(row["sample_id"] for row in release.released() if row["sample_id"] != AGAIN)):
        rows = release.rows_of([f"sub-{name}"])
        (comparison,) = regenerate(release, rows, place.results, tmp_path / name, 1)
        assert (comparison.verdict, comparison.same_file, comparison.largest) == ("bitwise", True, 0)
        paths = [rows[0][kind]["path"] for kind in ("image", "labels")]
        assert files(tmp_path / name) == {path: (place.release / path).read_bytes() for path in paths}


def test_images_are_drawn_with_the_threads_of_those_who_drew_them(place, monkeypatch):
    """By the records of the shard's own run; of `filter`, where the first image was rejected."""
    release = open_release(place.release)
    rows = list(release.released())
    assert set(drawing_threads(release).values()) == {1}
    again = next(row for row in rows if row["attempt"])
    shards = {row["sample_id"]: shard for shard in (0, 1, 2) for row in release.rows_of(shard=shard)}
    for record in release.records.values():
        shard = record["parameters"].get("shard")
        if record["step"] in ("generate", "filter"):
            record["environment"]["torch"]["threads"] = {"generate": 2, "filter": 5}[record["step"]] + shard
    seen = {}
    monkeypatch.setattr(
        regeneration,
        "_drawn",
        lambda part, study, places, threads: seen.update({row["sample_id"]: threads for row in part}) or iter(()),
    )
    list(regeneration.remake(rows, release, place.results, 9))
    assert seen == {row["sample_id"]: (5 if row["attempt"] else 2) + shards[row["sample_id"]] for row in rows}
    assert again["sample_id"] in seen and len(set(seen.values())) > 2
    release.records.clear()
    list(regeneration.remake(rows, release, place.results, 9))
    assert set(seen.values()) == {9}, "nothing says how many these were"


def test_a_shard_and_the_whole_cohort(place, tmp_path):
    shard = run("regenerate", place.release, "--models", place.results, "--shard", 1, "--out", tmp_path / "shard")
    assert shard.returncode == 0, shard.stdout + shard.stderr
    whole = run(
        "regenerate",
        place.release,
        "--models",
        place.results,
        "--out",
        tmp_path / "all",
        "--json",
        tmp_path / "all.json",
    )
    assert whole.returncode == 0, whole.stdout + whole.stderr
    released = {row[kind]["path"] for row in open_release(place.release).released() for kind in ("image", "labels")}
    assert files(tmp_path / "all") == {path: (place.release / path).read_bytes() for path in released}
    assert 0 < len(files(tmp_path / "shard")) < len(released)
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["same_file"] == found["verdicts"]["bitwise"] == found["images"] == len(released) // 2, (
        "label maps aside"
    )
    assert f"{len(released) // 2} bitwise" in whole.stdout


def test_the_provenance_folder_is_enough_and_a_changed_image_is_named(place, copied, tmp_path):
    release = open_release(copied)
    rows = list(release.released())
    (copied / rows[0]["image"]["path"]).unlink()
    assert [c.verdict for c in regenerate(release, rows, place.results, tmp_path / "a", 1)] == ["bitwise"] * len(rows)
    # The ledger claims another image, and another one lies there.
    lines = (copied / "provenance/ledger.jsonl").read_text()
    (copied / "provenance/ledger.jsonl").write_text(lines.replace(rows[1]["image"]["voxel_sha256"], "0" * 64))
    (copied / rows[1]["image"]["path"]).write_bytes((copied / rows[2]["image"]["path"]).read_bytes())
    done = run("regenerate", copied, "--models", place.results, "--out", tmp_path / "b")
    assert done.returncode == 1
    assert f"{rows[1]['sample_id']}: differs" in done.stdout and f"{len(rows) - 1} bitwise, 1 differs" in done.stdout


def test_what_cannot_be_made_again_is_refused(place, copied, tmp_path):
    release = open_release(place.release)
    with pytest.raises(UserError, match="was not released"):
        regenerate(release, release.rows_of([GIVEN_UP]), place.results, tmp_path, 1)
    with pytest.raises(UserError, match="no subject 'nobody'"):
        release.rows_of(["nobody"])
    with pytest.raises(UserError, match="no shard 9"):
        release.rows_of(shard=9)
    with pytest.raises(UserError, match="no autoencoder with weights"):
        regenerate(release, release.rows_of([AGAIN]), tmp_path, tmp_path, 1)
    with pytest.raises(UserError, match="is sealed"):
        step(release=place.release, models=place.results, out=place.release / "again")
    (copied / "provenance/root.json").unlink()
    with pytest.raises(UserError, match="not there"):
        open_release(copied)


def test_more_subjects_than_before_and_the_old_ones_as_they_were(place, tmp_path):
    """The six subjects of a group and six more, which are those that a study of twelve has."""
    done = run(
        "regenerate",
        place.release,
        "--models",
        place.results,
        "--count",
        12,
        "--group",
        "syn",
        "--out",
        tmp_path / "out",
        "--json",
        tmp_path / "x.json",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    released = {row["image"]["path"] for row in open_release(place.release).released() if row["group"] == "syn"}
    made, found = files(tmp_path / "out"), json.loads((tmp_path / "x.json").read_text())
    table = made.pop("added.tsv").decode().splitlines()
    assert {path: made[path] for path in released} == {path: (place.release / path).read_bytes() for path in released}
    assert found["same_file"] == found["images"] == len(released) == 4
    assert [one["sample_id"] for one in found["added"]] == [f"syn{i:06d}" for i in range(6, 12)]
    images = released | {one["path"] for one in found["added"]}
    assert set(made) == images | {labels_path(path) for path in images}
    assert "6 more images, syn000006 to syn000011: no privacy filter" in done.stdout
    # A study of twelve plans the same subjects, and its `generate` draws the same images.
    larger = place.study.model_copy(update={"plan": [place.study.plan[0].model_copy(update={"subjects": 12})]})
    (tmp_path / "plan").mkdir()
    root = tmp_path / "plan/plan.parquet"
    cohort, quality = place.results / "cohort/manifest.parquet", place.results / "preprocessed/qc.parquet"
    plan_step.run(config.freeze(larger, "plan", tmp_path), cohort, root, quality)
    planned = pd.read_parquet(root).set_index("sample_id")
    assert table[0].split("\t") == [
        "participant_id",
        "age",
        "dark_ml",
        "sex",
        "path",
        "sha256",
        "voxel_sha256",
        "seed_key",
    ]
    for one, line in zip(found["added"], table[1:], strict=True):
        subject = planned.loc[one["sample_id"]]
        assert (
            one["covariates"] == {name: subject[name] for name in ("age", "dark_ml", "sex")}
            and one["seed_key"] == subject["seed_key"]
        )
        assert (
            hashlib.sha256(made[one["path"]]).hexdigest()
            == one["sha256"]
            == line.split("\t")[table[0].split("\t").index("sha256")]
        )
    generate.run(
        config=config.freeze(larger, "generate", tmp_path),
        plan=root,
        shard=2,
        out=tmp_path / "shard.arrow",
        **place.model_files(),
    )
    drawn = Shards([tmp_path / "shard.arrow"])
    grid = Grid(tuple(place.study.preprocess.shape), place.study.preprocess.spacing_mm)
    for row, name in enumerate(drawn.column("sample_id")):
        assert (
            encode(drawn.tensor("image", row)[0].astype(np.float32), grid, name, "tiny")[0]
            == made[f"sub-{name}/anat/sub-{name}_T1w.nii.gz"]
        )


def test_a_shard_of_more_subjects_is_a_part_of_them(place, tmp_path):
    release = open_release(place.release)
    parts = [regenerate_more(release, place.results, tmp_path / "parts", 1, 10, "syn", shard) for shard in range(3)]
    compared, added = regenerate_more(release, place.results, tmp_path / "whole", 1, 10, "syn")
    assert {one.labels for one in compared} == {"same"}
    assert [one for part in parts for one in part[0]] == compared and [
        one for part in parts for one in part[1]
    ] == added
    assert len(added) == 4 and files(tmp_path / "parts") == files(tmp_path / "whole")
    with pytest.raises(UserError, match=r"no shard 3: 10 subjects of group syn are 3 shards"):
        regenerate_more(release, place.results, tmp_path, 1, 10, "syn", 3)


def test_more_subjects_than_a_dataset_holds_lie_in_several(place, tmp_path):
    small = place.study.model_copy(update={"release": place.study.release.model_copy(update={"shard_size": 10})})
    release = open_release(place.release)
    release.study = small  # ten subjects are planned, and two more do not fit into one dataset
    compared, added = regenerate_more(release, place.results, tmp_path, 1, 11, "syn")
    assert {c.verdict for c in compared} == {"bitwise"} and added[-1].path.startswith("shard-syn-0001/sub-syn000010/")
    assert (tmp_path / "shard-syn-0000/sub-syn000000").is_dir()


def test_more_subjects_want_to_know_what_covariates_are_drawn_from(place, copied, tmp_path):
    release = open_release(place.release)
    with pytest.raises(UserError, match="of which group. The plan has syn, cf"):
        regenerate_more(release, place.results, tmp_path, 1, 12, None)
    with pytest.raises(UserError, match="no such group"):
        regenerate_more(release, place.results, tmp_path, 1, 12, "other")
    with pytest.raises(UserError, match="has 6 subjects already"):
        regenerate_more(release, place.results, tmp_path, 1, 5, "syn")
    with pytest.raises(UserError, match=r"neither a release nor packed models hold it"):
        regenerate_more(release, tmp_path, tmp_path, 1, 12, "syn")
    # Another cohort gives others: the training rows are not those of the release.
    other = tmp_path / "other"
    for kind in ("autoencoder", "decoder", "diffusion"):
        shutil.copytree(place.results / kind, other / kind)
    (other / "cohort").mkdir()
    manifest = read_manifest(place.results / "cohort/manifest.parquet", place.study.covariates)
    write_manifest(manifest.assign(age=manifest["age"] * 0.9 + 5), other / "cohort/manifest.parquet")
    with pytest.raises(UserError, match=r"qc\.parquet: not there\. It says which of the training scans"):
        regenerate_more(release, other, tmp_path, 1, 12, "syn")
    shutil.copytree(place.results / "preprocessed", other / "preprocessed")
    with pytest.raises(UserError, match=r"gives \w+ covariates .*, the release has"):
        regenerate_more(release, other, tmp_path, 1, 12, "syn")
    table = place.study.plan[0].model_copy(update={"covariates": "table", "table": "(path)", "where": {}})
    release.study = place.study.model_copy(update={"plan": [table]})
    with pytest.raises(UserError, match="come from a table of the publisher's"):
        regenerate_more(release, place.results, tmp_path, 1, 12, None)
    with pytest.raises(UserError, match="without --subject"):
        step(release=place.release, models=place.results, out=tmp_path, subject=["a"], count=12)


@pytest.mark.slow
def test_snakemake_makes_more_subjects(place, tmp_path):
    given = ["--config", f"sealed={place.release}", f"models={place.results}", "count=12", "group=syn"]
    done = subprocess.run(
        [*SNAKEMAKE, str(tmp_path), "--cores", "1", "regenerate", *given], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (comparison,) = tmp_path.glob("regenerated/*/comparison.json")
    assert len((comparison.parent / "added.tsv").read_text().splitlines()) == 7
    assert len(files(comparison.parent / "release")) == 2 * (json.loads(comparison.read_text())["images"] + 6) == 20


@pytest.mark.slow
def test_snakemake_makes_a_release_again_shard_by_shard(place, tmp_path):
    done = subprocess.run(
        [
            *SNAKEMAKE,
            str(tmp_path),
            "--cores",
            "1",
            "regenerate",
            "--config",
            f"sealed={place.release}",
            f"models={place.results}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (comparison,) = tmp_path.glob("regenerated/*/comparison.json")
    found = json.loads(comparison.read_text())
    assert found["same_file"] == found["images"] == len(list(open_release(place.release).released()))
    assert len(files(comparison.parent / "release")) == 2 * found["images"]  # with label maps


def test_snakemake_says_what_it_needs(place, tmp_path):
    few = ["--config", f"sealed={place.release}", f"models={place.results}", "count=2", "group=syn"]
    for given, message in (
        ([], "Which release"),
        (["--config", "sealed=nowhere"], "nowhere/provenance/config.json"),
        (few, "has 6 subjects already"),
    ):
        done = subprocess.run([*SNAKEMAKE, str(tmp_path), "-n", "regenerate", *given], capture_output=True, text=True)
        assert done.returncode != 0 and message in done.stdout + done.stderr
