"""Which of several texts belongs to an image: learnt from real training pairs alone, to judge generated images.

A pair is told by ridge regression from what the image shows (the local histograms of `predictors`) to what its text
says (which common words it has), solved in dual form.  An image's score of a text is the cosine of the predicted and
the actual words.  On a few hundred pairs that is what can be learnt; networks trained on images and texts together
(Radford et al. 2021) had millions.  It has nothing of the text encoder that the generator was conditioned by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import GroupKFold

from meddiff_steps.cohort.texts import common_words, words
from meddiff_steps.core.errors import UserError
from meddiff_steps.instruments.predictors import LocalHistograms

#: Ridge penalties tried, as multiples of the mean eigenvalue of the kernel, and folds of subjects that choose one.
PENALTIES, FOLDS = tuple(10.0 ** (k / 2) for k in range(-4, 7)), 5
#: Subjects with texts below which nothing can be learnt.
MIN_SUBJECTS = 20


class WordFeatures:
    """Texts as which common words they have, rarer ones counting more, float64 (n, words).

    The weight of a word is ln(texts / texts that have it) (Spärck Jones 1972); rows have unit length.
    """

    def __init__(self, texts: Sequence[str], subjects: Sequence[str], min_subjects: int) -> None:
        self.places = {word: place for place, word in enumerate(common_words(texts, subjects, min_subjects))}
        self.weights = np.ones(len(self.places))
        if self.places:
            counts = (self(texts) > 0).sum(0)
            self.weights = np.log((1 + len(texts)) / np.maximum(counts, 1))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        found = np.zeros((len(texts), len(self.places)))
        for row, text in enumerate(texts):
            found[row, [self.places[word] for word in set(words(text)) if word in self.places]] = 1.0
        found *= self.weights
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class ImageTextScorer:
    """Scores of image and text, learnt by `fit_scorer` from so many subjects, with the `penalty` that was chosen."""

    histograms: LocalHistograms
    features: WordFeatures
    mean_image: np.ndarray
    mean_text: np.ndarray
    weights: np.ndarray
    penalty: float
    subjects: int

    def __call__(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Images (n, 1, *shape) in [0, 1] and texts (m,) -> scores (n, m); higher: more likely of the image."""
        seen = (self.histograms(images).astype(np.float64) - self.mean_image) @ self.weights
        return _cosine(seen, self.features(texts) - self.mean_text)


def fit_scorer(images: np.ndarray, texts: Sequence[str], subjects: Sequence[str], min_subjects: int) -> ImageTextScorer:
    """Learn from real pairs.

    Parameters
    ----------
    images
        (n, 1, *shape) in [0, 1].
    texts, subjects
        Of each image.
    min_subjects
        Subjects whose texts must have a word for it to count.

    Raises
    ------
    UserError
        There are too few subjects, or they have no words in common.
    """
    people = len(set(subjects))
    features = WordFeatures(texts, subjects, min_subjects)
    if people < MIN_SUBJECTS or not features.places:
        raise UserError(
            f"text: {people} training subjects have a text, and {len(features.places)} words stand in those of"
            f" {min_subjects} or more; at least {MIN_SUBJECTS} subjects and one word are needed to measure whether"
            " images show what texts say. Add texts, or lower text.min_subjects."
        )
    histograms = LocalHistograms(images.shape[2:])
    seen, said = histograms(images).astype(np.float64), features(texts)
    penalty = max(PENALTIES, key=lambda one: _held_out(seen, said, subjects, one))
    mean_image, mean_text, dual = _ridge(seen, said, penalty)
    weights = (seen - mean_image).T @ dual
    return ImageTextScorer(histograms, features, mean_image, mean_text, weights, penalty, people)


def _ridge(seen: np.ndarray, said: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean_image, mean_text = seen.mean(0), said.mean(0)
    centred = seen - mean_image
    kernel = centred @ centred.T
    ridge = penalty * np.trace(kernel) / len(kernel) * np.eye(len(kernel))
    return mean_image, mean_text, np.linalg.solve(kernel + ridge, said - mean_text)


def _held_out(seen: np.ndarray, said: np.ndarray, subjects: Sequence[str], penalty: float) -> float:
    """Share of wrong texts that the right one is scored above, over held-out subjects."""
    wins = []
    for fit, check in GroupKFold(FOLDS).split(seen, groups=np.asarray(subjects)):
        mean_image, mean_text, dual = _ridge(seen[fit], said[fit], penalty)
        predicted = (seen[check] - mean_image) @ (seen[fit] - mean_image).T @ dual
        scores = _cosine(predicted, said[check] - mean_text)
        wins.append(right_above_wrong(scores, np.arange(len(check)), np.asarray(subjects)[check], said[check]))
    return float(np.nanmean(np.concatenate(wins)))


def right_above_wrong(
    scores: np.ndarray, right: np.ndarray, subjects: np.ndarray, said: np.ndarray | None = None
) -> np.ndarray:
    """Per image, the share of other subjects' texts that its own is scored above; ties count half, chance is 0.5.

    Parameters
    ----------
    scores
        (images, texts).
    right
        Place of each image's text.
    subjects
        Of each text: other texts of the same subject are left out.
    said
        Features of the texts; those that say the same as the right one are left out, too.

    Returns
    -------
    numpy.ndarray
        (images,), NaN where no other text is left.
    """
    found = np.full(len(scores), np.nan)
    for row, place in enumerate(right):
        wrong = subjects != subjects[place]
        if said is not None:
            wrong &= (said != said[place]).any(1)
        if wrong.any():
            others = scores[row, wrong]
            found[row] = ((others < scores[row, place]) + 0.5 * (others == scores[row, place])).mean()
    return found


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    unit = [values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12) for values in (a, b)]
    return unit[0] @ unit[1].T
