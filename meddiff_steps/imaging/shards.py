"""Shards: Arrow IPC files with one row per image, fixed-shape tensors, read through a memory map.

A shard is written row by row (memory stays at a few rows) and appears under its name only when it is whole.
"""

from __future__ import annotations

import mmap
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path

#: Upper bound of one Arrow record batch; it bounds the writer's memory.
BATCH_BYTES = 32 * 2**20


@dataclass(frozen=True)
class TensorColumn:
    """Column type of a fixed-shape tensor, for example TensorColumn("float16", (1, 32, 40, 32)).

    `kind` is what a channel of a scan is ("contrast", "mask", "labels"; see `imaging.channels`), or "distances" where
    a label map is kept so (`imaging.signed_distances`); in the column's metadata, empty for what is neither.
    """

    dtype: str
    shape: tuple[int, ...]
    kind: str = ""

    @property
    def arrow(self) -> pa.DataType:
        return pa.fixed_shape_tensor(pa.from_numpy_dtype(np.dtype(self.dtype)), self.shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def _field(name: str, column: pa.DataType | TensorColumn) -> pa.Field:
    if not isinstance(column, TensorColumn):
        return pa.field(name, column)
    return pa.field(name, column.arrow, metadata={"kind": column.kind} if column.kind else None)


class ShardWriter:
    """Write one shard row by row.

    >>> with ShardWriter(path, {"scan_id": pa.string(), "image": TensorColumn("float16", (1, 32, 40, 32))}) as shard:
    ...     shard.append(scan_id="sub-01", image=volume)        # doctest: +SKIP

    The file appears under `path` when the block ends without an exception, and not at all otherwise.
    """

    def __init__(self, path: Path, columns: Mapping[str, pa.DataType | TensorColumn]) -> None:
        self.columns = dict(columns)
        row_bytes = sum(c.nbytes for c in self.columns.values() if isinstance(c, TensorColumn)) + 1
        self._rows_per_batch = max(1, BATCH_BYTES // row_bytes)
        self._schema = pa.schema([_field(name, column) for name, column in self.columns.items()])
        self._rows: list[dict[str, Any]] = []
        self._atomic = atomic_path(path)

    def __enter__(self) -> Self:
        self._file = pa.OSFile(str(self._atomic.__enter__()), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        return self

    def append(self, **row: Any) -> None:
        """Add one row; tensors are cast to the column's dtype and must have its shape."""
        for name, column in self.columns.items():
            if isinstance(column, TensorColumn):
                value = np.asarray(row[name], dtype=column.dtype, order="C")
                if value.shape != column.shape:
                    raise ValueError(f"column {name!r}: expected shape {column.shape}, found {value.shape}")
                row[name] = value
        self._rows.append(row)
        if len(self._rows) >= self._rows_per_batch:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        arrays = []
        for name, column in self.columns.items():
            values = [row[name] for row in self._rows]
            arrays.append(
                pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(values))
                if isinstance(column, TensorColumn)
                else pa.array(values, column)
            )
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._rows.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
            self._file.close()
        except BaseException as failure:  # a full disk, most likely: leave nothing that looks finished
            self._file.close()
            self._atomic.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._atomic.__exit__(kind, error, trace)


@contextmanager
def in_background(append: Callable[..., None], waiting: int = 8) -> Iterator[Callable[..., None]]:
    """`append`, such as that of a `ShardWriter`, called in a thread of its own, in the same order; converting and
    writing cost no time here.

    At most `waiting` rows wait, then a call waits for the oldest: memory stays bounded where the disk is slow.  What
    `append` raises is raised here, at a later call or at the end of the block.
    """
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as pool:

        def later(**row: Any) -> None:
            while len(pending) >= waiting:
                pending.popleft().result()
            pending.append(pool.submit(append, **row))

        yield later
        while pending:
            pending.popleft().result()


class Shards:
    """All rows of several shards, in the order given, without loading them.

    Parameters
    ----------
    paths
        Files that `ShardWriter` wrote, all with the same columns.

    Raises
    ------
    UserError
        A file is missing, truncated or no shard.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if not paths:
            raise UserError("no shard was given: at least one .arrow file is needed")
        self._batches: list[pa.RecordBatch] = []
        self._maps: list[mmap.mmap] = []  # of each batch
        self._paths: list[Path] = []
        self.schema = pa.schema([])
        for path in paths:
            try:
                with open(path, "rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                reader = pa.ipc.open_file(pa.py_buffer(mapped))
                self._batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
                self._maps += [mapped] * reader.num_record_batches
            except (pa.ArrowInvalid, OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
                raise UserError(
                    f"{path}: not a readable shard ({error}). Delete it and run the workflow again: it will be rebuilt."
                ) from None
            if self._paths and reader.schema != self.schema:
                raise UserError(
                    f"{path}: its columns differ from those of {self._paths[0]}. Shards of one stage must come from one"
                    " config; run the workflow again."
                )
            self.schema = reader.schema
            self._paths.append(path)
        self._starts = np.cumsum([0] + [b.num_rows for b in self._batches])
        self._views: dict[tuple[int, str], np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def origin(self) -> str:
        """Where they are, for messages."""
        return f"{self._paths[0]}{f' and {len(self._paths) - 1} more' if len(self._paths) > 1 else ''}"

    def shape(self, column: str) -> tuple[int, ...]:
        """Shape of one tensor of `column`."""
        return tuple(self.schema.field(column).type.shape)

    def kind(self, column: str) -> str:
        """What a tensor column says that it holds (`TensorColumn`)."""
        return (self.schema.field(column).metadata or {}).get(b"kind", b"").decode()

    def dtype(self, column: str) -> np.dtype:
        """Type of the stored values of `column`."""
        return np.dtype(self.schema.field(column).type.value_type.to_pandas_dtype())

    def image_ids(self) -> list[str]:
        """What images are named by: `scan_id`, or `sample_id` of synthetic ones, from which a second model learns."""
        return self.column("scan_id" if "scan_id" in self.schema.names else "sample_id")

    def column(self, name: str) -> list[Any]:
        """A plain column (ids, numbers) as a list."""
        return [value for batch in self._batches for value in batch.column(name).to_pylist()]

    def tensor(self, column: str, row: int) -> np.ndarray:
        """One tensor as a read-only view into the memory map."""
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        key = (index, column)
        if key not in self._views:
            self._views[key] = self._batches[index].column(column).to_numpy_ndarray()
        return self._views[key][row - self._starts[index]]

    def tensors(
        self, column: str, rows: Sequence[int] | np.ndarray | None = None, dtype: str | None = "float32"
    ) -> np.ndarray:
        """Selected tensors (all rows for None) as one new array (rows, *shape) of `dtype`, as stored for None."""
        chosen = range(len(self)) if rows is None else rows
        out = np.empty((len(chosen), *self.shape(column)), self.dtype(column) if dtype is None else dtype)
        for i, row in enumerate(chosen):
            _convert(self.tensor(column, int(row)), out[i, ...])
        return out

    def batches(self, column: str, size: int) -> Iterator[tuple[range, np.ndarray]]:
        """Consecutive rows, `size` at a time, as (row numbers, float32 array)."""
        for start in range(0, len(self), size):
            rows = range(start, min(start + size, len(self)))
            yield rows, self.tensors(column, rows)
            self._forget(rows)

    def _forget(self, rows: range) -> None:
        """Give back the memory of the files that these rows lie in; they are read again when looked at again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first, last = np.searchsorted(self._starts, [rows.start, rows.stop - 1], side="right") - 1
            for mapped in {id(m): m for m in self._maps[first : last + 1]}.values():
                mapped.madvise(mmap.MADV_DONTNEED)


def _convert(values: np.ndarray, out: np.ndarray) -> None:
    """out[...] = values, both of one shape.

    Where torch is loaded anyway it widens half precision: the same numbers in a seventh of the time (64x64x64: 0.08 ms
    instead of 0.55).
    """
    torch = sys.modules.get("torch")
    if torch is not None and values.dtype == np.float16 and out.dtype == np.float32:
        torch.from_numpy(out).copy_(
            torch.from_numpy(values.copy())
        )  # torch warns of read-only memory such as a mapped file's
    else:
        out[...] = values
