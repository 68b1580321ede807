"""Where the voxels of a NIfTI file lie, and whether all that its header says of it agrees.

A header says it up to three times: as voxel sizes (`pixdim`), as a rotation with an origin (`qform`) and as a matrix
(`sform`).  Programs read one or the other.  Where they contradict each other, one of two readers sees a mirror image, a
head of another size or one that is turned, and nothing in the file says which of them is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import nibabel as nib
import numpy as np

#: Voxel edges outside these limits (mm) are a wrong unit, not an image of a person.
VOXEL_LIMITS_MM = (0.01, 100.0)
#: Largest differences between qform, sform and pixdim that rounding explains: of a voxel's edges, as a share; of the
#: direction of an axis, degrees; of the middle of the volume, voxels.
SIZE_TOLERANCE, ANGLE_TOLERANCE_DEG, SHIFT_TOLERANCE = 0.01, 1.0, 0.5
#: qform and sform with different codes are of different spaces (a scanner's and a template's): they may be turned
#: against each other by less than what gives an axis another name, degrees, and lie anywhere.
OTHER_SPACE_DEG = 45.0

_UNITS = {1: "metres", 3: "micrometres"}
_VALID_CODES = range(6)
_REPAIR = "Convert the original images again, or, if you know which is right, write it into both"


def storage_problems(raw: Any, content: bytes) -> Iterator[tuple[str, str]]:
    """What contradicts itself in how a single NIfTI file is stored, as reason and detail of a `ScanError`.

    Parameters
    ----------
    raw
        Its header (nibabel's class) as it is stored, without repairs.
    content
        The file, decompressed.
    """
    kind = type(raw)
    magic, offset = raw["magic"].item(), float(raw["vox_offset"])
    first = kind.single_vox_offset
    if magic != kind.single_magic:
        yield (
            "damaged header",
            f"magic says {magic.decode('latin1')!r}, expected {kind.single_magic.decode('latin1')!r}: the header of a"
            " pair (.hdr and .img), or of no NIfTI file. Convert the image again.",
        )
    extended = any(content[first - 4 : first - 3])
    if not (offset >= first + 8 * extended and offset.is_integer()):
        yield (
            "damaged header",
            f"vox_offset {offset:g}, expected the {first} bytes of the header or more"
            f"{', and its extension' if extended else ''}: it would be read as voxels. Convert the image again.",
        )
    bits = raw.get_data_dtype().itemsize * 8
    if raw["bitpix"] not in (0, bits):
        yield (
            "damaged header",
            f"bitpix {raw['bitpix']}, but voxels of type {raw.get_data_dtype()} have {bits}. Convert the image again.",
        )
    sizes = [int(n) for n in raw["dim"][1 : 1 + max(0, int(raw["dim"][0]))]]
    expected = int(offset) + int(np.prod(sizes, dtype=object)) * bits // 8 if np.isfinite(offset) else 0
    if len(content) - expected > (np.prod(sizes[:2], dtype=object) * bits // 8 if sizes else 0) >= 0:
        yield (
            "damaged header",
            f"dim says {'x'.join(map(str, sizes))} voxels and so {expected:,} bytes, the file has {len(content):,}."
            " Convert the image again.",
        )


def affine_problems(raw: Any, affine: np.ndarray) -> Iterator[tuple[str, str]]:
    """What contradicts itself in where the voxels lie, as reason and detail of a `ScanError`.

    Parameters
    ----------
    raw
        The header as it is stored.
    affine
        (4, 4) that is used: of the sform where `sform_code` is above 0, else of the qform.
    """
    sizes = np.abs(np.asarray(raw["pixdim"][1:4], dtype=np.float64))
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    low, high = VOXEL_LIMITS_MM
    if not np.isfinite(affine).all() or not sizes.min() > 0 or spacing.min() == 0:
        yield (
            "voxels without size",
            f"voxels of {_mm(sizes)} mm in the header, {_mm(spacing)} mm by the affine, expected all above 0. Repair"
            " pixdim, qform and sform.",
        )
        return
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        yield (
            "singular affine",
            "two axes of the affine point the same way, so the volume is flat. Repair qform and sform.",
        )
        return
    unit = int(raw["xyzt_units"]) & 7
    if unit not in (0, 2):
        found = _UNITS.get(unit, f"{unit}, which is no unit")
        yield (
            "unit is not millimetres",
            f"xyzt_units says {found}, with voxels of {_mm(spacing)}; expected millimetres. Convert pixdim, qform and"
            " sform, or correct xyzt_units if they are in millimetres.",
        )
    if spacing.min() < low or spacing.max() > high:
        yield (
            "implausible voxel size",
            f"voxels of {_mm(spacing)} mm, expected {low:g} to {high:g} mm. Write the affine in millimetres.",
        )
    codes = {name: int(raw[f"{name}_code"]) for name in ("qform", "sform")}
    for name, code in codes.items():
        if code not in _VALID_CODES:
            yield "damaged header", f"{name}_code {code}, expected 0 to 5. {_REPAIR}."
    if codes["qform"] <= 0 and codes["sform"] <= 0:  # nibabel would guess, and half of the guesses are mirror images
        yield (
            "no orientation",
            "qform_code and sform_code are 0 (as after a conversion from Analyze), expected one above 0: nothing says"
            " where left and right are. Convert the original images again, or, if you know it, set the sform"
            " (fslorient -setsform and -setsformcode 1, or nibabel's set_sform).",
        )
    if codes["sform"] > 0 and (np.abs(spacing / sizes - 1) > SIZE_TOLERANCE).any():
        yield (
            "contradicting voxel sizes",
            f"pixdim says voxels of {_mm(sizes)} mm, sform {_mm(spacing)} mm; expected the same within"
            f" {SIZE_TOLERANCE:.0%}. {_REPAIR}.",
        )
    if codes["qform"] > 0:
        yield from _qform_problems(raw, affine, codes)


def _qform_problems(raw: Any, affine: np.ndarray, codes: dict[str, int]) -> Iterator[tuple[str, str]]:
    if raw["pixdim"][0] not in (-1, 0, 1):
        yield (
            "damaged header",
            f"qform_code {codes['qform']} with pixdim[0] {raw['pixdim'][0]:g}, expected 1 or -1: it says where left"
            f" and right are. {_REPAIR}.",
        )
        return
    try:
        qform = _qform(raw)
    except ValueError as error:
        yield "damaged header", f"the qform cannot be used ({error}). {_REPAIR}."
        return
    if codes["sform"] <= 0:
        return
    said = f"sform (code {codes['sform']}) has its axes along {_axes(affine)}, qform (code {codes['qform']})"
    if np.linalg.det(affine[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
        yield (
            "contradicting orientations",
            f"{said} along {_axes(qform)}: one is the mirror image of the other. {_REPAIR}.",
        )
        return
    same = codes["sform"] == codes["qform"]
    angle, shift = _apart(raw, affine, qform)
    if angle > (limit := ANGLE_TOLERANCE_DEG if same else OTHER_SPACE_DEG):
        yield (
            "contradicting orientations",
            f"{said} along {_axes(qform)}, turned by {angle:.1f} degrees; expected at most {limit:g}. {_REPAIR}.",
        )
    if same and shift > SHIFT_TOLERANCE:
        places = [_mm(nib.affines.apply_affine(one, _middle(raw))) for one in (affine, qform)]
        yield (
            "contradicting origins",
            f"the middle of the volume is at {places[0]} mm by sform and {places[1]} mm by qform, both of code"
            f" {codes['sform']}, {shift:.1f} voxels apart; expected at most {SHIFT_TOLERANCE:g}. {_REPAIR}.",
        )


def two_spaces(raw: Any, affine: np.ndarray) -> str | None:
    """How far the sform, which is used, leads from the qform where their codes say that they are of two spaces; None
    where they agree or only one is given.  Parameters as of `affine_problems`, which found nothing.
    """
    codes = int(raw["sform_code"]), int(raw["qform_code"])
    if min(codes) <= 0:
        return None
    angle, shift = _apart(raw, affine, _qform(raw))
    if angle <= ANGLE_TOLERANCE_DEG and shift <= SHIFT_TOLERANCE:
        return None
    return f"sform (code {codes[0]}) and qform (code {codes[1]}) are {angle:.1f} degrees and {shift:.1f} voxels apart"


def _apart(raw: Any, affine: np.ndarray, qform: np.ndarray) -> tuple[float, float]:
    """Largest angle between axes of the same name, degrees, and how far the middle of the volume moves, voxels."""
    axes, others = (a[:3, :3] / np.sqrt((a[:3, :3] ** 2).sum(axis=0)) for a in (affine, qform))
    cosine = np.clip((axes * others).sum(axis=0).min(), -1, 1)
    middle = _middle(raw)
    moved = nib.affines.apply_affine(np.linalg.inv(qform) @ affine, middle) - middle
    return float(np.degrees(np.arccos(cosine))), float(np.abs(moved).max())


def _middle(raw: Any) -> np.ndarray:
    return (np.array(raw["dim"][1:4], dtype=np.float64) - 1) / 2


def _qform(raw: Any) -> np.ndarray:
    """(4, 4) of the qform, whose pixdim[0] 0 stands for 1."""
    header = raw.copy()
    header["pixdim"][0] = header["pixdim"][0] or 1
    header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    qform = np.asarray(header.get_qform(), dtype=np.float64)
    if not np.isfinite(qform).all():
        raise ValueError("not finite")
    return qform


def _axes(affine: np.ndarray) -> str:
    return "".join(nib.orientations.aff2axcodes(affine))


def _mm(values: np.ndarray) -> str:
    return " x ".join(f"{value:.5g}" for value in values)
