"""The drawing decoder as everything else sees it: what a decoded image leaves open, drawn."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.core.registries import DRAWING_DECODERS
from meddiff_steps.models.tone import ToneCurve


class DrawingDecoder(nn.Module):
    """Draws an image from p(image | decoded image); a variant derives from it.

    A first stage gives the mean of all images that a latent can mean, and a mean is soft.

    Attributes
    ----------
    tone
        Grey levels of what is drawn, the last thing that `draw` does; fitted after training.
    """

    tone: ToneCurve

    def draw(self, decoded: Tensor, noise: Tensor, num_inference_steps: int, slab: int | None = None) -> Tensor:
        """One draw, float32 (b, 1, *spatial) in [0, 1].

        Parameters
        ----------
        decoded
            Images of a first stage, (b, 1, *spatial), clipped to [0, 1].
        noise
            Standard normal, of the same shape: all that is random in it.
        num_inference_steps
            Evaluations of the network; more draw better, and take longer.
        slab
            Planes of the first axis that are computed at a time, for less memory; the same but for rounding.
        """
        raise NotImplementedError

    def step(self, decoded: Tensor) -> Tensor:
        """One evaluation of the network in drawing from `decoded` (b, 1, *spatial); what it costs is counted on it."""
        raise NotImplementedError

    @property
    def costly(self) -> list[nn.Module]:
        """The parts that take nearly all of the time: what is worth compiling."""
        raise NotImplementedError


def build(settings: config.Decoder, image_shape: Sequence[int]) -> DrawingDecoder:
    """The decoder that `settings.network` names, with fresh weights, for images (1, *spatial)."""
    assert settings.network is not None, "this study has no drawing decoder"
    return DRAWING_DECODERS.load(settings.network).build(settings, image_shape)
