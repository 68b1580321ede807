"""A covariate as a linear function of latents, in closed form: what classifier guidance asks for its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

#: Ridge penalty, in units of the mean eigenvalue of the latents' Gram matrix.
PENALTY = 0.3


@dataclass(frozen=True)
class LatentPredictor:
    """score = latents . weights + bias: a standardised value, or a level's logit-like score between -1 and 1.

    Attributes
    ----------
    weights, bias
        (D, outputs) and (outputs,): one output for a number, one per level for a label.
    spread
        Deviation of scores of people who were left out about the truth, (outputs,); what the predictor is unsure of.
    """

    weights: Tensor
    bias: Tensor
    spread: Tensor

    def log_probability(self, target: float, categorical: bool) -> Callable[[Tensor], Tensor]:
        """log p(target | latents) up to a constant, of standardised latents (b, c, *spatial) -> (b,).

        Of a number a Gaussian about the score; of a level a softmax of the scores in units of their spread.
        """
        weights, bias, spread = self.weights, self.bias, self.spread

        def of(latents: Tensor) -> Tensor:
            scores = latents.float().flatten(1) @ weights.to(latents.device) + bias.to(latents.device)
            units = scores / spread.to(latents.device)
            if categorical:
                return functional.log_softmax(units, 1)[:, int(target)]
            return -0.5 * (units[:, 0] - target / float(spread[0])).square()

        return of


def fit_latent_predictor(
    latents: np.ndarray, encoded: np.ndarray, levels: int, subjects: Sequence[str] | np.ndarray
) -> LatentPredictor:
    """Ridge regression of one encoded covariate on latents, by the dual (as many unknowns as scans).

    Parameters
    ----------
    latents
        Standardised, of training scans, (n, c, *spatial).
    encoded
        Standardised values or level numbers, (n,), NaN where missing.
    levels
        Number of levels, 0 for a number.
    subjects
        Whose scan each is, (n,).
    """
    known = np.isfinite(encoded)
    x = latents[known].reshape(int(known.sum()), -1).astype(np.float64)
    centre = x.mean(0)
    x = x - centre
    target = encoded[known][:, None] if not levels else 2.0 * (encoded[known][:, None] == np.arange(levels)) - 1.0
    mean = target.mean(0)
    gram = x @ x.T
    penalty = PENALTY * np.trace(gram) / len(gram)
    inverse = np.linalg.inv(gram + penalty * np.eye(len(gram)))
    dual = inverse @ (target - mean)
    # Residuals of people all of whose scans were left out, without fitting again (Allen 1974, PRESS, by blocks).
    left_out, people = np.empty_like(dual), np.asarray(subjects)[known]
    for person in np.unique(people):
        own = np.flatnonzero(people == person)
        left_out[own] = np.linalg.solve(inverse[np.ix_(own, own)], dual[own])
    weights = x.T @ dual
    spread = np.maximum(left_out.std(0), 1e-3)
    bias = mean - centre @ weights
    tensors = (torch.from_numpy(values).float() for values in (weights, bias, spread))
    return LatentPredictor(*tensors)
