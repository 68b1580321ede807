"""Who is compared with whom: images with what is known of each, and which of them figures are about."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
from tqdm import tqdm

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import Covariates, PlanGroup
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards

logger = logging.getLogger(__name__)

#: Ceilings come from the test split; with fewer test subjects than this, from validation and calibration subjects as
#: well.
ENOUGH_SUBJECTS = 100
#: Reconstruction figures come from the test split alone from this many subjects on, else from all held-out scans.
MIN_TEST_SUBJECTS = 10
#: Image values read at once.
BATCH_VALUES = 2**23


class Column:
    """A tensor column of some rows, read as it is sliced."""

    def __init__(self, shards: Shards, name: str, rows: np.ndarray) -> None:
        self.shards, self.name, self.rows = shards, name, rows
        self.shape = (len(rows), *shards.shape(name))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        return self.shards.tensors(self.name, self.rows[index])


def none_accepted(origin: object, what: str) -> UserError:
    """What to say where the privacy filter let no image pass; `what` there is nothing to do, for example "release"."""
    return UserError(
        f"{origin}: no candidate was accepted, so there is nothing to {what}. privacy/report.json says what rejected"
        " them."
    )


def one_of_each(units: np.ndarray) -> np.ndarray:
    """Positions of one row of each unit (rows,), in their order: which one a hash of the unit says, so that it is not
    always the first visit.
    """
    rows: dict[str, list[int]] = {}
    for row, unit in enumerate(units.astype(str)):
        rows.setdefault(unit, []).append(row)
    chosen = [
        some[int(hashlib.sha256(f"one of {unit}".encode()).hexdigest(), 16) % len(some)] for unit, some in rows.items()
    ]
    return np.sort(np.array(chosen, dtype=int))


@dataclass(frozen=True)
class Images:
    """Some images and what is known of each.

    Attributes
    ----------
    shards
        Where they are.
    table
        A row per image, with its row of the shards as `row`.
    key
        Column of the table, and of the shards, that names an image.
    unit
        Column of the table with what is resampled: the subject of a real scan, the noise of a synthetic image.
    origin
        Name of the table in messages.
    """

    shards: Shards
    table: pd.DataFrame
    key: str
    unit: str
    origin: str

    @classmethod
    def of(cls, shards: Shards, key: str, unit: str, table: pd.DataFrame, origin: str) -> Self:
        """All images of the shards, in their order.

        Raises
        ------
        UserError
            An image is there twice, or has no row in the table.
        """
        ids = shards.column(key)
        repeated = pd.Series(ids)[pd.Series(ids).duplicated()].tolist()
        if repeated:
            raise UserError(
                f"{key} {repeated[0]} is in the shards more than once. The same shard was probably given twice."
            )
        absent = sorted(set(ids) - set(table[key]))
        if absent:
            raise UserError(
                f"{origin}: no row for {key} {absent[0]} ({len(absent)} such images). Images and table are of different"
                " runs; run the workflow again."
            )
        joined = pd.DataFrame({key: ids, "row": range(len(ids))}).merge(
            table, on=key, how="left", validate="one_to_one"
        )
        return cls(shards, joined, key, unit, origin)

    @classmethod
    def of_scans(cls, shards: Sequence[Path], manifest: Path, covariates: Covariates | None = None) -> Self:
        """All preprocessed scans of a cohort, each with its row of the manifest; `covariates` of these are checked.

        Raises
        ------
        UserError
            A shard or the manifest cannot be read, or they do not fit to each other.
        """
        table = read_manifest(manifest, covariates)
        return cls.of(Shards(shards), "scan_id", "subject_id", table, f"{manifest}")

    @classmethod
    def accepted(cls, shards: Shards, planned: pd.DataFrame, origin: str, what: str) -> Self:
        """Synthetic images that passed the filter; `what` is to be done with them.

        Raises
        ------
        UserError
            There is none, or as `of`.
        """
        if len(shards) == 0:
            raise none_accepted(shards.origin, what)
        return cls.of(shards, "sample_id", "seed_key", planned, origin)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def ids(self) -> list[str]:
        return self.table[self.key].tolist()

    @property
    def units(self) -> np.ndarray:
        return self.table[self.unit].to_numpy(dtype=str)

    @property
    def rows(self) -> np.ndarray:
        return self.table["row"].to_numpy(dtype=int)

    def of_splits(self, splits: Collection[str]) -> Self:
        """Those of some splits."""
        return replace(self, table=self.table[self.table["split"].isin(splits)].reset_index(drop=True))

    def taken(self, positions: Sequence[int]) -> Self:
        """Those at some positions of the table, in this order."""
        return replace(self, table=self.table.iloc[list(positions)].reset_index(drop=True))

    def at_most(self, most: int) -> Self:
        """`most` of them, those whose id has the smallest SHA-256, so that the choice is stable; the order stays."""
        if len(self) <= most:
            return self
        digests = self.table[self.key].map(lambda name: hashlib.sha256(str(name).encode()).hexdigest())
        logger.info("%d rows chosen by hash of %s", most, self.key)
        return replace(self, table=self.table[digests.rank(method="first") <= most].reset_index(drop=True))

    def one_of_each(self) -> Self:
        """One of each unit; see `one_of_each`."""
        rows = one_of_each(self.units)
        return self if len(rows) == len(self) else self.taken(rows.tolist())

    def whole_units(self, most: int, least: int) -> Self:
        """As `at_most`, but all of each of some units, where `least` units or more fit into `most` rows."""
        names, counts = np.unique(self.units, return_counts=True)
        order = np.argsort([hashlib.sha256(name.encode()).hexdigest() for name in names])
        taken = names[order[np.cumsum(counts[order]) <= most]]
        if len(taken) < least:
            return self.at_most(most)
        return self.taken(np.flatnonzero(np.isin(self.units, taken)).tolist())

    def column(self, name: str = "image") -> Column:
        return Column(self.shards, name, self.rows)

    def batches(self, task: str, name: str = "image") -> Iterator[np.ndarray]:
        """float32 images (b, 1, *shape) of at most `BATCH_VALUES` values; `task` names the progress bar.

        Raises
        ------
        UserError
            An image has values that are not finite.
        """
        step = max(1, BATCH_VALUES // int(np.prod(self.shards.shape(name))))
        column = self.column(name)
        with tqdm(total=len(self), desc=task, unit="image", mininterval=5, file=sys.stderr) as progress:
            for start in range(0, len(self), step):
                batch = column[start : start + step]
                finite = np.isfinite(batch).reshape(len(batch), -1).all(1)
                if not finite.all():
                    bad = self.ids[start + int(np.flatnonzero(~finite)[0])]
                    raise UserError(
                        f"{self.key} {bad}: the {name} has values that are not finite. Delete its shard and make it"
                        " again; if it returns, train longer."
                    )
                yield batch
                progress.update(len(batch))


def drawn(table: pd.DataFrame, plan: Sequence[PlanGroup]) -> pd.DataFrame:
    """Rows of synthetic subjects that figures are about: of groups whose covariates were drawn, or all where there is
    no such group.

    Grid and counterfactual groups are spread on purpose, and correlations over them would flatter.
    """
    groups = {group.name for group in plan if group.covariates in ("copula", "table")}
    kept = table[table["group"].isin(groups)]
    return (table if kept.empty else kept).reset_index(drop=True)


def held_out(cohort: Images) -> tuple[Images, list[str]]:
    """Real scans for floors and ceilings, and the splits they are of.

    Raises
    ------
    UserError
        There are none.
    """
    splits = ["test"]
    if cohort.of_splits(splits).table["subject_id"].nunique() < ENOUGH_SUBJECTS:
        splits = [s for s in ("test", "val", "calibration") if (cohort.table["split"] == s).any()]
    chosen = cohort.of_splits(splits)
    if len(chosen) == 0:
        raise UserError(
            "no preprocessed scan is in a held-out split, so there is no ceiling to compare with. Check splits and"
            " preprocessed/qc.parquet."
        )
    return chosen, splits


def reconstructed(paired: Images) -> Images:
    """Reconstructions that figures are about: the test split; all held-out ones when it is small.

    Raises
    ------
    UserError
        There are training scans among them.
    """
    if (paired.table["split"] == "train").any():
        raise UserError(
            f"{paired.origin}: holds training scans, expected held-out ones only. Run the step that writes"
            " reconstructions again."
        )
    test = paired.of_splits(["test"])
    return test if test.table["subject_id"].nunique() >= MIN_TEST_SUBJECTS else paired
