"""What headers say of a cohort's images: sizes, voxels, where they lie.  A sample is read, and no image data."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import nibabel as nib
import numpy as np
from PIL import Image as Picture

from meddiff_steps.core.pointers import not_fetched
from meddiff_steps.imaging.geometry import affine_problems

#: Images whose headers are read, at most.
SAMPLE = 100
#: Bytes of a NIfTI-2 header.
HEADER_BYTES = 540

T = TypeVar("T")


@dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes
    ----------
    path
        The file.
    size
        Voxels along left-right, posterior-anterior, inferior-superior, or rows and columns of a picture.
    spacing
        Edges of a voxel in mm along the same axes; None of a picture.
    affine
        (4, 4) from voxels to mm; None of a picture.
    problem
        Why the image could not be used; the rest is empty then.
    """

    path: str
    size: tuple[int, ...] = ()
    spacing: tuple[float, ...] | None = None
    affine: np.ndarray | None = None
    problem: str | None = None

    @property
    def extent(self) -> np.ndarray:
        """Field of view in mm."""
        return np.multiply(self.size, self.spacing or 1)


def repeated(header: Header, depth: int) -> Header:
    """The volume that `imaging.reading.as_volume` makes of a picture, or of a volume: voxels of 1 mm."""
    size = (depth, *header.size) if len(header.size) == 2 else header.size
    return replace(header, size=size, spacing=(1.0,) * len(size), affine=np.eye(4))


def spread(items: Sequence[T], count: int = SAMPLE) -> list[T]:
    """At most `count` of some items, evenly spread over them.

    >>> spread(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= count:
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def read_header(path: str) -> Header:
    """What the header of a NIfTI file or a picture says; of any other file, that it cannot be told."""
    told = not_fetched(path)
    if told:
        return Header(path, problem=told)
    try:
        with open(path, "rb") as stream:
            start = stream.read(8)
        if start[:8] == b"\x89PNG\r\n\x1a\n" or start[:3] == b"\xff\xd8\xff":
            with Picture.open(path) as picture:
                return Header(path, (picture.height, picture.width))
        with gzip.open(path, "rb") if start[:2] == b"\x1f\x8b" else open(path, "rb") as stream:
            return _nifti(path, stream.read(HEADER_BYTES))
    except OSError as error:
        return Header(path, problem=f"cannot be read ({error.strerror or error})")
    except (EOFError, zlib.error) as error:
        return Header(path, problem=f"is damaged or not complete ({error})")


def _nifti(path: str, content: bytes) -> Header:
    sizes = {int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big")}
    kind = next((k for k in (nib.Nifti1Header, nib.Nifti2Header) if k.sizeof_hdr in sizes), None)
    if kind is None:
        return Header(path, problem=None if content[128:132] == b"DICM" else "is of no format that is read here")
    try:
        raw = kind(content[: kind.sizeof_hdr], check=False)
        shape, affine = raw.get_data_shape(), raw.get_best_affine()
    except Exception as error:  # noqa: BLE001 a damaged header can make nibabel raise nearly anything
        return Header(path, problem=f"has a damaged header ({error})")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        return Header(path, problem=f"has {len(shape)} dimensions, expected 3")
    for _, detail in affine_problems(raw, affine):
        return Header(path, problem=detail)
    order = [int(axis) for axis in nib.orientations.io_orientation(affine)[:, 0]]
    edges, size, spacing = np.linalg.norm(affine[:3, :3], axis=0), [0, 0, 0], [0.0, 0.0, 0.0]
    for voxel_axis, world_axis in enumerate(order):
        size[world_axis], spacing[world_axis] = int(shape[voxel_axis]), float(edges[voxel_axis])
    return Header(path, tuple(size), tuple(spacing), affine)
