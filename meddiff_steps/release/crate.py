"""`ro-crate-metadata.json`: what lies in a release and which runs made it, for programs that read RO-Crate.

RO-Crate 1.1 with the Process Run Crate profile 0.5: a CreateAction per run (a stage, or a shard of one), from the
published run records.  Images are described by shard, never one by one.  It says nothing that `provenance/` does not
say; everything in it follows from the files of the release, so that an audit can build it again.

Sources: https://www.researchobject.org/ro-crate/specification/1.1/ and https://w3id.org/ro/wfrun/process/0.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from meddiff_steps.provenance import lineage
from meddiff_steps.release.licences import licence
from meddiff_steps.release.published import Published
from meddiff_steps.release.story import VERSION

NAME = "ro-crate-metadata.json"
SPECIFICATION = "https://w3id.org/ro/crate/1.1"
PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
CONTEXT = [f"{SPECIFICATION}/context", {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"}]
#: Folder of the release in the names that run records use.
FOLDER = "release/"
MEDIA_TYPES = {
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".parquet": "application/x-parquet",
    ".tsv": "text/tab-separated-values",
    ".py": "text/x-python",
    ".md": "text/markdown",
    ".png": "image/png",
    ".cff": "application/yaml",
}
MEANINGS = {
    "README.md": "What this cohort is, for people",
    "preview.png": "Some of the synthetic images, chosen by number",
    "CITATION.cff": "How to cite it (Citation File Format)",
    "LICENSE": "The licence in full",
    "participants.json": "What the columns of participants.tsv mean",
    "dseg.tsv": "Which structure each label of the label maps is",
    "dataset_description.json": "Name, licence and software",
    "participants.tsv": "Covariates asked for and measured, and a suggested split: a row per released subject",
    "croissant.json": "The tables and images as Croissant metadata",
    "provenance/ledger.jsonl": "A row per planned subject: recipe, decision and digests",
    "provenance/ledger.parquet": "The rows of ledger.jsonl as a table",
    "provenance/config.json": "Settings of all stages",
    "provenance/requirements.lock": "Software environment",
    "provenance/verify.py": "Checks the release with Python alone",
    "provenance/root.json": "Seals the release: roots of the ledgers, digests of all other files",
    "provenance/root.dsse.json": "Signature of root.json",
}
Entity = dict[str, Any]


def build(release: Published, records: Mapping[str, lineage.Record]) -> dict[str, Any]:
    """The content of ro-crate-metadata.json.

    Parameters
    ----------
    release
        What it describes.
    records
        Published run records by their path in the release.
    """
    description = release.description
    listed = {name: entry for name, entry in release.files.items() if name != NAME}
    actions, others = _actions(records, release, listed)
    shards = list(_shards(release.ledger))
    datasets = [_dataset(folder, description["Name"], sorted(listed)) for folder in description.get("Datasets", [])]
    people = [
        {"@id": f"#person-{i}", "@type": "Person", "name": name}
        for i, name in enumerate(release.study["release"]["authors"], start=1)
    ]
    name, url = licence(description["License"])
    licensed = {"@id": url or "#licence", "@type": "CreativeWork", "name": name}
    root: Entity = {
        "@id": "./",
        "@type": "Dataset",
        "name": description["Name"],
        "description": description["Description"],
        "datePublished": release.date,
        "version": VERSION,
        "license": _reference(licensed),
        "keywords": ", ".join(description["Keywords"]),
        "conformsTo": {"@id": PROFILE},
        "hasPart": [_reference(dataset) for dataset in datasets] + [{"@id": quote(path)} for path in sorted(listed)],
        "mentions": [_reference(entity) for entity in [*actions, *shards]],
    }
    if people:
        root["author"] = _references(people)
    if release.study["release"]["url"]:
        root["url"] = release.study["release"]["url"]
    top = {"@id": NAME, "@type": "CreativeWork", "about": {"@id": "./"}, "conformsTo": {"@id": SPECIFICATION}}
    profile = {"@id": PROFILE, "@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"}
    described = [_file(path, listed[path]) for path in sorted(listed)]
    return {
        "@context": CONTEXT,
        "@graph": [top, root, profile, licensed, *people, *datasets, *described, *shards, *actions, *others],
    }


def _reference(entity: Entity) -> Entity:
    return {"@id": entity["@id"]}


def _references(entities: list[Entity]) -> Entity | list[Entity]:
    """One reference, or a list of several: the specification advises against lists of one."""
    found = [_reference(entity) for entity in entities]
    return found[0] if len(found) == 1 else found


def _file(path: str, entry: Mapping[str, Any]) -> Entity:
    found: Entity = {"@id": quote(path), "@type": "File", "name": path}
    suffix = PurePosixPath(path).suffix
    found["encodingFormat"] = MEDIA_TYPES.get(suffix, "text/plain")
    if path.startswith("provenance/records/"):
        found["description"] = "Run record: files read and written, settings, code and environment"
    elif path in MEANINGS:
        found["description"] = MEANINGS[path]
    elif path.startswith("shard-") and PurePosixPath(path).name in MEANINGS:
        found["description"] = MEANINGS[PurePosixPath(path).name]
    if entry:
        found |= {"contentSize": str(entry["bytes"]), "sha256": entry["sha256"]}
    return found


def _dataset(folder: str, title: str, paths: list[str]) -> Entity:
    parts = [{"@id": quote(path)} for path in paths if path.startswith(f"{folder}/")]
    return {
        "@id": quote(f"{folder}/"),
        "@type": "Dataset",
        "name": f"{title}, {folder}",
        "description": (
            "A part of the subjects as a dataset that is complete by itself; SHA256SUMS lists its images, too"
        ),
        "hasPart": parts,
    }


def _shards(ledger: Mapping[str, Any]) -> Iterator[Entity]:
    for entry in ledger["shards"]:
        where = ", ".join(f"{first} to {end - 1}" for first, end in entry["ranges"][:3]) + (
            ", ..." if len(entry["ranges"]) > 3 else ""
        )
        yield {
            "@id": f"#shard-{entry['shard']}",
            "@type": "Collection",
            "name": f"Synthetic subjects of shard {entry['shard']}",
            "description": (
                f"{entry['rows']} planned subjects, rows {where} of the ledger; each row names its image and the"
                " image's SHA-256"
            ),
            "identifier": f"{ledger['scheme']}:{entry['root']}",
        }


def _actions(
    records: Mapping[str, lineage.Record], release: Published, files: Mapping[str, Any]
) -> tuple[list[Entity], list[Entity]]:
    """Runs, and what they refer to that is no part of the release: steps and files between them."""
    actions: list[Entity] = []
    others: dict[str, Entity] = {}

    def refer(entry: Mapping[str, Any]) -> Entity:
        path = str(entry["path"])
        inside = path.removeprefix(FOLDER)
        if path.startswith(FOLDER) and inside in files:
            return {"@id": quote(inside)}
        known = {"@id": f"#{quote(path)}", "@type": "CreativeWork", "name": path, "sha256": entry["sha256"]}
        return _reference(others.setdefault(known["@id"], known))

    def step(name: str, version: str, digest: str) -> Entity:
        known = {
            "@id": f"urn:meddiff-steps:{name}:{digest or version}",
            "@type": "SoftwareApplication",
            "name": f"meddiff_steps {name}",
        }
        return _reference(others.setdefault(known["@id"], known | {"softwareVersion": version}))

    for place, record in sorted(records.items(), key=lambda item: (item[1]["step"], item[0])):
        written = list(lineage.entries(record, "outputs"))
        action = {
            "@id": f"#run/{quote(written[0]['path'])}",
            "@type": "CreateAction",
            "name": f"{record['step']}: {written[0]['path']}",
            "description": (
                f"A run of `python -m meddiff_steps {record['step']}`; settings and environment are in its record."
            ),
            "instrument": step(record["step"], record["code"].get("version", ""), record["code"].get("digest", "")),
            "result": _one_or_all([refer(entry) for entry in written]),
            "subjectOf": {"@id": quote(place)},
        }
        read = [refer(entry) for entry in lineage.entries(record, "inputs")]
        actions.append(action | ({"object": _one_or_all(read)} if read else {}))
    actions.append(
        {
            "@id": "#run/provenance",
            "@type": "CreateAction",
            "name": "ledger: provenance/root.json",
            "description": (
                "The run of `python -m meddiff_steps ledger` that sealed this release; it has no record, because it"
                " wrote the last file."
            ),
            "instrument": step("ledger", release.version, ""),
            "object": _one_or_all(
                [refer({"path": path, "sha256": digest}) for path, digest in sorted(release.heads.items())]
            ),
            "result": [
                {"@id": quote(path)}
                for path in sorted(files)
                if path.startswith("provenance/") and not path.startswith("provenance/records/")
            ],
        }
    )
    return actions, list(others.values())


def _one_or_all(references: list[Entity]) -> Entity | list[Entity]:
    distinct = list({entry["@id"]: entry for entry in references}.values())
    return distinct[0] if len(distinct) == 1 else distinct
