"""report.html: one self-contained page, headline figures first.

The page loads nothing from outside (pictures are embedded, a content security policy forbids the rest and lets no script run but
the slice viewer's) and holds no dates or paths of the machine, so equal inputs give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from meddiff_steps.config import CategoricalCovariate, Covariates
from meddiff_steps.report import figures
from meddiff_steps.report.viewer import Viewer

SPLITS = ("train", "val", "calibration", "test")
#: Figures have these keys (and perhaps floor and ceiling).
_FIGURE_KEYS = {"value", "low", "high"}


@dataclass(frozen=True)
class Picture:
    """An embedded PNG: `alt` says what is seen for those who do not see it."""

    png: bytes
    alt: str
    caption: str

    @property
    def data(self) -> str:
        return base64.b64encode(self.png).decode("ascii")

    @property
    def width(self) -> int:
        """Width on the page in CSS pixels; pictures are drawn at 120 dots per inch and shown at 96."""
        return round(struct.unpack(">I", self.png[16:20])[0] * 96 / 120)


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Card:
    title: str
    content: Any


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    text: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    viewer: Viewer | None = None


@dataclass(frozen=True)
class Headline:
    """A number, what it means, and what it is to be compared with."""

    figure: str
    words: str
    detail: str = ""


# --------------------------------------------------------------------------------------------------- wording


def number(value: Any, digits: int = 3) -> str:
    """A number as people write it: at least `digits` significant ones, thousands separated, no exponents for common sizes."""
    if value is None:
        return "not defined"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 10**digits):
        return f"{int(value):,}"
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits}g}"
    places = max(0, digits - 1 - int(np.floor(np.log10(abs(value))))) if value else 0
    return f"{value:,.{places}f}"


def interval(figure: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A figure with its interval, such as "0.942 [0.930, 0.951]"."""
    if not figure or figure.get("value") is None:
        return "not defined"
    if figure.get("low") is None or figure.get("high") is None:
        return number(figure["value"], digits)
    return f"{number(figure['value'], digits)} [{number(figure['low'], digits)}, {number(figure['high'], digits)}]"


def percent(figure: Mapping[str, Any] | None) -> str:
    """A ratio figure in percent, such as "92 % [90, 95]"."""
    if not figure or figure.get("value") is None:
        return "not defined"
    text = f"{100 * figure['value']:.0f} %"
    return text if figure.get("low") is None or figure.get("high") is None else f"{text} [{100 * figure['low']:.0f}, {100 * figure['high']:.0f}]"


def headlines(metrics: Mapping[str, Any]) -> list[Headline]:
    """What a reader should know first, from metrics.json alone."""
    counts, quality, bands = metrics["n"], metrics["reconstruction"], metrics["spectrum"]
    out = [
        Headline(number(counts["training_subjects"]), "real subjects learnt from", f"{number(counts['subjects'])} in the cohort; the rest is held out"),
        Headline(number(counts["generated"]), "synthetic subjects generated", f"figures are about {number(counts['synthetic'])} of them"),
        Headline(
            f"{number(quality['psnr']['value'])} dB",
            "PSNR of held-out scans after encoding and decoding",
            f"95 % interval {_range(quality['psnr'])}, n {quality['psnr']['n']}",
        ),
    ]
    for name, entry in metrics["covariates"].items():
        key = "auc" if entry["kind"] == "categorical" else "r"
        words = f"reading the requested {name} from synthetic images" if key == "auc" else f"correlation of requested and measured {name}"
        out.append(Headline(f"{'AUC' if key == 'auc' else 'r'} {number(entry[key]['value'])}", words, f"ceiling {interval(entry[key].get('ceiling'))}"))
    synthetic = bands["synthetic"]
    out.append(
        Headline(
            percent({"value": synthetic["above_half"]["value"]}),
            "of the real power in the finest detail of synthetic images (above half of Nyquist)",
            f"{percent(synthetic['quarter_to_half'])} between a quarter and half; reconstructions {percent(bands['reconstruction']['above_half'])} above half",
        )
    )
    return out


def _range(figure: Mapping[str, Any]) -> str:
    return f"{number(figure.get('low'))} to {number(figure.get('high'))}"


# ---------------------------------------------------------------------------------------------------- tables


