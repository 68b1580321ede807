# Paths of what more than one rule names.  The files of a network lie in one folder (`core.folders`), which one option
# names.
from meddiff_steps.core import folders as study_files
from meddiff_steps.core.folders import BUNDLE, GIVEN, NETWORK, TONE, files_of_base
from meddiff_steps.synthesis.size import plan_shards


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
MANIFEST = f"{RESULTS}/{study_files.MANIFEST}"
COHORT_CARD = f"{RESULTS}/cohort/card.json"
PREPROCESSED = f"{RESULTS}/preprocessed/shard-{{shard}}.arrow"
QC_SHARD = f"{RESULTS}/preprocessed/qc/shard-{{shard}}.parquet"
QC = f"{RESULTS}/{study_files.QUALITY}"
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
DECIDED = f"{RESULTS}/{study_files.DECISIONS}"


wildcard_constraints:
    shard=r"\d{4}\d*",  # Snakemake takes no {4,}
    generator=r"[1-9]\d*",
