"""Section `compute`: what the machine is asked for."""

from typing import Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import PositiveInt, Section


class Compute(Section):
    """What the machine is asked for; docs/gpu.md says what each key does."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where networks run. `auto`: on a GPU where there is one; `cuda`: refuse to run without."
    )
    devices: PositiveInt = Field(1, description="GPUs (or processes) per training job. Changes the last bits.")
    precision: Literal["auto", "32-true", "bf16-mixed"] = Field(
        "auto", description="Around the networks only; `auto` takes bf16 where the hardware has it."
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile with static shapes, minutes once per job. `auto`: in trainings on a GPU; `true`: "
        "also where images are encoded and generated, worth it above some thousand images; `false`: nowhere. "
        "Changes the last bits.",
    )
    cuda_graphs: bool = Field(
        False,
        description="With `compile: true`, on a GPU: generation replays recorded CUDA graphs; for small images, "
        "which leave a GPU waiting.",
    )
    autotune: bool = Field(
        False,
        description="In trainings on a GPU, cuDNN times its convolutions and takes the fastest; a repeated training "
        "may then differ in the last bits.",
    )

    @model_validator(mode="after")
    def _graphs_are_compiled(self) -> Self:
        if self.cuda_graphs and self.compile is not True:
            raise ValueError("cuda_graphs needs compile: true")
        return self
