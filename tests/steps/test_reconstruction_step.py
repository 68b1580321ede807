"""Measurements from files: what fits is taken as it is, what does not is refused with its path."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from meddiff_steps.applications.reconstruction import Measurement
from meddiff_steps.config import Reconstruction
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.operators.mri import Mri, coil_maps
from meddiff_steps.steps.reconstruction import _read

SHAPE = (1, 8, 8, 8)
SCAN = {"scan_id": "sub-1_T1w", "subject_id": "sub-1"}


def read(folder: Path, name: str = "mri", pattern: str = "{scan_id}.npz") -> Measurement:
    settings = Reconstruction(operators=[name], accelerations=[4], measured=str(folder / pattern))
    study: Any = SimpleNamespace(reconstruction=settings, seed="x")
    return _read(study, name, 4.0, (2.0, 2.0, 2.0), SCAN, SHAPE)


def test_k_space_of_a_scan_is_read_with_its_maps_and_mask(tmp_path: Path) -> None:
    maps, mask = coil_maps(SHAPE[1:], 3), np.zeros(SHAPE[1:])
    maps = maps / np.sqrt((np.abs(maps) ** 2).sum(0))
    mask[:, ::2] = 1
    image = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    measured = Mri(maps, mask, 0.02).forward(image)
    np.savez(tmp_path / "sub-1_T1w.npz", y=measured[0].numpy(), maps=maps, mask=mask)
    found = read(tmp_path)
    torch.testing.assert_close(found.operator.forward(image), measured)
    torch.testing.assert_close(found.values, measured)


def test_a_measurement_without_what_says_how_it_was_made_is_refused(tmp_path: Path) -> None:
    """And not taken for one of a mask, of coils, or of a rate that are drawn here."""
    np.savez(tmp_path / "sub-1_T1w.npz", y=np.zeros((6, *SHAPE[1:]), np.complex64))
    with pytest.raises(UserError, match=r"sub-1_T1w.npz: .*no array 'mask', only \['y'\], expected .*\(8, 8, 8\)"):
        read(tmp_path)
    np.savez(tmp_path / "sub-1_T1w.npz", y=np.zeros((6, *SHAPE[1:]), np.complex64), mask=np.ones(SHAPE[1:]))
    with pytest.raises(UserError, match=r"sub-1_T1w.npz: .*no array 'maps', only \['mask', 'y'\]"):
        read(tmp_path)
    np.savez(tmp_path / "sub-1_T1w.npz", y=np.zeros(SHAPE))
    with pytest.raises(UserError, match=r"sub-1_T1w.npz: .*no array 'rate', only \['y'\], expected .*\(1, 8, 8, 8\)"):
        read(tmp_path, "low_count")


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sub-1_T1w.npz: not readable as .npz"):
        read(tmp_path)
    with pytest.raises(UserError, match="reconstruction.measured.*cannot be filled in"):
        read(tmp_path, pattern="{who}.npz")
    np.savez(tmp_path / "sub-1_T1w.npz", x=np.zeros(3))
    with pytest.raises(UserError, match=r"has no array y, only \['x'\]"):
        read(tmp_path)
    np.savez(tmp_path / "sub-1_T1w.npz", y=np.zeros((8, 8)))
    with pytest.raises(UserError, match=r"y has the shape \(8, 8\), expected \(1, 8, 8, 8\)"):
        read(tmp_path, "denoising")
    (tmp_path / "sub-1_T1w.npz").write_bytes(b"text")
    with pytest.raises(UserError, match="not readable as .npz"):
        read(tmp_path, "denoising")
