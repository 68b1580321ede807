"""How a network that starts from somebody's weights is kept near them: low-rank adapters, and a pull back to the base.

Adapters are written on torch's own parametrisations: the library `peft` needs transformers, accelerate and
huggingface_hub for what is thirty lines here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

#: Layers whose weights get adapters; what normalises, biases and free tensors stay the base's.
ADAPTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LowRank(nn.Module):
    """weight + up @ down, of which only `up` and `down` are trained (LoRA, Hu et al. 2022, equation 3).

    A convolution is taken as the matrix of its outputs by all else.  `up` starts at zero, so that nothing is changed at
    first.  The paper's factor alpha / r is 1: with Adam it is a learning rate.

    Parameters
    ----------
    weight
        Of the base (outputs, inputs, ...).
    rank
        Columns of `up`; at most the smaller side of the matrix.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        rank = min(rank, rows, columns)
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.empty(rank, columns))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The base's weight -> the adapted one, of the same shape."""
        with torch.autocast(weight.device.type, enabled=False):  # as exact as it will be merged
            return weight + (self.up @ self.down).view(weight.shape)


def add_adapters(network: nn.Module, rank: int) -> None:
    """Freeze a network, and give every layer of `ADAPTED` in it an adapter, which alone is trained."""
    network.requires_grad_(False)
    for layer in list(network.modules()):
        if isinstance(layer, ADAPTED):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


@torch.no_grad()
def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """The state of the network that had no adapters, with the weights that they made of the base: the same outputs, to
    the bit.
    """
    state = {name: value for name, value in network.state_dict().items() if ".parametrizations." not in f".{name}"}
    for name, layer in network.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            state[f"{name}.weight" if name else "weight"] = layer.weight
    return state


class Anchor:
    """A pull of trained weights towards those that they started from (L2-SP, Xuhong et al. 2018, equation 3).

    As with weight decay, the gradient of the penalty goes round the optimiser, which would scale it away (Loshchilov
    and Hutter 2019): after a step w moves by learning rate * strength * (start - w).

    Parameters
    ----------
    weights
        On their device, before the first step; those that are not trained are left out.
    strength
        Share of the way back per step and unit of the learning rate; 0: there is no pull, and nothing is kept.
    """

    def __init__(self, weights: Iterable[nn.Parameter], strength: float) -> None:
        self.strength = strength
        self.weights: list[Tensor] = [weight for weight in weights if weight.requires_grad and strength > 0]
        self.starts = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def pull(self, optimiser: Optimizer) -> None:
        """After a step of `optimiser`, whose learning rate it was."""
        if self.weights:
            share = min(1.0, self.strength * optimiser.param_groups[0]["lr"])
            torch._foreach_lerp_(self.weights, self.starts, share)
