"""A decoder in less memory: residual blocks are computed a slab at a time, exactly.

Tiles that are decoded each on its own and blended, the usual way, are not what the network makes of the image: group
normalisation then sees a tile's mean and spread, and edges are padded where there are none.  Here statistics are those
of the whole, and each slab sees the planes beside it, so that only rounding differs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import Tensor, nn
from torch.nn import functional


def decode_in_slabs(decoder: nn.Module, z: Tensor, planes: int) -> Tensor:
    """`decoder(z)`, (b, c, *spatial), of MONAI's AutoencoderKL; a residual block's float32 copies exist for `planes`
    planes of the first spatial axis only.
    """
    for block in decoder.get_submodule("blocks").children():
        z = _residual(block, z, planes) if isinstance(block, AEKLResBlock) else block(z)
    return z


def _slabs(length: int, planes: int) -> Iterator[slice]:
    return (slice(start, min(start + planes, length)) for start in range(0, length, planes))


def _residual(block: AEKLResBlock, x: Tensor, planes: int) -> Tensor:
    h = _normalised_convolution(block.norm1, block.conv1, x, planes)
    h = _normalised_convolution(block.norm2, block.conv2, h, planes)
    for slab in _slabs(x.shape[2], planes):
        h[:, :, slab] += block.nin_shortcut(x[:, :, slab])  # looks at single voxels
    return h


def _normalised_convolution(norm: nn.GroupNorm, convolution: nn.Module, x: Tensor, planes: int) -> Tensor:
    """convolution(silu(norm(x))) for a convolution of width 3 with zeros around."""
    gain, shift = _affine(norm, x, planes)
    out: Tensor | None = None
    for slab in _slabs(x.shape[2], planes):
        low, high = max(slab.start - 1, 0), min(slab.stop + 1, x.shape[2])
        y = convolution(functional.silu(x[:, :, low:high].float() * gain + shift))[
            :, :, slab.start - low : slab.stop - low
        ]
        if out is None:
            layout = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
            out = torch.empty((*y.shape[:2], *x.shape[2:]), dtype=y.dtype, device=y.device, memory_format=layout)
        out[:, :, slab] = y
    assert out is not None
    return out


def _affine(norm: nn.GroupNorm, x: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """What group normalisation multiplies and adds, float32 (b, c, 1, ...), from the statistics of all of x (two
    passes, float64 sums).
    """
    count = x[0].numel() // norm.num_groups

    def over_groups(center: Tensor | float, power: int) -> Tensor:
        total = torch.zeros(len(x), norm.num_groups, 1, dtype=torch.float64, device=x.device)
        for slab in _slabs(x.shape[2], planes):
            grouped = x[:, :, slab].float().reshape(len(x), norm.num_groups, -1)
            total += (grouped - center).pow(power).sum(2, keepdim=True, dtype=torch.float64)
        return total / count

    mean = over_groups(0.0, 1).float()
    deviation = (over_groups(mean, 2) + norm.eps).sqrt().float()
    shape, each = (len(x), -1, *[1] * (x.ndim - 2)), x.shape[1] // norm.num_groups
    gain = norm.weight.float() / deviation.repeat_interleave(each, 1)[..., 0]
    shift = norm.bias.float() - mean.repeat_interleave(each, 1)[..., 0] * gain
    return gain.reshape(shape), shift.reshape(shape)
