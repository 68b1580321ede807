"""The synthetic cohort as a dataset: 3D as BIDS derivative, 2D as PNG with a table.

The dataset says that it is synthetic in its sidecar, tables, description and README, every image in its own file
(`encoding`). Equal input gives equal bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from meddiff_steps import __version__
from meddiff_steps.cohort.texts import COLUMN as TEXT
from meddiff_steps.config import CategoricalCovariate, Covariates, Release
from meddiff_steps.config.release import SUFFIXES
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import CHECKSUMS, sha256_file, write_atomic
from meddiff_steps.imaging.encoding import (
    SYNTHETIC,
    VOLUME_SCALE,
    Grid,
    encode,
    encode_labels,
    read_mark,
    voxel_digest,
)
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.imaging.signed_distances import LABELS
from meddiff_steps.provenance import ledger, verify
from meddiff_steps.release import licences, preview
from meddiff_steps.release.citation import citation_file
from meddiff_steps.release.layout import image_path, unknown_to_bids
from meddiff_steps.release.readme import BIDS_VERSION, readme
from meddiff_steps.release.story import VERSION, Part, Story, origin, privacy

if TYPE_CHECKING:  # which loads torch; who describes a release needs none
    from meddiff_steps.release.measuring import Instruments

logger = logging.getLogger(__name__)

TEXTS = (verify.README, "CHANGES", "CITATION.cff", "LICENSE")

_SAMPLE_ID = re.compile(r"[A-Za-z0-9]+")

# --------------------------------------------------------------------------------------------------- images


def write_images(
    generated: Path,
    release: Path,
    grid: Grid,
    study: str,
    suffix: str = "T1w",
    only: Collection[str] | None = None,
    folders: Mapping[str, str] = MappingProxyType({}),
    instruments: Instruments | None = None,
) -> pd.DataFrame:
    """Write every image of one generated shard into the release, and its label map: the one that it was drawn from, or
    what a segmenter sees in it.

    Parameters
    ----------
    generated
        Shard with `sample_id` and `image` (1, *grid.shape) in [0, 1], and of pairs `labels`, uint8 (*grid.shape).
    release
        Root of the dataset.
    grid
        Shape and spacing of the images.
    study
        Named in every file.
    suffix
        BIDS suffix of volumes.
    only
        Ids of the images that may be written; all for None.
    folders
        Folder of the dataset in the release by id; who is not there lies in the release itself.
    instruments
        What is measured in each image.

    Returns
    -------
    DataFrame
        sample_id, path (relative to `release`), bytes, sha256 (of the file), voxel_sha256 (`voxel_digest`), sorted by
        sample_id; what was measured (`measuring.Instruments.measure`), and of label maps `ledger.LABELS`.

    Raises
    ------
    UserError
        The shape is not the study's, an id is not letters and digits or occurs twice, or an image has values outside
        [0, 1].
    """
    shards = Shards([generated])
    if shards.shape("image") != (1, *grid.shape):
        raise UserError(
            f"{generated}: images of shape {shards.shape('image')}, expected {(1, *grid.shape)} by preprocess.shape."
            " Generate the shard again."
        )
    samples = shards.column("sample_id")
    for sample_id in samples:
        if not _SAMPLE_ID.fullmatch(sample_id):
            raise UserError(
                f"{generated}: sample_id {sample_id!r} may hold letters and digits only (BIDS). Rename the group in"
                " `plan`, and plan again."
            )
    if len(set(samples)) < len(samples):
        twice = sorted({s for s in samples if samples.count(s) > 1})
        raise UserError(f"{generated}: sample_id {_shorten(twice)} occurs more than once. Generate the shard again.")
    rows, paired = [], LABELS in shards.schema.names
    chosen = [row for row, sample_id in enumerate(samples) if only is None or sample_id in only]
    for row in tqdm(
        sorted(chosen, key=samples.__getitem__), desc="images", unit="image", mininterval=5, file=sys.stderr
    ):
        sample_id = samples[row]
        image = shards.tensor("image", row)[0].astype(np.float32)
        if not (image.min() >= 0 and image.max() <= 1):  # false for NaN, too
            values = f"values from {image.min():g} to {image.max():g}"
            raise UserError(
                f"{generated}: image of {sample_id} holds {values}, expected 0 to 1. Generate the shard again."
            )
        path = PurePosixPath(folders.get(sample_id, ""), image_path(sample_id, len(grid.shape), suffix)).as_posix()
        content, stored = encode(image, grid, sample_id, study)
        write_atomic(release / path, content)
        found = {"sample_id": sample_id, **_entry(path, content, stored, grid)}
        if instruments is not None:
            measured, labels = instruments.measure(stored, shards.tensor(LABELS, row) if paired else None)
            found |= measured
            if labels is not None:
                path, content = verify.labels_path(path), encode_labels(labels, grid, sample_id, study)
                write_atomic(release / path, content)
                entry = _entry(path, content, labels, grid)
                found |= {column: entry[name] for name, column in ledger.LABELS.items()}
        rows.append(found)
    kinds = {"sample_id": "string", "path": "string", "bytes": "int64", "sha256": "string", "voxel_sha256": "string"}
    table = pd.DataFrame(rows, columns=None if rows else list(kinds))
    return table.astype(kinds)


def _entry(path: str, content: bytes, stored: np.ndarray, grid: Grid) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    return {"path": path, "bytes": len(content), "sha256": digest, "voxel_sha256": voxel_digest(stored, grid.affine)}


# -------------------------------------------------------------------------------------------------- dataset


def complete_dataset(release: Path, plan: pd.DataFrame, images: pd.DataFrame, story: Story) -> Path:
    """Add everything but the images to a dataset; `dataset_description.json` comes last and says that it is whole.

    Images in the folder that are not planned any more are removed if they carry this study's mark.

    Parameters
    ----------
    release
        Root of the dataset; holds the images already.
    plan
        sample_id, group, noise_index and a column per covariate (requested values).
    images
        Tables that `write_images` returned, one below the other.
    story
        What the texts say.

    The paths of `images` say which dataset each is in (`layout`): the release itself, or one of several folders, which
    are then complete datasets with checksums of their own.

    Returns
    -------
    Path
        The dataset_description.json.

    Raises
    ------
    UserError
        A planned sample has no image, an image is not planned, occurs twice, or is not on disk as written; or a
        stranger's image lies in the folder.
    """
    _check_complete(release, plan, images)
    description = release / "dataset_description.json"
    description.unlink(missing_ok=True)  # while the parts change there is no whole
    labelled = ledger.LABELS["path"] in images
    _remove_stale(release, {*images["path"], *(images[ledger.LABELS["path"]] if labelled else [])}, story.study)
    folders = set(_parts(plan, images, story))
    _remove_tables(release, folders)
    # Of an earlier version, suffix or segmenter.
    old = (*(f"{suffix}.json" for suffix in SUFFIXES), *verify.LABEL_FILES, verify.OLD_README, verify.PREVIEW)
    for folder, name in itertools.product(folders, old):
        (release / folder / name).unlink(missing_ok=True)
    (release / verify.OLD_README).unlink(missing_ok=True)
    for name, paths in previews(images, story).items():
        write_atomic(release / name, preview.picture(release, paths, story.grid, story.study))
    shown = {name: sha256_file(release / name) for name in previews(images, story)}
    for name, content in texts(plan, images, story, shown):
        write_atomic(release / name, content)
    return description


def previews(images: pd.DataFrame, story: Story) -> dict[str, list[str]]:
    """The picture in the README of each dataset, by its path, and the images that it shows."""
    members: dict[str, list[str]] = {}
    for path in images.sort_values("sample_id")["path"]:
        members.setdefault(verify.placed(path)[0], []).append(path)
    dims = len(story.grid.shape)
    return {_in(folder, verify.PREVIEW): preview.chosen(paths, dims) for folder, paths in sorted(members.items())}


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def texts(
    plan: pd.DataFrame, images: pd.DataFrame, story: Story, shown: Mapping[str, str]
) -> Iterator[tuple[str, bytes]]:
    """Name in the release and content of every file of its datasets but the images; the description of all comes last.

    Parameters are those of `complete_dataset`; of `images`, sample_id, path, sha256, those of label maps, and what was
    measured are read.  `shown` is the SHA-256 of each of `previews`.
    """
    splits = verify.Splits(story.seed)
    plan = plan.sort_values("sample_id", ignore_index=True)
    labels = [name for name, covariate in story.covariates.items() if isinstance(covariate, CategoricalCovariate)]
    plan["split"] = [
        splits.of(
            row["group"], int(row["noise_index"]), {name: str(row[name]) for name in labels if not pd.isna(row[name])}
        )
        for row in plan[["group", "noise_index", *labels]].to_dict("records")
    ]
    parts = _parts(plan, images, story)
    for folder, (members, written) in parts.items():
        known = {verify.PREVIEW: shown[_in(folder, verify.PREVIEW)]} if folder else {}
        found = _dataset_texts(members, written, story, Part(folder, len(plan)) if folder else None, known)
        yield from ((f"{folder}/{name}" if folder else name, content) for name, content in found.items())
    if "" not in parts:
        measured, labelled = ledger.measured_columns(story.covariates, images.columns), ledger.LABELS["path"] in images
        yield from _common_texts(len(plan), story, None, list(parts), measured, labelled).items()


def _parts(plan: pd.DataFrame, images: pd.DataFrame, story: Story) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Rows of plan and images by the folder of their dataset; paths are within it."""
    inside = [image_path(sample_id, len(story.grid.shape), story.config.suffix) for sample_id in images["sample_id"]]
    folders = np.array(
        [path.removesuffix(end).rstrip("/") for path, end in zip(images["path"], inside, strict=True)], dtype=object
    )
    if not any(folders):
        return {"": (plan, images)}
    # Paths in their dataset, also of label maps.
    images = images.assign(path=inside)
    if (column := ledger.LABELS["path"]) in images:
        images[column] = [verify.labels_path(path) for path in inside]
    plan = plan.set_index("sample_id").loc[images["sample_id"]].reset_index()
    return {str(folder): (plan[folders == folder], images[folders == folder]) for folder in sorted(set(folders))}


