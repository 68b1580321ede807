"""Gradients of convolutions in bfloat16 on a processor."""

import pytest
import torch

from meddiff_steps import config
from meddiff_steps.compute.device import adamw, make_fabric


@pytest.mark.parametrize(
    ("kernel", "stride", "depth"), [(3, 1, 2), (3, 1, 4), (3, 2, 4), (4, 2, 4), (4, 2, 6), (4, 1, 5), (1, 1, 2)]
)
def test_gradients_of_weights_are_those_of_float32_but_for_rounding(kernel, stride, depth):
    def gradient(precision):
        torch.manual_seed(0)
        net = torch.nn.Conv3d(16, 32, kernel, stride, padding=kernel // 3)
        net.weight.data = net.weight.data.to(memory_format=torch.channels_last_3d)
        x = torch.randn(2, 16, depth, 6, 6).to(memory_format=torch.channels_last_3d)
        fabric = make_fabric(config.Compute(device="cpu", precision=precision), threads=1)
        module, _ = fabric.setup(net, adamw(net.parameters(), 1e-3, fabric))
        for junk in (100, 1_000, 20_000, 100_000):
            torch.full((junk,), float("nan"))  # what a gradient that is not written would show
        out = module(x).float()
        fabric.backward((out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum())
        return net.weight.grad

    exact, rounded = gradient("32-true"), gradient("bf16-mixed")
    assert (rounded - exact).norm() < 0.02 * exact.norm()
