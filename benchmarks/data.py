"""Data on their way in and out: loader, preprocessing, release, diversity.

Every one stands beside the peers' way and, where a library does the irreducible part (gzip), beside that part alone.
"""

from __future__ import annotations

import gc
import gzip
import math
import shutil
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from monai.transforms import SaveImage

from benchmarks import measure, peer
from benchmarks.places import SEED, TINY, Place, Setting, Size, ellipsoids, write_latents
from meddiff_steps import config
from meddiff_steps.evaluation.diversity import pair_similarity
from meddiff_steps.evaluation.image_quality import SsimSettings
from meddiff_steps.imaging.encoding import GZIP_LEVEL, VOLUME_SCALE, Grid
from meddiff_steps.imaging.preprocess import preprocess_image, preprocess_shard
from meddiff_steps.imaging.shards import Shards, ShardWriter
from meddiff_steps.imaging.shards import TensorColumn as Column
from meddiff_steps.release.dataset import write_images
from meddiff_steps.simulation.dataset import one_torch_thread, simulate_cohort
from meddiff_steps.statistics.bootstrap import rounded
from meddiff_steps.training.latent_data import LatentData

#: Source scans of the preprocessing comparison: 2 mm, which is then brought to each study's grid.
SOURCE = Size("source", (96, 112, 96), 2.0, train=20, val=0, test=0)
#: Pairs behind our diversity figure, and cohort for which the cost of all ordered pairs is worked out.
PAIRS, COHORT = 100, 1000
#: Volumes among which pairs are drawn: few enough that all pairs can be compared once, to see whether our interval
#: holds their mean.
COMPARED = 24
BATCH = 8


# ----------------------------------------------------------------------------------------------------- loader


def loader(setting: Setting) -> dict[str, Any]:
    """Loader: files to batches in the first epoch, batches in later ones, memory and disk, beside Cache- and
    PersistentDataset.
    """
    rows = []
    for size in setting.sizes:
        place = setting.place(size)
        with tempfile.TemporaryDirectory(dir=setting.work) as folder:
            rows += _loader_rows(place, Path(folder))
    return {"rows": rows}


def _loader_rows(place: Place, folder: Path) -> list[dict[str, Any]]:
    setting, size, files = place.setting, place.size.name, place.files("train")
    table = place.table[place.table["split"] == "train"]
    numbers = iter(range(10**6))

    def ours_first() -> float:
        path = folder / f"ours-{next(numbers)}.arrow"
        preprocess_shard(table, place.study.preprocess, path)
        return _read(Shards([path]))

    def peer_first() -> float:
        return _drain(
            peer.peer_loader(
                files, place.study.preprocess, BATCH, cache="disk", folder=folder / f"peer-{next(numbers)}"
            )
        )

    rows = [
        measure.take_turns(ours_first, peer_first, setting.either(3, 1)).row(
            "loader, first epoch, beside PersistentDataset", size, "samples/s"
        )
    ]

    path, cache = folder / "ours.arrow", folder / "peer"
    preprocess_shard(table, place.study.preprocess, path)
    shards = Shards([path])
    disk = peer.peer_loader(files, place.study.preprocess, BATCH, cache="disk", folder=cache)
    _drain(disk)
    turns = setting.either(7, 2)
    epochs = setting.either(10, 1)  # ours are too quick to time one

    def ours_later() -> float:
        return sum(_read(shards) for _ in range(epochs))

    disk_bytes = {"ours": path.stat().st_size, "peer": peer.cached_bytes(cache)}
    per_scan = {side: rounded(value / len(files) / 1024) for side, value in disk_bytes.items()}
    rows.append(
        measure.take_turns(ours_later, lambda: _drain(disk), turns).row(
            "loader, later epochs, images, beside PersistentDataset", size, "samples/s", kibibytes_per_scan=per_scan
        )
    )
    data = _latents(place, folder / "latents.arrow")

    def ours_latents() -> float:
        for _ in range(epochs):
            for start in range(0, len(data.train_rows), BATCH):
                for column in ("mean", "numbers"):
                    torch.from_numpy(data.shards.tensors(column, data.train_rows[start : start + BATCH]))
        return epochs * len(data.train_rows)

    latent_scan = rounded((folder / "latents.arrow").stat().st_size / len(place.images) / 1024)
    rows.append(
        measure.take_turns(ours_latents, lambda: _drain(disk), turns).row(
            "loader, later epochs, what diffusion trains on, beside PersistentDataset",
            size,
            "samples/s",
            kibibytes_per_scan={"ours": latent_scan, "peer": per_scan["peer"]},
            note=("ours reads cached latents, the peer images that are still to be encoded"),
        )
    )
    rate = measure.copy_rate()
    # Stored as 2 bytes per number, given as 4.
    for row, size_of in ((rows[-2], 6 * math.prod(place.size.shape)), (rows[-1], 6 * math.prod(place.latent_shape))):
        row["floor"] = {"ours": measure.copying(size_of, rate, 1.0 / row["ours"]["value"])}
    gc.collect()
    before = measure.private_mebibytes()
    memory = peer.peer_loader(files, place.study.preprocess, BATCH, cache="memory")
    filled = measure.private_mebibytes() - before
    row = measure.take_turns(ours_later, lambda: _drain(memory), turns).row(
        "loader, later epochs, images, beside CacheDataset", size, "samples/s"
    )
    before = measure.private_mebibytes()
    held = Shards([path])
    _read(held)
    row["private_mebibytes"] = {
        "ours": rounded(max(0.0, measure.private_mebibytes() - before)),
        "peer": rounded(max(0.0, filled)),
    }
    return [*rows, row]


