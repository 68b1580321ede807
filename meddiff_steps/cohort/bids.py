"""BIDS datasets: images by datatype, suffix and entities, covariates from participants.tsv and sessions.tsv.

An own reader because only file names are needed: it lists each directory once and opens no sidecar, so 10,000 subjects
take about a second (pybids, which indexes everything, takes ten or more).
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from meddiff_steps.cohort.covariates import is_null, require_columns, shorten
from meddiff_steps.cohort.identity import alike, identity_key, shown
from meddiff_steps.cohort.table import read_delimited
from meddiff_steps.cohort.texts import text_columns
from meddiff_steps.config import BidsSource, CategoricalCovariate, Covariates
from meddiff_steps.core.errors import UserError

log = logging.getLogger(__name__)

EXTENSIONS = (".nii.gz", ".nii")
#: Entities whose labels are numbers: run-1 and run-01 are one run.
INDICES = frozenset({"run", "echo", "flip", "inv", "split", "chunk"})
#: Entities that tell scans of a cohort apart without making them another kind of image.  The others (space, desc, part,
#: rec, ce, echo, inv, ...) do, and so does whatever two images of one session differ in, but for the run.
WHO_AND_WHEN = frozenset({"sub", "ses", "run"})
PROTOCOL = frozenset({"acq", "dir", "task"})


@dataclass(frozen=True)
class BidsName:
    """A parsed image name, for example sub-01_ses-02_run-1_T1w.nii.gz."""

    stem: str
    """The name without suffix and extension: sub-01_ses-02_run-1."""
    entities: dict[str, str]
    suffix: str

    @classmethod
    def parse(cls, name: str) -> BidsName | None:
        """The parts of an image name, or None for any other file; the extension may have capitals.

        >>> BidsName.parse("sub-01_run-1_T1w.nii.gz")
        BidsName(stem='sub-01_run-1', entities={'sub': '01', 'run': '1'}, suffix='T1w')
        """
        extension = next((e for e in EXTENSIONS if name.lower().endswith(e)), None)
        if extension is None or not name.startswith("sub-"):
            return None
        stem, _, suffix = name[: -len(extension)].rpartition("_")
        pairs = [part.partition("-") for part in stem.split("_")]
        return cls(stem, {key: value for key, _, value in pairs}, suffix)

    def kind(self, datatype: str) -> str:
        """What the image is, without who and when: anat/acq-mprage_T1w."""
        parts = [f"{key}-{value}" for key, value in self.entities.items() if key not in ("sub", "ses")]
        return f"{datatype}/{'_'.join([*parts, self.suffix])}"

    def label(self, entity: str) -> str | None:
        """The label of an entity, without leading zeros where it is a number; None where the name has none."""
        return _label(entity, self.entities.get(entity))

    def carries(self, entities: Mapping[str, str | list[str | None] | None]) -> bool:
        """Whether the name has the labels that `cohort.entities` asks for.

        >>> BidsName.parse("sub-01_run-01_T1w.nii.gz").carries({"run": "1", "space": None, "acq": [None, "mprage"]})
        True
        """
        return all(
            self.label(entity) in [_label(entity, one) for one in _listed(wanted)]
            for entity, wanted in entities.items()
        )


def _listed(wanted: str | list[str | None] | None) -> list[str | None]:
    return wanted if isinstance(wanted, list) else [wanted]


def _label(entity: str, text: str | None) -> str | None:
    return str(int(text)) if text is not None and entity in INDICES and text.isdecimal() else text


@dataclass(frozen=True)
class _Image:
    name: BidsName
    subject: str
    session: str | None
    datatype: str
    path: str


def read_bids(source: BidsSource, covariates: Covariates, text_column: str | None = None) -> pd.DataFrame:
    """A cohort from a BIDS dataset.

    Parameters
    ----------
    source
        Root, datatype, suffix, and entities that an image must carry.
    covariates
        The declared schema.  A column of sub-*/sub-*_sessions.tsv overrides the one of participants.tsv for the
        sessions it lists.
    text_column
        Column of texts, where the study has such; it becomes the column `text`.

    Returns
    -------
    pandas.DataFrame
        scan_id (file name without suffix and extension), subject_id (`sub-01`), session_id (`ses-02` or None), path,
        and per covariate its raw text (None where no table has it); sorted by scan_id.

    Raises
    ------
    UserError
        The dataset is not there or breaks a rule, no image matches, images of several kinds do and `entities` does not
        say which, tables and directories spell an id in different ways, or a covariate column is missing.
    """
    dataset = _read(source)
    available, origin = dataset.columns, dataset.origin
    columns = require_columns(covariates, available, origin) | text_columns(text_column, available, origin)
    levels = {level for c in covariates.values() if isinstance(c, CategoricalCovariate) for level in c.levels}
    rows = [
        _ids(image) | {name: values.get(column) for name, column in columns.items()}
        for image, values in _cells(dataset, levels)
    ]
    return pd.DataFrame(rows, dtype="object")


def read_columns(source: BidsSource) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every column that a covariate could be read from.

    Returns
    -------
    scans
        A row per scan, as of `read_bids` without covariates.
    cells
        A row per scan: raw text in the columns of participants.tsv, then in those of sessions.tsv alone.

    Raises
    ------
    UserError
        As of `read_bids`.
    """
    dataset = _read(source)
    found = list(_cells(dataset, frozenset()))
    cells = [{column: values.get(column) for column in dataset.columns} for _, values in found]
    return (
        pd.DataFrame([_ids(image) for image, _ in found], dtype="object"),
        pd.DataFrame(cells, columns=dataset.columns, dtype="object"),
    )