def _dataset_texts(
    plan: pd.DataFrame, images: pd.DataFrame, story: Story, part: Part | None, digests: Mapping[str, str]
) -> dict[str, bytes]:
    """Everything but the images of one dataset; a part of a release also gets checksums, since the release's seal lies
    elsewhere: `digests` are of files beside texts and images.
    """
    volumes, labels = len(story.grid.shape) == 3, ledger.LABELS["path"] in images
    measured = ledger.measured_columns(story.covariates, images.columns)
    found = {
        "participants.tsv": _participants(plan, images, story.covariates, measured, volumes),
        "participants.json": _json(_participants_dictionary(story.covariates, TEXT in plan, measured, volumes)),
    }
    if labels:
        table = [("index", "name"), *((str(i), name) for i, name in enumerate(story.structures, start=1))]
        found[f"{verify.LABELS}.tsv"] = verify.table_bytes(table)
        found[f"{verify.LABELS}.json"] = _json(_labels_sidecar(story))
    if volumes:
        found[f"{story.config.suffix}.json"] = _json(_sidecar(story.study, story.config))
    if volumes and part is not None:
        found[".bidsignore"] = f"/{CHECKSUMS}\n/{verify.PREVIEW}\n".encode() + unknown_to_bids(story.config.suffix)
    found |= _common_texts(len(plan), story, part, [], measured, labels)
    if part is not None:
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()} | dict(digests)
        sums |= dict(zip(images["path"], images["sha256"], strict=True))
        sums |= dict(zip(images[ledger.LABELS["path"]], images[ledger.LABELS["sha256"]], strict=True)) if labels else {}
        found[CHECKSUMS] = verify.checksum_bytes(sums.items())
    return found


