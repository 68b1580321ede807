#!/usr/bin/env python3
"""Check a synthetic cohort with nothing but Python (3.9 or later): no package, no network.

    python3 -I verify.py RELEASE                        a release
    python3 -I verify.py RELEASE --key publisher.pub    and its signature
    python3 -I verify.py RELEASE --proof proof.json     one subject's place in it, with root.json and its image alone

Take this file from elsewhere than the release: the one that lies there may have been exchanged together with it.

Levels: L0 form (root.json and the ledger can be read), L1 integrity (every file is the one that was sealed, the roots
are those of the rows, the signature), L2 completeness (no file too many or too few, participants.tsv and ledger
agree).  Exit code: 0 nothing found, 1 findings, 2 could not run.  Without --key nothing says who made root.json:
compare the SHA-256 of root.json that is printed with one that you got from the publisher.

Whatever is read is a stranger's: it has a size that no release exceeds, one way to be written, and no field too many.

The ledger is one JSON object per line.  Its root is a Merkle tree by RFC 6962 over the lines as they are, in order.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain, zip_longest
from pathlib import Path, PurePosixPath
from typing import Any

ROOT_SCHEMA, LEDGER_SCHEMA, SCHEME = "meddiff/release/v1", "meddiff/ledger/v1", "rfc6962-sha256"
ROOT, SIGNATURE, LINES = "provenance/root.json", "provenance/root.dsse.json", "provenance/ledger.jsonl"
CONFIG, VERIFIER, LOCK = "provenance/config.json", "provenance/verify.py", "provenance/requirements.lock"
COLUMNS = "provenance/ledger.parquet"
EXAMPLES = 5
#: Most bytes of a file that is read as a whole, of one that is read piece by piece, of an image, and of a line of the
#: ledger; most rows, and most malformed ones before the rest is not read: many times what any release has.
MOST, STREAMED, IMAGE, LINE, ROWS, MALFORMED = 1 << 24, 1 << 33, 1 << 29, 1 << 16, 1 << 22, 1000
#: Most characters of the path of a file in a release, and of what a stranger says that is shown.
PATH, SHOWN = 1000, 1000
TABLE, DESCRIPTION, CHECKSUMS = "participants.tsv", "dataset_description.json", "SHA256SUMS"
#: What a dataset has, beside its images, and what a release has but once; nothing else but run records may be there.
README, PREVIEW = "README.md", "preview.png"
DATASET = (TABLE, "participants.json", PREVIEW, DESCRIPTION, README, "CHANGES", "CITATION.cff", "LICENSE")
RELEASE = (
    *(README, "CHANGES", "CITATION.cff", "LICENSE", DESCRIPTION, "croissant.json", "ro-crate-metadata.json"),
    *(LINES, COLUMNS, CONFIG, VERIFIER, LOCK),
)
#: What of that older releases lack, and what README was called in them; they have no column `split` either.
NEWER, OLD_README = frozenset({README, PREVIEW, "CITATION.cff"}), "README"
#: What a release with label maps has beside, in each dataset.
LABELS = "dseg"
LABEL_FILES = (f"{LABELS}.tsv", f"{LABELS}.json")
#: Among the covariates of a row, what was asked for in words, which is no level.
FREE_TEXT = "text"
#: Of every ten subjects alike, in an order drawn by key, so many are of each split.
SPLITS = ("train",) * 8 + ("val", "test")
SUFFIXES = ("T1w", "T2w", "PDw", "FLAIR", "T2starw", "inplaneT1", "inplaneT2", "CT")
_RECORD = re.compile(r"provenance/records(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+\.json")
_DATASET_FOLDER = re.compile(r"shard-[A-Za-z0-9]+-\d{4,9}")
_ID = re.compile(r"[A-Za-z0-9]{1,100}")

#: What a row holds: the types of its fields, and of the fields of those that are objects.
FIELDS: dict[str, tuple[type, ...]] = {
    "sample_id": (str,),
    "group": (str,),
    "cohort_root": (str,),
    "index": (int,),
    "noise_index": (int,),
    "attempt": (int, type(None)),
    "seed_key": (str, type(None)),
    "noise_sha256": (str, type(None)),
    "covariates": (dict,),
    "recipe": (dict,),
    "privacy": (dict,),
    "image": (dict, type(None)),
}
#: Fields that a row has where the study measures covariates in images, and where it has a segmenter.
MAYBE = {"measured": (dict, type(None)), "labels": (dict, type(None))}
PARTS: dict[str, dict[str, tuple[type, ...]]] = {
    "labels": {"path": (str,), "bytes": (int,), "sha256": (str,), "voxel_sha256": (str,)},
    "image": {"path": (str,), "bytes": (int,), "sha256": (str,), "voxel_sha256": (str,)},
    "privacy": {"decision": (str,), "attempts": (int,)},
    "recipe": {
        "autoencoder": (str,),
        "diffusion": (str,),
        "sampler": (str,),
        "precision": (str,),
        "num_inference_steps": (int,),
        "guidance_scale": (int, float),
        "batch_size": (int,),
    },
}
#: Fields of those objects that older releases lack.
LATER: dict[str, dict[str, tuple[type, ...]]] = {
    "recipe": {
        "decoder": (str, type(None)),
        "tone": (str,),
        "drawing_steps": (int, type(None)),
        "guidance": (str,),
        "mask_autoencoder": (str, type(None)),
        "mask_diffusion": (str, type(None)),
        "guidance_interval": (list, type(None)),
    }
}
DECISIONS = ("released", "duplicate", "rejected")

# What JSON must look like: a type, one of several, a range of whole numbers, a pattern, a constant text, fields of an
# object, a list of one form, or (`Each`) an object of any fields of one form.
COUNT, DIGEST = range(1 << 40), re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Each:
    """An object whose values have one form."""

    form: Any


ROOT_FORM: dict[str, Any] = {
    "schema": ROOT_SCHEMA,
    "study": str,
    "software": {"name": "meddiff_steps", "version": str},
    "seed": {"scheme": str, "root": str, "numbers": COUNT},
    "ledger": {
        "schema": LEDGER_SCHEMA,
        "scheme": SCHEME,
        "order": "sample_id",
        "root": DIGEST,
        "rows": range(ROWS + 1),
        "released": range(ROWS + 1),
        "shards": [{"shard": COUNT, "rows": COUNT, "ranges": [[COUNT]], "root": DIGEST}],
    },
    "private_ledger": {"scheme": SCHEME, "order": "sample_id, attempt", "rows": COUNT, "root": DIGEST},
    "privacy": {"verdict": str, "counts": Each(COUNT)},
    "inputs": Each(DIGEST),
    "files": Each({"bytes": COUNT, "sha256": DIGEST}),
    "signer": (DIGEST, type(None)),
}
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
#: Names of a kind of build, not addresses of pages.
BUILD_TYPE, BUILDER = "urn:meddiff-steps:synthetic-cohort:v1", "urn:meddiff-steps:workflow"
ENVELOPE_FORM = {"payloadType": PAYLOAD_TYPE, "payload": str, "signatures": [{"keyid": DIGEST, "sig": str}]}


@dataclass
class Check:
    """One thing that was looked at.

    Attributes
    ----------
    level, name
        0 to 7, and an id that does not change.
    outcome
        `pass`, `finding` (something is wrong), `note` (worth knowing, not wrong), or `not run`.
    text
        One sentence for people.
    examples
        A few of the things that are wrong.
    """

    level: int
    name: str
    outcome: str
    text: str
    examples: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.text, self.examples = shown(self.text), [shown(example) for example in self.examples]


class Unreadable(Exception):
    """The release cannot be read far enough to go on."""


def shown(text: str) -> str:
    """A text in which strangers' words cannot move the cursor, begin a line of their own, colour it, or fill it."""
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def judged(level: int, name: str, wrong: Iterable[str], good: str, bad: str) -> Check:
    """A check that is a finding if anything is wrong; `bad` follows the number of wrong things."""
    found = list(wrong)
    more = [f"and {len(found) - EXAMPLES} more"] if len(found) > EXAMPLES else []
    return (
        Check(level, name, "finding", f"{len(found)} {bad}", found[:EXAMPLES] + more)
        if found
        else Check(level, name, "pass", good)
    )


