"""Heads told from brains by what the scan shows; brains taken out of heads; a study's statement held against both."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from test_preprocess import DATA, affine_of, config, rotation, save

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging import brain_extraction
from meddiff_steps.imaging.preprocess import preprocess_image
from meddiff_steps.imaging.reading import Image, ScanError
from meddiff_steps.imaging.skull import check_statement, shows_skull, skull_facts

SHAPE, SPACING = (80, 96, 88), (2.5, 2.5, 2.5)


@cache
def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A head with noise around it, (x, y, z), and where its brain is: grey below the surface of the brain, white
    deeper, CSF, a skull and a scalp of varying thickness, and a neck.
    """
    rng = np.random.default_rng(seed)
    place = (np.moveaxis(np.indices(SHAPE), 0, -1) - (np.array(SHAPE) - 1) / 2) * SPACING + [0, 0, -10]
    brain = ((place / [66, 84, 62]) ** 2).sum(axis=-1) < 1
    within, beyond = (ndimage.distance_transform_edt(b, sampling=SPACING) for b in (brain, ~brain))

    def varying(low: float, high: float, width: float = 8.0) -> np.ndarray:
        field = ndimage.gaussian_filter(rng.standard_normal(SHAPE), width)
        return low + (high - low) * (field - field.min()) / np.ptp(field)

    csf, skull, scalp = varying(1, 4), varying(4, 9), varying(3, 8)
    values = np.where(within > 4, 900.0, 600.0) * brain
    values[(beyond > 0) & (beyond <= csf)] = 200
    values[(beyond > csf) & (beyond <= csf + skull)] = 100
    skin = (beyond > csf + skull) & (beyond <= csf + skull + scalp)
    neck = (np.hypot(place[..., 0], place[..., 1] + 10) < 55) & (place[..., 2] < -50) & (beyond > csf + skull + scalp)
    values[skin] = varying(500, 1200, 2)[skin]
    values[neck] = varying(300, 800, 2)[neck]
    noise = rng.normal(0, 25, (2, *SHAPE))
    return np.hypot(ndimage.gaussian_filter(values, 0.5) + noise[0], noise[1]).astype(np.float32), brain


def facts_of(array: np.ndarray, codes: str = "RAS", turn: np.ndarray | None = None) -> dict[str, Any]:
    return skull_facts(Image(array, affine_of(codes, SPACING, array.shape, turn)), "nonzero")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_head_has_a_skull_and_a_brain_has_none(seed: int) -> None:
    values, brain = drawn(seed)
    head, alone = facts_of(values), facts_of(values * brain)
    assert shows_skull(head) and head["skull_valley"] > 0.4 and head["head_ml"] > 2500
    assert not shows_skull(alone) and alone["skull_valley"] < 0.1 and 1200 < alone["head_ml"] < 1600
    only_top = facts_of(values[:, :, 50:])
    assert shows_skull(only_top) and only_top["skull_valley"] > 0.4, "of a part of a head, too"


def test_grey_values_and_axes_do_not_matter() -> None:
    values, brain = drawn(0)
    plain = facts_of(values)["skull_valley"]
    assert facts_of(7 * values)["skull_valley"] == pytest.approx(plain, abs=1e-3)
    shifted = facts_of(np.where(brain, values + 300, 0).astype(np.float32))
    assert shifted["skull_valley"] < 0.1
    turned = facts_of(np.ascontiguousarray(values[::-1, ::-1]), "LPS", rotation(10, 0, 5))
    assert turned["skull_valley"] == pytest.approx(plain, abs=0.02)


def test_what_cannot_be_judged_is_not() -> None:
    values, _ = drawn(0)
    affine = affine_of("RAS", SPACING, SHAPE)
    coarse = Image(values[::4, ::4, ::4], affine @ np.diag([4, 4, 4, 1]))
    picture, ct = Image(values[:, :, 40], None), Image(values, affine)
    for facts in (skull_facts(picture, "nonzero"), skull_facts(ct, "ct"), skull_facts(coarse, "all")):
        assert set(facts.values()) == {None} and not shows_skull(facts)


@pytest.mark.skipif(not (DATA / "ixi").is_dir(), reason="IXI is not here")
def test_real_brains_are_brains() -> None:
    from meddiff_steps.imaging.reading import read_image

    files = sorted((DATA / "ixi").glob("sub-*/anat/*_T1w.nii.gz"))[::37]
    found = [skull_facts(read_image(file), "nonzero") for file in files]
    assert max(f["skull_valley"] for f in found) < 0.1 and max(f["head_ml"] for f in found) < 2100


