"""The workflow's own files: they parse, are formatted, and plan jobs, also where no cluster is."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_study
import yaml

from meddiff_steps.config import freeze, parse_study, published
from meddiff_steps.core.folders import DERIVATIVE, NETWORK, OF_STEP

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "MEDDIFF_STUDY"} | variables
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_linter_is_content():
    done = run("snakemake", "--lint")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not (BIN / "snakefmt").exists(), reason="snakefmt is not installed")
def test_the_rules_are_formatted():
    done = run("snakefmt", "--check", "Snakefile", "rules")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not (BIN / "ruff").exists(), reason="ruff is not installed")
def test_the_code_is_clean():
    assert run("ruff", "check", ".").returncode == 0
    assert run("ruff", "format", "--check", ".").returncode == 0


@pytest.mark.skipif(not (BIN / "mypy").exists(), reason="mypy is not installed")
def test_the_types_are_clean():
    done = run("mypy")
    assert done.returncode == 0, done.stdout


def test_the_slurm_profile_plans_the_published_scale(tmp_path, monkeypatch):
    """Less than `dry_run.py` allows on a quiet machine: what the processor did, which a busy one enlarges by half."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    dry_run = importlib.import_module("dry_run")
    planned = dry_run.measure(100_000, tmp_path)
    assert 900 < planned.jobs < dry_run.JOBS
    assert planned.megabytes < dry_run.MEGABYTES
    assert planned.cpu < 1.5 * dry_run.SECONDS


def test_no_rule_of_many_jobs_reads_all_shards_of_another_stage():
    """Planning takes time for every pair of a job and a file that it reads."""
    many = set()
    for path in (ROOT / "rules").glob("*.smk"):
        blocks = re.findall(
            r"^ *(?:use )?rule ([\w ]+?)(?: with)?:\n(.*?)(?=^ *(?:use )?rule |\Z)", path.read_text(), re.M | re.S
        )
        for name, body in blocks:
            inputs = re.search(r"^ +input:\n(.*?)^ +output:", body, re.M | re.S)
            if re.search(r"^ +log:\n.*\{\{(?!network|beside)\w+\}\}", body, re.M):  # networks are a few
                assert inputs and not re.search(r"COHORT_IMAGES|expand\((?!f)", inputs.group(1)), name
                many.add(name.rpartition(" ")[2])
    assert {"preprocess", "latents", "generate", "filter", "images", "export", "downstream_filter"} <= many


