"""Holes filled without a model: smoothly from their rims, from the other side, or with a mean; and seams taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy import fft, sparse
from scipy.sparse.linalg import cg, spsolve

#: Voxels around a hole that its filling may depend on.
RIM = 4
#: Hidden voxels up to which equations are solved directly.
DIRECT = 20_000
#: Share of an image's energy that must be known on both sides of a mirror for it to be compared fairly.
LEAST_KNOWN = 0.1


def laplacian(shape: tuple[int, ...]) -> sparse.csr_matrix:
    """Sum over neighbours of (neighbour - value), over the voxels of a grid in C order; no flux through its faces."""
    total = sparse.csr_matrix((int(np.prod(shape)),) * 2)
    for axis, n in enumerate(shape):
        step = sparse.diags([np.ones(n - 1), np.ones(n - 1)], [-1, 1], format="csr")
        line = step - sparse.diags(np.asarray(step.sum(1)).ravel())
        before, after = int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :]))
        total = total + sparse.kron(sparse.kron(sparse.eye(before), line), sparse.eye(after))
    return total.tocsr()


def _solved(image: np.ndarray, hidden: np.ndarray, power: int) -> np.ndarray:
    """The image, with hidden voxels such that the `power`-th Laplacian vanishes there."""
    if not hidden.any():
        return image.copy()
    box = tuple(slice(max(0, int(found.min()) - RIM), int(found.max()) + 1 + RIM) for found in np.nonzero(hidden))
    part, unknown = image[box].astype(np.float64), hidden[box].ravel()
    operator = laplacian(part.shape)
    for _ in range(power - 1):
        operator = operator @ operator
    rows = operator[unknown]
    values = part.ravel()
    matrix, right = rows[:, unknown].tocsc(), -(rows[:, ~unknown] @ values[~unknown])
    if matrix.shape[0] <= DIRECT:
        values[unknown] = spsolve(matrix, right)
    else:  # the matrix is definite: negative for the Laplacian, positive for its square
        sign = -1.0 if power % 2 else 1.0
        values[unknown] = cg(sign * matrix, sign * right, rtol=1e-6, maxiter=5000)[0]
    filled = image.copy()
    filled[box] = values.reshape(part.shape)
    return filled


def harmonic(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Laplace's equation in the hidden voxels: as a membrane hung into the rim.

    Parameters
    ----------
    image
        (*spatial); what is below `hidden` (bool, the same shape) is not looked at.
    """
    return _solved(image, hidden, 1)


def biharmonic(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """The biharmonic equation, which also takes slopes from the rim (Damelin and Hoang 2018); clipped to the range of
    the known voxels.
    """
    filled, known = _solved(image, hidden, 2), image[~hidden]
    return np.clip(filled, known.min(), known.max())


def mirror(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """The same place of the other side of the head; harmonic where that is hidden, too, or beyond the grid.

    Left and right are the first axis of a volume and the last of a picture; the mirror stands where the two sides are
    most alike, as far as both are known.
    """
    axis = 0 if image.ndim == 3 else image.ndim - 1
    size, shift = image.shape[axis], _mirror_shift(image, hidden, axis)
    other, covered = (np.roll(np.flip(each, axis), shift, axis) for each in (image, hidden))
    beyond = slice(0, shift) if shift >= 0 else slice(size + shift, size)
    covered[(slice(None),) * axis + (beyond,)] = True
    filled = np.where(hidden & ~covered, other, image)
    both = hidden & covered
    return harmonic(filled, both) if both.any() else filled


def _mirror_shift(image: np.ndarray, hidden: np.ndarray, axis: int) -> int:
    """Voxels that the flipped image is moved to lie on the image: those of the largest correlation of both over pairs
    of voxels that are known, so that no hole moves the mirror.  Beyond the grid there is nothing.
    """
    size = image.shape[axis]

    def spectrum(values: np.ndarray) -> np.ndarray:
        found: np.ndarray = fft.rfft(values.astype(np.float32), 2 * size, axis)
        return found

    known = np.where(hidden, 0.0, image)
    own, power, gone = spectrum(known), spectrum(np.square(known)), spectrum(hidden)
    others = tuple(a for a in range(image.ndim) if a != axis)
    alike, lost = (fft.irfft(each.sum(others), 2 * size) for each in (own * own, power * gone))
    total = float(np.square(known).sum())
    if total == 0:
        return 0
    score = alike / np.maximum(total - lost, LEAST_KNOWN * total)
    return int(score[: 2 * size - 1].argmax()) - (size - 1)


def mean(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """The mean of the known foreground (voxels above 0)."""
    known = image[~hidden & (image > 0)]
    return np.where(hidden, known.mean() if known.size else 0.0, image).astype(image.dtype)


#: By name, what every learnt filling is compared with.
FILLINGS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "harmonic": harmonic,
    "biharmonic": biharmonic,
    "mirror": mirror,
    "mean": mean,
}


def pasted(image: np.ndarray, made: np.ndarray, hidden: np.ndarray, *, seamless: bool = True) -> np.ndarray:
    """The image with hidden voxels from `made`.

    `seamless`: an image that was decoded differs from the scan at the rim as well, and copying it leaves a step there.
    That difference is carried into the hole as a membrane and taken off, which keeps the gradients of what was made and
    the grey values of the rim (Pérez et al. 2003, Poisson image editing).
    """
    if not seamless:
        return np.where(hidden, made, image)
    rest = harmonic(image - made, hidden)
    return np.where(hidden, made + rest, image).astype(image.dtype)


def rim(hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of neighbours of which the first is known and the second hidden: their indices, (pairs,) of each in the
    flattened grid.
    """
    number = np.arange(hidden.size).reshape(hidden.shape)
    known, covered = [], []
    for axis in range(hidden.ndim):
        for step in (-1, 1):
            shifted, theirs = np.roll(hidden, step, axis), np.roll(number, step, axis)
            edge = np.zeros_like(hidden)
            edge[tuple(slice(None) if a != axis else (0 if step == 1 else -1) for a in range(hidden.ndim))] = True
            met = ~hidden & shifted & ~edge
            known.append(number[met])
            covered.append(theirs[met])
    return np.concatenate(known), np.concatenate(covered)


def seam(image: np.ndarray, truth: np.ndarray, hidden: np.ndarray) -> float:
    """How much larger steps across the rim are than the true ones: root mean square of their difference."""
    known, covered = rim(hidden)
    step = (image.ravel()[covered] - image.ravel()[known]) - (truth.ravel()[covered] - truth.ravel()[known])
    return float(np.sqrt(np.mean(step.astype(np.float64) ** 2)))