@dataclass(frozen=True)
class _Dataset:
    images: list[_Image]
    participants: dict[str, dict[str, str]]
    """Cells by subject."""
    sessions: dict[str, dict[str, dict[str, str]]]
    """Cells by subject and session, of subjects with a sessions.tsv."""
    columns: list[str]
    origin: str
    """The tables, for messages."""


def _read(source: BidsSource) -> _Dataset:
    """Images that match, by name, and what tables say of them; raises what `read_bids` does."""
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
    folders = sorted(entry.name for entry in _folders(root, "sub-"))
    header, participants = _read_participants(root, folders, source)
    if not folders:
        raise UserError(
            f"{root}: no sub-* directories, expected one per subject. Set cohort.root to the top of the BIDS dataset;"
            " with DataLad, run `datalad get -n` there first."
        )

    images: list[_Image] = []
    session_rows: dict[str, dict[str, dict[str, str]]] = {}
    for subject in folders:
        found, sessions, sessions_table = _subject_images(root, subject, source)
        images += found
        if found and sessions_table is not None:
            session_rows[subject] = _read_sessions(sessions_table, sessions, source)
    if not images:
        raise _nothing_matches(root, folders, source)
    _check_subjects(root, folders, participants, images)
    _check_names(images)
    _check_kinds(root, images, source)

    unlisted = [
        i.name.stem
        for i in images
        if i.subject in session_rows and (i.session is None or i.session not in session_rows[i.subject])
    ]
    if unlisted:
        log.warning(
            "%s: %d scan(s) of no session that sub-*_sessions.tsv lists (%s); participants.tsv is used",
            root,
            len(unlisted),
            shorten(unlisted),
        )

    session_columns = sorted({column for rows in session_rows.values() for row in rows.values() for column in row})
    return _Dataset(
        sorted(images, key=lambda i: i.name.stem),
        participants,
        session_rows,
        [*header, *(column for column in session_columns if column and column not in header)],
        f"{root / 'participants.tsv'}" + (" and sub-*_sessions.tsv" if session_columns else ""),
    )


def _ids(image: _Image) -> dict[str, str | None]:
    return {
        "scan_id": image.name.stem,
        "subject_id": image.subject,
        "session_id": image.session,
        "path": image.path,
    }


def _cells(dataset: _Dataset, levels: Collection[str]) -> Iterator[tuple[_Image, dict[str, str]]]:
    """Images with their cells by column; a cell that means "missing" is a value where it is one of `levels`."""
    rows = dataset.sessions
    for image in dataset.images:
        session = rows.get(image.subject, {}).get(image.session or "", {})
        known = {name: cell for name, cell in session.items() if cell.strip() in levels or not is_null(cell.strip())}
        yield image, session | dataset.participants[image.subject] | known


# -------------------------------------------------------------------------------------------------- tables


