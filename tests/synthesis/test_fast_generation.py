"""What a GPU needs of generation, on the processor: decoding in parts and in tiles, working ahead, compiled networks, writing in a thread."""

from __future__ import annotations

import threading
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_generate import COUNT, drawn, generator, subjects  # noqa: F401 - fixtures

from meddiff_steps import config
from meddiff_steps.errors import UserError
from meddiff_steps.imaging.shards import Shards, ShardWriter, Tensor, in_background
from meddiff_steps.models.autoencoder import Autoencoder
from meddiff_steps.synthesis.generate import Generator
from meddiff_steps.training import backend


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
    monkeypatch.setattr(generator, "begin_decoding", lambda latents: begun.append(1) or decode(latents))
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
    hook = generator.autoencoder.net.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    settings(decode_batch_size=2)
    parts = images_of(generator, subjects)
    hook.remove()
    assert set(sizes) == {2}
    assert list(parts) == list(whole)
    assert max(np.abs(parts[name] - whole[name]).max() for name in whole) < 1e-5  # other kernels may round otherwise


def test_parts_divide_a_batch():
    with pytest.raises(ValueError, match="decode_batch_size must divide batch_size=16, found 3"):
        config.Generate(decode_batch_size=3)


# -------------------------------------------------------------------------------------------------- decoding in tiles


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    model = Autoencoder(config.Autoencoder(channels=[8, 16], norm_num_groups=4, latent_channels=4), 3).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def smooth_latents():
    """Latents as of images: neighbours alike."""
    coarse = torch.randn(1, 4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, size=(16, 8, 8), mode="trilinear", align_corners=True)


def test_one_tile_is_the_whole(decoder, smooth_latents):
    assert torch.allclose(decoder.decode_tiled(smooth_latents, 16), decoder.decode(smooth_latents), atol=1e-6)


def test_tiles_of_the_linear_path_are_exact(smooth_latents):
    """A linear map of blocks looks at nothing but its own cell, so that blending averages equal numbers."""
    torch.manual_seed(2)
    model = Autoencoder(config.Autoencoder(channels=[8, 16], norm_num_groups=4, latent_channels=4), 3).requires_grad_(False).eval()
    assert torch.allclose(model.decode_tiled(smooth_latents, 8), model.decode(smooth_latents), atol=1e-5)


def test_tiles_are_near_the_whole_and_leave_no_step(decoder, smooth_latents):
    whole, tiled = decoder.decode(smooth_latents), decoder.decode_tiled(smooth_latents, 8)
    assert tiled.shape == whole.shape == (1, 1, 64, 32, 32)
    error = (tiled - whole).abs()
    spread = whole.std()
    assert error.mean() < 0.1 * spread
    # Where the first tile ends, and the last begins, neighbouring planes differ no more than they do elsewhere.
    jumps = (tiled[:, :, 1:] - tiled[:, :, :-1]).abs().mean((0, 1, 3, 4)) - (whole[:, :, 1:] - whole[:, :, :-1]).abs().mean((0, 1, 3, 4))
    seams = [15, 31, 47]  # before voxels 16, 32 and 48, the borders of tiles of 8 cells that overlap by half
    assert max(float(jumps[seam]) for seam in seams) < 0.05 * spread


def test_tiles_change_what_is_generated_only_a_little(generator, subjects, settings):  # noqa: F811
    few = subjects[:4]
    whole = images_of(generator, few)
    settings(decode_tile=4)  # latents of 2 x 2 x 2 cells fit one tile
    assert all(np.abs(image - whole[name]).max() < 1e-5 for name, image in images_of(generator, few).items())


# --------------------------------------------------------------------------------------------------- compiled networks


def test_a_compiled_generator_draws_the_same_images(generator, subjects, monkeypatch):  # noqa: F811
    def compile_traced(self, **options):
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager", fullgraph=True, dynamic=options["dynamic"])

    few = subjects[:5]
    plain = images_of(generator, few)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_traced)
    monkeypatch.setattr(backend, "lacking_for_compiler", lambda device: None)
    networks = [*generator.denoiser.costly, generator.autoencoder.net.decoder]
    fast = Generator(generator.model, generator.autoencoder, generator.settings, generator.fabric, config.Compute(device="cpu", compile=True))
    try:
        assert fast.compiled
        found = images_of(fast, few)
    finally:
        for network in networks:
            network._compiled_call_impl = None
    assert max(np.abs(found[name] - plain[name]).max() for name in plain) < 1e-4


def test_a_generator_that_cannot_compile_says_so(generator, monkeypatch):  # noqa: F811
    monkeypatch.setattr(backend, "lacking_for_compiler", lambda device: "the Python package triton")
    with pytest.raises(UserError, match="set compute.compile to false"):
        Generator(generator.model, generator.autoencoder, generator.settings, generator.fabric, config.Compute(compile=True))
    assert not Generator(generator.model, generator.autoencoder, generator.settings, generator.fabric, config.Compute()).compiled


# ------------------------------------------------------------------------------------------------- writing in a thread


def write(path, rows, wrap):
    with ShardWriter(path, {"sample_id": pa.string(), "image": Tensor("float16", (1, 4, 4))}) as writer:
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


def test_count_fits_several_batches():
    assert COUNT > 4  # of 4 places: the tests above see full and padded batches
