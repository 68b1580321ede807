"""What can be known of a study before hours are spent on it: its cohort, its grid, what its jobs ask for."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from meddiff_steps.cohort.base import check_units
from meddiff_steps.cohort.bids import read_bids
from meddiff_steps.cohort.covariates import (
    CovariateEncoding,
    as_declared,
    cell_text,
    is_null,
    parse_covariates,
    shorten,
)
from meddiff_steps.cohort.decisions import read_decisions
from meddiff_steps.cohort.identity import alike, one_spelling, shown
from meddiff_steps.cohort.splits import SPLITS, assign_splits
from meddiff_steps.cohort.table import read_table
from meddiff_steps.config import BidsSource, CategoricalCovariate, SimulatedSource, Study, TableSource
from meddiff_steps.config.cohort import SIMULATED_LEVELS
from meddiff_steps.config.preprocess import MNI152
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.core.folders import DECISIONS, NETWORK
from meddiff_steps.core.registries import DETECTORS
from meddiff_steps.imaging.brain_extraction import extraction_installed
from meddiff_steps.imaging.channels import filled_in
from meddiff_steps.imaging.points import read_shapes
from meddiff_steps.operations.expected import Expected, hours
from meddiff_steps.operations.machine import Machine
from meddiff_steps.operations.proposal import numbers_of
from meddiff_steps.operations.survey import Header, read_header, repeated, spread
from meddiff_steps.privacy.size import FEW_TRAINING_SUBJECTS, SUBJECTS_PER_NUMBER, subjects_needed
from meddiff_steps.release.licences import KNOWN, spdx

State = Literal["ok", "warning", "fail"]

#: Share of missing values from which little can be learnt of a covariate.
MANY_MISSING = 0.5
#: Of the field of view, what a grid shows at least; less is probably smaller than the head.
SMALL_GRID = 0.7
#: Of the largest field of view, what no grid shows less of by intention: a digit of the spacing is wrong.
FAR_TOO_SMALL = 0.5
#: Voxels of scans may be larger than those of the grid by this factor before the grid is called finer than its data.
FINER = 1.25
#: Bytes that a voxel takes as it is kept (float16), and images kept per planned subject: drawn, accepted, released.
BYTES_PER_VOXEL, KEPT_PER_SUBJECT = 2, 3


@dataclass(frozen=True)
class Finding:
    """One plain sentence about one topic, and whether something would go wrong."""

    state: State
    topic: str
    text: str


@dataclass
class Cohort:
    """What was read of a cohort: a row per scan with typed covariates and, if it could be made, `split`."""

    frame: pd.DataFrame
    subjects: int
    splits: Mapping[str, int]


class _Warnings(logging.Handler):
    """Collects what readers warn of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def _not_simulated(study: Study) -> Iterator[Finding]:
    """Levels that a plan asks for and the simulator never makes."""
    for group in study.plan:
        for name, wanted in group.where.items():
            there = SIMULATED_LEVELS.get(name)
            absent = [] if there is None else [one for one in np.atleast_1d(wanted).tolist() if one not in there]
            if absent:
                yield Finding(
                    "fail",
                    f"plan.{group.name}",
                    f"asks for {name} {shorten(absent)}, and simulated subjects are {' or '.join(there or ())}.",
                )


