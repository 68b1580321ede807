import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meddiff_steps import config
from meddiff_steps.config.base import fields_of
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import SAMPLERS

ROOT = Path(__file__).parents[1]

MINIMAL = {
    "study": "tiny",
    "cohort": {"source": "simulated"},
    "covariates": {"age": {"unit": "year", "range": [0, 100]}, "sex": {"levels": ["F", "M"]}},
    "plan": [{"name": "syn", "subjects": 10}],
}


#: A first stage that leaves images as large as they are.
ODD = {"stem": "none", "channels": [16]}


def with_change(path: str, value: object) -> dict:
    study = copy.deepcopy(MINIMAL)
    if not path:
        return study | value
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
    with pytest.raises(UserError, match="cohort: is missing, and has no default"):
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
        ("generate.sampler", "dpm++", "Did you mean `dpmpp`?"),
        ("cohort", {"root": "/data"}, "cohort: set `source` to bids, table or simulated"),
        ("covariates.sex", {}, "covariates.sex: give `levels`"),
        ("privacy.subgroup", "nope", "privacy.subgroup: nope is no declared covariate"),
        ("privacy.subgroup", "age", "privacy.subgroup: age is a number"),
        ("study", "My Study", "study"),
        ("covariates.age", {"unit": "year", "range": [90, 18]}, "low < high"),
        ("covariates.age", {"unit": "year"}, "covariates.age.range"),
        ("covariates.sex", {"levels": ["F"]}, "covariates.sex.levels"),
        ("covariates.sex", {"levels": ["F", "F"]}, "distinct"),
        ("covariates.sex", {"levels": ["F", "M "]}, "'M ' cannot be a level"),
        ("covariates.sex", {"levels": ["F", "n/a"]}, "are missing values"),
        ("covariates.sex", {"levels": ["F", "a\nb"]}, "no line breaks"),
        ("covariates", {}, "covariates"),
        ("covariates.split", {"unit": "year", "range": [0, 1]}, "split"),
        ("covariates.image", {"unit": "year", "range": [0, 1]}, "image"),
        ("cohort", {"source": "bids", "root": "x", "entities": {"run": []}}, "cohort.entities.run"),
        ("cohort", {"source": "bids", "root": "x", "alike_ids": "merge"}, "cohort.alike_ids"),
        ("splits", {"train": 0.5, "val": 0.1, "calibration": 0.1, "test": 0.1}, "must be 1"),
        ("splits", {"train": 0.9, "val": 0.1, "calibration": 0, "test": 0}, "train and test"),
        ("preprocess.shape", [30, 40, 32], "divisible by 4"),
        ("", {"preprocess": {"shape": [28, 40, 32]}, "diffusion": {"network": "unet"}}, "divisible by 8"),
        ("preprocess", {"shape": [32, 40], "spacing_mm": 5}, "spacing_mm: null"),
        ("preprocess.percentiles", [99, 1], "percentiles"),
        ("preprocess.shards", 0, "preprocess.shards"),
        ("autoencoder", {"network": "kl", "channels": [30, 60]}, "multiples of norm_num_groups"),
        (
            "autoencoder",
            {"network": "vq", "latent_channels": 10, "codebook": {"parts": 4}},
            "multiple of codebook.parts=4, found 10",
        ),
        ("autoencoder.codebook", {"entries": 64}, "Leave codebook out, or choose network: vq or vqvae"),
        (
            "autoencoder",
            {"network": "vq", "kl_weight": 1e-6},
            "kl_weight is set, but network is vq, which has no use for it",
        ),
        ("autoencoder.perceptual", {"weight": 0.1}, "perceptual.weights names no file"),
        ("autoencoder.optimiser", {"steps": 0, "batch_size": 1, "learning_rate": 0.1}, "autoencoder.optimiser.steps"),
        ("diffusion", {"network": "unet", "attention_levels": [True]}, "one entry per level"),
        ("diffusion", {"network": "unet", "num_head_channels": 48}, "num_head_channels"),
        ("diffusion.trains", "adapters", "diffusion.trains: adapters change weights that are given"),
        ("diffusion.towards_base", 1, "diffusion.towards_base: there is no base to pull to"),
        ("autoencoder.towards_base", 1, "autoencoder.towards_base: there is no base to pull to"),
        ("diffusion", {"trains": "adapters", "towards_base": 1}, "adapters leave the base as it is"),
        ("diffusion", {"trains": "adapters", "guide_share": 0.2}, "adapters keep no guide"),
        ("diffusion.adapter_rank", 0, "diffusion.adapter_rank"),
        ("diffusion.levels.deviation", 0, "diffusion.levels.deviation"),
        ("diffusion.optimiser", {"method": "sgd"}, "diffusion.optimiser.method"),
        ("decoder.network", "nothing", "decoder.network"),
        ("generate.guidance_interval", [2, 1], "guidance_interval: expected [low, high]"),
        ("generate.guidance", "autoguidance", "set diffusion.guide_share"),
        (
            "",
            {
                "diffusion": {"network": "conditioned", "conditioning": {"maps": "controlnet"}},
                "pairs": {"channel": "labels", "structures": {"a": [1]}},
                "compute": {"devices": 2},
            },
            "compute.devices: 2 processes cannot train diffusion.conditioning.maps: controlnet",
        ),
        ("", {"preprocess": {"shape": [9, 12], "spacing_mm": None}, "autoencoder": ODD}, "take even numbers"),
        ("diffusion.beta_start", 0.5, "beta_start"),
        ("diffusion", {"prediction_type": "epsilon", "zero_terminal_snr": True}, "zero_terminal_snr"),
        ("generate.sampler", "euler", "generate.sampler"),
        (
            "generate.sampler",
            "flow",
            "generate.sampler: flow cannot sample a model with diffusion.prediction_type: v_pred",
        ),
        ("generate.guidance_scale", -1, "guidance_scale"),
        ("generate.sampler", "progressive", "few_step.method is None; set few_step.method: progressive"),
        ("", {"few_step": {"method": "progressive"}, "second_model": {"subjects": 9}}, "a second model has no student"),
        (
            "",
            {"few_step": {"method": "consistency"}, "diffusion": {"num_train_timesteps": 500}},
            "num_train_timesteps: 500, and are one; take 8, or let",
        ),
        (
            "",
            {"few_step": {"method": "progressive"}, "diffusion": {"num_train_timesteps": 100}},
            "num_train_timesteps: 100, and are one; let the schedule",
        ),
        ("few_step.teacher_steps", 12, "num_inference_steps=4 doubled once or several times, found 12"),
        (
            "",
            {"few_step": {"method": "consistency"}, "generate": {"sampler": "progressive"}},
            "few_step.method is consistency",
        ),
        (
            "",
            {
                "few_step": {"method": "progressive"},
                "generate": {"sampler": "progressive", "num_inference_steps": 2},
            },
            "the student is for few_step.num_inference_steps: 4, found 2",
        ),
        (
            "",
            {
                "few_step": {"method": "consistency"},
                "generate": {"sampler": "consistency", "num_inference_steps": 3},
            },
            "3 does not divide it",
        ),
        ("sampler_study.samplers", ["consistency"], "sampler_study.samplers: consistency cannot sample"),
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
        ("evaluate", {"features": [{"name": "random", "weights": "x.pt"}]}, "none of random, radiomics, embedder"),
        ("evaluate", {"features": [{"name": "mine"}]}, "evaluate.features.0.weights"),
        ("evaluate.metrics", ["fid"], "evaluate.metrics.0"),
        ("privacy.detectors", [], "privacy.detectors"),
        ("autoencoder.network", "vae", "autoencoder.network"),
        ("stem", "haar", "stem: unknown key. Did you mean `autoencoder.stem`?"),
        ("variants.variants", 4, "variants.variants: unknown key"),
        ("preprocess.channels", {"image": {"path": "x"}}, "columns that shards already have"),
        ("preprocess.channels", {"t2": {"path": "{subject}_T2w.nii.gz"}}, "found 'subject'"),
        ("preprocess.channels", {"t2": {"path": "{subject_id_T2w.nii.gz"}}, "no path pattern"),
        ("downstream.target", "age", "downstream.target: age is a number"),
        ("downstream.groups", ["none"], "downstream.groups: the plan has no group none; it has ['syn']"),
        ("storage.cohort", "s3://bucket/x", "storage.cohort: only a BIDS cohort is fetched"),
        ("counterfactual.covariate", "height", "counterfactual.covariate: no such covariate"),
        ("counterfactual", {"covariate": "age", "values": [150]}, "counterfactual.values: 150 is outside"),
        ("counterfactual", {"covariate": "sex", "values": ["X"]}, "counterfactual.values: 'X' is not one of"),
        ("counterfactual.values", [1], "set `covariate`"),
        ("counterfactual", {"covariate": "age", "depth": 0}, "counterfactual.depth"),
        ("normative", {"reference": {"age": "40"}}, "normative.reference.age: is a number"),
        ("normative", {"matched": ["eyes"]}, "normative.matched: eyes is no covariate"),
        ("normative", {"reference": {"eyes": "blue"}}, "normative.reference.eyes"),
        ("inpainting", {"hole": {"ball_mm": 30, "box": [[0, 1]]}}, "a hole is one of `file`, `box` and `ball_mm`"),
        ("inpainting", {"hole": {"labels": [1]}}, "`labels` and `grow_mm` are about a `file`"),
        ("inpainting", {"hole": {"box": [[3, 3], [0, 2], [0, 2]]}}, "`box` needs a first voxel below the last"),
        ("inpainting", {"hole": {"box": [[0, 2], [0, 2]]}}, "inpainting.hole.box: 2 axes, expected 3"),
        ("inpainting", {"hole": {"box": [[0, 900], [0, 2], [0, 2]]}}, "reaches beyond preprocess.shape"),
        ("segmentation_ensemble", {"target": ["lesion"], "source": ["lesion"]}, "source and target share lesion"),
        ("translation", {"target": ["t2", "t2"]}, "target names an image twice"),
        ("translation", {"target": ["t2"], "network": "unet", "channels": [40]}, "multiples of norm_num_groups=16"),
        ("segmentation_ensemble", {"target": ["lesion"]}, "segmentation_ensemble.target: lesion is no channel"),
        ("segmentation_ensemble", {"target": ["lesion"], "labelled": [5, 5]}, "labelled names something twice"),
        ("segmentation_ensemble", {"pretraining_steps": 9}, "is compared with training from scratch on few labels"),
        (
            "segmentation_ensemble",
            {"beside": ["whole"]},
            "segmentation_ensemble.beside: whole is compared with patches",
        ),
        (
            "segmentation_ensemble",
            {"target": ["image"], "source": ["t2"], "patch": [16, 18, 16]},
            "segmentation_ensemble.patch: [16, 18, 16], expected 3 multiples of 4, none larger than in",
        ),
        (
            "translation",
            {"target": ["image"], "source": ["t2"], "lesion": "t1"},
            "translation.lesion: t1 is no channel of the study, which has image; declare it",
        ),
        ("harmonisation", {"covariate": "sex"}, "`to` is missing"),
        ("harmonisation", {"covariate": "sex", "to": "F", "others": ["F"]}, "`others` has 'F', which is `to`"),
        ("harmonisation", {"covariate": "age", "to": "F"}, "harmonisation.covariate: age: is a number"),
        ("harmonisation", {"covariate": "eyes", "to": "F"}, "harmonisation.covariate: eyes: no such covariate"),
        ("harmonisation", {"covariate": "sex", "to": "X"}, "harmonisation.to: 'X' is not one of"),
        ("harmonisation", {"covariate": "sex", "to": "F", "kept": ["sex"]}, "harmonisation.kept: sex is no other"),
        ("harmonisation", {"covariate": "sex", "to": "F", "channel": "t2"}, "harmonisation.channel: t2 is no contrast"),
        ("inpainting", {"lesions": {"masks": "m/*.nii"}}, "inpainting.lesions.masks: lie in a template's space"),
        ("registration", {"window": 4}, "`window` has a middle voxel, so it is odd; found 4"),
        ("registration", {"structures": {"a": [1]}}, "`structures` are labels of `labels`"),
        ("registration", {"labels": "l.nii", "structures": {"a": []}}, "`structures` have labels, a has none"),
        ("registration", {"shares": [0.5, 0.25]}, "`shares` rise and differ"),
        ("registration", {"pairs": 2}, "registration.pairs: 2, but sides of 32x40x32 voxels"),
        ("shape_completion", {"voxel_mm": 5}, "`closing_mm` (4) closes nothing below `voxel_mm` (5)"),
        ("reconstruction", {"operators": ["ct"]}, "reconstruction.operators.0"),
        ("reconstruction", {"operators": ["denoising", "denoising"]}, "must be distinct"),
        (
            "reconstruction",
            {"operators": ["mri"], "measured": "{scan_id}.npz"},
            "files of one operator in one strength",
        ),
        ("reconstruction", {"operators": ["mri"], "accelerations": [1]}, "reconstruction.accelerations.0"),
        ("pairs", {"channel": "labels", "structures": {"a": [1]}}, "pairs.channel: preprocess.channels has no labels"),
        ("anomaly", {"methods": ["gausian_noise"]}, "anomaly.methods.0"),
        ("anomaly", {"methods": ["healing", "healing"]}, "must be distinct"),
        ("anomaly", {"methods": ["healing"], "depths": [1.0]}, "anomaly.depths.0"),
        ("anomaly", {"masks": "{scan_id}.png", "lesions": {"diameter_mm": 9}}, "by `masks` or put in by `lesions`"),
        ("anomaly", {"lesions": {"masks": "m/*.nii"}}, "anomaly.lesions.masks: lie in a template's space"),
        ("anomaly.healthy", {"lesion": "0"}, "anomaly.healthy.lesion: no such covariate"),
        ("anomaly.healthy", {"sex": "X"}, "anomaly.healthy.sex: 'X' is not one of"),
        ("anomaly", {"methods": ["classifier_free"]}, "healthy value of one covariate, and anomaly.healthy has 0"),
        (
            "anomaly",
            {"methods": ["modality_cycles"]},
            "modality_cycles needs scans of two contrasts, and translation between them; the study has image and no"
            " other. Declare another one under preprocess.channels, and set translation: {target: [its name], cycle:",
        ),
        (
            "translation",
            {"target": ["t2"], "source": ["t1"], "cycle": True},
            "translation.cycle: goes from the scan and back to it; set source: [image], found ['t1']",
        ),
        (
            "translation",
            {"target": ["t2"], "lesion": "mask", "cycle": True},
            "translation.lesion: cycle: true learns from healthy scans, which have none; leave one of them out",
        ),
        ("augment", {"target": "sex"}, "augment.target: this key is now downstream.target (renamed in 0.2.0)"),
        ("augmentation.variants", 4, "augmentation.variants: this key is now variants.count (renamed in 0.2.0)"),
        ("distill", {"subjects": 9}, "distill.subjects: this key is now second_model.subjects (renamed in 0.2.0)"),
        ("augment", None, "augment: this section is now downstream (renamed in 0.2.0)"),
        ("release", "results/demo/release", "`--config sealed=FOLDER`"),
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
        (b"study: [", "line 1: not valid YAML"),
        (b"study: a\nplan:\n\t- name: b\n", "line 3: not valid YAML: .*Indent with spaces, not with tabs"),
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


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("seed: a\nstudy: x\nseed: b\n", "seed", (1, 3)),
        ("covariates: {age: {unit: a, range: [0, 1]}}\nx: 1\ncovariates:\n  sex: {}\n", "covariates", (1, 3)),
        ("covariates:\n  age: {}\n  sex: {}\n  age: {}\n", "age", (2, 4)),
        ("plan:\n- {name: a,\n   name: b}\n", "name", (2, 3)),
        ("plan: [{where: {age: 1,\n age: 2}}]\n", "age", (1, 2)),
        ("seed: a\n'seed': b\n", "seed", (1, 2)),
    ],
)
def test_a_key_that_is_given_twice_is_refused_with_both_lines(tmp_path, text, key, lines):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"`{key}` is on line {lines[0]} and again on line {lines[1]}"):
        config.load_study(path)


