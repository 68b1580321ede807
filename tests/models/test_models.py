import math

import numpy as np
import pytest
import torch

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import FIRST_STAGES
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.blocks import by_slabs, coordinates
from meddiff_steps.models.denoiser.base import Denoiser, gain
from meddiff_steps.models.denoiser.effects import CovariateEffects, covariate_features
from meddiff_steps.models.denoiser.resnet import LocalNetwork
from meddiff_steps.models.denoiser.tokens import CovariateTokens
from meddiff_steps.models.drawing.base import build as build_drawing
from meddiff_steps.models.first_stage.base import Posterior, halved
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.first_stage.stem import Stem
from meddiff_steps.models.latent_statistics import fit_effects, measure_standardisation
from meddiff_steps.models.trained import load_first_stage
from meddiff_steps.models.weights import save_model

SMALL = config.Autoencoder(channels=[8, 16], norm_num_groups=4, latent_channels=4)
UNET = config.Diffusion(
    network="unet", channels=[8, 16], norm_num_groups=4, num_head_channels=8, covariate_dim=8, num_res_blocks=1
)


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


FIRST_STAGES_SMALL = {name: SMALL.model_copy(update={"network": name}) for name in FIRST_STAGES.names()}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("stem", ["haar", "none"])
@pytest.mark.parametrize("network", FIRST_STAGES.names())
def test_first_stages_have_the_shapes_that_the_settings_say(network, dims, stem):
    settings = FIRST_STAGES_SMALL[network].model_copy(update={"stem": stem})
    model = build_first_stage(settings, dims)
    x = torch.rand(2, 1, *(8, 16, 8)[:dims])
    latents = (2, 4, *(n // settings.downsampling for n in x.shape[2:]))
    noise, amplitude = torch.randn(latents), torch.full((2, *[1] * (dims + 1)), 0.3)
    reconstruction, small, mean, log_variance = model(x, noise, amplitude, coarse=True)
    assert small.shape[:2] == (2, 1) and [2 * n for n in small.shape[2:]] == list(x.shape[2:])
    assert model(x, noise, amplitude)[1] is None
    assert reconstruction.shape == x.shape
    assert mean.shape == latents and (log_variance is None or log_variance.shape == latents)


def test_half_the_resolution_is_the_mean_of_what_lies_there():
    x = torch.randn(2, 3, 4, 6, 5)
    even = torch.nn.functional.avg_pool3d(x[..., :4], 2)
    assert torch.allclose(halved(x[..., :4]), even, atol=1e-6)
    assert halved(x).shape == (2, 3, 2, 3, 2) and halved(x[:, :, :1]).shape == (2, 3, 1, 3, 2)
    assert halved(x, (4, 3, 1)).shape == (2, 3, 4, 3, 1)
    posterior = Posterior(x, x + 1).halved()
    assert torch.equal(posterior.mean, halved(x)) and torch.allclose(posterior.log_variance, halved(x) + 1, atol=1e-6)
    assert Posterior(x).halved().log_variance is None


def test_latents_of_the_light_autoencoder_have_unit_power_in_every_image():
    model = build_first_stage(FIRST_STAGES_SMALL["resnet"], 3)
    latents = model.encode(torch.rand(3, 1, 8, 8, 8) * torch.tensor([0.01, 0.3, 1.0]).reshape(3, 1, 1, 1, 1)).mode()
    assert torch.allclose(latents.flatten(1).mean(1), torch.zeros(3), atol=1e-5)
    assert torch.allclose(latents.flatten(1).var(1, correction=0), torch.ones(3), atol=0.01)


def test_noise_on_latents_is_relative_to_each_image():
    mean = torch.randn(2, 4, 50, 50) * torch.tensor([1.0, 10.0]).reshape(2, 1, 1, 1)
    amplitude = torch.tensor([0.5, 0.2]).reshape(2, 1, 1, 1)
    added = Posterior(mean).sample(torch.randn(mean.shape), amplitude) - mean
    assert added.flatten(1).std(1).tolist() == pytest.approx([0.5, 2.0], rel=0.05)
    spread = Posterior(mean, torch.zeros(mean.shape)).sample(torch.randn(mean.shape), amplitude) - mean
    assert spread.flatten(1).std(1).tolist() == pytest.approx([1.25**0.5, 5.0**0.5], rel=0.05)


def test_local_layers_say_the_same_of_a_crop_and_of_the_whole():
    torch.manual_seed(0)
    net = LocalNetwork(3, 2, 2, 1, width=8, blocks=2)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, level, number = torch.randn(1, 2, 24, 8, 8), torch.tensor([0.3]), torch.tensor([[1.0]])
    place = coordinates(x.shape[2:])[None]
    whole = net(x, place, level, number)
    crop = net(x[:, :, 4:20], place[:, :, 4:20], level, number)
    reach = net.reach
    assert torch.allclose(crop[:, :, reach:-reach], whole[:, :, 4 + reach : 20 - reach], atol=1e-5)
    slabs = by_slabs(lambda a, b: net(a, b, level, number), [x, place], 5, reach)
    assert torch.allclose(slabs, whole, atol=1e-5)
    narrow = by_slabs(lambda a, b: net(a, b, level, number), [x, place], 5, 1)
    assert not torch.allclose(narrow, whole, atol=1e-3)


def test_decoding_in_slabs_changes_nothing_but_rounding():
    torch.manual_seed(0)
    model = build_first_stage(FIRST_STAGES_SMALL["resnet"], 3).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    latents = torch.randn(1, 4, 24, 4, 4)
    whole = model.decode(latents)
    for slab in (4, 12, 200):
        assert torch.allclose(model.decode(latents, slab), whole, atol=1e-5)


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
@pytest.mark.parametrize("network", ["unet", "resnet"])
def test_the_denoiser_depends_on_every_input(network, dims):
    torch.manual_seed(0)
    settings = UNET.model_copy(update={"network": network})
    model = Denoiser(settings, (4, *(4, 8, 4)[:dims]), [0, 2], variants=3).eval()
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
        model(x, t, Condition(c, variant=torch.tensor([[1.0, 0.0, 0.0]] * 2))),
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


def test_standardised_latents_have_mean_0_everywhere_and_one_scale():
    rng = np.random.default_rng(0)
    place = rng.normal(size=(2, 4, 5))
    latents = [(place + rng.normal(size=(2, 4, 5)) * [[[3.0]], [[0.5]]]).astype(np.float32) for _ in range(400)]
    standardise = measure_standardisation(iter(latents))
    z = standardise(np.stack(latents))
    assert np.allclose(standardise.inverse(z), np.stack(latents), atol=1e-4)
    assert standardise.offset.shape == (1, 2, 4, 5) and standardise.scale.shape == ()
    assert np.allclose(z.mean(0), 0, atol=1e-3)
    assert z.std() == pytest.approx(1, abs=0.01)
    assert z[:, 0].std() / z[:, 1].std() == pytest.approx(6, rel=0.05)


def test_constant_latents_can_be_standardised():
    standardise = measure_standardisation(np.full((1, 3, 4), 5.0, np.float32) for _ in range(5))
    assert np.all(standardise.offset == 5.0)
    assert np.all(standardise.scale > 0)


def as_image(latents):
    """A decoder for tests: all numbers of latents in a row, so that what is read is read from pairs of them."""
    return latents.flatten(1)[:, None]


def fitted_effects(x, shape, features, known, subjects):
    """`fit_effects` of latents (n, D) of a shape, whose images are themselves."""
    return fit_effects(
        lambda row: x[row].reshape(shape),
        features,
        known,
        subjects,
        lambda row: x[row][None].astype(np.float32),
        as_image,
    )


def test_effects_are_recovered_with_what_they_leave():
    rng = np.random.default_rng(0)
    features = rng.normal(loc=(5.0, 0.0), size=(2000, 2))
    known = rng.random((2000, 2)) < 0.9
    effects = rng.normal(size=(2, 60))
    x = (features - features.mean(0)) @ effects + 0.5 * rng.normal(size=(2000, 60))
    subjects = np.arange(2000)
    fitted = fitted_effects(x, (4, 3, 5), features, np.ones_like(known), subjects)
    assert np.allclose(fitted["effects"].reshape(2, 60), effects, atol=0.06)
    assert fitted["deviation"] == pytest.approx(0.5, rel=0.02)
    rows = fitted["readout"].reshape(4, 60)  # two of each feature: as latents are, and smoothed
    assert np.allclose(rows @ rows.T, np.eye(4), atol=1e-5)
    # What is left is white here, so that features are read along their effects
    assert np.linalg.norm(rows @ effects.T, axis=0) == pytest.approx(np.linalg.norm(effects, axis=1), rel=0.02)
    assert fitted["readout_deviations"] == pytest.approx([0.5] * 4, rel=0.1)
    some = fitted_effects(x, (4, 3, 5), np.where(known, features, 0.0), known, subjects)
    assert np.allclose(some["feature_mean"], features.mean(0), atol=0.1)
    assert np.allclose(some["feature_covariance"], np.eye(2), atol=0.15)


def test_scans_of_which_nothing_is_known_change_no_effect_and_no_readout():
    rng = np.random.default_rng(0)
    features, effects = rng.normal(size=(120, 2)), rng.normal(size=(2, 60))
    x = features @ effects + 0.5 * rng.normal(size=(120, 60))
    known = np.ones_like(features, bool)
    known[1::2] = False
    all_rows = fitted_effects(x, (4, 3, 5), np.where(known, features, 0.0), known, np.arange(120))
    labelled = fitted_effects(x[::2], (4, 3, 5), features[::2], known[::2], np.arange(120)[::2])
    for name, value in labelled.items():
        np.testing.assert_array_equal(all_rows[name], value, err_msg=name)


def test_deviations_along_the_readout_are_those_of_subjects_that_it_was_not_fitted_on():
    x = np.random.default_rng(0).normal(size=(60, 500))
    features = np.random.default_rng(1).normal(size=(60, 1))
    known = np.ones_like(features, dtype=bool)
    fitted = fitted_effects(x, (5, 100), features, known, np.arange(60))
    # Nothing can be read from noise: effects and direction fit their own subjects alone
    rows, effects = fitted["readout"].reshape(2, 500), fitted["effects"].reshape(1, 500)
    own = (x - (features - features.mean(0)) @ effects) @ rows.T
    assert own.std() < 1.0 < fitted["readout_deviations"].mean()


def test_what_is_read_from_a_difference_is_drawn_as_precisely():
    """Two directions vary much, and together: a covariate is read from their difference."""
    rng = np.random.default_rng(0)
    age, size, common = rng.normal(size=(3, 400))
    x = 0.1 * rng.normal(size=(400, 40))
    x[:, 0] += 3 * common + age
    x[:, 1] += 3 * common + size
    features, known = np.column_stack([age - size, age]), np.ones((400, 2), bool)
    fitted = fitted_effects(x, (2, 20), features, known, np.arange(400))
    rows, effects = fitted["readout"].reshape(4, 40), fitted["effects"].reshape(2, 40)
    drawn = features @ effects + (fitted["readout_deviations"] * rng.normal(size=(400, 4))) @ rows
    read = drawn[:, 0] - drawn[:, 1]
    assert np.corrcoef(read, age - size)[0, 1] > 0.98


def test_covariates_are_read_from_images_too_through_the_decoder():
    """Nothing of the feature is in these latents; in images it is, along what the decoder makes of one direction."""
    rng = np.random.default_rng(0)
    x, features, basis = rng.normal(size=(200, 12)), rng.normal(size=(200, 1)), rng.normal(size=(12, 8))
    fitted = fit_effects(
        lambda row: x[row].reshape(3, 4),
        features,
        np.ones_like(features, bool),
        np.arange(200),
        lambda row: np.full((1, 8), features[row, 0], np.float32),
        lambda latents: (latents.flatten(1) @ torch.from_numpy(basis).float())[:, None],
    )
    pulled = basis.sum(1) / np.linalg.norm(basis.sum(1))
    assert np.linalg.norm(fitted["readout"].reshape(2, 12) @ pulled) == pytest.approx(1.0, abs=1e-4)


def test_features_of_a_level_that_nobody_has_can_be_inverted():
    features = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]] * 5)
    known = np.ones_like(features, dtype=bool)
    fitted = fitted_effects(np.arange(10.0)[:, None] * np.ones(4), (2, 2), features, known, np.arange(10))
    assert np.isfinite(fitted["readout"]).all() and (fitted["readout_deviations"] > 0).all()
    assert np.linalg.eigvalsh(fitted["feature_covariance"].astype(float)).min() > 0


