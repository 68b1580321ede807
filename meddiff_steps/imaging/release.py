"""The synthetic cohort as a dataset: 3D as BIDS derivative, 2D as PNG with a table.

Every file says that it is synthetic on its own: NIfTI in `descrip` and in a header extension, PNG in text chunks,
and the dataset in its sidecar, tables, description and README.  Equal input gives equal bytes.

Volumes are int16 from 0 to 1000.  The step of 0.001 adds noise 70 dB below full scale, far below any generative model's error;
8 bits would save a third of the bytes and band dark tissue, 12 bits cost 15 % more and store decoder noise.  Integers
without scl_slope are read alike by every tool.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import math
import re
import shutil
import stat
import sys
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, get_args

import nibabel as nib
import numpy as np
import pandas as pd
from PIL import Image as PilImage
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from meddiff_steps import __version__
from meddiff_steps.cohort.manifest import content_digest
from meddiff_steps.config import CategoricalCovariate, Covariates, Release, Study
from meddiff_steps.errors import UserError
from meddiff_steps.files import CHECKSUMS, sha256_file, write_atomic
from meddiff_steps.imaging import card
from meddiff_steps.imaging.layout import image_path
from meddiff_steps.imaging.shards import Shards

logger = logging.getLogger(__name__)

#: Stored value of an image value of 1.
VOLUME_SCALE, PICTURE_SCALE = 1000, 255
#: zlib level of NIfTI files: 3 % smaller than 1; 9 takes half as long again for 1 % more.
GZIP_LEVEL = 6
#: NIfTI header extension code "comment": plain text, read by every tool that reads extensions.
COMMENT = 6
#: Bytes of a NIfTI-1 header.
_HEADER = 348
BIDS_VERSION = "1.10.0"
#: Version of the dataset; CHANGES tells of it.
VERSION = "1.0.0"
SUFFIXES = get_args(Release.model_fields["suffix"].annotation)
TEXTS = ("README", "CHANGES", "LICENSE")
SYNTHETIC = "SYNTHETIC: made by a generative model. Shows no real person."

_CAUTION = """Do not mix these images with scans of people without keeping the mark, and draw no diagnosis from them.
Every image says in its own file that it is synthetic; converting to another format can lose that."""
_SAMPLE_ID = re.compile(r"[A-Za-z0-9]+")
_LICENCES = {
    "CC0": ("Creative Commons Zero 1.0 Universal (public domain dedication)", "https://creativecommons.org/publicdomain/zero/1.0/legalcode"),
    "PDDL": ("Open Data Commons Public Domain Dedication and License 1.0", "https://opendatacommons.org/licenses/pddl/1-0/"),
    "CC-BY-4.0": ("Creative Commons Attribution 4.0 International", "https://creativecommons.org/licenses/by/4.0/legalcode"),
    "CC-BY-SA-4.0": ("Creative Commons Attribution-ShareAlike 4.0 International", "https://creativecommons.org/licenses/by-sa/4.0/legalcode"),
    "CC-BY-NC-4.0": ("Creative Commons Attribution-NonCommercial 4.0 International", "https://creativecommons.org/licenses/by-nc/4.0/legalcode"),
    "CC-BY-NC-SA-4.0": (
        "Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International",
        "https://creativecommons.org/licenses/by-nc-sa/4.0/legalcode",
    ),
}


@dataclass(frozen=True)
class Grid:
    """What turns an array into a picture of something: spacing (mm; None for 2D) and shape without the channel axis."""

    shape: tuple[int, ...]
    spacing_mm: float | None

    @property
    def affine(self) -> np.ndarray | None:
        """(4, 4) RAS+ affine in mm of a 3D grid; the middle of the grid is the origin.  None for 2D."""
        if self.spacing_mm is None:
            return None
        affine = np.diag([self.spacing_mm] * 3 + [1.0])
        affine[:3, 3] = -self.spacing_mm * (np.array(self.shape) - 1) / 2
        return affine


# --------------------------------------------------------------------------------------------------- images


def encode_volume(image: np.ndarray, grid: Grid, sample_id: str, study: str) -> tuple[bytes, np.ndarray]:
    """A compressed NIfTI-1 file.

    Parameters
    ----------
    image
        (x, y, z) in [0, 1], RAS+.
    grid
        Shape and spacing (mm) of `image`.
    sample_id, study
        Named in the header.

    Returns
    -------
    content
        The file's bytes, the same for the same input.
    stored
        int16 (x, y, z), 0 to 1000.
    """
    stored = np.rint(image * VOLUME_SCALE).astype(np.int16)
    return gzip.compress(_volume(stored, grid, sample_id, study), GZIP_LEVEL, mtime=0), stored


def _volume(stored: np.ndarray, grid: Grid, sample_id: str, study: str) -> bytes:
    """The NIfTI file of stored values, not compressed."""
    volume = nib.Nifti1Image(stored, grid.affine)
    volume.header.set_xyzt_units("mm", "sec")
    volume.header.set_slope_inter(1, 0)
    volume.header["cal_max"] = VOLUME_SCALE
    volume.header["descrip"] = f"SYNTHETIC, no real person; {study}".encode("ascii", "replace")[:79]
    volume.set_qform(grid.affine, code="aligned")  # not "scanner": there was none
    volume.set_sform(grid.affine, code="aligned")
    volume.header.extensions.append(nib.nifti1.Nifti1Extension(COMMENT, _mark(sample_id, study).encode()))
    return volume.to_bytes()


def encode_picture(image: np.ndarray, sample_id: str, study: str) -> tuple[bytes, np.ndarray]:
    """A PNG file (bytes) and its pixels, uint8 (rows, columns), from `image` (rows, columns) in [0, 1]."""
    stored = np.rint(image * PICTURE_SCALE).astype(np.uint8)
    return _picture(stored, sample_id, study), stored


def _picture(stored: np.ndarray, sample_id: str, study: str) -> bytes:
    text = PngInfo()
    text.add_text("Description", SYNTHETIC)
    text.add_text("Synthesis", _mark(sample_id, study))
    stream = io.BytesIO()
    PilImage.fromarray(stored).save(stream, format="PNG", pnginfo=text)
    return stream.getvalue()


def encode(image: np.ndarray, grid: Grid, sample_id: str, study: str) -> tuple[bytes, np.ndarray]:
    """`encode_volume` or `encode_picture`, as the grid has it."""
    return encode_volume(image, grid, sample_id, study) if len(grid.shape) == 3 else encode_picture(image, sample_id, study)


def voxel_digest(stored: np.ndarray, affine: np.ndarray | None) -> str:
    """SHA-256 of what an image shows: `content_digest` of its stored values and, in 3D, the affine (float32, as NIfTI keeps it).

    Independent of compression and of everything else in the header.
    """
    geometry = "" if affine is None else np.asarray(affine, dtype="<f4").tobytes().hex()
    return hashlib.sha256(f"meddiff/voxels/v1|{geometry}|{content_digest(stored)}".encode()).hexdigest()


def _mark(sample_id: str, study: str) -> str:
    return json.dumps({"synthetic": True, "sample_id": sample_id, "study": study}, sort_keys=True)


def read_mark(path: Path) -> dict[str, Any] | None:
    """The mark that `write_images` left in a file, or None if there is none."""
    try:
        if path.suffix == ".png":
            with PilImage.open(path, formats=["PNG"]) as picture:
                text = picture.info.get("Synthesis")
        else:
            text = _comment(nib.load(path).header)
    except (OSError, EOFError, zlib.error, ValueError, AttributeError, nib.filebasedimages.ImageFileError):
        return None
    return _read_mark(text)


def _comment(header: Any) -> str | None:
    return next((e.text for e in header.extensions if e.code == COMMENT), None)


def _read_mark(text: str | None) -> dict[str, Any] | None:
    try:
        mark = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    return mark if isinstance(mark, dict) and mark.get("synthetic") is True else None


class Undecodable(Exception):
    """A file is not the image that its name promises."""


class OtherForm(Undecodable):
    """It is an image, but of another shape or type; its values were not read."""


@dataclass(frozen=True)
class Decoded:
    """A released image as read back.

    Attributes
    ----------
    stored, affine
        Its values (*spatial) and, of a volume, its affine (4, 4).
    description, mark
        What it says of itself; the mark is None if there is none.
    content
        The file, without its compression if it is a volume.
    behind
        What does not belong to the image that was read.
    """

    stored: np.ndarray
    affine: np.ndarray | None
    description: str
    mark: dict[str, Any] | None
    content: bytes
    behind: list[str]


#: Bytes that an image may have beside its values: headers and marks have less than a thousand.
_BESIDE = 1 << 16


def decode(path: Path, grid: Grid) -> Decoded:
    """A released image.  No more is read, or unpacked, than an image of this grid can have.

    Raises
    ------
    Undecodable
        The file cannot be decoded, or (`OtherForm`) is no image of this grid.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise Undecodable("a link, or no file")
        most = math.prod(grid.shape) * (2 if len(grid.shape) == 3 else 1) + _BESIDE
        with open(path, "rb") as stream:
            packed = stream.read(2 * most)  # more than what no compression would make shorter
        return _decode_volume(packed, grid, most) if len(grid.shape) == 3 else _decode_picture(packed, grid)
    except Undecodable:
        raise
    except Exception as error:  # noqa: BLE001 decoders raise anything on damaged data
        raise Undecodable(f"{type(error).__name__}: {error}") from None


