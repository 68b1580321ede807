"""Section `few_step`: a student of the diffusion model that draws in a few steps."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import NetworkOptimiser, Section


class FewStepOptimiser(NetworkOptimiser):
    """Training of the student: of each halving of `progressive`, of each doubling of `consistency`."""

    steps: Annotated[
        int,
        Field(ge=1, description="Gradient steps of each halving or doubling. Too few blur."),
    ] = 1500
    batch_size: Annotated[
        int, Field(ge=1, description="Latents per gradient step, of all GPUs together. Bounds memory.")
    ] = 32
    learning_rate: Annotated[
        float,
        Field(gt=0.0, description="Largest step size. A third of the teacher's: a student begins with its weights."),
    ] = 1e-3


class FewStep(Section):
    """A student distilled from the diffusion model, guidance included, that draws in a few steps. Off by default.

    With `generate.sampler` of the same name the student draws the cohort; without, it stands beside its teacher in the
    target `sampler_study`.
    """

    method: Literal["progressive", "consistency"] | None = Field(
        None,
        description="`progressive`: each halving learns to take two steps of the one before in one (Salimans and Ho "
        "2022). `consistency`: every state leads to where its neighbour on the teacher's path does (Song et al. 2023), "
        "between ever more levels; "
        "one student for any number of steps. `null`: no student.",
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=32)] = Field(
        4, description="Steps that the student is for. `progressive` knows no other number."
    )
    teacher_steps: Annotated[int, Field(ge=2, le=64)] = Field(
        32,
        description="Steps of the teacher that it learns from: `num_inference_steps` doubled, once or several times.",
    )
    optimiser: FewStepOptimiser = Field(FewStepOptimiser(), description="Training of the student.")

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.teacher_steps not in [self.num_inference_steps * 2**k for k in range(1, 7)]:
            raise ValueError(
                f"teacher_steps must be num_inference_steps={self.num_inference_steps} doubled once or several times,"
                f" found {self.teacher_steps}"
            )
        return self
