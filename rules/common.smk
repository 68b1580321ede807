# The study, the paths and what jobs ask for; no rules here.
import json
import math
import os
import shlex
import subprocess
import sys
from functools import cache, partial
from os import environ
from pathlib import Path
from typing import NamedTuple

from snakemake.exceptions import WorkflowError
from snakemake.utils import update_config

from meddiff_steps import config as study_config
from meddiff_steps.core.code_digest import code_digest
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import hold
from meddiff_steps.core.registries import DETECTORS
from meddiff_steps.core import folders as study_files
from meddiff_steps.core.folders import BUNDLE, GIVEN, NETWORK, TONE, files_of_base, folders_of
from meddiff_steps.operations.rates import extraction_mb
from meddiff_steps.provenance.record import record_path
from meddiff_steps.privacy.size import BYTES_PER_VALUE, batch_size, subjects_needed
from meddiff_steps.synthesis.size import enlarged, plan_shards

if workflow.modifier.namespace:
    # Which is given neither the files of the study nor handlers that hold the lock and look after what is protected.
    raise WorkflowError(
        "meddiff cannot be a `module` of another workflow. Run it as it is (meddiff run STUDY.yaml, or snakemake"
        " --snakefile CHECKOUT/Snakefile --configfile STUDY.yaml); its release is what another workflow may read."
    )

# Jobs run `python`; make that the interpreter that runs Snakemake, also when its environment was not activated.
environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", "")])
# For envs/meddiff.post-deploy.sh, with `--sdm conda`.
environ.setdefault("MEDDIFF_WORKFLOW", str(workflow.basedir))

# A cluster that takes a node back sends SIGTERM to every process of a job, a terminal SIGINT (Ctrl-C). The shell and
# `tee` must outlive the step, which saves its state then; were the shell to end first, Snakemake would take the job for finished and kill what is
# left of it.
shell.prefix("set -euo pipefail; trap '' TERM INT; ")


# `--config sealed=FOLDER models=FOLDER`: a release to make again, with the folder of its models (by default its
# study's).
SEALED = config.get("sealed")
if isinstance(config.get("release"), str):
    raise WorkflowError("--config release=FOLDER is now sealed=FOLDER (renamed in 0.2.0).")
SEALED_MODELS = config.get("models", str(Path(SEALED).parent)) if SEALED else None
for key, folder in (("sealed", SEALED), ("models", SEALED_MODELS)):
    try:
        study_config.local_path(folder and str(folder))
    except ValueError as error:
        raise WorkflowError(f"--config {key}={folder}: {error}") from None
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
            raise UserError(
                f"{published}: not there. Give --config sealed=FOLDER, the root of a release that has a ledger."
            )
        ours = {"results": "regenerated", "storage": {}}
        return study_config.parse_study(json.loads(published.read_text()) | ours, str(published))
    # Not Snakemake's `config`, which takes the last of two keys and `no` for false.
    files, content = list(workflow.overwrite_configfiles), {}
    for file in files:
        update_config(content, study_config.read_yaml(file))
    given = study_config.given_on_command_line(dict(workflow.config_settings.config))
    update_config(content, given)
    if "study" not in content:
        files.insert(0, Path(workflow.basedir) / "config" / "config.yaml")
        content = study_config.read_yaml(files[0]) | content
    origin = [*map(str, files), *(["--config"] if given else [])]
    return study_config.parse_study(content, " with ".join(origin), files)


try:
    STUDY = read_study()
except UserError as error:
    raise WorkflowError(str(error)) from None

RESULTS = str(Path(STUDY.results, STUDY.study))
if workflow.is_main_process:
    environ["MEDDIFF_STUDY"] = str(study_config.freeze(STUDY, None, Path(RESULTS, "config")))

# What torch compiles for one job, the others find: entries are named by what they are made of and appear under their
# names when they are complete, so that jobs may share the folder. Deleting it costs compiling again.
environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(RESULTS, ".cache", "compiled").resolve()))


# Snakemake's own lock knows the files of runs that were started in the same folder; this one, two runs that were not.
RUN_LOCK = []


def lock_results():
    try:
        RUN_LOCK.append(hold(Path(RESULTS, ".lock")))
    except UserError as error:
        raise WorkflowError(str(error)) from None


