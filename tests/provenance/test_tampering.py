"""Attacks on a release, and the check that must see each.

The first kind changes files and leaves the seal as it was: L0 to L2 see it.  The second kind is by somebody who knows
how releases are sealed and seals the changed one again: without the publisher's key only L3 to L5 can see it, with the
key L1 does.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PilImage
from tiny_release import AGAIN, GIVEN_UP, Place, schema_of

from meddiff_steps import __version__
from meddiff_steps.audit.request import Report, Request
from meddiff_steps.audit.run import audit
from meddiff_steps.core.files import sha256_file, write_json
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.imaging.encoding import Grid, decode, encode_labels, encode_picture, encode_volume, voxel_digest
from meddiff_steps.provenance import ledger, lineage, signature, verify
from meddiff_steps.release import crate, croissant
from meddiff_steps.release import seal as bundle

FIRST, SECOND, LAST = "syn000000", "syn000003", "syn000005"


class Target:
    """A copy of the release, to be attacked; `sealed_again` are attacks whose author repairs digests and roots."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place, self.folder, self.keep = place, folder, folder.parent
        self.private = Path(shutil.copy(place.private, folder.parent / "private.parquet"))
        self.key = Path(f"{place.key}.pub")
        self.version = __version__

    def path(self, name: str) -> Path:
        return self.folder / f"sub-{name}/anat/sub-{name}_T1w.nii.gz"

    def rows(self) -> list[dict[str, Any]]:
        return [row for _, row in ledger.read_lines(self.folder)]

    def lines(self) -> list[bytes]:
        return (self.folder / bundle.LINES).read_bytes().splitlines()

    def write_lines(self, lines: list[bytes]) -> None:
        (self.folder / bundle.LINES).write_bytes(b"".join(line + b"\n" for line in lines))

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def edit(self, name: str, change: Callable[[Any], None]) -> None:
        content = self.json(name)
        change(content)
        write_json(self.folder / name, content)

    def edit_row(self, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        rows = self.rows()
        change(next(row for row in rows if row["sample_id"] == name))
        self.seal(rows)

    def seal(self, rows: list[dict[str, Any]] | None = None, describe: bool = True) -> None:
        """Everything that somebody without the key can repair; `describe` also makes the metadata again."""
        rows = self.rows() if rows is None else rows
        for row in rows:
            if row["image"] is not None:
                path = self.folder / row["image"]["path"]
                row["image"] |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            if row.get("labels"):
                path = self.folder / row["labels"]["path"]
                row["labels"] |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        schema = schema_of(rows, self.place.study.covariates)
        written = ledger.write_ledger(
            ledger.as_tables(rows, schema), schema, self.folder / bundle.TABLE, self.folder / bundle.LINES
        )
        root = self.json(bundle.ROOT)
        images = {row["image"]["path"] for row in rows if row["image"]}
        paths = images | {row["labels"]["path"] for row in rows if row.get("labels")}
        shards = ledger.shard_roots(written, {row["sample_id"]: 0 for row in rows})
        root["ledger"] |= {"root": written.root, "rows": len(rows), "released": len(images), "shards": shards}
        files = bundle._files(self.folder, paths)
        if describe:
            with contextlib.suppress(KeyError):  # of what is malformed nothing can be said
                date, version = self.json(croissant.NAME)["datePublished"], root["software"]["version"]
                for name, content in bundle.metadata(self.folder, root["ledger"], root["inputs"], files, date, version):
                    write_json(self.folder / name, content)
                    files[name] = bundle._entry(self.folder / name)
        root |= {"signer": None, "files": files}
        write_json(self.folder / bundle.ROOT, root)
        (self.folder / bundle.SIGNATURE).unlink(missing_ok=True)

    def show(self, name: str, stored: np.ndarray, honest: bool = True) -> None:
        """Put other voxels into an image, with its marks; `honest` also repairs the voxel digest."""
        grid = Grid(stored.shape, 20.0)
        content, kept = encode_volume(stored / 1000, grid, name, "tiny")
        self.path(name).write_bytes(content)
        rows = self.rows()
        if honest:
            next(row for row in rows if row["sample_id"] == name)["image"]["voxel_sha256"] = voxel_digest(
                kept, grid.affine
            )
        self.seal(rows)

    def rewrite(self, name: str, change: Callable[[bytearray], None]) -> None:
        """Change the uncompressed bytes of an image."""
        content = bytearray(gzip.decompress(self.path(name).read_bytes()))
        change(content)
        self.path(name).write_bytes(gzip.compress(bytes(content), 6, mtime=0))

    def audit(self, key: bool = True) -> Report:
        key_file = self.key if key else None
        return audit(Request(self.folder, key=key_file, private=self.private, version=self.version))


@dataclass(frozen=True)
class Attack:
    apply: Callable[[Target], Any]
    level: int
    check: str
    key: bool = True


def _flip(path: Path, place: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def _flip_voxel(target: Target) -> None:
    target.rewrite(FIRST, lambda content: content.__setitem__(len(content) - 5, content[-5] ^ 1))


def _swap(target: Target) -> None:
    a, b = target.path(FIRST), target.path(SECOND)
    x, y = a.read_bytes(), b.read_bytes()
    a.write_bytes(y), b.write_bytes(x)


def _rename(target: Target) -> None:
    target.path(FIRST).rename(target.path(FIRST).with_name("sub-syn000000_T2w.nii.gz"))


def _add(target: Target) -> None:
    target.path(GIVEN_UP).parent.mkdir(parents=True)
    shutil.copy(target.path(FIRST), target.path(GIVEN_UP))


def _link(target: Target) -> None:
    moved = target.keep / "moved"
    target.path(FIRST).rename(moved)
    target.path(FIRST).symlink_to(moved)


def _edit_line(target: Target, change: Callable[[list[bytes]], list[bytes]]) -> None:
    target.write_lines(change(target.lines()))


def _drop_field(target: Target) -> None:
    row = target.rows()[0]
    del row["recipe"]
    target.write_lines([json.dumps(row, sort_keys=True, separators=(",", ":")).encode(), *target.lines()[1:]])


def _climb(target: Target) -> None:
    _edit_line(
        target, lambda lines: [line.replace(b'"path":"sub-syn000000/', b'"path":"../sub-syn000000/') for line in lines]
    )


def _parquet(target: Target) -> None:
    path = target.folder / bundle.TABLE
    rows = pq.read_table(path).to_pylist()
    rows[0]["covariates"]["age"] = 42.0
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)


def _edit_tsv(target: Target, change: Callable[[list[str]], list[str]]) -> None:
    path = target.folder / "participants.tsv"
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))


