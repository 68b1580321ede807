"""Covariates and vectors such as those of a text as tokens that a network attends to, with a learnt null."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: Frequencies of the sine features of a standardised covariate: periods of 16 to 1 standard deviations.
FREQUENCIES = tuple(2.0 * math.pi / period for period in (16.0, 8.0, 4.0, 2.0, 1.0))


class CovariateTokens(nn.Module):
    """One token per covariate.

    With a single token, cross-attention is a softmax over one key and adds the same bias everywhere; with one
    token per covariate the network can attend to them by place and by feature.  Missing and dropped covariates
    have a learnt token of their own.

    Parameters
    ----------
    levels
        Per covariate: the number of levels, or 0 for a continuous one.
    dim
        Width of a token.
    """

    frequencies: Tensor

    def __init__(self, levels: list[int], dim: int) -> None:
        super().__init__()
        self.levels = levels
        self.null = nn.Parameter(torch.randn(len(levels), dim) * 0.02)
        self.register_buffer("frequencies", torch.tensor(FREQUENCIES), persistent=False)
        features = 1 + 2 * len(FREQUENCIES)
        self.embed = nn.ModuleList(
            nn.Embedding(n, dim) if n else nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))
            for n in levels
        )

    def forward(self, covariates: Tensor) -> Tensor:
        """(b, k) standardised values or level numbers, NaN where missing -> (b, k, dim)."""
        tokens = []
        for i, (n, embed) in enumerate(zip(self.levels, self.embed, strict=True)):
            value = covariates[:, i]
            known = torch.isfinite(value)
            value = torch.where(known, value, torch.zeros_like(value))
            if n:
                token = embed(value.long())
            else:
                phases = value[:, None] * self.frequencies
                token = embed(torch.cat([value[:, None], phases.sin(), phases.cos()], 1))
            tokens.append(torch.where(known[:, None], token, self.null[i].to(token.dtype)))
        return torch.stack(tokens, 1)


class ProjectedTokens(nn.Module):
    """Given vectors, each as a token; those that are not known (NaN) have one learnt token.

    Parameters
    ----------
    width
        Of a vector.
    dim
        Of a token.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.randn(dim) * 0.02)
        self.project = nn.Linear(width, dim)

    def forward(self, vectors: Tensor) -> Tensor:
        """(b, n, width), NaN where not known -> (b, n, dim)."""
        known = torch.isfinite(vectors)
        tokens = self.project(torch.where(known, vectors, torch.zeros_like(vectors)))
        return torch.where(known.all(-1, keepdim=True), tokens, self.null.to(tokens.dtype))
