"""Pictures of what a trained model does with somebody's scans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meddiff_steps.report.figures import Block, Tile, figure, image_grid, mosaic, planes, png, styled

#: Change of grey value, of the range of an image, that a map shows as black or white; no change is grey.
SHOWN_CHANGE = 0.3
#: z that a map of deviations shows as black or white.
SHOWN_Z = 6.0


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


def completion_sheet(
    title: str,
    scans: Sequence[tuple[str, Sequence[np.ndarray]]],
    captions: Sequence[str],
    regions: Sequence[np.ndarray] | None = None,
    views: Sequence[str] = ("axial", "coronal"),
) -> bytes:
    """Per scan a line of images with captions, cut through the middle of what is shown.

    Parameters
    ----------
    scans
        Name, and images (1, *spatial).
    regions
        bool (*spatial) of each scan: planes go through its middle, where it is empty through that of the image.
    views
        Of volumes.
    """
    blocks = []
    for i, (name, images) in enumerate(scans):
        region = np.ones(images[0].shape[1:], dtype=bool)
        if regions is not None and regions[i].any():
            region = regions[i]
        tiles = [Tile(_through(image, region, views)[None], text) for image, text in zip(images, captions, strict=True)]
        blocks.append(Block(name, tiles, columns=len(captions)))
    return image_grid(blocks, width=1.9 * len(captions), title=title)


def deviation_sheet(
    scans: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], regions: Sequence[np.ndarray]
) -> bytes:
    """Per scan: itself, the mean of the reference's draws, and its map of z, grey where nothing deviates.

    Parameters
    ----------
    scans
        Name, the two images (1, *spatial), and z (*spatial).
    regions
        As of `completion_sheet`.
    """
    lines = [
        (name, [scan, reference, np.clip(0.5 + z[None] / (2 * SHOWN_Z), 0.0, 1.0)])
        for name, scan, reference, z in scans
    ]
    return completion_sheet("Deviations", lines, ("scan", "reference", "z"), regions)


def _through(image: np.ndarray, region: np.ndarray, views: Sequence[str]) -> np.ndarray:
    """Planes of an image (1, *spatial) through the middle of a region, side by side."""
    cuts = []
    axes = {"sagittal": 0, "coronal": 1, "axial": 2}
    for view, axis in [(view, axes[view]) for view in views] if region.ndim == 3 else [("axial", None)]:
        moved = image
        if axis is not None:
            n, at = region.shape[axis], round(float(np.nonzero(region)[axis].mean()))
            moved = np.roll(image, n // 2 - at, axis + 1)
        cuts += planes(moved, (view,))
    return mosaic(cuts)


def registration_sheet(pairs: Sequence[tuple[str, Sequence[np.ndarray]]], captions: Sequence[str]) -> bytes:
    """Per pair a line of images (1, *spatial) with captions: the moving scan, its way, the fixed scan."""
    blocks = [
        Block(name, [Tile(image, text) for image, text in zip(images, captions, strict=True)], columns=len(captions))
        for name, images in pairs
    ]
    return image_grid(blocks, width=1.7 * len(captions), title="Registration", views=("axial", "coronal"))


def shape_sheet(shapes: Sequence[tuple[str, np.ndarray, Sequence[np.ndarray]]]) -> bytes:
    """Per shape a line: what is left (grey) with what was there, what the nearest training shape has, and draws.

    Parameters
    ----------
    shapes
        Name, what is left (k, 3), and further points (n, 3) by picture; mm.
    """
    captions = ["true", "nearest shape", *(f"draw {i + 1}" for i in range(len(shapes[0][2]) - 2))]
    with styled():
        height = 1.9 * len(shapes)
        drawing = figure(1.9 * len(captions), height)
        edges = {"left": 0.02, "right": 0.98, "bottom": 0.1 / height, "top": 1 - 0.4 / height}
        axes = drawing.subplots(
            len(shapes), len(captions), squeeze=False, sharex=True, sharey=True, gridspec_kw=edges | {"wspace": 0.05}
        )
        for line, (row, (name, left, parts)) in enumerate(zip(axes, shapes, strict=True)):
            for one, caption, part in zip(row, captions, parts, strict=True):
                # From the side: along the first axis
                one.scatter(*left[:, 1:].T, s=1, color="0.7", linewidths=0)
                one.scatter(*part[:, 1:].T, s=1.5, color="tab:red", linewidths=0)
                one.set_aspect("equal")
                one.set_axis_off()
                one.set_title("" if line else caption)
            row[0].set_title(f"{name}\n{captions[0]}" if line == 0 else name)
        return png(drawing)
