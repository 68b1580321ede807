"""Released images made again from their rows of the ledger, and what is the same about them."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from meddiff_steps import __version__, config
from meddiff_steps.cohort.manifest import read_manifest, usable
from meddiff_steps.cohort.texts import COLUMN as TEXT
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import sha256_file, write_atomic
from meddiff_steps.core.folders import MANIFEST, NETWORK, QUALITY, TONE
from meddiff_steps.core.weights_digest import safetensors_digest
from meddiff_steps.imaging import encoding
from meddiff_steps.models.masks import MaskModel
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.provenance import verify
from meddiff_steps.provenance.ledger import Row, cell, shard_of
from meddiff_steps.provenance.lineage import entries, step_of
from meddiff_steps.provenance.record import environment
from meddiff_steps.release import versions
from meddiff_steps.release.layout import Layout
from meddiff_steps.release.measuring import instruments_of, scaled
from meddiff_steps.release.sealed import Sealed
from meddiff_steps.synthesis import size
from meddiff_steps.synthesis.generate import CohortGenerator
from meddiff_steps.synthesis.plan import build_plan, draws

#: Largest difference of a stored value (1000 or 255 is full scale) at which an image counts as the same on another
#: machine. Rounding in another order, in bf16, moved images of the demo by up to 11 of 1000.
TOLERANCE = {3: 15, 2: 4}


#: Most steps of a recipe and most values of a batch that are drawn again: many times what any machine takes.
MOST_STEPS, MOST_VALUES = 10_000, 1 << 31


@dataclass(frozen=True)
class Comparison:
    """An image made again beside the released one.

    Attributes
    ----------
    verdict
        `bitwise`: it shows the same to the last bit as the released file, or, where there is none, as the ledger says;
        `within tolerance` (`TOLERANCE`); `differs`, be it in its header alone; `missing`: the released file cannot be
        read, or there is none and what was made again is not what the ledger says.
    same_file
        Whether even the files are equal, byte by byte.
    largest
        Largest difference of a stored value; -1 if the two cannot be compared.
    labels
        Of the label map that was made of it: `same` as the ledger says, `differs`, or "" where none was made.
    """

    sample_id: str
    verdict: str
    same_file: bool
    largest: int
    labels: str = ""


def find_models(folder: Path, recipe: Mapping[str, str]) -> dict[str, Path]:
    """Folders of the models whose weights a recipe names; the grey levels lie with `diffusion`.

    Raises
    ------
    UserError
        One of them is not there, or has other weights.
    """
    names = ("few_step", "second_model/diffusion", "distilled/diffusion", "diffusion")
    generators = [folder / name for name in names]
    places = {"autoencoder": [folder / "autoencoder"], "diffusion": generators}
    if recipe.get("decoder"):
        places["decoder"] = [folder / "decoder"]
    if recipe.get("tone"):
        places["tone"] = generators
    for kind in ("mask_autoencoder", "mask_diffusion"):
        if recipe.get(kind):
            places[kind] = [folder / "masks" / kind.removeprefix("mask_")]
    found: dict[str, Path] = {}
    for kind, candidates in places.items():
        seen = []
        for place in candidates:
            weights, card = (place / name for name in (TONE if kind == "tone" else NETWORK))
            if weights.is_file() and card.is_file():
                try:
                    digest = safetensors_digest(weights)
                except ValueError as error:
                    raise UserError(str(error)) from None
                if digest == recipe[kind]:
                    found[kind] = place
                seen.append(f"{weights} has {digest[:16]}")
        if kind not in found:
            raise UserError(
                f"{folder}: no {kind} with weights {recipe[kind][:16]}"
                f" ({'; '.join(seen) or 'no model.safetensors with card.json there'})"
            )
    return found


#: What another version may be needed for.
PURPOSE = "to make images again"
#: Steps that draw images: the second, those of subjects whose first image was rejected.
DRAWING = ("generate", "filter")
#: More than any machine has: a record that says so is not believed.
MOST_THREADS = 1024


def drawing_threads(release: Sealed) -> dict[tuple[str, int], int]:
    """CPU threads of the runs that drew the images of a release, by step and shard, as their records say: another
    number rounds otherwise.  Empty where it has no records.
    """
    found = {}
    for record in release.records.values():
        step, shard = step_of(record), record["parameters"].get("shard")
        threads = (record["environment"].get("torch") or {}).get("threads")
        if step in DRAWING and isinstance(shard, int) and isinstance(threads, int) and 0 < threads <= MOST_THREADS:
            found[step, shard] = threads
    return found


def _by_threads(rows: Sequence[Row], release: Sealed, threads: int) -> Iterator[tuple[int, list[Row]]]:
    """Rows by the number of threads that drew them; by `threads` where nothing says how many these were."""
    recorded = drawing_threads(release)
    shards: dict[str, int] = {}
    if len(set(recorded.values())) > 1:
        wanted = {row["sample_id"] for row in rows}
        for place, row in enumerate(release.rows()):
            if row["sample_id"] in wanted and (shard := shard_of(release.root, place)) is not None:
                shards[row["sample_id"]] = shard
    usual = next((number for (step, _), number in recorded.items() if step == DRAWING[0]), threads)
    found: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        step = DRAWING[row["attempt"] > 0]
        found[recorded.get((step, shards.get(row["sample_id"], -1)), usual)].append(row)
    yield from found.items()


def remake(
    rows: Sequence[Row], release: Sealed, models: Path, threads: int
) -> Iterator[tuple[Row, np.ndarray, np.ndarray | None]]:
    """The images of `rows`, float32 (*spatial) in [0, 1], and the label maps that they are drawn from, if they are,
    uint8 (*spatial), made again; batch by batch, so in another order.

    Parameters
    ----------
    threads
        Of a processor, where the records of the release do not say how many drew them.

    Raises
    ------
    UserError
        The rows do not share one recipe, or the models are not those of the recipe; `OtherVersion` where the version of
        the release may still know what to do with these models.
    """
    study = release.study
    assert study is not None
    recipe = rows[0]["recipe"]
    if any(row["recipe"] != recipe for row in rows):
        raise UserError(
            "the rows do not share one recipe, so one model cannot have made them all. Run `audit` on the release."
        )
    if (
        recipe["num_inference_steps"] > MOST_STEPS
        or recipe["batch_size"] * math.prod(study.preprocess.shape) > MOST_VALUES
    ):
        raise UserError(
            f"{recipe['num_inference_steps']} steps in batches of {recipe['batch_size']} are more than anybody draws."
            " Run `audit` on the release."
        )
    places = find_models(models, recipe)
    with versions.explained(release.version, PURPOSE):
        for number, part in _by_threads(rows, release, threads):
            yield from _drawn(part, study, places, number)


def _drawn(
    rows: Sequence[Row], study: config.Study, places: Mapping[str, Path], threads: int
) -> Iterator[tuple[Row, np.ndarray, np.ndarray | None]]:
    recipe = rows[0]["recipe"]
    named = "sampler num_inference_steps guidance guidance_scale guidance_interval batch_size drawing_steps".split()
    wanted = {name: recipe[name] for name in named if name in recipe}
    if not recipe.get("decoder"):
        wanted.pop("drawing_steps", None)  # of a decoder that is not there
    fabric = make_fabric(study.compute, threads)
    model = TrainedModel.load(
        places["autoencoder"],
        places["diffusion"],
        fabric,
        study.compute,
        decoder=places.get("decoder"),
        toned="tone" in places,
    )
    masks = MaskModel.where_there_is(
        places["mask_diffusion"].parent if "mask_diffusion" in places else None, fabric, study.compute
    )
    generator = CohortGenerator(model, study.generate.model_copy(update=wanted), masks)
    columns = ("sample_id", "index", "cohort_root", "noise_index", "attempt", "seed_key")
    subjects = pd.DataFrame([{name: row[name] for name in columns} | row["covariates"] for row in rows])
    for name, covariate in study.covariates.items():
        subjects[name] = subjects[name].astype(object if isinstance(covariate, config.CategoricalCovariate) else float)
    by_id = {row["sample_id"]: row for row in rows}
    for sample_id, image, labels in generator.pairs(subjects, "again"):
        # Shards keep half precision, so the released values went through it.
        yield by_id[sample_id], image[0].astype(np.float16).astype(np.float32), labels


def compare(
    row: Row, again: np.ndarray, release: Path, study: config.Study, labels: np.ndarray | None = None
) -> tuple[Comparison, bytes]:
    """An image that was made again beside the released file, and the file that it gives; and the label map that it was
    drawn from beside what the ledger says.
    """
    comparison, content = _compare_images(row, again, release, study)
    if labels is None:
        return comparison, content
    grid = encoding.Grid(tuple(study.preprocess.shape), study.preprocess.spacing_mm)
    return replace(comparison, labels=_same_labels(row, labels, grid)), content


def _same_labels(row: Row, labels: np.ndarray, grid: encoding.Grid) -> str:
    told = row.get("labels")
    return "same" if told and encoding.voxel_digest(labels, grid.affine) == told["voxel_sha256"] else "differs"


def _compare_images(row: Row, again: np.ndarray, release: Path, study: config.Study) -> tuple[Comparison, bytes]:
    grid = encoding.Grid(tuple(study.preprocess.shape), study.preprocess.spacing_mm)
    content, values = encoding.encode(again, grid, row["sample_id"], study.study)
    name, path = row["sample_id"], release / row["image"]["path"]
    promised = encoding.voxel_digest(values, grid.affine) == row["image"]["voxel_sha256"]
    if not os.path.lexists(path):  # the folder `provenance` alone is enough
        same_file = hashlib.sha256(content).hexdigest() == row["image"]["sha256"]
        return Comparison(name, "bitwise" if promised else "missing", same_file, 0 if promised else -1), content
    try:
        released = encoding.decode(path, grid)
    except encoding.Undecodable:
        return Comparison(name, "missing", False, -1), content
    largest = int(np.abs(released.stored.astype(int) - values.astype(int)).max())
    if encoding.departures(released, grid, name, study.study):
        verdict = "differs"
    elif largest == 0:
        verdict = "bitwise" if promised else "differs"
    else:
        verdict = "within tolerance" if largest <= TOLERANCE[study.spatial_dims] else "differs"
    return Comparison(name, verdict, sha256_file(path) == hashlib.sha256(content).hexdigest(), largest), content


def _with_labels(
    rows: Sequence[Row], release: Sealed, models: Path, threads: int
) -> Iterator[tuple[Row, np.ndarray, np.ndarray | None]]:
    """As `remake`; where the release has label maps that were read from images, and `models` has what reads them, they
    are read again.
    """
    study = release.study
    assert study is not None
    labelled = any(row.get("labels") for row in release.rows())
    segmenter = instruments_of(release, models)[0].segmenter if rows and labelled else None
    grid = encoding.Grid(tuple(study.preprocess.shape), study.preprocess.spacing_mm)
    for row, image, labels in remake(rows, release, models, threads) if rows else ():
        if labels is None and segmenter is not None:
            _, stored = encoding.encode(image, grid, row["sample_id"], study.study)
            labels = segmenter.label_map(torch.from_numpy(scaled(stored)))
        yield row, image, labels


def regenerate(release: Sealed, rows: Sequence[Row], models: Path, out: Path, threads: int) -> list[Comparison]:
    """Write the images of `rows` below `out`, at the paths that they have in the release, and compare them with it.

    Label maps are written beside them, where images are drawn from such or `models` is the folder of the study, which
    has the segmenter.

    Raises
    ------
    UserError
        A row has no image, since its subject was not released; or see `remake`.
    """
    for row in rows:
        if row["image"] is None:
            decision = row["privacy"]["decision"]
            raise UserError(
                f"{row['sample_id']}: was not released ({decision}), so the ledger holds no recipe of it. Take a"
                " subject of participants.tsv."
            )
    study = release.study
    assert study is not None
    found = []
    grid = encoding.Grid(tuple(study.preprocess.shape), study.preprocess.spacing_mm)
    for row, image, labels in _with_labels(rows, release, models, threads):
        comparison, content = compare(row, image, release.folder, study, labels)
        write_atomic(out / row["image"]["path"], content)
        if labels is not None:
            content = encoding.encode_labels(labels, grid, row["sample_id"], study.study)
            write_atomic(out / row["labels"]["path"], content)
        found.append(comparison)
    return sorted(found, key=lambda comparison: comparison.sample_id)


@dataclass(frozen=True)
class Added:
    """An image of a subject that the release did not have.  No privacy filter has looked at it."""

    sample_id: str
    path: str
    bytes: int
    sha256: str
    voxel_sha256: str
    seed_key: str
    covariates: dict[str, Any]


def plan_more(release: Sealed, models: Path, count: int, group: str | None) -> tuple[pd.DataFrame, config.PlanGroup]:
    """The plan of one group of a release with `count` subjects, and that group; it begins with the subjects of the
    ledger.

    Covariates are drawn as the study drew them.  What they are drawn from is not in a release: it comes from the
    training rows of `models`/cohort/manifest.parquet, as the folder of the study has it, less the scans that
    `models`/preprocessed/qc.parquet left out, where the plan of the release was made so.

    Raises
    ------
    UserError
        There is no such group, what its covariates are drawn from is not there, or it gives other covariates than the
        release has.
    """
    study = release.study
    assert study is not None
    wanted = size.enlarged(study.plan, count, group)
    if wanted.covariates == "table":
        raise UserError(
            f"group {wanted.name}: its covariates come from a table of the publisher's, which is not in the release."
            " Enlarge another group."
        )
    manifest = models / MANIFEST
    training = pd.DataFrame(columns=list(study.covariates))
    if draws(wanted, study.covariates):
        if not manifest.is_file():
            raise UserError(
                f"{manifest}: not there. The covariates of new subjects are drawn from a distribution that was fitted"
                " to the training scans; it is private, so neither a release nor packed models hold it. Give --models"
                " the study's own folder, or ask the publisher for more subjects."
            )
        scans = read_manifest(manifest, study.covariates)
        if _by_quality(release):
            if not (models / QUALITY).is_file():
                raise UserError(
                    f"{models / QUALITY}: not there. It says which of the training scans the plan of the release was"
                    " made of. Give --models the study's own folder, or ask the publisher for more subjects."
                )
            scans = usable(scans, pd.read_parquet(models / QUALITY))
        training = scans[scans["split"] == "train"]
    texts, size_of_shards = study.text.column is not None, study.generate.shard_size
    plan = build_plan([wanted], study.covariates, training, study.seed, size_of_shards, with_texts=texts)
    planned = {row["sample_id"]: row for row in plan.to_dict("records")}
    for row in release.rows():
        if row["group"] == wanted.name:
            found = _covariates(planned[row["sample_id"]], study.covariates) if row["sample_id"] in planned else None
            if found != row["covariates"]:
                raise UserError(
                    f"{manifest}: gives {row['sample_id']} covariates {found}, the release has {row['covariates']}. "
                    "Give --models the folder of the study that made this release, with the cohort as it was then."
                )
    return plan, wanted


def _by_quality(release: Sealed) -> bool:
    """Whether the plan of a release was made of the scans alone that preprocessing kept, as its records say."""
    return any(
        entry["path"] == QUALITY
        for record in release.records.values()
        if step_of(record) == "plan"
        for entry in entries(record, "inputs")
    )


def _covariates(subject: Mapping[Any, Any], covariates: config.Covariates) -> dict[str, Any]:
    asked = {
        name: cell(subject[name], isinstance(covariate, config.CategoricalCovariate))
        for name, covariate in covariates.items()
    }
    return asked | ({TEXT: cell(subject[TEXT], True)} if TEXT in subject else {})


def regenerate_more(
    release: Sealed, models: Path, out: Path, threads: int, count: int, group: str | None, shard: int | None = None
) -> tuple[list[Comparison], list[Added]]:
    """Make one group of a release again with `count` subjects, or one shard of it: those of the release are compared
    with it, the others are new.

    Images lie below `out` where a release of that many would have them.

    Raises
    ------
    UserError
        Nothing was released, there is no such shard; or see `plan_more` and `remake`.
    """
    study = release.study
    assert study is not None
    with versions.explained(release.version, PURPOSE):
        plan, wanted = plan_more(release, models, count, group)
    shards = int(plan["shard"].max()) + 1
    if shard is not None and not 0 <= shard < shards:
        raise UserError(f"no shard {shard}: {len(plan)} subjects of group {wanted.name} are {shards} shards, from 0.")
    chosen = (plan if shard is None else plan[plan["shard"] == shard]).to_dict("records")
    ids = {subject["sample_id"] for subject in chosen}
    known: dict[str, Row] = {}
    recipe: dict[str, Any] | None = None
    for row in release.rows():
        if row["sample_id"] in ids:
            known[row["sample_id"]] = row
        if row["image"] is not None:
            recipe = row["recipe"]
    if recipe is None:
        raise UserError(f"{release.folder}: nothing was released, so that nothing says how. Give another release.")
    rows: list[Row] = []
    for subject in chosen:
        old = known.get(subject["sample_id"])
        if old is None:
            front = {
                name: subject[name]
                for name in ("sample_id", "group", "index", "noise_index", "attempt", "cohort_root", "seed_key")
            }
            rows.append(front | {"covariates": _covariates(subject, study.covariates), "recipe": recipe, "image": None})
        elif old["image"] is not None:  # who was rejected stays rejected
            rows.append(old)
    layout = Layout.of(
        study.spatial_dims, [wanted if other.name == wanted.name else other for other in study.plan], study.release
    )
    grid = encoding.Grid(tuple(study.preprocess.shape), study.preprocess.spacing_mm)
    comparisons, added = [], []
    for row, image, labels in _with_labels(rows, release, models, threads):
        path = layout.path(row["sample_id"], row["group"], row["index"])
        if row["image"] is not None:
            comparison, content = compare(row, image, release.folder, study, labels)
            comparisons.append(comparison)
        else:
            content, stored = encoding.encode(image, grid, row["sample_id"], study.study)
            digests = hashlib.sha256(content).hexdigest(), encoding.voxel_digest(stored, grid.affine)
            added.append(Added(row["sample_id"], path, len(content), *digests, row["seed_key"], row["covariates"]))
        write_atomic(out / path, content)
        if labels is not None:
            content = encoding.encode_labels(labels, grid, row["sample_id"], study.study)
            write_atomic(out / verify.labels_path(path), content)
    return sorted(comparisons, key=lambda one: one.sample_id), sorted(added, key=lambda one: one.sample_id)


def write_added(path: Path, added: Sequence[Added]) -> None:
    """A table of subjects that a release did not have, like participants.tsv, with the digests of their images."""
    names = sorted({name for one in added for name in one.covariates})
    rows = []
    for one in added:
        cells = [verify.cell(one.covariates[name]) for name in names]
        rows.append([f"sub-{one.sample_id}", *cells, one.path, one.sha256, one.voxel_sha256, one.seed_key])
    table = pd.DataFrame(rows, columns=["participant_id", *names, "path", "sha256", "voxel_sha256", "seed_key"])
    write_atomic(path, table.to_csv(sep="\t", index=False, lineterminator="\n").encode())


def summary(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Counts by verdict, and how many files are equal byte by byte."""
    counts = Counter(comparison.verdict for comparison in comparisons)
    return {
        "images": len(comparisons),
        "verdicts": {name: counts[name] for name in ("bitwise", "within tolerance", "differs", "missing")},
        "labels": {name: sum(one.labels == name for one in comparisons) for name in ("same", "differs")},
        "same_file": sum(comparison.same_file for comparison in comparisons),
        "largest_difference": max((comparison.largest for comparison in comparisons), default=0),
    }


