"""Exact nearest neighbours by cosine similarity, in blocks."""

from __future__ import annotations

import numpy as np
import torch

from meddiff_steps.compute.device import full_float32
from meddiff_steps.core.errors import UserError

#: Queries and references compared at once: 16 MiB of similarities, which stay in a processor's cache until the best are
#: found.
QUERIES, REFERENCES = 512, 8192
#: Neighbouring references of which only the best is looked at first.
GROUP = 32


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
            f"{int(bad.sum())} of {len(rows)} vectors are not finite, the first in row {int(bad.argmax())}: a network"
            " has diverged, or an image holds NaN. Look at the training curves and at preprocessed/qc.parquet, and"
            " train again with a lower learning rate."
        )
    rows = rows - rows.mean(1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    constant = norms <= 1e-6 * np.sqrt(rows.shape[1])
    return np.where(constant, 0.0, rows / np.where(constant, 1.0, norms)).astype(np.float32)


@full_float32()
def nearest(queries: np.ndarray, references: np.ndarray | torch.Tensor, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The `k` most similar references of every query, exactly.

    A blocked matrix product, about as fast as a flat faiss index on two cores (figures in docs/privacy.md) without a
    second OpenMP runtime beside torch's.  Time grows with queries x references, memory with neither.

    Parameters
    ----------
    queries, references
        float32 (n, d) and (m, d) from `unit_rows`.  The search runs where references that are a tensor lie, in float32
        on a GPU too.
    k
        At most m are returned.

    Returns
    -------
    similarity, index
        float32 and int64, (n, min(k, m)), most similar first.

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
    similarity = np.empty((len(queries), k), np.float32)
    index = np.empty((len(queries), k), np.int64)
    everything = (
        references if isinstance(references, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(references))
    )
    for start in range(0, len(queries), QUERIES):
        block = torch.from_numpy(np.ascontiguousarray(queries[start : start + QUERIES])).to(everything.device)
        values, positions = [], []
        for first in range(0, len(references), REFERENCES):
            best, where = _top(block @ everything[first : first + REFERENCES].T, k)
            values.append(best)
            positions.append(where + first)
        best, order = torch.cat(values, 1).topk(k, dim=1)
        similarity[start : start + QUERIES] = best.cpu().numpy()
        index[start : start + QUERIES] = torch.cat(positions, 1).gather(1, order).cpu().numpy()
    return similarity, index


def nearest_of_each(queries: np.ndarray, references: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Similarity of every query to the nearest reference of each owner, float32 (n, owners), owners in sorted order.

    Parameters
    ----------
    queries, references
        float32 (n, d) and (m, d) from `unit_rows`.
    owners
        Whose each reference is, (m,).
    """
    order = np.argsort(owners, kind="stable")
    starts = np.unique(owners[order], return_index=True)[1]
    references = references[order]
    return np.concatenate(
        [
            np.maximum.reduceat(queries[i : i + QUERIES] @ references.T, starts, axis=1)
            for i in range(0, len(queries), QUERIES)
        ]
    )


def nearest_earlier(vectors: np.ndarray, start: int, stop: int, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The `k` most similar of all earlier rows, for rows `start` to `stop`.

    Returns
    -------
    similarity, index
        float32 and int64, (stop - start, at most k), most similar first.  Rows with fewer than k before them have
        similarity -inf there.
    """
    block = vectors[start:stop]
    own = torch.from_numpy(block @ block.T).masked_fill_(torch.ones(len(block), len(block)).triu().bool(), -torch.inf)
    values, positions = (part.numpy() for part in own.topk(min(k, len(block)), dim=1))
    if start == 0:
        return values, positions
    similarity, index = nearest(block, vectors[:start], k)
    similarity, index = np.concatenate([similarity, values], 1), np.concatenate([index, positions + start], 1)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(index, order, 1)


def _top(product: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row and their columns: the k best are in the k groups with the largest maximum, so only
    those are sorted.
    """
    rows, columns = product.shape
    groups = columns // GROUP
    if k == 1:
        return product.max(1, keepdim=True)
    if columns % GROUP or groups <= 2 * k:
        return product.topk(min(k, columns), dim=1)
    grouped = product.view(rows, groups, GROUP)
    group = grouped.amax(2).topk(k, dim=1, sorted=False).indices
    best, where = grouped.gather(1, group[:, :, None].expand(rows, k, GROUP)).view(rows, -1).topk(k, dim=1)
    return best, group.gather(1, where // GROUP) * GROUP + where % GROUP
