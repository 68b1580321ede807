"""Section `variants`: changed copies of training scans."""

from pydantic import Field

from meddiff_steps.config.base import Count, Fraction, PositiveInt, Section


class Variants(Section):
    """Variants of each training scan, drawn once and encoded with it (variant 0 is always the scan itself).

    The networks are told which variant they see; images are generated as if of scans as they are.
    """

    count: PositiveInt = Field(
        1, description="Variants per training scan, itself included. More where scans are few: 4 to 8 for some hundred."
    )
    flip: bool = Field(
        False,
        description="Mirror left-right in half of the variants, in half of the batches that the segmenter learns "
        "from, and in half of the images of `classical` arms (`downstream`). Sensible for brains, wrong for chests "
        "(the heart has a side) and for structures of one side (`segmentation`: they would swap names).",
    )
    max_shift_voxels: Count = Field(
        0, description="Largest whole-voxel shift per axis; no interpolation, so nothing is blurred."
    )
    shift_latents: bool = Field(
        True,
        description="Encode shifted variants too. Off where scans are registered: autoencoder and drawing decoder "
        "still learn from shifted scans, but the diffusion model need not learn where a head may lie.",
    )
    max_contrast: Fraction = Field(
        0.0, description="Largest share by which grey levels are multiplied up or down; 0.1 is plenty."
    )
