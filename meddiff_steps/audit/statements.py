"""L4 of an audit, what the release says of itself: settings of the runs, metadata, descriptions.

What is made again is made as the version would have made it that sealed the release.  Where that gives something else
than a version that is not this one wrote, the check is a note: either program may be the reason.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator
from typing import Any

import pandas as pd
import rfc8785

from meddiff_steps import __version__, config
from meddiff_steps.cohort.texts import COLUMN as TEXT
from meddiff_steps.core.errors import UserError
from meddiff_steps.provenance import lineage, verify
from meddiff_steps.provenance.ledger import LABELS
from meddiff_steps.provenance.lineage import Record
from meddiff_steps.provenance.verify import Check, judged
from meddiff_steps.release import crate, croissant, seal, versions
from meddiff_steps.release.dataset import previews, texts
from meddiff_steps.release.facts import are_facts
from meddiff_steps.release.layout import unknown_to_bids
from meddiff_steps.release.sealed import Sealed
from meddiff_steps.release.story import Story

#: Where the first of two models lies.
FIRST_MODEL = "teacher/"

# ----------------------------------------------------------------------------------------------- settings


def check_settings(release: Sealed) -> Check:
    """Every run had the settings of config.json, and all that its step could read in the version that it was of.

    Runs of a later version than this one, and of another one than the seal's that knew other keys, are noted: what
    they read cannot be told from what was published.
    """
    wrong, unknown = [], []
    seen: dict[tuple[str, str, bool], list[tuple[list[str], str]] | None] = {}
    for path, record in release.records.items():
        kind = record["step"], record["code"]["version"], path.startswith(FIRST_MODEL)
        if kind not in seen:
            seen[kind] = _could_have_read(release, path, record)
        known = seen[kind]
        text = f"{path} (step {record['step']})"
        if known is None:
            unknown.append(text)
        # Of nothing the digest is always right.
        elif not known or (record["config"].get("sections"), record["config"].get("sha256")) not in known:
            wrong.append(text)
    if unknown and not wrong:
        return _noted("settings", f"settings of {len(unknown)} run(s) cannot be checked", release.version, unknown)
    return judged(
        4,
        "settings",
        wrong,
        "the settings of every run are those of config.json",
        "run(s) had other settings than config.json",
    )


def _could_have_read(release: Sealed, path: str, record: Record) -> list[tuple[list[str], str]] | None:
    """Sections and digest that a run can have had, of which one is right; None where this version cannot know.

    Digests are of the published content, with the names that keys had then.
    """
    version = versions.stated(record["code"].get("version"))
    if not versions.is_known(version):
        return None
    sections = list(config.stages_of(version).get(record["step"], ()))
    found = []
    for content in _contents(release, path):
        try:
            part = rfc8785.dumps(config.part_of(content, sections, version))
        except (KeyError, TypeError, ValueError):
            continue
        found.append((sections, hashlib.sha256(part).hexdigest()))
    if not found and version != release.version:
        return None
    return found if sections else []


def _contents(release: Sealed, path: str) -> Iterator[dict[str, Any]]:
    """The published study, and for what the first of two models drew, the same with its plan."""
    yield release.config
    if not path.startswith(FIRST_MODEL):
        return
    section = release.config.get("second_model", release.config.get("distill"))
    subjects = section.get("subjects") if isinstance(section, dict) else None
    if isinstance(subjects, int):
        group = config.PlanGroup(name="teacher", subjects=max(1, subjects)).model_dump(mode="json")
        # A group has the keys that groups had in that version.
        keys = set(release.config["plan"][0]) if release.is_other else set(group)
        yield release.config | {"plan": [{key: value for key, value in group.items() if key in keys}]}


# ----------------------------------------------------------------------------------- metadata, descriptions


def check_metadata(release: Sealed) -> Check:
    """croissant.json and ro-crate-metadata.json say what follows from the rest of the release; made again, they are the
    same.
    """
    files, name = release.root["files"], "metadata"
    wrong = []
    try:
        date = release.config["release"]["date"] or _published(release)
        sealed, heads = release.root["ledger"], release.root["inputs"]
        for file, content in seal.metadata(release.folder, sealed, heads, files, date, release.version):
            if verify.read_bytes(release.folder, file) != verify.json_bytes(content):
                wrong.append(f"{file}: says something else than the release")
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        wrong.append(f"cannot be made again ({type(error).__name__}: {error})")
    if wrong and release.is_other:
        text = f"{croissant.NAME} and {crate.NAME} are not as version {__version__} would write them"
        return _noted(name, text, release.version, wrong)
    return judged(
        4, name, wrong, f"{croissant.NAME} and {crate.NAME} follow from the release", "problem(s) with metadata"
    )


def _published(release: Sealed) -> str:
    """The day of publication where the study leaves it open: that of the last image, in a record that is not public."""
    date = str(lineage.read_strictly(release.folder, croissant.NAME)["datePublished"])
    if date and datetime.date.fromisoformat(date).isoformat() != date:
        raise ValueError(f"datePublished is {date[:40]!r}, which is no day")
    return date


def check_described(release: Sealed) -> Check:
    """Texts, tables and dictionaries of the datasets follow from the config, the ledger and the facts of
    dataset_description.json; written again, they are the same.
    """
    name = "described"
    wrong: list[str] = []
    count = 0
    try:
        for file, content in _texts(release):
            count += 1
            if verify.read_bytes(release.folder, file, max(len(content), verify.MOST)) != content:
                wrong.append(f"{file}: says something else than config, ledger and facts")
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        wrong.append(f"cannot be written again ({type(error).__name__}: {error})")
    if wrong and release.is_other:
        return _noted(name, f"texts are not as version {__version__} would write them", release.version, wrong)
    return judged(4, name, wrong, f"{count} texts follow from config, ledger and facts", "problem(s) with texts")


def _texts(release: Sealed) -> Iterator[tuple[str, bytes]]:
    study = release.study
    assert study is not None
    described = lineage.read_strictly(release.folder, verify.DESCRIPTION, ascii_only=False)
    if not are_facts(described["Facts"]):
        raise ValueError(f"{verify.DESCRIPTION} holds more, or less, than facts")
    story = Story.of(study, described["Facts"], _sources(described))
    rows = list(release.released())
    plan = pd.DataFrame(
        [{name: row[name] for name in ("sample_id", "group", "noise_index")} | row["covariates"] for row in rows],
        columns=[
            *("sample_id", "group", "noise_index", *study.covariates),
            *([TEXT] if study.text.column is not None else []),
        ],
        dtype=object,
    )
    images = pd.DataFrame([_image(row) for row in rows], columns=None if rows else ["sample_id", "path", "sha256"])
    files = release.root["files"]
    yield from texts(plan, images, story, {name: files[name]["sha256"] for name in previews(images, story)})
    if study.spatial_dims == 3 and "BIDSVersion" in described:
        yield ".bidsignore", seal.IGNORED + unknown_to_bids(study.release.suffix)


def _image(row: dict[str, Any]) -> dict[str, Any]:
    """What tables of images say of a row, as far as texts need it."""
    found = {"sample_id": row["sample_id"], "path": row["image"]["path"], "sha256": row["image"]["sha256"]}
    labels = row.get("labels")
    found |= {LABELS[name]: labels[name] for name in ("path", "sha256")} if labels else {}
    return found | (row.get("measured") or {})


def _sources(described: dict[str, Any]) -> list[dict[str, str]]:
    """Addresses of the source cohort, of the form in which `describe` writes them; no other text."""
    sources = described.get("SourceDatasets", [])
    for entry in sources:
        if not {"DOI", "URL"} & entry.keys() <= entry.keys() <= {"DOI", "URL", "Version"}:
            raise ValueError(f"SourceDatasets holds {sorted(entry)}")
    return sources


def _noted(name: str, text: str, version: str, examples: list[str]) -> Check:
    """A note on what cannot be checked because another version made it."""
    return Check(4, name, "note", f"{text}; {versions.advice(version, 'to check')}", examples[: verify.EXAMPLES])
