import math

import numpy as np
import pytest
import torch
from torch import nn

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.denoiser import latent_gaussian as prior_module
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.denoiser.latent_gaussian import LatentGaussian
from meddiff_steps.models.denoiser.tokens import CovariateTokens
from meddiff_steps.models.first_stage.base import Posterior, reconstruct
from meddiff_steps.models.first_stage.kl import Autoencoder
from meddiff_steps.models.first_stage.stem import Stem
from meddiff_steps.models.latent_statistics import (
    SUBJECTS_PER_COMPONENT,
    covariate_features,
    fit_gaussian,
    measure_standardisation,
)
from meddiff_steps.models.trained import load_first_stage
from meddiff_steps.models.weights import save_model

SMALL = config.Autoencoder(channels=[8, 16], norm_num_groups=4, latent_channels=4)
UNET = config.Diffusion(channels=[8, 16], norm_num_groups=4, num_head_channels=8, covariate_dim=8, num_res_blocks=1)


@pytest.mark.parametrize("kind", ["haar", "space_to_depth", "none"])
@pytest.mark.parametrize("shape", [(2, 1, 8, 12), (2, 3, 4, 6, 8)])
def test_a_stem_is_orthonormal_and_invertible(kind, shape):
    stem = Stem(len(shape) - 2, kind)
    x = torch.randn(shape)
    y = stem(x)
    assert y.shape[1] == stem.channels(shape[1])
    assert torch.allclose(y.square().sum(), x.square().sum(), rtol=1e-5)
    assert torch.allclose(stem.inverse(y), x, atol=1e-5)


def test_the_first_haar_channel_is_the_block_mean():
    x = torch.randn(1, 1, 4, 4, 4)
    mean = torch.nn.functional.avg_pool3d(x, 2)
    assert torch.allclose(Stem(3, "haar")(x)[:, :1] / math.sqrt(8), mean, atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("stem", ["haar", "none"])
@pytest.mark.parametrize("linear", [True, False])
def test_autoencoder_shapes(dims, stem, linear):
    settings = SMALL.model_copy(update={"stem": stem, "linear_path": linear})
    model = Autoencoder(settings, dims)
    x = torch.rand(2, 1, *(8, 16, 8)[:dims])
    reconstruction, mean, log_variance = model(x, None)
    assert reconstruction.shape == x.shape
    assert mean.shape == log_variance.shape == (2, 4, *(n // settings.downsampling for n in x.shape[2:]))


def test_the_linear_path_starts_at_the_best_linear_code():
    # Blocks that live in a 4-dimensional space can be coded with 4 channels without loss.
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 4, 4, 4, generator=generator)
    weights = torch.randn(6, 2, 2, 2, 4, generator=generator) * 0.1
    blocks = torch.einsum("nxyzk,kabc->nxaybzc", weights, patterns).reshape(6, 1, 8, 8, 8) * 0.2 + 0.5
    model = Autoencoder(SMALL, 3)
    model.fit_before_training(blocks)
    reconstruction, mean, _ = model(blocks)
    assert torch.allclose(reconstruction, blocks, atol=2e-3)
    assert torch.allclose(mean.square().mean((0, 2, 3, 4)), torch.ones(4), atol=0.01)


def test_decoded_images_are_as_empty_as_scans():
    # A linear code of few channels cannot draw the edge of a ball in front of nothing, and leaves a haze around it.
    settings = SMALL.model_copy(update={"latent_channels": 8})
    model = Autoencoder(settings, 3).eval()
    axes = torch.meshgrid(*[torch.arange(16.0) - 7.5] * 3, indexing="ij")
    distance = torch.stack(axes).square().sum(0).sqrt()
    scans = torch.stack([(1.0 - distance / radius).clamp(0, 1)[None] for radius in torch.linspace(5, 8, 12)])
    model.fit_before_training(scans)
    before = reconstruct(model, scans)
    model.fit_grey_levels(scan[None] for scan in scans)
    after = reconstruct(model, scans)
    empty = [float((images == 0).float().mean()) for images in (scans, before, after)]
    assert empty[1] < empty[0] - 0.05
    assert abs(empty[2] - empty[0]) < 0.02
    assert (after - scans).abs().mean() < (before - scans).abs().mean()


def test_kl_against_torch_and_at_tiny_variances():
    mean, log_variance = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, torch.exp(0.5 * log_variance)), torch.distributions.Normal(0.0, 1.0)
    )
    assert torch.allclose(Posterior(mean, log_variance).kl_divergence(), expected.flatten(1).sum(1), rtol=1e-4)
    # In half precision the square of the standard deviation underflows; the log-variance does not.
    assert torch.isfinite(Posterior(torch.zeros(1, 1), torch.full((1, 1), -30.0).half()).kl_divergence()).all()


