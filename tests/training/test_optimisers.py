"""Muon on the weights of convolutions, AdamW on the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from meddiff_steps import config
from meddiff_steps.compute.device import make_fabric, to_channels_last
from meddiff_steps.training.checkpoints import CheckpointFolder
from meddiff_steps.training.optimisers import SMALLEST_SIDE, WEIGHT_DECAY, ConvolutionMuon, as_matrix, set_up

RATE = 0.01


def convolution(dims: int, last: bool) -> nn.Conv2d | nn.Conv3d:
    torch.manual_seed(0)
    layer = (nn.Conv2d if dims == 2 else nn.Conv3d)(8, 12, 3, padding=1)
    if last:
        to_channels_last(layer, dims)
    return layer


def gradient(layer: nn.Conv2d | nn.Conv3d, step: int) -> None:
    """Of a loss of fixed images, as a training computes it."""
    layer.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, 8, *(6, 5, 4)[: layer.weight.ndim - 2], generator=generator)
    layer(x).sin().sum().backward()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_step_is_that_of_torch_on_the_weight_as_a_matrix(dims: int, last: bool) -> None:
    layer = convolution(dims, last)
    before, address = layer.weight.detach().clone(), layer.weight.data_ptr()
    matrix = nn.Parameter(before.clone(memory_format=torch.contiguous_format).flatten(1))
    torchs = torch.optim.Muon([matrix], lr=RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    ours = ConvolutionMuon([layer.weight], RATE)
    for step in range(3):
        gradient(layer, step)
        assert layer.weight.grad is not None
        matrix.grad = layer.weight.grad.contiguous().flatten(1).clone()
        ours.step()
        torchs.step()
        # The columns stand in another order, so that bfloat16 products are summed in another.
        moved = (layer.weight.detach() - before).contiguous().flatten(1)
        expected = matrix.detach() - before.contiguous().flatten(1)
        assert float((moved - expected).norm() / expected.norm()) < (0.01 if last else 1e-6)
    assert layer.weight.data_ptr() == address, "in place"


def test_a_processor_that_emulates_bfloat16_makes_nearly_the_same_step_in_float32(monkeypatch) -> None:
    """Of singular values that Newton-Schulz brings near 1, whichever they are, and not of rounding."""
    moved = {}
    for fast in (True, False):
        monkeypatch.setattr("meddiff_steps.training.optimisers.cpu_has_bf16", lambda fast=fast: fast)
        layer = convolution(3, True)
        before = layer.weight.detach().clone()
        fabric = make_fabric(config.Compute(device="cpu", precision="32-true"), 1)
        settings = config.DiffusionOptimiser(method="muon", learning_rate=RATE)  # type: ignore[arg-type]
        optimiser = set_up(layer, settings, fabric)[1]["matrices"]
        gradient(layer, 0)
        optimiser.step()
        moved[fast] = as_matrix(layer.weight.detach() - before)
        assert optimiser.state[next(iter(optimiser.state))]["momentum_buffer"].dtype == torch.float32
    assert 0 < float((moved[True] - moved[False]).norm() / moved[True].norm()) < 0.02


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_a_matrix_shares_the_memory_of_its_weight(last: bool) -> None:
    weight = convolution(3, last).weight.detach()
    matrix = as_matrix(weight)
    assert matrix.shape == (12, 8 * 27) and matrix.data_ptr() == weight.data_ptr()
    torch.testing.assert_close(matrix.square().sum(1), weight.square().sum((1, 2, 3, 4)))


def test_a_weight_without_gradient_stays() -> None:
    layer, other = convolution(2, True), convolution(2, True)
    muon = ConvolutionMuon([layer.weight, other.weight], RATE)
    gradient(layer, 0)
    before = other.weight.detach().clone()
    muon.step()
    assert torch.equal(other.weight, before)
    gradient(other, 0)
    layer.weight.grad = None
    stays = layer.weight.detach().clone()
    muon.step()
    assert torch.equal(layer.weight, stays) and not torch.equal(other.weight, before)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(8, 8, 3), nn.Conv2d(8, SMALLEST_SIDE - 1, 3)
        self.linear, self.frozen = nn.Linear(16, 16), nn.Conv2d(8, 8, 3).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(x)).mean() + self.linear(x[:, :2, :2, :4].flatten(1)).mean()


@pytest.mark.parametrize(("method", "kinds"), [("muon", ["others", "matrices"]), ("adamw", ["others"])])
def test_which_weights_take_which_steps(method: str, kinds: list[str]) -> None:
    net = Net()
    fabric = make_fabric(config.Compute(device="cpu", precision="32-true"), 1)
    settings = config.DiffusionOptimiser(method=method, learning_rate=RATE)  # type: ignore[arg-type]
    called, optimisers = set_up(net, settings, fabric)
    assert list(optimisers) == kinds
    held = {id(p) for group in optimisers["others"].param_groups for p in group["params"]}
    trained = [net.wide.bias, net.narrow.weight, net.narrow.bias, *net.linear.parameters()]
    assert held == {id(p) for p in (trained if method == "muon" else [net.wide.weight, *trained])}
    assert {group["lr"] for optimiser in optimisers.values() for group in optimiser.param_groups} == {RATE}
    before = {name: value.clone() for name, value in net.named_parameters()}
    fabric.backward(called(torch.rand(2, 8, 8, 8)))
    for optimiser in optimisers.values():
        optimiser.step()
    moved = {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith("frozen")}


def test_muon_goes_on_from_a_checkpoint(tmp_path) -> None:
    def made() -> tuple[nn.Module, ConvolutionMuon]:
        layer = convolution(3, True)
        return layer, ConvolutionMuon([layer.weight], RATE)

    straight, steps = made()
    for step in range(4):
        gradient(straight, step)
        steps.step()
        if step == 1:
            CheckpointFolder(tmp_path).save(2, {"model": copy.deepcopy(straight)}, {"matrices": steps}, {})
    resumed, steps = made()
    assert CheckpointFolder(tmp_path).restore({"model": resumed}, {"matrices": steps}) == (2, {})
    for step in (2, 3):
        gradient(resumed, step)
        steps.step()
    assert torch.equal(resumed.weight, straight.weight)
