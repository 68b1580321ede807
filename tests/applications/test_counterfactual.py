"""Counterfactuals and interpolation with a denoiser whose answer is known, and what is measured of them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from meddiff_steps.applications import guides as guiding
from meddiff_steps.applications.counterfactual import counterfactuals
from meddiff_steps.applications.guides import image_guides, latent_guides
from meddiff_steps.applications.interpolation import interpolate
from meddiff_steps.applications.scans import chosen_scans, sweep, unseen, with_split
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.config import CategoricalCovariate, Compute, ContinuousCovariate, Counterfactual
from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.guidance import ClassifierGuidance
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.evaluation.counterfactual import figures, table
from meddiff_steps.imaging.selection import Images
from meddiff_steps.instruments.latent_predictors import fit_latent_predictor
from meddiff_steps.models.trained import TrainedModel

COVARIATES: dict[str, Any] = {
    "size": ContinuousCovariate(unit="mL", range=(-10, 10)),
    "sex": CategoricalCovariate(levels=["F", "M"]),
}
SHAPE, STD = (1, 4, 4, 4), 0.5
SUBJECTS = pd.DataFrame({"size": [-1.0, 1.0], "sex": ["F", "M"], "subject_id": ["sub-a", "sub-b"]})


class Exact(TrainedModel):
    """Latents are images; each voxel is N(encoded size, STD^2), and the denoiser knows it."""

    def __init__(self, prediction_type: str = "v_prediction") -> None:
        settings = SimpleNamespace(
            prediction_type=prediction_type,
            num_train_timesteps=1000,
            schedule="scaled_linear",
            beta_start=0.0015,
            beta_end=0.0205,
            zero_terminal_snr=False,
        )
        self.process, self.card = NoiseProcess.of(settings), SimpleNamespace(few_step=None)
        # Of mean 0 and spread 1, so that encoded sizes are sizes.
        training = pd.DataFrame({"size": [-1.0, 1.0] * 500, "sex": ["F", "M"] * 500})
        self.encoding = CovariateEncoding.fit(training, COVARIATES)
        self.latent_shape, self.spatial_dims = SHAPE, 3
        self.denoiser: Any = SimpleNamespace(text=None)  # it knows no texts
        self.fabric: Any = SimpleNamespace(device=torch.device("cpu"), to_device=lambda value: value)

    def encode(self, images: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(images)

    def decode(self, latents: Tensor, noise: Tensor | None = None, slab: int | None = None) -> Tensor:
        return latents

    def mean_images(self, latents: Tensor) -> Tensor:
        return latents

    def denoise(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = (v.reshape(-1, 1, 1, 1, 1).to(x.dtype) for v in self.process.alpha_sigma(timesteps))
        mean = torch.nan_to_num(condition.covariates[:, 0]).reshape(-1, 1, 1, 1, 1)
        x0 = mean + alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * (x - alpha * mean)
        return self.process.target(x0, torch.where(sigma > 0, (x - alpha * x0) / sigma, 0.0), timesteps)


def scans() -> np.ndarray:
    rng = np.random.default_rng(0)
    means = np.array([-1.0, 1.0]).reshape(2, 1, 1, 1, 1)
    return (means + STD * rng.standard_normal((2, *SHAPE))).astype(np.float32)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow"])
def test_the_moved_covariate_follows_and_the_rest_stays(prediction_type: str) -> None:
    """The exact flow of shifted Gaussians carries a scan from one mean to another and keeps its pattern."""
    settings = Counterfactual(covariate="size", depth=1.0, guidance_scale=1.0, num_inference_steps=100)
    images = scans()
    made = counterfactuals(Exact(prediction_type), images, SUBJECTS, [-1.0, 0.5, 2.0], settings)
    np.testing.assert_array_equal(made.decoded, images)
    np.testing.assert_allclose(made.returned, images, atol=2e-3)
    for row, own in enumerate([-1.0, 1.0]):
        for column, value in enumerate([-1.0, 0.5, 2.0]):
            np.testing.assert_allclose(made.moved[row, column], images[row] + value - own, atol=0.03)


def test_depth_bounds_the_change_and_guidance_enlarges_it() -> None:
    def change(**settings: Any) -> float:
        chosen = Counterfactual(covariate="size", num_inference_steps=50, **settings)
        made = counterfactuals(Exact(), scans(), SUBJECTS, [2.0], chosen)
        return float((made.moved[:, 0] - made.returned).mean())

    shallow, half, deep = (change(depth=depth, guidance_scale=1.0) for depth in (0.05, 0.4, 1.0))
    assert 0 < shallow < 0.35 < half < deep
    assert change(depth=0.4, guidance_scale=2.0) > 1.2 * half


def test_a_scan_is_what_it_is_whatever_stands_beside_it() -> None:
    settings = Counterfactual(covariate="size", num_inference_steps=10)
    both = counterfactuals(Exact(), scans(), SUBJECTS, [0.0], settings)
    alone = counterfactuals(Exact(), scans()[1:], SUBJECTS[1:], [0.0], settings)
    np.testing.assert_array_equal(both.moved[1:], alone.moved)


def test_a_report_is_told_on_no_way_for_it_says_what_the_covariate_was(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[pd.DataFrame] = []
    plain = Exact.condition
    monkeypatch.setattr(Exact, "condition", lambda self, subjects: told.append(subjects) or plain(self, subjects))
    settings, subjects = Counterfactual(covariate="size", num_inference_steps=5), SUBJECTS.assign(text="No atrophy.")
    counterfactuals(Exact(), scans(), subjects, [0.0], settings)
    interpolate(Exact(), scans(), subjects, [0.5], settings)
    assert len(told) == 6 and not any("text" in subject for subject in told)


def test_a_classifier_moves_a_scan_that_the_model_is_told_nothing_about() -> None:
    """Its training latents say how latents go with size; the condition, a label, does not."""
    rng = np.random.default_rng(1)
    sizes = rng.uniform(-2, 2, 200).astype(np.float32)
    latents = sizes.reshape(-1, 1, 1, 1, 1) + STD * rng.standard_normal((200, *SHAPE)).astype(np.float32)
    predictor = fit_latent_predictor(latents, sizes, levels=0, subjects=np.arange(200))
    found = latents.reshape(200, -1) @ predictor.weights.numpy() + predictor.bias.numpy()
    assert np.corrcoef(found[:, 0], sizes)[0, 1] > 0.97
    guide = ClassifierGuidance(predictor.log_probability(2.0, categorical=False), scale=1.0)
    settings = Counterfactual(covariate="sex", guidance_scale=1.0, num_inference_steps=30)
    made = counterfactuals(Exact(), scans(), SUBJECTS, ["M", "M"], settings, [(), (guide,)])
    plain, guided = made.moved[:, 0].mean(), made.moved[:, 1].mean()
    assert abs(plain - made.returned.mean()) < 0.01 and guided > plain + 0.3


def test_a_label_is_predicted_from_latents() -> None:
    rng = np.random.default_rng(2)
    level = rng.integers(0, 3, 150).astype(np.float32)
    latents = rng.standard_normal((150, 3, 2, 2)).astype(np.float32)
    latents[np.arange(150), level.astype(int)] += 2.0
    level[:5] = np.nan
    predictor = fit_latent_predictor(latents, level, levels=3, subjects=np.arange(150))
    probability = torch.stack(
        [predictor.log_probability(k, True)(torch.from_numpy(latents)).exp() for k in (0.0, 1.0, 2.0)], 1
    )
    np.testing.assert_allclose(probability.sum(1), 1.0, rtol=1e-5)
    assert (probability.argmax(1).numpy()[5:] == level[5:]).mean() > 0.9


def test_a_predictor_is_as_unsure_as_it_is_of_other_people() -> None:
    """Ten scans each, nearly alike: a scan whose twins are known is told well, another person is not."""
    rng = np.random.default_rng(0)
    people, sizes = rng.standard_normal((60, 4, 8, 8)), rng.standard_normal(60)
    scans_ = np.repeat(people, 10, 0) + 0.3 * rng.standard_normal((600, 4, 8, 8))
    predictor = fit_latent_predictor(scans_, np.repeat(sizes, 10), 0, np.repeat(np.arange(60), 10))
    others = rng.standard_normal((500, 256)) @ predictor.weights.numpy() + predictor.bias.numpy()
    error = float((others[:, 0] - rng.standard_normal(500)).std())
    assert float(predictor.spread[0]) == pytest.approx(error, rel=0.2)


def test_guidance_learns_from_whole_people_of_all_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """People of one level come first by id; a level that nobody has is refused."""
    seen: dict[str, Any] = {}

    def fitted(z: np.ndarray, encoded: np.ndarray, levels: int, subjects: np.ndarray) -> Any:
        seen.update(encoded=encoded, subjects=subjects)
        return SimpleNamespace(log_probability=lambda *_: None)

    monkeypatch.setattr(guiding, "fit_latent_predictor", fitted)
    monkeypatch.setattr(guiding, "MAX_LATENTS", 40)
    monkeypatch.setattr(guiding, "LEAST_PEOPLE", 2)
    names = [f"p{i // 2:02d}-{i % 2}" for i in range(80)]
    table = pd.DataFrame({"scan_id": names, "sex": ["F"] * 40 + ["M"] * 40, "split": "train"})
    table["subject_id"] = table["scan_id"].str[:3]
    columns = {"scan_id": names, "variant": [0] * 80}
    shards: Any = SimpleNamespace(
        column=lambda name: columns[name], tensors=lambda _, rows: np.zeros((len(rows), 1, 2, 2))
    )
    training = Images(shards, table, "scan_id", "subject_id", "manifest")
    scale = {"offset": np.zeros(1, np.float32), "scale": np.ones(1, np.float32)}
    encoding = CovariateEncoding({"sex": CategoricalCovariate(levels=["F", "M", "X"])}, {}, {})
    settings = Counterfactual(covariate="sex", classifier_guidance=1.0)
    latent_guides(settings, ["F", "M"], training, shards, scale, encoding)
    assert len(seen["encoded"]) == 40 and set(seen["encoded"]) == {0.0, 1.0}
    assert (np.unique(seen["subjects"], return_counts=True)[1] == 2).all()
    with pytest.raises(UserError, match=r"sex: \['X'\] is asked for, but the 40 training scans .* have \['F', 'M'\]"):
        latent_guides(settings, ["F", "X"], training, shards, scale, encoding)


def test_interpolation_goes_from_one_scan_to_the_other() -> None:
    settings = Counterfactual(covariate="size", guidance_scale=1.0, depth=1.0, num_inference_steps=100)
    images = scans()
    path = interpolate(Exact(), images, SUBJECTS, [0.0, 0.25, 0.5, 1.0], settings)
    np.testing.assert_allclose(path[0], images[0], atol=2e-3)
    np.testing.assert_allclose(path[-1], images[1], atol=2e-3)
    means = path.mean(axis=(1, 2, 3, 4))
    assert (np.diff(means) > 0).all() and abs(means[2]) < 0.3
    # On the sphere, so that the way between is as lively as its ends.
    assert path[2].std() > 0.7 * min(path[0].std(), path[-1].std())


# ------------------------------------------------------------------------------------------------ which scans


def manifest() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "scan_id": ["sub-c_T1w", "sub-a_T1w", "sub-b_ses-1_T1w", "sub-b_ses-2_T1w"],
            "subject_id": ["sub-c", "sub-a", "sub-b", "sub-b"],
            "split": ["test", "test", "train", "train"],
        }
    )


def test_scans_by_name_by_subject_or_of_the_test_split() -> None:
    assert chosen_scans(manifest(), [], 1)["scan_id"].tolist() == ["sub-a_T1w"]
    assert chosen_scans(manifest(), ["b", "sub-a_T1w"], 1)["scan_id"].tolist() == [
        *("sub-b_ses-1_T1w", "sub-b_ses-2_T1w", "sub-a_T1w")
    ]
    with pytest.raises(UserError, match=r"'sub-x' is no preprocessed scan .* sub-a_T1w"):
        chosen_scans(manifest(), ["sub-x"], 1)
    with pytest.raises(UserError, match="no preprocessed scan is in the test split"):
        chosen_scans(manifest()[2:], [], 1)


def test_named_scans_that_were_learnt_from_are_told_and_left_out_of_figures(caplog: pytest.LogCaptureFixture) -> None:
    named = manifest()[1:]
    found = chosen_scans(manifest(), named["scan_id"].tolist(), 1)
    assert "counterfactual.scans: 2 of 3 scans are of the split train (2), which was learnt from" in caplog.text
    rows = with_split(pd.DataFrame({"scan_id": found["scan_id"].repeat(2), "value": 1.0}), found)
    assert rows["split"].tolist() == ["test"] * 2 + ["train"] * 4
    new = unseen(rows)
    assert list(new) == ["scan_id", "value"] and set(new["scan_id"]) == {"sub-a_T1w"}


def test_of_slices_every_subject_has_its_share_from_all_of_the_head() -> None:
    table = pd.DataFrame(
        [
            {"scan_id": f"{subject}_{number:02d}", "subject_id": subject, "split": "test"}
            for subject, count in (("a", 10), ("b", 1), ("c", 4))
            for number in range(count)
        ]
    ).sample(frac=1, random_state=0)
    assert chosen_scans(table, [], 2)["scan_id"].tolist() == ["a_05", "b_00"]
    assert chosen_scans(table, [], 5)["scan_id"].tolist() == ["a_02", "a_07", "b_00", "c_01", "c_03"]
    assert chosen_scans(table, [], 100)["scan_id"].tolist() == sorted(table["scan_id"])


def test_a_sweep_stays_inside_what_was_trained_on() -> None:
    training = pd.DataFrame({"size": np.linspace(-10, 10, 101), "sex": ["F", "M", None] * 33 + ["F", "M"]})
    values = sweep(Counterfactual(covariate="size", sweep_steps=3), COVARIATES, training)
    assert values == pytest.approx([-9.4, 0.0, 9.4], abs=1e-6)
    assert sweep(Counterfactual(covariate="size", values=[1, 2]), COVARIATES, training) == [1, 2]
    assert sweep(Counterfactual(covariate="sex"), COVARIATES, training) == ["F", "M"]
    men = training.assign(sex="M")
    assert sweep(Counterfactual(covariate="sex"), COVARIATES, men) == ["M"]
    with pytest.raises(UserError, match="only have \\['M'\\], so the model has not learnt it"):
        sweep(Counterfactual(covariate="sex", values=["F"]), COVARIATES, men)
    points = training.assign(size=np.arange(101) % 11)
    assert sweep(Counterfactual(covariate="size", sweep_steps=4), COVARIATES, points) == [0, 3, 7, 10]
    days = training.assign(size=20240101.0 + np.arange(101) % 4)
    assert sweep(Counterfactual(covariate="size", sweep_steps=4), COVARIATES, days) == [20240101 + i for i in range(4)]
    near = sweep(
        Counterfactual(covariate="size", sweep_steps=3), COVARIATES, training.assign(size=5 + 1e-6 * training["size"])
    )
    assert len(set(near)) == 3
    fields = training.assign(size=np.where(np.arange(101) % 2, 1.5, 3.0))
    assert sweep(Counterfactual(covariate="size", sweep_steps=5), COVARIATES, fields) == [1.5, 3.0]


def test_values_outside_the_training_scans_are_told(caplog) -> None:
    training = pd.DataFrame({"size": np.linspace(-10, 10, 101)})
    assert sweep(Counterfactual(covariate="size", values=[0, 11]), COVARIATES, training) == [0, 11]
    assert "[11.0] of size, but the training scans are in [-10, 10]: the model has not learnt it" in caplog.text
    with pytest.raises(UserError, match="not set, so nothing is moved"):
        sweep(Counterfactual(), COVARIATES, training)


# ------------------------------------------------------------------------------------------------ figures


def measured(follow: float, drift: float) -> pd.DataFrame:
    """Planted: of the change asked for, a share `follow` is measured; the way back makes sizes 0.5 larger."""
    n, values = 12, [-4.0, 0.0, 4.0]
    own = np.linspace(-3, 3, n)
    subjects = pd.DataFrame({"subject_id": [f"s{i}" for i in range(n)], "size": own})
    moved = (own + 0.5)[:, None] + follow * (np.array(values)[None] - own[:, None])
    columns: dict[str, dict[str, np.ndarray]] = {
        "scan": {"size": own, "age": np.full(n, 50.0)},
        "returned": {"size": own + 0.5, "age": np.full(n, 50.2)},
        "moved": {"size": moved, "age": np.full((n, 3), 50.2 + drift)},
    }
    identity = {"returned": np.full(n, 0.9), "moved": np.full((n, 3), 0.8)}
    return table([f"scan{i}" for i in range(n)], subjects, "size", values, columns, identity)


def test_figures_are_those_that_were_planted() -> None:
    covariates = COVARIATES | {"age": ContinuousCovariate(unit="year", range=(0, 100))}
    found = figures(measured(0.6, 1.0), "size", covariates, resamples=50, seed="x")
    assert found["moved"]["slope_of_change"]["value"] == pytest.approx(0.6)
    assert found["moved"]["slope"]["value"] == pytest.approx(0.6)
    assert found["others"]["age"]["value"] == pytest.approx(1.0)
    assert found["others"]["age"]["floor"]["value"] == pytest.approx(0.2)
    assert found["others"]["age"]["unit"] == "year"
    assert found["identity"]["value"] == pytest.approx(0.8) and found["identity"]["ceiling"]["value"] == pytest.approx(
        0.9
    )
    nothing = figures(measured(0.0, 0.0), "size", covariates, resamples=50, seed="x")
    assert abs(nothing["moved"]["r"]["value"]) < 1e-9 and nothing["others"]["age"]["value"] == 0.0


# --------------------------------------------------------------------------------------- networks of the user's own


class MeanOf(torch.nn.Module):
    """A number: the mean of an image; or logits of two levels, far apart."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: Tensor) -> Tensor:
        mean = images.flatten(1).mean(1, keepdim=True)
        return torch.cat([mean, -mean, mean][: self.outputs], 1) if self.outputs > 1 else mean


