# Population-scale synthesis of medical images, from a cohort to a released synthetic cohort.
#
#   snakemake --cores 2                                            the demo (config/config.yaml)
#   snakemake --cores 2 --configfile config/studies/ixi.yaml       a study
#   snakemake --profile slurm --configfile my-study.yaml           the same on a cluster
from snakemake.utils import min_version

min_version("9.19")


report: "workflow/report/workflow.rst"


include: "rules/common.smk"
include: "rules/paths.smk"
include: "rules/given.smk"
include: "rules/jobs.smk"
include: "rules/targets.smk"
include: "rules/remote.smk"
include: "rules/cohort.smk"
include: "rules/preprocess.smk"
include: "rules/init_weights.smk"
include: "rules/autoencoder.smk"
include: "rules/decoder.smk"
include: "rules/latents.smk"
include: "rules/text.smk"
include: "rules/diffusion.smk"
include: "rules/few_step.smk"
include: "rules/generate.smk"
include: "rules/privacy.smk"
include: "rules/release.smk"
include: "rules/exports.smk"
include: "rules/evaluate.smk"
include: "rules/lineup.smk"
include: "rules/second_model.smk"
include: "rules/pairs.smk"
include: "rules/downstream.smk"
include: "rules/report.smk"
include: "rules/counterfactual.smk"
include: "rules/inpainting.smk"
include: "rules/normative.smk"
include: "rules/reconstruction.smk"
include: "rules/anomaly.smk"
include: "rules/registration.smk"
include: "rules/shape_completion.smk"
include: "rules/segmentation.smk"
include: "rules/translation.smk"
include: "rules/harmonisation.smk"
include: "rules/audit.smk"
include: "rules/regenerate.smk"


rule all:
    default_target: True
    input:
        RELEASE,
        LEDGER,
        METRICS,
        REPORT,
        NEIGHBOURS,
        TEXT_FIDELITY,
        REQUESTED,
        # Weights, too: Snakemake makes a missing file again only if something that is not there yet needs it.
        AUTOENCODER,
        DECODER,
        DIFFUSION[:2],
        RELEASED_MODEL,
    localrule: True
    message:
        f"Done. Look at {REPORT} first; the synthetic cohort is in {RELEASE_ROOT}"


rule augment:
    input:
        results_of_downstream_study,
    localrule: True
    message:
        "The downstream study is in {input[0]}"


rule release:
    input:
        RELEASE,
        LEDGER,
        REQUESTED,
    localrule: True
    message:
        f"The synthetic cohort is in {RELEASE_ROOT}"
