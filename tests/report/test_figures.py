"""Pictures and charts: orientation of planes, layout, same bytes twice."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.imaging.signed_distances import LABELS
from meddiff_steps.report import charts, figures, pictures
from meddiff_steps.report.charts import Chart
from meddiff_steps.report.figures import Block, Tile


@pytest.fixture
def head() -> np.ndarray:
    """A volume whose right, anterior and superior sides are marked by brightness."""
    volume = np.zeros((1, 8, 10, 6), np.float16)
    volume[0, -1] += 0.2  # right
    volume[0, :, -1] += 0.3  # anterior
    volume[0, :, :, -1] += 0.4  # superior
    return volume


def test_planes_follow_radiological_convention(head: np.ndarray) -> None:
    axial, coronal, sagittal = figures.planes(head)
    assert (axial.shape, coronal.shape, sagittal.shape) == ((10, 8), (6, 8), (6, 10))
    assert axial[0, 4] > axial[-1, 4]  # anterior is up
    assert axial[5, 0] > axial[5, -1]  # the subject's right is on the left
    assert coronal[0, 4] > coronal[-1, 4]  # superior is up
    assert coronal[3, 0] > coronal[3, -1]
    assert sagittal[0, 5] > sagittal[-1, 5]
    assert sagittal[3, 0] > sagittal[3, -1]  # anterior is on the left


def test_a_2d_image_is_shown_as_it_is() -> None:
    image = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    (plane,) = figures.planes(image)
    np.testing.assert_array_equal(plane, image[0])


def test_mosaic_centres_pictures_on_a_common_height() -> None:
    tall, short = np.ones((6, 2)), np.ones((2, 3))
    side = figures.mosaic([tall, short])
    assert side.shape == (6, 2 + 1 + 3)
    np.testing.assert_array_equal(side[:, 2], 0)
    np.testing.assert_array_equal(side[2:4, 3:], 1)
    assert side[:, 3:].sum() == 6
    assert figures.mosaic([tall.T, short], vertical=True).shape == (2 + 1 + 2, 6)


def test_label_maps_are_shown_in_colours_that_do_not_mix() -> None:
    labels = np.zeros((1, 12, 12), np.uint8)
    labels[0, 3:6], labels[0, 6:9] = 1, 2
    drawn = figures.image_grid([Block("", [Tile(labels, structures=2), Tile(labels / 2)], 2)])
    pixels = np.asarray(Image.open(io.BytesIO(drawn)).convert("RGB")).reshape(-1, 3)
    _, counts = np.unique(pixels[np.ptp(pixels, 1) > 20], axis=0, return_counts=True)
    assert (counts > 1000).sum() == 2 and counts[counts <= 1000].sum() < 0.03 * counts.sum()  # but for edges


def test_pairs_are_shown_with_all_their_structures(tmp_path: Path) -> None:
    columns = {"sample_id": pa.string(), "image": TensorColumn("float16", (1, 8, 8, 8))}
    with ShardWriter(tmp_path / "shard.arrow", columns | {LABELS: TensorColumn("uint8", (8, 8, 8))}) as shard:
        for i in range(2):
            labels = np.arange(8)[:, None, None] // 2 * np.ones((8, 8, 8))
            shard.append(sample_id=f"s{i}", image=np.full((1, 8, 8, 8), 0.5), labels=labels)
    plan = pd.DataFrame({"sample_id": ["s0", "s1", "s2"]})
    shown = pictures.label_maps(Shards([tmp_path / "shard.arrow"]), plan, ["a", "b", "c"])
    pixels = np.asarray(Image.open(io.BytesIO(shown.png)).convert("RGB")).reshape(-1, 3)
    counts = np.unique(pixels[np.ptp(pixels, 1) > 20], axis=0, return_counts=True)[1]
    assert (counts > 1000).sum() == 3 and "2 synthetic images" in shown.alt


def predictions() -> tuple[pd.DataFrame, dict]:
    rng = np.random.default_rng(0)
    rows = [(k, "size", None, v, v + rng.normal()) for k in ("real", "synthetic") for v in rng.uniform(0, 50, 30)]
    rows += [
        (k, "site", level, float(i % 2), rng.random())
        for k in ("real", "synthetic")
        for level in ("a$1", "b")
        for i in range(30)
    ]
    figure = {
        "value": 0.9,
        "low": 0.8,
        "high": 0.95,
        "n": 30,
        "ceiling": {"value": None, "low": None, "high": None, "n": 30},
    }
    metrics = {
        "size": {"kind": "continuous", "unit": "$mL$", "r": figure},
        "site": {"kind": "categorical", "auc": figure},
    }
    return pd.DataFrame(rows, columns=["kind", "covariate", "level", "requested_or_true", "measured"]), metrics


def everything(head: np.ndarray) -> dict[str, Callable[[], bytes]]:
    tiles = [Tile(head, "age 40 $\nsex F"), Tile(head), Tile(head, "one line")]
    return {
        "grid": lambda: figures.image_grid(
            [Block("Real", tiles, 2), Block("", tiles, 3, row_labels=["row"])], title="Title"
        ),
        "strip": lambda: figures.strip([tiles, tiles], difference=True),
        "short strip": lambda: figures.strip([tiles[:1]], difference=True),
        "reconstruction": lambda: figures.reconstruction_grid([("typical", head, head * 0.9)]),
    }


def all_charts() -> dict[str, Callable[[], list[Chart]]]:
    history = pd.DataFrame(
        {
            "step": [0, 10, 0, 10, 0, 0],
            "metric": ["train/l1", "train/l1", "val_l1", "val_l1", "psnr", "train/kl"],
            "value": [1.0, 0.01, 1.1, np.nan, 20.0, 0.0],
        }
    )
    curve = [10.0, 1.0, 0.1, 0.01]
    spectrum = {
        "frequency_of_nyquist": [0.1, 0.4, 0.6, 0.9],
        "radial_average": {"real": curve, "synthetic": curve, "image": curve, "reconstruction": curve},
    }
    places = pd.DataFrame(
        [(k, s, i, i % 3) for k in ("held_out", "synthetic") for s in ("a$", "b") for i in range(9)],
        columns=["kind", "space", "pc1", "pc2"],
    )
    figure = {"value": 0.7, "low": 0.6, "high": 0.8}
    curves = {"cutoffs_cycles_per_voxel": [0.1, None], "finest_mm": [10.0, 2.0]}
    points = [{"ratio": ratio, "auc": figure} for ratio in (0, 1)]
    return {
        "scatter": lambda: charts.scatter(*predictions(), {"size": "Size <of> it & more"}),
        "spectra": lambda: charts.spectra(spectrum),
        "losses": lambda: charts.loss_curves(history),
        "features": lambda: charts.feature_spaces(
            places, {"a$": {"explained": [0.5, 0.25]}, "skipped": {}, "b": {"explained": [0.1, 0.01]}}, {"b": "B"}
        ),
        "discriminability": lambda: charts.discriminability(curves | {"synthetic": [figure, figure]}),
        "arms": lambda: charts.arms([("a$_b", [("test split", figure)], [0.6, None])], 0.5),
        "bars": lambda: charts.bars([charts.Bars("by sex", ["one_two"], {"F": [figure]}, {"F": [figure]})], "AUC"),
        "ratios": lambda: charts.ratio_curves([{"real": 0.2, "source": "filtered", "points": points}]),
    }


PANELS = {"scatter": 2, "spectra": 2, "losses": 2, "features": 2}


@pytest.mark.parametrize(
    "name", ["scatter", "spectra", "losses", "features", "discriminability", "arms", "bars", "ratios"]
)
def test_charts_are_svg_with_ids_of_their_own_and_the_same_twice(name: str) -> None:
    draw = all_charts()[name]
    first = draw()
    assert len(first) == PANELS.get(name, 1)
    found: list[str] = []
    for panel in first:
        root = ElementTree.fromstring(f'<svg xmlns:x="x">{panel.marks}</svg>')
        assert 150 < panel.width < 400 and panel.title
        ids = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
        used = set(re.findall(r'(?:url\(|href=")#([^")]+)', panel.marks))
        assert used == set(ids) and len(set(ids)) == len(ids)
        assert not re.search(r"<style|metadata|matplotlib|\d\d:\d\d:\d\d|https?:", panel.marks)
        assert any(node.tag == "text" and node.text for node in root.iter()), "letters stay letters"
        found += ids
    assert len(set(found)) == len(found), "panels of one page share no id"
    assert draw() == first


def test_a_dollar_under_a_bar_is_a_dollar() -> None:
    bar = charts.Bars("by group", ["a$ $b"], {"F": [{"value": 0.5, "low": 0.4, "high": 0.6}]})
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", charts.bars([bar], "AUC")[0].marks)
    assert "a$ $b" in texts


def test_what_good_training_does_is_said_right() -> None:
    titles = "".join(panel.marks for panel in all_charts()["losses"]())
    assert "PSNR, dB: good if it rises" in titles and "l1: good if it falls" in titles
    assert "kl" not in titles, "a loss without weight is no news"


def test_charts_of_large_cohorts_stay_small() -> None:
    rng = np.random.default_rng(0)
    rows = [
        (kind, "age", None, value, value + rng.normal())
        for kind in ("real", "synthetic")
        for value in rng.uniform(0, 50, 20_000)
    ]
    table = pd.DataFrame(rows, columns=["kind", "covariate", "level", "requested_or_true", "measured"])
    metrics = {"age": predictions()[1]["size"]}
    (panel,) = charts.scatter(table, metrics, {})
    assert len(panel.marks) < 400_000
    assert "data:image/png;base64," in panel.marks


@pytest.mark.parametrize("name", ["grid", "strip", "short strip", "reconstruction"])
def test_pictures_are_png_without_metadata_and_the_same_twice(head: np.ndarray, name: str) -> None:
    draw = everything(head)[name]
    first = draw()
    picture = Image.open(io.BytesIO(first))
    assert picture.format == "PNG"
    assert set(picture.info) <= {"dpi"}
    assert min(picture.size) > 50
    assert draw() == first


def test_the_users_matplotlib_settings_do_not_matter(head: np.ndarray) -> None:
    import matplotlib

    plain = all_charts()["losses"](), everything(head)["strip"]()
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "savefig.dpi": 30}):
        assert (all_charts()["losses"](), everything(head)["strip"]()) == plain


def grey(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("L"), dtype=float)


def test_grid_pixels_are_square() -> None:
    dark = np.argwhere(
        grey(figures.image_grid([Block("", [Tile(np.zeros((1, 10, 20), np.float32))], 1)], width=3.0)) < 20
    )
    height, width = np.ptp(dark, axis=0) + 1
    assert width == pytest.approx(2 * height, abs=3)


def test_grid_shows_row_0_on_top() -> None:
    image = np.zeros((1, 20, 20), np.float32)
    image[0, :10] = 1.0  # upper half white
    shown = grey(figures.image_grid([Block("", [Tile(image)], 1)], width=3.0))
    assert np.argwhere(shown < 20)[:, 0].min() > 0.45 * shown.shape[0]