def test_keys_may_be_taken_over_from_another_mapping(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("a: {b: &one {x: 1, y: 2}}\nc: {<<: *one, y: 3}\nd: {<<: *one}\n")
    assert config.read_yaml(path) == {"a": {"b": {"x": 1, "y": 2}}, "c": {"x": 1, "y": 3}, "d": {"x": 1, "y": 2}}


WORDS = ["no", "NO", "yes", "on", "off", "y", "true", "1e3", "01", "1.50", "0x1F", "1_000", "12:30", "2024-01-31", ".5"]


def written(tmp_path: Path, more: str = "") -> config.Study:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in MINIMAL.items() if key != "covariates"}) + more)
    return config.load_study(path)


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_level_is_what_was_written_with_or_without_quotes(tmp_path, quote):
    """YAML 1.1, which Snakemake reads, takes `no` for false, `12:30` for 750 and `2024-01-31` for a date."""
    levels = ", ".join(f"{quote}{word}{quote}" for word in WORDS)
    study = written(tmp_path, f"covariates: {{a: {{levels: [{levels}]}}}}\nseed: {quote}no{quote}\n")
    assert study.covariates["a"].levels == WORDS
    assert study.seed == "no"


def test_texts_may_look_like_numbers(tmp_path):
    more = "covariates: {sex: {levels: [F, M]}}\nseed: 42\nrelease: {name: 1e3, licence: 007, date: 2026-01-31}\n"
    study = written(tmp_path, more)
    assert (study.seed, study.release.name, study.release.licence) == ("42", "1e3", "007")
    assert study.release.date == "2026-01-31"


