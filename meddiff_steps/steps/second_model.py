"""Step `second_model`: accepted synthetic images as the cohort that a second model learns from (Fernandez et
al. 2023).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from meddiff_steps.cohort.manifest import write_manifest
from meddiff_steps.cohort.splits import stable_fraction
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path
from meddiff_steps.steps import options


def run(
    config: options.Config,
    plan: options.Plan,
    decisions: Annotated[Path, typer.Option(help="the filter's decisions on its images (Parquet)")],
    out: Annotated[Path, typer.Option(help="manifest to write (Parquet), in the columns of cohort/manifest.parquet")],
) -> None:
    """Make a training cohort of the images of the first model that the filter accepted.

    Near duplicates are put into the split `test`, which no training reads.
    """
    study = load_stage(config, "second_model")
    table = pd.read_parquet(decisions)
    final = table[table["decision"].isin(["accepted", "duplicate"])].set_index("sample_id")
    planned = pd.read_parquet(plan)
    planned = planned[planned["sample_id"].isin(final.index)].reset_index(drop=True)
    ids = planned["sample_id"]
    held_out = np.array(
        [stable_fraction(f"{study.seed}/distill/{name}") < study.second_model.validation_share for name in ids],
        dtype=bool,
    )
    split = np.where(final.loc[ids, "decision"].to_numpy() == "duplicate", "test", np.where(held_out, "val", "train"))
    if (split == "train").sum() < 2:
        raise UserError(
            f"{decisions}: {(split == 'train').sum()} accepted images are left to train on. Set second_model.subjects"
            " higher, or look at what was rejected."
        )
    keys = final.loc[ids, "seed_key"].to_numpy()
    columns = {
        "scan_id": ids,
        "subject_id": ids,
        "session_id": None,
        "path": "synthetic",
        "sha256": keys,
        "content_sha256": keys,
        "split": split,
    }
    with atomic_path(out) as path:
        write_manifest(pd.DataFrame(columns).assign(**{name: planned[name] for name in study.covariates}), path)
