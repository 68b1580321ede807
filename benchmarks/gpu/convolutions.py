"""Whether bfloat16 convolutions of very large tensors are right and fast on this GPU, with this cuDNN.

Some versions were wrong or slow where a tensor has more than 2^31 numbers, or bytes (pytorch issues 163539, 166122 and
166643).  A batch of images at the published size has as many, so each shape is computed as one batch and image by
image, in bfloat16 and in float32: what a convolution gives for an image must not depend on the batch that it is in.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu.compare import Place
from benchmarks.gpu.record import Allotment, Record, free, synchronise, time_limit
from meddiff_steps.statistics.bootstrap import rounded

#: Shapes (b, c, *spatial), as they are in `latents` at a batch of 8, in autoencoder training at a batch of 4, and with
#: more than 2^31 bytes but fewer numbers.
SHAPES = ((8, 64, 160, 224, 160), (4, 128, 160, 224, 160), (4, 64, 160, 224, 160))
QUICK_SHAPES = ((2, 4, 8, 10, 8),)
#: Error beside float32, as a share of its norm, above which bfloat16 is called wrong: it has 8 significant bits.
LARGEST_ERROR = 0.02
#: How many times longer a batch may take than its images one by one before it is called slow.
SLOWEST = 2.0


def check(shape: tuple[int, ...], device: torch.device, memory_format: torch.memory_format) -> dict[str, Any]:
    """Errors and seconds of one shape in one layout, forward and backward.

    Returns
    -------
    dict
        `output` and `input_gradient`: ||bf16 batch - fp32|| / ||fp32|| of the worst image; `weight_gradient`: the same
        of the sum over images; `alone`: of the output of the first image by itself in bf16; None where something is no
        number.  `wrong`: which of these are too large; `seconds_batch` and `seconds_alone`: forward; `slow`.
    """
    torch.manual_seed(0)
    convolution = nn.Conv3d(shape[1], shape[1], 3, padding=1).to(device, torch.bfloat16, memory_format=memory_format)
    exact = nn.Conv3d(shape[1], shape[1], 3, padding=1).to(device, memory_format=memory_format)
    exact.load_state_dict({name: value.float() for name, value in convolution.state_dict().items()})
    x = torch.empty(shape, device=device, dtype=torch.bfloat16, memory_format=memory_format)
    for image in x:
        image.copy_(torch.randn(shape[1:], device=device))

    def one(i: int) -> Tensor:
        return x[i : i + 1].contiguous(memory_format=memory_format)

    def each() -> None:
        for i in range(len(x)):
            convolution(one(i))

    with torch.no_grad():
        seconds_batch = _seconds(lambda: convolution(x), device)
        seconds_alone = _seconds(each, device)
    x.requires_grad_()
    made = convolution(x)
    # Gradients of the sum of squares: as large a tensor goes back.
    made.backward(made.detach())
    gradient = x.grad
    assert gradient is not None and convolution.weight.grad is not None
    with torch.no_grad():
        first = convolution(one(0))
    apart: dict[str, list[float]] = {"output": [], "input_gradient": [], "weight_gradient": [], "alone": []}
    weights = torch.zeros_like(exact.weight)
    for i in range(len(x)):
        image = one(i).detach().float().requires_grad_()
        expected = exact(image)
        exact.zero_grad()
        # What went back in bfloat16 is what goes back here, so that errors of the way there count once.
        expected.backward(made[i : i + 1].detach().float())
        assert image.grad is not None and exact.weight.grad is not None
        weights += exact.weight.grad
        apart["output"].append(_apart(made[i : i + 1], expected))
        apart["input_gradient"].append(_apart(gradient[i : i + 1], image.grad))
        if i == 0:
            apart["alone"].append(_apart(first, expected))
    apart["weight_gradient"].append(_apart(convolution.weight.grad, weights))
    errors = {name: rounded(float(np.max(values))) for name, values in apart.items()}
    return {
        **errors,
        "wrong": [name for name, error in errors.items() if error is None or error > LARGEST_ERROR],
        "seconds_batch": seconds_batch,
        "seconds_alone": seconds_alone,
        "slow": seconds_batch > SLOWEST * seconds_alone,
    }


@torch.no_grad()
def _apart(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; not a number where something is none."""
    return float((found.float() - expected).norm() / expected.norm())


def _seconds(run: Any, device: torch.device) -> float:
    """Of the second of two calls: the first chooses kernels."""
    for _ in range(2):
        synchronise(device)
        begun = time.perf_counter()
        run()
        synchronise(device)
        seconds = time.perf_counter() - begun
    return seconds


def convolutions(record: Record, case: Place, allotment: Allotment, quick: bool) -> None:
    """Check every shape in both layouts, and write down the version of cuDNN beside it."""
    layouts = {"channels-last": torch.channels_last_3d, "contiguous": torch.contiguous_format}
    end = time.monotonic() + allotment.preparing + allotment.timing
    for shape in QUICK_SHAPES if quick else SHAPES:
        for layout, memory_format in layouts.items():
            where = f"convolution of {'x'.join(map(str, shape))}, {layout}"
            try:
                with time_limit(min(end - time.monotonic(), record.left())):
                    found = check(shape, case.device, memory_format)
                cudnn = record.content["machine"].get("cudnn")
                elements = int(torch.Size(shape).numel())
                record.add(
                    part="convolutions", tensor=list(shape), elements=elements, layout=layout, cudnn=cudnn, **found
                )
            except Exception as error:  # noqa: BLE001 - the next shape may do
                record.fail(where, error)
            free()
