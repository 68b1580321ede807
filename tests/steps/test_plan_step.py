"""The step `plan`, run as a person or a workflow runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from meddiff_steps.config import freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.steps.plan import run
from meddiff_steps.synthesis.size import plan_shards, planned_subjects

SPLITS = ["train"] * 8 + ["val", "test"]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    n = 200
    age = rng.uniform(44, 82, n).round(1)
    frame = pd.DataFrame(
        {
            "scan_id": [f"sub-{i:03d}" for i in range(n)],
            "subject_id": [f"sub-{i:03d}" for i in range(n)],
            "session_id": pd.Series([None] * n, dtype=object),
            "path": "x.nii.gz",
            "sha256": [f"{i:064x}" for i in range(n)],
            "content_sha256": [f"{i:064x}" for i in range(n)],
            "split": [SPLITS[i % 10] for i in range(n)],
            "age": np.where(np.arange(n) % 10 == 0, np.nan, age),
            "sex": np.where(rng.random(n) < 0.5, "F", "M").astype(object),
        }
    )
    # Held-out subjects are far from the training ones, so that a plan that read them would be seen.
    frame.loc[frame["split"] != "train", "age"] = 99.0
    path = tmp_path / "manifest.parquet"
    frame.to_parquet(path, index=False)
    return path


def config(tmp_path: Path, *groups: dict[str, Any]) -> Path:
    study = parse_study(
        {
            "study": "t",
            "cohort": {"source": "simulated"},
            "covariates": {"sex": {"levels": ["F", "M"]}, "age": {"unit": "year", "range": [18, 100], "column": "AGE"}},
            "plan": list(groups),
            "generate": {"shard_size": 20},
        },
        "test",
    )
    return freeze(study, "plan", tmp_path / "frozen")


def test_a_plan_is_written_from_the_training_rows(tmp_path, manifest):
    groups = (
        {"name": "syn", "subjects": 50},
        {"name": "cf", "subjects": 3, "covariates": "counterfactual", "grid": {"age": [50, 60, 70]}},
    )
    frozen = config(tmp_path, *groups)
    run(frozen, manifest, tmp_path / "plan.parquet")
    plan = pd.read_parquet(tmp_path / "plan.parquet")
    assert len(plan) == 59 and plan["shard"].nunique() == 3 and plan["age"].max() < 83
    assert planned_subjects(parse_groups(groups)) == 59 and plan_shards(parse_groups(groups), 20) == 3
    run(frozen, manifest, tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "plan.parquet").read_bytes()


def parse_groups(groups):
    from meddiff_steps.config import PlanGroup

    return [PlanGroup.model_validate(g) for g in groups]


def test_a_table_of_requests_is_read_with_gaps_as_nulls_of_the_right_type(tmp_path, manifest):
    (tmp_path / "mine.csv").write_text("sex,age,note\n,61.5,a\n,n/a,b\n", encoding="utf-8")
    run(
        config(tmp_path, {"name": "mine", "subjects": 2, "covariates": "table", "table": str(tmp_path / "mine.csv")}),
        manifest,
        tmp_path / "plan.parquet",
    )
    plan = pd.read_parquet(tmp_path / "plan.parquet")
    assert plan["age"].iloc[0] == 61.5 and plan["age"].isna().iloc[1] and plan["sex"].isna().all()
    assert str(pq.read_schema(tmp_path / "plan.parquet").field("sex").type) == "string"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sex,age\nF,130\n", "found '130', expected a number within [18, 100]"),
        ("sex,age\nX,50\n", "found 'X', expected one of ['F', 'M']"),
        ("sex\nF\n", "no column for covariate age"),
        ("sex,age\n", "no rows"),
        (None, "no such table"),
    ],
)
def test_a_bad_table_ends_with_one_message_and_no_traceback(tmp_path, manifest, text, message):
    table = tmp_path / "mine.csv"
    if text is not None:
        table.write_text(text, encoding="utf-8")
    frozen = config(tmp_path, {"name": "mine", "subjects": 1, "covariates": "table", "table": str(table)})
    command = [
        sys.executable,
        "-m",
        "meddiff_steps",
        "plan",
        "--config",
        frozen,
        "--manifest",
        manifest,
        "--out",
        tmp_path / "plan.parquet",
    ]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert "plan.mine.table" in done.stderr and not (tmp_path / "plan.parquet").exists()


def test_what_preprocessing_left_out_is_neither_drawn_from_nor_asked_for(tmp_path, manifest):
    """Of three sites one was excluded: a plan has none of it, and cannot be asked for it."""
    scans = pd.read_parquet(manifest)
    site = np.array(list("ABC"))[np.arange(len(scans)) % 3]
    scans.assign(sex=site).to_parquet(manifest, index=False)
    quality = tmp_path / "qc.parquet"
    status = np.where(site == "C", "left out", "ok")
    pd.DataFrame({"scan_id": scans["scan_id"], "status": status}).to_parquet(quality)
    covariates = {"sex": {"levels": ["A", "B", "C"]}, "age": {"unit": "year", "range": [18, 100]}}

    def frozen(**group: Any) -> Path:
        study = {"study": "t", "cohort": {"source": "simulated"}, "covariates": covariates}
        return freeze(
            parse_study(study | {"plan": [{"name": "syn", "subjects": 60, **group}]}, "test"), "plan", tmp_path
        )

    run(frozen(), manifest, tmp_path / "plan.parquet", quality)
    assert set(pd.read_parquet(tmp_path / "plan.parquet")["sex"]) == {"A", "B"}
    with pytest.raises(UserError, match=r"plan\.syn.*C"):
        run(frozen(where={"sex": "C"}), manifest, tmp_path / "plan.parquet", quality)
    pd.read_parquet(quality).iloc[1:].to_parquet(quality)
    with pytest.raises(UserError, match=r"qc\.parquet: nothing of 1 scans of the manifest, for example sub-000"):
        run(frozen(), manifest, tmp_path / "plan.parquet", quality)