def table(valleys: list[float | None]) -> pd.DataFrame:
    rows = [{"scan_id": f"sub-{n:02}", "skull_valley": v, "head_ml": 1300.0} for n, v in enumerate(valleys)]
    return pd.DataFrame(rows).astype({"skull_valley": "float64"})


def test_a_statement_is_checked() -> None:
    assert check_statement(table([0, 0.1, None]), True) is None
    assert check_statement(table([None]), True) is None
    told = check_statement(table([0, 0.5, 0.1]), True)
    assert told is not None and "1 of 3 scans show a head: sub-01 first" in told
    with pytest.raises(UserError, match=r"true, but 2 of 3 scans show a head.*skull_stripped: false"):
        check_statement(table([0, 0.5, 0.6]), True)
    told = check_statement(table([0, 0, None]), False)
    assert told is not None and "false, but 2 of 2 scans show a brain alone" in told, (
        "nothing is at risk: told, not refused"
    )


# ---------------------------------------------------------------------------------------------- extraction


class Stand:
    """What deepbet's class is asked for, answered with a known brain."""

    brain: np.ndarray

    def __init__(self, no_gpu: bool) -> None:
        assert no_gpu

    def run(self, image: Any) -> tuple[Any, Any, float]:
        import nibabel as nib

        assert self.brain.any(), "Not enough foreground to calculate bounding box"
        return image, nib.Nifti1Image(self.brain.astype(np.float32), image.affine), 0.0


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> type[Stand]:
    module = ModuleType("deepbet")
    module.BrainExtraction = Stand  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepbet", module)
    monkeypatch.setattr(brain_extraction.importlib.metadata, "version", lambda name: "9.9")
    brain_extraction.load_deepbet.cache_clear()
    yield Stand
    brain_extraction.load_deepbet.cache_clear()


def test_brains_are_taken_out_of_heads_alone(tmp_path: Path, stand: type[Stand]) -> None:
    """As a mask of another tool would: the same image, the same columns."""
    values, brain = drawn(0)
    stand.brain = brain
    affine = affine_of("RAS", SPACING, SHAPE)
    scan = save(tmp_path / "scan.nii.gz", values, affine)
    mask = save(tmp_path / "mask.nii.gz", brain.astype(np.uint8), affine)
    grid = {"shape": (52, 64, 56), "spacing_mm": 3.5}
    image, facts = preprocess_image(scan, config(**grid, brain_extraction="deepbet"))
    masked, others = preprocess_image(scan, config(**grid, brain_mask="x_{scan_id}"), mask)
    assert facts["brain_extraction"] == "deepbet 9.9" and others["brain_extraction"] is None
    assert np.array_equal(image, masked)
    assert facts == others | {"brain_extraction": "deepbet 9.9"} and facts["skull_valley"] < 0.1

    already = save(tmp_path / "brain.nii.gz", np.where(brain, values, 0), affine)
    image, facts = preprocess_image(already, config(**grid, brain_extraction="deepbet"))
    plain, others = preprocess_image(already, config(**grid))
    assert facts.pop("brain_extraction") == "brain already" and others.pop("brain_extraction") is None
    assert np.array_equal(image, plain) and facts == others

    stand.brain = np.zeros_like(brain)
    with pytest.raises(ScanError, match="Not enough foreground") as error:
        preprocess_image(scan, config(**grid, brain_extraction="deepbet"))
    assert error.value.reason == "no brain found"


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepbet", None)
    brain_extraction.load_deepbet.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'meddiff-steps\[brain-extraction\]'"):
        brain_extraction.load_deepbet()


@pytest.mark.parametrize(
    "settings",
    [
        {"brain_mask": "x_{scan_id}"},
        {"foreground": "ct"},
        {"shape": (24, 24), "spacing_mm": None},
    ],
)
def test_where_brains_cannot_be_taken_out(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="brain_extraction"):
        config(brain_extraction="deepbet", **settings)


def test_deepbet_finds_a_brain() -> None:
    """The networks themselves, where they are installed: most of a drawn brain, and nothing of its skull."""
    pytest.importorskip("deepbet")
    brain_extraction.load_deepbet.cache_clear()
    values, brain = drawn(0)
    scan = Image(values, affine_of("RAS", SPACING, SHAPE))
    mask, facts = brain_extraction.extracted(Path("scan"), scan, "nonzero")
    assert mask is not None and facts["brain_extraction"].startswith("deepbet ")
    found = mask.array > 0
    dice = 2 * (found & brain).sum() / (found.sum() + brain.sum())
    assert dice > 0.95
