"""Tables of the forward process: how much of a clean latent is left at each timestep.

They are float64, and the same as those of diffusers but for its rounding.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import numpy as np

PredictionType = Literal["epsilon", "v_prediction", "flow"]
Schedule = Literal["scaled_linear", "linear", "cosine"]

#: Signal power at the last step of a zero-terminal-SNR schedule, as a share of that before it: log-SNR must be finite.
#: (diffusers puts 2**-24 there, which is *more* than the step before it has: with 1,000 scaled-linear steps, 1.1e-8.)
ZERO_SNR_SHARE = 2.0**-10


class ProcessSettings(Protocol):
    """What a forward process is made from: a study's `diffusion` section, or anything else with these attributes."""

    @property
    def prediction_type(self) -> PredictionType: ...
    @property
    def num_train_timesteps(self) -> int: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def beta_start(self) -> float: ...
    @property
    def beta_end(self) -> float: ...
    @property
    def zero_terminal_snr(self) -> bool: ...


def alphas_cumprod(settings: ProcessSettings) -> np.ndarray:
    """Signal power at each timestep, float64 (num_train_timesteps,), decreasing, in (0, 1).

    `linear` and `scaled_linear` (linear in the root of beta; Rombach et al. 2022) run from `beta_start` to `beta_end`;
    `cosine` is that of Nichol and Dhariwal 2021 with betas capped at 0.999; with `zero_terminal_snr` the roots are
    shifted and scaled so that the last is zero (Lin et al. 2023, algorithm 1).

    Raises
    ------
    ValueError
        There is no such schedule.
    """
    steps = settings.num_train_timesteps
    if settings.schedule == "scaled_linear":
        betas = np.linspace(settings.beta_start**0.5, settings.beta_end**0.5, steps) ** 2
    elif settings.schedule == "linear":
        betas = np.linspace(settings.beta_start, settings.beta_end, steps)
    elif settings.schedule != "cosine":
        raise ValueError(f"schedule: expected one of {', '.join(get_args(Schedule))}, found {settings.schedule!r}")
    else:
        time = np.linspace(0.0, 1.0, steps + 1)
        power = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1.0 - power[1:] / power[:-1], 0.999)
    table = np.cumprod(1.0 - betas)
    if settings.zero_terminal_snr:
        root = np.sqrt(table)
        table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        table[-1] = table[-2] * ZERO_SNR_SHARE
    return table
