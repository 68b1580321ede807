"""Reading images: what comes out of good files, and what is said about bad ones."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as PilImage

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging import reading as imaging_io
from meddiff_steps.imaging.reading import ScanError, read_image

VOLUME = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)


def nifti(
    array: np.ndarray = VOLUME, affine: np.ndarray | None = None, kind: type[nib.Nifti1Image] = nib.Nifti1Image
) -> nib.Nifti1Image:
    return kind(array, np.diag([2.0, 2, 2, 1]) if affine is None else affine)


def header_with(**fields: object) -> bytes:
    """Uncompressed NIfTI bytes with header fields overwritten after nibabel has checked them."""
    image = nifti()
    content = bytearray(image.to_bytes())
    header = nib.Nifti1Header.from_fileobj(io.BytesIO(content), check=False)
    for name, value in fields.items():
        header[name] = value
    content[: len(header.binaryblock)] = header.binaryblock
    return bytes(content)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_volume(tmp_path: Path, name: str, kind: type[nib.Nifti1Image]) -> None:
    affine = np.array([[0, -2.0, 0, 5], [3, 0, 0, -7], [0, 0, 4, 1], [0, 0, 0, 1]])
    nib.save(nifti(affine=affine, kind=kind), tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.array.dtype == np.float32
    assert np.array_equal(image.array, VOLUME)
    assert image.affine is not None and np.allclose(image.affine, affine)


@pytest.mark.parametrize(("qform_code", "sform_code"), [(1, 0), (0, 1), (2, 4)])
def test_either_code_gives_the_orientation(tmp_path: Path, qform_code: int, sform_code: int) -> None:
    affine = np.diag([-2.0, 2, 2, 1])
    image = nifti(affine=affine)
    image.set_qform(affine, qform_code)
    image.set_sform(affine, sform_code)
    nib.save(image, tmp_path / "a.nii")
    assert np.array_equal(read_image(tmp_path / "a.nii").affine, affine)  # type: ignore[arg-type]


def test_intensity_scaling_is_applied(tmp_path: Path) -> None:
    stored = nifti()
    stored.header.set_slope_inter(0.5, 10)
    nib.save(stored, tmp_path / "a.nii.gz")
    expected = np.asarray(nib.Nifti1Image.from_filename(tmp_path / "a.nii.gz").dataobj)
    assert np.allclose(read_image(tmp_path / "a.nii.gz").array, expected)


def test_big_endian(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nib.save(nib.Nifti1Image(VOLUME.astype(">i2"), np.eye(4), header), tmp_path / "a.nii")
    assert np.array_equal(read_image(tmp_path / "a.nii").array, VOLUME)


def test_trailing_single_axes_are_dropped(tmp_path: Path) -> None:
    nib.save(nifti(VOLUME[..., np.newaxis, np.newaxis]), tmp_path / "a.nii.gz")
    assert np.array_equal(read_image(tmp_path / "a.nii.gz").array, VOLUME)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA"])
def test_picture_is_grey(tmp_path: Path, mode: str) -> None:
    pixels = np.tile(np.arange(8, dtype=np.uint8) * 30, (5, 1))
    PilImage.fromarray(pixels).convert(mode).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.affine is None
    assert image.array.dtype == np.float32 and np.array_equal(image.array, pixels)


def test_sixteen_bit_picture_keeps_its_levels(tmp_path: Path) -> None:
    pixels = np.array([[0, 1000], [40_000, 65_535]], dtype=np.uint16)
    PilImage.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png").array, pixels)


def test_jpeg_orientation_tag_is_honoured(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32), dtype=np.uint8)
    pixels[:, :16] = 200
    exif = PilImage.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    PilImage.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    shown = read_image(tmp_path / "a.jpg").array
    assert shown.shape == (32, 16)
    assert shown[:16].mean() > 150 and shown[16:].mean() < 50


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 999, (16, 16, 16)).astype(np.int16)


def damaged_gzip() -> bytes:
    content = bytearray(gzip.compress(nifti(noise()).to_bytes()))
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


def not_finite(value: float) -> bytes:
    array = VOLUME.astype(np.float32)
    array[1, 1, 1] = value
    return nifti(array).to_bytes()


def cut_png() -> bytes:
    stream = io.BytesIO()
    PilImage.fromarray(noise()[0].astype(np.uint8)).save(stream, format="PNG")
    return stream.getvalue()[:120]


def colour() -> bytes:
    return nifti(np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])).to_bytes()


BAD: dict[str, tuple[str, Callable[[], bytes], str, str]] = {
    "empty": ("a.nii.gz", lambda: b"", "empty file", "0 bytes"),
    "truncated gzip": (
        "a.nii.gz",
        lambda: gzip.compress(nifti(noise()).to_bytes())[:-2000],
        "truncated file",
        "ends early",
    ),
    "gzip without its last byte": (
        "a.nii.gz",
        lambda: gzip.compress(nifti().to_bytes())[:-1],
        "truncated file",
        "ends early",
    ),
    "damaged gzip": ("a.nii.gz", damaged_gzip, "damaged file", "damaged"),
    "truncated volume": ("a.nii", lambda: nifti(noise()).to_bytes()[:-100], "truncated file", "voxels cannot be read"),
    "header only": ("a.nii", lambda: nifti().to_bytes()[:200], "damaged header", "header"),
    "gzip of text": ("a.nii.gz", lambda: gzip.compress(b"hello, world"), "unknown format", "NIfTI"),
    "text": ("a.nii", lambda: b"this is no image at all", "unknown format", "expected NIfTI, PNG, JPEG or DICOM"),
    "time series": (
        "a.nii.gz",
        lambda: nifti(np.stack([VOLUME] * 3, axis=-1)).to_bytes(),
        "wrong dimension",
        "5x6x7x3",
    ),
    "slice": ("a.nii.gz", lambda: nifti(VOLUME[:, :, 0]).to_bytes(), "wrong dimension", "2D data"),
    "one-slice volume": ("a.nii.gz", lambda: nifti(VOLUME[:, :, :1]).to_bytes(), "wrong dimension", "at least 2"),
    "colour": ("a.nii", colour, "wrong data type", "one channel"),
    "complex": ("a.nii", lambda: nifti(VOLUME.astype(np.complex64)).to_bytes(), "wrong data type", "complex64"),
    "zero-size voxels": (
        "a.nii",
        lambda: header_with(pixdim=[1, 0, 2, 2, 0, 0, 0, 0], sform_code=0),
        "voxels without size",
        "0 x 2 x 2",
    ),
    "empty sform": ("a.nii", lambda: header_with(srow_x=[0, 0, 0, 0]), "voxels without size", "qform and sform"),
    "nan sform": ("a.nii", lambda: header_with(srow_x=[np.nan, 0, 0, 0]), "voxels without size", "qform and sform"),
    "singular affine": ("a.nii", lambda: header_with(srow_y=[2, 0, 0, 0]), "voxels without size", "qform and sform"),
    "flat affine": (
        "a.nii",
        lambda: header_with(srow_x=[2, 2, 0, 0], srow_y=[0, 0, 2, 0], srow_z=[0, 0, 1, 0]),
        "singular affine",
        "the same way",
    ),
    "metres": (
        "a.nii",
        lambda: nifti(affine=np.diag([0.002, 0.002, 0.002, 1])).to_bytes(),
        "implausible voxel size",
        "millimetres",
    ),
    "no codes": ("a.nii.gz", lambda: header_with(qform_code=0, sform_code=0), "no orientation", "fslorient"),
    "nan voxel": ("a.nii.gz", lambda: not_finite(np.nan), "values not finite", "1 of 210"),
    "infinite voxel": ("a.nii.gz", lambda: not_finite(np.inf), "values not finite", "1 of 210"),
    "constant": (
        "a.nii.gz",
        lambda: nifti(np.full((4, 4, 4), 7, dtype=np.int16)).to_bytes(),
        "constant image",
        "all values are 7",
    ),
    "truncated png": ("a.png", cut_png, "damaged picture", "cannot be decoded"),
    "png that is none": ("a.png", lambda: b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "damaged picture", "cannot be decoded"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file(tmp_path: Path, case: str) -> None:
    name, make, reason, words = BAD[case]
    path = tmp_path / name
    content = make()
    path.write_bytes(
        gzip.compress(content) if name.endswith(".gz") and content and content[:2] != b"\x1f\x8b" else content
    )
    with pytest.raises(ScanError) as caught:
        read_image(path)
    assert caught.value.reason == reason
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path)), "the message names the file first"
    assert str(caught.value).endswith("."), "and ends with a remedy"


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="no such file") as caught:
        read_image(tmp_path / "none.nii.gz")
    assert caught.value.reason == "missing file"
    with pytest.raises(ScanError, match="is a directory") as caught:
        read_image(tmp_path)
    assert caught.value.reason == "directory"


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # not chmod: tests may run as root, who may read everything
    with pytest.raises(ScanError, match="Permission denied") as caught:
        read_image(tmp_path / "a.nii.gz")
    assert caught.value.reason == "unreadable file"


def test_constant_mask_is_accepted(tmp_path: Path) -> None:
    nib.save(nifti(np.ones((4, 4, 4), dtype=np.uint8)), tmp_path / "mask.nii.gz")
    assert read_image(tmp_path / "mask.nii.gz", allow_constant=True).array.all()


def test_scan_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(ScanError("a.nii", "empty file", "the file has 0 bytes.")))
    assert (
        isinstance(error, ScanError) and error.reason == "empty file" and str(error) == "a.nii: the file has 0 bytes."
    )


def test_dicom_without_pydicom_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 50)
    monkeypatch.setattr(imaging_io.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pydicom") as caught:
        read_image(tmp_path / "a.dcm")
    assert not isinstance(caught.value, ScanError), "the machine is at fault, not the scan: the study stops"


def write_dicom(path: Path, pixels: np.ndarray, photometric: str = "MONOCHROME2", **fields: object) -> None:
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed; it is needed for DICOM input only")
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.UID("1.2.840.10008.5.1.4.1.1.1.1")
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=["test"])
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = pixels.astype("<u2").tobytes()
    for name, value in fields.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)


def test_dicom(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.uint16).reshape(3, 4)
    write_dicom(tmp_path / "a.dcm", pixels)
    assert np.array_equal(read_image(tmp_path / "a.dcm").array, pixels), "rows and columns, not swapped"
    write_dicom(tmp_path / "b.dcm", pixels, "MONOCHROME1")
    assert np.array_equal(read_image(tmp_path / "b.dcm").array, 11 - pixels.astype(np.float32)), (
        "dark is small, as everywhere else"
    )


def test_one_channel_of_a_colour_picture_is_the_scan_where_it_is_asked_for(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    PilImage.fromarray(colours).save(tmp_path / "a.png")
    for number, colour in enumerate(("red", "green", "blue")):
        np.testing.assert_array_equal(read_image(tmp_path / "a.png", colour=colour).array, colours[..., number])
    luminance = colours @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(read_image(tmp_path / "a.png").array, luminance, atol=1.0)
    PilImage.fromarray(colours[..., 1]).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_image(tmp_path / "b.png", colour="red").array, colours[..., 1])


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("padding", [0, 4095])
def test_padding_of_dicom_is_background_and_moves_nothing(tmp_path: Path, photometric: str, padding: int) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(1000, 2000, (16, 16)).astype(np.uint16)
    write_dicom(tmp_path / "a.dcm", pixels, photometric)
    plain = read_image(tmp_path / "a.dcm").array
    pixels[:4] = padding
    write_dicom(tmp_path / "b.dcm", pixels, photometric, PixelPaddingValue=padding)
    image = read_image(tmp_path / "b.dcm")
    assert image.blank is not None and image.blank[:4].all() and not image.blank[4:].any()
    assert np.ptp(image.array[:4]) == 0 and image.array[0, 0] == image.array.min()
    assert np.array_equal(np.argsort(image.array[4:].ravel()), np.argsort(plain[4:].ravel())), "bright stays bright"
    pixels[:2] = 5
    write_dicom(tmp_path / "c.dcm", pixels, photometric, PixelPaddingValue=5, PixelPaddingRangeLimit=0)
    found = read_image(tmp_path / "c.dcm").blank
    assert found is not None and found[:2].all() and found[2:4].all() == (padding == 0)


def test_labels_are_not_inverted_and_indices_of_colours_are_no_grey_levels(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.uint16).reshape(3, 4)
    write_dicom(tmp_path / "a.dcm", pixels, "MONOCHROME1")
    assert np.array_equal(read_image(tmp_path / "a.dcm", labels=True).array, pixels)
    write_dicom(tmp_path / "b.dcm", pixels, "PALETTE COLOR")
    with pytest.raises(ScanError, match="PALETTE COLOR, expected grey levels"):
        read_image(tmp_path / "b.dcm")


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"/annex/objects/MD5E-s6747706--db99.nii.gz\n", "datalad get"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (None, "datalad get"),
    ],
)
def test_a_file_that_was_not_fetched_stops_the_study(tmp_path: Path, content: bytes | None, remedy: str) -> None:
    """Nothing is wrong with the scan, mask or channel, so it is not left out."""
    path = tmp_path / "a.nii.gz"
    if content is None:
        path.symlink_to(".git/annex/objects/nowhere")
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=remedy) as caught:
        read_image(path)
    assert not isinstance(caught.value, ScanError)


def test_damaged_dicom(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", np.arange(1200, dtype=np.uint16).reshape(30, 40))
    (tmp_path / "a.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[:-500])
    with pytest.raises(ScanError) as caught:
        read_image(tmp_path / "a.dcm")
    assert caught.value.reason == "damaged DICOM"
