"""The whole workflow on a tiny simulated study, through Snakemake, as a user runs it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from tiny_study import CONTRACT, ENVIRONMENT, LEAN, ROOT, STUDY, digests, made_later, run, snakemake, whole_run

from meddiff_steps.config import load_study
from meddiff_steps.core.folders import BUNDLE
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.operations.cost import Machine, estimates
from meddiff_steps.operations.status import seconds


def run_and_kill(folder: Path, when: Callable[[], bool]) -> None:
    """Start the workflow and `kill -9` it with all its jobs as soon as `when()` holds."""
    process = subprocess.Popen(
        snakemake(folder, "--rerun-incomplete"),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 600
    while not when():
        assert process.poll() is None, "the workflow ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(folder, "--unlock")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return whole_run(tmp_path_factory)


def test_every_contract_file_is_there(study):
    assert [name for name in CONTRACT if not (study / "results/tiny" / name).exists()] == []


def test_a_second_run_does_nothing(study):
    assert "Nothing to be done" in run(study)


@pytest.mark.parametrize(
    ("lost", "made_again"),
    [
        ("autoencoder/model.safetensors", True),
        ("decoder/model.safetensors", True),
        ("diffusion/model.safetensors", True),
        ("preprocessed/shard-0000.arrow", False),
    ],
)
def test_of_a_finished_study_lost_weights_are_made_again_and_intermediates_are_not(study, tmp_path, lost, made_again):
    shutil.copytree(study, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    (tmp_path / "results/tiny" / lost).unlink()
    assert ("Nothing to be done" not in run(tmp_path, "--dry-run")) == made_again


def test_manifest_and_plan_have_their_columns(study):
    manifest = pd.read_parquet(study / "results/tiny/cohort/manifest.parquet")
    assert {"scan_id", "subject_id", "path", "sha256", "split", "age", "sex", "brain_ml"} <= set(manifest)
    assert manifest.groupby("subject_id")["split"].nunique().max() == 1
    plan = pd.read_parquet(study / "results/tiny/plan.parquet")
    assert {"sample_id", "index", "attempt", "seed_key", "shard"} <= set(plan)
    assert plan["seed_key"].is_unique
    old = plan[plan["group"] == "old"]
    assert old["age"].between(70, 85).all()
    assert (old["sex"] == "F").all()


def test_the_texts_of_a_release_count_what_was_learnt_from(study):
    results = study / "results/tiny"
    manifest, quality = map(pd.read_parquet, (results / "cohort/manifest.parquet", results / "preprocessed/qc.parquet"))
    train = manifest[manifest["split"] == "train"].merge(quality[quality["status"] == "ok"], on="scan_id")
    told = f"The model learnt from {len(train)} simulated images (no real person was ever imaged) of"
    for name in ("README.md", "dataset_description.json", "croissant.json"):
        assert told in (results / "release" / name).read_text(), name


def test_images_are_in_range_and_differ(study):
    shards = Shards(sorted((study / "results/tiny/generated").glob("*.arrow")))
    images = shards.tensors("image")
    assert len(images) == 22
    assert images.min() >= 0
    assert images.max() <= 1
    assert len({image.tobytes() for image in images}) == 22


def test_metrics_are_figures(study):
    metrics = json.loads((study / "results/tiny/evaluation/metrics.json").read_text())
    figure = metrics["covariates"]["brain_ml"]["r"]
    assert figure["low"] <= figure["value"] <= figure["high"]


def test_the_release_is_valid_bids(study, bids_report):
    issues = bids_report(study / "results/tiny/release")["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


def test_a_subject_is_the_same_in_another_cohort_size_shard_and_order(study, tmp_path):
    """Fewer subjects in other shards: the same models must give the same bytes for the same subject."""
    changed = STUDY | {
        "plan": [STUDY["plan"][1], {"name": "syn", "subjects": 7}],
        "generate": STUDY["generate"] | {"shard_size": 6},
    }
    folder = Path(shutil.copytree(study, tmp_path / "copy"))
    (folder / "study.yaml").write_text(yaml.safe_dump(changed))
    run(folder, *(f"results/tiny/generated/shard-000{i}.arrow" for i in range(2)))

    def images(where: Path) -> dict[str, bytes]:
        shards = Shards(sorted((where / "results/tiny/generated").glob("*.arrow")))
        return {
            name: np.ascontiguousarray(shards.tensor("image", i)).tobytes()
            for i, name in enumerate(shards.column("sample_id"))
        }

    before = images(study)
    after = {name: image for name, image in images(folder).items() if name in before}
    assert len(after) == 11
    assert all(before[name] == image for name, image in after.items())


def test_a_study_is_estimated_to_cost_what_it_did(study):
    """Measured by itself, so that nothing is extrapolated."""
    results = study / "results/tiny"
    found = {
        one.stage: one
        for one in estimates(load_study(study / "study.yaml"), STUDY["cohort"]["subjects"], Machine(), results)
    }
    assert {
        "simulate",
        "preprocess",
        "autoencoder",
        "decoder",
        "diffusion",
        "tone",
        "generate",
        "filter",
        "evaluate",
        "ledger",
    } <= set(found)
    measured = {stage: one for stage, one in found.items() if one.measured}
    assert measured.keys() == found.keys() - {"audit"}
    for stage, one in measured.items():
        folder = results / "benchmarks" / stage
        took = [seconds(path) for path in (folder.glob("*.tsv") if folder.is_dir() else [folder.with_suffix(".tsv")])]
        assert one.jobs == len(took)
        assert one.jobs * one.hours_each * 3600 == pytest.approx(sum(took))
    assert found["generate"].disk == pytest.approx(
        sum(path.stat().st_size for path in (results / "generated").glob("*.arrow"))
    )
    command = [
        sys.executable,
        "-m",
        "meddiff_steps",
        "plan-cost",
        str(study / "study.yaml"),
        "--measured",
        str(results),
        "--jobs",
        "4",
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "40 scans in, 22 synthetic subjects out" in done.stdout


@pytest.mark.parametrize(
    ("section", "change", "first", "untouched"),
    [
        (
            "generate",
            {"guidance_scale": 2.0},
            "generate",
            {"cohort", "preprocess", "autoencoder", "decoder", "latents", "diffusion"},
        ),
        (
            "decoder",
            {"latent_noise": 0.1},
            "decoder",
            {"cohort", "preprocess", "autoencoder", "latents", "diffusion"},
        ),
        ("diffusion", {"covariate_dropout": 0.2}, "diffusion", {"cohort", "preprocess", "autoencoder", "latents"}),
        (
            "release",
            {"licence": "CC-BY-4.0"},
            "describe",
            {"cohort", "autoencoder", "diffusion", "generate", "evaluate", "images"},
        ),
    ],
)
def test_a_changed_setting_reruns_its_stage_and_nothing_before(study, section, change, first, untouched):
    rules = "".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    assert {first, *untouched} <= set(re.findall(r"^ *rule (\w+):", rules, re.M)), "names of today"
    original = (study / "study.yaml").read_text()
    try:
        (study / "study.yaml").write_text(yaml.safe_dump(STUDY | {section: STUDY[section] | change}))
        listing = run(study, "--dry-run", "--quiet", "rules")
    finally:
        (study / "study.yaml").write_text(original)
    jobs = set(re.findall(r"^(\w+) +\d+$", listing, re.MULTILINE))
    assert first in jobs
    assert jobs & untouched == set()


def test_counterfactuals_lie_on_the_scans_own_grids_and_touch_nothing_else(study, tmp_path, bids_report):
    folder = Path(shutil.copytree(study, tmp_path / "copy"))
    wanted = {"covariate": "brain_ml", "values": [900, 1400], "num_inference_steps": 8, "classifier_guidance": 0.5}
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | {"counterfactual": wanted | {"interpolation_steps": 3}}))
    manifest = pd.read_parquet(folder / "results/tiny/cohort/manifest.parquet")
    scans = manifest[manifest["split"] == "test"].set_index("scan_id")["path"][:2]
    said = run(folder, "counterfactual", "--config", f"counterfactual={{scans: [{', '.join(scans.index)}]}}")
    assert "1 of 1 steps" in said
    made = folder / "results/tiny/counterfactuals"
    issues = bids_report(made)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
    assert json.loads((made / "figures.json").read_text())["scans"] == list(scans.index)
    kinds = ["brainml1400", "brainml1400Difference", "brainml900", "brainml900Difference", "returned"]
    for name, path in scans.items():
        real, images = nib.load(folder / path), list((made / name / "anat").glob("*.nii.gz"))
        assert {image.name for image in images} == {f"{name}_desc-{kind}_T1w.nii.gz" for kind in kinds}
        for image in map(nib.load, images):
            assert image.shape == real.shape
            np.testing.assert_allclose(image.affine, real.affine, atol=1e-5)
        sources = json.loads((made / name / f"anat/{name}_desc-returned_T1w.json").read_text())["Sources"]
        assert sources == [f"bids:raw:{name}/anat/{name}_T1w.nii.gz"]
    before = digests(study)
    assert {file: digest for file, digest in digests(folder).items() if file in before} == before
    assert "Nothing to be done" in run(folder, "--dry-run")


def test_holes_and_measurements_of_scans_are_completed_on_their_own_grids(study, tmp_path, bids_report):
    folder = Path(shutil.copytree(study, tmp_path / "copy"))
    manifest = pd.read_parquet(folder / "results/tiny/cohort/manifest.parquet")
    scans = manifest[manifest["split"] == "test"].set_index("scan_id")["path"][:2]
    few = {"scans": list(scans.index), "samples": 2, "num_inference_steps": 4}
    wanted = {
        "inpainting": few | {"hole": {"box": [[5, 8], [9, 12], [6, 9]]}, "resamples": 2, "tolerance": 3.0},
        "reconstruction": few | {"operators": ["mri", "denoising"], "accelerations": [3]},
    }
    wanted["reconstruction"] |= {"methods": ["consistency", "moments"], "lesions": {"diameter_mm": 30}}
    wanted["normative"] = few | {"wanted": True, "lesions": {"diameter_mm": 30}}
    wanted["anomaly"] = few | {"methods": ["gaussian_noise"], "depths": [0.5], "lesions": {"diameter_mm": 40}}
    wanted["anomaly"] |= {"subject_false_positive_rate": 0.5}
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | wanted))
    said = run(folder, "inpainting", "normative", "reconstruction", "anomaly")
    assert "4 of 4 steps" in said
    for step, kinds in {
        "inpainting": ["hidden", "inpainted", "inpaintedMean", "inpaintedStd"],
        "normative": ["reference", "deviation"],
        "reconstruction": [f"{task}{kind}" for task in ("denoising0p1", "mri3") for kind in ("", "FirstLook", "Std")],
        "anomaly": ["anomaly", "anomalyMask", "healed"],
    }.items():
        made = folder / "results/tiny" / step
        issues = bids_report(made)["issues"]["issues"]
        assert [issue for issue in issues if issue["severity"] == "error"] == []
        figures = json.loads((made / "figures.json").read_text())
        assert figures["scans"] == list(scans.index)
        assert step in ("anomaly", "normative") or figures["nominal_coverage"] == pytest.approx(1 / 3)
        for name, path in scans.items():
            real, images = nib.load(folder / path), list((made / name / "anat").glob("*.nii.gz"))
            assert {image.name for image in images} == {f"{name}_desc-{kind}_T1w.nii.gz" for kind in kinds}
            for image in map(nib.load, images):
                assert image.shape == real.shape
                np.testing.assert_allclose(image.affine, real.affine, atol=1e-5)
    name, path = next(iter(scans.items()))
    anat = folder / f"results/tiny/inpainting/{name}/anat"
    hidden, filled = (nib.load(anat / f"{name}_desc-{kind}_T1w.nii.gz").get_fdata() for kind in ("hidden", "inpainted"))
    np.testing.assert_array_equal(filled[hidden == 0], nib.load(folder / path).get_fdata()[hidden == 0])
    found = pd.read_parquet(folder / "results/tiny/normative/measurements.parquet")
    assert found.groupby(["method", "kind"]).size().to_dict() == {
        (method, kind): 2 for method in ("counterfactual", "regression") for kind in ("reference", "lesion")
    }
    rows = pd.read_parquet(folder / "results/tiny/reconstruction/measurements.parquet")
    assert set(rows["method"]) == {
        *("first_look", "total_variation", "consistency", "consistency_mean", "moments", "moments_mean")
    }
    assert rows["lesion_kept"].notna().all()
    before = digests(study)
    assert {file: digest for file, digest in digests(folder).items() if file in before} == before


def test_a_study_without_drawing_decoder_gives_images_as_the_autoencoder_decodes_them(study, tmp_path):
    folder = Path(shutil.copytree(study, tmp_path / "copy"))
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | {"decoder": STUDY["decoder"] | {"network": None}}))
    results = folder / "results/tiny"
    shutil.rmtree(results / "decoder")
    said = run(folder)
    assert not re.search(r"^(autoencoder|decoder|latents|diffusion) +[0-9]", said, re.M), "nothing is trained anew"
    assert not (results / "decoder").exists()
    before, after = digests(study), digests(folder)
    assert after["diffusion/model.safetensors"] == before["diffusion/model.safetensors"]
    for name in ("generated/shard-0000.arrow", "diffusion/tone.safetensors", "evaluation/metrics.json"):
        assert after[name] != before[name]
    rows = [json.loads(line) for line in (results / "release/provenance/ledger.jsonl").read_text().splitlines()]
    assert {(row["recipe"]["decoder"], row["recipe"]["drawing_steps"]) for row in rows if row["recipe"]} == {
        (None, None)
    }
    names = {path.relative_to(results / "model-release").as_posix() for path in results.glob("model-release/*/*")}
    assert names == {
        *(f"{kind}/{name}" for kind in ("autoencoder", "diffusion") for name in ("model.safetensors", "card.json")),
        *(f"diffusion/tone.{kind}" for kind in ("safetensors", "json")),
        *BUNDLE,
    }
    command = [sys.executable, "-m", "meddiff_steps", "audit", str(results / "release")]
    done = subprocess.run([*command, "--models", str(results / "model-release")], env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    assert "rawing decoder" not in (results / "report.html").read_text()


@pytest.mark.slow
def test_a_second_model_learns_from_accepted_synthetic_images_alone(study, tmp_path):
    folder = Path(shutil.copytree(study, tmp_path / "copy"))
    (folder / "study.yaml").write_text(
        yaml.safe_dump(STUDY | {"second_model": {"subjects": 14}, "generate": STUDY["generate"] | {"shard_size": 22}})
    )
    run(folder, "results/tiny/report.html")
    results = folder / "results/tiny"
    manifest = pd.read_parquet(results / "second_model/manifest.parquet")
    decisions = pd.read_parquet(results / "teacher/privacy/decisions.parquet")
    assert set(manifest["scan_id"]) == set(decisions.loc[decisions["decision"] != "rejected", "sample_id"])
    card = json.loads((results / "second_model/diffusion/card.json").read_text())
    assert card["scans"]["train"] == (manifest["split"] == "train").sum()
    # The first model is as it was; what is released comes from the second.
    assert digests(folder)["diffusion/model.safetensors"] == digests(study)["diffusion/model.safetensors"]
    assert digests(folder)["generated/shard-0000.arrow"] != digests(study)["generated/shard-0000.arrow"]
    assert "The second model beside the first" in (results / "report.html").read_text()


@pytest.mark.slow
def test_a_student_draws_a_cohort_that_can_be_audited_and_made_again(study, tmp_path):
    folder = Path(shutil.copytree(study, tmp_path / "copy"))
    optimiser = {"steps": 20, "batch_size": 4, "checkpoint_every": 5, "learning_rate": 1e-3}
    student = {"method": "consistency", "num_inference_steps": 2, "teacher_steps": 4, "optimiser": optimiser}
    generate = STUDY["generate"] | {"sampler": "consistency"}
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | {"few_step": student, "generate": generate}))
    run(folder)
    results = folder / "results/tiny"
    before, after = digests(study), digests(folder)
    assert after["diffusion/model.safetensors"] == before["diffusion/model.safetensors"]
    assert after["diffusion/tone.safetensors"] == before["diffusion/tone.safetensors"]
    weights = json.loads((results / "few_step/card.json").read_text())["weights_sha256"]
    rows = [json.loads(line) for line in (results / "release/provenance/ledger.jsonl").read_text().splitlines()]
    recipes = [row["recipe"] for row in rows if row["recipe"]]
    assert {(r["diffusion"], r["sampler"], r["num_inference_steps"], r["guidance_scale"]) for r in recipes} == {
        (weights, "consistency", 2, 1.5)
    }
    for models in ("model-release", "."):
        command = [sys.executable, "-m", "meddiff_steps", "audit", str(results / "release")]
        done = subprocess.run([*command, "--models", str(results / models)], env=ENVIRONMENT, capture_output=True)
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    for explained in ("few_step", "diffusion"):
        assert explained in run_explain(results / "release", next(r for r in rows if r["recipe"])["sample_id"])


def run_explain(release: Path, subject: str) -> str:
    command = [sys.executable, "-m", "meddiff_steps", "explain", subject, str(release)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_killed_runs_finish_with_the_same_bytes(study, tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(LEAN))
    results = tmp_path / "results/tiny"
    run_and_kill(tmp_path, lambda: any(results.glob("state/autoencoder/*/step-*.safetensors")))
    run_and_kill(tmp_path, lambda: (results / "autoencoder/card.json").exists())
    run_and_kill(tmp_path, lambda: any(results.glob("state/decoder/*/step-*.safetensors")))
    run_and_kill(tmp_path, lambda: any(results.glob("state/diffusion/*/step-*.safetensors")))
    run_and_kill(tmp_path, lambda: any(results.glob("generated/.partial-*")))
    run(tmp_path, "--rerun-incomplete")
    assert digests(tmp_path) == {name: digest for name, digest in digests(study).items() if not made_later(name)}


def test_a_bad_study_stops_before_any_job(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"preproces": {}}))
    done = subprocess.run(snakemake(tmp_path, "-n"), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "preproces: unknown key" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