def test_missing_covariates_use_their_null_and_no_other():
    tokens = CovariateTokens([0, 3], 8)
    known = tokens(torch.tensor([[0.5, 2.0]]))
    missing = tokens(torch.tensor([[math.nan, 2.0]]))
    assert torch.equal(missing[:, 0], tokens.null[:1])
    assert torch.equal(missing[:, 1], known[:, 1])
    tokens(torch.tensor([[math.nan, math.nan]])).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in tokens.parameters() if p.grad is not None)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_denoiser_depends_on_every_input(dims):
    torch.manual_seed(0)
    model = Denoiser(UNET, (4, *(4, 8, 4)[:dims]), [0, 2]).eval()
    # The output convolution and the covariate path start at zero; move them, as training would.
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    x, t, c = torch.randn(2, 4, *(4, 8, 4)[:dims]), torch.tensor([10.0, 10.0]), torch.tensor([[0.1, 0.0], [0.1, 0.0]])
    base = model(x, t, Condition(c))
    assert base.shape == x.shape
    assert base.dtype == torch.float32
    for changed in (
        model(x + 0.1, t, Condition(c)),
        model(x, t + 300.5, Condition(c)),
        model(x, t, Condition(c + torch.tensor([1.0, 0.0]))),
        model(x, t, Condition(c + torch.tensor([0.0, 1.0]))),
    ):
        assert (changed - base).abs().max() > 1e-4


def test_gradient_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Denoiser(UNET.model_copy(update={"gradient_checkpointing": checkpointing}), (4, 8, 8), [0])
        torch.manual_seed(1)
        x = torch.randn(1, 4, 8, 8)
        for parameter in model.parameters():
            parameter.data += 0.01
        model(x, torch.tensor([3.0]), Condition(torch.zeros(1, 1))).square().mean().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_standardised_latents_have_mean_0_everywhere_and_deviation_1_per_channel():
    rng = np.random.default_rng(0)
    place = rng.normal(size=(2, 4, 5))
    latents = [(place + rng.normal(size=(2, 4, 5)) * [[[3.0]], [[0.5]]]).astype(np.float32) for _ in range(400)]
    standardise = measure_standardisation(iter(latents))
    offset, scale = standardise.offset, standardise.scale
    z = standardise(np.stack(latents))
    assert np.allclose(standardise.inverse(z), np.stack(latents), atol=1e-4)
    assert offset.shape == (1, 2, 4, 5)
    assert scale.shape == (1, 2, 1, 1)
    assert np.allclose(z.mean(0), 0, atol=1e-3)
    assert np.allclose(z.std((0, 2, 3)), 1, atol=0.01)


def test_constant_latents_can_be_standardised():
    standardise = measure_standardisation(np.full((1, 3, 4), 5.0, np.float32) for _ in range(5))
    assert np.all(standardise.offset == 5.0)
    assert np.all(standardise.scale > 0)