def test_numbers_and_switches_are_read_as_yaml_has_them(tmp_path):
    more = "covariates: {age: {unit: year, range: [0, 1.0e2]}}\nrelease: {models: yes, skull_stripped: off}\n"
    more += "autoencoder: {optimiser: {learning_rate: 1e-4, steps: 010}}\ncompute: {compile: true}\n"
    study = written(tmp_path, more)
    assert study.covariates["age"].range == (0, 100)
    assert study.release.models and not study.release.skull_stripped and study.compute.compile
    assert (study.autoencoder.optimiser.learning_rate, study.autoencoder.optimiser.steps) == (1e-4, 10)


def test_what_a_plan_asks_for_is_read_as_its_covariate_is_declared(tmp_path):
    more = "covariates: {age: {unit: year, range: [0, 100]}, site: {levels: [01, no, 2]}}\n"
    path = tmp_path / "study.yaml"
    path.write_text(
        "study: x\ncohort: {source: simulated}\n" + more + "counterfactual: {covariate: age, values: [1e1, 20]}\n"
        "plan: [{name: a, subjects: 1, where: {site: [no, 01], age: [10.50, 2e1]}},\n"
        "{name: b, subjects: 1, covariates: grid, grid: {site: [01, 2]}, base: {age: 5.0}}]\n"
    )
    study = config.load_study(path)
    assert study.plan[0].where == {"site": ["no", "01"], "age": [10.5, 20.0]}
    assert (study.plan[1].grid, study.plan[1].base) == ({"site": ["01", "2"]}, {"age": 5.0})
    assert study.counterfactual.values == [10.0, 20]


