"""Parts of a release's README that make it a dataset card: model, measured figures, what to check, and what only people
can say.

Figures come from the cards and reports of the steps and are about groups; nothing here is about one scan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meddiff_steps.config import Card

_BANDS = {
    "below_quarter": "power below 1/4 of Nyquist, over real",
    "quarter_to_half": "power between 1/4 and 1/2 of Nyquist, over real",
    "above_half": "power above 1/2 of Nyquist, over real",
}


def model(cards: Mapping[str, Mapping[str, Any]], distilled: int = 0) -> str:
    """What made the images.

    Parameters
    ----------
    cards
        The cards of the models by name; `parameters`, `weights_sha256` and `scans` (images per split) are read.
    distilled
        Synthetic images that the second model learnt from, or 0 if it learnt from the cohort.
    """
    lines = []
    for name, card in cards.items():
        learnt = f", learnt from {card['scans']['train']} images" if card.get("scans") else ""
        lines.append(
            f"- {name}: {card['parameters']:,} parameters{learnt}; SHA-256 of its weights {card['weights_sha256']}"
        )
    if distilled:
        lines.append(
            f"\nThe diffusion model learnt from synthetic images of a first model alone ({distilled} were made, and"
            " filtered); the autoencoder from the cohort."
        )
    return "\n".join(lines)


def privacy(report: Mapping[str, Any]) -> str:
    """A table of the tests behind the verdict, and how many subjects were left out."""
    gates = report.get("gates", [])
    rows = [(gate["name"], _figure(gate["figure"]), f"{gate['limit']:g}", gate["outcome"]) for gate in gates]
    counts = report.get("counts", {})
    names = {
        "planned": "planned",
        "candidates": "images made for them",
        "released": "released",
        "duplicates": "left out as doubles",
        "failed": "given up",
    }
    said = "; ".join(f"{counts[key]} {words}" for key, words in names.items() if key in counts)
    return "\n\n".join(
        filter(
            None,
            [
                f"Subjects: {said}." if said else "",
                _table(("test", "figure [95 % interval]", "limit", "outcome"), rows),
            ],
        )
    )


def quality(metrics: Mapping[str, Any]) -> str:
    """A table of what was measured in the synthetic images, beside the same figure on held-out real ones."""
    rows = []
    for name, found in sorted(metrics.get("covariates", {}).items()):
        key, words = (
            ("auc", "AUC of reading what was asked for")
            if found["kind"] == "categorical"
            else ("r", "r(requested, measured)")
        )
        rows.append((f"{name}, {words}", _figure(found[key]), _figure(found[key].get("ceiling"))))
    for band, words in _BANDS.items():
        figure = metrics.get("spectrum", {}).get("synthetic", {}).get(band)
        rows += [(words, _figure(figure), _figure(figure.get("ceiling")))] if figure else []
    for space, found in sorted(metrics.get("realism", {}).items()):
        figure = found.get("classifier_auc")
        rows += (
            [
                (
                    f"told from real by a classifier on {space} features, AUC",
                    _figure(figure),
                    _figure(figure.get("floor")),
                )
            ]
            if figure
            else []
        )
    return _table(("measured", "synthetic [95 % interval]", "held-out real"), rows)


def blanks(card: Card) -> str:
    """What only the publisher can say; where he has not, a blank that says so and where to fill it in."""
    lines = []
    for name, field in Card.model_fields.items():
        text = (
            getattr(card, name).strip()
            or f"[NOT STATED. To be written by the publisher: release.card.{name} in the study]"
        )
        lines.append(f"- {(field.description or '').rstrip('.')}: {text}")
    return "\n".join(lines)


CHECK = """`python3 -I verify.py .` checks with Python alone that every file is the one that was sealed; add
`--key publisher.pub` if you have the publisher's public key. Take verify.py from meddiff_steps: the one in provenance/
may have been exchanged together with the rest. `ro-crate-metadata.json` and `croissant.json` describe the
same for other programs."""
CHECK_PART = """`sha256sum -c SHA256SUMS` checks the files of this dataset. It is a part of a cohort whose
`provenance/root.json`, signed where there is a key, holds the digest of SHA256SUMS, and whose ledger holds the recipe
of each image."""


def _figure(figure: Mapping[str, Any] | None) -> str:
    if not figure or figure.get("value") is None:
        return ""
    known = figure.get("low") is not None and figure.get("high") is not None
    interval = f" [{figure['low']:.3g}, {figure['high']:.3g}]" if known else ""
    return f"{figure['value']:.3g}{interval}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *lines]) if lines else ""