def cohort(study: Study) -> tuple[list[Finding], Cohort | None]:
    """What the cohort's tables and folders say; images are not opened."""
    source = study.cohort
    if isinstance(source, SimulatedSource):
        counts = {name: round(source.subjects * getattr(study.splits, name)) for name in SPLITS}
        told = Finding("ok", "cohort", f"{source.subjects} simulated subjects will be made.")
        split = _splits(counts, study)
        said = replace(split, text=f"about {split.text}")
        return [told, said, *_given(study), *_not_simulated(study)], Cohort(pd.DataFrame(), source.subjects, counts)
    if isinstance(source, BidsSource) and study.storage.cohort and not Path(source.root).exists():
        return [
            Finding("ok", "cohort", f"fetched from {study.storage.cohort} when the run begins; not read here.")
        ], None
    log, warnings = logging.getLogger("meddiff_steps.cohort"), _Warnings()
    log.addHandler(warnings)
    propagated, log.propagate = log.propagate, False
    try:
        text = study.text.column
        raw = read_table(source, study.covariates, text) if isinstance(source, TableSource) else None
        if raw is None and isinstance(source, BidsSource):
            raw = read_bids(source, study.covariates, text)
    except UserError as error:
        return [Finding("fail", "cohort", str(error))], None
    finally:
        log.removeHandler(warnings)
        log.propagate = propagated
    assert raw is not None
    same = [] if source.alike_ids == "distinct" else alike(raw["subject_id"])
    subjects = raw["subject_id"].replace(one_spelling(same)).nunique()
    found = [Finding("ok", "cohort", f"{len(raw)} scans of {subjects} subjects.")]
    found += [Finding("warning", "cohort", text) for text in warnings.found]
    found += _given(study)
    found += [finding for name in study.covariates for finding in _covariate(study, raw, name)]
    repeated = sorted(set(raw["scan_id"][raw["scan_id"].duplicated()]))
    if repeated:
        found.append(Finding("fail", "cohort", f"scan_id {shorten(repeated)} occurs more than once."))
    if same and source.alike_ids == "refuse":
        listed = "; ".join(shorten([shown(name) for name in names]) for names in same[:3])
        found.append(
            Finding("fail", "cohort", f"ids differ in spelling alone: {listed}. Write them alike, or cohort.alike_ids.")
        )
    try:
        assigned = assign_splits(raw["subject_id"], same, study.splits, study.seed)
    except UserError as error:
        return [*found, Finding("fail", "splits", str(error))], Cohort(raw, subjects, {})
    raw["split"] = raw["subject_id"].map(assigned)
    counts = Counter(raw.groupby(raw["subject_id"].replace(one_spelling(same)))["split"].first())
    found.append(_splits({name: counts[name] for name in SPLITS}, study))
    try:
        kept = raw[~raw["scan_id"].isin(_excluded(study, raw["scan_id"].tolist()))]
    except UserError as error:
        return [*found, Finding("fail", "preprocess.exclude", str(error))], Cohort(raw, subjects, counts)
    found += _learnable(study, kept)
    found += _asked(study, kept)
    return found, Cohort(raw, subjects, counts)


def _excluded(study: Study, scans: list[str]) -> dict[str, str]:
    """Scans that a person excluded: by the study's table, or the one that lies with its results."""
    decided = Path(study.preprocess.exclude or Path(study.results, study.study, DECISIONS))
    return read_decisions(decided, scans) if decided.is_file() else {}


def _splits(counts: Mapping[str, int], study: Study) -> Finding:
    said = ", ".join(f"{counts[name]} {name}" for name in SPLITS) + " subjects."
    numbers = 0 if _given_diffusion(study) else numbers_of(study.covariates.values())  # whose covariates are settled
    if counts["train"] >= max(FEW_TRAINING_SUBJECTS, SUBJECTS_PER_NUMBER * numbers):
        return Finding("ok", "splits", said)
    if counts["train"] >= FEW_TRAINING_SUBJECTS:
        return Finding(
            "warning",
            "splits",
            f"{said} Covariates are told by {numbers} numbers (two each, or one per level), and training subjects can"
            f" teach {counts['train'] // SUBJECTS_PER_NUMBER}, at {SUBJECTS_PER_NUMBER} for each: released images may"
            " come nearer to them than to strangers, which a gate stops after hours. Leave covariates out"
            " (docs/own-cohort.md).",
        )
    return Finding(
        "warning",
        "splits",
        f"{said} So few to learn from that released images may be nearer to them than to strangers, which a gate stops"
        f" after hours; it did so with 32. Plan for {FEW_TRAINING_SUBJECTS} or more, or start from somebody's weights"
        " (init_from).",
    )


