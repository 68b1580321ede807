"""Audit of a release: what can be checked of a synthetic cohort, level by level.

L0 form, L1 integrity and signature, L2 completeness (these three are `verify`, which needs Python alone), L3 lineage,
L4 consistency of recipes, L5 content; with the models L6 makes images again, with the real scans L7 compares with them
again. Every level says what it found, or that it did not run and why.  The checks take no statement of the release on
trust that they can compute themselves.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from meddiff_steps import __version__, config
from meddiff_steps.core.canonical import canonical_bytes
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json, sha256_file
from meddiff_steps.core.random_streams import SCHEME as SEED_SCHEME
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.imaging import encoding
from meddiff_steps.privacy.verdict import SEVERITY
from meddiff_steps.provenance import ledger, lineage, signature, verify
from meddiff_steps.provenance.columns import canonical_lines
from meddiff_steps.provenance.verify import Check, judged
from meddiff_steps.release import crate, croissant, seal
from meddiff_steps.release.dataset import config_texts
from meddiff_steps.release.layout import Layout
from meddiff_steps.release.sealed import Sealed

LEVELS = ("form", "integrity", "completeness", "lineage", "recipes", "content", "re-execution", "privacy")
#: Files of the study without which a ledger cannot have been made.
HEADS = ("plan.parquet", "privacy/decisions.parquet", "privacy/report.json", "autoencoder/card.json")


@dataclass(frozen=True)
class Request:
    """What to audit, with what.

    Attributes
    ----------
    release
        Root of the dataset.
    key
        The publisher's public key.
    private
        The private ledger.
    models
        Folder with autoencoder/ and diffusion/ (or distilled/diffusion/), for L6.
    results
        The study's folder with the real scans, for L7.
    sample, seed
        Images that L6 and L7 look at, and what they are drawn by.
    hash_images
        Whether L1 reads the images; without, L5 does not run either.
    threads
        CPU threads of L6 and L7.
    """

    release: Path
    key: Path | None = None
    private: Path | None = None
    models: Path | None = None
    results: Path | None = None
    sample: int = 20
    seed: str = "audit"
    hash_images: bool = True
    threads: int = 1


@dataclass
class Report:
    """All checks of an audit."""

    release: str
    checks: list[Check] = field(default_factory=list)
    sha256: str | None = None

    def status(self, level: int) -> str:
        """`FINDINGS`, `NOT RUN` or `PASS`."""
        outcomes = [check.outcome for check in self.checks if check.level == level]
        if "finding" in outcomes:
            return "FINDINGS"
        return "PASS" if "pass" in outcomes else "NOT RUN"

    @property
    def passed(self) -> bool:
        return not any(check.outcome == "finding" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        levels = [{"level": i, "name": name, "status": self.status(i)} for i, name in enumerate(LEVELS)]
        return {
            "schema": "meddiff/audit/v1",
            "release": self.release,
            "root_sha256": self.sha256,
            "passed": self.passed,
            "levels": levels,
            "checks": [vars(check) for check in self.checks],
        }


def audit(request: Request) -> Report:
    """Run every level that can run.

    Raises
    ------
    UserError
        There is no release with provenance, or the key cannot be read.
    """
    if not (request.release / seal.FOLDER).is_dir():
        raise UserError(
            f"{request.release}: no folder `{seal.FOLDER}`. Give the root of a release; one that was made without a"
            " ledger cannot be audited."
        )
    key = signature.load_public(request.key) if request.key else None
    report = Report(str(request.release))
    try:
        checks, root, form = verify.check_form(request.release)
    except verify.Unreadable as error:
        report.checks = [Check(0, "root-form", "finding", str(error))]
        report.checks += [
            Check(level, "all", "not run", "the ledger or root.json cannot be read") for level in range(1, 8)
        ]
        return report
    release = Sealed(request.release, root)
    report.sha256 = release.sha256
    report.checks += [*checks, *check_twins(release)]
    sound = not any(check.outcome == "finding" for check in report.checks)
    report.checks += verify.check_integrity(request.release, root, form, request.hash_images, _progress)
    report.checks.append(check_signature(release, key))
    report.checks += verify.check_completeness(request.release, root, form)
    if not sound or release.study is None:
        report.checks += [
            Check(level, "all", "not run", "L0 found the ledger, the config or the records malformed")
            for level in range(3, 8)
        ]
        return report
    report.checks += check_lineage(release)
    report.checks += [*check_recipes(release, request.private), check_metadata(release), check_described(release)]
    if request.hash_images:
        report.checks += check_content(release)
    else:
        report.checks.append(Check(5, "all", "not run", "the images were not to be read"))
    report.checks += _heavy(release, request)
    return report


def _heavy(release: Sealed, request: Request) -> Iterator[Check]:
    """L6 and L7, which need torch, models and real scans."""
    if request.models is None:
        yield Check(6, "all", "not run", "no models: give --models, a folder with autoencoder/ and diffusion/")
    else:
        from meddiff_steps.audit.reexecution import check_reexecution

        yield from check_reexecution(release, request.models, request.sample, request.seed, request.threads)
    if request.results is None:
        yield Check(7, "all", "not run", "no real scans: give --results, the study's folder")
    else:
        from meddiff_steps.audit.privacy import check_privacy

        yield from check_privacy(release, request.results, request.sample, request.seed)


def _progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    return tqdm(items, total=total, desc="hash", unit="image", mininterval=5, file=sys.stderr)


# ------------------------------------------------------------------------------------------------- L0, L1


def check_twins(release: Sealed) -> list[Check]:
    """L0: config and records can be read, and ledger.parquet holds the same rows as ledger.jsonl, which are canonical."""
    differ: list[str] = []
    number = 0
    try:
        with open(release.folder / seal.LINES, "rb") as lines:
            for table in ledger.read_tables(release.folder / seal.TABLE):
                # Equal bytes: the same row, and canonical.
                for expected, name, line in itertools.zip_longest(
                    canonical_lines(table), table["sample_id"].to_pylist(), itertools.islice(lines, len(table))
                ):
                    number += 1
                    if line is None or line.removesuffix(b"\n") != expected:
                        differ.append(f"line {number} ({name})")
                release.count_weights(table)
            differ += [f"line {number + extra}: not in {seal.TABLE}" for extra, _ in enumerate(lines, start=1)]
    except (UserError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        differ.append(str(error))
    return [
        judged(
            0,
            "readable",
            release.problems,
            f"config and {len(release.records)} outputs' records can be read",
            "file(s) of provenance cannot be read",
        ),
        judged(
            0,
            "twins",
            differ,
            "ledger.parquet and ledger.jsonl hold the same canonical rows",
            "row(s) differ between ledger.parquet and ledger.jsonl",
        ),
    ]


def check_signature(release: Sealed, key: signature.Ed25519PublicKey | None) -> Check:
    """L1: who sealed the release; the same rules as `verify.check_signature`, by another implementation of the
    arithmetic.
    """
    if key is None or not (release.folder / seal.SIGNATURE).is_file():
        return verify.check_signature(release.folder, release.root, b"no key" if key else None)
    digest = sha256_file(release.folder / seal.ROOT)
    try:
        statement = signature.verify(read_json(release.folder / seal.SIGNATURE), key)
        subjects = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
    except (UserError, KeyError, TypeError) as error:
        return Check(1, "signature", "finding", f"{seal.SIGNATURE}: {error}")
    if subjects.get(seal.ROOT) != digest:
        named = str(subjects.get(seal.ROOT))
        return Check(
            1,
            "signature",
            "finding",
            f"the signature is valid, but of another release: it names root.json {named[:16]}, here it is"
            f" {digest[:16]}",
        )
    return Check(1, "signature", "pass", f"root.json, SHA-256 {digest}, is signed by key {signature.key_id(key)[:16]}")


# ----------------------------------------------------------------------------------------------------- L3


def check_lineage(release: Sealed) -> list[Check]:
    """L3: the runs lead from the ledger back to the cohort without a gap, and name the weights that the rows name."""
    inputs = {str(path): str(digest) for path, digest in release.root["inputs"].items()}
    found = lineage.trace(inputs, release.records.get)
    steps = found.steps()
    names = {record["step"] for record in steps}
    stray = sorted(path for path in release.records if path not in found.records)
    ends = [f"{name} is not among the inputs of the ledger" for name in HEADS if name not in inputs]
    ends += [
        f"no run of step `{name}`"
        for name in ("cohort", "autoencoder", "diffusion", "generate", "filter", "privacy", "images")
        if name not in names
    ]
    gaps = [f"{path}: no run wrote it" for path in found.missing]
    gaps += [
        f"{path}: read with SHA-256 {wanted[:16]}, but written with {written[:16]}"
        for path, wanted, written in found.stale
    ]
    gaps += [f"{path}: leads to itself" for path in sorted(set(found.cyclic))]
    for path, digest in inputs.items():  # what of the release itself the ledger was made from
        if (
            path.startswith("release/")
            and release.root["files"].get(path.removeprefix("release/"), {}).get("sha256") != digest
        ):
            gaps.append(f"{path}: read with SHA-256 {digest[:16]}, but sealed with another")
    checks = [
        judged(
            3,
            "chain",
            gaps,
            f"{len(steps)} runs: every file that one read is what another wrote",
            "gap(s) in the chain of runs",
        ),
        judged(3, "ends", ends, "the chain leads from the ledger to the cohort", "end(s) of the chain are missing"),
        judged(3, "stray-records", stray, "no record that leads nowhere", "record(s) that do not lead to this release"),
        judged(
            3,
            "sources",
            _source_problems(release, found),
            "every run read what its step needs",
            "run(s) did not read what their step needs",
        ),
        judged(
            3,
            "weights",
            _weight_problems(release, found),
            "the rows' weights were written by recorded trainings",
            "row(s) or models name other weights",
        ),
        _check_lock(release, steps),
    ]
    return checks + _code_notes(release, steps)


def _source_problems(release: Sealed, found: lineage.Lineage) -> Iterator[str]:
    """Runs that lack an input, and runs that made or filtered the released images with other weights than the rows
    name.
    """
    made: set[str] = set()  # what the released images were made from
    for record in found.steps():
        sources = {
            found.records[entry["path"]]["step"]
            for entry in lineage.entries(record, "inputs")
            if entry["path"] in found.records
        }
        for needed in lineage.SOURCES.get(record["step"], ()):
            if not needed & sources:
                yield f"{_written(record)} (step {record['step']}): read nothing of step {' or '.join(sorted(needed))}"
        if record["step"] == "images":
            made |= {entry["path"] for entry in lineage.entries(record, "inputs")}
    filters = [
        record
        for record in found.steps()
        if record["step"] == "filter" and made & {entry["path"] for entry in lineage.entries(record, "outputs")}
    ]
    made = {entry["path"] for record in filters for entry in lineage.entries(record, "inputs")}
    for record in found.steps():
        drew = record["step"] == "generate" and made & {entry["path"] for entry in lineage.entries(record, "outputs")}
        if not drew and record not in filters:
            continue
        for kind in ("autoencoder", "diffusion"):
            read = {entry["path"] for entry in lineage.entries(record, "inputs")}
            weights = {
                (kind, str(entry["weights_sha256"]))
                for path in read & set(found.records)
                if found.records[path]["step"] == kind
                for entry in lineage.entries(found.records[path], "outputs")
                if entry["path"] == path and "weights_sha256" in entry
            }
            if not weights or not weights <= set(release.weights):
                named = ", ".join(sorted(digest[:16] for _, digest in weights)) or "none"
                yield f"{_written(record)} (step {record['step']}): read {kind} {named}, which the rows do not name"


def _written(record: lineage.Record) -> str:
    return next((str(entry["path"]) for entry in lineage.entries(record, "outputs")), "nothing")


def _weight_problems(release: Sealed, found: lineage.Lineage) -> Iterator[str]:
    written: dict[str, set[str]] = {"autoencoder": set(), "diffusion": set()}
    for path, record in found.records.items():
        kind = record["step"]
        if kind in written:
            written[kind] |= {
                entry["weights_sha256"]
                for entry in lineage.entries(record, "outputs")
                if entry["path"] == path and "weights_sha256" in entry
            }
    used = release.weights
    for (kind, digest), (first, count) in used.items():
        if digest not in written[kind]:
            yield f"{kind} {digest[:16]} of {count} row(s), first {first}: no recorded training wrote it"
    if len(used) > 2:
        yield f"{len(used)} different weights in one cohort"


def _check_lock(release: Sealed, steps: list[lineage.Record]) -> Check:
    locks = {record["environment"].get("lock_sha256") for record in steps} - {None}
    path = release.folder / seal.LOCK
    if not path.is_file():
        return Check(3, "environment", "note", f"no {seal.LOCK}: versions are known from the records alone")
    if locks and sha256_file(path) not in locks:
        return Check(3, "environment", "finding", f"{seal.LOCK} is not the lock of any recorded run")
    return Check(3, "environment", "pass", f"{seal.LOCK} is the lock of the recorded runs")


def _code_notes(release: Sealed, steps: list[lineage.Record]) -> list[Check]:
    versions = Counter(str(record["code"].get("version")) for record in steps)
    commits = Counter(str(record["code"].get("commit"))[:12] for record in steps)
    dirty = sorted({record["step"] for record in steps if record["code"].get("dirty")})
    notes = []
    if release.root["software"].get("version") not in versions:
        notes.append(
            Check(
                3,
                "code",
                "finding",
                f"sealed by version {str(release.root['software'].get('version'))[:40]!r}, but runs by"
                f" {dict(versions)}",
            )
        )
    elif set(versions) != {release.root["software"].get("version")} or len(commits) > 1:
        notes.append(Check(3, "code", "note", f"runs by versions {dict(versions)}, commits {dict(commits)}"))
    if dirty:
        notes.append(
            Check(
                3,
                "uncommitted",
                "note",
                f"steps with uncommitted changes: {', '.join(dirty)}; their code digests are in the records",
            )
        )
    return notes or [
        Check(3, "code", "pass", f"all runs by version {next(iter(versions), '')}, commit {next(iter(commits), '')}")
    ]


# ----------------------------------------------------------------------------------------------------- L4


def check_recipes(release: Sealed, private: Path | None) -> list[Check]:
    """L4: what each row says could be so; keys and noise are computed again, no model is needed."""
    study = release.study
    assert study is not None
    groups = {group.name: group for group in study.plan}
    wrong: dict[str, list[str]] = {
        name: [] for name in ("keys", "unique", "noise", "recipe", "covariates", "groups", "attempts")
    }
    owners: dict[str, tuple[str, str, int]] = {}
    noises: dict[str, tuple[str, str, int]] = {}
    counts: Counter[str] = Counter()
    decisions: Counter[str] = Counter()
    outcomes: dict[str, Outcome] = {}
    usual: dict[str, Any] | None = None
    for row in tqdm(
        release.rows(), total=release.root["ledger"]["rows"], desc="recipes", unit="row", mininterval=5, file=sys.stderr
    ):
        name, group = row["sample_id"], groups.get(row["group"])
        counts[row["group"]] += 1
        decisions[row["privacy"]["decision"]] += 1
        held = str(row["covariates"].get(study.privacy.subgroup)) if study.privacy.subgroup else "all"
        outcomes[name] = (row["attempt"], row["seed_key"], row["privacy"]["attempts"], held)
        if group is None:
            wrong["groups"].append(f"{name}: group {row['group']!r} is not in the plan")
            continue
        if row["recipe"] != usual:  # all share one, as a rule
            if (expected := config_recipe(study, row["recipe"])) != row["recipe"]:
                wrong["recipe"].append(f"{name}: {difference(row['recipe'], expected)}")
            else:
                usual = expected
        wrong["covariates"] += [f"{name}: {problem}" for problem in covariate_problems(row, group, study.covariates)]
        wrong["attempts"] += [f"{name}: {problem}" for problem in _attempt_problems(row, study.privacy.max_attempts)]
        points = len(next(iter(group.grid.values()))) if group.covariates == "counterfactual" else 1
        if (
            row["cohort_root"] != f"{study.seed}/{row['group']}"
            or row["noise_index"] != row["index"] // points
            or name != f"{row['group']}{row['index']:06d}"
        ):
            wrong["keys"].append(
                f"{name}: root {row['cohort_root']!r}, number {row['index']}, noise {row['noise_index']} do not follow"
                " from seed and plan"
            )
        if row["seed_key"] is None:
            continue
        if row["seed_key"] != seed_key(row["cohort_root"], row["noise_index"], row["attempt"], "noise"):
            wrong["keys"].append(f"{name}: the key does not follow from root, number and attempt")
        # The rows of one counterfactual subject share their noise on purpose; nobody else may.
        origin = (name, row["group"], row["noise_index"] if points > 1 else row["index"])
        for kind, known, value in (("key", owners, row["seed_key"]), ("noise", noises, row["noise_sha256"])):
            other = known.setdefault(value, origin)
            if other[1:] != origin[1:]:
                wrong["unique"].append(f"{name} and {other[0]} share their {kind}")
        if row["noise_sha256"] != ledger.noise_digest(row["seed_key"]):
            wrong["noise"].append(f"{name}: this key gives other noise here")
    for name, group in groups.items():
        size = (
            group.subjects * int(np.prod([len(values) for values in group.grid.values()]))
            if group.grid
            else group.subjects
        )
        if counts[name] != size:
            wrong["groups"].append(f"group {name}: {counts[name]} rows, planned {size}")
    seed = release.root["seed"]
    if (
        seed.get("scheme") != SEED_SCHEME
        or seed.get("root") != study.seed
        or seed.get("numbers") != ledger.NOISE_NUMBERS
    ):
        wrong["keys"].append(f"root.json: seed {seed}, expected scheme {SEED_SCHEME} and root {study.seed!r}")
    rows = release.root["ledger"]["rows"]
    return [
        judged(
            4,
            "seed-keys",
            wrong["keys"],
            f"all keys of {rows} rows follow from the seed",
            "key(s) do not follow from the seed",
        ),
        judged(
            4,
            "unique",
            wrong["unique"],
            "no two subjects share a key or noise",
            "subject(s) share a key or noise with another",
        ),
        judged(
            4,
            "noise",
            wrong["noise"],
            "every key gives the noise whose digest the ledger holds",
            "key(s) give other noise than recorded",
        ),
        judged(
            4,
            "recipe",
            wrong["recipe"],
            "sampler, steps, guidance and batch size are those of the config",
            "row(s) differ from the config",
        ),
        judged(
            4,
            "covariates",
            wrong["covariates"],
            "all covariates are what the plan allows",
            "covariate(s) are not what the plan allows",
        ),
        judged(
            4, "groups", wrong["groups"], f"{len(groups)} group(s) have their planned size", "problem(s) with groups"
        ),
        judged(
            4,
            "attempts",
            wrong["attempts"],
            "attempts and decisions fit together",
            "row(s) whose attempts and decisions do not fit",
        ),
        judged(
            4,
            "verdict",
            _verdict_problems(release, decisions, outcomes),
            f"counts and verdict ({_verdict(release)}) fit",
            "problem(s)",
        ),
        judged(
            4,
            "settings",
            _settings_problems(release),
            "the settings of every run are those of config.json",
            "run(s) had other settings than config.json",
        ),
        *check_private(release, private, outcomes),
    ]


def config_recipe(study: config.Study, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that the config asks for; what it leaves open (weights, a sampler's default steps) as the row has it."""
    wanted = study.generate
    return {
        **recipe,
        "sampler": wanted.sampler,
        "num_inference_steps": wanted.num_inference_steps or recipe["num_inference_steps"],
        "guidance_scale": wanted.guidance_scale,
        "batch_size": wanted.batch_size,
        "precision": study.compute.precision,
    }


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The fields that differ, with both values."""
    return ", ".join(
        f"{key} {found.get(key)!r} instead of {expected.get(key)!r}"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    )


def covariate_problems(row: ledger.Row, group: config.PlanGroup, covariates: config.Covariates) -> Iterator[str]:
    """Which covariates of a row the study could not have asked for."""
    values = row["covariates"]
    if set(values) != set(covariates):
        yield f"covariates {sorted(values)}, declared {sorted(covariates)}"
        return
    for name, covariate in covariates.items():
        value = values[name]
        if value is None:
            allowed = group.covariates == "table" or (
                name not in group.where and name not in group.grid and name not in group.base
            )
        elif isinstance(covariate, config.CategoricalCovariate):
            allowed = value in covariate.levels
        else:
            allowed = isinstance(value, (int, float)) and covariate.range[0] <= value <= covariate.range[1]
        if not allowed:
            yield f"{name} = {value!r}"
            continue
        if name in group.where and not _fulfils(
            value, group.where[name], isinstance(covariate, config.CategoricalCovariate)
        ):
            yield f"{name} = {value!r}, asked for {group.where[name]}"
        fixed = group.grid.get(name, [group.base[name]] if name in group.base else None)
        if fixed is not None and not any(_same(value, wanted) for wanted in fixed):
            yield f"{name} = {value!r}, asked for one of {fixed}"


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(value, str):
        return value == (wanted if isinstance(wanted, str) else f"{wanted:g}")
    return not isinstance(wanted, str) and abs(value - wanted) <= 1e-9 * max(1.0, abs(wanted))


def _fulfils(value: Any, condition: Any, categorical: bool) -> bool:
    if not isinstance(condition, list):
        return _same(value, condition)
    if categorical:
        return any(_same(value, wanted) for wanted in condition)
    return condition[0] <= value <= condition[1]


def _verdict(release: Sealed) -> str:
    """The verdict as it can be shown: a stranger wrote it."""
    said = str(release.root["privacy"].get("verdict"))
    return said if said in SEVERITY else repr(said[:40])


def _attempt_problems(row: ledger.Row, most: int) -> Iterator[str]:
    made = row["privacy"]["attempts"]
    if not 1 <= made <= most:
        yield f"{made} attempts, allowed {most}"
    elif row["privacy"]["decision"] == "released" and row["attempt"] != made - 1:
        yield f"released at attempt {row['attempt']} of {made}"
    elif row["privacy"]["decision"] == "rejected" and made != most:
        yield f"given up after {made} of {most} attempts"


def _verdict_problems(release: Sealed, decisions: Counter[str], outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    study, said = release.study, release.root["privacy"]
    assert study is not None
    if said.get("verdict") == "FAIL" and study.privacy.enforce == "stop":
        yield "the verdict is FAIL and privacy.enforce is stop, but there is a release"
    try:
        described = str(read_json(release.folder / verify.DESCRIPTION).get("Description"))
    except UserError as error:
        described = str(error)
    if f"Verdict: {said.get('verdict')}." not in described:
        yield f"{verify.DESCRIPTION} does not say the verdict that root.json says, {str(said.get('verdict'))[:40]!r}"
    candidates = sum(made for _, _, made, _ in outcomes.values())
    found = {
        "planned": sum(decisions.values()),
        "released": decisions["released"],
        "duplicates": decisions["duplicate"],
        "failed": decisions["rejected"],
        "candidates": candidates,
        "rejected": candidates - decisions["released"] - decisions["duplicate"],
    }
    counts = said.get("counts")
    for name, number in found.items():
        if (told := counts.get(name) if isinstance(counts, dict) else None) != number:
            yield f"{number} {name} by the ledger, {str(told)[:40]!r} by the privacy report"


def _settings_problems(release: Sealed) -> Iterator[str]:
    study = release.study
    assert study is not None
    teacher = config.PlanGroup(name="teacher", subjects=max(1, study.distill.subjects)).model_dump(mode="json")
    for path, record in release.records.items():
        said = record["config"]
        try:
            plans = [release.config] + ([release.config | {"plan": [teacher]}] if path.startswith("teacher/") else [])
            known = {
                hashlib.sha256(canonical_bytes(config.part_of(content, said["sections"]))).hexdigest()
                for content in plans
            }
        except (KeyError, TypeError, ValueError):
            known = set()
        # Of nothing the digest is always right.
        if said.get("sha256") not in known or said.get("sections") != list(config.STAGES.get(record["step"], ())):
            yield f"{path} (step {record['step']})"


def check_metadata(release: Sealed) -> Check:
    """L4: croissant.json and ro-crate-metadata.json say what follows from the rest of the release; made again, they are
    the same.
    """
    files, name = release.root["files"], "metadata"
    if not {croissant.NAME, crate.NAME} & set(files):
        return Check(
            4, name, "note", f"no {croissant.NAME} and no {crate.NAME}: sealed by a version that did not write them"
        )
    if (version := release.root["software"].get("version")) != __version__:
        return Check(
            4,
            name,
            "note",
            f"{croissant.NAME} and {crate.NAME} are by version {version} and cannot be made again by version"
            f" {__version__}",
        )
    wrong = []
    try:
        date = str(release.config["release"]["date"] or read_json(release.folder / croissant.NAME)["datePublished"])
        for file, content in seal.metadata(release.folder, release.root["ledger"], release.root["inputs"], files, date):
            if read_json(release.folder / file) != content:
                wrong.append(f"{file}: says something else than the release")
    except (UserError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        wrong.append(f"cannot be made again ({type(error).__name__}: {error})")
    return judged(
        4, name, wrong, f"{croissant.NAME} and {crate.NAME} follow from the release", "problem(s) with metadata"
    )


def check_described(release: Sealed) -> Check:
    """L4: what explains tables and images follows from the config; made again, it is the same."""
    study, name = release.study, "described"
    assert study is not None
    written = release.records.get("release/dataset_description.json")
    version = written["code"].get("version") if written else None
    if version != __version__:
        return Check(
            4,
            name,
            "note",
            f"dictionaries and licence are by version {str(version)[:40]!r} and cannot be made again by version"
            f" {__version__}",
        )
    layout = Layout.of(study.spatial_dims, study.plan, study.release)
    # Planned folders of subjects that all failed are not there.
    folders = sorted({verify.placed(row["image"]["path"])[0] for row in release.released()} if layout.size else {""})
    wrong = []
    for place, (file, content) in itertools.product(folders, config_texts(study).items()):
        path = release.folder / place / file
        try:
            if path.stat().st_size != len(content) or path.read_bytes() != content:
                wrong.append(f"{PurePosixPath(place, file)}: says something else than the config")
        except OSError as error:
            wrong.append(f"{PurePosixPath(place, file)}: {error.strerror}")
    return judged(
        4,
        name,
        wrong,
        f"{', '.join(config_texts(study))} follow from the config",
        "file(s) say something else than the config",
    )


#: Attempt and key of a subject's released image (None if there is none), the number of its attempts, and its subgroup
#: of the filter.
Outcome = tuple[int | None, str | None, int, str]


def check_private(release: Sealed, private: Path | None, outcomes: Mapping[str, Outcome]) -> list[Check]:
    """L4: the private ledger is the one that the release commits to, and agrees with the public one."""
    if private is None:
        return [Check(4, "private-ledger", "not run", "no private ledger: give --private")]
    sealed = release.root["private_ledger"]
    leaves: list[bytes] = []
    accepted: dict[str, tuple[int, str]] = {}
    tries: Counter[str] = Counter()
    wrong: list[str] = []
    limits: dict[str, Any] = {}
    try:
        for table in ledger.read_tables(private):
            leaves += map(verify.leaf_hash, canonical_lines(table))
            names, tried, decided, keys = (
                table[name].to_pylist() for name in ("sample_id", "attempt", "decision", "seed_key")
            )
            tries.update(names)
            for name, limit in zip(names, table["limit"].to_pylist(), strict=True):
                group = outcomes[name][3] if name in outcomes else ""
                if limits.setdefault(group, limit) != limit:
                    wrong.append(f"{name}: limits {limit}, those of its subgroup {group!r} are {limits[group]}")
            accepted |= {
                name: (attempt, key)
                for name, attempt, key, decision in zip(names, tried, keys, decided, strict=True)
                if decision == "accepted"
            }
            for row in table.filter(_to_look_at(table)).to_pylist():
                wrong += [
                    f"{row['sample_id']}, attempt {row['attempt']}: {problem}" for problem in _candidate_problems(row)
                ]
    except (UserError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        return [Check(4, "private-ledger", "finding", f"{private} cannot be read as the private ledger ({error})")]
    if verify.merkle_root(leaves).hex() != sealed.get("root") or len(leaves) != sealed.get("rows"):
        wrong.append("its root is not the one that root.json commits to")
    for name, (attempt, key, attempts, _) in outcomes.items():
        if accepted.get(name, (None, None)) != (attempt, key):
            wrong.append(f"{name}: released and accepted do not fit together")
        if tries[name] != attempts:
            wrong.append(f"{name}: {tries[name]} candidates, {attempts} attempts")
    return [
        judged(
            4,
            "private-ledger",
            wrong,
            f"{len(leaves)} candidates; decisions follow from similarities and limits",
            "problem(s) with the private ledger",
        )
    ]


def _to_look_at(table: pa.Table) -> pa.Array:
    """Candidates about which `_candidate_problems` could say something: the rejected ones, and those above a limit."""
    found = pc.equal(table["decision"], "rejected").combine_chunks()
    similarity, limit = table["similarity"].combine_chunks(), table["limit"].combine_chunks()
    for place in range(similarity.type.num_fields):
        name = similarity.type.field(place).name
        found = pc.or_(
            found, pc.fill_null(pc.greater(pc.struct_field(similarity, name), pc.struct_field(limit, name)), False)
        )
    return found


def _candidate_problems(row: ledger.Row) -> Iterator[str]:
    above = [
        name
        for name, limit in row["limit"].items()
        if limit is not None and row["similarity"][name] is not None and row["similarity"][name] > limit
    ]
    if row["decision"] == "rejected":
        if row["reason"] != "not an image" and sorted(row["reason"].split(", ")) != sorted(above):
            yield f"rejected for {row['reason']!r}, above its limit is {above}"
    elif above:
        yield f"{row['decision']}, but above its limit is {above}"


# ----------------------------------------------------------------------------------------------------- L5


def check_content(release: Sealed) -> list[Check]:
    """L5: every image is decoded; it says that it is synthetic, and is what the ledger says it shows."""
    study = release.study
    assert study is not None
    wrong: dict[str, list[str]] = {name: [] for name in ("decodes", "format", "voxels", "bytes", "marks", "twins")}
    shown: dict[str, tuple[str, str]] = {}
    layout, grid = (
        Layout.of(study.spatial_dims, study.plan, study.release),
        encoding.Grid(tuple(study.preprocess.shape), study.preprocess.spacing_mm),
    )
    folders: set[str] = set()
    for row in tqdm(
        release.released(),
        total=release.root["ledger"]["released"],
        desc="content",
        unit="image",
        mininterval=5,
        file=sys.stderr,
    ):
        name, path = row["sample_id"], release.folder / row["image"]["path"]
        other, key = shown.setdefault(row["image"]["voxel_sha256"], (name, row["seed_key"]))
        if (
            key != row["seed_key"]
        ):  # counterfactual images of one subject may be equal: their covariate then does nothing
            wrong["twins"].append(f"{name} and {other}")
        folders.add(layout.folder(row["group"], row["index"]))
        if row["image"]["path"] != layout.path(name, row["group"], row["index"]):
            wrong["format"].append(f"{name}: lies at {row['image']['path']}")
        try:
            image = encoding.decode(path, grid)
        except encoding.Undecodable as error:
            wrong["format" if isinstance(error, encoding.OtherForm) else "decodes"].append(
                f"{row['image']['path']}: {error}"
            )
            continue
        wrong["format"] += [f"{name}: {problem}" for problem in _format_problems(image.stored)]
        if encoding.voxel_digest(image.stored, image.affine) != row["image"]["voxel_sha256"]:
            wrong["voxels"].append(name)
        wrong["bytes"] += [f"{name}: {problem}" for problem in encoding.departures(image, grid, name, study.study)]
        if not image.description.startswith("SYNTHETIC"):
            wrong["marks"].append(f"{name}: the description is {image.description[:40]!r}")
        if image.mark is None or image.mark.get("sample_id") != name or image.mark.get("study") != study.study:
            wrong["marks"].append(f"{name}: the mark is {str(image.mark)[:200]!r}")
    wrong["marks"] += _dataset_marks(release.folder, study, folders or {""})
    count = release.root["ledger"]["released"]
    return [
        judged(5, "decodes", wrong["decodes"], f"{count} images can be decoded", "image(s) cannot be decoded"),
        judged(
            5,
            "format",
            wrong["format"],
            "shape, type and range are the study's",
            "problem(s) with shape, type, range or place",
        ),
        judged(
            5,
            "voxels",
            wrong["voxels"],
            "what the images show is what the ledger holds",
            "image(s) show something else than the ledger says",
        ),
        judged(
            5,
            "bytes",
            wrong["bytes"],
            "no image holds anything else: headers are as they are written",
            "thing(s) in images that no image is written with",
        ),
        judged(
            5,
            "marks",
            wrong["marks"],
            "every image and the dataset say that they are synthetic",
            "mark(s) are missing or wrong",
        ),
        judged(5, "twins", wrong["twins"], "no two subjects show the same", "pair(s) of subjects show the same"),
    ]


def _format_problems(stored: np.ndarray) -> Iterator[str]:
    top = encoding.VOLUME_SCALE if stored.ndim == 3 else encoding.PICTURE_SCALE
    if stored.min() < 0 or stored.max() > top:
        yield f"values from {stored.min()} to {stored.max()}, expected 0 to {top}"
    elif stored.min() == stored.max():
        yield f"the same value everywhere ({stored.min()})"


def _dataset_marks(folder: Path, study: config.Study, datasets: Collection[str]) -> Iterator[str]:
    wanted: list[tuple[str, Callable[[Any], Any]]] = []
    for place in sorted({"", *datasets}):
        wanted.append((str(PurePosixPath(place, "dataset_description.json")), lambda content: content["Synthetic"]))
        if study.spatial_dims == 3 and place in datasets:
            wanted.append(
                (
                    str(PurePosixPath(place, f"{study.release.suffix}.json")),
                    lambda content: content["Synthesis"]["Synthetic"],
                )
            )
    for name, mark in wanted:
        try:
            if mark(json.loads((folder / name).read_text(encoding="utf-8"))) is not True:
                yield f"{name}: does not say that it is synthetic"
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield f"{name}: no mark ({type(error).__name__}: {error})"
