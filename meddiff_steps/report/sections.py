"""Sections of the report: what each says, from the files that the steps before it wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from meddiff_steps.config import Study
from meddiff_steps.core.registries import DETECTORS
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.privacy.table_attacks import FEW
from meddiff_steps.privacy.verdict import SEVERITY, bounds_text, stopping
from meddiff_steps.release import card
from meddiff_steps.report import names, tables
from meddiff_steps.report import pictures as drawn
from meddiff_steps.report.names import Names
from meddiff_steps.report.page import Card, Section, Table
from meddiff_steps.report.wording import counted, interval, number, p_value, percent


def lead(counts: Mapping[str, Any], simulated: bool) -> str:
    """The paragraph under the title, from the part `n` of evaluation/metrics.json."""
    word = "simulated" if simulated else "real"
    return (
        f"A diffusion model learnt from {number(counts['training_scans'])} {word} images of"
        f" {number(counts['training_subjects'])} subjects and then made {number(counts['generated'])} synthetic ones."
        " Every figure of quality is measured on subjects it never saw, or on the synthetic images."
    )


def privacy_section(report: Mapping[str, Any] | None, called: Names) -> Section:
    """The verdict of `privacy/report.json`, its gates and its controls; that there is none where it is None."""
    title = "Could they expose somebody?"
    if report is None:
        untested = "Not tested. Without these tests the images must be handled as the cohort itself."
        return Section("privacy", title, text=[untested])
    counts, calibration = report["counts"], report["calibration"]
    text = [
        (
            f"Verdict: {report['verdict']}. It is the worst of the gates below; none makes up for another. A gate is"
            " CONDITIONAL where its limit lies inside the interval, so that the data do not say. A verdict is the"
            " outcome of these tests, not a proof of anonymity."
        ),
        (
            f"{counted(counts['candidates'], 'image')} drawn for {counted(counts['planned'], 'planned subject')}."
            f" Rejected: {number(counts['rejected'])}; left out as near duplicates of each other:"
            f" {number(counts['duplicates'])}; subjects given up: {number(counts['failed'])}; released:"
            f" {number(counts['released'])}."
        ),
    ]
    left_out = [name for name in DETECTORS.names() if name not in calibration.get("detectors", DETECTORS.names())]
    if left_out:
        text.append(
            f"By choice of the study, copies were not looked for by every detector: not by {', '.join(left_out)}."
        )
    if calibration["status"] != "CALIBRATED":
        text.append(
            f"NOT CALIBRATED: there are {calibration['subjects']} calibration subjects and {calibration['needed']} are"
            f" needed for the level {calibration['level']:g}. Nothing was rejected for being too near to a training"
            " scan."
        )
    if stopping(report["gates"]):
        text.append(
            "The run stops before the release (privacy.enforce: stop)."
            if report["enforce"] == "stop"
            else "There is a release all the same, because the study says so (privacy.enforce: report). It must not be"
            " treated as anonymous."
        )
    rows = [
        [
            called.gate(gate["name"]),
            interval(gate["figure"]),
            bounds_text(gate["name"], gate["limit"]),
            gate["outcome"],
            gate.get("meaning", ""),
        ]
        for gate in sorted(report["gates"], key=lambda gate: -SEVERITY.index(gate["outcome"]))
    ]
    shown = [
        Table(
            ["test", "figure", "limit", "outcome", "what a failure means"],
            rows,
            "The tests behind the verdict, the worst first.",
        )
    ]
    if report["controls"]:
        planted = [
            [f"planted copies, {kind}", percent(figure), str(figure["n"])]
            for kind, figure in report["controls"]["positive"].items()
        ]
        strangers = report["controls"]["negative"]
        shown.append(
            Table(
                ["control", "flagged", "n"],
                [*planted, ["unseen real subjects", percent(strangers), str(strangers["n"])]],
                "Does the filter work? Good: all planted copies are flagged, and unseen real subjects as often as the"
                f" level says ({percent({'value': strangers.get('level')})}).",
            )
        )
    detectors = calibration.get("detectors", [])
    if detectors:
        shown.append(
            Table(
                ["detector", "what it compares"],
                [list(names.detector(name).partition(": ")[::2]) for name in detectors],
                "The copy detectors that the tests name.",
            )
        )
    drift = report["attacks"].get("covariate_drift")
    if drift:
        largest = max(drift, key=lambda name: abs(drift[name]))
        text.append(
            f"Released against planned covariates: the largest drift is that of {called.covariate(largest)},"
            f" {drift[largest]:+.3f}"
            " (standard deviations, or of a level's share)."
        )
    rare = report["attacks"].get("covariate_table", {}).get("rare_values", {})
    if rare:
        shares = ", ".join(
            f"{called.covariate(name)} {percent(found)} ({percent(found['chance'])})" for name, found in rare.items()
        )
        text.append(
            f"Released numbers that are exactly those of fewer than {FEW} training subjects: {shares}. In brackets, the"
            " same of people who were never trained on: what chance gives."
        )
    loss = report["attacks"].get("denoising_loss")
    if loss:
        text.append(
            "Whoever had the model's weights could tell training subjects by their denoising loss with AUC"
            f" {interval(loss['auc'])} (0.5: not at all). Weights are therefore not part of the release."
        )
    if few := report["attacks"].get("rare"):
        text.append(_rare_level(few))
    return Section("privacy", title, text=text, tables=shown)


def _rare_level(found: Mapping[str, Any]) -> str:
    """What can be told of the few whom a rare level was learnt from; gates hold the figures of images."""
    people = f"The rare level was learnt from {counted(found['subjects'], 'subject')}"
    compared = "unseen people of that level" if found["strangers"] == "of that level" else "unseen people of all levels"
    if "nearer_to_training" not in found:
        return f"{people}; {counted(found['images'], 'image')} of it are too few to attack, or these subjects are."
    told = [f"{name} {interval(figure)}" for name, figure in found["nearer_to_training"].items()]
    loss = found.get("denoising_loss")
    weights = f" From the weights they are told from {compared} with AUC {interval(loss['auc'])}." if loss else ""
    unjudged = "" if found["strangers"] == "of that level" else " These differ in more than that: no figure is judged."
    return (
        f"{people}. Its {counted(found['images'], 'image')} are nearer to these than to {compared} (0.5: no more than"
        f" chance): {', '.join(told)}.{weights}{unjudged}"
    )


def given_weights(cards: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the models started from, by their names and cards, and what this says of whom; nothing where all began
    here.
    """
    found = [f"{name.capitalize()}: {card.given_weights(made)}." for name, made in cards.items() if made.get("base")]
    return [*found, card.GIVEN] if found else []