def test_values_of_the_command_line_are_read_as_those_of_a_file():
    """Snakemake gives what is below the first level as text."""
    given = {"counterfactual": {"covariate": "age", "values": ["90", "14.50"], "num_inference_steps": "null"}}
    study = config.parse_study(MINIMAL | config.given_on_command_line(given | {"seed": 2024}), "--config")
    assert (study.counterfactual.values, study.counterfactual.num_inference_steps) == ([90, 14.5], None)
    assert study.seed == "2024"


def test_a_value_that_is_no_text_is_refused_with_its_line_and_how_to_write_it(tmp_path):
    with pytest.raises(UserError, match=r"seed: (?s:.*)quotes(?s:.*)study.yaml, line (\d+)") as caught:
        written(tmp_path, "covariates: {sex: {levels: [F, M]}}\nseed: {a: 1}\n")
    line = int(re.search(r"line (\d+)", str(caught.value))[1])
    assert (tmp_path / "study.yaml").read_text().splitlines()[line - 1].startswith("seed:")


def test_what_is_wrong_between_sections_is_told_with_the_line_of_the_key_that_it_names(tmp_path):
    more = "covariates: {age: {unit: year, range: [0, 100]}}\ndownstream:\n  seeds: 3\n  target: age\n"
    with pytest.raises(UserError, match=r"downstream.target: age is a number.*study.yaml, line (\d+)\]") as caught:
        written(tmp_path, more)
    line = int(re.search(r"line (\d+)", str(caught.value))[1])
    assert (tmp_path / "study.yaml").read_text().splitlines()[line - 1] == "  target: age"


