"""Precision, recall, density, coverage, Vendi score and similarity of pairs against brute force and known answers."""

import numpy as np
import pytest

from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation import diversity as d
from meddiff_steps.evaluation.image_quality import SsimSettings, structural_similarity
from meddiff_steps.evaluation.realism.base import Sample
from meddiff_steps.statistics.bootstrap import Bootstrap


def points(label: str, n: int, dims: int = 4) -> np.ndarray:
    return philox("test", f"diversity {label}").normal(size=(n, dims))


def test_manifold_shares_agree_with_brute_force() -> None:
    real, made, k = points("real", 23), 1.3 * points("made", 17) + 0.4, 3

    def radius(of: np.ndarray, i: int) -> float:
        return sorted(float(np.linalg.norm(of[i] - of[j])) for j in range(len(of)) if j != i)[k - 1]

    def inside(x: np.ndarray, of: np.ndarray) -> list[bool]:
        return [float(np.linalg.norm(x - of[i])) < radius(of, i) for i in range(len(of))]

    shares = d.manifold_shares(real, made, k)
    assert shares["precision"].tolist() == [float(any(inside(x, real))) for x in made]
    assert shares["density"] == pytest.approx([sum(inside(x, real)) / k for x in made])
    assert shares["recall"].tolist() == [float(any(inside(x, made))) for x in real]
    assert shares["coverage"].tolist() == [
        float(min(np.linalg.norm(real[i] - x) for x in made) < radius(real, i)) for i in range(len(real))
    ]
    assert 0 < shares["coverage"].mean() < 1


def inside_any(x: np.ndarray, of: np.ndarray, k: int) -> bool:
    return bool((np.linalg.norm(of - x, axis=1) < d.neighbour_radii(of, k)[:, 0]).any())


def test_an_image_is_judged_as_if_there_were_none_of_its_subject() -> None:
    real, made, k = points("real", 23), points("real", 17) + 0.3 * points("made", 17), 3
    same = np.zeros((23, 17), bool)
    same[np.arange(17), np.arange(17)] = True
    same[17, 3] = True  # a second scan of the fourth
    shares = d.manifold_shares(real, made, k, same)
    for j in range(17):
        kept = ~same[:, j]
        alone = d.manifold_shares(real[kept], made[j : j + 1], k)
        assert shares["precision"][j] == alone["precision"][0]
        assert shares["density"][j] == pytest.approx(alone["density"][0])
    for i in range(23):
        others = ~same[i]
        assert shares["recall"][i] == inside_any(real[i], made[others], k)
        near = [
            np.linalg.norm(made[j] - real[i])
            < np.sort(np.linalg.norm(real[~same[:, j]] - real[i], axis=1))[k]  # itself is first
            for j in np.flatnonzero(others)
        ]
        assert shares["coverage"][i] == any(near)


def test_density_of_reconstructions_of_the_reference_has_no_bias() -> None:
    found = []
    for i in range(30):
        real = points(f"pairs {i}", 60)
        found.append(d.manifold_shares(real, real[:30], 5, np.eye(60, 30, dtype=bool))["density"].mean())
    assert np.mean(found) == pytest.approx(1.0, abs=0.05)


def test_equal_distributions_have_density_one_and_the_published_coverage() -> None:
    assert d.expected_coverage(10_000, 10_000, 5) == pytest.approx(
        0.969, abs=0.001
    )  # Naeem et al. 2020: about 0.97 at k = 5
    found = [d.manifold_shares(points(f"r{i}", 60), points(f"s{i}", 90), 5) for i in range(40)]
    assert np.mean([f["coverage"].mean() for f in found]) == pytest.approx(d.expected_coverage(60, 90, 5), abs=0.005)
    assert np.mean([f["density"].mean() for f in found]) == pytest.approx(1.0, abs=0.04)


def test_more_neighbours_than_images() -> None:
    shares = d.manifold_shares(points("few", 3), points("made few", 2), 5)
    assert all(np.isfinite(values).all() for values in shares.values())


def test_vendi_score_of_known_kernels() -> None:
    assert d.vendi_score(np.eye(7)) == pytest.approx(7.0)
    assert d.vendi_score(np.ones((7, 7))) == pytest.approx(1.0)
    blocks = np.kron(np.eye(3), np.ones((4, 4)))  # three kinds of image, four of each
    assert d.vendi_score(blocks) == pytest.approx(3.0)
    rho = 0.6  # eigenvalues of [[1, rho], [rho, 1]] / 2 are (1 +- rho) / 2
    shares = np.array([1 + rho, 1 - rho]) / 2
    assert d.vendi_score(np.array([[1, rho], [rho, 1]])) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_vendi_weights_are_repeated_rows() -> None:
    kernel = np.exp(-((points("kernel", 6)[:, None] - points("kernel", 6)[None]) ** 2).sum(2))
    counts = np.array([2, 0, 1, 3, 0, 1])
    rows = np.arange(6).repeat(counts)
    assert d._vendi(kernel, counts.astype(float)) == pytest.approx(d.vendi_score(kernel[np.ix_(rows, rows)]))


