"""Pictures of what a trained model does with somebody's scans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meddiff_steps.report.figures import Block, Tile, image_grid

#: Change of grey value, of the range of an image, that a map shows as black or white; no change is grey.
SHOWN_CHANGE = 0.3


def _change(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + (after - before) / (2 * SHOWN_CHANGE), 0.0, 1.0)


def counterfactual_sheet(
    names: Sequence[str],
    scans: np.ndarray,
    decoded: np.ndarray,
    back: np.ndarray,
    moved: np.ndarray,
    captions: Sequence[str],
) -> bytes:
    """Per scan: itself, there and back, and each counterfactual; below each what changed against the way back.

    Below the scan stands what its first stage alone changes, and below the way back all that is changed for no reason.

    Parameters
    ----------
    names, scans
        Of the scans, (n, 1, *spatial).
    decoded, back, moved
        As `applications.counterfactual.Counterfactuals` has them, `decoded`, `returned` and `moved`.
    captions
        Of the values.
    """
    blocks = []
    for i, name in enumerate(names):
        scan, returned = scans[i], back[i]
        tiles = [Tile(scan, "scan"), Tile(returned, "nothing moved")]
        tiles += [Tile(image, caption) for image, caption in zip(moved[i], captions, strict=True)]
        tiles += [Tile(_change(decoded[i], scan), "first stage alone"), Tile(_change(returned, scan), "less the scan")]
        tiles += [Tile(_change(image, returned), "less nothing moved") for image in moved[i]]
        blocks.append(Block(name, tiles, columns=2 + len(captions)))
    return image_grid(blocks, width=2.2 * (2 + len(captions)), title="Counterfactuals", views=("axial", "coronal"))


def interpolation_sheet(names: Sequence[str], paths: Sequence[np.ndarray], shares: Sequence[float]) -> bytes:
    """Images between each scan and the next, a line each."""
    blocks = [
        Block(
            f"{first} to {second}",
            [Tile(image, f"{share:.0%}") for image, share in zip(path, shares, strict=True)],
            columns=len(shares),
        )
        for first, second, path in zip(names, names[1:], paths, strict=False)
    ]
    return image_grid(blocks, width=1.8 * len(shares), title="Between scans", views=("axial", "coronal"))
