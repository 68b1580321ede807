"""What is missing of a shape, drawn as points by a diffusion that is told what is left."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import batch_noise, seed_key
from meddiff_steps.diffusion.sampling import sample
from meddiff_steps.evaluation.shapes import chamfer
from meddiff_steps.models.points import PointDenoiser, told

ENTRY = {
    "order": 8,
    "summary": "The missing part of a shape, as points and as a mask",
    "source": "Friedrich et al. 2023 (PCDiff); Luo and Hu 2021",
    "needs": ["surfaces of shapes in one frame, as points"],
}

#: Of the shapes that are not for testing, one of so many is only watched; and how many at least are learnt from.
HELD_OUT, LEAST = 12, 8


def split(count: int, test_every: int, origin: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of training, held-out and test shapes; `origin` for messages.

    Raises
    ------
    UserError
        Too few shapes.
    """
    numbers = np.arange(count)
    test, others = numbers[::test_every], np.delete(numbers, slice(None, None, test_every))
    val, train = others[::HELD_OUT], np.delete(others, slice(None, None, HELD_OUT))
    if len(train) < LEAST:
        raise UserError(
            f"{origin}: {count} shapes, of which {len(train)} would be learnt from, at least {LEAST} are needed."
        )
    return train, val, test


@torch.no_grad()
def complete(
    model: PointDenoiser, left: np.ndarray, count: int, settings: config.ShapeCompletion, roots: Sequence[str]
) -> np.ndarray:
    """Draw what is missing of some shapes, `settings.samples` times each.  The draws of a shape are a batch of their
    own, so that they do not depend on how many others there are.

    Parameters
    ----------
    left
        What is left of each, mm (b, k, 3); no matter in which order.
    count
        Points to draw.
    roots
        Of the random numbers of each.

    Returns
    -------
    numpy.ndarray
        mm, float32 (b, samples, count, 3).
    """
    device, draws, found = next(model.parameters()).device, settings.samples, []
    for points, root in zip(left, roots, strict=True):
        # By their place, so that which points are looked at does not depend on their order either
        seen = torch.from_numpy(chosen(points, settings.known, root).astype(np.float32)).to(device)
        known = told(model.standardise(seen[None]).repeat_interleave(draws, 0))
        keys = [seed_key(f"{root}/{i}", 0, 0, "shape") for i in range(draws)]
        noise = torch.from_numpy(batch_noise(keys, (3, count))).to(device)
        drawn = sample(model, noise, known, model.process, "ddim", num_inference_steps=settings.num_inference_steps)
        found.append(model.millimetres(drawn.float()).reshape(draws, count, 3).cpu().numpy())
    return np.stack(found)


def chosen(points: np.ndarray, count: int, root: str) -> np.ndarray:
    """`count` of points (p, 3), drawn by `root` and where they are alone, not by their order."""
    ordered = points[np.lexsort(points.T)]
    generator = np.random.Generator(np.random.Philox(key=int(seed_key(root, 0, 0, "known"), 16)))
    found: np.ndarray = ordered[generator.permutation(len(ordered))[:count]]
    return found


def most_typical(draws: np.ndarray) -> int:
    """The draw, of (samples, n, 3), that is nearest to the others by Chamfer distance."""
    distances = np.array([[chamfer(a, b) for b in draws] for a in draws])
    return int(distances.sum(1).argmin())