@pytest.mark.parametrize("path", ["", "~/x", "$HOME/x", "a/${USER}", "x{y}", "a\nb", "a\tb", "-x"])
def test_a_path_that_shells_or_snakemake_would_read_as_something_else_is_refused(path):
    for key in ("results", "autoencoder.perceptual.weights", "release.signing_key", "preprocess.registration.template"):
        with pytest.raises(UserError, match=key):
            config.parse_study(with_change(key, path), "study.yaml")


@pytest.mark.parametrize(
    "path", ["my results", "it's", 'a "b"', "a;b", "a$(b)", "a`b`", "a&b|c>d", "data$", "a*", "#a", "ü"]
)
def test_a_path_of_other_characters_stays_as_it_is(path):
    assert config.parse_study(with_change("results", path), "study.yaml").results == path


@pytest.mark.parametrize("place", ["s3://bucket/a;b", "s3://bucket/{a}", "s3://bucket/$(a)", "s3://bucket/a\nb"])
def test_a_bucket_is_named_by_safe_characters(place):
    with pytest.raises(UserError, match="storage.publish"):
        config.parse_study(with_change("storage.publish", place), "study.yaml")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such study file"):
        config.load_study(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a directory"):
        config.load_study(tmp_path)


def test_all_problems_of_a_study_are_told_at_once():
    wrong = with_change("covariates.split", {"levels": ["a", "b"]}) | {
        "augment": {"target": "sex", "seeds": 1},
        "privacy": {"subgroup": "age"},
    }
    with pytest.raises(UserError) as caught:
        config.parse_study(wrong, "study.yaml")
    assert [line.strip().split(":")[0] for line in str(caught.value).splitlines()] == [
        "study.yaml",
        "augment.target",
        "augment.seeds",
        "downstream.seeds",
    ]
    wrong["augment"] = {"target": "sex"}
    with pytest.raises(UserError, match=r"3 problem(?s:.*)split(?s:.*)privacy.subgroup: age is a number"):
        config.parse_study(wrong, "study.yaml")


def test_a_misspelt_key_is_told_once_and_a_value_with_what_was_meant():
    """Not also as the key that is missing for it, and not once for every kind of value that it could be."""
    wrong = {
        "study": "s",
        "cohort": {"source": "bdis", "root": "x"},
        "covariates": {"age": {"unit": "year", "rnage": [1, 90]}, "int": {"levels": ["a", "b"]}},
        "plan": [{"name": "syn", "subject": 5}],
        "generate": {"sampler": "dpmp"},
        "compute": {"compile": "maybe"},
    }
    with pytest.raises(UserError) as caught:
        config.parse_study(wrong, "study.yaml")
    said = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert [line.split(":")[0] for line in said] == [
        "cohort",
        "covariates.age.rnage",
        "plan.0.subject",
        "generate.sampler",
        "compute.compile",
    ]
    assert "Did you mean `bids`? (found 'bdis')" in said[0]
    assert "Did you mean `range`?" in said[1] and "Did you mean `subjects`?" in said[2]
    assert "Did you mean `dpmpp`?" in said[3]
    assert " or: " in said[4] and "'auto'" in said[4]


def test_a_covariate_may_have_the_name_of_a_type():
    with pytest.raises(UserError, match=r"\n  covariates\.int: give `levels`"):
        config.parse_study(with_change("covariates.int", {}), "study.yaml")


def test_a_covariate_that_the_plan_misspells_is_understood():
    with pytest.raises(UserError, match="no such covariate(?s:.*)Did you mean `sex`?"):
        config.parse_study(with_change("plan.0.where", {"sexx": "F"}), "study.yaml")


# ------------------------------------------------------------------------------------------------- all keys


def test_every_key_is_explained():
    assert [".".join(keys) for keys, field in fields_of(config.Study) if not (field.description or "").strip()] == []


def test_paths_and_texts_are_marked_where_they_are_declared():
    assert {".".join(keys) for keys in config.PATH_KEYS} == {
        "results",
        "cohort.root",
        "anomaly.lesions.masks",
        "anomaly.masks",
        "inpainting.hole.file",
        "inpainting.lesions.masks",
        "normative.lesions.masks",
        "counterfactual.predictor",
        "reconstruction.lesions.masks",
        "reconstruction.measured",
        "registration.labels",
        "shape_completion.points",
        "cohort.table",
        "preprocess.brain_mask",
        "preprocess.registration.template",
        "preprocess.exclude",
        "preprocess.channels.*.path",
        "autoencoder.perceptual.weights",
        "init_from.path",
        "init_from.autoencoder",
        "init_from.diffusion",
        "plan.table",
        "release.signing_key",
        "evaluate.features.weights",
        "segmentation.labels",
        "text.encoder",
    }
    assert {"covariates.*.unit", "covariates.*.description", "release.card.ethics"} <= {
        ".".join(keys) for keys in config.TEXT_KEYS
    }


def test_no_path_is_published():
    channels = {"t2": {"path": "/data/{scan_id}_T2w.nii.gz"}}
    study = config.parse_study(with_change("preprocess.channels", channels) | {"results": "/scratch"}, "a").model_dump(
        mode="json"
    )
    shown = config.without_paths(study)
    assert "/data" not in json.dumps(shown) and "/scratch" not in json.dumps(shown)
    channel = {"path": "(path)", "kind": "contrast", "window": None, "required": True}
    assert shown["preprocess"]["channels"]["t2"] == channel
    assert shown["preprocess"]["brain_mask"] is None
    assert config.without_paths(shown) == shown


def test_parsing_a_workflow_imports_nothing_heavy():
    command = "import sys, meddiff_steps.config; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "numpy", "pandas", "pyarrow", "monai"} & set(done.stdout.split())


# --------------------------------------------------------------------------------------------------- stages


def test_freezing_is_content_addressed(tmp_path):
    before = config.parse_study(MINIMAL, "a")
    assert config.freeze(before, None, tmp_path) == config.freeze(before, None, tmp_path)


GUIDED = {"few_step"}
GENERATED = {
    *("tone", "generate", "filter", "describe", "text_fidelity", "sampler_study", "showcase", "export_models"),
    "ledger",
}
DOWNSTREAM = {f"downstream_{name}" for name in ("design", "plan", "data", "train", "test", "neighbours")}


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("title", "Another", {"neighbours", "describe", "lineup", "report", "ledger"}),
        ("covariates.age.description", "Age at scan", {"describe", "neighbours", "report", "ledger"}),
        (
            "covariates.age.unit",
            "years",
            {
                *("neighbours", "describe", "evaluate", "sampler_study", "showcase", "report", "ledger"),
                *("counterfactual", "inpainting", "normative", "harmonisation"),
            },
        ),
        ("generate.guidance_scale", 2.0, GENERATED | GUIDED),
        ("few_step.teacher_steps", 8, {"few_step", "ledger"}),
        ("generate.num_inference_steps", 20, set()),  # what the default sampler takes anyway
        ("generate.num_inference_steps", 21, GENERATED),
        (
            "variants.count",
            2,
            {
                *("autoencoder", "decoder", "latents", "ledger", "segmentation_model", "segmentation_few_labels"),
                *("translation_model", "translation_unpaired", "harmonisation_model"),
            },
        ),
        ("decoder.channels", 32, {"init_weights", "decoder", "ledger"}),
        ("diffusion.levels.mean", 0.0, {"diffusion", "ledger"}),
        ("preprocess.max_failed_share", 0.5, {"quality", "report", "ledger"}),
        ("preprocess.channels", {"t2": {"path": "x"}}, {"preprocess", "report", "ledger"}),
        ("privacy.detectors", ["aligned"], {"calibrate", "filter", "privacy", "ledger"}),
        ("downstream.jobs", 3, {"downstream_train", "ledger"}),
        ("downstream.seeds", 6, DOWNSTREAM | {"ledger"}),
        ("counterfactual.depth", 0.5, {"counterfactual"}),
        ("inpainting.hole", {"ball_mm": 30}, {"inpainting"}),
        ("normative.depth", 0.4, {"normative"}),
        ("reconstruction.operators", ["mri"], {"reconstruction"}),
        ("anomaly.depths", [0.4], {"anomaly"}),
        ("registration.shares", [0.5], {"registration"}),
        ("registration.smoothness", 2.0, {"registration_train", "registration"}),
        ("shape_completion.samples", 9, {"shape_completion"}),
        ("shape_completion.blocks", 2, {"shape_completion_train", "shape_completion"}),
        ("segmentation_ensemble.samples", 9, {"segmentation"}),
        ("segmentation_ensemble.block", 2, {"segmentation_model", "segmentation_few_labels", "segmentation"}),
        ("segmentation_ensemble.labelled", [5], {"segmentation"}),
        ("translation.lesion", "lesion", {"translation_model", "translation"}),
        ("anomaly.healthy", {"sex": "F"}, {"translation_model", "anomaly"}),
        ("translation.unpaired", {}, {"translation_unpaired", "translation"}),
        ("harmonisation.samples", 9, {"harmonisation"}),
        ("lineup.images", 30, {"lineup"}),
        ("release.card", {"ethics": "Approved."}, {"describe", "ledger"}),
        ("release.exports", ["webdataset"], set()),
        ("storage.protect", False, set()),
        ("results", "elsewhere", {"ledger"}),
    ],
)
def test_what_runs_again_after_an_edit(tmp_path, path, value, expected):
    before, after = config.parse_study(MINIMAL, "a"), config.parse_study(with_change(path, value), "b")
    assert {
        stage
        for stage in config.STAGES
        if config.freeze(before, stage, tmp_path) != config.freeze(after, stage, tmp_path)
    } == expected