def given(path: Path, outputs: int = 1) -> str:
    torch.jit.script(MeanOf(outputs)).save(str(path))
    return str(path)


def test_a_network_of_the_users_own_moves_a_scan_that_the_model_is_told_nothing_about(tmp_path: Path) -> None:
    settings = Counterfactual(
        covariate="sex",
        guidance_scale=1.0,
        num_inference_steps=30,
        classifier_guidance=0.4,
        predictor=given(tmp_path / "p.pt"),
    )
    declared = ContinuousCovariate(unit="mL", range=(-10, 10))
    held_out = scans().repeat(3, axis=0)
    known = pd.Series(held_out.mean(axis=(1, 2, 3, 4)) + [0.1, -0.1] * 3)
    model = Exact()
    guides = image_guides(settings, [2.0, -2.0], declared, model, held_out, known)
    # The deviation of the network about the truth is the unit that its value is wrong in: 0.1.
    latents = torch.full((1, *SHAPE), 0.5)
    (guide,) = guides[0]
    assert guide.log_probability(latents).item() == pytest.approx(-0.5 * (1.5 / 0.1) ** 2, rel=1e-4)
    moved = counterfactuals(model, scans(), SUBJECTS, ["M", "M"], settings, guides).moved
    plain = counterfactuals(model, scans(), SUBJECTS, ["M", "M"], settings).moved
    assert moved[:, 0].mean() > plain[:, 0].mean() + 0.2
    assert moved[:, 1].mean() < plain[:, 1].mean() - 0.2


