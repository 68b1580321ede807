"""Trains the diffusion model of test_training.py in as many processes as it is told, and writes its weights: FOLDER
PROCESSES METHOD.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file
from test_training import OPTIMISER, diffusion_task, latent_data

from meddiff_steps import config
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.training import loop

if __name__ == "__main__":
    folder, processes = Path(sys.argv[1]), int(sys.argv[2])
    fabric = make_fabric(config.Compute(device="cpu", precision="32-true"), 1, processes)
    optimiser = OPTIMISER.model_copy(update={"method": sys.argv[3]})
    data = latent_data(folder / f"latents-{fabric.global_rank}.arrow")
    task = diffusion_task(data, fabric, optimiser=optimiser.model_dump())
    curve = loop.fit(task, OPTIMISER, fabric, folder / "state", "test")
    if fabric.is_global_zero:
        curve.to_parquet(folder / "history.parquet", index=False)
        save_file(
            {name: value.contiguous() for name, value in task.modules["average"].state_dict().items()},
            folder / "weights.safetensors",
        )
