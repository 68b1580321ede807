"""Sources and targets of scans: what is given to a network, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn

SHAPE = (1, 8, 8)


def shards(folder: Path, labels: np.ndarray | None = None) -> Shards:
    """Two scans with a contrast, two readers' masks (of which the second marks less) and a label map."""
    kinds = {"flair": "contrast", "first": "mask", "second": "mask", "parts": "labels"}
    columns = {"scan_id": pa.string(), "image": TensorColumn("float16", SHAPE)}
    stored = {"contrast": "float16", "mask": "uint8", "labels": "int16"}
    columns |= {name: TensorColumn(stored[kind], SHAPE, kind) for name, kind in kinds.items()}
    mask = np.zeros(SHAPE)
    mask[0, 2:6, 2:6] = 1
    with ShardWriter(folder / "shard.arrow", columns) as shard:
        for name in "ab":
            shard.append(
                scan_id=name,
                image=np.full(SHAPE, 0.25),
                flair=np.full(SHAPE, 0.75),
                first=mask,
                second=mask * (np.arange(8) < 4),
                parts=mask * 7 if labels is None else labels,
            )
    return Shards([folder / "shard.arrow"])


def test_contrasts_and_masks_are_encoded_and_come_back(tmp_path: Path) -> None:
    found = shards(tmp_path)
    contrast = Pairs.of(found, ["image", "first"], ["flair"], [0, 1], "x")
    assert (contrast.kind, contrast.channels, contrast.readers) == ("contrast", 1, 1)
    assert contrast.sources([1])[0, :, 3, 3].tolist() == [0.25, 1.0]
    encoded = contrast.encoded(contrast.truths([0]))
    assert (encoded == 0.5).all() and (contrast.decoded(encoded) == 0.75).all()
    assert contrast.decoded(encoded + 9).max() == 1.0

    readers = Pairs.of(found, ["image"], ["first", "second"], [0], "x")
    truths = readers.truths([0, 1])
    assert (readers.kind, readers.channels, readers.readers) == ("mask", 1, 2) and truths.shape == (2, 2, 8, 8)
    assert truths.sum((2, 3)).tolist() == [[16, 8], [16, 8]]
    assert np.array_equal(readers.decoded(readers.encoded(truths[:, :1])), truths[:, :1])


def test_label_maps_are_one_hot_with_nothing_first(tmp_path: Path) -> None:
    parts = np.zeros(SHAPE)
    parts[0, :2], parts[0, 4:6] = 9, 3
    pairs = Pairs.of(shards(tmp_path, parts), ["image"], ["parts"], [0], "x")
    assert pairs.labels == (0, 3, 9) and pairs.channels == 3
    truth = pairs.truths([0])
    encoded = pairs.encoded(truth)
    assert (encoded.sum(1) == -1).all()  # one of three is 1
    assert encoded[0, 2, 0, 0] == encoded[0, 1, 4, 0] == encoded[0, 0, 3, 0] == 1
    assert np.array_equal(pairs.decoded(encoded), truth)


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        (["t2"], ["first"], r"x.source: 't2' is no image of the scans, which have image, flair, first"),
        (["image"], ["dose"], "x.target: 'dose' is no image.*Declare it under preprocess.channels"),
        (["parts"], ["flair"], "x.source: parts is a label map"),
        (["image"], ["flair", "first"], "x.target: contrast, mask together"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, source: list[str], target: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Pairs.of(shards(tmp_path), source, target, [0], "x")


def test_masks_in_which_nothing_is_marked_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="x.target: nothing is marked in parts of any of 2 training scans"):
        Pairs.of(shards(tmp_path, np.zeros(SHAPE)), ["image"], ["parts"], [0, 1], "x")