def refuse_protected():
    """Refuse jobs whose outputs are there and write-protected (storage.protect).

    Snakemake does so by asking whether the file can be written, and root, which containers run as, can write any.
    """
    for job in workflow.dag.needrun_jobs():
        kept = [
            str(file)
            for file in job.output
            if Path(file).is_file() and not Path(file).is_symlink() and not Path(file).stat().st_mode & 0o222
        ]
        if kept:
            raise WorkflowError(
                f"{job.rule.name} would replace {', '.join(kept)}, which storage.protect keeps: the study or the code"
                " that makes it was changed. Give the study another name, or allow it with: chmod u+w FILES"
            )


onstart:
    if workflow.is_main_process:
        missing = problems({job.rule.name for job in workflow.dag.jobs}) + left_out(workflow.dag)
        if missing:
            raise WorkflowError("\n".join(missing))
        refuse_protected()
        lock_results()


def tell(variable, log):
    """Run the command that the user wants run when it is over: mail, a message in a chat."""
    command = environ.get(variable)
    if command and workflow.is_main_process:
        about = {
            "MEDDIFF_NAME": STUDY.study,
            "MEDDIFF_RESULTS": RESULTS,
            "MEDDIFF_LOG": log if isinstance(log, str) else " ".join(log or []),
        }
        ended = subprocess.run(command, shell=True, env={**environ, **about}).returncode
        if ended:
            logger.warning(f"{variable}: ended with {ended}: {command}")


onsuccess:
    tell("MEDDIFF_ON_SUCCESS", log)


onerror:
    tell("MEDDIFF_ON_ERROR", log)


def settings(stage, study=STUDY):
    """Path of the frozen config of one stage; it changes exactly when something the stage may read changes."""
    return str(study_config.freeze(study, stage, Path(RESULTS, "config")))


# ------------------------------------------------------------------------------------------------ paths
# What more than one rule names.  The files of a network lie in one folder (`core.folders`), which one option names.


def network(folder):
    """The files of a trained network."""
    return [f"{folder}/{name}" for name in NETWORK]


def trained(folder):
    """The files of a network and its training curve, which comes last."""
    return [*network(folder), f"{folder}/history.parquet"]


def generator(folder):
    """The files of a diffusion model: its network, and the grey levels of what it generates."""
    return [*network(folder), *(f"{folder}/{name}" for name in TONE)]


def derivative(application):
    """What an application writes beside its images."""
    return [f"{RESULTS}/{application}/{name}" for name in study_files.DERIVATIVE]


def image_to_image(folder):
    """The files of networks that draw an image from images."""
    return [f"{folder}/{name}" for name in study_files.IMAGE_TO_IMAGE]


