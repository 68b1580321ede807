"""Section `covariates`: what images are conditioned on."""

import math
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from meddiff_steps.config.base import Name, Section, Text

_DESCRIPTION = (
    "One sentence for data dictionaries; its beginning, up to the first bracket or stop, names the covariate in the "
    "report. Correcting it trains nothing again."
)


def level_text(level: Any) -> Any:
    """A level that is written as a number, as text; anything else as it is."""
    if isinstance(level, bool) or not isinstance(level, (int, float)):
        return level
    return str(int(level)) if float(level).is_integer() else repr(level)


class ContinuousCovariate(Section):
    """A number with a unit, for example age in years."""

    unit: Text = Field(
        description="Unit of the column, for example `year` or `mL`. Shown beside values; correcting it trains "
        "nothing again."
    )
    range: tuple[float, float] = Field(description="Smallest and largest plausible value; anything outside is refused.")
    column: str | None = Field(None, description="Column in the source table; the covariate's own name by default.")
    description: Text = Field("", description=_DESCRIPTION)

    @model_validator(mode="after")
    def _range_is_ordered(self) -> Self:
        low, high = self.range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"range must be [low, high] with low < high, found [{low:g}, {high:g}]")
        return self


class CategoricalCovariate(Section):
    """A label from a fixed list, for example sex."""

    levels: list[str] = Field(min_length=2, description="All labels that may occur, as written in the source table.")
    column: str | None = Field(None, description="Column in the source table; the covariate's own name by default.")
    description: Text = Field("", description=_DESCRIPTION)

    @field_validator("levels", mode="before")
    @classmethod
    def _levels_are_text(cls, value: Any) -> Any:
        return [level_text(level) for level in value] if isinstance(value, list) else value

    @field_validator("levels")
    @classmethod
    def _levels_are_unique(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError(f"levels must be distinct, found {value}")
        for level in value:
            if level == "n/a" or level != level.strip() or len(level.splitlines()) != 1:
                raise ValueError(
                    f"{level!r} cannot be a level: n/a and an empty cell are missing values, and cells of tables have"
                    " no blanks around them and no line breaks"
                )
        return value


def _covariate_kind(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "categorical" if isinstance(value, CategoricalCovariate) else "continuous"
    return "categorical" if "levels" in value else "continuous" if {"unit", "range"} & set(value) else None


Covariate = Annotated[
    Annotated[ContinuousCovariate, Tag("continuous")] | Annotated[CategoricalCovariate, Tag("categorical")],
    Discriminator(
        _covariate_kind,
        custom_error_type="covariate_kind",
        custom_error_message="give `levels` (a label) or `unit` and `range` (a number)",
    ),
]
Covariates = dict[Name, Covariate]