# ------------------------------------------------------------------------------------------ Merkle (RFC 6962)


def leaf_hash(content: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + content).digest()


def merkle_root(leaves: Iterable[bytes]) -> bytes:
    level = list(leaves)
    while len(level) > 1:
        pairs = [hashlib.sha256(b"\x01" + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(level) - len(level) % 2 :]
    return level[0] if level else hashlib.sha256().digest()


def proven(proof: Any, root: str) -> bool:
    """Whether a proof (as `prove` writes it) leads from its record to a ledger's root (RFC 9162, section 2.1.3.2)."""
    try:
        node, index, last = leaf_hash(proof["record"].encode()), int(proof["index"]), int(proof["rows"]) - 1
        path = [bytes.fromhex(step) for step in proof["path"]]
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    if not 0 <= index <= last:
        return False
    for sibling in path:
        if last == 0:
            return False
        if index % 2 or index == last:
            node = hashlib.sha256(b"\x01" + sibling + node).digest()
            while not index % 2 and index:
                index, last = index // 2, last // 2
        else:
            node = hashlib.sha256(b"\x01" + node + sibling).digest()
        index, last = index // 2, last // 2
    return last == 0 and node.hex() == root


# ------------------------------------------------------------------------------------------------ reading


def read_bytes(release: Path, name: str, most: int = MOST) -> bytes:
    """A file of the release.

    Raises
    ------
    OSError, ValueError
        It is not there, a link or no file, or larger than `most` bytes.
    """
    path = release / name
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("a link, or no file")
    if found.st_size > most:
        raise ValueError(f"{found.st_size} bytes, no release has more than {most} of it")
    with open(path, "rb") as stream:
        return stream.read(most)


def load_json(content: bytes) -> Any:
    """JSON that means the same to every program.

    Raises
    ------
    ValueError
        It is none, or has a key twice, a number that is not finite or not exact, half a character, or too many levels.
    """
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_without_doubles,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
        )
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _whole(text: str) -> int:
    if len(text) > 17 or abs(int(text)) >= 1 << 53:
        raise ValueError("an integer of 2^53 or more")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]}")
    return value


def json_bytes(value: Any, ascii_only: bool = True) -> bytes:
    """How JSON files of a release are written; those for people (`ascii_only=False`) keep letters as they are."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=ascii_only, allow_nan=False) + "\n").encode()


def read_json(release: Path, name: str, ascii_only: bool = True) -> dict[str, Any]:
    """A JSON object of the release, which is written as `json_bytes` writes it.

    Raises
    ------
    OSError, ValueError
        It cannot be read, is no object, or is written otherwise.
    """
    content = read_bytes(release, name)
    value = load_json(content)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    if json_bytes(value, ascii_only) != content:
        raise ValueError("not written in the one way that files of a release are written")
    return value


def unlike(value: Any, form: Any, where: str = "") -> Iterator[str]:
    """Places at which a JSON value has another form than it must have."""
    if isinstance(form, dict) and type(value) is dict:
        for key in sorted(form.keys() | value.keys()):
            if key not in value or key not in form:
                yield f"{where}{key} ({'missing' if key in form else 'unknown'})"
            else:
                yield from unlike(value[key], form[key], f"{where}{key}.")
    elif isinstance(form, Each) and type(value) is dict:
        for key, item in value.items():
            yield from unlike(item, form.form, f"{where}{key}.")
    elif isinstance(form, list) and type(value) is list:
        for item in value:
            yield from unlike(item, form[0], where)
    elif not _is(value, form):
        yield where[:-1]


def _is(value: Any, form: Any) -> bool:
    if isinstance(form, tuple):
        return any(_is(value, one) for one in form)
    if isinstance(form, range):
        return type(value) is int and value in form
    if isinstance(form, re.Pattern):
        return type(value) is str and form.fullmatch(value) is not None
    return type(value) is form if isinstance(form, type) else type(value) is type(form) and value == form


def read_root(release: Path) -> dict[str, Any]:
    """root.json.

    Raises
    ------
    Unreadable
        It is not there, cannot be read, or has another form; or there is what could not be read to an end.
    """
    try:
        closed = sorted(_endless(release))
    except (OSError, ValueError) as error:
        raise Unreadable(f"the folder cannot be listed ({error})") from None
    if closed:
        raise Unreadable(f"{closed[0]} is a device, a pipe or a link where there must be a file; nothing was read")
    try:
        root = read_json(release, ROOT)
    except (OSError, ValueError) as error:
        raise Unreadable(f"{ROOT} cannot be read ({error})") from None
    wrong = list(unlike(root, ROOT_FORM)) or [f"files.{name}" for name in root["files"] if not safe(name)]
    if wrong:
        raise Unreadable(f"{ROOT} lacks, or has wrong, {', '.join(wrong[:EXAMPLES])}")
    return root


def _entries(release: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Whatever lies in a release, with its path there; links are not followed."""
    waiting = [""]
    while waiting:
        place = waiting.pop()
        with os.scandir(f"{release}/{place}") as found:
            for entry in found:
                name = f"{place}{entry.name}"
                if len(name) > PATH:
                    raise ValueError(f"paths of more than {PATH} characters, such as {name[:50]}")
                yield name, entry
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{name}/")


