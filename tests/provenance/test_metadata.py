"""The descriptions of a release for other programs: RO-Crate and Croissant, read by the programs of those who define
them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tiny_release import Place

from meddiff_steps.core.files import write_json
from meddiff_steps.provenance import verify
from meddiff_steps.release import crate, croissant, seal
from meddiff_steps.release.published import Published

BIN = Path(sys.executable).parent
LOCK = Path(__file__).parents[2] / "envs/requirements-crate.lock"
#: Puts the context of RO-Crate 1.1, as the wheel of rocrate brings it, where the validator looks before it asks the
#: network.
SEED_CACHE = """
    import importlib.util, io, sys
    from pathlib import Path
    import requests, requests_cache
    from urllib3 import HTTPResponse

    context = (Path(importlib.util.find_spec("rocrate").origin).parent / "data/ro-crate.jsonld").read_bytes()
    session = requests_cache.CachedSession(sys.argv[1], backend="sqlite", expire_after=-1)
    accepted = {"Accept": "application/ld+json, application/json, */*;q=0.1"}
    request = requests.Request("GET", "https://w3id.org/ro/crate/1.1/context", headers=accepted)
    response = requests.Response()
    response.status_code, response.url = 200, request.url
    response.headers["Content-Type"] = "application/ld+json"
    response.raw = HTTPResponse(io.BytesIO(context), headers=dict(response.headers), status=200, preload_content=False)
    response.request = session.prepare_request(request)
    session.cache.save_response(response)
"""


def run(*command: str | Path, offline: bool = True) -> subprocess.CompletedProcess[str]:
    """A command, without a network where the system lets us take it away."""
    unshare = (
        ["unshare", "-rn"]
        if offline and subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
        else []
    )
    return subprocess.run([*unshare, *map(str, command)], capture_output=True, text=True, timeout=800)


@pytest.fixture(scope="module")
def validator(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """The command of the RO-Crate validator, in an environment of its own: it wants another `rich` than we have."""
    folder = tmp_path_factory.mktemp("crate")
    done = run(sys.executable, "-m", "venv", folder / "venv", offline=False)
    if done.returncode == 0:
        done = run(
            folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "-r", LOCK, offline=False
        )
    if done.returncode:
        pytest.skip(f"no environment for the RO-Crate validator: {done.stderr.strip()[-200:]}")
    (folder / "seed.py").write_text(textwrap.dedent(SEED_CACHE))
    done = run(folder / "venv/bin/python", folder / "seed.py", folder / "cache")
    assert done.returncode == 0, done.stderr
    return [
        folder / "venv/bin/rocrate-validator",
        "-y",
        "validate",
        "--offline",
        "--cache-path",
        folder / "cache",
        "--no-paging",
    ]


def test_the_crate_validator_accepts_the_release(validator, place, copied, tmp_path):
    """Also of a release whose description is as poor as it may be: no author, no address, a licence of its own."""

    def judged(release: Path) -> dict[str, Any]:
        done = run(*validator, "-l", "required", "-v", "-f", "json", "-o", tmp_path / "found.json", release)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return json.loads((tmp_path / "found.json").read_text())

    found = judged(place.release)
    assert found["passed"] and not found["issues"], found["issues"]
    assert crate.PROFILE.rsplit("/", 1)[1] == "0.5" and "process-run-crate-0.5" in json.dumps(found)
    description = json.loads((copied / "dataset_description.json").read_text())
    study = json.loads((copied / seal.CONFIG).read_text())
    study["release"]["authors"] = []
    write_json(copied / seal.CONFIG, study)
    (copied / "dataset_description.json").write_bytes(
        verify.json_bytes(description | {"License": "Ask us"}, ascii_only=False)
    )
    describe(copied)
    assert judged(copied)["passed"]
    (copied / "participants.tsv").unlink()
    assert not judged(copied)["passed"], "the crate lists a file that is gone"


def test_validators_accept_a_release_of_several_datasets(validator, large, tmp_path):
    done = run(*validator, "-l", "required", "-v", "-f", "json", "-o", tmp_path / "found.json", large.release)
    found = json.loads((tmp_path / "found.json").read_text())
    assert done.returncode == 0 and found["passed"] and not found["issues"], found["issues"]
    if (BIN / "mlcroissant").exists():
        done = run(BIN / "mlcroissant", "validate", "--jsonld", large.release / croissant.NAME)
        assert done.returncode == 0 and "error" not in done.stderr.lower(), done.stderr


def describe(release: Path) -> dict[str, Any]:
    """Make the metadata of a changed release again."""
    root = json.loads((release / seal.ROOT).read_text())
    for name, content in seal.metadata(release, root["ledger"], root["inputs"], root["files"], "2026-01-31"):
        (release / name).write_text(json.dumps(content))
    return root


@pytest.mark.skipif(not (BIN / "mlcroissant").exists(), reason="mlcroissant is not installed")
def test_mlcroissant_accepts_and_loads_the_release(place, copied):
    done = run(BIN / "mlcroissant", "validate", "--jsonld", place.release / croissant.NAME)
    assert done.returncode == 0 and "error" not in done.stderr.lower(), done.stderr
    script = (
        "import json, sys, mlcroissant; print(json.dumps(list(mlcroissant.Dataset(sys.argv[1]).records('subjects')),"
        " default=bytes.decode))"
    )
    done = run(sys.executable, "-c", script, place.release / croissant.NAME)
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in (place.release / seal.LINES).read_text().splitlines()]
    assert [record["subjects/sample_id"] for record in records] == [row["sample_id"] for row in rows]
    assert [record["subjects/covariate_age"] for record in records] == [row["covariates"]["age"] for row in rows]
    assert [record["subjects/covariate_sex"] for record in records] == [row["covariates"]["sex"] for row in rows]
    assert [record["subjects/image_sha256"] for record in records] == [
        (row["image"] or {}).get("sha256") for row in rows
    ]
    with open(copied / seal.TABLE, "ab") as stream:
        stream.write(b"x")
    assert run(sys.executable, "-c", script, copied / croissant.NAME).returncode != 0, "its digest is looked at"


RECORDS = """
import json, sys, mlcroissant
dataset = mlcroissant.Dataset(sys.argv[1])
names = [one.uuid for one in dataset.metadata.record_sets]
records = {name: [{k: str(v.size) if hasattr(v, "size") and not isinstance(v, bytes) else v for k, v in one.items()}
                  for one in dataset.records(name)] for name in names}
