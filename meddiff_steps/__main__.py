"""Command line: `python -m meddiff_steps STEP --help`.  Only the module of the step that is asked for is imported."""

from __future__ import annotations

import os
import sys

# `python -m` looks into the current folder first, which may be a stranger's release: nothing of it is imported, unless
# the package itself lies there.  (A package of our name would have been run by now; `-P` or the command prevents that.)
if __name__ == "__main__" and not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):
    sys.path.pop(0)

import difflib
import importlib
import logging
import signal

from meddiff_steps import __version__

#: Every step with one line of help, in the order data flows.
STEPS = {
    "freeze": "write the content-addressed config files of a study",
    "schema": "write the JSON Schema and the key reference of studies",
    "read_bundle": "print what a study has to say to start from a MONAI bundle or a model release",
    "ship_models": "make a model release small enough to come with this package",
    "simulate": "make the simulated brain cohort (a BIDS dataset)",
    "cohort": "read a cohort and write its manifest: scans, covariates, splits",
    "preprocess": "bring one shard of scans to the study's grid and intensity scale",
    "quality": "merge the quality tables and stop if too many scans were left out",
    "scan_pages": "show all preprocessed scans, the oddest first, for a person to keep or exclude",
    "masks": "number the structures of one shard of label maps, and turn them into signed distances",
    "init_weights": "convert given weights (a MONAI bundle, a model release) to start from",
    "text": "encode the texts of the cohort, once",
    "autoencoder": "train the autoencoder (resumable)",
    "decoder": "train the decoder that draws the detail which latents leave open (resumable)",
    "latents": "encode one shard of scans",
    "scale": "measure the scale of the training latents, and how they depend on covariates",
    "diffusion": "train the covariate-conditioned latent diffusion model (resumable)",
    "few_step": "distil the diffusion model into a student that draws in a few steps (resumable)",
    "tone": "fit the grey levels of generated images",
    "embedder": "train the learned copy detector",
    "calibrate": "measure how near unseen real subjects come to the training set",
    "plan": "decide which synthetic subjects to make, with which covariates",
    "generate": "sample and decode one shard of planned subjects",
    "filter": "reject and redraw images that are too near to a training scan",
    "privacy": "attack the cohort before and after the filter, and give the verdict",
    "neighbours": "show the released images most like training scans beside these; for the owner of the cohort alone",
    "gate": "stop before the release if a privacy gate fails, or there is no filter that filters",
    "second_model": "make a training cohort of accepted synthetic images, for a second model",
    "predictors": "learn to measure covariates, from real training scans",
    "images": "write one shard of synthetic images into the release",
    "describe": "complete the released dataset: participants, description, sidecars",
    "ledger": "seal the release: a row per subject, run records, roots, and a signature if there is a key",
    "export": "write one shard of a sealed release as a tar file for machine learning",
    "export_index": "list the tar files of an export, with checksums",
    "export_models": "pack the models that made a release",
    "segmenter": "train the network that measures volumes, on label maps of real scans",
    "evaluate": "measure covariate fidelity and sharpness against held-out real scans",
    "downstream_design": "freeze the design of the downstream study and check the plan against it",
    "downstream_plan": "choose the subjects that a further generator seed draws for the downstream study",
    "downstream_data": "gather the images that the study's classifiers may learn from",
    "downstream_train": "train the classifiers of some arms of the downstream study",
    "downstream_neighbours": "average what classifiers say of test scans and of neighbours that the model draws",
    "downstream_test": "open the test split once and compare the arms",
    "segmentation_study": "compare segmenters that learnt from real pairs, synthetic ones, and both",
    "text_fidelity": "measure whether images show what texts say, against held-out scans",
    "sampler_study": "compare samplers: quality against steps and seconds",
    "lineup": "show real and synthetic images in random order, for people to tell apart",
    "lineup_score": "what the answers of a line-up's readers are worth",
    "showcase": "sample the sweeps and interpolations that the report shows",
    "counterfactual": "show a real scan with one covariate moved, on its own grid",
    "inpainting": "draw hidden parts of real scans anew, on their own grids",
    "normative": "map how far real scans are from a reference population, on their own grids",
    "reconstruction": "make scans from incomplete measurements of them",
    "anomaly": "map what is unusual in scans, and say how well lesions are found",
    "registration_train": "train a network that brings scans of different people onto each other (resumable)",
    "registration": "bring scans onto scans of other people, wholly and in part",
    "shape_completion_train": "train the diffusion of points that completes shapes (resumable)",
    "shape_completion": "draw what is missing of shapes",
    "segmentation_model": "train what marks a structure, with noise and without (resumable)",
    "segmentation_few_labels": "train what marks a structure with few labels, pretrained or not (resumable)",
    "segmentation": "mark a structure in real scans by several draws, on their own grids",
    "translation_model": "train what draws another contrast, with noise and without (resumable)",
    "translation_unpaired": "train what draws another contrast from scans that are not paired (resumable)",
    "translation": "draw another contrast of real scans, on their own grids",
    "harmonisation_model": "train what takes scans of some sites to how another shows them (resumable)",
    "harmonisation": "take scans to the look of another site, on their own grids",
    "report": "write report.html",
    "plan_cost": "count what a study will cost: hours of GPUs and cores, jobs, memory and disk",
    "status": "how far a study is: jobs done, running and failed, hours used",
    "audit": "check a release, from its form to making images again",
    "regenerate": "make images of a release again from its ledger and its models: one subject, a shard, or all",
    "regenerated": "sum up whether the shards that were made again are what was released",
    "explain": "where one synthetic image comes from, as a tree",
    "diff": "which part of the recipe differs between two releases",
    "prove": "the path from one subject to the release's root",
    "keygen": "make a key to sign releases with",
}


def usage() -> str:
    width = max(map(len, STEPS)) + 2
    lines = [
        f"meddiff_steps {__version__}",
        "",
        "usage: python -m meddiff_steps STEP [OPTIONS]    (STEP --help lists the options)",
        "",
    ]
    return "\n".join(lines + [f"  {name:<{width}}{text}" for name, text in STEPS.items()])


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        try:
            print(usage(), flush=True)
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name = arguments[0].replace("-", "_")
    if name not in STEPS:
        near = difflib.get_close_matches(name, STEPS, 1)
        meant = f" Did you mean `{near[0]}`?" if near else ""
        print(f"error: there is no step {name!r}.{meant}\n\n{usage()}", file=sys.stderr)
        return 2
    # The shell of a rule ignores SIGTERM and SIGINT, so that it outlives the step, and the step inherits that: undo it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import typer

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    from meddiff_steps.command.ending import exit_code, tell_cost
    from meddiff_steps.provenance.record import recorded

    app.command()(recorded(name, importlib.import_module(f"meddiff_steps.steps.{name}").run))
    try:
        return exit_code(lambda: app(arguments[1:], prog_name=f"python -m meddiff_steps {name}"), name)
    finally:
        if "--config" in arguments or "MEDDIFF_WORKFLOW" in os.environ:  # a job of the workflow, not somebody's command
            tell_cost(name)


if __name__ == "__main__":
    sys.exit(main())