def second_model_section(
    privacy: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]], called: Names
) -> Section:
    """Privacy and quality of the first model's cohort beside those of the second, which made the release.

    Parameters
    ----------
    privacy, metrics
        `privacy/report.json` and `evaluation/metrics.json` of the first and of the second.
    """
    gates = [{gate["name"]: gate for gate in report["gates"]} for report in privacy]
    rows = [["verdict", *(report["verdict"] for report in privacy)]]
    rows += [
        [called.gate(name), *(interval(each[name]["figure"]) if name in each else "" for each in gates)]
        for name in gates[1]
    ]
    for name, entry in metrics[1]["covariates"].items():
        key = "auc" if entry["kind"] == "categorical" else "r"
        rows.append(
            [
                f"{called.covariate(name)}, {key} with what was asked",
                *(interval(each["covariates"][name][key]) for each in metrics),
            ]
        )
    for band in metrics[1]["spectrum"]["synthetic"]:
        rows.append(
            [
                f"power over that of real images, {names.spaced(band)} of Nyquist",
                *(interval(each["spectrum"]["synthetic"][band]) for each in metrics),
            ]
        )
    text = [
        "The released images come from a second diffusion model that never saw a real scan: it learnt from images of"
        " the first model that the filter had accepted. Only the autoencoder, which both share, learnt from real scans."
    ]
    return Section(
        "second-model",
        "The second model beside the first",
        text=text,
        tables=[
            Table(["figure", "first model", "second model"], rows, "Both models, by the same tests and measurements.")
        ],
    )


