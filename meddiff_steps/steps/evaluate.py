"""Step `evaluate`: covariate fidelity, realism, diversity, reconstruction quality and sharpness, each beside what real scans give."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import typer
from tqdm import tqdm

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import CategoricalCovariate, Covariates, Study, load_stage
from meddiff_steps.errors import UserError
from meddiff_steps.evaluation import features as feature_spaces
from meddiff_steps.evaluation import spectrum
from meddiff_steps.evaluation.diversity import diversity, pair_similarity
from meddiff_steps.evaluation.fidelity import (
    correlation_structure,
    covariate_fidelity,
    distribution_distances,
    predictions_table,
    subgroup_fidelity,
    training_range,
)
from meddiff_steps.evaluation.image_quality import SsimSettings, reconstruction_quality
from meddiff_steps.evaluation.predictors import MAX_TRAINING_SCANS, Predictors, fit_predictors
from meddiff_steps.evaluation.realism import MIN_IMAGES, Sample, Scale, realism
from meddiff_steps.files import atomic_path, read_json, write_atomic
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.files import load_embedder

logger = logging.getLogger(__name__)

#: Images measured at most, of either kind: beyond it intervals hardly shrink. Chosen by a hash of the id, so the choice is stable.
MAX_SYNTHETIC, MAX_HELD_OUT = 5_000, 5_000
#: Ceilings come from the test split; with fewer test subjects than this, from validation and calibration subjects as well.
ENOUGH_SUBJECTS = 100
#: Reconstruction figures come from the test split alone from this many subjects on, else from all held-out scans.
MIN_TEST_SUBJECTS = 10
#: Image values read at once.
BATCH_VALUES = 2**23


def run(
    config: Annotated[Path, typer.Option(help="Frozen config of stage `evaluate`.")],
    manifest: Annotated[Path, typer.Option(help="cohort/manifest.parquet.")],
    images: Annotated[list[Path], typer.Option(help="Preprocessed shard; repeat for every shard.")],
    generated: Annotated[list[Path], typer.Option(help="Generated shard; repeat for every shard.")],
    plan: Annotated[Path, typer.Option(help="plan.parquet.")],
    reconstructions: Annotated[Path, typer.Option(help="Held-out images beside their reconstructions (.arrow).")],
    out: Annotated[Path, typer.Option(help="Figures to write (metrics.json).")],
    predictions: Annotated[Path, typer.Option(help="Table to write: requested or true beside measured covariates (.parquet).")],
    embedder: Annotated[Path | None, typer.Option(help="privacy/embedder.safetensors: a feature space; left out if not given.")] = None,
    embedder_card: Annotated[Path | None, typer.Option(help="privacy/embedder.json.")] = None,
    components: Annotated[Path | None, typer.Option(help="Table to write: where each image lies in the feature spaces (.parquet).")] = None,
) -> None:
    """Measure covariate fidelity, realism, diversity, reconstruction quality and sharpness.

    Predictors of the covariates learn from real training scans only and are applied to synthetic images and to held-out real
    scans.  Grid and counterfactual groups are left out where other groups exist: their covariates are spread on purpose, and
    correlations over them would flatter.
    """
    study = load_stage(config, "evaluate")
    scans = read_manifest(manifest, study.covariates)
    real, synthetic, paired = Shards(images), Shards(generated), Shards([reconstructions])
    if real.shape("image") != synthetic.shape("image"):
        raise UserError(f"generated images have shape {synthetic.shape('image')}, preprocessed ones {real.shape('image')}. Both must come from this study.")
    cohort = _join(real, "scan_id", scans, f"{manifest}")
    wanted, groups = _requests(synthetic, plan, study)
    options: dict[str, Any] = {"resamples": study.evaluate.bootstrap, "seed": study.seed}

    train = _choose(cohort[cohort["split"] == "train"], "scan_id", MAX_TRAINING_SCANS)
    if train.empty:
        raise UserError(f"{manifest}: no preprocessed scan is in the train split, so nothing can be measured. Check splits and preprocessed/qc.parquet.")
    predictors = fit_predictors(
        (batch for _, batch in _read(real, "image", train["row"], "learning to measure")), train, train["subject_id"].tolist(), study.covariates
    )

    held_out, splits = _held_out(cohort)
    held_out = _choose(held_out, "scan_id", MAX_HELD_OUT)
    wanted = _choose(wanted, "sample_id", MAX_SYNTHETIC)
    trained = training_range(cohort[cohort["split"] == "train"], study.covariates)
    real_table, real_power = _measure(predictors, real, held_out, "scan_id", "subject_id", "real", study.covariates, trained)
    synthetic_table, synthetic_power = _measure(predictors, synthetic, wanted, "sample_id", "seed_key", "synthetic", study.covariates, trained)
    measured = pd.concat([synthetic_table, real_table], ignore_index=True)

    labels = [name for name, c in study.covariates.items() if isinstance(c, CategoricalCovariate)]
    levels = pd.concat([table.set_index(key)[labels] for table, key in ((wanted, "sample_id"), (held_out, "scan_id"))])
    spaces = _feature_spaces(study, len(real.shape("image")) - 1, embedder, embedder_card)
    like, various, places = _realism_and_diversity(study, spaces, real, synthetic, {"training": train, "held_out": held_out, "synthetic": wanted})

    rows, quality, image_power, reconstruction_power = _reconstructions(paired, scans, str(reconstructions), options)
    shape = real.shape("image")[1:]
    curves = {"real": real_power, "synthetic": synthetic_power, "image": image_power, "reconstruction": reconstruction_power}
    metrics = {
        "covariates": covariate_fidelity(measured, study.covariates, **options),
        "correlations": correlation_structure(measured, study.covariates, **options),
        "distributions": distribution_distances(measured, study.covariates, resamples=study.evaluate.realism_bootstrap, seed=study.seed),
        "subgroups": subgroup_fidelity(measured, levels, study.covariates, **options),
        "training_range": {name: list(ends) for name, ends in trained.items()},
        "realism": like,
        "diversity": various,
        "predictors": predictors.card(),
        "reconstruction": quality,
        "spectrum": {
            "bands_of_nyquist": {name: list(edges) for name, edges in spectrum.BANDS.items()},
            "reconstruction": spectrum.band_power_ratio(reconstruction_power, image_power, paired=True, units=rows["subject_id"].tolist(), **options),
            "synthetic": spectrum.band_power_ratio(
                synthetic_power,
                real_power,
                paired=False,
                units=wanted["seed_key"].tolist(),
                reference_units=held_out["subject_id"].tolist(),
                **options,
            ),
            "frequency_of_nyquist": [float(f"{f:.6g}") for f in spectrum.ring_frequencies(shape)],
            "radial_average": {name: [float(f"{v:.6g}") for v in power.mean(0) / spectrum.ring_sizes(shape)] for name, power in curves.items() if len(power)},
        },
        "n": {
            "subjects": int(scans["subject_id"].nunique()),
            "scans": len(scans),
            "training_subjects": int(cohort.loc[cohort["split"] == "train", "subject_id"].nunique()),
            "training_scans": int((cohort["split"] == "train").sum()),
            "held_out_subjects": int(held_out["subject_id"].nunique()),
            "held_out_scans": len(held_out),
            "held_out_splits": splits,
            "planned": groups["planned"],
            "generated": len(synthetic),
            "synthetic": len(wanted),
            "synthetic_groups": groups["used"],
            "reconstructions": len(rows),
            "reconstruction_splits": sorted(set(rows["split"])),
        },
    }
    with atomic_path(predictions) as temporary:
        measured.to_parquet(temporary, index=False)
    if components is not None:
        with atomic_path(components) as temporary:
            places.to_parquet(temporary, index=False)
    write_atomic(out, (json.dumps(metrics, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    for name, entry in metrics["covariates"].items():
        key = "auc" if entry["kind"] == "categorical" else "r"
        logger.info("%s: %s %s on synthetic images, %s on held-out real scans", name, key, entry[key]["value"], entry[key]["ceiling"]["value"])


# --------------------------------------------------------------------------------------------------- inputs


def _join(shards: Shards, key: str, table: pd.DataFrame, origin: str) -> pd.DataFrame:
    """Rows of `table` that are in the shards, in the shards' order, with the shard row as `row`."""
    ids = shards.column(key)
    repeated = pd.Series(ids)[pd.Series(ids).duplicated()].tolist()
    if repeated:
        raise UserError(f"{key} {repeated[0]} is in the shards more than once. The same shard was probably given twice.")
    absent = sorted(set(ids) - set(table[key]))
    if absent:
        raise UserError(f"{origin}: no row for {key} {absent[0]} ({len(absent)} such images). Images and table are of different runs; run the workflow again.")
    return pd.DataFrame({key: ids, "row": range(len(ids))}).merge(table, on=key, how="left", validate="one_to_one")


