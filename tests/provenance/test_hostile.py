"""Releases that somebody made to deceive, to hide something, to be executed, or to hang or crash who audits them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tomllib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_tampering import FIRST, SECOND, Attack, Target, _chunk, _record, seen, stand_alone
from tiny_release import Place

import meddiff_steps
from meddiff_steps.audit import form
from meddiff_steps.audit.reexecution import choose, most_bad
from meddiff_steps.audit.request import Request
from meddiff_steps.audit.run import audit
from meddiff_steps.config import Release
from meddiff_steps.core.files import sha256_file, write_json
from meddiff_steps.core.random_streams import philox
from meddiff_steps.provenance import lineage, signature, verify
from meddiff_steps.release import crate, croissant
from meddiff_steps.release import seal as bundle

CHECKOUT = Path(meddiff_steps.__file__).parents[1]


@pytest.fixture
def target(place: Place, copied: Path) -> Target:
    return Target(place, copied)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("flat"), dims=2)


def found_alone(folder: Path, *arguments: str) -> set[tuple[int, str]]:
    """What verify.py finds."""
    done = stand_alone(folder, "--json", *arguments)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    return {(one["level"], one["name"]) for one in json.loads(done.stdout) if one["outcome"] == "finding"}


def reseal(target: Target, *names: str) -> None:
    """Repair the digests of some files in root.json, and nothing else."""
    root = target.json(bundle.ROOT)
    for name in names:
        content = (target.folder / name).read_bytes()
        root["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(target.folder / bundle.ROOT, root | {"signer": None})
    (target.folder / bundle.SIGNATURE).unlink(missing_ok=True)


def rewrite(target: Target, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of a file, and repair its digest."""
    path = target.folder / name
    path.write_bytes(change(path.read_bytes()))
    if name != bundle.ROOT:
        reseal(target, name)


# ----------------------------------------------------------------------- auditing runs nothing of the release