def _raise_age(lines: list[str]) -> list[str]:
    column = lines[0].split("\t").index("age")
    cells = lines[1].split("\t")
    cells[column] = f"{float(cells[column]) + 1:g}" if cells[column] != "n/a" else "50"
    return [lines[0], "\t".join(cells), *lines[2:]]


def _sign_by_another(target: Target) -> None:
    signature.generate(target.keep / "other.pem")
    key = signature.load_private(target.keep / "other.pem")
    target.edit(
        bundle.SIGNATURE,
        lambda envelope: envelope.update(signature.sign(json.loads(base64.b64decode(envelope["payload"])), key)),
    )


def _name_the_right_key(target: Target) -> None:
    right = target.json(bundle.SIGNATURE)["signatures"][0]["keyid"]
    _sign_by_another(target)
    target.edit(bundle.SIGNATURE, lambda envelope: envelope["signatures"][0].update(keyid=right))


def _replay(target: Target) -> None:
    """A changed release with the signature of the true one, which names another root.json."""
    envelope, signer = (target.folder / bundle.SIGNATURE).read_bytes(), target.json(bundle.ROOT)["signer"]
    target.edit("T1w.json", lambda content: content.update(SkullStripped=False))
    target.seal()
    target.edit(bundle.ROOT, lambda root: root.update(signer=signer))
    (target.folder / bundle.SIGNATURE).write_bytes(envelope)


def _edit_payload(target: Target) -> None:
    def change(envelope: dict[str, Any]) -> None:
        payload = json.loads(base64.b64decode(envelope["payload"]))
        payload["subject"][0]["digest"]["sha256"] = "0" * 64
        envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()

    target.edit(bundle.SIGNATURE, change)


def _private(target: Target, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    rows = pq.read_table(target.private).to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows), schema=pq.read_schema(target.private)), target.private)


def _record(target: Target, step: str) -> Path:
    return next(
        path
        for path in sorted((target.folder / bundle.RECORDS).rglob("*.json"))
        if json.loads(path.read_text())["step"] == step
    )


NAIVE = {
    "one bit of a voxel": Attack(_flip_voxel, 1, "images"),
    "one bit of a compressed image": Attack(lambda t: _flip(t.path(FIRST), 60), 1, "images"),
    "the origin in a header": Attack(
        lambda t: t.rewrite(FIRST, lambda c: c.__setitem__(slice(268, 272), struct.pack("<f", 3.0))), 1, "images"
    ),
    "an image compressed again": Attack(
        lambda t: t.path(FIRST).write_bytes(gzip.compress(gzip.decompress(t.path(FIRST).read_bytes()), 1)), 1, "images"
    ),
    "an image cut short": Attack(lambda t: t.path(FIRST).write_bytes(t.path(FIRST).read_bytes()[:-1]), 1, "images"),
    "a byte behind an image": Attack(
        lambda t: t.path(FIRST).write_bytes(t.path(FIRST).read_bytes() + b"x"), 1, "images"
    ),
    "two images swapped": Attack(_swap, 1, "images"),
    "an image renamed": Attack(_rename, 2, "no-orphans"),
    "an image removed": Attack(lambda t: t.path(FIRST).unlink(), 2, "no-missing"),
    "a rejected subject slipped in": Attack(_add, 2, "no-orphans"),
    "a file of another program": Attack(lambda t: (t.folder / "Thumbs.db").write_bytes(b"x"), 2, "no-orphans"),
    "an image that is a link": Attack(_link, 2, "no-links"),
    "a folder that is a link": Attack(lambda t: (t.folder / "sub-x").symlink_to(t.keep), 2, "no-links"),
    "a dangling link": Attack(lambda t: (t.folder / "derivatives").symlink_to(t.keep / "none"), 2, "no-links"),
    "an empty folder": Attack(lambda t: (t.folder / "sub-syn000099/anat").mkdir(parents=True), 2, "no-stray-folders"),
    "a name in other case": Attack(
        lambda t: shutil.copy(t.folder / "README.md", t.folder / "ReadMe.md"), 2, "no-case-clash"
    ),
    "one bit of the ledger": Attack(
        lambda t: _flip(t.folder / bundle.LINES, t.lines()[0].index(b'"seed_key":"') + 14), 1, "ledger-root"
    ),
    "a row dropped": Attack(lambda t: _edit_line(t, lambda x: x[:3] + x[4:]), 1, "ledger-root"),
    "a row doubled": Attack(lambda t: _edit_line(t, lambda x: [*x[:3], x[2], *x[3:]]), 0, "rows-order"),
    "rows in another order": Attack(lambda t: _edit_line(t, lambda x: [x[1], x[0], *x[2:]]), 0, "rows-order"),
    "a row without recipe": Attack(_drop_field, 0, "rows-form"),
    "a row that is no JSON": Attack(lambda t: _edit_line(t, lambda x: [x[0][:-1], *x[1:]]), 0, "rows-form"),
    "a key twice in a row": Attack(
        lambda t: _edit_line(t, lambda x: [x[0].replace(b'{"attempt":0', b'{"attempt":1,"attempt":0'), *x[1:]]),
        0,
        "rows-form",
    ),
    "a row that is not canonical": Attack(
        lambda t: _edit_line(t, lambda x: [x[0].replace(b'":', b'": ', 1), *x[1:]]), 0, "canonical"
    ),
    "a path out of the release": Attack(_climb, 0, "rows-form"),
    "the table beside the ledger": Attack(_parquet, 0, "twins"),
    "a table that is none": Attack(lambda t: (t.folder / bundle.TABLE).write_bytes(b"PAR1"), 0, "twins"),
    "the root in root.json": Attack(
        lambda t: t.edit(bundle.ROOT, lambda r: r["ledger"].update(root="0" * 64)), 1, "ledger-root"
    ),
    "a shard's root": Attack(
        lambda t: t.edit(bundle.ROOT, lambda r: r["ledger"]["shards"][1].update(root="0" * 64)), 1, "shard-roots"
    ),
    "a shard's rows": Attack(lambda t: t.edit(bundle.ROOT, lambda r: r["ledger"]["shards"].pop()), 1, "shard-roots"),
    "the verdict in root.json": Attack(
        lambda t: t.edit(bundle.ROOT, lambda r: r["privacy"].update(verdict="BEST")), 1, "signature"
    ),
    "an unknown version": Attack(
        lambda t: t.edit(bundle.ROOT, lambda r: r.update(schema="meddiff/release/v9")), 0, "root-form"
    ),
    "root.json removed": Attack(lambda t: (t.folder / bundle.ROOT).unlink(), 0, "root-form"),
    "one bit of the config": Attack(lambda t: _flip(t.folder / bundle.CONFIG, 100), 1, "files"),
    "a run record": Attack(
        lambda t: _record(t, "generate").write_text(_record(t, "generate").read_text().replace("numpy", "numpi")),
        1,
        "files",
    ),
    "a run record removed": Attack(lambda t: _record(t, "generate").unlink(), 2, "no-missing"),
    "the verifier": Attack(lambda t: (t.folder / bundle.VERIFIER).write_text("print('all is well')"), 1, "files"),
    "a covariate in participants.tsv": Attack(lambda t: _edit_tsv(t, _raise_age), 2, "participants"),
    "a row of participants.tsv": Attack(lambda t: _edit_tsv(t, lambda x: x[:-1]), 2, "participants"),
    "a participant twice": Attack(lambda t: _edit_tsv(t, lambda x: [*x, x[-1]]), 2, "participants"),
    "the metadata of the crate": Attack(
        lambda t: t.edit(crate.NAME, lambda c: c["@graph"][1].update(license={"@id": "#mine"})), 1, "files"
    ),
    "a run dropped from the crate": Attack(lambda t: t.edit(crate.NAME, lambda c: c["@graph"].pop()), 4, "metadata"),
    "no crate": Attack(lambda t: (t.folder / crate.NAME).unlink(), 2, "no-missing"),
    "no croissant": Attack(lambda t: (t.folder / croissant.NAME).unlink(), 2, "no-missing"),
    "real images, says croissant": Attack(
        lambda t: t.edit(croissant.NAME, lambda c: c.update({"rai:hasSyntheticData": False})), 1, "files"
    ),
    "the licence": Attack(lambda t: (t.folder / "LICENSE").write_text("All rights reserved."), 1, "files"),
    "the mark in the sidecar": Attack(lambda t: t.edit("T1w.json", lambda c: c.pop("Synthesis")), 5, "marks"),
    "the mark of the dataset": Attack(
        lambda t: t.edit("dataset_description.json", lambda c: c.update(Synthetic=False)), 5, "marks"
    ),
    "the signature stripped": Attack(lambda t: (t.folder / bundle.SIGNATURE).unlink(), 1, "signature"),
    "the signature stripped, seen without a key": Attack(
        lambda t: (t.folder / bundle.SIGNATURE).unlink(), 1, "signature", key=False
    ),
    "a signature by another key": Attack(_sign_by_another, 1, "signature"),
    "another key that claims to be the right one": Attack(_name_the_right_key, 1, "signature"),
    "the signature of another release": Attack(_replay, 1, "signature"),
    "a signed statement changed": Attack(_edit_payload, 1, "signature"),
    "a signature that is none": Attack(lambda t: (t.folder / bundle.SIGNATURE).write_text("{}"), 1, "signature"),
    "a similarity in the private ledger": Attack(
        lambda t: _private(t, lambda r: [r[0] | {"nearest": r[1]["nearest"]}, *r[1:]]), 4, "private-ledger"
    ),
    "a candidate missing in the private ledger": Attack(lambda t: _private(t, lambda r: r[:-1]), 4, "private-ledger"),
}


