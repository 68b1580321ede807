"""Sections `cohort` and `splits`: where real scans come from, and which subjects are kept for what."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from meddiff_steps.config.base import Fraction, LocalPath, NoOrLocalPath, PositiveFloat, PositiveInt, Section


def _as_text(value: Any) -> Any:
    """A label of BIDS that looks like a number, for example a run, is text."""
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Label = str | None
Labels = Annotated[Label | Annotated[list[Label], Field(min_length=1)], BeforeValidator(_as_text)]

AlikeIds = Annotated[
    Literal["refuse", "join", "distinct"],
    Field(
        description="Ids that differ only in capitals, leading zeros, number format or Unicode form (`sub-1` and "
        "`sub-01`): `refuse` stops, `join` takes them for one person, who is called by the first as sorted, "
        "`distinct` for several. Path patterns are filled in with the id as it was written."
    ),
]


#: Levels of the simulator's categorical covariates, with what they mean.
SIMULATED_LEVELS: dict[str, dict[str, str]] = {
    "sex": {"F": "female", "M": "male"},
    "diagnosis": {"control": "no disease", "case": "wider sulci and ventricles than age and sex explain, on average"},
}


class SimulatedSource(Section):
    """A simulated brain cohort from the MNI152 templates that ship with nilearn (no data needed)."""

    source: Literal["simulated"] = Field("simulated", description="Chooses this kind of cohort.")
    subjects: Annotated[int, Field(ge=20, le=1_000_000)] = Field(600, description="Subjects, one scan of each.")
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        (32, 40, 32), description="Voxels of a scan along its three axes."
    )
    spacing_mm: PositiveFloat = Field(
        5.0, description="Edge of a voxel in mm; shape times spacing must hold a head, about 160 x 200 x 160 mm."
    )
    case_share: Fraction = Field(0.2, description="Share of subjects with the simulated diagnosis.")
    missing_share: Fraction = Field(
        0.02, description="Share of age values left out, so that missing values are exercised."
    )
    contrasts: list[Literal["T2w", "FLAIR"]] = Field(
        [], description="Further images of every scan, sub-*_T2w.nii.gz beside sub-*_T1w.nii.gz."
    )
    labels: bool = Field(
        False, description="Write derivatives/truth/sub-*/anat/sub-*_dseg.nii.gz, the tissue of each voxel (dseg.tsv)."
    )
    lesion_share: Fraction = Field(
        0.0,
        description="Share of subjects with a lesion, some 2 to 24 mL of white matter that is dark in T1w and bright "
        "in T2w and FLAIR. Above 0, sub-*_label-lesion_mask.nii.gz beside the label maps marks it.",
    )


class BidsSource(Section):
    """A BIDS dataset: images under sub-*/[ses-*/]DATATYPE, covariates in participants.tsv and sessions.tsv."""

    source: Literal["bids"] = Field(description="Chooses this kind of cohort.")
    root: LocalPath = Field(
        description="Directory that holds dataset_description.json; relative paths start at the working directory."
    )
    datatype: str = Field("anat", description="Folder of a subject or session that its images lie in.")
    suffix: str = Field("T1w", description="Last part of image names, which says what they show: sub-01_T1w.nii.gz.")
    entities: dict[str, Labels] = Field(
        {},
        description="Entities that an image name must carry, for example {acq: mprage}; null where it must not carry "
        "one ({space: null}), a list where several will do. Runs, echoes and other indices compare as numbers.",
    )
    alike_ids: AlikeIds = "refuse"


class TableSource(Section):
    """A CSV, TSV or Parquet table with one row per image and a column of paths."""

    source: Literal["table"] = Field(description="Chooses this kind of cohort.")
    table: LocalPath = Field(description="The table; relative paths start at the working directory.")
    path_column: str = Field("path", description="Column with the path of each image.")
    subject_column: str = Field(
        "subject_id", description="Column that says whom the image shows; splits are made by it."
    )
    root: NoOrLocalPath = Field(
        None, description="Directory that relative image paths start at; the table's own by default."
    )
    alike_ids: AlikeIds = "refuse"


CohortSource = Annotated[SimulatedSource | BidsSource | TableSource, Field(discriminator="source")]


class Splits(Section):
    """Shares of subjects; a subject's split is a stable hash of its id, so newcomers move nobody."""

    train: Fraction = Field(0.75, description="Subjects that all networks learn from; must be above 0.")
    val: Fraction = Field(0.05, description="Subjects that trainings are watched and choices are made on.")
    calibration: Fraction = Field(
        0.1,
        description="Subjects that the privacy filter takes its thresholds from. At the default `privacy.level` they "
        "must be at least 59, or it rejects nothing and the run stops before the release.",
    )
    test: Fraction = Field(0.1, description="Subjects that every figure is reported on; must be above 0.")

    @model_validator(mode="after")
    def _shares_add_up(self) -> Self:
        total = self.train + self.val + self.calibration + self.test
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"train + val + calibration + test must be 1, found {total:g}")
        if self.train == 0 or self.test == 0:
            raise ValueError("train and test must both be above 0: every figure is reported on held-out subjects")
        return self