SIMULATED = f"{RESULTS}/cohort/simulated/participants.tsv"
FETCHED = f"{RESULTS}/cohort/fetched"
MANIFEST = f"{RESULTS}/cohort/manifest.parquet"
COHORT_CARD = f"{RESULTS}/cohort/card.json"
PREPROCESSED = f"{RESULTS}/preprocessed/shard-{{shard}}.arrow"
QC_SHARD = f"{RESULTS}/preprocessed/qc/shard-{{shard}}.parquet"
QC = f"{RESULTS}/preprocessed/qc.parquet"
# Given weights that trainings start from (init_from), by model.
BASE = None if SEALED else STUDY.init_from
INIT = {name: network(f"{RESULTS}/init/{name}") for name in GIVEN if BASE and name in BASE.models}
GIVEN_FILES = files_of_base(BASE.path, BASE.autoencoder, BASE.diffusion) if BASE else []
SCAN_PAGES = f"{RESULTS}/quality/index.html"
AUTOENCODER = network(f"{RESULTS}/autoencoder")
AUTOENCODER_CURVE = f"{RESULTS}/autoencoder/history.parquet"
AUTOENCODER_RECONSTRUCTIONS = f"{RESULTS}/autoencoder/reconstructions.arrow"
DECODER = network(f"{RESULTS}/decoder") if STUDY.decoder.network else []
DECODER_CURVE = [f"{RESULTS}/decoder/history.parquet"] if DECODER else []
# Held-out scans as the model makes them of their latents: what generated images can be at best.
RECONSTRUCTIONS = f"{RESULTS}/{'decoder' if DECODER else 'autoencoder'}/reconstructions.arrow"
# The encoder of texts, and the tokens of the cohort's texts.
TEXT = [f"{RESULTS}/text/{name}" for name in study_files.TEXT] if STUDY.text.column else []
TEXT_FIDELITY = f"{RESULTS}/evaluation/text.json" if TEXT else []
# Label maps of the scans, and the networks that learn them: with their scans they are pairs.
LABEL_MAP = f"{RESULTS}/masks/maps/shard-{{shard}}.arrow"
LABEL_LATENT = f"{RESULTS}/masks/latents/shard-{{shard}}.arrow"
LABEL_SCALE = [f"{RESULTS}/masks/latents/scale.safetensors"] if STUDY.pairs else []
MASKS = [f"{RESULTS}/masks/{name}" for name in study_files.MASKS] if STUDY.pairs else []
SEGMENTATION_STUDY = [f"{RESULTS}/segmentation_study/{name}" for name in ("results.json", "cases.parquet")]
# Networks of applications: one that registers, of either kind, the diffusion of points, what marks a structure.
REGISTRATION_NETWORK = f"{RESULTS}/registration_networks/{{network}}"
SHAPE_NETWORK = network(f"{RESULTS}/shape_network")
SEGMENTATION_MODEL = image_to_image(f"{RESULTS}/segmentation_model")
SEGMENTATION_BESIDE = f"{RESULTS}/segmentation_beside/{{beside}}"
SEGMENTATION_FEW_LABELS = f"{RESULTS}/segmentation_few_labels/{{network}}"
# Networks that draw another contrast, the way back from it, and volume-wise; what foretells it without noise.
TRANSLATION_MODEL = image_to_image(f"{RESULTS}/translation_model")
TRANSLATION_LESION = network(f"{RESULTS}/translation_lesion") if STUDY.translation.lesion else []
TRANSLATION_BACK = network(f"{RESULTS}/translation_back")
TRANSLATION_VOLUME = network(f"{RESULTS}/translation_volume") if STUDY.translation.volume_steps else []
TRANSLATION_SOLID = network(f"{RESULTS}/translation_solid") if STUDY.translation.volume_steps else []
FORETELLING = [f"{RESULTS}/translation_model/{name}" for name in study_files.OF_IMAGE_TO_IMAGE["regression"]]
# Networks between groups of images that are not paired: contrasts, sites.
TRANSLATION_UNPAIRED = trained(f"{RESULTS}/translation_unpaired")
HARMONISATION_MODEL = trained(f"{RESULTS}/harmonisation_model")
LATENTS = f"{RESULTS}/latents/shard-{{shard}}.arrow"
LATENT_SCALE = f"{RESULTS}/latents/scale.safetensors"
DIFFUSION = generator(f"{RESULTS}/diffusion")
STUDENT = generator(f"{RESULTS}/few_step") if STUDY.few_step.method else []
# The model that makes what is released: the one trained on real scans, a second one that never saw them, or a student.
RELEASED_FOLDER = f"{RESULTS}/diffusion"
if STUDY.second_model.subjects:
    RELEASED_FOLDER = f"{RESULTS}/second_model/diffusion"
elif STUDY.student_draws:
    RELEASED_FOLDER = f"{RESULTS}/few_step"
