"""Anomaly maps with a model whose answers are known, and thresholds that hold in people they were not taken from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_inpainting import SHAPE, STD, Exact

from meddiff_steps.applications.anomaly import (
    ENSEMBLE,
    Calibration,
    Head,
    Mapped,
    calibrated,
    finished,
    members_of,
    planted,
    score,
    warn_of_scans_each,
)
from meddiff_steps.applications.anomaly_maps._tiles import masks
from meddiff_steps.applications.anomaly_maps.base import Context, Finding, Scan, build
from meddiff_steps.applications.anomaly_maps.coarse_noise import coarse
from meddiff_steps.applications.anomaly_maps.healing import on_grid, surprise
from meddiff_steps.applications.anomaly_maps.modality_cycles import Cycle, cycled
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import Anomaly, Compute, Translation
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import philox
from meddiff_steps.diffusion.guidance import ClassifierGuidance
from meddiff_steps.models.image_to_image import ImageToImage

#: The world of `Exact`: voxels are N(0.5, 0.1^2), independent, where size is 1; N(0.4, 0.1^2) where it is not known.
HEALTHY = {"size": 1.0}
LESION = np.zeros(SHAPE[1:], bool)
LESION[2:4, 2:4, 1:3] = True


def settings(*methods: str, **changes: Any) -> Anomaly:
    usual: dict[str, Any] = {"num_inference_steps": 60, "samples": 60, "depths": [0.5], "healthy": HEALTHY}
    return Anomaly(methods=list(methods), **(usual | changes))


def scan(number: int = 0, contrast: float = 0.5) -> Scan:
    image = 0.5 + STD * np.random.default_rng(number).standard_normal(SHAPE)
    image = np.where(LESION, 0.5 + contrast, image).astype(np.float32)
    return Scan(image, pd.DataFrame({"size": [np.nan], "subject_id": [f"sub-{number}"]}), f"x/{number}")


@pytest.mark.parametrize("name", ["gaussian_noise", "simplex_noise", "coarse_noise"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow"])
def test_noise_and_denoise_move_a_scan_towards_the_population_by_a_known_share(name: str, prediction_type: str) -> None:
    """The sampler's path in a Gaussian world: z -> m + (alpha (z - m) + sigma n) / sqrt(alpha^2 + sigma^2)."""
    model, wanted = Exact(prediction_type), settings(name)
    context, one = Context(model, wanted), scan()
    found = build(name, context)(one)
    assert list(found) == [""], "one depth has no variants"
    alpha, sigma = (float(v) for v in model.process.alpha_sigma(torch.tensor([context.timestep(0.5)])))
    share = 1 - alpha / np.hypot(alpha, sigma)
    expected = share * (one.image - 0.5)[0]
    tolerance = 6 * 0.1 * sigma / np.hypot(alpha, sigma) / np.sqrt(wanted.samples)
    if name == "gaussian_noise":
        np.testing.assert_allclose(found[""].difference, expected, atol=tolerance)
    assert found[""].difference[LESION].mean() == pytest.approx(0.5 * share, abs=tolerance)
    np.testing.assert_allclose(found[""].difference, (one.image - found[""].healed)[0], atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow"])
def test_patches_are_drawn_from_the_posterior_of_what_noise_leaves(prediction_type: str) -> None:
    """Voxels are independent, so what lies around says nothing: z -> m + alpha^2 / (alpha^2 + sigma^2) (z - m) in the
    mean, and what is left of the spread comes back as chance.
    """
    model, wanted = Exact(prediction_type), settings("patches", samples=60, patch_cells=3, num_inference_steps=40)
    context, one = Context(model, wanted), scan()
    found = build("patches", context)(one)[""]
    alpha, sigma = (float(v) for v in model.process.alpha_sigma(torch.tensor([context.timestep(0.5)])))
    share = sigma**2 / (alpha**2 + sigma**2)
    np.testing.assert_allclose(found.difference, share * (one.image - 0.5)[0], atol=6 * STD / np.sqrt(60))
    assert found.difference[LESION].mean() == pytest.approx(0.5 * share, abs=0.03)


def test_patches_cover_every_cell_once() -> None:
    for shape, cells in (((5, 7), 3), ((4, 4, 6), 4), ((3, 3, 3), 8)):
        found = masks(shape, cells)
        assert (found.sum(0) == 1).all() and len(found) == np.prod([-(-n // cells) for n in shape])


def test_a_patch_is_drawn_to_fit_what_lies_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network sees the others as they are: at every level they are the scan's, with that level's noise."""
    model, seen = Exact(), []
    denoise = model.denoise

    def watched(x: torch.Tensor, timesteps: torch.Tensor, *told: Any) -> torch.Tensor:
        seen.append((x.clone(), timesteps))
        return denoise(x, timesteps, *told)

    monkeypatch.setattr(model, "denoise", watched)
    one, wanted = scan(), settings("patches", samples=1, patch_cells=2, num_inference_steps=10)
    build("patches", Context(model, wanted))(one)
    latents, tiles = model.encode(one.image[None]), masks(SHAPE[1:], 2)
    for x, timesteps in seen[: len(seen) // 2]:
        alpha, sigma = (float(v[0]) for v in model.process.alpha_sigma(timesteps))
        left = (x[0] - alpha * latents[0]) / sigma
        assert left[0][torch.from_numpy(~tiles[0])].std() == pytest.approx(1.0, abs=0.35)


def test_depths_are_variants_and_their_mean_is_the_method() -> None:
    context = Context(Exact(), settings("gaussian_noise", depths=[0.2, 0.6], samples=20))
    found = build("gaussian_noise", context)(scan())
    assert list(found) == ["", "0.2", "0.6"]
    np.testing.assert_allclose(found[""].difference, (found["0.2"].difference + found["0.6"].difference) / 2, atol=1e-6)
    assert found["0.6"].difference[LESION].mean() > found["0.2"].difference[LESION].mean() > 0


def test_noise_is_keyed_by_the_scan() -> None:
    mapper = build("simplex_noise", Context(Exact(), settings("simplex_noise", samples=1, num_inference_steps=5)))
    first, second = mapper(scan())[""], mapper(scan())[""]
    np.testing.assert_array_equal(first.difference, second.difference)
    other = mapper(Scan(scan().image, scan().subject, "another"))[""]
    assert np.abs(other.difference - first.difference).max() > 1e-3


def test_a_counterfactual_of_health_differs_by_what_the_covariate_does() -> None:
    """There and back nothing changes; forward again with another mean, every latent moves by (1 - alpha) of it."""
    model = Exact()
    context = Context(model, settings("classifier_free", guidance_scale=1.0, inversion_depth=0.5))
    found = build("classifier_free", context)(scan())[""]
    (alpha, _) = (float(v) for v in model.process.alpha_sigma(torch.tensor([context.timestep(0.5)])))
    moved = float(model.condition(pd.DataFrame({"size": [1.0]})).covariates[0, 0]) * 0.1  # a latent is 10 grey values
    np.testing.assert_allclose(found.difference, -(1 - alpha) * moved, atol=2e-3)
    np.testing.assert_allclose(found.healed, scan().image + (1 - alpha) * moved, atol=0.01)


def test_a_classifiers_gradient_changes_what_it_looks_at() -> None:
    def log_probability(latents: torch.Tensor) -> torch.Tensor:
        return -2.0 * (latents * torch.from_numpy(LESION)).flatten(1).sum(1)

    guide = ClassifierGuidance(log_probability, scale=1.0)
    context = Context(Exact(), settings("classifier", healthy={"size": 1.0}), guides=(guide,))
    found = build("classifier", context)(scan())[""]
    base = float(np.median(found.difference[~LESION]))
    assert (found.difference[LESION] - base).min() > 5 * np.abs(found.difference[~LESION] - base).max()
    with pytest.raises(UserError, match="classifier needs the cohort's latents"):
        build("classifier", Context(Exact(), settings("classifier")))


def test_healing_draws_surprising_latents_anew_and_leaves_the_rest() -> None:
    model, wanted = Exact(), settings("healing", samples=40, num_inference_steps=25)
    reference = [scan(i, contrast=0.0) for i in range(1, 12)]
    context = Context(model, wanted, reference)
    one = scan(contrast=0.6)
    surprised = surprise(context, one)
    assert surprised[LESION].min() > np.percentile(surprised[~LESION], 95)
    found = build("healing", context)(one)[""]
    kept = np.abs(found.healed - one.image)[0] < 1e-5
    assert not kept[LESION].any() and kept[~LESION].mean() > 0.85
    assert found.healed[0][LESION].mean() == pytest.approx(0.5, abs=0.03), "as the healthy population is"
    assert found.difference[LESION].mean() > 0.5, "what surprises counts for more than its grey values"
    with pytest.raises(UserError, match="healing needs healthy scans in the val split"):
        build("healing", Context(model, wanted))


@pytest.mark.parametrize("cell", [1, 7, 14])
def test_a_cell_weighs_the_voxels_that_it_covers(cell: int) -> None:
    cells = np.zeros((16, 12))
    cells[cell, 5] = 1.0
    found = on_grid(cells, (64, 36))
    assert found.shape == (64, 36) and found.max() > 0.7
    places = np.average(np.indices(found.shape).reshape(2, -1), axis=1, weights=found.ravel())
    np.testing.assert_allclose(places, [4 * cell + 1.5, 3 * 5 + 1])


def test_coarse_noise_has_blobs_of_its_cells() -> None:
    field = np.stack([coarse((2, 32, 24), 4, philox("x", str(i))) for i in range(20)]).astype(float)
    assert np.square(field).mean() == pytest.approx(1.0, rel=1e-4)
    at = [float((field[..., lag:] * field[..., : 24 - lag]).mean()) for lag in (1, 4, 8)]
    assert at[0] > 0.7 and abs(at[2]) < 0.15 and at[0] > at[1] > at[2]


# ------------------------------------------------------------------------------------------------ calibration


def people(count: int, seed: int, scans_each: int = 2) -> tuple[list[np.ndarray], list[Head], list[str]]:
    """Maps of healthy people, who differ in level: a head of 16 x 16 in 20 x 20, its rim without a map."""
    rng = np.random.default_rng(seed)
    whole, interior = np.zeros((2, 20, 20), bool)
    whole[2:18, 2:18], interior[3:17, 3:17] = True, True
    maps, subjects = [], []
    for person in range(count):
        level = 0.3 * rng.standard_normal()
        for _ in range(scans_each):
            maps.append(np.where(interior, level + rng.standard_normal((20, 20)), np.nan))
            subjects.append(f"p{person}")
    return maps, [Head(whole, interior, 1.0)] * len(maps), subjects


def test_the_threshold_of_voxels_holds_in_people_it_was_not_taken_from() -> None:
    wanted = settings("gaussian_noise", voxel_false_positive_rate=0.02)
    calibration = Calibration.of(*people(60, 0), wanted)
    maps, heads, _ = people(60, 1)
    shares = [calibration.marked(calibration.scaled(m))[h.whole].mean() for m, h in zip(maps, heads, strict=True)]
    assert np.mean(shares) == pytest.approx(0.02, rel=0.25)
    own, heads, _ = people(60, 0)
    share = np.mean(
        [calibration.marked(calibration.scaled(m))[h.whole].mean() for m, h in zip(own, heads, strict=True)]
    )
    assert 0.019 < share <= 0.02, "never above the rate in those it was taken from"


def test_the_threshold_of_scores_holds_for_people_with_the_stated_probability() -> None:
    """19 people and a rate of 0.1: of a new person, some scan is flagged in one case of ten (exactly, by exchange)."""
    wanted, flagged = settings("gaussian_noise", subject_false_positive_rate=0.1), []
    for seed in range(60):
        maps, heads, subjects = people(29, seed)
        calibration = Calibration.of(maps[:38], heads[:38], subjects[:38], wanted)
        scores = [calibration.scored(one, wanted.score_share) for one in maps[38:]]
        flagged += [max(scores[i : i + 2]) > calibration.score_threshold for i in range(0, 20, 2)]
    assert np.mean(flagged) == pytest.approx(0.1, abs=0.035)


def test_which_scans_get_a_lesion_goes_with_no_session() -> None:
    """Scans in the order of their ids, two sessions of each person: half of each session's, or nearly."""
    ill = planted(64, "x/anomaly")
    assert len(ill) == 32 and list(ill.values()) == list(range(32)) and list(ill) == sorted(ill)
    assert 8 <= sum(position % 2 for position in ill) <= 24
    assert planted(64, "x/anomaly") == ill != planted(64, "y/anomaly") and len(planted(5, "x")) == 3


def test_people_with_many_more_scans_than_the_thresholds_come_from_are_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    two_each = [f"p{i // 2}" for i in range(18)]
    warn_of_scans_each(two_each, ["a"] * 4 + ["b"] * 3)
    assert not caplog.records
    warn_of_scans_each(two_each, ["a"] * 30)
    assert "people with 2 scans each, and those that are asked about have 30: more healthy" in caplog.text


def test_too_few_people_are_refused() -> None:
    with pytest.raises(UserError, match="needs healthy scans of 9 people in the calibration split, found 8"):
        Calibration.of(*people(8, 0), settings("gaussian_noise"))
    Calibration.of(*people(9, 0), settings("gaussian_noise"))
    with pytest.raises(UserError, match="0.9 needs healthy scans of 2 people"):
        Calibration.of(*people(1, 0), settings("gaussian_noise", subject_false_positive_rate=0.9))


def test_maps_are_scaled_by_healthy_voxels_and_scores_are_their_highest() -> None:
    maps, heads, subjects = people(20, 0)
    calibration = Calibration.of([3 * m + 5 for m in maps], heads, subjects, settings("gaussian_noise"))
    inside = np.concatenate([calibration.scaled(3 * m + 5)[h.interior] for m, h in zip(maps, heads, strict=True)])
    assert inside.mean() == pytest.approx(0.0, abs=1e-6) and inside.std() == pytest.approx(1.0, abs=1e-6)
    values = np.full((10, 10), np.nan)
    values[:5] = np.arange(50).reshape(5, 10)
    assert score(values, 0.1) == np.arange(45, 50).mean() and score(values, 1e-6) == 49


def test_the_ensemble_is_the_mean_in_units_of_healthy_people() -> None:
    wanted = settings("gaussian_noise", samples=4, num_inference_steps=8, margin_voxels=0, smoothing_voxels=0.0)
    mappers = {"gaussian_noise": build("gaussian_noise", Context(Exact(), wanted))}
    healthy = [Mapped.of(scan(i, contrast=0.0), mappers, wanted) for i in range(9)]
    calibrations, members = calibrated(healthy, [f"p{i}" for i in range(9)], wanted)
    assert members == members_of(wanted) == ["z_score", "asymmetry", "gaussian_noise"]
    one = Mapped.of(scan(20), mappers, wanted).with_ensemble(calibrations, members)
    expected = np.mean([calibrations[name].scaled(one.maps[name]) for name in members], axis=0)
    np.testing.assert_allclose(one.maps[ENSEMBLE], expected, atol=1e-5)
    found = calibrations[ENSEMBLE].scaled(one.maps[ENSEMBLE])
    assert found[LESION].mean() > np.nanmean(found[~LESION]) + 2
    assert set(calibrations) == {"z_score", "asymmetry", "intensity", "gaussian_noise", ENSEMBLE}


def test_the_ensemble_flags_no_more_newcomers_than_was_asked_for() -> None:
    """9 people, and eight members whose sizes differ from person to person: none of them is scored in his own units."""
    wanted, flagged = (
        settings(*"gaussian_noise simplex_noise coarse_noise classifier_free classifier healing".split()),
        [],
    )
    members, inside = members_of(wanted), np.ones((20, 20), bool)
    for seed in range(40):
        rng = np.random.default_rng(seed)

        def person(rng: np.random.Generator = rng) -> Mapped:
            maps = {name: np.exp(rng.standard_normal()) * rng.standard_normal((20, 20)) for name in members}
            return Mapped(scan(), Head(inside, inside, 1.0), maps, {})

        calibrations, _ = calibrated([person() for _ in range(9)], [f"p{i}" for i in range(9)], wanted)
        limit = calibrations[ENSEMBLE]
        for _ in range(20):
            new = person().with_ensemble(calibrations, members).maps[ENSEMBLE]
            flagged.append(limit.scored(new, wanted.score_share) > limit.score_threshold)
    assert 0.03 < np.mean(flagged) <= 0.12, "in units of themselves 30 %"


def test_a_map_ends_at_the_margin_and_knows_its_side() -> None:
    image = np.zeros((20, 20), np.float32)
    image[3:17, 3:17] = 0.5 + 0.05 * np.random.default_rng(0).standard_normal((14, 14))
    wanted = settings("gaussian_noise", margin_voxels=2, look_for="dark", smoothing_voxels=0.0)
    head = Head.of(image, 2)
    found = finished(np.full(image.shape, -0.1), head, wanted)
    assert np.isfinite(found).sum() == 10 * 10 and found[10, 10] == pytest.approx(0.1 / head.spread, rel=1e-5)


# ------------------------------------------------------------------------------------------- modality cycles

#: From -1 to 1: scans are N(0.1, SPREAD^2) at each voxel, the other contrast is LINK (scan - 0.1) + N(0, NOISE^2).
SPREAD, LINK, NOISE = 0.25, 0.8, 0.15
#: Squared correlation of both, and what is left of a scan's spread once the other contrast is known.
SHARED = (LINK * SPREAD) ** 2 / ((LINK * SPREAD) ** 2 + NOISE**2)
LEFT = SPREAD * np.sqrt(1 - SHARED)
PLANE = (16, 12)
SPOT = np.zeros(PLANE, bool)
SPOT[4:8, 4:8] = True


class Linear(ImageToImage):
    """The best of all networks for one of both contrasts given the other, where both are normal."""

    def __init__(self, slope: float, means: tuple[float, float], std: float) -> None:
        settings = Translation(source=["image"], target=["other"], block=4, channels=[8], num_res_blocks=1)
        super().__init__(settings, PLANE, 1, 1)
        self.slope, self.means, self.std = slope, means, std

    def predict(self, told: torch.Tensor, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (a.float().reshape(-1, 1, 1, 1) for a in self.process.alpha_sigma(timesteps))
        source, target = (self.in_blocks(torch.full((1, 1, *PLANE), mean)) for mean in self.means)
        mean, power = target + self.slope * (told - source), (alpha * self.std) ** 2 + sigma**2
        clean = mean + alpha * self.std**2 / power * (x - alpha * mean)
        return self.process.target(clean, (x - alpha * clean) / sigma, timesteps)

    def guess(self, sources: torch.Tensor) -> torch.Tensor:
        return self.means[1] + self.slope * (sources * 2.0 - 1.0 - self.means[0])


def cycle() -> Cycle:
    forward = Linear(LINK, (0.1, 0.0), NOISE).eval()
    back = Linear(SHARED / LINK, (0.0, 0.1), LEFT).eval()
    return Cycle(forward, back, make_fabric(Compute(device="cpu", precision="32-true"), threads=1))


def two_contrasts(number: int, lesion: float = 0.0) -> Scan:
    """A healthy person's, and a lesion that the scan alone shows."""
    rng = np.random.default_rng(number)
    scan = 0.1 + SPREAD * rng.standard_normal((1, *PLANE))
    other = LINK * (scan - 0.1) + NOISE * rng.standard_normal((1, *PLANE))
    images = ((1 + each) / 2 for each in (np.where(SPOT, lesion or scan, scan), other))
    image, contrast = (each.astype(np.float32) for each in images)
    return Scan(image, pd.DataFrame({"subject_id": ["a"]}), f"x/{number}", contrast)


def test_a_cycle_gives_back_what_both_contrasts_share() -> None:
    """In health the difference is (1 - r^2) (scan - mean), 0 in expectation; from the measured contrast it is what that
    leaves open: 0 in expectation, with a spread of sqrt(1 - r^2) of the scan's.
    """
    wanted = settings("modality_cycles", samples=12, num_inference_steps=20, patch_cells=2)
    mapper = cycled(cycle(), wanted)
    healthy = [two_contrasts(number) for number in range(8)]
    found = [mapper(one) for one in healthy]
    chance = LEFT / np.sqrt(12) / 2  # of a mean of draws, in grey values
    for one, each in zip(healthy, found, strict=True):
        assert list(each) == ["", "measured"]
        expected = (1 - SHARED) * (one.image[0] - 0.55)
        assert np.abs(each[""].difference - expected).max() < 5 * chance
        np.testing.assert_allclose(each[""].difference, (one.image - each[""].healed)[0], atol=1e-6)
    cycled_, measured = (np.stack([each[name].difference for each in found]) for name in ("", "measured"))
    spread = np.hypot((1 - SHARED) * SPREAD / 2, chance)
    assert abs(cycled_.mean()) < 4 * spread / np.sqrt(cycled_.size) and cycled_.std() == pytest.approx(spread, rel=0.1)
    spread = np.hypot(LEFT / 2, chance)
    assert abs(measured.mean()) < 4 * spread / np.sqrt(measured.size)
    assert measured.std() == pytest.approx(spread, rel=0.1)


def test_what_no_healthy_tissue_shows_is_highest_where_it_is() -> None:
    wanted = settings("modality_cycles", samples=12, num_inference_steps=20, patch_cells=2)
    one = two_contrasts(3, lesion=1.0)
    found = cycled(cycle(), wanted)(one)
    chance = LEFT / np.sqrt(12) / 2
    assert found[""].difference[SPOT].mean() == pytest.approx((1 - SHARED) * 0.45, abs=2 * chance)
    shown = {name: each.difference for name, each in found.items()}
    for name, difference in shown.items():
        assert difference[SPOT].mean() > np.abs(difference[~SPOT]).mean() + 2 * difference[~SPOT].std(), name
    # The other contrast has no lesion there, so that nothing of it comes back
    expected = 1.0 - (0.1 + SHARED / LINK * (2 * one.contrasts[0] - 1))[SPOT].mean()
    assert shown["measured"][SPOT].mean() == pytest.approx(expected / 2, abs=2 * chance)
    assert shown["measured"][SPOT].min() > shown["measured"][~SPOT].max()
    assert cycled(cycle(), wanted)(one)[""].difference == pytest.approx(shown[""], abs=0), "noise is keyed by the scan"


def test_tiles_of_a_cycle_are_drawn_beside_the_scan_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks outside of a tile are the scan's at every level, with that level's noise."""
    made, seen = cycle(), []
    predict = made.back.predict

    def watched(told: torch.Tensor, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen.append((x.clone(), timesteps))
        return predict(told, x, timesteps)

    monkeypatch.setattr(made.back, "predict", watched)
    wanted, one = settings("modality_cycles", samples=1, num_inference_steps=8, patch_cells=1), two_contrasts(0)
    made.drawn(one.image, one.contrasts, wanted, "x")
    blocks = made.back.in_blocks(torch.from_numpy(one.image)[None] * 2 - 1)
    tiles = masks(blocks.shape[2:], 1)
    for x, timesteps in seen:
        alpha, sigma = (float(v[0]) for v in made.back.process.alpha_sigma(timesteps))
        left = (x - alpha * blocks) / sigma
        assert len(x) == len(tiles)
        kept = torch.stack([each[:, torch.from_numpy(~tile)] for each, tile in zip(left, tiles, strict=True)])
        assert float(kept.std()) == pytest.approx(1.0, abs=0.1)


def test_a_cycle_without_networks_is_refused() -> None:
    with pytest.raises(UserError, match=r"modality_cycles needs the networks of both ways .* translation.cycle: true"):
        build("modality_cycles", Context(None, settings("modality_cycles")))


@pytest.mark.parametrize("depths", [[0.5], [0.3, 0.4, 0.5]])
def test_a_scan_takes_no_more_memory_than_is_asked_for(depths: list[float]) -> None:
    wanted, image = settings("gaussian_noise", "simplex_noise", "patches", depths=depths), scan()
    found = Finding(0.1 * image.image[0], image.image.copy())
    mappers: Any = dict.fromkeys(wanted.methods, lambda _: dict.fromkeys(["", *map(str, depths)], found))

    def held(one: Mapped) -> float:
        arrays = [*one.maps.values(), *one.healed.values(), one.scan.image, one.head.whole, one.head.interior]
        return sum(array.nbytes for array in arrays) / (4 * image.image.size)

    mapped = Mapped.of(image, mappers, wanted)
    assert held(mapped) + 3 <= wanted.images_held <= held(mapped) + 8
    assert held(mapped.for_thresholds()) == held(mapped) - len(wanted.methods)