def test_every_key_reaches_a_stage_or_is_about_what_happens_beside_them(tmp_path):
    """What no stage is given does nothing; only storage, requests for copies and what a plan of its cost reckons with
    are nobody's.
    """
    given = {entry for entries in config.STAGES.values() for entry in entries}
    unread = {
        f"{section}.{key}" if hasattr(field.annotation, "model_fields") else section
        for section, field in config.Study.model_fields.items()
        for key in getattr(field.annotation, "model_fields", [""])
        if not {section, f"{section}.{key}"} & given
    }
    of_sections = {f"storage.{key}" for key in config.Storage.model_fields}
    of_sections |= {f"cost.{key}" for key in config.Cost.model_fields}
    assert unread == {"release.exports", "release.models", *of_sections}


@pytest.mark.parametrize("stage", config.STAGES)
def test_a_stage_reads_its_sections_and_no_other(tmp_path, stage):
    study = config.parse_study(MINIMAL, "a")
    view = config.load_stage(config.freeze(study, stage, tmp_path), stage)
    declared = [tuple(entry.split(".")) for entry in config.STAGES[stage]]
    filled = config.parse_study(config.resolved(study.model_dump(mode="json")), "resolved")
    for name in config.Study.model_fields:
        keys = [entry[1] for entry in declared if entry[0] == name and len(entry) == 2]
        if name == "covariates" and (name,) in declared:
            for covariate in view.covariates.values():
                texts = {entry[2] for entry in declared if entry[:2] == (name, "*")}
                assert texts & set(type(covariate).model_fields) == {"unit", "description"} & set(vars(covariate))
        elif (name,) in declared:
            assert getattr(view, name) == getattr(filled, name)
        elif keys and getattr(filled, name) is None:  # an optional section
            assert getattr(view, name) is None
        elif keys:
            assert vars(getattr(view, name)) == {key: getattr(getattr(filled, name), key) for key in keys}
        else:
            with pytest.raises(AttributeError):
                getattr(view, name)


