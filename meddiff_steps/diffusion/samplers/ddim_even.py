"""DDIM on evenly spaced timesteps of training, by which published models are sampled."""

from __future__ import annotations

import numpy as np

from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.samplers import ddim
from meddiff_steps.diffusion.schedules import NoiseProcess

ENTRY = {
    "order": 2,
    "summary": "DDIM on every n-th timestep of training, the last of them 0: as published models are sampled",
    "source": "Song et al. 2021, Denoising diffusion implicit models, equation 12 with eta = 0; linear times of D.2",
    "default_steps": 100,
    "processes": ["variance_preserving"],
    "evaluations": "steps",
    "stochastic": False,
    "compared": False,  # for models that were published with it
}


def timesteps(process: NoiseProcess, steps: int) -> np.ndarray:
    """Timesteps (steps,), falling to 0, a whole number apart.

    Raises
    ------
    UserError
        Training had fewer.
    """
    if steps > process.num_train_timesteps:
        raise UserError(
            f"num_inference_steps: ddim_even can take at most the {process.num_train_timesteps} steps of training,"
            f" found {steps}. Ask for fewer."
        )
    return (process.num_train_timesteps // steps * np.arange(steps, dtype=np.float64))[::-1]


solver = ddim.solver
