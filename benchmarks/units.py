"""What a processor takes for the units that `plan-cost` counts: `python -m benchmarks.units [--side 64]`.

Each unit is timed by the functions that the stages call, on an average brain (MNI152) of so many voxels a side, in one
thread, the quickest of some tries.  Prints seconds per unit, beside those of `meddiff_steps/operations/rates.py`, and
FLOP/s of the networks of the demo and of `config/studies/ukb.yaml` on one core.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nilearn.datasets import load_mni152_template
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from meddiff_steps import config
from meddiff_steps.compute.device import channels_last, make_fabric, to_channels_last
from meddiff_steps.core.random_streams import noise, step_generator
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.evaluation.discriminability import low_pass
from meddiff_steps.evaluation.spectrum import radial_power
from meddiff_steps.imaging import encoding
from meddiff_steps.imaging.perturbations import augment
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.instruments.embedder import Embedder
from meddiff_steps.instruments.feature_spaces.assemble import spaces
from meddiff_steps.instruments.feature_spaces.base import Context, extract
from meddiff_steps.instruments.predictors import LocalHistograms
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.drawing.base import build as build_decoder
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.operations.rates import CORE_FLOPS, PROCESSOR
from meddiff_steps.privacy.detectors.aligned import WINDOW, cell, extent, ssim_map, window_mean
from meddiff_steps.privacy.search import nearest, unit_rows

ROOT = Path(__file__).parents[1]
#: Images that are timed together, tries, and queries, references and numbers of the search.
IMAGES, TRIES, SEARCH = 4, 3, (512, 4096, 4096)


def brain(side: int) -> np.ndarray:
    """An average brain, float32 (1, side, 1.25 side, side) in [0, 1]."""
    volume = load_mni152_template(resolution=1)
    whole = torch.from_numpy(np.asarray(volume.get_fdata(), np.float32))[None, None]
    size = (side, side * 5 // 4 // 2 * 2, side)
    grid = nn.functional.interpolate(whole, size=size, mode="trilinear", antialias=False)[0]
    return (grid / grid.max()).clamp(0.0, 1.0).numpy()


def quickest(run: Callable[[], Any]) -> float:
    """Seconds of the quickest of some tries; the first one does not count."""
    found = []
    run()
    for _ in range(TRIES):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def units(image: np.ndarray, folder: Path) -> Iterator[tuple[str, float]]:
    """Seconds of one core per unit, by the names of `rates.PROCESSOR`."""
    shape, voxels = image.shape[1:], image.size
    images = np.stack([image] * IMAGES)
    images += 0.01 * np.random.default_rng(0).standard_normal(images.shape, np.float32) * (images > 0)
    images = images.clip(0.0, 1.0)
    tensors = torch.from_numpy(images)
    every = IMAGES * voxels
    path = folder / "images.arrow"

    def store() -> None:
        with ShardWriter(path, {"image": TensorColumn("float16", image.shape)}) as writer:
            for one in images:
                writer.append(image=one)

    yield "voxel stored", quickest(store) / every
    shards = Shards([path])
    yield "voxel read", quickest(lambda: shards.tensors("image", list(range(IMAGES)))) / every
    yield "voxel copied", quickest(lambda: images[[2, 0, 1, 3]]) / every
    yield "normal number", quickest(lambda: noise("0" * 32, image.shape)) / voxels
    yield "voxel augmented", quickest(lambda: augment(tensors, step_generator("units", "batch", 0))) / every

    def reduce() -> None:
        Embedder(shape).reduce(tensors)
        window_mean(torch.cat([tensors, extent(tensors)]), cell(shape))

    yield "voxel reduced", quickest(reduce) / every
    # Every candidate is moved, and compared inside of its extent.
    yield "voxel compared", quickest(lambda: ssim_map(torch.roll(tensors, (1,), (2,)), tensors, WINDOW)) / every
    queries, references, width = SEARCH
    vectors = unit_rows(np.random.default_rng(0).standard_normal((references, width), np.float32))
    yield "product", quickest(lambda: nearest(vectors[:queries], vectors)) / (2.0 * queries * references * width)
    histograms = LocalHistograms(shape)
    yield "voxel measured", quickest(lambda: (histograms(images), radial_power(images))) / every
    found = spaces(None, Context(3))
    yield "voxel described", quickest(lambda: extract(found, shards, list(range(IMAGES)))) / every
    (space,) = (one for one in found if one.name == "random")
    blurred = quickest(lambda: extract([space], shards, list(range(IMAGES)), change=low_pass(0.1)))
    yield "voxel blurred", blurred / every
    grid = encoding.Grid(shape, 1.0)
    file = folder / "image.nii.gz"
    content, _ = encoding.encode_volume(images[0, 0], grid, "syn0", "units")
    file.write_bytes(content)
    print(f"{len(content) / voxels:.2f} bytes per voxel packed")
    yield "voxel packed", quickest(lambda: encoding.encode_volume(images[0, 0], grid, "syn0", "units")) / voxels

    def look() -> None:
        decoded = encoding.decode(file, grid)
        encoding.voxel_digest(decoded.stored, decoded.affine)

    yield "voxel unpacked", quickest(look) / voxels


def network_rates(study: config.Study, sides: int) -> Iterator[tuple[str, float]]:
    """FLOP/s of the networks of a study on images of `sides` voxels a side, in one thread, forward."""
    shape = (sides,) * 3
    fabric = make_fabric(config.Compute(device="cpu"), 1)
    first_stage = build_first_stage(study.autoencoder, 3)
    image = torch.rand(2, 1, *shape)
    latent = first_stage.encode(image[:1]).mode()
    denoiser = Denoiser(study.diffusion, latent.shape[1:], [0, 2])
    drawer, embedder = build_decoder(study.decoder, (1, *shape)), Embedder(shape)
    for network in (first_stage, denoiser, drawer, embedder):
        to_channels_last(network.requires_grad_(False), 3)

    def dense(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=channels_last(3))

    image, latents = dense(image), dense(torch.randn(2, *latent.shape[1:]))
    runs: dict[str, Callable[[], Any]] = {
        "encoder": lambda: first_stage.encode(image),
        "decoder": lambda: first_stage.decode(latents),
        "denoiser": lambda: denoiser(latents, torch.full((2,), 500.0), Condition(torch.zeros(2, 2))),
        "drawing": lambda: drawer.step(image),
        "embedder": lambda: embedder(image),
    }
    with torch.no_grad(), fabric.autocast():
        for name, run in runs.items():
            with FlopCounterMode(display=False) as counter:
                run()
            yield name, counter.get_total_flops() / quickest(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=64, help="voxels of the image along its first axis")
    parser.add_argument("--networks", type=int, default=32, help="voxels a side of the images that networks see")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    image = brain(arguments.side)
    print(f"{image.shape[1:]}, {math.prod(image.shape):,} voxels, one thread")
    with tempfile.TemporaryDirectory() as folder:
        for name, seconds in units(image, Path(folder)):
            print(f"{name:<24}{seconds:>10.2e} s, in the table {PROCESSOR[name].seconds:.2e} s", flush=True)
    for path in ("config/config.yaml", "config/studies/ukb.yaml"):
        for name, rate in network_rates(config.load_study(ROOT / path), arguments.networks):
            print(
                f"{path}: {name:<12}{rate / 1e9:>8.1f} GFLOP/s, the table has {CORE_FLOPS[name] / 1e9:.0f}", flush=True
            )


if __name__ == "__main__":
    main()