def _in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("module", ["tqdm", "logging", "typer", "numpy", "meddiff_steps_plugin"])
def test_modules_that_lie_in_the_release_are_not_run(copied, tmp_path, module):
    (copied / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    done = _in(copied, "-m", "meddiff_steps", "audit", ".")
    assert done.returncode == 1 and f"{module}.py" in done.stdout, done.stderr
    assert not (tmp_path / "ran").exists()


def test_nor_is_a_package_of_our_own_name_with_the_documented_commands(copied, tmp_path):
    (copied / "meddiff_steps").mkdir()
    for name in ("__init__", "__main__"):
        (copied / f"meddiff_steps/{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for command in (["-P", "-m", "meddiff_steps"], ["-I", str(verify.__file__)]):
        done = _in(copied, *command, *(["audit"] if "-P" in command else []), ".")
        assert done.returncode == 1 and "meddiff_steps/__main__.py" in done.stdout, done.stderr
    scripts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"meddiff-steps": "meddiff_steps.__main__:main", "meddiff": "meddiff_steps.command.app:main"}
    text = (CHECKOUT / "docs/audit.md").read_text()
    assert "meddiff-steps audit" in text and "python -P -m meddiff_steps audit" in text
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ the sample


def test_the_sample_is_new_each_time_and_can_be_drawn_again(place):
    assert Request(place.release).seed != Request(place.release).seed
    rows = [{"sample_id": f"{i:03}"} for i in range(200)]
    draws = {tuple(row["sample_id"] for row in choose(rows, 5, Request(place.release).seed, "x")) for _ in range(5)}
    assert len(draws) == 5
    assert choose(rows, 5, "known", "x") == choose(rows, 5, "known", "x")


def test_the_bound_is_true_of_samples_as_they_are_drawn():
    """Of releases with one image more than the bound allows, at most 5 % of the samples are clean."""
    rows = [{"sample_id": str(i)} for i in range(100)]
    bad = round(100 * most_bad(100, 20)) + 1
    clean = sum(
        all(int(row["sample_id"]) >= bad for row in choose(rows, 20, str(seed), "images")) for seed in range(2000)
    )
    assert clean / 2000 <= 0.05 + 3 * (0.05 * 0.95 / 2000) ** 0.5
    assert math.ceil(round(1000 * most_bad(200, 20), 6)) / 10 == 13.0
    assert philox("a", "audit/images").integers(100) == philox("a", "audit/images").integers(100)


# ----------------------------------------------------------------------------- versions and files that are missing


@pytest.mark.parametrize("name", sorted({*verify.RELEASE, *verify.DATASET, "T1w.json", ".bidsignore"} - {verify.LINES}))
def test_a_file_that_every_release_has_cannot_be_left_out(target, name):
    (target.folder / name).unlink()
    root = target.json(bundle.ROOT)
    del root["files"][name]
    write_json(target.folder / bundle.ROOT, root | {"signer": None})
    (target.folder / bundle.SIGNATURE).unlink()
    assert (2, "no-missing") in found_alone(target.folder)
    assert (2, "no-missing") in seen(target.audit(key=False))


@pytest.mark.parametrize("version", ["0.1.0", "0.0.9", "99.0.0", "none"])
def test_no_version_that_a_release_names_changes_what_is_found(target, version):
    target.edit("T1w.json", lambda content: content.update(Description="T1w of a patient"))
    target.edit(croissant.NAME, lambda content: content.update({"rai:hasSyntheticData": False}))
    target.seal(describe=False)
    target.edit(bundle.ROOT, lambda root: root["software"].update(version=version))
    assert {(0, "version"), (4, "metadata"), (4, "described")} <= seen(target.audit(key=False))


# ------------------------------------------------------------------------------------------- one canonical form

JSONS = (bundle.ROOT, bundle.CONFIG, croissant.NAME, crate.NAME, verify.DESCRIPTION, "participants.json", "T1w.json")
SPELLINGS: dict[str, Callable[[bytes], bytes]] = {
    "a key twice": lambda c: c.replace(b"{", b'{"Description": "Real scans of patients",', 1),
    "blanks": lambda c: c + b" " * 100,
    "no line end": lambda c: c[:-1],
    "a mark of byte order": lambda c: b"\xef\xbb\xbf" + c,
    "other blanks": lambda c: json.dumps(json.loads(c), sort_keys=True).encode(),
    "another order": lambda c: json.dumps(dict(reversed(json.loads(c).items())), indent=1).encode() + b"\n",
    "letters as numbers": lambda c: (
        c.replace(b"e", b"\\u0065", 1) if b'"e' not in c else c.replace(b'"e', b'"\\u0065', 1)
    ),
    "a number that is none": lambda c: c.replace(b"{", b'{"x": NaN,', 1),
    "a number without end": lambda c: c.replace(b"{", b'{"x": 1e999,', 1),
    "a huge number": lambda c: c.replace(b"{", b'{"x": 1' + b"0" * 400 + b",", 1),
    "half a character": lambda c: c.replace(b"{", b'{"x": "\\ud800",', 1),
}


@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_json_is_written_in_one_way(target, name, spelling):
    rewrite(target, name, SPELLINGS[spelling])
    report = target.audit(key=False)
    expected = {
        bundle.ROOT: {(0, "root-form")},
        bundle.CONFIG: {(0, "readable")},
        croissant.NAME: {(4, "metadata")},
        crate.NAME: {(4, "metadata")},
    }.get(name, {(4, "described"), (4, "metadata"), (5, "marks"), (3, "chain")})
    assert seen(report) & expected, report.checks


def test_records_are_written_in_one_way_and_named_for_what_they_are_of(target):
    path = _record(target, "generate").relative_to(target.folder).as_posix()
    for change in SPELLINGS.values():
        kept = (target.folder / path).read_bytes()
        rewrite(target, path, change)
        assert (0, "readable") in seen(target.audit(key=False))
        (target.folder / path).write_bytes(kept)
    (target.folder / path).rename(target.folder / bundle.RECORDS / "jane-doe.json")
    target.seal()
    assert (0, "readable") in seen(target.audit(key=False))


FORGED_RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a field too many": lambda r: r.update(patients=["Jane Doe"]),
    "times and host": lambda r: r.update(volatile={"host": "here"}),
    "no outputs": lambda r: r.update(outputs={}),
    "sections that are no text": lambda r: r["config"].update(sections=[1]),
    "a lock that is none": lambda r: r["environment"].update(lock_sha256=["x"]),
    "a file with more to it": lambda r: r["outputs"]["out"][0].update(patient="Jane Doe"),
    "a digest that is none": lambda r: r["inputs"]["plan"][0].update(sha256="Jane Doe"),
    "parameters that are none": lambda r: r["parameters"].update(shard=[[]]),
    "code that is none": lambda r: r["code"].update(commit=7),
}


