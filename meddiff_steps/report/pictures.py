"""Pictures of the report with their captions: which images are shown, chosen by rule and never by eye."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from meddiff_steps.config import CategoricalCovariate, Covariates, Study
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.imaging.signed_distances import LABELS
from meddiff_steps.report import charts, figures, names
from meddiff_steps.report.lineup import tile
from meddiff_steps.report.names import Names
from meddiff_steps.report.page import Charts, Gallery, Picture, Shot
from meddiff_steps.report.viewer import Viewer, viewer

#: Pictures beside each other by axes of an image, and letters in a line of their captions.
CAPTIONS = {3: (2, 82), 2: (6, 26)}
#: Pairs of a real scan and the synthetic image with the most similar request on the contact sheet (3D and 2D).
PAIRS = {3: 6, 2: 12}
#: Synthetic images that are shown with their label maps.
LABELLED = 8
#: Reconstructions searched for the shown ones (worst, middle, best tenth).
SEARCHED = 200
#: Facts about an image, and the image.
Shown = tuple[list[str], np.ndarray]


def _facts(row: pd.Series, covariates: Covariates) -> list[str]:
    """Covariates of one image; labels with their name, numbers with their unit."""
    facts, called = [], names.of(covariates)
    for key, covariate in covariates.items():
        value, name = row[key], called.covariate(key)
        if pd.isna(value):
            facts.append(f"{name} –")
        else:
            facts.append(
                f"{name} {value}"
                if isinstance(covariate, CategoricalCovariate)
                else f"{name} {_short(float(value))} {covariate.unit}"
            )
    return facts


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value.is_integer() else f"{value:.3g}"


def _coordinates(table: pd.DataFrame, covariates: Covariates, reference: pd.DataFrame) -> np.ndarray:
    """Covariates on comparable scales, (rows, dimensions): standard deviations for numbers, 2 between labels, 0 where
    missing.
    """
    columns = []
    for name, covariate in covariates.items():
        if isinstance(covariate, CategoricalCovariate):
            columns += [np.sqrt(2.0) * (table[name] == level).to_numpy(dtype=float) for level in covariate.levels]
        else:
            known = reference[name].astype(float)
            spread = float(known.std()) or 1.0
            columns.append(((table[name].astype(float) - known.mean()) / spread).fillna(0.0).to_numpy())
    return np.stack(columns, axis=1)


def matched_pairs(
    real: Shards, synthetic: Shards, scans: pd.DataFrame, planned: pd.DataFrame, study: Study
) -> list[tuple[Shown, Shown]]:
    """Held-out scans spread evenly over the first covariate's order, each with the synthetic image whose request is
    closest, and their covariates.
    """
    held = _rows(real, "scan_id", scans[scans["split"] == "test"])
    made = _rows(synthetic, "sample_id", planned)
    if held.empty or made.empty:
        raise UserError(
            "report: there are no preprocessed test scans or no planned synthetic images to show. Check splits and the"
            " plan."
        )
    places, requests = (_coordinates(t, study.covariates, scans) for t in (held, made))
    order = np.lexsort((held["scan_id"].to_numpy(dtype=str), places[:, 0]))
    shown = order[
        np.unique(
            np.linspace(0, len(order) - 1, min(PAIRS[study.spatial_dims], len(order), len(made))).round().astype(int)
        )
    ]
    free = np.ones(len(made), dtype=bool)
    pairs = []
    for i in shown:
        partner = int(np.where(free, np.square(requests - places[i]).sum(1), np.inf).argmin())
        free[partner] = False
        one, other = (
            (_facts(table.iloc[at], study.covariates), shards.tensor("image", int(table["row"].iloc[at])))
            for shards, table, at in ((real, held, i), (synthetic, made, partner))
        )
        pairs.append((one, other))
    return pairs


def contact_sheet(pairs: list[tuple[Shown, Shown]], study: Study) -> Picture:
    """All pairs as one picture."""
    spatial_dims = study.spatial_dims
    columns, width = CAPTIONS[spatial_dims]
    tiles = [
        [figures.Tile(image, figures.wrapped(facts, width)) for facts, image in side]
        for side in zip(*pairs, strict=True)
    ]
    kind = "Simulated, held out" if study.cohort.source == "simulated" else "Real, held out"
    if spatial_dims == 3:  # pairs side by side
        blocks = [figures.Block("", [tile for pair in zip(*tiles, strict=True) for tile in pair], columns)]
        title = f"Left: {kind.lower()}. Right: synthetic, with the covariates that were requested"
    else:
        blocks = [
            figures.Block(kind, tiles[0], columns, figures.REAL),
            figures.Block("Synthetic, with the covariates that were requested", tiles[1], columns, figures.SYNTHETIC),
        ]
        title = ""
    how = (
        "Axial, coronal and sagittal middle slices, radiological convention (the subject's right is on the left; in"
        " sagittal slices, anterior). "
        if spatial_dims == 3
        else ""
    )
    return Picture(
        figures.image_grid(blocks, title=title),
        f"{len(pairs)} held-out {kind.split(',')[0].lower()} images beside {len(pairs)} synthetic ones, each with its"
        " covariates.",
        f"{how}Grey values 0 to 1, bicubic. Each held-out scan stands beside the synthetic image whose request is"
        " closest; none was picked by eye. Good: as sharp as its partner, with structures of the size that was asked"
        " for. Bad: haze in the background, blur, or one image everywhere.",
    )


def gallery(pairs: list[tuple[Shown, Shown]], study: Study) -> Gallery:
    """All pairs, for the page."""
    kind = "Simulated, held out" if study.cohort.source == "simulated" else "Real, held out"
    shots = [
        tuple(
            Shot(tile(image), words, ", ".join(facts))
            for words, (facts, image) in zip((kind, "Synthetic"), pair, strict=True)
        )
        for pair in pairs
    ]
    how = (
        " Axial, coronal and sagittal middle slices, radiological convention (the subject's right is on the left; in"
        " sagittal slices, anterior)."
        if study.spatial_dims == 3
        else ""
    )
    return Gallery(
        [(first, second) for first, second in shots],
        "Each held-out scan beside the synthetic image whose request is closest; none was picked by eye. Under"
        f" synthetic images stands what was asked for.{how} Good: as sharp as its partner, with structures of the size"
        " that was asked for. Bad: haze in the background, blur, or one image everywhere.",
        wide=study.spatial_dims == 3,
    )


def slices(pairs: list[tuple[Shown, Shown]]) -> Viewer:
    """The first, middle and last pair."""
    chosen = [pairs[i] for i in sorted({0, len(pairs) // 2, len(pairs) - 1})]
    groups = [
        [
            (f"{kind}: {', '.join(facts)}", image)
            for kind, (facts, image) in zip(("Held out", "Synthetic"), pair, strict=True)
        ]
        for pair in chosen
    ]
    return viewer(
        groups,
        "Move the sliders, or click or drag in a slice: all planes of both volumes follow. Good: the same structures in"
        " the same places, as sharp in every plane. Bad: texture that breaks off from slice to slice, or haze outside"
        " the head. Radiological convention, 256 grey levels.",
    )


def label_maps(synthetic: Shards, planned: pd.DataFrame, structures: Collection[str]) -> Picture:
    """The first synthetic images of a study with pairs, with the label maps that they were drawn from."""
    rows = _rows(synthetic, "sample_id", planned)["row"].iloc[:LABELLED].tolist()
    tiles = []
    for row in rows:
        tiles.append(figures.Tile(synthetic.tensor("image", row), "image"))
        tiles.append(figures.Tile(synthetic.tensor(LABELS, row)[None], "label map", len(structures)))
    return Picture(
        figures.image_grid([figures.Block("", tiles, 4)]),
        f"{len(rows)} synthetic images, each beside its label map.",
        f"The first of the plan, each with the label map that it was drawn from ({', '.join(structures)}). Good:"
        " borders of the map are those that the image shows. Bad: tissue beside its label, ragged or torn structures.",
    )


def _rows(shards: Shards, key: str, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `table` that have an image, with its shard row."""
    ids = shards.column(key)
    return pd.DataFrame({key: ids, "row": range(len(ids))}).merge(table, on=key, how="inner")