RELEASED_MODEL = generator(RELEASED_FOLDER)
PLAN = f"{RESULTS}/plan.parquet"
GENERATED = f"{RESULTS}/generated/shard-{{shard}}.arrow"
EMBEDDER = network(f"{RESULTS}/instruments/embedder")
PREDICTORS = network(f"{RESULTS}/instruments/predictors")
SEGMENTER = network(f"{RESULTS}/instruments/segmenter") if STUDY.segmentation else []
REFERENCE = f"{RESULTS}/privacy/reference.safetensors"
REFERENCE_SCANS = f"{RESULTS}/privacy/reference-scans.arrow"
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
METRICS = f"{RESULTS}/evaluation/metrics.json"
EVALUATION = [METRICS, f"{RESULTS}/evaluation/predictions.parquet", f"{RESULTS}/evaluation/components.parquet"]
SHOWCASE = f"{RESULTS}/evaluation/showcase.arrow"
REPORT = f"{RESULTS}/report.html"
# Made of a sealed release on request, beside it.
WEBDATASET_SHARD = f"{RESULTS}/exports/webdataset/shard-{{shard}}.tar"
WEBDATASET = [f"{RESULTS}/exports/webdataset/{name}" for name in ("manifest.parquet", "README.md", "SHA256SUMS")]
MODEL_RELEASE = [
    f"{RESULTS}/model-release/{name}"
    for name in (
        "README.md",
        "SHA256SUMS",
        "config.json",
        *(BUNDLE if STUDY.unlike_monai is None else []),
        *(
            f"{kind}/{file}"
            for kind in ("autoencoder", *(["decoder"] if DECODER else []), "diffusion")
            for file in NETWORK
        ),
        *(f"diffusion/{file}" for file in TONE),
    )
]
REQUESTED = [
    *(WEBDATASET if "webdataset" in STUDY.release.exports else []),
    *(MODEL_RELEASE if STUDY.release.models else []),
]
REGENERATED_SHARD = f"{RESULTS}/comparison/shard-{{shard}}.json"
# The first model's cohort, where there is a second, and what it was found to be, shown beside the second one's.
TEACHER = f"{RESULTS}/teacher"
TEACHER_REPORTS = (
    [f"{TEACHER}/privacy/report.json", f"{TEACHER}/evaluation/metrics.json"] if STUDY.second_model.subjects else []
)
# Training state, and what must survive reruns, lies outside the outputs of rules: Snakemake deletes those when a job
# fails.
STATE = f"{RESULTS}/state"
# The downstream study. Its results, and the record of the one time that it read the test split, are in the report.
DOWNSTREAM = f"{RESULTS}/augmentation"
DOWNSTREAM_RESULTS = (
    [f"{DOWNSTREAM}/{name}" for name in ("results.json", "test-opened.json")] if STUDY.downstream.target else []
)
if DOWNSTREAM_RESULTS and STUDY.downstream.neighbours.count:
    DOWNSTREAM_RESULTS.append(f"{DOWNSTREAM}/neighbours.json")


def shard_names(count):
    return [f"{i:04d}" for i in range(count)]


COHORT_SHARDS = shard_names(STUDY.preprocess.shards)
PLAN_SHARDS = shard_names(plan_shards(STUDY.plan, STUDY.generate.shard_size))
COHORT_IMAGES = expand(PREPROCESSED, shard=COHORT_SHARDS)
LABEL_MAPS, LABEL_LATENTS = (
    expand(path, shard=COHORT_SHARDS) if STUDY.pairs else [] for path in (LABEL_MAP, LABEL_LATENT)
)
# The file that scans are registered to, where it is one of the user's.
REGISTRATION = STUDY.preprocess.registration
TEMPLATE = REGISTRATION.template if REGISTRATION and REGISTRATION.template != study_config.MNI152 else None
# Scans that a person excluded: the study's table, or the one that lies with its results.
DECIDED = f"{RESULTS}/qc.tsv"

# ------------------------------------------------------------------------------------- files of the user's
# Where they are gone, what was made of them is taken as it is: a cohort need not stay mounted. Not so when the study has
# changed since: Snakemake would leave out a rule whose input is missing, without a word.

# What stages that read them make. A shard has a run record each, of other files the first.
MADE_OF_GIVEN = {
    "cohort": [MANIFEST, COHORT_CARD],
    "preprocess": COHORT_IMAGES,
    "text": TEXT,
    "init_weights": [file for files in INIT.values() for file in files],
    "autoencoder": [*AUTOENCODER, AUTOENCODER_CURVE, AUTOENCODER_RECONSTRUCTIONS],
    "plan": [PLAN],
    "evaluate": EVALUATION,
    "counterfactual": derivative("counterfactuals"),
    "inpainting": derivative("inpainting"),
    "shape_completion_train": SHAPE_NETWORK,
    "shape_completion": derivative("shape_completion"),
}


class Given(NamedTuple):
    """A file or folder of the user's: the key that names it, the stage that reads it, and what helps if it is gone."""

    key: str
    path: str
    stage: str
    remedy: str = ""


