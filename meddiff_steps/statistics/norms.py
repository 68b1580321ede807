"""What is normal at each voxel: linear models of many values at once, and how far a newcomer is from them.

The deviation of a newcomer from the prediction of a linear model, divided by the standard deviation of that prediction,
follows Student's t if residuals are normal; it is told as the z of the same probability.  So a share of 5 % of healthy
newcomers lies beyond 1.96 however few the subjects of reference are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from meddiff_steps.core.errors import UserError

#: Residual standard deviation at least, of the range of grey values: one grey level of 8 bits.  Where no subject
#: differs (background), the smallest rounding would be a deviation.
LEAST_STD = 1 / 255
#: z at most, either way: the probability of more is 0 in float64.
LARGEST_Z = 37.0


@dataclass(frozen=True)
class Norm:
    """A fitted model.

    Attributes
    ----------
    coefficients
        (p, v).
    std
        Residual standard deviation, (v,), at least `LEAST_STD`.
    inverse
        Of the normal equations, (p, p).
    degrees
        Of freedom.
    """

    coefficients: np.ndarray
    std: np.ndarray
    inverse: np.ndarray
    degrees: int

    def z(self, design: np.ndarray, values: np.ndarray) -> np.ndarray:
        """How far a newcomer's values (v,) are from what is predicted for its `design` (p,); float32 (v,)."""
        spread = self.std * np.sqrt(1 + design @ self.inverse @ design)
        t = (values - design @ self.coefficients) / spread
        z = np.sign(t) * stats.norm.isf(stats.t.sf(np.abs(t), self.degrees))
        return np.clip(z, -LARGEST_Z, LARGEST_Z).astype(np.float32)


class NormSums:
    """Sums over subjects that a `Norm` is made of: memory is that of a few images, however many subjects there are.

    Parameters
    ----------
    columns, voxels
        Numbers of columns of the design, and of values of a subject.
    """

    def __init__(self, columns: int, voxels: int) -> None:
        self.count = 0
        self.xx, self.xy = np.zeros((columns, columns)), np.zeros((columns, voxels))
        self.yy = np.zeros(voxels)

    def add(self, design: np.ndarray, values: np.ndarray) -> None:
        """One subject: `design` (p,), `values` (v,)."""
        self.count += 1
        self.xx += np.outer(design, design)
        self.xy += np.outer(design, values)
        self.yy += np.square(values, dtype=np.float64)

    def norm(self, who: str) -> Norm:
        """The least-squares fit; columns that say nothing beyond others get the smallest coefficients.

        Parameters
        ----------
        who
            The subjects, for messages.

        Raises
        ------
        UserError
            Fewer than two subjects more than columns.
        """
        inverse = np.linalg.pinv(self.xx, hermitian=True)
        rank = int(np.linalg.matrix_rank(self.xx, hermitian=True))
        degrees = self.count - rank
        if degrees < 2:
            raise UserError(
                f"{who}: {self.count} of them, expected at least {rank + 2} to know what is normal. Enlarge that split,"
                " or name fewer covariates."
            )
        coefficients = inverse @ self.xy
        residual = np.maximum(self.yy - (coefficients * self.xy).sum(0), 0.0)
        return Norm(coefficients, np.maximum(np.sqrt(residual / degrees), LEAST_STD), inverse, degrees)
