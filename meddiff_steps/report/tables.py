"""Tables of the report, from metrics.json, the plan and what preprocessing wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from meddiff_steps.config import CategoricalCovariate, Covariates
from meddiff_steps.core.registries import FEATURE_SPACES, METRICS
from meddiff_steps.imaging.registration import registered
from meddiff_steps.report import names
from meddiff_steps.report.names import Names
from meddiff_steps.report.page import Table
from meddiff_steps.report.sentences import spelt
from meddiff_steps.report.wording import interval, limit, number, p_value, percent

SPLITS = ("train", "val", "calibration", "test")


def fidelity_table(metrics: Mapping[str, Any], called: Names, instrument: str = "predictors") -> Table:
    """Every fidelity figure beside its ceiling, as `instrument` measured it."""
    rows = []
    labels = {
        "r": "r",
        "slope": "slope",
        "mae": "mean absolute error",
        "bias": "bias",
        "auc": "AUC",
        "ece": "calibration error",
    }
    for name, entry in metrics.items():
        for key, label in labels.items():
            if key in entry:
                unit = f", {entry['unit']}" if key in ("mae", "bias") else ""
                share = percent(entry["share_of_ceiling"]) if key in ("r", "auc") else ""
                rows.append(
                    [
                        called.covariate(name),
                        f"{label}{unit}",
                        interval(entry[key]),
                        interval(entry[key].get("ceiling")),
                        share,
                        number(entry[key]["n"]),
                    ]
                )
    return Table(
        ["covariate", "figure", "synthetic", "ceiling (real, held out)", "share of ceiling", "n"],
        rows,
        f"How well covariates are followed, measured by {instrument}. Good: r, AUC and slope at their ceiling, bias and"
        " mean absolute error at theirs.",
    )


def realism_table(metrics: Mapping[str, Any]) -> Table:
    """Realism and diversity of every feature space beside real against real."""
    known = {
        "frechet": ("Frechet distance (squared)", "floor", "at its floor"),
        "kid": ("kernel distance (KID)", "floor", "near 0"),
        "classifier_auc": ("AUC of telling from real scans", "floor", "0.5"),
        "precision": ("precision: look real", "ceiling", "at its ceiling"),
        "recall": ("recall: real ones within reach", "ceiling", "at its ceiling"),
        "density": ("density", "ceiling", "at its ceiling"),
        "coverage": ("coverage: real ones with one nearby", "ceiling", "at its ceiling"),
        "vendi": ("Vendi score: how many differ", "ceiling", "at its ceiling"),
    }
    rows = []
    for space, entry in metrics["realism"].items():
        both = entry | metrics["diversity"]["features"].get(space, {})
        for key, (label, reference, good) in (known | _others(entry, known)).items():
            if key in both:
                figure = both[key]
                rows.append([names.space(space), label, *_beside(figure, reference), good, number(figure["n"])])
    settings = metrics["diversity"]["ssim_settings"]
    figure = metrics["diversity"][settings["metric"]]
    label = f"{spelt(settings['metric'])} of {number(figure['pairs'])} pairs, window {settings['kernel_size']}"
    rows.append(["images", label, *_beside(figure, "floor"), "near that of real pairs", number(figure["n"])])
    header = ["features", "figure", "synthetic against held-out real", "real against real", "reconstructions"]
    return Table(
        [*header, "good is", "n"],
        rows,
        "Realism and diversity by feature space. Real against real is the floor of a distance and the ceiling of a"
        " share: as many training scans in place of the synthetic images.",
    )


def space_table(spaces: Mapping[str, Any]) -> Table:
    """What the feature spaces are, and the digest of all that defines their numbers."""
    return Table(
        ["feature space", "key in files", "digest", "what it is", "what it sees and misses"],
        [
            [
                names.space(key),
                key,
                entry["digest"],
                entry["description"],
                FEATURE_SPACES.entry(key)["summary"] if key in FEATURE_SPACES.names() else "",
            ]
            for key, entry in spaces.items()
        ],
        "The feature spaces. Figures of equal digest are of one space, and can be compared between runs.",
    )


def _beside(figure: Mapping[str, Any], reference: str) -> list[str]:
    """A figure, what real scans give, and what reconstructions of real scans do, where there are enough."""

    def shown(one: Mapping[str, Any]) -> str:
        return f"{interval(one)}, p {p_value(one['p_value'])}" if "p_value" in one else interval(one)

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
            words = _SPOILT.get(name, names.metric(name))
            rows.append([names.space(space), words, interval(entry["real"]), *cells, ", ".join(seen) or "NOTHING"])
    return Table(
        ["features", "figure", "the scans as they are", *map(plain_way, ways), "sees"],
        rows,
        "Held-out scans, as they are and spoilt, measured as if they were synthetic. ●: worse, the figure sees the"
        " fault; ○: better, it praises the fault; no mark: it is blind to it.",
    )


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
    return Table(["structure that is left", *shown], rows, "AUC of telling images from held-out scans. Good: 0.5.")


def _others(entry: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, tuple[str, str, str]]:
    """Figures of realism that this page has no words of its own for, as `known` has them."""
    found = [
        key for key, figure in entry.items() if key not in known and isinstance(figure, dict) and "floor" in figure
    ]
    return {
        key: (METRICS.entry(key)["summary"] if key in METRICS.names() else names.spaced(key), "floor", "at its floor")
        for key in found
    }


def distribution_table(metrics: Mapping[str, Any], called: Names) -> Table:
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
            f"{called.covariate(name)}, {entry['unit']}",
            interval(distance),
            interval(distance["floor"]),
            interval(entry["relative"]),
            interval(entry["requested"]),
        ]
        rows.append(row)
    return Table(
        header,
        rows,
        "How far the distribution of what is measured in synthetic images is from that in held-out scans (Wasserstein"
        " distance). Good: as near as random halves of real scans.",
    )


def subgroup_table(subgroups: Mapping[str, Any], called: Names) -> Table:
    """Fidelity within the levels of categorical covariates, one figure per covariate."""
    rows = []
    for name, levels in subgroups.items():
        for level, entry in levels.items():
            shown = f"{called.covariate(name)} = {level}"
            counts = f"{number(entry['images']['synthetic'])} / {number(entry['images']['real'])}"
            for other, fidelity in entry["covariates"].items():
                key = "auc" if fidelity["kind"] == "categorical" else "r"
                bias = f"{interval(fidelity['bias'])} {fidelity['unit']}" if "bias" in fidelity else ""
                figure = fidelity[key]
                rows.append(
                    [
                        shown,
                        f"{called.covariate(other)}, {'AUC' if key == 'auc' else 'r'}",
                        interval(figure),
                        interval(figure["ceiling"]),
                        bias,
                        counts,
                    ]
                )
            if not entry["covariates"]:
                rows.append([shown, "too few images", "", "", "", counts])
    return Table(
        ["subgroup", "figure", "synthetic", "ceiling (real, held out)", "bias", "images, synthetic / real"],
        rows,
        "How well covariates are followed within each subgroup. Good: alike in all, each at its ceiling.",
    )


def extrapolation_table(metrics: Mapping[str, Any], ranges: Mapping[str, Any], called: Names) -> Table:
    """Requests beyond what training scans have, which other figures leave out."""
    rows = [
        [
            called.covariate(name),
            f"{number(ranges[name][0])} to {number(ranges[name][1])} {entry['unit']}",
            number(entry["extrapolation"]["mae"]["n"]),
            *(interval(entry["extrapolation"][key]) for key in ("mae", "bias")),
        ]
        for name, entry in metrics.items()
        if "extrapolation" in entry
    ]
    return Table(
        ["requested beyond training", "training scans have", "images", "mean absolute error", "bias"],
        rows,
        "Requests beyond what training scans have. They count in no other figure.",
    )


def correlation_table(correlations: Mapping[str, Any], called: Names) -> Table:
    """Pairs of covariates as requested and as measured."""
    header = ["pair", "requested", "measured on synthetic", "true (real)", "measured on real"]
    keys = ("requested", "measured", "true", "real_measured")
    return Table(
        header,
        [[called.pair(pair), *(interval(entry.get(k)) for k in keys)] for pair, entry in correlations.items()],
        "Correlations of covariates. Good: measured on synthetic as measured on real, where requested is as true.",
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
        "Power in three bands of spatial frequency. Good: 100 %. Blur is below, noise above.",
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
        [[label, interval(quality[key]), number(quality[key]["n"])] for key, label in named],
        "Held-out scans after encoding and decoding. Good: PSNR and similarity high, error low.",
    )


def covariate_table(manifest: pd.DataFrame, requested: pd.DataFrame, covariates: Covariates, called: Names) -> Table:
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
        words = called.covariate(name)
        if isinstance(covariate, CategoricalCovariate):
            for level in covariate.levels:
                rows.append([f"{words} = {level}", *(_share(g[name], level) for g in groups.values())])
        else:
            rows.append([f"{words}, {covariate.unit}", *(_spread(g[name]) for g in groups.values())])
        if any(g[name].isna().any() for g in groups.values()):
            rows.append([f"{words} missing", *(number(int(g[name].isna().sum())) for g in groups.values())])
    return Table(
        ["", *groups],
        rows,
        "Who was in the cohort, by split, and who was asked for. Numbers: mean ± standard deviation (smallest to"
        " largest).",
    )


def name_table(covariates: Covariates, called: Names) -> Table:
    """Names of covariates on the page, their keys in files, and what they are."""
    rows = []
    for key, covariate in covariates.items():
        if isinstance(covariate, CategoricalCovariate):
            values = ", ".join(covariate.levels)
        else:
            low, high = covariate.range
            values = f"{limit(low)} to {limit(high)} {covariate.unit}"
        rows.append([called.covariate(key), key, values, covariate.description])
    return Table(
        ["name on this page", "key in files", "plausible values", "description"],
        rows,
        "The covariates of the study.",
    )


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
    return text, [Table(["reason", "scans", "which"], rows, "Scans that preprocessing left out.")]


def stress_table(along: Mapping[str, Any], called: Names) -> Table:
    """AUC of every arm in the strata of a covariate, on planned images and on test scans, from a part of `stress` of
    `augmentation/results.json`.
    """
    rows = [
        [arm, stratum, *(_of_stratum(along[kind][arm], stratum) for kind in ("synthetic", "real"))]
        for arm in along["synthetic"]
        for stratum in along["strata"]
    ]
    named = called.covariate(along["covariate"])
    return Table(
        ["arm", named, "synthetic", "real test scans"],
        rows,
        f"Stress test along {named}: AUC within strata, on synthetic images that were planned for it and on test scans."
        " Good: alike from stratum to stratum, and both columns alike. Where they differ, the synthetic one"
        " tells of the generator.",
    )


def _of_stratum(entry: Mapping[str, Any], stratum: str) -> str:
    found = entry.get("groups", {}).get(stratum)
    return interval(found) if found and found["value"] is not None else "no images of both classes"


def neighbours_table(arms: Sequence[Mapping[str, Any]], nearby: Mapping[str, Any]) -> Table:
    """AUC of every arm on test scans alone and with neighbours, from `augmentation/neighbours.json`."""
    figures = {arm["name"]: arm["figures"] for arm in nearby["arms"]}
    return Table(
        ["arm", "AUC", "AUC with neighbours", "gain"],
        [
            [
                arm["name"],
                interval(arm["figures"]["test"]["auc"]),
                interval(figures[arm["name"]]["auc"]),
                interval(figures[arm["name"]]["gain"]),
            ]
            for arm in arms
            if arm["name"] in figures
        ],
        f"Every test scan alone, and averaged with {nearby['count']} neighbours that the model drew anew from it."
        " Good: a gain above 0.",
    )
