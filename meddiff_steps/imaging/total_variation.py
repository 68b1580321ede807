"""The classic prior for inverse problems: an image of small total variation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from meddiff_steps.imaging.operators.base import Operator

#: Iterations at least and at most, and the change from one to the next, as a share of the image, below which they end.
#: Of thick slices (factor 4, best weight, three brains) PSNR is then 0.4 to 0.6 dB above that after 100 iterations.
LEAST, MOST, TOLERANCE = 20, 600, 3e-5
#: Share of the step that the dual takes: of noise alone the image is then within 3e-3 of the solution after 100
#: iterations (with a share of 1 within 3e-2).
DUAL_STEP = 8.0


def _gradient(x: Tensor) -> Tensor:
    """Forward differences of (b, 1, *spatial), 0 at the last voxel: (b, axes, *spatial)."""
    found = x.new_zeros(len(x), x.ndim - 2, *x.shape[2:])
    for axis in range(x.ndim - 2):
        difference = torch.diff(x[:, 0], dim=axis + 1)
        found[:, axis].narrow(axis + 1, 0, x.shape[axis + 2] - 1).copy_(difference)
    return found


def _divergence(p: Tensor) -> Tensor:
    """The negative adjoint of `_gradient`."""
    found = p.new_zeros(len(p), 1, *p.shape[2:])
    for axis in range(p.shape[1]):
        inner = p[:, axis].narrow(axis + 1, 0, p.shape[axis + 2] - 1)
        found[:, 0].narrow(axis + 1, 0, p.shape[axis + 2] - 1).add_(inner)
        found[:, 0].narrow(axis + 1, 1, p.shape[axis + 2] - 1).sub_(inner)
    return found


def total_variation(
    operator: Operator, measured: Tensor, weight: float, most: int = MOST, tolerance: float = TOLERANCE
) -> Tensor:
    """argmin over x of |y - A x|^2 / 2 + weight * TV(x), isotropic, (b, 1, *spatial).

    The primal-dual iteration of Condat 2013 (algorithm 3.1), whose smooth part is the data's.

    Parameters
    ----------
    weight
        In the units of the measurement's squares; 0 is least squares.
    most, tolerance
        Iterations at most, and the change that ends them, of all images together.
    """
    axes = len(operator.image_shape) - 1
    norm = squared_norm(operator, measured.device)
    # 1 / tau - sigma * |gradient|^2 >= |A|^2 / 2, with |gradient|^2 <= 4 per axis.
    sigma = DUAL_STEP * norm / (8 * axes)
    tau = 1.0 / (norm / 2 + sigma * 4 * axes)
    x = operator.first_look(measured).clone()
    dual = x.new_zeros(len(x), axes, *x.shape[2:])
    for count in range(1, most + 1):
        slope = operator.adjoint(operator.forward(x) - measured) - _divergence(dual)
        following = x - tau * slope
        dual = dual + sigma * _gradient(2 * following - x)
        dual = dual / (dual.norm(dim=1, keepdim=True) / max(weight, 1e-12)).clamp(min=1.0)
        change, x = (following - x).norm() / following.norm().clamp(min=1e-12), following
        if count >= LEAST and change < tolerance:
            break
    return x


def squared_norm(operator: Operator, device: torch.device | str = "cpu", iterations: int = 20) -> float:
    """The largest eigenvalue of A* A, by power iteration, and a tenth more for what that lacks."""
    x = torch.linspace(0.5, 1.5, math.prod(operator.image_shape), device=device).reshape(1, *operator.image_shape)
    value = 1.0
    for _ in range(iterations):
        image = operator.adjoint(operator.forward(x))
        value = float(image.norm() / x.norm())
        x = image / image.norm()
    return 1.1 * value
