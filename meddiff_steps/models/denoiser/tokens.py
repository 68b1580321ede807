"""Covariates and vectors such as those of a text as tokens that a network attends to, with a learnt null."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps.models.blocks import ChannelNorm, silence

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


class AttendedTokens(nn.Module):
    """Given vectors as tokens, and which of them are there to be attended to.

    One more, learnt, always is: where nothing is known, it stands alone, and a short text is not thinned out by the
    places that it leaves empty.

    Parameters
    ----------
    widths
        Of every kind of vector, by name.
    dim
        Of a token.
    """

    def __init__(self, widths: Mapping[str, int], dim: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.randn(dim) * 0.02)
        self.project = nn.ModuleList(nn.Linear(width, dim) for width in widths.values())

    def forward(self, vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(b, n, width) each, NaN where not known -> tokens (b, m, dim), and bool (b, m); m is all n and 1."""
        batch = len(vectors[0])
        tokens, there = [self.null.expand(batch, 1, -1)], [self.null.new_ones(batch, 1, dtype=torch.bool)]
        for project, given in zip(self.project, vectors, strict=True):
            known = torch.isfinite(given).all(-1)
            tokens.append(project(torch.where(known[..., None], given, 0.0)))
            there.append(known)
        return torch.cat(tokens, 1), torch.cat(there, 1)


class CrossAttention(nn.Module):
    """x + what every place of x finds among tokens (Vaswani et al. 2017; Rombach et al. 2022); starts as the identity.

    Parameters
    ----------
    channels
        Of x.
    dim
        Of a token.
    heads
        Attended to separately; fewer where they do not divide the channels.
    """

    def __init__(self, channels: int, dim: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = math.gcd(channels, heads)
        self.norm, self.query = ChannelNorm(channels), nn.Linear(channels, channels, bias=False)
        self.key_value, self.last = nn.Linear(dim, 2 * channels, bias=False), nn.Linear(channels, channels)
        silence(self.last)

    def forward(self, x: Tensor, tokens: Tensor, there: Tensor) -> Tensor:
        """x (b, channels, *spatial), tokens (b, m, dim), which of them are there, bool (b, m) -> as x."""
        places = self.norm(x).movedim(1, -1)
        query = self.query(places).flatten(1, -2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.key_value(tokens).chunk(2, -1)
        )
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=there[:, None, None, :])
        return x + self.last(found.transpose(1, 2).flatten(2)).unflatten(1, places.shape[1:-1]).movedim(-1, 1)
