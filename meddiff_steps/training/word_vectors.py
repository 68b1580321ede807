"""Vectors of words from the texts of a cohort: which words stand together, in few numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from meddiff_steps.cohort.texts import common_words, words
from meddiff_steps.core.errors import UserError
from meddiff_steps.models.text_encoder import WordEncoder

#: Words on either side that a word is seen together with.
WINDOW = 5


def fit_words(
    texts: Sequence[str], subjects: Sequence[str], width: int, max_tokens: int, min_subjects: int
) -> WordEncoder:
    """Vectors of the words that enough subjects' texts have.

    The positive pointwise mutual information of words within `WINDOW` of each other, by its leading singular vectors,
    each times the root of its value (Levy and Goldberg 2014, section 3.3); every vector then has `width` as its square.
    It is exact linear algebra: no seed, no steps, the same result on any run.

    Parameters
    ----------
    texts, subjects
        Of the training scans: a text and whose it is, each text once per subject.

    Raises
    ------
    UserError
        Fewer than two words are common enough.
    """
    vocabulary = common_words(texts, subjects, min_subjects)
    if len(vocabulary) < 2:
        raise UserError(
            f"text.min_subjects: {len(vocabulary)} word(s) stand in the texts of {min_subjects} training subjects or"
            f" more, of {len(set(subjects))} that have texts. Add texts, lower it, or give text.encoder."
        )
    encoder = WordEncoder(vocabulary, width, max_tokens)
    together = np.zeros((len(vocabulary), len(vocabulary)))
    for text in texts:
        rows = [encoder.places[word] for word in words(text) if word in encoder.places]
        for place, row in enumerate(rows):
            for other in rows[max(0, place - WINDOW) : place]:
                together[row, other] += 1.0
                together[other, row] += 1.0
    share = together / max(together.sum(), 1.0)
    own = share.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(share / np.outer(own, own))
    left, values, _ = np.linalg.svd(np.where(np.isfinite(information), np.maximum(information, 0.0), 0.0))
    kept = min(width, len(vocabulary))
    vectors = np.zeros((len(vocabulary), width))
    vectors[:, :kept] = left[:, :kept] * np.sqrt(values[:kept])
    # The sign of a singular vector is free: its largest entry is positive.
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(width)])
    vectors *= np.where(signs == 0, 1.0, signs)
    length = np.sqrt(np.square(vectors).sum(1, keepdims=True))
    encoder.vectors.copy_(torch.from_numpy(vectors / np.maximum(length, 1e-12) * np.sqrt(width)))
    return encoder.finish()