def _reuse(row: dict[str, Any], target: Target) -> None:
    other = next(row for row in target.rows() if row["sample_id"] == SECOND)
    row.update(seed_key=other["seed_key"], noise_sha256=other["noise_sha256"])


def _pick_key(row: dict[str, Any]) -> None:
    key = seed_key("a lucky root", 1, 0, "noise")
    row.update(seed_key=key, noise_sha256=ledger.noise_digest(key))


def _slip_in(target: Target) -> None:
    """The subject that was given up, as if it had been released at its last attempt."""
    rows = target.rows()
    row = next(row for row in rows if row["sample_id"] == GIVEN_UP)
    key = seed_key(row["cohort_root"], row["noise_index"], 1, "noise")
    target.path(GIVEN_UP).parent.mkdir(parents=True)
    stored = np.random.default_rng(1).integers(0, 1000, (8, 8, 8)).astype(np.int16)
    content, stored = encode_volume(stored / 1000, Grid((8, 8, 8), 20.0), GIVEN_UP, "tiny")
    target.path(GIVEN_UP).write_bytes(content)
    path = target.path(GIVEN_UP).relative_to(target.folder).as_posix()
    row.update(
        attempt=1,
        seed_key=key,
        noise_sha256=ledger.noise_digest(key),
        image={"path": path, "voxel_sha256": voxel_digest(stored, Grid((8, 8, 8), 20.0).affine)},
    )
    row["privacy"]["decision"] = "released"
    known = next(row for row in rows if row["sample_id"] == FIRST)
    if "labels" in known:
        path = path.replace("_T1w", "_dseg")
        grid = Grid((8, 8, 8), 20.0, labels=True)
        labels = decode(target.folder / known["labels"]["path"], grid).stored
        (target.folder / path).write_bytes(encode_labels(labels, grid, GIVEN_UP, "tiny"))
        row.update(measured=known["measured"], labels={"path": path, "voxel_sha256": known["labels"]["voxel_sha256"]})
    target.seal(rows)
    table = target.folder / verify.TABLE
    header = table.read_text().splitlines()[0].split("\t")
    cells = verify.check_form(target.folder)[2].datasets[""]
    table.write_bytes(verify.table_bytes([header, *([who, *cells[who]] for who in sorted(cells))]))
    target.seal()


def _shift_age(target: Target, age: float) -> None:
    rows = target.rows()
    next(row for row in rows if row["sample_id"] == FIRST)["covariates"]["age"] = age

    def change(lines: list[str]) -> list[str]:
        column = lines[0].split("\t").index("age")
        return [
            "\t".join([*(c := line.split("\t"))[:column], f"{age:g}", *c[column + 1 :]])
            if line.startswith(f"sub-{FIRST}")
            else line
            for line in lines
        ]

    _edit_tsv(target, change)
    target.seal(rows)


def _forget(target: Target, name: str) -> None:
    shutil.rmtree(target.folder / f"sub-{name}")
    _edit_tsv(target, lambda lines: [line for line in lines if not line.startswith(f"sub-{name}")])
    target.seal([row for row in target.rows() if row["sample_id"] != name])


def _all_rows(target: Target, change: Callable[[dict[str, Any]], None]) -> None:
    rows = target.rows()
    for row in rows:
        row["recipe"] = dict(row["recipe"])
        change(row)
    target.seal(rows)


def _edit_record(target: Target, step: str, change: Callable[[dict[str, Any]], None]) -> None:
    target.edit(_record(target, step).relative_to(target.folder).as_posix(), change)
    target.seal()