def _endless(release: Path) -> Iterator[str]:
    """What is no file and no folder, or is a link to such a thing; and links in `provenance`, which is read before L2
    looks for links.
    """
    for name, entry in _entries(release):
        if entry.is_symlink():
            if name.startswith("provenance") or (
                os.path.exists(entry.path) and not entry.is_file() and not entry.is_dir()
            ):
                yield name
        elif not entry.is_file() and not entry.is_dir():
            yield name


def safe(name: str) -> bool:
    """Whether a path stays inside the release, on any machine."""
    path = PurePosixPath(name)
    return (
        0 < len(name) <= PATH
        and name.isprintable()
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
        and path.as_posix() == name
    )


def row_problem(row: Any) -> str | None:
    """What is wrong with the form of a row, or None."""
    if not isinstance(row, dict) or not FIELDS.keys() <= row.keys() <= FIELDS.keys() | MAYBE.keys():
        return "fields are missing or unknown"
    for name, kinds in {**FIELDS, **MAYBE}.items():
        if name in row and type(row[name]) not in kinds:
            return f"{name} is {type(row[name]).__name__}"
    for name, parts in PARTS.items():
        part = row.get(name)
        if part is not None:
            later = LATER.get(name, {})
            if not parts.keys() <= part.keys() <= parts.keys() | later.keys():
                return f"fields of {name} are missing or unknown"
            for key, kinds in {**parts, **{key: later[key] for key in later if key in part}}.items():
                if type(part[key]) not in kinds:
                    return f"{name}.{key} is {type(part[key]).__name__}"
    for name, value in [*row["covariates"].items(), *(row.get("measured") or {}).items()]:
        if not (value is None or type(value) in (str, float) or (type(value) is int and abs(value) < 1 << 64)):
            return f"covariates.{name} is neither text nor a number"
    if row["privacy"]["decision"] not in DECISIONS:
        return f"privacy.decision is {row['privacy']['decision']!r}"
    if (row["privacy"]["decision"] == "released") != (row["image"] is not None):
        return (
            f"the decision is {row['privacy']['decision']}, but there is {'no' if row['image'] is None else 'an'} image"
        )
    if any(
        (row[name] is None) != (row["image"] is None)
        for name in ("attempt", "seed_key", "noise_sha256", *(MAYBE.keys() & row.keys()))
    ):
        return "a released row names attempt, seed_key, noise_sha256 and what is measured, another does not"
    if not (_ID.fullmatch(row["sample_id"]) and _ID.fullmatch(row["group"])):
        return "sample_id or group is not letters and digits"
    if row["image"] is not None and not _is_place(row["image"]["path"], row["sample_id"]):
        return f"image.path {row['image']['path']!r} is no place of an image of {row['sample_id']}"
    if row.get("labels") and row["labels"]["path"] != labels_path(row["image"]["path"]):
        return f"labels.path {row['labels']['path']!r} is no place of a label map of {row['sample_id']}"
    return None


def labels_path(image: str) -> str:
    """Where the label map of a volume lies, which is at `image`.

    >>> labels_path("shard-syn-0002/sub-syn002345/anat/sub-syn002345_T1w.nii.gz")
    'shard-syn-0002/sub-syn002345/anat/sub-syn002345_dseg.nii.gz'
    """
    return f"{image.rpartition('_')[0]}_{LABELS}.nii.gz"


def _is_place(path: str, sample_id: str) -> bool:
    folder, inside = placed(path)
    volumes = {f"sub-{sample_id}/anat/sub-{sample_id}_{suffix}.nii.gz" for suffix in SUFFIXES}
    return (not folder or _DATASET_FOLDER.fullmatch(folder) is not None) and (
        inside == f"images/{sample_id}.png" or inside in volumes
    )


