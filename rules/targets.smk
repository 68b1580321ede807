# Targets that are asked for by name: what they are made from, or why they cannot be made.
from functools import cache

from meddiff_steps.privacy.size import subjects_needed
from meddiff_steps.synthesis.size import enlarged, plan_shards


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
