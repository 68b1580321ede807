"""How to cite a release: CITATION.cff and BibTeX.

Source: Citation File Format 1.2.0, https://citation-file-format.github.io.
"""

from __future__ import annotations

from typing import Any

import yaml

from meddiff_steps import __version__
from meddiff_steps.config import Release
from meddiff_steps.imaging.encoding import SYNTHETIC
from meddiff_steps.release.licences import licence, spdx
from meddiff_steps.release.story import VERSION

#: What stands where a study names no authors.
NOBODY = "Authors not stated"


def citation_file(config: Release, title: str) -> bytes:
    """The file CITATION.cff of a release, or of a part of one, with this title."""
    url = licence(config.licence)[1]
    identifier = spdx(config.licence)
    content: dict[str, Any] = {
        "cff-version": "1.2.0",
        "message": "If you use this synthetic dataset, please cite it as below.",
        "type": "dataset",
        "title": title,
        "abstract": SYNTHETIC,
        # The study has names as they are written: which part is the family's is not known.
        "authors": [{"name": author} for author in config.authors or [NOBODY]],
        "version": VERSION,
        "keywords": ["synthetic", "generative model", "latent diffusion"],
        "references": [
            {
                "type": "software",
                "title": "meddiff-steps",
                "version": __version__,
                "authors": [{"name": "The meddiff-steps authors"}],
            }
        ],
    }
    if identifier:
        content["license"] = identifier
    if url:
        content["license-url"] = url
    if config.date:
        content["date-released"] = config.date
    if config.url.startswith(("http://", "https://")):
        content["url"] = config.url
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100).encode()


def bibtex(config: Any, date: str) -> str:
    """A BibTeX entry; `config` is the study's section `release` as JSON.

    >>> print(bibtex({"name": "My {cohort}", "authors": ["A. Author", "B. Other"], "url": ""}, "2026-11-01"))
    @misc{synthetic2026, author = {{A. Author} and {B. Other}}, title = {{My cohort}}, year = {2026}, \
note = {Synthetic dataset, version 1.0.0}}
    """

    def plain(value: str) -> str:
        return value.translate({ord(one): None for one in "{}\\"})

    authors = " and ".join(f"{{{plain(author)}}}" for author in config["authors"] or [NOBODY])
    fields = {"author": authors, "title": f"{{{plain(config['name'])}}}", "year": date[:4]}
    fields |= {"url": plain(config["url"])} if config["url"] else {}
    fields["note"] = f"Synthetic dataset, version {VERSION}"
    inside = ", ".join(f"{name} = {{{value}}}" for name, value in fields.items() if value)
    return f"@misc{{synthetic{date[:4]}, {inside}}}"
