import pandas as pd
import pytest

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.steps.second_model import run

STUDY = {
    "study": "x",
    "cohort": {"source": "simulated"},
    "covariates": {"age": {"unit": "year", "range": [0, 100]}},
    "plan": [{"name": "syn", "subjects": 2}],
}


def files(folder, decisions):
    names = [f"teacher-{i}" for i in range(len(decisions))]
    pd.DataFrame({"sample_id": names, "age": 50.0}).to_parquet(folder / "plan.parquet")
    pd.DataFrame(
        {"sample_id": names, "decision": decisions, "seed_key": [f"{i:032x}" for i in range(len(names))]}
    ).to_parquet(folder / "decisions.parquet")
    return (
        freeze(parse_study(STUDY, "test"), "second_model", folder),
        folder / "plan.parquet",
        folder / "decisions.parquet",
        folder / "manifest.parquet",
    )


def test_only_accepted_images_are_learnt_from(tmp_path):
    paths = files(tmp_path, ["accepted"] * 100 + ["rejected"] * 10 + ["duplicate"] * 5)
    run(*paths)
    manifest = read_manifest(paths[3])
    assert len(manifest) == 105
    assert set(manifest.loc[manifest["split"] == "test", "scan_id"]) == {f"teacher-{i}" for i in range(110, 115)}
    assert 0 < (manifest["split"] == "val").sum() < 25


def test_too_few_accepted_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="0 accepted images are left to train on. Set second_model.subjects higher"):
        run(*files(tmp_path, ["rejected"] * 10))
