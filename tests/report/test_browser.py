"""The report in a browser, as wide as a desk's and as a phone's screen."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, chromium, cut_off, unloaded
from fabricated import Fabricated

from meddiff_steps.audit.page import as_html
from meddiff_steps.audit.request import Report
from meddiff_steps.provenance.verify import Check
from meddiff_steps.report.page import Section, render
from meddiff_steps.report.viewer import viewer

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no chromium is installed (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(str(chromium()), tmp_path_factory.mktemp("browser") / "profile") as started:
        yield started


@pytest.fixture(scope="module", params=[(16, 20, 16), (24, 32)], ids=["3D", "2D"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = Fabricated(tmp_path_factory.mktemp("study"), request.param, simulated=False)
    study.evaluate()
    study.report()
    return study.root / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_whole(browser: Browser, report: Path, width: int) -> None:
    browser.open(report, width)
    if browser.evaluate("document.querySelector('.viewer') !== null"):
        wait_for(browser, "document.querySelector('.viewer').dataset.ready")
    assert browser.errors() == []
    assert browser.evaluate("document.images.length") >= 12
    assert unloaded(browser) == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert cut_off(browser, width) == []
    drawn_at = browser.evaluate(
        "[...document.querySelectorAll('svg')].map(chart => chart.getBoundingClientRect().width)"
    )
    assert len(drawn_at) >= 9 and min(drawn_at) > 200
    smallest = browser.evaluate(
        "Math.min(...[...document.querySelectorAll('.sentences *')].map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12
    browser.screenshot(report.with_name(f"screenshot-{width}.png"))  # for whoever looks


@pytest.mark.parametrize("width", [1280, 390])
def test_sentences_come_first_and_links_lead_to_sections(browser: Browser, report: Path, width: int) -> None:
    browser.open(report, width)
    tops = browser.evaluate(
        "['.sentences', 'nav', '#pictures', '#looks', '#fidelity', '#privacy', '#use', '#made', '#glossary',"
        " 'footer'].map(name => document.querySelector(name).getBoundingClientRect().top)"
    )
    assert tops == sorted(tops)
    missing = "[...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.hash)).map(a => a.hash)"
    assert browser.evaluate(missing) == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_an_audit_is_whole(browser: Browser, tmp_path: Path, width: int) -> None:
    long = "sub-syn000001/anat/" + "x" * 120 + ".nii.gz"
    outcomes = ("pass", "finding", "note", "not run")
    checks = [
        Check(level, name, outcome, f"What was seen, in words, and a name: {long}", [long, "<b>"])
        for level in range(8)
        for name, outcome in zip(("files", "signature-of-the-publisher", "x", "y"), outcomes, strict=True)
    ]
    page = tmp_path / "audit.html"
    page.write_text(as_html(Report(f"results/{'study' * 20}/release", checks, sha256="ab" * 32)))
    browser.open(page, width)
    assert browser.errors() == [] and unloaded(browser) == [] and cut_off(browser, width) == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    browser.screenshot(tmp_path / f"audit-{width}.png")


def test_errors_and_overflow_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<img src='nothing.png'><div style='width: 2000px'>wide</div><script>console.error('told');"
        " missing.call()</script>"
    )
    browser.open(page, 390)
    assert len(browser.errors()) == 3
    assert browser.evaluate("document.documentElement.scrollWidth") >= 2000
    assert cut_off(browser, 390) == ["DIV wide"] and len(unloaded(browser)) == 1


def wait_for(browser: Browser, condition: str) -> None:
    """Until a JavaScript expression is true; the viewer draws as soon as its volumes are decoded."""
    script = (
        f"new Promise((done, fail) => {{ const look = n => {condition} ? done(true) : n ? setTimeout(look, 20, n - 1) :"
        " fail(new Error()); look(500); })"
    )
    assert browser.evaluate(script)


def drawn(browser: Browser, plane: str) -> np.ndarray:
    """Grey values of what a plane of the first shown volume shows, (rows, columns), a value per voxel, without the
    lines.
    """
    script = f"""(() => {{
        const canvas = document.querySelector('.viewer .pair:not([hidden]) canvas[data-plane={plane}]');
        const copy = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        return [canvas.width, canvas.height, [...copy.data.filter((_, i) => i % 4 === 0)]];
    }})()"""
    width, height, values = browser.evaluate(script)
    return np.array(values).reshape(height, width)


def move(browser: Browser, axis: int, value: int) -> None:
    browser.evaluate(
        f"(() => {{ const s = document.querySelectorAll('.viewer input')[{axis}]; s.value = {value};"
        " s.dispatchEvent(new Event('input')); })()"
    )
    wait_for(browser, f"document.querySelector('.viewer').dataset.ready.split(',')[{axis}] == {value}")


def place(browser: Browser) -> list[int]:
    return browser.evaluate("[...document.querySelectorAll('.viewer input')].map(slider => Number(slider.value))")


@pytest.fixture
def slices(browser: Browser, tmp_path: Path) -> Browser:
    """A page with two volumes: each corner region has its own grey value, and the second is empty."""
    head = np.zeros((1, 8, 10, 6), np.float32)
    head[0, 4:] += 0.2  # right
    head[0, :, 5:] += 0.3  # anterior
    head[0, :, :, 3:] += 0.4  # superior
    content = Section(
        "slices", "Slices", viewer=viewer([[("head", head)], [("nothing", np.zeros_like(head))]], "caption")
    )
    (tmp_path / "page.html").write_bytes(render(title="T", study="s", lead="l", simulated=True, sections=[content]))
    browser.open(tmp_path / "page.html", 1280)
    wait_for(browser, "document.querySelector('.viewer').dataset.ready")
    return browser


def corners(picture: np.ndarray) -> list[float]:
    """Values a tenth inside the corners: upper left, upper right, lower left, lower right."""
    rows, columns = picture.shape
    return [round(picture[y, x] / 255, 1) for y in (rows // 10, -rows // 10) for x in (columns // 10, -columns // 10)]


def test_planes_are_shown_the_radiological_way(slices: Browser) -> None:
    assert place(slices) == [4, 5, 3]
    assert corners(drawn(slices, "axial")) == [0.9, 0.7, 0.6, 0.4]  # right on the left, anterior up
    assert corners(drawn(slices, "coronal")) == [0.9, 0.7, 0.5, 0.3]  # superior up
    assert corners(drawn(slices, "sagittal")) == [0.9, 0.6, 0.5, 0.2]  # anterior on the left


def test_sliders_change_slices(slices: Browser) -> None:
    move(slices, 2, 0)
    assert corners(drawn(slices, "axial")) == [0.5, 0.3, 0.2, 0.0]
    move(slices, 0, 0)
    assert corners(drawn(slices, "sagittal")) == [0.7, 0.4, 0.3, 0.0]
    assert slices.errors() == []


def test_a_click_in_one_plane_moves_the_others(slices: Browser) -> None:
    box = slices.evaluate(
        "(() => { const b = document.querySelector('canvas[data-plane=axial]').getBoundingClientRect(); return [b.left,"
        " b.top, b.width, b.height]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):  # near the upper left corner: right and anterior
        slices.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=box[0] + 0.05 * box[2],
            y=box[1] + 0.05 * box[3],
            button="left",
            clickCount=1,
        )
    assert place(slices) == [7, 9, 3]
    wait_for(slices, "document.querySelector('.viewer').dataset.ready == '7,9,3'")
    assert corners(drawn(slices, "coronal")) == [0.9, 0.7, 0.5, 0.3]


def test_buttons_change_volumes(slices: Browser) -> None:
    slices.evaluate("document.querySelectorAll('.viewer button')[1].click()")
    wait_for(slices, "document.querySelectorAll('.pair canvas[data-plane=axial]')[1].width > 300")
    assert corners(drawn(slices, "axial")) == [0.0] * 4
    assert slices.evaluate("[...document.querySelectorAll('.pair')].map(pair => pair.hidden)") == [True, False]
