"""The metric `classifier_auc`: how well a linear classifier tells synthetic images from held-out scans."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation.realism.base import Draws, Sample, Scale, shared_units
from meddiff_steps.statistics.bootstrap import Bootstrap, Figure
from meddiff_steps.statistics.bootstrap import figure as with_interval
from meddiff_steps.statistics.measures import auc, smaller_side

ENTRY = {
    "order": 3,
    "title": "AUC of telling from real scans",
    "summary": (
        "AUC of a linear classifier that tells synthetic images from held-out scans of units it has not learnt from;"
        " 0.5 if it cannot."
    ),
    "source": "Lopez-Paz and Oquab 2017 (classifier two-sample test)",
    "blind_to": (
        "how large a difference is: it saturates at 1 by whatever little can be told, visible or not; and"
        " whatever no linear boundary in the space tells."
    ),
}

#: Inverse penalty and folds of the classifier.
CLASSIFIER_C, FOLDS = 0.1, 5


def figure(synthetic: Sample, reference: Sample, scale: Scale, draws: Draws) -> Figure:
    """AUC of a classifier that is to tell `synthetic` from `reference`: 0.5 if it cannot, 1 if it always can (Lopez-Paz
    and Oquab 2017).

    Logistic regression on all standardised features, judged on images of units it has not learnt from (five folds).
    The AUC over all folds together is slightly below 0.5 where there is nothing to tell.  The interval is from
    `draws.resamples`; without two units on either side there is no value.
    """
    a, b = synthetic, reference
    features = np.concatenate([a.features, b.features])
    labels = np.concatenate([np.ones(len(a), bool), np.zeros(len(b), bool)])
    units = shared_units(a, b)
    folds = min(FOLDS, len(np.unique(a.units)), len(np.unique(b.units)))
    boot = Bootstrap(units, draws.resamples, draws.seed, f"classifier {draws.label}")
    if folds < 2:
        return with_interval(np.nan, np.full(draws.resamples, np.nan), boot.n)
    scores = np.empty(len(features))
    state = int(philox(draws.seed, f"classifier folds {draws.label}").integers(2**31))
    for fit, check in StratifiedGroupKFold(folds, shuffle=True, random_state=state).split(features, labels, units):
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=CLASSIFIER_C, max_iter=1000, class_weight="balanced")
        ).fit(features[fit], labels[fit])
        scores[check] = model.decision_function(features[check])
    return boot.figure(auc(labels, scores), smaller_side(labels, units))
