"""Releases that another version of this package sealed: what may differ for that reason alone, and what to advise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from meddiff_steps import __version__
from meddiff_steps.core.errors import UserError

_NUMBERS = re.compile(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?(?:[.a-z+][0-9a-z.+]{0,20})?")


class OtherVersion(UserError):
    """Another version of this package may be able to do what this one cannot."""


def stated(value: Any) -> str:
    """A version as somebody else wrote it, short enough to be shown."""
    return str(value)[:40]


def _numbers(version: str) -> tuple[int, ...] | None:
    found = _NUMBERS.fullmatch(version)
    return tuple(int(number or 0) for number in found.groups()) if found else None


def is_known(version: str) -> bool:
    """Whether this package knows what a version did: one that is not later than itself.

    >>> is_known("0.1.0"), is_known("999.0.0"), is_known("none")
    (True, False, False)
    """
    found, own = _numbers(version), _numbers(__version__)
    return found is not None and own is not None and found <= own


def advice(version: str, purpose: str) -> str:
    """What to do about another version.

    >>> advice("0.1.0", "to make images again")
    'made by version 0.1.0; to make images again install meddiff-steps 0.1.0'
    """
    if _numbers(version) is None:
        return (
            f"made by {version!r}, which is no version of meddiff-steps; {purpose} ask the publisher for the right one"
        )
    return f"made by version {version}; {purpose} install meddiff-steps {version}"


@contextmanager
def explained(version: str, purpose: str) -> Iterator[None]:
    """Whatever fails in here on what another version made is an `OtherVersion`; of this version it stays what it is.

    What is old can be refused in as many ways as there are places that read it.
    """
    try:
        yield
    except (UserError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if version == __version__:
            raise
        reason = str(error).splitlines()[0] if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise OtherVersion(f"version {__version__} cannot ({reason[:300]}); {advice(version, purpose)}") from None
