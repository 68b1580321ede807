"""Which images figures are about."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn


def shards(folder: Path, names: list[str]) -> Shards:
    columns = {"sample_id": pa.string(), "image": TensorColumn("float16", (1, 4, 4))}
    with ShardWriter(folder / "shard-0000.arrow", columns) as shard:
        for name in names:
            shard.append(sample_id=name, image=np.zeros((1, 4, 4)))
    return Shards([folder / "shard-0000.arrow"])


def test_where_the_filter_accepted_nothing_it_is_said_so(tmp_path: Path) -> None:
    planned = pd.DataFrame({"sample_id": ["a", "b"], "seed_key": ["1", "2"]})
    assert Images.accepted(shards(tmp_path, ["b"]), planned, "plan.parquet", "measure").ids == ["b"]
    with pytest.raises(
        UserError, match=r"shard-0000.arrow: no candidate was accepted, so there is nothing to measure\. privacy/report"
    ):
        Images.accepted(shards(tmp_path, []), planned, "plan.parquet", "measure")


def test_of_too_many_scans_whole_people_are_taken_where_these_are_enough(tmp_path: Path) -> None:
    names = [f"{person}{scan}" for person in "abcdefgh" for scan in range(3)]
    table = pd.DataFrame({"sample_id": names, "person": [name[0] for name in names]})
    images = Images.of(shards(tmp_path, names), "sample_id", "person", table, "table")
    part = images.whole_units(13, 4)
    assert len(part) == 12 and pd.Series(part.units).value_counts().eq(3).all()
    assert part.ids == sorted(part.ids) == images.whole_units(13, 1).ids  # in their order, and always the same
    assert images.whole_units(13, 5).ids == images.at_most(13).ids
    assert images.whole_units(24, 8).ids == names
