"""The slice viewer's part that runs in Python; test_browser.py is about the rest."""

import io

import numpy as np
import pytest
from PIL import Image

from meddiff_steps.report import viewer as module
from meddiff_steps.report.page import Section, render
from meddiff_steps.report.viewer import encoded, reduced, viewer


def test_a_volume_is_encoded_slab_by_slab() -> None:
    volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 255
    picture = np.asarray(Image.open(io.BytesIO(encoded(volume))))
    assert picture.shape == (4 * 3, 2)
    np.testing.assert_array_equal(picture.reshape(4, 3, 2).transpose(2, 1, 0), np.arange(24).reshape(2, 3, 4))


def test_values_that_do_not_fit_are_clipped() -> None:
    picture = np.asarray(Image.open(io.BytesIO(encoded(np.array([[[-1.0, 2.0, np.nan]]])))))
    assert picture.ravel().tolist() == [0, 255, 0]


def test_large_volumes_are_averaged_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).random((1, 5, 8, 6)).astype(np.float32)
    assert reduced(image).shape == (5, 8, 6)
    monkeypatch.setattr(module, "MAX_VOXELS", 30)
    small = reduced(image)
    assert small.shape == (2, 4, 3)
    assert small[1, 3, 2] == pytest.approx(image[0, 2:4, 6:8, 4:6].mean())


def test_the_published_size_keeps_the_page_below_eight_megabytes() -> None:
    head = np.random.default_rng(0).random((160, 224, 160), dtype=np.float32)  # noise compresses less than brains do
    head[
        sum(np.square(axis) for axis in np.meshgrid(*[np.linspace(-1, 1, n) for n in head.shape], indexing="ij")) > 1
    ] = 0
    assert 6 * len(encoded(reduced(head[None]))) * 4 / 3 < 3e6  # three pairs; the pictures take about 5 MB


def test_the_script_is_allowed_by_its_digest_and_only_where_it_is_needed() -> None:
    volume = np.zeros((1, 2, 3, 4), np.float32)
    content = {"title": "T", "study": "s", "lead": "l", "simulated": False}
    section = Section("slices", "Slices", viewer=viewer([[("<b>", volume)]], "caption"))
    page = render(sections=[section], **content).decode()  # type: ignore[arg-type]
    assert "script-src 'sha256-" in page
    assert "&lt;b&gt;" in page
    assert "script" not in render(sections=[Section("x", "X", text=["y"])], **content).decode()  # type: ignore[arg-type]