def _requests(synthetic: Shards, plan: Path, study: Study) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Planned rows of the generated images that fidelity is measured on, and which groups they are of."""
    try:
        planned = pd.read_parquet(plan)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{plan}: not a readable plan ({error}). Run the `plan` step again.") from None
    missing = [c for c in ("sample_id", "group", "seed_key", *study.covariates) if c not in planned]
    if missing:
        raise UserError(f"{plan}: no column {missing[0]}. Run the `plan` step again.")
    joined = _join(synthetic, "sample_id", planned, f"{plan}")
    if len(joined) < len(planned):
        logger.warning("%d of %d planned subjects were generated; figures are about those", len(joined), len(planned))
    drawn = {group.name for group in study.plan if group.covariates in ("copula", "table")}
    kept = joined[joined["group"].isin(drawn)]
    used = joined if kept.empty else kept
    return used.reset_index(drop=True), {"planned": len(planned), "used": sorted(set(used["group"]))}


def _choose(table: pd.DataFrame, key: str, most: int) -> pd.DataFrame:
    """At most `most` rows, those whose id has the smallest SHA-256; the order stays."""
    if len(table) > most:
        digests = table[key].map(lambda name: hashlib.sha256(str(name).encode()).hexdigest())
        table = table[digests.rank(method="first") <= most]
        logger.info("%d rows chosen by hash of %s", most, key)
    return table.reset_index(drop=True)


def _held_out(cohort: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Real scans for ceilings, and the splits they are of."""
    splits = ["test"]
    if cohort.loc[cohort["split"] == "test", "subject_id"].nunique() < ENOUGH_SUBJECTS:
        splits = [s for s in ("test", "val", "calibration") if (cohort["split"] == s).any()]
    chosen = cohort[cohort["split"].isin(splits)]
    if chosen.empty:
        raise UserError("no preprocessed scan is in a held-out split, so there is no ceiling to compare with. Check splits and preprocessed/qc.parquet.")
    return chosen, splits


