"""Pages lead somewhere: links to files that are there, citations to the list of references."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "config/README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
