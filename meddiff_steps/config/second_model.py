"""Section `second_model`: a model that never saw a real scan."""

from typing import Annotated

from pydantic import Field

from meddiff_steps.config.base import Count, Section


class SecondModel(Section):
    """A second model, trained only on accepted synthetic images, makes the released cohort (Fernandez et al. 2023)."""

    subjects: Count = Field(
        0,
        description="Synthetic subjects of the first model that the second learns from; 0: no second model. As many "
        "as there are training scans, or more.",
    )
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.1, description="Of the accepted ones: those that the second training is validated on."
    )
