"""A release with its ledger, as read back: what audits and regeneration work on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from meddiff_steps import __version__, config
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import sha256_file
from meddiff_steps.provenance import ledger, lineage, verify
from meddiff_steps.release import seal, versions

#: Sections that rows and images are held against.
HELD = (
    *(
        "study",
        "seed",
        "cohort",
        "covariates",
        "text",
        "preprocess",
        "autoencoder",
        "decoder",
        "diffusion",
        "plan",
        "generate",
    ),
    *("privacy", "compute", "release"),
)
#: Those of them that a study of an older version lacks.
LATER = {"decoder", "text"}


class Sealed:
    """A release as its root.json describes it.

    Attributes
    ----------
    version
        The version of this package by whose rules it is read: by default the one that it says sealed it.
    study
        The published study, with the names of today; None where it is not one, or where this version cannot read it.
    config
        The same as it was published, with the names of then; digests are of it.
    sha256
        Of root.json, which stands for the release.
    records
        Record by the path of each output.
    problems
        What could not be read of config and records.
    unread
        What this version does not understand in the config of another; `study` then has no more than the sections
        `HELD`.
    """

    def __init__(self, folder: Path, root: dict[str, Any], version: str | None = None) -> None:
        self.folder, self.root = folder, root
        self.sha256 = sha256_file(folder / seal.ROOT)
        self.version = version or versions.stated(root["software"]["version"])
        self.problems: list[str] = []
        self.unread: str | None = None
        self.study: config.Study | None = None
        self.config: dict[str, Any] = {}
        self.records: dict[str, lineage.Record] = {}
        try:
            self.config = lineage.read_strictly(folder, seal.CONFIG)
            self.study = self._read_study()
        except UserError as error:
            self.problems.append(str(error))
        try:
            self.records = lineage.read_published(folder)
        except UserError as error:
            self.problems.append(str(error))

    @property
    def is_other(self) -> bool:
        """Whether another version of this package sealed it."""
        return self.version != __version__

    def _read_study(self) -> config.Study | None:
        """The study; of another version's, if need be, the sections `HELD` alone, so that a section that has changed
        since then (or was made to look so) keeps no row and no image from being checked.
        """
        try:
            study = config.parse_published(self.config, seal.CONFIG, self.version)
            if not self.is_other and config.published(study) != self.config:
                raise UserError(f"{seal.CONFIG}: not as a study is published: values are missing or of another type")
            return study
        except UserError as error:
            if not self.is_other or not set(HELD) - LATER <= set(self.config):
                raise
            self.unread = str(error)
        try:
            return config.parse_published(
                {name: self.config[name] for name in HELD if name in self.config}, seal.CONFIG, self.version
            )
        except UserError as error:
            self.unread = str(error)
            return None

    @cached_property
    def weights(self) -> dict[tuple[str, str], tuple[str, int]]:
        """Which weights the rows name: (kind, digest) -> first subject and number of rows."""
        found: dict[tuple[str, str], tuple[str, int]] = {}
        for row in self.rows():
            for kind in ledger.WEIGHTS:
                if (digest := row["recipe"].get(kind)) is not None:
                    first, count = found.get((kind, digest), (row["sample_id"], 0))
                    found[kind, digest] = (first, count + 1)
        return found

    def instrument(self, kind: str) -> str | None:
        """Digest of the weights of the instrument (`predictors`, `segmenter`) by which its images were measured."""
        path = f"instruments/{kind}/model.safetensors"
        read = any(
            entry["path"] == path
            for record in self.records.values()
            if lineage.step_of(record) == "images"
            for entry in lineage.entries(record, "inputs")
        )
        record = self.records.get(path)
        if not read or record is None:
            return None
        return next((e.get("weights_sha256") for e in lineage.entries(record, "outputs") if e["path"] == path), None)

    def rows(self) -> Iterator[ledger.Row]:
        """Rows of the ledger, one at a time."""
        for _, row in ledger.read_lines(self.folder):
            yield row

    def released(self) -> Iterator[ledger.Row]:
        return (row for row in self.rows() if row["image"] is not None)

    def rows_of(self, subjects: Collection[str] | None = None, shard: int | None = None) -> list[ledger.Row]:
        """Rows of the subjects that are named (with or without "sub-"), or the released ones of one shard, or all
        released ones.

        Raises
        ------
        UserError
            There is no such subject or shard.
        """
        if subjects is not None:
            wanted = {name.removeprefix("sub-") for name in subjects}
            rows = [row for row in self.rows() if row["sample_id"] in wanted]
            absent = sorted(wanted - {row["sample_id"] for row in rows})
            if absent:
                raise UserError(
                    f"{self.folder}: no subject {absent[0]!r} in the ledger. Participants are listed in"
                    " participants.tsv."
                )
            return rows
        if shard is None:
            return list(self.released())
        shards = [entry["shard"] for entry in self.root["ledger"]["shards"]]
        if shard not in shards:
            raise UserError(
                f"{self.folder}: no shard {shard}; there are {len(shards)}, from {min(shards)} to {max(shards)}."
            )
        return [
            row
            for place, row in enumerate(self.rows())
            if row["image"] is not None and ledger.shard_of(self.root, place) == shard
        ]


def open_release(folder: Path) -> Sealed:
    """A release that is well formed, as far as its rows say; whether they are true is for `audit` to find.

    Raises
    ------
    UserError
        It has no ledger, or the ledger, the config or root.json is malformed; `OtherVersion` where the config may be
        sound to the version that made it.
    """
    if not (folder / seal.ROOT).is_file():
        raise UserError(f"{folder / seal.ROOT}: not there. Give the root of a release that has a ledger.")
    try:
        checks, root, _ = verify.check_form(folder)
    except verify.Unreadable as error:
        raise UserError(f"{error}. Run `audit` on the release.") from None
    problems = [f"{check.name}: {check.text}" for check in checks if check.outcome == "finding"]
    release = Sealed(folder, root)
    problems += release.problems
    if not problems and release.study is None:
        advice = versions.advice(release.version, "to work with it")
        raise versions.OtherVersion(
            f"{folder}: version {__version__} cannot read its config; {advice}\n{release.unread}"
        )
    if problems:
        raise UserError(f"{folder}: not a well-formed release ({problems[0]}). Run `audit` on it.")
    return release
