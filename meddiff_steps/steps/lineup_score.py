"""Step `lineup_score`: what the answers of a line-up's readers are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json, write_json
from meddiff_steps.evaluation.lineup import score
from meddiff_steps.report.wording import interval, number


def run(
    key: Annotated[Path, typer.Option(help="lineup/key.json")],
    answers: Annotated[Path, typer.Option(help="what readers answered (CSV): lineup, reader, image, certainty")],
    out: Annotated[Path | None, typer.Option(help="figures to write (JSON); printed in any case")] = None,
) -> None:
    """Print how often readers were right, and how well their certainty tells synthetic from real, beside chance."""
    entries = read_json(key)
    if entries.get("schema") != "meddiff/lineup/v1":
        raise UserError(f"{key}: not the key of a line-up. Give lineup/key.json, which `snakemake lineup` wrote.")
    try:
        table = pd.read_csv(answers, dtype={"lineup": str, "reader": str})
    except (OSError, ValueError) as error:
        raise UserError(f"{answers}: not a readable table ({error}). Save it as CSV with a heading.") from None
    found = score(entries, table)
    print("\n".join(lines(found)))
    if out is not None:
        write_json(out, found)


def lines(found: dict[str, Any]) -> list[str]:
    """Scores in words."""
    out = [
        f"line-up {found['lineup']}: {found['images']} images, half of them real; guessing is right half of the time"
    ]
    for reader, one in found["readers"].items():
        if one["chance"] is None:
            out.append(f"{reader}: could not tell any of {one['answered']}")
            continue
        low, high = one["chance"]
        out.append(
            f"{reader}: accuracy {interval(one['accuracy'])}, {one['right']} of {one['accuracy']['n']} right"
            f" (guessing: {low} to {high} in 95 of 100 cases; p {number(one['p_value'], 2)}),"
            f" {one['undecided']} undecided, AUC {interval(one['auc'])} (guessing: 0.5)"
        )
    everyone = found["all"]
    out.append(f"all: accuracy {interval(everyone['accuracy'])}, AUC {interval(everyone['auc'])}, over images")
    return out
