"""Codebooks: what is nearest, how entries are learnt and brought back, and MONAI's network beside ours."""

import numpy as np
import pytest
import torch
from monai.networks.layers.vector_quantizer import EMAQuantizer
from monai.networks.nets import VQVAE

from meddiff_steps import config
from meddiff_steps.evaluation.reconstructions import codebook_use
from meddiff_steps.models.first_stage import quantiser
from meddiff_steps.models.first_stage.base import build
from meddiff_steps.models.first_stage.quantiser import Codebooks, perplexity, use_counts, used_share

SETTINGS = config.Codebook(entries=16, parts=2)


def one_process(values):
    return values


@pytest.fixture
def books():
    torch.manual_seed(0)
    return Codebooks(4, SETTINGS)


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4)])
def test_codes_are_the_nearest_entries_of_every_part(books, shape, monkeypatch):
    monkeypatch.setattr(quantiser, "CELLS", 7)  # several pieces, of which the last is smaller
    latents = torch.randn(2, 4, *shape)
    codes = books.codes(latents)
    assert codes.shape == (2, 2, *shape)
    for i, part in enumerate(books.parts):
        numbers = latents[:, 2 * i : 2 * i + 2].movedim(1, -1)
        distance = (numbers[..., None, :] - part.embedding.weight).square().sum(-1)
        assert torch.equal(codes[:, i], distance.argmin(-1))
    entries = books.embed(codes)
    assert entries.shape == latents.shape
    assert torch.equal(books.codes(entries), codes)
    assert torch.equal(books(latents), entries)
    assert float(books.commitment(latents)) == pytest.approx(float((latents - entries).square().mean()), rel=1e-5)


def test_gradients_pass_the_quantiser_as_if_it_were_not_there(books):
    latents = torch.randn(1, 4, 3, 3, requires_grad=True)
    weight = torch.randn(1, 4, 3, 3)
    (books(latents) * weight).sum().backward()
    assert torch.equal(latents.grad, weight)
    assert not any(parameter.requires_grad for parameter in books.parameters())