def _stray_record(target: Target) -> None:
    content = json.loads(_record(target, "generate").read_text())
    content["outputs"] = {"out": [{"path": "generated/shard-0099.arrow", "bytes": 1, "sha256": "0" * 64}]}
    write_json(target.folder / bundle.RECORDS / "generated/shard-0099.arrow.json", content)
    target.seal()


def _from_elsewhere(path: str) -> Callable[[Target], None]:
    """The diffusion model came from a file that no run wrote."""
    return lambda target: _edit_record(
        target, "generate", lambda r: r["inputs"]["diffusion"][0].update(path=path, sha256="0" * 64)
    )


def _keep_inputs(step: str, *names: str) -> Callable[[Target], None]:
    return lambda target: _edit_record(
        target, step, lambda r: r.update(inputs={name: r["inputs"][name] for name in names if name in r["inputs"]})
    )


def _other_training(target: Target) -> None:
    """A second training, recorded, whose weights the images were made with; the rows name those of the first."""
    content = json.loads(_record(target, "diffusion").read_text())
    for entry in (one for files in content["outputs"].values() for one in files):
        entry.update(
            path=f"other/{entry['path']}", **({"weights_sha256": "2" * 64} if "weights_sha256" in entry else {})
        )
    first = next(lineage.entries(content, "outputs"))["path"]
    write_json(target.folder / bundle.RECORDS / f"{first}.json", content)
    for record in (target.folder / bundle.RECORDS / "generated").glob("*.json"):

        def change(run: dict[str, Any]) -> None:
            for entry in run["inputs"]["diffusion"]:
                entry["path"] = f"other/{entry['path']}"

        target.edit(record.relative_to(target.folder).as_posix(), change)
    target.seal()


def _circle(target: Target) -> None:
    """The cohort's manifest, made to depend on the plan that depends on it."""
    plan = json.loads(_record(target, "plan").read_text())["outputs"]["out"]
    _edit_record(target, "cohort", lambda record: record["inputs"].update(plan=plan))


def _extra_cell(target: Target) -> None:
    _edit_tsv(target, lambda lines: [lines[0], f"{lines[1]}\tJane Doe", *lines[2:]])
    target.seal()


def _slip_in_as(name: str) -> Callable[[Target], None]:
    def apply(target: Target) -> None:
        (target.folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(target.path(FIRST), target.folder / name)
        target.seal()

    return apply


def _say(name: str, change: Callable[[Any], Any]) -> Callable[[Target], None]:
    """An attack that edits one of the release's own JSON files."""

    def apply(target: Target) -> None:
        target.edit(name, change)
        target.seal()

    return apply


def _older(target: Target) -> None:
    """False metadata, and a version that could not make it again."""
    target.edit(croissant.NAME, lambda c: c.update({"rai:hasSyntheticData": False}))
    target.seal(describe=False)
    target.edit(bundle.ROOT, lambda r: r["software"].update(version="0.0.9"))


def _raise_limits(limit: float | None) -> Callable[[Target], None]:
    """A copy of a training scan that was let pass, with limits of its own."""

    def apply(target: Target) -> None:
        def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            row = next(row for row in rows if row["sample_id"] == FIRST)
            row.update(similarity=dict.fromkeys(row["similarity"], 0.9999), limit=dict.fromkeys(row["limit"], limit))
            return rows

        _private(target, change)
        rows, schema = pq.read_table(target.private).to_pylist(), pq.read_schema(target.private)
        written = ledger.write_ledger(ledger.as_tables(rows, schema), schema, target.private)
        target.edit(bundle.ROOT, lambda r: r["private_ledger"].update(root=written.root, rows=len(rows)))
        target.seal()

    return apply


def _privacy(change: Callable[[dict[str, Any]], Any]) -> Callable[[Target], None]:
    return lambda target: (target.edit(bundle.ROOT, lambda root: change(root["privacy"])), target.seal())  # type: ignore[return-value]


def _unmark(target: Target) -> None:
    volume = nib.Nifti1Image.from_filename(target.path(FIRST))
    stored = np.asarray(volume.dataobj)
    bare = nib.Nifti1Image(stored, volume.affine, volume.header)
    bare.header.extensions.clear()
    target.path(FIRST).write_bytes(gzip.compress(bare.to_bytes(), 6, mtime=0))
    target.seal()


def _describe(target: Target, text: bytes) -> None:
    target.rewrite(FIRST, lambda content: content.__setitem__(slice(148, 148 + 80), text.ljust(80, b"\0")))
    target.seal()


def _twin(target: Target) -> None:
    stored = np.asarray(nib.Nifti1Image.from_filename(target.path(SECOND)).dataobj)
    target.show(FIRST, stored)


def _noise_image(low: int, high: int, shape: tuple[int, ...] = (8, 8, 8)) -> np.ndarray:
    return np.random.default_rng(2).integers(low, high, shape).astype(np.float64)


def _rewritten(offset: int, content: bytes) -> Callable[[Target], None]:
    """An attack that writes over bytes of an image's header."""

    def apply(target: Target) -> None:
        target.rewrite(FIRST, lambda c: c.__setitem__(slice(offset, offset + len(content)), content))
        target.seal()

    return apply


def _mirror(target: Target) -> None:
    volume = nib.Nifti1Image.from_bytes(gzip.decompress(target.path(FIRST).read_bytes()))
    volume.set_qform(np.diag([-1, 1, 1, 1]) @ volume.affine, code=1)
    target.path(FIRST).write_bytes(gzip.compress(volume.to_bytes(), 6, mtime=0))
    target.seal()


def _second_extension(target: Target) -> None:
    volume = nib.Nifti1Image.from_bytes(gzip.decompress(target.path(FIRST).read_bytes()))
    volume.header.extensions.append(nib.nifti1.Nifti1Extension(6, b'{"patient": "Jane Doe"}'))
    target.path(FIRST).write_bytes(gzip.compress(volume.to_bytes(), 6, mtime=0))
    target.seal()


def _deep_mark(target: Target) -> None:
    volume = nib.Nifti1Image.from_bytes(gzip.decompress(target.path(FIRST).read_bytes()))
    volume.header.extensions.clear()
    volume.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"[" * 50_000))
    target.path(FIRST).write_bytes(gzip.compress(volume.to_bytes(), 6, mtime=0))
    target.seal()


def _named(target: Target) -> None:
    """A name in the header of the compression, where `gzip -N` shows it."""
    packed = target.path(FIRST).read_bytes()
    target.path(FIRST).write_bytes(packed[:3] + b"\x08" + packed[4:10] + b"Jane Doe\0" + packed[10:])
    target.seal()


