"""Every kind of variant that a study chooses among, where its files are, and what each of them must say."""

from __future__ import annotations

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registry import Part, Registry

SAMPLERS = Registry(
    "sampler",
    "meddiff_steps.diffusion.samplers",
    keys=("generate.sampler", "sampler_study.samplers"),
    fields={
        "default_steps": int,
        "processes": list,
        "evaluations": str,
        "stochastic": bool,
        "source": str,
    },
)
FIRST_STAGES = Registry(
    "first stage",
    "meddiff_steps.models.first_stage",
    keys=("autoencoder.network",),
    fields={"source": str, "cost": str},
)
DRAWING_DECODERS = Registry(
    "drawing decoder",
    "meddiff_steps.models.drawing",
    keys=("decoder.network",),
    fields={"source": str, "cost": str},
)
DENOISERS = Registry(
    "denoiser",
    "meddiff_steps.models.denoiser",
    keys=("diffusion.network",),
    fields={"source": str, "cost": str, "conditions": list},
)
DETECTORS = Registry(
    "detector",
    "meddiff_steps.privacy.detectors",
    keys=("privacy.detectors",),
    fields={"source": str, "misses": str},
)
METRICS = Registry(
    "metric",
    "meddiff_steps.evaluation.realism",
    keys=("evaluate.metrics",),
    fields={"source": str, "blind_to": str},
)
FEATURE_SPACES = Registry(
    "feature space",
    "meddiff_steps.instruments.feature_spaces",
    keys=("evaluate.spaces",),
    fields={"source": str, "spatial_dims": list, "needs": str},
)
OPERATORS = Registry(
    "measurement operator",
    "meddiff_steps.imaging.operators",
    keys=("reconstruction.operators",),
    fields={"source": str, "measures": str, "strengths": str},
)
ANOMALY_MAPS = Registry(
    "anomaly map",
    "meddiff_steps.applications.anomaly_maps",
    keys=("anomaly.methods",),
    fields={"source": str, "needs": list, "cost": str},
)
APPLICATIONS = Registry(
    "application",
    "meddiff_steps.applications",
    fields={"source": str, "needs": list},
)

#: Draws in training, so that without it a training would count the code of samplers.
REHEARSAL = Part("diffusion.rare", "meddiff_steps.training.rehearsal")

#: All of them, for whoever lists or checks them.
REGISTRIES = (
    *(SAMPLERS, FIRST_STAGES, DRAWING_DECODERS, DENOISERS, DETECTORS, METRICS, FEATURE_SPACES),
    *(OPERATORS, ANOMALY_MAPS, APPLICATIONS),
)


def default_steps(sampler: str, num_train_timesteps: int) -> int:
    """A sampler's tested number of steps; never more than the process was trained on.

    At it, the spread of sampled Gaussian data (std 0.5, exact denoiser, default schedule) is within 5 % of the truth,
    with some reserve. Measured in tests/diffusion/test_samplers.py, in %: ddpm -1.4, ddim -3.5, ddim_even -4.0, pndm
    +1.0, heun +3.6, dpmpp +2.5, unipc +1.9; on a flow: flow -2.9, dpmpp +3.3, unipc +2.4.
    """
    return min(int(SAMPLERS.entry(sampler)["default_steps"]), num_train_timesteps)


def evaluations(sampler: str, num_inference_steps: int) -> int:
    """Network evaluations per sample (each is two passes where classifier-free guidance acts)."""
    steps = num_inference_steps
    counts = {"steps": steps, "2 * steps - 1": 2 * steps - 1, "steps + 1": steps + (steps > 1)}
    formula = SAMPLERS.entry(sampler)["evaluations"]
    if formula not in counts:
        raise UserError(f"sampler {sampler!r}: ENTRY['evaluations'] must be one of {list(counts)}, found {formula!r}.")
    return counts[formula]


def samplers_of(prediction_type: str, *, of_students: bool = False) -> tuple[str, ...]:
    """The samplers that can sample a model of this prediction type; or a student distilled from one (`few_step`)."""
    kind = "flow" if prediction_type == "flow" else "variance_preserving"
    return tuple(
        name
        for name in SAMPLERS.names()
        if kind in SAMPLERS.entry(name)["processes"] and is_of_students(name) == of_students
    )


def is_of_students(sampler: str) -> bool:
    """Whether a sampler draws from models that were distilled for it, and from no other."""
    return bool(SAMPLERS.entry(sampler).get("of_students", False))


def claimed_keys() -> dict[str, list[str]]:
    """Keys of `autoencoder` that some first stages alone read (their ENTRY's `keys`), and the names of these."""
    claimed: dict[str, list[str]] = {}
    for name in FIRST_STAGES.names():
        for key in FIRST_STAGES.entry(name).get("keys", []):
            claimed.setdefault(key, []).append(name)
    return claimed
