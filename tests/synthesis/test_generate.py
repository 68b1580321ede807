"""Drawing subjects: who is drawn with whom, and in which order, changes no bit."""

from __future__ import annotations

import doctest
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.drawing.base import build as build_drawing
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.trained import DenoiserCard, TrainedModel
from meddiff_steps.synthesis import generate
from meddiff_steps.synthesis.generate import CohortGenerator

COUNT = 14


@pytest.fixture(scope="module", params=["kl", "resnet", "vq", "resnet with decoder"])
def generator(request: pytest.FixtureRequest) -> CohortGenerator:
    torch.manual_seed(0)
    network = request.param.split()[0]
    covariates = {"age": config.ContinuousCovariate(unit="year", range=(18, 100))}
    encoding = CovariateEncoding.fit(pd.DataFrame({"age": [20.0, 40.0, 60.0]}), covariates)
    second = {"network": "unet", "norm_num_groups": 4, "num_head_channels": 8} if network == "kl" else {}
    diffusion = config.Diffusion(channels=[8, 16], num_res_blocks=1, **second)
    denoiser = Denoiser(diffusion, (4, 2, 2, 2), encoding.level_counts, variants=5)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # its last layer begins at zero
    settings = config.Autoencoder(network=network, channels=[8, 16], norm_num_groups=4, latent_channels=4)
    first, decoder = build_first_stage(settings, 3), None
    if "decoder" in request.param:
        decoder = build_drawing(config.Decoder(channels=8, num_res_blocks=1), (1, 8, 8, 8))
        decoder.deviation.fill_(0.1)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        decoder.requires_grad_(False).eval()
    for part in (denoiser, first):
        part.requires_grad_(False).eval()
    settings = config.Generate(batch_size=4, num_inference_steps=4, sampler="ddpm", drawing_steps=2)
    card = DenoiserCard(diffusion, (4, 2, 2, 2), encoding, variants=5)
    exact = config.Compute(device="cpu", precision="32-true")
    model = TrainedModel(first, denoiser, card, make_fabric(exact, 1), decoder=decoder)
    return CohortGenerator(model, settings)


@pytest.fixture(scope="module")
def subjects() -> pd.DataFrame:
    rows = [
        {
            "sample_id": f"syn{i:06d}",
            "index": i,
            "noise_index": i,
            "attempt": 0,
            "cohort_root": "root/syn",
            "age": 20.0 + i,
        }
        for i in range(COUNT)
    ]
    return pd.DataFrame(rows).assign(seed_key=[seed_key("root/syn", i, 0, "noise") for i in range(COUNT)])


def drawn(generator: CohortGenerator, subjects: pd.DataFrame) -> dict[str, bytes]:
    return {name: image.tobytes() for name, image in generator.images(subjects, "test")}


@pytest.mark.parametrize("shards", [1, 2, 7, COUNT])
def test_shards_change_no_bit(generator, subjects, shards):
    whole = drawn(generator, subjects)
    assert len(set(whole.values())) == COUNT
    parts: dict[str, bytes] = {}
    for rows in np.array_split(np.arange(COUNT), shards):
        parts |= drawn(generator, subjects.iloc[rows])
    assert parts == whole


def test_order_and_company_change_no_bit(generator, subjects):
    whole = drawn(generator, subjects)
    mixed = np.random.default_rng(1).permutation(COUNT)
    assert drawn(generator, subjects.iloc[mixed]) == whole
    some = drawn(generator, subjects.iloc[mixed[:5]])
    assert some == {name: whole[name] for name in some}


def test_batches_are_full_wherever_a_shard_begins():
    for start in (0, 3, 8):
        batches = list(generate.batch_slots(np.arange(start, start + 10), 4))
        assert len(batches) == 3
        assert np.unique(np.concatenate(batches)).tolist() == list(range(10))
    assert list(generate.batch_slots(np.array([], dtype=int), 4)) == []


def test_what_is_drawn_belongs_to_the_subject(generator):
    """A decoder draws with the subject's own noise: another attempt draws other detail, on other latents."""
    model = generator.model
    assert model.draws == (model.decoder is not None)
    latents = torch.randn(2, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    whose = [[("root/syn", index, attempt) for index in range(2)] for attempt in (0, 1)]
    noise = [generator._noise(subjects, "decoder", model.image_shape) for subjects in whose]
    drawn = [model.decode(latents, given, drawing_steps=2) for given in noise]
    assert torch.equal(*drawn) == (model.decoder is None)
    assert not torch.equal(noise[0][0], noise[0][1])
    mean = model.decode(latents)
    assert torch.equal(mean, drawn[0]) == (model.decoder is None)


def test_autoguidance_is_asked_for_by_the_study(generator, subjects):
    if generator.model.card.settings.network == "unet":
        pytest.skip("one network is enough")
    torch.manual_seed(1)
    model = generator.model
    settings = model.card.settings.model_copy(update={"guide_share": 0.2})
    card = replace(model.card, settings=settings)
    denoiser = card.build().requires_grad_(False).eval()
    denoiser.load_state_dict(model.denoiser.state_dict(), strict=False)
    for parameter in denoiser.guide.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    guided = TrainedModel(model.first_stage, denoiser, card, model.fabric, decoder=model.decoder)

    def made(model, **changes):
        return drawn(CohortGenerator(model, generator.settings.model_copy(update=changes)), subjects[:3])

    plain = made(guided)
    assert made(guided, guidance="autoguidance") == plain == made(model), "at a scale of 1 the guide is not asked"
    away = made(guided, guidance="autoguidance", guidance_scale=2.0)
    assert away != made(guided, guidance_scale=2.0) != plain


def test_example():
    assert doctest.testmod(generate).failed == 0
