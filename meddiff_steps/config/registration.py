"""Section `registration`: scans of several people brought onto each other."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import (
    Count,
    Name,
    NetworkOptimiser,
    NoOrPathPattern,
    PositiveFloat,
    PositiveInt,
    Section,
    Weight,
)


class RegistrationOptimiser(NetworkOptimiser):
    """Training of a registration network."""

    steps: Annotated[
        int, Field(ge=1, description="Gradient steps. More until the held-out loss is flat; both networks take them.")
    ] = 2000
    batch_size: Annotated[int, Field(ge=1, description="Pairs of scans per gradient step. Bounds memory.")] = 2


class PairRegistration(Section):
    """Scans brought onto scans by a deformation that a score network's features are told of (DiffuseMorph).

    Beside a plain network, demons and an affine transform.  Off without `pairs`.
    """

    pairs: Count = Field(
        0,
        description="Pairs of test scans that are registered and judged, one scan of each person: each, by its id, is "
        "moved onto the next, and the last onto the first. 0: nothing is registered.",
    )
    labels: NoOrPathPattern = Field(
        None,
        description="Path of a scan's label map, with {subject_id}, {session_id}, {scan_id} in it; same world space as "
        "the scan. Without it nothing says whether structures come to lie on each other.",
    )
    structures: dict[Name, list[PositiveInt]] = Field(
        {}, description="Labels of each structure whose overlap is told; all labels of a pair are judged besides."
    )
    reduce: PositiveInt = Field(
        2,
        description="Voxels along each axis that networks see as one, their mean; the deformation is that of all "
        "voxels. 1 on a GPU.",
    )
    channels: list[PositiveInt] = Field(
        [32, 64, 64],
        min_length=2,
        description="Features at half of the reduced resolution, a quarter, ...; deformations are found at each of "
        "them.",
    )
    score_weight: Weight = Field(0.1, description="Of the loss of the score beside that of the deformation.")
    smoothness: Weight = Field(
        1.0, description="Of the bending energy of the velocity. More: smoother, fewer folds, less overlap."
    )
    window: PositiveInt = Field(
        5, description="Reduced voxels along each side of the windows whose correlation is made large; odd."
    )
    shares: list[Annotated[float, Field(ge=0.0, le=1.0)]] = Field(
        [0.25, 0.5, 0.75],
        description="Shares of the feature that scans are deformed by, between the moving scan (0) and the whole "
        "deformation (1), which is always told.",
    )
    oracle_mm: PositiveFloat = Field(
        8.0, description="Largest displacement of the known deformations that are to be found again, about."
    )
    optimiser: RegistrationOptimiser = Field(
        RegistrationOptimiser(), description="Training of the network with a score, and of the plain one."
    )

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if self.window % 2 == 0:
            raise ValueError(f"`window` has a middle voxel, so it is odd; found {self.window}")
        if self.structures and self.labels is None:
            raise ValueError("`structures` are labels of `labels`; say where these lie, or leave both out")
        empty = [name for name, labels in self.structures.items() if not labels]
        if empty:
            raise ValueError(f"`structures` have labels, {empty[0]} has none; name some, or leave it out")
        if sorted(set(self.shares)) != self.shares:
            raise ValueError(f"`shares` rise and differ, found {self.shares}")
        return self
