import copy
import json
from pathlib import Path

import pytest
import yaml

from meddiff_steps import config
from meddiff_steps.core.errors import UserError

ROOT = Path(__file__).parents[1]

MINIMAL = {
    "study": "tiny",
    "cohort": {"source": "simulated"},
    "covariates": {"age": {"unit": "year", "range": [0, 100]}, "sex": {"levels": ["F", "M"]}},
    "plan": [{"name": "syn", "subjects": 10}],
}


def with_change(path: str, value: object) -> dict:
    study = copy.deepcopy(MINIMAL)
    *parents, last = path.split(".")
    place = study
    for key in parents:
        place = place[int(key)] if key.isdigit() else place.setdefault(key, {})
    place[last] = value
    return study


@pytest.mark.parametrize(
    "path", [ROOT / "config/config.yaml", *sorted((ROOT / "config/studies").glob("*.yaml"))], ids=lambda p: p.name
)
def test_every_shipped_study_is_valid(path):
    assert config.load_study(path).study


def test_the_generated_files_have_not_drifted():
    assert (ROOT / "config/study.schema.json").read_text() == config.json_schema(), (
        "run: python -m meddiff_steps schema"
    )
    assert (ROOT / "config/keys.md").read_text() == config.key_reference(), "run: python -m meddiff_steps schema"


def test_a_study_says_where_its_scans_come_from():
    with pytest.raises(UserError, match="cohort: Field required"):
        config.parse_study({key: value for key, value in MINIMAL.items() if key != "cohort"}, "study.yaml")


def test_levels_may_be_numbers_of_any_length():
    study = config.parse_study(with_change("covariates.site", {"levels": [1234567, 1234568, 0.5]}), "study.yaml")
    assert study.covariates["site"].levels == ["1234567", "1234568", "0.5"]


