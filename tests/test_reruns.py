"""Edit of X -> the stages that run again. Each edit is made in a copy of the package, or in the study."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[1] / "meddiff_steps"
STUDY: dict[str, Any] = {
    "study": "tiny",
    "cohort": {"source": "simulated"},
    "covariates": {
        "age": {"unit": "year", "range": [0, 120], "description": "Age"},
        "sex": {"levels": ["F", "M"], "description": "Sex"},
    },
    "plan": [{"name": "syn", "subjects": 3}],
    "generate": {"sampler": "dpmpp"},
    "sampler_study": {"samplers": ["dpmpp", "ddim"]},
}
#: What a rule of each step is given beside its files: prints {step: key}.
KEYS = """
import json, sys
from pathlib import Path
from meddiff_steps.__main__ import STEPS
from meddiff_steps.config import STAGES, freeze, parse_study
from meddiff_steps.core.code_digest import code_digest
study = parse_study(json.loads(sys.argv[1]), "test")
keys = {}
for step in STEPS:
    content = None
    if step in STAGES:
        frozen = freeze(study, step, Path("config"))
        content = json.loads(frozen.read_text())
        keys[step] = frozen.name
    keys[step] = [keys.get(step), code_digest(step, content)]
print(json.dumps(keys))
"""
#: Stages that have the trained model at work.
SAMPLING = {
    "decoder",
    "tone",
    "generate",
    "filter",
    "privacy",
    "showcase",
    "text_fidelity",
    "sampler_study",
    "counterfactual",
    "inpainting",
    "normative",
    "reconstruction",
    "anomaly",
    "shape_completion",
    "regenerate",
    "audit",
    "init_weights",
    "downstream_neighbours",
    "export_models",
}

#: Stages that draw images from images, or train what does.
PAIRED = {
    *("segmentation_model", "segmentation_few_labels", "segmentation"),
    *("translation_model", "translation_unpaired", "translation", "harmonisation_model", "harmonisation"),
}
#: Which count the operations of these networks; no rule runs them.
COUNTING = {"status"}

#: File, what is there, what becomes of it; then the stages.  A network that is trained anew has all that uses it made
#: anew by its files.
CODE: dict[str, tuple[str, str, str, set[str]]] = {
    "a constant of the denoiser, whose layers the drawing decoder has, too": (
        *("models/denoiser/resnet.py", "FREQUENCIES, LOWEST, HIGHEST = 32", "FREQUENCIES, LOWEST, HIGHEST = 16"),
        {"decoder", "diffusion", "init_weights"} | PAIRED | COUNTING,
    ),
    "a denoiser that is not the study's": (
        *("models/denoiser/unet.py", "POSITION_CHANNELS = 8", "POSITION_CHANNELS = 4"),
        set(),
    ),
    "the first stage": (
        *("models/first_stage/resnet.py", "(features, features.shape[1:])", "(features, features.shape[2:])"),
        {"autoencoder", "init_weights"},
    ),
    "codebooks, which the study's first stage has not": (
        *("models/first_stage/quantiser.py", "DEAD_BELOW = 0.05", "DEAD_BELOW = 0.06"),
        set(),
    ),
    "the drawing decoder": (
        *("models/drawing/base.py", "decoded * 2.0 - 1.0", "decoded * 2.1 - 1.0"),
        {"decoder", "init_weights"},
    ),
    "a constant of the training of the drawing decoder": (
        *("training/tasks/decoder.py", "PLACES, LEAST_SHARE, BLACK = 8", "PLACES, LEAST_SHARE, BLACK = 9"),
        {"decoder"},
    ),
    "a constant of the training of the denoiser": (
        *("training/tasks/diffusion.py", "VALIDATION_LATENTS = 64", "VALIDATION_LATENTS = 32"),
        {"diffusion", "status"},
    ),
    "a constant of the optimiser": (
        *("training/optimisers.py", "WEIGHT_DECAY = 0.01", "WEIGHT_DECAY = 0.02"),
        {
            "autoencoder",
            "decoder",
            "diffusion",
            "few_step",
            "registration_train",
            "segmentation_model",
            "segmentation_few_labels",
            "translation_model",
            "translation_unpaired",
            "harmonisation_model",
        },
    ),
    "a constant of the grey levels, from which costs are estimated": (
        *("synthesis/grey_levels.py", "IMAGES = 64", "IMAGES = 32"),
        {"tone", "status"},
    ),
    "an instrument's constant": (
        *("instruments/segmenter.py", "MAX_SCANS = 500", "MAX_SCANS = 400"),
        {"segmenter"},
    ),
    "a sampler's default steps": (
        *("diffusion/samplers/dpmpp.py", '"default_steps": 20', '"default_steps": 25'),
        {
            *("tone", "generate", "filter", "describe", "showcase", "text_fidelity", "sampler_study", "ledger"),
            "export_models",
        },
    ),
    "the solver of the study's sampler": (
        *("diffusion/samplers/dpmpp.py", "/ (2 * r)", "/ (3 * r)"),
        {
            *("decoder", "tone", "generate", "filter", "showcase", "text_fidelity", "sampler_study", "init_weights"),
            "export_models",
            *PAIRED,
            *COUNTING,
        },
    ),
    "the solver of a sampler that is not the study's": ("diffusion/samplers/heun.py", "/ 2)", "/ 3)", set()),
    "what a sampler says of itself": (
        *("diffusion/samplers/dpmpp.py", '"summary": "', '"summary": "Well known. '),
        set(),
    ),
    "how a sampler is run": ("diffusion/sampling.py", "math.hypot(", "2 * math.hypot(", SAMPLING | PAIRED | COUNTING),
    "a caption of the report": (
        "report/page.html.jinja",
        "<figcaption>",
        "<figcaption>Figure: ",
        {"report", "neighbours"},
    ),
    "a detector's constant": (
        *("privacy/detectors/aligned.py", "WINDOW = 7", "WINDOW = 9"),
        {"calibrate", "filter", "privacy"},
    ),
    "a comment": ("training/tasks/autoencoder.py", "VALIDATION_SCANS = 32", "VALIDATION_SCANS = 32  # many", set()),
    "an error message": ("core/registry.py", "Correct the entry.", "Correct it.", set()),
}
#: Key, what becomes of it, the stages; `ledger` besides, which seals the study.
STUDIES: dict[str, tuple[Any, set[str]]] = {
    "covariates.age.description": ("Age at the scan", {"describe", "neighbours", "report"}),
    "covariates.age.range": (
        [0, 110],
        {
            *(
                "cohort",
                "init_weights",
                "scale",
                "diffusion",
                "tone",
                "plan",
                "privacy",
                "neighbours",
                "predictors",
                "images",
                "describe",
                "evaluate",
                "sampler_study",
            ),
            *(
                "showcase",
                "counterfactual",
                "inpainting",
                "normative",
                "reconstruction",
                "anomaly",
                "harmonisation",
                "downstream_design",
                "downstream_plan",
                "downstream_data",
            ),
            *("downstream_test", "downstream_neighbours", "lineup", "report", "second_model"),
        },
    ),
    "title": ("A better title", {"neighbours", "describe", "lineup", "report"}),
    "decoder.channels": (32, {"decoder", "init_weights"}),
    "diffusion.levels.mean": (0.0, {"diffusion"}),
    "generate.drawing_steps": (
        20,
        {"tone", "generate", "filter", "describe", "showcase", "text_fidelity", "sampler_study", "export_models"},
    ),
    "generate.guidance_scale": (
        2.0,
        {
            *("few_step", "tone", "generate", "filter", "describe", "showcase", "text_fidelity", "sampler_study"),
            "export_models",
        },
    ),
    "privacy.level": (0.2, {"calibrate", "privacy"}),
    "release.licence": ("CC-BY-4.0", {"describe", "export", "export_index"}),
}
#: Keys of what is done beside a release, which does not seal them.
UNSEALED: dict[str, tuple[Any, set[str]]] = {
    "counterfactual.depth": (0.7, {"counterfactual"}),
    "inpainting.resamples": (9, {"inpainting"}),
    "normative.depth": (0.7, {"normative"}),
    "reconstruction.operators": (["denoising"], {"reconstruction"}),
    "anomaly.score_share": (0.02, {"anomaly"}),
    "registration.shares": ([0.5], {"registration"}),
    "registration.smoothness": (2.0, {"registration_train", "registration"}),
    "shape_completion.samples": (9, {"shape_completion"}),
    "segmentation_ensemble.samples": (9, {"segmentation"}),
    "segmentation_ensemble.labelled": ([5], {"segmentation"}),
    "translation.channels": ([32], {"translation_model", "translation"}),
    "translation.unpaired": ({"cycle_weight": 1.0}, {"translation_unpaired", "translation"}),
    "harmonisation.samples": (9, {"harmonisation"}),
    "lineup.seed": ("another", {"lineup"}),
    "storage.protect": (False, set()),
}


def keys_of(folder: Path, study: Mapping[str, Any] = STUDY) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", KEYS, json.dumps(study)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Steps that would run again.

    `plan_cost` is no job, and its code is that of all networks which it counts and times.
    """
    return {step for step in before if before[step] != after[step] and step != "plan_cost"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reruns")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def before(folder: Path) -> dict[str, Any]:
    return keys_of(folder)


@pytest.fixture
def edited(folder: Path, request: pytest.FixtureRequest) -> Iterator[set[str]]:
    name, old, new, stages = CODE[request.param]
    path = folder / PACKAGE.name / name
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{name} no longer has {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")
    yield stages
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("edited", CODE, indirect=True)
def test_an_edit_of_code(folder: Path, before: dict[str, Any], edited: set[str]) -> None:
    assert changed(before, keys_of(folder)) == edited


@pytest.mark.parametrize("key", [*STUDIES, *UNSEALED])
def test_an_edit_of_the_study(folder: Path, before: dict[str, Any], key: str) -> None:
    value, stages = (STUDIES | UNSEALED)[key]
    study = json.loads(json.dumps(STUDY))
    *sections, last = key.split(".")
    place = study
    for section in sections:
        place = place.setdefault(section, {})
    assert place.get(last) != value
    place[last] = value
    assert changed(before, keys_of(folder, study)) == stages | ({"ledger"} if key in STUDIES else set())