def _decode_volume(packed: bytes, grid: Grid, most: int) -> Decoded:
    unpacker = zlib.decompressobj(31)
    content = unpacker.decompress(packed, most)
    behind = []
    if packed[3:8] != bytes(5):
        behind.append("fields in the header of its compression")
    if unpacker.unused_data:
        behind.append("bytes behind its compressed content")
    if not unpacker.eof:
        if len(content) < most:
            raise Undecodable("cut short")
        behind.append(f"more than {most} bytes")
    header = nib.Nifti1Header.from_fileobj(io.BytesIO(content))
    _check_form(tuple(header.get_data_shape()), header.get_data_dtype(), grid, np.int16)
    volume = nib.Nifti1Image.from_bytes(content)
    stored = np.asarray(volume.dataobj.get_unscaled())  # type: ignore[attr-defined]
    return Decoded(stored, volume.affine, header["descrip"].item().decode("ascii", "replace"), _read_mark(_comment(header)), content, behind)


def _decode_picture(content: bytes, grid: Grid) -> Decoded:
    with PilImage.open(io.BytesIO(content), formats=["PNG"]) as picture:
        _check_form(picture.size[::-1], np.dtype(np.uint8) if picture.mode == "L" else picture.mode, grid, np.uint8)
        stored = np.asarray(picture)
        return Decoded(stored, None, str(picture.info.get("Description", "")), _read_mark(picture.info.get("Synthesis")), content, [])


