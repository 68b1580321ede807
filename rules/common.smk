# The study, the paths and what jobs ask for; no rules here.
import json
import math
import os
import sys
from os import environ
from pathlib import Path

from snakemake.exceptions import WorkflowError

from meddiff_steps import config as study_config
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import hold
from meddiff_steps.privacy.size import BYTES_PER_VALUE, batch_size
from meddiff_steps.core.code_digest import code_digest
from meddiff_steps.synthesis.size import enlarged, plan_shards

# Jobs run `python`; make that the interpreter that runs Snakemake, also when its environment was not activated.
environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", "")])

# A cluster that takes a node back sends SIGTERM to every process of a job. The shell and `tee` must outlive the step, which
# saves its state then; were the shell to end first, Snakemake would take the job for finished and kill what is left of it.
shell.prefix("set -euo pipefail; trap '' TERM; ")


# `--config release=FOLDER models=FOLDER`: a release to make again, with the folder of its models (by default its study's).
SEALED = config["release"] if isinstance(config.get("release"), str) else None
SEALED_MODELS = config.get("models", str(Path(SEALED).parent)) if SEALED else None
# `count=400 group=syn`: more subjects of a group than the release has; the group may be left out if there is one alone.
MORE_SUBJECTS = config.get("count") if SEALED else None


def read_study():
    """The study of this run.

    A job on a cluster parses the workflow again, possibly hours after it was submitted. It reads what the main
    process froze when it started, not the YAML, which may have been edited since.
    """
    frozen = environ.get("MEDDIFF_STUDY")
    if frozen and not workflow.is_main_process:
        return study_config.parse_study(json.loads(Path(frozen).read_text()), frozen)
    if SEALED:
        # The study that the release was made by; where its scans lie is not in it, and no job here reads them.
        published = Path(SEALED, "provenance", "config.json")
        if not published.is_file():
            raise UserError(f"{published}: not there. Give --config release=FOLDER, the root of a release that has a ledger.")
        return study_config.parse_study(json.loads(published.read_text()) | {"results": "regenerated"}, str(published))
    if "study" in config:
        return study_config.parse_study(dict(config), ", ".join(map(str, workflow.configfiles)) or "--config")
    default = Path(workflow.basedir) / "config" / "config.yaml"
    if config:
        import yaml

        return study_config.parse_study(yaml.safe_load(default.read_text()) | dict(config), f"{default} with --config")
    return study_config.load_study(default)


try:
    STUDY = read_study()
except UserError as error:
    raise WorkflowError(str(error)) from None

RESULTS = f"{STUDY.results}/{STUDY.study}"
if workflow.is_main_process:
    environ["MEDDIFF_STUDY"] = str(study_config.freeze(STUDY, None, Path(RESULTS, "config")))


# Snakemake's own lock knows the files of runs that were started in the same folder; this one, two runs that were not.
RUN_LOCK = []


def lock_results():
    try:
        RUN_LOCK.append(hold(Path(RESULTS, ".lock")))
    except UserError as error:
        raise WorkflowError(str(error)) from None


onstart:
    if workflow.is_main_process:
        if cohort_problem():
            raise WorkflowError(cohort_problem())
        lock_results()


def settings(stage, study=STUDY):
    """Path of the frozen config of one stage; it changes exactly when something the stage may read changes."""
    return str(study_config.freeze(study, stage, Path(RESULTS, "config")))


# ------------------------------------------------------------------------------------------------ paths