def fidelity_table(metrics: Mapping[str, Any]) -> Table:
    """Every fidelity figure beside its ceiling."""
    rows = []
    names = {"r": "r", "slope": "slope", "mae": "mean absolute error", "bias": "bias", "auc": "AUC"}
    for name, entry in metrics.items():
        for key, label in names.items():
            if key in entry:
                unit = f", {entry['unit']}" if key in ("mae", "bias") else ""
                share = percent(entry["share_of_ceiling"]) if key in ("r", "auc") else ""
                rows.append([name, f"{label}{unit}", interval(entry[key]), interval(entry[key].get("ceiling")), share, number(entry[key]["n"])])
    return Table(["covariate", "figure", "synthetic", "ceiling (real, held out)", "share of ceiling", "n"], rows)


def realism_table(metrics: Mapping[str, Any]) -> Table:
    """Realism and diversity of every feature space beside real against real."""
    names = {
        "frechet": ("Frechet distance (squared)", "floor", "low, near its floor"),
        "kid": ("kernel distance (KID)", "floor", "near 0"),
        "classifier_auc": ("AUC of telling synthetic from real", "floor", "0.5"),
        "precision": ("precision: look real", "ceiling", "near its ceiling"),
        "recall": ("recall: real ones within reach", "ceiling", "near its ceiling"),
        "density": ("density", "ceiling", "near its ceiling"),
        "coverage": ("coverage: real ones with a synthetic one nearby", "ceiling", "near its ceiling"),
        "vendi": ("Vendi score: effective number of different images", "ceiling", "near its ceiling"),
    }
    rows = []
    for space, entry in metrics["realism"].items():
        both = entry | metrics["diversity"]["features"].get(space, {})
        for key, (label, reference, good) in names.items():
            if key in both:
                figure = both[key]
                shown = f"{interval(figure)}, p {number(figure['p_value'], 2)}" if "p_value" in figure else interval(figure)
                rows.append([space, label, shown, interval(figure[reference]), good, number(figure["n"])])
    settings = metrics["diversity"]["ssim_settings"]
    figure = metrics["diversity"][settings["metric"]]
    label = f"{'MS-SSIM' if settings['metric'] == 'ms_ssim' else 'SSIM'} of {number(figure['pairs'])} pairs, window {settings['kernel_size']}"
    rows.append(["images", label, interval(figure), interval(figure["floor"]), "near that of real pairs", number(figure["n"])])
    return Table(["features", "figure", "synthetic against held-out real", "real against real", "good is", "n"], rows)


def distribution_table(metrics: Mapping[str, Any]) -> Table:
    """How far distributions of measured covariates are apart."""
    header = ["covariate", "distance of distributions", "of random halves of real scans", "in standard deviations of real scans", "requested from true"]
    rows = []
    for name, entry in metrics.items():
        distance = entry["wasserstein"]
        row = [f"{name}, {entry['unit']}", interval(distance), interval(distance["floor"]), interval(entry["relative"]), interval(entry["requested"])]
        rows.append(row)
    return Table(header, rows)


def subgroup_table(subgroups: Mapping[str, Any]) -> Table:
    """Fidelity within the levels of categorical covariates, one figure per covariate."""
    rows = []
    for name, levels in subgroups.items():
        for level, entry in levels.items():
            counts = f"{number(entry['images']['synthetic'])} / {number(entry['images']['real'])}"
            for other, fidelity in entry["covariates"].items():
                key = "auc" if fidelity["kind"] == "categorical" else "r"
                bias = f"{interval(fidelity['bias'])} {fidelity['unit']}" if "bias" in fidelity else ""
                figure = fidelity[key]
                rows.append([f"{name} = {level}", f"{other}, {'AUC' if key == 'auc' else 'r'}", interval(figure), interval(figure["ceiling"]), bias, counts])
            if not entry["covariates"]:
                rows.append([f"{name} = {level}", "too few images", "", "", "", counts])
    return Table(["subgroup", "figure", "synthetic", "ceiling (real, held out)", "bias", "images, synthetic / real"], rows)


def extrapolation_table(metrics: Mapping[str, Any], ranges: Mapping[str, Any]) -> Table:
    """Requests beyond what training scans have, which other figures leave out."""
    rows = [
        [
            name,
            f"{number(ranges[name][0])} to {number(ranges[name][1])} {entry['unit']}",
            number(entry["extrapolation"]["mae"]["n"]),
            *(interval(entry["extrapolation"][key]) for key in ("mae", "bias")),
        ]
        for name, entry in metrics.items()
        if "extrapolation" in entry
    ]
    return Table(["requested beyond training", "training scans have", "images", "mean absolute error", "bias"], rows)


def correlation_table(correlations: Mapping[str, Any]) -> Table:
    """Pairs of covariates as requested and as measured."""
    header = ["pair", "requested", "measured on synthetic", "true (real)", "measured on real"]
    keys = ("requested", "measured", "true", "real_measured")
    return Table(header, [[pair.replace("~", " and "), *(interval(entry.get(k)) for k in keys)] for pair, entry in correlations.items()])


