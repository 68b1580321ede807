"""From a file back to its sources, over run records: the outputs of one run are the inputs of the next."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.provenance import verify
from meddiff_steps.provenance.record import SCHEMA, record_path

Record = dict[str, Any]
#: Where a release has its records.
FOLDER = "provenance/records"


def entries(record: Record, side: str) -> Iterator[dict[str, Any]]:
    """The files of one side ("inputs", "outputs") of a record: path, bytes, sha256."""
    for files in record[side].values():
        yield from files


_FILE = {"path": str, "bytes": verify.COUNT, "sha256": verify.DIGEST}
_NONE = type(None)
_FORM = {
    "schema": SCHEMA,
    "step": str,
    "parameters": verify.Each((bool, int, float, str)),
    "inputs": verify.Each(list),
    "outputs": verify.Each(list),
    "config": {"sections": [str], "sha256": verify.DIGEST},
    "code": {
        "version": str,
        "digest": str,
        "commit": (str, _NONE),
        "dirty": (bool, _NONE),
        "diff_sha256": (verify.DIGEST, _NONE),
    },
    "environment": dict,
}


def check_record(record: Any, name: str) -> None:
    """Refuse what is no record of this schema.

    Raises
    ------
    UserError
        A field is missing, unknown, or of another type, or it names no output.
    """
    form = _FORM | ({"volatile": dict} if "volatile" in record else {})
    wrong = list(verify.unlike(record, form)) or [
        *_wrong_files(record),
        *verify.unlike(record["environment"].get("lock_sha256"), (verify.DIGEST, _NONE), "environment.lock_sha256."),
    ]
    if wrong:
        raise UserError(
            f"{name}: not a run record ({', '.join(wrong[:5])}). Get the release again, or run the workflow again."
        )


def _wrong_files(record: Record) -> Iterator[str]:
    for side in ("inputs", "outputs"):
        for entry in entries(record, side):
            weighed = isinstance(entry, dict) and "weights_sha256" in entry
            yield from verify.unlike(entry, _FILE | ({"weights_sha256": verify.DIGEST} if weighed else {}), f"{side}.")
    if not any(record["outputs"].values()):
        yield "outputs"


#: What steps of earlier versions are called today; the records of old releases name them as they were.
RENAMED = {
    "distill": "second_model",
    "evaluate": "measure",
    "release": "describe",
    "augment": "downstream_train",
    "augment_design": "downstream_design",
    "augment_plan": "downstream_plan",
    "augment_data": "downstream_data",
    "augment_test": "downstream_test",
}


def step_of(record: Record) -> str:
    """The step whose run a record is of, by its name of today.

    >>> step_of({"step": "distill"}), step_of({"step": "generate"})
    ('second_model', 'generate')
    """
    step: str = record["step"]
    return RENAMED.get(step, step)


def kind_of(record: Record) -> str:
    """What a recipe calls the weights that a run wrote: by its step, but that a student takes its teacher's place, and
    networks of label maps are told from those of images by their folder.

    >>> kind_of({"step": "few_step"}), kind_of({"step": "tone"})
    ('diffusion', 'tone')
    >>> kind_of({"step": "diffusion", "outputs": [{"path": "masks/diffusion/model.safetensors"}]})
    'mask_diffusion'
    """
    step = step_of(record)
    if step == "few_step":
        return "diffusion"
    of_masks = any(str(entry["path"]).startswith(MASKS) for entry in entries(record, "outputs"))
    return f"mask_{step}" if of_masks and step in ("autoencoder", "diffusion") else step


#: Folder of a study that the networks of label maps lie in.
MASKS = "masks/"
#: Steps whose settings may name files from outside the study: tables, masks, weights, labels.  What all others read, a
#: run wrote.
FROM_OUTSIDE = frozenset(
    {"cohort", "preprocess", "text", "init_weights", "autoencoder", "plan", "segmenter", "measure"}
)
#: What a run of a step must have read, by the steps that write it, any one of each set; by their names of today.
SOURCES: dict[str, tuple[frozenset[str], ...]] = {
    step: tuple(frozenset(one.split("|")) for one in needed.split())
    for step, needed in {
        "preprocess": "cohort",
        "masks": "preprocess",
        "autoencoder": "cohort preprocess|masks",
        "latents": "autoencoder preprocess|filter|masks",
        "text": "cohort",
        "decoder": "cohort preprocess autoencoder",
        "diffusion": "cohort|second_model latents",
        "few_step": "cohort latents diffusion",
        "tone": "cohort|second_model autoencoder diffusion|few_step",
        "second_model": "plan filter|privacy",
        "calibrate": "autoencoder preprocess",
        "plan": "cohort",
        "generate": "plan autoencoder diffusion|few_step",
        "filter": "plan generate calibrate autoencoder diffusion|few_step",
        "privacy": "plan filter",
        "gate": "plan privacy",
        "images": "filter gate",
    }.items()
}


def is_declared(record: Record, name: str, path: str) -> bool:
    """Whether a file that a run read as `name` needs no run behind it.

    That is its frozen config, whose content is checked against the published one, and, of the steps that may read such,
    a file from outside the study.
    """
    if name == "config":
        today = step_of(record)  # a frozen config is named for a step or its stage, which was not always the same
        names = "|".join(map(re.escape, {today, *(old for old, new in RENAMED.items() if new == today)}))
        return re.fullmatch(rf"config/({names})-[0-9a-f]{{16}}\.json", path) is not None
    return step_of(record) in FROM_OUTSIDE and (path.startswith("external/") or PurePosixPath(path).is_absolute())


@dataclass
class Lineage:
    """Runs that lead to some files.

    Attributes
    ----------
    records
        Record by the path of each of its outputs.
    missing, stale, cyclic
        Files without a run; files that are not what their run wrote (path, digest wanted, digest written); files that
        lead to themselves.
    """

    records: dict[str, Record] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    stale: list[tuple[str, str, str]] = field(default_factory=list)
    cyclic: list[str] = field(default_factory=list)

    def steps(self) -> list[Record]:
        """The distinct records, by step and first output."""
        distinct = {id(record): record for record in self.records.values()}
        return sorted(distinct.values(), key=lambda r: (r["step"], next(entries(r, "outputs"))["path"]))


def trace(heads: Mapping[str, str], producer: Any) -> Lineage:
    """Walk from files back to their sources.

    Parameters
    ----------
    heads
        SHA-256 by path of the files to start from.
    producer
        producer(path) is the record of the run that wrote it, or None.
    """
    found = Lineage()
    done: set[str] = set()
    #: Each run, and SHA-256 by path of what it wrote: looked up once per file, not searched.
    runs: dict[int, tuple[Record, dict[str, str]]] = {}
    for head, digest in heads.items():
        # (path, digest, is it left again): a depth-first walk without recursion.
        stack: list[tuple[str, str, bool]] = [(head, digest, False)]
        above: set[str] = set()
        while stack:
            path, wanted, leaving = stack.pop()
            if leaving:
                above.discard(path)
                done.add(path)
                continue
            if path in above:
                found.cyclic.append(path)
                continue
            record = found.records.get(path) or producer(path)
            if record is not None and id(record) not in runs:
                runs[id(record)] = record, {entry["path"]: entry["sha256"] for entry in entries(record, "outputs")}
            written = runs[id(record)][1].get(path) if record is not None else None
            if record is None or written is None:
                found.missing.append(path)
                continue
            if written != wanted:
                found.stale.append((path, wanted, written))
            if path in done:
                continue
            if path not in found.records:
                for name in runs[id(record)][1]:
                    found.records.setdefault(name, record)
            above.add(path)
            stack.append((path, wanted, True))
            stack += [
                (entry["path"], entry["sha256"], False)
                for name, files in record["inputs"].items()
                for entry in files
                if not is_declared(record, name, entry["path"])
            ]
    found.missing = sorted(set(found.missing))
    return found


def study_records(results: Path) -> Any:
    """A `producer` for `trace` over the records of a study's folder.

    A run that wrote several files is found under the first; the others are found through an index of all records, made
    when it is first needed.
    """
    index: dict[str, Record] = {}

    def producer(path: str) -> Record | None:
        direct = record_path(results, path)
        if direct.is_file():
            record = read_json(direct)
            check_record(record, str(direct))
            return record
        if not index:
            index.update(read_records(results / "records"))
        return index.get(path)

    return producer


def read_records(folder: Path, read: Callable[[Path], Record] = read_json) -> dict[str, Record]:
    """Record by the path of each of its outputs, of all records under a folder.

    Raises
    ------
    UserError
        A file is no record, or two records claim the same output; or see `read`.
    """
    found: dict[str, Record] = {}
    for path in sorted(folder.rglob("*.json")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        record = read(path)
        check_record(record, str(path))
        for entry in entries(record, "outputs"):
            if entry["path"] in found:
                raise UserError(
                    f"{path}: {entry['path']} is an output of another record, too. Remove the older record, or get the"
                    " release again."
                )
            found[entry["path"]] = record
    return found


def read_published(release: Path) -> dict[str, Record]:
    """Records of a release, which are written in one way and named for their first output; see `read_records`.

    Raises
    ------
    UserError
        One of them is written otherwise, or named for something else.
    """
    folder = release / FOLDER

    def read(path: Path) -> Record:
        record = read_strictly(release, path.relative_to(release).as_posix())
        check_record(record, str(path))
        first = next(entries(record, "outputs"))["path"]
        if path.relative_to(folder).as_posix() != f"{first}.json" or "volatile" in record:
            raise UserError(f"{path}: not the published record of {first}. Get the release again.")
        return record

    return read_records(folder, read)


def read_strictly(release: Path, name: str, ascii_only: bool = True) -> dict[str, Any]:
    """`verify.read_json`.

    Raises
    ------
    UserError
        The file cannot be read, or is not written in the one way that files of a release are.
    """
    try:
        return verify.read_json(release, name, ascii_only)
    except (OSError, ValueError) as error:
        raise UserError(f"{release / name}: {error}. Run `audit` on the release, or get it again.") from None
