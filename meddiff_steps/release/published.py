"""What the descriptions of a release for other programs (`crate`, `croissant`) are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meddiff_steps import __version__

#: The ledger as a table.
TABLE = "provenance/ledger.parquet"


@dataclass(frozen=True)
class Published:
    """A release that is complete but for its seal.

    Attributes
    ----------
    description
        dataset_description.json.
    study
        provenance/config.json, the published study.
    date
        Day of publication, YYYY-MM-DD.
    ledger, heads, files
        The parts `ledger`, `inputs` and `files` of root.json.  The seal itself, which covers all files and comes later,
        has an empty entry in `files`.
    measured
        Columns of measured covariates, as the ledger has them.
    version
        The version of this package that seals it.
    """

    description: Mapping[str, Any]
    study: Mapping[str, Any]
    date: str
    ledger: Mapping[str, Any]
    heads: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]
    measured: Sequence[str] = ()
    version: str = __version__
