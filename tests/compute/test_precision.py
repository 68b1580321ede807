"""What is computed in which type: gradients of convolutions in bfloat16, and what must stay float32 under autocast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from meddiff_steps import config
from meddiff_steps.compute.device import adamw, full_float32, make_fabric, to_channels_last
from meddiff_steps.compute.precision import WITHOUT_ONEDNN, convolve_single_images_fast
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.latent_statistics import fit_effects

#: Whatever may run on tensor cores, or calls what does.
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "linalg_", "cholesky", "convolution", "einsum")


class Products(TorchDispatchMode):
    """Writes down every product below autocast: its name, the types that it multiplies, and what TF32 may do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, set[torch.dtype], str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(name.removeprefix("_").startswith(product) for product in PRODUCTS):
            dtypes = {value.dtype for value in args if isinstance(value, Tensor) and value.is_floating_point()}
            tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
            self.seen.append((name, dtypes, torch.get_float32_matmul_precision(), tf32))
        return func(*args, **(kwargs or {}))

    def exact(self) -> bool:
        """Whether there were any, none of them rounds, and on a GPU none would."""
        kept = {torch.float32, torch.float64}
        return bool(self.seen) and all(
            dtypes <= kept and precision == "highest" and not tf32 for _, dtypes, precision, tf32 in self.seen
        )


@pytest.fixture
def denoiser(monkeypatch) -> Denoiser:
    """As a study trains it: the default network, effects and readout as after `scale`, and TF32 where there is any."""
    before = torch.get_float32_matmul_precision()
    make_fabric(config.Compute(device="cpu"), threads=1)
    torch.manual_seed(0)
    settings = config.Diffusion(channels=[16], num_res_blocks=1)
    model = Denoiser(settings, (4, 4, 4, 4), [0, 2])
    with torch.no_grad():
        for weight in model.network.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    model.effects.effects.copy_(0.3 * torch.randn_like(model.effects.effects))
    rows = torch.linalg.qr(torch.randn(256, len(model.effects.readout)))[0].T
    model.effects.readout.copy_(rows.reshape(model.effects.readout.shape))
    model.effects.readout_deviations.fill_(0.5)
    yield model
    torch.set_float32_matmul_precision(before)


INPUT = (torch.tensor([10.0, 900.0]), Condition(torch.tensor([[0.503, 0.0], [float("nan"), 1.0]])))


def test_the_closed_form_prior_never_rounds_what_it_multiplies(denoiser):
    """Neither to bfloat16 nor, on a GPU, to TF32, which `make_fabric` allows for everything else."""
    assert torch.get_float32_matmul_precision() == "high"
    x, levels = torch.randn(2, 4, 4, 4, 4), denoiser.process.alpha_sigma(INPUT[0])
    for call in (
        lambda: denoiser.effects(x, *levels, INPUT[1].covariates),
        lambda: denoiser.effects.outside_readout(x),
        lambda: denoiser.effects.path(x, *levels, levels[0] / 2 + 0.5, levels[1] / 2, INPUT[1].covariates),
    ):
        with torch.autocast("cpu", torch.bfloat16), Products() as products:
            call()
        assert products.exact(), products.seen
    with torch.autocast("cpu", torch.bfloat16), Products() as everything:
        denoiser(x, *INPUT)
    assert any(torch.bfloat16 in dtypes for _, dtypes, _, _ in everything.seen)  # the network does round
    assert torch.get_float32_matmul_precision() == "high"


def test_in_bf16_a_network_still_adds_nothing_along_the_readout(denoiser):
    x, (timesteps, condition) = torch.randn(2, 4, 4, 4, 4), INPUT
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = denoiser(x, timesteps, condition)
    known = denoiser.effects(x, *denoiser.process.alpha_sigma(timesteps), condition.covariates)
    added = (found - denoiser.process.target(known.clean, known.noise, timesteps)).flatten(1)
    rows = denoiser.effects.readout.flatten(1)
    assert added.norm() > 0.1
    assert (added @ rows.T).norm() < 1e-5 * added.norm()


def test_effects_are_fitted_without_rounding():
    """Through a decoder that would: on a GPU convolutions round by default."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((12, 1, 4, 4), dtype=np.float32)
    features = latents[:, 0, :2, 0] + 0.1 * rng.standard_normal((12, 2), dtype=np.float32)
    decoder = torch.nn.ConvTranspose2d(1, 1, 2, 2).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        fit_effects(
            lambda row: latents[row],
            features,
            np.ones_like(features, bool),
            np.arange(12),
            lambda row: np.kron(latents[row], np.ones((1, 2, 2), np.float32)),
            decoder,
        )
    assert "convolution" in {name for name, *_ in products.seen}
    assert products.exact(), products.seen


def test_switches_are_put_back_whatever_happens():
    def switches():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu")

    before = switches()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ZeroDivisionError):
        outside = switches()
        try:
            with full_float32():
                assert switches() == ("highest", False, False)
                assert not torch.backends.cuda.matmul.allow_tf32
                raise ZeroDivisionError
        finally:
            assert switches() == outside
    assert switches() == before


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


@pytest.mark.parametrize(
    ("images", "side", "asked"), [(1, 6, True), (2, 6, False), (1, WITHOUT_ONEDNN // 64 + 1, False)]
)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_small_image_alone_is_convolved_by_onednn_to_the_same_result(dims, images, side, asked, monkeypatch):
    torch.manual_seed(0)
    layer = (torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d)(8, 4, 3, padding=1)
    to_channels_last(layer, dims)
    x = torch.randn(images, 8, 8, side, *[5] * (dims - 2), requires_grad=True)
    through = []

    def of(x: Tensor) -> list[Tensor]:
        layer.zero_grad()
        x.grad = None
        made = layer(x)
        made.sin().sum().backward()
        return [made.detach(), x.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone()]

    expected = of(x)
    convolve_single_images_fast(layer)
    to_mkldnn = Tensor.to_mkldnn
    monkeypatch.setattr(Tensor, "to_mkldnn", lambda self: through.append(self.shape) or to_mkldnn(self))
    for one, other in zip(of(x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert bool(through) == (asked and torch.backends.mkldnn.is_available())
    through.clear()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert not through


def test_a_torch_without_onednn_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    layer = torch.nn.Conv3d(1, 1, 3)
    convolve_single_images_fast(layer)
    assert "_conv_forward" not in vars(layer)
