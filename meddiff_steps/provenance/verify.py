#!/usr/bin/env python3
"""Check a synthetic cohort with nothing but Python (3.9 or later): no package, no network.

    python3 -I provenance/verify.py                     the release that this file lies in python3 -I verify.py RELEASE
    --key publisher.pub    another one, and its signature python3 -I verify.py RELEASE --proof proof.json     one
    subject's place in it, with root.json and that subject's image alone

Levels: L0 form (root.json and the ledger can be read), L1 integrity (every file is the one that was sealed, the roots
are those of the rows, the signature), L2 completeness (no file too many or too few, participants.tsv and ledger
agree).  Exit code: 0 nothing found, 1 findings, 2 could not run.  Without --key nothing says who made root.json:
compare the SHA-256 of root.json that is printed with one that you got from the publisher.  A copy of this file from
elsewhere is worth more than the one in the release.

The ledger is one JSON object per line.  Its root is a Merkle tree by RFC 6962 over the lines as they are, in order.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

ROOT_SCHEMA, LEDGER_SCHEMA, SCHEME = "meddiff/release/v1", "meddiff/ledger/v1", "rfc6962-sha256"
ROOT, SIGNATURE, LINES = "provenance/root.json", "provenance/root.dsse.json", "provenance/ledger.jsonl"
EXAMPLES = 5
#: Bytes of the largest file that is read as a whole, and of the longest line of a ledger: many times what any release
#: has.
MOST, LINE = 1 << 28, 1 << 20
TABLE, DESCRIPTION, CHECKSUMS = "participants.tsv", "dataset_description.json", "SHA256SUMS"
#: What a dataset that is a part of a release has, beside its images.
DATASET = (TABLE, "participants.json", DESCRIPTION, "README", "CHANGES", "LICENSE")

#: How names of images end, of the ledger's and of others that could have been slipped in.
IMAGES = tuple(
    ".nii .nii.gz .img .hdr .mgz .mgh .mnc .nrrd .nhdr .mha .mhd .dcm .dicom .npy .npz .h5 .hdf5 .png .jpg .jpeg .tif"
    " .tiff .bmp .gif .webp".split()
)

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
PARTS: dict[str, dict[str, tuple[type, ...]]] = {
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
        "guidance_interval": (list, type(None)),
    }
}
DECISIONS = ("released", "duplicate", "rejected")
ROOT_FIELDS: dict[str, type] = {
    "schema": str,
    "study": str,
    "software": dict,
    "seed": dict,
    "ledger": dict,
    "private_ledger": dict,
    "privacy": dict,
    "inputs": dict,
    "files": dict,
}


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
    """A text in which strangers' words cannot move the cursor, begin a line of their own or colour it."""
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


def read_root(release: Path) -> dict[str, Any]:
    """root.json, with its fields.

    Raises
    ------
    Unreadable
        It is not there, no JSON, of an unknown version, or lacks fields; or there is what could not be read to an end.
    """
    closed = sorted(_endless(release))
    if closed:
        raise Unreadable(f"{closed[0]} is a device, a pipe or a link where there must be a file; nothing was read")
    try:
        root = _read(release, ROOT)
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"{ROOT} cannot be read ({error})") from None
    if not isinstance(root, dict) or root.get("schema") != ROOT_SCHEMA:
        raise Unreadable(
            f"{ROOT} is of schema {root.get('schema') if isinstance(root, dict) else None!r}, expected {ROOT_SCHEMA!r}"
        )
    wrong = [name for name, kind in ROOT_FIELDS.items() if not isinstance(root.get(name), kind)]
    ledger: dict[str, Any] = root["ledger"] if isinstance(root.get("ledger"), dict) else {}
    files: dict[str, Any] = root["files"] if isinstance(root.get("files"), dict) else {}
    wrong += [
        f"ledger.{name}"
        for name, kind in (("root", str), ("rows", int), ("released", int), ("shards", list))
        if not isinstance(ledger.get(name), kind)
    ]
    if ledger.get("scheme") != SCHEME or ledger.get("schema") != LEDGER_SCHEMA:
        wrong.append("ledger.scheme or ledger.schema")
    for name, entry in files.items():
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("bytes"), int)
            and isinstance(entry.get("sha256"), str)
            and safe(name)
        ):
            wrong.append(f"files.{name}")
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


def _read(release: Path, name: str) -> Any:
    """A JSON file of the release."""
    if (release / name).stat().st_size > MOST:
        raise ValueError(f"larger than {MOST} bytes")
    return json.loads((release / name).read_text(encoding="utf-8"))


def safe(name: str) -> bool:
    """Whether a path stays inside the release."""
    path = PurePosixPath(name)
    return (
        bool(name)
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
        and path.as_posix() == name
    )


