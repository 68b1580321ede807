# Files of the user's, which the study names. Where they are gone, what was made of them is taken as it is: a cohort need
# not stay mounted. Not so when the study has changed since: Snakemake would leave out a rule whose input is missing,
# without a word.
from typing import NamedTuple

from meddiff_steps.cohort.base import check_units
from meddiff_steps.provenance.record import record_path

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


def other_units(stages):
    """A covariate that given weights are still to be told in another unit than they learnt it in, in words."""
    if INIT and (stages is None or "init_weights" in stages) and not kept("init_weights"):
        try:
            check_units(BASE, STUDY.covariates)
        except UserError as error:
            return [str(error)]
    return []


def problems(stages=None):
    """What of the user's files is not where or what the study says, in words: of all stages, or of some."""
    return other_units(stages) + [
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

# A plan can be made without the scans, a run cannot.
if workflow.is_main_process:
    for problem in problems():
        logger.warning(f"warning: {problem}")