def rows(release: Path) -> Iterator[tuple[int, bytes, Any]]:
    """Line number, bytes and object (None if it is no JSON) of each line of the ledger."""
    try:
        with open(release / LINES, "rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(LINE + 1), b""), start=1):
                if len(line) > LINE or number > ROWS:
                    raise Unreadable(f"{LINES}, line {number}: more than {LINE} bytes, or than {ROWS} lines")
                content = line[:-1] if line.endswith(b"\n") else line
                try:
                    yield number, content, load_json(content)
                except ValueError:
                    yield number, content, None
    except OSError as error:
        raise Unreadable(f"{LINES} cannot be read ({error})") from None


def placed(path: str) -> tuple[str, str]:
    """Folder of the dataset that an image lies in ("" for the release itself), and its path there."""
    parts = path.split("/")
    start = max(0, len(parts) - (2 if path.endswith(".png") else 3))
    return "/".join(parts[:start]), "/".join(parts[start:])


def cell(value: Any) -> str:
    """A covariate as participants.tsv writes it."""
    return "n/a" if value is None else value if isinstance(value, str) else f"{float(value):.6g}"


class Splits:
    """The suggested split of a release: who trains, validates and tests.

    Subjects with the same group and the same levels are taken in order, ten at a time, and the places of a split among
    the ten are drawn by the study's seed.  So nobody's split changes when a group grows, and images of one subject (in
    a counterfactual group) are in one split.
    """

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self._seen: dict[str, int] = {}
        self._last: dict[str, tuple[int, str]] = {}

    def of(self, group: str, number: int, covariates: Mapping[str, Any]) -> str:
        """Split of a released row, by its group, `noise_index` and covariates; call it in the ledger's order."""
        known = self._last.get(group)
        if known is None or known[0] != number:
            levels = [
                f"{name}={value}"
                for name, value in sorted(covariates.items())
                if isinstance(value, str) and name != FREE_TEXT
            ]
            stratum = json.dumps([group, *levels])
            place = self._seen[stratum] = self._seen.get(stratum, -1) + 1
            drawn = f"meddiff/split/v1|{self.seed}|{stratum}|{place // len(SPLITS)}|"
            order = sorted(range(len(SPLITS)), key=lambda i: hashlib.sha256(f"{drawn}{i}".encode()).digest())
            known = self._last[group] = number, SPLITS[order[place % len(SPLITS)]]
        return known[1]


def table_bytes(lines: Iterable[Iterable[str]]) -> bytes:
    """Cells as participants.tsv holds them."""
    stream = io.StringIO()
    csv.writer(stream, delimiter="\t", lineterminator="\n").writerows(lines)
    return stream.getvalue().encode()


def checksum_bytes(digests: Iterable[tuple[str, str]]) -> bytes:
    """SHA256SUMS of files by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests)).encode()


# ------------------------------------------------------------------------------------------------- levels


@dataclass
class Ledger:
    """What the later checks need of the ledger, row by row."""

    leaves: list[bytes] = field(default_factory=list)
    sample_ids: list[str] = field(default_factory=list)
    #: path, bytes, sha256 of each released image
    images: list[tuple[str, int, str]] = field(default_factory=list)
    #: cells of participants.tsv by participant, by folder of the dataset ("" for the release itself)
    datasets: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    indices: dict[str, list[int]] = field(default_factory=dict)
    covariates: list[str] = field(default_factory=list)
    #: fields that not all releases have, and columns of what was measured; None before the first row
    more: tuple[list[str], list[str]] | None = None
    #: path, bytes, sha256 of each label map
    labels: list[tuple[str, int, str]] = field(default_factory=list)
    #: whether it is of an older version, without a suggested split
    older: bool = False

    @property
    def columns(self) -> list[str]:
        """Columns of participants.tsv behind the covariates, in order."""
        return [*(self.more[1] if self.more else []), *([] if self.older else ["split"])]


def check_form(release: Path) -> tuple[list[Check], dict[str, Any], Ledger]:
    """L0: root.json and every row of the ledger have their form, and rows are in order, each subject once."""
    root = read_root(release)
    ledger, malformed, order = Ledger(older=OLD_README in root["files"]), [], []
    splits = Splits(root["seed"]["root"])
    for number, content, row in rows(release):
        ledger.leaves.append(leaf_hash(content))
        problem = "not JSON, or a key twice" if row is None else row_problem(row)
        if problem:
            malformed.append(f"line {number}: {problem}")
            if len(malformed) > MALFORMED:
                raise Unreadable(f"{LINES}: more than {MALFORMED} malformed rows, {malformed[0]}")
            ledger.sample_ids.append("")
            continue
        if ledger.sample_ids and row["sample_id"] <= ledger.sample_ids[-1]:
            order.append(f"line {number}: {row['sample_id']} after {ledger.sample_ids[-1]}")
        ledger.sample_ids.append(row["sample_id"])
        ledger.indices.setdefault(row["group"], []).append(row["index"])
        if not ledger.covariates:
            ledger.covariates = sorted(row["covariates"])
        if sorted(row["covariates"]) != ledger.covariates:
            malformed.append(f"line {number}: other covariates than the rows before")
        elif (problem := _more_problem(ledger, row)) is not None:
            malformed.append(f"line {number}: {problem}")
        elif row["image"] is not None:
            image = row["image"]
            ledger.images.append((image["path"], image["bytes"], image["sha256"]))
            folder, inside = placed(image["path"])
            shown = [inside] if inside.endswith(".png") else []
            ledger.datasets.setdefault(folder, {})[f"sub-{row['sample_id']}"] = shown + [
                cell(row["covariates"][name]) for name in ledger.covariates
            ]
            told = ledger.datasets[folder][f"sub-{row['sample_id']}"]
            told += [cell(value) for _, value in sorted(row.get("measured", {}).items())]
            told += [] if ledger.older else [splits.of(row["group"], row["noise_index"], row["covariates"])]
            if "labels" in row:
                ledger.labels.append((row["labels"]["path"], row["labels"]["bytes"], row["labels"]["sha256"]))
    checks = [
        Check(0, "root-form", "pass", f"{ROOT} is of schema {ROOT_SCHEMA}"),
        judged(
            0,
            "rows-form",
            malformed,
            f"all {len(ledger.leaves)} rows of the ledger have their form",
            "row(s) of the ledger are malformed",
        ),
        judged(0, "rows-order", order, "rows are in order, each subject once", "row(s) are out of order or double"),
    ]
    return checks, root, ledger


def _more_problem(ledger: Ledger, row: dict[str, Any]) -> str | None:
    """How the fields of a row that not all releases have differ from those of the rows before."""
    fields, columns = sorted(MAYBE.keys() & row.keys()), sorted(row.get("measured") or {})
    if ledger.more is None or (not ledger.more[1] and columns and fields == ledger.more[0]):
        ledger.more = fields, columns
    if fields != ledger.more[0] or (row["image"] is not None and columns != ledger.more[1]):
        return "other fields, or other measurements, than the rows before"
    return None


def check_integrity(
    release: Path,
    root: dict[str, Any],
    ledger: Ledger,
    hash_images: bool = True,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> list[Check]:
    """L1 without the signature: roots and digests."""
    sealed = root["ledger"]
    checks = []
    found = merkle_root(ledger.leaves).hex()
    wrong = [] if found == sealed["root"] else [f"root of the rows {found}, sealed {sealed['root']}"]
    wrong += [] if len(ledger.leaves) == sealed["rows"] else [f"{len(ledger.leaves)} rows, sealed {sealed['rows']}"]
    wrong += (
        []
        if len(ledger.images) == sealed["released"]
        else [f"{len(ledger.images)} released images, sealed {sealed['released']}"]
    )
    checks.append(
        judged(
            1,
            "ledger-root",
            wrong,
            f"the ledger's root is {found}",
            "difference(s) between the ledger and its sealed root",
        )
    )
    checks.append(
        judged(
            1,
            "shard-roots",
            _shard_problems(sealed["shards"], ledger),
            f"roots of {len(sealed['shards'])} shard(s)",
            "shard(s) have another root",
        )
    )
    files = [(name, entry["bytes"], entry["sha256"]) for name, entry in root["files"].items()]
    wrong = _altered(release, files, True, None)
    checks.append(
        judged(1, "files", wrong, f"{len(files)} files beside the images are as sealed", "file(s) are not as sealed")
    )
    checks.append(check_verifier(release))
    if ledger.labels:
        wrong = _altered(release, ledger.labels, hash_images, progress)
        good = f"{len(ledger.labels)} label maps are as sealed"
        checks.append(judged(1, "labels", wrong, good, "label map(s) are not as sealed"))
    wrong = _altered(release, ledger.images, hash_images, progress)
    what = "size and SHA-256" if hash_images else "size alone"
    checks.append(
        judged(
            1, "images", wrong, f"{len(ledger.images)} images are as sealed, by {what}", "image(s) are not as sealed"
        )
    )
    if not hash_images:
        checks.append(Check(1, "image-digests", "not run", "the content of the images was not read, as asked"))
    return checks


def check_verifier(release: Path) -> Check:
    """L1: the program in the release is this one."""
    own = Path(__file__).resolve()
    if own == (release / VERIFIER).resolve():
        return Check(1, "verifier", "note", "this program lies in the release itself: trust a copy from elsewhere")
    try:
        same = read_bytes(release, VERIFIER) == own.read_bytes()
    except (OSError, ValueError) as error:
        return Check(1, "verifier", "finding", f"{VERIFIER} cannot be read ({error})")
    if same:
        return Check(1, "verifier", "pass", f"{VERIFIER} is this program")
    return Check(1, "verifier", "finding", f"{VERIFIER} is of another version than this program, or exchanged")


def _shard_problems(shards: list[Any], ledger: Ledger) -> list[str]:
    wrong: list[str] = []
    seen = [0] * len(ledger.leaves)
    left = len(seen)  # rows that no shard has named; more than there are need not be counted
    for number, entry in enumerate(shards):
        try:
            bounds = [bound for first, end in entry["ranges"] for bound in (first, end)]
            if entry["shard"] != number or bounds != sorted(set(bounds)):
                wrong.append(f"shard {entry['shard']}: another number than {number}, or ranges that meet")
            left -= sum(end - first if first <= end <= len(seen) else len(seen) + 1 for first, end in entry["ranges"])
            if left < 0:
                return [*wrong, "shards that name rows twice, or rows that are not there"]
            places = [i for first, end in entry["ranges"] for i in range(first, end)]
            if merkle_root(ledger.leaves[i] for i in places).hex() != entry["root"] or len(places) != entry["rows"]:
                wrong.append(f"shard {entry['shard']}")
            for i in places:
                seen[i] += 1
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            wrong.append("a shard that is not described, or names rows that are not there")
    return wrong + (
        [f"{sum(n != 1 for n in seen)} row(s) are not in exactly one shard"] if any(n != 1 for n in seen) else []
    )


def _altered(
    release: Path,
    files: list[tuple[str, int, str]],
    read: bool,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None,
) -> list[str]:
    base = str(release)

    def most(name: str) -> int:
        return IMAGE if name.endswith((".nii.gz", ".png")) else STREAMED if name in (LINES, COLUMNS) else MOST

    def problem(entry: tuple[str, int, str]) -> str | None:
        name, size, digest = entry
        path = f"{base}/{name}"
        try:
            found = os.lstat(path)
            if not stat.S_ISREG(found.st_mode):
                return f"{name}: a link, or no file"
            if found.st_size != size:
                return f"{name}: {found.st_size} bytes, sealed {size}"
            if size > most(name):
                return f"{name}: {size} bytes, no release has more than {most(name)} of it"
            return f"{name}: another SHA-256" if read and sha256_file(path) != digest else None
        except FileNotFoundError:
            return f"{name}: not there"
        except OSError as error:
            return f"{name}: {error.strerror}"

    if not read:
        return [found for found in map(problem, files) if found]
    # By the hundred: handing over a file to a thread takes longer than reading a small one.
    parts = [files[start : start + 100] for start in range(0, len(files), 100)]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results: Iterable[Any] = chain.from_iterable(pool.map(lambda part: list(map(problem, part)), parts))
        return [found for found in (progress(results, len(files)) if progress else results) if found]


def sha256_file(path: Path | str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def contents(release: Path) -> tuple[set[str], list[str], set[str]]:
    """Files, links and folders of a release, as paths in it; links are not followed."""
    files: set[str] = set()
    links: list[str] = []
    folders: set[str] = set()
    for name, entry in _entries(release):
        if entry.is_symlink():
            links.append(name)
        elif entry.is_dir():
            folders.add(name)
        else:
            files.add(name)
    return files, links, folders


def check_completeness(release: Path, root: dict[str, Any], ledger: Ledger) -> list[Check]:
    """L2: the files are exactly those that are sealed; tables, ledger and folders name the same subjects."""
    expected = _expected_files(ledger)
    sealed = set(root["files"]) | {path for path, _, _ in [*ledger.images, *ledger.labels]} | {ROOT}
    if root["signer"]:
        sealed.add(SIGNATURE)
    there, links, folders = contents(release)
    alike: dict[str, str] = {}
    clashes = [
        f"{name} and {alike[_folded(name)]}" for name in sorted(there) if alike.setdefault(_folded(name), name) != name
    ]
    needed: set[str] = set()
    for name in sealed:
        while (name := name.rpartition("/")[0]) and name not in needed:
            needed.add(name)
    gaps = [
        f"{group}: {_gap(found)}" for group, found in ledger.indices.items() if sorted(found) != list(range(len(found)))
    ]
    everyone = [path for path, _, _ in [*ledger.images, *ledger.labels]]
    twice = len(everyone) - len(set(everyone))
    owners = [f"{twice} shared path(s)"] if twice else []
    strangers = [name for name in root["files"] if name not in expected and not _RECORD.fullmatch(name)]
    checks = [
        judged(
            2,
            "no-orphans",
            sorted(there - sealed),
            "no file is there that was not sealed",
            "file(s) are there that were not sealed",
        ),
        judged(
            2,
            "no-missing",
            sorted((sealed | expected) - there),
            "no file that was sealed, or that every release has, is missing",
            "file(s) are missing that were sealed, or that every release has",
        ),
        judged(
            2,
            "no-strangers",
            sorted(strangers),
            "every sealed file is one that a release has",
            "sealed file(s) are none that a release has",
        ),
        judged(2, "no-links", sorted(links), "no links", "link(s) in the release"),
        judged(
            2,
            "no-stray-folders",
            sorted(folders - needed),
            "no folder without sealed files",
            "folder(s) without sealed files",
        ),
        judged(
            2,
            "no-case-clash",
            clashes,
            "no names that are the same to some systems",
            "names that are the same to some systems",
        ),
        judged(
            2,
            "indices",
            gaps,
            "subjects of each group are numbered without gaps",
            "group(s) have gaps or doubles in their numbers",
        ),
        judged(2, "one-image-each", owners, "no two subjects share a file", "problem(s) with images"),
    ]
    checks.append(_check_participants(release, ledger))
    return [*checks, _check_datasets(release, root, ledger)] if set(ledger.datasets) - {""} else checks


def _folded(name: str) -> str:
    """What a name is to systems that tell neither case nor forms of a letter apart."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def _expected_files(ledger: Ledger) -> set[str]:
    """What a release of these rows must hold beside images and run records."""
    absent, instead = (NEWER, {OLD_README}) if ledger.older else (frozenset(), set())
    found = set(RELEASE) - absent | instead
    for folder in ledger.datasets or {"": {}}:
        labelled = LABEL_FILES if ledger.labels else ()
        # Where nothing was released, there is nothing to show.
        shown = set() if ledger.datasets else {PREVIEW}
        found |= {_in(folder, name) for name in {*DATASET, *labelled} - absent - shown | instead}
        found |= {_in(folder, CHECKSUMS)} if folder else set()
    for folder, suffix in {(placed(path)[0], path) for path, _, _ in ledger.images if path.endswith(".nii.gz")}:
        sidecar = suffix.removesuffix(".nii.gz").rpartition("_")[2]
        found |= {_in(folder, f"{sidecar}.json"), _in(folder, ".bidsignore")}
    return found


def _gap(found: list[int]) -> str:
    missing = sorted(set(range(len(found))) - set(found))
    return f"number {missing[0]} is missing" if missing else "a number occurs twice"


def _check_participants(release: Path, ledger: Ledger) -> Check:
    datasets = ledger.datasets or {"": {}}
    wrong: list[str] = []
    for folder, participants in sorted(datasets.items()):
        wrong += _table_problems(release, _in(folder, TABLE), participants, ledger.covariates, ledger.columns)
    count = sum(map(len, datasets.values()))
    where = TABLE if len(datasets) == 1 else f"{TABLE} of {len(datasets)} datasets"
    return judged(
        2,
        "participants",
        wrong,
        f"{where}{'' if ledger.older else ', with its suggested split,'} and the ledger agree on {count} subjects",
        "difference(s) between participants.tsv and the ledger",
    )


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _table_problems(
    release: Path, name: str, participants: dict[str, list[str]], covariates: list[str], behind: list[str]
) -> Iterator[str]:
    """How a table differs from the one that the ledger gives; only the order of its covariates is its own."""
    try:
        content = read_bytes(release, name)
        header = content[: content.find(b"\n") + 1].decode("utf-8").rstrip("\n").split("\t")
    except (OSError, ValueError) as error:
        yield f"{name} cannot be read ({type(error).__name__}: {error})"
        return
    first = next(iter(participants.values()), None)
    shown = header[1:2] == ["image"] if first is None else len(first) > len(covariates) + len(behind)
    front = 2 if shown else 1
    end = front + len(covariates)
    if (
        header[:front] != ["participant_id", "image"][:front]
        or sorted(header[front:end]) != covariates
        or header[end:] != behind
    ):
        yield f"{name}: columns {header}, expected participant_id, {covariates} and {behind}"
        return
    order = [front - 1 + covariates.index(column) for column in header[front:end]]
    lines = [header]
    for who, cells in sorted(participants.items()):
        lines.append([who, *cells[: front - 1], *(cells[place] for place in order), *cells[end - 1 :]])
    expected = table_bytes(lines)
    if content != expected:
        pairs = zip_longest(content.split(b"\n"), expected.split(b"\n"), fillvalue=b"(none)")
        yield from (
            f"line {number} of {name}: {found[:200]!r}, by the ledger {wanted[:200]!r}"
            for number, (found, wanted) in enumerate(pairs, 1)
            if found != wanted
        )


def _check_datasets(release: Path, root: dict[str, Any], ledger: Ledger) -> Check:
    """L2 of a release of several datasets: each is complete by itself, its checksums are the sealed digests, and nobody
    is in two.
    """
    digests: dict[str, dict[str, str]] = {folder: {} for folder in ledger.datasets}
    sealed = [(path, digest) for path, _, digest in [*ledger.images, *ledger.labels]] + [
        (name, entry["sha256"]) for name, entry in root["files"].items()
    ]
    for path, digest in sealed:
        folder, _, inside = path.partition("/")
        if folder in digests and inside != CHECKSUMS:
            digests[folder][inside] = digest
    wrong = ["images beside the datasets, in the release's own folder"] if "" in digests else []
    try:
        named = read_json(release, DESCRIPTION, ascii_only=False).get("Datasets")
    except (OSError, ValueError):
        named = None
    wrong += [] if named == sorted(digests) else [f"{DESCRIPTION} names datasets {named}"]
    seen: dict[str, str] = {}
    for folder, participants in sorted(ledger.datasets.items()):
        wrong += [
            f"{who}: in {seen[who]} and {folder}" for who in participants if seen.setdefault(who, folder) != folder
        ]
        try:
            told = read_bytes(release, _in(folder, CHECKSUMS))
        except (OSError, ValueError) as error:
            wrong.append(f"{_in(folder, CHECKSUMS)} cannot be read ({type(error).__name__})")
            continue
        if told != checksum_bytes(digests[folder].items()):
            wrong.append(f"{_in(folder, CHECKSUMS)}: not the digests that are sealed, in order")
    return judged(
        2,
        "datasets",
        wrong,
        f"{len(digests)} datasets are complete, each with its checksums",
        "problem(s) with datasets",
    )


# ---------------------------------------------------------------------------------------------- signature

# Ed25519 (RFC 8032, section 5.1), for verification alone: a tenth of a second, and nothing to install.
_P = 2**255 - 19
_ORDER = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, -1, _P) % _P
_SPKI = bytes.fromhex("302a300506032b6570032100")
Point = tuple[int, int, int, int]


