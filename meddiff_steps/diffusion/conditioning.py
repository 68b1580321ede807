"""What a denoiser is told about each subject: covariates, maps on a grid, and tokens such as those of a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from meddiff_steps.core.errors import UserError

#: Rows of a batch: one number, a slice, a list of numbers, or a tensor of numbers or truth values.
Rows = int | slice | Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """The condition of a batch of b subjects, a row each.

    A covariate or token that is NaN is not known. Denoisers have something learnt in the place of it, so that one
    network serves every subset of what can be known, and a batch has one shape whatever is known.

    Attributes
    ----------
    covariates
        Encoded covariates, floating point (b, k): standardised numbers, or the numbers of levels.
    maps
        What lies on a grid, by name: scans, masks, label maps, (b, c, *spatial) of any dtype; grids may differ.
    tokens
        Sequences of vectors by name, floating point (b, n, dim).
    variant
        What was done to a training image (mirrored, shifted), floating point (b, v); None: nothing.

    Raises
    ------
    ValueError
        A tensor has another shape or kind than these, or another number of rows than the covariates.
    """

    covariates: Tensor
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    variant: Tensor | None = None

    def __post_init__(self) -> None:
        _check("covariates", self.covariates, self.covariates.ndim == 2, "(b, k)", len(self))
        for name, value in self.maps.items():
            _check(f"maps[{name!r}]", value, value.ndim >= 3, "(b, c, *spatial)", len(self), any_dtype=True)
        for name, value in self.tokens.items():
            _check(f"tokens[{name!r}]", value, value.ndim == 3, "(b, n, dim)", len(self))
        if self.variant is not None:
            _check("variant", self.variant, self.variant.ndim == 2, "(b, v)", len(self))

    def __len__(self) -> int:
        """Subjects, b."""
        return self.covariates.shape[0] if self.covariates.ndim else 0

    def __getitem__(self, rows: Rows) -> Condition:
        """The condition of some subjects, in the order asked for; of one subject, still with an axis for the batch."""
        if isinstance(rows, int):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"row {rows} of a condition with {len(self)}")
            rows = [rows]
        chosen = rows if isinstance(rows, slice) else torch.as_tensor(rows)
        return self._each(lambda value: value[chosen if isinstance(chosen, slice) else chosen.to(value.device)])

    def null(self) -> Condition:
        """What is left for an unconditional prediction: covariates and tokens are NaN, maps stay.

        NaN rather than fewer tokens: the shapes of both passes of classifier-free guidance are then the same, and one
        compiled network serves both. Maps stay because they say which image is wanted and not what it is like: an
        unconditional inpainting still sees the picture around its hole.
        """
        tokens = {name: torch.full_like(value, torch.nan) for name, value in self.tokens.items()}
        return replace(self, covariates=torch.full_like(self.covariates, torch.nan), tokens=tokens)

    def moved(self, column: int, value: float | Tensor) -> Condition:
        """Another value in one column of the covariates, for everybody or (b,) for each; NaN makes it unknown."""
        if not -self.covariates.shape[1] <= column < self.covariates.shape[1]:
            raise IndexError(f"column {column} of {self.covariates.shape[1]} covariates; columns count from 0")
        covariates = self.covariates.clone()
        covariates[:, column] = value if isinstance(value, Tensor) else float(value)
        return replace(self, covariates=covariates)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Moved to a device, and to a floating-point dtype.

        Integer maps keep their labels, and covariates are never less than float32: the number of a level or a
        standardised age would not survive half precision.
        """

        def converted(value: Tensor) -> Tensor:
            return value.to(device=device, dtype=dtype if dtype is not None and value.is_floating_point() else None)

        wide = None if dtype is None else torch.promote_types(dtype, torch.float32)
        return replace(self._each(converted), covariates=self.covariates.to(device=device, dtype=wide))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        maps, tokens = ({name: change(value) for name, value in d.items()} for d in (self.maps, self.tokens))
        variant = None if self.variant is None else change(self.variant)
        return Condition(change(self.covariates), maps, tokens, variant)

    def variant_numbers(self, count: int) -> Tensor:
        """The variant, (b, count); zeros where none is given."""
        return self.covariates.new_zeros(len(self), count) if self.variant is None else self.variant

    def maps_of(self, channels: Mapping[str, int]) -> list[Tensor]:
        """The maps that a network was trained with, in the order of `channels`, which has the channels of each.

        Raises
        ------
        UserError
            There are others.
        """
        found = {name: value.shape[1] for name, value in sorted(self.maps.items())}
        if found != dict(channels):
            raise UserError(
                f"condition.maps: found channels {found}, this model was trained with {dict(channels)}. Give just these"
                " maps, on the grid of the latents."
            )
        return [self.maps[name] for name in channels]

    def tokens_of(self, widths: Mapping[str, int]) -> list[Tensor]:
        """The tokens that a network was trained with, (b, n, dim) each, in the order of `widths`; of a kind that is not
        given, one that is not known.

        Raises
        ------
        UserError
            There are others, or of another width.
        """
        found = {name: value.shape[2] for name, value in sorted(self.tokens.items())}
        wrong = {name: width for name, width in found.items() if widths.get(name) != width}
        if wrong:
            raise UserError(
                f"condition.tokens: found widths {wrong}, this model was trained with {dict(widths)}. Encode them with"
                " the encoder that lies with the model."
            )
        missing = {name: width for name, width in widths.items() if name not in found}
        unknown = {name: self.covariates.new_full((len(self), 1, width), torch.nan) for name, width in missing.items()}
        return [{**unknown, **self.tokens}[name] for name in widths]


#: denoiser(x (b, c, *spatial), timesteps (b,) float32, condition) -> what the process predicts, shaped as x.
Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]


def _check(name: str, value: Tensor, shaped: bool, expected: str, rows: int, any_dtype: bool = False) -> None:
    if not shaped:
        raise ValueError(f"{name}: expected a shape {expected}, found {tuple(value.shape)}. Give it an axis for each.")
    if value.shape[0] != rows:
        raise ValueError(f"{name}: {value.shape[0]} rows, but covariates have {rows}. Give a row per subject in both.")
    if not (any_dtype or value.is_floating_point()):
        raise ValueError(f"{name}: {value.dtype} has no NaN, which stands for what is not known. Use float32.")