def _behind(content: bytes, packed: bool) -> Callable[[Target], None]:
    def apply(target: Target) -> None:
        path = target.path(FIRST)
        path.write_bytes(
            path.read_bytes() + gzip.compress(content, mtime=0)
            if packed
            else gzip.compress(gzip.decompress(path.read_bytes()) + content, mtime=0)
        )
        target.seal()

    return apply


def _break_image(target: Target) -> None:
    target.path(FIRST).write_bytes(gzip.compress(b"no image"))
    target.seal()


def _labels(change: Callable[[np.ndarray], Any], honest: bool = True) -> Callable[[Target], None]:
    """An attack that puts other labels into a label map; `honest` also repairs its voxel digest."""

    def apply(target: Target) -> None:
        rows = target.rows()
        row = next(row for row in rows if row["sample_id"] == FIRST)
        grid = Grid((8, 8, 8), 20.0, labels=True)
        path = target.folder / row["labels"]["path"]
        labels = decode(path, grid).stored.copy()
        change(labels)
        path.write_bytes(encode_labels(labels, grid, FIRST, "tiny"))
        if honest:
            row["labels"]["voxel_sha256"] = voxel_digest(labels, grid.affine)
        target.seal(rows)

    return apply


def _exchange(labels: np.ndarray) -> None:
    """As many voxels of each label, at other places."""
    labels[:] = labels[::-1, ::-1]


def _measured(column: str, value: Any) -> Callable[[Target], None]:
    """An attack that says that something else was measured, in the ledger and in the table."""

    def apply(target: Target) -> None:
        target.edit_row(FIRST, lambda row: row["measured"].update({column: value}))
        table = target.folder / "participants.tsv"
        lines = [line.split("\t") for line in table.read_text().splitlines()]
        place = lines[0].index(column)
        next(line for line in lines if line[0] == f"sub-{FIRST}")[place] = verify.cell(value)
        table.write_bytes(verify.table_bytes(lines))
        target.seal()

    return apply


def _split(target: Target) -> None:
    """A subject moves from one split to another."""
    table = target.folder / "participants.tsv"
    content = table.read_text()
    assert content.count("\tval\n") == 1
    table.write_text(content.replace("\tval\n", "\ttrain\n"))
    target.seal()


def _picture(target: Target) -> None:
    """A picture in README that shows other images than the release's."""
    shape = np.asarray(PilImage.open(target.folder / verify.PREVIEW)).shape
    drawn = np.random.default_rng(1).uniform(0, 1, shape)
    (target.folder / verify.PREVIEW).write_bytes(encode_picture(drawn, "preview", "tiny")[0])
    target.seal()


def _unmeasured(row: dict[str, Any]) -> None:
    row.pop("measured")
    row.pop("labels")


