"""Mixed precision that leaves the inputs of a network alone."""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric.plugins import MixedPrecision
from torch import Tensor, nn


class Bf16Inside(MixedPrecision):
    """bfloat16 in the products and convolutions of a network, and nowhere else.

    Lightning's own plugin also rounds everything that a network is given to bfloat16, which has 8 significant bits:
    timestep 999 becomes 1000, which is none, and an age of 0.503 standard deviations 0.504.  Autocast rounds where it
    multiplies; the rest stays float32.

    Parameters
    ----------
    device
        "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)

    def convert_module(self, module: nn.Module) -> nn.Module:
        if self.device == "cpu":
            for part in module.modules():
                if isinstance(part, nn.Conv2d | nn.Conv3d):
                    _keep_gradients_right(part)
        return super().convert_module(module)

    def convert_input(self, data: Any) -> Any:
        return data


def _keep_gradients_right(convolution: nn.Conv2d | nn.Conv3d) -> None:
    """Let a trained convolution compute in float32 where torch 2.13 on processors with AVX512-BF16 gets the gradient of
    its weights wrong in bfloat16.

    That was seen where an axis of the image has 1 or 2 voxels and where the kernel is wider than 3: the gradient is
    what lay in memory before, or the process ends with a corrupted heap.  Kernels up to 3 on axes of 3 and more are
    right (`tests/training/test_precision.py`).
    """
    convolve = convolution._conv_forward

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not weight.requires_grad or (min(x.shape[2:]) > 2 and max(convolution.kernel_size) <= 3):
            return convolve(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            return convolve(x.float(), weight, bias)

    convolution._conv_forward = forward  # type: ignore[method-assign, assignment]
