"""A level that few have: a base that is told of it, and a training that does not forget what the base knew."""

import dataclasses

import numpy as np
import pytest
import torch
from test_init_from import given
from test_training import OPTIMISER, fabric, images, latents  # noqa: F401 - fixtures

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.models.pretrained.convert import Sections, convert
from meddiff_steps.models.pretrained.new_level import with_level
from meddiff_steps.models.trained import DenoiserCard, load_denoiser, save_denoiser
from meddiff_steps.models.weights import weights_digest
from meddiff_steps.training import loop
from meddiff_steps.training.rehearsal import Rehearsal
from meddiff_steps.training.tasks.diffusion import DiffusionTask

AGE = config.ContinuousCovariate(unit="year", range=(0, 1))
SHAPE = (4, 4, 4, 4)


def encoding(levels):
    return CovariateEncoding(
        {"disease": config.CategoricalCovariate(levels=levels), "age": AGE}, {"age": 0.0}, {"age": 1.0}
    )


KNOWN, GROWN = encoding(["a", "b"]), encoding(["a", "b", "rare"])


def settings(network="resnet", **rare):
    return config.Diffusion(
        **{"network": network, "channels": [8, 16], "norm_num_groups": 4, "num_head_channels": 8, "num_res_blocks": 1},
        guide_share=0.5,
        optimiser=OPTIMISER.model_dump(),
        rare={"covariate": "disease", "level": "rare", **rare} if rare else None,
    )


def base(network="resnet"):
    """Trained, with effects and a readout, and its card; `a` was met thrice as often as `b`."""
    torch.manual_seed(3)
    made = DenoiserCard(settings(network), SHAPE, KNOWN, 5)
    denoiser = given(made.build())
    effects = denoiser.effects
    effects.effects.normal_()
    effects.feature_mean.copy_(torch.tensor([0.75, 0.25, 0.0, 2.2]))
    spread = torch.randn(4, 4)
    effects.feature_covariance.copy_(spread @ spread.T / 4 + 0.1 * torch.eye(4))
    rows = torch.linalg.qr(torch.randn(256, 8))[0].T
    effects.readout.copy_(rows.reshape(8, *SHAPE))
    effects.readout_deviations.uniform_(0.2, 0.5)
    return denoiser, made


def predicted(denoiser, group, age=0.4, guide=False):
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    told = torch.tensor([[group, age]], dtype=torch.float32).expand(2, 2)
    with torch.no_grad():
        return denoiser(x, torch.tensor([50.0, 800.0]), Condition(told), guide)


@pytest.mark.parametrize("guide", [False, True])
@pytest.mark.parametrize("network", ["resnet", "unet"])
def test_a_new_level_changes_nothing_and_is_what_it_is_taken_for(network, guide):
    denoiser, made = base(network)
    grown, card = with_level(denoiser, made, GROWN, "disease", "b")
    assert card.encoding.level_counts == [3, 0]
    for group in (0.0, 1.0):
        for age in (0.4, float("nan")):
            torch.testing.assert_close(
                predicted(grown, group, age, guide), predicted(denoiser, group, age, guide), rtol=1e-3, atol=1e-3
            )
    torch.testing.assert_close(
        predicted(grown, 2.0, guide=guide), predicted(grown, 1.0, guide=guide), rtol=1e-3, atol=1e-3
    )
    assert not torch.allclose(predicted(grown, 2.0, guide=guide), predicted(grown, 0.0, guide=guide), atol=1e-2)


def test_without_a_like_level_it_is_the_mean_of_all():
    denoiser, made = base()
    grown, _ = with_level(denoiser, made, GROWN, "disease", None)
    effects = denoiser.effects.effects
    torch.testing.assert_close(grown.effects.effects[2], 0.75 * effects[0] + 0.25 * effects[1])
    torch.testing.assert_close(grown.effects.effects[3:], effects[2:])


def test_a_network_that_cannot_be_told_of_it_is_refused():
    made = DenoiserCard(settings("published"), SHAPE, KNOWN, 0)
    with pytest.raises(UserError, match="published cannot be told of a further level"):
        with_level(made.build(), made, GROWN, "disease", None)


