"""The fast path beside the plain one, on the processor: compiled networks, bfloat16, memory layout, the optimiser."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps import config
from meddiff_steps.compute import compilation
from meddiff_steps.compute import device as backend
from meddiff_steps.compute.precision import Bf16Inside
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import DENOISERS, DRAWING_DECODERS, FIRST_STAGES
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.drawing.base import DrawingDecoder
from meddiff_steps.models.drawing.base import build as build_drawing
from meddiff_steps.models.first_stage.base import FirstStage
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.training import loop

DIFFUSION = config.Diffusion(
    channels=[8, 16], norm_num_groups=4, num_head_channels=8, covariate_dim=8, num_res_blocks=1
)
AUTOENCODER = config.Autoencoder(channels=[8, 16], norm_num_groups=4, latent_channels=4)
CALL = (torch.tensor([10.0, 999.0]), Condition(torch.tensor([[0.503, 0.0], [float("nan"), 1.0]])))


def moved(make: Callable[[], nn.Module]) -> nn.Module:
    """A network with weights as after some training: layers that begin at zero would hide what comes before them."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def settings_of(settings: config.Diffusion | config.Autoencoder, **changes) -> Any:
    return settings.model_copy(update=changes)


@pytest.fixture(scope="module", params=DENOISERS.names())
def denoiser(request: pytest.FixtureRequest) -> Denoiser:
    model = moved(lambda: Denoiser(settings_of(DIFFUSION, network=request.param), (4, 4, 4, 4), [0, 2], variants=3))
    assert isinstance(model, Denoiser)
    model.effects.effects.copy_(0.3 * torch.randn_like(model.effects.effects))
    return model


@pytest.fixture(scope="module", params=FIRST_STAGES.names())
def autoencoder(request: pytest.FixtureRequest) -> FirstStage:
    model = moved(lambda: build_first_stage(settings_of(AUTOENCODER, network=request.param), 3))
    assert isinstance(model, FirstStage)
    return model


@pytest.fixture(scope="module", params=DRAWING_DECODERS.names())
def drawing(request: pytest.FixtureRequest) -> DrawingDecoder:
    settings = config.Decoder(network=request.param, channels=8, num_res_blocks=1)
    model = moved(lambda: build_drawing(settings, (1, 8, 8, 8)))
    assert isinstance(model, DrawingDecoder)
    return model


#: Noise on the latents of an image of 8 x 8 x 8, and how much.
NOISE = (torch.randn(1, 4, 2, 2, 2, generator=torch.Generator().manual_seed(3)), torch.full((1, 1, 1, 1, 1), 0.3))


def cpu(precision: str = "32-true") -> Fabric:
    return backend.make_fabric(config.Compute(device="cpu", precision=precision), threads=1)


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float(((found - expected).norm() / expected.norm()).detach())


def output_and_gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    model.zero_grad()
    output = model(*inputs)
    output = output if isinstance(output, Tensor) else output[0]
    output.square().mean().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


# ------------------------------------------------------------------------------------------------------ compiling


@pytest.fixture
def eager_backend(monkeypatch):
    """Traced, differentiated and guarded as by torch.compile, without the minutes that generated code takes: graph
    breaks still fail.
    """
    compiled = []

    def compile_traced(self: nn.Module, **options) -> None:
        compiled.append((self, options))
        self._compiled_call_impl = torch.compile(
            self._call_impl, backend="aot_eager", fullgraph=True, dynamic=options["dynamic"]
        )

    monkeypatch.setattr(nn.Module, "compile", compile_traced)
    monkeypatch.setattr(compilation, "lacking_for_compiler", lambda device: None)
    torch._dynamo.reset()
    return compiled


def test_a_compiled_denoiser_is_one_graph_and_the_same_function(denoiser, eager_backend):
    x = torch.randn(2, 4, 4, 4, 4)
    plain = output_and_gradients(denoiser, x, *CALL)
    fast = copy.deepcopy(denoiser)
    assert compilation.speed_up(fast.costly, config.Compute(compile=True), cpu(), training=True)
    assert list(fast.state_dict()) == list(denoiser.state_dict())
    assert [module for module, _ in eager_backend] == fast.costly
    found = output_and_gradients(fast, x, *CALL)
    assert len(found) == len(plain) > 20
    assert max(relative(a, b) for a, b in zip(found, plain, strict=True) if b.norm()) < 1e-5


def test_a_compiled_autoencoder_is_the_same_function(autoencoder, eager_backend):
    inputs = torch.rand(1, 1, 8, 8, 8), *NOISE
    plain = output_and_gradients(autoencoder, *inputs)
    fast = copy.deepcopy(autoencoder)
    assert compilation.speed_up(fast.costly.values(), config.Compute(compile=True), cpu(), training=True)
    assert len(eager_backend) == 2
    found = output_and_gradients(fast, *inputs)
    assert max(relative(a, b) for a, b in zip(found, plain, strict=True) if b.norm()) < 1e-5


