"""What is known of the cohort that given weights learnt from."""

import json

import pandas as pd
import pytest

from meddiff_steps import config
from meddiff_steps.cohort.base import check_held_out, check_units
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.folders import CARD, NETWORK, files_of_base, manifest_of_base


def covariates(unit, **more):
    age = {"unit": unit, "range": [0, 1200]}
    return config.parse_study(
        {
            "study": "x",
            "cohort": {"source": "simulated"},
            "covariates": {"age": age, "sex": {"levels": ["F", "M"]}, **more},
            "plan": [{"name": "x", "subjects": 1}],
        },
        "test",
    ).covariates


@pytest.mark.parametrize("place", ["config.json", "release/provenance/config.json"])
def test_covariates_in_other_units_than_the_weights_know_are_refused(tmp_path, place):
    base = config.InitFrom(path=str(tmp_path))
    check_units(base, covariates("month"))  # nothing says in what they learnt
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    learnt = {"age": {"unit": "year", "range": [40, 90]}, "sex": {"levels": ["F", "M"]}}
    (tmp_path / place).write_text(json.dumps({"covariates": learnt}))
    with pytest.raises(UserError, match=r"covariates.age.unit: 'month', .* learnt age in 'year' .*Convert the column"):
        check_units(base, covariates("month"))
    check_units(base, covariates("year", weight={"unit": "kg", "range": [1, 200]}))
    check_units(base.model_copy(update={"models": ["autoencoder"]}), covariates("month"))


def manifest(rows):
    return pd.DataFrame(rows, columns=["scan_id", "subject_id", "content_sha256", "split"])


BASE = manifest([("a", "1", "x", "train"), ("b", "2", "y", "test"), ("c", "3", None, "train")])


def test_people_who_are_held_out_here_and_were_learnt_from_are_refused(tmp_path, caplog):
    seen = manifest([("p", "P", "x", "calibration"), ("q", "Q", "y", "train"), ("r", "R", None, "test")])
    with pytest.raises(UserError, match=r"scans of 1 subject\(s\) of the calibration or test split \(P\).*`seed` and"):
        check_held_out(seen, BASE, tmp_path)
    check_held_out(seen.assign(split=["train", "test", "test"]), BASE, tmp_path)
    assert not caplog.records
    check_held_out(manifest([("p", "1", "z", "test")]), BASE, tmp_path)  # another cohort may count its people alike
    assert "1 subject(s) of the calibration or test split have ids of subjects" in caplog.text


def test_the_manifest_that_weights_learnt_from_is_found_and_watched(tmp_path):
    models = tmp_path / "base/model-release"
    for name in NETWORK:
        (models / "diffusion" / name).parent.mkdir(parents=True, exist_ok=True)
        (models / "diffusion" / name).touch()
    assert manifest_of_base(None) is None and manifest_of_base(str(models)) is None
    assert {path.rpartition("/")[2] for path in files_of_base(str(models))} == set(NETWORK)
    learnt = tmp_path / "base/cohort/manifest.parquet"
    learnt.parent.mkdir()
    learnt.touch()
    assert manifest_of_base(str(models)) == manifest_of_base(str(tmp_path / "base")) == learnt
    assert files_of_base(str(models))[-1] == str(learnt) and CARD in str(files_of_base(str(models)))