def test_the_gaussian_fit_recovers_effects_and_components():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(60, 2)))[0].T
    features = rng.normal(size=(4000, 2))
    effects = rng.normal(size=(2, 60))
    x = features @ effects + rng.normal(size=(4000, 2)) * [3.0, 2.0] @ basis + 0.5 * rng.normal(size=(4000, 60))
    fit = fit_gaussian(lambda row: x[row].reshape(4, 3, 5), features, rank=2, subjects=np.arange(4000))
    assert np.allclose(fit.effects, effects, atol=0.2)
    assert np.allclose(np.abs(fit.basis @ basis.T), np.eye(2), atol=0.05)
    assert np.allclose(fit.variances, [9, 4], rtol=0.15)
    assert fit.local_variances.mean() == pytest.approx(0.25, rel=0.1)


def test_variances_are_those_of_subjects_that_the_components_have_not_seen():
    """Of pure noise in many dimensions, sample components explain far more variance in their own sample than in
    another.
    """
    x = np.random.default_rng(0).normal(size=(200, 5, 100))
    fit = fit_gaussian(lambda row: x[row], np.zeros((200, 1)), rank=5, subjects=np.arange(200))
    assert fit.variances == pytest.approx(np.ones(5), rel=0.25)
    assert np.square(x.reshape(200, -1) @ fit.basis.T).mean() > 5
    variants = x[np.repeat(np.arange(100), 2)]
    fit = fit_gaussian(lambda row: variants[row], np.zeros((200, 1)), rank=5, subjects=np.repeat(np.arange(100), 2))
    assert fit.variances == pytest.approx(np.ones(5), rel=0.25)


def test_components_are_few_beside_subjects_not_beside_their_variants():
    x = np.random.default_rng(4).standard_normal((80, 2, 30)).astype(np.float32)
    for copies in (1, 4):
        variants = np.repeat(x, copies, 0)
        fit = fit_gaussian(
            lambda row, of=variants: of[row],
            np.zeros((len(variants), 1)),
            rank=64,
            subjects=np.repeat(np.arange(80), copies),
        )
        assert len(fit.basis) == 80 // SUBJECTS_PER_COMPONENT


def test_channels_at_one_place_keep_their_covariance():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 3, 3))  # of three channels, another one at each of six positions
    x = np.einsum("pij,njp->nip", mixing, rng.normal(size=(2000, 3, 6)))
    fit = fit_gaussian(lambda row: x[row], np.zeros((2000, 1)), rank=1, subjects=np.arange(2000))
    component = fit.basis.reshape(3, 6)
    for p in range(6):
        local = fit.local_basis[p] @ np.diag(fit.local_variances[p]) @ fit.local_basis[p].T
        whole = local + fit.variances[0] * np.outer(component[:, p], component[:, p])
        assert np.allclose(whole, mixing[p] @ mixing[p].T, atol=0.15 * np.abs(mixing[p] @ mixing[p].T).max())


def random_prior(prediction_type="v_prediction", local_variances=None, width=0):
    rng = np.random.default_rng(1)
    size = 32
    prior = LatentGaussian(
        NoiseProcess.of(UNET.model_copy(update={"prediction_type": prediction_type})),
        (4, 4, 2),
        [0, 2],
        rank=3,
        width=width,
    )
    values = {
        "basis": np.linalg.qr(rng.normal(size=(size, 3)))[0].T,
        "effects": rng.normal(size=(3, size)),
        "variances": np.array([5.0, 2.0, 1.0]),
        "local_variances": np.full((8, 4), 0.3) if local_variances is None else local_variances,
        "local_basis": np.linalg.qr(rng.normal(size=(8, 4, 4)))[0],
    }
    prior.load_state_dict({name: torch.from_numpy(value).float() for name, value in values.items()}, strict=False)
    return prior, values


