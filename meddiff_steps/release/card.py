"""Parts of a release's README that make it a dataset card: model, measured figures, what to check, and what only people
can say.

Figures come from the cards and reports of the steps and are about groups; nothing here is about one scan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meddiff_steps.config import Card
from meddiff_steps.privacy.verdict import STRANGERS, bounds_text, shown_name

_BANDS = {
    "below_quarter": "power below 1/4 of Nyquist, over {}",
    "quarter_to_half": "power between 1/4 and 1/2 of Nyquist, over {}",
    "above_half": "power above 1/2 of Nyquist, over {}",
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
    lines, given = [], False
    for name, card in cards.items():
        learnt = f", learnt from {card['scans']['train']} images" if card.get("scans") else ""
        lines.append(
            f"- {name}: {card['parameters']:,} parameters{learnt}; SHA-256 of its weights {card['weights_sha256']}"
        )
        if card.get("base"):
            given = True
            lines.append(f"  {given_weights(card)}")
    if given:
        lines.append(f"\n{GIVEN}")
    if distilled:
        lines.append(
            f"\nThe diffusion model learnt from synthetic images of a first model alone ({distilled} were made, and"
            " filtered); the autoencoder from the cohort."
        )
    return "\n".join(lines)


#: What has to be said of images that a model made which did not begin here.
GIVEN = (
    "Nothing that was measured here tells of the people whose images the given weights were made from: neither filter"
    " nor verdict compares with them. Were calibration or test subjects among them, thresholds, floors and the gate of"
    " the weights would be too kind. Their licence holds for the models made of them, and may hold for images."
)


def given_weights(card: Mapping[str, Any]) -> str:
    """What the weights of a model with a `base` started from, and under which licence; a sentence."""
    base = card["base"]
    words = [str(base[key]) for key in ("name", "version", "source") if base.get(key)]
    digest = base.get("source_sha256") or base.get("file_sha256") or base["weights_sha256"]
    how = f" ({base['trained']})" if base.get("trained") else ""
    began = "started from" if card.get("scans") else "are, untrained here, those of"
    what = f"{base['kind']} ({', '.join(words)})" if words else base["kind"]
    return (
        f"Its weights {began} a {what}, SHA-256 {digest}{how}; licence:"
        f" {base.get('licence') or '[NOT STATED. To be written by the publisher: init_from.licence in the study]'}"
    )


def models(
    cards: Mapping[str, Mapping[str, Any]],
    gate: Mapping[str, Any],
    metrics: Mapping[str, Any],
    licence: str,
    usage: str,
    unlike: str | None,
) -> list[str]:
    """Parts of the README of packed models.

    Parameters
    ----------
    cards
        As of `model`.
    gate
        What could be told from the weights, and the limit.
    metrics
        Of the evaluation; empty: not measured.
    licence
        Of the weights.
    usage
        Lines of Python that run them in MONAI.
    unlike
        Why MONAI cannot run them; None where it can.
    """
    row = (gate["name"], figure(gate["figure"]), bounds_text(gate["name"], gate["limit"]), gate["outcome"])
    run = f"configs/ and models/ are a MONAI bundle. With MONAI and torch alone, one image:\n\n```python\n{usage}```"
    return [
        f"## What they are\n\n{model(cards)}",
        f"## What they give away\n\n{_table(('test', 'figure [95 % interval]', 'limit', 'outcome'), [row])}",
        f"## What their images are like\n\n{quality(metrics) or 'Not measured.'}",
        f"## In MONAI\n\n{run if unlike is None else f'Not as a bundle: {unlike}.'}",
        f"## Licence of the weights\n\n{licence}",
    ]


def privacy(report: Mapping[str, Any]) -> str:
    """A table of the tests behind the verdict, and how many subjects were left out."""
    gates = report.get("gates", [])
    rows = [
        (shown_name(gate["name"]), figure(gate["figure"]), bounds_text(gate["name"], gate["limit"]), gate["outcome"])
        for gate in gates
    ]
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
                f"'{STRANGERS}' passes unless its figure is further above the limit than chance explains."
                if any(gate["name"] == STRANGERS for gate in gates)
                else "",
            ],
        )
    )


def quality(metrics: Mapping[str, Any], source: str = "real") -> str:
    """A table of what was measured in the synthetic images, beside the same figure on held-out scans, which `source`
    says the kind of: real or simulated.
    """
    rows = []
    for name, found in sorted(metrics.get("covariates", {}).items()):
        key, words = (
            ("auc", "AUC of reading what was asked for")
            if found["kind"] == "categorical"
            else ("r", "r(requested, measured)")
        )
        rows.append((f"{name}, {words}", figure(found[key]), figure(found[key].get("ceiling"))))
    for band, words in _BANDS.items():
        power = metrics.get("spectrum", {}).get("synthetic", {}).get(band)
        rows += [(words.format(source), figure(power), figure(power.get("ceiling")))] if power else []
    for space, found in sorted(metrics.get("realism", {}).items()):
        auc = found.get("classifier_auc")
        rows += (
            [
                (
                    f"told from {source} by a classifier on {space} features, AUC",
                    figure(auc),
                    figure(auc.get("floor")),
                )
            ]
            if auc
            else []
        )
    return _table(("measured", "synthetic [95 % interval]", f"held-out {source}"), rows)


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


CHECK = """`meddiff-steps audit .`, of the package meddiff-steps, looks at everything that can be known of this release,
from its form to what each image shows; with the models it makes images again. `python3 -I verify.py .` checks with
Python alone that every file is the one that was sealed; add `--key publisher.pub` if you have the publisher's
public key. Take verify.py from meddiff_steps: the one in provenance/ may have been exchanged together with the rest.
`ro-crate-metadata.json` and `croissant.json` describe the same for other programs."""
CHECK_PART = """`sha256sum -c SHA256SUMS` checks the files of this dataset. It is a part of a cohort whose
`provenance/root.json`, signed where there is a key, holds the digest of SHA256SUMS, and whose ledger holds the recipe
of each image."""


def figure(found: Mapping[str, Any] | None) -> str:
    """A figure with its 95 % interval; "" where it is not known."""
    if not found or found.get("value") is None:
        return ""
    known = found.get("low") is not None and found.get("high") is not None
    interval = f" [{found['low']:.3g}, {found['high']:.3g}]" if known else ""
    return f"{found['value']:.3g}{interval}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *lines]) if lines else ""
