"""Pages lead somewhere: links to files that are there, citations to the list of references; the site is built of them,
what they quote is what the programs say, and the tutorial runs.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from tiny_study import whole_run

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "config/README.md", "config/keys.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
CITATION = re.compile(r"\b([A-Z][^\W\d_]{2,})(?: et al\.,?| and [A-Z][^\W\d_]+)? \(?((?:19|20)\d\d)\b")
MONTHS = {
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
}


def test_links_lead_to_files():
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
        if not target.startswith(("http:", "https:")) and not (page.parent / target).exists()
    ]
    assert not broken


def test_what_is_cited_is_in_the_list_of_references():
    references = (ROOT / "docs/references.md").read_text().splitlines()
    missing = {
        f"{path.relative_to(ROOT)}: {name} {year}"
        for path in [*PAGES, *sorted((ROOT / "meddiff_steps").rglob("*.py"))]
        for name, year in CITATION.findall(path.read_text())
        if name not in MONTHS and not any(name in line and year in line for line in references)
    }
    assert not missing


# ------------------------------------------------------------------------------------------------------ trouble


def said() -> Iterator[str]:
    """Every text in the code, as Python joins it."""
    for path in sorted((ROOT / "meddiff_steps").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    for path in sorted((ROOT / "rules").glob("*.smk")):  # not Python: texts that stand on lines of their own
        yield re.sub(r'"\s*f?"', "", path.read_text())


def test_messages_of_the_page_about_trouble_are_those_of_the_programs():
    quoted = re.findall(r"```text\n(.*?)\n```", (ROOT / "docs/faq.md").read_text(), re.S)
    assert len(quoted) > 10
    known = "\n".join(said())
    assert not [part for message in quoted for part in message.split("…") if part not in known]


# --------------------------------------------------------------------------------------------------------- site


class Loaded(HTMLParser):
    """What a page fetches to be shown."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video") and named.get("src"):
            self.addresses.append(named["src"])
        if tag == "link" and named.get("rel") in ("stylesheet", "preload", "preconnect", "icon"):
            self.addresses.append(named["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site; --strict fails on a link or an anchor that leads nowhere, and on a page that the menu lacks."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: `make test` does that")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_is_whole_and_fetches_nothing_from_elsewhere(site):
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 30
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        for address in loaded.addresses:
            assert address.startswith("data:") or (page.parent / address.split("?")[0]).is_file(), (page.name, address)


def test_the_site_has_every_command_key_and_option(site):
    options = (site / "options.html").read_text()
    assert all(text in options for text in ("meddiff regenerate", "--subject", "meddiff_steps few_step", "required"))
    assert "num_inference_steps" in (site / "keys.html").read_text()
    assert "encode" in (site / "python.html").read_text() and ":::" not in (site / "python.html").read_text()
    assert "```mermaid" not in (site / "architecture.html").read_text()


# ----------------------------------------------------------------------------------------------------- tutorial


def test_the_tutorial_runs(tmp_path_factory, monkeypatch):
    client = pytest.importorskip("nbclient", reason="nbclient is not installed: `make test` does that")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: `make test` does that")
    folder = whole_run(tmp_path_factory) / "results/tiny"
    for name, value in {"MEDDIFF_RESULTS": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "docs/tutorial.ipynb", 4)
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    released = len(list((folder / "release").glob("sub-*")))
    assert f"{released} synthetic subjects" in printed and "L5 content      PASS" in printed and "1 bitwise" in printed


def test_the_tutorial_shows_what_it_prints_and_no_warnings():
    cells = [cell for cell in nbformat.read(ROOT / "docs/tutorial.ipynb", 4).cells if cell.cell_type == "code"]
    assert sum(bool(cell.outputs) for cell in cells) > 7
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