def row_problem(row: Any) -> str | None:
    """What is wrong with the form of a row, or None."""
    if not isinstance(row, dict) or row.keys() != FIELDS.keys():
        return "fields are missing or unknown"
    for name, kinds in FIELDS.items():
        if type(row[name]) not in kinds:
            return f"{name} is {type(row[name]).__name__}"
    for name, parts in PARTS.items():
        part = row[name]
        if part is not None:
            later = LATER.get(name, {})
            if not parts.keys() <= part.keys() <= parts.keys() | later.keys():
                return f"fields of {name} are missing or unknown"
            for key, kinds in {**parts, **{key: later[key] for key in later if key in part}}.items():
                if type(part[key]) not in kinds:
                    return f"{name}.{key} is {type(part[key]).__name__}"
    for name, value in row["covariates"].items():
        if not (value is None or type(value) in (str, float) or (type(value) is int and abs(value) < 1 << 64)):
            return f"covariates.{name} is neither text nor a number"
    if row["privacy"]["decision"] not in DECISIONS:
        return f"privacy.decision is {row['privacy']['decision']!r}"
    if (row["privacy"]["decision"] == "released") != (row["image"] is not None):
        return (
            f"the decision is {row['privacy']['decision']}, but there is {'no' if row['image'] is None else 'an'} image"
        )
    if any((row[name] is None) != (row["image"] is None) for name in ("attempt", "seed_key", "noise_sha256")):
        return "a released row names attempt, seed_key and noise_sha256, another does not"
    if row["image"] is not None and not safe(row["image"]["path"]):
        return f"image.path {row['image']['path']!r} leads out of the release"
    return None


