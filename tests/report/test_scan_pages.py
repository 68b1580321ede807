"""Pages of all scans: the oddest first, every measure, and decisions that the next run obeys."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from browser import Browser, chromium, unloaded
from PIL import Image

from meddiff_steps.cohort.decisions import EXCLUDED, read_decisions
from meddiff_steps.config import freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.preprocess import QC_COLUMNS, preprocess_shard
from meddiff_steps.imaging.registration import load_template, template_on_grid
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn
from meddiff_steps.report.scan_pages import (
    _NO_MEASURE,
    COUNTED,
    LEGEND,
    TEMPLATE,
    in_order,
    meaning,
    measures,
    oddness,
    thumbnail,
)
from meddiff_steps.steps import quality as quality_step
from meddiff_steps.steps import scan_pages

SHAPE = (16, 20, 16)
STUDY: dict[str, Any] = {
    "study": "tiny",
    "cohort": {"source": "bids", "root": "somewhere"},
    "covariates": {"age": {"unit": "year", "range": [0, 100]}},
    "preprocess": {"shape": list(SHAPE), "spacing_mm": 10.0, "shards": 1},
    "plan": [{"name": "x", "subjects": 1}],
}


def ball(radius: float) -> np.ndarray:
    place = np.indices(SHAPE) - (np.array(SHAPE) - 1).reshape(3, 1, 1, 1) / 2
    return (np.linalg.norm(place, axis=0) < radius).astype(np.float16)[np.newaxis] * np.float16(0.6)


def table(count: int, odd: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        row: dict[str, Any] = dict.fromkeys(QC_COLUMNS)
        row |= {"scan_id": f"sub-{number:02}", "path": f"/x/{number}", "status": "ok"}
        row |= {"percentile_low": 0.0, "percentile_high": float(rng.normal(900, 30)), "cut_off_share": 0.0}
        row |= {"head_ml": float(rng.normal(1400, 90)), "skull_valley": 0.0}
        rows.append(row)
    rows[odd]["head_ml"] = 4000.0
    rows[odd + 1]["percentile_high"] = 9000.0
    rows[1] |= {"status": "left out", "reason": "no contrast", "message": "/x/1: flat. Check <the> scan."}
    rows[1] |= {"percentile_high": None, "head_ml": None}
    return pd.DataFrame(rows).astype(QC_COLUMNS)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    quality = table(12)
    quality.to_parquet(tmp_path / "qc.parquet", index=False)
    with ShardWriter(
        tmp_path / "s.arrow", {"scan_id": pa.string(), "image": TensorColumn("float16", (1, *SHAPE))}
    ) as shard:
        for number, name in enumerate(quality["scan_id"]):
            if quality["status"][number] == "ok":
                shard.append(scan_id=name, image=ball(3 + number / 3))
    return tmp_path


def made(place: Path, settings: dict[str, Any] | None = None, exclude: Path | None = None) -> Path:
    study = parse_study(STUDY | {"preprocess": STUDY["preprocess"] | (settings or {})}, "test")
    out = place / "quality/index.html"
    scan_pages.run(freeze(study, "scan_pages", place), place / "qc.parquet", [place / "s.arrow"], out, exclude=exclude)
    return out


def test_the_oddest_come_first() -> None:
    ordered = in_order(table(12))
    assert ordered["scan_id"].tolist()[:2] == ["sub-01", "sub-03"], "left out, then the odd one"
    assert ordered["oddest"][1] == "head_ml" and ordered["oddness"][1] > 20
    assert "percentile_high" not in set(ordered["oddest"]), "grey values of MR have no unit"
    ct = in_order(table(12).assign(background="air"))
    assert ct["oddest"][1] == "percentile_high" and ct["scan_id"][1] == "sub-04", "those of CT have"
    assert set(measures(table(12))) == {"percentile_high", "head_ml"}, "what is the same everywhere measures nothing"


def test_every_measure_is_told_on_the_page(place: Path) -> None:
    numbers = {name for name, kind in QC_COLUMNS.items() if kind == "float64"} - set(_NO_MEASURE)
    assert numbers == set(LEGEND) - {"oddness"}, "of the quality table"
    assert meaning("channel_lesion_on_head").startswith("share of that mask") and not meaning("channel_on_call")
    page = made(place).read_text(encoding="utf-8")
    assert f"<dt>head_ml</dt><dd>{LEGEND['head_ml']}</dd>" in page and LEGEND["skull_valley"] not in page


def test_oddness_is_in_robust_deviations() -> None:
    values = pd.DataFrame({"a": [*np.random.default_rng(1).normal(5, 2, 999), 1005.0], "b": [0.0] * 999 + [1.0]})
    found = oddness(values)
    assert found["a"].iloc[-1] == pytest.approx(500, rel=0.1), "one outlier does not widen the scale"
    assert found["b"].iloc[-1] == pytest.approx(1 / np.sqrt(0.001 * 0.999)), "else the standard deviation"


def test_a_thumbnail_shows_the_scan_and_its_outlines() -> None:
    head = ball(7.5)[0] > 0
    shown = np.asarray(Image.open(io.BytesIO(thumbnail(ball(5), head))), dtype=int)
    assert shown.shape[0] >= 112 and shown.shape[1] > 2.5 * shown.shape[0]
    for colour in (COUNTED, TEMPLATE):
        near = np.abs(shown - np.array(colour)).max(axis=-1) < 60
        assert 0.002 < near.mean() < 0.1, "a thin line"
    bare = np.asarray(Image.open(io.BytesIO(thumbnail(ball(5)))), dtype=int)
    assert not (np.abs(bare - np.array(TEMPLATE)).max(axis=-1) < 60).any()


def test_the_template_lies_where_registered_scans_do() -> None:
    head = template_on_grid(load_template("mni152"), (40, 48, 40), (4.0, 4.0, 4.0))
    assert 1500 < head.sum() * 4**3 / 1000 < 2200, "mL: the brain of MNI152 is a large one"
    others = [np.flatnonzero(head.any(axis=tuple(o for o in range(3) if o != axis))) for axis in range(3)]
    middle = [(found[0] + found[-1]) / 2 for found in others]
    assert np.allclose(middle, (np.array(head.shape) - 1) / 2, atol=1)


def test_a_page_has_every_scan_and_loads_nothing(place: Path) -> None:
    page = made(place).read_text()
    shown = re.findall(r'<li data-scan="([^"]+)"', page)
    assert shown[:2] == ["sub-01", "sub-03"] and sorted(shown) == [f"sub-{n:02}" for n in range(12)]
    assert page.count("data:image/jpeg;base64,") == 11 and "no contrast: /x/1: flat. Check &lt;the&gt; scan." in page
    assert "tiny: scans" in page and "Private: this page shows scans of real people" in page
    assert not re.search(r"https?://|<link|@import|src=\"(?!data:)", page)
    values = json.loads(html.unescape(re.search(r'data-scan="sub-03" data-values="([^"]+)"', page)[1]))  # type: ignore[index]
    assert values["head_ml"] == 4000 and set(values) == {"oddness", "percentile_high", "head_ml"}
    first = re.search(r"base64,([^\"]+)", page)
    assert first is not None and Image.open(io.BytesIO(base64.b64decode(first[1]))).format == "JPEG"
    assert made(place).read_text() == page, "equal inputs give equal bytes"


def test_many_scans_are_many_pages(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_pages, "PER_PAGE", 5)
    out = made(place)
    files = [out, out.with_name("page-002.html"), out.with_name("page-003.html")]
    counts = [file.read_text().count("<li data-scan") for file in files]
    assert counts == [5, 5, 2] and not out.with_name("page-004.html").exists()
    assert 'href="page-002.html"' in files[0].read_text() and 'href="index.html"' in files[2].read_text()


def decided(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(["scan_id\tdecision\tnote", *rows]) + "\n")
    return path


def test_decisions_are_read_and_shown_again(place: Path) -> None:
    file = decided(place / "qc.tsv", "sub-03\texclude\ttoo bright", "sub-04\texclude\t", "sub-04\tkeep\t")
    scans = [f"sub-{n:02}" for n in range(12)]
    assert read_decisions(file, scans) == {"sub-03": "too bright"}, "the last row about a scan counts"
    page = made(place, exclude=file).read_text()
    assert page.count('class="excluded"') == 1 and "(too bright)" in page
    for rows, said in (
        (["sub-3\texclude\t"], "1 scans are not of the cohort: sub-3"),
        (["sub-03\tmaybe\t"], "line 2: decision 'maybe', expected keep or exclude"),
    ):
        with pytest.raises(UserError, match=said):
            read_decisions(decided(place / "bad.tsv", *rows), scans)
    (place / "bad.tsv").write_text("scan\tdecision\n")
    with pytest.raises(UserError, match="no column scan_id"):
        read_decisions(place / "bad.tsv", scans)


def test_what_is_excluded_is_left_out_and_is_no_failure(tmp_path: Path) -> None:
    """Unread: the files are not even there."""
    config = parse_study(STUDY, "test").preprocess
    rows = pd.DataFrame({"scan_id": ["a", "b"], "subject_id": ["a", "b"], "path": ["/gone/a", "/gone/b"]})
    found = preprocess_shard(rows, config, tmp_path / "s.arrow", excluded={"b": "moved", "z": ""})
    assert found["scan_id"].tolist() == ["a", "b"] and found["reason"].tolist() == ["missing file", EXCLUDED]
    assert "(moved)" in found["message"][1] and "qc.tsv" in found["message"][1]

    whole = table(12)
    whole.loc[whole["scan_id"] > "sub-06", ["status", "reason", "message"]] = ["left out", EXCLUDED, "m"]
    study = parse_study(STUDY | {"preprocess": STUDY["preprocess"] | {"max_failed_share": 0.15}}, "test")
    frozen = freeze(study, "quality", tmp_path)
    whole.to_parquet(tmp_path / "q.parquet", index=False)
    quality_step.run(frozen, [tmp_path / "q.parquet"], tmp_path / "out.parquet")  # 1 of 7 failed, 5 were excluded
    whole.loc[2, ["status", "reason", "message"]] = ["left out", "no contrast", "m"]
    whole.to_parquet(tmp_path / "q.parquet", index=False)
    with pytest.raises(UserError, match="2 of 7 scans"):
        quality_step.run(frozen, [tmp_path / "q.parquet"], tmp_path / "out.parquet")


@pytest.mark.skipif(chromium() is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(place: Path, tmp_path: Path, width: int) -> None:
    page = made(place, exclude=decided(place / "qc.tsv", "sub-03\texclude\ttoo bright"))
    executable = chromium()
    assert executable is not None
    with Browser(executable, tmp_path / "profile") as browser:
        browser.open(page, width)
        order = "[...document.querySelectorAll('.scans li')].map(li => li.dataset.scan)"
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
        assert unloaded(browser) == []
        before = browser.evaluate(order)
        browser.evaluate("measure.value = 'head_ml', measure.dispatchEvent(new Event('change')), 0")
        after = browser.evaluate(order)
        assert sorted(after) == sorted(before) and after != before and after[-1] == "sub-01", "no value comes last"
        browser.evaluate(
            "(s => (s.value = 'exclude', s.dispatchEvent(new Event('change', {bubbles: true})), 0))"
            "(document.querySelector('[data-scan=sub-05] .decision'))"
        )
        lines = browser.evaluate("document.querySelector('#lines').value")
        assert browser.evaluate("document.querySelector('output').textContent") == "2 excluded"
        assert not browser.errors()
        browser.screenshot(tmp_path / f"scans-{width}.png")
    (tmp_path / "saved.tsv").write_text(lines)
    assert read_decisions(tmp_path / "saved.tsv", before) == {"sub-03": "too bright", "sub-05": ""}
