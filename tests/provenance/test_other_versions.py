"""Releases that another version of this package sealed: what can be checked is checked, the rest says which to install.

The old release is the tiny one, rewritten as version 0.1.0 would have sealed it: with its names of keys and steps, its
number wherever that is written, and everything sealed again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rfc8785
import torch
from test_audit import checks, run
from test_tampering import FIRST, SEALED_AGAIN, Target, _shift_age, seen
from tiny_release import AGAIN, LATER_FIELDS, UNTROUBLED, Place

from meddiff_steps import __version__, config
from meddiff_steps.audit import chain, privacy, reexecution
from meddiff_steps.audit import explain as story
from meddiff_steps.audit.page import as_text
from meddiff_steps.audit.request import Request
from meddiff_steps.audit.run import audit
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import sha256_file, write_json
from meddiff_steps.provenance import lineage, verify
from meddiff_steps.release import seal, versions
from meddiff_steps.release.sealed import Sealed, open_release

OLD, UNKNOWN = "0.1.0", "99.1.0"
INSTALL = "install meddiff-steps 0.1.0"
#: Sections by their names of today, and of then; and a key of one of them.
SECTIONS = {"variants": "augmentation", "downstream": "augment", "second_model": "distill"}
STEPS = {today: old for old, today in lineage.RENAMED.items()}


#: Keys that there were then, and are no more.
GONE = {"autoencoder": "linear_path", "latents": "gaussian_rank", "diffusion": "component_steps"}


def old_config(content: dict[str, Any]) -> dict[str, Any]:
    found = {SECTIONS.get(name, name): section for name, section in content.items() if name != "decoder"}
    for section, key in GONE.items():
        found[section] = found[section] | {key: 0}
    if "count" in found["augmentation"]:
        found["augmentation"]["variants"] = found["augmentation"].pop("count")
    return found


def old_record(record: dict[str, Any], content: dict[str, Any], version: str) -> dict[str, Any]:
    table = config.stages_of(version)
    step = record["step"] if record["step"] in table else STEPS[record["step"]]
    part = rfc8785.dumps(config.part_of(content, table[step], version))
    settings = {"sections": list(table[step]), "sha256": hashlib.sha256(part).hexdigest()}
    return record | {"step": step, "config": settings, "code": record["code"] | {"version": version}}


def without_grey_levels(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in entries if not entry["path"].startswith("diffusion/tone.")]


def age(target: Target, version: str = OLD) -> Target:
    """Rewrite a release as `version` would have sealed it."""
    rows = target.rows()
    if version == OLD:
        (target.folder / verify.README).rename(target.folder / verify.OLD_README)
        for name in verify.NEWER - {verify.README}:
            (target.folder / name).unlink()
        table = target.folder / verify.TABLE
        lines = [line.rpartition("\t")[0] for line in table.read_text().splitlines()]
        table.write_text("".join(f"{line}\n" for line in lines))
        for path in (target.folder / seal.RECORDS).rglob("*.json"):
            record = json.loads(path.read_text())
            if record["step"] == "tone":
                path.unlink()
                continue
            inputs = {name: without_grey_levels(files) for name, files in record["inputs"].items()}
            write_json(path, record | {"inputs": inputs})
        for row in rows:
            if row["recipe"] is not None:
                row["recipe"] = {key: value for key, value in row["recipe"].items() if key not in LATER_FIELDS}
    target.edit("T1w.json", lambda content: content["Synthesis"].update(SoftwareVersion=version))
    target.edit("dataset_description.json", lambda content: content["GeneratedBy"][0].update(Version=version))
    content = target.json(seal.CONFIG)
    if version == OLD:
        content = old_config(content)
    write_json(target.folder / seal.CONFIG, content)
    described = sha256_file(target.folder / "dataset_description.json")
    for path in (target.folder / seal.RECORDS).rglob("*.json"):
        record = old_record(json.loads(path.read_text()), content, version)
        for entry in (*lineage.entries(record, "inputs"), *lineage.entries(record, "outputs")):
            if entry["path"] == "release/dataset_description.json":
                entry["sha256"] = described
        write_json(path, record)

    def change(root: dict[str, Any]) -> None:
        root["software"]["version"] = version
        root["inputs"]["release/dataset_description.json"] = described
        if version == OLD:
            del root["inputs"]["diffusion/tone.json"]

    target.edit(seal.ROOT, change)
    target.seal(rows)
    target.version = version
    return target


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A release as version 0.1.0 had them: without a drawing decoder, of grey levels as they come."""
    return Place(tmp_path_factory.mktemp("plain"), drawing=False, toned=False, measured=False)