SIMULATED = f"{RESULTS}/cohort/simulated/participants.tsv"
FETCHED = f"{RESULTS}/cohort/fetched"
MANIFEST = f"{RESULTS}/cohort/manifest.parquet"
COHORT_CARD = f"{RESULTS}/cohort/card.json"
PREPROCESSED = f"{RESULTS}/preprocessed/shard-{{shard}}.arrow"
QC_SHARD = f"{RESULTS}/preprocessed/qc/shard-{{shard}}.parquet"
QC = f"{RESULTS}/preprocessed/qc.parquet"
AUTOENCODER = f"{RESULTS}/autoencoder/model.safetensors"
AUTOENCODER_CARD = f"{RESULTS}/autoencoder/card.json"
AUTOENCODER_HISTORY = f"{RESULTS}/autoencoder/history.parquet"
RECONSTRUCTIONS = f"{RESULTS}/autoencoder/reconstructions.arrow"
LATENTS = f"{RESULTS}/latents/shard-{{shard}}.arrow"
LATENT_SCALE = f"{RESULTS}/latents/scale.safetensors"
LATENT_MANIFEST = f"{RESULTS}/latents/manifest.json"
DIFFUSION = f"{RESULTS}/diffusion/model.safetensors"
DIFFUSION_CARD = f"{RESULTS}/diffusion/card.json"
DIFFUSION_HISTORY = f"{RESULTS}/diffusion/history.parquet"
PLAN = f"{RESULTS}/plan.parquet"
GENERATED = f"{RESULTS}/generated/shard-{{shard}}.arrow"
EMBEDDER = f"{RESULTS}/privacy/embedder.safetensors"
EMBEDDER_CARD = f"{RESULTS}/privacy/embedder.json"
REFERENCE = f"{RESULTS}/privacy/reference.safetensors"
CALIBRATION = f"{RESULTS}/privacy/calibration.json"
FILTERED = f"{RESULTS}/filtered/shard-{{shard}}.arrow"
DECISIONS_SHARD = f"{RESULTS}/privacy/decisions/shard-{{shard}}.parquet"
DECISIONS = f"{RESULTS}/privacy/decisions.parquet"
PRIVACY_REPORT = f"{RESULTS}/privacy/report.json"
RELEASED = f"{RESULTS}/privacy/released.parquet"
NEIGHBOURS = f"{RESULTS}/privacy/neighbours.html"
IMAGES = f"{RESULTS}/images/shard-{{shard}}.parquet"
RELEASE_ROOT = f"{RESULTS}/release"
RELEASE = f"{RELEASE_ROOT}/dataset_description.json"
LEDGER = f"{RELEASE_ROOT}/provenance/root.json"
PRIVATE_LEDGER = f"{RESULTS}/privacy/ledger-private.parquet"
# Made of a sealed release on request, beside it.
WEBDATASET_SHARD = f"{RESULTS}/exports/webdataset/shard-{{shard}}.tar"
WEBDATASET_FILES = {
    name: f"{RESULTS}/exports/webdataset/{file}" for name, file in (("manifest", "manifest.parquet"), ("readme", "README.md"), ("sums", "SHA256SUMS"))
}
MODEL_RELEASE_FILES = {
    "readme": f"{RESULTS}/model-release/README.md",
    "sums": f"{RESULTS}/model-release/SHA256SUMS",
    "config": f"{RESULTS}/model-release/config.json",
    "autoencoder": f"{RESULTS}/model-release/autoencoder/model.safetensors",
    "autoencoder_card": f"{RESULTS}/model-release/autoencoder/card.json",
    "diffusion": f"{RESULTS}/model-release/diffusion/model.safetensors",
    "diffusion_card": f"{RESULTS}/model-release/diffusion/card.json",
}
REQUESTED = [
    file
    for wanted, files in (("webdataset" in STUDY.release.exports, WEBDATASET_FILES), (STUDY.release.models, MODEL_RELEASE_FILES))
    if wanted
    for file in files.values()
]
METRICS = f"{RESULTS}/evaluation/metrics.json"
PREDICTIONS = f"{RESULTS}/evaluation/predictions.parquet"
COMPONENTS = f"{RESULTS}/evaluation/components.parquet"
SEGMENTER_FILES = (
    {"segmenter": f"{RESULTS}/evaluation/segmenter.safetensors", "segmenter_card": f"{RESULTS}/evaluation/segmenter.json"} if STUDY.segmentation else {}
)
SAMPLER_STUDY = f"{RESULTS}/sampler_study/results.json"
SAMPLER_FIGURE = f"{RESULTS}/sampler_study/figure.png"
SHOWCASE = f"{RESULTS}/evaluation/showcase.arrow"
REPORT = f"{RESULTS}/report.html"
REGENERATED_SHARD = f"{RESULTS}/comparison/shard-{{shard}}.json"
REGENERATED = f"{RESULTS}/comparison.json"
CONTACT_SHEET = f"{RESULTS}/contact-sheet.png"
# Inputs of a rule that are also options of its step, by the same names.
AUTOENCODER_FILES = {"autoencoder": AUTOENCODER, "autoencoder_card": AUTOENCODER_CARD}
EMBEDDER_FILES = {"embedder": EMBEDDER, "embedder_card": EMBEDDER_CARD}
DETECTOR_FILES = AUTOENCODER_FILES | {"scale": LATENT_SCALE} | EMBEDDER_FILES
# The model that makes what is released: the one trained on real scans, or, with distill.subjects, one that never saw them.
RELEASED_MODEL = f"{RESULTS}/distilled/diffusion" if STUDY.distill.subjects else f"{RESULTS}/diffusion"
DIFFUSION_FILES = {"diffusion": f"{RELEASED_MODEL}/model.safetensors", "diffusion_card": f"{RELEASED_MODEL}/card.json"}
RELEASED_HISTORY = f"{RELEASED_MODEL}/history.parquet"
# The first model's cohort, with distill.subjects, and what it was found to be, shown beside the second one's.
TEACHER = f"{RESULTS}/teacher"
TEACHER_PLAN = f"{TEACHER}/plan.parquet"
TEACHER_GENERATED = f"{TEACHER}/generated/shard-{{shard}}.arrow"
TEACHER_FILTERED = f"{TEACHER}/filtered/shard-{{shard}}.arrow"
TEACHER_DECISIONS_SHARD = f"{TEACHER}/privacy/decisions/shard-{{shard}}.parquet"
TEACHER_DECISIONS = f"{TEACHER}/privacy/decisions.parquet"
TEACHER_PREDICTIONS = f"{TEACHER}/evaluation/predictions.parquet"
TEACHER_COMPONENTS = f"{TEACHER}/evaluation/components.parquet"
TEACHER_REPORTS = (
    {"teacher_privacy": f"{TEACHER}/privacy/report.json", "teacher_metrics": f"{TEACHER}/evaluation/metrics.json"} if STUDY.distill.subjects else {}
)
DISTILLED_MANIFEST = f"{RESULTS}/distilled/manifest.parquet"
DISTILLED_LATENTS = f"{RESULTS}/distilled/latents/shard-{{shard}}.arrow"
DISTILLED_SCALE = f"{RESULTS}/distilled/latents/scale.safetensors"
DISTILLED_LATENT_MANIFEST = f"{RESULTS}/distilled/latents/manifest.json"
# Training state, and what must survive reruns, lives outside the outputs of rules: Snakemake deletes those when a job fails.
STATE = f"{RESULTS}/state"
# The augmentation study. Its results, and the record of the one time that it read the test split, are in the report.
DESIGN = f"{RESULTS}/augmentation/design.json"
SAMPLES = f"{RESULTS}/augmentation/samples.parquet"
REDUCED = f"{RESULTS}/augmentation/images.arrow"
CLASSIFIERS = f"{RESULTS}/augmentation/classifiers/{{job}}.safetensors"
VALIDATION = f"{RESULTS}/augmentation/classifiers/{{job}}.parquet"
AUGMENT_PREDICTIONS = f"{RESULTS}/augmentation/predictions.parquet"
AUGMENT_REPORTS = {"augmentation": f"{RESULTS}/augmentation/results.json", "opened": f"{RESULTS}/augmentation/test-opened.json"} if STUDY.augment.target else {}
OPENINGS = f"{STATE}/augmentation/openings.jsonl"
# What generator seeds beyond the released cohort draw, for the augmentation study alone.
GENERATOR = f"{RESULTS}/augmentation/generator-{{generator}}"
GENERATOR_FILES = {
    name: f"{GENERATOR}/{file}"
    for name, file in (
        ("plan", "plan.parquet"),
        ("generated", "generated/shard-{shard}.arrow"),
        ("filtered", "filtered/shard-{shard}.arrow"),
        ("decisions", "decisions/shard-{shard}.parquet"),
        ("diffusion", "diffusion/model.safetensors"),
        ("diffusion_card", "diffusion/card.json"),
        ("history", "diffusion/history.parquet"),
    )
}