def showcase(shards: Shards, study: Study) -> list[Picture]:
    """A picture per sweep and one of interpolations."""
    called = names.of(study.covariates)
    table = pd.DataFrame({c: shards.column(c) for c in ("panel", "row", "position", "label")}).reset_index(names="at")
    views = ("axial", "coronal")
    pictures = []
    for panel in dict.fromkeys(table["panel"]):
        rows = []
        for _, part in table[table["panel"] == panel].groupby("row", sort=True):
            ordered = part.sort_values("position", kind="stable")
            rows.append(
                [
                    figures.Tile(shards.tensor("image", at), figures.plain(label))
                    for at, label in zip(ordered["at"], ordered["label"], strict=True)
                ]
            )
        if panel.startswith("sweep:"):
            key = panel.removeprefix("sweep:")
            covariate, name = study.covariates.get(key), called.covariate(key)
            unit = (
                f" ({covariate.unit})"
                if covariate is not None and not isinstance(covariate, CategoricalCovariate)
                else ""
            )
            caption = (
                f"{name}{unit} moved while noise and all other covariates stay. Right: last minus first image, red is"
                " brighter. "
            )
            caption += (
                "Good: what this covariate does to anatomy changes step by step, and nothing else. Bad: no change, or"
                " another subject at every step."
            )
            pictures.append(
                Picture(
                    figures.strip(rows, difference=True, views=views),
                    f"Synthetic images of {len(rows)} subjects as {name} changes.",
                    caption,
                )
            )
        else:
            caption = (
                "From one synthetic subject to another: noise and covariates change together. Good: every image between"
                " is a subject of its own. Bad: two subjects seen through each other."
            )
            picture = figures.strip(rows, difference=False, views=views, row_name="pair")
            pictures.append(Picture(picture, f"{panel}: synthetic images between pairs of subjects.", caption))
    return pictures