SEALED_AGAIN = {
    "a label map with more of a structure": Attack(_labels(lambda labels: labels.__setitem__(0, 1)), 5, "labels"),
    "a label that no structure has": Attack(_labels(lambda labels: labels.__setitem__(0, 2)), 5, "labels"),
    "a label map that the ledger does not hold": Attack(_labels(_exchange, honest=False), 5, "labels"),
    "a volume that the label map does not have": Attack(_measured("dark_ml_segmented", 1234.5), 5, "labels"),
    "a level that no covariate has": Attack(_measured("sex_measured", "X"), 4, "measured"),
    "a measurement with more digits than are told": Attack(_measured("age_measured", 50.12345678), 4, "measured"),
    "another split": Attack(_split, 2, "participants"),
    "another picture": Attack(_picture, 5, "previews"),
    "no word of what was measured": Attack(lambda t: _all_rows(t, _unmeasured), 4, "measured"),
    "another citation": Attack(
        lambda t: (
            (t.folder / "CITATION.cff").write_text(
                (t.folder / "CITATION.cff").read_text().replace("A. Author", "X. Y")
            ),
            t.seal(),
        ),
        4,
        "described",
    ),
    "another lookup table": Attack(
        lambda t: ((t.folder / "dseg.tsv").write_text("index\tname\n1\tbright_ml\n"), t.seal()), 4, "described"
    ),
    "another subject's key": Attack(lambda t: t.edit_row(FIRST, lambda r: _reuse(r, t)), 4, "unique"),
    "another subject's key does not follow from the seed": Attack(
        lambda t: t.edit_row(FIRST, lambda r: _reuse(r, t)), 4, "seed-keys"
    ),
    "a key that was picked": Attack(lambda t: t.edit_row(FIRST, _pick_key), 4, "seed-keys"),
    "another root of the seeds": Attack(
        lambda t: t.edit_row(FIRST, lambda r: r.update(cohort_root="seed2/syn")), 4, "seed-keys"
    ),
    "noise of another key": Attack(lambda t: t.edit_row(FIRST, lambda r: r.update(noise_sha256="0" * 64)), 4, "noise"),
    "a hidden attempt": Attack(lambda t: t.edit_row(AGAIN, lambda r: r["privacy"].update(attempts=1)), 4, "attempts"),
    "more attempts than allowed": Attack(
        lambda t: t.edit_row(GIVEN_UP, lambda r: r["privacy"].update(attempts=9)), 4, "attempts"
    ),
    "a rejected subject, with row and key": Attack(_slip_in, 4, "verdict"),
    "a rejected subject, against the private ledger": Attack(_slip_in, 4, "private-ledger"),
    "an age out of the range": Attack(lambda t: _shift_age(t, 130.0), 4, "covariates"),
    "an age that the plan excludes": Attack(lambda t: _shift_age(t, 22.0), 4, "covariates"),
    "another sampler in one row": Attack(
        lambda t: t.edit_row(FIRST, lambda r: r.update(recipe=r["recipe"] | {"sampler": "ddpm"})), 4, "recipe"
    ),
    "another guidance in all rows": Attack(
        lambda t: _all_rows(t, lambda r: r["recipe"].update(guidance_scale=7.5)), 4, "recipe"
    ),
    "another batch size": Attack(lambda t: _all_rows(t, lambda r: r["recipe"].update(batch_size=1)), 4, "recipe"),
    "other steps of the drawing decoder": Attack(
        lambda t: _all_rows(t, lambda r: r["recipe"].update(drawing_steps=7)), 4, "recipe"
    ),
    "guidance at some levels alone": Attack(
        lambda t: _all_rows(t, lambda r: r["recipe"].update(guidance_interval=[0.5, 2.0])), 4, "recipe"
    ),
    "other grey levels": Attack(lambda t: _all_rows(t, lambda r: r["recipe"].update(tone="1" * 64)), 3, "weights"),
    "a decoder of nobody's training": Attack(
        lambda t: _all_rows(t, lambda r: r["recipe"].update(decoder="1" * 64)), 3, "weights"
    ),
    "another checkpoint in one row": Attack(
        lambda t: t.edit_row(FIRST, lambda r: r.update(recipe=r["recipe"] | {"diffusion": "1" * 64})), 3, "weights"
    ),
    "another checkpoint in all rows": Attack(
        lambda t: _all_rows(t, lambda r: r["recipe"].update(autoencoder="1" * 64)), 3, "weights"
    ),
    "a subject forgotten": Attack(lambda t: _forget(t, FIRST), 2, "indices"),
    "the last subject forgotten": Attack(lambda t: _forget(t, LAST), 4, "groups"),
    "other settings in the config": Attack(
        lambda t: (t.edit(bundle.CONFIG, lambda c: c["privacy"].update(level=0.2)), t.seal()), 4, "settings"
    ),
    "another seed in the config": Attack(
        lambda t: (t.edit(bundle.CONFIG, lambda c: c.update(seed="other")), t.seal()), 4, "seed-keys"
    ),
    "a config that is none": Attack(
        lambda t: (t.edit(bundle.CONFIG, lambda c: c.pop("plan")), t.seal()), 0, "readable"
    ),
    "another environment lock": Attack(
        lambda t: ((t.folder / bundle.LOCK).write_text("numpy==1.0\n"), t.seal()), 3, "environment"
    ),
    "a record of another output": Attack(
        lambda t: _edit_record(t, "generate", lambda r: r["outputs"]["out"][0].update(sha256="0" * 64)), 3, "chain"
    ),
    "a record of another input": Attack(
        lambda t: _edit_record(t, "generate", lambda r: r["inputs"]["plan"][0].update(sha256="0" * 64)), 3, "chain"
    ),
    "a record that is missing": Attack(lambda t: (_record(t, "filter").unlink(), t.seal()), 3, "chain"),
    "no record of the cohort": Attack(lambda t: (_record(t, "cohort").unlink(), t.seal()), 3, "ends"),
    "runs in a circle": Attack(_circle, 3, "chain"),
    "a model from elsewhere": Attack(_from_elsewhere("external/model.safetensors"), 3, "chain"),
    "a model from a folder of this machine": Attack(_from_elsewhere("/home/me/model.safetensors"), 3, "chain"),
    "a model that is said to be a config": Attack(_from_elsewhere("config/model.safetensors"), 3, "chain"),
    "images made of nothing": Attack(_keep_inputs("generate", "config"), 3, "sources"),
    "images made without a model": Attack(_keep_inputs("generate", "config", "plan"), 3, "sources"),
    "a filter without limits": Attack(
        _keep_inputs("filter", "config", "plan", "generated", "autoencoder", "decoder", "diffusion"), 3, "sources"
    ),
    "a model trained on nothing": Attack(_keep_inputs("autoencoder", "config", "manifest"), 3, "sources"),
    "images made by another training": Attack(_other_training, 3, "sources"),
    "a record that leads nowhere": Attack(_stray_record, 3, "stray-records"),
    "no privacy report behind the ledger": Attack(
        lambda t: t.edit(bundle.ROOT, lambda r: r["inputs"].pop("privacy/report.json")), 3, "ends", key=False
    ),
    "a record that is none": Attack(lambda t: _edit_record(t, "generate", lambda r: r.pop("inputs")), 0, "readable"),
    "real images, says croissant": Attack(
        lambda t: (t.edit(croissant.NAME, lambda c: c.update({"rai:hasSyntheticData": False})), t.seal(describe=False)),
        4,
        "metadata",
    ),
    "another author in the crate": Attack(
        lambda t: (
            t.edit(crate.NAME, lambda c: next(e for e in c["@graph"] if e["@type"] == "Person").update(name="X")),
            t.seal(describe=False),
        ),
        4,
        "metadata",
    ),
    "a FAIL that was released": Attack(
        lambda t: t.edit(bundle.ROOT, lambda r: r["privacy"].update(verdict="FAIL")), 4, "verdict", key=False
    ),
    "fewer released than the report says": Attack(
        lambda t: t.edit(bundle.ROOT, lambda r: r["privacy"]["counts"].update(released=9)), 4, "verdict", key=False
    ),
    "another picture, old voxel digest": Attack(
        lambda t: t.show(FIRST, _noise_image(0, 1000), honest=False), 5, "voxels"
    ),
    "one voxel": Attack(lambda t: (_flip_voxel(t), t.seal()), 5, "voxels"),
    "moved in space": Attack(
        lambda t: (t.rewrite(FIRST, lambda c: c.__setitem__(slice(292, 296), struct.pack("<f", 3.0))), t.seal()),
        5,
        "voxels",
    ),
    "another verdict": Attack(_privacy(lambda p: p.update(verdict="CONDITIONAL")), 4, "verdict"),
    "nothing was rejected": Attack(_privacy(lambda p: p["counts"].update(rejected=0)), 4, "verdict"),
    "fewer candidates": Attack(_privacy(lambda p: p["counts"].update(candidates=10)), 4, "verdict"),
    "no counts": Attack(_privacy(lambda p: p.update(counts={})), 4, "verdict"),
    "false metadata by another version": Attack(_older, 3, "code"),
    "real scans, says the description": Attack(
        _say("dataset_description.json", lambda c: c.update(Name="Real scans")), 3, "chain"
    ),
    "ages in months": Attack(_say("participants.json", lambda c: c["age"].update(Units="month")), 4, "described"),
    "sexes exchanged": Attack(
        _say("participants.json", lambda c: c["sex"].update(Levels={"F": "male", "M": "female"})), 4, "described"
    ),
    "a patient in the sidecar": Attack(
        _say("T1w.json", lambda c: c.update(Description="T1w of a patient")), 4, "described"
    ),
    "another licence": Attack(
        lambda t: ((t.folder / "LICENSE").write_text("All rights reserved."), t.seal()), 4, "described"
    ),
    "a cell too many in participants.tsv": Attack(_extra_cell, 2, "participants"),
    "a scan slipped in, in capitals": Attack(_slip_in_as("SUB-real01/T1W.NII.GZ"), 2, "no-strangers"),
    "a scan slipped in, of another format": Attack(_slip_in_as("real.mgz"), 2, "no-strangers"),
    "a run with no settings": Attack(
        lambda t: _edit_record(
            t, "diffusion", lambda r: r.update(config={"sections": [], "sha256": hashlib.sha256(b"{}").hexdigest()})
        ),
        4,
        "settings",
    ),
    "limits raised for one candidate": Attack(_raise_limits(1.0), 4, "private-ledger"),
    "no limits for one candidate": Attack(_raise_limits(None), 4, "private-ledger"),
    "an image shown inverted": Attack(_rewritten(112, struct.pack("<ff", -1.0, 1000.0)), 5, "bytes"),
    "mirrored by its qform": Attack(_mirror, 5, "bytes"),
    "voxels in metres": Attack(_rewritten(123, b"\x01"), 5, "bytes"),
    "voxels of another size": Attack(_rewritten(80, struct.pack("<fff", 1, 1, 1)), 5, "bytes"),
    "a name in the header": Attack(_rewritten(14, b"Jane Doe"), 5, "bytes"),
    "a second header extension": Attack(_second_extension, 5, "bytes"),
    "a name in the header of the compression": Attack(_named, 5, "bytes"),
    "something behind the voxels": Attack(_behind(b"x" * 100, packed=False), 5, "bytes"),
    "much behind the voxels": Attack(_behind(os.urandom(300_000), packed=False), 5, "bytes"),
    "an image that unpacks to 64 MB": Attack(_behind(bytes(1 << 26), packed=False), 5, "bytes"),
    "another file behind the compressed one": Attack(_behind(b"a scan", packed=True), 5, "bytes"),
    "a shape of 2 GB": Attack(_rewritten(40, struct.pack("<4h", 3, 1000, 1000, 1000)), 5, "format"),
    "a mark that is nested deeply": Attack(_deep_mark, 5, "marks"),
    "another subject's picture": Attack(_twin, 5, "twins"),
    "nothing in the picture": Attack(lambda t: t.show(FIRST, np.full((8, 8, 8), 500.0)), 5, "format"),
    "values out of range": Attack(lambda t: t.show(FIRST, _noise_image(0, 3000)), 5, "format"),
    "another shape": Attack(lambda t: t.show(FIRST, _noise_image(0, 1000, (8, 8, 6))), 5, "format"),
    "no image in the file": Attack(_break_image, 5, "decodes"),
    "the mark in the header extension": Attack(_unmark, 5, "marks"),
    "the mark in the description": Attack(lambda t: _describe(t, b"T1 of a patient"), 5, "marks"),
    "another subject's file, with its mark": Attack(
        lambda t: (shutil.copy(t.path(SECOND), t.path(FIRST)), t.seal()), 5, "marks"
    ),
    "the sidecar's mark": Attack(
        lambda t: (t.edit("T1w.json", lambda c: c["Synthesis"].update(Synthetic=False)), t.seal()), 5, "marks"
    ),
}


