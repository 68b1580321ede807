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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Self, get_args

import numpy as np
import pandas as pd
from tqdm import tqdm

from meddiff_steps import __version__
from meddiff_steps.config import CategoricalCovariate, Covariates, Release, Study
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import CHECKSUMS, write_atomic
from meddiff_steps.imaging.encoding import PICTURE_SCALE, SYNTHETIC, VOLUME_SCALE, Grid, encode, read_mark, voxel_digest
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.privacy.verdict import stopping
from meddiff_steps.provenance import verify
from meddiff_steps.release import card
from meddiff_steps.release.layout import image_path

logger = logging.getLogger(__name__)

BIDS_VERSION = "1.10.0"
#: Version of the dataset; CHANGES tells of it.
VERSION = "1.0.0"
SUFFIXES = get_args(Release.model_fields["suffix"].annotation)
TEXTS = ("README", "CHANGES", "LICENSE")

_CAUTION = """Do not mix these images with scans of people without keeping the mark, and draw no diagnosis from them.
Every image says in its own file that it is synthetic; converting to another format can lose that."""
_SAMPLE_ID = re.compile(r"[A-Za-z0-9]+")
_LICENCES = {
    "CC0": (
        "Creative Commons Zero 1.0 Universal (public domain dedication)",
        "https://creativecommons.org/publicdomain/zero/1.0/legalcode",
    ),
    "PDDL": (
        "Open Data Commons Public Domain Dedication and License 1.0",
        "https://opendatacommons.org/licenses/pddl/1-0/",
    ),
    "CC-BY-4.0": (
        "Creative Commons Attribution 4.0 International",
        "https://creativecommons.org/licenses/by/4.0/legalcode",
    ),
    "CC-BY-SA-4.0": (
        "Creative Commons Attribution-ShareAlike 4.0 International",
        "https://creativecommons.org/licenses/by-sa/4.0/legalcode",
    ),
    "CC-BY-NC-4.0": (
        "Creative Commons Attribution-NonCommercial 4.0 International",
        "https://creativecommons.org/licenses/by-nc/4.0/legalcode",
    ),
    "CC-BY-NC-SA-4.0": (
        "Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International",
        "https://creativecommons.org/licenses/by-nc-sa/4.0/legalcode",
    ),
}


# --------------------------------------------------------------------------------------------------- images


