"""Generators that fail in a known way: every figure moves as docs/evaluation.md says, and every failure is seen by at
least one.

The images are textured discs of random size with an inner bright spot; a third of them, a subgroup, has a second spot.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation.diversity import diversity, pair_similarity
from meddiff_steps.evaluation.realism.base import Sample, Scale
from meddiff_steps.evaluation.realism.measure import measure
from meddiff_steps.evaluation.spectrum import band_power_ratio, radial_power
from meddiff_steps.instruments.feature_spaces.assemble import spaces
from meddiff_steps.instruments.feature_spaces.base import Context
from meddiff_steps.privacy.attacks import authenticity, nearer_to_training
from meddiff_steps.privacy.search import nearest, unit_rows

SHAPE, N = (32, 32), 100
SPACES = spaces(["random", "radiomics"], Context(2))
Results = dict[str, Any]


def population(label: str, n: int = N, second_spot: float = 1 / 3) -> np.ndarray:
    """float32 (n, 1, 32, 32) in [0, 1]."""
    rng = philox("test", f"sanity {label}")
    y, x = np.meshgrid(*[np.arange(s) - (s - 1) / 2 for s in SHAPE], indexing="ij")
    out = np.empty((n, 1, *SHAPE), np.float32)
    for i in range(n):
        head = np.clip(rng.uniform(9, 13) + 0.5 - np.hypot(x * rng.uniform(0.9, 1.1), y), 0, 1)
        spot = np.clip(rng.uniform(2, 5) + 0.5 - np.hypot(x - rng.uniform(-2, 2), y), 0, 1)
        other = np.clip(3.5 - np.hypot(x, y + 6), 0, 1) * (rng.random() < second_spot)
        texture = gaussian_filter(rng.normal(size=SHAPE), 0.6)
        out[i, 0] = np.clip(head * (0.4 + 0.35 * spot + 0.45 * other + 0.12 * texture), 0, 1)
    return out


def features(images: np.ndarray) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        return {space.name: space.extract(torch.from_numpy(images)).numpy() for space in SPACES}


class Reality:
    """Training and held-out images, measured once."""

    def __init__(self) -> None:
        self.training, self.held_out = population("training"), population("held out")
        self.features = {"training": features(self.training), "held_out": features(self.held_out)}

    def judge(self, synthetic: np.ndarray) -> Results:
        made = self.features | {"synthetic": features(synthetic)}
        out: Results = {}
        for space in SPACES:
            scale = Scale.of(self.features["held_out"][space.name], N)
            samples = {
                kind: Sample(scale.standard(f[space.name]), np.array([f"{kind}{i}" for i in range(len(f[space.name]))]))
                for kind, f in made.items()
            }
            common: dict[str, Any] = {"resamples": 200, "seed": "sanity"}
            out[space.name] = measure(samples, scale, slow_resamples=100, permutations=199, **common) | diversity(
                samples, neighbours=5, **common
            )
        pairs = [
            pair_similarity(
                lambda rows, x=x: x[rows],
                [str(i) for i in range(N)],
                SHAPE,
                pairs=150,
                resamples=200,
                seed="sanity",
                label=str(k),
            )
            for k, x in enumerate((synthetic, self.training))
        ]
        out["ssim"] = pairs[0] | {"floor": pairs[1]}
        out["power"] = band_power_ratio(
            radial_power(synthetic), radial_power(self.held_out), paired=False, resamples=200, seed="sanity"
        )["above_half"]
        return out


def above(figure: dict[str, Any]) -> bool:
    """Its interval lies above that of its floor or ceiling."""
    return figure["low"] > figure.get("floor", figure.get("ceiling"))["high"]


def below(figure: dict[str, Any]) -> bool:
    return figure["high"] < figure.get("floor", figure.get("ceiling"))["low"]


def caught(results: Results) -> set[str]:
    """Figures that say that something is wrong."""
    found = set()
    for space in SPACES:
        r = results[space.name]
        found |= {name for name in ("frechet", "classifier_auc") if above(r[name])}
        found |= {"kid"} if r["kid"]["p_value"] < 0.01 else set()
        found |= {name for name in ("precision", "recall", "density", "coverage", "vendi") if below(r[name])}
        found |= {"vendi high"} if above(r["vendi"]) else set()
    found |= {"ssim"} if above(results["ssim"]) else {"ssim low"} if below(results["ssim"]) else set()
    return found | ({"blur"} if below(results["power"]) else {"noise"} if above(results["power"]) else set())


@pytest.fixture(scope="module")
def reality() -> Reality:
    return Reality()


@pytest.fixture(scope="module")
def good(reality: Reality) -> Results:
    return reality.judge(population("a perfect generator"))


def test_a_perfect_generator_is_not_accused(good: Results) -> None:
    assert caught(good) == set()


def test_the_held_out_set_itself(reality: Reality) -> None:
    results = reality.judge(reality.held_out)
    for space in SPACES:
        r = results[space.name]
        assert r["frechet"]["value"] == pytest.approx(0.0, abs=1e-6)
        assert r["kid"]["value"] < 0  # the unbiased estimate leaves out the diagonal, which is largest
        assert [r[name]["value"] for name in ("precision", "recall", "coverage")] == [1.0, 1.0, 1.0]
        assert r["classifier_auc"]["value"] < 0.55
    assert results["power"]["value"] == pytest.approx(1.0)


def blurred() -> np.ndarray:
    return gaussian_filter(population("blurred"), (0, 0, 0.8, 0.8)).astype(np.float32)


def collapsed() -> np.ndarray:
    few = population("few", 4)[np.arange(N) % 4]
    return np.clip(few + 0.01 * philox("test", "jitter").normal(size=few.shape), 0, 1).astype(np.float32)


def noisy() -> np.ndarray:
    images = population("noisy")
    return np.clip(images + 0.08 * philox("test", "noise").normal(size=images.shape), 0, 1).astype(np.float32)


def without_subgroup() -> np.ndarray:
    return population("without subgroup", second_spot=0.0)


#: A failure, the figures that must see it, and those that must not say the opposite.
FAILURES: list[tuple[Callable[[], np.ndarray], set[str], set[str]]] = [
    (blurred, {"frechet", "kid", "classifier_auc", "blur"}, {"noise"}),
    (collapsed, {"recall", "coverage", "vendi", "ssim", "kid"}, {"vendi high", "ssim low"}),
    (noisy, {"frechet", "kid", "classifier_auc", "precision", "density", "noise"}, {"blur", "vendi"}),
    (without_subgroup, {"recall", "kid"}, {"precision", "blur", "noise"}),
]


@pytest.mark.parametrize(("make", "seen", "not_said"), FAILURES, ids=lambda x: getattr(x, "__name__", ""))
def test_failures_are_caught(
    reality: Reality, make: Callable[[], np.ndarray], seen: set[str], not_said: set[str]
) -> None:
    found = caught(reality.judge(make()))
    assert seen <= found, found
    assert not (found & not_said), found


def test_figures_grow_with_the_failure(reality: Reality, good: Results) -> None:
    base = population("graded")
    noise = philox("test", "graded noise").normal(size=base.shape)
    steps = [good, *(reality.judge(np.clip(base + s * noise, 0, 1).astype(np.float32)) for s in (0.04, 0.16))]
    for space in SPACES:
        values = {
            name: [step[space.name][name]["value"] for step in steps]
            for name in ("frechet", "kid", "precision", "coverage")
        }
        assert values["frechet"] == sorted(values["frechet"])
        assert values["kid"] == sorted(values["kid"])
        assert values["precision"] == sorted(values["precision"], reverse=True)
        assert values["coverage"] == sorted(values["coverage"], reverse=True)


def test_copies_of_the_training_set_are_seen_by_the_privacy_figures_alone(reality: Reality, good: Results) -> None:
    """Copies are as real and as various as can be: realism and diversity praise them, which is why they are no evidence
    of privacy.
    """
    results = reality.judge(reality.training)
    assert caught(results) == set()
    for space in SPACES:
        for name in ("frechet", "kid", "classifier_auc"):
            assert results[space.name][name]["value"] == pytest.approx(
                results[space.name][name]["floor"]["value"], abs=0.05
            )
    training, held_out, made = (
        unit_rows(x.reshape(len(x), -1)) for x in (reality.training, reality.held_out, reality.training)
    )
    fresh = unit_rows(population("a perfect generator").reshape(N, -1))
    among = nearest(training, training, 2)[0][:, 1]
    found = {}
    for name, vectors in (("copies", made), ("fresh", fresh)):
        similarity, index = nearest(vectors, training)
        genuine = authenticity(similarity[:, 0], index[:, 0], among)
        nearer = nearer_to_training(vectors @ training.T, vectors @ held_out.T, 200, np.random.default_rng(0))
        found[name] = (genuine, nearer)
    assert found["copies"][0]["high"] < 0.05 < found["fresh"][0]["low"]
    assert found["copies"][1]["value"] > 0.95
    assert found["copies"][1]["low"] > 0.85
    assert found["fresh"][1]["low"] < 0.5 < found["fresh"][1]["high"]