def files_given():
    """All that the study names and stages read, but for what is fetched and for paths with fields of a scan."""
    if SEALED:
        return
    if not STUDY.storage.cohort and STUDY.cohort.source in ("bids", "table"):
        key = {"bids": "root", "table": "table"}[STUDY.cohort.source]
        yield Given(f"cohort.{key}", getattr(STUDY.cohort, key), "cohort")
    if TEMPLATE:
        remedy = f" Correct it, or take {study_config.MNI152}, which comes with nilearn."
        yield Given("preprocess.registration.template", TEMPLATE, "preprocess", remedy)
    if STUDY.preprocess.exclude:
        yield Given("preprocess.exclude", STUDY.preprocess.exclude, "preprocess")
    if STUDY.text.column and STUDY.text.encoder:
        yield Given("text.encoder", f"{STUDY.text.encoder}/config.json", "text")
    for key in ("path", "autoencoder", "diffusion") if INIT else ():
        if getattr(BASE, key):
            yield Given(
                f"init_from.{key}", getattr(BASE, key), "init_weights", " Nothing is downloaded (docs/pretrained.md)."
            )
    for weights in PERCEPTUAL:
        yield Given("autoencoder.perceptual.weights", weights, "autoencoder")
    for group in STUDY.plan:
        if group.table:
            yield Given(f"plan.{group.name}.table", group.table, "plan")
    for one in STUDY.evaluate.features:
        yield Given(f"evaluate.features.{one.name}.weights", one.weights, "evaluate")
    if STUDY.counterfactual.predictor:
        yield Given("counterfactual.predictor", STUDY.counterfactual.predictor, "counterfactual")
    for file in HOLE:
        yield Given("inpainting.hole.file", file, "inpainting")
    for stage in ("shape_completion_train", "shape_completion"):
        if STUDY.shape_completion.points:
            remedy = " docs/applications/shape-completion.md says what such a file holds, and has lines that make one."
            yield Given("shape_completion.points", STUDY.shape_completion.points, stage, remedy)


def there(stage):
    """Whether all that a stage makes of the user's files is there."""
    return all(Path(file).exists() for file in MADE_OF_GIVEN[stage])


def kept(stage):
    """Whether what a stage made needs the user's files no more: it is there, and no run record names other settings."""
    today = Path(settings(stage)).name
    return there(stage) and all(made_by(file) in (None, today) for file in MADE_OF_GIVEN[stage])


def made_by(file):
    """Name of the frozen config by which a file was made, by its run record; None where there is none."""
    try:
        record = json.loads(record_path(Path(RESULTS), str(Path(file).relative_to(RESULTS))).read_text())
        return Path(record["inputs"]["config"][0]["path"]).name
    except (OSError, ValueError, LookupError, TypeError):
        return None


def given(stage, files):
    """Those of the user's files that are there, as inputs of a stage.

    Where what it made is kept they always count: without them Snakemake takes it as it is, where a shorter list would
    make it again.
    """
    keep = kept(stage)
    return [file for file in files if keep or Path(file).exists()]


def problems(stages=None):
    """What of the user's files is not where the study says, in words: of all stages, or of some."""
    return [
        f"{one.key}: {one.path} is not there. Relative paths start at the working directory, {Path.cwd()}."
        + (
            f" The settings of {one.stage} were changed since it ran, so that this is needed again: bring it back, or"
            " undo the change."
            if there(one.stage)
            else ""
        )
        + one.remedy
        for one in files_given()
        if (stages is None or one.stage in stages) and not Path(one.path).exists() and not kept(one.stage)
    ]


def left_out(dag):
    """The same of stages that a run leaves out, their file being gone, though what they read besides is made again."""
    remade = {str(file) for job in dag.needrun_jobs() for file in job.output}
    wanted = {str(file) for files in (dag.targetfiles, *(job.input for job in dag.jobs)) for file in files}
    return [
        f"{one.key}: {one.path} is not there. {one.stage} needs it again, since what it reads besides is made again."
        + one.remedy
        for one in files_given()
        if not Path(one.path).exists()
        and kept(one.stage)
        and wanted.intersection(MADE_OF_GIVEN[one.stage])
        and remade.intersection(str(file) for file in workflow.get_rule(one.stage).input if not callable(file))
    ]