def _read_participants(
    root: Path, folders: Collection[str], source: BidsSource
) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Columns of participants.tsv, and its cells by directory."""
    table = root / "participants.tsv"
    if not os.path.lexists(table):
        entries = _scan(root)
        near = next((entry.name for entry in entries if entry.name.lower() == table.name), None)
        inside = sorted(
            entry.name
            for entry in entries
            if entry.is_dir() and os.path.exists(os.path.join(entry.path, "participants.tsv"))
        )
        hint = (
            f" There is {near}: rename it, capitals count."
            if near
            else " The directory is empty: with DataLad or git submodules, fetch it first (`datalad get -n`)."
            if not entries
            else f" There is one in {shorten(inside)}: set cohort.root to that directory."
            if inside
            else " Add it, or set cohort.root to the top of the dataset."
        )
        raise UserError(f"{table}: not there, but it says who the subjects are.{hint}")
    return _read_keyed(table, "participant_id", "sub-", folders, source)


def _read_sessions(table: Path, sessions: Collection[str], source: BidsSource) -> dict[str, dict[str, str]]:
    """Cells by session of the subject."""
    rows = _read_keyed(table, "session_id", "ses-", sessions, source)[1]
    if rows and sessions and not rows.keys() & set(sessions):
        raise UserError(
            f"{table}: lists {shorten(rows)}, but the directories are {shorten(sorted(sessions))}: nothing in it"
            " belongs to a scan. Write session_id as the directories are called."
        )
    return rows


def _read_keyed(
    table: Path, key: str, prefix: str, names: Collection[str], source: BidsSource
) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Columns of a BIDS table without its key column, and its cells by key, which is spelt as the directories in
    `names` are.
    """
    header, rows = read_delimited(table, "\t")
    if key not in header:
        near = next((column for column in header if identity_key(column) == key), None)
        hint = (
            f" Rename {near!r}, capitals count."
            if near
            else " Cells must be separated by tabs."
            if len(header) == 1
            else ""
        )
        raise UserError(
            f"{table}: no column {key!r}. Columns are: {', '.join(header)}.{hint} Add the column, with values such as"
            f" {prefix}01."
        )
    spelt = {identity_key(name): name for name in names}
    cells: dict[str, dict[str, str]] = {}
    repeated, respelt = [], {}
    for line, row in rows:
        values = dict(zip(header, row, strict=True))
        name = values.pop(key).strip()
        near = spelt.get(identity_key(name)) if source.alike_ids != "distinct" else None
        if not name.startswith(prefix):
            right = f"Write {near or prefix + name}" if name else f"Write {prefix}01, for example, or remove the row"
            raise UserError(f"{table}, line {line}: {key} {name!r} must start with {prefix!r}. {right}.")
        if near and name not in names:
            respelt[name] = near
            name = near
        if name in cells:
            repeated.append(name)
        cells[name] = values
    if respelt and source.alike_ids == "refuse":
        found = shorten(f"{shown(name)} for {shown(near)}" for name, near in respelt.items())
        raise UserError(
            f"{table}: {len(respelt)} row(s) spell {key} differently from the directory: {found}. Write it as the"
            " directories are called (a spreadsheet drops leading zeros: make the column text before it is opened), or"
            " set cohort.alike_ids: join."
        )
    if repeated:
        remedy = "; values that change between sessions belong in sub-*/sub-*_sessions.tsv" if prefix == "sub-" else ""
        raise UserError(
            f"{table}: {key} {shorten(sorted(set(repeated)))} occurs more than once. Keep one row each{remedy}."
        )
    same = alike(cells) if source.alike_ids == "refuse" else []
    if same:
        raise UserError(
            f"{table}: {key} {' and '.join(map(shown, same[0]))} differ in spelling alone. Keep one row of each, or set"
            " cohort.alike_ids."
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


def _folders(parent: str | Path, prefix: str) -> list[os.DirEntry[str]]:
    """Directories whose names begin with a BIDS prefix; one that does so but for capitals would be overlooked."""
    found = [entry for entry in _scan(parent) if entry.name.lower().startswith(prefix) and entry.is_dir()]
    for entry in found:
        if not entry.name.startswith(prefix):
            raise UserError(
                f"{entry.path}: directories begin with {prefix!r}, capitals count. Rename it"
                f" {prefix}{entry.name[len(prefix) :]}."
            )
    return found


def _subject_images(root: Path, subject: str, source: BidsSource) -> tuple[list[_Image], list[str], Path | None]:
    """Images of one subject that match the filter, its sessions, and its sessions.tsv if there is one."""
    top = os.path.join(root, subject)
    sessions = _folders(top, "ses-")
    images = []
    for session, place in [(None, top), *((entry.name, entry.path) for entry in sessions)]:
        for folder in _scan(place):
            if folder.name != source.datatype or not folder.is_dir():
                continue
            for file in _scan(folder.path):
                name = BidsName.parse(file.name)
                if name is not None and name.suffix == source.suffix and name.carries(source.entities):
                    images.append(_Image(name, subject, session, source.datatype, file.path))
    table = os.path.join(top, f"{subject}_sessions.tsv")
    return images, [entry.name for entry in sessions], Path(table) if os.path.lexists(table) else None


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
        seen = shorten(sorted({i.name.kind(i.datatype) for i in _all_images(root, without)}))
        log.warning(
            "%s: %d subject(s) have no image that matches the filter: %s. They are left out. %s.",
            root,
            len(without),
            shorten(without),
            f"Seen there: {seen}" if seen else "Their directories hold no image; with DataLad, run `datalad get`",
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
            f"{shorten(sorted(twice))}: the image is there both as .nii and as .nii.gz, or with two spellings of them."
            " Remove one of them."
        )
    stems: dict[str, list[str]] = {}
    for image in images:
        stems.setdefault(image.subject, []).append(image.name.stem)
    for names in stems.values():
        for same in alike(names):
            raise UserError(
                f"{' and '.join(same)}: names that differ in spelling alone (leading zeros, capitals) stand for one"
                " image. Remove or rename one of them."
            )


def _check_kinds(root: Path, images: list[_Image], source: BidsSource) -> None:
    """Refuse images of several kinds that the study does not tell apart, and say what was found of each entity."""
    found = {
        key: Counter(image.name.label(key) for image in images)
        for key in sorted({key for image in images for key in image.name.entities} - {"sub", "ses"})
    }
    labels = {key: sorted(counts, key=lambda label: (label is not None, label)) for key, counts in found.items()}
    told = {
        key: f"{key}: "
        + shorten(
            [f"{'none' if label is None else repr(label)} ({counts[label]})" for label in labels[key]],
            10,
        )
        for key, counts in found.items()
    }
    if told:
        log.info("%s: entities of the %d images: %s", root, len(images), "; ".join(told.values()))
    sessions: dict[tuple[str, str | None], list[BidsName]] = {}
    for image in images:
        sessions.setdefault((image.subject, image.session), []).append(image.name)
    beside = {
        key
        for names in sessions.values()
        if len(names) > 1
        for key in found
        if len({name.label(key) for name in names}) > 1
    }
    mixed = [
        key
        for key, counts in found.items()
        if len(counts) > 1 and key not in {*source.entities, *WHO_AND_WHEN} and (key in beside or key not in PROTOCOL)
    ]
    if mixed:
        key = mixed[0]
        first = labels[key][0] or "null"
        named = f"{{{key}: {first}}}" + (" for images without it" if first == "null" else "")
        raise UserError(
            f"{root}: images of several kinds match, and cohort.entities does not say which are meant:\n  "
            + "\n  ".join(told[key] for key in mixed)
            + f"\nName one of each in cohort.entities ({named}), or a list of those that may be mixed;"
            f" `meddiff propose` takes --entity {key}={first} for the first."
        )


def _nothing_matches(root: Path, folders: list[str], source: BidsSource) -> UserError:
    """The error for an empty selection: says what the dataset does hold."""
    everything = list(_all_images(root, folders))
    wanted = f"cohort.datatype {source.datatype!r}, cohort.suffix {source.suffix!r}"
    wanted += f" and cohort.entities {source.entities}" if source.entities else ""
    if not everything:
        other = Counter("".join(path.suffixes).lower() for folder in folders for path in (root / folder).rglob("*.*"))
        seen = shorten([f"{ending} ({count})" for ending, count in other.most_common()])
        return UserError(
            f"{root}: no .nii or .nii.gz image in any of the {len(folders)} sub-* directories. "
            + (f"Seen: {seen}. Convert the images to NIfTI, or c" if seen else "C")
            + "heck that they were downloaded (with DataLad, `datalad get`)."
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
        near = sorted(
            {
                f"{key}-{label} is not {key}-{wanted}"
                for image in matching
                for key, label in image.name.entities.items()
                for wanted in _listed(source.entities.get(key))
                if wanted is not None and wanted != label and identity_key(wanted) == identity_key(label)
            }
        )
        message += f" Labels count to the letter: {shorten(near)}." if near else ""
    return UserError(f"{message} Set the filter to one of them.")


def _all_images(root: Path, folders: Iterable[str]) -> Iterator[_Image]:
    for subject in folders:
        top = os.path.join(root, subject)
        sessions = [(e.name, e.path) for e in _scan(top) if e.name.startswith("ses-") and e.is_dir()]
        for session, place in [(None, top), *sessions]:
            for folder in _scan(place):
                if folder.is_dir() and not folder.name.startswith("ses-"):
                    names = ((file.path, BidsName.parse(file.name)) for file in _scan(folder.path))
                    yield from (_Image(name, subject, session, folder.name, path) for path, name in names if name)
