"""How the generative networks take their steps: Muon on convolutions, AdamW on all else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meddiff_steps.compute.device import adamw
from meddiff_steps.config import NetworkOptimiser

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricModule

#: A matrix with fewer rows or columns has no directions worth making equal.
SMALLEST_SIDE = 8

#: Decay of the weights of convolutions per step, as a share of the learning rate.
WEIGHT_DECAY = 0.01


class ConvolutionMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) on the weights of convolutions, each as a matrix of outputs by all else.

    torch's takes matrices alone.  The step of a matrix has the size that AdamW's would have (Liu et al. 2025), so that
    both share a learning rate.

    Parameters
    ----------
    weights
        Convolutions' weights (outputs, inputs, ...), already on their device: what is stepped shares their memory.
    """

    def __init__(self, weights: Iterable[nn.Parameter], learning_rate: float) -> None:
        self.weights = list(weights)
        matrices = [as_matrix(weight.detach()) for weight in self.weights]
        super().__init__(matrices, lr=learning_rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
        self.matrices = matrices

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else as_matrix(weight.grad)
        return super().step(closure)


def as_matrix(weight: Tensor) -> Tensor:
    """(outputs, inputs, *kernel) as (outputs, the rest), sharing its memory, in whichever layout it is stored."""
    return weight.flatten(1) if weight.is_contiguous() else weight.movedim(1, -1).view(len(weight), -1)


def set_up(
    model: nn.Module, settings: NetworkOptimiser, fabric: Fabric
) -> tuple[_FabricModule, dict[str, torch.optim.Optimizer]]:
    """The model as it is called in training, on its device, and the optimisers of its trainable weights by name."""
    fabric.to_device(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [w for w in trained if settings.method == "muon" and w.ndim > 2 and _is_wide(w)]
    taken = {id(weight) for weight in matrices}
    made: dict[str, torch.optim.Optimizer] = {
        "others": adamw([weight for weight in trained if id(weight) not in taken], settings.learning_rate, fabric)
    }
    if matrices:
        made["matrices"] = ConvolutionMuon(matrices, settings.learning_rate)
    net, *wrapped = fabric.setup(model, *made.values())
    return net, dict(zip(made, wrapped, strict=True))


def _is_wide(weight: Tensor) -> bool:
    return min(len(weight), weight[0].numel()) >= SMALLEST_SIDE