def fidelity(predictions: pd.DataFrame, metrics: Mapping[str, Any], called: Names) -> list[Charts]:
    """Requested against measured covariates."""
    if not metrics or predictions.empty:
        return []
    shown = {name: called.covariate(name) for name in metrics}
    alt = f"Requested against measured {', '.join(shown.values())}, synthetic images over held-out real scans."
    caption = (
        "Orange: synthetic, requested against measured. Grey: held-out real scans, true against measured: the"
        " predictor's own error, the ceiling. Bars: quartiles. Good: orange lies along grey. Bad: orange is flatter"
        " (requests are followed in part), off to one side (a bias), or a cloud."
    )
    return [Charts(charts.scatter(predictions, metrics, shown), alt, caption)]


def subgroups(measured: Mapping[str, Any], called: Names) -> list[Charts]:
    """How well covariates are shown within each level of each label, from the part `subgroups` of
    evaluation/metrics.json.
    """
    panels = []
    for label, levels in measured.items():
        known = {level: part["covariates"] for level, part in levels.items() if part["covariates"]}
        first: Mapping[str, Any] = next(iter(known.values()), {})
        covariates = [name for name in first if all(name in part for part in known.values())]
        read = {
            level: [part[name].get("r") or part[name]["auc"] for name in covariates] for level, part in known.items()
        }
        if len(read) > 1 and covariates:
            panels.append(
                charts.Bars(
                    f"by {figures.plain(called.covariate(label))}",
                    [called.covariate(name) for name in covariates],
                    read,
                    {level: [one.get("ceiling") for one in found] for level, found in read.items()},
                )
            )
    if not panels:
        return []
    return [
        Charts(
            charts.bars(panels, "r of numbers, AUC of labels"),
            "How well each covariate is shown, by subgroup.",
            "Bars: requested against measured in synthetic images, with 95 % intervals; the line over a bar is its"
            " ceiling, the same on held-out scans of the subgroup. Good: bars of one covariate alike, each at its"
            " ceiling. Bad: one subgroup below its ceiling while another is at it.",
        )
    ]