def _check_form(shape: tuple[int, ...], kind: Any, grid: Grid, expected: Any) -> None:
    if shape != grid.shape or kind != expected:
        raise OtherForm(f"{kind} {shape}, expected {np.dtype(expected)} {grid.shape}")


def departures(image: Decoded, grid: Grid, sample_id: str, study: str) -> list[str]:
    """What a file holds otherwise than `encode` writes it for the same stored values: every tool then shows what the ledger holds, and nothing is hidden."""
    if len(grid.shape) == 3:
        return image.behind + _volume_departures(image.content, _volume(image.stored, grid, sample_id, study))
    found, pixels = _chunks(image.content)
    expected, _ = _chunks(_picture(image.stored, sample_id, study))
    unpacker, size = zlib.decompressobj(), grid.shape[0] * (grid.shape[1] + 1)
    try:
        whole = len(unpacker.decompress(pixels, size + 1)) == size and unpacker.eof and not unpacker.unused_data
    except zlib.error:
        whole = False
    return ([] if found == expected else ["other chunks than texts and pixels"]) + ([] if whole else ["more or less than its pixels"])


def _volume_departures(content: bytes, expected: bytes) -> list[str]:
    if content == expected:
        return []
    found, wanted = (np.frombuffer(one, nib.nifti1.header_dtype, 1)[0] for one in (content, expected))
    fields = [name for name in nib.nifti1.header_dtype.names or () if found[name].tobytes() != wanted[name].tobytes()]
    # The quaternion comes from an eigenvector, whose last bits are those of the machine.
    wrong = [name for name in fields if not (name.startswith("quatern_") and abs(found[name] - wanted[name]) <= 1e-6)]
    return [f"other {', '.join(wrong)}"] * bool(wrong) + ["other bytes behind its header"] * (content[_HEADER:] != expected[_HEADER:])


