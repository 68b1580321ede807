"""One study, one model: every default, unit and bound of the workflow lives here and nowhere else.

A study is one YAML file.  `load_study` reads and validates it; `freeze` writes what each stage is allowed to
see into content-addressed JSON files; `load_stage` is how a step reads its own.  The JSON Schema for editors
(`config/study.schema.json`) and the reference of keys (`config/keys.md`) are generated from these classes.

A module per section; `study` relates them, `stages` says which stage reads what, `renamed` what keys were called.
"""

from meddiff_steps.config.anomaly import Anomaly
from meddiff_steps.config.autoencoder import Adversarial, Autoencoder, AutoencoderOptimiser, Codebook, Perceptual
from meddiff_steps.config.base import (
    Alphanumeric,
    Fraction,
    Name,
    NetworkOptimiser,
    Optimiser,
    PositiveFloat,
    PositiveInt,
    Scalar,
    Section,
    local_path,
)
from meddiff_steps.config.choices import (
    AnomalyMapName,
    DenoiserName,
    DetectorName,
    DrawingDecoderName,
    FeatureSpaceName,
    FirstStageName,
    MetricName,
    OperatorName,
    Sampler,
)
from meddiff_steps.config.cohort import BidsSource, CohortSource, SimulatedSource, Splits, TableSource
from meddiff_steps.config.compute import Compute
from meddiff_steps.config.cost import Cost
from meddiff_steps.config.counterfactual import Counterfactual
from meddiff_steps.config.covariates import CategoricalCovariate, ContinuousCovariate, Covariate, Covariates
from meddiff_steps.config.decoder import Decoder, DecoderOptimiser
from meddiff_steps.config.diffusion import (
    Conditioning,
    Diffusion,
    DiffusionOptimiser,
    Input,
    Maisi,
    NoiseLevels,
    Published,
    Rare,
)
from meddiff_steps.config.downstream import Arm, Classifier, ClassifierOptimiser, Downstream, Primary, Shift
from meddiff_steps.config.evaluate import Evaluate, FeatureNetwork
from meddiff_steps.config.few_step import FewStep, FewStepOptimiser
from meddiff_steps.config.generate import Generate
from meddiff_steps.config.image_to_image import (
    DrawingNetwork,
    Harmonisation,
    ImageToImage,
    ImageToImageOptimiser,
    SegmentationEnsemble,
    Translation,
    Unpaired,
    UnpairedOptimiser,
)
from meddiff_steps.config.init_from import InitFrom
from meddiff_steps.config.inpainting import Hole, Inpainting, Lesions
from meddiff_steps.config.latents import Latents
from meddiff_steps.config.lineup import Lineup
from meddiff_steps.config.loading import load_study, parse_published, parse_study
from meddiff_steps.config.normative import Normative
from meddiff_steps.config.pairs import Pairs, PairsOptimiser, SegmentationStudy
from meddiff_steps.config.plan import Condition, PlanGroup
from meddiff_steps.config.preprocess import MNI152, Channel, Preprocess, Registration
from meddiff_steps.config.privacy import Embedder, EmbedderOptimiser, Privacy
from meddiff_steps.config.publishing import PATH_KEYS, published, without_paths
from meddiff_steps.config.reconstruction import Reconstruction
from meddiff_steps.config.reference import json_schema, key_reference
from meddiff_steps.config.registration import PairRegistration
from meddiff_steps.config.release import Card, Release
from meddiff_steps.config.sampler_study import SamplerStudy
from meddiff_steps.config.second_model import SecondModel
from meddiff_steps.config.segmentation import Segmentation, SegmenterOptimiser, Structure
from meddiff_steps.config.shape_completion import ShapeCompletion
from meddiff_steps.config.stages import STAGES, TEXT_KEYS, freeze, load_stage, part_of, resolved, stages_of
from meddiff_steps.config.storage import S3, Storage
from meddiff_steps.config.study import RESERVED_COLUMNS, Study
from meddiff_steps.config.text import FreeText
from meddiff_steps.config.variants import Variants
from meddiff_steps.config.yaml_files import given_on_command_line, read_yaml

__all__ = [
    "MNI152",
    "PATH_KEYS",
    "RESERVED_COLUMNS",
    "S3",
    "STAGES",
    "TEXT_KEYS",
    "Adversarial",
    "Alphanumeric",
    "Anomaly",
    "AnomalyMapName",
    "Arm",
    "Autoencoder",
    "AutoencoderOptimiser",
    "BidsSource",
    "Card",
    "CategoricalCovariate",
    "Channel",
    "Classifier",
    "ClassifierOptimiser",
    "Codebook",
    "CohortSource",
    "Compute",
    "Condition",
    "Conditioning",
    "ContinuousCovariate",
    "Cost",
    "Counterfactual",
    "Covariate",
    "Covariates",
    "Decoder",
    "DecoderOptimiser",
    "DenoiserName",
    "DetectorName",
    "Diffusion",
    "DiffusionOptimiser",
    "Downstream",
    "DrawingDecoderName",
    "DrawingNetwork",
    "Embedder",
    "EmbedderOptimiser",
    "Evaluate",
    "FeatureNetwork",
    "FeatureSpaceName",
    "FewStep",
    "FewStepOptimiser",
    "FirstStageName",
    "Fraction",
    "FreeText",
    "Generate",
    "Harmonisation",
    "Hole",
    "ImageToImage",
    "ImageToImageOptimiser",
    "InitFrom",
    "Inpainting",
    "Input",
    "Latents",
    "Lesions",
    "Lineup",
    "Maisi",
    "MetricName",
    "Name",
    "NetworkOptimiser",
    "NoiseLevels",
    "Normative",
    "OperatorName",
    "Optimiser",
    "PairRegistration",
    "Pairs",
    "PairsOptimiser",
    "Perceptual",
    "PlanGroup",
    "PositiveFloat",
    "PositiveInt",
    "Preprocess",
    "Primary",
    "Privacy",
    "Published",
    "Rare",
    "Reconstruction",
    "Registration",
    "Release",
    "Sampler",
    "SamplerStudy",
    "Scalar",
    "SecondModel",
    "Section",
    "Segmentation",
    "SegmentationEnsemble",
    "SegmentationStudy",
    "SegmenterOptimiser",
    "ShapeCompletion",
    "Shift",
    "SimulatedSource",
    "Splits",
    "Storage",
    "Structure",
    "Study",
    "TableSource",
    "Translation",
    "Unpaired",
    "UnpairedOptimiser",
    "Variants",
    "freeze",
    "given_on_command_line",
    "json_schema",
    "key_reference",
    "load_stage",
    "load_study",
    "local_path",
    "parse_published",
    "parse_study",
    "part_of",
    "published",
    "read_yaml",
    "resolved",
    "stages_of",
    "without_paths",
]