def test_logits_of_levels_guide_as_their_softmax_says(tmp_path: Path) -> None:
    settings = Counterfactual(covariate="sex", classifier_guidance=1.0, predictor=given(tmp_path / "p.pt", 2))
    declared = CategoricalCovariate(levels=["F", "M"])
    ((first,), (second,)) = image_guides(settings, ["F", "M"], declared, Exact(), scans(), pd.Series(["F", "M"]))
    latents = torch.full((1, *SHAPE), 0.5)
    assert first.log_probability(latents).item() == pytest.approx(float(np.log(1 / (1 + np.exp(-1.0)))), rel=1e-5)
    assert second.log_probability(latents).exp() + first.log_probability(latents).exp() == pytest.approx(1.0)


def test_a_network_that_says_something_else_is_refused(tmp_path: Path) -> None:
    declared, known = CategoricalCovariate(levels=["F", "M"]), pd.Series([1.0, 2.0])
    three = Counterfactual(covariate="sex", classifier_guidance=1.0, predictor=given(tmp_path / "p.pt", 3))
    guides = image_guides(three, ["F"], declared, Exact(), scans(), known)
    with pytest.raises(UserError, match=r"gives \(1, 3\) for 1 images, expected \(1, 2\): a logit for each of"):
        guides[0][0].log_probability(torch.zeros(1, *SHAPE))
    number = ContinuousCovariate(unit="mL", range=(-10, 10))
    with pytest.raises(UserError, match=r"expected \(1, 1\): the covariate in its unit"):
        image_guides(three, [1.0], number, Exact(), scans().repeat(2, axis=0), pd.Series([1.0, 2.0] * 2))
    one = three.model_copy(update={"predictor": given(tmp_path / "one.pt")})
    with pytest.raises(UserError, match="2 validation scans have a sex, expected at least 3"):
        image_guides(one, [1.0], number, Exact(), scans(), known)
    with pytest.raises(UserError, match="0 validation scans have a sex, expected at least 3"):
        image_guides(one, [1.0], number, Exact(), scans(), pd.Series([np.nan, np.nan]))
    with pytest.raises(ValueError, match="classifier_guidance, its weight, is 0"):
        Counterfactual(covariate="sex", predictor="p.pt")


def test_scans_keep_their_grey_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The curve of generated images is not for what is made of scans."""
    step, asked = import_module("meddiff_steps.steps.counterfactual"), dict[str, Any]()

    def load(*_: Any, **wanted: Any) -> Any:
        asked.update(wanted)
        raise InterruptedError

    cohort = SimpleNamespace(shards=SimpleNamespace(tensors=lambda *_: scans()), table=manifest().assign(row=0))
    cohort.of_splits = lambda splits: cohort
    study = SimpleNamespace(counterfactual=Counterfactual(covariate="sex", values=["F"]), covariates=COVARIATES)
    study.compute = Compute(device="cpu", precision="32-true")
    monkeypatch.setattr(step, "load_stage", lambda *_: study)
    monkeypatch.setattr(step, "Images", SimpleNamespace(of_scans=lambda *_: cohort))
    monkeypatch.setattr(step, "sweep", lambda *_: ["F"])
    monkeypatch.setattr(step, "TrainedModel", SimpleNamespace(load=load))
    path = Path("x")
    with pytest.raises(InterruptedError):
        step.run(path, path, path, [path], path, path, path, path, path)
    assert asked["toned"] is False