def band_table(spectrum: Mapping[str, Any]) -> Table:
    """Power over real in three bands."""
    labels = {"below_quarter": "below a quarter of Nyquist", "quarter_to_half": "a quarter to half", "above_half": "above half"}
    rows = [
        [label, percent(spectrum["synthetic"][band]), percent(spectrum["synthetic"][band].get("ceiling")), percent(spectrum["reconstruction"][band])]
        for band, label in labels.items()
    ]
    return Table(["spatial frequency", "synthetic over real", "real over real (random halves)", "reconstruction over its image"], rows)


def quality_table(quality: Mapping[str, Any]) -> Table:
    """Reconstruction of held-out scans."""
    settings = quality["settings"]
    similarity = "MS-SSIM" if settings["metric"] == "ms_ssim" else "SSIM (image too small for several scales)"
    detail = f"{similarity}, window {settings['kernel_size']}, {settings['scales']} scale{'s' if settings['scales'] != 1 else ''}"
    named = (("psnr", "PSNR, dB"), (settings["metric"], detail), ("l1", "mean absolute error"))
    return Table(["figure", "held-out scans", "n"], [[label, interval(quality[key], 4), number(quality[key]["n"])] for key, label in named])


def privacy_section(report: Mapping[str, Any]) -> Section:
    """The verdict of `privacy/report.json`, its gates and its controls."""
    counts, calibration = report["counts"], report["calibration"]
    text = [
        f"Verdict: {report['verdict']}. It is the worst of the gates below; none makes up for another. A gate is CONDITIONAL where its limit lies inside the "
        "interval, so that the data do not say. A verdict is the outcome of these tests, not a proof of anonymity.",
        f"{number(counts['candidates'])} images were drawn for {number(counts['planned'])} planned subjects; {number(counts['rejected'])} were rejected, "
        f"{number(counts['duplicates'])} left out as near duplicates of each other, {number(counts['failed'])} subjects failed, "
        f"{number(counts['released'])} released.",
    ]
    if calibration["status"] != "CALIBRATED":
        text.append(
            f"NOT CALIBRATED: there are {calibration['subjects']} calibration subjects and {calibration['needed']} are needed for the level "
            f"{calibration['level']:g}. Nothing was rejected for being too near to a training scan."
        )
    rows = [[gate["name"], interval(gate["figure"]), number(gate["limit"]), gate["outcome"]] for gate in report["gates"]]
    tables = [Table(["gate", "figure", "limit", "outcome"], rows)]
    if report["controls"]:
        planted = [[f"planted copies, {kind}", percent(figure), str(figure["n"])] for kind, figure in report["controls"]["positive"].items()]
        strangers = report["controls"]["negative"]
        tables.append(Table(["control", "flagged", "n"], [*planted, ["unseen real subjects", percent(strangers), str(strangers["n"])]]))
    drift = report["attacks"].get("covariate_drift")
    if drift:
        largest = max(drift, key=lambda name: abs(drift[name]))
        text.append(
            f"Released against planned covariates: the largest drift is that of {largest}, {drift[largest]:+.3f} (standard deviations, or of a level's share)."
        )
    loss = report["attacks"].get("denoising_loss")
    if loss:
        text.append(
            f"Whoever had the model's weights could tell training subjects by their denoising loss with AUC {interval(loss['auc'])} (0.5: not at all). "
            "Weights are therefore not part of the release."
        )
    return Section("privacy", "Does it give training subjects away?", text=text, tables=tables)


