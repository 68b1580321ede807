"""Section `preprocess`: from any scan to one grid and one scale."""

import string
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from meddiff_steps.config.base import (
    Fraction,
    LocalPath,
    Name,
    NoOrLocalPath,
    NoOrPathPattern,
    PathPattern,
    PositiveInt,
    Section,
    Spacing,
    per_axis,
)

#: What a path pattern can be filled in with, by scan.
PATTERN_FIELDS = ("subject_id", "session_id", "scan_id")
#: Columns of shards; no channel can have their names.
SHARD_COLUMNS = frozenset(
    [
        "scan_id",
        "sample_id",
        "subject_id",
        "image",
        "reconstruction",
        "split",
        "variant",
        "mean",
        "log_variance",
        "attempt",
    ]
)


class Channel(Section):
    """A further image of each scan, brought to the same grid and stored beside it as a column of its own."""

    path: PathPattern = Field(
        description="Path pattern, with {subject_id}, {session_id} and {scan_id}; the image is in the same world "
        "space as the scan.",
    )
    kind: Literal["contrast", "mask", "labels"] = Field(
        "contrast",
        description="`contrast`: grey values, interpolated and scaled to [0, 1] like the scan; `mask`: 0 outside and "
        "1 inside; `labels`: whole numbers. Masks and labels take what fills most of a voxel.",
    )
    window: tuple[float, float] | None = Field(
        None,
        description="Of a contrast: the grey values that become 0 and 1, in place of `preprocess.percentiles`. So one "
        "CT may be given in several windows.",
    )
    required: bool = Field(
        True, description="`true`: a scan without this image is left out of the study; `false`: it is filled with 0."
    )

    @field_validator("path")
    @classmethod
    def _can_be_filled_in(cls, value: str) -> str:
        try:
            found = {field for _, field, _, _ in string.Formatter().parse(value) if field is not None}
        except ValueError as error:
            raise ValueError(f"{value!r} is no path pattern ({error}); write {{{{ and }}}} for braces") from None
        unknown = sorted(found - set(PATTERN_FIELDS))
        if unknown:
            raise ValueError(f"a pattern has {', '.join(PATTERN_FIELDS)} in braces, found {unknown[0]!r}")
        return value

    @model_validator(mode="after")
    def _window_of_a_contrast(self) -> Self:
        _check_window(self.window)
        if self.window is not None and self.kind != "contrast":
            raise ValueError(f"a window is of grey values, found kind: {self.kind}; leave `window` out")
        return self


def _check_window(window: tuple[float, float] | None) -> None:
    if window is not None and not window[0] < window[1]:
        raise ValueError(f"window must be [low, high] with low < high, found [{window[0]:g}, {window[1]:g}]")


#: The template that comes with a package (nilearn); every other is a path.
MNI152 = "mni152"


class Registration(Section):
    """Every scan in the pose of a template: rotation and translation, or an affine transform, found anew for each."""

    template: LocalPath = Field(
        MNI152,
        description="`mni152` (a brain without skull, in millimetres of MNI space), or the path of a 3D NIfTI volume "
        "that shows what the scans show.",
    )
    transform: Literal["rigid", "affine"] = Field(
        "rigid",
        description="`rigid` keeps the size and shape of heads; `affine` gives all of them the template's, volumes "
        "in millilitres are then no longer those of the scan.",
    )
    max_rotation_deg: Annotated[float, Field(gt=0.0, le=180.0)] = Field(
        45.0, description="A scan that would have to be turned by more is left out."
    )
    min_correlation: Fraction = Field(
        0.8, description="A scan whose grey values correlate less with the template's after registration is left out."
    )


