"""The training loop that both stages share: learning rate, averaging, curves, checkpoints, resume.

Nothing in it draws a random number; a task derives all it needs from the step number.  An interrupted and resumed
training therefore takes exactly the steps of an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from meddiff_steps.compute.micro_batch import MicroBatch
from meddiff_steps.config import Optimiser
from meddiff_steps.core.errors import Preempted, UserError
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.training.checkpoints import CheckpointFolder

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)

#: With several processes, steps between two agreements on whether one of them was asked to stop: each waits for the
#: GPU.
AGREE_EVERY = 10

#: What `Task.validate` of the two stages measures on held-out scans, and training is to lower.
HELD_OUT_LOSSES = ("val/l1", "val/loss")


class Task(Protocol):
    """What the loop trains.

    `modules["model"]` is the network; `modules["average"]`, of the same shape, receives its running average and is
    what is validated and released.
    """

    modules: dict[str, nn.Module]
    optimisers: dict[str, torch.optim.Optimizer]
    micro: MicroBatch

    def train_step(self, step: int) -> dict[str, Tensor]:
        """One update; returns detached scalar losses by name."""

    def validate(self) -> dict[str, float]:
        """Losses of `modules["average"]` on held-out data, the same data and noise at every call."""


def batch_rows(root: str, step: int, batch_size: int, count: int) -> np.ndarray:
    """Rows of the batch of `step`: consecutive pieces of an endless sequence of shuffled epochs, (batch_size,)."""
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = position // count
    order = {int(e): step_generator(root, "order", int(e)).permutation(count) for e in np.unique(epochs)}
    return np.array([order[int(e)][p % count] for e, p in zip(epochs, position, strict=True)])


def rank_share(batch: np.ndarray, fabric: Fabric) -> np.ndarray:
    """This process's part of a batch; the parts of all processes make the batch without overlap.

    Every process draws the random numbers of the whole batch and keeps its part, so that the step that all take
    together is that of one process, but for rounding.

    Raises
    ------
    UserError
        The processes would get parts of different sizes, which a mean over processes would weight wrongly.
    """
    if len(batch) % fabric.world_size:
        raise UserError(
            f"optimiser.batch_size is {len(batch)} and compute.devices {fabric.world_size}: expected a multiple, so"
            " that every process gets as many images. Change one of them."
        )
    return batch[fabric.global_rank :: fabric.world_size]


def of_all_processes(sums: Mapping[str, Tensor], fabric: Fabric) -> dict[str, list[float]]:
    """Each scalar as every process has it, in their order."""
    if fabric.world_size == 1:
        return {name: [float(value)] for name, value in sums.items()}
    return {name: torch.as_tensor(fabric.all_gather(value)).tolist() for name, value in sums.items()}


def of_this_process(sums: Mapping[str, list[float]], fabric: Fabric) -> dict[str, Tensor]:
    """What `of_all_processes` gave: this process's own, to the bit; their mean where there were more or fewer."""
    return {
        name: fabric.to_device(
            torch.tensor(each[fabric.global_rank] if len(each) == fabric.world_size else float(np.mean(each)))
        )
        for name, each in sums.items()
    }


