"""Section `shape_completion`: shapes with a defect, completed by a diffusion of points."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import NoOrLocalPath, Optimiser, PositiveFloat, PositiveInt, Section


class ShapeOptimiser(Optimiser):
    """Training of the diffusion of points."""

    steps: Annotated[int, Field(ge=1, description="Gradient steps. More until the held-out loss is flat.")] = 1500
    batch_size: Annotated[int, Field(ge=1, description="Shapes per gradient step. Bounds memory.")] = 16
    learning_rate: Annotated[float, Field(gt=0.0, description="Largest step size. Lower it where the loss jumps.")] = (
        2e-3
    )


class ShapeCompletion(Section):
    """What is missing of a shape, drawn as points, given what is left (PCDiff).

    Beside the nearest training shape.  Off without `points`.
    """

    points: NoOrLocalPath = Field(
        None,
        description="Shapes (.npz): `points_mm` (n, p, 3) on their surfaces, one frame for all; `missing`, bool "
        "(n, p), as many of each; `ids`.",
    )
    test_every: Annotated[int, Field(ge=2)] = Field(
        4, description="Every so many shapes one is for testing alone, from the first on."
    )
    known: PositiveInt = Field(192, description="Points of what is left that the network looks at, drawn among them.")
    drawn: PositiveInt = Field(
        96, description="Missing points per shape in training; all are drawn in use. More cost more."
    )
    channels: Annotated[int, Field(ge=16, multiple_of=16)] = Field(64, description="Features of a point.")
    blocks: PositiveInt = Field(3, description="Blocks of attention among points, and to what is left.")
    samples: Annotated[int, Field(ge=1)] = Field(
        5, description="Draws for each shape. The one that is most like the others is the completion."
    )
    num_inference_steps: PositiveInt = Field(25, description="Levels of noise.")
    voxel_mm: PositiveFloat = Field(1.0, description="Voxels of the masks that points become.")
    closing_mm: PositiveFloat = Field(
        4.0, description="Gaps between points that masks close; about three times their distance."
    )
    optimiser: ShapeOptimiser = Field(ShapeOptimiser(), description="Training of the diffusion of points.")

    @model_validator(mode="after")
    def _has_voxels(self) -> Self:
        if self.closing_mm < self.voxel_mm:
            raise ValueError(
                f"`closing_mm` ({self.closing_mm:g}) closes nothing below `voxel_mm` ({self.voxel_mm:g}); raise it, or"
                " take finer voxels"
            )
        return self