def test_texts_are_read_only_by_stages_that_name_them(tmp_path):
    study = config.parse_study(with_change("covariates.age.description", "Age at scan"), "a")
    given = config.load_stage(config.freeze(study, "describe", tmp_path), "describe").covariates["age"]
    assert (given.unit, given.description) == ("year", "Age at scan")
    withheld = config.load_stage(config.freeze(study, "diffusion", tmp_path), "diffusion").covariates["age"]
    assert withheld.range == (0, 100) and not hasattr(withheld, "description") and not hasattr(withheld, "unit")


LEFT_OPEN = ("generate", "counterfactual", "inpainting", "normative", "reconstruction")


def test_what_a_study_leaves_open_is_decided_when_it_is_frozen(tmp_path):
    def steps(stage: str | None, **changes: object) -> dict[str, int]:
        frozen = json.loads(config.freeze(config.parse_study(MINIMAL | changes, "a"), stage, tmp_path).read_text())
        return {name: frozen[name]["num_inference_steps"] for name in LEFT_OPEN if name in frozen}

    assert steps("generate") == {"generate": 20}
    assert steps(None) == {"generate": 20, "inpainting": 25} | dict.fromkeys(
        ("counterfactual", "normative", "reconstruction"), 75
    )
    student = {"generate": {"sampler": "progressive"}, "few_step": {"method": "progressive", "num_inference_steps": 2}}
    assert steps("generate", **student) == {"generate": 2}
    assert steps("ledger", generate={"sampler": "ddpm"}, diffusion={"num_train_timesteps": 500}) == {"generate": 500}
    flow = {"diffusion": {"prediction_type": "flow"}, "generate": {"num_inference_steps": 7}}
    assert steps("counterfactual", **flow) == {"counterfactual": 50}
    assert steps(None, **flow) == {"generate": 7, "inpainting": 16} | dict.fromkeys(
        ("counterfactual", "normative", "reconstruction"), 50
    )


def test_a_new_default_reruns_the_studies_that_left_it_open(tmp_path, monkeypatch):
    left_open, given = (
        config.parse_study(MINIMAL, "a"),
        config.parse_study(with_change("generate.num_inference_steps", 20), "b"),
    )

    def frozen() -> list[list[Path]]:
        return [
            [config.freeze(study, stage, tmp_path) for stage in ("generate", "diffusion")]
            for study in (left_open, given)
        ]

    before = frozen()
    monkeypatch.setitem(SAMPLERS._entries, "dpmpp", SAMPLERS.entry("dpmpp") | {"default_steps": 25})
    after = frozen()
    assert after[1] == before[1]
    assert after[0][0] != before[0][0] and after[0][1] == before[0][1]


def test_the_published_study_says_what_each_stage_was_given(tmp_path):
    """As the audit does it: from what is published, which is what `ledger` may read, every other part follows."""
    raw = with_change("covariates.age.description", "Age at scan") | {
        "title": "T",
        "release": {"card": {"ethics": "Approved."}},
    }
    study = config.parse_study(raw, "a")
    published = json.loads(config.freeze(study, "ledger", tmp_path).read_text())
    afterwards = {"counterfactual", "inpainting", "normative", "reconstruction", "anomaly", "lineup", "export_models"}
    afterwards |= {"registration_train", "registration", "shape_completion_train", "shape_completion"}
    afterwards |= {"segmentation_study", "segmentation_model", "segmentation_few_labels", "segmentation"}
    afterwards |= {"translation_model", "translation_unpaired", "translation", "harmonisation_model", "harmonisation"}
    for stage in config.STAGES.keys() - afterwards:
        given = json.loads(config.freeze(study, stage, tmp_path).read_text())
        assert config.part_of(published, config.STAGES[stage]) == given


# ------------------------------------------------------------------------------------------- earlier versions

OLD = MINIMAL | {
    "title": "Old",
    "augmentation": {"variants": 4, "flip": True, "max_shift_voxels": 1},
    "augment": {"target": "sex", "seeds": 3},
    "distill": {"subjects": 50, "validation_share": 0.2},
    "release": {"name": "Old"},
}


