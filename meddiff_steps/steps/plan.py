"""Step `plan`: from the training scans to plan.parquet."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import pandas as pd
import pyarrow as pa
import typer

from meddiff_steps.cohort.covariates import parse_covariates
from meddiff_steps.cohort.manifest import read_manifest, usable
from meddiff_steps.cohort.table import load_table
from meddiff_steps.cohort.texts import COLUMN
from meddiff_steps.config import Covariates, PlanGroup, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path
from meddiff_steps.privacy.planned_texts import check_texts
from meddiff_steps.steps import options
from meddiff_steps.synthesis.plan import build_plan

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    manifest: options.Manifest,
    out: Annotated[Path, typer.Option(help="Plan to write (Parquet).")],
    qc: options.KeptBy = None,
) -> None:
    """Decide which synthetic subjects to make: one row each, with its covariates, its seed key and its shard.

    The covariates come from a copula fitted to the training subjects, less scans that preprocessing left out, from the
    user's table, or from a grid.  A subject's row does not depend on how many subjects are asked for.
    """
    study = load_stage(config, "plan")
    scans = read_manifest(manifest, study.covariates)
    if qc is not None:
        scans = usable(scans, pd.read_parquet(qc))
    training = scans[scans["split"] == "train"]
    tables = {group.name: _read_requests(group, study.covariates) for group in study.plan if group.table is not None}
    with_texts = study.text.column is not None
    size = study.generate.shard_size
    plan = build_plan(study.plan, study.covariates, training, study.seed, size, tables, with_texts)
    if with_texts:
        known = scans[scans[COLUMN].notna()]
        check_texts(plan, known, study.text.shared_words, study.text.min_subjects, study.text.encoder is None)
    with atomic_path(out) as temporary:
        plan.to_parquet(temporary, index=False, schema=_schema(plan))
    log.info("%s: %d synthetic subjects in %d shards", out, len(plan), plan["shard"].nunique())


def _read_requests(group: PlanGroup, covariates: Covariates) -> pd.DataFrame:
    """The table of a group, with typed columns under the covariates' own names."""
    by_name: Covariates = {
        name: covariate.model_copy(update={"column": None}) for name, covariate in covariates.items()
    }
    try:
        return parse_covariates(load_table(Path(str(group.table))), by_name)
    except UserError as error:
        raise UserError(f"plan.{group.name}.table {group.table}: {error}") from None


def _schema(plan: pd.DataFrame) -> pa.Schema:
    """Column types by kind, so that a column of nulls keeps its type."""

    def kind(column: pd.Series) -> pa.DataType:
        if pd.api.types.is_integer_dtype(column):
            return pa.int64()
        return pa.float64() if pd.api.types.is_float_dtype(column) else pa.string()

    return pa.schema([(str(name), kind(plan[name])) for name in plan.columns])
