"""The page of the blind test: nothing but what tiles show tells them apart, and its lines are what is scored."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import Browser, chromium
from fabricated import Fabricated
from PIL import Image

from meddiff_steps.config import freeze
from meddiff_steps.core.errors import UserError
from meddiff_steps.report.lineup import SMALLEST, tile
from meddiff_steps.steps import lineup, lineup_score


@pytest.fixture(scope="module", params=[(16, 20, 16), (24, 32)], ids=["3D", "2D"])
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fabricated:
    return Fabricated(tmp_path_factory.mktemp("study"), request.param, simulated=len(request.param) == 3)


def made(study: Fabricated, tag: str = "", seed: str | None = None) -> tuple[str, dict[str, object], Path]:
    settings = study.study.lineup.model_copy(update={"images": 6, "seed": seed})
    folder = study.root / f"lineup{tag}"
    lineup.run(
        config=freeze(study.study.model_copy(update={"lineup": settings}), "lineup", study.root),
        manifest=study.root / "cohort/manifest.parquet",
        images=study.shards,
        generated=[study.root / "generated.arrow"],
        plan=study.root / "plan.parquet",
        out=folder / "lineup.html",
        key=folder / "key.json",
    )
    return (folder / "lineup.html").read_text(), json.loads((folder / "key.json").read_text()), folder


def test_tiles_differ_in_nothing_but_what_they_show(study: Fabricated) -> None:
    page, key, folder = made(study)
    entries = key["images"]
    assert isinstance(entries, list) and len(entries) == 12
    shown = re.findall(r'<img alt="image (\d+)" src="data:image/png;base64,([^"]+)">', page)
    assert [int(number) for number, _ in shown] == [entry["image"] for entry in entries] == list(range(1, 13))
    headers, sizes = set(), set()
    for _, data in shown:
        content = base64.b64decode(data)
        picture = Image.open(io.BytesIO(content))
        sizes.add(picture.size)
        headers.add((content[:33], picture.mode, tuple(picture.info)))
        assert re.findall(rb"(IHDR|IDAT|IEND|tEXt|iTXt|zTXt|eXIf|tIME|pHYs|gAMA)", content)[:1] == [b"IHDR"]
        assert not {b"tEXt", b"iTXt", b"zTXt", b"eXIf", b"tIME"} & set(re.findall(rb"[a-zA-Z]{4}", content[33:45]))
    assert len(sizes) == len(headers) == 1
    assert min(next(iter(sizes))) >= SMALLEST
    for entry in entries:
        assert entry["id"] not in page
    assert "synthetic" not in re.sub(r"perhaps synthetic|surely synthetic|or synthetic", "", page)
    held = {"val", "test", "calibration"}
    manifest = pd.read_parquet(study.root / "cohort/manifest.parquet").set_index("scan_id")["split"]
    assert {manifest[entry["id"]] for entry in entries if entry["kind"] == "real"} <= held
    assert all(entry["id"].startswith("cohort") for entry in entries if entry["kind"] == "synthetic")  # no sweep
    warned = "scans of real people" in page
    assert warned == (len(study.pictures[0].shape) == 3)  # the 2D study has people
    assert not re.findall(r"https?://", page)
    assert str(study.root) not in page
    again = made(study, "-again")
    assert (again[0], again[1]) == (page, key)
    other = made(study, "-other", "another")[1]
    assert other["lineup"] != key["lineup"]
    assert folder.name == "lineup"


def test_answers_are_scored_from_files(study: Fabricated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, key, folder = made(study)
    entries = key["images"]
    assert isinstance(entries, list)
    rows = [f"{key['lineup']},AB,{e['image']},{100 if e['kind'] == 'synthetic' else 25}" for e in entries]
    answers = tmp_path / "answers.csv"
    answers.write_text("\n".join(["lineup,reader,image,certainty", *rows]) + "\n")
    lineup_score.run(folder / "key.json", answers, tmp_path / "scores.json")
    said = capsys.readouterr().out
    assert "AB: accuracy 1.00 [0.76, 1.00], 12 of 12 right (guessing: 3 to 9 in 95 of 100 cases" in said
    assert "guessing is right half of the time" in said
    assert json.loads((tmp_path / "scores.json").read_text())["readers"]["AB"]["auc"]["value"] == 1.0
    with pytest.raises(UserError, match="not the key of a line-up"):
        lineup_score.run(study.stage["evaluate"], answers)
    with pytest.raises(UserError, match="not a readable table"):
        lineup_score.run(folder / "key.json", tmp_path / "nowhere.csv")


def test_a_tile_is_the_same_for_equal_images_whatever_their_type() -> None:
    image = np.linspace(0, 1, 48).reshape(1, 6, 8)
    assert tile(image.astype(np.float16)) == tile(image.astype(np.float16).astype(np.float32))
    assert np.asarray(Image.open(io.BytesIO(tile(np.ones((1, 200, 240)))))).shape == (200, 240)


@pytest.mark.skipif(chromium() is None, reason="no Chromium or Chrome is installed")
def test_the_page_writes_the_lines_that_are_scored(study: Fabricated, tmp_path: Path) -> None:
    _, key, folder = made(study)
    with Browser(chromium() or "", tmp_path / "browser") as browser:
        browser.open(folder / "lineup.html", 1200)
        browser.evaluate("document.querySelector('#reader').value = 'A, B'")
        browser.evaluate('document.querySelector(\'input[name="3"][value="75"]\').click()')
        browser.evaluate('document.querySelector(\'input[name="1"][value="0"]\').click()')
        lines = browser.evaluate("document.querySelector('textarea').value").splitlines()
        said = browser.evaluate("document.querySelector('output').textContent")
        assert not browser.errors()
        browser.screenshot(tmp_path / "lineup.png")
    assert lines == ["lineup,reader,image,certainty", f"{key['lineup']},A  B,1,0", f"{key['lineup']},A  B,3,75"]
    assert said == "2 of 12 judged"