def test_a_compiled_drawing_decoder_is_the_same_function(drawing, eager_backend):
    model = copy.deepcopy(drawing)
    decoded, noise = torch.rand(2, 1, 8, 8, 8), torch.randn(2, 1, 8, 8, 8)
    with torch.no_grad():
        plain = model.draw(decoded, noise, 3)
        fast = copy.deepcopy(model)
        assert compilation.speed_up(fast.costly, config.Compute(compile=True), cpu(), training=False)
        assert relative(fast.draw(decoded, noise, 3), plain) < 1e-5
    assert len(eager_backend) == 1


def test_a_compiled_drawing_decoder_learns_as_the_plain_one(drawing, eager_backend):
    """On a crop, with its coordinates, as `DecoderTask` calls it."""
    x, timesteps, decoded = torch.randn(2, 8, 3, 3, 3), CALL[0], torch.randn(2, 8, 3, 3, 3)
    inputs = x, timesteps, decoded, drawing.place([1, 0, 1], [3, 3, 3]).expand(2, -1, -1, -1, -1)
    plain = output_and_gradients(drawing, *inputs)
    fast = copy.deepcopy(drawing)
    assert compilation.speed_up(fast.costly, config.Compute(compile=True), cpu(), training=True)
    found = output_and_gradients(fast, *inputs)
    assert len(found) == len(plain) > 10
    assert max(relative(a, b) for a, b in zip(found, plain, strict=True) if b.norm()) < 1e-5


def test_a_compiled_discriminator_is_one_graph_and_the_same_function(eager_backend):
    model = moved(lambda: PatchDiscriminator(3, 4, in_channels=1, num_layers_d=2, norm="INSTANCE"))
    image = torch.rand(1, 1, 16, 16, 16)
    plain = model(image)[-1].detach()
    assert compilation.speed_up([model], config.Compute(compile=True), cpu(), training=True)
    assert relative(model(image)[-1], plain) < 1e-5


@pytest.mark.parametrize(
    "setting, device, training, expected",
    [
        ("auto", "cuda", True, True),
        ("auto", "cuda", False, False),
        ("auto", "cpu", True, False),
        (True, "cpu", False, True),
        (False, "cuda", True, False),
    ],
)
def test_what_is_compiled(monkeypatch, setting, device, training, expected):
    monkeypatch.setattr(compilation, "lacking_for_compiler", lambda device: None)
    assert compilation.compiles(config.Compute(compile=setting), device, training) is expected


