"""Step `anomaly`: maps of what is unusual in scans, on their own grids, as a BIDS derivative."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from safetensors.numpy import load_file

from meddiff_steps import config as settings_of
from meddiff_steps.applications import anomaly, derivative
from meddiff_steps.applications.anomaly import Mapped
from meddiff_steps.applications.anomaly_maps.base import REFERENCE_SCANS, Context, Mapper, Scan, Translations, build
from meddiff_steps.applications.guides import latent_guides
from meddiff_steps.applications.scans import CALIBRATED_ON, chosen_scans
from meddiff_steps.cohort.manifest import having
from meddiff_steps.cohort.texts import without_text
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import Study, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, read_json, write_atomic, write_json
from meddiff_steps.core.folders import NETWORK, OF_IMAGE_TO_IMAGE
from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation import anomaly as judging
from meddiff_steps.imaging.places import lesion, mask_of_scan, mask_on_grid, with_lesion
from meddiff_steps.imaging.restoration import restore, restore_numbers
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.report.application_figures import completion_sheet
from meddiff_steps.steps import options

log = logging.getLogger(__name__)

README = """# Anomaly maps

What is unusual in each scan, by a generative model that knows heads of a cohort. The scans are of real people: handle
maps and images as the scans themselves. A map is no diagnosis: figures.json says how many lesions are missed, and how
much that is healthy is marked.

