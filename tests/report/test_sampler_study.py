"""Step `sampler_study` and its figure, on the fabricated study."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fabricated import Fabricated, ball

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.core.errors import UserError
from meddiff_steps.evaluation.sampler_study import Point, choice, compare, points
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.instruments.feature_spaces.base import Context
from meddiff_steps.instruments.feature_spaces.random import build as random_space
from meddiff_steps.instruments.predictors import load_predictors
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.drawing.base import build as build_decoder
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.tone import ToneCurve
from meddiff_steps.models.trained import save_image_network, save_tone
from meddiff_steps.models.weights import save_model
from meddiff_steps.steps import sampler_study

SHAPE = (16, 20, 16)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Fabricated:
    return Fabricated(tmp_path_factory.mktemp("study"), SHAPE)


def test_every_sampler_that_can_is_compared_at_every_setting() -> None:
    settings = config.SamplerStudy(num_inference_steps=[8, 4], guidance_scales=[1, 2])
    found = points(settings, "v_prediction")
    assert {point.sampler for point in found} == {"ddim", "pndm", "heun", "dpmpp", "unipc"}
    assert len(found) == 5 * 2 * 2
    assert found[:2] == [Point("ddim", 4, 1.0), Point("ddim", 8, 1.0)]
    assert {point.sampler for point in points(settings, "flow")} == {"flow", "dpmpp", "unipc"}
    assert (Point("heun", 4, 1.0).passes, Point("dpmpp", 4, 2.0).passes) == (7, 8)


def test_the_cheapest_point_that_is_not_shown_to_be_worse_is_recommended() -> None:
    def point(passes: int, frechet: float, r: float) -> dict[str, Any]:
        return {
            "passes": passes,
            "frechet": {"value": frechet, "low": frechet - 2, "high": frechet + 2},
            "covariates": {"age": {"r": {"value": r, "low": r - 0.1, "high": r + 0.1}}},
        }

    entries = [point(4, 30, 0.8), point(8, 12, 0.8), point(16, 10, 0.8), point(32, 9, 0.8)]
    assert choice(entries) == 1  # 10 to 14 overlaps 7 to 11
    entries[1] = point(8, 12, 0.3)  # near, but it does not show what was asked for
    assert choice(entries) == 2
    unknown = {"value": None, "low": None, "high": None}
    assert choice([entries[0] | {"frechet": unknown}]) is None
    entries[3]["covariates"]["age"]["r"] = unknown  # nothing is known about the best one's covariates
    assert choice(entries) == 1


def test_a_sampler_that_leaves_noise_behind_is_told_from_one_that_does_not(study: Fabricated) -> None:
    subjects = pd.read_parquet(study.root / "plan.parquet")[:30]
    scans = read_manifest(study.root / "cohort/manifest.parquet", study.study.covariates)
    cohort = Images.of(Shards(study.shards), "scan_id", "subject_id", scans, "manifest")

    def draw(point: Point, rows: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
        rng = np.random.default_rng(0)
        for _, row in rows[::-1].iterrows():  # the order does not matter
            image = ball(300.0 if pd.isna(row["size"]) else row["size"], row["sex"], SHAPE, rng).astype(np.float32)
            yield row["sample_id"], np.clip(image + rng.normal(0, 0.8 / point.num_inference_steps, image.shape), 0, 1)

    ways = [Point("dpmpp", 4, 1.0), Point("dpmpp", 1000, 1.0)]
    study.learn()
    instrument = load_predictors(study.root / "predictors")
    found = compare(draw, ways, subjects, cohort, instrument, [random_space(Context(3))], study.study)
    few, many = found["points"]
    assert found["images"] == 30
    assert few["frechet"]["low"] > many["frechet"]["high"]
    assert few["kid"]["low"] > few["kid"]["floor"]["high"]
    assert many["frechet"]["low"] < many["frechet"]["floor"]["high"]
    there = many["spaces"]["random"]
    assert there["frechet"] == many["frechet"] and few["spaces"]["random"]["frechet"] == few["frechet"]
    assert few["spaces"]["random"]["precision"]["high"] < there["precision"]["low"]
    assert set(there) == {"frechet", "precision", "recall"} and 0 < there["recall"]["ceiling"]["value"] <= 1
    assert many["covariates"]["size"]["r"]["value"] > 0.97
    assert many["covariates"]["size"]["r"]["value"] > few["covariates"]["size"]["r"]["value"]
    assert many["covariates"]["size"]["r"]["ceiling"]["n"] >= 40
    assert set(many["covariates"]["sex"]) == {"auc"}
    assert few["seconds_per_image"] > 0


@pytest.fixture(scope="module")
def models(study: Fabricated) -> dict[str, Path]:
    """Untrained networks in folders, and the predictors."""
    study.learn()
    torch.manual_seed(0)
    settings, scans = study.study, read_manifest(study.root / "cohort/manifest.parquet", study.study.covariates)
    latent = [settings.autoencoder.latent_channels, *(n // settings.autoencoder.downsampling for n in SHAPE)]
    encoding = CovariateEncoding.fit(scans, settings.covariates)
    folders = {name: study.root / "models" / name for name in ("autoencoder", "decoder", "diffusion")}
    card = {
        "settings": settings.autoencoder.model_dump(mode="json"),
        "image_shape": [1, *SHAPE],
        "latent_shape": latent,
    }
    save_model(build_first_stage(settings.autoencoder, 3), folders["autoencoder"], card)
    decoder = build_decoder(settings.decoder, [1, *SHAPE])
    decoder.deviation.fill_(0.01)
    facts = {"settings": settings.decoder.model_dump(mode="json")}
    save_image_network(decoder, folders["decoder"], [1, *SHAPE], facts)
    card = {
        "settings": settings.diffusion.model_dump(mode="json"),
        "latent_shape": latent,
        "variants": 0,
        "encoding": encoding.to_json(),
    }
    save_model(Denoiser(settings.diffusion, latent, encoding.level_counts), folders["diffusion"], card)
    save_tone(ToneCurve(), folders["diffusion"], {})
    return folders


def run(study: Fabricated, models: dict[str, Path], tag: str, **changes: Path) -> dict:
    root = study.root
    files = {
        "manifest": root / "cohort/manifest.parquet",
        "plan": root / "plan.parquet",
        "predictors": root / "predictors",
        "out": root / f"samplers{tag}.json",
        "figure": root / f"samplers{tag}.png",
    }
    sampler_study.run(**{"config": study.stage["sampler_study"], "images": study.shards, **files, **models, **changes})
    return json.loads(files["out"].read_text())


def test_the_step_compares_samplers_of_a_model(study: Fabricated, models: dict[str, Path]) -> None:
    found = run(study, models, "")
    assert [(p["sampler"], p["guidance_scale"], p["num_inference_steps"], p["passes"]) for p in found["points"]] == [
        ("dpmpp", 1, 2, 2),
        ("dpmpp", 1, 3, 3),
        ("dpmpp", 2, 2, 4),
        ("dpmpp", 2, 3, 6),
        ("heun", 1, 2, 3),
        ("heun", 1, 3, 5),
        ("heun", 2, 2, 6),
        ("heun", 2, 3, 10),
    ]
    assert (found["images"], found["batch_size"], found["device"]) == (20, 8, "cpu")
    assert all(set(point["spaces"]) == {"random", "radiomics", "structure"} for point in found["points"])
    assert (study.root / "samplers.png").read_bytes().startswith(b"\x89PNG")
    again = run(study, models, "-again")
    for results in (found, again):
        for point in results["points"]:
            assert point.pop("seconds_per_image") > 0
    assert again == found


def test_too_few_planned_subjects_are_refused(study: Fabricated, models: dict[str, Path]) -> None:
    plan = study.root / "short-plan.parquet"
    pd.read_parquet(study.root / "plan.parquet")[:9].to_parquet(plan)
    with pytest.raises(UserError, match="9 planned subjects"):
        run(study, models, "-few", plan=plan)


def test_a_sampler_that_does_not_fit_the_model_is_refused(study: Fabricated) -> None:
    raw = study.study.model_dump(mode="json")
    with pytest.raises(UserError, match=r"sampler_study\.samplers: flow cannot sample .*prediction_type: v_prediction"):
        config.parse_study(raw | {"sampler_study": {"samplers": ["flow"]}}, "test")