def shard_names(count):
    return [f"{i:04d}" for i in range(count)]


COHORT_SHARDS = shard_names(STUDY.preprocess.shards)
PLAN_SHARDS = shard_names(plan_shards(STUDY.plan, STUDY.generate.shard_size))
COHORT_IMAGES = expand(PREPROCESSED, shard=COHORT_SHARDS)


wildcard_constraints:
    shard=r"\d{4}",
    generator=r"[1-9]\d*",


# -------------------------------------------------------------------------------------- what jobs ask for

VOXELS = math.prod(STUDY.preprocess.shape)
# Attempts up to which requests grow; a training that is preempted twenty times must not ask for 3000 times the memory.
MOST_GROWTH = 4
# Bytes per voxel that the copy detectors need for as many images as they look at together, and a shard that is drawn as well.
DETECTING = BYTES_PER_VALUE * batch_size(STUDY.preprocess.shape)
DRAWING_AND_DETECTING = max(DETECTING, 600 * STUDY.generate.batch_size)
GPUS = 0 if STUDY.compute.device == "cpu" else STUDY.compute.devices


def memory(base_mb, bytes_per_voxel=0, images=1):
    """mem_mb of a job: a base for Python and its libraries plus bytes per voxel of the images it holds; half as much again at attempts 2 to 4."""
    return lambda wildcards, attempt: int((base_mb + bytes_per_voxel * images * VOXELS / 2**20) * 1.5 ** (min(attempt, MOST_GROWTH) - 1))