def study(folder, levels, **rare):
    return config.parse_study(
        {
            "study": "rare",
            "cohort": {"source": "simulated"},
            "covariates": {"disease": {"levels": levels}, "age": {"unit": "year", "range": [0, 1]}},
            "preprocess": {"shape": [16, 16, 16], "spacing_mm": 10},
            "autoencoder": {
                **{"network": "resnet", "channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4},
                "optimiser": {"steps": 0},
            },
            "decoder": {"network": None},
            "diffusion": {
                **{"channels": [8, 16], "norm_num_groups": 4, "num_head_channels": 8, "num_res_blocks": 1},
                **({"rare": {"covariate": "disease", "level": "rare", **rare}} if rare is not None else {}),
            },
            "init_from": {"path": str(folder), "models": ["autoencoder", "diffusion"]},
            "plan": [{"name": "syn", "subjects": 4}],
            "release": {"licence": "CC0-1.0"},
        },
        "test",
    )


def test_a_model_release_is_taken_over_with_the_level(tmp_path):
    denoiser, made = base()
    save_denoiser(denoiser, made, tmp_path / "models/diffusion", {})
    given_by = study(tmp_path / "models", ["a", "b", "rare"], like="a")
    only = given_by.init_from.model_copy(update={"models": ["diffusion"]})
    convert(only, Sections.of_study(given_by), tmp_path / "init")
    grown, card, _ = load_denoiser(tmp_path / "init/diffusion")
    assert card.encoding.levels["disease"] == ("a", "b", "rare")
    torch.testing.assert_close(predicted(grown, 2.0), predicted(denoiser, 0.0), rtol=1e-3, atol=1e-3)
    for levels in (["rare", "a", "b"], ["a", "c", "rare"], ["a", "rare"]):
        wrong = study(tmp_path / "models", levels, like=None)
        with pytest.raises(UserError, match=r"levels in the same order, and rare as the last of disease"):
            convert(only, Sections.of_study(wrong), tmp_path / "wrong")


def cohort(latents, groups, grown):  # noqa: F811
    """Latents whose training rows are of these groups, at one age each, with what the base knows of latents."""
    covariates = np.zeros((len(latents.covariates), 2), np.float32)
    covariates[:, 1] = np.linspace(0, 1, len(covariates))
    covariates[latents.train_rows, 0] = [groups[i % len(groups)] for i in range(len(latents.train_rows))]
    prior = {name: torch.from_numpy(value) for name, value in grown.prior().items()}
    return dataclasses.replace(latents, covariates=covariates, prior=prior)


def test_batches_have_the_rare_level_and_what_the_base_draws(latents, fabric):  # noqa: F811
    grown, _ = with_level(*base(), GROWN, "disease", "a")
    data = cohort(latents, [2.0, 0.0, 0.0, 0.0], grown)
    rare = config.Rare(covariate="disease", level="rare", share=0.5, preserved=40)
    rehearsal = Rehearsal(rare, data, GROWN, grown, "seed", fabric)
    assert set(rehearsal.known[:, 0]) <= {0.0, 1.0}, "the base is never asked for what it does not know"
    again = Rehearsal(rare, data, GROWN, grown, "seed", fabric)
    np.testing.assert_array_equal(rehearsal.drawn, again.drawn)
    generator = np.random.default_rng(0)
    batches = [rehearsal.batch(step, 8, generator) for step in range(30)]
    assert all((batch.covariates[:, 0] == 2.0).sum() == 4 for batch in batches)
    drawn = {row.tobytes() for row in rehearsal.drawn}
    seen = [row.tobytes() in drawn for batch in batches for row in batch.latents]
    others = len(rehearsal.others)
    assert abs(sum(seen) / (4 * 30) - 40 / (40 + others)) < 0.1
    assert not any(row.tobytes() in drawn for batch in batches for row in batch.latents[:4])


def test_what_is_drawn_is_what_the_base_draws_at_these_covariates(latents, fabric):  # noqa: F811
    """Effects of covariates alone: latents drawn for `a` and `b` lie about the effects of these."""
    made = DenoiserCard(settings(), SHAPE, KNOWN, 5)
    denoiser = made.build().requires_grad_(False).eval()  # starts at zero: the closed form is all
    denoiser.effects.effects[0], denoiser.effects.effects[1] = 3.0, -3.0
    denoiser.effects.feature_mean[:2] = 0.5
    denoiser.effects.deviation.fill_(0.1)
    grown, _ = with_level(denoiser, made, GROWN, "disease", "a")
    rare = config.Rare(covariate="disease", level="rare", preserved=30)
    rehearsal = Rehearsal(rare, cohort(latents, [2.0], grown), GROWN, grown, "seed", fabric)
    means = rehearsal.drawn.reshape(30, -1).mean(1)
    asked = rehearsal.known[:, 0]
    assert {0.0, 1.0} == set(asked) and np.abs(means - np.where(asked == 0.0, 3.0, -3.0)).max() < 0.2


def test_what_the_base_draws_keeps_its_other_levels(latents, fabric, tmp_path):  # noqa: F811
    """Scans of the rare level alone. Of latents that the base draws anew, the network goes on predicting nearly what it
    did; without such latents in its training it forgets them.
    """
    grown, _ = with_level(*base(), GROWN, "disease", "a")
    asked = config.Rare(covariate="disease", level="rare", preserved=16)
    fresh = Rehearsal(asked, cohort(latents, [2.0], grown), GROWN, grown, "another seed", fabric)
    x, told = torch.from_numpy(fresh.drawn), Condition(torch.from_numpy(fresh.known))
    times = torch.linspace(100.0, 900.0, len(x))
    noisy = grown.process.add_noise(x, torch.randn_like(x), times)
    moved = {}
    for preserved, share in ((200, 0.5), (1, 0.9)):
        chosen = settings(like="a", preserved=preserved, share=share)
        optimiser = chosen.optimiser.model_copy(update={"steps": 200, "learning_rate": 3e-3, "batch_size": 16})
        chosen = chosen.model_copy(update={"optimiser": optimiser})
        task = DiffusionTask(chosen, cohort(latents, [2.0], grown), GROWN, "seed", fabric, grown)
        loop.fit(task, optimiser, fabric, tmp_path / str(preserved), "test")
        with torch.no_grad():
            after, before = (network(noisy, times, told) for network in (task.modules["model"], grown))
        moved[preserved] = float((after - before).square().mean().sqrt())
    assert 0.0 < moved[200] < 0.85 * moved[1]


def test_a_training_resumes_to_the_same_weights(latents, fabric, tmp_path):  # noqa: F811
    def run(folder):
        grown, _ = with_level(*base(), GROWN, "disease", "a")
        task = DiffusionTask(
            settings(like="a", preserved=8), cohort(latents, [2.0, 1.0], grown), GROWN, "seed", fabric, grown
        )
        loop.fit(task, task.settings.optimiser, fabric, folder, "test")
        return weights_digest(task.modules["average"].state_dict())

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts")
    for late in sorted((tmp_path / "parts").glob("step-*.safetensors"))[1:]:
        late.unlink()
    assert run(tmp_path / "parts") == whole


def test_a_cohort_without_the_level_or_without_company_is_refused(latents, fabric):  # noqa: F811
    grown, _ = with_level(*base(), GROWN, "disease", "a")
    for groups, preserved, message in (([0.0], 10, "no training scan has disease rare"), ([2.0], 0, "preserved")):
        rare = config.Rare(covariate="disease", level="rare", preserved=preserved)
        with pytest.raises(UserError, match=message):
            Rehearsal(rare, cohort(latents, groups, grown), GROWN, grown, "seed", fabric)


def test_a_study_says_what_is_wrong_with_its_rare_level(tmp_path):
    for rare, message in (
        ({"covariate": "age"}, "age is no categorical covariate"),
        ({"level": "none"}, "add it last"),
        ({"like": "rare"}, r"expected one of \['a', 'b'\]"),
    ):
        with pytest.raises(UserError, match=message):
            study(tmp_path, ["a", "b", "rare"], **rare)
    with pytest.raises(UserError, match="a handful of scans teach"):
        content = study(tmp_path, ["a", "b", "rare"], like="a").model_dump(mode="json")
        content["init_from"]["models"] = ["autoencoder"]
        config.parse_study(content | {"diffusion": content["diffusion"] | {"optimiser": {"steps": 5}}}, "test")
