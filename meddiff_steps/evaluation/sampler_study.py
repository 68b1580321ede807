"""Which sampler, how many steps, which guidance scale: quality against seconds per image.

All points draw the same subjects from the same noise, so that they differ by the sampler alone.  Quality is the Frechet
distance, precision and recall in feature spaces that need no network of the study's, KID in the first of them, and how
well predictors read covariates, each beside its floor or ceiling.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from meddiff_steps.config import Sampler, Study
from meddiff_steps.config import SamplerStudy as Settings
from meddiff_steps.core.registries import SAMPLERS, evaluations, is_of_students, samplers_of
from meddiff_steps.evaluation.diversity import kernel_width, variety
from meddiff_steps.evaluation.fidelity import covariate_fidelity, predictions_table
from meddiff_steps.evaluation.metrics import MAX_HELD_OUT, measure
from meddiff_steps.evaluation.realism import frechet, kid
from meddiff_steps.evaluation.realism.base import Draws, Sample, Scale
from meddiff_steps.imaging.selection import Images, held_out
from meddiff_steps.instruments.feature_spaces.base import FeatureSpace, extract
from meddiff_steps.instruments.predictors import MAX_TRAINING_SCANS, Predictors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One way to sample: the diffusion model itself, or a student, with a sampler of students."""

    sampler: Sampler
    num_inference_steps: int
    guidance_scale: float

    @property
    def of_student(self) -> bool:
        """Whether a student draws."""
        return is_of_students(self.sampler)

    @property
    def passes(self) -> int:
        """Network passes per image."""
        single = self.of_student or self.guidance_scale in (0.0, 1.0)
        return evaluations(self.sampler, self.num_inference_steps) * (1 if single else 2)


def points(settings: Settings, prediction_type: str) -> list[Point]:
    """All combinations that the study asks for, samplers first."""
    entries = {name: SAMPLERS.entry(name) for name in samplers_of(prediction_type)}
    able = [name for name, entry in entries.items() if not entry["stochastic"] and entry.get("compared", True)]
    return [
        Point(sampler, steps, scale)
        for sampler in settings.samplers or able
        for scale in settings.guidance_scales
        for steps in sorted(settings.num_inference_steps)
    ]