def _chunks(content: bytes) -> tuple[list[bytes], bytes]:
    """The chunks of a PNG but for its pixels, and these, packed: another version of zlib packs the same ones otherwise."""
    others, pixels, place = [content[:8]], b"", 8
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] == b"IDAT":
            pixels += content[place + 8 : end - 4]
        else:
            others.append(content[place:end])
        place = end
    return others, pixels


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
        sample_id, path (relative to `release`), bytes, sha256 (of the file), voxel_sha256 (`voxel_digest`), sorted by sample_id.

    Raises
    ------
    UserError
        The shape is not the study's, an id is not letters and digits or occurs twice, or an image has values outside [0, 1].
    """
    shards = Shards([generated])
    if shards.shape("image") != (1, *grid.shape):
        raise UserError(f"{generated}: images of shape {shards.shape('image')}, expected {(1, *grid.shape)} by preprocess.shape. Generate the shard again.")
    samples = shards.column("sample_id")
    for sample_id in samples:
        if not _SAMPLE_ID.fullmatch(sample_id):
            raise UserError(f"{generated}: sample_id {sample_id!r} may hold letters and digits only (BIDS). Rename the group in `plan`, and plan again.")
    if len(set(samples)) < len(samples):
        twice = sorted({s for s in samples if samples.count(s) > 1})
        raise UserError(f"{generated}: sample_id {_shorten(twice)} occurs more than once. Generate the shard again.")
    rows = []
    chosen = [row for row, sample_id in enumerate(samples) if only is None or sample_id in only]
    for row in tqdm(sorted(chosen, key=samples.__getitem__), desc="images", unit="image", mininterval=5, file=sys.stderr):
        sample_id = samples[row]
        image = shards.tensor("image", row)[0].astype(np.float32)
        if not (image.min() >= 0 and image.max() <= 1):  # false for NaN, too
            found = f"values from {image.min():g} to {image.max():g}"
            raise UserError(f"{generated}: image of {sample_id} holds {found}, expected 0 to 1. Generate the shard again.")
        path = PurePosixPath(folders.get(sample_id, ""), image_path(sample_id, len(grid.shape), suffix)).as_posix()
        content, stored = encode(image, grid, sample_id, study)
        write_atomic(release / path, content)
        rows.append((sample_id, path, len(content), hashlib.sha256(content).hexdigest(), voxel_digest(stored, grid.affine)))
    table = pd.DataFrame(rows, columns=["sample_id", "path", "bytes", "sha256", "voxel_sha256"])
    return table.astype({"sample_id": "string", "path": "string", "bytes": "int64", "sha256": "string", "voxel_sha256": "string"})


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
    card
        The cohort's card; `scans` and `subjects` (counts) and `simulated` (bool) are read.
    sources
        BIDS SourceDatasets entries, as far as known.
    privacy
        The privacy report; `verdict`, `enforce`, `calibration`, `gates` and `counts` are read. None: not tested.
    models
        Cards of the models by name.
    distilled
        distill.subjects.
    metrics
        The evaluation's metrics. None: not measured.
    """

    study: str
    title: str
    config: Release
    covariates: Covariates
    grid: Grid
    sampler: str
    card: dict[str, Any]
    sources: Sequence[dict[str, str]] = ()
    privacy: dict[str, Any] | None = None
    models: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    distilled: int = 0
    metrics: dict[str, Any] | None = None


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

    The paths of `images` say which dataset each is in (`layout`): the release itself, or one of several folders, which are then complete datasets
    with checksums of their own.

    Returns
    -------
    Path
        The dataset_description.json.

    Raises
    ------
    UserError
        A planned sample has no image, an image is not planned, occurs twice, or is not on disk as written; or a stranger's
        image lies in the folder.
    """
    _check_complete(release, plan, images)
    description = release / "dataset_description.json"
    description.unlink(missing_ok=True)  # while the parts change there is no whole
    _remove_stale(release, set(images["path"]), story.study)
    parts = _parts(plan, images, story)
    _remove_tables(release, set(parts))
    for folder, (members, written) in parts.items():
        _write_dataset(release / folder, members, written, story, Part(folder, len(plan)) if folder else None)
    if "" not in parts:
        _write_texts(release, len(plan), story, None, list(parts))
        _write_json(description, _description(story, None, list(parts)))
    return description


@dataclass(frozen=True)
class Part:
    """One of several datasets of a release: its folder, and how many subjects the release has."""

    folder: str
    total: int


def _parts(plan: pd.DataFrame, images: pd.DataFrame, story: Story) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Rows of plan and images by the folder of their dataset; paths are within it."""
    inside = [image_path(sample_id, len(story.grid.shape), story.config.suffix) for sample_id in images["sample_id"]]
    folders = np.array([path.removesuffix(end).rstrip("/") for path, end in zip(images["path"], inside, strict=True)], dtype=object)
    if not any(folders):
        return {"": (plan, images)}
    images = images.assign(path=inside)
    plan = plan.set_index("sample_id").loc[images["sample_id"]].reset_index()
    return {str(folder): (plan[folders == folder], images[folders == folder]) for folder in sorted(set(folders))}