print(json.dumps(records, default=bytes.decode))
"""


def records(release: Path) -> dict[str, list[dict[str, Any]]]:
    """Every record of every set, as mlcroissant gives them; of a picture its size."""
    done = run(sys.executable, "-c", RECORDS, release / croissant.NAME)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not (BIN / "mlcroissant").exists(), reason="mlcroissant is not installed")
def test_every_set_of_records_can_be_iterated(place, large, tmp_path):
    flat = Place(tmp_path, dims=2)
    found = {one: records(one.release) for one in (place, large, flat)}
    for one, sets in found.items():
        rows = [json.loads(line) for line in (one.release / seal.LINES).read_text().splitlines()]
        released = [row for row in rows if row["image"]]
        assert [r["subjects/age_measured"] for r in sets["subjects"]] == [
            (row["measured"] or {}).get("age_measured") for row in rows
        ]
        told = {r["participants/participant_id"]: r["participants/split"] for r in sets["participants"]}
        assert set(told) == {f"sub-{row['sample_id']}" for row in released} and set(told.values()) <= {*verify.SPLITS}
        paths = {r["images/sample_id"]: r["images/path"] for r in sets["images"] if r["images/path"]}
        assert paths == {row["sample_id"]: row["image"]["path"] for row in released}
        assert set(sets) == {"subjects", "participants", "images"} | (set() if one is flat else {"labels"})
    assert {r["images/image"] for r in found[flat]["images"]} == {"(8, 8)"}
    labels = {r["labels/sample_id"]: r["labels/sha256"] for r in found[large]["labels"] if r["labels/path"]}
    rows = map(json.loads, (large.release / seal.LINES).read_text().splitlines())
    assert labels == {row["sample_id"]: row["labels"]["sha256"] for row in rows if row["labels"]}
    cited = json.loads((place.release / croissant.NAME).read_text())["citeAs"]
    assert cited.startswith("@misc{synthetic20") and "{A. Author} and {B. Author}" in cited


def test_the_crate_describes_runs_and_files_but_no_single_image(place):
    content = json.loads((place.release / crate.NAME).read_text())
    entities = {entity["@id"]: entity for entity in content["@graph"]}
    assert len(entities) == len(content["@graph"]), "each is described once"
    used = set(re.findall(r'\{"@id": "([^"]+)"\}', json.dumps(content["@graph"])))
    assert used - set(entities) == {crate.SPECIFICATION}, "every reference leads to an entity"
    root = json.loads((place.release / seal.ROOT).read_text())
    files = {entity["@id"]: entity.get("sha256") for entity in entities.values() if entity["@type"] == "File"}
    assert files == {name: entry["sha256"] for name, entry in root["files"].items() if name != crate.NAME} | {
        seal.ROOT: None
    }
    assert ".nii.gz" not in json.dumps(content)
    actions = [entity for entity in entities.values() if entity["@type"] == "CreateAction"]
    records = list((place.release / seal.RECORDS).rglob("*.json"))
    assert len(actions) == len(records) + 1, "one per run, and the one that seals"
    shards = [entity["identifier"] for entity in entities.values() if entity["@type"] == "Collection"]
    assert shards == [f"rfc6962-sha256:{entry['root']}" for entry in root["ledger"]["shards"]] and len(shards) == 3


def test_the_size_of_the_crate_depends_on_shards_not_on_subjects(place):
    study = json.loads((place.release / seal.CONFIG).read_text())
    description = json.loads((place.release / "dataset_description.json").read_text())
    root = json.loads((place.release / seal.ROOT).read_text())
    many = root["ledger"] | {
        "rows": 100_000,
        "released": 100_000,
        "shards": [{"shard": 0, "rows": 100_000, "ranges": [[0, 100_000]], "root": "0" * 64}],
    }
    content = crate.build(Published(description, study, "2026-01-31", many, root["inputs"], root["files"]), {})
    assert len(json.dumps(content)) < 40_000


def test_croissant_says_that_all_is_synthetic(place):
    content = json.loads((place.release / croissant.NAME).read_text())
    assert (
        content["rai:hasSyntheticData"] is True
        and "All 8 images are synthetic" in content["rai:syntheticDataExplanation"]
    )
    assert content["conformsTo"][0] == "http://mlcommons.org/croissant/1.1"
    table = content["distribution"][0]
    assert table["sha256"] == hashlib.sha256((place.release / table["contentUrl"]).read_bytes()).hexdigest()
    assert table["encodingFormat"] == "application/x-parquet"
    assert len(list(place.release.glob(content["distribution"][2]["includes"]))) == 8


def test_what_the_publisher_states_is_in_the_metadata(tmp_path, place):
    release = Path(shutil.copytree(place.release, tmp_path / "release"))
    study = json.loads((release / seal.CONFIG).read_text())
    study["release"] |= {
        "url": "https://example.org/cohort",
        "card": study["release"]["card"] | {"intended_use": "Teaching.", "not_for": "Diagnosis."},
    }
    write_json(release / seal.CONFIG, study)
    description = json.loads((release / "dataset_description.json").read_text())
    sources = {"SourceDatasets": [{"DOI": "doi:10.5281/zenodo.1"}]}
    (release / "dataset_description.json").write_bytes(verify.json_bytes(description | sources, ascii_only=False))
    describe(release)
    content = json.loads((release / croissant.NAME).read_text())
    assert content["url"] == "https://example.org/cohort" and content["datePublished"] == "2026-01-31"
    assert content["rai:dataUseCases"] == "Teaching." and content["rai:dataLimitations"] == "Diagnosis."
    assert content["prov:wasDerivedFrom"] == [{"@id": "https://doi.org/10.5281/zenodo.1"}]
    root = json.loads((release / crate.NAME).read_text())["@graph"][1]
    assert root["url"] == "https://example.org/cohort" and root["datePublished"] == "2026-01-31"


def test_the_day_is_that_of_the_images_unless_the_study_gives_one(place):
    record = json.loads((place.results / "records" / "images/shard-0000.parquet.json").read_text())
    content = json.loads((place.release / croissant.NAME).read_text())
    assert content["datePublished"] == record["volatile"]["ended"][:10]


def test_asking_for_a_copy_does_not_change_what_is_sealed(place: Place, tmp_path):
    from meddiff_steps import config

    asked = config.parse_study(
        place.study.model_dump(mode="json")
        | {"release": place.study.release.model_dump() | {"exports": ["webdataset"], "models": True}},
        "x",
    )
    for stage in ("images", "describe", "ledger"):
        assert config.freeze(asked, stage, tmp_path).name == place.frozen(stage).name
