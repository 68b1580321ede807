"""Guidance of an application by a predictor that was fitted to training latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.diffusion.guidance import ClassifierGuidance, Guidance
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.instruments.latent_predictors import fit_latent_predictor
from meddiff_steps.models.latent_statistics import Standardisation

#: Training latents that the predictor is fitted to, at most.
MAX_LATENTS = 1024


def latent_guides(
    settings: config.Counterfactual,
    values: Sequence[config.Scalar],
    training: pd.DataFrame,
    latents: Shards,
    scale: Mapping[str, np.ndarray],
    encoding: CovariateEncoding,
) -> list[tuple[Guidance, ...]]:
    """For each value the covariate is moved to, guidance towards latents that a linear predictor takes for it.

    Parameters
    ----------
    training
        Rows of training scans.
    latents, scale
        Cached posteriors of the cohort, and their standardisation.
    """
    column = encoding.names.index(str(settings.covariate))
    levels = encoding.level_counts[column]
    variants = latents.column("variant")
    row_of = {name: i for i, name in enumerate(latents.column("scan_id")) if variants[i] == 0}
    known = training[training["scan_id"].isin(row_of)][:MAX_LATENTS]
    standardise = Standardisation(scale["offset"], scale["scale"])
    z = standardise(latents.tensors("mean", [row_of[name] for name in known["scan_id"]]))
    predictor = fit_latent_predictor(z, encoding.encode(known)[:, column], levels)
    requests = pd.concat([known.iloc[[0]].assign(**{str(settings.covariate): [value]}) for value in values])
    targets = encoding.encode(requests)[:, column]
    return [
        (
            ClassifierGuidance(
                predictor.log_probability(float(target), bool(levels)), scale=settings.classifier_guidance
            ),
        )
        for target in targets
    ]
