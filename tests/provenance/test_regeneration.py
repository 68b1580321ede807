"""A released image made again, alone or with others, is the released file; and what is not the same is said to be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_release import AGAIN, GIVEN_UP

from meddiff_steps.errors import UserError
from meddiff_steps.provenance.regeneration import regenerate
from meddiff_steps.provenance.sealed import open_release
from meddiff_steps.steps.regenerate import run as step

SNAKEMAKE = [sys.executable, "-m", "snakemake", "-s", str(Path(__file__).parents[2] / "Snakefile"), "--directory"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "meddiff_steps", *map(str, arguments)], capture_output=True, text=True)


def test_one_subject_alone_is_the_released_file(place, tmp_path):
    release = open_release(place.release)
    for name in (AGAIN, next(row["sample_id"] for row in release.released() if row["sample_id"] != AGAIN)):
        rows = release.rows_of([f"sub-{name}"])
        (comparison,) = regenerate(release, rows, place.results, tmp_path / name, 1)
        assert (comparison.verdict, comparison.same_file, comparison.largest) == ("bitwise", True, 0)
        path = rows[0]["image"]["path"]
        assert files(tmp_path / name) == {path: (place.release / path).read_bytes()}


def test_a_shard_and_the_whole_cohort(place, tmp_path):
    shard = run("regenerate", place.release, "--models", place.results, "--shard", 1, "--out", tmp_path / "shard")
    assert shard.returncode == 0, shard.stdout + shard.stderr
    whole = run("regenerate", place.release, "--models", place.results, "--out", tmp_path / "all", "--json", tmp_path / "all.json")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    released = {row["image"]["path"] for row in open_release(place.release).released()}
    assert files(tmp_path / "all") == {path: (place.release / path).read_bytes() for path in released}
    assert 0 < len(files(tmp_path / "shard")) < len(released)
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["same_file"] == found["verdicts"]["bitwise"] == found["images"] == len(released)
    assert f"{len(released)} bitwise" in whole.stdout


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


@pytest.mark.slow
def test_snakemake_makes_a_release_again_shard_by_shard(place, tmp_path):
    done = subprocess.run(
        [*SNAKEMAKE, str(tmp_path), "--cores", "1", "regenerate", "--config", f"release={place.release}", f"models={place.results}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (comparison,) = tmp_path.glob("regenerated/*/comparison.json")
    found = json.loads(comparison.read_text())
    assert found["same_file"] == found["images"] == len(list(open_release(place.release).released()))
    assert len(files(comparison.parent / "release")) == found["images"]


def test_snakemake_says_what_it_needs(tmp_path):
    for given, message in (([], "Which release"), (["--config", "release=nowhere"], "nowhere/provenance/config.json")):
        done = subprocess.run([*SNAKEMAKE, str(tmp_path), "-n", "regenerate", *given], capture_output=True, text=True)
        assert done.returncode != 0 and message in done.stdout + done.stderr
