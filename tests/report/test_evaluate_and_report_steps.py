"""Steps `evaluate` and `report` on a tiny fabricated study of balls with a known volume, in 3D and 2D."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from fabricated import Fabricated

from meddiff_steps.config import freeze
from meddiff_steps.core.errors import UserError
from meddiff_steps.evaluation import metrics as metrics_module
from meddiff_steps.imaging import selection
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn
from meddiff_steps.release.card import quality
from meddiff_steps.report import sections, tables
from meddiff_steps.steps import predictors as predictors_step


@pytest.fixture(scope="module", params=[(16, 20, 16), (24, 32)], ids=["3D", "2D"])
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fabricated:
    fabricated = Fabricated(tmp_path_factory.mktemp("study"), request.param, simulated=len(request.param) == 3)
    fabricated.evaluate()
    fabricated.page = fabricated.report()
    return fabricated


def test_metrics_of_a_perfect_generator(study: Fabricated) -> None:
    metrics = study.metrics()
    size, sex = metrics["covariates"]["size"], metrics["covariates"]["sex"]
    assert size["r"]["value"] > 0.97
    assert size["slope"]["value"] == pytest.approx(1.0, abs=0.1)
    assert size["share_of_ceiling"]["value"] == pytest.approx(1.0, abs=0.03)
    assert sex["auc"]["value"] > 0.9
    beyond = size["extrapolation"]["mae"]["n"] if "extrapolation" in size else 0
    assert size["r"]["n"] + beyond == 39  # one request is null; the sweep is left out
    assert metrics["reconstruction"]["psnr"]["value"] == pytest.approx(20.0, abs=0.05)
    assert metrics["reconstruction"]["psnr"]["n"] == 24  # the test split alone
    for figure in metrics["spectrum"]["synthetic"].values():
        assert figure["low"] < 1.1
        assert figure["high"] > 0.9
        assert figure["ceiling"]["n"] == 48
    for figure in metrics["spectrum"]["reconstruction"].values():
        assert figure["value"] == pytest.approx(1.0, abs=0.02)  # a constant shift is no blur
    assert metrics["n"] == {
        "subjects": 120,
        "scans": 120,
        "training_subjects": 72,
        "training_scans": 72,
        "held_out_subjects": 48,
        "held_out_scans": 48,
        "held_out_splits": ["test", "val", "calibration"],
        "planned": 42,
        "generated": 42,
        "synthetic": 40,
        "synthetic_groups": ["cohort"],
        "reconstructions": 24,
        "reconstruction_splits": ["test"],
    }


def test_realism_and_diversity_of_a_perfect_generator(study: Fabricated) -> None:
    metrics = study.metrics()
    assert set(metrics["realism"]) == set(metrics["diversity"]["features"]) == set(SPACES)
    for name, entry in metrics["realism"].items():
        assert entry["images"] == {"synthetic": 40, "training": 40, "held_out": 45, "reconstructions": 33}
        assert re.fullmatch("[0-9a-f]{16}", entry["digest"])
        assert metrics["diversity"]["features"][name]["digest"] == entry["digest"]
        assert entry["kid"]["p_value"] > 0.01
        assert entry["frechet"]["low"] < entry["frechet"]["floor"]["high"]
        assert entry["classifier_auc"]["low"] < entry["classifier_auc"]["floor"]["high"]
        assert (entry["frechet"]["n"], entry["classifier_auc"]["n"]) == (40, 85)
        for key in ("precision", "recall", "density", "coverage", "vendi"):
            figure = metrics["diversity"]["features"][name][key]
            assert figure["value"] > 0.75 * figure["ceiling"]["value"], (name, key)
    kind = metrics["diversity"]["ssim_settings"]["metric"]
    pairs = metrics["diversity"][kind]
    assert (pairs["pairs"], pairs["floor"]["pairs"]) == (20, 20)
    assert pairs["low"] < pairs["floor"]["high"]
    assert set(metrics["distributions"]) == {"size"}
    assert metrics["distributions"]["size"]["relative"]["value"] < 0.6
    assert set(metrics["subgroups"]["sex"]) == {"F", "M"}
    assert metrics["subgroups"]["sex"]["F"]["covariates"]["size"]["r"]["value"] > 0.9
    assert len(metrics["training_range"]["size"]) == 2
    places = pd.read_parquet(study.root / "evaluation/components.parquet")
    assert places.groupby(["space", "kind"]).size().to_dict() == {
        (s, k): n for s in SPACES for k, n in (("held_out", 45), ("synthetic", 40))
    }


def test_a_failed_generator_is_caught(study: Fabricated, tmp_path: Path) -> None:
    """The same image for everybody."""
    plan = pd.read_parquet(study.root / "plan.parquet")
    rng = np.random.default_rng(3)
    with ShardWriter(
        tmp_path / "same.arrow", {"sample_id": pa.string(), "image": TensorColumn("float16", study.pictures[0].shape)}
    ) as shard:
        for name in plan["sample_id"]:
            shard.append(
                sample_id=name, image=np.clip(study.pictures[0] + rng.normal(0, 0.01, study.pictures[0].shape), 0, 1)
            )
    metrics = study.evaluate("-same", generated=[tmp_path / "same.arrow"])
    for name, entry in metrics["diversity"]["features"].items():
        assert entry["recall"]["high"] < entry["recall"]["ceiling"]["low"], name
        assert entry["vendi"]["high"] < entry["vendi"]["ceiling"]["low"], name
    pairs = metrics["diversity"][metrics["diversity"]["ssim_settings"]["metric"]]
    assert pairs["low"] > pairs["floor"]["high"]
    assert all(entry["kid"]["p_value"] < 0.02 for entry in metrics["realism"].values())


def test_too_few_images_say_so(study: Fabricated) -> None:
    plan = pd.read_parquet(study.root / "plan.parquet").assign(group="cohort")
    plan.loc[6:, "group"] = "sweep"
    plan.to_parquet(study.root / "plan-few.parquet", index=False)
    metrics = study.evaluate("-six", plan=study.root / "plan-few.parquet", embedder=None)
    assert set(metrics["realism"]) == {"random", "radiomics", "structure"}
    assert metrics["discriminability"]["skipped"].startswith("6 images")
    assert "figures" not in metrics["sanity"]
    assert metrics["realism"]["random"]["skipped"].startswith("6 images")
    assert pd.read_parquet(study.root / "evaluation-six/components.parquet").empty


def test_evaluate_repeats_byte_for_byte_and_batches_do_not_matter(
    study: Fabricated, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.evaluate("-again")
    for name in ("metrics.json", "predictions.parquet", "components.parquet"):
        assert (study.root / "evaluation-again" / name).read_bytes() == (study.root / "evaluation" / name).read_bytes()
    monkeypatch.setattr(selection, "BATCH_VALUES", 7 * study.pictures[0].size)
    other = study.evaluate("-batches")
    for key in ("r", "slope"):
        assert other["covariates"]["size"][key]["value"] == pytest.approx(
            study.metrics()["covariates"]["size"][key]["value"], rel=1e-4
        )


def test_large_cohorts_are_measured_on_a_stable_choice(study: Fabricated, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAX_SYNTHETIC", 20), ("MAX_HELD_OUT", 30), ("MAX_TRAINING_SCANS", 50)):
        monkeypatch.setattr(metrics_module, name, value)
    monkeypatch.setattr(predictors_step, "MAX_TRAINING_SCANS", 50)
    study.learn("-few")
    metrics = study.evaluate("-few", predictors=study.root / "predictors-few")
    assert (metrics["n"]["synthetic"], metrics["n"]["held_out_scans"], metrics["predictors"]["training_scans"]) == (
        20,
        30,
        50,
    )
    assert metrics["n"]["training_scans"] == 72  # what the generator learnt from does not shrink


def test_report_is_self_contained_and_repeats_byte_for_byte(study: Fabricated) -> None:
    page = study.page
    assert study.report("-again") == page
    assert (study.root / "sheet.png").read_bytes() == (study.root / "sheet-again.png").read_bytes()
    assert (study.root / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert not re.findall(r"https?://", page)
    assert not re.findall(r"<(link|iframe|object)\b", page)
    assert re.findall(r"<script[^>]*>", page) == ["<script>"] * (
        len(study.pictures[0].shape) == 4
    )  # the slice viewer, for volumes alone
    assert re.findall(r'src="(.{10})', page)
    assert set(re.findall(r'src="(.{10})', page)) == {"data:image"}
    assert str(study.root) not in page


def test_report_says_what_matters(study: Fabricated) -> None:
    page = study.page
    assert "Balls &amp; &lt;discs&gt;" in page
    assert ("SIMULATED training data" in page) == (study.stage["report"].read_text().find('"simulated"') >= 0)
    for words in (
        "nobody has tested whether these images give training subjects away",
        "whether a model that learns from these images gains anything was not studied",
        "a linear classifier tells the images from held-out scans with AUC",
        "PSNR, dB",
        "ceiling",
        "above half",
        "below a quarter of Nyquist",
        "120 of 120 scans preprocessed",
        "Do they look like scans?",
        "Do they follow the covariates?",
        "Could they expose somebody?",
        "Are they of use?",
        "How were they made?",
        "AUC of telling from real scans",
        "Vendi score: how many differ",
        "convolutional network with fixed random weights",
        "distance of distributions",
        "Sex = F",
        "Number of voxels, voxel",
    ):
        assert words.lower() in page.lower(), words
    assert len(re.findall(r'<li class="(?:good|middling|bad|not-measured)">', page)) == 5
    assert not re.search(r">[^<]*\b(size|sex):? (?:=|missing)", page), "a key where a name should be"
    charts = re.findall(r"<svg .*?</svg>", page, re.S)
    assert len(charts) >= 9
    assert all(re.search(r"<title>.{4,}</title><desc>.{20,}</desc>", chart) for chart in charts)
    captions = re.findall(r"<figcaption><b>(Figure|Table) (\d+)\.</b> [^<]{20,}</figcaption>", page)
    for kind in ("Figure", "Table"):
        assert [int(n) for k, n in captions if k == kind] == list(range(1, 1 + sum(k == kind for k, _ in captions)))
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) >= 12
    assert all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    folded = re.findall(r"<summary>([^<]*)</summary>", page)
    assert {"Cohort", "Autoencoder", "Drawing decoder", "Diffusion model"} <= set(folded)
    assert "Training curves of the drawing decoder" in page
    without = study.report("-without", decoder=None)
    assert "Drawing decoder" not in without and "drawing decoder" not in without


def test_report_sets_the_first_model_beside_the_second(study: Fabricated, tmp_path: Path) -> None:
    gate = {"name": "copies before the filter", "limit": 0.01, "figure": {"value": 0.004, "low": 0, "high": 0.02}}
    counts = dict.fromkeys(("planned", "released", "duplicates", "failed", "candidates", "rejected"), 1)
    judged = {"counts": counts, "calibration": {"status": "CALIBRATED"}, "controls": None, "attacks": {}}
    for folder, verdict in (("teacher/privacy", "FAIL"), ("privacy", "PASS")):
        (tmp_path / folder).mkdir(parents=True)
        found = judged | {"verdict": verdict, "gates": [gate | {"outcome": verdict}]}
        (tmp_path / folder / "report.json").write_text(json.dumps(found))
    copytree(study.root / "evaluation", tmp_path / "teacher/evaluation")
    page = study.report("-second", privacy=tmp_path / "privacy/report.json", teacher=tmp_path / "teacher")
    assert "Verdict: PASS" in page
    assert "The second model beside the first" in page
    assert re.search(r"verdict</th>\s*<td[^>]*>FAIL</td>\s*<td[^>]*>PASS</td>", page)
    alone = study.report("-alone", privacy=tmp_path / "privacy/report.json")
    assert "Verdict: PASS" in alone
    assert "The second model beside the first" not in alone


def damaged(study: Fabricated, name: str, change: Any) -> Path:
    table = pd.read_parquet(study.root / name)
    path = study.root / f"damaged-{Path(name).name}"
    change(table).to_parquet(path, index=False)
    return path


def test_inputs_of_different_runs_are_refused(study: Fabricated, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row for sample_id cohort000"):
        study.evaluate("-bad", plan=damaged(study, "plan.parquet", lambda t: t[1:]))
    with pytest.raises(UserError, match="no column size"):
        study.evaluate("-bad", plan=damaged(study, "plan.parquet", lambda t: t.drop(columns="size")))
    with pytest.raises(UserError, match="no row for scan_id"):
        study.evaluate("-bad", manifest=damaged(study, "cohort/manifest.parquet", lambda t: t[1:]))
    with pytest.raises(UserError, match="more than once"):
        study.evaluate("-bad", images=[*study.shards, study.shards[0]])
    with pytest.raises(UserError, match="not a readable plan"):
        study.evaluate("-bad", plan=study.shards[0])
    with pytest.raises(UserError, match="no preprocessed scan is in the train split"):
        study.evaluate("-bad", manifest=damaged(study, "cohort/manifest.parquet", lambda t: t.assign(split="test")))
    with pytest.raises(UserError, match="held-out split"):
        study.evaluate("-bad", manifest=damaged(study, "cohort/manifest.parquet", lambda t: t.assign(split="train")))
    assert not (study.root / "evaluation-bad").exists()


def test_a_failed_image_is_named(study: Fabricated, tmp_path: Path) -> None:
    path = tmp_path / "generated.arrow"
    shape = study.pictures[0].shape
    with ShardWriter(path, {"sample_id": pa.string(), "image": TensorColumn("float16", shape)}) as shard:
        shard.append(sample_id="cohort000", image=study.pictures[0])
        shard.append(sample_id="cohort001", image=np.full(shape, np.nan))
    with pytest.raises(UserError, match=r"cohort001.*not finite"):
        study.evaluate("-bad", generated=[path])
    with ShardWriter(path, {"sample_id": pa.string(), "image": TensorColumn("float16", (1, 8, 8))}) as shard:
        shard.append(sample_id="cohort000", image=np.zeros((1, 8, 8)))
    with pytest.raises(UserError, match="shape"):
        study.evaluate("-bad", generated=[path])


def test_training_scans_among_the_reconstructions_are_refused(study: Fabricated, tmp_path: Path) -> None:
    path, shape = tmp_path / "reconstructions.arrow", study.pictures[0].shape
    tensor = TensorColumn("float16", shape)
    with ShardWriter(
        path, {"scan_id": pa.string(), "split": pa.string(), "image": tensor, "reconstruction": tensor}
    ) as shard:
        shard.append(scan_id="sub-000_T1w", split="test", image=study.pictures[0], reconstruction=study.pictures[0])
    with pytest.raises(UserError, match="training scans"):
        study.evaluate("-bad", reconstructions=path)


def figures_of(entry: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every figure in a JSON report by its path, floors and ceilings among them."""
    if isinstance(entry, dict):
        if entry.keys() >= {"value", "low", "high"}:
            yield name, entry
        for key, part in entry.items():
            yield from figures_of(part, f"{name}/{key}")


