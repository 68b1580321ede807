"""Training of the prior's component network: seconds, on one device, before the UNet's training."""

from __future__ import annotations

import copy
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from meddiff_steps import config
from meddiff_steps.core.files import atomic_path
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.denoiser.base import COMPONENT_WIDTH
from meddiff_steps.models.denoiser.latent_gaussian import LatentGaussian, covariate_features
from meddiff_steps.training.latent_data import LatentData, drop
from meddiff_steps.training.loop import learning_rate_scale, update_average

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)

#: Steps of this batch cost milliseconds.
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, EMA_DECAY = 256, 2e-3, 100, 0.99

#: Times and noises at which each held-out subject is judged, so that few subjects give a stable figure.
VALIDATION_DRAWS = 16

#: A few hundred subjects allow many steps to learn them by heart; the average weights are kept that do best held out.
VALIDATE_EVERY = 50


def train_components(
    data: LatentData, settings: config.Diffusion, levels: list[int], root: str
) -> tuple[dict[str, Tensor], float]:
    """Train the network of the prior whose Gaussian `data` holds, with early stopping on held-out subjects.

    The target is the error of the Gaussian's estimate of the clean coefficients in posterior standard deviations, which
    has variance 1 at every time and component if latents are Gaussian; a network that learns nothing has a loss near 1.

    Parameters
    ----------
    settings
        The study's `diffusion` section.
    levels
        Per covariate: the number of levels, or 0 for a continuous one.
    root
        The study's seed.

    Returns
    -------
    tensors, gain
        State of the trained network under its names in the denoiser, and the held-out loss over that of the Gaussian
        alone: 1 if nothing was learnt (the network then stays zero) or nobody is held out (the last average is kept).
    """
    torch.manual_seed(int(step_generator(root, "components/weights", 0).integers(2**31)))
    prior = LatentGaussian(
        NoiseProcess.of(settings),
        data.shards.shape("mean"),
        levels,
        len(data.prior["prior.basis"]),
        width=COMPONENT_WIDTH,
    )
    prior.load_state_dict(
        {name.removeprefix("prior."): value for name, value in data.prior.items() if name.startswith("prior.")},
        strict=False,
    )
    assert prior.network is not None
    coefficients = (
        data.coefficients(data.train_rows),
        data.coefficients(data.val_rows),
    )  # of all components; the leading ones are judged
    covariates = data.covariates[data.train_rows], data.covariates[data.val_rows]
    schedule = config.Optimiser(
        steps=settings.component_steps, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, warmup_steps=WARMUP_STEPS
    )
    effects = prior.effects @ prior.basis.T

    def loss(clean: np.ndarray, seen: np.ndarray, generator: np.random.Generator) -> Tensor:
        count = len(clean)
        uniform = (generator.permutation(count) + generator.random(count)) / count
        noise = torch.from_numpy(generator.standard_normal(clean.shape, dtype=np.float32))
        timesteps = prior.process.training_timesteps(torch.from_numpy(uniform))
        alpha, sigma = (a.float()[:, None] for a in prior.process.alpha_sigma(timesteps))
        given = torch.from_numpy(seen)
        centred = torch.from_numpy(clean) - covariate_features(given, prior.levels) @ effects
        y = alpha * centred + sigma * noise
        estimate = alpha * prior.variances * y / (alpha**2 * prior.variances + sigma**2)
        # Near the clean end of a flow nothing is left to correct, and the deviation is 0.
        target = (centred - estimate) / prior.deviations(timesteps).clamp_min(1e-6)
        return (prior.correction(y, timesteps, given) - target)[:, : prior.learnt].square().mean()

    def held_out() -> float:
        generator = step_generator(root, "components/validation", 0)
        network, prior.network = prior.network, average
        with torch.no_grad():
            total = sum(float(loss(coefficients[1], covariates[1], generator)) for _ in range(VALIDATION_DRAWS))
        prior.network = network
        return total / VALIDATION_DRAWS

    average = copy.deepcopy(prior.network).requires_grad_(False).eval()
    has_held_out = len(coefficients[1]) > 0
    gaussian = held_out() if has_held_out else 1.0
    best, best_loss = copy.deepcopy(average), gaussian
    optimiser = torch.optim.AdamW(prior.network.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    prior.network.train()
    for step in tqdm(range(schedule.steps), desc="components", mininterval=5, file=sys.stderr):
        generator = step_generator(root, "components/batch", step)
        rows = generator.integers(len(coefficients[0]), size=BATCH_SIZE)
        seen = drop(covariates[0][rows], settings.covariate_dropout, settings.condition_dropout, generator)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_scale(step, schedule)
        optimiser.zero_grad(set_to_none=True)
        loss(coefficients[0][rows], seen, generator).backward()
        torch.nn.utils.clip_grad_norm_(prior.network.parameters(), schedule.gradient_clip)
        optimiser.step()
        update_average(average, prior.network, EMA_DECAY, step)
        judged = has_held_out and ((step + 1) % VALIDATE_EVERY == 0 or step + 1 == schedule.steps)
        if judged and (now := held_out()) < best_loss:
            best, best_loss = copy.deepcopy(average), now
            log.info(
                "components: held-out loss %.4f after %d steps (the Gaussian alone: %.4f)", now, step + 1, gaussian
            )
    kept = best if has_held_out else average
    return {f"prior.network.{name}": value for name, value in kept.state_dict().items()}, best_loss / gaussian


def with_components(
    data: LatentData, settings: config.Diffusion, levels: list[int], root: str, state: Path, fabric: Fabric
) -> LatentData:
    """`data` with a trained component network in its prior, where the study wants one and there is a Gaussian.

    It is kept in `state`, so that a resumed training has the same; of several processes the first trains it.
    """
    if not settings.component_steps or "prior.basis" not in data.prior:
        return data
    kept = state / "components.safetensors"
    if fabric.is_global_zero and not kept.exists():
        tensors, gain = train_components(data, settings, levels, root)
        log.info("components: held-out loss %.3f of the Gaussian's", gain)
        with atomic_path(kept) as path:
            save_file(tensors, path)
    fabric.barrier()
    return replace(data, prior=data.prior | load_file(kept))