def downstream_section(
    results: Mapping[str, Any] | None,
    opened: Mapping[str, Any] | None,
    called: Names,
    nearby: Mapping[str, Any] | None = None,
) -> Section:
    """The verdict of `augmentation/results.json`, its arms and its contrasts.

    Parameters
    ----------
    results, opened, nearby
        `augmentation/results.json`, `augmentation/test-opened.json` and `augmentation/neighbours.json`; None where the
        study has none.
    called
        Names of covariates.
    """
    title = "Are they of use?"
    if results is None or opened is None:
        unknown = (
            "Not studied. `downstream` in the study file asks whether a classifier gains by these images; until then"
            " nothing is known of their use."
        )
        return Section("use", title, text=[unknown])
    primary, counts, arms = results["primary"], results["n"], results["arms"]
    reference = next(arm for arm in arms if arm["name"] == primary["reference"])
    cases = ", ".join(f"{number(n)} {level}" for level, n in counts["test_images_by_level"].items())
    chosen = (
        ""
        if primary["chosen_on"] != "val"
        else f", chosen on the validation subjects among {', '.join(primary['candidates'])}"
    )
    generators = counts["generators"]
    crossed = f" with each of {generators} generator seeds" if generators > 1 else ""
    if generators == 1:
        drawn_by = "Intervals resample test subjects and the seeds of classifiers, not generators: there was one."
    else:
        models = (
            "diffusion models trained from different seeds"
            if results["n"]["generators_retrained"]
            else "one diffusion model, sampled from other noise"
        )
        drawn_by = (
            f"Intervals cover test subjects, the seeds of classifiers and {generators} generator seeds ({models})."
        )
    part = any(0 < arm["settings"]["real"] < 1 for arm in arms)
    text = [
        (
            f"Verdict: {results['verdict']}. {results['verdict_text']} The AUC of {primary['arm']}{chosen} minus that"
            f" of {primary['reference']} is {interval(primary['difference'])} on {number(counts['test_subjects'])} test"
            f" subjects, mean of {counts['seeds']} classifiers{crossed}. The verdict is “helps” where this interval"
            " lies above 0, “harms” where it lies below."
        ),
        (
            f"Classifiers learnt to tell {called.covariate(results['target'])} from the image, with the same number of"
            f" steps in every arm. Test images: {cases}. The generator learnt from training subjects alone. {drawn_by}"
            + (
                " It learnt from all of them: what arms of a smaller real share gain can be from others."
                if part
                else ""
            )
        ),
        (
            "The test split was opened once, after everything was fixed."
            if opened["designs"] == 1
            else (
                f"The test split has been opened with {opened['designs']} different designs. Figures of the later ones,"
                " these among them, flatter."
            )
        ),
    ]
    shift = results.get("shift")
    if shift:
        saw = shift["subjects_that_the_generator_saw"]
        text.append(
            f"Kept out of training and tested on their own (shifted): {called.covariate(shift['covariate'])} ="
            f" {', '.join(shift['levels'])}."
            + (f" The generator did see {number(saw)} training subjects of them." if saw else "")
        )
    header = ["arm", "real images", "added", "AUC", "AUPRC", "Brier", "calibration error", "AUC on validation"]
    grouped = any("worst_group_auc" in arm["figures"].get("test", {}) for arm in arms)
    rows = []
    for arm in arms:
        figures_of = arm["figures"].get("test") or arm["figures"]["synthetic"]
        images = [number(sum(arm["images"][kind].values())) for kind in ("real", "added")]
        name = arm["name"] if "test" in arm["figures"] else f"{arm['name']} (tested on synthetic)"
        row = [
            name,
            *images,
            *(interval(figures_of[key]) for key in ("auc", "auprc", "brier", "ece")),
            number(arm["validation"]["auc"]),
        ]
        rows.append(
            row
            + (
                [interval(figures_of[key]) if key in figures_of else "" for key in ("worst_group_auc", "gap")]
                if grouped
                else []
            )
        )
    header += [f"worst {called.covariate(results['subgroup'])}", "gap"] if grouped else []
    compared = []
    for row in results["contrasts"]:
        second = row["delong"]
        adjusted = "declared beforehand" if row["primary"] else p_value(row["p_holm"])
        delong = [interval(second["difference"]), p_value(second["p"])] if second else ["more than two classes", ""]
        compared.append(
            [
                f"{row['arm']} minus {row['reference']}",
                interval(row["difference"]),
                p_value(row["p"]),
                adjusted,
                *delong,
            ]
        )
    shown = [
        Table(
            header,
            rows,
            "Every arm on the test split. Good: AUC and AUPRC high, Brier and calibration error low.",
        ),
        Table(
            ["difference of AUC", "bootstrap", "p", "p (Holm)", "DeLong (subjects only)", "p"],
            compared,
            "Differences of arms. Good: an interval above 0.",
        ),
    ]
    if nearby:
        shown.append(tables.neighbours_table(arms, nearby))
    for along in results.get("stress", []):
        shown.append(tables.stress_table(along, called))
    pictures = drawn.augmentation(arms, reference["figures"]["test"]["auc"]["value"], results["ratio_curves"])
    return Section("use", title, text=text, pictures=pictures, tables=shown)