def test_vendi_figure_tells_shift_from_collapse() -> None:
    width = d.kernel_width(points("training", 80))

    def score(features: np.ndarray) -> dict[str, float]:
        return d.vendi_figure(Sample(features, np.arange(len(features)).astype(str)), width)

    base = score(points("set", 80))
    assert base["low"] < base["value"] < base["high"]
    assert score(points("set", 80) + 50.0)["value"] == pytest.approx(base["value"])
    assert score(0.05 * points("set", 80))["high"] < 0.5 * base["low"]


def test_vendi_interval_covers_the_expected_score() -> None:
    samples = [Sample(points(f"vendi {i}", 25), np.arange(25).astype(str)) for i in range(100)]
    found = [d.vendi_figure(sample, 8.0) for sample in samples]
    expected = np.mean([f["value"] for f in found])
    assert sum(f["low"] <= expected <= f["high"] for f in found) >= 88
    assert d.vendi_figure(Sample(points("vendi", 5), np.array(["one"] * 5)), 8.0)["low"] is None


def test_pairs_are_distinct_and_of_different_subjects() -> None:
    units = np.array([f"s{i // 2}" for i in range(40)])
    pairs = d.draw_pairs(units, 60, philox("test", "pairs"))
    assert len({tuple(p) for p in pairs}) == 60
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert all(units[a] != units[b] for a, b in pairs)
    assert len(d.draw_pairs(units[:4], 60, philox("test", "pairs"))) == 4  # all there are: 6 less the 2 of one subject
    assert len(d.draw_pairs(np.array(["a", "a"]), 5, philox("test", "pairs"))) == 0


def test_pair_statistic_is_the_mean_over_repeated_images() -> None:
    pairs, values = np.array([[0, 1], [0, 2], [1, 2]]), np.array([0.1, 0.5, 0.9])
    counts = np.array([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
    found = d.pair_statistic(pairs, values)
    assert found(counts[:2]) == pytest.approx([0.5, 0.1])
    with np.errstate(invalid="ignore"):
        assert np.isnan(found(counts[2:]))[0]


def test_pair_similarity_is_the_mean_over_pairs() -> None:
    images = philox("test", "pair images").random((8, 1, 16, 16), dtype=np.float32)
    found = d.pair_similarity(
        lambda rows: images[rows], [str(i) for i in range(8)], (16, 16), pairs=1000, resamples=100, seed="", label="x"
    )
    first, second = np.triu_indices(8, 1)
    expected = structural_similarity(images[first], images[second], SsimSettings.for_shape((16, 16))).mean()
    assert found["pairs"] == 28
    assert found["value"] == pytest.approx(expected, abs=1e-5)
    assert found["low"] < found["value"] < found["high"]
    alone = d.pair_similarity(
        lambda rows: images[rows], ["one"] * 8, (16, 16), pairs=10, resamples=100, seed="", label="x"
    )
    assert (alone["value"], alone["pairs"]) == (None, 0)


def test_intervals_cover_what_many_images_give() -> None:
    """The interval of the mean similarity of pairs is over images: pairs share them, so it must not shrink with the
    number of pairs.
    """
    rng = philox("test", "coverage of intervals")
    hits = 0
    for i in range(60):
        x = rng.normal(size=25)
        first, second = np.triu_indices(25, 1)
        boot = Bootstrap(np.arange(25), 300, str(i))
        found = boot.figure(d.pair_statistic(np.stack([first, second], 1), x[first] + x[second]))
        hits += found["low"] <= 0 <= found["high"]
    assert hits >= 50


def test_the_same_images_as_training_reach_the_ceiling() -> None:
    base = {"training": points("training", 60), "held_out": points("held", 50), "synthetic": points("training", 60)}
    found = d.diversity(
        {k: Sample(v, np.array([f"{k}{i}" for i in range(len(v))])) for k, v in base.items()},
        neighbours=5,
        resamples=100,
        seed="",
    )
    for entry in found.values():
        assert entry["value"] == entry["ceiling"]["value"]
    base["synthetic"] = (
        base["synthetic"] + 100.0
    )  # like nothing real: no image in common, which 60 images say to within Wilson's interval
    found = d.diversity(
        {k: Sample(v, np.array([f"{k}{i}" for i in range(len(v))])) for k, v in base.items()},
        neighbours=5,
        resamples=100,
        seed="",
    )
    assert (found["precision"]["value"], found["precision"]["low"], found["precision"]["high"]) == (0.0, 0.0, 0.0601719)
    assert (found["coverage"]["value"], found["coverage"]["high"]) == (0.0, 0.0713476)
    assert (found["precision"]["n"], found["recall"]["n"]) == (60, 50)