@pytest.fixture
def target(place: Place, copied: Path) -> Target:
    return Target(place, copied)


def seen(report: Report) -> set[tuple[int, str]]:
    return {(check.level, check.name) for check in report.checks if check.outcome == "finding"}


@pytest.mark.parametrize("name", NAIVE)
def test_a_changed_release_is_seen(target, name):
    attack = NAIVE[name]
    attack.apply(target)
    report = target.audit(attack.key)
    assert (attack.level, attack.check) in seen(report)
    assert not report.passed


@pytest.mark.parametrize("name", SEALED_AGAIN)
def test_a_release_that_was_sealed_again_is_seen(target, name):
    attack = SEALED_AGAIN[name]
    attack.apply(target)
    found = seen(target.audit(key=False))
    assert (attack.level, attack.check) in found
    if attack.key:
        assert {level for level, _ in found} & {1} == set(), (
            "the seal itself is sound, so that it is this check that sees it"
        )
        assert (1, "signature") in seen(target.audit()), "and whoever has the key sees it at once"


def test_sealing_again_alone_is_no_finding_without_the_key(target):
    """Otherwise the attacks above would be seen for the wrong reason."""
    target.seal()
    report = target.audit(key=False)
    assert seen(report) == set()
    assert next(check for check in report.checks if check.name == "signature").text.startswith("UNSIGNED")
    assert (1, "signature") in seen(target.audit())


def test_an_allowed_covariate_that_was_edited_is_seen_with_the_key_alone(target):
    """What only the images themselves could contradict: L6 makes them again; without models the signature is what
    remains.
    """
    _shift_age(target, 55.5)
    assert seen(target.audit(key=False)) == set()
    assert (1, "signature") in seen(target.audit())


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("flat"), dims=2)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("hidden", ["text", "behind", "behind the pixels", "packed otherwise"])
def test_what_a_picture_hides_is_seen(flat, tmp_path, hidden):
    target = Target(flat, Path(shutil.copytree(flat.release, tmp_path / "release")))
    path = target.folder / f"images/{FIRST}.png"
    content = path.read_bytes()
    start, end = content.index(b"IDAT") - 4, content.index(b"IEND") - 4
    pixels = zlib.decompress(content[start + 8 : end - 4])
    path.write_bytes(
        {
            "text": content[:end] + _chunk(b"tEXt", b"Patient\0Jane Doe") + content[end:],
            "behind": content + b"a scan",
            "behind the pixels": content[:start] + _chunk(b"IDAT", zlib.compress(pixels + b"a scan")) + content[end:],
            "packed otherwise": content[:start] + _chunk(b"IDAT", zlib.compress(pixels, 0)) + content[end:],
        }[hidden]
    )
    target.seal()
    assert seen(target.audit(key=False)) == {(5, "packing" if hidden == "packed otherwise" else "bytes")}


def test_making_an_image_again_looks_at_the_released_file(target):
    """Its voxels are those of the ledger, but viewers show it inverted."""
    _rewritten(112, struct.pack("<ff", -1.0, 1000.0))(target)
    report = audit(Request(target.folder, models=target.place.results))
    assert {(5, "bytes"), (6, "images")} <= seen(report)


def test_the_attacks_are_many_and_every_level_up_to_five_sees_some():
    attacks = [*NAIVE.values(), *SEALED_AGAIN.values()]
    assert len(attacks) >= 40
    assert {attack.level for attack in attacks} == set(range(6))


# ------------------------------------------------------------------------------- the verifier without packages


