"""`croissant.json`: the release as a dataset for machine learning, in the Croissant 1.1 vocabulary.

It names the ledger's table with its digest, the images as a set of files, a record per planned subject, that all of it
is synthetic (Croissant RAI 1.0) and where it comes from (PROV).

Sources: https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html and
https://docs.mlcommons.org/croissant/docs/croissant-rai-spec.html.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from meddiff_steps.imaging.encoding import SYNTHETIC
from meddiff_steps.release.dataset import VERSION, licence
from meddiff_steps.release.published import TABLE, Published

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
        "distribution": [_table(release.files[TABLE]), _images(study, "Datasets" in description)],
        "recordSet": [_subjects(study)],
    }
    if description.get("Authors"):
        found["creator"] = [{"@type": "sc:Person", "name": author} for author in description["Authors"]]
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
        f" Covariates are what the model was asked for, not measurements. Of {ledger['rows']} planned subjects those"
        " were left out whose images came too near to a training scan or to another image."
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


def _images(study: Mapping[str, Any], several: bool) -> dict[str, Any]:
    volumes = len(study["preprocess"]["shape"]) == 3
    return {
        "@type": "cr:FileSet",
        "@id": "images",
        "name": "images",
        "description": "The synthetic images; their digests are in the ledger.",
        "encodingFormat": "application/gzip" if volumes else "image/png",
        "includes": ("shard-*/" if several else "") + ("sub-*/anat/*.nii.gz" if volumes else "images/*.png"),
    }


def _subjects(study: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": "subjects",
        "name": "subjects",
        "description": "Planned subjects: what was asked for, and what became of it.",
        "key": {"@id": "subjects/sample_id"},
        "field": list(_fields(study)),
    }


def _fields(study: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    def field(name: str, kind: str, meaning: str, source: dict[str, Any]) -> dict[str, Any]:
        place = {"fileObject": {"@id": "ledger"}} | source
        return {
            "@type": "cr:Field",
            "@id": f"subjects/{name}",
            "name": name,
            "description": meaning,
            "dataType": kind,
            "source": place,
        }

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