def _add(a: Point, b: Point) -> Point:
    e, f = (a[1] - a[0]) * (b[1] - b[0]) % _P, (a[1] + a[0]) * (b[1] + b[0]) % _P
    g, h = 2 * a[3] * b[3] * _D % _P, 2 * a[2] * b[2] % _P
    x, y, z, t = f - e, h - g, h + g, f + e
    return x * y % _P, z * t % _P, y * z % _P, x * t % _P


def _times(n: int, point: Point) -> Point:
    result: Point = (0, 1, 1, 0)
    while n:
        if n & 1:
            result = _add(result, point)
        point, n = _add(point, point), n >> 1
    return result


def _point(encoded: bytes) -> Point:
    number = int.from_bytes(encoded, "little")
    y, odd = number & (2**255 - 1), number >> 255
    square = (y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P
    x = pow(square, (_P + 3) // 8, _P)
    if (x * x - square) % _P:
        x = x * pow(2, (_P - 1) // 4, _P) % _P
    if y >= _P or (x * x - square) % _P or (x == 0 and odd):
        raise ValueError("not a point of the curve")
    x = _P - x if x & 1 != odd else x
    return x, y, 1, x * y % _P


def ed25519_valid(key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) of `message` is by the public key (32 bytes)."""
    if len(key) != 32 or len(signature) != 64:
        return False
    s = int.from_bytes(signature[32:], "little")
    if s >= _ORDER:
        return False
    try:
        a, r = _point(key), _point(signature[:32])
    except ValueError:
        return False
    h = int.from_bytes(hashlib.sha512(signature[:32] + key + message).digest(), "little") % _ORDER
    base = _point((4 * pow(5, -1, _P) % _P).to_bytes(32, "little"))
    left, right = _times(s, base), _add(r, _times(h, a))
    return not ((left[0] * right[2] - right[0] * left[2]) % _P or (left[1] * right[2] - right[1] * left[2]) % _P)


def read_public_key(path: Path) -> bytes:
    """The 32 bytes of an ed25519 public key in PEM.

    Raises
    ------
    Unreadable
        The file holds none, or one of small order, by which anybody could sign.
    """
    try:
        with open(path, "rb") as stream:
            lines = stream.read(1000).decode("ascii").splitlines()
        der = base64.b64decode("".join(line for line in lines if not line.startswith("-----")), validate=True)
    except (OSError, ValueError) as error:
        raise Unreadable(f"--key {path}: not a public key in PEM ({error})") from None
    if len(der) != 44 or not der.startswith(_SPKI):
        raise Unreadable(f"--key {path}: not an ed25519 public key")
    try:
        x, y, z, _ = _times(8, _point(der[12:]))
    except ValueError as error:
        raise Unreadable(f"--key {path}: {error}") from None
    if x % _P == 0 and (y - z) % _P == 0:
        raise Unreadable(f"--key {path}: a key of small order, by which anybody could sign")
    return der[12:]


def pre_authentication(payload: bytes) -> bytes:
    """What is signed: DSSE's PAE, "DSSEv1" and both parts, each after its length in bytes."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def key_id(key: bytes) -> str:
    """SHA-256 of a public key (32 bytes) in its standard form (SubjectPublicKeyInfo, DER), as hex."""
    return hashlib.sha256(_SPKI + key).hexdigest()


def statement(root: Mapping[str, Any], digest: str, study: Mapping[str, Any]) -> dict[str, Any]:
    """What is signed of a release: an in-toto statement with SLSA provenance, which says no more than the release.

    Parameters
    ----------
    root, digest
        root.json and its SHA-256.
    study
        config.json.
    """
    files = root["files"]
    dependencies = {**root["inputs"], "config.json": files[CONFIG]["sha256"]}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": ROOT, "digest": {"sha256": digest}},
            {"name": LINES, "digest": {"sha256": files[LINES]["sha256"]}},
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": study,
                "resolvedDependencies": [
                    {"name": name, "digest": {"sha256": known}} for name, known in sorted(dependencies.items())
                ],
            },
            "runDetails": {"builder": {"id": BUILDER, "version": {"meddiff_steps": root["software"]["version"]}}},
        },
    }


