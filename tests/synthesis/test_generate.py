"""Drawing subjects: who is drawn with whom, and in which order, changes no bit."""

from __future__ import annotations

import doctest

import numpy as np
import pandas as pd
import pytest
import torch

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.first_stage.kl import Autoencoder
from meddiff_steps.models.trained import DenoiserCard, TrainedModel
from meddiff_steps.synthesis import generate
from meddiff_steps.synthesis.generate import CohortGenerator

COUNT = 14


@pytest.fixture(scope="module")
def generator() -> CohortGenerator:
    torch.manual_seed(0)
    covariates = {"age": config.ContinuousCovariate(unit="year", range=(18, 100))}
    encoding = CovariateEncoding.fit(pd.DataFrame({"age": [20.0, 40.0, 60.0]}), covariates)
    diffusion = config.Diffusion(
        channels=[8, 16], norm_num_groups=4, attention_levels=[False, True], num_head_channels=8
    )
    denoiser = Denoiser(diffusion, (4, 2, 2, 2), encoding.level_counts)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # its last layer begins at zero
    first = Autoencoder(config.Autoencoder(channels=[8, 16], norm_num_groups=4, latent_channels=4), 3)
    for network in (denoiser, first):
        network.requires_grad_(False).eval()
    settings = config.Generate(batch_size=4, num_inference_steps=4, sampler="ddpm")
    card = DenoiserCard(diffusion, (4, 2, 2, 2), encoding, rank=0)
    model = TrainedModel(first, denoiser, card, make_fabric(config.Compute(device="cpu"), 1))
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


def test_example():
    assert doctest.testmod(generate).failed == 0
