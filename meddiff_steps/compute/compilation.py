"""torch.compile, and weights in the type that products take them in."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from meddiff_steps.config import Compute
from meddiff_steps.core.errors import UserError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)


def lacking_for_compiler(device: str) -> str | None:
    """What torch.compile needs for "cpu" or "cuda" and this machine has not; None if all is there."""
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "the Python package triton"
    language, variable, names = (
        ("C", "CC", ("gcc", "clang", "cc")) if device == "cuda" else ("C++", "CXX", ("g++", "clang++", "c++"))
    )
    if not any(shutil.which(name) for name in (os.environ.get(variable, ""), *names) if name):
        return f"a {language} compiler ({', '.join(names)}, or the one that {variable} names)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return f"Python's headers (Debian: python3-dev; {sysconfig.get_path('include')}/Python.h)"
    return None


def compiles(compute: Compute, device: str, training: bool) -> bool:
    """Whether `compute.compile` means that this job compiles its networks.

    Raises
    ------
    UserError
        It is asked to, and the machine cannot; where `auto` would, it is only told.
    """
    if not (compute.compile is True or (compute.compile == "auto" and training and device == "cuda")):
        return False
    lacking = lacking_for_compiler(device)
    if lacking and compute.compile is True:
        raise UserError(
            f"compute.compile is true, but torch.compile on {device} needs {lacking}. Install it, or set"
            " compute.compile to false."
        )
    if lacking:
        log.warning(
            "networks are not compiled: torch.compile on %s needs %s. Training will be slower.", device, lacking
        )
    return lacking is None


def speed_up(networks: Iterable[nn.Module], compute: Compute, fabric: Fabric, training: bool) -> bool:
    """Compile networks in place, where `compute` says so, for tensors whose shapes never change; returns whether.

    Weights keep their names.  Compiling itself happens at the first call, and again where a network is called in
    another shape or mode.

    Parameters
    ----------
    networks
        What a model calls `costly`.
    training
        Whether they are trained; generation has a recipe to keep, so nothing that times kernels and picks among them is
        done there.

    Raises
    ------
    UserError
        See `compiles`.
    """
    device = fabric.device.type
    if training and compute.autotune:
        torch.backends.cudnn.benchmark = True
    if not compiles(compute, device, training):
        return False
    # A network that is called in too many ways would go on without being compiled, and round otherwise from then on:
    # stop instead.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    mode = "reduce-overhead" if compute.cuda_graphs and device == "cuda" and not training else None
    for network in networks:
        network.compile(dynamic=False, mode=mode)
    log.info("networks are compiled at their first call%s", " and replayed as CUDA graphs" if mode else "")
    return True


def cast_weights(networks: Iterable[nn.Module], fabric: Fabric) -> None:
    """Keep the weights of convolutions and linear maps in the type that autocast would cast them to at every call, in
    place.

    Results stay the same to the bit; for networks that are no longer trained. On processors, and without autocast,
    nothing is done.
    """
    with fabric.autocast():
        if fabric.device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
            return
        dtype = torch.get_autocast_dtype("cuda")
    cast_products(networks, dtype)


def cast_products(networks: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Weights and biases of all convolutions and linear maps in `dtype`, in place; see `cast_weights`."""
    for network in networks:
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
                module.to(dtype)