Per scan, on its own grid: `desc-anomaly` is the map of the method in the sidecar, in standard deviations of healthy
scans; `desc-anomalyMask` is what lies above its threshold (1); `desc-healed` the scan as the first method expects it.
measurements.parquet has the score of every scan by every method.
"""
#: Scans on the contact sheet.
SHOWN = 10
#: Standard deviations that are white in a picture.
WHITE = 10.0
#: The map that others are compared with.
REFERENCE = "z_score"


def run(
    config: options.Config,
    manifest: options.Manifest,
    qc: options.Quality,
    images: options.Images,
    out: Annotated[Path, typer.Option(help="folder to write: a BIDS derivative dataset, figures.json, pictures")],
    autoencoder: Annotated[
        Path | None, typer.Option(help="folder autoencoder/; left out where no method needs a trained model")
    ] = None,
    diffusion: Annotated[Path | None, typer.Option(help="folder diffusion/; left out with the autoencoder")] = None,
    latents: Annotated[
        list[Path] | None,
        typer.Option(help="latent shards of the cohort, which the predictor of `classifier` learns from"),
    ] = None,
    scale: Annotated[Path | None, typer.Option(help="latents/scale.safetensors, which goes with them")] = None,
    translation: Annotated[
        Path | None, typer.Option(help="folder of the translation to another contrast, for `modality_cycles`")
    ] = None,
    back: Annotated[Path | None, typer.Option(help="folder of the way back, for the same")] = None,
    threads: options.Threads = 1,
) -> None:
    """Map what is unusual in scans, and measure how well lesions are found where they are known."""
    study = load_stage(config, "anomaly")
    settings = study.anomaly
    cohort = Images.of_scans(images, manifest, study.covariates)
    worker = _Worker(study, cohort, pd.read_parquet(qc).set_index("scan_id"))
    scans = chosen_scans(cohort.table, settings.scans, settings.most_scans, "anomaly", CALIBRATED_ON)
    known = worker.healthy("calibration", settings.most_calibration_scans)
    anomaly.check_people(known["subject_id"].nunique(), settings)
    anomaly.warn_of_scans_each(known["subject_id"].tolist(), scans["subject_id"].tolist())
    fabric, model, digests = make_fabric(study.compute, threads), None, dict[str, str]()
    if autoencoder is not None and diffusion is not None:
        model = TrainedModel.load(autoencoder, diffusion, fabric, study.compute, toned=False)
        for network in (model.denoiser, model.first_stage):
            network.requires_grad_(False)
        digests |= model.digests
    elif settings.need("a trained model"):
        raise UserError("anomaly.methods: some need a trained model; give --autoencoder and --diffusion.")
    translations = None
    if translation is not None and back is not None:
        translations = Translations(translation, back, fabric)
        cards = {"translation": translation / OF_IMAGE_TO_IMAGE["regression"][1], "back": back / NETWORK[1]}
        digests |= {name: read_json(card)["weights_sha256"] for name, card in cards.items()}
        worker = replace(worker, contrasts=tuple(read_json(cards["translation"])["target"]))
    guides: Any = ((),)
    if model is not None and settings.need("latents of the cohort") and latents and scale:
        ((covariate, value),) = settings.healthy.items()
        wanted = settings_of.Counterfactual(covariate=covariate, classifier_guidance=settings.classifier_guidance)
        training = cohort.of_splits(["train"])
        guides = latent_guides(wanted, [value], training, Shards(latents), load_file(scale), model.encoding)
    reference: list[Scan] = []
    if settings.need("healthy validation scans"):
        known_well = worker.healthy("val", min(REFERENCE_SCANS, settings.most_calibration_scans))
        reference = [worker.scan(row) for row in known_well.to_dict("records")]
    context = Context(model, settings, reference, guides[0], translations)
    mappers = {name: build(name, context) for name in settings.methods}

    healthy = []
    for number, row in enumerate(known.to_dict("records")):
        healthy.append(Mapped.of(worker.scan(row), mappers, settings).for_thresholds())
        log.info("%s: done, %d of %d healthy scans for thresholds", row["scan_id"], number + 1, len(known))
    calibrations, members = anomaly.calibrated(healthy, known["subject_id"].tolist(), settings)
    del healthy
    cases = []
    ill = anomaly.planted(len(scans), f"{study.seed}/anomaly") if settings.lesions.given else {}
    for number, row in enumerate(scans.to_dict("records")):
        case = worker.case(row, ill.get(number), mappers)
        cases.append(replace(case, mapped=case.mapped.with_ensemble(calibrations, members)))
        log.info("%s: done, %d of %d", row["scan_id"], number + 1, len(scans))

    shutil.rmtree(out, ignore_errors=True)
    tables, found = [], []
    reference_counts: judging.Counts | None = None
    chosen: dict[str, Any] = {"resamples": study.evaluate.bootstrap, "seed": study.seed}
    for name, calibration in calibrations.items():
        judged = [worker.judged(case, calibration.scaled(case.mapped.maps[name])) for case in cases]
        scores = [calibration.scored(case.mapped.maps[name], settings.score_share) for case in cases]
        limit, score_limit = calibration.threshold, calibration.score_threshold
        table = pd.DataFrame(
            [judging.measured(scan, limit, own, score_limit) for scan, own in zip(judged, scores, strict=True)]
        )
        entry: dict[str, Any] = {"method": name, "calibration": asdict(calibration)}
        new = [i for i, case in enumerate(cases) if case.row["split"] not in CALIBRATED_ON]
        unseen = [judged[i] for i in new]
        if worker.truth_known and any(scan.truth.any() for scan in unseen):
            figures, counts = judging.figures(
                name, unseen, table.iloc[new].reset_index(drop=True), calibration.threshold, reference_counts, **chosen
            )
            reference_counts = counts if name == REFERENCE else reference_counts
            entry |= figures
        elif not worker.truth_known:
            table = table.drop(columns=["lesion_voxels", "false_share", "false_marks", "dice"])
        found.append(entry)
        tables.append(table.assign(method=name, split=[case.row["split"] for case in cases]))
    facts: dict[str, Any] = {"scans": scans["scan_id"].tolist(), "settings": settings.model_dump(mode="json")}
    facts |= {"model": digests, "calibration_scans": known["scan_id"].tolist(), "methods": found}
    with atomic_path(out / "measurements.parquet") as path:
        pd.concat(tables, ignore_index=True).to_parquet(path, index=False)
    write_json(out / "figures.json", facts)
    for case in cases:
        _write_images(study, out, case, calibrations[anomaly.ENSEMBLE])
    write_atomic(out / "contact-sheet.png", _sheet(worker, cases, [*members, anomaly.ENSEMBLE], calibrations))
    derivative.complete(out, "Anomaly maps", README, digests, "anomaly")
    log.info("%s: %d scans, thresholds from %d healthy ones", out, len(scans), len(known))


@dataclass(frozen=True)
class _Case:
    """A scan whose lesions are looked for: its rows of the manifest and of the quality table, its maps, and how much of
    each voxel of the study's grid a lesion is that was put into it.
    """

    row: dict[Any, Any]
    facts: pd.Series
    mapped: Mapped
    share: np.ndarray | None


@dataclass(frozen=True)
class _Worker:
    """Scans of the cohort, as they are read and as their maps are judged; `contrasts` are read beside each."""

    study: Study
    cohort: Images
    quality: pd.DataFrame
    contrasts: tuple[str, ...] = ()

    @property
    def settings(self) -> settings_of.Anomaly:
        return self.study.anomaly

    @property
    def truth_known(self) -> bool:
        """Whether it is known where lesions are."""
        return self.settings.masks is not None or self.settings.lesions.given

    def healthy(self, split: str, most: int) -> pd.DataFrame:
        """Scans of a split that have no lesion: by their masks, and by covariates where the study says so; all of each
        person, where that leaves enough people, for a score is the highest of a person's scans.
        """
        part = self.cohort.of_splits([split])
        table = having(part.table, self.settings.healthy)
        if self.settings.masks is not None:
            table = table[[not self._mask(row).any() for row in table.to_dict("records")]]
        return part.taken(table.index.tolist()).whole_units(most, anomaly.people_needed(self.settings)).table

    def _mask(self, row: dict[Any, Any]) -> np.ndarray:
        assert self.settings.masks is not None
        return mask_of_scan(self.settings.masks, row, self.quality.loc[row["scan_id"]], "anomaly.masks")

    def scan(self, row: dict[Any, Any]) -> Scan:
        """A scan as it is, without what would tell whether it is healthy: covariates, and its report."""
        at = np.array([row["row"]])
        image, *contrasts = (self.cohort.shards.tensors(name, at)[0] for name in ("image", *self.contrasts))
        subject = without_text(pd.DataFrame([row])).assign(**dict.fromkeys(self.settings.healthy))
        others = np.concatenate(contrasts) if contrasts else None
        return Scan(image, subject, f"{self.study.seed}/anomaly/{row['scan_id']}", others)

    def case(self, row: dict[Any, Any], number: int | None, mappers: dict[str, Mapper]) -> _Case:
        """A scan with its maps, and with the lesion of a number put in, where it gets one."""
        settings, facts, scan, share = self.settings, self.quality.loc[row["scan_id"]], self.scan(row), None
        if number is not None:
            interior = anomaly.Head.of(scan.image[0], settings.margin_voxels).interior
            spacing = self.study.preprocess.voxel_mm or (1.0,) * interior.ndim
            share = lesion(settings.lesions, number, facts, interior, spacing, philox(scan.root, "place"), "anomaly")
            scan = replace(scan, image=with_lesion(scan.image[0], share, settings.lesions.contrast)[None])
        return _Case(row, facts, Mapped.of(scan, mappers, settings), share)

    def judged(self, case: _Case, values: np.ndarray) -> judging.Judged:
        """A map beside the truth, both on the scan's own grid."""
        region = restore(case.mapped.head.whole.astype(np.uint8), case.facts, kind="mask")[0] > 0
        if self.settings.masks is not None:
            truth = self._mask(case.row)
        elif case.share is not None:
            truth = restore((case.share >= 0.5).astype(np.uint8), case.facts, kind="mask")[0] > 0
        else:
            truth = np.zeros(region.shape, dtype=bool)
        return judging.Judged(case.row["scan_id"], case.row["subject_id"], _on_scan(values, case.facts), truth, region)

    def outline(self, case: _Case) -> np.ndarray:
        """Where the lesion is on the study's grid, (*spatial) in [0, 1], for pictures."""
        shape = case.mapped.head.whole.shape
        if case.share is not None:
            return case.share
        if self.settings.masks is None:
            return np.zeros(shape, np.float32)
        return mask_on_grid(self.settings.masks, case.row, case.facts, shape, "anomaly.masks")


