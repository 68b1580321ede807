"""A folder in which the real step `autoencoder` runs in seconds, as a command, so that it can be killed or run in
several processes.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from meddiff_steps import config
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn

OUTPUTS = [
    f"autoencoder/{name}" for name in ("model.safetensors", "card.json", "history.parquet", "reconstructions.arrow")
]


def prepare(folder: Path, method: str = "muon", steps: int = 60, network: str = "resnet", **compute) -> list[str]:
    """Write manifest, images and frozen config into `folder`; returns the arguments of the step, to be run there."""
    rng = np.random.default_rng(0)
    with ShardWriter(
        folder / "images.arrow", {"scan_id": pa.string(), "image": TensorColumn("float16", (1, 8, 8, 8))}
    ) as shard:
        for i in range(12):
            shard.append(scan_id=f"scan{i}", image=rng.random((1, 8, 8, 8)))
    names = [f"scan{i}" for i in range(12)]
    table = {
        "scan_id": names,
        "subject_id": names,
        "session_id": [None] * 12,
        "path": names,
        "sha256": ["0" * 64] * 12,
        "content_sha256": ["0" * 64] * 12,
    }
    pd.DataFrame(table | {"split": ["train"] * 8 + ["val"] * 2 + ["test"] * 2}).to_parquet(folder / "manifest.parquet")
    optimiser = {
        "method": method,
        "steps": steps,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "log_every": 7,
        "checkpoint_every": 11,
        "validate_every": 20,
    }
    study = config.parse_study(
        {
            "study": "tiny",
            "cohort": {"source": "simulated"},
            "covariates": {"age": {"unit": "year", "range": [40, 90]}},
            "preprocess": {"shape": [8, 8, 8]},
            "autoencoder": {"network": network, "channels": [8, 16], "latent_channels": 4, "optimiser": optimiser},
            "diffusion": {"channels": [8, 16], "norm_num_groups": 4, "num_head_channels": 8},
            "plan": [{"name": "syn", "subjects": 1}],
            "compute": {"device": "cpu", "precision": "32-true"} | compute,
        },
        "test",
    )
    frozen = config.freeze(study, "autoencoder", folder / "frozen")
    files = [f"--config {frozen} --manifest manifest.parquet --images images.arrow --state state"]
    files += ["--out autoencoder"]
    return [sys.executable, "-m", "meddiff_steps", "autoencoder", *" ".join(files).split()]
