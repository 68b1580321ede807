"""Reading one image: NIfTI volumes, PNG and JPEG pictures, 2D DICOM.

Whatever is wrong with a file is said as a `ScanError`, so that a cohort can go on without that scan and still
know why it was left out.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image as PilImage
from PIL import ImageOps

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.pointers import not_fetched
from meddiff_steps.imaging.geometry import affine_problems, storage_problems, two_spaces

_NIFTI_CLASSES: dict[int, type[nib.Nifti1Image]] = {348: nib.Nifti1Image, 540: nib.Nifti2Image}
_PICTURE_FORMATS = ("PNG", "JPEG")


class ScanError(UserError):
    """One scan cannot be used.

    Parameters
    ----------
    path
        The file.
    reason
        A few words without file names or numbers, the same for the same kind of trouble, so that reasons can be
        counted.
    detail
        What was found, what was expected, and the remedy.
    """

    def __init__(self, path: Path | str, reason: str, detail: str) -> None:
        super().__init__(
            path, reason, detail
        )  # all arguments: exceptions are pickled on their way out of a worker process
        self.path, self.reason, self.detail = Path(path), reason, detail

    def __str__(self) -> str:
        return f"{self.path}: {self.detail}"


@dataclass(frozen=True)
class Image:
    """One image in its own orientation and units.

    Attributes
    ----------
    array
        float32, (x, y, z) voxels along the file's axes, or (rows, columns) for a picture; finite.
    affine
        (4, 4) voxel index to mm in RAS+ world space; None for pictures.
    blank
        Bool, of the array's shape: what the file itself says shows nothing (transparent, padding); None where it says
        nothing.
    two_spaces
        As of `geometry.two_spaces`.
    """

    array: np.ndarray
    affine: np.ndarray | None
    blank: np.ndarray | None = None
    two_spaces: str | None = None


#: Channels of a colour picture, by number.
COLOURS = {"red": 0, "green": 1, "blue": 2}


def read_image(
    path: Path,
    *,
    allow_constant: bool = False,
    sha256: str | None = None,
    labels: bool = False,
    colour: str = "luminance",
) -> Image:
    """Read one image.

    Parameters
    ----------
    path
        `.nii`, `.nii.gz`, `.png`, `.jpg`, `.jpeg` or `.dcm` (or any name that holds DICOM); the content decides, not
        the name.
    allow_constant
        Accept an image with a single value (masks).
    sha256
        What the file's bytes must have, if it was looked at before.
    labels
        The values are numbers of structures, not grey levels: a picture with a palette gives its indices, and one that
        is coloured or lossy is refused.
    colour
        What a colour picture's grey levels are: its `luminance`, or one of `COLOURS`.  Grey pictures are as they are.

    Returns
    -------
    Image
        Volumes with the header's intensity scaling applied and trailing axes of length 1 dropped; pictures as grey
        levels on black; padding of DICOM as dark as the darkest pixel, and what is stored inverted (MONOCHROME1) as it
        is shown.

    Raises
    ------
    ScanError
        The file is missing, not the one that `sha256` was taken of, a directory, unreadable, empty, truncated, of an
        unknown format, of the wrong dimension, has voxels without size, does not say where left and right are, or holds
        values that are not finite or all the same, or labels are wanted and the picture can hold none.
    UserError
        The content of the file was not fetched (git-annex, Git LFS), or it is DICOM and pydicom is not installed.
    """
    path = Path(path)
    content = _read_bytes(path)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        detail = (
            "not the file that the manifest was made of. Restore it, or read the cohort again (remove"
            " cohort/manifest.parquet)."
        )
        raise ScanError(path, "changed since the cohort was read", detail)
    if content[:2] == b"\x1f\x8b":
        image = _decode_nifti(path, _gunzip(path, content))
    elif (
        int.from_bytes(content[:4], "little") in _NIFTI_CLASSES or int.from_bytes(content[:4], "big") in _NIFTI_CLASSES
    ):
        image = _decode_nifti(path, content)
    elif content[128:132] == b"DICM":
        image = _decode_dicom(path, labels)
    elif content[:8] == b"\x89PNG\r\n\x1a\n" or content[:3] == b"\xff\xd8\xff":
        image = _decode_picture(path, content, labels, colour)
    else:
        raise ScanError(
            path,
            "unknown format",
            f"starts with the bytes {content[:8].hex(' ')}; expected NIfTI, PNG, JPEG or DICOM. Convert it, for example"
            " with dcm2niix.",
        )
    if image.blank is not None and image.blank.all():
        raise ScanError(
            path, "nothing visible", "all of it is transparent or padding: there is nothing to see. Export it again."
        )
    _check_values(path, image.array, allow_constant)
    return image


def as_volume(path: Path, image: Image, depth: int | None) -> Image:
    """A picture as a volume that shows it `depth` times along its first axis, with voxels of 1 mm; the image as it is
    without a depth.  A volume lies voxel by voxel as its file has it, whatever its affine.

    Raises
    ------
    ScanError
        A volume has another depth.
    """
    if depth is None:
        return image
    if image.affine is None:
        blank = None if image.blank is None else np.repeat(image.blank[np.newaxis], depth, axis=0)
        return Image(np.repeat(image.array[np.newaxis], depth, axis=0), np.eye(4), blank)
    if image.array.shape[0] != depth:
        raise ScanError(
            path,
            "another depth",
            f"{image.array.shape[0]} voxels along the first axis, expected the {depth} of preprocess.depth. Turn the"
            " volume so that its picture is seen along its first axis, or set preprocess.depth.",
        )
    return Image(image.array, np.eye(4), image.blank)


def _read_bytes(path: Path) -> bytes:
    if told := not_fetched(path):  # nothing is wrong with the scan
        raise UserError(f"{path}: {told}.")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ScanError(
            path, "missing file", "no such file. Check cohort.root, the table's path column, or preprocess.brain_mask."
        ) from None
    except IsADirectoryError:
        raise ScanError(
            path,
            "directory",
            "is a directory, expected one image file. DICOM series: convert them to NIfTI, for example with dcm2niix.",
        ) from None
    except OSError as error:
        raise ScanError(
            path, "unreadable file", f"cannot be read ({error.strerror or error}). Check its permissions and the disk."
        ) from None
    if not content:
        raise ScanError(path, "empty file", "the file has 0 bytes. Copy or convert it again.")
    return content


def _gunzip(path: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(
            content
        )  # in one piece, unlike a stream read to the last voxel: this checks length and CRC
    except EOFError:
        raise ScanError(
            path, "truncated file", f"the gzip stream ends early ({len(content):,} bytes). Copy the file again."
        ) from None
    except (OSError, zlib.error) as error:
        raise ScanError(path, "damaged file", f"the gzip stream is damaged ({error}). Copy the file again.") from None


def _decode_nifti(path: Path, content: bytes) -> Image:
    kind = _NIFTI_CLASSES.get(int.from_bytes(content[:4], "little")) or _NIFTI_CLASSES.get(
        int.from_bytes(content[:4], "big")
    )
    if kind is None:
        raise ScanError(
            path,
            "unknown format",
            "the decompressed content is no NIfTI-1 or NIfTI-2 file. Convert it, for example with dcm2niix.",
        )
    try:
        # As stored: nibabel repairs what it reads, sizes of 0 for example become 1 mm.
        raw = kind.header_class(content[: kind.header_class.sizeof_hdr], check=False)
        for reason, detail in storage_problems(raw, content):
            raise ScanError(path, reason, detail)
        volume = kind.from_bytes(content)
        shape, dtype = volume.shape, volume.get_data_dtype()
    except ScanError:
        raise
    except Exception as error:  # noqa: BLE001 a damaged header can make nibabel raise nearly anything
        raise ScanError(
            path, "damaged header", f"the NIfTI header cannot be used ({error}). Convert the image again."
        ) from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        found = "x".join(map(str, shape))
        raise ScanError(
            path,
            "wrong dimension",
            f"{len(shape)}D data ({found}), expected one 3D volume. Extract or average the volumes of a series first.",
        )
    if min(shape) < 2:
        raise ScanError(
            path,
            "wrong dimension",
            f"a volume of {'x'.join(map(str, shape))} voxels, expected at least 2 along every axis. Give a 3D volume,"
            " not a slice.",
        )
    if dtype.kind not in "iufb":
        raise ScanError(
            path,
            "wrong data type",
            f"voxels of type {dtype}, expected real numbers. Convert colour or complex data to one channel.",
        )
    affine = np.asarray(volume.affine, dtype=np.float64)
    for reason, detail in affine_problems(raw, affine):
        raise ScanError(path, reason, detail)
    try:
        array = np.asarray(volume.get_fdata(dtype=np.float32, caching="unchanged")).reshape(shape)
    except Exception as error:  # noqa: BLE001 short reads and impossible offsets raise whatever they meet
        raise ScanError(
            path, "truncated file", f"the voxels cannot be read ({error}). Copy or convert the file again."
        ) from None
    return Image(array, affine, two_spaces=two_spaces(raw, affine))


def _decode_picture(path: Path, content: bytes, labels: bool, colour: str) -> Image:
    try:
        with PilImage.open(io.BytesIO(content), formats=_PICTURE_FORMATS) as opened:
            picture = ImageOps.exif_transpose(opened)
            if labels:
                return Image(_indices(path, picture, opened.format), None)
            grey = picture
            if not (picture.mode in ("L", "F", "I") or picture.mode.startswith("I;16")):
                grey = (
                    picture.convert("L")
                    if colour not in COLOURS
                    else picture.convert("RGB").getchannel(COLOURS[colour])
                )
            array, blank = np.asarray(grey, dtype=np.float32), None
            if (opacity := _opacity(picture)) is not None:
                array, blank = array * opacity, opacity == 0
    except ScanError:
        raise
    except Exception as error:  # noqa: BLE001 Pillow raises SyntaxError, struct.error and others
        raise ScanError(
            path, "damaged picture", f"the picture cannot be decoded ({error}). Copy or export it again."
        ) from None
    return Image(array, None, blank)


def _opacity(picture: PilImage.Image) -> np.ndarray | None:
    """float32 (rows, columns), 0 where a picture is transparent, to 1; None where it is nowhere."""
    if not picture.has_transparency_data:
        return None
    if picture.mode.startswith("I"):  # Pillow converts 16 bits to no alpha; one grey level is transparent
        opacity = (np.asarray(picture) != picture.info["transparency"]).astype(np.float32)
    else:
        opacity = np.asarray(picture.convert("RGBA").getchannel("A"), dtype=np.float32) / 255
    return None if opacity.all() and opacity.min() == 1 else opacity


def _indices(path: Path, picture: PilImage.Image, form: str | None) -> np.ndarray:
    """A picture's values as they are stored, float32 (rows, columns)."""
    if form == "JPEG":
        raise ScanError(
            path,
            "lossy labels",
            "a JPEG, which changes values near edges, expected labels or a mask. Export them again, as PNG.",
        )
    values = np.asarray(picture, dtype=np.float32)
    if values.ndim == 3 and picture.mode.startswith("RGB") and (values[..., :3] == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim != 2:
        raise ScanError(
            path,
            "coloured labels",
            f"a picture of mode {picture.mode}, expected one number per pixel. Export labels as grey levels or palette"
            " indices.",
        )
    return values


def _decode_dicom(path: Path, labels: bool) -> Image:
    if importlib.util.find_spec("pydicom") is None:
        raise UserError(
            f"{path}: is DICOM, and the package pydicom is not installed. Install it (pip install pydicom), or convert"
            " the images to PNG or NIfTI."
        )
    from monai.data import PydicomReader  # imports torch: only when there is DICOM

    try:
        reader = PydicomReader(swap_ij=False)
        dataset = reader.read(str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # every radiograph without a position in the patient would be warned about
            array = np.asarray(reader.get_data(dataset)[0], dtype=np.float32)
        photometric = dataset.get("PhotometricInterpretation")
        blank = _padding(dataset)
    except Exception as error:  # noqa: BLE001 pydicom and its decoders raise many kinds
        raise ScanError(
            path,
            "damaged DICOM",
            f"cannot be decoded ({error}). Convert it to PNG, or install the decoder that the message names.",
        ) from None
    if array.ndim != 2:
        raise ScanError(
            path,
            "wrong dimension",
            f"DICOM data of shape {array.shape}, expected one grey 2D image. Convert volumes to NIfTI, for example with"
            " dcm2niix.",
        )
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ScanError(
            path,
            "wrong data type",
            f"PhotometricInterpretation {photometric}, expected grey levels (MONOCHROME1 or MONOCHROME2). Convert it to"
            " a grey PNG.",
        )
    shown = array if blank is None else array[~blank]
    if not labels and shown.size:
        if photometric == "MONOCHROME1":  # shows small values bright; PNG and NIfTI never do
            array = shown.max() + shown.min() - array
        if blank is not None:
            array = np.where(blank, array[~blank].min(), array)
    return Image(array, None, blank)


def _padding(dataset: Any) -> np.ndarray | None:
    """Bool (rows, columns), True where a DICOM image says that a pixel is padding; None where none is."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    low, high = sorted((int(value), int(dataset.get("PixelPaddingRangeLimit", value))))
    stored = np.asarray(dataset.pixel_array)
    padding: np.ndarray = (stored >= low) & (stored <= high)
    return padding if padding.any() else None


def _check_values(path: Path, array: np.ndarray, allow_constant: bool) -> None:
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise ScanError(
            path,
            "values not finite",
            f"{bad:,} of {array.size:,} values are NaN or infinite. Set them to 0, or convert the image again.",
        )
    if not allow_constant and array.min() == array.max():
        raise ScanError(
            path,
            "constant image",
            f"all values are {array.flat[0]:g}: there is nothing to see. Convert the image again.",
        )