def _common_texts(
    subjects: int, story: Story, part: Part | None, datasets: Sequence[str], measured: Sequence[str], labels: bool
) -> dict[str, bytes]:
    """What a dataset and a release of several have alike."""
    title = f"{story.config.name}, {part.folder}" if part else story.config.name
    return {
        verify.README: readme(subjects, story, part, datasets, measured, labels).encode(),
        "CHANGES": f"{VERSION}\n  - First release: {subjects} synthetic subjects.\n".encode(),
        "CITATION.cff": citation_file(story.config, title),
        "LICENSE": licences.text(story.config).encode(),
        "dataset_description.json": _json(_description(story, part, datasets)),
    }


def _remove_tables(release: Path, wanted: set[str]) -> None:
    """Remove tables and texts of datasets of an earlier plan, which lay in other folders."""
    tables = ["participants.tsv", "participants.json", ".bidsignore", *(f"{suffix}.json" for suffix in SUFFIXES)]
    tables += [*verify.LABEL_FILES, verify.PREVIEW]
    for folder in {"", *(place.name for place in release.glob("shard-*") if place.is_dir())} - wanted:
        for name in tables + ([*TEXTS, verify.OLD_README, "dataset_description.json", CHECKSUMS] if folder else []):
            (release / folder / name).unlink(missing_ok=True)
        for place in (release / folder / "images", release / folder):
            if folder and place.is_dir() and not any(place.iterdir()):
                place.rmdir()


