"""How the generative networks take their steps: Muon on convolutions, AdamW on all else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meddiff_steps.compute.device import adamw, cpu_has_bf16
from meddiff_steps.compute.precision import convolve_single_images_fast
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

    torch's takes matrices alone, and multiplies them in bfloat16 on every machine: a processor that has to emulate that
    spends most of a training on it.  The step of a matrix has the size that AdamW's would have (Liu et al. 2025), so
    that both share a learning rate.

    Parameters
    ----------
    weights
        Convolutions' weights (outputs, inputs, ...), already on their device: what is stepped shares their memory.
    products
        What steps are made orthogonal in: bfloat16 or float32.
    """

    def __init__(
        self, weights: Iterable[nn.Parameter], learning_rate: float, products: torch.dtype = torch.bfloat16
    ) -> None:
        self.weights, self.products = list(weights), products
        matrices = [as_matrix(weight.detach()) for weight in self.weights]
        super().__init__(matrices, lr=learning_rate, weight_decay=WEIGHT_DECAY)
        self.matrices = matrices

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # takes no closure
        group = self.param_groups[0]
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            if weight.grad is None:
                continue
            gradient = as_matrix(weight.grad)
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            gradient = gradient.lerp(state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"]), group["momentum"])
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            size = 0.2 * math.sqrt(max(matrix.shape))  # of a step by AdamW (Liu et al. 2025, section 2.2)
            matrix.add_(self._orthogonal(gradient, group), alpha=-group["lr"] * size)

    def _orthogonal(self, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Nearly its polar factor, by Newton-Schulz iteration of the fifth order (Jordan et al. 2024)."""
        a, b, c = group["ns_coefficients"]
        x = gradient.to(self.products)
        x = x.T if len(x) > x.shape[1] else x
        x = x / x.norm().clamp(min=group["eps"])
        for _ in range(group["ns_steps"]):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if len(gradient) > gradient.shape[1] else x


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
        fast = fabric.device.type != "cpu" or cpu_has_bf16()
        made["matrices"] = ConvolutionMuon(matrices, settings.learning_rate, torch.bfloat16 if fast else torch.float32)
    if fabric.device.type == "cpu":
        convolve_single_images_fast(model)
    net, *wrapped = fabric.setup(model, *made.values())
    return net, dict(zip(made, wrapped, strict=True))


def _is_wide(weight: Tensor) -> bool:
    return min(len(weight), weight[0].numel()) >= SMALLEST_SIDE