def _on_scan(values: np.ndarray, facts: pd.Series) -> np.ndarray:
    """A map on the scan's own grid, NaN where none is made."""
    made = np.isfinite(values)
    there = restore(made.astype(np.uint8), facts, kind="mask")[0] > 0
    return np.where(there, restore_numbers(np.where(made, values, values[made].min()), facts)[0], np.nan)


def _write_images(study: Study, out: Path, case: _Case, calibration: anomaly.Calibration) -> None:
    source = derivative.Source(case.row["scan_id"], case.row["path"], study.release.suffix)
    own = case.mapped.maps[anomaly.ENSEMBLE]
    values = _on_scan(calibration.scaled(own), case.facts)
    marked = calibration.marked(values)
    said: dict[str, Any] = {"Method": anomaly.ENSEMBLE, "Units": "standard deviations of healthy scans"}
    said |= {"Threshold": calibration.threshold, "ScoreThreshold": calibration.score_threshold}
    said |= {"Score": calibration.scored(own, study.anomaly.score_share), "SkullStripped": study.release.skull_stripped}
    first, image = next(iter(case.mapped.healed.items()))
    healed, affine = restore(image, case.facts)
    derivative.write_image(out, source, "anomaly", np.nan_to_num(values, nan=0.0), affine, said, span=(0.0, WHITE))
    derivative.write_image(out, source, "anomalyMask", marked.astype(np.float32), affine, said, span=(0.0, 1.0))
    facts = {"Method": first, "SkullStripped": study.release.skull_stripped}
    derivative.write_image(out, source, "healed", healed, affine, facts)


def _sheet(
    worker: _Worker, cases: list[_Case], names: list[str], calibrations: dict[str, anomaly.Calibration]
) -> bytes:
    """Scans, their lesions, what they are expected to be, and the maps, which are grey at their thresholds."""
    outlines = [worker.outline(case) for case in cases]
    shown = [i for i, outline in enumerate(outlines) if outline.any()] or list(range(len(cases)))
    chosen = [shown[i] for i in np.unique(np.linspace(0, len(shown) - 1, min(SHOWN, len(shown))).astype(int))]
    tiles, regions = [], []
    for i in chosen:
        mapped = cases[i].mapped
        maps = [calibrations[name].shown(mapped.maps[name])[None] for name in names]
        tiles.append(
            (
                mapped.scan.subject["scan_id"].iloc[0],
                [mapped.scan.image, outlines[i][None], *mapped.healed.values(), *maps],
            )
        )
        regions.append(outlines[i] > 0 if outlines[i].any() else mapped.head.whole)
    captions = ["scan", "lesion", *(f"healed: {name}" for name in cases[0].mapped.healed), *names]
    return completion_sheet("Anomaly maps", tiles, captions, regions)