def random_effects():
    rng = np.random.default_rng(1)
    module = CovariateEffects((4, 4, 2), [0, 2])
    root = rng.normal(size=(4, 4))
    values = {
        "effects": rng.normal(size=(4, 4, 4, 2)),
        "feature_mean": rng.normal(size=4),
        "feature_covariance": root @ root.T + 0.1 * np.eye(4),
        "deviation": np.array(0.6),
        "readout": np.concatenate([np.linalg.qr(rng.normal(size=(32, 4)))[0].T, np.zeros((4, 32))]).reshape(8, 4, 4, 2),
        "readout_deviations": np.array([0.2, 1.5, 0.7, 0.3, 1.0, 1.0, 1.0, 1.0]),
    }
    module.load_state_dict({name: torch.from_numpy(value).float() for name, value in values.items()})
    return module, values


COVARIATES = np.array([[0.7, 1.0], [np.nan, 0.0], [0.2, np.nan], [np.nan, np.nan]], np.float32)


def test_a_continuous_covariate_has_an_effect_that_bends_and_goes_on_straight():
    values, known = covariate_features(torch.tensor([[-100.0], [0.0], [100.0], [float("nan")]]), [0])
    assert torch.allclose(values, torch.tensor([[-100.0, 100.0], [0.0, 2.0], [100.0, 100.0], [0.0, 0.0]]), atol=0.03)
    assert known.tolist() == [[True, True]] * 3 + [[False, False]]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_effects_give_the_posterior_mean_of_their_gaussian(prediction_type):
    """Against the general formula with dense matrices: missing features are Gaussian given the known ones."""
    module, values = random_effects()
    process = NoiseProcess.of(UNET.model_copy(update={"prediction_type": prediction_type}))
    x, t = np.random.default_rng(2).normal(size=(4, 32)), torch.tensor([100.0, 700.0, 400.0, 900.0])
    alpha, sigma = process.alpha_sigma(t)
    found = module(torch.from_numpy(x).float().reshape(4, 4, 4, 2), alpha, sigma, torch.from_numpy(COVARIATES))
    effects, mean, covariance = values["effects"].reshape(4, 32), values["feature_mean"], values["feature_covariance"]
    given = [
        (np.array([0.7, np.hypot(2.0, 0.7), 0.0, 1.0]), [0, 1, 2, 3]),
        (np.array([0.0, 0.0, 1.0, 0.0]), [2, 3]),
        (np.array([0.2, np.hypot(2.0, 0.2), 0.0, 0.0]), [0, 1]),
        (np.zeros(4), []),
    ]
    for i, (feature, known) in enumerate(given):
        hidden = [k for k in range(4) if k not in known]
        m, c = mean.copy(), np.zeros((4, 4))
        m[known] = feature[known]
        gain = covariance[np.ix_(hidden, known)] @ np.linalg.inv(covariance[np.ix_(known, known)])
        m[hidden] = mean[hidden] + gain @ (feature[known] - mean[known])
        c[np.ix_(hidden, hidden)] = covariance[np.ix_(hidden, hidden)] - gain @ covariance[np.ix_(known, hidden)]
        a, s = float(alpha[i]), float(sigma[i])
        rows, deviations = values["readout"].reshape(8, 32)[:4], values["readout_deviations"][:4]
        rest = 0.36 * (np.eye(32) - rows.T @ rows) + rows.T @ np.diag(deviations**2) @ rows
        spread = rest + effects.T @ c @ effects
        m = m - mean
        q = np.linalg.solve(a**2 * spread + s**2 * np.eye(32), x[i] - a * m @ effects)
        assert np.allclose(found.clean[i].flatten(), m @ effects + a * spread @ q, atol=2e-3)
        assert np.allclose(found.noise[i].flatten(), s * q, atol=2e-3)


