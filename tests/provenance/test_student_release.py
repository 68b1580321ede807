"""A release whose images a student drew: audited, explained and made again as any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_release import UNTROUBLED, Place

from meddiff_steps.audit.explain import explain
from meddiff_steps.audit.request import Request
from meddiff_steps.audit.run import audit
from meddiff_steps.core.folders import CARD, NETWORK, TONE
from meddiff_steps.release.models import pack


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("student"), student=True)


def test_a_release_of_a_student_is_audited_and_made_again(place: Place) -> None:
    report = audit(Request(place.release, models=place.results, seed="audit"))
    assert [(check.level, check.name, check.text) for check in report.checks if check.outcome == "finding"] == []
    found = {check.name: check for check in report.checks if check.level in (3, 6)}
    assert all(found[name].outcome == "pass" for name in ("chain", "sources", "weights", "models", "images"))
    assert "8 are the same bit by bit" in found["images"].text


def test_its_recipes_name_the_students_weights(place: Place) -> None:
    rows = [json.loads(line) for line in (place.release / "provenance/ledger.jsonl").read_text().splitlines()]
    weights = {name: json.loads((place.results / name / CARD).read_text())["weights_sha256"] for name in FOLDERS}
    recipes = [row["recipe"] for row in rows if row["recipe"]]
    assert {(recipe["diffusion"], recipe["sampler"]) for recipe in recipes} == {(weights["few_step"], "consistency")}
    assert weights["few_step"] != weights["diffusion"]
    text = "\n".join(explain(place.release, UNTROUBLED))
    assert "few_step" in text and "diffusion" in text


FOLDERS = ("few_step", "diffusion")


def test_the_teacher_alone_is_not_enough(place: Place, tmp_path: Path) -> None:
    for name in ("autoencoder", "decoder", "diffusion"):
        shutil.copytree(place.results / name, tmp_path / name)
    found = {check.name: check for check in audit(Request(place.release, models=tmp_path)).checks if check.level == 6}
    assert found["models"].outcome == "finding" and "no diffusion with weights" in found["models"].text


def test_packed_models_hold_the_student(place: Place, tmp_path: Path) -> None:
    privacy = json.loads((place.results / "privacy/report.json").read_text())
    pack(place.model_files(), place.release, tmp_path, "Tiny", privacy)
    for name in (*NETWORK, *TONE):
        assert (tmp_path / "diffusion" / name).read_bytes() == (place.results / "few_step" / name).read_bytes()
    report = audit(Request(place.release, models=tmp_path))
    assert {check.name: check.outcome for check in report.checks if check.level == 6}["models"] == "pass"