def write_images(
    generated: Path,
    release: Path,
    grid: Grid,
    study: str,
    suffix: str = "T1w",
    only: Collection[str] | None = None,
    folders: Mapping[str, str] = MappingProxyType({}),
) -> pd.DataFrame:
    """Write every image of one generated shard into the release.

    Parameters
    ----------
    generated
        Shard with `sample_id` and `image` (1, *grid.shape) in [0, 1].
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

    Returns
    -------
    DataFrame
        sample_id, path (relative to `release`), bytes, sha256 (of the file), voxel_sha256 (`voxel_digest`), sorted by
        sample_id.

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
    rows = []
    chosen = [row for row, sample_id in enumerate(samples) if only is None or sample_id in only]
    for row in tqdm(
        sorted(chosen, key=samples.__getitem__), desc="images", unit="image", mininterval=5, file=sys.stderr
    ):
        sample_id = samples[row]
        image = shards.tensor("image", row)[0].astype(np.float32)
        if not (image.min() >= 0 and image.max() <= 1):  # false for NaN, too
            found = f"values from {image.min():g} to {image.max():g}"
            raise UserError(
                f"{generated}: image of {sample_id} holds {found}, expected 0 to 1. Generate the shard again."
            )
        path = PurePosixPath(folders.get(sample_id, ""), image_path(sample_id, len(grid.shape), suffix)).as_posix()
        content, stored = encode(image, grid, sample_id, study)
        write_atomic(release / path, content)
        rows.append(
            (sample_id, path, len(content), hashlib.sha256(content).hexdigest(), voxel_digest(stored, grid.affine))
        )
    table = pd.DataFrame(rows, columns=["sample_id", "path", "bytes", "sha256", "voxel_sha256"])
    return table.astype(
        {"sample_id": "string", "path": "string", "bytes": "int64", "sha256": "string", "voxel_sha256": "string"}
    )


# -------------------------------------------------------------------------------------------------- dataset


@dataclass(frozen=True)
class Story:
    """What the texts of a dataset say about where it comes from.

    Attributes
    ----------
    study, title
        As in the study file.
    config
        The study's `release` section.
    covariates
        The study's covariates.
    grid
        Shape and spacing of the images.
    sampler
        One phrase, for example "dpmpp, guidance scale 1".
    facts
        See `release.facts`.
    sources
        BIDS SourceDatasets entries, as far as known.
    distilled
        second_model.subjects.
    """

    study: str
    title: str
    config: Release
    covariates: Covariates
    grid: Grid
    sampler: str
    facts: Mapping[str, Any]
    sources: Sequence[dict[str, str]] = ()
    distilled: int = 0

    @classmethod
    def of(cls, study: Study, facts: Mapping[str, Any], sources: Sequence[dict[str, str]] = ()) -> Self:
        """What a study, and what was measured in it, have to tell."""
        steps = study.generate.num_inference_steps
        return cls(
            study=study.study,
            title=study.title,
            config=study.release,
            covariates=study.covariates,
            grid=Grid(tuple(study.preprocess.shape), study.preprocess.spacing_mm),
            sampler=(
                f"{study.generate.sampler}{f', {steps} steps' if steps else ''}, guidance scale"
                f" {study.generate.guidance_scale:g}"
            ),
            facts=facts,
            sources=sources,
            distilled=study.second_model.subjects,
        )

    @property
    def card(self) -> Mapping[str, Any]:
        return self.facts["cohort"]

    @property
    def privacy(self) -> Mapping[str, Any] | None:
        return self.facts["privacy"]

    @property
    def models(self) -> Mapping[str, Any]:
        return {one["name"]: one for one in self.facts["models"]}

    @property
    def metrics(self) -> Mapping[str, Any] | None:
        return self.facts["metrics"]


def complete_dataset(release: Path, plan: pd.DataFrame, images: pd.DataFrame, story: Story) -> Path:
    """Add everything but the images to a dataset; `dataset_description.json` comes last and says that it is whole.

    Images in the folder that are not planned any more are removed if they carry this study's mark.

    Parameters
    ----------
    release
        Root of the dataset; holds the images already.
    plan
        sample_id and a column per covariate (requested values).
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
    _remove_stale(release, set(images["path"]), story.study)
    folders = set(_parts(plan, images, story))
    _remove_tables(release, folders)
    for folder, suffix in itertools.product(folders, SUFFIXES):
        (release / folder / f"{suffix}.json").unlink(missing_ok=True)  # the sidecar of an earlier suffix
    for name, content in texts(plan, images, story):
        write_atomic(release / name, content)
    return description


def texts(plan: pd.DataFrame, images: pd.DataFrame, story: Story) -> Iterator[tuple[str, bytes]]:
    """Name in the release and content of every file of its datasets but the images; the description of all comes last.

    Parameters are those of `complete_dataset`; of `images`, sample_id, path and sha256 are read.
    """
    parts = _parts(plan, images, story)
    for folder, (members, written) in parts.items():
        found = _dataset_texts(members, written, story, Part(folder, len(plan)) if folder else None)
        yield from ((f"{folder}/{name}" if folder else name, content) for name, content in found.items())
    if "" not in parts:
        yield from _common_texts(len(plan), story, None, list(parts)).items()


@dataclass(frozen=True)
class Part:
    """One of several datasets of a release: its folder, and how many subjects the release has."""

    folder: str
    total: int


