"""Simulated brains, decoded softly, spoilt in known ways: which figure sees what, and the curve over detail."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy.ndimage import gaussian_filter

from meddiff_steps.config import Evaluate, SimulatedSource
from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation.discriminability import discriminability, low_pass
from meddiff_steps.evaluation.likeness import Kind, Measured, kinds_of, measured
from meddiff_steps.evaluation.metrics import realism_and_diversity
from meddiff_steps.evaluation.sanity import sanity, verdict
from meddiff_steps.evaluation.spectrum import BANDS
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.instruments.feature_spaces.assemble import spaces
from meddiff_steps.instruments.feature_spaces.base import Context
from meddiff_steps.report import charts, sections, tables
from meddiff_steps.simulation.brains import load_template, make_lattice, simulate_subject

SHAPE, TRAIN, HELD_OUT = (28, 34, 28), 60, 50
SETTINGS = Evaluate(
    bootstrap=200, realism_bootstrap=100, permutations=100, ssim_pairs=20, cutoffs=[0.3, 0.08], sanity_images=40
)
SPACES = spaces(["random", "radiomics", "structure"], Context(3))


class Brains:
    """Scans, soft reconstructions of the held-out ones, and synthetic images: other brains with noise."""

    def __init__(self, root: Path) -> None:
        source = SimulatedSource(subjects=200, shape=SHAPE, spacing_mm=6.0)
        template, lattice = load_template(6.0), make_lattice(SHAPE, 6.0)
        brains = [
            simulate_subject(source, "test", i, lattice, template).images["T1w"].astype(np.float32)
            for i in range(TRAIN + HELD_OUT + 40)
        ]
        brains = [np.clip(brain / np.quantile(brain[brain > 0], 0.995), 0, 1) for brain in brains]
        names = [f"sub-{i:03d}" for i in range(TRAIN + HELD_OUT)]
        table = pd.DataFrame({"scan_id": names, "subject_id": names})
        table["split"] = ["train"] * TRAIN + ["test"] * HELD_OUT
        image = TensorColumn("float16", (1, *SHAPE))
        with ShardWriter(root / "scans.arrow", {"scan_id": pa.string(), "image": image}) as shard:
            for name, brain in zip(names, brains, strict=False):
                shard.append(scan_id=name, image=brain[None])
        columns = {"scan_id": pa.string(), "image": image, "reconstruction": image}
        with ShardWriter(root / "pairs.arrow", columns) as shard:
            for name, brain in list(zip(names, brains, strict=False))[TRAIN:]:
                shard.append(scan_id=name, image=brain[None], reconstruction=gaussian_filter(brain, 0.45)[None])
        made = pd.DataFrame({"sample_id": [f"syn{i}" for i in range(40)]})
        made["seed_key"] = made["sample_id"]
        with ShardWriter(root / "made.arrow", {"sample_id": pa.string(), "image": image}) as shard:
            for name, brain in zip(made["sample_id"], brains[TRAIN + HELD_OUT :], strict=True):
                noise = 0.1 * philox("test", f"seen {name}").normal(size=SHAPE) * (brain > 0)
                shard.append(sample_id=name, image=np.clip(brain + noise, 0, 1)[None])
        scans = Images.of(Shards([root / "scans.arrow"]), "scan_id", "subject_id", table, "scans")
        paired = Images.of(Shards([root / "pairs.arrow"]), "scan_id", "subject_id", table, "pairs")
        synthetic = Images.of(Shards([root / "made.arrow"]), "sample_id", "seed_key", made, "plan")
        self.kinds: dict[str, Kind] = kinds_of(
            synthetic, scans.of_splits(["train"]), scans.of_splits(["test"]), paired, 200
        )
        self.found: list[Measured] = measured(SPACES, self.kinds)


@pytest.fixture(scope="module")
def brains(tmp_path_factory: pytest.TempPathFactory) -> Brains:
    return Brains(tmp_path_factory.mktemp("brains"))


@pytest.fixture(scope="module")
def seen(brains: Brains) -> dict[str, Any]:
    return sanity(SPACES, brains.kinds, brains.found, SETTINGS, seed="test")


def test_structure_sees_blur_and_matched_noise_where_other_figures_miss_the_noise(seen: dict[str, Any]) -> None:
    sees = {
        space: {name: set(entry["sees"]) for name, entry in part.items()} for space, part in seen["figures"].items()
    }
    assert {"blur", "blur_and_grain", "reconstruction_and_grain", "blocks"} <= sees["structure"]["frechet"]
    for missing in (sees["random"]["frechet"], sees["random"]["precision"]):
        assert not {"blur_and_grain", "reconstruction_and_grain", "blocks"} & missing
    assert "blur" in sees["random"]["frechet"]
    assert "haze" in sees["radiomics"]["frechet"] and "haze" not in sees["structure"]["frechet"]
    assert {"blur"} <= sees["power"]["above_half"]
    assert seen["images"] == 40
    assert set(seen["figures"]["power"]) == set(BANDS)


def test_a_figure_that_sees_nothing_is_shown_as_such(seen: dict[str, Any]) -> None:
    table = tables.sanity_table(seen)
    assert table.header[-1] == "sees"
    rows = {(row[0], row[1]): row for row in table.rows}
    blind = [row for row in table.rows if row[-1] == "NOTHING"]
    assert blind and all("●" not in " ".join(row) for row in blind)
    assert rows["fine structure", "Frechet distance"][-1].startswith("blur, blur + grain")
    assert len(table.rows) == 3 * 8 + 3
    assert sections.sanity_section(seen).tables[0].rows == table.rows
    assert not sections.sanity_section({"skipped": "no reason"}).tables


def test_a_verdict_knows_which_side_is_bad() -> None:
    low, high = ({"value": v, "low": v - 0.1, "high": v + 0.1, "n": 9} for v in (0.2, 0.8))
    assert (verdict("frechet", high, low), verdict("frechet", low, high)) == ("worse", "better")
    assert (verdict("precision", low, high), verdict("precision", high, low)) == ("worse", "better")
    assert verdict("vendi", high, low) == verdict("vendi", low, high) == verdict("above_half", low, high) == "worse"
    assert verdict("kid", high, high) == "alike"
    assert verdict("kid", high | {"low": None}, low) == "unknown"


def test_it_is_left_out_on_request_and_without_reconstructions(brains: Brains) -> None:
    off = SETTINGS.model_copy(update={"sanity_images": 0})
    assert sanity(SPACES, brains.kinds, brains.found, off, seed="") == {"skipped": "evaluate.sanity_images is 0"}
    without = {kind: some for kind, some in brains.kinds.items() if kind != "reconstructions"}
    assert "fewer than 10 reconstructions" in sanity(SPACES, without, brains.found, SETTINGS, seed="")["skipped"]
    few = SETTINGS.model_copy(update={"sanity_images": 5})
    assert "skipped" in sanity(SPACES, brains.kinds, brains.found, few, seed="")


def test_every_figure_stands_beside_that_of_reconstructions(brains: Brains) -> None:
    like, various, _ = realism_and_diversity(SPACES, brains.kinds, brains.found, SETTINGS, seed="test")
    for space in ("random", "radiomics", "structure"):
        figures = like[space] | various["features"][space]
        assert figures["images"]["reconstructions"] == 40
        for name in ("frechet", "kid", "classifier_auc", "precision", "recall", "density", "coverage", "vendi"):
            decoded = figures[name]["reconstructions"]
            assert decoded["low"] <= decoded["value"] <= decoded["high"]
            assert ("floor" if name in ("frechet", "kid", "classifier_auc") else "ceiling") in decoded
    decoded = like["structure"]["frechet"]["reconstructions"]
    assert decoded["low"] > 5 * decoded["floor"]["high"]  # soft
    assert "reconstructions" in various[various["ssim_settings"]["metric"]]
    rows = tables.realism_table({"realism": like, "diversity": various}).rows
    assert all(row[4] for row in rows)


def test_the_curve_says_that_noise_is_fine_detail(brains: Brains) -> None:
    curves = discriminability(brains.kinds, brains.found, SETTINGS, 3, (6.0, 6.0, 6.0), seed="test")
    assert curves["cutoffs_cycles_per_voxel"] == [0.08, 0.3, None]
    assert curves["finest_mm"] == [37.5, 10.0, 6.0]
    assert curves["synthetic"][0]["low"] < 0.65 < 0.9 < curves["synthetic"][2]["low"]
    assert all(figure["low"] < 0.6 for figure in curves["training"])
    like, _, _ = realism_and_diversity(SPACES, brains.kinds, brains.found, SETTINGS, seed="test")
    last = {
        key: value for key, value in like["random"]["classifier_auc"].items() if key in ("value", "low", "high", "n")
    }
    assert curves["synthetic"][2] == last
    assert curves["reconstructions"][2]["value"] == like["random"]["classifier_auc"]["reconstructions"]["value"]
    alone = discriminability(
        brains.kinds, [], SETTINGS, 3, (6.0, 6.0, 6.0), seed="test"
    )  # where `random` is not chosen
    assert alone["synthetic"][2]["value"] == pytest.approx(last["value"])
    assert len(tables.curve_table(curves).rows) == 3
    assert "<path" in charts.discriminability(curves)[0].marks
    assert sections.discriminability_section(curves).pictures
    whole = curves | {"cutoffs_cycles_per_voxel": [None], "finest_mm": [None]}
    assert not sections.discriminability_section(whole).pictures


def test_a_low_pass_halves_the_amplitude_at_its_frequency() -> None:
    wave = np.cos(2 * np.pi * 0.1 * np.arange(200))[None, None, :, None] * np.ones((1, 1, 200, 8))
    left = low_pass(0.1)(wave, np.zeros(1))[0, 0, 50:150, 4]
    assert np.abs(left).max() == pytest.approx(0.5, abs=0.01)