def _unbase64(text: str) -> bytes:
    """Bytes of a text that is the one way to write them."""
    content = base64.b64decode(text, validate=True)
    if base64.b64encode(content).decode() != text:
        raise ValueError("padded otherwise")
    return content


def read_envelope(release: Path) -> tuple[str, bytes, bytes]:
    """Key id, signature and payload of a release's signature; nothing else can be in it.

    Raises
    ------
    OSError, ValueError
        It is no envelope of this form.
    """
    envelope = read_json(release, SIGNATURE)
    wrong = list(unlike(envelope, ENVELOPE_FORM))
    if wrong or len(envelope["signatures"]) != 1:
        raise ValueError(f"wrong: {', '.join(wrong[:EXAMPLES]) or 'not one signature'}")
    signed = envelope["signatures"][0]
    return signed["keyid"], _unbase64(signed["sig"]), _unbase64(envelope["payload"])


def check_signature(
    release: Path,
    root: dict[str, Any],
    key: bytes | None,
    valid: Callable[[bytes, bytes, bytes], bool] = ed25519_valid,
) -> Check:
    """L1: who sealed the release.  Without a key it is unsigned as far as this program can tell.

    Parameters
    ----------
    key
        The publisher's public key, 32 bytes.
    valid
        valid(key, message, signature): the arithmetic.
    """

    def check(outcome: str, text: str) -> Check:
        return Check(1, "signature", outcome, text)

    digest, signer = sha256_file(release / ROOT), root["signer"]
    there = os.path.lexists(release / SIGNATURE)
    if there != bool(signer) or (key and not there):
        told = f"root.json names signer {signer[:16]}" if signer else "root.json names no signer"
        return check("finding", f"UNSIGNED: {told}, and {SIGNATURE} is {'there' if there else 'missing'}")
    if not there:
        return check("note", f"UNSIGNED: compare the SHA-256 of root.json, {digest}, with one from the publisher")
    try:
        named, signed, payload = read_envelope(release)
        if key is not None and not valid(key, pre_authentication(payload), signed):
            return check(
                "finding", "the signature is not by this key, or the statement was changed after it was signed"
            )
        found = load_json(payload)
        # Where nothing but root.json is at hand, the settings that were signed stand for themselves.
        alone = not os.path.lexists(release / CONFIG)
        study = found["predicate"]["buildDefinition"]["externalParameters"] if alone else read_json(release, CONFIG)
        if found != statement(root, digest, study):
            return check(
                "finding", "the signature is of another release: its statement is not what follows from this one"
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return check("finding", f"{SIGNATURE} is not a signed statement ({type(error).__name__}: {error})")
    if named != signer or len(signed) != 64 or (key is not None and named != key_id(key)):
        return check("finding", f"root.json names signer {signer[:16]}, the signature key {named[:16]}")
    if key is None:
        text = f"a signature that names key {signer[:16]}, but no --key to check it with"
        return check("note", f"UNSIGNED as far as can be told: there is {text}")
    return check("pass", f"root.json, SHA-256 {digest}, is signed by key {named[:16]}")


# --------------------------------------------------------------------------------------------------- main


def _require_provenance(release: Path) -> None:
    if not (release / "provenance").is_dir():
        raise Unreadable(f"{release}: no folder `provenance`; this is not a release, or it was removed")


def verify(release: Path, key: bytes | None = None, hash_images: bool = True) -> list[Check]:
    """All checks of L0 to L2.

    Raises
    ------
    Unreadable
        There is no release with provenance here.
    """
    _require_provenance(release)
    try:
        checks, root, ledger = check_form(release)
    except Unreadable as error:
        unread = [Check(level, "all", "not run", "the ledger or root.json cannot be read") for level in (1, 2)]
        return [Check(0, "root-form", "finding", str(error)), *unread]
    return [
        *checks,
        *check_integrity(release, root, ledger, hash_images),
        check_signature(release, root, key),
        *check_completeness(release, root, ledger),
    ]


def verify_one(release: Path, proof: Any, key: bytes | None = None) -> list[Check]:
    """What can be checked with root.json, its signature, a proof and one image: neither the ledger nor any other file
    is read.

    Raises
    ------
    Unreadable
        There is no release with provenance here.
    """
    _require_provenance(release)
    try:
        root = read_root(release)
    except Unreadable as error:
        return [Check(0, "root-form", "finding", str(error)), Check(1, "all", "not run", "root.json cannot be read")]
    checks = [Check(0, "root-form", "pass", f"{ROOT} is of schema {ROOT_SCHEMA}"), check_signature(release, root, key)]
    sealed = root["ledger"]
    try:
        row = load_json(proof["record"].encode())
        problem = row_problem(row)
    except (AttributeError, KeyError, TypeError, ValueError):
        row, problem = None, "it holds no row"
    wrong = [] if problem is None else [problem]
    wrong += (
        []
        if proven(proof, sealed["root"]) and proof["rows"] == sealed["rows"]
        else [f"does not lead to the ledger's root {sealed['root']}"]
    )
    who = row["sample_id"] if problem is None else "a row"
    checks.append(
        judged(
            1, "proof", wrong, f"leads from {who} to the ledger's root {sealed['root']}", "problem(s) with the proof"
        )
    )
    if wrong:
        return [*checks, Check(1, "image", "not run", "without a proof nothing is known of the image")]
    image = row["image"]
    if image is None:
        return [*checks, Check(1, "image", "not run", f"{who} was not released: {row['privacy']['decision']}")]
    if not os.path.lexists(release / image["path"]):
        return [
            *checks,
            Check(1, "image", "not run", f"{image['path']} is not here; its SHA-256 must be {image['sha256']}"),
        ]
    altered = _altered(release, [(image["path"], image["bytes"], image["sha256"])], True, None)
    return [
        *checks,
        judged(
            1, "image", altered, f"{image['path']} is the image of {who}, by size and SHA-256", "image is not as sealed"
        ),
    ]


def _start(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(MOST)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check a synthetic cohort: form, integrity, completeness.")
    parser.add_argument(
        "release", nargs="?", type=Path, default=Path(__file__).resolve().parents[1], help="root of the release"
    )
    parser.add_argument(
        "--key", type=Path, help="the publisher's public key (PEM, ed25519), from elsewhere than the release"
    )
    parser.add_argument(
        "--proof",
        type=Path,
        help="check root.json, its signature and one subject's image alone, by this proof, as `prove` writes it",
    )
    parser.add_argument("--no-images", action="store_true", help="do not read the images")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        key = read_public_key(options.key) if options.key else None
        if options.proof:
            checks = verify_one(options.release, load_json(_start(options.proof)), key)
        else:
            checks = verify(options.release, key, not options.no_images)
    except Exception as error:  # noqa: BLE001 a traceback would end with the exit code of findings
        print(f"error: {shown(str(error) or type(error).__name__)}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        for check in checks:
            print(f"L{check.level}  {check.outcome.upper():8}{check.name:18}{check.text}")
            for example in check.examples:
                print(f"{'':30}{example}")
    return 1 if any(check.outcome == "finding" for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