def student_points(method: Sampler, num_inference_steps: int, guidance_scale: float) -> list[Point]:
    """Ways to draw from a student that was distilled for so many steps at this guidance.

    `consistency` can be drawn from in fewer steps, too.
    """
    counts = [num_inference_steps]
    while method == "consistency" and counts[0] % 2 == 0:
        counts.insert(0, counts[0] // 2)
    return [Point(method, steps, guidance_scale) for steps in counts]


def choice(entries: Sequence[Mapping[str, Any]]) -> int | None:
    """Which point to take: of those that these images do not show to be worse than the best, the one with the fewest
    passes.

    Worse is a Frechet interval above that of the point with the smallest distance, or a covariate's below that of the
    same point.

    Parameters
    ----------
    entries
        `points` as `compare` returns them.

    Returns
    -------
    int or None
        Position in `entries`; None where no Frechet distance is known.
    """
    known = [entry for entry in entries if entry["frechet"]["low"] is not None]
    if not known:
        return None
    best = min(known, key=lambda entry: entry["frechet"]["value"])

    def as_good(entry: Mapping[str, Any]) -> bool:
        pairs = [
            (entry["covariates"][name][key], figure)
            for name, part in best["covariates"].items()
            for key, figure in part.items()
        ]
        return entry["frechet"]["low"] <= best["frechet"]["high"] and not any(
            mine["high"] is not None and other["low"] is not None and mine["high"] < other["low"]
            for mine, other in pairs
        )

    return entries.index(
        min(
            (entry for entry in known if as_good(entry)), key=lambda entry: (entry["passes"], entry["frechet"]["value"])
        )
    )


#: (sample_id, image (1, *spatial)) of a plan's rows, in any order, drawn in one way; the work is done as it is read.
Draw = Callable[[Point, pd.DataFrame], Iterable[tuple[str, np.ndarray]]]


def compare(
    draw: Draw,
    chosen: Sequence[Point],
    subjects: pd.DataFrame,
    cohort: Images,
    predictors: Predictors,
    spaces: Sequence[FeatureSpace],
    study: Study,
) -> dict[str, Any]:
    """Draw the same subjects in every way, and measure them.

    Parameters
    ----------
    draw
        Makes images.  It is called once before time is taken, so that what happens only once does not count.
    chosen
        The ways.
    subjects
        Rows of a plan.
    cohort
        Preprocessed scans of all splits.
    predictors
        What measures covariates.
    spaces
        Of Frechet distance, precision and recall; the first, which decides, of KID, too.
    study
        `seed`, `covariates` and the bootstraps of `evaluate` are read.

    Returns
    -------
    dict
        `images`, `space`, and `points`: `sampler, num_inference_steps, guidance_scale, passes, seconds_per_image`, the
        figures `frechet` and `kid` with a `floor`, `spaces`, by name the figures `frechet` with a `floor` and
        `precision` and `recall` with a `ceiling`, and `covariates`, the figure `r` or `auc` of each, with its
        `ceiling`; `choice`.
    """
    train, real = cohort.of_splits(["train"]).at_most(MAX_TRAINING_SCANS), held_out(cohort)[0].at_most(MAX_HELD_OUT)
    reference, _ = measure(predictors, real, "real", study.covariates, {})
    some = train.one_of_each().at_most(len(subjects))
    features = {
        name: extract(spaces, s.shards, s.rows, f"features of {name} images")
        for name, s in (("training", some), ("held-out", real))
    }
    yardsticks = [
        _Yardstick(space, features["training"][space.name], features["held-out"][space.name], some, real, study)
        for space in spaces
    ]
    ids, units = subjects["sample_id"].tolist(), subjects["seed_key"].to_numpy(dtype=str)
    for _ in draw(chosen[0], subjects[:1]):
        pass
    out = []
    for point in chosen:
        seconds, seen, measured = _drawn(draw(point, subjects), ids, predictors, spaces)
        table = predictions_table(ids, units.tolist(), "synthetic", subjects, measured, study.covariates)
        fidelity = covariate_fidelity(
            pd.concat([table, reference], ignore_index=True),
            study.covariates,
            resamples=study.evaluate.bootstrap,
            seed=study.seed,
        )
        entry: dict[str, Any] = asdict(point) | {
            "passes": point.passes,
            "seconds_per_image": float(f"{seconds / len(subjects):.4g}"),
        }
        read = {one.space.name: one.read(seen[one.space.name], units) for one in yardsticks}
        entry |= {"frechet": read[spaces[0].name]["frechet"], "kid": yardsticks[0].kid(seen[spaces[0].name], units)}
        entry["spaces"] = read
        entry["covariates"] = {
            name: {key: part[key] for key in ("r", "auc") if key in part} for name, part in fidelity.items()
        }
        out.append(entry)
        logger.info(
            "%s, %d steps, guidance %g: %.3g s per image, Frechet distance %s (floor %s)",
            *(entry[key] for key in ("sampler", "num_inference_steps", "guidance_scale", "seconds_per_image")),
            entry["frechet"]["value"],
            entry["frechet"]["floor"]["value"],
        )
    return {
        "images": len(subjects),
        "space": {"name": spaces[0].name, "digest": spaces[0].digest},
        "points": out,
        "choice": choice(out),
    }


class _Yardstick:
    """One feature space, and real images in it: held-out scans, and training scans, one of each subject and as many as
    there are synthetic images.  Where there are fewer, no more synthetic images are read than there are of these.
    """

    def __init__(
        self, space: FeatureSpace, training: np.ndarray, held: np.ndarray, some: Images, real: Images, study: Study
    ) -> None:
        self.space, self.settings, self.seed = space, study.evaluate, study.seed
        self.scale = Scale.of(held, min(len(training), len(held)))
        self.held = Sample(self.scale.standard(held), real.units)
        self.training = Sample(self.scale.standard(training), some.units)
        self.width = kernel_width(self.training.features)

    def _sample(self, features: np.ndarray, units: np.ndarray) -> Sample:
        count = len(self.training)
        return Sample(self.scale.standard(features[:count]), units[:count])

    def read(self, features: np.ndarray, units: np.ndarray) -> dict[str, Any]:
        """`frechet` with its `floor`, and `precision` and `recall` with a `ceiling`, of synthetic images (n, d)."""
        sample = self._sample(features, units)
        floor = frechet.figure(self.training, self.held, self.scale, self._draws("training"))
        found, ceiling = (self._variety(*one) for one in ((sample, "synthetic"), (self.training, "training")))
        return {
            "frechet": frechet.figure(sample, self.held, self.scale, self._draws("synthetic")) | {"floor": floor},
            **{name: found[name] | {"ceiling": ceiling[name]} for name in ("precision", "recall")},
        }

    def kid(self, features: np.ndarray, units: np.ndarray) -> dict[str, Any]:
        """`kid` with its `floor`."""
        sample = self._sample(features, units)
        floor = kid.figure(self.training, self.held, self.scale, self._draws("training"))
        return kid.figure(sample, self.held, self.scale, self._draws("synthetic")) | {"floor": floor}

    def _draws(self, label: str) -> Draws:
        settings = self.settings
        return Draws(settings.bootstrap, settings.realism_bootstrap, settings.permutations, self.seed, label)

    def _variety(self, sample: Sample, label: str) -> dict[str, Any]:
        return variety(
            *(sample, self.held, self.width),
            neighbours=self.settings.neighbours,
            resamples=self.settings.bootstrap,
            seed=self.seed,
            label=label,
        )


def _drawn(
    images: Iterable[tuple[str, np.ndarray]],
    ids: Sequence[str],
    predictors: Predictors,
    spaces: Sequence[FeatureSpace],
) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Seconds that drawing took, features (n, d) in every space and measured covariates in the order of `ids`; images
    are not kept.
    """
    seconds, start = 0.0, time.perf_counter()
    features: dict[str, dict[str, np.ndarray]] = {space.name: {} for space in spaces}
    measured = {}
    for name, image in images:
        seconds += time.perf_counter() - start
        with torch.inference_mode():
            seen = torch.from_numpy(np.ascontiguousarray(image[None], np.float32))
            for space in spaces:
                features[space.name][name] = space.extract(seen).numpy()
        measured[name] = predictors.measure(image[None])
        start = time.perf_counter()
    seconds += time.perf_counter() - start
    values = {
        covariate: np.concatenate([measured[name][covariate] for name in ids]) for covariate in predictors.by_name
    }
    return seconds, {space: np.concatenate([rows[name] for name in ids]) for space, rows in features.items()}, values
