"""What a GPU needs of generation, on the processor: decoding in parts and in slabs, working ahead, compiled networks,
writing in a thread.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from monai.networks.nets.autoencoderkl import AEKLResBlock
from test_generate import drawn, generator, subjects  # noqa: F401 - fixtures

from meddiff_steps import config
from meddiff_steps.compute import compilation
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn, in_background
from meddiff_steps.models.first_stage.kl import Autoencoder
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.synthesis.generate import CohortGenerator


@pytest.fixture
def settings(generator):  # noqa: F811
    """Changes settings of the shared generator for one test."""
    before = generator.settings, generator.ahead

    def change(**values):
        generator.settings = generator.settings.model_copy(update=values)

    yield change
    generator.settings, generator.ahead = before


def images_of(generator, subjects):  # noqa: F811
    return {name: image.copy() for name, image in generator.images(subjects, "test")}


# --------------------------------------------------------------------------------------------------- one batch ahead


def test_working_ahead_changes_no_bit_and_no_order(generator, subjects, settings):  # noqa: F811
    whole = drawn(generator, subjects)
    generator.ahead = 1
    ahead = drawn(generator, subjects)
    assert list(ahead) == list(whole)
    assert ahead == whole


def test_working_ahead_begins_exactly_one_batch_more(generator, subjects, settings, monkeypatch):  # noqa: F811
    begun = []
    decode = generator.begin_decoding
    monkeypatch.setattr(generator, "begin_decoding", lambda *drawn: begun.append(1) or decode(*drawn))
    for ahead, expected in ((0, 1), (1, 2)):
        begun.clear()
        generator.ahead = ahead
        images = generator.images(subjects, "test")
        next(images)
        assert len(begun) == expected
        images.close()


# -------------------------------------------------------------------------------------------------- decoding in parts


def test_decoding_in_parts_is_decoding_whole(generator, subjects, settings):  # noqa: F811
    whole = images_of(generator, subjects)
    sizes = []
    hook = generator.model.first_stage.costly["decoder"].register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]))
    )
    settings(decode_batch_size=2)
    parts = images_of(generator, subjects)
    hook.remove()
    assert set(sizes) == {2}
    assert list(parts) == list(whole)
    assert max(np.abs(parts[name] - whole[name]).max() for name in whole) < 1e-5  # other kernels may round otherwise


def test_parts_divide_a_batch():
    with pytest.raises(ValueError, match="decode_batch_size must divide batch_size=16, found 3"):
        config.Generate(decode_batch_size=3)


# -------------------------------------------------------------------------------------------------- decoding in slabs


@pytest.fixture(scope="module", params=[2, 3])
def decoder(request):
    torch.manual_seed(0)
    settings = config.Autoencoder(stem="none", channels=[8, 16], norm_num_groups=4, latent_channels=4, num_res_blocks=2)
    model = Autoencoder(settings, request.param).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("planes", [1, 3, 8, 100])
def test_slabs_give_what_the_whole_gives_at_seams_as_elsewhere(decoder, planes):
    z = 3 + torch.randn(
        2, 4, *(6, 4, 5)[: decoder.net.decoder.spatial_dims], generator=torch.Generator().manual_seed(1)
    )
    z = z * torch.linspace(0.2, 2, 6).reshape(6, *[1] * (z.ndim - 3))  # parts differ, so that statistics of parts would
    whole = decoder.decode(z)
    assert whole.std() > 0.05
    assert (decoder.decode(z, planes) - whole).abs().max() < 1e-5 * max(1.0, float(whole.abs().max()))


def test_a_block_never_holds_more_than_a_slab_in_full_float32(decoder):
    sizes = []
    for block in decoder.net.decoder.modules():
        if isinstance(block, AEKLResBlock):
            block.conv1.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[2]))
    decoder.decode(torch.randn(1, 4, *(6, 4, 5)[: decoder.net.decoder.spatial_dims]), slab=2)
    assert sizes
    assert max(sizes) <= 2 + 2  # and the planes beside it


def test_slabs_in_bf16_are_as_near_as_bf16_is(decoder):
    z = torch.randn(1, 4, *(6, 4, 5)[: decoder.net.decoder.spatial_dims], generator=torch.Generator().manual_seed(2))
    exact = decoder.decode(z)
    with torch.autocast("cpu", torch.bfloat16):
        whole, slabs = decoder.decode(z), decoder.decode(z, 2)
    assert (slabs - exact).norm() < 1.5 * (whole - exact).norm()


def test_slabs_change_what_is_generated_by_rounding_only(generator, subjects, settings):  # noqa: F811
    few = subjects[:4]
    whole = images_of(generator, few)
    settings(decode_slab=3)
    errors = [float(np.abs(image - whole[name]).max()) for name, image in images_of(generator, few).items()]
    assert max(errors) < 1e-5


# --------------------------------------------------------------------------------------------------- compiled networks


def again(model, compute):
    return TrainedModel(
        model.first_stage, model.denoiser, model.card, model.fabric, compute, decoder=model.decoder, tone=model.tone
    )


def test_a_compiled_generator_draws_the_same_images(generator, subjects, monkeypatch):  # noqa: F811
    def compile_traced(self, **options):
        self._compiled_call_impl = torch.compile(
            self._call_impl, backend="aot_eager", fullgraph=True, dynamic=options["dynamic"]
        )

    few = subjects[:5]
    plain = images_of(generator, few)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_traced)
    monkeypatch.setattr(compilation, "lacking_for_compiler", lambda device: None)
    model = generator.model
    networks = [*model.denoiser.costly, model.first_stage.costly["decoder"]]
    networks += model.decoder.costly if model.decoder else []
    fast = CohortGenerator(again(generator.model, config.Compute(device="cpu", compile=True)), generator.settings)
    try:
        assert fast.model.compiled
        found = images_of(fast, few)
    finally:
        for network in networks:
            network._compiled_call_impl = None
    assert max(np.abs(found[name] - plain[name]).max() for name in plain) < 1e-4


def test_a_generator_that_cannot_compile_says_so(generator, monkeypatch):  # noqa: F811
    monkeypatch.setattr(compilation, "lacking_for_compiler", lambda device: "the Python package triton")
    with pytest.raises(UserError, match="set compute.compile to false"):
        again(generator.model, config.Compute(compile=True))
    assert not again(generator.model, config.Compute()).compiled


# ------------------------------------------------------------------------------------------------- writing in a thread


def write(path, rows, wrap):
    with ShardWriter(path, {"sample_id": pa.string(), "image": TensorColumn("float16", (1, 4, 4))}) as writer:
        if wrap:
            with in_background(writer.append, waiting=3) as append:
                for name, image in rows:
                    append(sample_id=name, image=image)
        else:
            for name, image in rows:
                writer.append(sample_id=name, image=image)


def test_a_shard_written_in_a_thread_has_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(f"syn{i}", rng.random((1, 4, 4), dtype=np.float32)) for i in range(40)]
    write(tmp_path / "plain.arrow", rows, wrap=False)
    write(tmp_path / "thread.arrow", rows, wrap=True)
    assert (tmp_path / "thread.arrow").read_bytes() == (tmp_path / "plain.arrow").read_bytes()
    assert Shards([tmp_path / "thread.arrow"]).column("sample_id") == [name for name, _ in rows]


def test_what_fails_in_the_thread_fails_here_and_leaves_no_shard(tmp_path):
    rows = [("a", np.zeros((1, 4, 4))), ("b", np.zeros((1, 5, 4))), ("c", np.zeros((1, 4, 4)))]
    with pytest.raises(ValueError, match="expected shape"):
        write(tmp_path / "x.arrow", rows, wrap=True)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_wait_are_bounded():
    gate, written = threading.Event(), []

    def append(row):
        gate.wait()
        written.append(row)

    def fill():
        with in_background(append, waiting=2) as later:
            for row in range(6):
                later(row=row)
                submitted.append(row)

    submitted: list[int] = []
    filler = threading.Thread(target=fill)
    filler.start()
    time.sleep(0.3)
    assert len(submitted) == 2
    gate.set()
    filler.join()
    assert written == list(range(6))