def _instrument(measured: Mapping[str, Any], called: Names) -> list[str]:
    counts = measured["n"]
    instrument = (
        "Predictors that learnt from real training scans alone measure each covariate in the synthetic images, and in"
        f" held-out real scans for comparison ({number(counts['held_out_scans'])} scans, split"
        f" {', '.join(counts['held_out_splits'])}). Points on the dashed line are what was asked for."
    )
    skipped = measured["predictors"]["skipped"]
    return [
        instrument,
        *(f"Not measured: {called.covariate(name)}, because {reason}." for name, reason in skipped.items()),
    ]


def _second_instrument(segmentation: Mapping[str, Any], called: Names) -> str:
    held = segmentation["held_out"]
    found = "; ".join(
        f"{called.covariate(name)} Dice {interval(entry['dice'])}, r {interval(entry['r'])}"
        for name, entry in held.items()
        if isinstance(entry, dict)
    )
    lead = (
        "A segmenter that learnt from label maps of real training scans measures volumes a second time (last table). "
    )
    if not found:
        return lead + "No held-out scan has a label map to check it with."
    return lead + f"Against {number(held['scans'])} label maps that it did not learn from: {found}."


def _spaces(measured: Mapping[str, Any]) -> list[str]:
    spaces = measured["realism"]
    told = "P"
    if any("classifier_auc" in entry for entry in spaces.values()):
        told = "An AUC near 1 means that a simple classifier tells synthetic from real, by whatever little differs; p"
    text = [
        (
            "Images are compared as rows of features, in several feature spaces (last table). Figures of different"
            " spaces cannot be compared, nor can published ones; what counts is how far a figure is from that of as"
            " many real training scans in place of the synthetic images (real against real)."
        ),
        (
            f"{told}recision falls when images look like no real one, recall and coverage when kinds of real images are"
            " missing. Copies of training scans would score perfectly: see the section on privacy."
        ),
    ]
    return text + [
        f"{names.space(key)}: not measured, {entry['skipped']}." for key, entry in spaces.items() if "skipped" in entry
    ]


def fidelity_section(metrics: Mapping[str, Any], predictions: pd.DataFrame, called: Names) -> Section:
    """Requested against measured covariates, from evaluation/metrics.json and predictions.parquet."""
    covariates = metrics["covariates"]
    shown = [
        tables.fidelity_table(covariates, called),
        tables.extrapolation_table(covariates, metrics["training_range"], called),
        tables.correlation_table(metrics["correlations"], called),
        tables.distribution_table(metrics["distributions"], called),
        tables.subgroup_table(metrics["subgroups"], called),
    ]
    text, second = _instrument(metrics, called), metrics.get("segmentation")
    if second:
        text.append(_second_instrument(second, called))
        shown.append(tables.fidelity_table(second["covariates"], called, "the segmenter"))
    return Section(
        "fidelity",
        "Do they follow the covariates?",
        text=text,
        pictures=[*drawn.fidelity(predictions, covariates, called), *drawn.subgroups(metrics["subgroups"], called)],
        tables=shown,
    )