def realism(places: pd.DataFrame, spaces: Mapping[str, Any]) -> list[Charts]:
    """Real and synthetic images as points of every feature space."""
    if places.empty:
        return []
    caption = (
        "Each point is an image, along the two directions in which held-out scans vary most. Good: orange crosses"
        " mix with grey circles and spread as far. Bad: crosses beside the circles (not real), in a clump (not"
        " various), or missing where circles are (a kind of image is left out). Two directions show only a part of what"
        " differs; the table is about all of them."
    )
    shown = {key: names.space(key) for key in spaces}
    alt = (
        f"Synthetic and held-out real images in the feature spaces {', '.join(shown.values())}, principal components 1"
        " and 2."
    )
    return [Charts(charts.feature_spaces(places, spaces, shown), alt, caption)]


def spectra(spectrum: Mapping[str, Any]) -> list[Charts]:
    """Power over spatial frequency."""
    return [
        Charts(
            charts.spectra(spectrum),
            "Radially averaged power spectra of real, synthetic and reconstructed images, and their ratios over spatial"
            " frequency.",
            "First: power of held-out real, synthetic and reconstructed images (Hann-windowed). Second: ratio to real."
            " Dotted: the bands of the table. Good: orange along grey, and at 1. Bad: below 1 in fine detail (blur), or"
            " above (noise).",
        )
    ]


def discriminability(curves: Mapping[str, Any]) -> list[Charts]:
    """AUC of telling images from real ones, over the detail that is left; none of a single point."""
    if len(curves["cutoffs_cycles_per_voxel"]) < 2:
        return []
    return [
        Charts(
            charts.discriminability(curves),
            "AUC of a classifier that tells synthetic images, reconstructions and training scans from held-out scans,"
            " over the frequency above which detail was removed.",
            "Left: coarse structure alone; right: all detail. Good: orange along grey (0.5: not told). Bad: orange high"
            " at the left, where only shape and contrast are left. Where orange follows blue, it is the decoder that"
            " images are told by. Bars: 95 % intervals.",
        )
    ]


def reconstruction(shards: Shards) -> Picture:
    """Three held-out images at the 10th, 50th and 90th percentile of reconstruction error."""
    split = np.array(shards.column("split"))
    rows = np.flatnonzero(split == "test") if (split == "test").any() else np.arange(len(shards))
    if len(rows) == 0:
        raise UserError("report: the reconstructions hold no image. Run the step that writes them again.")
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(SEARCHED, len(rows))).round().astype(int))]
    errors = np.array(
        [
            np.mean(np.square(shards.tensor("image", r).astype(np.float64) - shards.tensor("reconstruction", r)))
            for r in map(int, rows)
        ]
    )
    order = rows[np.argsort(errors, kind="stable")]
    ids, shown = shards.column("scan_id"), []
    for share, words in ((0.1, "better than most"), (0.5, "typical"), (0.9, "worse than most")):
        row = int(order[round(share * (len(order) - 1))])
        error = float(errors[np.flatnonzero(rows == row)[0]])
        label = f"{words}: {ids[row]}, {10 * np.log10(1 / max(error, 1e-10)):.1f} dB"
        shown.append((figures.plain(label), shards.tensor("image", row), shards.tensor("reconstruction", row)))
    return Picture(
        figures.reconstruction_grid(shown),
        "Held-out images, what the model makes of their latents, and the differences.",
        "Held-out images at the 10th, 50th and 90th percentile of reconstruction error. Difference: reconstruction"
        " minus image, red is brighter. Good: differences without shape. Bad: edges and folds in them: what is"
        " lost there, no generated image can have.",
    )


def histories(training: Mapping[str, pd.DataFrame]) -> list[Charts]:
    """Losses by step of every model that has any."""
    return [
        Charts(
            charts.loss_curves(history),
            f"Training curves of the {name}.",
            f"Training of the {name}, by step. Good: as the titles say, then flat, validation beside train. Bad:"
            " validation getting worse while train gets better, or no end of either.",
        )
        for name, history in training.items()
        if not history.empty
    ]


