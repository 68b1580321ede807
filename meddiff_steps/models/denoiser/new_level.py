"""What a network that is told of one level more of a categorical covariate makes of its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NewLevel:
    """Where the new level lies among what a network is told, and what it is taken for.

    Attributes
    ----------
    covariate
        Its covariate, by number.
    feature
        Its feature, which comes after those of the covariate's other levels (`effects.covariate_features`).
    features
        How many there are without it.
    mix
        Of each of the covariate's other levels, its share in what the new one is at first; they sum to 1.
    """

    covariate: int
    feature: int
    features: int
    mix: Tensor

    def mixed(self, values: Tensor, dim: int = 0, first: int = 0) -> Tensor:
        """What the new level has of `values`, which has the features along `dim`, from `first` on; without `dim`."""
        mine = values.narrow(dim, first + self.feature - len(self.mix), len(self.mix))
        return torch.tensordot(self.mix.to(values.dtype), mine, ([0], [dim]))


def inserted(values: Tensor, new: Tensor | float, at: int, dim: int = 0) -> Tensor:
    """`values` with one place more along `dim`, before the place `at`, that holds `new`."""
    before, after = values.narrow(dim, 0, at), values.narrow(dim, at, values.shape[dim] - at)
    shape = [1 if axis == dim else size for axis, size in enumerate(values.shape)]
    place = new.unsqueeze(dim) if isinstance(new, Tensor) else values.new_full(shape, new)
    return torch.cat([before, place.to(values.dtype), after], dim)
