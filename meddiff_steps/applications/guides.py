"""Guidance of an application by a predictor: one fitted to training latents, or a network of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.guidance import ClassifierGuidance, Guidance
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.instruments.latent_predictors import fit_latent_predictor
from meddiff_steps.models.latent_statistics import Standardisation
from meddiff_steps.models.torchscript import load_torchscript
from meddiff_steps.models.trained import TrainedModel

#: Training latents that the predictor is fitted to, at most; all of each of some people, where so many or more fit.
MAX_LATENTS, LEAST_PEOPLE = 1024, 32


def latent_guides(
    settings: config.Counterfactual,
    values: Sequence[config.Scalar],
    training: Images,
    latents: Shards,
    scale: Mapping[str, np.ndarray],
    encoding: CovariateEncoding,
) -> list[tuple[Guidance, ...]]:
    """For each value the covariate is moved to, guidance towards latents that a linear predictor takes for it.

    Parameters
    ----------
    training
        Training scans.
    latents, scale
        Cached posteriors of the cohort, and their standardisation.

    Raises
    ------
    UserError
        None of the scans that are learnt from has a level that is asked for.
    """
    column = encoding.names.index(str(settings.covariate))
    levels = encoding.level_counts[column]
    variants = latents.column("variant")
    row_of = {name: i for i, name in enumerate(latents.column("scan_id")) if variants[i] == 0}
    there = training.table["scan_id"].isin(row_of) & training.table[str(settings.covariate)].notna()
    known = training.taken(np.flatnonzero(there).tolist()).whole_units(MAX_LATENTS, LEAST_PEOPLE).table
    standardise = Standardisation(scale["offset"], scale["scale"])
    z = standardise(latents.tensors("mean", [row_of[name] for name in known["scan_id"]]))
    encoded = encoding.encode(known)[:, column]
    requests = pd.concat([known.iloc[[0]].assign(**{str(settings.covariate): [value]}) for value in values])
    targets = encoding.encode(requests)[:, column]
    absent = [value for value, target in zip(values, targets, strict=True) if levels and target not in encoded]
    if absent:
        raise UserError(
            f"{settings.covariate}: {absent} is asked for, but the {len(known)} training scans that guidance learns"
            f" from only have {sorted(known[str(settings.covariate)].unique())}. Ask for another level, or add training"
            " scans that have it."
        )
    predictor = fit_latent_predictor(z, encoded, levels, known["subject_id"].to_numpy())
    return [
        (
            ClassifierGuidance(
                predictor.log_probability(float(target), bool(levels)), scale=settings.classifier_guidance
            ),
        )
        for target in targets
    ]


def image_guides(
    settings: config.Counterfactual,
    values: Sequence[config.Scalar],
    declared: config.Covariate,
    model: TrainedModel,
    images: np.ndarray,
    known: pd.Series,
) -> list[tuple[ClassifierGuidance]]:
    """For each value, guidance towards images that the user's network takes for it, through the first stage.

    Parameters
    ----------
    declared
        The covariate that is moved.
    images, known
        Scans (n, 1, *spatial) that no network of the study learnt from, and their covariate: how far a network is from
        numbers says how unsure it is of them.

    Raises
    ------
    UserError
        The file is no TorchScript, does not take these images, or gives something else than it should.
    """
    key = "counterfactual.predictor"
    network = model.fabric.to_device(load_torchscript(Path(str(settings.predictor)), key))
    levels = declared.levels if isinstance(declared, config.CategoricalCovariate) else []

    def predict(shown: Tensor) -> Tensor:
        try:
            found = network(shown)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"{key}: {settings.predictor} does not take images {tuple(shown.shape[1:])} ({reason}). Give a network"
                " for the study's grid."
            ) from None
        if tuple(found.shape) != (len(shown), len(levels) or 1):
            raise UserError(
                f"{key}: {settings.predictor} gives {tuple(found.shape)} for {len(shown)} images, expected"
                f" {(len(shown), len(levels) or 1)}: a logit for each of {levels}"
                if levels
                else f"{key}: {settings.predictor} gives {tuple(found.shape)} for {len(shown)} images, expected"
                f" {(len(shown), 1)}: the covariate in its unit."
            )
        return found.float()

    spread = 1.0
    if not levels:
        truth = known.to_numpy(dtype=float, na_value=np.nan)
        there = np.isfinite(truth)
        if there.sum() < 3:
            raise UserError(
                f"{key}: {there.sum()} validation scans have a {settings.covariate}, expected at least 3 to measure how"
                " unsure the network is. Enlarge splits.val."
            )
        with torch.no_grad():
            found = torch.cat([predict(model.fabric.to_device(torch.from_numpy(one[None]))) for one in images[there]])
        spread = float(np.sqrt(np.square(found[:, 0].cpu().numpy() - truth[there]).mean()))

    def towards(value: config.Scalar) -> Callable[[Tensor], Tensor]:
        def log_probability(latents: Tensor) -> Tensor:
            found = predict(model.mean_images(latents))
            if levels:
                return functional.log_softmax(found, 1)[:, levels.index(str(value))]
            return -0.5 * ((found[:, 0] - float(value)) / spread).square()

        return log_probability

    return [(ClassifierGuidance(towards(value), scale=settings.classifier_guidance),) for value in values]
