"""What a NIfTI header says of where its voxels lie, when it says several things."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from meddiff_steps.config import Preprocess
from meddiff_steps.imaging.geometry import ANGLE_TOLERANCE_DEG, SHIFT_TOLERANCE, SIZE_TOLERANCE
from meddiff_steps.imaging.preprocess import other_spaces, preprocess_shard
from meddiff_steps.imaging.reading import Image, ScanError, read_image

VOLUME = np.arange(8 * 9 * 10, dtype=np.int16).reshape(8, 9, 10)
AFFINE = np.array([[2.0, 0, 0, -7], [0, 2, 0, -8], [0, 0, 3, -13.5], [0, 0, 0, 1]])


def turned(degrees: float, affine: np.ndarray = AFFINE) -> np.ndarray:
    """Around the middle of the volume, so that the angle alone differs."""
    angle = np.deg2rad(degrees)
    turn, middle = np.eye(4), (np.array(VOLUME.shape) - 1) / 2
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    result = turn @ affine
    result[:3, 3] += nib.affines.apply_affine(affine, middle) - nib.affines.apply_affine(result, middle)
    return result


def moved(voxels: float) -> np.ndarray:
    return AFFINE @ np.array([[1, 0, 0, voxels], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def scaled(factor: float) -> np.ndarray:
    middle = nib.affines.apply_affine(AFFINE, (np.array(VOLUME.shape) - 1) / 2)
    result = AFFINE @ np.diag([factor, 1, 1, 1])
    result[:3, 3] += middle - nib.affines.apply_affine(result, (np.array(VOLUME.shape) - 1) / 2)
    return result


MIRRORED = np.diag([-1.0, 1, 1, 1]) @ AFFINE


def written(
    path: Path,
    sform: np.ndarray = AFFINE,
    qform: np.ndarray = AFFINE,
    codes: tuple[int, int] = (1, 1),
    kind: type[nib.Nifti1Image] = nib.Nifti1Image,
    **fields: Any,
) -> Path:
    """A file with sform and qform of these codes, and fields of its header overwritten without any check."""
    image = kind(VOLUME, AFFINE)
    image.set_qform(qform, codes[1])
    image.set_sform(sform, codes[0])
    image.header["sform_code"], image.header["qform_code"] = codes
    content = bytearray(image.to_bytes())
    header = kind.header_class(bytes(content[: kind.header_class.sizeof_hdr]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[: len(header.binaryblock)] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(content)) if path.suffix == ".gz" else bytes(content))
    return path


def refused(path: Path) -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_image(path)
    return caught.value


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(
    ("sform", "codes", "fields"),
    [
        (AFFINE, (1, 1), {}),
        (turned(30), (1, 1), {"qform_code": 0}),
        (turned(0.8 * ANGLE_TOLERANCE_DEG), (1, 1), {}),
        (moved(0.8 * SHIFT_TOLERANCE), (1, 1), {}),
        (scaled(1 + 0.8 * SIZE_TOLERANCE), (1, 1), {}),
        (moved(30), (4, 1), {}),
        (turned(20), (2, 1), {}),
        (AFFINE, (1, 1), {"xyzt_units": 0}),
        (AFFINE, (1, 1), {"xyzt_units": 2 + 16}),
        (AFFINE, (1, 1), {"bitpix": 0}),
    ],
    ids=[
        *("agree", "sform alone", "rounded angle", "rounded origin", "rounded size", "another space"),
        *("turned in another space", "no unit", "milliseconds", "no bitpix"),
    ],
)
def test_what_agrees_is_read(
    tmp_path: Path, kind: type[nib.Nifti1Image], sform: np.ndarray, codes: tuple[int, int], fields: dict[str, Any]
) -> None:
    image = read_image(written(tmp_path / "a.nii.gz", sform, codes=codes, kind=kind, **fields))
    assert np.array_equal(image.array, VOLUME) and np.allclose(image.affine, sform, atol=1e-5)  # type: ignore[arg-type]


def test_two_spaces_are_told(tmp_path: Path) -> None:
    for sform, codes in ((AFFINE, (4, 1)), (turned(30), (2, 0)), (turned(0.5), (1, 1))):
        assert read_image(written(tmp_path / "a.nii", sform, codes=codes)).two_spaces is None
    rows = []
    for i, sform in enumerate((AFFINE, turned(12), moved(6))):
        path = written(tmp_path / f"{i}.nii", sform, codes=(2, 1))
        rows.append({"scan_id": f"sub-{i}", "subject_id": f"sub-{i}", "path": str(path)})
    settings = Preprocess.model_validate({"shape": (8, 8, 8), "spacing_mm": 3.0})
    table = preprocess_shard(pd.DataFrame(rows), settings, tmp_path / "s.arrow")
    assert table["two_spaces"].isna().tolist() == [True, False, False]
    assert "sub-1, whose sform (code 2) and qform (code 1) are 12.0 degrees and 0.0 voxels apart" in (
        other_spaces(table) or ""
    )
    assert "2 of 3 scans" in (other_spaces(table) or "") and other_spaces(table[:1]) is None


def test_a_qform_alone_says_where_voxels_lie(tmp_path: Path) -> None:
    for qfac, affine in ((0, AFFINE), (1, AFFINE), (-1, MIRRORED)):
        pixdim = [qfac, 2, 2, 3, 0, 0, 0, 0]
        image = read_image(written(tmp_path / "a.nii", np.eye(4), affine, (0, 1), pixdim=pixdim))
        assert image.affine is not None and np.allclose(image.affine, affine, atol=1e-5)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        ({"sform": MIRRORED}, "contradicting orientations", "along LAS, qform (code 1) along RAS: one is the mirror"),
        ({"sform": MIRRORED, "codes": (4, 1)}, "contradicting orientations", "mirror image"),
        ({"pixdim": [-1, 2, 2, 3, 0, 0, 0, 0]}, "contradicting orientations", "mirror image"),
        ({"sform": turned(12)}, "contradicting orientations", "turned by 12.0 degrees; expected at most 1"),
        ({"sform": turned(180)}, "contradicting orientations", "along LPS, qform (code 1) along RAS, turned by 180.0"),
        ({"sform": turned(90), "codes": (2, 1)}, "contradicting orientations", "expected at most 45"),
        ({"sform": moved(3)}, "contradicting origins", "3.0 voxels apart"),
        ({"sform": scaled(1.5)}, "contradicting voxel sizes", "pixdim says voxels of 2 x 2 x 3 mm, sform 3 x 2 x 3 mm"),
        ({"sform": scaled(0.5), "codes": (4, 1)}, "contradicting voxel sizes", "sform 1 x 2 x 3 mm"),
        (
            {"codes": (1, 0), "pixdim": [1, 1, 1, 1, 0, 0, 0, 0]},
            "contradicting voxel sizes",
            "pixdim says voxels of 1 x",
        ),
        ({"xyzt_units": 1}, "unit is not millimetres", "xyzt_units says metres"),
        ({"xyzt_units": 3 + 8}, "unit is not millimetres", "micrometres, with voxels of 2 x 2 x 3"),
        ({"xyzt_units": 5}, "unit is not millimetres", "5, which is no unit"),
        ({"magic": b"ni1\0"}, "damaged header", "magic says 'ni1"),
        ({"magic": b"\0\0\0\0"}, "damaged header", "magic"),
        ({"vox_offset": 0}, "damaged header", "vox_offset 0"),
        ({"vox_offset": 348}, "damaged header", "vox_offset 348"),
        ({"dim": [3, 8, 9, 5, 1, 1, 1, 1]}, "damaged header", "dim says 8x9x5"),
        ({"bitpix": 8}, "damaged header", "bitpix 8, but voxels of type int16 have 16"),
        ({"sform_code": 17}, "damaged header", "sform_code 17"),
        ({"qform_code": -3}, "damaged header", "qform_code -3"),
        ({"codes": (0, 1), "pixdim": [2, 2, 2, 3, 0, 0, 0, 0]}, "damaged header", "pixdim[0] 2, expected 1 or -1"),
        ({"quatern_b": 1.4}, "damaged header", "qform cannot be used"),
        ({"qoffset_x": np.nan}, "damaged header", "qform cannot be used"),
    ],
)
def test_what_contradicts_itself_is_left_out_with_both_statements(
    tmp_path: Path, kind: type[nib.Nifti1Image], change: dict[str, Any], reason: str, said: str
) -> None:
    error = refused(written(tmp_path / "a.nii.gz", kind=kind, **change))
    assert (error.reason, said in error.detail) == (reason, True), error.detail
    assert error.detail.endswith(".") and any(w in error.detail for w in ("Convert", "Repair"))


def test_an_extension_is_not_read_as_voxels(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOLUME, AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"of the scanner"))
    nib.save(image, tmp_path / "a.nii")
    assert np.array_equal(read_image(tmp_path / "a.nii").array, VOLUME)
    content = bytearray((tmp_path / "a.nii").read_bytes())
    header = nib.Nifti1Header.from_fileobj(io.BytesIO(content), check=False)
    header["vox_offset"] = 352
    content[:348] = header.binaryblock
    (tmp_path / "a.nii").write_bytes(content)
    assert "extension" in refused(tmp_path / "a.nii").detail


def test_big_endian_and_trailing_axes_contradict_nothing(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nib.save(nib.Nifti1Image(VOLUME[..., np.newaxis].astype(">i2"), AFFINE, header), tmp_path / "a.nii")
    image = read_image(tmp_path / "a.nii")
    assert isinstance(image, Image) and image.array.shape == VOLUME.shape
