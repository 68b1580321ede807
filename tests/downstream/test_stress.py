"""Classifiers along covariates: strata, a stress test whose answer is known, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate, freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.downstream.stress import Strata
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn
from meddiff_steps.report.names import Names
from meddiff_steps.report.sections import downstream_section
from meddiff_steps.steps import downstream_neighbours as step
from tests.downstream.test_steps import ARMS, SHAPE, STAGES, Tiny, image

AGE = ContinuousCovariate(unit="year", range=(0, 120))


def test_numbers_have_bins_of_equal_counts_and_few_values_one_each() -> None:
    many = Strata.of(AGE, pd.Series(np.arange(40.0, 80.0)), 4)
    assert many.names[0] == "40 to 49.75 year" and len(many.names) == 4
    labels = many.label(pd.Series([39.0, 40.0, 49.0, 50.0, 79.0, 80.0, None]))
    assert labels.tolist() == [None, many.names[0], many.names[0], many.names[1], many.names[3], None, None]
    few = Strata.of(AGE, pd.Series([40.0, 60.0, 90.0] * 5), 4)
    assert few.names == ("40 year", "60 year", "90 year")
    assert few.label(pd.Series([40.0, 74.0, 90.0, 91.0])).tolist() == ["40 year", "60 year", "90 year", None]


def test_strata_of_large_numbers_have_names_of_their_own() -> None:
    count = ContinuousCovariate(unit="", range=(0, 1e9))
    few = Strata.of(count, pd.Series([100001.0, 100002.0, 100003.0]), 4)
    assert few.names == ("100001", "100002", "100003")
    assert few.label(pd.Series([100002.0, 100003.0])).tolist() == ["100002", "100003"]
    many = Strata.of(count, pd.Series(np.arange(1e6, 1e6 + 41)), 4)
    assert many.names == tuple(f"10000{low:02d} to 10000{low + 10}" for low in (0, 10, 20, 30))


def test_labels_have_a_stratum_per_level_that_was_planned() -> None:
    found = Strata.of(CategoricalCovariate(levels=["A", "B", "C"]), pd.Series(["A", "C"]), 4)
    assert found.names == ("A", "C")
    assert found.label(pd.Series(["C", "B", None])).tolist() == ["C", None, None]


STRESS = {"groups": ["edge"], "along": ["sex"]}


def with_edges(root: Path, levels: tuple[str, ...] = ("control", "case"), **changes: Any) -> Tiny:
    """A study with a group `edge`: cases show in women, and not in men."""
    made = Tiny(root, ARMS[:2], jobs=1, **changes)
    rng = np.random.default_rng(11)
    rows = [
        {"sample_id": f"edge{i:03d}", "group": "edge", "diagnosis": levels[i % len(levels)], "sex": "FM"[i // 2 % 2]}
        for i in range(80)
    ]
    plan = pd.concat([pd.read_parquet(root / "plan.parquet"), pd.DataFrame(rows).assign(site="A")])
    plan.to_parquet(root / "plan.parquet", index=False)
    with ShardWriter(
        root / "edge.arrow", {"sample_id": pa.string(), "image": TensorColumn("float16", (1, *SHAPE))}
    ) as shard:
        for row in rows:
            shown = row["diagnosis"] == "case" and row["sex"] == "F"
            shard.append(sample_id=row["sample_id"], image=image(shown, rng))
    return made


def study_with(made: Tiny, stress: dict[str, Any]) -> dict[str, Any]:
    raw = made.study.model_dump(mode="json")
    raw["plan"].append({"name": "edge", "subjects": 20, "covariates": "grid", "grid": {"sex": ["F", "M"]}})
    raw["downstream"]["stress"] = stress
    return raw


def test_a_classifier_that_fails_men_is_seen_to(tmp_path: Path) -> None:
    made = with_edges(tmp_path)
    made.study = parse_study(study_with(made, STRESS), "test")
    made.stage = {name: freeze(made.study, name, tmp_path) for name in STAGES}
    made.design()
    samples = made.data()
    assert not samples["image_id"].str.startswith("edge").any(), "no classifier learns from them"
    made.train()
    shards = [tmp_path / "filtered.arrow", tmp_path / "edge.arrow"]
    found = made.test(plan=tmp_path / "plan.parquet", filtered=shards)
    (along,) = found["stress"]
    assert along["covariate"] == "sex" and along["strata"] == ["F", "M"]
    groups = along["synthetic"]["real"]["groups"]
    assert groups["F"]["value"] > 0.8
    assert groups["M"]["low"] < 0.5 < groups["M"]["high"]
    assert along["synthetic"]["real"]["gap"]["value"] == pytest.approx(groups["F"]["value"] - groups["M"]["value"])
    assert set(along["real"]) == set(along["synthetic"]) == {"real", "real_synthetic"}
    assert along["real"]["real"]["groups"]["M"]["value"] > 0.7, "in real scans men are as easy as women"
    predictions = pd.read_parquet(tmp_path / "predictions.parquet")
    assert (predictions["set"] == "stress").sum() == 80 * 2 * 2
    section = downstream_section(found, {"designs": 1}, Names())
    assert any("M" in row and "synthetic" in table.header for table in section.tables for row in table.rows)
    with pytest.raises(UserError, match="give --plan and the --filtered shards"):
        made.test("-bad")


def test_a_group_with_one_level_of_the_target_is_refused(tmp_path: Path) -> None:
    made = with_edges(tmp_path, levels=("case",))
    made.study = parse_study(study_with(made, STRESS), "test")
    made.stage = {name: freeze(made.study, name, tmp_path) for name in STAGES}
    made.design()
    made.data()
    made.train()
    with pytest.raises(UserError, match="have not all levels of diagnosis"):
        made.test(plan=tmp_path / "plan.parquet", filtered=[tmp_path / "filtered.arrow", tmp_path / "edge.arrow"])


@pytest.mark.parametrize(
    ("stress", "message"),
    [
        ({"groups": ["syn"]}, "arms learn from the group syn"),
        ({"groups": ["other"]}, "the plan has no group other"),
        ({"groups": ["edge"], "along": ["diagnosis"]}, "diagnosis is no covariate beside the target"),
    ],
)
def test_what_cannot_be_tested_is_refused_when_the_study_is_read(
    tmp_path: Path, stress: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse_study(study_with(Tiny(tmp_path), stress), "test")


# ---------------------------------------------------------------------------------------------------- neighbours


def test_a_scan_and_its_neighbours_are_averaged_and_the_model_is_told_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Tiny(tmp_path, ARMS[:2], jobs=1)
    made.table["text"] = "Signs of " + made.table["diagnosis"]
    made.write_cohort()
    results = made.everything()
    raw = made.study.model_dump(mode="json")
    raw["downstream"]["neighbours"] = {"count": 2}
    told = []

    def drawn(_: Any, scan: np.ndarray, subject: pd.DataFrame, root: str, *, samples: int, **__: Any) -> np.ndarray:
        told.append((subject[list(made.study.covariates)].isna().all(axis=None), "text" in subject, root))
        return np.stack([scan, scan, 1 - scan])[:samples]

    def run(name: str) -> dict[str, Any]:
        monkeypatch.setattr(step.TrainedModel, "load", classmethod(lambda *_, **__: None))
        out = tmp_path / f"{name}.json"
        step.run(
            freeze(parse_study(raw, "test"), "downstream_neighbours", tmp_path),
            weights=[tmp_path / "0.safetensors"],
            reduced=tmp_path / "images.arrow",
            predictions=tmp_path / "predictions.parquet",
            opened=tmp_path / "opened.json",
            manifest=tmp_path / "manifest.parquet",
            images=[tmp_path / "real.arrow"],
            autoencoder=tmp_path,
            diffusion=tmp_path,
            out=out,
        )
        return json.loads(out.read_text())

    monkeypatch.setattr(step, "neighbours", drawn)
    found = run("same")
    assert len(told) == 40
    assert {(empty, text) for empty, text, _ in told} == {(True, False)}
    assert len({root for _, _, root in told}) == 40
    for arm, alone in zip(found["arms"], results["arms"], strict=True):
        assert arm["name"] == alone["name"]
        assert arm["figures"]["auc"] == alone["figures"]["test"]["auc"], "neighbours that are the scan change nothing"
        assert arm["figures"]["gain"]["value"] == 0
    assert found["opened"] == results["opened"]["frozen_sha256"]
    # What is drawn says the opposite of the scan, twice: so does the average.
    other = dict(zip(made.table["scan_id"], made.images, strict=True))
    cases = made.table.set_index("scan_id")["diagnosis"]
    names = {level: cases.index[cases == level][0] for level in ("control", "case")}

    def opposite(_: Any, scan: np.ndarray, subject: pd.DataFrame, root: str, **__: Any) -> np.ndarray:
        own = cases[root.rpartition("/")[2]]
        return np.stack([other[names["control" if own == "case" else "case"]]] * 2).astype(np.float32)

    monkeypatch.setattr(step, "neighbours", opposite)
    turned = run("turned")["arms"][0]["figures"]
    assert turned["auc"]["value"] < 0.2 < 0.8 < results["arms"][0]["figures"]["test"]["auc"]["value"]
    assert turned["gain"]["high"] < 0
    section = downstream_section(results, {"designs": 1}, Names(), found)
    assert any("AUC with neighbours" in table.header for table in section.tables)