def minutes(value):
    """runtime of a job in minutes; doubles at attempts 2 to 4."""
    return lambda wildcards, attempt: int(value * 2 ** (min(attempt, MOST_GROWTH) - 1))


def passing(kind, path):
    """The output of a stage whose shards are deleted when nobody needs them any more, where the study says so (storage.temporary)."""
    return temp(path) if kind in STUDY.storage.temporary else path


def lasting(path):
    """An output that a later run must not replace by itself (storage.protect): Snakemake deletes outputs before it makes them again."""
    return protected(path) if STUDY.storage.protect else path


def repeat(option, files):
    """The same command-line option once per file."""
    return " ".join(f"{option} {file}" for file in files)


def options(files, names):
    """--name FILE for each of `names` among a rule's input."""
    return " ".join(f"--{name.replace('_', '-')} {files[name]}" for name in names)


def enlarged_group():
    """The group of a release's plan that `count` is about, with so many subjects."""
    try:
        return enlarged(STUDY.plan, int(MORE_SUBJECTS), config.get("group"))
    except (UserError, ValueError) as error:
        raise WorkflowError(f"--config count={MORE_SUBJECTS}: {error}") from None


def made_again(wildcards):
    """Comparisons of all shards of the release."""
    if not SEALED:
        raise WorkflowError("Which release? Give --config release=FOLDER, its root, and models=FOLDER, where autoencoder/ and diffusion/ lie.")
    if MORE_SUBJECTS is not None:
        return expand(REGENERATED_SHARD, shard=shard_names(plan_shards([enlarged_group()], STUDY.generate.shard_size)))
    ledger = json.loads(Path(SEALED, "provenance", "root.json").read_text())["ledger"]
    return expand(REGENERATED_SHARD, shard=[f"{entry['shard']:04d}" for entry in ledger["shards"]])


def cohort_problem():
    """What is wrong with where the scans should be, in words; None if nothing is, or if they are fetched or were read already."""
    source = STUDY.cohort
    named = {"bids": "root", "table": "table"}.get(source.source)
    if SEALED or named is None or STUDY.storage.cohort or Path(MANIFEST).exists() or Path(getattr(source, named)).exists():
        return None
    return f"cohort.{named}: {getattr(source, named)} is not there. Relative paths start at the working directory, {Path.cwd()}."


def tables(files, made):
    """Tables of the user's that a rule reads, where they are there.

    Once the rule's output `made` is, they always count: without them Snakemake takes it as it is, where a shorter list would make it again.
    """
    return [file for file in files if Path(file).exists() or Path(made).exists()]


def cohort_tables():
    """What says who the subjects are. A fetched cohort is watched where it comes from; sub-*_sessions.tsv are too many."""
    if STUDY.storage.cohort or STUDY.cohort.source == "simulated":
        return []
    return tables([STUDY.cohort.table if STUDY.cohort.source == "table" else f"{STUDY.cohort.root}/participants.tsv"], MANIFEST)


# A plan can be made without the scans, a run cannot.
if workflow.is_main_process and cohort_problem():
    logger.warning(cohort_problem())