def _write_dataset(root: Path, plan: pd.DataFrame, images: pd.DataFrame, story: Story, part: Part | None) -> None:
    """Everything but the images of one dataset; a part of a release also gets checksums, since the release's seal lies elsewhere."""
    volumes = len(story.grid.shape) == 3
    write_atomic(root / "participants.tsv", _participants(plan, images, story.covariates, volumes).encode())
    _write_json(root / "participants.json", _participants_dictionary(story.covariates, volumes))
    if volumes:
        for suffix in SUFFIXES:
            (root / f"{suffix}.json").unlink(missing_ok=True)  # the sidecar of an earlier suffix
        _write_json(root / f"{story.config.suffix}.json", _sidecar(story.study, story.config))
    _write_texts(root, len(plan), story, part, [])
    _write_json(root / "dataset_description.json", _description(story, part, []))
    if part is not None:
        names = ["participants.tsv", "participants.json", *TEXTS, "dataset_description.json"]
        if volumes:
            write_atomic(root / ".bidsignore", f"/{CHECKSUMS}\n".encode())
            names += [f"{story.config.suffix}.json", ".bidsignore"]
        digests = {name: sha256_file(root / name) for name in names} | dict(zip(images["path"], images["sha256"], strict=True))
        write_atomic(root / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode())


