"""Layers that the light networks are made of, in 2D and 3D.

None of them looks further than its kernel: normalisation is over the channels of one place.  So a network of them says
the same of a place whatever lies far away, a crop of an image trains what the whole image is drawn with, and an image
can be computed in slabs.  It is also what a processor does fastest: a third of a step went into group normalisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps.compute.device import channels_last


def convolution(spatial_dims: int, inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d | nn.Conv3d:
    """Kernels of three voxels along each axis, zeros around the image."""
    kind = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
    return kind(inputs, outputs, 3, stride=stride, padding=1)


def silence(layer: nn.Conv2d | nn.Conv3d | nn.Linear) -> None:
    """Let a layer give zeros until it is trained."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def coordinates(shape: Sequence[int]) -> Tensor:
    """Where each voxel lies, from -1 at the first to 1 at the last along each axis; float32 (d, *shape)."""
    axes = [torch.linspace(-1.0, 1.0, n) if n > 1 else torch.zeros(1) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each place (Ba et al. 2016), with gain and bias; (b, c, *spatial)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        # Channels-last, as images are stored here, this moves nothing.
        return functional.layer_norm(x.movedim(1, -1), weight.shape, weight, bias).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """x + convolution(silu(norm(convolution(silu(norm(x)))))); starts as the identity (He et al. 2016).

    Parameters
    ----------
    spatial_dims
        2 or 3.
    channels
        In and out.
    embedding
        Width of a vector that scales and shifts the second normalisation (Perez et al. 2018, FiLM); 0: there is none.
    """

    def __init__(self, spatial_dims: int, channels: int, embedding: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1, self.conv2 = (convolution(spatial_dims, channels, channels) for _ in range(2))
        self.modulation = nn.Linear(embedding, 2 * channels) if embedding else None
        silence(self.conv2)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x (b, channels, *spatial), embedding (b, width) -> as x."""
        h = self.norm2(self.conv1(functional.silu(self.norm1(x))))
        if self.modulation is not None:
            gain, shift = self.modulation(embedding).to(h.dtype).unflatten(1, (-1, *[1] * (x.ndim - 2))).chunk(2, 1)
            h = torch.addcmul(h + shift, h, gain)
        return x + self.conv2(functional.silu(h))


def dense(x: Tensor) -> Tensor:
    """x (b, c, *spatial) with its channels together in memory, which convolutions like."""
    return x.contiguous(memory_format=channels_last(x.ndim - 2))


def by_slabs(
    network: Callable[..., Tensor], inputs: Sequence[Tensor], planes: int, reach: int, factor: int = 1
) -> Tensor:
    """network(*inputs) of local layers, a slab of the first spatial axis at a time; the same but for rounding.

    Parameters
    ----------
    network
        From tensors (b, ., *spatial) to one that is `factor` times as large along every axis.
    planes
        Of a slab, in planes of the inputs.
    reach
        Planes to either side that a place's output depends on, at most.
    """
    length, parts = inputs[0].shape[2], []
    for start in range(0, length, planes):
        low, high = max(start - reach, 0), min(start + planes + reach, length)
        made = network(*(dense(x[:, :, low:high]) for x in inputs))
        parts.append(made[:, :, (start - low) * factor : (min(start + planes, length) - low) * factor])
    return torch.cat(parts, 2)