def _read(shards: Shards) -> float:
    """One shuffled epoch as the training tasks read it."""
    order = np.random.default_rng(0).permutation(len(shards))
    for start in range(0, len(order), BATCH):
        torch.from_numpy(shards.tensors("image", order[start : start + BATCH]))
    return len(order)


def _drain(batches: Any) -> float:
    return sum(len(batch["image"]) for batch in batches)


def _latents(place: Place, path: Path) -> LatentData:
    """Latents of the study's shape with made-up values: reading does not depend on them."""
    shape, count = place.latent_shape, len(place.images)
    rng = np.random.default_rng(0)
    shards = write_latents(path, [rng.standard_normal(shape, dtype=np.float32) for _ in range(count)])
    prior = {"offset": torch.zeros(1, *shape), "scale": torch.ones(())}
    return LatentData(shards, prior, place.covariates, place.rows("train"), place.rows("val"))


# ---------------------------------------------------------------------------------------------- preprocessing


def preprocessing(setting: Setting) -> dict[str, Any]:
    """Preprocessing: 2 mm scans to the study's grid on one core, beside the tutorials' transforms and beside gzip
    alone.
    """
    size = Size("source", TINY.shape, TINY.spacing_mm, 20, 0, 0) if setting.quick else SOURCE
    root = setting.work / ("source-quick" if setting.quick else "source")
    if not (root / "participants.tsv").exists():
        if setting.quick:
            ellipsoids(root, 20, size)
        else:
            simulate_cohort(
                config.SimulatedSource(subjects=20, shape=size.shape, spacing_mm=size.spacing_mm),
                SEED,
                root,
                setting.threads,
            )
    files = sorted(root.glob("sub-*/anat/*.nii.gz"))[: setting.either(12, 3)]
    rows = []
    with one_torch_thread():
        for place in (setting.place(size) for size in setting.sizes):
            settings = place.study.preprocess
            transform = peer.peer_transform(settings)

            def ours(settings: config.Preprocess = settings) -> float:
                for path in files:
                    preprocess_image(path, settings)
                return len(files)

            def theirs(transform: Any = transform) -> float:
                for path in files:
                    transform({"image": str(path)})
                return len(files)

            row = measure.take_turns(ours, theirs, setting.either(5, 1)).row(
                "preprocessing on one core", place.size.name, "subjects/s"
            )
            row["floor"] = {
                "ours": _part(
                    "gzip decoding",
                    [lambda path=path: gzip.decompress(path.read_bytes()) for path in files],
                    1.0 / row["ours"]["value"],
                )
            }
            rows.append(row | {"note": f"from {'x'.join(map(str, size.shape))} at {size.spacing_mm:g} mm"})
    return {"rows": rows}


def _part(kind: str, runs: list[Any], seconds: float) -> dict[str, Any]:
    """What share of a measured time per subject an irreducible part alone takes; the best of three rounds."""

    def once() -> float:
        start = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - start) / len(runs)

    least = min(once() for _ in range(3))
    return {"kind": kind, "seconds": rounded(least), "reached": rounded(least / seconds)}


# ---------------------------------------------------------------------------------------------------- release


