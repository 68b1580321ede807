"""Step `sampler_study`: quality against steps and seconds, for every sampler and guidance scale of the study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_atomic, write_json
from meddiff_steps.evaluation.realism.base import MIN_IMAGES
from meddiff_steps.evaluation.sampler_study import Point, compare, points, student_points
from meddiff_steps.imaging.selection import Images, drawn
from meddiff_steps.instruments.feature_spaces.assemble import spaces
from meddiff_steps.instruments.feature_spaces.base import Context
from meddiff_steps.instruments.predictors import load_predictors
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.report.charts import sampler_study
from meddiff_steps.steps import options
from meddiff_steps.synthesis.generate import CohortGenerator

#: Feature spaces that need no network of the study's; the first decides.
SPACES = ("random", "radiomics", "structure")


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    plan: options.Plan,
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    predictors: options.Predictors,
    out: Annotated[Path, typer.Option(help="figures of every point to write (JSON)")],
    figure: Annotated[Path, typer.Option(help="picture to write (PNG)")],
    decoder: options.Decoder = None,
    few_step: options.FewStep = None,
    threads: options.Threads = 1,
) -> None:
    """Draw the same planned subjects with every sampler, number of steps and guidance scale, and by the student where
    there is one; measure quality and seconds.

    Seconds are of this machine, at the study's batch size, decoding included; all else repeats.
    """
    study = load_stage(config, "sampler_study")
    subjects = drawn(pd.read_parquet(plan), study.plan)[: study.sampler_study.images]
    if len(subjects) < MIN_IMAGES:
        raise UserError(
            f"{plan}: {len(subjects)} planned subjects, and samplers cannot be compared on fewer than {MIN_IMAGES}."
            " Plan more."
        )
    model = TrainedModel.load(
        autoencoder, diffusion, make_fabric(study.compute, threads), study.compute, decoder=decoder
    )
    drawing = {False: CohortGenerator(model, study.generate)}
    ways = points(study.sampler_study, model.process.prediction_type)
    if few_step is not None:
        student = TrainedModel.load(autoencoder, few_step, model.fabric, study.compute, decoder=decoder)
        drawing[True] = CohortGenerator(student, study.generate)
        made = student.card.few_step
        if made is None:
            raise UserError(f"--few-step {few_step}: no student. Give the folder that the step few_step wrote.")
        ways += student_points(made.method, made.num_inference_steps, made.guidance_scale)

    def draw(point: Point, rows: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
        generator = drawing[point.of_student]
        generator.settings = study.generate.model_copy(update=asdict(point))
        return generator.images(
            rows, f"{point.sampler}, {point.num_inference_steps} steps, guidance {point.guidance_scale:g}"
        )

    cohort = Images.of_scans(images, manifest, study.covariates)
    results = compare(
        draw, ways, subjects, cohort, load_predictors(predictors), spaces(SPACES, Context(model.spatial_dims)), study
    )
    results |= {"batch_size": study.generate.batch_size, "threads": threads, "device": str(model.fabric.device)}
    write_atomic(figure, sampler_study(results))
    write_json(out, results)