def test_a_machine_without_compiler_is_told_apart_from_a_wish(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "C++ compiler" in str(compilation.lacking_for_compiler("cpu"))
    with pytest.raises(
        UserError,
        match=(
            r"compute.compile is true, but .* needs a C\+\+ compiler .*\. Install it, or set compute.compile to false"
        ),
    ):
        compilation.compiles(config.Compute(compile=True), "cpu", training=True)
    monkeypatch.setattr(compilation, "lacking_for_compiler", lambda device: "the Python package triton")
    with caplog.at_level(logging.WARNING):
        assert compilation.compiles(config.Compute(), "cuda", training=True) is False
    assert "triton" in caplog.text


def test_graphs_need_a_compiler():
    with pytest.raises(ValueError, match="cuda_graphs needs compile: true"):
        config.Compute(cuda_graphs=True)


def test_settings_of_older_releases_are_still_read():
    assert (
        config.Compute.model_validate({"device": "auto", "devices": 1, "precision": "auto", "compile": False}).compile
        is False
    )


# -------------------------------------------------------------------------------------------------------- bfloat16


def test_bf16_leaves_the_inputs_of_a_network_alone():
    seen = []

    class Probe(nn.Linear):
        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            seen.append((x.dtype, timesteps.clone()))
            return super().forward(x)

    fabric = cpu("bf16-mixed")
    net = fabric.setup(Probe(4, 4))
    output = net(torch.rand(2, 4), CALL[0])
    assert seen[0][0] == torch.float32
    assert torch.equal(seen[0][1], CALL[0])  # 999 is no bfloat16
    assert output.dtype == torch.float32  # computed in bfloat16, given back as Lightning does
    assert isinstance(fabric._precision, Bf16Inside)
    with fabric.autocast():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def known(made: tuple[Tensor, Tensor, Tensor | None]) -> list[Tensor]:
    """What a first stage gives in training; one without a posterior gives no variance."""
    return [value for value in made if value is not None]


def test_bf16_networks_stay_within_one_percent(denoiser, autoencoder):
    """A bfloat16 has 8 significant bits, so one rounding is up to 0.4 %; a network of random weights averages over
    many.
    """
    fabric = cpu("bf16-mixed")
    x, image = torch.randn(2, 4, 4, 4, 4), torch.rand(1, 1, 8, 8, 8)
    plain = [*output_and_gradients(denoiser, x, *CALL)[:1], *known(autoencoder(image, *NOISE))]
    net, first = fabric.setup(copy.deepcopy(denoiser)), fabric.setup(copy.deepcopy(autoencoder))
    found = [net(x, *CALL).detach(), *known(first(image, *NOISE))]
    assert {value.dtype for value in found} == {torch.float32}
    errors = [relative(a, b) for a, b in zip(found, plain, strict=True)]
    assert max(errors) < 0.01
    assert errors[0] > 0  # it really was another arithmetic


def test_the_effects_of_covariates_are_exact_in_bf16(denoiser):
    """At timestep 999, sigma / alpha is 120: what is rounded there comes back 120 times as large."""
    x, levels = torch.ones(2, 4, 4, 4, 4), denoiser.process.alpha_sigma(CALL[0])
    with torch.autocast("cpu", torch.bfloat16):
        found = denoiser.effects(x, *levels, CALL[1].covariates)
    expected = denoiser.effects(x, *levels, CALL[1].covariates)
    for name in ("clean", "noise", "surprise"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_drawing_decoder_in_bf16_stays_within_one_percent(drawing):
    seen, place = torch.randn(2, 8, 4, 4, 4), drawing.place().expand(2, -1, -1, -1, -1)
    inputs = torch.randn(2, 8, 4, 4, 4), CALL[0], seen, place
    plain = drawing(*inputs)
    found = cpu("bf16-mixed").setup(copy.deepcopy(drawing))(*inputs)
    assert found.dtype == torch.float32
    assert 0 < relative(found, plain) < 0.01


def test_what_is_drawn_in_bf16_is_what_is_drawn_but_for_rounding(drawing):
    """The sampler's state stays float32: only the network rounds, and errors do not add up over steps."""
    model = copy.deepcopy(drawing).eval()
    model.deviation.fill_(0.05)
    decoded, noise = torch.rand(1, 1, 8, 8, 8), torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        plain = model.draw(decoded, noise, 10)
        with torch.autocast("cpu", torch.bfloat16):
            found = model.draw(decoded, noise, 10)
    assert found.dtype == torch.float32
    assert (plain - decoded).std() > 0.01
    assert 0 < relative(found, plain) < 0.01


def test_attention_is_fused_and_what_the_formula_says(monkeypatch):
    """MONAI's blocks by torch's fused kernels, in bfloat16 under autocast, beside its own softmax of products."""
    settings = settings_of(DIFFUSION, network="unet", attention_levels=[True, True])
    fused = moved(lambda: Denoiser(settings, (4, 4, 4, 4), [0, 2]))
    plain = copy.deepcopy(fused)
    attending = [m for m in plain.modules() if getattr(m, "use_flash_attention", False)]
    assert attending
    for module in attending:
        module.use_flash_attention = False
    x = torch.randn(2, 4, 4, 4, 4)
    assert relative(fused(x, *CALL), plain(x, *CALL)) < 1e-5
    seen = []
    attend = functional.scaled_dot_product_attention

    def watched(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        made = attend(query, *rest, **options)
        seen.append(made.dtype)
        return made

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rounded = fused(x, *CALL)
    assert set(seen) == {torch.bfloat16}
    assert 0 < relative(rounded, plain(x, *CALL)) < 0.01


def test_weights_cast_once_give_the_same_bits_in_every_network(autoencoder, drawing):
    z, decoded, noise = torch.randn(1, 4, 2, 2, 2), torch.rand(1, 1, 8, 8, 8), torch.randn(1, 1, 8, 8, 8)
    first, drawer = copy.deepcopy(autoencoder), copy.deepcopy(drawing)
    for model, networks in ((first, first.costly.values()), (drawer, drawer.costly)):
        compilation.cast_products(networks, torch.bfloat16)
        assert any(weight.dtype == torch.bfloat16 for weight in model.parameters())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(first.decode(z), autoencoder.decode(z))
        assert torch.equal(first.encode(decoded).mean, autoencoder.encode(decoded).mean)
        assert torch.equal(drawer.draw(decoded, noise, 2), drawing.draw(decoded, noise, 2))


def test_weights_cast_once_give_the_same_bits(denoiser):
    def weight(model: Denoiser) -> Tensor:
        return next(m.weight for m in model.costly[0].modules() if isinstance(m, nn.Conv3d))

    x = torch.randn(2, 4, 4, 4, 4)
    cast = copy.deepcopy(denoiser)
    compilation.cast_products(cast.costly, torch.bfloat16)
    assert weight(cast).dtype == torch.bfloat16
    assert cast.effects.effects.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(cast(x, *CALL), denoiser(x, *CALL))
    untouched = copy.deepcopy(denoiser)
    compilation.cast_weights(untouched.costly, cpu("bf16-mixed"))
    assert weight(untouched).dtype == torch.float32


# ----------------------------------------------------------------------------------------- layout, optimiser, clipping


def test_channels_last_whatever_else_a_module_holds():
    module = nn.Sequential(nn.Conv3d(4, 8, 3), nn.GroupNorm(2, 8))
    module.register_buffer(
        "plane", torch.rand(2, 3, 4, 5)
    )  # Module.to(memory_format=torch.channels_last_3d) raises here
    before = copy.deepcopy(module)
    backend.to_channels_last(module, 3)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(module[0].weight, before[0].weight)
    x = torch.rand(1, 4, 6, 6, 6)
    assert relative(module(x.contiguous(memory_format=torch.channels_last_3d)), before(x)) < 1e-6


@pytest.mark.parametrize("network", FIRST_STAGES.names())
def test_recomputed_blocks_of_the_autoencoder_change_nothing_and_a_copy_is_its_own(network):
    image, settings = torch.rand(1, 1, 8, 8, 8), settings_of(AUTOENCODER, network=network)
    plain = output_and_gradients(moved(lambda: build_first_stage(settings, 3)), image, *NOISE)
    kept = moved(lambda: build_first_stage(settings_of(settings, gradient_checkpointing=True), 3))
    found = output_and_gradients(kept, image, *NOISE)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    copied = copy.deepcopy(kept)
    with torch.no_grad():
        for parameter in kept.parameters():
            parameter.zero_()
    assert torch.equal(copied(image, *NOISE)[0], plain[0])


def denoiser_of(network: str, **changes: Any) -> nn.Module:
    return moved(lambda: Denoiser(settings_of(DIFFUSION, network=network, **changes), (4, 4, 4, 4), [0, 2], variants=3))


@pytest.mark.parametrize("network", DENOISERS.names())
def test_recomputed_blocks_of_the_denoiser_change_nothing(network):
    x = torch.randn(2, 4, 4, 4, 4)
    plain = output_and_gradients(denoiser_of(network), x, *CALL)
    found = output_and_gradients(denoiser_of(network, gradient_checkpointing=True), x, *CALL)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_recomputed_blocks_can_be_compiled(eager_backend):
    x, fast = torch.randn(2, 4, 4, 4, 4), denoiser_of("resnet", gradient_checkpointing=True)
    plain = output_and_gradients(denoiser_of("resnet"), x, *CALL)
    assert compilation.speed_up(fast.costly, config.Compute(compile=True), cpu(), training=True)
    found = output_and_gradients(fast, x, *CALL)
    assert max(relative(a, b) for a, b in zip(found, plain, strict=True) if b.norm()) < 1e-5


def test_the_optimiser_is_the_plain_one_on_a_processor():
    weight = nn.Parameter(torch.ones(3))
    optimiser = backend.adamw([weight], 0.1, cpu())
    assert optimiser.defaults["fused"] is None
    assert optimiser.defaults["weight_decay"] == 0.0


def test_fused_updates_are_those_of_the_plain_optimiser():
    weights = [nn.Parameter(torch.linspace(-1, 1, 64)) for _ in range(2)]
    for weight, fused in zip(weights, (False, True), strict=True):
        optimiser = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.0, fused=fused)
        for step in range(20):
            weight.grad = torch.sin(weight.detach() * (step + 1))
            optimiser.step()
    assert relative(weights[1], weights[0]) < 1e-6


def test_gradients_that_are_not_finite_are_looked_for_at_every_step_of_a_processor():
    settings = config.Optimiser(steps=10, batch_size=1, learning_rate=1.0)
    fabric = cpu()
    net, _ = fabric.setup(module := nn.Linear(2, 2), torch.optim.SGD(module.parameters(), lr=1.0))
    module.weight.grad = torch.full((2, 2), torch.nan)
    with pytest.raises(RuntimeError, match="non-finite"):
        loop.clip_gradients(net, settings, 3, fabric)


def test_to_device_copies_what_it_is_given():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert torch.equal(backend.to_device(array, cpu()), torch.from_numpy(array))


def test_gradients_are_clipped_over_all_weights_together():
    fabric, settings = cpu(), config.Optimiser(steps=10, batch_size=1, learning_rate=1.0, gradient_clip=1.0)
    net = fabric.setup(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)))
    for weight in net.parameters():
        weight.grad = torch.full((2, 2), 2.0)
    loop.clip_gradients(net, settings, 3, fabric)
    norms = [float(weight.grad.norm()) for weight in net.parameters() if weight.grad is not None]
    assert norms == pytest.approx([0.5**0.5] * 2, rel=1e-4)
