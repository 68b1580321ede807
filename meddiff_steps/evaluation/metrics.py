"""All of metrics.json: every measurement of the package, on the images that `selection` chooses."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from meddiff_steps.config import CategoricalCovariate, Covariates, Evaluate, Study
from meddiff_steps.core.errors import UserError
from meddiff_steps.evaluation import spectrum
from meddiff_steps.evaluation.discriminability import discriminability
from meddiff_steps.evaluation.diversity import diversity, pair_similarity
from meddiff_steps.evaluation.fidelity import (
    correlation_structure,
    covariate_fidelity,
    distribution_distances,
    predictions_table,
    subgroup_fidelity,
    training_range,
)
from meddiff_steps.evaluation.image_quality import SsimSettings, reconstruction_quality
from meddiff_steps.evaluation.likeness import Kind, Measured, kinds_of, measured, smallest, space_card
from meddiff_steps.evaluation.realism.base import MIN_IMAGES
from meddiff_steps.evaluation.realism.measure import measure as measure_realism
from meddiff_steps.evaluation.sanity import sanity
from meddiff_steps.imaging.selection import Images, drawn, held_out, reconstructed
from meddiff_steps.instruments.feature_spaces.base import FeatureSpace
from meddiff_steps.instruments.predictors import MAX_TRAINING_SCANS, Predictors
from meddiff_steps.instruments.segmenter import Segmenter, segmented_volumes

logger = logging.getLogger(__name__)

#: Images measured at most, of either kind: beyond it intervals hardly shrink. Chosen by a hash of the id, so the choice
#: is stable.
MAX_SYNTHETIC, MAX_HELD_OUT = 5_000, 5_000


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes
    ----------
    metrics
        The content of metrics.json.
    predictions
        Requested or true beside measured covariates (`fidelity.PREDICTION_COLUMNS`).
    components
        Where held-out and synthetic images lie in each feature space: `id, kind, space, pc1, pc2`.
    """

    metrics: dict[str, Any]
    predictions: pd.DataFrame
    components: pd.DataFrame