def as_text(comparisons: Sequence[Comparison], environment: Sequence[str], added: Sequence[Added] = ()) -> list[str]:
    """A summary for people, as lines: counts, the first images that are not the same, what is new, and how the machines
    differ.
    """
    found = summary(comparisons)
    lines = [
        f"{len(comparisons)} images: "
        + (", ".join(f"{count} {name}" for name, count in found["verdicts"].items() if count) or "none"),
        f"{found['same_file']} files are equal byte by byte",
    ]
    if made := sum(found["labels"].values()):
        lines.append(f"{made} label maps: {found['labels']['same']} the same")
    unlike = [comparison for comparison in comparisons if comparison.verdict in ("differs", "missing")]
    lines += [f"  {c.sample_id}: {c.verdict}, by up to {c.largest} stored units" for c in unlike[:10]]
    if added:
        lines.append(
            f"{len(added)} more images, {added[0].sample_id} to {added[-1].sample_id}: no privacy filter compared them"
            " with real scans"
        )
    if environment:
        lines += [
            "differences between the machine of the release and this one:",
            *(f"  {line}" for line in environment),
        ]
    return lines


def environment_difference(release: Sealed) -> list[str]:
    """How the machine of the release, by the records of the steps that draw images, and the version of this package
    differ from those here, a line each.
    """
    there = [_flat(record["environment"]) for record in release.records.values() if step_of(record) in DRAWING]
    here, found = _flat(environment()), []
    here.pop("torch threads", None)  # images are made again with those of the release
    if release.is_other:
        found.append(f"meddiff_steps: {versions.advice(release.version, PURPOSE)}; here {__version__}")
    for name in sorted(here):
        others = {one.get(name, "nothing") for one in there}
        if others != {here[name]}:
            found.append(f"{name}: {' or '.join(sorted(others))}, here {here[name]}")
    return found


def _flat(machine: Mapping[str, Any]) -> dict[str, str]:
    """Every fact of an environment by its name, as text; lists of it in one order."""
    found: dict[str, str] = {}
    for name, value in machine.items():
        facts = {f"{name} {key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        found |= {
            key: ", ".join(sorted(map(str, one))) if isinstance(one, list) else str(one) for key, one in facts.items()
        }
    return found
