"""A batch in parts, where a GPU has no room for the whole of it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_atomic

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricModule

log = logging.getLogger(__name__)

#: Mean losses of some rows of a batch: the one to minimise, and all by name.
Losses = Callable[[slice], tuple[Tensor, dict[str, Tensor]]]


class MicroBatch:
    """How many images go through a network at a time.

    Gradients of the parts are added up, so that the batch stays what the study says and its step the same, but for
    rounding.  Networks that normalise over a batch would see the parts; ours normalise within an image.

    Attributes
    ----------
    size
        Images at a time; None while the whole batch fits.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.size: int | None = None
        self._memory: Path | None = None

    def remember(self, path: Path) -> None:
        """Keep the size in this file, and begin with the one that an earlier attempt left there."""
        self._memory = path
        if path.is_file():
            self.size = int(path.read_text(encoding="utf-8"))
            log.info("%d images at a time, as %s says", self.size, path)

    def gradients(self, module: _FabricModule, count: int, losses: Losses) -> dict[str, Tensor]:
        """Gradients of the mean loss over `count` images in the parameters of `module`, and its detached mean losses by
        name.

        Raises
        ------
        UserError
            Memory does not suffice for one image; or for a part with several processes, which cannot change it alone:
            started again, all of them take smaller ones.
        """
        while True:
            try:
                return self._accumulate(module, count, losses)
            except torch.OutOfMemoryError as error:
                said = str(error).splitlines()[0]
            module.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._halve(count, said)

    def parts(self, count: int, batch_size: int, share: float = 1.0) -> list[slice]:
        """Rows of `count` images that are looked at without gradients: as many at a time as in training, whose batches
        have `batch_size` images, or patches that are a `share` of one.
        """
        size = max(1, int((self.size or batch_size // self.fabric.world_size) * share))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _accumulate(self, module: _FabricModule, count: int, losses: Losses) -> dict[str, Tensor]:
        module.zero_grad(set_to_none=True)
        size = min(self.size or count, count)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.fabric.device))
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            share = (rows.stop - rows.start) / count
            # Whether gradients are exchanged is decided as the network is asked
            with self.fabric.no_backward_sync(module, enabled=rows.stop < count and self.fabric.world_size > 1):
                loss, named = losses(rows)
                self.fabric.backward(loss * share)
            for name, value in named.items():
                sums[name] = sums[name] + value.detach() * share
        return dict(sums)

    def _halve(self, count: int, said: str) -> None:
        size = min(self.size or count, count)
        if size == 1:
            raise UserError(
                f"the GPU has no room for one image in training ({said}). Set gradient_checkpointing: true in the"
                " section of this network, use fewer channels or a coarser preprocess.spacing_mm, or run on a GPU with"
                " more memory."
            )
        self.size = max(1, size // 2)
        if self._memory is not None:
            write_atomic(self._memory, f"{self.size}\n".encode())
        if self.fabric.world_size > 1:
            raise UserError(
                f"out of memory with {size} images at a time in each process ({said}). Start it again: it goes on with"
                f" {self.size}."
            )
        log.warning(
            "out of memory with %d images at a time (%s); going on with %d, the batch stays %d",
            size,
            said,
            self.size,
            count,
        )