@pytest.mark.parametrize("version", ["0.1.0", "0.1.12"])
def test_a_study_that_an_earlier_version_published_is_read_with_the_names_of_today(version):
    content = copy.deepcopy(OLD)
    study = config.parse_published(content, "config.json", version)
    assert (study.variants.count, study.variants.flip, study.variants.max_shift_voxels) == (4, True, 1)
    assert (study.downstream.target, study.downstream.seeds) == ("sex", 3)
    assert (study.second_model.subjects, study.second_model.validation_share) == (50, 0.2)
    assert content == OLD, "digests are of what was published"
    assert config.parse_published(study.model_dump(mode="json"), "config.json", "0.2.0") == study


def test_old_names_are_read_in_releases_of_old_versions_alone():
    with pytest.raises(UserError, match=r"distill\.subjects: this key is now second_model\.subjects"):
        config.parse_published(OLD, "config.json", "0.2.0")
    with pytest.raises(UserError, match=r"augment\.target: this key is now"):
        config.parse_published(OLD | {"downstream": {}}, "config.json", "0.1.0")


def test_keys_that_are_gone_are_told_of_study_files_and_refused_in_releases(tmp_path, caplog):
    study = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    expected = config.parse_study(study, "a")
    study["diffusion"] = study["diffusion"] | {"component_steps": 5}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    assert config.load_study(tmp_path / "study.yaml") == expected
    assert "diffusion.component_steps: this key is gone" in caplog.text
    with pytest.raises(UserError, match=r"diffusion\.component_steps: this key is gone"):
        config.parse_published(study, "config.json", "0.2.0")


def test_what_steps_of_earlier_versions_read_is_known():
    old = config.stages_of("0.1.0")
    assert old["autoencoder"] == ("seed", "augmentation", "autoencoder", "compute")
    assert old["distill"] == ("seed", "covariates", "distill") and "second_model" not in old
    content = {"seed": "s", "covariates": {"age": {"unit": "year", "description": "Age"}}, "distill": OLD["distill"]}
    assert config.part_of(content, old["distill"], "0.1.0") == content, "with all texts"
    assert config.part_of(content, ("covariates",)) == {"covariates": {"age": {"unit": "", "description": ""}}}
    assert config.stages_of("0.2.0").items() >= config.STAGES.items()


def test_numeric_levels_are_read_as_text():
    study = config.parse_study(with_change("covariates.sex", {"levels": [0, 1]}), "a")
    assert study.covariates["sex"].levels == ["0", "1"]


def test_the_schema_is_one_that_editors_understand():
    schema = json.loads(config.json_schema())
    assert schema["properties"]["study"]["pattern"]
    assert yaml.safe_load((ROOT / "config/config.yaml").read_text()).keys() <= schema["properties"].keys()


def test_volumes_are_not_compared_where_all_heads_get_one_size():
    changes = {
        "segmentation": {"labels": "/data/{scan_id}.nii.gz", "structures": {"brain_ml": {"labels": [1]}}},
        "covariates": MINIMAL["covariates"] | {"brain_ml": {"unit": "mL", "range": [500, 2000]}},
    }
    for transform in ("rigid", "affine"):
        study = with_change("preprocess.registration", {"transform": transform}) | changes
        if transform == "rigid":
            config.parse_study(study, "a")
        else:
            with pytest.raises(UserError, match=r"segmentation: .*transform: affine.*take rigid"):
                config.parse_study(study, "a")


def test_a_cycle_goes_through_contrasts_that_every_scan_has():
    def channel(**changes):
        raw = with_change("preprocess.channels", {"t2": {"path": "x/{scan_id}.nii", **changes}})
        raw |= {"translation": {"target": ["t2"], "cycle": True}, "anomaly": {"methods": ["modality_cycles"]}}
        return config.parse_study(raw, "a")

    assert channel().translation.cycle
    for changes in ({"kind": "mask"}, {"required": False}):
        with pytest.raises(UserError, match=r"preprocess.channels.t2 must be of kind: contrast, and required: true"):
            channel(**changes)


def of_scans(suffix: str | None, asked: str | None) -> dict:
    named = {"suffix": suffix} if suffix else {}
    study = MINIMAL | {"cohort": {"source": "bids", "root": "x"} | named}
    return study | {"release": {"suffix": asked}} if asked else study


def saved(folder: Path, study: dict) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


@pytest.mark.parametrize(
    ("scans", "asked", "found"),
    [("FLAIR", None, "FLAIR"), ("CT", None, "CT"), (None, None, "T1w"), ("T2w", "T2w", "T2w"), ("scan", "PDw", "PDw")],
)
def test_a_release_shows_what_its_scans_show(tmp_path, scans, asked, found):
    study = config.load_study(saved(tmp_path, of_scans(scans, asked)))
    assert study.release.suffix == found
    assert config.parse_study(config.published(study), "a release").release == study.release


@pytest.mark.parametrize(("scans", "asked"), [("FLAIR", "T1w"), ("T1w", "CT"), ("scan", None)])
def test_a_release_that_says_otherwise_is_refused_at_the_door(tmp_path, scans, asked):
    content = of_scans(scans, asked)
    with pytest.raises(UserError, match=f"release.suffix.*{scans}"):
        config.load_study(saved(tmp_path, content))
    sealed = config.parse_study(content, "a release that was made so")
    assert sealed.release.suffix == (asked or "T1w"), "it can still be read, as it is"
    flat = content | {"preprocess": {"shape": [64, 64], "spacing_mm": None}}
    assert config.load_study(saved(tmp_path, flat)).spatial_dims == 2, "pictures have no suffix"