def _check_complete(release: Path, plan: pd.DataFrame, images: pd.DataFrame) -> None:
    planned, made = set(plan["sample_id"]), set(images["sample_id"])
    twice = sorted(images["sample_id"][images["sample_id"].duplicated()])
    if twice:
        raise UserError(
            f"release: {len(twice)} sample(s) have more than one image: {_shorten(twice)}. Give each images table once."
        )
    if planned - made:
        raise UserError(
            f"release: {len(planned - made)} planned sample(s) have no image: {_shorten(sorted(planned - made))}. Run"
            " the `images` step of their shards."
        )
    if made - planned:
        raise UserError(
            f"release: {len(made - planned)} image(s) are not in the plan: {_shorten(sorted(made - planned))}. Give the"
            " plan that they were made by."
        )
    wrong = []
    for path, size in zip(images["path"], images["bytes"], strict=True):
        try:
            if (release / path).stat().st_size != size:
                wrong.append(path)
        except FileNotFoundError:
            wrong.append(path)
    if wrong:
        raise UserError(
            f"release: {len(wrong)} image(s) in {release} are missing or changed: {_shorten(wrong)}. Run the `images`"
            " step again."
        )


def _remove_stale(release: Path, wanted: set[str], study: str) -> None:
    for partial in release.rglob(".partial-*"):
        partial.unlink()  # of a writer that was killed; all writers have ended before a dataset is completed
    patterns = [
        f"{place}{pattern}" for place in ("", "shard-*/") for pattern in ("sub-*/anat/*.nii.gz", "images/*.png")
    ]
    found = {p.relative_to(release).as_posix(): p for pattern in patterns for p in release.glob(pattern)}
    stale = sorted(set(found) - wanted)
    strange = [name for name in stale if (read_mark(found[name]) or {}).get("study") != study]
    if strange:
        raise UserError(
            f"{release}: {len(strange)} image(s) were not made by study {study!r}: {_shorten(strange)}. Move them"
            " elsewhere: the folder is published as it is."
        )
    for name in stale:
        found[name].unlink()
    for folder in {found[name].parent.parent for name in stale if name.endswith(".nii.gz")}:
        if not any(p.is_file() for p in folder.rglob("*")):
            shutil.rmtree(folder)
    if stale:
        logger.warning("removed %d image(s) of an earlier plan: %s", len(stale), _shorten(stale))


def _participants(
    plan: pd.DataFrame, images: pd.DataFrame, covariates: Covariates, measured: Sequence[str], volumes: bool
) -> bytes:
    table = plan.sort_values("sample_id", ignore_index=True)
    found = images.set_index("sample_id").loc[table["sample_id"]]
    columns = {"participant_id": [f"sub-{s}" for s in table["sample_id"]]}
    if not volumes:
        paths = dict(zip(images["sample_id"], images["path"], strict=True))
        columns["image"] = [paths[s] for s in table["sample_id"]]
    for name in covariates:
        columns[name] = [verify.cell(None if pd.isna(value) else value) for value in table[name]]
    if TEXT in table:
        columns[TEXT] = [verify.cell(None if pd.isna(value) else value) for value in table[TEXT]]
    for name in measured:
        columns[name] = [verify.cell(None if pd.isna(value) else value) for value in found[name]]
    columns["split"] = table["split"].tolist()
    return verify.table_bytes([list(columns), *zip(*columns.values(), strict=True)])


