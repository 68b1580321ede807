"""A trained denoiser that is told of one level more of a categorical covariate, and knows nothing of it yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import DENOISERS
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.denoiser.effects import feature_count
from meddiff_steps.models.denoiser.new_level import NewLevel, inserted
from meddiff_steps.models.trained import DenoiserCard

#: Variance of the new level's feature: as if one in a hundred had it. It matters where the covariate is missing.
VARIANCE = 0.01


def with_level(
    denoiser: Denoiser, made: DenoiserCard, encoding: CovariateEncoding, covariate: str, like: str | None
) -> tuple[Denoiser, DenoiserCard]:
    """The denoiser that knows one level more: the last of `covariate`. For all others it predicts what it did.

    Asked for the new level, it predicts what it does for the level `like`; without one, the effects of the others are
    averaged, as often as each was met in training.

    Parameters
    ----------
    denoiser, made
        Trained, and how it was made.
    encoding
        With that level.

    Raises
    ------
    UserError
        The network cannot be told of further levels (ENTRY has no `grows`).
    """
    kind = made.settings.network
    if not DENOISERS.entry(kind).get("grows", False):
        raise UserError(f"diffusion.network: {kind} cannot be told of a further level. Leave diffusion.rare out.")
    place, counts = made.encoding.names.index(covariate), made.encoding.level_counts
    feature = feature_count(counts[: place + 1])
    levels = made.encoding.levels[covariate]
    if like is None:
        met = denoiser.effects.feature_mean[feature - len(levels) : feature].clamp_min(0.0)
        mix = met / met.sum() if met.sum() > 0 else torch.full((len(levels),), 1.0 / len(levels))
    else:
        mix = torch.eye(len(levels))[levels.index(like)]
    new = NewLevel(place, feature, feature_count(counts), mix)
    state = dict(denoiser.state_dict())
    _tell_effects(state, new)
    tell: Callable[[dict[str, Tensor], str, NewLevel], None] = DENOISERS.load(kind).tell
    for part in ("network.", "guide."):
        if any(name.startswith(part) for name in state):
            tell(state, part, new)
    card = replace(made, encoding=encoding)
    grown = card.build()
    grown.load_state_dict(state)
    return grown.requires_grad_(False).eval(), card


def _tell_effects(state: dict[str, Tensor], new: NewLevel) -> None:
    """In place. The new directions of the readout are zeros, which change nothing wherever they stand."""
    effects, covariance = state["effects.effects"], state["effects.feature_covariance"]
    state["effects.effects"] = inserted(effects, new.mixed(effects), new.feature)
    state["effects.feature_mean"] = inserted(state["effects.feature_mean"], 0.0, new.feature)
    covariance = inserted(inserted(covariance, 0.0, new.feature), 0.0, new.feature, 1)
    covariance[new.feature, new.feature] = VARIANCE
    state["effects.feature_covariance"] = covariance
    for name, value in (("readout", 0.0), ("readout_deviations", 1.0)):
        rows = state[f"effects.{name}"]
        for _ in range(len(rows) // new.features):
            rows = inserted(rows, value, len(rows))
        state[f"effects.{name}"] = rows
