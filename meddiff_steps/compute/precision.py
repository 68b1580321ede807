"""Which type and which library convolutions are computed with, where torch alone chooses badly."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning_fabric.plugins import MixedPrecision
from torch import Tensor, nn

#: A single float32 image of no more numbers than this along its first three axes (channels and two of space) is
#: convolved without oneDNN (torch 2.13, `ConvParams::use_mkldnn`).
WITHOUT_ONEDNN = 20480


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


def convolve_single_images_fast(module: nn.Module) -> None:
    """Let convolutions of one small float32 image be computed by oneDNN, as those of larger ones and of batches are, in
    place; for networks that are trained on processors.

    torch takes its own kernels there, which made passes through a network twice as long on a processor with AVX2.
    Results differ in their last bits.  A torch without oneDNN, as on Macs, is left as it is.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Conv3d) and max(part.kernel_size) > 1:
            _by_onednn(part)


def _by_onednn(convolution: nn.Conv2d | nn.Conv3d) -> None:
    convolve = convolution._conv_forward

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        small = len(x) == 1 and math.prod(x.shape[:4]) <= WITHOUT_ONEDNN
        if not small or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return convolve(x, weight, bias)
        return convolve(x.to_mkldnn(), weight, bias).to_dense()

    convolution._conv_forward = forward  # type: ignore[method-assign, assignment]
