"""A release whose images were asked for in words: its ledger names them, and its images come out again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_release import Place

from meddiff_steps.audit.recipes import text_problems
from meddiff_steps.audit.request import Request
from meddiff_steps.audit.run import audit
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.errors import UserError
from meddiff_steps.models.trained import TrainedModel, load_denoiser
from meddiff_steps.provenance import verify
from meddiff_steps.release import croissant
from meddiff_steps.release.regeneration import regenerate_more
from meddiff_steps.release.sealed import open_release
from meddiff_steps.synthesis.generate import CohortGenerator

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("texts"), dims=2, texts=True)


def rows_of(place: Place) -> list[dict]:
    return [json.loads(line) for line in (place.release / "provenance/ledger.jsonl").read_text().splitlines()]


def test_it_is_audited_and_made_again_to_the_bit(place: Place) -> None:
    report = audit(Request(place.release, models=place.results, seed="audit"))
    assert [(check.level, check.name, check.text) for check in report.checks if check.outcome == "finding"] == []
    found = {check.name: check for check in report.checks}
    assert "8 are the same bit by bit" in found["images"].text and found["covariates"].outcome == "pass"


def test_rows_and_participants_name_the_texts(place: Place) -> None:
    asked = {row["sample_id"]: row["covariates"] for row in rows_of(place)}
    assert asked["syn000001"]["text"] == 'Mass "left", no effusion.' and asked["cf000000"]["text"] is None
    assert asked["syn000000"]["text"] == f"Mass, {asked['syn000000']['age']:.0f} years."
    table = pd.read_csv(place.release / "participants.tsv", sep="\t", keep_default_na=False).set_index("participant_id")
    assert table.loc["sub-syn000001", "text"] == asked["syn000001"]["text"]
    assert table.loc["sub-cf000000", "text"] == "n/a"
    assert "no person's report" in (place.release / "participants.json").read_text()


def test_the_suggested_split_takes_texts_for_no_levels(place: Place) -> None:
    table = pd.read_csv(place.release / "participants.tsv", sep="\t").set_index("participant_id")["split"]
    splits = verify.Splits(place.study.seed)
    for row in (row for row in rows_of(place) if row["image"]):
        levels = {"sex": row["covariates"]["sex"]}
        assert table[f"sub-{row['sample_id']}"] == splits.of(row["group"], row["noise_index"], levels)


@pytest.mark.skipif(not (BIN / "mlcroissant").exists(), reason="mlcroissant is not installed")
def test_croissant_names_the_texts(place: Place) -> None:
    script = (
        "import json, sys, mlcroissant; print(json.dumps([r['subjects/covariate_text'] for r in"
        " mlcroissant.Dataset(sys.argv[1]).records('subjects')], default=bytes.decode))"
    )
    command = [sys.executable, "-c", script, place.release / croissant.NAME]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [row["covariates"]["text"] for row in rows_of(place)]


def test_another_text_than_planned_is_a_finding(place: Place) -> None:
    row = next(row for row in rows_of(place) if row["sample_id"] == "syn000001")
    group = place.study.plan[0]
    assert not list(text_problems(row, group))
    row["covariates"]["text"] = "Somebody's report"
    assert list(text_problems(row, group)) == ['text "Somebody\'s report", planned \'Mass "left", no effusion.\'']


def test_more_subjects_take_the_texts_in_turn(place: Place, tmp_path: Path) -> None:
    comparisons, added = regenerate_more(open_release(place.release), place.results, tmp_path, 1, 8, "syn")
    assert {one.verdict for one in comparisons} == {"bitwise"}
    assert [one.covariates["text"] for one in added][1] == 'Mass "left", no effusion.'


def test_the_text_changes_the_image(place: Place) -> None:
    model = TrainedModel.load(
        *(place.results / name for name in ("autoencoder", "diffusion")),
        make_fabric(place.study.compute, 1),
        decoder=place.results / "decoder",
    )
    plan = pd.read_parquet(place.results / "plan.parquet").iloc[[1]].reset_index(drop=True)
    images = [
        next(CohortGenerator(model, place.study.generate).images(plan.assign(text=text), "x"))[1]
        for text in (plan["text"].iloc[0], "Left.", None)
    ]
    assert all(np.abs(images[0] - other).max() > 1e-4 for other in images[1:])


def test_a_model_with_another_vocabulary_is_refused(place: Place, tmp_path: Path) -> None:
    for name in ("autoencoder", "decoder", "diffusion"):
        shutil.copytree(place.results / name, tmp_path / name)
    card = json.loads((tmp_path / "diffusion/card.json").read_text())
    card["text"]["vocabulary"] = card["text"]["vocabulary"][::-1]
    (tmp_path / "diffusion/card.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="describes another encoder of texts than its weights are of"):
        load_denoiser(tmp_path / "diffusion")
    found = {check.name: check for check in audit(Request(place.release, models=tmp_path)).checks if check.level == 6}
    assert "pass" not in {found[name].outcome for name in found if name == "images"}
