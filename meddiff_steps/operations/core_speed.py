"""How long networks take on a core of this machine, beside the processor that `operations.rates` was measured on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.compute.device import channels_last, make_fabric, to_channels_last
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.first_stage.base import build, latent_shape
from meddiff_steps.operations.rates import CORE_FLOPS
from meddiff_steps.training.optimisers import set_up

#: Voxels, batches, and networks as the demo trains them.
SHAPE, BATCH = (32, 40, 32), 4
AUTOENCODER = config.Autoencoder(channels=[32, 64], latent_channels=12)
DIFFUSION = config.Diffusion(channels=[64])
#: Seconds that a step of the training of each takes there (docs/recipes.md: 5,000 in 6.4 and 5,500 in 3.9 minutes).
REFERENCE_S = {"autoencoder": 0.077, "denoiser": 0.043}
#: Networks that are like the autoencoder: of images, one at a time.  Others are like the denoiser.
OF_IMAGES = ("encoder", "decoder", "discriminator", "embedder")
#: Steps that are timed, after one that is not; the fastest counts.
STEPS = 3


@lru_cache(maxsize=1)
def slowness() -> Mapping[str, float]:
    """By how much networks take longer here, by the names of `rates.CORE_FLOPS`; measured, in some seconds.

    What counts is time of the processor in one thread, so that other work on the machine hardly does.  The training of
    an autoencoder by one image at a time, and of a denoiser, are a few convolutions that wait for memory and many that
    do not; a processor without bfloat16 can take ten times as long.
    """
    threads, silenced = torch.get_num_threads(), logging.root.manager.disable
    logging.disable(logging.INFO)  # this is no step of the study
    try:
        fabric = make_fabric(config.Compute(device="cpu", compile=False), 1)
        with torch.random.fork_rng(devices=[]):
            first_stage = build(AUTOENCODER, 3, 1)
            latents = latent_shape(AUTOENCODER, (1, *SHAPE))
            denoiser = Denoiser(DIFFUSION, latents, [0, 2])
            images, noise = _images(1, 1, *SHAPE), _images(1, *latents)
            noisy, told = _images(BATCH, *latents), Condition(torch.zeros(BATCH, 2))
            times = torch.linspace(100, 900, BATCH)
            forward: dict[str, tuple[nn.Module, config.NetworkOptimiser, Callable[[nn.Module], Tensor]]] = {
                "autoencoder": (
                    first_stage,
                    AUTOENCODER.optimiser,
                    lambda net: net(images, noise, torch.ones(1, 1, 1, 1, 1), True)[0],
                ),
                "denoiser": (denoiser, DIFFUSION.optimiser, lambda net: net(noisy, times, told)),
            }
            took = {}
            for name, (network, settings, made) in forward.items():
                to_channels_last(network, 3)
                net, optimisers = set_up(network, settings, fabric)
                seconds = []
                for _ in range(1 + STEPS):
                    start = time.process_time()
                    fabric.backward(made(net).square().mean())
                    for optimiser in optimisers.values():
                        optimiser.step()
                        optimiser.zero_grad()
                    seconds.append(time.process_time() - start)
                took[name] = min(seconds[1:]) / REFERENCE_S[name]
    finally:
        torch.set_num_threads(threads)
        logging.disable(silenced)
    return {name: took["autoencoder" if name.startswith(OF_IMAGES) else "denoiser"] for name in CORE_FLOPS}


def _images(*shape: int) -> Tensor:
    return torch.rand(shape).contiguous(memory_format=channels_last(len(shape) - 2))