def distillation_section(privacy: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> Section:
    """Privacy and quality of the first model's cohort beside those of the second, which made the release.

    Parameters
    ----------
    privacy, metrics
        `privacy/report.json` and `evaluation/metrics.json` of the first and of the second.
    """
    gates = [{gate["name"]: gate for gate in report["gates"]} for report in privacy]
    rows = [["verdict", *(report["verdict"] for report in privacy)]]
    rows += [[name, *(interval(each[name]["figure"]) if name in each else "" for each in gates)] for name in gates[1]]
    for name, entry in metrics[1]["covariates"].items():
        key = "auc" if entry["kind"] == "categorical" else "r"
        rows.append([f"{name}, {key} with what was asked", *(interval(each["covariates"][name][key]) for each in metrics)])
    for band in metrics[1]["spectrum"]["synthetic"]:
        rows.append([f"power over that of real images, {band}", *(interval(each["spectrum"]["synthetic"][band]) for each in metrics)])
    text = [
        "The released images come from a second diffusion model that never saw a real scan: it learnt from images of the first model that the filter had "
        "accepted. Only the autoencoder, which both share, learnt from real scans."
    ]
    return Section("distillation", "The second model beside the first", text=text, tables=[Table(["figure", "first model", "second model"], rows)])


def augmentation_section(results: Mapping[str, Any], opened: Mapping[str, Any]) -> Section:
    """The verdict of `augmentation/results.json`, its arms and its contrasts.

    Parameters
    ----------
    results, opened
        `augmentation/results.json` and `augmentation/test-opened.json`.
    """
    primary, counts, arms = results["primary"], results["n"], results["arms"]
    reference = next(arm for arm in arms if arm["name"] == primary["reference"])
    cases = ", ".join(f"{number(n)} {level}" for level, n in counts["test_images_by_level"].items())
    chosen = "" if primary["chosen_on"] != "val" else f", chosen on the validation subjects among {', '.join(primary['candidates'])}"
    text = [
        f"Verdict: {results['verdict']}. {results['verdict_text']} The AUC of {primary['arm']}{chosen} minus that of {primary['reference']} is "
        f"{interval(primary['difference'])} on {number(counts['test_subjects'])} test subjects, mean of {counts['seeds']} classifiers. The verdict is "
        "“helps” where this interval lies above 0, “harms” where it lies below.",
        f"Classifiers learnt to tell {results['target']} from the image, with the same number of steps in every arm. Test images: {cases}. "
        "The generator learnt from training subjects alone. Intervals resample test subjects and the seeds of classifiers, not generators: there was one.",
        "The test split was opened once, after everything was fixed."
        if opened["designs"] == 1
        else f"The test split has been opened with {opened['designs']} different designs. Figures of the later ones, these among them, flatter.",
    ]
    shift = results.get("shift")
    if shift:
        saw = shift["subjects_that_the_generator_saw"]
        text.append(
            f"Kept out of training and tested on their own (shifted): {shift['covariate']} = {', '.join(shift['levels'])}."
            + (f" The generator did see {number(saw)} training subjects of them." if saw else "")
        )
    header = ["arm", "real images", "added", "AUC", "AUPRC", "Brier", "calibration error", "AUC on validation"]
    grouped = any("worst_group_auc" in arm["figures"].get("test", {}) for arm in arms)
    rows = []
    for arm in arms:
        figures_of = arm["figures"].get("test") or arm["figures"]["synthetic"]
        images = [number(sum(arm["images"][kind].values())) for kind in ("real", "added")]
        name = arm["name"] if "test" in arm["figures"] else f"{arm['name']} (tested on synthetic)"
        row = [name, *images, *(interval(figures_of[key]) for key in ("auc", "auprc", "brier", "ece")), number(arm["validation"]["auc"])]
        rows.append(row + ([interval(figures_of[key]) if key in figures_of else "" for key in ("worst_group_auc", "gap")] if grouped else []))
    header += [f"worst {results['subgroup']}", "gap"] if grouped else []
    compared = []
    for row in results["contrasts"]:
        second = row["delong"]
        adjusted = "declared beforehand" if row["primary"] else number(row["p_holm"])
        delong = [interval(second["difference"]), number(second["p"])] if second else ["more than two classes", ""]
        compared.append([f"{row['arm']} minus {row['reference']}", interval(row["difference"]), number(row["p"]), adjusted, *delong])
    tables = [Table(header, rows), Table(["difference of AUC", "bootstrap", "p", "p (Holm)", "DeLong (subjects only)", "p"], compared)]
    names = {"test": "test split", "shifted": "kept-out group", "synthetic": "synthetic images"}
    entries = []
    for arm in arms:
        found = arm["figures"]
        entries.append((arm["name"], [(words, found[key]["auc"]) for key, words in names.items() if key in found], found.get("test", {}).get("seeds", [])))
    pictures = [
        Picture(
            figures.arms(entries, reference["figures"]["test"]["auc"]["value"]),
            f"AUC of {len(arms)} arms with 95 % intervals.",
            "Further right is better. Bars: 95 % intervals; circles: single classifiers; grey line: the reference of the verdict; dotted: guessing. "
            "Overlapping bars do not mean that two arms are alike, since they saw the same test subjects: the table of differences decides.",
        )
    ]
    if results["ratio_curves"]:
        pictures.append(
            Picture(
                figures.ratio_curves(results["ratio_curves"]),
                "AUC over the number of images added per real one.",
                "Good: a line that rises from its value at 0, the classifier without added images, by more than the bars. Bad: one that falls. A flat line "
                "says that more images of this kind are of no use; published curves flatten at 10 to 1 (Sagers et al. 2023).",
            )
        )
    return Section("augmentation", "Does it help a classifier?", text=text, pictures=pictures, tables=tables)


def covariate_table(manifest: pd.DataFrame, requested: pd.DataFrame, covariates: Covariates) -> Table:
    """Counts and covariates per split, and as requested of the synthetic cohort."""
    groups = {split: manifest[manifest["split"] == split] for split in SPLITS} | {"synthetic (requested)": requested}
    rows = [
        ["subjects", *(number(int(g["subject_id"].nunique() if "subject_id" in g else len(g))) for g in groups.values())],
        ["scans", *(number(len(g)) for g in groups.values())],
    ]
    for name, covariate in covariates.items():
        if isinstance(covariate, CategoricalCovariate):
            for level in covariate.levels:
                rows.append([f"{name} = {level}", *(_share(g[name], level) for g in groups.values())])
        else:
            rows.append([f"{name}, {covariate.unit}", *(_spread(g[name]) for g in groups.values())])
        if any(g[name].isna().any() for g in groups.values()):
            rows.append([f"{name} missing", *(number(int(g[name].isna().sum())) for g in groups.values())])
    return Table(["", *groups], rows)


def _share(values: pd.Series, level: str) -> str:
    present = values.dropna()
    return f"{(present == level).sum()} ({100 * (present == level).mean():.0f} %)" if len(present) else "–"


def _spread(values: pd.Series) -> str:
    present = values.dropna().astype(float)
    if present.empty:
        return "–"
    return f"{number(present.mean())} ± {number(present.std(ddof=1) if len(present) > 1 else 0.0)} ({number(present.min())} to {number(present.max())})"


def quality_control(qc: pd.DataFrame) -> tuple[list[str], list[Table]]:
    """What preprocessing did: sentences, and the scans left out with their reasons."""
    kept = qc[qc["status"] == "ok"]
    text = [f"{number(len(kept))} of {number(len(qc))} scans preprocessed, {number(len(qc) - len(kept))} left out."]
    for column, words in (("shape", "Sizes as acquired (voxels)"), ("spacing_mm", "Voxel sizes as acquired (mm)"), ("orientation", "Orientations")):
        counts = (
            kept[column].dropna().value_counts(sort=False).sort_index().sort_values(ascending=False, kind="stable") if column in kept else pd.Series(dtype=int)
        )
        if len(counts):
            shown = "; ".join(f"{str(value).strip('[]')} ({number(int(count))})" for value, count in counts.head(4).items())
            text.append(f"{words}: {shown}{f'; and {len(counts) - 4} more' if len(counts) > 4 else ''}.")
    if "cut_off_share" in kept and kept["cut_off_share"].notna().any():
        cut = kept["cut_off_share"].dropna()
        worst = kept["scan_id"].loc[cut.index[int(cut.argmax())]]
        text.append(f"Foreground outside the grid: median {100 * cut.median():.2f} %, at most {100 * cut.max():.2f} % ({worst}).")
    lost = qc[qc["status"] != "ok"]
    if lost.empty:
        return text, []
    rows = []
    for reason, group in lost.groupby("reason", sort=True):
        ids = ", ".join(group["scan_id"].head(5))
        rows.append([str(reason), number(len(group)), f"{ids}{', …' if len(group) > 5 else ''}"])
    return text, [Table(["reason", "scans", "which"], rows)]


# ------------------------------------------------------------------------------------------------------ page


def _show_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value, 4) if isinstance(value, float) else str(value)


def render(*, title: str, study: str, lead: str, simulated: bool, headline: Sequence[Headline], sections: Iterable[Section]) -> bytes:
    """The page as UTF-8; all text is escaped.

    Parameters
    ----------
    title, study, lead
        Heading, name of the study, one introductory paragraph.
    simulated
        Shows the banner that says so.
    headline, sections
        In the order of the page; sections without content are left out.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "is_figure": lambda keys: set(keys) >= _FIGURE_KEYS,
        "show_figure": lambda figure: interval(figure, 4) + (f", n {figure['n']}" if "n" in figure else ""),
        "show_value": _show_value,
    }
    filled = [s for s in sections if s.text or s.pictures or s.tables or s.cards or s.viewer]
    script = environment.get_template("viewer.js.jinja").render() if any(s.viewer for s in filled) else ""
    page = environment.get_template("page.html.jinja").render(
        title=title,
        study=study,
        lead=lead,
        simulated=simulated,
        headline=headline,
        sections=filled,
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() if script else "",
    )
    return page.encode("utf-8")
