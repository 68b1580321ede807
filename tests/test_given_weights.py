"""A whole run that starts from a bundle and trains nothing, and what its release says of the base."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from monai_bundles import METADATA, write_bundle
from tiny_study import STUDY, run, whole_run

from meddiff_steps.audit.request import Request
from meddiff_steps.audit.run import audit
from meddiff_steps.core.files import read_json, sha256_file
from meddiff_steps.core.folders import BUNDLE
from meddiff_steps.models.pretrained.study import sections_of
from meddiff_steps.models.trained import load_denoiser

SHAPE = [16, 32, 16]
INPUTS = [
    {"covariate": "sex", "levels": [0, 1]},
    {"covariate": "age", "range": [44, 82]},
    {"value": 0.2},
    {"covariate": "brain_ml", "range": [900, 1900]},
]


def study_of(bundle: Path) -> dict:
    """What `read_bundle` prints, completed, in the place of the tiny study's networks."""
    said = yaml.safe_load(sections_of(bundle))
    said["diffusion"]["published"]["inputs"] = INPUTS
    said["generate"] = STUDY["generate"] | said["generate"] | {"num_inference_steps": 4}
    said["preprocess"] = STUDY["preprocess"] | said["preprocess"]
    said["plan"] = [{"name": "syn", "subjects": 6}]
    said["release"] = STUDY["release"] | {"exports": []}
    return STUDY | said


@pytest.mark.slow
def test_a_cohort_is_drawn_from_a_bundle_without_training(tmp_path):
    outputs = {"pred": {"type": "image", "spatial_shape": SHAPE}}
    data = METADATA["network_data_format"] | {"outputs": outputs}
    bundle = write_bundle(tmp_path / "bundle", metadata={"network_data_format": data})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study_of(bundle)))
    run(tmp_path, "release")
    results = tmp_path / "results/tiny"

    for model, file in (("autoencoder", "autoencoder.pt"), ("diffusion", "model.pt")):
        given, card = (read_json(results / folder / "card.json") for folder in (f"init/{model}", model))
        assert card["weights_sha256"] == given["weights_sha256"] == card["base"]["weights_sha256"]
        assert card["base"]["file_sha256"] == sha256_file(bundle / "models" / file)
    record = read_json(results / "records/init/autoencoder/model.safetensors.json")
    read = {Path(entry["path"]).name for entry in record["inputs"]["given"]}
    assert read == {"inference.json", "metadata.json", "autoencoder.pt", "model.pt"}

    readme = (results / "release/README.md").read_text()
    assert "Its weights are, untrained here, those of a MONAI bundle (bundle, 1.0.0)" in readme
    assert "licence: A licence of the weights" in readme
    assert "It says nothing of the people whose images the given weights were made from" in readme
    assert (results / "release/provenance/records/init/autoencoder/model.safetensors.json").is_file()
    models = results / "model-release"
    assert "started from weights under: A licence of the weights" in (models / "README.md").read_text()
    assert all((models / name).is_file() for name in BUNDLE)
    found = audit(Request(results / "release", models=models, results=results, sample=2))
    wrong = [check for check in found.checks if check.outcome == "finding"]
    assert not wrong, json.dumps([str(check) for check in wrong], indent=1)


@pytest.mark.slow
def test_a_level_of_a_handful_is_learnt_and_these_people_are_attacked(tmp_path, tmp_path_factory):
    base = whole_run(tmp_path_factory) / "results/tiny"
    cohort = tmp_path / "cohort"
    shutil.copytree(base / "cohort/simulated", cohort)
    people = pd.read_csv(cohort / "participants.tsv", sep="\t")
    people.loc[people.index % 3 == 0, "sex"] = "X"
    people.to_csv(cohort / "participants.tsv", sep="\t", index=False)
    content = STUDY | {
        "cohort": {"source": "bids", "root": str(cohort)},
        "covariates": STUDY["covariates"] | {"sex": {"levels": ["F", "M", "X"]}},
        "init_from": {
            "path": str(base / "model-release"),
            "models": ["autoencoder", "decoder", "diffusion"],
            "licence": "CC0-1.0",
        },
        "plan": [{"name": "syn", "subjects": 12, "where": {"sex": "X"}}],
        "release": STUDY["release"] | {"exports": []},
    }
    for name, steps in (("autoencoder", 0), ("decoder", 0), ("diffusion", 12)):
        content[name] = STUDY[name] | {"optimiser": STUDY[name]["optimiser"] | {"steps": steps}}
    content["diffusion"]["rare"] = {"covariate": "sex", "level": "X", "preserved": 6}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    run(tmp_path, "release", "results/tiny/report.html")
    results = tmp_path / "results/tiny"
    assert load_denoiser(results / "diffusion")[1].encoding.levels["sex"] == ("F", "M", "X")
    report = read_json(results / "privacy/report.json")
    rare = report["attacks"]["rare"]
    assert rare["subjects"] >= 2 and rare["images"] > 0 and 0.0 <= rare["denoising_loss"]["auc"]["value"] <= 1.0
    assert any(gate["name"].startswith("rare level: nearer to training") for gate in report["gates"])
    assert "The rare level was learnt from" in (results / "report.html").read_text()
    found = audit(Request(results / "release", models=results / "model-release", results=results, sample=2))
    wrong = [check for check in found.checks if check.outcome == "finding"]
    assert not wrong, json.dumps([str(check) for check in wrong], indent=1)