def test_another_evaluation_seed_gives_overlapping_intervals(study: Fabricated, tmp_path: Path) -> None:
    """Values are the same where nothing but the interval is drawn, and every interval overlaps what the first seed
    gave.
    """
    other = study.study.model_copy(update={"evaluate": study.study.evaluate.model_copy(update={"seed": "another"})})
    first, second = (
        dict(figures_of(m))
        for m in (
            study.metrics(),
            study.evaluate("-seed", config=freeze(other, "evaluate", tmp_path)),
        )
    )
    assert first.keys() == second.keys()
    known = [name for name, figure in first.items() if figure["low"] is not None]
    assert len(known) > 60
    apart = [
        name
        for name in known
        if not (first[name]["low"] <= second[name]["high"] and second[name]["low"] <= first[name]["high"])
    ]
    assert not apart
    drawn = [name for name in known if any(first[name][end] != second[name][end] for end in ("low", "high"))]
    assert len(drawn) > 0.5 * len(known)  # the seed is used
    assert all(
        first[name]["value"] == second[name]["value"]
        for name in known
        if name.startswith(("/covariates", "/reconstruction", "/subgroups"))
    )


def test_chosen_spaces_and_metrics_have_the_numbers_of_all_of_them(study: Fabricated) -> None:
    every = study.metrics()
    some = study.study.evaluate.model_copy(update={"spaces": ["embedder", "random"], "metrics": ["kid"]})
    config = freeze(study.study.model_copy(update={"evaluate": some}), "evaluate", study.root)
    found = study.evaluate("-chosen", config=config)
    assert set(found["realism"]) == {"random", "embedder"}
    for name, entry in found["realism"].items():
        assert entry == {key: value for key, value in every["realism"][name].items() if key not in LEFT_OUT}
        assert found["diversity"]["features"][name] == every["diversity"]["features"][name]
    for name, figures in found["sanity"]["figures"].items():
        whole = every["sanity"]["figures"][name]
        assert figures == {key: value for key, value in whole.items() if key not in LEFT_OUT}
    del found["realism"], found["diversity"]["features"], every["realism"], every["diversity"]["features"]
    del found["sanity"]["figures"], every["sanity"]["figures"]
    assert found == every
    places = pd.read_parquet(study.root / "evaluation/components.parquet").query("space in ('random', 'embedder')")
    chosen = pd.read_parquet(study.root / "evaluation-chosen/components.parquet")
    pd.testing.assert_frame_equal(chosen, places.reset_index(drop=True))


