"""`croissant.json`: the release as a dataset for machine learning, in the Croissant 1.1 vocabulary.

It names the ledger's table with its digest, the images and label maps as sets of files, a record per planned subject,
per participant (with the suggested split), per image and per label map, how to cite it, that all of it is synthetic
(Croissant RAI 1.0) and where it comes from (PROV).

Sources: https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html and
https://docs.mlcommons.org/croissant/docs/croissant-rai-spec.html.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from meddiff_steps.cohort.texts import COLUMN as TEXT
from meddiff_steps.imaging.encoding import SYNTHETIC
from meddiff_steps.provenance import verify
from meddiff_steps.provenance.ledger import MEASURED, SEGMENTED
from meddiff_steps.release.citation import bibtex
from meddiff_steps.release.licences import licence
from meddiff_steps.release.published import TABLE, Published
from meddiff_steps.release.story import VERSION

NAME = "croissant.json"
VERSIONS = ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"]
#: The names that the vocabulary defines; programs that read Croissant compare them with their own list.
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{
        name: f"cr:{name}"
        for name in (
            "arrayShape citeAs column containedIn equivalentProperty extract field fileObject fileProperty fileSet"
            " format includes isArray isLiveDataset jsonPath key md5 parentField path recordSet references regex"
            " repeated replace samplingRate separator source subField transform"
        ).split()
    },
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}
#: Columns of the ledger that are records of several values, and what of each is listed: (name in the row, type,
#: meaning).
COLUMNS = [
    ("sample_id", "sc:Text", "Synthetic subject"),
    ("group", "sc:Text", "Group of the plan"),
    ("index", "sc:Integer", "Number in the group"),
    ("seed_key", "sc:Text", "Key of the random numbers that the image was made from; empty where none was released"),
]
NESTED = [
    ("privacy", "decision", "sc:Text", "released, duplicate or rejected"),
    ("image", "path", "sc:Text", "Where the image lies in the release"),
    ("image", "sha256", "sc:Text", "SHA-256 of the image file"),
    ("image", "voxel_sha256", "sc:Text", "SHA-256 of what the image shows"),
]


def build(release: Published) -> dict[str, Any]:
    """The content of croissant.json."""
    description, study = release.description, release.study
    name, url = licence(description["License"])
    card = study["release"]["card"]
    found: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": VERSIONS,
        "name": description["Name"],
        "description": description["Description"],
        "license": url or name,
        "datePublished": release.date,
        "version": VERSION,
        "keywords": description["Keywords"],
        "isLiveDataset": False,
        "rai:hasSyntheticData": True,
        "rai:syntheticDataExplanation": _explanation(description, study, release.ledger),
        "rai:personalSensitiveInformation": (
            "No row and no image describes a real person; README says what was tested for traces of real ones."
        ),
        "prov:wasDerivedFrom": _sources(description),
        "prov:wasGeneratedBy": _activity(study, release.heads, release.version),
        "citeAs": bibtex(study["release"], release.date),
        "distribution": [_table(release.files[TABLE]), *_files(release)],
        "recordSet": [_subjects(release), _participants(), *_file_records(release)],
    }
    if study["release"]["authors"]:
        found["creator"] = [{"@type": "sc:Person", "name": author} for author in study["release"]["authors"]]
    if study["release"]["url"]:
        found["url"] = study["release"]["url"]
    for key, text in (
        ("rai:dataUseCases", card["intended_use"]),
        ("rai:dataLimitations", " ".join(filter(None, (card["limitations"], card["not_for"])))),
    ):
        if text:
            found[key] = text
    return found


def _explanation(description: Mapping[str, Any], study: Mapping[str, Any], ledger: Mapping[str, Any]) -> str:
    return (
        f"All {ledger['released']} images are synthetic. {SYNTHETIC} {description['GeneratedBy'][0]['Description']}"
        " Covariates are what the model was asked for; what was measured in the images has names of its own. Of"
        f" {ledger['rows']} planned subjects those were left out whose images came too near to a training scan or to"
        " another image."
    )


def _sources(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    known = [source.get("DOI") or source["URL"] for source in description.get("SourceDatasets", [])]
    if known:
        return [
            {"@id": f"https://doi.org/{name.removeprefix('doi:')}" if name.startswith(("10.", "doi:")) else name}
            for name in known
        ]
    return [
        {
            "@type": "prov:Entity",
            "prov:label": (
                "The cohort that the model learnt from, as the description says; it is not part of this dataset"
            ),
        }
    ]


def _activity(study: Mapping[str, Any], heads: Mapping[str, str], version: str) -> dict[str, Any]:
    agent = {"@type": "prov:SoftwareAgent", "prov:label": f"meddiff_steps {version}"}
    return {
        "@type": "prov:Activity",
        "prov:label": (
            f"Sampling of study {study['study']} with {study['generate']['sampler']}, privacy filter, release"
        ),
        "prov:wasAssociatedWith": agent,
        "prov:used": [
            {"@type": "prov:Entity", "prov:label": path, "sha256": digest}
            for path, digest in sorted(heads.items())
            if path.endswith("card.json")
        ],
    }


def _table(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": "ledger",
        "name": "ledger",
        "description": "A row per planned subject, released or not.",
        "contentUrl": TABLE,
        "contentSize": f"{entry['bytes']} B",
        "encodingFormat": "application/x-parquet",
        "sha256": entry["sha256"],
    }


def _files(release: Published) -> Iterator[dict[str, Any]]:
    """Tables of participants, images and label maps."""
    several = "Datasets" in release.description
    where = "shard-*/" if several else ""
    meaning = "Covariates asked for and measured, and the suggested split: a row per released subject."
    if several:
        table = {"@type": "cr:FileSet", "includes": f"{where}{verify.TABLE}"}
    else:
        entry = release.files[verify.TABLE]
        size = f"{entry['bytes']} B"
        table = {"@type": "cr:FileObject", "contentUrl": verify.TABLE, "contentSize": size, "sha256": entry["sha256"]}
    names = {"@id": "participants-table", "name": "participants-table", "description": meaning}
    yield table | names | {"encodingFormat": "text/tab-separated-values"}
    for name, meaning, pattern in _sets(release):
        yield {
            "@type": "cr:FileSet",
            "@id": f"{name}-files",
            "name": f"{name}-files",
            "description": f"{meaning}; their digests are in the ledger.",
            "encodingFormat": "application/gzip" if pattern.endswith(".gz") else "image/png",
            "includes": f"{where}{pattern}",
        }


def _sets(release: Published) -> Iterator[tuple[str, str, str]]:
    """Name, meaning and pattern of each set of files that the ledger holds."""
    study = release.study
    if len(study["preprocess"]["shape"]) != 3:
        yield "images", "The synthetic images", "images/*.png"
        return
    yield "images", "The synthetic images", f"sub-*/anat/*_{study['release']['suffix']}.nii.gz"
    if any(PurePosixPath(name).name in verify.LABEL_FILES for name in release.files):
        yield "labels", "A label map of each synthetic image", f"sub-*/anat/*_{verify.LABELS}.nii.gz"


def _file_records(release: Published) -> Iterator[dict[str, Any]]:
    """A record per image, and per label map.

    Pictures are read from their files.  Of volumes, which programs for Croissant cannot read, a record says where the
    file lies, from the ledger: there it is empty for subjects that were not released.
    """
    for name, meaning, pattern in _sets(release):
        if pattern.endswith(".png"):
            files = {"fileSet": {"@id": f"{name}-files"}}
            inside = {"regex": r"^([A-Za-z0-9]+)\.png$"}
            fields = [
                ("sample_id", "sc:Text", "Synthetic subject", {"fileProperty": "filename"}, inside),
                ("path", "sc:Text", "Where the file lies in the release", {"fileProperty": "fullpath"}, None),
                ("image", "sc:ImageObject", "What it shows", {"fileProperty": "content"}, None),
            ]
        else:
            files, column = {"fileObject": {"@id": "ledger"}}, {"column": "image" if name == "images" else "labels"}
            fields = [
                ("sample_id", "sc:Text", "Synthetic subject", {"column": "sample_id"}, None),
                ("path", "sc:Text", "Where the file lies in the release", column, {"jsonPath": "path"}),
                ("sha256", "sc:Text", "SHA-256 of the file", column, {"jsonPath": "sha256"}),
            ]
        yield {
            "@type": "cr:RecordSet",
            "@id": name,
            "name": name,
            "description": f"{meaning}, a record per file.",
            "key": {"@id": f"{name}/sample_id"},
            "field": [
                _field(
                    name,
                    field,
                    kind,
                    meant,
                    files | {"extract": extract} | ({"transform": transform} if transform else {}),
                )
                for field, kind, meant, extract, transform in fields
            ],
        }


def _participants() -> dict[str, Any]:
    fields = [
        ("participant_id", "Synthetic subject, as its folder is called"),
        ("split", "Suggested use: train, val or test"),
    ]
    source = {"fileObject": {"@id": "participants-table"}}
    return {
        "@type": "cr:RecordSet",
        "@id": "participants",
        "name": "participants",
        "description": "Released subjects, and the suggested split.",
        "key": {"@id": "participants/participant_id"},
        "field": [
            _field("participants", name, "sc:Text", meaning, source | {"extract": {"column": name}})
            for name, meaning in fields
        ],
    }


def _field(record: str, name: str, kind: str, meaning: str, source: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{record}/{name}",
        "name": name,
        "description": meaning,
        "dataType": kind,
        "source": dict(source),
    }


def _subjects(release: Published) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": "subjects",
        "name": "subjects",
        "description": "Planned subjects: what was asked for, what was measured, and what became of it.",
        "key": {"@id": "subjects/sample_id"},
        "field": list(_fields(release.study, release.measured)),
    }


def _fields(study: Mapping[str, Any], measured: Sequence[str]) -> Iterator[dict[str, Any]]:
    def field(name: str, kind: str, meaning: str, source: dict[str, Any]) -> dict[str, Any]:
        return _field("subjects", name, kind, meaning, {"fileObject": {"@id": "ledger"}} | source)

    for name, kind, meaning in COLUMNS:
        yield field(name, kind, meaning, {"extract": {"column": name}})
    for column, part, kind, meaning in NESTED:
        yield field(f"{column}_{part}", kind, meaning, {"extract": {"column": column}, "transform": {"jsonPath": part}})
    for name, covariate in study["covariates"].items():
        number = "range" in covariate
        meaning = f"{covariate['description'].rstrip('.') or name}, asked for" + (
            f"; {covariate['unit']}" if number else ""
        )
        yield field(
            f"covariate_{name}",
            "sc:Float" if number else "sc:Text",
            meaning,
            {"extract": {"column": "covariates"}, "transform": {"jsonPath": name}},
        )
    if study.get("text", {}).get("column") is not None:
        asked = {"extract": {"column": "covariates"}, "transform": {"jsonPath": TEXT}}
        yield field(f"covariate_{TEXT}", "sc:Text", "What the image was asked to show, in words", asked)
    for column in measured:
        covariate = study["covariates"][column.removesuffix(MEASURED).removesuffix(SEGMENTED)]
        number = "range" in covariate
        how = "measured in the image" if column.endswith(MEASURED) else "volume in the label map"
        yield field(
            column,
            "sc:Float" if number else "sc:Text",
            how + (f"; {covariate['unit']}" if number else ""),
            {"extract": {"column": "measured"}, "transform": {"jsonPath": column}},
        )
