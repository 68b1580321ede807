"""Exact nearest neighbours by cosine similarity, in blocks."""

from __future__ import annotations

import numpy as np
import torch

from meddiff_steps.errors import UserError

#: Similarities held at once, float32; bounds memory whatever the number of queries and references.
BLOCK_ELEMENTS = 2**26


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows less their mean, with norm 1: the inner product of two is Pearson's r.  float32 (n, d).

    A constant row has no direction and becomes 0, which is similar to nothing.

    Raises
    ------
    UserError
        A value is not finite.
    """
    rows = np.asarray(vectors, dtype=np.float32).reshape(len(vectors), -1)
    bad = ~np.isfinite(rows).all(1)
    if bad.any():
        raise UserError(
            f"{int(bad.sum())} of {len(rows)} vectors are not finite, the first in row {int(bad.argmax())}: a network has diverged, or an image holds NaN. "
            "Look at the training curves and at preprocessed/qc.parquet, and train again with a lower learning rate."
        )
    rows = rows - rows.mean(1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    constant = norms <= 1e-6 * np.sqrt(rows.shape[1])
    return np.where(constant, 0.0, rows / np.where(constant, 1.0, norms)).astype(np.float32)


def nearest(queries: np.ndarray, references: np.ndarray, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The `k` most similar references of every query, exactly.

    A blocked matrix product with a running top-k: on two cores it beats a flat faiss index at these sizes (see
    tests/benchmarks), and nothing has to be built.  Time grows with queries x references, memory with neither.

    Parameters
    ----------
    queries, references
        float32 (n, d) and (m, d) from `unit_rows`.
    k
        At most m are returned.

    Returns
    -------
    similarity, index
        float32 and int64, (n, min(k, m)), most similar first; ties go to the smaller index.

    Raises
    ------
    ValueError
        There is no reference, or the widths differ.
    """
    if len(references) == 0:
        raise ValueError("there is no reference to compare with")
    if queries.shape[1] != references.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} numbers and references {references.shape[1]}")
    k = min(k, len(references))
    columns = min(len(references), 32768)
    rows = max(1, BLOCK_ELEMENTS // columns)
    similarity = np.empty((len(queries), k), np.float32)
    index = np.empty((len(queries), k), np.int64)
    everything = torch.from_numpy(np.ascontiguousarray(references))
    for start in range(0, len(queries), rows):
        block = torch.from_numpy(np.ascontiguousarray(queries[start : start + rows]))
        best = torch.full((len(block), 0), -torch.inf)
        where = torch.zeros((len(block), 0), dtype=torch.int64)
        for first in range(0, len(references), columns):
            product = block @ everything[first : first + columns].T
            values, positions = product.topk(min(k, product.shape[1]), dim=1)
            values, positions = torch.cat([best, values], 1), torch.cat([where, positions + first], 1)
            order = torch.argsort(values, dim=1, descending=True, stable=True)[:, :k]
            best, where = values.gather(1, order), positions.gather(1, order)
        similarity[start : start + rows], index[start : start + rows] = best.numpy(), where.numpy()
    return similarity, index
