# The study, and what is done before and after a run; no rules here.
import json
import os
import subprocess
import sys
from os import environ
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import update_config

from meddiff_steps import config as study_config
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import hold
from meddiff_steps.operations.status import another_cohort

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


def refuse_another_cohort():
    """Refuse to replace the results of another study of this name; say so where the cohort only lies elsewhere.

    Before this study is frozen, because what was frozen last says whose the results are.
    """
    state, text = another_cohort(STUDY) or ("ok", "")
    if state == "fail":
        raise WorkflowError(f"study: {text}")
    if text:
        print(f"warning: study: {text}", file=sys.stderr)


if workflow.is_main_process:
    refuse_another_cohort()
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