def _read(shards: Shards, column: str, rows: np.ndarray | pd.Series, task: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Selected images in bounded batches, as (positions in `rows`, float32 images)."""
    numbers = np.asarray(rows, dtype=int)
    step = max(1, BATCH_VALUES // int(np.prod(shards.shape(column))))
    with tqdm(total=len(numbers), desc=task, unit="image", mininterval=5, file=sys.stderr) as progress:
        for start in range(0, len(numbers), step):
            chosen = np.arange(start, min(start + step, len(numbers)))
            yield chosen, shards.tensors(column, numbers[chosen])
            progress.update(len(chosen))


# ------------------------------------------------------------------------------------------------ measuring


def _measure(
    predictors: Predictors,
    shards: Shards,
    table: pd.DataFrame,
    key: str,
    unit: str,
    kind: str,
    covariates: Covariates,
    trained: dict[str, tuple[float, float]],
) -> tuple[pd.DataFrame, np.ndarray]:
    """Predictions and radial power of the images of `table`, in one pass."""
    values: dict[str, list[np.ndarray]] = {name: [] for name in predictors.by_name}
    powers = []
    for chosen, batch in _read(shards, "image", table["row"], f"measuring {kind} images"):
        if not np.isfinite(batch).all():
            bad = chosen[~np.isfinite(batch).reshape(len(batch), -1).all(1)][0]
            raise UserError(
                f"{key} {table[key].iloc[bad]}: the image has values that are not finite. Delete its shard and make it again; if it returns, train longer."
            )
        for name, part in predictors.measure(batch).items():
            values[name].append(part)
        powers.append(spectrum.radial_power(batch))
    measured = {name: np.concatenate(parts) for name, parts in values.items()}
    return predictions_table(table[key].tolist(), table[unit].tolist(), kind, table, measured, covariates, trained), np.concatenate(powers)


def _feature_spaces(study: Study, spatial_dims: int, embedder: Path | None, card: Path | None) -> list[feature_spaces.FeatureSpace]:
    spaces = [feature_spaces.random_space(spatial_dims), feature_spaces.radiomic_space()]
    if embedder is not None and card is not None:
        spaces.append(feature_spaces.embedder_space(load_embedder(embedder, card), read_json(card)["weights_sha256"]))
    return spaces + [feature_spaces.network_space(network, spatial_dims) for network in study.evaluate.features]


def _realism_and_diversity(
    study: Study, spaces: list[feature_spaces.FeatureSpace], real: Shards, synthetic: Shards, tables: dict[str, pd.DataFrame]
) -> tuple[dict[str, Any], dict[str, Any], pd.DataFrame]:
    """Both sections of metrics.json, and the first two principal components of held-out and synthetic images in every space.

    As many training scans as synthetic images are taken, so that a floor has the bias of its figure.
    """
    settings = study.evaluate
    count = min(len(tables["synthetic"]), len(tables["training"]), settings.max_images)
    ids = {"synthetic": "sample_id", "training": "scan_id", "held_out": "scan_id"}
    tables = {kind: _choose(tables[kind], key, settings.max_images if kind == "held_out" else count) for kind, key in ids.items()}
    units = {kind: tables[kind]["seed_key" if kind == "synthetic" else "subject_id"].to_numpy(dtype=str) for kind in ids}
    rows = {kind: table["row"].to_numpy(dtype=int) for kind, table in tables.items()}
    shards = {kind: synthetic if kind == "synthetic" else real for kind in ids}
    smallest = min(map(len, tables.values()))

    like: dict[str, Any] = {}
    by_space: dict[str, Any] = {}
    places = []
    found = {kind: feature_spaces.extract(spaces, shards[kind], rows[kind], f"features of {kind} images") for kind in ids}
    for space in spaces:
        card: dict[str, Any] = {"digest": space.digest, "description": space.description, "images": {kind: len(table) for kind, table in tables.items()}}
        if smallest < MIN_IMAGES:
            like[space.name] = by_space[space.name] = card | {"skipped": f"{smallest} images of one kind, at least {MIN_IMAGES} are needed"}
            continue
        scale = Scale.of(found["training"][space.name], smallest)
        samples = {kind: Sample(scale.standard(found[kind][space.name]), units[kind]) for kind in ids}
        card |= {"features": len(scale.mean), "components": scale.basis.shape[1], "explained": [float(f"{x:.4g}") for x in scale.explained[:2]]}
        common: dict[str, Any] = {"resamples": settings.bootstrap, "seed": study.seed}
        like[space.name] = card | realism(samples, scale, slow_resamples=settings.realism_bootstrap, permutations=settings.permutations, **common)
        by_space[space.name] = card | {"neighbours": settings.neighbours} | diversity(samples, neighbours=settings.neighbours, **common)
        for kind in ("held_out", "synthetic"):
            first = scale.components(samples[kind].features)[:, :2]
            places.append(pd.DataFrame({"id": tables[kind][ids[kind]], "kind": kind, "space": space.name, "pc1": first[:, 0], "pc2": first[:, 1]}))
        told = like[space.name]["classifier_auc"]
        logger.info("%s: AUC of telling synthetic from real %s, real from real %s", space.name, told["value"], told["floor"]["value"])

    shape = real.shape("image")[1:]
    ssim = SsimSettings.for_shape(shape)
    options: dict[str, Any] = {"pairs": settings.ssim_pairs, "resamples": settings.bootstrap, "seed": study.seed}
    pairs = {}
    for kind in ("synthetic", "training"):
        images = _Lazy(shards[kind], "image", rows[kind])
        pairs[kind] = pair_similarity(images.__getitem__, units[kind], shape, label=kind, **options)
    various = {ssim.name: pairs["synthetic"] | {"floor": pairs["training"]}, "ssim_settings": ssim.card() | {"metric": ssim.name}, "features": by_space}
    empty = pd.DataFrame({"id": pd.Series(dtype="string"), "kind": "", "space": "", "pc1": 0.0, "pc2": 0.0})
    return like, various, pd.concat(places, ignore_index=True) if places else empty


class _Lazy:
    """A tensor column that is read as it is sliced."""

    def __init__(self, shards: Shards, column: str, rows: np.ndarray) -> None:
        self.shards, self.column, self.rows = shards, column, rows
        self.shape = (len(rows), *shards.shape(column))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        return self.shards.tensors(self.column, self.rows[index])


def _reconstructions(paired: Shards, scans: pd.DataFrame, origin: str, options: dict[str, Any]) -> tuple[pd.DataFrame, dict[str, Any], np.ndarray, np.ndarray]:
    """Rows used (test split; all held-out ones when it is small), quality, and radial power of images and reconstructions."""
    table = _join(paired, "scan_id", scans, origin)
    if (table["split"] == "train").any():
        raise UserError(f"{origin}: holds training scans, expected held-out ones only. Run the step that writes reconstructions again.")
    test = table[table["split"] == "test"]
    rows = (test if test["subject_id"].nunique() >= MIN_TEST_SUBJECTS else table).reset_index(drop=True)
    numbers = rows["row"].to_numpy(dtype=int)
    quality = reconstruction_quality(_Lazy(paired, "image", numbers), _Lazy(paired, "reconstruction", numbers), subjects=rows["subject_id"].tolist(), **options)
    powers = [np.concatenate([spectrum.radial_power(b) for _, b in _read(paired, c, numbers, f"spectrum of each {c}")]) for c in ("image", "reconstruction")]
    return rows, quality, powers[0], powers[1]
