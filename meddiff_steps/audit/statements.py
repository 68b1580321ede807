"""L4 of an audit, what the release says of itself: verdict and counts, settings of the runs, metadata, descriptions.

What is made again is made as the version would have made it that sealed the release.  Where that gives something else
than a version that is not this one wrote, the check is a note: either program may be the reason.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from meddiff_steps import __version__, config
from meddiff_steps.audit.recipes import Tally
from meddiff_steps.core.canonical import canonical_bytes
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.privacy.verdict import SEVERITY
from meddiff_steps.provenance import verify
from meddiff_steps.provenance.lineage import Record
from meddiff_steps.provenance.verify import Check, judged
from meddiff_steps.release import crate, croissant, seal, versions
from meddiff_steps.release.dataset import config_texts
from meddiff_steps.release.layout import Layout
from meddiff_steps.release.sealed import Sealed

# ------------------------------------------------------------------------------------------------ verdict


def check_verdict(release: Sealed, tally: Tally) -> Check:
    """Verdict and counts of the privacy report are those of the ledger and the description."""
    wrong = [*_verdict_problems(release), *_count_problems(release, tally)]
    return judged(4, "verdict", wrong, f"counts and verdict ({_verdict(release)}) fit", "problem(s)")


def _verdict(release: Sealed) -> str:
    """The verdict as it can be shown: a stranger wrote it."""
    said = str(release.root["privacy"].get("verdict"))
    return said if said in SEVERITY else repr(said[:40])


def _verdict_problems(release: Sealed) -> Iterator[str]:
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


def _count_problems(release: Sealed, tally: Tally) -> Iterator[str]:
    decisions = tally.decisions
    candidates = sum(made for _, _, made, _ in tally.outcomes.values())
    found = {
        "planned": sum(decisions.values()),
        "released": decisions["released"],
        "duplicates": decisions["duplicate"],
        "failed": decisions["rejected"],
        "candidates": candidates,
        "rejected": candidates - decisions["released"] - decisions["duplicate"],
    }
    counts = release.root["privacy"].get("counts")
    for name, number in found.items():
        if (told := counts.get(name) if isinstance(counts, dict) else None) != number:
            yield f"{number} {name} by the ledger, {str(told)[:40]!r} by the privacy report"


# ----------------------------------------------------------------------------------------------- settings


def check_settings(release: Sealed) -> Check:
    """Every run had the settings of config.json, and all that its step could read in the version that it was of.

    Runs of a later version than this one, and of another one than the seal's that knew other keys, are noted: what
    they read cannot be told from what was published.
    """
    wrong, unknown = [], []
    for path, record in release.records.items():
        known = _could_have_read(release, path, record)
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
            part = canonical_bytes(config.part_of(content, sections, version))
        except (KeyError, TypeError, ValueError):
            continue
        found.append((sections, hashlib.sha256(part).hexdigest()))
    if not found and version != release.version:
        return None
    return found if sections else []


def _contents(release: Sealed, path: str) -> Iterator[dict[str, Any]]:
    """The published study, and for what the first of two models drew, the same with its plan."""
    yield release.config
    if not path.startswith("teacher/"):
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
    if not {croissant.NAME, crate.NAME} & set(files):
        text = f"no {croissant.NAME} and no {crate.NAME}: sealed by a version that did not write them"
        return Check(4, name, "note", text)
    wrong = []
    try:
        date = str(release.config["release"]["date"] or read_json(release.folder / croissant.NAME)["datePublished"])
        sealed, heads = release.root["ledger"], release.root["inputs"]
        for file, content in seal.metadata(release.folder, sealed, heads, files, date, release.version):
            if read_json(release.folder / file) != content:
                wrong.append(f"{file}: says something else than the release")
    except (UserError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        wrong.append(f"cannot be made again ({type(error).__name__}: {error})")
    if wrong and release.is_other:
        text = f"{croissant.NAME} and {crate.NAME} are not as version {__version__} would write them"
        return _noted(name, text, release.version, wrong)
    return judged(
        4, name, wrong, f"{croissant.NAME} and {crate.NAME} follow from the release", "problem(s) with metadata"
    )


def check_described(release: Sealed) -> Check:
    """What explains tables and images follows from the config; made again, it is the same."""
    study, name = release.study, "described"
    assert study is not None
    written = release.records.get("release/dataset_description.json")
    version = versions.stated(written["code"].get("version") if written else None)
    texts = config_texts(study, version)
    wrong = list(_other_texts(release.folder, _folders(release), texts))
    if wrong and version != __version__:
        return _noted(
            name, f"dictionaries and licence are not as version {__version__} would write them", version, wrong
        )
    return judged(
        4,
        name,
        wrong,
        f"{', '.join(texts)} follow from the config",
        "file(s) say something else than the config",
    )


def _folders(release: Sealed) -> list[str]:
    """Folders of the datasets; planned ones whose subjects all failed are not there."""
    study = release.study
    assert study is not None
    layout = Layout.of(study.spatial_dims, study.plan, study.release)
    return sorted({verify.placed(row["image"]["path"])[0] for row in release.released()} if layout.size else {""})


def _other_texts(release: Path, folders: Iterable[str], texts: dict[str, bytes]) -> Iterator[str]:
    for place, (file, content) in itertools.product(folders, texts.items()):
        path = release / place / file
        try:
            if path.stat().st_size != len(content) or path.read_bytes() != content:
                yield f"{PurePosixPath(place, file)}: says something else than the config"
        except OSError as error:
            yield f"{PurePosixPath(place, file)}: {error.strerror}"


def _noted(name: str, text: str, version: str, examples: list[str]) -> Check:
    """A note on what cannot be checked because another version made it."""
    return Check(4, name, "note", f"{text}; {versions.advice(version, 'to check')}", examples[: verify.EXAMPLES])
