"""The folder `provenance/` of a release: everything that an audit needs and nothing that is private.

    ledger.jsonl, ledger.parquet   the same rows, for any program and for tables
    config.json                    the study, without paths of the machine it ran on
    requirements.lock              the environment
    records/                       the runs that lead to the release (`lineage`)
    verify.py                      checks all of it with Python alone
    root.json                      roots of the ledgers, and size and SHA-256 of every other file of the release
    root.dsse.json                 its signature, if there is a key

Beside the folder, in the release's own: `croissant.json` and `ro-crate-metadata.json`, which describe the release to
programs that know nothing of this one.  They are made of what the release holds by then, so that an audit can make them
again.

`root.json` is written last: its own SHA-256 stands for the release.  The release must be complete before.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddiff_steps import __version__
from meddiff_steps.config import without_paths
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import sha256_file, write_atomic, write_json
from meddiff_steps.core.random_streams import SCHEME as SEED_SCHEME
from meddiff_steps.provenance import ledger, lineage, merkle, record, signature, verify
from meddiff_steps.provenance.ledger import Written
from meddiff_steps.provenance.lineage import read_strictly as read
from meddiff_steps.release import crate, croissant, published
from meddiff_steps.release.layout import unknown_to_bids
from meddiff_steps.release.published import Published

FOLDER = "provenance"
ROOT, SIGNATURE, LINES, TABLE = verify.ROOT, verify.SIGNATURE, verify.LINES, published.TABLE
CONFIG, LOCK, VERIFIER, RECORDS = verify.CONFIG, verify.LOCK, verify.VERIFIER, lineage.FOLDER

#: What the BIDS validator is to leave alone in a release that is one dataset.
IGNORED = "".join(f"/{name}\n" for name in (FOLDER, croissant.NAME, crate.NAME, verify.PREVIEW)).encode()


@dataclass(frozen=True)
class Facts:
    """What a release says of itself beside its ledger.

    Attributes
    ----------
    config
        The whole study, as frozen.
    privacy
        privacy/report.json; verdict and counts are published.
    heads
        SHA-256 by path of the files that the ledger was made from.
    results
        The study's folder, with the records.
    lock
        Lock of the environment.
    """

    config: dict[str, Any]
    privacy: dict[str, Any]
    heads: Mapping[str, str]
    results: Path
    lock: bytes


def prepare(release: Path) -> None:
    """Remove what an earlier run left in `provenance/` and of metadata: without root.json a release claims nothing."""
    for name in (ROOT, crate.NAME, croissant.NAME):
        (release / name).unlink(missing_ok=True)
    shutil.rmtree(release / FOLDER, ignore_errors=True)


def complete(
    release: Path, public: Written, private: Written, shard_of: Mapping[str, int], image_paths: set[str], facts: Facts
) -> dict[str, Any]:
    """Add config, lock, records, verifier and metadata to a release whose ledger is written, then `root.json` and its
    signature.

    Parameters
    ----------
    release
        Root of the dataset.
    public, private
        The two ledgers.
    shard_of
        Shard by sample id.
    image_paths
        Images and label maps, which the ledger's rows describe; all others are listed in `root.json`.

    Returns
    -------
    dict
        The content of root.json.

    Raises
    ------
    UserError
        The release has no dataset_description.json, or its signing key cannot be used.
    """
    if not (release / "dataset_description.json").is_file():
        raise UserError(
            f"{release}: no dataset_description.json. Run the `release` step first: the ledger seals a complete"
            " dataset."
        )
    study = without_paths(facts.config)
    key = (
        signature.load_private(Path(facts.config["release"]["signing_key"]))
        if facts.config["release"].get("signing_key")
        else None
    )
    traced = lineage.trace(facts.heads, lineage.study_records(facts.results))
    for found in traced.steps():
        written = next(lineage.entries(found, "outputs"))["path"]
        write_json(release / RECORDS / f"{written}.json", record.public(found))
    write_json(release / CONFIG, study)
    write_atomic(release / LOCK, facts.lock)
    write_atomic(release / VERIFIER, Path(verify.__file__).read_bytes())
    if "BIDSVersion" in read(release, verify.DESCRIPTION, ascii_only=False):
        write_atomic(release / ".bidsignore", IGNORED + unknown_to_bids(study["release"]["suffix"]))
    sealed = {
        "schema": ledger.SCHEMA,
        "scheme": merkle.SCHEME,
        "order": "sample_id",
        "rows": len(public.leaves),
        "released": public.released,
        "root": public.root,
        "shards": ledger.shard_roots(public, shard_of),
    }
    files = _files(release, image_paths)
    for name, content in metadata(release, sealed, facts.heads, files, study["release"]["date"] or _last_day(traced)):
        write_json(release / name, content)
        files[name] = _entry(release / name)
    root = {
        "schema": verify.ROOT_SCHEMA,
        "study": study["study"],
        "software": {"name": "meddiff_steps", "version": __version__},
        "seed": {"scheme": SEED_SCHEME, "root": study["seed"], "numbers": ledger.NOISE_NUMBERS},
        "ledger": sealed,
        "private_ledger": {
            "scheme": merkle.SCHEME,
            "order": "sample_id, attempt",
            "rows": len(private.leaves),
            "root": private.root,
        },
        "privacy": {
            "verdict": facts.privacy["verdict"],
            "counts": {k: v for k, v in facts.privacy.get("counts", {}).items() if isinstance(v, int)},
        },
        "inputs": dict(facts.heads),
        "files": files,
        "signer": signature.key_id(key.public_key()) if key else None,
    }
    write_json(release / ROOT, root)
    if key is not None:
        statement = verify.statement(root, sha256_file(release / ROOT), study)
        write_json(release / SIGNATURE, signature.sign(statement, key))
    return root


def metadata(
    release: Path,
    sealed: Mapping[str, Any],
    heads: Mapping[str, str],
    files: Mapping[str, dict[str, Any]],
    date: str,
    version: str = __version__,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of croissant.json and ro-crate-metadata.json, which lists the first; nothing else is read than
    the release.

    Parameters
    ----------
    release
        A release that is complete but for its seal.
    sealed
        The part `ledger` of root.json.
    heads
        The part `inputs` of root.json.
    files
        The part `files` of root.json; the crate takes it as it is when its turn comes.
    date
        Day of publication.
    version
        Version of this package that seals it.

    Raises
    ------
    UserError
        Description, config or a record cannot be read.
    """
    description, study = read(release, verify.DESCRIPTION, ascii_only=False), read(release, CONFIG)
    measured = _measured(release)
    made = Published(description, study, date, sealed, heads, files, measured, version)
    yield croissant.NAME, croissant.build(made)
    records = {name: read(release, name) for name in files if name.startswith(f"{RECORDS}/")}
    whole = Published(description, study, date, sealed, heads, {**files, ROOT: {}}, measured, version)
    yield crate.NAME, crate.build(whole, records)


def _measured(release: Path) -> list[str]:
    """Columns of measured covariates, by the first released row of the ledger."""
    return next((sorted(row.get("measured") or {}) for _, row in ledger.read_lines(release) if row["image"]), [])


def _last_day(traced: lineage.Lineage) -> str:
    """The day on which the last image was made: sealing again, or a day later, gives the same bytes."""
    return max(
        (record["volatile"]["ended"][:10] for record in traced.steps() if record["step"] == "images"), default=""
    )


def _files(release: Path, image_paths: set[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file that is no image and not `root.json` or its signature."""
    files, links, _ = verify.contents(release)
    if links:
        raise UserError(
            f"{release / links[0]}: a link, but a release holds files only. Remove it, or put the file itself there."
        )
    others = sorted(files - image_paths - {ROOT, SIGNATURE})
    return {name: _entry(release / name) for name in others}


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