@pytest.mark.parametrize(
    ("sampler", "target", "expected"),
    [
        ("consistency", "all", {"few_step", "few_step_tone"}),
        ("dpmpp", "all", {"tone"}),
        ("dpmpp", "sampler_study", {"few_step", "few_step_tone", "tone"}),
        ("consistency", "counterfactual", {"tone"}),
    ],
)
def test_a_student_is_distilled_for_whom_it_draws(sampler, target, expected, tmp_path):
    study = tiny_study.LEAN | {
        "few_step": {"method": "consistency"},
        "generate": tiny_study.STUDY["generate"] | {"sampler": sampler},
        "counterfactual": {"covariate": "age", "values": [50]},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    arguments = ["--directory", str(tmp_path), "--configfile", str(tmp_path / "study.yaml")]
    done = run("snakemake", "-n", "-p", target, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    planned = set(re.findall(r"^(\w+) +\d+$", done.stdout, re.M))
    assert planned & {"few_step", "few_step_tone", "tone"} == expected
    drawn_by = set(re.findall(r"meddiff_steps generate .*--diffusion (\S+)", done.stdout))
    assert drawn_by == (
        {f"results/tiny/{'few_step' if sampler == 'consistency' else 'diffusion'}"} if target == "all" else set()
    )


@pytest.fixture
def bare_path(tmp_path) -> str:
    """A PATH with a shell and this Python, where no scheduler can be found."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "sh", "which"):  # the Slurm plugin asks `which` for the programs of Slurm
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return f"{tmp_path}/bin{os.pathsep}{BIN}"


@pytest.mark.parametrize("profile", ["slurm", "profiles/workstation", "profiles/kubernetes"])
def test_every_profile_plans_a_study_where_no_scheduler_is_installed(profile, bare_path, tmp_path):
    if profile == "profiles/kubernetes":
        pytest.importorskip("snakemake_executor_plugin_cluster_generic")
    done = run(
        "snakemake",
        "--profile",
        profile,
        "-n",
        "--configfile",
        "config/studies/ixi.yaml",
        "--config",
        f"results={tmp_path}",
        PATH=bare_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^diffusion\s+1", done.stdout, re.M)


def test_every_word_that_a_rule_gives_to_the_shell_is_quoted():
    """`params.options` is quoted where it is made; a step, threads and a shard are never the user's words."""
    plain = {"params.step", "params.options", "threads", "wildcards.shard"}
    for path in (ROOT / "Snakefile", *sorted((ROOT / "rules").glob("*.smk"))):
        text = path.read_text()
        commands = re.findall(r"shell:\n((?: +\".*\"\n)+)", text) + re.findall(r"^STEP = (.*)$", text, re.M)
        for word in re.findall(r"\{([^{}]+)\}", "".join(commands)):
            assert word.endswith(":q") or word in plain, f"{path.name}: {word}"


def test_paths_of_any_characters_reach_no_shell(tmp_path):
    odd = 'o\'d "d" $(touch ran); touch ran; `touch ran` & x > ran'
    study = tiny_study.STUDY | {"results": odd, "cohort": tiny_study.STUDY["cohort"] | {"subjects": 20}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    tiny_study.run(tmp_path, "--until", "cohort")
    assert (tmp_path / odd / "tiny/cohort/manifest.parquet").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {".snakemake", "study.yaml", odd}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["counterfactual"], "counterfactual.covariate: not set"),
        (["inpainting"], "inpainting.hole: not set"),
        (["normative"], "normative.wanted: not set"),
        (["reconstruction"], "reconstruction.operators: not set"),
        (["anomaly"], "anomaly.methods: not set"),
        (["registration"], "registration.pairs: 0"),
        (["shape_completion"], "shape_completion.points: not set"),
        (["shape_completion", "--config", "shape_completion={points: no.npz}"], "points: no.npz is not there"),
        (["segmentation"], "segmentation_ensemble.target: not set"),
        (["translation"], "translation.target: not set"),
        (["harmonisation"], "harmonisation.covariate: not set"),
        (["augment", "--config", "downstream={}"], "downstream.target: not set"),
        (["regenerate", "--config", "sealed=~/release"], "begins with ~"),
        (["regenerate", "--config", "sealed=release", "models=a{b}"], "has braces"),
        (["all", "--config", "results=a{b}"], "results: the path has braces"),
        (["all", "--config", "seed=True"], "Put it in quotes"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_job(arguments, expected, tmp_path):
    done = run("snakemake", "-n", "--directory", str(tmp_path), *arguments)
    assert done.returncode != 0
    assert expected in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("enforce", "subjects", "said"),
    [
        ("stop", 90, "the filter needs 59 (privacy.level: 0.05). It will reject nothing, and the run stops before the"),
        ("report", 90, "It will reject nothing, and the release will say so (privacy.enforce: report)"),
        ("stop", 900, ""),
    ],
)
def test_a_dry_run_says_that_the_filter_will_have_no_threshold(enforce, subjects, said, tmp_path):
    study = tiny_study.STUDY | {"privacy": {"enforce": enforce}}
    study |= {"cohort": study["cohort"] | {"subjects": subjects}, "splits": {}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    options = ["--directory", str(tmp_path), "--configfile", str(tmp_path / "study.yaml")]
    command = ["snakemake", "-n", "calibrate", *options]
    without = run("snakemake", "-n", "cohort", *options)
    assert "reject nothing" not in without.stdout + without.stderr
    done = run(*command)
    assert done.returncode == 0
    shown = done.stdout + done.stderr
    assert said in shown if said else "reject nothing" not in shown
    card = tmp_path / "results/tiny/cohort/card.json"
    card.parent.mkdir(parents=True)
    card.write_text(json.dumps({"splits": {"calibration": {"subjects": 3}}}))
    done = run(*command)
    shown = done.stdout + done.stderr
    assert "the calibration split has 3 subjects" in shown, "what was read counts, not what was expected"


def test_a_key_that_is_given_twice_is_refused_by_the_workflow(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tiny_study.STUDY) + "covariates: {sex: {levels: [no, yes]}}\n")
    done = run("snakemake", "-n", "--directory", str(tmp_path), "--configfile", str(tmp_path / "study.yaml"))
    assert "key `covariates` is on line" in done.stdout + done.stderr


def test_changed_tables_are_noticed_and_missing_ones_are_no_obstacle(tmp_path):
    results, participants, requests = (
        tmp_path / "results/tiny",
        tmp_path / "bids/participants.tsv",
        tmp_path / "requests.csv",
    )
    study = {
        "study": "tiny",
        "results": f"{tmp_path}/results",
        "cohort": {"source": "bids", "root": f"{tmp_path}/bids"},
    }
    study |= {"covariates": {"age": {"unit": "year", "range": [0, 120]}}}
    study["plan"] = [{"name": "a", "subjects": 1, "covariates": "table", "table": str(requests)}]

    def planned() -> set[str]:
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
        target = f"{results}/generated/shard-0000.arrow"
        done = run(
            "snakemake", "-n", "--rerun-triggers", "mtime", "--configfile", f"{tmp_path}/study.yaml", "--", target
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return {rule for rule in ("cohort", "plan") if re.search(rf"^{rule} +1$", done.stdout, re.M)}

    assert planned() == {"cohort", "plan"}, "also without the tables"
    parts = [f"preprocessed/{name}" for i in (0, 1) for name in (f"shard-000{i}.arrow", f"qc/shard-000{i}.parquet")]
    for name in ("cohort/manifest.parquet", "cohort/card.json", *parts, "preprocessed/qc.parquet", "plan.parquet"):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).touch()
    assert not planned(), "what was read once is taken as it is where the tables are gone"
    participants.parent.mkdir()
    for table in (participants, requests):
        table.touch()
        os.utime(table, (0, 0))
    assert not planned()
    os.utime(requests)
    assert planned() == {"plan"}
    os.utime(participants)
    assert planned() == {"cohort", "plan"}
    participants.parent.rename(tmp_path / "moved")
    study["cohort"]["root"] = f"{tmp_path}/moved"
    assert planned() == {"cohort", "plan"}


def test_a_changed_template_is_noticed_and_a_missing_one_stops_a_run(tmp_path):
    template, results = tmp_path / "template.nii.gz", tmp_path / "results/tiny"
    study = {
        "study": "tiny",
        "results": f"{tmp_path}/results",
        "cohort": {"source": "bids", "root": f"{tmp_path}/bids"},
        "covariates": {"age": {"unit": "year", "range": [0, 120]}},
        "plan": [{"name": "a", "subjects": 1}],
        "preprocess": {"registration": {"template": str(template)}, "shards": 1},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    (tmp_path / "bids").mkdir()
    shard = results / "preprocessed/shard-0000.arrow"

    def snakemake(*options: str) -> subprocess.CompletedProcess[str]:
        given = ("--rerun-triggers", "mtime", "--configfile", f"{tmp_path}/study.yaml", "--", str(shard))
        return run("snakemake", *options, *given)

    planned = snakemake("-n")
    assert planned.returncode == 0 and re.search(r"^preprocess +1$", planned.stdout, re.M)
    said = f"preprocess.registration.template: {template} is not there"
    assert said in planned.stdout + planned.stderr, "a plan can be made, and says so"
    refused = snakemake("--cores", "1")
    assert refused.returncode != 0 and said in refused.stdout + refused.stderr and not (results / "cohort").exists()

    made = [*(results / "cohort" / name for name in ("manifest.parquet", "card.json")), shard]
    made.append(results / "preprocessed/qc/shard-0000.parquet")
    template.touch()
    assert f"--template {template} " in snakemake("-n", "-p").stdout
    os.utime(template, (0, 0))
    for name in made:
        name.parent.mkdir(parents=True, exist_ok=True)
        name.touch()
    assert "Nothing to be done" in snakemake("-n").stdout
    os.utime(template)
    assert re.search(r"^preprocess +1$", snakemake("-n").stdout, re.M)


def test_given_weights_that_know_another_unit_stop_a_run(tmp_path):
    models = ROOT / "meddiff_steps/shipped/simulated-5mm"
    study = {
        "study": "tiny",
        "results": f"{tmp_path}/results",
        "cohort": {"source": "simulated"},
        "covariates": {"age": {"unit": "month", "range": [0, 1200]}},
        "init_from": {"path": str(models)},
        "autoencoder": {"optimiser": {"steps": 0}},
        "plan": [{"name": "a", "subjects": 1}],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    card = f"{tmp_path}/results/tiny/init/diffusion/card.json"

    def snakemake(*options: str) -> subprocess.CompletedProcess[str]:
        return run("snakemake", *options, "--configfile", f"{tmp_path}/study.yaml", "--", card)

    said = "covariates.age.unit: 'month', but the given diffusion network learnt age in 'year'"
    planned = snakemake("-n", "-p")
    assert planned.returncode == 0 and said in planned.stdout + planned.stderr
    assert f"--manifest {tmp_path}/results/tiny/cohort/manifest.parquet" in planned.stdout
    refused = snakemake("--cores", "1")
    assert refused.returncode != 0 and said in refused.stdout + refused.stderr
    assert not (tmp_path / "results/tiny/cohort").exists()


def test_a_table_of_excluded_scans_reaches_preprocessing(tmp_path):
    study = tiny_study.STUDY | {"preprocess": tiny_study.STUDY["preprocess"] | {"exclude": "excluded.tsv"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    (tmp_path / "excluded.tsv").touch()
    done = run(
        "snakemake", "-n", "-p", "quality", "--directory", str(tmp_path), "--configfile", f"{tmp_path}/study.yaml"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--exclude excluded.tsv" in done.stdout


def test_a_file_that_is_gone_stops_a_run_once_the_study_was_changed(tmp_path):
    """Snakemake itself leaves out a rule whose input is missing where its output is there."""
    results = tmp_path / "results/tiny"
    study = tiny_study.STUDY | {
        "results": f"{tmp_path}/results",
        "cohort": {"source": "table", "table": f"{tmp_path}/people.csv"},
        "covariates": {"age": {"unit": "year", "range": [0, 120]}},
        "preprocess": {"exclude": "x.tsv", "registration": {"template": "t.nii"}, "shards": 1},
        "autoencoder": {"perceptual": {"weight": 1, "weights": "w.pt"}},
        "plan": [{"name": "a", "subjects": 1, "covariates": "table", "table": "plan.csv"}],
        "evaluate": {"features": [{"name": "mine", "weights": "f.pt"}]},
        "counterfactual": {"covariate": "age", "classifier_guidance": 1, "predictor": "p.pt"},
        "inpainting": {"hole": {"file": "hole.nii"}},
        "shape_completion": {"points": "s.npz"},
    }
    made = {
        "cohort": ["cohort/manifest.parquet", "cohort/card.json"],
        "preprocess": ["preprocessed/shard-0000.arrow", "preprocessed/qc/shard-0000.parquet"],
        "autoencoder": [f"autoencoder/{name}" for name in OF_STEP["autoencoder"]["out"]],
        "plan": ["plan.parquet"],
        "evaluate": [f"evaluation/{name}" for name in OF_STEP["evaluate"]["out"]],
        "counterfactual": [f"counterfactuals/{name}" for name in DERIVATIVE],
        "inpainting": [f"inpainting/{name}" for name in DERIVATIVE],
        "shape_completion_train": [f"shape_network/{name}" for name in NETWORK],
        "shape_completion": [f"shape_completion/{name}" for name in DERIVATIVE],
    }
    parsed = parse_study(study, "test")
    for stage, names in made.items():
        for name in names:
            (results / name).parent.mkdir(parents=True, exist_ok=True)
            (results / name).touch()
        config = freeze(parsed, stage, results / "config").relative_to(results)
        record = results / f"records/{names[0]}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"inputs": {"config": [{"path": str(config)}]}}))

    def snakemake(*options: str) -> tuple[int, str, set[str]]:
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
        triggers = ("--rerun-triggers", "mtime", "params", "--", f"{results}/generated/shard-0000.arrow")
        done = run("snakemake", *options, "--configfile", f"{tmp_path}/study.yaml", *triggers)
        said = done.stdout + done.stderr
        return done.returncode, said, set(re.findall(r"^(?:warning: )?([\w.]+): \S+ is not there", said, re.M))

    code, said, missing = snakemake("-n")
    assert code == 0 and not missing and "plan" not in said.rpartition("Job stats")[2].partition("Reasons")[0]
    (tmp_path / "people.csv").touch()
    code, said, _ = snakemake("--cores", "1")
    assert code != 0 and "plan needs it again, since what it reads besides is made again" in said
    assert "counterfactual needs it again" not in said, "nobody asked for it"
    study |= {"seed": "another", "covariates": {"age": {"unit": "year", "range": [0, 110]}}}
    study["evaluate"] |= {"bootstrap": 500}
    study["preprocess"] |= {"shape": [16, 16, 16]}
    code, said, missing = snakemake("-n")
    assert code == 0 and re.search(r"^plan +1$", said, re.M), said
    assert missing == {
        *("preprocess.registration.template", "preprocess.exclude", "autoencoder.perceptual.weights", "plan.a.table"),
        *("evaluate.features.mine.weights", "counterfactual.predictor", "inpainting.hole.file"),
        "shape_completion.points",
    }
    assert "The settings of plan were changed since it ran" in said
    code, said, missing = snakemake("--cores", "1")
    assert code != 0 and "plan.a.table" in said.rpartition("WorkflowError")[2]
    assert "counterfactual.predictor" not in said.rpartition("WorkflowError")[2], "nobody asked for it"


def test_there_may_be_more_than_ten_thousand_shards(tmp_path):
    plan = {"plan": [{"name": "a", "subjects": 10_001}], "generate": tiny_study.STUDY["generate"] | {"shard_size": 1}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tiny_study.STUDY | plan))
    shard = "results/tiny/generated/shard-10000.arrow"
    done = run("snakemake", "-n", shard, "--directory", str(tmp_path), "--configfile", f"{tmp_path}/study.yaml")
    assert done.returncode == 0 and re.search(r"^generate +1$", done.stdout, re.M), done.stdout + done.stderr


def test_a_shard_is_made_again_of_all_models_that_draw_it(tmp_path):
    provenance, models = tmp_path / "release/provenance", tmp_path / "models"
    provenance.mkdir(parents=True)
    (provenance / "config.json").write_text(json.dumps(published(parse_study(tiny_study.STUDY, "test"))))
    (provenance / "root.json").write_text(json.dumps({"ledger": {"shards": [{"shard": 0}]}}))
    weights = {f"{folder}/model.safetensors" for folder in ("autoencoder", "decoder", "diffusion", "masks/diffusion")}
    for name in weights | {"diffusion/tone.safetensors"}:
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).touch()
    made = tmp_path / "regenerated/tiny/comparison/shard-0000.json"
    made.parent.mkdir(parents=True)
    for path in (provenance / "root.json", made):
        path.touch()
        os.utime(path, (1e9, 1e9))
    given = ("--config", f"sealed={tmp_path}/release", f"models={models}")
    done = run("snakemake", "-n", "--directory", str(tmp_path), "regenerate", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    (newer,) = re.findall(r"Updated input files: (.*)", done.stdout)
    assert set(newer.split(", ")) == {f"{models}/{name}" for name in weights | {"diffusion/tone.safetensors"}}


def test_a_module_of_another_workflow_is_refused(tmp_path):
    """It would run the demo, whatever its `config`, without a lock."""
    text = f'module meddiff:\n    snakefile: "{ROOT}/Snakefile"\n    config: config\n\nuse rule * from meddiff\n'
    (tmp_path / "Snakefile").write_text(text)
    done = run("snakemake", "-n", "--directory", str(tmp_path), "-s", str(tmp_path / "Snakefile"))
    assert done.returncode != 0 and "cannot be a `module`" in done.stdout + done.stderr


def test_no_profile_asks_for_job_arrays():
    for path in [ROOT / "slurm/profile.v9+.yaml", *(ROOT / "profiles").glob("*/profile*.yaml")]:
        assert "slurm-array-jobs" not in yaml.safe_load(path.read_text())


def kubernetes_job(tmp_path, *arguments: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run profiles/kubernetes/job.py with a `kubectl` that does what `script` says."""
    (tmp_path / "kubectl").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "kubectl").chmod(0o755)
    command = [sys.executable, str(ROOT / "profiles/kubernetes/job.py"), *arguments]
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "MEDDIFF_STUDY": "results/x/config/study.json",
    }
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)


def test_a_kubernetes_job_asks_for_what_the_rule_says(tmp_path):
    asked = {"rule": "generate", "threads": 8, "resources": {"mem_mb": 3000, "runtime": 480, "gpu": 1}}
    (tmp_path / "job.sh").write_text(f"#!/bin/sh\n# properties = {json.dumps(asked)}\n")
    options = ["--namespace", "lab", "--image", "meddiff:1", "--claim", "shared", "--mount", "/data"]
    done = kubernetes_job(tmp_path, "submit", *options, str(tmp_path / "job.sh"), script=f"cat > {tmp_path}/sent")
    assert done.returncode == 0, done.stderr
    sent = json.loads((tmp_path / "sent").read_text())
    assert done.stdout.strip() == sent["metadata"]["name"]
    assert sent["spec"]["template"]["spec"]["activeDeadlineSeconds"] == 480 * 60
    assert "activeDeadlineSeconds" not in sent["spec"], "time in the queue does not count"
    (container,) = sent["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"memory": "3000Mi", "nvidia.com/gpu": "1", "cpu": "8"},
        "limits": {"memory": "3000Mi", "nvidia.com/gpu": "1"},
    }
    assert container["workingDir"] == str(tmp_path)
    assert container["env"] == [{"name": "MEDDIFF_STUDY", "value": "results/x/config/study.json"}]


NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="needs a first process of its own, as containers have",
)
@pytest.mark.parametrize(
    ("script", "ends"), [("exit 0", 0), ("exit 3", 3), ("python step.py && exit 0 || exit 1", 143)]
)
def test_a_kubernetes_job_hands_on_that_it_is_to_stop(tmp_path, monkeypatch, script, ends):
    monkeypatch.syspath_prepend(ROOT / "profiles/kubernetes")
    first = importlib.import_module("job").FIRST
    (tmp_path / "job.sh").write_text(f"cd {tmp_path} && {script}\n")
    (tmp_path / "step.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n    time.sleep(0.5)\n    pathlib.Path('saved').touch()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\npathlib.Path('begun').touch()\ntime.sleep(60)\n"
    )
    container = subprocess.Popen([*NAMESPACE, "/bin/sh", "-c", first, str(tmp_path / "job.sh")])
    if ends == 143:
        while not (tmp_path / "begun").exists():
            time.sleep(0.1)
        (process,) = psutil.Process(container.pid).children()
        process.terminate()
    assert container.wait(60) == ends
    assert (tmp_path / "saved").exists() == (ends == 143)


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("""echo '{"status": {"conditions": [{"type": "Complete", "status": "True"}]}}'""", "success"),
        ("""echo '{"status": {"conditions": [{"type": "Failed", "status": "True"}]}}'""", "failed"),
        ("""echo '{"status": {"active": 1}}'""", "running"),
        ("true", "failed"),
        ("echo no answer >&2; exit 1", "running"),
    ],
)
def test_the_state_of_a_kubernetes_job_in_snakemakes_words(tmp_path, script, word):
    assert kubernetes_job(tmp_path, "status", "--namespace", "lab", "job", script=script).stdout.strip() == word


def rules_with(pattern: str) -> dict[str, str]:
    """What the rules say, but for those made of others, in which a line begins with `pattern`."""
    rules = "\n".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    blocks = re.findall(r"^ *rule (\w+):\n(.*?)(?=^ *(?:use )?rule |\Z)", rules, re.M | re.S)
    return {name: body for name, body in blocks if re.search(rf"^ +{pattern}", body, re.M)}


def gpu_rules() -> dict[str, str]:
    """What the rules that ask for a GPU by themselves say."""
    return rules_with("gpu=")


def test_what_runs_beside_snakemake_needs_little():
    """On a login node."""
    for name, body in rules_with("localrule: True").items():
        asked = re.search(r"^ +mem_mb=memory\((\d+)\),", body, re.M)
        assert asked is None or int(asked[1]) <= 3000, name
        assert asked or "mem_mb" not in body, f"{name}: grows with images"


def test_trainings_ask_for_the_same_time_at_every_attempt():
    """They go on where they stopped; a job that begins again asks for more, and never for more than they do."""
    trainings = rules_with(r".*\bstate=f")
    assert {"autoencoder", "decoder", "diffusion", "few_step", "segmentation_few_labels"} <= trainings.keys()
    for name, body in rules_with("runtime=").items():
        (asked,) = re.findall(r"^ +runtime=(.*),", body, re.M)
        assert asked.isdigit() if name in trainings else asked.startswith("minutes("), name
    source = (ROOT / "rules/jobs.smk").read_text()
    found: dict = {}
    exec("".join(re.findall(r"^(?:MOST_MINUTES = .*\n|def minutes\(.*\n(?:    .*\n)+)", source, re.M)), found)
    assert [found["minutes"](720)(None, attempt) for attempt in (1, 2, 3, 21)] == [720, 1440, 2880, 2880]


def test_the_slurm_profile_names_every_rule_that_asks_for_a_gpu():
    rules = "\n".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    asking = set(gpu_rules())
    asking |= {name for base, name in re.findall(r"^ *use rule (\w+) as (\w+) with:", rules, re.M) if base in asking}
    named = re.findall(r"^# +(\w+): \{slurm_partition: gpu\}$", (ROOT / "slurm/profile.v9+.yaml").read_text(), re.M)
    assert sorted(named) == sorted(asking)


def test_rules_that_run_the_detectors_ask_for_memory_by_voxels():
    """And for no more images at once than the detectors take."""
    rules = (ROOT / "rules/privacy.smk").read_text() + (ROOT / "rules/audit.smk").read_text()
    asked = dict(re.findall(r"^rule (\w+):\n(?:.*\n)*? +mem_mb=memory\((.*?)\),", rules, re.M))
    assert all("DETECTING" in asked[rule] for rule in ("calibrate", "filter", "privacy", "audit"))


def test_several_gpus_are_asked_for_on_one_node():
    several = {name for name, body in gpu_rules().items() if re.search(r"^ +gpu=GPUS,", body, re.M)}
    assert several == {
        *("autoencoder", "decoder", "diffusion", "few_step"),
        *("segmentation_model", "segmentation_few_labels", "translation_model"),
    }
    assert all(re.search(r"^ +nodes=1,", gpu_rules()[name], re.M) for name in several)


def test_exactly_the_rules_that_run_networks_ask_for_a_gpu():
    assert set(gpu_rules()) == {
        "segmentation_study",
        "downstream_neighbours",
        "autoencoder",
        "downstream_train",
        "latents",
        "scale",
        "decoder",
        "diffusion",
        "few_step",
        "tone",
        "generate",
        "calibrate",
        "filter",
        "privacy",
        "sampler_study",
        "showcase",
        "counterfactual",
        "inpainting",
        "normative",
        "reconstruction",
        "anomaly",
        "registration_train",
        "registration",
        "shape_completion_train",
        "shape_completion",
        "segmentation_model",
        "segmentation_few_labels",
        "segmentation",
        "translation_model",
        "translation_unpaired",
        "translation",
        "harmonisation_model",
        "harmonisation",
        "text_fidelity",
        "audit",
        "segmenter",
        "regenerate_shard",
    }
