"""BIDS datasets: images by datatype, suffix and entities, covariates from participants.tsv and sessions.tsv.

An own reader because only file names are needed: it lists each directory once and opens no sidecar, so 10,000 subjects
take about a second (pybids, which indexes everything, takes ten or more).
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from meddiff_steps.cohort.covariates import require_columns, shorten
from meddiff_steps.cohort.table import read_delimited
from meddiff_steps.config import BidsSource, Covariates
from meddiff_steps.core.errors import UserError

log = logging.getLogger(__name__)

EXTENSIONS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class BidsName:
    """A parsed image name, for example sub-01_ses-02_run-1_T1w.nii.gz."""

    stem: str
    """The name without suffix and extension: sub-01_ses-02_run-1."""
    entities: dict[str, str]
    suffix: str

    @classmethod
    def parse(cls, name: str) -> BidsName | None:
        """The parts of an image name, or None for any other file.

        >>> BidsName.parse("sub-01_run-1_T1w.nii.gz")
        BidsName(stem='sub-01_run-1', entities={'sub': '01', 'run': '1'}, suffix='T1w')
        """
        extension = next((e for e in EXTENSIONS if name.endswith(e)), None)
        if extension is None or not name.startswith("sub-"):
            return None
        stem, _, suffix = name.removesuffix(extension).rpartition("_")
        pairs = [part.partition("-") for part in stem.split("_")]
        return cls(stem, {key: value for key, _, value in pairs}, suffix)


@dataclass(frozen=True)
class _Image:
    name: BidsName
    subject: str
    session: str | None
    datatype: str
    path: str


def read_bids(source: BidsSource, covariates: Covariates) -> pd.DataFrame:
    """A cohort from a BIDS dataset.

    Parameters
    ----------
    source
        Root, datatype, suffix, and entities that an image must carry.
    covariates
        The declared schema.  A column of sub-*/sub-*_sessions.tsv overrides the one of participants.tsv for the
        sessions it lists.

    Returns
    -------
    pandas.DataFrame
        scan_id (file name without suffix and extension), subject_id (`sub-01`), session_id (`ses-02` or None), path,
        and per covariate its raw text (None where no table has it); sorted by scan_id.

    Raises
    ------
    UserError
        The dataset is not there or breaks a rule, no image matches, or a covariate column is missing.
    """
    root = Path(source.root)
    if not root.exists():
        raise UserError(
            f"cohort.root: {root} does not exist. Set it to the directory that holds participants.tsv; relative paths"
            " start at the working directory."
        )
    if not root.is_dir():
        raise UserError(
            f"cohort.root: {root} is a file, expected the directory of a BIDS dataset. Name the directory that holds"
            " participants.tsv."
        )
    header, participants = _read_participants(root)

    folders = sorted(entry.name for entry in _scan(root) if entry.name.startswith("sub-") and entry.is_dir())
    if not folders:
        raise UserError(
            f"{root}: no sub-* directories, expected one per subject. Set cohort.root to the top of the BIDS dataset."
        )

    images: list[_Image] = []
    session_rows: dict[str, dict[str, dict[str, str]]] = {}
    for subject in folders:
        found, sessions_table = _subject_images(root, subject, source)
        images += found
        if found and sessions_table is not None:
            session_rows[subject] = _read_sessions(sessions_table)
    if not images:
        raise _nothing_matches(root, folders, source)
    _check_subjects(root, folders, participants, images)
    _check_names(images)

    session_columns = sorted({column for rows in session_rows.values() for row in rows.values() for column in row})
    available = [*header, *(column for column in session_columns if column not in header)]
    origin = f"{root / 'participants.tsv'}" + (" and sub-*_sessions.tsv" if session_columns else "")
    columns = require_columns(covariates, available, origin)

    unlisted = [
        i.name.stem
        for i in images
        if i.session and i.subject in session_rows and i.session not in session_rows[i.subject]
    ]
    if unlisted:
        log.warning(
            "%s: %d scan(s) of sessions that sub-*_sessions.tsv does not list (%s); participants.tsv is used",
            root,
            len(unlisted),
            shorten(unlisted),
        )

    rows = []
    for image in sorted(images, key=lambda i: i.name.stem):
        values = participants[image.subject] | session_rows.get(image.subject, {}).get(image.session or "", {})
        row: dict[str, str | None] = {
            "scan_id": image.name.stem,
            "subject_id": image.subject,
            "session_id": image.session,
            "path": image.path,
        }
        row |= {name: values.get(column) for name, column in columns.items()}
        rows.append(row)
    return pd.DataFrame(rows, dtype="object")


# -------------------------------------------------------------------------------------------------- tables


def _read_participants(root: Path) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Columns of participants.tsv, and per participant its cells."""
    table = root / "participants.tsv"
    if not table.exists():
        inside = sorted(
            entry.name
            for entry in _scan(root)
            if entry.is_dir() and os.path.exists(os.path.join(entry.path, "participants.tsv"))
        )
        hint = (
            f" There is one in {shorten(inside)}: set cohort.root to that directory."
            if inside
            else " Add it, or set cohort.root to the top of the dataset."
        )
        raise UserError(f"{table}: not there, but it says who the subjects are.{hint}")
    return _read_keyed(table, "participant_id", "sub-")


def _read_sessions(table: Path) -> dict[str, dict[str, str]]:
    """Per session its cells."""
    return _read_keyed(table, "session_id", "ses-")[1]


