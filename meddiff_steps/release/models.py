"""The models of a release, packed so that somebody else can make its images again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import CHECKSUMS, atomic_path, read_json, sha256_file, write_atomic, write_checksums
from meddiff_steps.core.folders import NETWORK, TONE
from meddiff_steps.core.weights_digest import safetensors_digest
from meddiff_steps.privacy.verdict import SEVERITY, WEIGHTS, Gate, bounds_text, measured
from meddiff_steps.provenance import ledger
from meddiff_steps.release import seal

CONFIG, README = "config.json", "README.md"
#: What stands where nobody named a licence.
NOT_STATED = "not stated"


def weights_gate(privacy: Mapping[str, Any], limit: float) -> Gate:
    """Whether the weights themselves may go: how well they tell the scans that they learnt from (Carlini et al. 2022).

    Where a rare level was learnt, the few people with it are attacked as well, and the worse outcome counts: it is
    NOT_EVALUATED where no unseen people of the level could be compared with.

    Parameters
    ----------
    privacy
        privacy/report.json.
    limit
        Largest AUC, and as far below a half.
    """
    attacks = privacy.get("attacks", {})
    tried = [attacks, *([attacks["rare"]] if "rare" in attacks else [])]
    meaning = "whoever has the weights can tell whose scans they learnt from"
    gates = [measured(WEIGHTS, _told(one), limit, meaning) for one in tried]
    return max(gates, key=lambda gate: SEVERITY.index(gate.outcome))


def _told(attacks: Mapping[str, Any]) -> dict[str, Any] | None:
    """AUC of the denoising loss, where there were scans to tell apart, alike but for who was learnt from."""
    if attacks.get("strangers") == "all":
        return None
    return (attacks.get("denoising_loss") or {}).get("auc")


def refuse_weights(gate: Gate, enforce: str) -> None:
    """Stop where the study stops at a failed gate.

    Raises
    ------
    UserError
        `enforce` is `stop`, and the gate failed or could not be evaluated.
    """
    if enforce == "stop" and gate.outcome in ("FAIL", "NOT_EVALUATED"):
        raise UserError(
            f"release.models: {gate.name} is {_interval(gate.figure) or 'not measured'}, the limit"
            f" {bounds_text(gate.name, gate.limit)}: {gate.meaning}. Keep the weights (release.models: false), train"
            " less or on more scans, or, where the terms of the scans allow it, raise release.membership_limit."
        )


def pack(
    models: Mapping[str, Path],
    release: Path,
    folder: Path,
    title: str,
    privacy: Mapping[str, Any],
    card: Sequence[str] = (),
    bundle: Callable[[], Sequence[str]] | None = None,
) -> None:
    """Copy weights, cards and config, and write a README that names the release and warns.

    `regeneration.find_models` finds the models there.

    Parameters
    ----------
    models
        Folders of `autoencoder`, `diffusion`, and `decoder` where there is one.
    release
        Root of the sealed release that they made.
    folder
        Where to write.
    title
        The release's.
    privacy
        privacy/report.json; what could be told from the weights is read.
    card
        Further parts of the README: what the models are.
    bundle
        Writes more into `folder`, when it is certain that the models are those of the release; gives the names.

    Raises
    ------
    UserError
        The ledger is empty, or names other weights.
    """
    first = next(ledger.read_lines(release), None)
    if first is None:
        raise UserError(f"{release / seal.LINES}: no rows, so no weights to pack.")
    if "decoder" not in models:  # that of an earlier model
        shutil.rmtree(folder / "decoder", ignore_errors=True)
    names = []
    files = [(kind, place, NETWORK, kind) for kind, place in models.items()]
    for kind, place, (weights_name, card_name), folder_name in [
        *files,
        ("tone", models["diffusion"], TONE, "diffusion"),
    ]:
        weights, made = place / weights_name, place / card_name
        digest, wanted = safetensors_digest(weights), first[1]["recipe"][kind]
        if digest != wanted or read_json(made)["weights_sha256"] != wanted:
            raise UserError(
                f"{weights}: its weights are {digest[:16]}, the release was made by {wanted[:16]}. Run the workflow"
                " again, or give the right model."
            )
        for source, name in ((weights, f"{folder_name}/{weights_name}"), (made, f"{folder_name}/{card_name}")):
            with atomic_path(folder / name) as path:
                shutil.copyfile(source, path)
            names.append(name)
    names += bundle() if bundle is not None else ()
    with atomic_path(folder / CONFIG) as path:
        shutil.copyfile(release / seal.CONFIG, path)
    write_atomic(folder / README, _readme(title, sha256_file(release / seal.ROOT), privacy, card).encode())
    write_checksums(folder, [*names, CONFIG, README])


def _interval(figure: Mapping[str, Any]) -> str:
    if figure.get("value") is None:
        return ""
    if figure["low"] is None:
        return f"{figure['value']:.2f} (no interval: too few on one side)"
    return "{value:.2f} [{low:.2f}, {high:.2f}]".format(**figure)


def _readme(title: str, root_sha256: str, privacy: Mapping[str, Any], card: Sequence[str]) -> str:
    figure = _interval(_told(privacy.get("attacks", {})) or {})
    told = "What the weights give away was not measured."
    if figure:
        told = (
            f"Whoever has the weights could tell training scans by their denoising loss with AUC {figure} (0.5: not at"
            " all)."
        )
    return f"""# Models of {title}

The weights that made the release whose provenance/root.json has SHA-256 {root_sha256}.

**Weights can give away more of the scans that they learnt from than the released images do.** The privacy verdict of
the release (`{privacy["verdict"]}`) is about its images, not about these files. {told}
With the seed of the release they also make the images that its privacy filter rejected. Share them only under terms
that cover the training scans.

- autoencoder/, decoder/, diffusion/: model.safetensors and card.json; diffusion/tone.*: grey levels
- {CONFIG}: the study
- {CHECKSUMS}: `sha256sum -c {CHECKSUMS}` checks the files

Make images of the release again, and compare: `python -m meddiff_steps audit RELEASE --models THIS_FOLDER`
Start another study from them: `init_from: {{path: THIS_FOLDER}}`; `python -m meddiff_steps read_bundle THIS_FOLDER`
writes what else it has to say.
""" + "".join(f"\n{part}\n" for part in card)
