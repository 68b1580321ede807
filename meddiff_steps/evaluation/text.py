"""Whether images show what texts say: retrieval of the right text, and the findings that it names.

Held-out texts, which nothing learnt from, are asked for again: images are drawn with them, and with the same noise and
covariates without them.  Instruments that real training pairs taught judge both, and the held-out scans themselves,
which are the ceiling.  Chance is 0.5 throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from meddiff_steps.cohort.texts import COLUMN, mentions
from meddiff_steps.config import CategoricalCovariate, Covariates
from meddiff_steps.instruments.image_text import ImageTextScorer, right_above_wrong
from meddiff_steps.instruments.predictors import Predictors
from meddiff_steps.statistics.bootstrap import Bootstrap, Statistic, figure
from meddiff_steps.statistics.measures import auc, mean_of, smaller_side

ABSENT, PRESENT = "absent", "present"
CHANCE = 0.5
#: Kinds of images: held-out scans, drawn with their texts, and drawn without.
KINDS = ("scans", "with_text", "covariates_alone")


@dataclass(frozen=True)
class Images:
    """Images of one kind: (n, 1, *shape), and the row of the held-out scan that each belongs to, (n,)."""

    values: np.ndarray
    rows: np.ndarray


def finding_levels(findings: Mapping[str, Sequence[str]]) -> Covariates:
    """Findings as labels that predictors learn."""
    return {name: CategoricalCovariate(levels=[ABSENT, PRESENT]) for name in findings}


def finding_table(texts: Sequence[str], findings: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Which findings each text names: a row per text, a column per finding."""
    said = {
        name: [PRESENT if mentions(text, phrases) else ABSENT for text in texts] for name, phrases in findings.items()
    }
    return pd.DataFrame(said, index=range(len(texts)))


def text_figures(
    kinds: Mapping[str, Images],
    held_out: pd.DataFrame,
    scorer: ImageTextScorer,
    predictors: Predictors | None,
    findings: Mapping[str, Sequence[str]],
    resamples: int,
    seed: str,
) -> dict[str, Any]:
    """Figures of each kind of images, and what texts add to covariates.

    Parameters
    ----------
    kinds
        By `KINDS`.
    held_out
        Scans with a text that nothing learnt from: `subject_id` and `text`.
    scorer, predictors
        Learnt from training pairs; predictors of the `findings`, None where there are none.

    Returns
    -------
    dict
        `retrieval` and, by finding, `findings`: a figure per kind, `gain` (with text less covariates alone, of the same
        noise), and `chance`.
    """
    texts, subjects = held_out[COLUMN].tolist(), held_out["subject_id"].to_numpy(dtype=str)
    said = scorer.features(texts)
    wins = {
        kind: right_above_wrong(scorer(images.values, texts), images.rows, subjects, said)
        for kind, images in kinds.items()
    }
    found: dict[str, Any] = {"retrieval": {**_compared(kinds, wins, subjects, resamples, seed), "chance": CHANCE}}
    found["findings"] = {}
    if predictors is None:
        return found
    named = finding_table(texts, findings)
    measured = {kind: predictors.measure(images.values) for kind, images in kinds.items()}
    for name in findings:
        labels = (named[name] == PRESENT).to_numpy()
        if name in predictors.skipped or len(set(labels)) < 2:
            reason = predictors.skipped.get(name, "held-out texts all say the same of it")
            found["findings"][name] = {"not_measured": reason}
            continue
        figures: dict[str, Any] = {"texts_naming_it": int(labels.sum()), "chance": CHANCE}
        drawn, sides = {}, []
        for kind, images in kinds.items():
            scores, truth, who = measured[kind][name][:, 1], labels[images.rows], subjects[images.rows]
            bootstrap = Bootstrap(who, resamples, seed, f"text/{name}")
            sides.append(smaller_side(truth, who))
            figures[kind] = bootstrap.figure(auc(truth, scores), sides[-1])
            drawn[kind] = (truth, scores)
        one, other = auc(*drawn["with_text"]), auc(*drawn["covariates_alone"])
        who = subjects[kinds["with_text"].rows]
        bootstrap = Bootstrap(who, resamples, seed, f"text/{name}")
        gain, draws = bootstrap.draws(_difference(one, other))
        figures["gain"] = figure(gain, min(sides).enough(draws), bootstrap.n)
        found["findings"][name] = figures
    return found


def _difference(one: Statistic, other: Statistic) -> Statistic:
    return lambda weights: one(weights) - other(weights)


def _compared(
    kinds: Mapping[str, Images], values: Mapping[str, np.ndarray], subjects: np.ndarray, resamples: int, seed: str
) -> dict[str, Any]:
    """The mean of each kind, and the mean difference of the two that were drawn from the same noise."""
    figures: dict[str, Any] = {}
    differences = values["with_text"] - values["covariates_alone"]
    for name, column, rows in (
        *((kind, values[kind], images.rows) for kind, images in kinds.items()),
        ("gain", differences, kinds["with_text"].rows),
    ):
        known = np.isfinite(column)
        figures[name] = Bootstrap(subjects[rows][known], resamples, seed, "text/retrieval").figure(
            mean_of(column[known])
        )
    return figures
