"""Device, precision and processes: the one place that asks what the machine can do."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from meddiff_steps.config import Compute
from meddiff_steps.core.errors import UserError

if TYPE_CHECKING:  # it brings the whole of torch's compiler, 2 s: imported where it is used
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import ClusterEnvironment

log = logging.getLogger(__name__)


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX); elsewhere it is emulated and slow."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def given_gpus() -> str | None:
    """The GPUs that this job was told to use, as its scheduler wrote them ("0", "1,3"); None where nobody said
    anything.
    """
    return os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("ROCR_VISIBLE_DEVICES"))


def resolve(compute: Compute) -> tuple[str, Literal["32-true", "bf16-mixed"]]:
    """Device ("cpu" or "cuda") and precision ("32-true" or "bf16-mixed") that `compute` means on this machine.

    A job of Slurm that asked for no GPU sees all of them on many clusters, but has none; it stays on the processor.

    Raises
    ------
    UserError
        `compute.device` is cuda and no GPU is visible.
    """
    has_cuda = torch.cuda.is_available() and not ("SLURM_JOB_ID" in os.environ and given_gpus() is None)
    if compute.device == "cuda" and not has_cuda:
        raise UserError(
            "compute.device is cuda, but this job sees no GPU. Run it where one is given (a rule's `gpu` resource, or"
            " CUDA_VISIBLE_DEVICES), or set compute.device to auto or cpu."
        )
    device = "cuda" if has_cuda and compute.device != "cpu" else "cpu"
    if compute.precision != "auto":
        return device, compute.precision
    return device, (
        "bf16-mixed" if (torch.cuda.is_bf16_supported() if device == "cuda" else cpu_has_bf16()) else "32-true"
    )


def launched_by() -> tuple[ClusterEnvironment, int, int]:
    """Who starts the processes of a training, how many there are (0: not started yet), and on how many nodes.

    `torchrun` or `srun --ntasks-per-node N`, if one of them did; otherwise this process starts the others. Lightning
    alone would take the single task that Snakemake runs in a job of Slurm for one of a set that never comes, and train
    on one GPU of several.
    """
    from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        processes = int(os.environ["WORLD_SIZE"])
        return TorchElasticEnvironment(), processes, processes // int(os.environ["LOCAL_WORLD_SIZE"])
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if tasks > 1 and "SLURM_STEP_ID" in os.environ:
        return SLURMEnvironment(auto_requeue=False), tasks, int(os.environ.get("SLURM_NNODES", "1"))
    return LightningEnvironment(), 0, 1


def make_fabric(compute: Compute, threads: int, processes: int = 1) -> Fabric:
    """Fabric for this job, launched.

    Parameters
    ----------
    compute
        The study's `compute` section; see `resolve`.
    threads
        CPU threads per process. The number changes the last bits of CPU results.
    processes
        Processes that share the work, one per GPU: `compute.devices` for a training, 1 for everything else.

    Raises
    ------
    UserError
        `torchrun` or `srun` started another number of processes.
    """
    from lightning_fabric import Fabric

    from meddiff_steps.compute.precision import Bf16Inside

    device, precision = resolve(compute)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    environment, started, nodes = launched_by()
    if started and started != processes:
        raise UserError(
            f"{type(environment).__name__.removesuffix('Environment')} started {started} processes, but this step works"
            f" in {processes}. Set compute.devices to the number of processes of a training (all nodes together); start"
            " other steps as one process."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `srun` command is available")  # jobs are started by Snakemake
        fabric = Fabric(
            accelerator=device,
            devices=processes // nodes,
            num_nodes=nodes,
            precision=None if precision == "bf16-mixed" else precision,
            strategy="ddp" if processes > 1 else "auto",
            plugins=[environment, Bf16Inside(device)] if precision == "bf16-mixed" else [environment],
        )
    fabric.launch()
    if fabric.is_global_zero:
        log.info(
            "running on %d x %s, %s, %d CPU threads; CUDA_VISIBLE_DEVICES: %s",
            processes,
            device,
            precision,
            threads,
            given_gpus(),
        )
    return fabric


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 stays float32 in here, whatever surrounds it: no autocast, and no TF32 on a GPU.

    Networks may round what they multiply: to bfloat16 under autocast, and else to the 10 bits of TF32, in products
    because `make_fabric` allows it, in convolutions because cuDNN does.  The switches are those of the whole process;
    what is begun in the block keeps what they were there, and they are put back however it ends.  Also a decorator.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def to_channels_last(module: nn.Module, spatial_dims: int) -> None:
    """Store convolution weights channels-last, in place; both oneDNN and cuDNN convolve faster so (2D and 3D)."""
    layout = channels_last(spatial_dims)
    for tensor in [*module.parameters(), *module.buffers()]:
        if (
            tensor.ndim == spatial_dims + 2
        ):  # Module.to(memory_format=...) would refuse a module with a tensor of another rank
            tensor.data = tensor.data.to(memory_format=layout)


def channels_last(spatial_dims: int) -> torch.memory_format:
    return torch.channels_last_3d if spatial_dims == 3 else torch.channels_last


def to_device(array: np.ndarray, fabric: Fabric) -> Tensor:
    """`array` on the device; to a GPU by way of pinned memory, so that nobody waits for what the GPU still has
    to do.
    """
    tensor = torch.from_numpy(array)
    return (
        tensor.pin_memory().to(fabric.device, non_blocking=True)
        if fabric.device.type == "cuda"
        else fabric.to_device(tensor)
    )


def adamw(parameters: Iterable[nn.Parameter], learning_rate: float, fabric: Fabric) -> torch.optim.AdamW:
    """AdamW without weight decay; on a GPU all parameters are updated by a few fused kernels."""
    return torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=0.0, fused=True if fabric.device.type == "cuda" else None
    )