LEFT_OUT = {"frechet", "classifier_auc"}
SPACES = ("random", "radiomics", "embedder", "structure")


def test_the_page_and_the_card_of_a_release_cope_with_chosen_spaces_and_metrics(study: Fabricated) -> None:
    some = study.study.evaluate.model_copy(update={"spaces": ["radiomics"], "metrics": ["frechet"]})
    config = freeze(study.study.model_copy(update={"evaluate": some}), "evaluate", study.root)
    metrics = study.evaluate("-one", config=config)
    section = sections.realism_section(metrics, pd.read_parquet(study.root / "evaluation-one/components.parquet"))
    assert len(section.pictures) == 1
    assert "AUC" not in " ".join(section.text)
    rows = section.tables[0].rows
    assert {row[0] for row in rows} == {"grey values and texture", "images"}
    assert [row[1] for row in rows][:2] == ["Frechet distance (squared)", "precision: look real"]
    assert "radiomics" not in quality(metrics)  # which shows the classifier alone
    metrics["realism"]["radiomics"]["precision of hands"] = metrics["realism"]["radiomics"]["frechet"]
    shown = tables.realism_table(metrics).rows
    assert ["grey values and texture", "precision of hands", "at its floor"] in [
        [row[0], row[1], row[5]] for row in shown
    ]
