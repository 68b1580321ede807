"""Trains the diffusion model of test_training.py in as many processes as it is told, and writes its weights: FOLDER
PROCESSES.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from test_training import OPTIMISER, diffusion_task

from meddiff_steps import config
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.training import loop
from meddiff_steps.training.latent_data import LatentData


def latents(path: Path) -> LatentData:
    rng = np.random.default_rng(0)
    shape = TensorColumn("float16", (4, 4, 4, 4))
    with ShardWriter(path, {"mean": shape, "log_variance": shape}) as shard:
        for _ in range(10):
            shard.append(mean=rng.normal(size=shape.shape), log_variance=np.full(shape.shape, -4.0))
    prior = {
        "offset": torch.zeros(1, *shape.shape),
        "scale": torch.ones(1, 4, 1, 1, 1),
        "prior.effects": torch.zeros(2, 256),
    }
    prior |= {"prior.basis": torch.eye(256)[:3], "prior.variances": torch.ones(3)}
    prior |= {"prior.local_basis": torch.eye(4).expand(64, 4, 4).clone(), "prior.local_variances": torch.ones(64, 4)}
    return LatentData(
        Shards([path]), prior, rng.normal(size=(10, 2)).astype(np.float32), np.arange(8), np.arange(8, 10)
    )


if __name__ == "__main__":
    folder, processes = Path(sys.argv[1]), int(sys.argv[2])
    fabric = make_fabric(config.Compute(device="cpu", precision="32-true"), 1, processes)
    task = diffusion_task(latents(folder / f"latents-{fabric.global_rank}.arrow"), fabric)
    curve = loop.fit(task, OPTIMISER, fabric, folder / "state", "test")
    if fabric.is_global_zero:
        curve.to_parquet(folder / "history.parquet", index=False)
        save_file(
            {name: value.contiguous() for name, value in task.modules["average"].state_dict().items()},
            folder / "weights.safetensors",
        )
