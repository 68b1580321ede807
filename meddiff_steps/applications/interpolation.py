"""Between two scans: images on the way from one to the other, through the states that both are made from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.applications.counterfactual import deepest, inversion_condition, sampler_settings
from meddiff_steps.cohort.texts import without_text
from meddiff_steps.core.random_streams import batch_noise
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.models.trained import TrainedModel

ENTRY = {
    "order": 2,
    "summary": "Images between two real scans: their states mixed on the sphere, their covariates on a line",
    "source": "Song et al. 2021 (DDIM), section 5.3; Shoemake 1985",
    "needs": ["a trained model", "two scans with covariates"],
}


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Spherical interpolation, which keeps the norm that Gaussian noise has (Shoemake 1985)."""
    a, b = start.double().flatten(), end.double().flatten()
    angle = torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1.0, 1.0))
    if float(angle) < 1e-6:
        return start
    mixed = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return mixed.reshape(start.shape).to(start.dtype)


@torch.no_grad()
def interpolate(
    model: TrainedModel,
    images: np.ndarray,
    subjects: pd.DataFrame,
    shares: Sequence[float],
    settings: config.Counterfactual,
    key: str | None = None,
) -> np.ndarray:
    """Images float32 (shares, 1, *spatial) in [0, 1] between two scans, of share 0 (the first) to 1.

    Parameters
    ----------
    images
        Two preprocessed scans, float32 (2, 1, *spatial) in [0, 1].
    subjects
        Their covariates.  Numbers change evenly; labels, and what one of the two lacks, change in the middle.  Reports,
        which have no middle, are not told.
    settings
        How far the scans are taken back, and how images are sampled from there.
    key
        Of the drawing decoder's noise, the same for all images; without it images are the mean of what latents can
        mean.
    """
    noise = None if key is None else torch.from_numpy(batch_noise([key], model.image_shape))
    forward, states = sampler_settings(model, settings), []
    own = [model.condition(without_text(subjects.iloc[[row]])) for row in (0, 1)]
    for row, condition in enumerate(own):
        inversion = model.invert(
            model.encode(images[row : row + 1]),
            inversion_condition(condition, settings),
            num_inference_steps=settings.num_inference_steps,
            until=deepest(model, settings),
        )
        states.append(inversion.state)
        start = inversion.timesteps[-1]
    labels = torch.tensor([kind == "categorical" for kind in model.encoding.kinds], device=states[0].device)
    made = []
    for share in shares:
        first, second = (condition.covariates for condition in own)
        even = (1 - share) * first + share * second
        nearer = first if share < 0.5 else second
        condition = Condition(torch.where(labels | ~torch.isfinite(even), nearer, even))
        found = model.sample(slerp(states[0], states[1], share), condition, forward, start=start)
        made.append(model.decode(found, noise)[0].cpu().numpy())
    return np.stack(made)