def evaluate(
    cohort: Images,
    generated: Images,
    paired: Images,
    spaces: Sequence[FeatureSpace],
    study: Study,
    predictors: Predictors,
    instrument: tuple[Segmenter, dict[str, Any]] | None = None,
) -> Evaluation:
    """Measure covariate fidelity, realism, diversity, reconstruction quality and sharpness.

    Parameters
    ----------
    cohort
        Preprocessed scans of all splits; feature scales learn from the train split alone.
    generated
        Synthetic images, with the covariates that were requested.
    paired
        Held-out scans (`image`) beside their reconstructions (`reconstruction`), which are measured like synthetic
        images, too.
    spaces
        Feature spaces of realism and diversity.
    study
        `seed`, `covariates`, `plan`, `evaluate` and `preprocess.spacing_mm` are read.
    predictors
        What measures covariates.
    instrument
        Segmenter that measures volumes a second time, and its card.

    Raises
    ------
    UserError
        There are no training or no held-out scans, training scans are among the reconstructions, or images are not
        finite.
    """
    seed = study.evaluate.seed or study.seed
    options: dict[str, Any] = {"resamples": study.evaluate.bootstrap, "seed": seed}
    every_train = cohort.of_splits(["train"])
    train = every_train.at_most(MAX_TRAINING_SCANS)
    if len(train) == 0:
        raise UserError(
            f"{cohort.origin}: no preprocessed scan is in the train split, so nothing can be compared. Check splits and"
            " preprocessed/qc.parquet."
        )
    real, splits = held_out(cohort)
    wanted = replace(generated, table=drawn(generated.table, study.plan))
    real, synthetic = real.at_most(MAX_HELD_OUT), wanted.at_most(MAX_SYNTHETIC)
    trained = training_range(every_train.table, study.covariates)
    real_table, real_power = measure(predictors, real, "real", study.covariates, trained)
    synthetic_table, synthetic_power = measure(predictors, synthetic, "synthetic", study.covariates, trained)
    predictions = pd.concat([synthetic_table, real_table], ignore_index=True)
    labels = [name for name, c in study.covariates.items() if isinstance(c, CategoricalCovariate)]
    levels = pd.concat([images.table.set_index(images.key)[labels] for images in (synthetic, real)])
    shown = reconstructed(paired)
    kinds = kinds_of(synthetic, train, real, paired, study.evaluate.max_images)
    found = measured(spaces, kinds)
    like, various, components = realism_and_diversity(spaces, kinds, found, study.evaluate, seed=seed)
    quality = reconstruction_quality(
        shown.column("image"), shown.column("reconstruction"), subjects=shown.units.tolist(), **options
    )
    image_power, reconstruction_power = (radial_power(shown, name) for name in ("image", "reconstruction"))
    ratios = {
        "reconstruction": spectrum.band_power_ratio(
            reconstruction_power, image_power, paired=True, units=shown.units.tolist(), **options
        ),
        "synthetic": spectrum.band_power_ratio(
            synthetic_power,
            real_power,
            paired=False,
            units=synthetic.units.tolist(),
            reference_units=real.units.tolist(),
            **options,
        ),
    }
    curves = {
        "real": real_power,
        "synthetic": synthetic_power,
        "image": image_power,
        "reconstruction": reconstruction_power,
    }
    metrics = {
        "covariates": covariate_fidelity(predictions, study.covariates, **options),
        "correlations": correlation_structure(predictions, study.covariates, **options),
        "distributions": distribution_distances(
            predictions, study.covariates, resamples=study.evaluate.realism_bootstrap, seed=seed
        ),
        "subgroups": subgroup_fidelity(predictions, levels, study.covariates, **options),
        "training_range": {name: list(ends) for name, ends in trained.items()},
        "realism": like,
        "diversity": various,
        "discriminability": discriminability(
            kinds, found, study.evaluate, study.spatial_dims, study.preprocess.voxel_mm, seed=seed
        ),
        "sanity": sanity(spaces, kinds, found, study.evaluate, seed=seed),
        "predictors": predictors.card(),
        "reconstruction": quality,
        "spectrum": ratios | spectrum.curves_card(curves, cohort.shards.shape("image")[1:]),
        "n": {
            "training_subjects": int(every_train.table["subject_id"].nunique()),
            "training_scans": len(every_train),
            "held_out_subjects": int(real.table["subject_id"].nunique()),
            "held_out_scans": len(real),
            "held_out_splits": splits,
            "generated": len(generated),
            "synthetic": len(synthetic),
            "synthetic_groups": sorted(set(wanted.table["group"])),
            "reconstructions": len(shown),
            "reconstruction_splits": sorted(set(shown.table["split"])),
        },
    }
    if instrument is not None:
        model, card = instrument
        parts = [
            segmented(model, images, kind, study, trained)
            for kind, images in (("synthetic", synthetic), ("real", real))
        ]
        volumes = covariate_fidelity(pd.concat(parts, ignore_index=True), study.covariates, **options)
        metrics["segmentation"] = {
            "covariates": volumes,
            "digest": card["weights_sha256"][:16],
            "held_out": card["held_out"],
        }
    return Evaluation(metrics, predictions, components)


def segmented(
    model: Segmenter, images: Images, kind: str, study: Study, trained: Mapping[str, tuple[float, float]]
) -> pd.DataFrame:
    """`fidelity.predictions_table` of volumes that a segmenter measures."""
    assert study.preprocess.voxel_mm is not None
    volumes = segmented_volumes(model, images, math.prod(study.preprocess.voxel_mm) / 1000, f"segmenting {kind} images")
    return predictions_table(images.ids, images.units.tolist(), kind, images.table, volumes, study.covariates, trained)


