"""Shards are whole or absent, and read without being loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging import shards as module
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn

SHAPE = (1, 3, 4, 5)
COLUMNS = {"scan_id": pa.string(), "age": pa.float64(), "image": TensorColumn("float16", SHAPE)}


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, *SHAPE)).astype(np.float16)


def write(path: Path, values: np.ndarray, first: int = 0) -> Path:
    with ShardWriter(path, COLUMNS) as shard:
        for i, value in enumerate(values):
            shard.append(scan_id=f"s{first + i}", age=float(i), image=value)
    return path


@pytest.mark.parametrize("rows_per_batch", [1, 3, 1000])
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_batch: int) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", rows_per_batch * (2 * 60 + 1))
    values = images(7)
    shards = Shards([write(tmp_path / "a.arrow", values[:4]), write(tmp_path / "b.arrow", values[4:], first=4)])
    assert len(shards) == 7
    assert shards.shape("image") == SHAPE
    assert shards.column("scan_id") == [f"s{i}" for i in range(7)]
    assert shards.column("age") == [0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0]
    for row in range(7):
        assert np.array_equal(shards.tensor("image", row), values[row])
    assert np.array_equal(shards.tensors("image", [6, 0, 3]), values[[6, 0, 3]].astype(np.float32))
    blocks = list(shards.batches("image", 3))
    assert [list(rows) for rows, _ in blocks] == [[0, 1, 2], [3, 4, 5], [6]]
    assert np.array_equal(np.concatenate([block for _, block in blocks]), values.astype(np.float32))


@pytest.mark.parametrize("loaded", [True, False])
def test_every_half_is_widened_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: bool) -> None:
    """Whether torch or numpy does it: subnormal numbers, infinities and signs of zero included."""
    pytest.importorskip("torch")
    if not loaded:
        monkeypatch.delitem(sys.modules, "torch")
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[~np.isnan(halves)]
    with ShardWriter(tmp_path / "halves.arrow", {"x": TensorColumn("float16", halves.shape)}) as shard:
        shard.append(x=halves)
    found = Shards([tmp_path / "halves.arrow"]).tensors("x")[0]
    assert found.tobytes() == halves.astype(np.float32).tobytes()


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    values = images(5)
    assert write(tmp_path / "a.arrow", values).read_bytes() == write(tmp_path / "b.arrow", values).read_bytes()


def test_tensor_is_a_read_only_view(tmp_path: Path) -> None:
    shards = Shards([write(tmp_path / "a.arrow", images(4))])
    before = pa.total_allocated_bytes()
    view = shards.tensor("image", 2)
    assert pa.total_allocated_bytes() == before, "the memory map is used, nothing is copied"
    assert not view.flags.owndata and not view.flags.writeable
    assert np.shares_memory(view, shards.tensor("image", 2))


def test_empty_shard(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.arrow", images(0))
    shards = Shards([empty])
    assert len(shards) == 0 and shards.column("scan_id") == [] and shards.shape("image") == SHAPE
    assert shards.tensors("image").shape == (0, *SHAPE)
    assert list(shards.batches("image", 4)) == []
    values = images(3)
    mixed = Shards([empty, write(tmp_path / "a.arrow", values), empty])
    assert len(mixed) == 3
    assert np.array_equal(mixed.tensors("image"), values.astype(np.float32))


@pytest.mark.parametrize("row", [-1, 4])
def test_row_out_of_range(tmp_path: Path, row: int) -> None:
    with pytest.raises(IndexError):
        Shards([write(tmp_path / "a.arrow", images(4))]).tensor("image", row)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = write(tmp_path / "a.arrow", images(4))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"a\.arrow: not a readable shard .* run the workflow again"):
        Shards([path])


def test_missing_file_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.arrow"):
        Shards([tmp_path / "none.arrow"])
    with pytest.raises(UserError, match="no shard was given"):
        Shards([])


def test_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "a.arrow", COLUMNS) as shard:
        shard.append(scan_id="s0", age=1.0, image=images(1)[0])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_exception_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", images(4))
    before = path.read_bytes()
    with pytest.raises(RuntimeError), ShardWriter(path, COLUMNS):
        raise RuntimeError
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    with ShardWriter(path, COLUMNS) as shard:
        shard.append(scan_id="s0", age=1.0, image=images(1)[0])
        assert not path.exists()
    assert path.exists()


def test_wrong_shape_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"column 'image': expected shape"),
        ShardWriter(tmp_path / "a.arrow", COLUMNS) as shard,
    ):
        shard.append(scan_id="s0", age=1.0, image=np.zeros((1, 3, 4, 6)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is looked up in /proc")
def test_reading_all_batches_keeps_no_file_in_memory_and_can_be_done_again(tmp_path):
    def resident_mb(kind: str) -> float:
        return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) / 1024

    shape = (1, 64, 64, 32)
    paths = [tmp_path / f"{i}.arrow" for i in range(4)]
    for number, path in enumerate(paths):
        with ShardWriter(path, {"scan_id": pa.string(), "image": TensorColumn("float16", shape)}) as shard:
            for i in range(50):
                shard.append(scan_id=f"s{number}-{i}", image=np.full(shape, 50 * number + i, np.float16))
    shards = Shards(paths)
    files, own = resident_mb("RssFile"), resident_mb("RssAnon")
    for _ in range(2):
        assert [float(block[:, 0, 0, 0, 0].sum()) for _, block in shards.batches("image", 25)] == [
            sum(range(k, k + 25)) for k in range(0, 200, 25)
        ]
    assert resident_mb("RssFile") < files + 15  # they have 50 MB, in four of 12.5
    assert resident_mb("RssAnon") < own + 35  # all blocks have 200 MB, one has 12.5