def test_no_network_adds_anything_along_the_readout():
    module, values = random_effects()
    learnt = torch.randn(4, 4, 4, 2)
    outside = module.outside_readout(learnt).flatten(1)
    rows = torch.from_numpy(values["readout"]).float().reshape(8, 32)
    assert torch.allclose(outside @ rows.T, torch.zeros(4, 8), atol=1e-5)
    assert torch.allclose(outside + (learnt.flatten(1) @ rows.T) @ rows, learnt.flatten(1), atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_what_the_network_adds_stays_consistent(prediction_type):
    """alpha * x0 + sigma * noise is x whatever the network says, and one unit moves x0 by one posterior deviation."""
    process = NoiseProcess.of(UNET.model_copy(update={"prediction_type": prediction_type}))
    t, x, x0 = torch.tensor([50.0, 600.0]), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    alpha, sigma = (a.float().reshape(2, 1, 1, 1) for a in process.alpha_sigma(t))
    target = process.target(x0, (x - alpha * x0) / sigma, t)
    moved = process.to_x0(target + gain(process, 0.7, t, 4), x, t)
    posterior = 0.7 * sigma / (alpha**2 * 0.49 + sigma**2).sqrt()
    assert torch.allclose(moved - x0, posterior.expand_as(x0), atol=1e-3)
    noise = process.to_noise(target + gain(process, 0.7, t, 4), x, t)
    assert torch.allclose(alpha * moved + sigma * noise, x, atol=1e-4)


def test_v_on_unit_data_is_the_preconditioning_of_edm():
    process = NoiseProcess.of(config.Diffusion())
    t = torch.tensor([10.0, 500.0, 990.0])
    assert torch.allclose(gain(process, 1.0, t, 2), -torch.ones(3, 1), atol=1e-5)


def test_a_drawing_decoder_draws_from_its_noise_alone():
    torch.manual_seed(0)
    settings = config.Decoder(channels=8, num_res_blocks=1)
    model = build_drawing(settings, (1, 12, 8, 8)).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.deviation.fill_(0.05)
    decoded, noise = torch.rand(2, 1, 12, 8, 8), torch.randn(2, 1, 12, 8, 8)
    with torch.no_grad():
        drawn = model.draw(decoded, noise, 3)
        assert torch.equal(model.draw(decoded, noise, 3), drawn)
        assert torch.allclose(model.draw(decoded, noise, 3, slab=4), drawn, atol=1e-4)
        assert not torch.allclose(model.draw(decoded, -noise, 3), drawn, atol=1e-3)
        one = model.draw(decoded[1:], noise[1:], 3)
    assert torch.allclose(one, drawn[1:], atol=1e-5)
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1


def test_weights_of_another_network_are_refused_in_words(tmp_path):
    model = build_first_stage(SMALL, 2)
    card = {"settings": SMALL.model_dump(mode="json"), "image_shape": [1, 8, 8]}
    save_model(model, tmp_path, card)
    assert torch.equal(load_first_stage(tmp_path)[0].encoder[0].weight, model.encoder[0].weight)
    del model.encoder[0]
    save_model(model, tmp_path, card)
    with pytest.raises(UserError, match="not the weights of this version's network"):
        load_first_stage(tmp_path)


def test_a_guide_is_the_same_network_with_weights_of_its_own():
    torch.manual_seed(0)
    settings = config.Diffusion(channels=[8], num_res_blocks=1, guide_share=0.2)
    model = Denoiser(settings, (4, 4, 4), [0, 2]).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, t, c = torch.randn(2, 4, 4, 4), torch.tensor([300.0, 600.0]), Condition(torch.tensor([[0.1, 0.0], [0.4, 1.0]]))
    other = model(x, t, c, guide=True)
    assert (other - model(x, t, c)).abs().max() > 1e-3
    model.guide.load_state_dict(model.network.state_dict())
    assert torch.equal(model(x, t, c, guide=True), model(x, t, c))
    assert len(model.costly) == 2
    assert Denoiser(settings.model_copy(update={"guide_share": 0}), (4, 4, 4), [0, 2]).guide is None