def test_what_an_optimiser_leaves_out_keeps_the_default_of_its_network():
    study = config.parse_study(with_change("diffusion.optimiser", {"steps": 7}), "study.yaml")
    assert study.diffusion.optimiser == config.DiffusionOptimiser(steps=7)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("stduy", "x", "stduy: unknown key"),
        ("preprocess.spacng_mm", 2, "preprocess.spacng_mm: unknown key. Did you mean `spacing_mm`?"),
        ("cohort", {"root": "/data"}, "cohort: set `source` to bids, table or simulated"),
        ("covariates.sex", {}, "covariates.sex: give `levels`"),
        ("privacy.subgroup", "nope", "privacy.subgroup: nope is no declared covariate"),
        ("privacy.subgroup", "age", "privacy.subgroup: age is a number"),
        ("study", "My Study", "study"),
        ("covariates.age", {"unit": "year", "range": [90, 18]}, "low < high"),
        ("covariates.age", {"unit": "year"}, "covariates.age.range"),
        ("covariates.sex", {"levels": ["F"]}, "covariates.sex.levels"),
        ("covariates.sex", {"levels": ["F", "F"]}, "distinct"),
        ("covariates", {}, "covariates"),
        ("covariates.split", {"unit": "year", "range": [0, 1]}, "split"),
        ("splits", {"train": 0.5, "val": 0.1, "calibration": 0.1, "test": 0.1}, "must be 1"),
        ("splits", {"train": 0.9, "val": 0.1, "calibration": 0, "test": 0}, "train and test"),
        ("preprocess.shape", [30, 40, 32], "divisible by 8"),
        ("preprocess", {"shape": [32, 40], "spacing_mm": 5}, "spacing_mm: null"),
        ("preprocess.percentiles", [99, 1], "percentiles"),
        ("preprocess.shards", 0, "preprocess.shards"),
        ("autoencoder.channels", [30, 60], "multiples of norm_num_groups"),
        ("autoencoder.perceptual", {"weight": 0.1}, "perceptual.weights names no file"),
        ("autoencoder.optimiser", {"steps": 0, "batch_size": 1, "learning_rate": 0.1}, "autoencoder.optimiser.steps"),
        ("diffusion.attention_levels", [True], "one entry per level"),
        ("diffusion.num_head_channels", 48, "num_head_channels"),
        ("diffusion.beta_start", 0.5, "beta_start"),
        ("diffusion", {"prediction_type": "epsilon", "zero_terminal_snr": True}, "zero_terminal_snr"),
        ("generate.sampler", "euler", "generate.sampler"),
        ("generate.sampler", "flow", "prediction_type: flow"),
        ("generate.guidance_scale", -1, "guidance_scale"),
        ("plan", [], "plan"),
        ("plan.0.where", {"height": 3}, "no such covariate"),
        ("plan.0.where", {"sex": "X"}, "is not one of"),
        ("plan.0.where", {"age": [20, 300]}, "outside the declared range"),
        ("plan.0.covariates", "grid", "grid"),
        ("plan.0.covariates", "table", "table"),
        ("plan.0.name", "my group", "name"),
        ("plan", [{"name": "a", "subjects": 1}, {"name": "a", "subjects": 1}], "distinct"),
        ("cohort", {"source": "dicomweb"}, "cohort"),
        ("cohort", {"source": "bids"}, "cohort.root"),
        ("compute.devices", 0, "compute.devices"),
        ("evaluate", {"features": [{"name": "random", "weights": "x.pt"}]}, "none of random, embedder, radiomics"),
        ("evaluate", {"features": [{"name": "mine"}]}, "evaluate.features.0.weights"),
    ],
)
def test_a_bad_study_is_refused_with_the_key_and_the_reason(path, value, expected):
    with pytest.raises(UserError) as caught:
        config.parse_study(with_change(path, value), "study.yaml")
    assert "study.yaml" in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"study: [", "not valid YAML"),
        (b"- 1", "expected a mapping"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"", "expected a mapping"),
    ],
)
def test_a_file_that_is_no_study_is_refused(tmp_path, content, expected):
    path = tmp_path / "study.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        config.load_study(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such study file"):
        config.load_study(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a directory"):
        config.load_study(tmp_path)


def test_freezing_is_content_addressed_and_narrow(tmp_path):
    before = config.parse_study(MINIMAL, "a")
    after = config.parse_study(with_change("generate.guidance_scale", 2.0), "b")
    changed = {
        stage
        for stage in config.STAGES
        if config.freeze(before, stage, tmp_path) != config.freeze(after, stage, tmp_path)
    }
    assert changed == {stage for stage, sections in config.STAGES.items() if "generate" in sections}
    assert "diffusion" not in changed
    assert config.freeze(before, None, tmp_path) == config.freeze(before, None, tmp_path)


@pytest.mark.parametrize("stage", config.STAGES)
def test_a_stage_reads_its_sections_and_no_other(tmp_path, stage):
    study = config.parse_study(MINIMAL, "a")
    view = config.load_stage(config.freeze(study, stage, tmp_path), stage)
    for name in config.Study.model_fields:
        keys = [declared.partition(".")[2] for declared in config.STAGES[stage] if declared.partition(".")[0] == name]
        if keys == [""]:
            assert getattr(view, name) == getattr(study, name)
        elif keys:
            assert vars(getattr(view, name)) == {key: getattr(getattr(study, name), key) for key in keys}
        else:
            with pytest.raises(AttributeError):
                getattr(view, name)


def test_numeric_levels_are_read_as_text():
    study = config.parse_study(with_change("covariates.sex", {"levels": [0, 1]}), "a")
    assert study.covariates["sex"].levels == ["0", "1"]


def test_the_schema_is_one_that_editors_understand():
    schema = json.loads(config.json_schema())
    assert schema["properties"]["study"]["pattern"]
    assert yaml.safe_load((ROOT / "config/config.yaml").read_text()).keys() <= schema["properties"].keys()
