"""What can be chosen by name, as types of keys: the names are those of the registries."""

from typing import Annotated

from meddiff_steps.core.registries import (
    ANOMALY_MAPS,
    DENOISERS,
    DETECTORS,
    DRAWING_DECODERS,
    FEATURE_SPACES,
    FIRST_STAGES,
    METRICS,
    OPERATORS,
    SAMPLERS,
)
from meddiff_steps.core.registry import Choice

Sampler = Annotated[str, Choice(SAMPLERS)]
FirstStageName = Annotated[str, Choice(FIRST_STAGES)]
DenoiserName = Annotated[str, Choice(DENOISERS)]
DrawingDecoderName = Annotated[str, Choice(DRAWING_DECODERS)]
DetectorName = Annotated[str, Choice(DETECTORS)]
MetricName = Annotated[str, Choice(METRICS)]
OperatorName = Annotated[str, Choice(OPERATORS)]
AnomalyMapName = Annotated[str, Choice(ANOMALY_MAPS)]
FeatureSpaceName = Annotated[str, Choice(FEATURE_SPACES)]