PERCEPTUAL = [STUDY.autoencoder.perceptual.weights] if STUDY.autoencoder.perceptual.weight else []
# A mask for all scans; those of single scans are too many to watch.
HOLE = [file for file in (STUDY.inpainting.hole.file,) if file and "{" not in file]
# The table that says who the subjects are. A fetched cohort is watched where it comes from; sub-*_sessions.tsv
# are too many.
COHORT_TABLE = []
if not STUDY.storage.cohort and STUDY.cohort.source in ("bids", "table"):
    COHORT_TABLE = [STUDY.cohort.table if STUDY.cohort.source == "table" else f"{STUDY.cohort.root}/participants.tsv"]
EXCLUDE = (
    given("preprocess", [STUDY.preprocess.exclude])
    if STUDY.preprocess.exclude
    else [file for file in (DECIDED,) if Path(file).exists()]
)
FEATURE_NETWORKS = given("evaluate", [network.weights for network in STUDY.evaluate.features])


wildcard_constraints:
    shard=r"\d{4}\d*",  # Snakemake takes no {4,}
    generator=r"[1-9]\d*",


# -------------------------------------------------------------------------------------- what jobs ask for

VOXELS = math.prod(STUDY.preprocess.shape)
# Attempts up to which requests grow; a training that is preempted twenty times must not ask for 3000 times the memory.
MOST_GROWTH = 4
# Minutes beyond which no further attempt goes: what trainings ask for, which partitions must allow in any case.
MOST_MINUTES = 2880
# Bytes per voxel that the copy detectors need for as many images as they look at together, and a shard that is drawn as
# well.
DETECTING = BYTES_PER_VALUE * batch_size(STUDY.preprocess.shape)
DRAWING_AND_DETECTING = max(DETECTING, 600 * STUDY.generate.batch_size)
# Directions of training scans are taken from their latents, where the detector `latent` is chosen.
DETECTED_LATENTS = "latent" in (STUDY.privacy.detectors or DETECTORS.names())
GPUS = 0 if STUDY.compute.device == "cpu" else STUDY.compute.devices


def memory(base_mb, bytes_per_voxel=0, images=1):
    """mem_mb of a job: a base for Python and its libraries plus bytes per voxel of the images it holds; half as much
    again at attempts 2 to 4.
    """
    return lambda wildcards, attempt: int(
        (base_mb + bytes_per_voxel * images * VOXELS / 2**20) * 1.5 ** (min(attempt, MOST_GROWTH) - 1)
    )


def minutes(value):
    """runtime of a job in minutes; twice as long at each further attempt, up to MOST_MINUTES. A training, which goes on
    where it stopped, asks for the same at every attempt.
    """
    return lambda wildcards, attempt: min(value * 2 ** (attempt - 1), MOST_MINUTES)


def passing(kind, path):
    """The output of a stage whose shards are deleted when nobody needs them any more, where the study says so
    (storage.temporary).
    """
    return temp(path) if kind in STUDY.storage.temporary else path


def lasting(path):
    """An output that a later run must not replace by itself (storage.protect): Snakemake deletes outputs before it
    makes them again.
    """
    return protected(path) if STUDY.storage.protect else path


def arguments(step, extra, wildcards, input, output):
    """`--name value` for every named input and output of a job of `step`, and for what `extra` adds, quoted.

    A name is that of the step's option; a list is given one by one, but for the files of a folder (`core.folders`),
    which are given as the folder.  Inputs whose names begin with `after` are only waited for, and outputs `also` lie
    beside another.
    """
    words = []

    def add(name, value):
        several = [value] if isinstance(value, (str, Path, int)) else list(value)
        files = folders_of(step).get(name)
        if several and files:
            several = [several[0].removesuffix(files[0]).rstrip("/")]
        words.extend(f"--{name.replace('_', '-')} {shlex.quote(str(one))}" for one in several)

    for name, value in [*input.items(), *output.items()]:
        if not name.startswith(("after", "also")):
            add(name, value)
    for name, value in extra.items():
        add(name, value(wildcards) if callable(value) else value)
    return " ".join(words)


def run_step(step, study=STUDY, **extra):
    """What a job of a step is given: its frozen config, the digest of the code that it reaches, and its options."""
    frozen = settings(step, study)
    return {
        "step": step,
        "config": frozen,
        "code": code_digest(step, json.loads(Path(frozen).read_text())),
        "options": partial(arguments, step, extra),
    }