def _given_diffusion(study: Study) -> Path | None:
    """The card of the diffusion model of ours that the study starts from."""
    base = study.init_from
    if base is None or base.path is None or "diffusion" not in base.models:
        return None
    card = Path(base.path, "diffusion", NETWORK[1])
    return card if card.is_file() else None


def _given(study: Study) -> Iterator[Finding]:
    """Whether the study has the covariates that given weights know, in their units."""
    card = _given_diffusion(study)
    if card is not None:
        try:
            trained = CovariateEncoding.from_json(read_json(card).get("encoding", {}))
            as_declared(trained, study.covariates, study.diffusion.rare, f"{card.parent}")
            assert study.init_from is not None, "it names the card"
            check_units(study.init_from, study.covariates)
        except UserError as error:
            yield Finding("fail", "init_from", str(error))


def _covariate(study: Study, raw: pd.DataFrame, name: str) -> Iterator[Finding]:
    """Values against what is declared: both ways."""
    covariate, topic = study.covariates[name], f"covariates.{name}"
    cells = [cell_text(value) for value in raw[name]]
    levels = covariate.levels if isinstance(covariate, CategoricalCovariate) else []
    given = [cell for cell in cells if cell in levels or not is_null(cell)]
    counts = Counter(given)
    strange = [f"{cell!r} ({count})" for cell, count in counts.most_common() if cell not in levels]
    if levels and strange:
        yield Finding(
            "fail",
            topic,
            f"the data have {shorten(strange)}, which `levels` {levels} does not name. Add them there, or correct them"
            " in the table (n/a where unknown).",
        )
        return
    try:
        parse_covariates(raw, {name: covariate})
    except UserError as error:
        said = [line.strip().removeprefix(f"{topic}: ") for line in str(error).split("\n", 1)[-1].splitlines()]
        yield Finding("fail", topic, f"{said[0]} {'; '.join(said[1:])}")
        return
    missing = 1 - len(given) / len(cells)
    absent = f"; {missing:.0%} missing" if missing else ""
    if isinstance(covariate, CategoricalCovariate):
        yield Finding("ok", topic, ", ".join(f"{counts[level]} {level}" for level in covariate.levels) + absent + ".")
        nobody = [level for level in covariate.levels if not counts[level]]
        if nobody:
            yield Finding(
                "warning", topic, f"no scan has {shorten(nobody)}, which is declared: nothing can be learnt of it."
            )
    elif given:
        low, high = min(map(float, given)), max(map(float, given))
        yield Finding("ok", topic, f"{low:g} to {high:g} {covariate.unit}, within the declared range{absent}.")
    if missing > MANY_MISSING:
        yield Finding("warning", topic, f"{missing:.0%} of its values are missing; little can be learnt of it.")


def _learnable(study: Study, frame: pd.DataFrame) -> Iterator[Finding]:
    for name, covariate in study.covariates.items():
        try:
            CovariateEncoding.fit(frame, {name: covariate})
        except UserError as error:
            # A value that cannot be read was told before.
            if "do not fit what the study declares" not in str(error):
                yield Finding("fail", f"covariates.{name}", str(error).removeprefix(f"covariates.{name}: "))


def _asked(study: Study, frame: pd.DataFrame) -> Iterator[Finding]:
    """Levels that the plan asks for and no training scan has."""
    train = frame[frame["split"] == "train"]
    for group in study.plan:
        for name, wanted in group.where.items():
            if isinstance(study.covariates.get(name), CategoricalCovariate):
                seen = {cell_text(value) for value in train[name]}
                for level in wanted if isinstance(wanted, list) else [wanted]:
                    if str(level) not in seen:
                        yield Finding(
                            "fail", f"plan.{group.name}", f"asks for {name} {level}, which no training scan has."
                        )


