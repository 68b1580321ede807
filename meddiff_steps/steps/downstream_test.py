"""Step `downstream_test`: the one place of the downstream study that reads the test split; it says so in a record."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from monai.networks.nets import ResNet

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import Study, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, read_json, sha256_file, write_json
from meddiff_steps.downstream.design import check, design_digest, generators_of, held_group, levels_of, recipe, recipes
from meddiff_steps.downstream.images import reduce
from meddiff_steps.downstream.opening import record_opening, scans_digest
from meddiff_steps.downstream.results import choose, summarise
from meddiff_steps.downstream.scoring import load_classifiers, score
from meddiff_steps.downstream.stress import stress_figures
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.steps import options

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    design: Annotated[Path, typer.Option(help="augmentation/design.json")],
    samples: Annotated[Path, typer.Option(help="augmentation/samples.parquet")],
    reduced: Annotated[Path, typer.Option(help="augmentation/images.arrow")],
    weights: Annotated[list[Path], typer.Option(help="weights of one job; repeat for all of them")],
    validation: Annotated[list[Path], typer.Option(help="validation scores of one job; repeat for all of them")],
    manifest: options.Manifest,
    images: options.Images,
    ledger: Annotated[
        Path, typer.Option(help="record of all openings of the test split of this study; kept and added to")
    ],
    opened: Annotated[Path, typer.Option(help="record of this opening to write (JSON)")],
    predictions: Annotated[Path, typer.Option(help="predictions to write (Parquet)")],
    out: Annotated[Path, typer.Option(help="results to write (JSON)")],
    plan: Annotated[Path | None, typer.Option(help="plan.parquet, where downstream.stress names groups of it")] = None,
    filtered: Annotated[
        list[Path] | None, typer.Option(help="shard of accepted images, for the stress test; repeat for all of them")
    ] = None,
    threads: options.Threads = 1,
) -> None:
    """Choose the primary arm on the val split, freeze everything, then score the test split once with all
    classifiers.
    """
    study = load_stage(config, "downstream_test")
    downstream, levels = study.downstream, levels_of(study.downstream, study.covariates)
    torch.set_num_threads(threads)
    decided = design_digest(downstream, study.variants.flip)
    if read_json(design)["design_sha256"] != decided:
        raise UserError(
            f"{design}: it is of another design than the config. Run `downstream_design` and what follows again."
        )
    table, small, real = pd.read_parquet(samples), Shards([reduced]), Shards(images)
    scores = pd.concat([pd.read_parquet(path) for path in validation], ignore_index=True)
    kept = scores[scores["kept"]]
    absent = sorted(set(recipes(downstream)) - set(kept["recipe"]))
    if absent:
        raise UserError(f"no weights of recipe {absent[0]}: {len(weights)} files were given. Name those of every job.")
    trained = [(arm, recipe(arm, generator)) for arm in downstream.arms for generator in generators_of(arm, downstream)]
    by_arm = pd.concat([kept[kept["recipe"] == name].assign(arm=arm.name) for arm, name in trained], ignore_index=True)
    primary = choose(downstream, by_arm)
    arms = check(downstream, levels, table, len(table))
    frozen = {
        "design": decided,
        "samples": sha256_file(samples),
        "weights": [sha256_file(path) for path in weights],
        "primary": primary,
    }

    # From here on the test split is open.
    scans = read_manifest(manifest, study.covariates)
    ids = real.column("scan_id")
    test = scans[(scans["split"] == "test") & scans[downstream.target].isin(levels)].merge(
        pd.DataFrame({"scan_id": ids, "row": range(len(ids))}), on="scan_id"
    )
    if not (~held_group(test, downstream)).any():
        raise UserError(
            f"{manifest}: no preprocessed scan with a known {downstream.target} is in the test split. Raise"
            " splits.test, or see preprocessed/qc.parquet."
        )
    frozen["test"] = scans_digest(test, downstream)
    record = record_opening(
        ledger, frozen, {"scans": len(test), "subjects": int(test["subject_id"].nunique()), "split": "test"}
    )
    write_json(opened, record)
    if record["designs"] > 1:
        log.warning(
            "the test split of this study has now been opened with %d different designs; figures of the later ones"
            " flatter",
            record["designs"],
        )
    classifiers = load_classifiers(weights, downstream.classifier, small.shape("image"), len(levels))
    facts = _facts(
        test,
        "scan_id",
        "subject_id",
        test[downstream.target],
        test[downstream.subgroup] if downstream.subgroup else None,
    )
    facts["set"] = np.where(held_group(test, downstream), "shifted", "test")
    side, rows = downstream.classifier.longest_side, test["row"].to_numpy(dtype=int)
    of_real, of_synthetic = ([arm for arm in downstream.arms if arm.test == kind] for kind in ("real", "synthetic"))
    scored = score(
        classifiers,
        of_real,
        downstream,
        facts,
        rows,
        lambda chosen: reduce(real.tensors("image", chosen), side),
        levels,
    )
    if of_synthetic:
        made = table[(table["kind"] == "filtered") & (table["generator"] == 0)]
        facts = _facts(made, "image_id", "subject_id", made["level"].map(dict(enumerate(levels))), None).assign(
            set="synthetic"
        )
        read = functools.partial(small.tensors, "image")
        scored = pd.concat(
            [scored, score(classifiers, of_synthetic, downstream, facts, made.index.to_numpy(), read, levels)],
            ignore_index=True,
        )
    stressed, planned = _stress(study, plan, filtered, classifiers, levels)
    scored = pd.concat([scored, stressed], ignore_index=True) if len(stressed) else scored
    with atomic_path(predictions) as path:
        scored.to_parquet(path, index=False)
    generator_saw = int(scans.loc[(scans["split"] == "train") & held_group(scans, downstream), "subject_id"].nunique())
    results = summarise(downstream, levels, scored, by_arm, arms, primary, study.seed) | {
        "opened": {key: record[key] for key in ("frozen_sha256", "designs")},
        "shift": (
            downstream.shift.model_dump(mode="json") | {"subjects_that_the_generator_saw": generator_saw}
            if downstream.shift
            else None
        ),
    }
    if planned is not None:
        tested = test.set_index("scan_id")
        results["stress"] = stress_figures(scored, planned, tested, downstream, study.covariates, levels, study.seed)
    write_json(out, results)
    log.info("%s: %s (%s)", results["verdict"], results["primary"]["difference"], results["verdict_text"])


def _stress(
    study: Study,
    plan: Path | None,
    filtered: list[Path] | None,
    classifiers: dict[tuple[str, int], ResNet],
    levels: list[str],
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Scores of images that were planned for a stress test, and their covariates by `image_id`; None without one."""
    downstream = study.downstream
    if not downstream.stress.groups:
        return pd.DataFrame(), None
    if plan is None or not filtered:
        raise UserError("downstream.stress names groups of the plan: give --plan and the --filtered shards.")
    shards = Shards(filtered)
    ids = shards.column("sample_id")
    table = pd.read_parquet(plan)
    table = table[table["group"].isin(downstream.stress.groups) & table[downstream.target].isin(levels)]
    table = table.merge(pd.DataFrame({"sample_id": ids, "row": range(len(ids))}), on="sample_id")
    if table[downstream.target].nunique() < len(levels):
        raise UserError(
            f"downstream.stress.groups: accepted images of {downstream.stress.groups} have not all levels of"
            f" {downstream.target}, so no classifier can be judged on them. Plan a grid over it and"
            " the other covariate."
        )
    facts = _facts(table, "sample_id", "sample_id", table[downstream.target], None).assign(set="stress")
    side = downstream.classifier.longest_side
    arms = [arm for arm in downstream.arms if arm.test == "real"]
    rows = table["row"].to_numpy(dtype=int)
    found = score(
        classifiers, arms, downstream, facts, rows, lambda chosen: reduce(shards.tensors("image", chosen), side), levels
    )
    return found, table.rename(columns={"sample_id": "image_id"}).set_index("image_id")


def _facts(table: pd.DataFrame, image: str, subject: str, level: pd.Series, subgroup: pd.Series | None) -> pd.DataFrame:
    return pd.DataFrame({"image_id": table[image], "subject_id": table[subject], "level": level, "subgroup": subgroup})
