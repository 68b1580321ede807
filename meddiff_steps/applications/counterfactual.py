"""Counterfactuals of a real scan: how it might look with one covariate moved.

The scan's latents are taken back along the sampler's own path to a state at which only coarse anatomy is left, and from
there forward again with another value of one covariate.  What the covariate does not touch comes back, because the
state remembers it.  Beside each counterfactual stands the same way there and back with nothing moved: what the model
changes for no reason at all, the floor of every difference (but for what a classifier's guidance adds).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.cohort.texts import without_text
from meddiff_steps.core.random_streams import batch_noise
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.guidance import Guidance
from meddiff_steps.diffusion.samplers import ddim, flow
from meddiff_steps.models.trained import TrainedModel

ENTRY = {
    "order": 1,
    "summary": "A real scan with one covariate moved, on its own grid, with a map of what changed",
    "source": "Dhariwal and Nichol 2021, appendix F (inversion); Sanchez and Tsaftaris 2022; Mokady et al. 2023",
    "needs": ["a trained model", "the scan's covariates, or none"],
}


@dataclass(frozen=True)
class Counterfactuals:
    """What became of some scans, images float32 (1, *spatial) in [0, 1] each.

    Attributes
    ----------
    decoded
        The scans encoded and decoded: what the first stage alone changes, (n, 1, *spatial).
    returned
        There and back with nothing moved, (n, 1, *spatial).
    moved
        The counterfactuals, (n, values, 1, *spatial).
    """

    decoded: np.ndarray
    returned: np.ndarray
    moved: np.ndarray


def inversion_condition(own: Condition, settings: config.Counterfactual) -> Condition:
    """What the network is told on the way to the state: the scan's own covariates, or nothing."""
    return own if settings.invert_with == "covariates" else own.null()


def deepest(model: TrainedModel, settings: config.Counterfactual) -> float | None:
    """The timestep that scans are taken back to; None for the noisiest."""
    return None if settings.depth >= 1.0 else settings.depth * model.process.last_timestep


def sampler_settings(model: TrainedModel, settings: config.Counterfactual) -> config.Generate:
    """How the way forward is sampled: by the sampler that `invert` inverts, with the same steps."""
    # The module, not its name: so its code counts for what an application makes, and for nothing else.
    sampler = flow if model.process.is_flow else ddim
    return config.Generate(
        sampler=sampler.__name__.rpartition(".")[2],
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )


@torch.no_grad()
def counterfactuals(
    model: TrainedModel,
    images: np.ndarray,
    subjects: pd.DataFrame,
    values: Sequence[config.Scalar],
    settings: config.Counterfactual,
    guidance: Sequence[tuple[Guidance, ...]] | None = None,
    keys: Sequence[str] | None = None,
) -> Counterfactuals:
    """Move the covariate `settings.covariate` of some scans to each of `values`.

    The way back with nothing moved is guided by the scan's own covariates as strongly as the counterfactuals are by
    theirs (`guidance_scale`): it is the floor of what that and the way there and back change.  Further guidance does
    not act on it, so what a classifier's gradient changes for no reason is not in this floor.

    Parameters
    ----------
    images
        Preprocessed scans, float32 (n, 1, *spatial) in [0, 1].
    subjects
        Their covariates, a row each; empty cells are missing.  A report is told on neither way: it still says what the
        covariate was.
    values
        In the covariate's own units.
    guidance
        Further guidance for each of the values, for example a classifier's.
    keys
        Of each scan's noise for the drawing decoder, the same for all of its images; without them images are the mean
        of what latents can mean.

    Returns
    -------
    Counterfactuals
        One scan after the other was worked on, so that a scan's images do not depend on the others.
    """
    assert settings.covariate is not None
    forward = sampler_settings(model, settings)
    decoded, returned, moved = [], [], []
    for row in range(len(images)):
        subject = without_text(subjects.iloc[[row]])
        latents, own = model.encode(images[row : row + 1]), model.condition(subject)
        inversion = model.invert(
            latents,
            inversion_condition(own, settings),
            num_inference_steps=settings.num_inference_steps,
            until=deepest(model, settings),
        )
        start = inversion.timesteps[-1]
        noise = torch.from_numpy(batch_noise([keys[row]], model.image_shape)) if keys is not None else None

        def back(
            condition: Condition,
            extra: tuple[Guidance, ...],
            state: Tensor,
            start: float = start,
            noise: Tensor | None = noise,
        ) -> np.ndarray:
            found = model.sample(state, condition, forward, start=start, guidance=extra)
            return model.decode(found, noise)[0].cpu().numpy()

        decoded.append(model.decode(latents, noise)[0].cpu().numpy())
        returned.append(back(own, (), inversion.state))
        moved.append(
            np.stack(
                [
                    back(model.condition(_with(subject, settings.covariate, value)), extra, inversion.state)
                    for value, extra in zip(values, guidance or [()] * len(values), strict=True)
                ]
            )
        )
    return Counterfactuals(np.stack(decoded), np.stack(returned), np.stack(moved))


def _with(subject: pd.DataFrame, covariate: str, value: config.Scalar) -> pd.DataFrame:
    """A subject with one covariate set; a label's column may have been all empty."""
    return subject.assign(**{covariate: pd.Series([value], index=subject.index)})