def licence(study: Study) -> Finding:
    """Whether a release can say what is allowed with it."""
    asked = study.release
    if spdx(asked.licence) == "CC0-1.0" and not isinstance(study.cohort, SimulatedSource):
        return Finding(
            "warning", "release.licence", f"{asked.licence} gives all rights away: do the cohort's terms allow it?"
        )
    if spdx(asked.licence) or asked.licence_text.strip():
        return Finding("ok", "release.licence", f"{asked.licence}, whose text goes into the release.")
    return Finding(
        "warning",
        "release.licence",
        f"{asked.licence} is none of {', '.join(KNOWN)}, whose texts are known, so the release's LICENSE would hold no"
        " text. Write it into release.licence_text.",
    )


def privacy(study: Study, calibration: int) -> Finding:
    """What the filter can promise with so many calibration subjects."""
    detectors = len(study.privacy.detectors or DETECTORS.names()) + bool(study.pairs)  # one more of label maps
    needed = subjects_needed(study.privacy.level, detectors)
    if calibration >= needed:
        goes_on = study.privacy.enforce == "report"
        return Finding(
            "warning" if goes_on and not isinstance(study.cohort, SimulatedSource) else "ok",
            "privacy",
            f"{calibration} calibration subjects, {needed} are needed: the filter takes at most"
            f" {study.privacy.level:.0%} of strangers for copies."
            + (" A verdict of FAIL would not stop the release (privacy.enforce: report)." if goes_on else ""),
        )
    least = detectors / (calibration + 1)
    remedy = (
        f"raise privacy.level to {math.ceil(100 * least) / 100:g}, or splits.calibration"
        if least < 0.5
        else "raise splits.calibration"
    )
    then = "the run stops before the release" if study.privacy.enforce == "stop" else "the release will say so"
    return Finding(
        "fail" if study.privacy.enforce == "stop" else "warning",
        "privacy",
        f"{calibration} calibration subjects, and privacy.level {study.privacy.level:g} needs {needed}: the filter will"
        f" reject nothing, and {then}. {remedy[0].upper()}{remedy[1:]}.",
    )


# ------------------------------------------------------------------------------------------------------ images


def headers(frame: pd.DataFrame, told: Callable[[int, int], None]) -> list[Header]:
    """Headers of a sample of scans; `told` is called with how many of how many were read."""
    paths = spread(frame["path"].tolist())
    found = []
    for number, path in enumerate(paths, 1):
        found.append(read_header(path))
        told(number, len(paths))
    return found


def images(study: Study, found: Sequence[Header]) -> Iterator[Finding]:
    """Headers against the grid."""
    bad = [header for header in found if header.problem]
    depth = study.preprocess.depth
    good = [repeated(header, depth) if depth else header for header in found if header.size]
    if bad:
        share = len(bad) / len(found)
        state: State = "fail" if share > study.preprocess.max_failed_share else "warning"
        named = "; ".join(f"{header.path}: {header.problem}" for header in bad[:3])
        yield Finding(state, "scans", f"{len(bad)} of the {len(found)} that were looked at cannot be used: {named}")
    if not good:
        return
    flat = [header for header in good if (len(header.size) == 2) != (study.spatial_dims == 2)]
    if flat:
        kind = "pictures" if len(flat[0].size) == 2 else "volumes"
        yield Finding(
            "fail",
            "grid",
            f"preprocess.shape has {study.spatial_dims} sides, but {flat[0].path} and others are {kind}.",
        )
        return
    sizes = Counter(header.size for header in good)
    common = ", ".join(f"{'x'.join(map(str, size))} ({count})" for size, count in sizes.most_common(3))
    yield Finding("ok", "scans", f"headers of {len(found)} read; most common sizes: {common}.")
    if study.preprocess.voxel_mm is not None:
        spacing = np.array(study.preprocess.voxel_mm)
        yield _grid(study, good, spacing)
        edges = np.median([header.spacing for header in good], axis=0)
        if spacing.max() * FINER < edges.max():
            yield Finding(
                "warning",
                "grid",
                f"voxels of {_by(spacing)} mm are finer than those of the scans ({_by(edges)} mm): detail that is"
                " not there costs memory and time.",
            )


