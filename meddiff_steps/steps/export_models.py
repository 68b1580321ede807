"""Step `export_models`: the models that made a release, packed for publication."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import Compute, Study, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.core.folders import BUNDLE, CARD
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.release import bundle, card
from meddiff_steps.release.facts import with_base
from meddiff_steps.release.models import NOT_STATED, README, pack, refuse_weights, weights_gate
from meddiff_steps.steps import options


def run(
    config: options.Config,
    root: Annotated[Path, typer.Option(help="root.json of the sealed release")],
    privacy: Annotated[Path, typer.Option(help="privacy/report.json")],
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    out: Annotated[Path, typer.Option(help="README.md to write, in the folder of the packed models")],
    decoder: options.Decoder = None,
    metrics: Annotated[
        Path | None, typer.Option(help="evaluation/metrics.json; without, the card tells no figures.")
    ] = None,
) -> None:
    """Pack the weights that made a sealed release, with cards, config, checksums, a MONAI bundle and a warning.

    Runs on request alone (release.models): weights can give away more of the training scans than images do. Where these
    can be told from the weights, it stops or says so (release.membership_limit, privacy.enforce).
    """
    if out.name != README:
        raise UserError(f"--out {out}: expected a path that ends in {README}. Its folder holds the models.")
    study = load_stage(config, "export_models")
    report = read_json(privacy)
    gate = weights_gate(report, study.release.membership_limit)
    refuse_weights(gate, study.privacy.enforce)
    models = {"autoencoder": autoencoder, **({"decoder": decoder} if decoder else {}), "diffusion": diffusion}
    cards = {name: with_base(read_json(folder / CARD), study.init_from) for name, folder in models.items()}
    licence = _licence(study, cards)
    facts = {
        "name": study.release.name,
        "description": f"Models of study {study.study}",
        "authors": ", ".join(study.release.authors),
        "copyright": f"Licence of the weights: {licence}",
        "license": licence,
        "weights_sha256": {name: each["weights_sha256"] for name, each in cards.items()},
        "privacy": {"verdict_of_images": report["verdict"], "weights": gate.to_json()},
    }
    names = [each["name"] for each in cards["diffusion"]["encoding"]["covariates"]]
    unlike, usage = study.unlike_monai, bundle.usage(names)
    parts = card.models(cards, gate.to_json(), read_json(metrics) if metrics else {}, licence, usage, unlike)

    def as_bundle() -> Sequence[str]:
        fabric = make_fabric(Compute(device="cpu", precision="32-true"), 1)
        model = TrainedModel.load(autoencoder, diffusion, fabric, decoder=decoder)
        bundle.write(model, study.generate, out.parent, facts, study.preprocess.spacing_mm)
        return BUNDLE

    written = as_bundle if unlike is None else None
    pack(models, root.parents[1], out.parent, study.release.name, report, parts, written)


def _licence(study: Study, cards: dict[str, Any]) -> str:
    """Of the weights; where they started from others, theirs goes with it."""
    said = [study.release.models_licence]
    for base in (each["base"] for each in cards.values() if "base" in each):
        theirs = (study.init_from.licence if study.init_from else "") or base.get("license") or NOT_STATED
        said.append(f"started from weights under: {theirs}")
    return "; ".join(dict.fromkeys(filter(None, said))) or NOT_STATED