def test_half_precision_around_it_changes_no_code():
    """Entries that lie nearer to each other than bfloat16 can tell."""
    torch.manual_seed(0)
    books = Codebooks(2, config.Codebook(entries=64, parts=1))
    books.parts[0].embedding.weight.data = 1 + torch.rand(64, 2) / 100
    latents = 1 + torch.rand(1, 2, 16, 16) / 100
    exact = books.codes(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(books.codes(latents), exact)
        # MONAI guards against this on a GPU alone
        assert not torch.equal(books.parts[0].quantize(latents)[2], exact[:, 0])


def test_entries_are_running_means_and_those_without_latents_stay(books):
    part, before = books.parts[1], books.parts[1].embedding.weight.clone()
    part.ema_cluster_size.fill_(2.0)
    part.ema_w.copy_(2 * before)
    latents = before[3].repeat(5, 1) + 0.01 * torch.randn(5, 2)
    batch = torch.cat([torch.randn(5, 2), latents], 1)[..., None, None]
    assert set(books.codes(batch)[:, 1].flatten().tolist()) == {3}
    books.follow(batch, one_process)
    decay = SETTINGS.decay
    expected = (decay * 2 * before[3] + (1 - decay) * latents.sum(0)) / (decay * 2 + (1 - decay) * 5)
    torch.testing.assert_close(part.embedding.weight[3], expected)
    others = torch.arange(16) != 3
    assert torch.equal(part.embedding.weight[others], before[others])
    for _ in range(20_000):  # until their counts are no longer numbers above zero
        part.ema_cluster_size.mul_(decay), part.ema_w.mul_(decay)
    books.follow(batch, one_process)
    assert torch.equal(part.embedding.weight[others], before[others])


def test_the_update_of_monai_throws_unused_entries_away():
    """Why ours is used: should MONAI's be mended, it can be."""
    torch.manual_seed(0)
    theirs = EMAQuantizer(2, 16, 2).train()
    used = theirs(torch.randn(1, 2, 1, 1))[2].item()
    far = theirs.embedding.weight.norm(dim=1)
    assert (far[torch.arange(16) != used] > 1000).all()


def test_dead_entries_are_put_where_latents_have_none_near(books):
    rng = np.random.default_rng(0)
    for part in books.parts:
        part.ema_cluster_size.fill_(4.0)
        part.ema_cluster_size[:3] = 0.1
    before = [part.embedding.weight.clone() for part in books.parts]
    here = torch.cat([weight[rng.integers(3, 16, 200)] for weight in before], 1)  # exactly at entries in use
    far = torch.randn(3, 4) + 20
    other = Codebooks(4, SETTINGS)
    untouched = other.parts[0].embedding.weight[3:].clone()
    found = books.restart(torch.cat([here, far]), cells=64, rng=rng)
    for i, (part, old) in enumerate(zip(books.parts, before, strict=True)):
        assert torch.equal(part.embedding.weight[3:], old[3:])
        moved = {tuple(row) for row in part.embedding.weight[:3].tolist()}
        assert moved == {tuple(row) for row in far[:, 2 * i : 2 * i + 2].tolist()}
        assert part.ema_cluster_size.tolist() == [4.0] * 16
        torch.testing.assert_close(part.ema_w[:3] / part.ema_cluster_size[:3, None], part.embedding.weight[:3])
    other.place(found)
    assert torch.equal(other.parts[0].embedding.weight[:3], books.parts[0].embedding.weight[:3])
    assert torch.equal(other.parts[0].embedding.weight[3:], untouched)


def test_use_of_codebooks():
    codes = torch.tensor([[[0, 0, 0, 0], [0, 1, 2, 3]], [[0, 0, 0, 0], [3, 2, 1, 0]]])
    counts = use_counts(codes, 8)
    assert counts.shape == (2, 2, 8) and counts.sum() == codes.numel()
    assert used_share(counts.sum(0)) == pytest.approx((1 / 8 + 4 / 8) / 2)
    assert perplexity(counts.sum(0)) == pytest.approx((1 + 4) / 2)
    found = codebook_use(counts, ["a", "b"])
    assert found["perplexity"]["value"] == 2.5 and found["used"]["n"] == 2
    rng = np.random.default_rng(0)
    many = np.stack([[np.bincount(rng.integers(8, size=64), minlength=64)] for _ in range(30)])
    few = codebook_use(many, [str(i) for i in range(30)])
    assert few["perplexity"]["low"] < few["perplexity"]["value"] < few["perplexity"]["high"]
    assert few["used"]["value"] == 8 / 64


def test_monais_network_gives_what_monai_gives():
    torch.manual_seed(0)
    settings = config.Autoencoder(
        network="vqvae",
        stem="none",
        channels=[8, 16],
        latent_channels=4,
        num_res_blocks=2,
        codebook=config.Codebook(entries=32, parts=1),
    )
    ours = build(settings, 3).eval()
    theirs = VQVAE(
        3,
        1,
        1,
        channels=(8, 16),
        num_res_layers=2,
        num_res_channels=(8, 16),
        downsample_parameters=((1, 3, 1, 1), (2, 4, 1, 1)),
        upsample_parameters=((2, 4, 1, 1, 0), (1, 3, 1, 1, 0)),
        num_embeddings=32,
        embedding_dim=4,
    ).eval()
    ours.encoder.load_state_dict(theirs.encoder.state_dict())
    ours.decoder.load_state_dict(theirs.decoder.state_dict())
    ours.codebooks.parts[0].load_state_dict(theirs.quantizer.quantizer.state_dict())
    images = torch.rand(2, 1, 8, 8, 8)
    with torch.no_grad():
        latents = ours.encode(images).mode()
        expected, _ = theirs(2 * images - 1)
        torch.testing.assert_close(latents, theirs.encode(2 * images - 1))
        assert torch.equal(ours.codebooks.codes(latents)[:, 0], theirs.index_quantize(2 * images - 1))
        torch.testing.assert_close(2 * ours.decode(latents) - 1, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("network", ["vq", "vqvae"])
def test_the_decoder_sees_entries_alone_in_slabs_as_well(network):
    torch.manual_seed(0)
    settings = config.Autoencoder(network=network, channels=[8, 16], latent_channels=4, codebook=SETTINGS)
    model = build(settings, 3).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    latents = torch.randn(1, 4, 24, 4, 4)
    with torch.no_grad():
        whole = model.decode(latents)
        entries = model.codebooks(latents)
        assert not torch.equal(entries, latents)
        assert torch.equal(model.decode(entries), whole)
        for slab in (4, 12, 200):
            torch.testing.assert_close(model.decode(latents, slab), whole, atol=1e-5, rtol=0)
