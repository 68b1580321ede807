"""Feature spaces: images as rows of numbers that realism and diversity are measured on.

No figure of realism is comparable across feature spaces, so each has a digest of all that defines its numbers, which is
stored beside every figure made with it.  None is a part of the generator, which would judge itself, and nothing is ever
downloaded.

A space that is chosen by name (`evaluate.spaces`) is a module of this package: `ENTRY` says what it is and
`build(context)` makes it, or returns None where the context lacks what it needs.  `assemble.spaces` puts the chosen
ones together.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards

#: Image values read at once; with eight channels of `random.RandomNetwork` it bounds memory to some hundred MB.
BATCH_VALUES = 2**21


@dataclass(frozen=True)
class FeatureSpace:
    """A named map from images to features.

    Attributes
    ----------
    name
        As it appears in metrics.json.
    digest
        First 16 hex digits of a SHA-256 over everything that defines the numbers.
    description
        One line for readers.
    extract
        float32 (b, 1, *spatial) in [0, 1] to (b, features).
    """

    name: str
    digest: str
    description: str
    extract: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Context:
    """What a space may need to be built; nothing is read before one needs it.

    Attributes
    ----------
    spatial_dims
        Of the study's images, 2 or 3.
    embedder
        Folder of the learned copy detector; None where there is none.
    foreground
        As `preprocess.foreground`: `all` where 0 is a grey value like others, so that images have no background.
    """

    spatial_dims: int
    embedder: Path | None = None
    foreground: Literal["nonzero", "all", "ct"] = "nonzero"


def digest_of(*parts: Any) -> str:
    """`FeatureSpace.digest` of what defines a space: values that JSON can hold, the space's name first."""
    return hashlib.sha256(json.dumps(["meddiff/features/v1", *parts], sort_keys=True).encode()).hexdigest()[:16]


#: Images float32 (b, 1, *spatial) and their rows to changed images of the same shape.
Change = Callable[[np.ndarray, np.ndarray], np.ndarray]


def extract(
    spaces: Sequence[FeatureSpace],
    shards: Shards,
    rows: Sequence[int] | np.ndarray,
    task: str = "features",
    *,
    column: str = "image",
    change: Change | None = None,
) -> dict[str, np.ndarray]:
    """Features of selected images in every space, reading each image once.

    Parameters
    ----------
    spaces
        At least one; names are distinct.
    shards
        With a column of images, (1, *spatial) in [0, 1].
    rows
        Of `shards`.
    task
        Name of the progress bar.
    column
        Of `shards`.
    change
        What is done to the images first.

    Returns
    -------
    dict
        Per space float32 (rows, features).  Memory is that, plus one batch of `BATCH_VALUES` values, whatever the
        number of rows.

    Raises
    ------
    UserError
        A network gives something other than finite features, (b, d) or (b, d, *spatial).
    """
    numbers = np.asarray(rows, dtype=int)
    step = max(1, BATCH_VALUES // math.prod(shards.shape(column)))
    out: dict[str, np.ndarray] = {}
    with (
        torch.inference_mode(),
        tqdm(total=len(numbers), desc=task, unit="image", mininterval=5, file=sys.stderr) as progress,
    ):
        for start in range(0, len(numbers), step):
            chosen = numbers[start : start + step]
            values = shards.tensors(column, chosen)
            images = torch.from_numpy(values if change is None else change(values, chosen))
            for space in spaces:
                found = _checked(space, space.extract(images), len(images))
                if space.name not in out:
                    out[space.name] = np.empty((len(numbers), found.shape[1]), np.float32)
                out[space.name][start : start + len(images)] = found
            progress.update(len(chosen))
    return out


def _checked(space: FeatureSpace, found: Any, images: int) -> np.ndarray:
    if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != images:
        shown = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise UserError(
            f"evaluate.features.{space.name}: the network gave {shown} for {images} images, expected ({images},"
            " features). Export it so that it does."
        )
    rows = (found.float() if found.ndim == 2 else found.float().flatten(2).mean(2)).numpy()
    if not np.isfinite(rows).all():
        raise UserError(
            f"feature space {space.name}: features are not finite. Look at the images; for your own network, check"
            " `channels` and `zscore`."
        )
    return rows