def _write_texts(root: Path, subjects: int, story: Story, part: Part | None, datasets: Sequence[str]) -> None:
    write_atomic(root / "README", _readme(subjects, story, part, datasets).encode())
    write_atomic(root / "CHANGES", f"{VERSION}\n  - First release: {subjects} synthetic subjects.\n".encode())
    write_atomic(root / "LICENSE", _licence(story.config).encode())


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
        raise UserError(f"release: {len(twice)} sample(s) have more than one image: {_shorten(twice)}. Give each images table once.")
    if planned - made:
        raise UserError(
            f"release: {len(planned - made)} planned sample(s) have no image: {_shorten(sorted(planned - made))}. Run the `images` step of their shards."
        )
    if made - planned:
        raise UserError(
            f"release: {len(made - planned)} image(s) are not in the plan: {_shorten(sorted(made - planned))}. Give the plan that they were made by."
        )
    wrong = []
    for path, size in zip(images["path"], images["bytes"], strict=True):
        try:
            if (release / path).stat().st_size != size:
                wrong.append(path)
        except FileNotFoundError:
            wrong.append(path)
    if wrong:
        raise UserError(f"release: {len(wrong)} image(s) in {release} are missing or changed: {_shorten(wrong)}. Run the `images` step again.")


def _remove_stale(release: Path, wanted: set[str], study: str) -> None:
    for partial in release.rglob(".partial-*"):
        partial.unlink()  # of a writer that was killed; all writers have ended before a dataset is completed
    patterns = [f"{place}{pattern}" for place in ("", "shard-*/") for pattern in ("sub-*/anat/*.nii.gz", "images/*.png")]
    found = {p.relative_to(release).as_posix(): p for pattern in patterns for p in release.glob(pattern)}
    stale = sorted(set(found) - wanted)
    strange = [name for name in stale if (read_mark(found[name]) or {}).get("study") != study]
    if strange:
        raise UserError(
            f"{release}: {len(strange)} image(s) were not made by study {study!r}: {_shorten(strange)}. Move them elsewhere: the folder is published as it is."
        )
    for name in stale:
        found[name].unlink()
    for folder in {found[name].parent.parent for name in stale if name.endswith(".nii.gz")}:
        if not any(p.is_file() for p in folder.rglob("*")):
            shutil.rmtree(folder)
    if stale:
        logger.warning("removed %d image(s) of an earlier plan: %s", len(stale), _shorten(stale))


def _participants(plan: pd.DataFrame, images: pd.DataFrame, covariates: Covariates, volumes: bool) -> str:
    table = plan.sort_values("sample_id", ignore_index=True)
    columns = {"participant_id": [f"sub-{s}" for s in table["sample_id"]]}
    if not volumes:
        paths = dict(zip(images["sample_id"], images["path"], strict=True))
        columns["image"] = [paths[s] for s in table["sample_id"]]
    for name in covariates:
        columns[name] = [_cell(value) for value in table[name]]
    return pd.DataFrame(columns).to_csv(sep="\t", index=False, lineterminator="\n")


def _cell(value: Any) -> str:
    if pd.isna(value):
        return "n/a"
    return value if isinstance(value, str) else f"{float(value):.6g}"


def _participants_dictionary(covariates: Covariates, volumes: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "Description": "Synthetic subjects and the covariates that were requested for them. No row describes a real person.",
        "participant_id": {"Description": "Synthetic subject; no real person stands behind it."},
    }
    if not volumes:
        fields["image"] = {"Description": "Path of the subject's synthetic image."}
    for name, covariate in covariates.items():
        own = covariate.description.strip().rstrip(".")
        fields[name] = {"Description": f"{own + '. ' if own else ''}Value that the model was asked for (requested), not measured in the image; n/a: left open."}
        if isinstance(covariate, CategoricalCovariate):
            fields[name]["Levels"] = {level: level for level in covariate.levels}
        else:
            fields[name]["Units"] = covariate.unit
    return fields


