"""Step `neighbours`: the private page of released images beside the training scans most like them; and bars by
subgroup.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricated import Fabricated
from safetensors.numpy import save_file

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import freeze
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.report import pictures
from meddiff_steps.report.names import Names
from meddiff_steps.steps import neighbours


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Fabricated:
    return Fabricated(tmp_path_factory.mktemp("study"), (16, 20, 16))


def write(study: Fabricated, decision: str = "accepted", status: str = "CALIBRATED") -> tuple[Path, list[str]]:
    """The page, and the ids of training scans by their number in the reference."""
    r = study.root
    shards = Shards(study.shards)
    splits = read_manifest(r / "cohort/manifest.parquet").set_index("scan_id")["split"].loc[shards.column("scan_id")]
    rows = np.flatnonzero((splits == "train").to_numpy())
    save_file({"rows": rows.astype(np.int64)}, r / "reference.safetensors")
    card = {
        "status": status,
        "detectors": ["aligned"],
        "thresholds": {"aligned": 0.9} if status == "CALIBRATED" else {},
    }
    (r / "calibration.json").write_text(json.dumps(card))
    names = Shards([r / "generated.arrow"]).column("sample_id")
    table = pd.DataFrame(
        {
            "sample_id": names,
            "decision": decision,
            "similarity_aligned": np.linspace(0.1, 0.8, len(names)),
            "nearest_aligned": 5,
        }
    )
    table.loc[table.index[-1], ["decision", "similarity_aligned"]] = "rejected", 0.99
    table.to_parquet(r / "decisions.parquet")
    neighbours.run(
        config=freeze(study.study, "neighbours", r),
        manifest=r / "cohort/manifest.parquet",
        images=study.shards,
        plan=r / "plan.parquet",
        filtered=[r / "generated.arrow"],
        decisions=r / "decisions.parquet",
        reference=r / "reference.safetensors",
        calibration=r / "calibration.json",
        out=r / "neighbours.html",
    )
    return r / "neighbours.html", [str(shards.column("scan_id")[row]) for row in rows]


def test_the_nearest_pairs_are_shown_and_the_page_says_that_it_is_private(
    study: Fabricated, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[pd.DataFrame] = []
    original = pictures.neighbours
    monkeypatch.setattr(pictures, "neighbours", lambda chosen, *rest: (seen.append(chosen), original(chosen, *rest))[1])
    page, names = write(study)
    text = page.read_text()
    assert "Private." in text
    assert text.count("<img") == 1
    assert "0.900 on, the filter rejects" in text
    ids = Shards([study.root / "generated.arrow"]).column("sample_id")
    assert seen[0]["sample_id"].tolist() == [
        str(name) for name in ids[-2:-8:-1]
    ]  # the most alike first, the rejected one left out
    assert set(seen[0]["scan_id"]) == {names[5]}
    first = page.read_bytes()
    write(study)
    assert page.read_bytes() == first


def test_an_uncalibrated_filter_is_said_and_nothing_accepted_is_refused(study: Fabricated) -> None:
    assert "not calibrated" in write(study, status="NOT_CALIBRATED")[0].read_text()
    with pytest.raises(UserError, match="no candidate was accepted"):
        write(study, decision="rejected")


def test_subgroups_are_drawn_with_their_ceilings_and_only_where_there_are_two() -> None:
    figure = {"value": 0.8, "low": 0.7, "high": 0.9, "n": 30, "ceiling": {"value": 0.9}}
    entry = {"images": {}, "covariates": {"age": {"r": figure}, "diagnosis": {"auc": figure}}}
    (picture,) = pictures.subgroups(
        {"sex": {"F": entry, "M": entry}, "site": {"A": entry, "B": {"images": {}, "covariates": {}}}},
        Names({"sex": "Sex of it"}),
    )
    assert [panel.title for panel in picture.panels] == ["by Sex of it"]
    assert "<path" in picture.panels[0].marks
    assert pictures.subgroups({"site": {"A": entry, "B": {"images": {}, "covariates": {}}}}, Names()) == []
    assert pictures.subgroups({}, Names()) == []