@pytest.fixture
def target(place: Place, copied: Path) -> Target:
    return Target(place, copied)


@pytest.fixture(scope="module")
def old(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release of version 0.1.0; tests must not change it."""
    folder = tmp_path_factory.mktemp("old")
    return age(Target(place, Path(shutil.copytree(place.release, folder / "release")))).folder


# --------------------------------------------------------------------------------------- what is checked


def test_an_old_release_passes_all_that_needs_no_models(place, old):
    report = audit(Request(old, version=OLD, private=place.private))
    assert report.passed and seen(report) == set()
    assert [report.status(level) for level in range(8)] == ["PASS"] * 6 + ["NOT RUN"] * 2
    noted = {check.name for check in report.checks if check.level in (4, 5) and check.outcome != "pass"}
    assert noted == {"described"}, "settings and metadata are those of that version; its texts told other facts"
    note = checks(report, 3)["other-version"]
    assert note.outcome == "note" and INSTALL in note.text and "to make images again" in note.text


def test_the_version_is_the_auditors_to_say(old, place):
    """A release that names an older version is audited by the rules of today, unless the auditor knows better."""
    report = audit(Request(old, private=place.private))
    assert (0, "version") in seen(report) and INSTALL in checks(report, 0)["version"].text
    assert (1, "verifier") not in seen(report), "and nothing else is taken for a reason"
    assert run("audit", old).returncode == 1 and run("audit", old, "--version", OLD).returncode == 0
    assert (0, "version") in seen(audit(Request(place.release, version=OLD))), "nor is today's an old one"


def test_old_names_are_those_of_then(old):
    content = json.loads((old / seal.CONFIG).read_text())
    assert {"augmentation", "augment", "distill"} <= set(content) and "variants" in content["augmentation"]
    assert Sealed(old, json.loads((old / seal.ROOT).read_text())).study is not None


def test_images_of_an_old_release_are_made_again_where_the_weights_load(place, old, tmp_path):
    found = checks(audit(Request(old, version=OLD, models=place.results)), 6)
    assert found["images"].outcome == "pass" and "8 are the same bit by bit" in found["images"].text
    done = run("regenerate", old, "--models", place.results, "--out", tmp_path / "again", "--subject", UNTROUBLED)
    assert done.returncode == 0, done.stderr
    assert "1 bitwise" in done.stdout


def test_one_image_of_an_old_release_that_alone_differs_is_seen(target, place):
    """The others come out the same, so the version is no excuse."""
    age(target)
    _shift_age(target, 55.5)
    found = checks(audit(Request(target.folder, version=OLD, models=place.results)), 6)
    assert found["images"].outcome == "finding" and found["images"].examples[0].startswith(FIRST)


def test_where_this_version_draws_otherwise_re_execution_did_not_run(place, old, monkeypatch):
    def otherwise(rows: list[dict[str, Any]], release: Sealed, *_: Any) -> Any:
        shape = place.study.preprocess.shape
        return ((row, np.random.default_rng(0).random(shape).astype(np.float32), None) for row in rows)

    monkeypatch.setattr(reexecution, "remake", otherwise)
    report = audit(Request(old, version=OLD, models=place.results))
    assert report.status(6) == "NOT RUN" and report.passed and INSTALL in checks(report, 6)["images"].text
    assert audit(Request(place.release, models=place.results)).status(6) == "FINDINGS"


def test_weights_that_do_not_load_name_the_version_to_install(place, old, tmp_path):
    models = tmp_path / "models"
    for kind in ("autoencoder", "diffusion"):
        shutil.copytree(place.results / kind, models / kind)
    card = models / "diffusion/card.json"
    content = json.loads(card.read_text())
    write_json(card, content | {"settings": content["settings"] | {"a_key_of_then": 1}})
    report = audit(Request(old, version=OLD, models=models))
    assert report.status(6) == "NOT RUN" and report.passed and INSTALL in checks(report, 6)["images"].text
    done = run("regenerate", old, "--models", models, "--out", tmp_path / "again")
    assert done.returncode == 2 and INSTALL in done.stderr and "Traceback" not in done.stderr
    assert checks(audit(Request(old, version=OLD, models=tmp_path / "none")), 6)["models"].outcome == "finding", (
        "wrong folder"
    )


class Near:
    """A detector to which every image is a copy of a scan."""

    name = "learned"

    def similarity(self, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        return np.ones(len(images)), np.zeros(len(images), int)


def test_limits_are_those_of_the_detectors_of_then(place, old, monkeypatch, tmp_path):
    monkeypatch.setattr(privacy, "load_file", lambda path: {})
    monkeypatch.setattr(privacy, "load_detectors", lambda *given: [Near()])
    monkeypatch.setattr(privacy, "_stale", lambda release, results: [])
    found = checks(audit(Request(old, version=OLD, results=place.results)), 7)["images"]
    assert found.outcome == "note" and INSTALL in found.text and found.examples
    assert checks(audit(Request(place.release, results=place.results)), 7)["images"].outcome == "finding"
    monkeypatch.setattr(Near, "name", "a detector of today")
    found = checks(audit(Request(old, version=OLD, results=place.results)), 7)["images"]
    assert found.outcome == "not run" and INSTALL in found.text


def test_commands_on_an_old_release(place, old, tmp_path):
    assert any(f"version {OLD}" in line for line in story.explain(old, AGAIN))
    (tmp_path / "proof.json").write_text(json.dumps(story.prove(old, AGAIN)))
    command = [sys.executable, "-I", "-S", str(old / "provenance/verify.py"), "--proof", str(tmp_path / "proof.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = story.compare(old, place.release)
    assert not [line for line in lines if line.startswith("config")], "the same settings under other names"
    assert any("code.version" in line for line in lines)


# -------------------------------------------------------------------------------- what cannot be checked


def _break(target: Target, section: str, **keys: Any) -> None:
    target.edit(seal.CONFIG, lambda content: content[section].update(keys))
    target.seal()


def test_a_section_that_has_changed_keeps_nothing_else_from_being_checked(target):
    _break(age(target), "evaluate", a_key_of_then=1)
    report = target.audit(key=False)
    note = checks(report, 0)["other-version"]
    assert note.outcome == "note" and "in part" in note.text and INSTALL in note.text
    assert report.passed and [report.status(level) for level in range(6)] == ["PASS"] * 6
    _shift_age(target, 130.0)
    assert (4, "covariates") in seen(target.audit(key=False)), "and rows are still held against the plan"


def test_a_config_that_only_its_own_version_reads_stops_the_audit(target):
    _break(age(target), "generate", guidance_scale="of then")
    report = target.audit(key=False)
    assert seen(report) == set() and not report.passed
    assert [report.status(level) for level in range(8)] == ["PASS"] * 4 + ["NOT RUN"] * 4
    assert all(INSTALL in check.text for check in report.checks if check.level > 3)
    assert as_text(report).splitlines()[-1] == "nothing found; L4, L5, L6, L7 did not run"
    assert run("audit", target.folder, "--version", OLD).returncode == 2, (
        "a script that looks at nothing but the exit code is not fooled"
    )
    with pytest.raises(versions.OtherVersion, match=INSTALL):
        open_release(target.folder)


def test_a_config_that_no_version_could_read_is_a_finding(target):
    age(target).edit(seal.CONFIG, lambda content: content.pop("plan"))
    target.seal()
    assert (0, "readable") in seen(target.audit(key=False))
    with pytest.raises(UserError, match="not a well-formed release"):
        open_release(target.folder)


def test_our_own_version_has_no_such_excuse(target):
    _break(target, "evaluate", a_key_of_then=1)
    assert (0, "readable") in seen(target.audit(key=False))


def test_what_a_later_version_read_is_noted(target):
    age(target, UNKNOWN)
    report = target.audit(key=False)
    assert report.passed and checks(report, 4)["settings"].outcome == "note"
    assert "install meddiff-steps 99.1.0" in checks(report, 4)["settings"].text


@pytest.mark.parametrize("version", [{"x": 1}, "\x1b[2J; curl x | sh", "", None, 3])
def test_a_version_that_is_none_is_never_advised(target, version):
    target.edit(seal.ROOT, lambda root: root["software"].update(version=version))
    report = target.audit(key=False)
    assert ((0, "version") if isinstance(version, str) else (0, "root-form")) in seen(report)
    text = as_text(report)
    assert "\x1b" not in text and "install meddiff-steps" not in text


# -------------------------------------------------------------------------------- nothing is gained by it

#: What the programs of another version may have written otherwise: a note, as its own text says.
NOTED = {"metadata", "described"}
CLAIMED = {
    name: attack
    for name, attack in SEALED_AGAIN.items()
    if attack.level >= 3 and name != "false metadata by another version"
}
#: What version 0.1.0 did not have, attacked; a version is claimed that may have it.
LATER_PARTS = {
    name
    for name, attack in CLAIMED.items()
    if attack.check in ("labels", "measured", "previews") or name in ("another citation", "another lookup table")
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A release as this version has them; tests must not change it."""
    return Place(tmp_path_factory.mktemp("measured"))


@pytest.mark.parametrize("name", CLAIMED)
def test_an_attack_is_seen_whatever_version_the_release_claims(request, tmp_path, name):
    attack, later = CLAIMED[name], name in LATER_PARTS
    place = request.getfixturevalue("measured" if later else "place")
    target = Target(place, Path(shutil.copytree(place.release, tmp_path / "release", symlinks=True)))
    attack.apply(age(target, UNKNOWN if later else OLD))
    report = target.audit(key=False)
    if attack.check in NOTED:
        note = checks(report, attack.level)[attack.check]
        assert note.outcome == "note" and f"not as version {__version__} would write" in note.text
        assert f"install meddiff-steps {target.version}" in note.text and note.examples
    else:
        assert (attack.level, attack.check) in seen(report)


def test_a_run_that_claims_another_version_than_the_seal_is_at_most_noted(target):
    """Its settings are still compared; and that there are two versions is said."""
    path = next((target.folder / seal.RECORDS / "generated").glob("*.json")).relative_to(target.folder).as_posix()
    content = target.json(seal.CONFIG)
    target.edit(path, lambda record: record.update(old_record(record, content, OLD)))
    target.seal()
    report = target.audit(key=False)
    assert report.passed and checks(report, 3)["code"].outcome == "note"
    target.edit(path, lambda record: record["config"].update(sha256="0" * 64))
    target.seal()
    assert (4, "settings") in seen(target.audit(key=False))


# ------------------------------------------------------------------------------------------ names of steps


@pytest.mark.parametrize("step", ["distill", "second_model"])
def test_both_names_of_a_step_are_understood(step):
    def made(name: str, inputs: list[str], output: str) -> dict[str, Any]:
        files = [{"path": path, "sha256": "0"} for path in inputs]
        return {"step": name, "inputs": {"x": files}, "outputs": {"y": [{"path": output, "sha256": "0"}]}}

    runs = [made(step, ["plan", "filtered"], "manifest"), made("diffusion", ["manifest", "latents"], "model")]
    for name, output in (("plan", "plan"), ("filter", "filtered"), ("latents", "latents")):
        runs.append(made(name, [], output))
    found = lineage.trace({"model": "0"}, {run["outputs"]["y"][0]["path"]: run for run in runs}.get)
    assert not [problem for problem in chain._without_sources(found) if problem.startswith(("model", "manifest"))]
    runs[0]["inputs"]["x"].pop()
    assert any(problem.startswith("manifest") for problem in chain._without_sources(found))


@pytest.mark.parametrize(("step", "named"), [("evaluate", "evaluate"), ("measure", "measure"), ("measure", "evaluate")])
def test_a_frozen_config_is_named_for_a_step_or_its_stage(step, named):
    record = {"step": step}
    assert lineage.is_declared(record, "config", f"config/{named}-0123456789abcdef.json")
    assert not lineage.is_declared(record, "config", "config/privacy-0123456789abcdef.json")
    assert lineage.is_declared(record, "labels", "external/atlas.nii.gz")
