"""How one image of a release is stored, and read back: volumes as NIfTI, pictures as PNG.

Every file says that it is synthetic on its own: NIfTI in `descrip` and in a header extension, PNG in text chunks.
Equal input gives equal bytes.

Volumes are int16 from 0 to 1000.  The step of 0.001 adds noise 70 dB below full scale, far below any generative model's
error; 8 bits would save a third of the bytes and band dark tissue, 12 bits cost 15 % more and store decoder noise.
Integers without scl_slope are read alike by every tool.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image as PilImage
from PIL.PngImagePlugin import PngInfo

from meddiff_steps.cohort.manifest import content_digest
from meddiff_steps.config.base import Spacing, per_axis

#: Stored value of an image value of 1.
VOLUME_SCALE, PICTURE_SCALE = 1000, 255
#: zlib level of NIfTI files: 3 % smaller than 1; 9 takes half as long again for 1 % more.
GZIP_LEVEL = 6
#: NIfTI header extension code "comment": plain text, read by every tool that reads extensions.
COMMENT = 6
SYNTHETIC = "SYNTHETIC: made by a generative model. Shows no real person."
#: Bytes of a NIfTI-1 header.
_HEADER = 348
#: How every compressed file begins: no name, no time, no hint of machine or level that anybody could choose.
_GZIP_HEADER = bytes.fromhex("1f8b0800000000000003")
#: Share by which an image may be larger than this machine packs it, where another zlib packed it, and bytes beside.
_LOOSER = 0.1
#: Most values of an image that is decoded: four times a head at half a millimetre.
LARGEST = 1 << 28
#: Bytes that an image may have beside its values: headers and marks have less than a thousand.
_BESIDE = 1 << 16


@dataclass(frozen=True)
class Grid:
    """What turns an array into a picture of something: spacing (mm, one number or three; None for 2D), shape without
    the channel axis, and whether its values are labels (uint8) rather than grey.
    """

    shape: tuple[int, ...]
    spacing_mm: Spacing | None
    labels: bool = False

    @property
    def affine(self) -> np.ndarray | None:
        """(4, 4) RAS+ affine in mm of a 3D grid; the middle of the grid is the origin.  None for 2D."""
        if self.spacing_mm is None:
            return None
        spacing = np.array(per_axis(self.spacing_mm))
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = -spacing * (np.array(self.shape) - 1) / 2
        return affine


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
    return _packed(_volume(stored, grid, sample_id, study)), stored


def _packed(content: bytes) -> bytes:
    return _GZIP_HEADER + gzip.compress(content, GZIP_LEVEL, mtime=0)[len(_GZIP_HEADER) :]


def _volume(stored: np.ndarray, grid: Grid, sample_id: str, study: str) -> bytes:
    """The NIfTI file of stored values, not compressed."""
    volume = nib.Nifti1Image(stored, grid.affine)
    volume.header.set_xyzt_units("mm", "sec")
    volume.header.set_slope_inter(1, 0)
    if stored.dtype == np.uint8:
        volume.header.set_intent("label")
    else:
        volume.header["cal_max"] = VOLUME_SCALE
    volume.header["descrip"] = f"SYNTHETIC, no real person; {study}".encode("ascii", "replace")[:79]
    volume.set_qform(grid.affine, code="aligned")  # not "scanner": there was none
    for name in ("quatern_b", "quatern_c", "quatern_d"):
        volume.header[name] = 0  # no rotation; where it comes from an eigenvector, the last bits are the machine's
    volume.set_sform(grid.affine, code="aligned")
    volume.header.extensions.append(nib.nifti1.Nifti1Extension(COMMENT, _mark(sample_id, study).encode()))
    return volume.to_bytes()


def encode_labels(labels: np.ndarray, grid: Grid, sample_id: str, study: str) -> bytes:
    """A label map, uint8 (x, y, z), 0 outside of all structures, as a compressed NIfTI-1 file with the same header."""
    return _packed(_volume(labels, grid, sample_id, study))


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
    return (
        encode_volume(image, grid, sample_id, study)
        if len(grid.shape) == 3
        else encode_picture(image, sample_id, study)
    )


def voxel_digest(stored: np.ndarray, affine: np.ndarray | None) -> str:
    """SHA-256 of what an image shows: `content_digest` of its stored values and, in 3D, the affine (float32, as NIfTI
    keeps it).

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
    packed
        The file as it is.
    """

    stored: np.ndarray
    affine: np.ndarray | None
    description: str
    mark: dict[str, Any] | None
    content: bytes
    behind: list[str]
    packed: bytes


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
        if math.prod(grid.shape) > LARGEST:
            raise OtherForm(f"a shape of {grid.shape}: more than {LARGEST} values are not decoded")
        most = math.prod(grid.shape) * (2 if len(grid.shape) == 3 else 1) + _BESIDE
        with open(path, "rb") as stream:
            packed = stream.read(2 * most)  # more than what no compression would make shorter
        return _decode_volume(packed, grid, most) if len(grid.shape) == 3 else _decode_picture(packed, grid)
    except Undecodable:
        raise
    except FileNotFoundError:
        raise Undecodable("not there") from None
    except Exception as error:  # noqa: BLE001 decoders raise anything on damaged data
        raise Undecodable(f"{type(error).__name__}: {error}") from None


def _decode_volume(packed: bytes, grid: Grid, most: int) -> Decoded:
    unpacker = zlib.decompressobj(31)
    content = unpacker.decompress(packed, most)
    behind = []
    if packed[: len(_GZIP_HEADER)] != _GZIP_HEADER:
        behind.append("another header of its compression")
    if unpacker.unused_data:
        behind.append("bytes behind its compressed content")
    if not unpacker.eof:
        if len(content) < most:
            raise Undecodable("cut short")
        behind.append(f"more than {most} bytes")
    header = nib.Nifti1Header.from_fileobj(io.BytesIO(content))
    _check_form(tuple(header.get_data_shape()), header.get_data_dtype(), grid, np.uint8 if grid.labels else np.int16)
    volume = nib.Nifti1Image.from_bytes(content)
    stored = np.asarray(volume.dataobj.get_unscaled())  # type: ignore[attr-defined]
    return Decoded(
        stored,
        volume.affine,
        header["descrip"].item().decode("ascii", "replace"),
        _read_mark(_comment(header)),
        content,
        behind,
        packed,
    )


def _decode_picture(content: bytes, grid: Grid) -> Decoded:
    with PilImage.open(io.BytesIO(content), formats=["PNG"]) as picture:
        _check_form(picture.size[::-1], np.dtype(np.uint8) if picture.mode == "L" else picture.mode, grid, np.uint8)
        stored = np.asarray(picture)
        return Decoded(
            stored,
            None,
            str(picture.info.get("Description", "")),
            _read_mark(picture.info.get("Synthesis")),
            content,
            [],
            content,
        )


def _check_form(shape: tuple[int, ...], kind: Any, grid: Grid, expected: Any) -> None:
    if shape != grid.shape or kind != expected:
        raise OtherForm(f"{kind} {shape}, expected {np.dtype(expected)} {grid.shape}")


def departures(image: Decoded, grid: Grid, sample_id: str, study: str) -> list[str]:
    """What a file holds otherwise than `encode` writes it for the same stored values: every tool then shows what the
    ledger holds, and nothing is hidden but in the way in which it is packed (`is_packed_otherwise`).
    """
    if len(grid.shape) == 3:
        return image.behind + _volume_departures(image.content, _volume(image.stored, grid, sample_id, study))
    found, pixels = _chunks(image.content)
    expected, _ = _chunks(_picture(image.stored, sample_id, study))
    unpacker, size = zlib.decompressobj(), grid.shape[0] * (grid.shape[1] + 1)
    try:
        whole = len(unpacker.decompress(pixels, size + 1)) == size and unpacker.eof and not unpacker.unused_data
    except zlib.error:
        whole = False
    return ([] if found == expected else ["other chunks than texts and pixels"]) + (
        [] if whole else ["more or less than its pixels"]
    )


def is_packed_otherwise(image: Decoded, grid: Grid, sample_id: str, study: str) -> bool:
    """Whether a file that shows and says what it should is not the one that zlib of this machine packs.

    Raises
    ------
    Undecodable
        It is larger than any zlib would make it: something is hidden in it.
    """
    if len(grid.shape) == 3:
        expected = _packed(_volume(image.stored, grid, sample_id, study))
    else:
        expected = _picture(image.stored, sample_id, study)
    if len(image.packed) > (1 + _LOOSER) * len(expected) + _HEADER:
        raise Undecodable(f"{len(image.packed)} bytes, of which {len(expected)} are needed")
    return image.packed != expected


def _volume_departures(content: bytes, expected: bytes) -> list[str]:
    if content == expected:
        return []
    found, wanted = (np.frombuffer(one, nib.nifti1.header_dtype, 1)[0] for one in (content, expected))
    wrong = [name for name in nib.nifti1.header_dtype.names or () if found[name].tobytes() != wanted[name].tobytes()]
    return [f"other {', '.join(wrong)}"] * bool(wrong) + ["other bytes behind its header"] * (
        content[_HEADER:] != expected[_HEADER:]
    )


def _chunks(content: bytes) -> tuple[list[bytes], bytes]:
    """The chunks of a PNG, one run of pixels as one empty chunk, and these, packed: another version of zlib packs the
    same ones otherwise.
    """
    others, pixels, place = [content[:8]], b"", 8
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        kind, inside = content[place + 4 : place + 8], content[place + 8 : end - 4]
        if kind == b"IDAT" and inside and zlib.crc32(kind + inside).to_bytes(4, "big") == content[end - 4 : end]:
            pixels += inside
            others += [b"IDAT"] * (others[-1] != b"IDAT")
        else:
            others.append(content[place:end])
        place = end
    return others, pixels