def realism_section(metrics: Mapping[str, Any], components: pd.DataFrame | None) -> Section:
    """Realism and diversity, from evaluation/metrics.json and components.parquet."""
    pictures = [] if components is None else drawn.realism(components, metrics["realism"])
    return Section(
        "realism",
        "Are they like real ones, and as various?",
        text=_spaces(metrics),
        pictures=pictures,
        tables=[tables.realism_table(metrics), tables.space_table(metrics["realism"])],
    )


def discriminability_section(curves: Mapping[str, Any]) -> Section:
    """From which detail on images are told from real ones, from the part `discriminability` of metrics.json."""
    if "skipped" in curves:
        return Section("discriminability", "From which detail on are they told from real ones?")
    return Section(
        "discriminability",
        "From which detail on are they told from real ones?",
        text=[
            "Detail above a frequency is removed from all images, and the same linear classifier tells synthetic ones"
            " from held-out scans by what is left. One AUC of all detail, the last point, saturates by whatever little"
            " differs; the curve says how coarse the difference is. Reconstructions of held-out scans are told by what"
            " the decoder alone does, so no synthetic image can be expected to be told later than they are."
        ],
        pictures=drawn.discriminability(curves),
        tables=[tables.curve_table(curves)],
    )


def sanity_section(sanity: Mapping[str, Any]) -> Section:
    """Which figure sees which fault, from the part `sanity` of metrics.json."""
    title = "What would each figure say of scans that are spoilt in a known way?"
    if "figures" not in sanity:
        return Section("sanity", title, text=[f"Not measured: {sanity['skipped']}."])
    ways = "; ".join(f"{tables.plain_way(way)} ({words})" for way, words in sanity["ways"].items())
    return Section(
        "sanity",
        title,
        text=[
            f"{number(sanity['images'])} held-out scans were spoilt, and measured as if they were synthetic: {ways}.",
            "● says that a figure is worse than for the same scans as they are, by more than both intervals: it sees"
            " the fault. ○ says that it is better: it praises the fault. No mark: it is blind to it, and being near its"
            " floor says nothing about such a fault.",
        ],
        tables=[tables.sanity_table(sanity)],
    )


def sharpness_section(spectrum: Mapping[str, Any]) -> Section:
    """Power spectra, from the part `spectrum` of evaluation/metrics.json."""
    return Section(
        "sharpness",
        "How sharp are they?",
        text=[
            "Blur removes power at high spatial frequencies; noise and checkerboards add it. 100 % is what real images"
            " have."
        ],
        pictures=drawn.spectra(spectrum),
        tables=[tables.band_table(spectrum)],
    )


def reconstruction_section(reconstructions: Shards, quality: Mapping[str, Any]) -> Section:
    """Held-out images beside their reconstructions, and the part `reconstruction` of evaluation/metrics.json."""
    return Section(
        "reconstruction",
        "What latents keep",
        pictures=[drawn.reconstruction(reconstructions)],
        tables=[tables.quality_table(quality)],
    )


def looks_section(metrics: Mapping[str, Any], components: pd.DataFrame) -> Section:
    """All that compares the images with scans, whatever covariates say."""
    return Section(
        "looks",
        "Do they look like scans?",
        parts=[
            realism_section(metrics, components),
            discriminability_section(metrics["discriminability"]),
            sharpness_section(metrics["spectrum"]),
            sanity_section(metrics["sanity"]),
        ],
    )


def making_section(
    data: Section, reconstruction: Section, training: Mapping[str, pd.DataFrame], cards: Mapping[str, Any]
) -> Section:
    """The data, what the models learnt, and their cards."""
    return Section(
        "made",
        "How were they made?",
        parts=[
            data,
            reconstruction,
            Section("training", "Training", pictures=drawn.histories(training)),
            Section("cards", "Settings and counts", cards=[Card(title, content) for title, content in cards.items()]),
        ],
    )


def data_section(
    qc: pd.DataFrame, scans: pd.DataFrame, requested: pd.DataFrame, study: Study, called: Names
) -> Section:
    """What went in and what was asked for, from preprocessed/qc.parquet, the cohort's manifest and the plan."""
    checks, left_out = tables.quality_control(qc)
    return Section(
        "data",
        "The data",
        text=checks,
        tables=[
            tables.name_table(study.covariates, called),
            tables.covariate_table(scans, requested, study.covariates, called),
            *left_out,
        ],
    )