def described(study: Study) -> dict[str, bytes]:
    """Dictionaries and licence of every dataset of a study, by name, as `complete_dataset` writes them: they follow from the study alone."""
    volumes = study.spatial_dims == 3
    found = {"participants.json": _json(_participants_dictionary(study.covariates, volumes)), "LICENSE": _licence(study.release).encode()}
    return found | ({f"{study.release.suffix}.json": _json(_sidecar(study.study, study.release))} if volumes else {})


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
    software = {"Name": "meddiff_steps", "Version": __version__, "Description": f"Latent diffusion model of study {story.study}, sampled with {story.sampler}."}
    fields: dict[str, Any] = {
        "Name": f"{story.config.name}, {part.folder}" if part else story.config.name,
        "License": story.config.licence,
        "GeneratedBy": [software],
        "Description": f"{SYNTHETIC} {_origin(story)} Privacy: {_privacy(story)}",
        "Keywords": ["synthetic", "generative model", "latent diffusion"],
        "Synthetic": True,
    }
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
    return f"The model learnt from a cohort of {story.card['scans']} {what} of {story.card['subjects']} subjects, of which a part was held out for evaluation."


def _privacy(story: Story) -> str:
    if story.privacy is None:
        return "What these images reveal about the subjects that the model learnt from was not tested."
    calibration = story.privacy["calibration"]
    text = f"Verdict: {story.privacy['verdict']}."
    if calibration["status"] == "CALIBRATED":
        text += (
            f" Every image was compared with every training scan by {len(calibration['detectors'])} detectors, and drawn again if one of them found it nearer"
            f" than {100 * (1 - calibration['level']):g} % of {calibration['subjects']} unseen real subjects come."
        )
    else:
        text += (
            f" The filter had no thresholds: {calibration['needed']} unseen real subjects are needed for its level and there were {calibration['subjects']}."
        )
    if story.privacy["verdict"] == "FAIL":
        text += " This dataset was written although it failed, because its study says so (privacy.enforce: report). It must not be treated as anonymous."
    return text + " A verdict is the outcome of stated tests, not a proof of anonymity."


def _readme(subjects: int, story: Story, part: Part | None, datasets: Sequence[str]) -> str:
    size = " x ".join(map(str, story.grid.shape))
    if story.grid.spacing_mm is None:
        layout = f"images/ID.png: grey pictures of {size} pixels (rows x columns), 0 to {PICTURE_SCALE}. participants.tsv names the picture of each subject."
    else:
        path = image_path("ID", 3, story.config.suffix)
        layout = (
            f"{path}: volumes of {size} voxels of {story.grid.spacing_mm:g} mm, axes left-right, posterior-anterior, inferior-superior,\n"
            f"origin in the middle of the grid, int16 from 0 to {VOLUME_SCALE} in arbitrary units. The layout is BIDS {BIDS_VERSION}, type derivative."
        )
    if datasets:
        layout = (
            f"{len(datasets)} datasets of at most {story.config.shard_size} subjects, each complete by itself: shard-GROUP-NUMBER/. In each, {layout}\n"
            "A subject's dataset follows from its group and number alone. provenance/ledger.parquet is the table of all."
        )
    many = f"{subjects} synthetic subjects, of a cohort of {part.total}; figures below are of the cohort" if part else f"{subjects} synthetic subjects"
    lines = []
    for name, covariate in story.covariates.items():
        meaning = f"one of {', '.join(covariate.levels)}" if isinstance(covariate, CategoricalCovariate) else f"in {covariate.unit}"
        lines.append(f"- {name}: {meaning}{'. ' + covariate.description if covariate.description else ''}")
    title = f"Study {story.study}: {story.title}" if story.title else f"Study {story.study}"
    parts = [
        f"# {story.config.name}{f', {part.folder}' if part else ''}",
        f"{SYNTHETIC}\n{many}. {title}.",
        f"## Where they come from\n{_origin(story)}\nSampling: {story.sampler}. Software: meddiff_steps {__version__}.",
        *([f"## Model\n{card.model(story.models, story.distilled)}"] if story.models else []),
        f"## What is here\n{layout}",
        "## Covariates\nparticipants.tsv holds the values that the model was asked for, not measurements of the images; n/a means left open.\n"
        + "\n".join(lines),
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
    return f"{config.name}\n\nThe synthetic images and tables in this dataset are released under:\n\n{name}\n" + (f"{url}\n" if url else "")


def _write_json(path: Path, value: Any) -> None:
    write_atomic(path, _json(value))


def _json(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