def release(setting: Setting) -> dict[str, Any]:
    """Writing the release: our marked, hashed int16 volumes beside MONAI's SaveImage, and beside zlib alone."""
    rows = []
    for place in (setting.place(size) for size in setting.sizes):
        images = place.tensors("test").numpy()[: setting.either(32, 4)]
        grid = Grid(place.size.shape, place.size.spacing_mm)
        with tempfile.TemporaryDirectory(dir=setting.work) as name, one_torch_thread():
            folder = Path(name)
            shard = folder / "generated.arrow"
            with ShardWriter(
                shard, {"sample_id": pa.string(), "image": Column("float16", (1, *place.size.shape))}
            ) as writer:
                for number, image in enumerate(images):
                    writer.append(sample_id=f"syn{number:06d}", image=image)

            def ours(folder: Path = folder, shard: Path = shard, grid: Grid = grid) -> float:
                shutil.rmtree(folder / "ours", ignore_errors=True)
                return len(write_images(shard, folder / "ours", grid, "benchmarks"))

            def theirs(folder: Path = folder, images: np.ndarray = images) -> float:
                shutil.rmtree(folder / "peer", ignore_errors=True)
                save = SaveImage(
                    output_dir=folder / "peer",
                    output_postfix="",
                    separate_folder=False,
                    print_log=False,
                    resample=False,
                )
                for number, image in enumerate(images):
                    save(torch.from_numpy(image), meta_data={"filename_or_obj": f"syn{number:06d}"})
                return len(images)

            row = measure.take_turns(ours, theirs, setting.either(5, 1)).row(
                "writing volumes, one core", place.size.name, "volumes/s"
            )
            stored = [np.rint(image * VOLUME_SCALE).astype("<i2").tobytes() for image in images]
            compress = [lambda content=content: zlib.compress(content, GZIP_LEVEL) for content in stored]
            row["floor"] = {"ours": _part(f"zlib at level {GZIP_LEVEL}", compress, 1.0 / row["ours"]["value"])}
            sizes = {
                side: sum(p.stat().st_size for p in (folder / side).rglob("*.nii.gz")) / len(images) / 1024
                for side in ("ours", "peer")
            }
            row["kibibytes_per_volume"] = {side: rounded(value) for side, value in sizes.items()}
            row["note"] = "ours with a mark, a checksum of the file and one of its voxels; the peer's float32 without"
            rows.append(row)
    return {"rows": rows}


# -------------------------------------------------------------------------------------------------- diversity


def diversity(setting: Setting) -> dict[str, Any]:
    """MS-SSIM diversity: random pairs with an interval, beside all ordered pairs, both files read again for each."""
    rows = []
    for place in (setting.place(size) for size in setting.sizes):
        chosen = place.rows("test")[:COMPARED]
        files, shape = place.files("test"), place.size.shape
        settings = SsimSettings.for_shape(shape)
        metric = settings.metric(3, 255.0)  # of the files' grey levels
        count = setting.either(PAIRS, 5)
        figures = []

        def ours(
            place: Place = place,
            chosen: np.ndarray = chosen,
            shape: Any = shape,
            count: int = count,
            figures: list[Any] = figures,
        ) -> float:
            read, units = partial(_images, place, chosen), [str(row) for row in chosen]
            figures.append(
                pair_similarity(read, units, shape, pairs=count, resamples=200, seed=SEED, label="benchmark")
            )
            return figures[-1]["pairs"]

        def theirs(files: list[Path] = files, metric: Any = metric) -> float:
            return len(peer.peer_diversity(files, metric, limit=setting.either(12, 2)))

        row = measure.take_turns(ours, theirs, setting.either(3, 1)).row(
            f"{settings.name} of pairs", place.size.name, "pairs/s"
        )
        per_pair = {side: 1.0 / row[side]["value"] for side in ("ours", "peer")}
        whole = {"ours": per_pair["ours"] * figures[-1]["pairs"], "peer": per_pair["peer"] * COHORT * (COHORT - 1)}
        everything = None
        if place.size is setting.sizes[0]:
            read = partial(_images, place, chosen)
            everything = pair_similarity(
                read, [str(row) for row in chosen], shape, pairs=len(chosen) ** 2, resamples=100, seed=SEED, label="all"
            )
        row |= {
            "figure": figures[-1],
            "all_pairs": everything,
            "settings": settings.card(),
            "seconds_for_1000_volumes": {side: rounded(value) for side, value in whole.items()},
            "ratio_for_1000_volumes": rounded(whole["peer"] / whole["ours"]),
            "note": (
                f"of {COHORT:,} volumes, ours compares {figures[-1]['pairs']} pairs and says how sure it is; the peer's"
                f" {COHORT * (COHORT - 1):,} are worked out from its seconds per pair"
            ),
        }
        rows.append(row)
    return {"rows": rows}


def _images(place: Place, chosen: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return place.images.tensors("image", chosen[rows])