def BY_SHARD(wildcards):
    """Of a job, the shard that its step is asked for."""
    return wildcards.shard


# What every step is run by.
STEP = "python -m meddiff_steps {params.step} --config {params.config:q} {params.options} 2>&1 | tee {log:q}"
STEP_WITH_THREADS = STEP.replace(" 2>&1", " --threads {threads} 2>&1")


def enlarged_group():
    """The group of a release's plan that `count` is about, with so many subjects."""
    try:
        return enlarged(STUDY.plan, int(MORE_SUBJECTS), config.get("group"))
    except (UserError, ValueError) as error:
        raise WorkflowError(f"--config count={MORE_SUBJECTS}: {error}") from None


def more_subjects():
    """What `count` adds to the command that makes a shard of a release again."""
    return (
        [f"--count={enlarged_group().subjects}", f"--group={enlarged_group().name}"]
        if MORE_SUBJECTS is not None
        else []
    )


def made_again(wildcards):
    """Comparisons of all shards of the release."""
    if not SEALED:
        raise WorkflowError(
            "Which release? Give --config sealed=FOLDER, its root, and models=FOLDER, where autoencoder/ and diffusion/"
            " lie (to `meddiff run` after a --: meddiff run STUDY.yaml regenerate -- --config sealed=FOLDER models=FOLDER)."
        )
    if MORE_SUBJECTS is not None:
        return expand(REGENERATED_SHARD, shard=shard_names(plan_shards([enlarged_group()], STUDY.generate.shard_size)))
    ledger = json.loads(Path(SEALED, "provenance", "root.json").read_text())["ledger"]
    return expand(REGENERATED_SHARD, shard=[f"{entry['shard']:04d}" for entry in ledger["shards"]])


def results_of_downstream_study(wildcards):
    """What `snakemake augment` asks for."""
    if not DOWNSTREAM_RESULTS:
        raise WorkflowError(
            "downstream.target: not set, so there is no downstream study. Name the categorical covariate that is to be"
            " told from images."
        )
    return DOWNSTREAM_RESULTS


def pairs_to_learn_from(wildcards):
    """What `snakemake segmentation_study` asks for without pairs."""
    raise WorkflowError(
        "pairs: not set, so no synthetic image has a label map that a segmenter could learn from. Say which channel of"
        " preprocess.channels holds label maps, and name their structures (docs/applications/pairs.md)."
    )


def nowhere_to_publish(wildcards):
    """What `snakemake publish` asks for without a place."""
    raise WorkflowError(
        "storage.publish: not set, so there is nowhere to publish the release. Give a place, for example"
        " s3://bucket/prefix (docs/cluster.md)."
    )


def manifest_of_scans_to_move(wildcards):
    """The manifest; without a covariate to move nothing is started for it."""
    try:
        STUDY.counterfactual.moved
    except UserError as error:
        raise WorkflowError(str(error)) from None
    return MANIFEST


def guides_of_counterfactuals():
    """What predictors that guide counterfactuals are made from: a network of the user's, or training latents."""
    wanted = STUDY.counterfactual
    if wanted.predictor is not None:
        return {"after_predictor": given("counterfactual", [wanted.predictor])}
    return (
        {"latents": expand(LATENTS, shard=COHORT_SHARDS), "scale": LATENT_SCALE} if wanted.classifier_guidance else {}
    )


def manifest_of_scans_to_fill(wildcards):
    """The manifest; without anything to hide nothing is started for it."""
    if not STUDY.inpainting.wanted:
        raise WorkflowError(
            "inpainting.hole: not set, so nothing is hidden. Name a mask (file), a box or a ball (ball_mm), for example"
            " in the study `inpainting: {hole: {ball_mm: 30}}`."
        )
    return MANIFEST


def manifest_of_scans_to_compare(wildcards):
    """The manifest; unless it is wanted nothing is started for it."""
    if not STUDY.normative.wanted:
        raise WorkflowError(
            "normative.wanted: not set, so no deviation is mapped. Set it, and name a reference if not everybody is,"
            " for example in the study `normative: {wanted: true, reference: {diagnosis: CN}}`."
        )
    return MANIFEST