def rows(release: Path) -> Iterator[tuple[int, bytes, Any]]:
    """Line number, bytes and object (None if it is no JSON) of each line of the ledger."""
    try:
        with open(release / LINES, "rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(LINE + 1), b""), start=1):
                if len(line) > LINE:
                    raise Unreadable(f"{LINES}, line {number}: longer than {LINE} bytes")
                content = line[:-1] if line.endswith(b"\n") else line
                try:
                    row = json.loads(content)
                    # As many keys as are written? Otherwise, or where blanks hide some, one may be there twice, which
                    # the slower hook finds out.
                    if content.count(b'":') != _keys(row) or any(blank in content for blank in (b" ", b"\t", b"\r")):
                        row = json.loads(content, object_pairs_hook=_without_doubles)
                    yield number, content, row
                except (ValueError, RecursionError):
                    yield number, content, None
    except OSError as error:
        raise Unreadable(f"{LINES} cannot be read ({error})") from None


def _keys(row: Any) -> int:
    """Keys of a row and of its parts; -1 for what is no row."""
    return len(row) + sum([len(part) for part in row.values() if type(part) is dict]) if type(row) is dict else -1


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def placed(path: str) -> tuple[str, str]:
    """Folder of the dataset that an image lies in ("" for the release itself), and its path there."""
    parts = path.split("/")
    start = max(0, len(parts) - (2 if path.endswith(".png") else 3))
    return "/".join(parts[:start]), "/".join(parts[start:])


def cell(value: Any) -> str:
    """A covariate as participants.tsv writes it."""
    return "n/a" if value is None else value if isinstance(value, str) else f"{float(value):.6g}"


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


def check_form(release: Path) -> tuple[list[Check], dict[str, Any], Ledger]:
    """L0: root.json and every row of the ledger have their form, and rows are in order, each subject once."""
    root = read_root(release)
    ledger, malformed, order = Ledger(), [], []
    for number, content, row in rows(release):
        ledger.leaves.append(leaf_hash(content))
        problem = "not JSON, or a key twice" if row is None else row_problem(row)
        if problem:
            malformed.append(f"line {number}: {problem}")
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
        elif row["image"] is not None:
            image = row["image"]
            ledger.images.append((image["path"], image["bytes"], image["sha256"]))
            folder, inside = placed(image["path"])
            shown = [inside] if inside.endswith(".png") else []
            ledger.datasets.setdefault(folder, {})[f"sub-{row['sample_id']}"] = shown + [
                cell(row["covariates"][name]) for name in ledger.covariates
            ]
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


def _shard_problems(shards: list[Any], ledger: Ledger) -> list[str]:
    wrong: list[str] = []
    seen = [0] * len(ledger.leaves)
    left = len(seen)  # rows that no shard has named; more than there are need not be counted
    for entry in shards:
        try:
            left -= sum(
                end - first if 0 <= first <= end <= len(seen) else len(seen) + 1 for first, end in entry["ranges"]
            )
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

    def problem(entry: tuple[str, int, str]) -> str | None:
        name, size, digest = entry
        path = f"{base}/{name}"
        try:
            found = os.lstat(path)
            if not stat.S_ISREG(found.st_mode):
                return f"{name}: a link, or no file"
            if found.st_size != size:
                return f"{name}: {found.st_size} bytes, sealed {size}"
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
    sealed = set(root["files"]) | {path for path, _, _ in ledger.images} | {ROOT}
    if (release / SIGNATURE).is_file():
        sealed.add(SIGNATURE)
    there, links, folders = contents(release)
    lower: dict[str, str] = {}
    clashes = [
        f"{name} and {lower[name.lower()]}" for name in sorted(there) if lower.setdefault(name.lower(), name) != name
    ]
    needed: set[str] = set()
    for name in sealed:
        while (name := name.rpartition("/")[0]) and name not in needed:
            needed.add(name)
    gaps = [
        f"{group}: {_gap(found)}" for group, found in ledger.indices.items() if sorted(found) != list(range(len(found)))
    ]
    twice = len(ledger.images) - len({path for path, _, _ in ledger.images})
    owners = [f"{twice} shared path(s)"] if twice else []
    owners += [f"{name}: an image of nobody in the ledger" for name in sorted(root["files"]) if _where_images_lie(name)]
    checks = [
        judged(
            2,
            "no-orphans",
            sorted(there - sealed),
            "no file is there that was not sealed",
            "file(s) are there that were not sealed",
        ),
        judged(2, "no-missing", sorted(sealed - there), "no sealed file is missing", "sealed file(s) are missing"),
        judged(2, "no-links", sorted(links), "no links", "link(s) in the release"),
        judged(
            2,
            "no-stray-folders",
            sorted(folders - needed),
            "no folder without sealed files",
            "folder(s) without sealed files",
        ),
        judged(2, "no-case-clash", clashes, "no names that differ in case alone", "names that differ in case alone"),
        judged(
            2,
            "indices",
            gaps,
            "subjects of each group are numbered without gaps",
            "group(s) have gaps or doubles in their numbers",
        ),
        judged(2, "one-image-each", owners, "no two subjects share a file", "problem(s) with images"),
    ]
    checks.append(_check_participants(release, root, ledger))
    return [*checks, _check_datasets(release, root, ledger)] if set(ledger.datasets) - {""} else checks


def _where_images_lie(name: str) -> bool:
    name = name.lower()
    folders = name.split("/")[:-1]
    return name.endswith(IMAGES) or (
        folders[:1] != ["provenance"] and any(one == "images" or one.startswith("sub-") for one in folders)
    )


def _gap(found: list[int]) -> str:
    missing = sorted(set(range(len(found))) - set(found))
    return f"number {missing[0]} is missing" if missing else "a number occurs twice"


def _check_participants(release: Path, root: dict[str, Any], ledger: Ledger) -> Check:
    datasets = ledger.datasets or {"": {}}
    tables = {_in(folder, TABLE) for folder in datasets}
    wrong = [
        f"{name}: of no dataset"
        for name in sorted(root["files"])
        if PurePosixPath(name).name == TABLE and name not in tables
    ]
    for folder, participants in sorted(datasets.items()):
        wrong += _table_problems(release, _in(folder, TABLE), participants, ledger.covariates)
    count = sum(map(len, datasets.values()))
    where = TABLE if len(datasets) == 1 else f"{TABLE} of {len(datasets)} datasets"
    return judged(
        2,
        "participants",
        wrong,
        f"{where} and the ledger agree on {count} subjects",
        "difference(s) between participants.tsv and the ledger",
    )


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _table_problems(
    release: Path, name: str, participants: dict[str, list[str]], covariates: list[str]
) -> Iterator[str]:
    try:
        with open(release / name, encoding="utf-8", newline="") as stream:
            table = list(csv.reader(stream, delimiter="\t"))
        header, body = table[0], table[1:]
        front = header[: len(header) - len(covariates)]
        columns = [header.index(column) for column in [*front[1:], *covariates]]
        found = {row[0]: [row[i] for i in columns] for row in body}
    except (OSError, ValueError, IndexError, csv.Error) as error:
        yield f"{name} cannot be read ({type(error).__name__}: {error})"
        return
    yield from (f"{who}: in {name} alone" for who in sorted(set(found) - set(participants)))
    yield from (f"{who}: in the ledger alone, not in {name}" for who in sorted(set(participants) - set(found)))
    yield from (
        f"{who}: {found[who]}, ledger {cells}"
        for who, cells in sorted(participants.items())
        if who in found and found[who] != cells
    )
    yield from (
        f"line {number} of {name} has {len(row)} cells, its header {len(header)}"
        for number, row in enumerate(body, 2)
        if len(row) != len(header)
    )
    if len(body) != len(found):
        yield f"{len(body) - len(found)} participant(s) of {name} occur twice"
    if (
        sorted(front) not in (["participant_id"], ["image", "participant_id"])
        or sorted(header[len(front) :]) != covariates
    ):
        yield f"{name}: columns {header}, expected participant_id and {covariates}"


def _check_datasets(release: Path, root: dict[str, Any], ledger: Ledger) -> Check:
    """L2 of a release of several datasets: each is complete by itself, its checksums are the sealed digests, and nobody
    is in two.
    """
    digests: dict[str, dict[str, str]] = {folder: {} for folder in ledger.datasets}
    sealed = [(path, digest) for path, _, digest in ledger.images] + [
        (name, entry["sha256"]) for name, entry in root["files"].items()
    ]
    for path, digest in sealed:
        folder, _, inside = path.partition("/")
        if folder in digests and inside != CHECKSUMS:
            digests[folder][inside] = digest
    wrong = [f"{folder!r}: not a folder of the release" for folder in sorted(digests) if not folder or "/" in folder]
    try:
        named = _read(release, DESCRIPTION)["Datasets"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        named = None
    wrong += [] if named == sorted(digests) else [f"{DESCRIPTION} names datasets {named}"]
    seen: dict[str, str] = {}
    for folder, participants in sorted(ledger.datasets.items()):
        wrong += [f"{_in(folder, name)} is missing" for name in DATASET if name not in digests[folder]]
        wrong += [
            f"{who}: in {seen[who]} and {folder}" for who in participants if seen.setdefault(who, folder) != folder
        ]
        try:
            lines = (release / _in(folder, CHECKSUMS)).read_text(encoding="utf-8").splitlines()
            told = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        except (OSError, ValueError) as error:
            wrong.append(f"{_in(folder, CHECKSUMS)} cannot be read ({type(error).__name__})")
            continue
        differ = sorted(name for name in {*told, *digests[folder]} if told.get(name) != digests[folder].get(name))
        wrong += [f"{_in(folder, CHECKSUMS)}: {name} is not as sealed" for name in differ]
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
    """The 32 bytes of an ed25519 public key in PEM."""
    try:
        body = "".join(line for line in path.read_text(encoding="ascii").splitlines() if not line.startswith("-----"))
        der = base64.b64decode(body, validate=True)
    except (OSError, ValueError) as error:
        raise Unreadable(f"--key {path}: not a public key in PEM ({error})") from None
    if len(der) != 44 or not der.startswith(_SPKI):
        raise Unreadable(f"--key {path}: not an ed25519 public key")
    return der[12:]


def check_signature(release: Path, root: dict[str, Any], key: bytes | None) -> Check:
    """L1: who sealed the release.  Without a key it is unsigned as far as this program can tell."""
    name, digest = "signature", sha256_file(release / ROOT)
    there = (release / SIGNATURE).is_file()
    signer = root.get("signer")
    if not there:
        if signer or key:
            return Check(
                1,
                name,
                "finding",
                f"UNSIGNED: {SIGNATURE} is missing"
                + (f", but root.json names signer {str(signer)[:16]}" if signer else ""),
            )
        return Check(
            1, name, "note", f"UNSIGNED: compare the SHA-256 of root.json, {digest}, with one from the publisher"
        )
    if key is None:
        return Check(
            1,
            name,
            "note",
            f"UNSIGNED as far as can be told: there is a signature that names key {str(signer)[:16]}, but no --key to"
            " check it with",
        )
    try:
        envelope = _read(release, SIGNATURE)
        payload = base64.b64decode(envelope["payload"], validate=True)
        kind = envelope["payloadType"].encode()
        message = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
        if not any(
            ed25519_valid(key, message, base64.b64decode(entry["sig"], validate=True))
            for entry in envelope["signatures"]
        ):
            return Check(
                1, name, "finding", "the signature is not by this key, or the statement was changed after it was signed"
            )
        subjects = {entry["name"]: entry["digest"]["sha256"] for entry in json.loads(payload)["subject"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Check(1, name, "finding", f"{SIGNATURE} is not a signed statement ({type(error).__name__}: {error})")
    if subjects.get(ROOT) != digest:
        return Check(
            1,
            name,
            "finding",
            f"the signature is valid, but of another release: it names root.json {str(subjects.get(ROOT))[:16]}, here"
            f" it is {digest[:16]}",
        )
    return Check(
        1, name, "pass", f"root.json, SHA-256 {digest}, is signed by key {hashlib.sha256(_SPKI + key).hexdigest()[:16]}"
    )


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
        row = json.loads(proof["record"])
        problem = row_problem(row)
    except (KeyError, TypeError, ValueError, RecursionError):
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
    try:
        key = read_public_key(options.key) if options.key else None
        if options.proof:
            checks = verify_one(options.release, json.loads(options.proof.read_text(encoding="utf-8")), key)
        else:
            checks = verify(options.release, key, not options.no_images)
    except (Unreadable, OSError, ValueError, RecursionError) as error:
        print(f"error: {shown(str(error))}", file=sys.stderr)
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
