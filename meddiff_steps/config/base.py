"""What all sections share: their class, types of values, marks on keys, and a walk over all keys."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
#: mm along the axes of a 3D grid: one number for all three, or three.
Spacing = PositiveFloat | tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
Alphanumeric = Annotated[str, Field(pattern=r"^[A-Za-z0-9]+$")]
#: A value of a covariate: a number, or a level.
Scalar = float | int | str
#: Of the keys `scans` of applications, which have `most_scans` beside them.
SCANS = (
    "Scans by their `scan_id` in the manifest; when left out `most_scans` of the test split, as many of each subject as"
    " can be."
)


def per_axis(spacing: float | Sequence[float]) -> tuple[float, float, float]:
    """A `Spacing` along each of three axes."""
    x, y, z = [spacing] * 3 if isinstance(spacing, (int, float)) else spacing
    return x, y, z


@dataclass(frozen=True)
class Mark:
    """Something about a key that is said once, where the key is declared."""

    name: str


#: The key is a text for people. A stage is given it only where STAGES names it, so that correcting it trains nothing
#: again.
TEXT = Mark("text")
#: The key is a path on the user's machine, which nothing that is published may show.
PATH = Mark("path")
Text = Annotated[str, TEXT]

#: What only a shell expands, what Snakemake takes for a wildcard, and what no name of a file should hold.
_NO_PATH = (
    (r"^$", "is empty"),
    (r"^~", "begins with ~, which only a shell expands"),
    (r"\$[A-Za-z_{]", "has $, which only a shell expands"),
    (r"^-", "begins with -, which programs take for an option"),
    (r"[\x00-\x1f\x7f]", "has a line break, a tab or another control character"),
)
_BRACES = (r"[{}]", "has braces, which Snakemake takes for a wildcard")


def _path(value: str | None, refused: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, problem in refused:
        if value is not None and re.search(pattern, value):
            raise ValueError(f"the path {problem}. Write it out, as `ls` shows it, or rename the folder")
    return value


def local_path(value: str | None) -> str | None:
    """A path that means the same to everything that reads it, blanks and quotes included.

    Raises
    ------
    ValueError
        It does not.
    """
    return _path(value, (*_NO_PATH, _BRACES))


def path_pattern(value: str | None) -> str | None:
    """The same of a path with fields in braces."""
    return _path(value, _NO_PATH)


LocalPath = Annotated[str, PATH, Field(min_length=1), AfterValidator(local_path)]
NoOrLocalPath = Annotated[str | None, PATH, AfterValidator(local_path)]
PathPattern = Annotated[str, PATH, Field(min_length=1), AfterValidator(path_pattern)]
NoOrPathPattern = Annotated[str | None, PATH, AfterValidator(path_pattern)]


class Section(BaseModel):
    """A part of a study: unknown keys are refused, values cannot change after validation."""

    # Built when first used: the workflow, parsed anew in every job, starts sooner.  A number where a text is expected
    # is its digits: `yaml_files` reads as numbers only what is written back just so.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, coerce_numbers_to_str=True)


class Optimiser(Section):
    """How a network is trained; what a study leaves out keeps its default."""

    steps: Annotated[
        int, Field(ge=1, description="Gradient steps. More for larger cohorts, until the validation loss is flat.")
    ]
    batch_size: Annotated[
        int, Field(ge=1, description="Images per gradient step, of all GPUs together. Bounds memory.")
    ]
    learning_rate: Annotated[
        float, Field(gt=0.0, description="Largest step size of AdamW. Lower it where the loss jumps.")
    ]
    warmup_steps: Annotated[
        int,
        Field(ge=0, description="Steps over which the learning rate rises from 0; it then falls to 0 along a cosine."),
    ] = 50
    gradient_clip: PositiveFloat = Field(1.0, description="Largest gradient norm.")
    log_every: PositiveInt = Field(25, description="Steps that one point of the training curve averages.")
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="Decay per step of the averaged weights that are released; 1 - 5 / `steps` when left out."
    )
    checkpoint_every: PositiveInt = Field(250, description="Steps between resumable checkpoints.")
    validate_every: Annotated[int, Field(ge=1, description="Steps between validation losses.")] = 200

    @property
    def averaging(self) -> float:
        """Decay per step of the averaged weights."""
        return max(0.0, 1.0 - 5.0 / max(self.steps, 1)) if self.ema_decay is None else self.ema_decay


class NetworkOptimiser(Optimiser):
    """How a network that makes images is trained."""

    method: Literal["muon", "adamw"] = Field(
        "muon",
        description="Muon orthogonalises the steps of convolutions and needs a tenth of the steps here; AdamW is the "
        "usual one, with a third of the learning rate.",
    )
    learning_rate: Annotated[float, Field(gt=0.0, description="Largest step size. Lower it where the loss jumps.")] = (
        3e-3
    )
    warmup_steps: Annotated[
        int,
        Field(ge=0, description="Steps over which the learning rate rises from 0; it then falls to 0 along a cosine."),
    ] = 30


# --------------------------------------------------------------------------------------------- a walk over keys

#: Where a key is: the names that lead to it, "*" for any name of a mapping; lists have no name of their own.
Keys = tuple[str, ...]


def models_in(annotation: Any) -> Iterator[tuple[Keys, type[BaseModel]]]:
    """The models that a key of this type may hold, each with a "*" per mapping on the way."""
    origin = get_origin(annotation)
    if origin is None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield (), annotation
    elif origin is dict:
        for keys, model in models_in(get_args(annotation)[1]):
            yield ("*", *keys), model
    else:
        for argument in get_args(annotation)[: 1 if origin is Annotated else None]:
            yield from models_in(argument)


def fields_of(model: type[BaseModel], keys: Keys = ()) -> Iterator[tuple[Keys, FieldInfo]]:
    """Every key below a model, with where it is."""
    for name, field in model.model_fields.items():
        yield (*keys, name), field
        for below, inner in models_in(field.annotation):
            yield from fields_of(inner, (*keys, name, *below))


def marked(model: type[BaseModel], mark: Mark) -> frozenset[Keys]:
    """Where the keys with a mark are."""
    return frozenset(keys for keys, field in fields_of(model) if mark in field.metadata)


def replaced(
    content: dict[str, Any], places: Collection[Keys], by: str, but: Collection[str] = frozenset()
) -> dict[str, Any]:
    """A copy of a study's content in which the values at some places are `by`; what is null or among `but` stays."""

    def copy(value: Any, below: frozenset[Keys]) -> Any:
        if not below:
            return value
        if isinstance(value, dict):
            return {
                key: copy(item, frozenset(keys[1:] for keys in below if keys and keys[0] in (key, "*")))
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [copy(item, below) for item in value]
        return by if () in below and value is not None and value not in but else value

    copied: dict[str, Any] = copy(content, frozenset(places))
    return copied