def manifest_of_scans_to_reconstruct(wildcards):
    """The manifest; without a measurement nothing is started for it."""
    if not STUDY.reconstruction.operators:
        raise WorkflowError(
            "reconstruction.operators: not set, so nothing is measured. Name some, for example in the"
            " study `reconstruction: {operators: [mri]}`."
        )
    return MANIFEST


def manifest_of_scans_to_map(wildcards):
    """The manifest; without a method nothing is started for it."""
    if not STUDY.anomaly.methods:
        raise WorkflowError(
            "anomaly.methods: not set, so no map is made. Name some, for example in the"
            " study `anomaly: {methods: [gaussian_noise]}`."
        )
    return MANIFEST


def manifest_of_scans_to_register(wildcards):
    """The manifest; without pairs nothing is started for it."""
    if not STUDY.registration.pairs:
        raise WorkflowError(
            "registration.pairs: 0, so nothing is registered. Say how many pairs of test scans, for example in the"
            " study `registration: {pairs: 12}`."
        )
    return MANIFEST


def points_of_shapes(stage):
    """What a stage reads shapes from; without a file of them nothing is started."""

    def points(wildcards):
        if STUDY.shape_completion.points is None:
            raise WorkflowError(
                "shape_completion.points: not set, so there are no shapes. Name a file (.npz), for example in the"
                " study `shape_completion: {points: shapes.npz}`."
            )
        if problems({stage}) and not there(stage):
            raise WorkflowError("\n".join(problems({stage})))
        return given(stage, [STUDY.shape_completion.points])

    return points


def manifest_of_scans_to_mark(wildcards):
    """The manifest; without anything to mark nothing is started for it."""
    if not STUDY.segmentation_ensemble.wanted:
        raise WorkflowError(
            "segmentation_ensemble.target: not set, so nothing is marked. Declare masks under preprocess.channels (kind:"
            " mask), and name them."
        )
    return MANIFEST


def manifest_of_scans_to_translate(wildcards):
    """The manifest; without a contrast to draw nothing is started for it."""
    if not STUDY.translation.wanted:
        raise WorkflowError(
            "translation.target: not set, so nothing is drawn. Declare contrasts under preprocess.channels, and name"
            " one."
        )
    return MANIFEST


def manifest_of_scans_to_harmonise(wildcards):
    """The manifest; without sites nothing is started for it."""
    if not STUDY.harmonisation.wanted:
        raise WorkflowError(
            "harmonisation.covariate: not set, so nothing is harmonised. Name the categorical covariate that says the"
            " site, and the site whose look is taken, for example in the study `harmonisation: {covariate: site, to:"
            " A}`."
        )
    return MANIFEST


def filter_problem():
    """That the privacy filter will have no threshold, in words; None where it will, or nobody knows yet."""
    detectors = len(STUDY.privacy.detectors or DETECTORS.names()) + bool(STUDY.pairs)  # one more of label maps
    needed = subjects_needed(STUDY.privacy.level, detectors)
    if Path(COHORT_CARD).is_file():
        try:
            subjects = json.loads(Path(COHORT_CARD).read_text())["splits"]["calibration"]["subjects"]
        except (ValueError, KeyError):  # the step that reads it says what is wrong with it
            return None
    elif STUDY.cohort.source == "simulated":
        subjects = round(STUDY.cohort.subjects * STUDY.splits.calibration)
    else:
        return None
    if SEALED or subjects >= needed:
        return None
    then = "the run stops before the release" if STUDY.privacy.enforce == "stop" else "the release will say so"
    return (
        f"privacy: the calibration split has {subjects} subjects, and the filter needs {needed} (privacy.level:"
        f" {STUDY.privacy.level:g}). It will reject nothing, and {then} (privacy.enforce: {STUDY.privacy.enforce})."
        " Raise splits.calibration, or the level."
    )


@cache
def warn_of_filter():
    """Say, once, where the privacy filter will have no threshold."""
    problem = filter_problem() if workflow.is_main_process else None
    if problem:
        logger.warning(f"warning: {problem}")


def manifest_of_a_filter(wildcards):
    """The manifest; what is wrong with the filter is said where there is one."""
    warn_of_filter()
    return MANIFEST


# A plan can be made without the scans, a run cannot.
if workflow.is_main_process:
    for problem in problems():
        logger.warning(f"warning: {problem}")