class Preprocess(Section):
    """From any scan to one grid and one intensity scale [0, 1]; defined once, used by every later stage."""

    shape: tuple[PositiveInt, PositiveInt] | tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        (32, 40, 32),
        description="Voxels (3D, axes left-right, posterior-anterior, inferior-superior) or pixels (2D, rows, "
        "columns). Divisible by the reduction of both networks; shape times spacing must hold every scan.",
    )
    spacing_mm: Spacing | None = Field(
        5.0,
        description="Voxel size of the 3D grid in mm: one number, or three along the axes of `shape` where slices are "
        "thick; null for 2D images.",
    )
    colour: Literal["luminance", "red", "green", "blue"] = Field(
        "luminance",
        description="What the grey levels of colour pictures are: their luminance, or one of their channels, where "
        "these are contrasts of their own. Grey pictures and volumes are as they are.",
    )
    depth: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="Pictures in a 3D study: each is repeated so many times along a first axis, its depth, and a pixel "
        "counts as 1 mm, so that a volume can be drawn from what is seen along it (`segmentation_ensemble`). Volumes "
        "among `channels` have that many voxels along theirs. Off by default.",
    )
    interpolation: Literal["auto", "linear", "cubic", "nearest"] = Field(
        "auto",
        description="How grey values come to the grid. `auto`: linear, and cubic splines where a registered scan comes "
        "to a grid that is as fine; `nearest` copies the nearest voxel and smooths nothing.",
    )
    center: Literal["image", "foreground"] = Field(
        "image", description="What the grid is centred on. `foreground` where scans show the head in different places."
    )
    registration: Registration | None = Field(
        None,
        description="Brings every scan into the pose of a template, in whose middle the grid then lies, whatever "
        "`center`. Off by default; leave it off where the cohort is registered already.",
    )
    foreground: Literal["nonzero", "all", "ct"] = Field(
        "nonzero",
        description="Voxels that intensity percentiles are taken over. `nonzero`: all but what surrounds the head, "
        "which is mostly 0; `ct`: what is denser than air, of scans in Hounsfield units; `all` where there is no "
        "background (radiographs).",
    )
    percentiles: tuple[float, float] = Field((0.0, 99.5), description="Mapped to 0 and 1; values outside are clipped.")
    window: tuple[float, float] | None = Field(
        None,
        description="Grey values that become 0 and 1 in every scan, in place of percentiles: of CT in Hounsfield "
        "units, [0, 80] for brain. Null where grey values have no unit, as in MR.",
    )
    bias_field: Literal["n4"] | None = Field(
        None,
        description="`n4` divides each MR scan by the smooth field of its receiving coil (N4ITK) before all else; it "
        "finds next to none where a scan was corrected already. Channels are left as they are.",
    )
    brain_mask: NoOrPathPattern = Field(
        None,
        description="Path pattern of a mask per scan, with {subject_id}, {session_id} and {scan_id}; voxels outside "
        "become 0.",
    )
    brain_extraction: Literal["deepbet"] | None = Field(
        None,
        description="`deepbet` takes the brain out of every T1w scan that shows a skull; scans that show a brain alone "
        "stay as they are. Needs `pip install 'meddiff-steps[brain-extraction]'`. Masks of other tools: `brain_mask`.",
    )
    channels: dict[Name, Channel] = Field(
        {}, description="Further images of each scan, by the name of their column: other contrasts, masks, label maps."
    )
    exclude: NoOrLocalPath = Field(
        None,
        description="Table of scans that were looked at and are not to be learnt from: qc.tsv, with columns `scan_id` "
        "and `decision` (`keep`, `exclude`). By default results/STUDY/qc.tsv, where it is there.",
    )
    shards: Annotated[int, Field(ge=1, le=10_000)] = Field(
        2,
        description="Files, and so jobs, that the scans are divided into; about one per 500 scans, or per 2,000 "
        "where a GPU encodes them.",
    )
    max_failed_share: Fraction = Field(0.05, description="More left-out scans than this stop the study.")

    @field_validator("channels")
    @classmethod
    def _names_are_free(cls, value: dict[str, Channel]) -> dict[str, Channel]:
        taken = sorted(set(value) & SHARD_COLUMNS)
        if taken:
            raise ValueError(f"{taken} are columns that shards already have; call the channels something else")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high = self.percentiles
        if not 0.0 <= low < high <= 100.0:
            raise ValueError(f"percentiles must be 0 <= low < high <= 100, found [{low:g}, {high:g}]")
        _check_window(self.window)
        if (len(self.shape) == 3) != (self.spacing_mm is not None):
            raise ValueError("a 3D shape needs spacing_mm in millimetres, a 2D shape needs spacing_mm: null")
        heads = [key for key in ("registration", "bias_field", "brain_extraction") if getattr(self, key) is not None]
        if self.depth is not None and (len(self.shape) == 2 or heads):
            raise ValueError(
                "depth repeats pictures in a 3D study, found "
                + (f"{heads[0]}, which is of volumes" if heads else f"the 2D shape {list(self.shape)}")
                + "; leave one of both out"
            )
        if self.registration is not None and len(self.shape) == 2:
            raise ValueError(
                "registration turns heads in space and needs a 3D shape with spacing_mm, found the 2D shape "
                f"{list(self.shape)}; leave preprocess.registration out for pictures"
            )
        if self.bias_field is not None and (len(self.shape) == 2 or self.foreground == "ct"):
            raise ValueError(
                "bias_field corrects the receiving coil of MR volumes, found "
                + ("foreground: ct" if len(self.shape) == 3 else f"the 2D shape {list(self.shape)}")
                + "; leave preprocess.bias_field out"
            )
        if self.brain_mask is not None and self.foreground == "ct" and self.window is None:
            raise ValueError(
                "brain_mask of CT (foreground: ct) needs a window, whose lower end stands for what the mask cuts away: "
                "air of -1000 HU would be interpolated into the brain; set preprocess.window, e.g. [0, 80] for brains"
            )
        if self.brain_extraction is not None and self.brain_mask is not None:
            raise ValueError("brain_mask and brain_extraction both say what the brain is; give one of them")
        if self.brain_extraction is not None and (len(self.shape) == 2 or self.foreground != "nonzero"):
            raise ValueError(
                "brain_extraction is for T1w volumes (foreground: nonzero), found "
                + (f"foreground: {self.foreground}" if len(self.shape) == 3 else f"the 2D shape {list(self.shape)}")
                + "; leave it out, or give masks of another tool as preprocess.brain_mask"
            )
        return self

    @property
    def voxel_mm(self) -> tuple[float, float, float] | None:
        """`spacing_mm` along each axis of a 3D grid; None for 2D images."""
        return None if self.spacing_mm is None else per_axis(self.spacing_mm)
