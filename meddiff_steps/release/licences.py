"""Licences that a release can be under: names, addresses, and the full texts, which lie in the package.

The texts are those of the SPDX License List (https://spdx.org/licenses), by its identifiers.
"""

from __future__ import annotations

from importlib.resources import files

from meddiff_steps.config import Release

#: By the name that BIDS gives a licence (or SPDX, where BIDS has none): its SPDX identifier, its name, its address.
KNOWN = {
    "CC0": (
        "CC0-1.0",
        "Creative Commons Zero 1.0 Universal (public domain dedication)",
        "https://creativecommons.org/publicdomain/zero/1.0/legalcode",
    ),
    "PDDL": (
        "PDDL-1.0",
        "Open Data Commons Public Domain Dedication and License 1.0",
        "https://opendatacommons.org/licenses/pddl/1-0/",
    ),
    "CC-BY-4.0": (
        "CC-BY-4.0",
        "Creative Commons Attribution 4.0 International",
        "https://creativecommons.org/licenses/by/4.0/legalcode",
    ),
    "CC-BY-SA-4.0": (
        "CC-BY-SA-4.0",
        "Creative Commons Attribution-ShareAlike 4.0 International",
        "https://creativecommons.org/licenses/by-sa/4.0/legalcode",
    ),
    "CC-BY-NC-4.0": (
        "CC-BY-NC-4.0",
        "Creative Commons Attribution-NonCommercial 4.0 International",
        "https://creativecommons.org/licenses/by-nc/4.0/legalcode",
    ),
    "CC-BY-NC-SA-4.0": (
        "CC-BY-NC-SA-4.0",
        "Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International",
        "https://creativecommons.org/licenses/by-nc-sa/4.0/legalcode",
    ),
}
_BY_SPDX = {spdx: code for code, (spdx, _, _) in KNOWN.items()}


def _known(code: str) -> tuple[str, str, str] | None:
    return KNOWN.get(_BY_SPDX.get(code, code))


def spdx(code: str) -> str | None:
    """The SPDX identifier of a licence that is known here.

    >>> spdx("CC0"), spdx("CC0-1.0"), spdx("my own")
    ('CC0-1.0', 'CC0-1.0', None)
    """
    found = _known(code)
    return found[0] if found else None


def licence(code: str) -> tuple[str, str | None]:
    """A licence's name, and the address of its text where it is a well-known one.

    >>> licence("CC0")[1]
    'https://creativecommons.org/publicdomain/zero/1.0/legalcode'
    """
    found = _known(code)
    return (found[1], found[2]) if found else (code, None)


def text(config: Release) -> str:
    """The file LICENSE: what is under which licence, and the whole of it."""
    name, url = licence(config.licence)
    found = spdx(config.licence)
    if config.licence_text.strip():
        whole = config.licence_text.strip() + "\n"
    elif found:
        whole = (files("meddiff_steps.release") / "licences" / f"{found}.txt").read_text(encoding="utf-8")
    else:
        whole = "[NOT STATED. The text of this licence is to be given by the publisher: release.licence_text]\n"
    head = f"{config.name}\n\nThe synthetic images and tables in this dataset are released under:\n\n{name}\n"
    return head + (f"{url}\n" if url else "") + f"\n{'-' * 80}\n\n{whole}"
