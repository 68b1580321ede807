"""Figures of anomaly maps, against scikit-learn and against maps whose figures are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from meddiff_steps.evaluation.anomaly import BINS, Counts, Judged, figures, lesions_of, measured, recall

OPTIONS = {"resamples": 100, "seed": "x"}


def scans(count: int = 8, *, side: int = 24, levels: int | None = None, signal: float = 1.5) -> list[Judged]:
    """Scans of half as many people, the last two without a lesion; values are higher in lesions."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        truth = np.zeros((side, side), bool)
        if i < count - 2:
            truth[3 : 6 + i, 5:9] = True
        values = rng.standard_normal((side, side)) + signal * truth
        if levels:
            values = np.round(values * levels) / levels
        region = np.ones((side, side), bool)
        region[:2] = False
        values[:4] = np.nan  # no map at the rim, where lesions reach
        made.append(Judged(f"scan{i}", f"person{i // 2}", values, truth, region))
    return made


def pooled(made: list[Judged]) -> tuple[np.ndarray, np.ndarray]:
    chosen = [scan.region | scan.truth for scan in made]
    values = np.concatenate([np.nan_to_num(s.values, nan=-99.0)[c] for s, c in zip(made, chosen, strict=True)])
    return np.concatenate([s.truth[c] for s, c in zip(made, chosen, strict=True)]), values


@pytest.mark.parametrize("levels", [None, 4])
def test_areas_are_those_of_scikit_learn(levels: int | None) -> None:
    made = scans(levels=levels)
    counts, (truth, values) = Counts.of(made, 0.5), pooled(made)
    one = np.ones((1, len(counts.subjects)))
    assert counts.average_precision(one)[0] == pytest.approx(average_precision_score(truth, values), abs=1e-9)
    assert counts.auroc(one)[0] == pytest.approx(roc_auc_score(truth, values), abs=1e-9)


def test_with_more_values_than_bins_they_are_nearly_so() -> None:
    made = scans(side=160)
    truth, values = pooled(made)
    assert len(np.unique(values)) > 4 * BINS
    counts = Counts.of(made, 0.5)
    one = np.ones((1, len(counts.subjects)))
    assert counts.average_precision(one)[0] == pytest.approx(average_precision_score(truth, values), abs=1e-3)
    assert counts.auroc(one)[0] == pytest.approx(roc_auc_score(truth, values), abs=1e-3)


def test_weights_are_people_drawn_several_times() -> None:
    made = scans()
    counts = Counts.of(made, 0.5)
    weights = np.array([[2.0, 0.0, 1.0, 1.0]])
    drawn = [scan for scan in made for _ in range(int(weights[0, counts.subjects.index(scan.subject_id)]))]
    truth, values = pooled(drawn)
    assert counts.average_precision(weights)[0] == pytest.approx(average_precision_score(truth, values), abs=1e-9)
    assert counts.auroc(weights)[0] == pytest.approx(roc_auc_score(truth, values), abs=1e-9)


def test_dice_at_a_threshold_and_at_the_best() -> None:
    made = scans()
    truth, values = pooled(made)
    counts = Counts.of(made, 0.7)
    one = np.ones((1, len(counts.subjects)))

    def dice(threshold: float) -> float:
        marked = values > threshold
        return 2 * (marked & truth).sum() / (marked.sum() + truth.sum())

    assert counts.dice_at(0.7)(one)[0] == pytest.approx(dice(0.7), abs=1e-12)
    best = max(dice(t) for t in [-100.0, *np.unique(values)])
    assert counts.best_dice(one)[0] == pytest.approx(best, abs=1e-12)


def test_lesions_are_found_by_a_quarter_of_them() -> None:
    truth = np.zeros((12, 12), bool)
    truth[1:3, 1:3], truth[3, 3], truth[7:11, 7:11] = True, True, True  # the first two touch by a corner
    values = np.where(truth, 0.0, -1.0)
    values[1, 1] = 2.0
    values[7, 7:11] = 2.0
    scan = Judged("s", "p", values, truth, np.ones(truth.shape, bool))
    found = lesions_of(scan, 1.0)
    assert [(row["voxels"], row["found"]) for row in found] == [(5, False), (16, True)]
    row = measured(scan, 1.0, 3.0, 2.0)
    assert (row["lesion_voxels"], row["false_marks"], row["flagged"]) == (21, 0, True)
    assert row["dice"] == pytest.approx(2 * 5 / (5 + 21)) and row["false_share"] == 0.0
    values[0, 11] = 2.0
    again = measured(scan, 1.0, 3.0, 3.0)
    assert (again["false_marks"], again["flagged"]) == (1, False)
    assert again["false_share"] == pytest.approx(1 / (144 - 21))


def test_recall_is_by_thirds_of_size() -> None:
    table = pd.DataFrame(
        {"subject_id": [f"p{i % 4}" for i in range(9)], "voxels": range(1, 10), "found": [False] * 3 + [True] * 6}
    )
    parts = recall(table, OPTIONS | {"label": "x"})
    assert [(p["size"], p["voxels"], p["lesions"]) for p in parts] == [
        ("all", [1, 9], 9),
        ("small", [1, 3], 3),
        ("medium", [4, 6], 3),
        ("large", [7, 9], 3),
    ]
    assert [p["found"]["value"] for p in parts] == [pytest.approx(2 / 3, rel=1e-5), 0.0, 1.0, 1.0]


def test_figures_of_a_good_map_and_of_a_blind_one() -> None:
    def of(signal: float, reference: Counts | None) -> tuple[dict, Counts]:
        made = scans(signal=signal)
        table = pd.DataFrame([measured(scan, 1.0, float(np.nanmax(scan.values)), 3.2) for scan in made])
        return figures("x", made, table, 1.0, reference, **OPTIONS)

    blind, counts = of(0.0, None)
    good, _ = of(4.0, counts)
    assert "gain" not in blind and good["gain"]["low"] > 0
    assert good["average_precision"]["value"] > 0.5 > 3 * blind["prevalence"] > blind["average_precision"]["value"]
    assert good["average_precision"]["value"] > good["average_precision_of_all"]["value"]
    assert good["scan_auroc"]["value"] == 1.0 and good["scan_auroc"]["n"] == 4
    assert good["false_share"]["value"] == pytest.approx(0.1587 * 20 / 22, rel=0.15), (
        "one in six of a normal is above 1"
    )
    assert good["best_dice"]["value"] >= good["dice"]["value"] and good["recall"][0]["lesions"] == 6