def _grid(study: Study, found: Sequence[Header], spacing: np.ndarray) -> Finding:
    box = np.multiply(study.preprocess.shape, spacing)
    views = np.array([header.extent for header in found])
    largest = views.max(axis=0)
    if (box >= largest - spacing / 2).all():
        return Finding("ok", "grid", f"{_by(box)} mm holds every field of view (largest {_by(largest)} mm).")
    if (box < FAR_TOO_SMALL * largest).any():
        return Finding(
            "fail",
            "grid",
            f"{_by(box)} mm (preprocess.shape times spacing_mm, {_by(spacing)} mm), less than half of the largest field"
            f" of view of the scans, {_by(largest)} mm: heads would be cut off. Take larger voxels, or more of them.",
        )
    middle = np.median(views, axis=0)
    said = (
        f"{_by(box)} mm, smaller than the field of view of scans ({_by(middle)} mm in the middle): heads must be"
        " smaller than the grid. Headers do not say whether they are; `meddiff propose` measures some, and after"
        " `meddiff run STUDY quality` cut_off_share in preprocessed/qc.parquet tells all."
    )
    return Finding("warning" if (box < SMALL_GRID * middle).any() else "ok", "grid", said)


def _by(numbers: Any) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)


def beside(study: Study, frame: pd.DataFrame) -> Iterator[Finding]:
    """Files that a pattern names for each scan: masks, channels, label maps; and the template."""
    patterns = {f"preprocess.channels.{name}": one.path for name, one in study.preprocess.channels.items()}
    optional = {f"preprocess.channels.{name}" for name, one in study.preprocess.channels.items() if not one.required}
    if study.preprocess.brain_mask:
        patterns["preprocess.brain_mask"] = study.preprocess.brain_mask
    if study.segmentation is not None:
        patterns["segmentation.labels"] = study.segmentation.labels
    rows = spread(frame.to_dict("records"))
    for key, pattern in patterns.items():
        try:
            paths = [filled_in(pattern, row, key) for row in rows]
        except UserError as error:
            yield Finding("fail", key, str(error))
            continue
        absent = [path for path in paths if not path.exists()]
        if not absent:
            yield Finding("ok", key, f"there for all of the {len(paths)} scans that were looked at.")
            continue
        many = len(absent) / len(paths) > study.preprocess.max_failed_share and key not in optional
        fails = many and (key != "segmentation.labels" or len(absent) == len(paths))
        yield Finding("fail" if fails else "warning", key, f"not there for {len(absent)} of {len(paths)}: {absent[0]}")
    registration = study.preprocess.registration
    if registration is not None and registration.template != MNI152 and not Path(registration.template).is_file():
        yield Finding("fail", "preprocess.registration.template", f"{registration.template} is not there.")
    if study.preprocess.brain_extraction is not None and not extraction_installed():
        yield Finding(
            "fail",
            "preprocess.brain_extraction",
            "deepbet is not installed: pip install 'meddiff-steps[brain-extraction]'.",
        )


def shapes(study: Study) -> tuple[list[Finding], int]:
    """What the file of shapes that are completed says, and how many there are; nothing of a file that is not there,
    which the workflow tells.
    """
    if study.shape_completion.points is None or not Path(study.shape_completion.points).is_file():
        return [], 0
    path = Path(study.shape_completion.points)
    try:
        found = read_shapes(path)
    except UserError as error:
        return [Finding("fail", "shapes", str(error))], 0
    said = f"{len(found.ids)} of {found.points.shape[1]} points, {found.gap} of them missing, in {path}."
    return [Finding("ok", "shapes", said)], len(found.ids)