def augmentation(
    arms: Sequence[Mapping[str, Any]], reference: float, curves: Sequence[Mapping[str, Any]]
) -> list[Charts]:
    """AUC of every arm, and over the number of images added where several were.

    Parameters
    ----------
    arms, curves
        The parts `arms` and `ratio_curves` of augmentation/results.json.
    reference
        AUC of the arm that the verdict compares with.
    """
    names = {"test": "test split", "shifted": "kept-out group", "synthetic": "synthetic images"}
    entries = []
    for arm in arms:
        found = arm["figures"]
        entries.append(
            (
                arm["name"],
                [(words, found[key]["auc"]) for key, words in names.items() if key in found],
                found.get("test", {}).get("seeds", []),
            )
        )
    shown = [
        Charts(
            charts.arms(entries, reference),
            f"AUC of {len(arms)} arms with 95 % intervals.",
            "Good: arms with synthetic images further right than the grey line by more than their bars. Bad: further"
            " left. Bars: 95 % intervals; circles: single classifiers; grey line: the reference of the verdict; dotted:"
            " guessing. Overlapping bars do not mean that two arms are alike, since they saw the same test subjects:"
            " the table of differences decides.",
        )
    ]
    grouped = [
        (arm["name"], arm["figures"]["test"]["groups"]) for arm in arms if "groups" in arm["figures"].get("test", {})
    ]
    if grouped:
        levels = list(grouped[0][1])
        panel = charts.Bars(
            "by subgroup",
            [name for name, _ in grouped],
            {level: [groups[level] for _, groups in grouped] for level in levels},
        )
        shown.append(
            Charts(
                charts.bars([panel], "AUC"),
                "AUC of every arm by subgroup.",
                "Bars: AUC within a subgroup of the test split, with 95 % intervals. Good: bars of one arm alike, and"
                " higher than in arms without synthetic images for every subgroup. Bad: an arm that gains for one"
                " subgroup and loses for another. Small subgroups have long intervals.",
            )
        )
    if curves:
        shown.append(
            Charts(
                charts.ratio_curves(curves),
                "AUC over the number of images added per real one.",
                "Good: a line that rises from its value at 0, the classifier without added images, by more than the"
                " bars. Bad: one that falls. A flat line says that more images of this kind are of no use; published"
                " curves flatten at 10 to 1 (Sagers et al. 2023).",
            )
        )
    return shown


def neighbours(
    chosen: pd.DataFrame,
    limit: float | None,
    synthetic: Shards,
    real: Shards,
    planned: pd.DataFrame,
    scans: pd.DataFrame,
    covariates: Covariates,
) -> Picture:
    """Synthetic images beside the training scan that a detector takes for most like them.

    Parameters
    ----------
    chosen
        sample_id, similarity and scan_id, a row per pair, most alike first.
    limit
        Similarity from which the filter rejects; None where it is not calibrated.
    synthetic, real
        Accepted and preprocessed images.
    planned, scans
        Requested and true covariates.
    """
    made = _rows(synthetic, "sample_id", planned).set_index("sample_id")
    known = _rows(real, "scan_id", scans).set_index("scan_id")
    spatial_dims = len(real.shape("image")) - 1
    columns, width = CAPTIONS[spatial_dims]
    tiles = []
    for pair in chosen.itertuples():
        for title, table, shards, name in (
            (f"{pair.sample_id}, similarity {pair.similarity:.3f}", made, synthetic, pair.sample_id),
            (f"{pair.scan_id}, training", known, real, pair.scan_id),
        ):
            row = table.loc[[name]].iloc[0]
            tiles.append(
                figures.Tile(
                    shards.tensor("image", int(row["row"])),
                    f"{title}\n{figures.wrapped(_facts(row, covariates), width)}",
                )
            )
    told = (
        f"from a similarity of {limit:.3f} on, the filter rejects"
        if limit is not None
        else "the filter is not calibrated and rejects none"
    )
    return Picture(
        figures.image_grid(
            [figures.Block("", tiles, columns)], title="Left: synthetic. Right: the nearest training scan"
        ),
        f"{len(chosen)} synthetic images, each beside the training scan most like it.",
        f"The {len(chosen)} released images most like a training scan; {told}. Good: two people who resemble each other"
        " as strangers of their age and sex do. Bad: the same folds, the same shape of a ventricle or the same device"
        " in both.",
    )
