"""The tiny simulated study that several tests run through Snakemake, as a user runs it."""

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]

STUDY: dict[str, Any] = {
    "study": "tiny",
    "cohort": {"source": "simulated", "subjects": 40, "shape": [16, 20, 16], "spacing_mm": 10},
    "covariates": {
        "age": {"unit": "year", "range": [40, 90]},
        "sex": {"levels": ["F", "M"]},
        "brain_ml": {"unit": "mL", "range": [500, 2500]},
    },
    "splits": {"train": 0.5, "val": 0.15, "calibration": 0.15, "test": 0.2},
    "preprocess": {"shape": [16, 24, 16], "spacing_mm": 10, "shards": 2},
    "variants": {"count": 2, "flip": True},
    "autoencoder": {
        "channels": [8, 16],
        "norm_num_groups": 4,
        "latent_channels": 4,
        "optimiser": {"steps": 30, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 5},
    },
    "diffusion": {
        "channels": [8, 16],
        "norm_num_groups": 4,
        "num_head_channels": 8,
        "covariate_dim": 16,
        "num_res_blocks": 1,
        "optimiser": {"steps": 30, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 5},
    },
    "decoder": {
        "channels": 8,
        "num_res_blocks": 1,
        "crop": 12,
        "optimiser": {"steps": 30, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 5},
    },
    "plan": [{"name": "syn", "subjects": 18}, {"name": "old", "subjects": 4, "where": {"age": [70, 85], "sex": "F"}}],
    "generate": {"batch_size": 4, "shard_size": 11, "guidance_scale": 1.5, "drawing_steps": 3},
    "privacy": {
        "level": 0.45,
        "enforce": "report",
        "bootstrap": 100,
        "embedder": {"optimiser": {"steps": 20, "batch_size": 8, "learning_rate": 1e-3}},
    },
    "evaluate": {"bootstrap": 200, "sweep_steps": 3, "realism_bootstrap": 100, "permutations": 100, "ssim_pairs": 20},
    "release": {
        "name": "Tiny",
        "authors": ["A Tester", "B Tester"],
        "date": "2026-01-31",
        "exports": ["webdataset"],
        "models": True,
    },
    # Tests make parts of finished studies again.
    "storage": {"protect": False},
}

CONTRACT = [
    "cohort/manifest.parquet",
    "preprocessed/shard-0000.arrow",
    "preprocessed/shard-0001.arrow",
    "preprocessed/qc.parquet",
    "autoencoder/model.safetensors",
    "autoencoder/card.json",
    "decoder/model.safetensors",
    "decoder/card.json",
    "decoder/reconstructions.arrow",
    "latents/shard-0000.arrow",
    "latents/manifest.json",
    "diffusion/model.safetensors",
    "diffusion/card.json",
    "diffusion/tone.safetensors",
    "diffusion/tone.json",
    "plan.parquet",
    "generated/shard-0000.arrow",
    "generated/shard-0001.arrow",
    "filtered/shard-0000.arrow",
    "privacy/decisions.parquet",
    "privacy/report.json",
    "release/dataset_description.json",
    "release/participants.tsv",
    "release/croissant.json",
    "release/ro-crate-metadata.json",
    "exports/webdataset/shard-0000.tar",
    "exports/webdataset/manifest.parquet",
    "exports/webdataset/SHA256SUMS",
    "model-release/diffusion/model.safetensors",
    "model-release/diffusion/tone.safetensors",
    "model-release/decoder/model.safetensors",
    "model-release/README.md",
    "evaluation/metrics.json",
    "report.html",
]


def snakemake(folder: Path, *arguments: str) -> list[str]:
    # The number of threads changes last bits, and what is compared ran on other processors. --configfile takes several
    # files, so targets must stand before it.
    command = [
        sys.executable,
        "-m",
        "snakemake",
        *arguments,
        "-s",
        str(ROOT / "Snakefile"),
        "--directory",
        str(folder),
        "--cores",
        "2",
        "--max-threads",
        "1",
    ]
    return [*command, "--configfile", str(folder / "study.yaml")]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("MEDDIFF_STUDY", None)


#: The study without what it makes of the finished release.
LEAN: dict[str, Any] = STUDY | {
    "release": {name: value for name, value in STUDY["release"].items() if name not in ("exports", "models")}
}


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(snakemake(folder, *arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def digests(folder: Path) -> dict[str, str]:
    """Digest of every result, leaving out logs, timings, run records (they hold times) and training state."""
    root = folder / "results/tiny"
    files = [
        p
        for p in root.rglob("*")
        if p.is_file() and p.relative_to(root).parts[0] not in {"logs", "benchmarks", "state", "config", "records"}
    ]
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if not p.name.startswith(".")
    }


def whole_run(factory: pytest.TempPathFactory) -> Path:
    """The folder of one undisturbed run of `STUDY`, which all processes of a test session share; only the first makes
    it.
    """
    base = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder, done = base / "tiny-study", base / "tiny-study.done"
    with open(base / "tiny-study.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()
            (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
            run(folder)
            done.touch()
    return folder


def made_later(name: str) -> bool:
    """Whether a result is made of the finished release, which `LEAN` leaves out."""
    return name.startswith(("exports/", "model-release/"))