def _read_keyed(table: Path, key: str, prefix: str) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Columns of a BIDS table without its key column, and its cells by key."""
    header, rows = read_delimited(table, "\t")
    if key not in header:
        spaced = " Cells must be separated by tabs." if len(header) == 1 else ""
        raise UserError(
            f"{table}: no column {key!r}. Columns are: {', '.join(header)}.{spaced} Add the column, with values such as"
            f" {prefix}01."
        )
    cells: dict[str, dict[str, str]] = {}
    repeated = []
    for row in rows:
        values = dict(zip(header, row, strict=True))
        name = values.pop(key).strip()
        if not name.startswith(prefix):
            raise UserError(f"{table}: {key} {name!r} must start with {prefix!r}. Write {prefix}{name or '01'}.")
        if name in cells:
            repeated.append(name)
        cells[name] = values
    if repeated:
        remedy = "; values that change between sessions belong in sub-*/sub-*_sessions.tsv" if prefix == "sub-" else ""
        raise UserError(
            f"{table}: {key} {shorten(sorted(set(repeated)))} occurs more than once. Keep one row each{remedy}."
        )
    return [column for column in header if column and column != key], cells


# -------------------------------------------------------------------------------------------------- images


def _scan(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be listed ({error.strerror}). Give this account permission to read the dataset."
        ) from None


def _subject_images(root: Path, subject: str, source: BidsSource) -> tuple[list[_Image], Path | None]:
    """Images of one subject that match the filter, and its sessions.tsv if there is one."""
    entries = _scan(os.path.join(root, subject))
    places: list[tuple[str | None, str]] = [
        (None, entry.path) for entry in entries if entry.name == source.datatype and entry.is_dir()
    ]
    for entry in entries:
        if entry.name.startswith("ses-") and entry.is_dir():
            places += [
                (entry.name, inner.path)
                for inner in _scan(entry.path)
                if inner.name == source.datatype and inner.is_dir()
            ]
    images = []
    for session, place in places:
        for file in _scan(place):
            name = BidsName.parse(file.name)
            if (
                name is None
                or name.suffix != source.suffix
                or any(name.entities.get(k) != v for k, v in source.entities.items())
            ):
                continue
            images.append(_Image(name, subject, session, source.datatype, file.path))
    table = next((Path(entry.path) for entry in entries if entry.name == f"{subject}_sessions.tsv"), None)
    return images, table


def _check_subjects(
    root: Path, folders: list[str], participants: dict[str, dict[str, str]], images: list[_Image]
) -> None:
    table = root / "participants.tsv"
    imaged = {image.subject for image in images}
    strangers = sorted(imaged - set(participants))
    if strangers:
        raise UserError(
            f"{table}: no row for {len(strangers)} subject(s) that have images: {shorten(strangers)}. Add the rows (n/a"
            " where a value is unknown)."
        )
    absent = sorted(set(participants) - set(folders))
    if absent:
        log.warning("%s: %d row(s) without a directory: %s. They are left out.", table, len(absent), shorten(absent))
    without = sorted((set(participants) & set(folders)) - imaged)
    if without:
        log.warning(
            "%s: %d subject(s) have no image that matches the filter: %s. They are left out.",
            root,
            len(without),
            shorten(without),
        )


def _check_names(images: list[_Image]) -> None:
    """A file in the wrong directory would put one person under another's name, and so into two splits."""
    for image in images:
        found = (
            f"sub-{image.name.entities['sub']}",
            f"ses-{image.name.entities['ses']}" if "ses" in image.name.entities else None,
        )
        if found != (image.subject, image.session):
            labels = "_".join(filter(None, (image.subject, image.session)))
            raise UserError(
                f"{image.path}: the name must start with {labels}, as its directory says. Move or rename the file."
            )
    twice = [stem for stem, count in Counter(image.name.stem for image in images).items() if count > 1]
    if twice:
        raise UserError(
            f"{shorten(sorted(twice))}: the image is there both as .nii and as .nii.gz. Remove one of them."
        )


def _nothing_matches(root: Path, folders: list[str], source: BidsSource) -> UserError:
    """The error for an empty selection: says what the dataset does hold."""
    everything = list(_all_images(root, folders))
    wanted = f"cohort.datatype {source.datatype!r}, cohort.suffix {source.suffix!r}"
    wanted += f" and cohort.entities {source.entities}" if source.entities else ""
    if not everything:
        return UserError(
            f"{root}: no .nii or .nii.gz image in any of the {len(folders)} sub-* directories. Check that the images"
            " were downloaded."
        )
    kinds = Counter(f"{image.datatype}/{image.name.suffix}" for image in everything)
    seen = shorten([f"{kind} ({count})" for kind, count in kinds.most_common()], 10)
    message = f"{root}: no image matches {wanted}. Seen: {seen}."
    if source.entities and kinds[f"{source.datatype}/{source.suffix}"]:
        matching = [i for i in everything if (i.datatype, i.name.suffix) == (source.datatype, source.suffix)]
        labels = Counter(f"{k}-{v}" for i in matching for k, v in i.name.entities.items() if k not in ("sub", "ses"))
        message += (
            " Entities of these:"
            f" {shorten([f'{e} ({n})' for e, n in labels.most_common()], 10) or 'none but sub and ses'}."
        )
    return UserError(f"{message} Set the filter to one of them.")


def _all_images(root: Path, folders: list[str]) -> Iterator[_Image]:
    for subject in folders:
        top = os.path.join(root, subject)
        sessions = [(e.name, e.path) for e in _scan(top) if e.name.startswith("ses-") and e.is_dir()]
        for session, place in [(None, top), *sessions]:
            for folder in _scan(place):
                if folder.is_dir() and not folder.name.startswith("ses-"):
                    names = ((file.path, BidsName.parse(file.name)) for file in _scan(folder.path))
                    yield from (_Image(name, subject, session, folder.name, path) for path, name in names if name)