def stand_alone(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a recipient runs it: isolated, without site packages, from a copy that is not in the attacked release."""
    from meddiff_steps.provenance import verify

    copy = Path(shutil.copy(verify.__file__, folder.parent / "verify.py"))
    return subprocess.run(
        [sys.executable, "-I", "-S", str(copy), str(folder), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )


def test_verify_accepts_the_clean_release(place, tmp_path):
    own = place.release / "provenance/verify.py"
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(own), "--key", f"{place.key}.pub", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(done.stdout)
    assert {check["level"] for check in checks} == {0, 1, 2}
    assert [check["name"] for check in checks if check["outcome"] != "pass"] == ["verifier"], (
        "it cannot vouch for itself"
    )
    done = stand_alone(place.release, "--key", f"{place.key}.pub", "--json")
    assert {check["outcome"] for check in json.loads(done.stdout)} == {"pass"}
    assert hashlib.sha256((place.release / "provenance/root.json").read_bytes()).hexdigest() in done.stdout
    assert not (place.release / "provenance/__pycache__").exists()


@pytest.mark.parametrize(
    "name", [name for name, attack in NAIVE.items() if attack.level <= 2 and attack.check not in ("twins",)][::4]
)
def test_verify_sees_what_the_audit_sees(target, name):
    attack = NAIVE[name]
    attack.apply(target)
    done = stand_alone(target.folder, "--json", *(["--key", str(target.key)] if attack.key else []))
    assert done.returncode == 1, done.stderr
    assert (attack.level, attack.check) in {
        (check["level"], check["name"]) for check in json.loads(done.stdout) if check["outcome"] == "finding"
    }


def _pipe(target: Target, name: str) -> None:
    (target.folder / name).unlink()
    os.mkfifo(target.folder / name)


def _link_to(target: Target, name: str, to: str) -> None:
    (target.folder / name).unlink()
    (target.folder / name).symlink_to(to)


NESTED = b"[" * 200_000

#: What should hang, crash or fill the memory of who looks at it: what it does, and the level and check that name it.
HOSTILE: dict[str, tuple[Callable[[Target], Any], int, str]] = {
    "a shard of many rows": (
        lambda t: t.edit(bundle.ROOT, lambda r: r["ledger"]["shards"][0].update(ranges=[[0, 10**11]])),
        1,
        "shard-roots",
    ),
    "a shard of the same rows often": (
        lambda t: t.edit(bundle.ROOT, lambda r: r["ledger"]["shards"][0].update(ranges=[[0, 4]] * 9)),
        1,
        "shard-roots",
    ),
    "a ledger without end": (lambda t: _link_to(t, bundle.LINES, "/dev/zero"), 0, "root-form"),
    "a ledger that is a pipe": (lambda t: _pipe(t, bundle.LINES), 0, "root-form"),
    "a table that is a pipe": (lambda t: _pipe(t, "participants.tsv"), 0, "root-form"),
    "an image without end": (
        lambda t: _link_to(t, t.path(FIRST).relative_to(t.folder).as_posix(), "/dev/zero"),
        0,
        "root-form",
    ),
    "a deep root.json": (lambda t: (t.folder / bundle.ROOT).write_bytes(NESTED), 0, "root-form"),
    "a deep line": (lambda t: _edit_line(t, lambda x: [NESTED[: 1 << 15], *x[1:]]), 0, "rows-form"),
    "a long line": (lambda t: _edit_line(t, lambda x: [b" " * (1 << 21), *x[1:]]), 0, "root-form"),
    "a covariate that is none": (
        lambda t: _edit_line(t, lambda x: [x[0].replace(b'"sex":"', b'"sex":[1],"x":"'), *x[1:]]),
        0,
        "rows-form",
    ),
    "a deep signature": (lambda t: (t.folder / bundle.SIGNATURE).write_bytes(NESTED), 1, "signature"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_release_is_a_finding_and_no_crash(target, name):
    attack, level, check = HOSTILE[name]
    attack(target)
    done = stand_alone(target.folder, "--json", "--key", str(target.key))
    assert done.returncode == 1 and not done.stderr
    assert (level, check) in {
        (one["level"], one["name"]) for one in json.loads(done.stdout) if one["outcome"] == "finding"
    }
    assert (level, check) in seen(target.audit())


def test_deep_files_beside_the_ledger_are_findings(target):
    for name in (bundle.CONFIG, _record(target, "generate").relative_to(target.folder).as_posix()):
        (target.folder / name).write_bytes(NESTED)
    assert (0, "readable") in seen(target.audit())


def test_words_of_a_stranger_cannot_draw_on_the_terminal(target):
    target.edit(bundle.ROOT, lambda root: root["privacy"].update(verdict="\x1b[2J\nL1  PASS"))
    _edit_line(
        target, lambda lines: [lines[0].replace(b'"decision":"released"', b'"decision":"\\u001b[2J"'), *lines[1:]]
    )
    done = stand_alone(target.folder)
    assert "\x1b" not in done.stdout and "\\x1b[2J" in done.stdout
    assert not any("\x1b" in f"{check.text}{check.examples}" for check in target.audit().checks)


def test_a_proof_needs_nothing_but_root_and_image(place, tmp_path):
    proof, folder = tmp_path / "proof.json", tmp_path / "part"
    written = subprocess.run(
        [sys.executable, "-m", "meddiff_steps", "prove", FIRST, str(place.release), "--out", str(proof)],
        capture_output=True,
        text=True,
    )
    assert written.returncode == 0, written.stderr
    image = f"sub-{FIRST}/anat/sub-{FIRST}_T1w.nii.gz"
    for name in (bundle.ROOT, bundle.SIGNATURE, image):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(place.release / name, folder / name)

    def outcomes() -> tuple[int, dict[str, str]]:
        done = stand_alone(folder, "--proof", str(proof), "--key", f"{place.key}.pub", "--json")
        return done.returncode, {check["name"]: check["outcome"] for check in json.loads(done.stdout)}

    good = dict.fromkeys(("root-form", "signature", "proof", "image"), "pass")
    assert outcomes() == (0, good)
    _flip(folder / image, 60)
    assert outcomes() == (1, good | {"image": "finding"})
    (folder / image).unlink()
    assert outcomes() == (0, good | {"image": "not run"})
    content = json.loads(proof.read_text())
    write_json(proof, content | {"record": content["record"].replace(FIRST, SECOND)})
    assert outcomes() == (1, good | {"proof": "finding", "image": "not run"})
    write_json(proof, content)
    root = json.loads((folder / bundle.ROOT).read_text())
    write_json(folder / bundle.ROOT, root | {"study": "other"})
    assert outcomes() == (1, good | {"signature": "finding", "image": "not run"})


def test_verify_that_cannot_run_says_so(tmp_path, place):
    assert stand_alone(tmp_path / "none").returncode == 2
    done = stand_alone(tmp_path)
    assert done.returncode == 2 and "not a release" in done.stderr
    (tmp_path / "bad.pub").write_text("no key")
    done = stand_alone(Path(shutil.copytree(place.release, tmp_path / "release")), "--key", str(tmp_path / "bad.pub"))
    assert done.returncode == 2 and "not a public key" in done.stderr