def radial_power(images: Images, column: str) -> np.ndarray:
    """`spectrum.radial_power` of a column, (n, rings)."""
    return np.concatenate(
        [spectrum.radial_power(batch) for batch in images.batches(f"spectrum of each {column}", column)]
    )


def measure(
    predictors: Predictors,
    images: Images,
    kind: str,
    covariates: Covariates,
    trained: Mapping[str, tuple[float, float]],
) -> tuple[pd.DataFrame, np.ndarray]:
    """`fidelity.predictions_table` and `spectrum.radial_power` (n, rings) of images, in one pass."""
    values: dict[str, list[np.ndarray]] = {name: [] for name in predictors.by_name}
    powers = []
    for batch in images.batches(f"measuring {kind} images"):
        for name, part in predictors.measure(batch).items():
            values[name].append(part)
        powers.append(spectrum.radial_power(batch))
    measured = {name: np.concatenate(parts) for name, parts in values.items()}
    return predictions_table(
        images.ids, images.units.tolist(), kind, images.table, measured, covariates, trained
    ), np.concatenate(powers)


def realism_and_diversity(
    spaces: Sequence[FeatureSpace],
    kinds: Mapping[str, Kind],
    found: Sequence[Measured],
    settings: Evaluate,
    *,
    seed: str,
) -> tuple[dict[str, Any], dict[str, Any], pd.DataFrame]:
    """Both sections of metrics.json, and the first two principal components of held-out and synthetic images in every
    space.

    Parameters
    ----------
    spaces
        In each of which all is measured.
    kinds, found
        Images, and their features in all spaces (`likeness`).
    settings
        The study's.
    seed
        Of all that is drawn.
    """
    like: dict[str, Any] = {}
    by_space: dict[str, Any] = {}
    places = [pd.DataFrame({"id": pd.Series(dtype="string"), "kind": "", "space": "", "pc1": 0.0, "pc2": 0.0})]
    if not found:
        reason = f"{smallest(kinds)} images of one kind, counted by subject, at least {MIN_IMAGES} are needed"
        like = {space.name: space_card(space, kinds) | {"skipped": reason} for space in spaces}
        by_space = dict(like)
    for one in found:
        name, card = one.space.name, one.card(kinds)
        common: dict[str, Any] = {"resamples": settings.bootstrap, "seed": seed}
        found_here = measure_realism(
            one.samples,
            one.scale,
            settings.metrics,
            slow_resamples=settings.realism_bootstrap,
            permutations=settings.permutations,
            **common,
        )
        like[name] = card | found_here
        by_space[name] = (
            card
            | {"neighbours": settings.neighbours}
            | diversity(one.samples, neighbours=settings.neighbours, **common)
        )
        for kind in ("held_out", "synthetic"):
            first = one.scale.components(one.samples[kind].features)[:, :2]
            ids = kinds[kind].images.ids
            places.append(
                pd.DataFrame({"id": ids, "kind": kind, "space": name, "pc1": first[:, 0], "pc2": first[:, 1]})
            )
        for metric, figure in found_here.items():
            logger.info("%s: %s %s, real against real %s", name, metric, figure["value"], figure["floor"]["value"])

    shape = kinds["synthetic"].images.shards.shape("image")[1:]
    ssim = SsimSettings.for_shape(shape)
    pairs = {
        kind: pair_similarity(
            kinds[kind].images.column(kinds[kind].column).__getitem__,
            kinds[kind].images.units,
            shape,
            pairs=settings.ssim_pairs,
            resamples=settings.bootstrap,
            seed=seed,
            label=kind,
        )
        for kind in ("synthetic", "training", "reconstructions")
        if kind in kinds
    }
    similar = pairs["synthetic"] | {"floor": pairs["training"]}
    if "reconstructions" in pairs:
        similar["reconstructions"] = pairs["reconstructions"]
    various = {
        ssim.name: similar,
        "ssim_settings": ssim.card() | {"metric": ssim.name},
        "features": by_space,
    }
    return like, various, pd.concat(places[1:] or places, ignore_index=True)
