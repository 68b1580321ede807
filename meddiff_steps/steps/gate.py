"""Step `gate`: nothing is released after a FAIL, or without a filter that filters, unless the study says so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, read_json
from meddiff_steps.imaging.selection import none_accepted
from meddiff_steps.privacy.verdict import bounds_text, stopping
from meddiff_steps.steps import options


def run(
    config: options.Config,
    report: Annotated[Path, typer.Option(help="privacy/report.json")],
    decisions: Annotated[Path, typer.Option(help="privacy/decisions.parquet")],
    plan: options.Plan,
    out: Annotated[Path, typer.Option(help="the plan of what may be released to write (Parquet)")],
) -> None:
    """Let the accepted subjects pass, or stop the run with what failed."""
    study = load_stage(config, "gate")
    result = read_json(report)
    if (bad := stopping(result["gates"])) and study.privacy.enforce == "stop":
        reasons = [
            f"  {gate['outcome']}, {gate['name']}: {_short(gate['figure'].get('value'))} against"
            f" {bounds_text(gate['name'], gate['limit'])}; {gate['meaning']}"
            for gate in bad
        ]
        raise UserError(
            f"{report}: the privacy verdict is {result['verdict']}, so nothing is released:\n"
            + "\n".join(reasons)
            + "\nWhere it failed: train on more subjects, for fewer steps, or with scan variants. Where the filter had"
            " too few subjects or misses copies: raise splits.calibration or privacy.level. To look at the cohort all"
            " the same, set privacy.enforce: report; the release then says so."
        )
    table = pd.read_parquet(decisions)
    accepted = table.loc[table["decision"] == "accepted"].set_index("sample_id")
    if accepted.empty:
        raise none_accepted(decisions, "release")
    planned = pd.read_parquet(plan)
    released = planned[planned["sample_id"].isin(accepted.index)].reset_index(drop=True)
    for column in ("attempt", "seed_key"):
        released[column] = accepted.loc[released["sample_id"], column].to_numpy()
    with atomic_path(out) as path:
        released.to_parquet(path, index=False)


def _short(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"
