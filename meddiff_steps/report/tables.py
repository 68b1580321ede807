"""Tables of the report, from metrics.json, the plan and what preprocessing wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from meddiff_steps.config import CategoricalCovariate, Covariates
from meddiff_steps.core.registries import METRICS
from meddiff_steps.imaging.registration import registered
from meddiff_steps.report.page import Table
from meddiff_steps.report.wording import interval, number, percent

SPLITS = ("train", "val", "calibration", "test")


def fidelity_table(metrics: Mapping[str, Any], title: str = "covariate") -> Table:
    """Every fidelity figure beside its ceiling; `title` heads the covariates."""
    rows = []
    names = {
        "r": "r",
        "slope": "slope",
        "mae": "mean absolute error",
        "bias": "bias",
        "auc": "AUC",
        "ece": "calibration error",
    }
    for name, entry in metrics.items():
        for key, label in names.items():
            if key in entry:
                unit = f", {entry['unit']}" if key in ("mae", "bias") else ""
                share = percent(entry["share_of_ceiling"]) if key in ("r", "auc") else ""
                rows.append(
                    [
                        name,
                        f"{label}{unit}",
                        interval(entry[key]),
                        interval(entry[key].get("ceiling")),
                        share,
                        number(entry[key]["n"]),
                    ]
                )
    return Table([title, "figure", "synthetic", "ceiling (real, held out)", "share of ceiling", "n"], rows)


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
        for key, (label, reference, good) in (names | _others(entry, names)).items():
            if key in both:
                figure = both[key]
                rows.append([space, label, *_beside(figure, reference), good, number(figure["n"])])
    settings = metrics["diversity"]["ssim_settings"]
    figure = metrics["diversity"][settings["metric"]]
    label = (
        f"{'MS-SSIM' if settings['metric'] == 'ms_ssim' else 'SSIM'} of {number(figure['pairs'])} pairs, window"
        f" {settings['kernel_size']}"
    )
    rows.append(["images", label, *_beside(figure, "floor"), "near that of real pairs", number(figure["n"])])
    header = ["features", "figure", "synthetic against held-out real", "real against real", "reconstructions"]
    return Table([*header, "good is", "n"], rows)


def _beside(figure: Mapping[str, Any], reference: str) -> list[str]:
    """A figure, what real scans give, and what reconstructions of real scans do, where there are enough."""

    def shown(one: Mapping[str, Any]) -> str:
        return f"{interval(one)}, p {number(one['p_value'], 2)}" if "p_value" in one else interval(one)

    decoded = figure.get("reconstructions")
    return [shown(figure), interval(figure[reference]), shown(decoded) if decoded else ""]


#: Figures that stand in the sanity table, by the part of metrics.json that they are of.
_SPOILT = {
    "frechet": "Frechet distance",
    "kid": "KID",
    "classifier_auc": "AUC of telling from real",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "vendi": "Vendi score",
    "below_quarter": "below a quarter of Nyquist",
    "quarter_to_half": "a quarter to half",
    "above_half": "above half",
}
_MARKS = {"worse": " ●", "better": " ○", "alike": "", "unknown": " ?"}


def sanity_table(sanity: Mapping[str, Any]) -> Table:
    """What each figure says of scans that were spoilt in a known way; empty where none were."""
    if "figures" not in sanity:
        return Table([], [])
    ways = list(sanity["ways"])
    rows = []
    for space, figures in sanity["figures"].items():
        for name in [*(key for key in _SPOILT if key in figures), *sorted(set(figures) - set(_SPOILT))]:
            entry = figures[name]
            seen = [plain_way(way) for way in ways if way in entry["sees"]]
            cells = [f"{number(entry[way]['value'])}{_MARKS[entry[way]['verdict']]}" for way in ways]
            words = _SPOILT.get(name, name)
            rows.append([space, words, interval(entry["real"]), *cells, ", ".join(seen) or "NOTHING"])
    return Table(["features", "figure", "the scans as they are", *map(plain_way, ways), "sees"], rows)


def plain_way(way: str) -> str:
    """The name of a way to spoil scans, as people write it."""
    return way.replace("_and_", " + ").replace("_", " ")


def curve_table(curves: Mapping[str, Any]) -> Table:
    """AUC over what is left of the detail; empty where it was not measured."""
    if "skipped" in curves:
        return Table([], [])
    kinds = {
        "synthetic": "synthetic against held-out real",
        "training": "real against real",
        "reconstructions": "reconstructions",
    }
    shown = {words: curves[kind] for kind, words in kinds.items() if kind in curves}
    rows = []
    for i, cutoff in enumerate(curves["cutoffs_cycles_per_voxel"]):
        finest = curves["finest_mm"][i]
        size = f", {number(finest)} mm" if finest else ""
        words = f"coarser than {number(0.5 / cutoff)} voxels{size}" if cutoff else "all"
        rows.append([words, *(interval(figures[i]) for figures in shown.values())])
    return Table(["structure that is left", *shown], rows)


def _others(entry: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, tuple[str, str, str]]:
    """Figures of realism that this page has no words of its own for, as `known` has them."""
    found = [
        key for key, figure in entry.items() if key not in known and isinstance(figure, dict) and "floor" in figure
    ]
    return {
        key: (METRICS.entry(key)["summary"] if key in METRICS.names() else key, "floor", "near its floor")
        for key in found
    }


def distribution_table(metrics: Mapping[str, Any]) -> Table:
    """How far distributions of measured covariates are apart."""
    header = [
        "covariate",
        "distance of distributions",
        "of random halves of real scans",
        "in standard deviations of real scans",
        "requested from true",
    ]
    rows = []
    for name, entry in metrics.items():
        distance = entry["wasserstein"]
        row = [
            f"{name}, {entry['unit']}",
            interval(distance),
            interval(distance["floor"]),
            interval(entry["relative"]),
            interval(entry["requested"]),
        ]
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
                rows.append(
                    [
                        f"{name} = {level}",
                        f"{other}, {'AUC' if key == 'auc' else 'r'}",
                        interval(figure),
                        interval(figure["ceiling"]),
                        bias,
                        counts,
                    ]
                )
            if not entry["covariates"]:
                rows.append([f"{name} = {level}", "too few images", "", "", "", counts])
    return Table(
        ["subgroup", "figure", "synthetic", "ceiling (real, held out)", "bias", "images, synthetic / real"], rows
    )


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
    return Table(
        header,
        [[pair.replace("~", " and "), *(interval(entry.get(k)) for k in keys)] for pair, entry in correlations.items()],
    )


def band_table(spectrum: Mapping[str, Any]) -> Table:
    """Power over real in three bands."""
    labels = {
        "below_quarter": "below a quarter of Nyquist",
        "quarter_to_half": "a quarter to half",
        "above_half": "above half",
    }
    rows = [
        [
            label,
            percent(spectrum["synthetic"][band]),
            percent(spectrum["synthetic"][band].get("ceiling")),
            percent(spectrum["reconstruction"][band]),
        ]
        for band, label in labels.items()
    ]
    return Table(
        ["spatial frequency", "synthetic over real", "real over real (random halves)", "reconstruction over its image"],
        rows,
    )


def quality_table(quality: Mapping[str, Any]) -> Table:
    """Reconstruction of held-out scans."""
    settings = quality["settings"]
    similarity = "MS-SSIM" if settings["metric"] == "ms_ssim" else "SSIM (image too small for several scales)"
    detail = (
        f"{similarity}, window {settings['kernel_size']}, {settings['scales']}"
        f" scale{'s' if settings['scales'] != 1 else ''}"
    )
    named = (("psnr", "PSNR, dB"), (settings["metric"], detail), ("l1", "mean absolute error"))
    return Table(
        ["figure", "held-out scans", "n"],
        [[label, interval(quality[key], 4), number(quality[key]["n"])] for key, label in named],
    )


def covariate_table(manifest: pd.DataFrame, requested: pd.DataFrame, covariates: Covariates) -> Table:
    """Counts and covariates per split, and as requested of the synthetic cohort."""
    groups = {split: manifest[manifest["split"] == split] for split in SPLITS} | {"synthetic (requested)": requested}
    rows = [
        [
            "subjects",
            *(number(int(g["subject_id"].nunique() if "subject_id" in g else len(g))) for g in groups.values()),
        ],
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
    return (
        f"{number(present.mean())} ± {number(present.std(ddof=1) if len(present) > 1 else 0.0)}"
        f" ({number(present.min())} to {number(present.max())})"
    )


def quality_control(qc: pd.DataFrame) -> tuple[list[str], list[Table]]:
    """What preprocessing did: sentences, and the scans left out with their reasons."""
    kept = qc[qc["status"] == "ok"]
    text = [f"{number(len(kept))} of {number(len(qc))} scans preprocessed, {number(len(qc) - len(kept))} left out."]
    for column, words in (
        ("shape", "Sizes as acquired (voxels)"),
        ("spacing_mm", "Voxel sizes as acquired (mm)"),
        ("orientation", "Orientations"),
    ):
        counts = (
            kept[column].dropna().value_counts(sort=False).sort_index().sort_values(ascending=False, kind="stable")
            if column in kept
            else pd.Series(dtype=int)
        )
        if len(counts):
            shown = "; ".join(
                f"{str(value).strip('[]')} ({number(int(count))})" for value, count in counts.head(4).items()
            )
            text.append(f"{words}: {shown}{f'; and {len(counts) - 4} more' if len(counts) > 4 else ''}.")
    if "cut_off_share" in kept and kept["cut_off_share"].notna().any():
        cut = kept["cut_off_share"].dropna()
        worst = kept["scan_id"].loc[cut.index[int(cut.argmax())]]
        text.append(
            f"Foreground outside the grid: median {100 * cut.median():.2f} %, at most {100 * cut.max():.2f} %"
            f" ({worst})."
        )
    if told := registered(kept):
        text.append(f"{told}.")
    lost = qc[qc["status"] != "ok"]
    if lost.empty:
        return text, []
    rows = []
    for reason, group in lost.groupby("reason", sort=True):
        ids = ", ".join(group["scan_id"].head(5))
        rows.append([str(reason), number(len(group)), f"{ids}{', …' if len(group) > 5 else ''}"])
    return text, [Table(["reason", "scans", "which"], rows)]