@pytest.mark.parametrize("name", FORGED_RECORDS)
def test_records_have_one_form(target, name):
    path = _record(target, "generate").relative_to(target.folder).as_posix()
    target.edit(path, FORGED_RECORDS[name])
    reseal(target, path)
    assert (0, "readable") in seen(target.audit(key=False))


FORGED_ROOTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a field too many": lambda r: r.update(patients="Jane Doe"),
    "a field too many below": lambda r: r["ledger"].update(patients="Jane Doe"),
    "a shard with more to it": lambda r: r["ledger"]["shards"][0].update(patients="Jane Doe"),
    "a path with a NUL": lambda r: r["files"].update({"a\0b": {"bytes": 1, "sha256": "0" * 64}}),
    "a path with a line end": lambda r: r["files"].update({"a\nb": {"bytes": 1, "sha256": "0" * 64}}),
    "a version that is none": lambda r: r["software"].update(version=["x"]),
    "rows below zero": lambda r: r["ledger"].update(rows=-1),
    "rows without end": lambda r: r["ledger"].update(rows=10**12),
    "true rows": lambda r: r["ledger"].update(rows=True),
    "counts that are texts": lambda r: r["privacy"]["counts"].update(released="Jane Doe"),
    "inputs that are lists": lambda r: r["inputs"].update({"plan.parquet": []}),
    "no signer": lambda r: r.pop("signer"),
}


@pytest.mark.parametrize("name", FORGED_ROOTS)
def test_root_json_has_one_form(target, name):
    target.edit(bundle.ROOT, FORGED_ROOTS[name])
    assert (0, "root-form") in found_alone(target.folder)
    assert (0, "root-form") in seen(target.audit(key=False))


def _repack(target: Target, change: Callable[[bytes], bytes], names: tuple[str, ...] = (FIRST,)) -> None:
    for name in names:
        target.path(name).write_bytes(change(target.path(name).read_bytes()))
    target.seal()


def _with_empty_blocks(packed: bytes) -> bytes:
    """The same content, with a thousand empty blocks in its stream, of which there are several kinds."""
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    content = packer.compress(gzip.decompress(packed))
    return content + b"".join(packer.flush(zlib.Z_FULL_FLUSH) for _ in range(1000)) + packer.flush()


def _quaternion(target: Target) -> None:
    target.rewrite(FIRST, lambda c: struct.pack_into("<I", c, 256, int.from_bytes(b"Jan", "big")))
    target.seal()


def _table(target: Target, change: Callable[[bytes], bytes]) -> None:
    path = target.folder / bundle.TABLE
    path.write_bytes(change(path.read_bytes()))
    reseal(target, bundle.TABLE)


def _gap(content: bytes) -> bytes:
    footer = content[-8 - int.from_bytes(content[-8:-4], "little") :]
    return content[: -len(footer)] + b"Jane Doe" * 100 + footer


def _parquet_again(target: Target, **settings: Any) -> None:
    path = target.folder / bundle.TABLE
    pq.write_table(pq.read_table(path).replace_schema_metadata({"patients": "Jane Doe"}), path, **settings)
    reseal(target, bundle.TABLE)


def _bomb(target: Target) -> None:
    path = target.folder / bundle.TABLE
    table = pq.read_table(path)
    groups = pa.array(["a" * (1 << 28), *table["group"].to_pylist()[1:]])
    table = table.set_column(table.schema.get_field_index("group"), "group", groups)
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    reseal(target, bundle.TABLE)


#: Said to have passed, though the limit lies in the interval.
CONDITIONAL = {
    "name": "membership, distance, aligned",
    "limit": 0.6,
    "outcome": "PASS",
    "figure": {"value": 0.58, "low": 0.52, "high": 0.64},
}


