"""Step `quality`: the quality tables of all shards as one, and the decision whether the study may go on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from meddiff_steps.cohort.decisions import EXCLUDED
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path
from meddiff_steps.imaging.background import uncertain
from meddiff_steps.imaging.channels import absent_channels
from meddiff_steps.imaging.masks import misplaced
from meddiff_steps.imaging.preprocess import cut_off, other_spaces
from meddiff_steps.imaging.registration import registered
from meddiff_steps.imaging.skull import check_statement
from meddiff_steps.steps import options

logger = logging.getLogger(__name__)


def run(
    config: options.Config,
    qc: Annotated[list[Path], typer.Option(help="Quality table of one shard; repeat for every shard.")],
    out: Annotated[Path, typer.Option(help="Table to write (preprocessed/qc.parquet).")],
) -> None:
    """Merge the quality tables and stop if too many scans were left out, or if what is said of them is not so.

    The limit is preprocess.max_failed_share; the statement is release.skull_stripped.
    """
    study = load_stage(config, "quality")
    table = pd.concat([pd.read_parquet(path) for path in qc], ignore_index=True).sort_values(
        "scan_id", ignore_index=True
    )
    left_out = table[table["status"] == "left out"]
    if len(left_out) == len(table):
        raise UserError(f"preprocess: none of {len(table)} scans could be used.\n{_reasons(left_out)}")
    by_hand = int((left_out["reason"] == EXCLUDED).sum())
    failed = left_out[left_out["reason"] != EXCLUDED]
    share = len(failed) / max(1, len(table) - by_hand)
    if share > study.preprocess.max_failed_share:
        raise UserError(
            f"preprocess: {len(failed)} of {len(table) - by_hand} scans ({share:.1%}) were left out, more than"
            f" preprocess.max_failed_share ({study.preprocess.max_failed_share:.1%}).\n{_reasons(failed)}\nRepair"
            " these scans, take them out of the cohort, or raise the limit."
        )
    logger.info("%d of %d scans are usable", len(table) - len(left_out), len(table))
    if len(left_out):
        logger.warning("left out:\n%s", _reasons(left_out))
    if told := registered(table):
        logger.info("%s", told)
    if told := cut_off(table):
        logger.warning("%s Column cut_off_share of %s has all figures.", told, out)
    if told := absent_channels(table):
        logger.warning("%s. Columns channel_NAME_present of %s say for which.", told, out)
    if told := other_spaces(table):
        logger.warning("%s.", told)
    if told := uncertain(table):
        logger.warning("%s.", told)
    if told := misplaced(table):
        logger.warning("masks and label maps that may not fit: %s. Look at them, one over the other.", told)
    if told := check_statement(table, study.release.skull_stripped):
        logger.warning("%s. Look at them: columns head_ml and skull_valley of %s.", told, out)
    with atomic_path(out) as temporary:
        table.to_parquet(temporary, index=False)


def _reasons(left_out: pd.DataFrame) -> str:
    """The five commonest reasons, each with how many scans, up to three of them, and the first message in full."""
    counts = left_out["reason"].value_counts(sort=False).sort_index().sort_values(ascending=False, kind="stable")
    lines = []
    for reason, count in counts.head(5).items():
        examples = left_out[left_out["reason"] == reason]
        lines.append(
            f"  {count} x {reason}: {', '.join(examples['scan_id'].head(3))}{', ...' if count > 3 else ''}. First:"
            f" {examples['message'].iloc[0]}"
        )
    return "\n".join(lines)