# ----------------------------------------------------------------------------------------------------- machine


def needs(study: Study, jobs: Sequence[Mapping[str, Any]], here: Machine | None) -> Iterator[Finding]:
    """What jobs ask for (rule, threads, mem_mb, runtime, gpu) against this machine; `here` is None where they will
    run elsewhere.
    """
    counts = Counter(job["rule"] for job in jobs)
    yield Finding("ok", "jobs", f"{len(jobs)} jobs of {len(counts)} rules.")
    most = max(jobs, key=lambda job: job["mem_mb"])
    largest = f"{most['rule']} reserves the most, {most['mem_mb'] / 1024:.1f} GiB (it uses less)"
    longest = max(jobs, key=lambda job: job["runtime"])
    with_gpu = sorted({job["rule"] for job in jobs if job["gpu"]})
    wanted = max((job["gpu"] for job in jobs), default=0)
    if here is None:
        yield Finding("ok", "memory", f"{largest}.")
        yield Finding("ok", "limits", f"the longest job may take {longest['runtime'] / 60:g} h ({longest['rule']}).")
        yield Finding("ok", "GPU", f"rules that ask for one: {', '.join(with_gpu) or 'none'}.")
        return
    enough = most["mem_mb"] <= here.memory_mb
    yield Finding(
        "ok" if enough else "fail",
        "memory",
        f"{largest}; this machine has {here.memory_mb / 1024:.1f} GiB."
        + ("" if enough else " Take smaller batches or a coarser grid, or a larger machine (--elsewhere)."),
    )
    if not with_gpu:
        yield Finding("ok", "GPU", "no rule asks for one.")
    elif here.gpus >= wanted:
        yield Finding("ok", "GPU", f"{here.gpus} here, for {', '.join(with_gpu)}.")
    elif study.compute.device == "cuda":
        yield Finding(
            "fail",
            "GPU",
            f"compute.device is cuda, and {here.gpus} of {wanted} GPU(s) are here: {', '.join(with_gpu)}.",
        )
    else:
        yield Finding(
            "ok",
            "GPU",
            f"none is here, so these rules will run on processors: {', '.join(with_gpu)}."
            if not here.gpus
            else f"{here.gpus} here, {wanted} asked for: {', '.join(with_gpu)}.",
        )


def time(found: Sequence[Expected], measured: Path | None) -> Finding:
    """Hours, where they can be told."""
    if not found:
        return Finding("warning", "time", "not known, because the cohort could not be read.")
    slowest = sorted((one for one in found if one.asked), key=lambda one: -one.jobs * one.hours_each)[:3]
    named = ", ".join(f"{one.stage} {_long(one.jobs * one.hours_each)}" for one in slowest)
    by = f"as {measured} was measured" if measured else "on processor cores as fast as those here"
    return Finding("ok", "time", f"about {_long(hours(found))} of jobs ({named}), {by}.")


def _long(hours: float) -> str:
    if hours >= 0.95:
        return f"{hours:.1f} hours"
    minutes = max(1, round(60 * hours))
    return f"{minutes} minute{'s' * (minutes > 1)}"


def disk(study: Study, scans: int, planned: int, found: Sequence[Expected], free: int) -> Finding:
    """Bytes that the results take against what is free: as expected, or at least what images alone take, of scans and
    of planned subjects.
    """
    voxels = math.prod(study.preprocess.shape)
    images = (scans + KEPT_PER_SUBJECT * planned) * voxels * BYTES_PER_VOXEL
    wanted = max(images, sum(one.disk for one in found))
    sure = "about" if found else "at least"
    enough = wanted <= free
    return Finding(
        "ok" if enough else "fail",
        "disk",
        f"{sure} {wanted / 1e9:.2f} GB for {study.results}/{study.study}; {free / 1e9:.1f} GB are free."
        + (
            ""
            if enough
            else " Point `results` at a larger disk, or delete shards as they are used (storage.temporary)."
        ),
    )