COVARIATES = np.array([[0.7, 1.0], [np.nan, 0.0]], np.float32)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_the_prior_is_the_posterior_mean_of_its_gaussian(prediction_type):
    """Against the general formula with dense matrices."""
    prior, values = random_prior(prediction_type)
    x, t = np.random.default_rng(2).normal(size=(2, 32)), torch.tensor([100.0, 700.0])
    noise, clean = prior(torch.from_numpy(x).float().reshape(2, 4, 4, 2), t, torch.from_numpy(COVARIATES))
    features = covariate_features(COVARIATES, [0, 2])
    # Local variances are beside the components, so S on the components is `variances` and 0.3 elsewhere.
    basis = values["basis"]
    covariance = 0.3 * (np.eye(32) - basis.T @ basis) + basis.T @ np.diag(values["variances"]) @ basis
    for i, (alpha, sigma) in enumerate(zip(*(a.numpy() for a in prior.process.alpha_sigma(t)), strict=True)):
        mean = features[i] @ values["effects"]
        q = np.linalg.solve(alpha**2 * covariance + sigma**2 * np.eye(32), x[i] - alpha * mean)
        assert np.allclose(clean[i].flatten(), mean + alpha * covariance @ q, atol=1e-4)
        assert np.allclose(noise[i].flatten(), sigma * q, atol=1e-4)


def test_the_prior_is_exact_where_components_are_local_ones_too():
    prior, values = random_prior(local_variances=np.random.default_rng(0).uniform(0.1, 0.5, (8, 4)))
    local = np.zeros((8, 4, 4, 8))  # position, number, channel, position
    for p in range(8):
        local[p, :, :, p] = values["local_basis"][p].T
    local = local.reshape(32, 32)
    prior.basis.copy_(torch.from_numpy(local[[3, 10, 30]]))
    variances = values["local_variances"].ravel()
    variances[[3, 10, 30]] = values["variances"]
    covariance = local.T @ np.diag(variances) @ local
    x, t = np.random.default_rng(2).normal(size=32), torch.tensor([400.0])
    clean = prior(torch.from_numpy(x).float().reshape(1, 4, 4, 2), t, torch.from_numpy(COVARIATES[:1]))[1]
    alpha, sigma = (float(a) for a in prior.process.alpha_sigma(t))
    mean = covariate_features(COVARIATES[:1], [0, 2])[0] @ values["effects"]
    expected = mean + alpha * covariance @ np.linalg.solve(
        alpha**2 * covariance + sigma**2 * np.eye(32), x - alpha * mean
    )
    assert np.allclose(clean.flatten(), expected, atol=1e-4)


def test_the_prior_stays_consistent_whatever_its_network_says():
    """alpha * clean + sigma * noise is always x, so every sampler and prediction type sees the same estimate."""
    prior, _ = random_prior(local_variances=np.random.default_rng(0).uniform(0.1, 0.5, (8, 4)), width=8)
    nn.init.normal_(prior.network.last.weight)
    x, t = torch.randn(2, 4, 4, 2), torch.tensor([100.0, 700.0])
    noise, clean = prior(x, t, torch.from_numpy(COVARIATES))
    alpha, sigma = (a.float().reshape(2, 1, 1, 1) for a in prior.process.alpha_sigma(t))
    assert torch.allclose(alpha * clean + sigma * noise, x, atol=1e-4)
    prior.network = None
    assert not torch.allclose(prior(x, t, torch.from_numpy(COVARIATES))[1], clean, atol=1e-2)


def test_covariate_features_are_the_same_in_torch():
    assert np.array_equal(
        prior_module.covariate_features(torch.from_numpy(COVARIATES), [0, 2]).numpy(),
        covariate_features(COVARIATES, [0, 2]),
    )


def test_weights_of_another_network_are_refused_in_words(tmp_path):
    model = Autoencoder(SMALL, 2)
    card = {"settings": SMALL.model_dump(mode="json"), "image_shape": [1, 8, 8]}
    save_model(model, tmp_path, card)
    assert torch.equal(load_first_stage(tmp_path)[0].tone.values, model.tone.values)
    del model.tone._buffers["values"]
    save_model(model, tmp_path, card)
    with pytest.raises(UserError, match="not the weights of this version's network"):
        load_first_stage(tmp_path)