def _facts(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        described = json.loads(content)
        change(described["Facts"])
        return verify.json_bytes(described, ascii_only=False)

    return apply


def _test(privacy: dict[str, Any], name: str) -> dict[str, Any]:
    return next(gate for gate in privacy["gates"] if gate["name"] == name)


HIDDEN: dict[str, Attack] = {
    "machine and level in the header of the compression": Attack(
        lambda t: _repack(t, lambda c: c[:8] + b"JD" + c[10:]), 5, "bytes"
    ),
    "a time in the header of the compression": Attack(
        lambda t: _repack(t, lambda c: c[:4] + b"JDoe" + c[8:]), 5, "bytes"
    ),
    "another level of compression": Attack(
        lambda t: _repack(t, lambda c: c[:10] + gzip.compress(gzip.decompress(c), 9, mtime=0)[10:]), 5, "packing"
    ),
    "empty blocks in the compression": Attack(lambda t: _repack(t, _with_empty_blocks), 5, "packing"),
    "text in the quaternion": Attack(_quaternion, 5, "bytes"),
    "metadata of the table": Attack(_parquet_again, 0, "twins"),
    "another compression of the table": Attack(lambda t: _parquet_again(t, compression="none"), 0, "twins"),
    "a gap in the table": Attack(lambda t: _table(t, _gap), 0, "twins"),
    "bytes before the table": Attack(lambda t: _table(t, lambda c: c[:4] + b"Jane Doe" + c[4:]), 0, "twins"),
    "a table that says it is by another pyarrow, and holds more": Attack(
        lambda t: _table(t, lambda c: _gap(re.sub(rb"arrow version [0-9]+", b"arrow version 77", c)) + c * 9),
        0,
        "twins",
    ),
    "a table that unpacks to much": Attack(_bomb, 0, "twins"),
    "line ends of Windows in participants.tsv": Attack(
        lambda t: rewrite(t, "participants.tsv", lambda c: c.replace(b"\n", b"\r\n")), 2, "participants"
    ),
    "line ends of old in participants.tsv": Attack(
        lambda t: rewrite(t, "participants.tsv", lambda c: c.replace(b"\n", b"\r")), 2, "participants"
    ),
    "quotes in participants.tsv": Attack(
        lambda t: rewrite(t, "participants.tsv", lambda c: c.replace(b"\tF\t", b'\t"F"\t')), 2, "participants"
    ),
    "a line too many in participants.tsv": Attack(
        lambda t: rewrite(t, "participants.tsv", lambda c: c + b"\n"), 2, "participants"
    ),
    "digits too many in participants.tsv": Attack(
        lambda t: rewrite(t, "participants.tsv", lambda c: re.sub(rb"\t(\d+\.\d+)", rb"\t\g<1>0", c, count=1)),
        2,
        "participants",
    ),
    "no line end in the ledger": Attack(lambda t: rewrite(t, bundle.LINES, lambda c: c[:-1]), 0, "canonical"),
    "numbers of the ledger otherwise": Attack(
        lambda t: rewrite(t, bundle.LINES, lambda c: c.replace(b'"guidance_scale":1,', b'"guidance_scale":1.0,')),
        0,
        "canonical",
    ),
    "another README": Attack(
        lambda t: rewrite(t, "README.md", lambda c: c.replace(b"Verdict: PASS", b"Verdict: CONDITIONAL")),
        4,
        "described",
    ),
    "another history": Attack(lambda t: rewrite(t, "CHANGES", lambda c: c + b"Jane Doe\n"), 4, "described"),
    "another .bidsignore": Attack(lambda t: rewrite(t, ".bidsignore", lambda c: b"*\n"), 4, "described"),
    "another program": Attack(lambda t: rewrite(t, bundle.VERIFIER, lambda c: b"print('all is well')"), 1, "verifier"),
    "a study of another name": Attack(
        lambda t: (
            t.edit(bundle.ROOT, lambda r: r.update(study="ukbiobank", signer=None))
            or (t.folder / bundle.SIGNATURE).unlink()
        ),
        4,
        "verdict",
    ),
    "more than facts": Attack(
        lambda t: rewrite(t, verify.DESCRIPTION, _facts(lambda f: f.update(patients=["Jane Doe"]))), 4, "described"
    ),
    "more than a figure": Attack(
        lambda t: rewrite(t, verify.DESCRIPTION, _facts(lambda f: f["cohort"].update(scans={"Jane": "Doe"}))),
        4,
        "described",
    ),
    "a better outcome of a test": Attack(
        lambda t: rewrite(t, verify.DESCRIPTION, _facts(lambda f: f["privacy"]["gates"].append(CONDITIONAL))),
        4,
        "verdict",
    ),
    **{
        f"privacy: {name}": Attack(
            lambda t, change=change: rewrite(t, verify.DESCRIPTION, _facts(lambda f: change(f["privacy"]))),
            4,
            "verdict",
        )
        for name, change in {
            "no tests at all": lambda p: p["gates"].clear(),
            "a test left out": lambda p: p["gates"].remove(_test(p, "membership, distance, latent")),
            "a test twice": lambda p: p["gates"].append(_test(p, "calibrated")),
            "a limit that the study does not have": lambda p: _test(p, "membership, distance, latent").update(
                limit=1.0, figure={"value": 0.95, "low": 0.93, "high": 0.97}
            ),
            "few people that calibrate": lambda p: (
                _test(p, "calibrated").update(figure={"value": 3}) or p["calibration"].update(subjects=3)
            ),
            "few people that are enough": lambda p: p["calibration"].update(subjects=3, needed=3),
            "another level": lambda p: p["calibration"].update(level=0.5),
            "a detector less": lambda p: p["calibration"]["detectors"].pop(),
            "copies that nothing finds": lambda p: _test(p, "planted copies are found")["figure"].update(value=0.0),
            "strangers that are flagged": lambda p: _test(p, "strangers are not flagged")["figure"].update(value=0.5),
            "subjects without images": lambda p: _test(p, "planned subjects are filled").update(outcome="FAIL"),
        }.items()
    },
    "another number of a shard": Attack(
        lambda t: (t.edit(bundle.ROOT, lambda r: r["ledger"]["shards"][0].update(shard=7)), reseal(t)), 1, "shard-roots"
    ),
    "empty ranges of a shard": Attack(
        lambda t: (t.edit(bundle.ROOT, lambda r: r["ledger"]["shards"][0]["ranges"].append([9, 9])), reseal(t)),
        1,
        "shard-roots",
    ),
    "no day": Attack(
        lambda t: (t.edit(croissant.NAME, lambda c: c.update(datePublished="2026-13-77")), t.seal()), 4, "metadata"
    ),
    "another day": Attack(
        lambda t: (t.edit(croissant.NAME, lambda c: c.update(datePublished="Jane Doe")), t.seal()), 4, "metadata"
    ),
    "values of the config that are left out": Attack(
        lambda t: (t.edit(bundle.CONFIG, lambda c: c["privacy"].pop("level")), t.seal()), 0, "readable"
    ),
    "values of the config as text": Attack(
        lambda t: (t.edit(bundle.CONFIG, lambda c: c["privacy"].update(level=str(c["privacy"]["level"]))), t.seal()),
        0,
        "readable",
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_nothing_is_hidden_in_how_a_file_is_written(target, name):
    attack = HIDDEN[name]
    attack.apply(target)
    found = seen(target.audit(key=False))
    assert (attack.level, attack.check) in found
    if attack.check in ("participants", "verifier"):
        assert (attack.level, attack.check) in found_alone(target.folder)


STRANGE = [
    *("patients.csv", "real01.nii.bz2", "real01.mif", "real01.zip", "README.txt", "readme", "Licence", "T2w.json"),
    *("provenance/sub-real01/anat/real.dat", "provenance/records/real01.nii.gz", "provenance/records/.hidden.json"),
    *("code/run.sh", "sub-syn000000/anat/sub-syn000000_T1w.json", "images/syn000000.png", "phenotype/a.tsv"),
    *("SHA256SUMS", "shard-syn-0000/README.md", "n\u00e9e.txt", "provenance/keys/a.pub", "provenance/verify.pyc"),
]


@pytest.mark.parametrize("name", STRANGE)
def test_only_files_that_a_release_has_can_be_sealed(target, name):
    (target.folder / name).parent.mkdir(parents=True, exist_ok=True)
    (target.folder / name).write_text("Jane Doe")
    reseal(target, name)
    assert (2, "no-strangers") in found_alone(target.folder)
    assert (2, "no-strangers") in seen(target.audit(key=False))


def test_names_that_some_systems_take_for_one_are_seen(target):
    for name in ("n\u00e9e.txt", "ne\u0301e.txt", "stra\u00dfe.txt", "STRASSE.txt"):
        (target.folder / name).write_text(name)
    target.seal()
    found = next(check for check in target.audit(key=False).checks if check.name == "no-case-clash")
    assert found.outcome == "finding" and len(found.examples) == 2


@pytest.mark.parametrize(
    "path", ["images/x.png", "sub-x/anat/Jane-Doe.json", "patient/sub-syn000000/anat/sub-syn000000_T1w.nii.gz"]
)
def test_an_image_lies_at_its_place(target, path):
    target.edit_row(FIRST, lambda row: None)
    (target.folder / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(target.path(FIRST), target.folder / path)
    rows = target.rows()
    next(row for row in rows if row["sample_id"] == FIRST)["image"]["path"] = path
    target.seal(rows, describe=False)
    assert (0, "rows-form") in found_alone(target.folder) and (0, "rows-form") in seen(target.audit(key=False))


def test_suffixes_are_those_of_studies():
    assert get_args(Release.model_fields["suffix"].annotation) == verify.SUFFIXES


@pytest.mark.parametrize("hidden", ["checksums", "pieces", "order", "empty"])
def test_what_the_chunks_of_a_picture_hide_is_seen(flat, tmp_path, hidden):
    target = Target(flat, Path(shutil.copytree(flat.release, tmp_path / "release")))
    path = target.folder / f"images/{FIRST}.png"
    content = path.read_bytes()
    start, end = content.index(b"IDAT") - 4, content.index(b"IEND") - 4
    pixels, before, after = content[start + 8 : end - 4], content[:start], content[end:]
    texts = before[33:]
    path.write_bytes(
        {
            "checksums": before + _chunk(b"IDAT", pixels)[:-4] + b"Jane" + after,
            "pieces": before + _chunk(b"IDAT", pixels[:5]) + _chunk(b"IDAT", pixels[5:]) + after,
            "order": before[:33] + _chunk(b"IDAT", pixels) + texts + after,
            "empty": before + _chunk(b"IDAT", pixels) + _chunk(b"IDAT", b"") * 100 + after,
        }[hidden]
    )
    target.seal()
    assert seen(target.audit(key=False)) & {(5, "bytes"), (5, "packing")}


def test_another_zlib_is_no_finding_but_said(target):
    """All images are packed otherwise: that may be the machine.  What then is not compared is said."""
    rows = [row["sample_id"] for row in target.rows() if row["image"]]
    paths = [target.folder / row["image"]["path"] for row in target.rows() if row["image"]]
    assert len(rows) == len(paths)
    for path in paths:
        path.write_bytes(path.read_bytes()[:10] + gzip.compress(gzip.decompress(path.read_bytes()), 9, mtime=0)[10:])
    target.seal()
    report = target.audit(key=False)
    assert seen(report) == set()
    noted = next(check for check in report.checks if check.name == "packing")
    assert noted.outcome == "note" and zlib.ZLIB_RUNTIME_VERSION in noted.text


def test_another_pyarrow_is_no_finding_but_said(target, monkeypatch):
    monkeypatch.setattr(form.pa, "__version__", "1.2.3")
    path = target.folder / bundle.TABLE
    path.write_bytes(re.sub(rb"(arrow version )([0-9]+)", rb"\g<1>77", path.read_bytes()))
    target.seal()
    path.write_bytes(re.sub(rb"(arrow version )([0-9]+)", rb"\g<1>77", path.read_bytes()))
    reseal(target, bundle.TABLE)
    noted = next(check for check in target.audit(key=False).checks if check.name == "twins")
    assert noted.outcome == "note" and "pyarrow 77" in noted.text


# ------------------------------------------------------------------------------------------------ the envelope


def _envelope(target: Target, change: Callable[[dict[str, Any]], Any]) -> None:
    target.edit(bundle.SIGNATURE, change)


def _sign_again(target: Target, change: Callable[[dict[str, Any]], Any]) -> None:
    """The publisher signs a statement that says something else."""
    envelope = target.json(bundle.SIGNATURE)
    statement = json.loads(base64.b64decode(envelope["payload"]))
    change(statement)
    write_json(target.folder / bundle.SIGNATURE, signature.sign(statement, signature.load_private(target.place.key)))


ENVELOPES: dict[str, Callable[[Target], Any]] = {
    "a field too many": lambda t: _envelope(t, lambda e: e.update(patients=["Jane Doe"])),
    "a field too many in the signature": lambda t: _envelope(t, lambda e: e["signatures"][0].update(cert="Jane Doe")),
    "many signatures": lambda t: _envelope(t, lambda e: e.update(signatures=e["signatures"] * 20_000)),
    "two signatures": lambda t: _envelope(t, lambda e: e.update(signatures=e["signatures"] * 2)),
    "no signature": lambda t: _envelope(t, lambda e: e.update(signatures=[])),
    "another key's name": lambda t: _envelope(t, lambda e: e["signatures"][0].update(keyid="0" * 64)),
    "another type of payload": lambda t: _envelope(t, lambda e: e.update(payloadType="text/plain")),
    "padding": lambda t: _envelope(t, lambda e: e["signatures"][0].update(sig=e["signatures"][0]["sig"][:-3] + "B==")),
    "blanks in the payload": lambda t: _envelope(t, lambda e: e.update(payload=e["payload"] + "\n")),
    "blanks": lambda t: (t.folder / bundle.SIGNATURE).write_text(json.dumps(t.json(bundle.SIGNATURE))),
    "no JSON": lambda t: (t.folder / bundle.SIGNATURE).write_bytes(t.path(FIRST).read_bytes() * 4),
    "a list": lambda t: (t.folder / bundle.SIGNATURE).write_text("[]\n"),
    "another predicate": lambda t: _sign_again(t, lambda s: s.update(predicateType="https://example.org/v1")),
    "another kind of statement": lambda t: _sign_again(t, lambda s: s.update(_type="https://example.org/v1")),
    "more in the predicate": lambda t: _sign_again(t, lambda s: s["predicate"].update(patients="Jane Doe")),
    "another subject beside": lambda t: _sign_again(t, lambda s: s["subject"].append(s["subject"][0])),
    "other settings": lambda t: _sign_again(
        t, lambda s: s["predicate"]["buildDefinition"]["externalParameters"].update(seed="another")
    ),
}


@pytest.mark.parametrize("name", ENVELOPES)
def test_an_envelope_holds_nothing_but_the_signature(target, name):
    """Both programs find the same, with the key and without."""
    ENVELOPES[name](target)
    for key in (True, False):
        assert (1, "signature") in seen(target.audit(key))
        assert (1, "signature") in found_alone(target.folder, *(["--key", str(target.key)] if key else []))


def test_an_unsigned_release_has_no_envelope(target):
    kept = (target.folder / bundle.SIGNATURE).read_bytes()
    target.seal()
    (target.folder / bundle.SIGNATURE).write_bytes(kept)
    assert {(1, "signature"), (2, "no-orphans")} <= seen(target.audit(key=False)) & found_alone(target.folder)


#: Encodings of the points of order 1, 2, 4 and 8 of edwards25519, and two that are not reduced.
SMALL = [
    *("01" + "00" * 31, "ec" + "ff" * 30 + "7f", "00" * 32, "00" * 31 + "80"),
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    *("ee" + "ff" * 30 + "7f", "ed" + "ff" * 30 + "7f"),
]


@pytest.mark.parametrize("point", SMALL)
def test_a_key_by_which_anybody_could_sign_is_refused(place, tmp_path, point):
    der = bytes.fromhex("302a300506032b6570032100" + point)
    path = tmp_path / "weak.pub"
    path.write_text(f"-----BEGIN PUBLIC KEY-----\n{base64.b64encode(der).decode()}\n-----END PUBLIC KEY-----\n")
    with pytest.raises(verify.Unreadable, match="small order|not a point"):
        verify.read_public_key(path)
    done = stand_alone(Path(shutil.copytree(place.release, tmp_path / "release")), "--key", str(path))
    assert done.returncode == 2 and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------ bounded work

SIZED = [bundle.ROOT, bundle.SIGNATURE, *verify.RELEASE, *verify.DATASET, "T1w.json", ".bidsignore"]


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", sorted({*SIZED, "record", "image"}))
def test_a_file_of_64_gigabytes_that_takes_no_space_is_not_read(target, name, sealed):
    path = target.folder / name
    if name == "record":
        path = _record(target, "plan")
    elif name == "image":
        path = target.path(FIRST)
    with open(path, "r+b") as stream:
        stream.truncate(1 << 36)
    name = path.relative_to(target.folder).as_posix()
    root = target.json(bundle.ROOT) if name != bundle.ROOT else {"files": {}}
    if sealed and name in root["files"]:
        root["files"][name]["bytes"] = 1 << 36
        write_json(target.folder / bundle.ROOT, root)
    report = target.audit()
    assert report.found and report.checks
    assert found_alone(target.folder, "--key", str(target.key))


def test_a_run_of_many_files_is_followed_in_time(target):
    """Each of 20,000 files that one run wrote and another read is looked up, not searched."""
    files = [{"path": f"preprocessed/{i}", "bytes": 1, "sha256": "0" * 64} for i in range(20_000)]
    record = json.loads(_record(target, "preprocess").read_text())
    reader = record | {"step": "autoencoder", "inputs": {"images": files}}
    reader["outputs"] = {"out": [files[0] | {"path": "model"}]}
    made = {entry["path"]: record | {"inputs": {}, "outputs": {"out": files}} for entry in files}
    one = next(iter(made.values()))
    found = lineage.trace({"model": "0" * 64}, (dict.fromkeys(made, one) | {"model": reader}).get)
    assert len(found.records) == 20_001 and not found.missing


def test_folders_without_end_are_a_finding(target):
    here = os.getcwd()
    try:
        os.chdir(target.folder)
        for _ in range(120):
            os.mkdir("d" * 50)
            os.chdir("d" * 50)
    finally:
        os.chdir(here)
    assert (0, "root-form") in found_alone(target.folder) and (0, "root-form") in seen(target.audit())


def test_lines_without_end_are_a_finding(target):
    (target.folder / bundle.LINES).write_bytes(b"\n" * 5_000_000)
    assert (0, "root-form") in found_alone(target.folder) and (0, "root-form") in seen(target.audit())


PLANS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no value of the grid": lambda c: c["plan"][1].update(grid={"age": []}),
    "many values of the grid": lambda c: c["plan"][1].update(grid={"age": [50.0] * 300_000}),
    "half a range": lambda c: c["plan"][0].update(where={"age": [50.0]}),
    "a grid of 10^12 voxels": lambda c: c["preprocess"].update(shape=[10_000] * 3),
    "voxels of 10^300 mm": lambda c: c["preprocess"].update(spacing_mm=1e300),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_nobody_made_is_seen(target, name):
    target.edit(bundle.CONFIG, PLANS[name])
    reseal(target, bundle.CONFIG)
    report = target.audit(key=False)
    assert report.found and not report.passed


def test_a_model_that_does_not_load_ends_the_level_and_not_the_audit(place, tmp_path):
    for kind in ("autoencoder", "decoder", "diffusion"):
        shutil.copytree(place.results / kind, tmp_path / kind)
    card = tmp_path / "autoencoder/card.json"
    content = json.loads(card.read_text())
    write_json(card, {name: value for name, value in content.items() if name != "weights_sha256"})
    report = audit(Request(place.release, models=tmp_path, sample=1))
    assert report.status(6) in ("NOT RUN", "FINDINGS", "PASS")
    write_json(card, {})
    report = audit(Request(place.release, models=tmp_path, sample=1))
    assert report.status(6) in ("NOT RUN", "FINDINGS") and not report.passed


@pytest.mark.parametrize("field", ["num_inference_steps", "batch_size"])
def test_a_recipe_that_nobody_could_draw_is_not_drawn(target, field):
    rows = [row | {"recipe": row["recipe"] | {field: 10**9}} for row in target.rows()]
    target.seal(rows)
    report = audit(Request(target.folder, models=target.place.results, sample=1))
    assert report.status(6) == "FINDINGS"
    assert "more than anybody draws" in next(check.text for check in report.checks if check.level == 6)


def test_a_level_that_stops_is_no_pass(place, monkeypatch):
    monkeypatch.setattr("meddiff_steps.audit.content.check_content", lambda release, threads: 1 / 0)
    report = audit(Request(place.release))
    assert report.status(5) == "NOT RUN" and not report.found and not report.passed
    assert "ZeroDivisionError" in next(check.text for check in report.checks if check.level == 5)


@pytest.mark.parametrize("command", ["explain", "diff", "prove", "regenerate"])
def test_commands_on_a_malformed_release_could_not_run(target, command):
    """Exit code 2, in a line, without what a stranger wrote to the terminal; 1 would say that something differs."""
    path = target.folder / bundle.LINES
    row = json.loads(path.read_bytes().splitlines()[0]) | {"recipe": None, "\x1b[2J": 1}
    path.write_bytes(json.dumps(row).encode() + b"\n")
    folder = str(target.folder)
    arguments = {
        "explain": ["sub-syn000000", folder],
        "prove": ["sub-syn000000", folder],
        "diff": [str(target.place.release), folder],
        "regenerate": [folder, "--models", str(target.place.results), "--out", str(target.keep / "again")],
    }[command]
    done = _in(target.keep, "-m", "meddiff_steps", command, *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "\x1b" not in done.stderr + done.stdout


def test_texts_of_strangers_are_cut_short():
    assert len(verify.Check(0, "x", "finding", "a" * 10**6, ["b" * 10**6]).text) < 2000


def test_both_programs_hold_second_images_to_the_same(target):
    shutil.copy(target.path(SECOND), target.path(FIRST))
    assert (1, "images") in seen(target.audit()) & found_alone(target.folder)
    assert sha256_file(target.path(SECOND)) == sha256_file(target.path(FIRST))
