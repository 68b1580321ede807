"""The five sentences: words and grades follow from the figures, and bad news is never left out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from meddiff_steps.report import sentences as told
from meddiff_steps.report.names import Names

CALLED = Names({"age": "Age at scan", "sex": "Sex", "diagnosis": "Diagnosis"})
DOCS = Path(__file__).parents[2] / "docs/evaluation.md"


def says(sentence: told.Sentence, words: str) -> bool:
    """Whether the sentence, or what else it has to say, holds these words, capitals aside."""
    return words.lower() in "\n".join((sentence.text, *sentence.also)).lower()


def figure(value: float | None, half: float = 0.02, **more: Any) -> dict[str, Any]:
    low, high = (None, None) if value is None else (value - half, value + half)
    return {"value": value, "low": low, "high": high, "n": 200} | more


def good_metrics() -> dict[str, Any]:
    """Of a cohort that cannot be told from real scans."""

    def space() -> dict[str, Any]:
        return {
            "description": "d",
            "digest": "0" * 16,
            "frechet": figure(4.0, 2.0, floor=figure(3.8, 2.0)),
            "classifier_auc": figure(0.52, 0.05, floor=figure(0.5, 0.05)),
        }

    shares = {
        key: figure(0.93, 0.03, ceiling=figure(0.94, 0.03)) for key in ("precision", "recall", "density", "coverage")
    }
    return {
        "realism": {"radiomics": space(), "structure": space()},
        "diversity": {
            "features": {"radiomics": copy.deepcopy(shares), "structure": copy.deepcopy(shares)},
            "ssim_settings": {"metric": "ms_ssim"},
            "ms_ssim": figure(0.9, floor=figure(0.9)),
        },
        "spectrum": {
            "synthetic": {
                band: figure(1.0, ceiling=figure(1.0)) for band in ("below_quarter", "quarter_to_half", "above_half")
            }
        },
        "covariates": {
            "age": {
                "kind": "continuous",
                "unit": "year",
                "r": figure(0.9, ceiling=figure(0.91)),
                "slope": figure(0.9, 0.1, ceiling=figure(0.92, 0.1)),
                "bias": figure(0.1, 0.5, ceiling=figure(0.0, 0.5)),
            },
            "sex": {"kind": "categorical", "auc": figure(0.95, ceiling=figure(0.95))},
        },
        "subgroups": {},
        "predictors": {"skipped": {}},
        "discriminability": {},
        "sanity": {"figures": {"structure": {"frechet": {"sees": ["blur"]}}}},
        "n": {"held_out_subjects": 300, "synthetic": 200},
    }


def gate(name: str, outcome: str, value: float = 0.5, half: float = 0.05) -> dict[str, Any]:
    meaning = "images lie nearer to training subjects than to strangers"
    return {"name": name, "figure": figure(value, half), "limit": 0.6, "outcome": outcome, "meaning": meaning}


def privacy(verdict: str, *gates: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "verdict": verdict,
        "gates": list(gates),
        "counts": {"rejected": 3, "candidates": 203, "failed": 0, "planned": 200},
        "calibration": {"status": "CALIBRATED"},
        "attacks": {},
    } | more


def results(verdict: str, difference: dict[str, Any], **primary: Any) -> dict[str, Any]:
    first = {"arm": "both", "reference": "real", "difference": difference, "margin": 0.03, "non_inferior": None}
    return {
        "verdict": verdict,
        "target": "diagnosis",
        "primary": first | primary,
        "contrasts": [],
        "arms": [
            {"name": name, "settings": {"synthetic": synthetic}}
            for name, synthetic in {"real": 0, "quarter": 0, "both": 1, "alone": 1, "mixed": 1, "better": 1}.items()
        ],
        "n": {"test_subjects": 93},
    }


def limits(metrics: dict[str, Any], **changes: Any) -> told.Sentence:
    options: dict[str, Any] = {
        "privacy": privacy("PASS", gate("x", "PASS")),
        "downstream": results("helps", figure(0.1)),
        "opened": {"designs": 1},
        "simulated": False,
        "grid": "64x64 pixels",
        "scans_left_out": 0,
        "called": CALLED,
    } | changes
    return told.limits_sentence(metrics, **options)


# ------------------------------------------------------------------------------------------------- privacy


def test_untested_images_are_as_bad_as_exposed_ones() -> None:
    found = told.privacy_sentence(None, CALLED)
    assert (found.grade, found.figure) == ("bad", "not tested")
    assert says(found, "handle them as the cohort itself")


def test_a_conditional_verdict_says_why_in_one_clause() -> None:
    report = privacy(
        "CONDITIONAL",
        gate("membership", "PASS"),
        gate("nearer to training, aligned", "CONDITIONAL", 0.58, 0.05),
        gate("inference of age", "CONDITIONAL", 0.55, 0.2),
    )
    found = told.privacy_sentence(report, CALLED)
    assert (found.grade, found.figure) == ("middling", "CONDITIONAL")
    assert says(found, "2 of 3 tests are undecided, because the limit lies inside the 95 % interval")
    assert says(found, "furthest over it: inference of Age at scan 0.55 [0.35, 0.75], limit 0.6")
    assert says(found, "rejected 3 of 203 images")


def test_every_failure_is_told_and_what_else_could_not_be_said() -> None:
    report = privacy(
        "FAIL",
        gate("membership", "FAIL", 0.9),
        gate("nearer to training, latent", "FAIL", 0.8),
        gate("singling out", "NOT_EVALUATED"),
        gate("other", "CONDITIONAL", 0.6),
    )
    found = told.privacy_sentence(report, CALLED)
    assert found.grade == "bad"
    for words in ("2 of 4 tests failed", "membership 0.90", "nearer to training, latent 0.80", "strangers"):
        assert says(found, words)
    assert says(found, "could not be evaluated: singling out") and says(found, "is undecided")


def test_a_filter_that_flags_strangers_or_misses_copies_is_told_by_what_that_means() -> None:
    strangers = gate(told.STRANGERS, "CONDITIONAL", 0.32, 0.09) | {"limit": 0.05}
    missed = gate(told.COPIES_FOUND, "NOT_EVALUATED", 0.2, 0.15) | {"limit": 0.95}
    report = privacy("NOT_EVALUATED", gate("membership", "CONDITIONAL", 0.6), strangers, missed)
    found = told.privacy_sentence(report, CALLED)
    assert says(found, "strangers are flagged more often than the level says: 0.32 [0.23, 0.41], limit 0.05")
    assert says(found, "detectors miss planted copies: 0.20 [0.05, 0.35], limit 0.95")
    assert says(found, "1 of 3 tests is undecided") and not says(found, "could not be evaluated")
    unmeasured = missed | {"figure": {"value": None, "low": None, "high": None}}
    assert says(told.privacy_sentence(privacy("NOT_EVALUATED", unmeasured), CALLED), "could not be evaluated: planted")


def test_a_gate_with_too_few_people_says_so() -> None:
    few = gate("membership", "NOT_EVALUATED") | {"figure": {"value": 1.0, "low": None, "high": None, "too_few": 3}}
    found = told.privacy_sentence(privacy("NOT_EVALUATED", few), CALLED)
    assert says(found, "could not be evaluated: membership (3 on one side, too few)")


def test_a_pass_shows_the_figure_that_is_nearest_to_its_limit() -> None:
    found = told.privacy_sentence(privacy("PASS", gate("a", "PASS", 0.4), gate("b", "PASS", 0.5)), CALLED)
    assert found.grade == "good"
    assert says(found, "All 2 tests are within their limits; nearest to its limit is b 0.50 [0.45, 0.55]")


def test_a_filter_that_filters_nothing_and_weights_that_tell_are_said() -> None:
    report = privacy("NOT_EVALUATED", gate("calibrated", "NOT_EVALUATED"), calibration={"status": "NOT_CALIBRATED"})
    found = told.privacy_sentence(report, CALLED)
    assert (found.grade, found.figure) == ("bad", "NOT EVALUATED") and says(found, "was not calibrated")
    loss = {"denoising_loss": {"auc": figure(0.7)}}
    assert says(told.privacy_sentence(privacy("PASS", attacks=loss), CALLED), "whoever had the weights")


def test_an_auc_of_too_few_decides_nothing() -> None:
    few = {"value": 1.0, "low": None, "high": None, "n": 33, "too_few": 3}
    assert told.ends(few) is None and told.apart(few, figure(0.5)) == 0
    loss = {"denoising_loss": {"auc": few}}
    assert not says(told.privacy_sentence(privacy("PASS", attacks=loss), CALLED), "whoever had the weights")
    metrics = good_metrics()
    metrics["realism"]["structure"]["classifier_auc"] = few | {"floor": few}
    assert told.realism_sentence(metrics).grade != "bad"


# ------------------------------------------------------------------------------------------------- realism


def test_realism_is_good_only_where_nothing_is_apart() -> None:
    found = told.realism_sentence(good_metrics())
    assert (found.grade, found.figure) == ("good", "AUC 0.520")
    assert says(found, "none of 16 figures are apart")
    assert says(found, "with AUC 0.52 [0.47, 0.57]") and says(found, "training scans: 0.50 [0.45, 0.55]")


@pytest.mark.parametrize(
    ("where", "bad", "words"),
    [
        (
            ("realism", "radiomics", "classifier_auc"),
            figure(0.9, 0.04, floor=figure(0.5)),
            "AUC 0.900 [0.860, 0.940] by their grey values and texture",
        ),
        (
            ("realism", "structure", "frechet"),
            figure(39.0, 3.0, floor=figure(0.5, 0.3), reconstructions=figure(26.0, 2.0)),
            "fine structure, 39.0 [36.0, 42.0] (floor 0.50 [0.20, 0.80], reconstructions of real scans 26.0",
        ),
        (
            ("diversity", "features", "structure", "recall"),
            figure(0.06, 0.03, ceiling=figure(0.96)),
            "recall in fine structure is 0.060 [0.030, 0.090] (ceiling 0.960",
        ),
        (
            ("diversity", "features", "radiomics", "precision"),
            figure(0.2, 0.03, ceiling=figure(0.96)),
            "precision in grey values and texture is 0.200",
        ),
        (
            ("spectrum", "synthetic", "above_half"),
            figure(0.5, ceiling=figure(1.0)),
            "power above half of Nyquist is 50 % [48, 52]",
        ),
    ],
)
def test_one_bad_figure_among_many_good_ones_is_told(where: tuple[str, ...], bad: Any, words: str) -> None:
    metrics = good_metrics()
    part: Any = metrics
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = bad
    found = told.realism_sentence(metrics)
    assert found.grade == "bad" and says(found, words)
    assert says(found, "1 of 16 figures is apart from what real scans give")


def test_what_is_apart_and_not_far_is_middling() -> None:
    metrics = good_metrics()
    metrics["diversity"]["features"]["structure"]["recall"] = figure(0.8, ceiling=figure(0.94))
    metrics["diversity"]["ms_ssim"] = figure(0.95, floor=figure(0.9))
    found = told.realism_sentence(metrics)
    assert found.grade == "middling"
    assert says(found, "recall in fine structure is 0.800") and says(found, "MS-SSIM 0.950")


def test_spaces_that_were_not_measured_are_said() -> None:
    metrics = good_metrics()
    metrics["realism"]["structure"] = {"skipped": "6 images are too few"}
    del metrics["diversity"]["features"]["structure"]
    found = told.realism_sentence(metrics)
    assert found.grade == "middling" and says(found, "not measured: fine structure (6 images are too few)")
    metrics["realism"]["radiomics"] = {"skipped": "too few"}
    del metrics["diversity"]["features"]["radiomics"]
    found = told.realism_sentence(metrics)
    assert (found.grade, found.figure) == ("not measured", "not measured")


@pytest.mark.parametrize("undefined", ["figure", "reference"])
def test_a_figure_without_a_reference_is_not_measured_and_not_good(undefined: str) -> None:
    metrics, nothing = good_metrics(), figure(None)
    metrics["realism"]["structure"]["frechet"] = (
        nothing | {"floor": figure(4.0)} if undefined == "figure" else figure(50.0, floor=nothing)
    )
    found = told.realism_sentence(metrics)
    assert found.grade == "middling" and says(found, "not measured: 1 figure where")
    assert says(found, "none of 15 figures are apart")
    metrics["realism"] = {"structure": {"frechet": figure(50.0, floor=nothing)}}
    metrics["diversity"], metrics["spectrum"] = {"features": {}}, {"synthetic": {}}
    assert told.realism_sentence(metrics).grade == "not measured"


def test_a_study_that_leaves_out_the_classifier_has_another_figure() -> None:
    metrics = good_metrics()
    for entry in metrics["realism"].values():
        del entry["classifier_auc"]
    metrics["realism"]["radiomics"]["my_distance"] = figure(9.0, floor=figure(1.0))
    found = told.realism_sentence(metrics)
    assert (found.grade, found.figure) == ("middling", "1 of 15 apart") and not says(found, "classifier")


# ------------------------------------------------------------------------------------------------ fidelity


def test_the_least_followed_covariate_is_told_with_its_ceiling() -> None:
    found = told.fidelity_sentence(good_metrics(), CALLED)
    assert (found.grade, found.figure) == ("good", "r 0.900")
    assert says(found, "Of 2 covariates the weakest is Age at scan: r 0.900 [0.880, 0.920]")
    assert says(found, "0.910 [0.890, 0.930] in held-out scans (its ceiling)")


def test_one_covariate_is_told_as_one() -> None:
    metrics = good_metrics()
    del metrics["covariates"]["age"]
    found = told.fidelity_sentence(metrics, CALLED)
    assert found.text.startswith("The one covariate that was measured is Sex: what was asked for is read")


@pytest.mark.parametrize(
    ("change", "grade", "words"),
    [
        ({"r": figure(0.3, ceiling=figure(0.91))}, "bad", "r 0.300"),
        ({"r": figure(0.8, ceiling=figure(0.91))}, "middling", "r 0.800"),
        ({"slope": figure(0.5, ceiling=figure(1.0))}, "middling", "the slope of Age at scan is 0.500"),
        (
            {"bias": figure(-5.0, 1.0, ceiling=figure(0.0, 0.5))},
            "middling",
            "bias of Age at scan is -5.0 [-6.0, -4.0] y",
        ),
        ({"r": figure(0.2, ceiling=figure(0.21))}, "middling", "can hardly be read even from held-out scans"),
        ({"r": figure(None, ceiling=figure(None))}, "middling", "could not be compared"),
        (
            {"r": figure(0.42, 0.37, ceiling=figure(0.9, 0.2))},
            "middling",
            "undecided: r 0.42 [0.05, 0.79] is 47 % of its ceiling 0.90 [0.70, 1.10]",
        ),
        ({"r": figure(0.87, 0.1, ceiling=figure(0.9, 0.1))}, "good", "r 0.87"),
    ],
)
def test_covariates_that_are_not_followed_are_told(change: dict[str, Any], grade: str, words: str) -> None:
    metrics = good_metrics()
    metrics["covariates"]["age"] |= change
    found = told.fidelity_sentence(metrics, CALLED)
    assert found.grade == grade and says(found, words)


def test_no_covariate_that_falls_short_is_left_out() -> None:
    metrics = good_metrics()
    metrics["covariates"]["age"]["r"] = figure(0.4, ceiling=figure(0.9))
    metrics["covariates"]["sex"]["auc"] = figure(0.7, ceiling=figure(0.95))
    found = told.fidelity_sentence(metrics, CALLED)
    assert (found.grade, found.figure) == ("bad", "r 0.400")
    assert says(found, "the weakest is Age at scan")
    assert says(found, "Sex follows with AUC 0.700 [0.680, 0.720] (ceiling 0.950 [0.930, 0.970])")


def test_a_study_without_a_subgroup_that_could_be_measured_says_so() -> None:
    metrics = good_metrics()
    few = {"value": 0.9, "low": None, "high": None, "n": 33, "too_few": 3}
    unknown = {"kind": "categorical", "auc": few | {"ceiling": few}}
    metrics["subgroups"] = {"sex": {"F": {"covariates": {}}, "M": {"covariates": {"diagnosis": unknown}}}}
    found = told.fidelity_sentence(metrics, CALLED)
    assert found.grade == "middling" and says(found, "no subgroup could be measured")
    del metrics["covariates"]["age"]
    assert told.fidelity_sentence(metrics, CALLED).grade == "good", "one covariate has no subgroups of others"


def test_subgroups_a_second_instrument_and_missing_predictors_are_told() -> None:
    metrics = good_metrics()
    low = {"kind": "continuous", "r": figure(0.5, ceiling=figure(0.9))}
    metrics["subgroups"] = {"sex": {"F": {"covariates": {"age": low}}, "M": {"covariates": {}}}}
    metrics["predictors"]["skipped"] = {"diagnosis": "it does not vary"}
    metrics["segmentation"] = {"covariates": {"age": low | {"unit": "year"}}}
    found = told.fidelity_sentence(metrics, CALLED)
    assert found.grade == "bad"
    assert says(found, "within subgroups 1 of 1 figure is below the ceiling (worst: Age at scan where Sex = F: r 0.500")
    assert says(found, "Age at scan (by the segmenter) follows with r 0.500")
    assert says(found, "not measured: Diagnosis (it does not vary)")
    metrics["covariates"] = {}
    assert told.fidelity_sentence(metrics, CALLED).grade == "not measured"


# ------------------------------------------------------------------------------------ usefulness and limits


@pytest.mark.parametrize(("verdict", "grade"), [("helps", "good"), ("no evidence", "middling"), ("harms", "bad")])
def test_usefulness_follows_the_verdict_and_shows_the_difference(verdict: str, grade: str) -> None:
    found = told.usefulness_sentence(results(verdict, figure(0.06, 0.1)), {"designs": 1}, CALLED)
    assert (found.grade, found.figure) == (grade, "+0.060 AUC")
    assert says(found, "(both against real) the AUC of a classifier of Diagnosis changes by 0.06 [-0.04, 0.16]")


def test_losses_and_second_looks_are_told() -> None:
    found = results("no evidence", figure(0.0, 0.1), non_inferior=False)
    lost = {"reference": "real", "difference": figure(-0.3), "primary": False}
    found["contrasts"] = [
        lost | {"arm": "alone", "p_holm": 0.0},
        lost | {"arm": "mixed", "p_holm": 0.06},  # no loss once adjusted
        lost | {"arm": "quarter", "p_holm": 0.01},  # fewer real scans, and no synthetic image
        lost | {"arm": "better", "p_holm": 0.01, "difference": figure(0.2)},
    ]
    said = told.usefulness_sentence(found, {"designs": 3}, CALLED)
    assert not any(says(said, word) for word in ("mixed", "quarter", "better"))
    assert says(said, "a loss of more than 0.03 cannot be excluded")
    assert says(said, "other arms lose: alone against real -0.300") and says(said, "opened with 3 designs")


def test_no_study_of_use_says_so() -> None:
    found = told.usefulness_sentence(None, None, CALLED)
    assert (found.grade, found.figure) == ("not measured", "not studied") and says(found, "nothing is known of it")


def test_limits_are_good_where_all_was_measured_on_enough_people() -> None:
    found = limits(good_metrics())
    assert (found.grade, found.figure) == ("good", "300 held-out subjects")
    assert says(found, "300 held-out subjects and 200 synthetic images of 64x64 pixels")
    assert says(found, "no interval covers another training")


@pytest.mark.parametrize(
    ("changes", "grade", "words"),
    [
        ({"simulated": True}, "bad", "nothing here is about patients"),
        ({"privacy": None}, "middling", "not measured: privacy"),
        ({"downstream": None, "opened": None}, "middling", "not measured: usefulness"),
        ({"scans_left_out": 2}, "middling", "2 scans are left out of it all by preprocessing"),
        ({"privacy": privacy("FAIL", gate("x", "FAIL"))}, "bad", "should not be released"),
        (
            {"privacy": privacy("PASS", counts={"failed": 4, "planned": 200})},
            "middling",
            "4 of 200 planned subjects could not be made",
        ),
    ],
)
def test_what_is_missing_is_a_limit(changes: dict[str, Any], grade: str, words: str) -> None:
    found = limits(good_metrics(), **changes)
    assert found.grade == grade and says(found, words)


def test_few_people_blind_figures_and_requests_beyond_are_limits() -> None:
    metrics = good_metrics()
    metrics["n"]["held_out_subjects"] = 30
    assert limits(metrics).grade == "bad"
    metrics["n"]["held_out_subjects"] = 100
    metrics["sanity"]["figures"]["embedder"] = {"kid": {"sees": []}}
    metrics["covariates"]["age"]["extrapolation"] = {"mae": figure(9.0) | {"n": 12}}
    metrics["discriminability"] = {"skipped": "too few"}
    found = limits(metrics)
    assert found.grade == "middling" and says(found, "1 of 2 figures see none of the faults")
    assert says(found, "Age at scan (12)") and says(found, "from which detail on images are told")


def test_all_five_are_one_sentence_each_and_in_order() -> None:
    found = told.sentences(
        good_metrics(), None, None, None, CALLED, simulated=False, grid="64x64 pixels", scans_left_out=0
    )
    assert [one.topic for one in found] == list(told.RULES)
    for one in found:
        for clause in (one.text, *one.also):
            assert clause[0].isupper() and clause.endswith(".") and ". " not in clause


def test_docs_have_the_rules_of_the_page() -> None:
    text = DOCS.read_text(encoding="utf-8")
    missing = [f"| {topic} | {rule} |" for topic, rule in told.RULES.items() if f"| {topic} | {rule} |" not in text]
    assert not missing, "docs/evaluation.md lacks:\n" + "\n".join(missing)