def learning_rate_scale(step: int, settings: Optimiser) -> float:
    """Linear warm-up, then a cosine to zero at the last step; in (0, 1]."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of the weights; the decay grows from 0.1 so that the first steps are forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    targets = [p for p in average.state_dict().values() if p.is_floating_point()]
    sources = [p for p in model.state_dict().values() if p.is_floating_point()]
    torch._foreach_lerp_(targets, sources, 1.0 - decay)


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGINT (Ctrl-C) sets instead of ending the process; a second SIGINT ends it.

    Outside the main thread, where Python allows no handler, nothing sets it.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def asked_to_stop(asked: threading.Event, fabric: Fabric, done: int) -> bool:
    """Whether this training shall stop after `done` steps; all processes give the same answer at the same step."""
    if fabric.world_size == 1:
        return asked.is_set()
    if done % AGREE_EVERY:
        return False
    votes = fabric.all_gather(fabric.to_device(torch.tensor(float(asked.is_set()))))
    return bool(torch.as_tensor(votes).any())


def clip_gradients(module: nn.Module, settings: Optimiser, step: int, fabric: Fabric) -> None:
    """Scale gradients so that their norm is at most `settings.gradient_clip`.

    Raises
    ------
    RuntimeError
        A gradient is not finite.  Looking makes a processor wait for its GPU, so there only steps before a checkpoint
        are looked at; between them the loss, which is then no longer finite either, stops the training before anything
        is saved.
    """
    checked = fabric.device.type == "cpu" or (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps
    # Not Fabric's, which clips the weights of one optimiser; gradients are never scaled here (fp16 is not offered).
    nn.utils.clip_grad_norm_(module.parameters(), settings.gradient_clip, error_if_nonfinite=checked)


def warn_if_in_vain(history: list[tuple[int, str, float]], label: str) -> None:
    """Say so if a held-out loss of `history` (step, metric, value) is no lower at the end than before the first
    step.
    """
    for metric in HELD_OUT_LOSSES:
        values = [value for _, name, value in history if name == metric]
        if len(values) > 1 and values[-1] >= values[0]:
            log.warning(
                "%s: training did not lower %s: %.4g before the first step, %.4g at the end. What is fitted without"
                " training (the covariates' effects) is better alone: lower the learning rate, train for more steps,"
                " or on more scans",
                *(label, metric, values[0], values[-1]),
            )


def fit(task: Task, settings: Optimiser, fabric: Fabric, state: Path, label: str) -> pd.DataFrame:
    """Train `task` to its last step, resuming from `state` if it holds a checkpoint.

    Returns
    -------
    DataFrame
        The training curve: step, metric, value.

    Raises
    ------
    Preempted
        SIGTERM or SIGINT came. The state after the step that was running is saved, with the means of the curve that
        were not yet complete; called again, the training ends with the same weights and curve as an undisturbed one.
    """
    checkpoints = CheckpointFolder(state)
    task.micro.remember(state / "micro-batch")
    start, extra = checkpoints.restore(task.modules, task.optimisers)
    history: list[tuple[int, str, float]] = [tuple(row) for row in extra.get("history", [])]
    base_rates = {
        name: [group["lr"] for group in optimiser.param_groups] for name, optimiser in task.optimisers.items()
    }
    sums = of_this_process(extra.get("sums", {}), fabric)
    counts: dict[str, int] = defaultdict(int, extra.get("counts", {}))
    curves = SummaryWriter(str(state / "tensorboard"), purge_step=start) if fabric.is_global_zero else nullcontext()
    bar = tqdm(
        range(start, settings.steps),
        initial=start,
        total=settings.steps,
        desc=label,
        mininterval=5,
        file=sys.stderr,
        disable=not fabric.is_global_zero,
    )

    def record(step: int, values: Mapping[str, float]) -> None:
        for metric, value in values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{label}: {metric} is {value} at step {step}. Lower the learning rate, or set compute.precision to"
                    " 32-true."
                )
            history.append((step, metric, value))
            if writer:
                writer.add_scalar(metric, value, step)
        bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)

    with stop_request() as asked, curves as writer:
        if start == 0:
            record(0, task.validate())  # what is given without training
        for step in bar:
            done = step + 1
            scale = learning_rate_scale(step, settings)
            for name, optimiser in task.optimisers.items():
                for group, rate in zip(optimiser.param_groups, base_rates[name], strict=True):
                    group["lr"] = rate * scale
            losses = task.train_step(step)
            update_average(task.modules["average"], task.modules["model"], settings.averaging, step)
            for name, value in losses.items():
                sums[name] = sums[name] + value if name in sums else value
                counts[name] += 1
            last = done == settings.steps
            save = done % settings.checkpoint_every == 0 or last
            # The curve is also written at every checkpoint, so that a resumed run averages over the same steps.
            if done % settings.log_every == 0 or save:
                means = {name: float(np.mean(each)) for name, each in of_all_processes(sums, fabric).items()}
                record(done, {name: mean / counts[name] for name, mean in means.items()})
                sums.clear()
                counts.clear()
            if done % settings.validate_every == 0 or last:
                record(done, task.validate())
            stop = asked_to_stop(asked, fabric, done)
            extra = {"history": history}
            if stop and sums:
                extra |= {"sums": of_all_processes(sums, fabric), "counts": counts}
            if (save or stop) and fabric.is_global_zero:
                checkpoints.save(done, task.modules, task.optimisers, extra)
            if stop:
                # The first process to end makes a launcher end the others, and one of them is still writing
                fabric.barrier()
                raise Preempted(
                    f"{label}: asked to stop; saved step {done} of {settings.steps} in {state}. The same"
                    " command goes on from there."
                )
    if fabric.is_global_zero:
        warn_if_in_vain(history, label)
    return pd.DataFrame(history, columns=["step", "metric", "value"]).astype({"step": "int64", "value": "float64"})
