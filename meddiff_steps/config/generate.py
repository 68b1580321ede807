"""Section `generate`: how images are drawn."""

from typing import Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import PositiveInt, Section, Weight
from meddiff_steps.config.choices import Sampler


class Generate(Section):
    """How synthetic images are drawn from the trained model; all of it is in the recipe of every image."""

    sampler: Sampler = Field(
        "dpmpp",
        description="How noise becomes an image. `dpmpp` needs the fewest steps for most models; docs/samplers.md "
        "compares them.",
    )
    num_inference_steps: PositiveInt | None = Field(
        None, description="Steps; the sampler's tested default when left out. Fewer are faster and lose spread."
    )
    guidance: Literal["classifier_free", "autoguidance"] = Field(
        "classifier_free",
        description="What `guidance_scale` moves away from: the prediction without covariates (Ho and Salimans 2022), "
        "or that of the same network when it was less trained (Karras et al. 2024b; needs `diffusion.guide_share`).",
    )
    guidance_scale: Weight = Field(
        1.0,
        description="1 is plain conditional sampling (one network pass per step). Above, images follow their "
        "covariates more closely and vary less, for two passes per step.",
    )
    batch_size: PositiveInt = Field(
        16, description="Fixed: it changes the last bits, so it belongs to the recipe; short batches are padded."
    )
    guidance_interval: tuple[Weight, Weight] | None = Field(
        None,
        description="Noise levels, sigma / alpha from above the first to the second, at which `guidance_scale` holds; "
        "elsewhere it is 1, in one pass. Kynkäänniemi et al. 2024 find that the middle ones suffice.",
    )
    drawing_steps: PositiveInt = Field(
        10, description="Steps of the drawing decoder (section `decoder`), each one pass of its network."
    )
    shard_size: PositiveInt = Field(250, description="Subjects per job.")
    decode_batch_size: PositiveInt | None = Field(
        None,
        description="Images decoded at once, which bounds memory; divides `batch_size`, and is all of a batch when "
        "left out. Changes the last bits.",
    )
    decode_slab: PositiveInt | None = Field(
        None,
        description="Where one image is too large to be decoded at once: planes of a slab that layers are computed "
        "in. The same but for rounding, slower.",
    )

    @model_validator(mode="after")
    def _interval_holds_levels(self) -> Self:
        if self.guidance_interval is not None and not self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError(f"guidance_interval: expected [low, high], low < high, found {self.guidance_interval}")
        return self

    @model_validator(mode="after")
    def _decoding_divides(self) -> Self:
        if self.decode_batch_size and self.batch_size % self.decode_batch_size:
            raise ValueError(
                f"decode_batch_size must divide batch_size={self.batch_size}, found {self.decode_batch_size}"
            )
        return self