def _participants_dictionary(
    covariates: Covariates, texts: bool, measured: Sequence[str], volumes: bool
) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "Description": (
            "Synthetic subjects and the covariates that were requested for them. No row describes a real person."
        ),
        "participant_id": {"Description": "Synthetic subject; no real person stands behind it."},
    }
    if not volumes:
        fields["image"] = {"Description": "Path of the subject's synthetic image."}
    for name, covariate in covariates.items():
        own = covariate.description.strip().rstrip(".")
        fields[name] = {
            "Description": (
                f"{own + '. ' if own else ''}Value that the model was asked for (requested), not measured in the image;"
                " n/a: left open."
            )
        }
        if isinstance(covariate, CategoricalCovariate):
            fields[name]["Levels"] = {level: level for level in covariate.levels}
        else:
            fields[name]["Units"] = covariate.unit
    if texts:
        fields[TEXT] = {
            "Description": (
                "What the image was asked to show, in words, written for this cohort and no person's report; n/a:"
                " nothing was."
            )
        }
    for name in measured:
        covariate = covariates[name.removesuffix(ledger.MEASURED).removesuffix(ledger.SEGMENTED)]
        if name.endswith(ledger.SEGMENTED):
            fields[name] = {"Description": "Volume of the structure in the subject's label map (dseg), whole voxels."}
        elif isinstance(covariate, CategoricalCovariate):
            fields[name] = {
                "Description": "Level that the image shows most probably, read by a predictor that learnt"
                " from real scans; it errs on real scans, too (README).",
                "Levels": {level: level for level in covariate.levels},
            }
        else:
            fields[name] = {
                "Description": "Value measured in the image by a predictor that learnt from real scans; it"
                " errs on real scans, too (README)."
            }
        if not isinstance(covariate, CategoricalCovariate):
            fields[name]["Units"] = covariate.unit
    fields["split"] = {
        "Description": (
            "Suggested use: of ten subjects of a group with the same levels, eight train, one validates, one tests;"
            " drawn by the study's seed, and all images of a subject together."
        ),
        "Levels": {"train": "training", "val": "validation", "test": "test"},
    }
    return fields


def _labels_sidecar(story: Story) -> dict[str, Any]:
    learnt = "by a network that learnt from label maps of real scans"
    drawn = f"Label map that a synthetic image was drawn from, itself drawn {learnt}."
    return {
        "Description": drawn if story.paired else f"Label map of a synthetic image, {learnt}.",
        "Manual": False,
        "SpatialReference": "orig",
        "Synthesis": {
            "Synthetic": True,
            "Study": story.study,
            "Software": "meddiff_steps",
            "SoftwareVersion": __version__,
        },
    }


def _sidecar(study: str, config: Release) -> dict[str, Any]:
    # Under one key of its own: BIDS-Prov (BEP028) will give GeneratedBy in sidecars another meaning.
    return {
        "Description": SYNTHETIC,
        "SkullStripped": config.skull_stripped,
        "Synthesis": {
            "Synthetic": True,
            "Study": study,
            "DigitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia",
            "Software": "meddiff_steps",
            "SoftwareVersion": __version__,
            "IntensityUnits": f"arbitrary; 0 to {VOLUME_SCALE}",
        },
    }


def _description(story: Story, part: Part | None, datasets: Sequence[str]) -> dict[str, Any]:
    software = {
        "Name": "meddiff_steps",
        "Version": __version__,
        "Description": f"Latent diffusion model of study {story.study}, sampled with {story.sampler}.",
    }
    fields: dict[str, Any] = {
        "Name": f"{story.config.name}, {part.folder}" if part else story.config.name,
        "License": story.config.licence,
        "GeneratedBy": [software],
        "Description": f"{SYNTHETIC} {origin(story)} Privacy: {privacy(story)}",
        "Keywords": ["synthetic", "generative model", "latent diffusion"],
        "Synthetic": True,
    }
    if part is None:
        fields["Facts"] = story.facts
    if datasets:
        fields["Datasets"] = list(datasets)  # and no claim to be BIDS: each of them is
    elif len(story.grid.shape) == 3:
        # A derivative: a model stands between these images and any scan.
        fields |= {"BIDSVersion": BIDS_VERSION, "DatasetType": "derivative"}
    if story.config.acknowledgements:
        fields["Acknowledgements"] = story.config.acknowledgements
    if story.sources:
        fields["SourceDatasets"] = list(story.sources)
    return fields


def _json(value: Any) -> bytes:
    return verify.json_bytes(value, ascii_only=False)


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
