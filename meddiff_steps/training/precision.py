"""Mixed precision that leaves the inputs of a network alone."""

from __future__ import annotations

from typing import Any

from lightning_fabric.plugins import MixedPrecision


class Bf16Inside(MixedPrecision):
    """bfloat16 in the products and convolutions of a network, and nowhere else.

    Lightning's own plugin also rounds everything that a network is given to bfloat16, which has 8 significant bits: timestep 999 becomes
    1000, which is none, and an age of 0.503 standard deviations 0.504.  Autocast rounds where it multiplies; the rest stays float32.

    Parameters
    ----------
    device
        "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)

    def convert_input(self, data: Any) -> Any:
        return data