def _parts(plan: pd.DataFrame, images: pd.DataFrame, story: Story) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Rows of plan and images by the folder of their dataset; paths are within it."""
    inside = [image_path(sample_id, len(story.grid.shape), story.config.suffix) for sample_id in images["sample_id"]]
    folders = np.array(
        [path.removesuffix(end).rstrip("/") for path, end in zip(images["path"], inside, strict=True)], dtype=object
    )
    if not any(folders):
        return {"": (plan, images)}
    images = images.assign(path=inside)
    plan = plan.set_index("sample_id").loc[images["sample_id"]].reset_index()
    return {str(folder): (plan[folders == folder], images[folders == folder]) for folder in sorted(set(folders))}


def _dataset_texts(plan: pd.DataFrame, images: pd.DataFrame, story: Story, part: Part | None) -> dict[str, bytes]:
    """Everything but the images of one dataset; a part of a release also gets checksums, since the release's seal lies
    elsewhere.
    """
    volumes = len(story.grid.shape) == 3
    found = {
        "participants.tsv": _participants(plan, images, story.covariates, volumes),
        "participants.json": _json(_participants_dictionary(story.covariates, volumes)),
    }
    if volumes:
        found[f"{story.config.suffix}.json"] = _json(_sidecar(story.study, story.config))
    if volumes and part is not None:
        found[".bidsignore"] = f"/{CHECKSUMS}\n".encode()
    found |= _common_texts(len(plan), story, part, [])
    if part is not None:
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
        digests |= dict(zip(images["path"], images["sha256"], strict=True))
        found[CHECKSUMS] = verify.checksum_bytes(digests.items())
    return found


def _common_texts(subjects: int, story: Story, part: Part | None, datasets: Sequence[str]) -> dict[str, bytes]:
    """What a dataset and a release of several have alike."""
    return {
        "README": _readme(subjects, story, part, datasets).encode(),
        "CHANGES": f"{VERSION}\n  - First release: {subjects} synthetic subjects.\n".encode(),
        "LICENSE": _licence(story.config).encode(),
        "dataset_description.json": _json(_description(story, part, datasets)),
    }


def _remove_tables(release: Path, wanted: set[str]) -> None:
    """Remove tables and texts of datasets of an earlier plan, which lay in other folders."""
    tables = ["participants.tsv", "participants.json", ".bidsignore", *(f"{suffix}.json" for suffix in SUFFIXES)]
    for folder in {"", *(place.name for place in release.glob("shard-*") if place.is_dir())} - wanted:
        for name in tables + ([*TEXTS, "dataset_description.json", CHECKSUMS] if folder else []):
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


def _participants(plan: pd.DataFrame, images: pd.DataFrame, covariates: Covariates, volumes: bool) -> bytes:
    table = plan.sort_values("sample_id", ignore_index=True)
    columns = {"participant_id": [f"sub-{s}" for s in table["sample_id"]]}
    if not volumes:
        paths = dict(zip(images["sample_id"], images["path"], strict=True))
        columns["image"] = [paths[s] for s in table["sample_id"]]
    for name in covariates:
        columns[name] = [verify.cell(None if pd.isna(value) else value) for value in table[name]]
    return verify.table_bytes([list(columns), *zip(*columns.values(), strict=True)])


def _participants_dictionary(covariates: Covariates, volumes: bool) -> dict[str, Any]:
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
    return fields


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
        "Description": f"{SYNTHETIC} {_origin(story)} Privacy: {_privacy(story)}",
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
    if story.config.authors:
        fields["Authors"] = story.config.authors
    if story.config.acknowledgements:
        fields["Acknowledgements"] = story.config.acknowledgements
    if story.sources:
        fields["SourceDatasets"] = list(story.sources)
    return fields


def _origin(story: Story) -> str:
    what = "simulated images (no real person was ever imaged)" if story.card.get("simulated") else "real images"
    return (
        f"The model learnt from a cohort of {story.card['scans']} {what} of {story.card['subjects']} subjects, of which"
        " a part was held out for evaluation."
    )


def _privacy(story: Story) -> str:
    if story.privacy is None:
        return "What these images reveal about the subjects that the model learnt from was not tested."
    calibration = story.privacy["calibration"]
    text = f"Verdict: {story.privacy['verdict']}."
    if calibration["status"] == "CALIBRATED":
        text += (
            f" Every image was compared with every training scan by {_counted(calibration['detectors'])}, and"
            f" drawn again if one of them found it nearer than {100 * (1 - calibration['level']):g} % of"
            f" {calibration['subjects']} unseen real subjects come."
        )
    else:
        text += (
            f" The filter had no thresholds and rejected nothing: {calibration['needed']} unseen real subjects are"
            f" needed for its level and there were {calibration['subjects']}."
        )
    if bad := stopping(story.privacy.get("gates", [])):
        why = "it failed" if story.privacy["verdict"] == "FAIL" else f"the filter is none ({bad[0]['name']})"
        text += (
            f" This dataset was written although {why}, because its study says so (privacy.enforce: report). It must"
            " not be treated as anonymous."
        )
    return text + " A verdict is the outcome of stated tests, not a proof of anonymity."


def _counted(detectors: Sequence[str]) -> str:
    return f"the detector {detectors[0]}" if len(detectors) == 1 else f"{len(detectors)} detectors"


def _readme(subjects: int, story: Story, part: Part | None, datasets: Sequence[str]) -> str:
    size = " x ".join(map(str, story.grid.shape))
    if story.grid.spacing_mm is None:
        layout = (
            f"images/ID.png: grey pictures of {size} pixels (rows x columns), 0 to {PICTURE_SCALE}. participants.tsv"
            " names the picture of each subject."
        )
    else:
        path = image_path("ID", 3, story.config.suffix)
        spacing = story.grid.spacing_mm
        edges = " x ".join(f"{mm:g}" for mm in ([spacing] if isinstance(spacing, float | int) else spacing))
        layout = (
            f"{path}: volumes of {size} voxels of {edges} mm, axes left-right, posterior-anterior,"
            f" inferior-superior,\norigin in the middle of the grid, int16 from 0 to {VOLUME_SCALE} in arbitrary units."
            f" The layout is BIDS {BIDS_VERSION}, type derivative."
        )
    if datasets:
        layout = (
            f"{len(datasets)} datasets of at most {story.config.shard_size} subjects, each complete by itself:"
            f" shard-GROUP-NUMBER/. In each, {layout}\nA subject's dataset follows from its group and number alone."
            " provenance/ledger.parquet is the table of all."
        )
    many = (
        f"{subjects} synthetic subjects, of a cohort of {part.total}; figures below are of the cohort"
        if part
        else f"{subjects} synthetic subjects"
    )
    lines = []
    for name, covariate in story.covariates.items():
        meaning = (
            f"one of {', '.join(covariate.levels)}"
            if isinstance(covariate, CategoricalCovariate)
            else f"in {covariate.unit}"
        )
        lines.append(f"- {name}: {meaning}{'. ' + covariate.description if covariate.description else ''}")
    title = f"Study {story.study}: {story.title}" if story.title else f"Study {story.study}"
    parts = [
        f"# {story.config.name}{f', {part.folder}' if part else ''}",
        f"{SYNTHETIC}\n{many}. {title}.",
        f"## Where they come from\n{_origin(story)}\nSampling: {story.sampler}. Software: meddiff_steps {__version__}.",
        *([f"## Model\n{card.model(story.models, story.distilled)}"] if story.models else []),
        f"## What is here\n{layout}",
        "## Covariates\nparticipants.tsv holds the values that the model was asked for, not measurements of the images;"
        " n/a means left open.\n" + "\n".join(lines),
        f"## Quality\n{(card.quality(story.metrics) if story.metrics else '') or 'Not measured.'}",
        "\n\n".join(filter(None, [f"## Privacy\n{_privacy(story)}", card.privacy(story.privacy or {})])),
        f"## Please note\n{_CAUTION}",
        f"## From the publisher\n{card.blanks(story.config.card)}",
        f"## How to check it\n{card.CHECK_PART if part else card.CHECK}",
        f"## Licence\n{story.config.licence}; see LICENSE.",
    ]
    if story.config.acknowledgements:
        parts.append(f"## Acknowledgements\n{story.config.acknowledgements}")
    return "\n\n".join(parts) + "\n"


def licence(code: str) -> tuple[str, str | None]:
    """A licence's name, and the address of its text where it is a well-known one.

    >>> licence("CC0")[1]
    'https://creativecommons.org/publicdomain/zero/1.0/legalcode'
    """
    return _LICENCES.get(code, (code, None))


def _licence(config: Release) -> str:
    name, url = licence(config.licence)
    return f"{config.name}\n\nThe synthetic images and tables in this dataset are released under:\n\n{name}\n" + (
        f"{url}\n" if url else ""
    )


def _json(value: Any) -> bytes:
    return verify.json_bytes(value, ascii_only=False)


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
