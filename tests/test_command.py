"""The command `meddiff`: what people type."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meddiff_steps import __version__
from meddiff_steps.command.app import COMMANDS, EXAMPLES, STEPS, loaded, unknown
from meddiff_steps.command.init import study_name
from meddiff_steps.command.run import (
    check_profile,
    check_targets,
    places,
    profile_folder,
    snakemake_command,
    split_targets,
    tell_what_would_fail,
    workflow_folder,
)
from meddiff_steps.config import freeze, load_study, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.operations.status import another_cohort

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "config/studies/ixi.yaml"


def meddiff(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "meddiff_steps.command.app", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment},
    )


def test_help_lists_every_command_and_what_to_type():
    done = meddiff("--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert all(line in " ".join(done.stdout.split()) for line in COMMANDS.values()), "a line of help is cut off"
    assert EXAMPLES["propose"][0] in done.stdout
    assert meddiff("--version").stdout.strip() == __version__


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in STEPS])
def test_a_command_shows_its_options_and_examples(name):
    done = meddiff(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: meddiff {name} " in done.stdout
    assert all(line in done.stdout for line in EXAMPLES[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_commands_with_options_that_there_are(name):
    known = {option for parameter in loaded(name).params for option in parameter.opts}
    for line in EXAMPLES[name]:
        words = line.partition(" -- ")[0].split()
        assert words[:2] == ["meddiff", name]
        assert {word for word in words if word.startswith("-")} <= known


def test_a_misspelt_command_is_understood():
    assert "Did you mean `meddiff check`?" in unknown("chek")
    assert "python -m meddiff_steps preprocess" in unknown("preprocess")
    assert "Did you mean" not in unknown("xyz")
    done = meddiff("chek")
    assert done.returncode == 2 and done.stderr.startswith("error: there is no command 'chek'")


def test_the_shell_completes_commands_and_their_options():
    def completed(*words: str) -> str:
        line = " ".join(["meddiff", *words])
        done = meddiff(
            _MEDDIFF_COMPLETE="complete_bash", _TYPER_COMPLETE_ARGS=line, COMP_WORDS=line, COMP_CWORD=str(len(words))
        )
        return done.stdout

    assert completed("pr").split() == ["propose", "prove"]
    assert "--profile" in completed("run", "--pro")


def test_a_study_to_begin_with_loads_and_nothing_is_written_over(tmp_path):
    done = meddiff("init", "brains.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    study = load_study(tmp_path / "brains.yaml")
    assert study.study == "brains" and study.cohort.root == "/data/brains"
    assert "<--" in (tmp_path / "brains.yaml").read_text()
    again = meddiff("init", "brains.yaml", cwd=tmp_path)
    assert again.returncode == 2 and "is there already" in again.stderr


def test_the_template_is_one_file():
    assert (ROOT / "config/studies/template.yaml").samefile(ROOT / "meddiff_steps/config/template.yaml")
    assert study_name(Path("a/Ünï 7T.yml")) == "n-7t"


def test_the_report_is_found_by_its_study(tmp_path):
    folder = tmp_path / "results/ixi"
    folder.mkdir(parents=True)
    made = folder / "inpainting"
    made.mkdir(parents=True)
    (made / "figures.json").touch()
    assert "see results/ixi/inpainting (contact" in meddiff("report", str(STUDY), cwd=tmp_path).stderr
    missing = meddiff("report", str(STUDY), cwd=tmp_path)
    assert missing.returncode == 2 and "report.html: not there yet" in missing.stderr
    (folder / "report.html").touch()
    assert meddiff("report", str(STUDY), cwd=tmp_path).stdout.strip() == "results/ixi/report.html"
    assert meddiff("report", "results/ixi", cwd=tmp_path).stdout.strip() == "results/ixi/report.html"
    assert "mean `meddiff report results/ixi`?" in meddiff("report", "results/ixi/inpainting", cwd=tmp_path).stderr


def test_an_audit_of_results_names_their_release(tmp_path):
    (tmp_path / "results/s/release/provenance").mkdir(parents=True)
    said = meddiff("audit", "results/s", cwd=tmp_path).stderr
    assert "no folder `provenance`" in said and said.rstrip().endswith("Did you mean results/s/release?")
    assert "Did you mean" not in meddiff("audit", "results", cwd=tmp_path).stderr


# ------------------------------------------------------------------------------------------------------- run


def test_run_gives_snakemake_what_one_would_type(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = snakemake_command(Path("my.yaml"), ["evaluate"], ["--keep-going"], 8)
    assert command == "snakemake evaluate --rerun-incomplete --cores 8 --keep-going --configfile my.yaml".split()
    planned = snakemake_command(Path("my.yaml"), [], [], 4, dry_run=True)
    assert planned == "snakemake --rerun-incomplete --cores 4 -n --configfile my.yaml".split()
    cluster = snakemake_command(Path("my.yaml"), [], [], None, "slurm")
    assert "--cores" not in cluster and cluster[2] == "--profile" and Path(cluster[3], "profile.v9+.yaml").is_file()


def test_run_finds_the_workflow_from_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = snakemake_command(Path("my.yaml"), [], [], 2)
    assert command[1:3] == ["--snakefile", str(ROOT / "Snakefile")]
    assert profile_folder("workstation", ROOT) == str(ROOT / "profiles/workstation")
    assert profile_folder("of-this-user", ROOT) == "of-this-user"
    with pytest.raises(UserError, match="Did you mean 'slurm'"):
        profile_folder("slurmm", ROOT)


def test_a_package_without_the_workflow_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDDIFF_WORKFLOW", str(tmp_path))
    with pytest.raises(UserError, match="MEDDIFF_WORKFLOW is to name"):
        workflow_folder()
    monkeypatch.delenv("MEDDIFF_WORKFLOW")
    monkeypatch.setattr("meddiff_steps.__file__", str(tmp_path / "meddiff_steps/__init__.py"))
    with pytest.raises(UserError, match="git clone"):
        workflow_folder()


def test_what_follows_the_dashes_goes_to_snakemake():
    assert split_targets(["a", "b", "--config", "x=1"]) == (["a", "b"], ["--config", "x=1"])
    assert split_targets([]) == ([], [])


def test_options_of_snakemake_before_the_dashes_are_told_where_they_belong():
    said = meddiff("run", "my.yaml", "--keep-going").stderr
    assert "meddiff run STUDY.yaml -- --keep-going" in said
    assert "--cores" in meddiff("run", "my.yaml", "--corse", "3").stderr


def test_a_target_that_there_is_not_is_refused_with_the_one_that_was_meant():
    check_targets(["all", "evaluate", "scan_pages", "results/x/report.html"], workflow_folder())
    with pytest.raises(UserError, match="no target 'evaluat'. Did you mean 'evaluate'"):
        check_targets(["evaluat"], workflow_folder())


def test_a_dry_run_for_a_cluster_shows_all_threads():
    asked = snakemake_command(Path("my.yaml"), [], [], profile="slurm", dry_run=True)
    assert asked[asked.index("--cores") + 1] == "1000"
    assert "--cores" not in snakemake_command(Path("my.yaml"), [], [], profile="slurm")
    assert "--cores" not in snakemake_command(Path("my.yaml"), [], [], profile="workstation", dry_run=True)


def test_jobs_of_slurm_are_not_begun_where_no_slurm_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"with sbatch, .*login node .*my.yaml --profile slurm -n"):
        check_profile("slurm", Path("my.yaml"))
    check_profile("workstation", Path("my.yaml"))
    check_profile("slurm", Path("my.yaml"), dry_run=True)
    (tmp_path / "sbatch").touch(0o755)
    check_profile("slurm", Path("my.yaml"))


def test_a_profile_that_speaks_of_a_rule_that_there_is_not_is_refused(tmp_path):
    (tmp_path / "profile.yaml").write_text("set-resources:\n  autoencodr: {slurm_partition: gpu}\n")
    with pytest.raises(UserError, match="'autoencodr', and there is no such rule. Did you mean 'autoencoder'"):
        check_profile(str(tmp_path), Path("my.yaml"), dry_run=True)


def test_a_target_asked_for_as_a_command_is_told_how_to_run():
    assert "meddiff run STUDY.yaml publish" in unknown("publish")


def test_run_says_what_is_wrong_with_a_study_before_snakemake_starts(tmp_path):
    (tmp_path / "bad.yaml").write_text("study: bad\nplann: []\n")
    done = meddiff("run", "bad.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "Did you mean `plan`?" in done.stderr and "snakemake" not in done.stderr


def test_results_of_another_cohort_are_not_replaced(tmp_path, monkeypatch):
    """A study takes the name of a finished one: refused; the cohort of the same study was moved: said."""

    def study(source, title="One"):
        (tmp_path / "study.yaml").write_text(
            f"study: s\ntitle: {title}\ncohort: {source}\ncovariates: {{age: {{unit: year, range: [18, 95]}}}}\n"
            "plan: [{name: syn, subjects: 10}]\n"
        )
        return load_study(tmp_path / "study.yaml")

    def said(*arguments):
        done = meddiff(*arguments, "study.yaml", cwd=tmp_path)
        return done.stdout + done.stderr

    monkeypatch.chdir(tmp_path)
    freeze(study("{source: bids, root: here}"), None, tmp_path / "results/s/config")
    assert another_cohort(study("{source: simulated}")) is None  # nothing but a plan was made
    (tmp_path / "results/s/cohort").mkdir()
    (tmp_path / "results/s/cohort/manifest.parquet").touch()
    for arguments in (["run"], ["run", "-n"]):
        refused = said(*arguments)
        assert "error: study: results/s holds results of another cohort (bids, " in refused, refused
        assert "this study: simulated)" in refused and "move the folder away" in refused
    assert "FAIL    study: results/s holds" in said("check")
    state, text = another_cohort(study("{source: bids, root: there}"))
    assert state == "warning" and text.startswith("results/s holds results of a cohort that lay elsewhere (bids, ")
    assert another_cohort(study("{source: bids, root: there}", "Two"))[0] == "fail"
    assert another_cohort(study("{source: bids, root: ./here}", "Two")) is None
    assert len(list((tmp_path / "results/s/config").iterdir())) == 1


def test_a_folder_that_is_unlocked_says_how_to_go_on(tmp_path):
    shutil.copy(ROOT / "config/config.yaml", tmp_path / "study.yaml")
    done = meddiff("run", "study.yaml", "--", "--unlock", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.splitlines()[-1].startswith("Unlocked. The same command without")


# ----------------------------------------------------------------------------------------------------- check


def test_check_says_what_would_fail_and_what_jobs_ask_for(tmp_path):
    study = STUDY.read_text().replace("../shared/data/ixi", "nowhere")
    (tmp_path / "study.yaml").write_text(study)
    done = meddiff("check", "study.yaml", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("FAIL    cohort: cohort.root: nowhere does not exist") for line in lines)
    assert any(" jobs of " in line for line in lines), "Snakemake planned nothing"
    assert any(line.startswith("ok      memory: ") or line.startswith("FAIL    memory: ") for line in lines)
    assert lines[-1].endswith("1 would fail") or lines[-1].endswith("2 would fail")
    assert not (tmp_path / "results").exists()


# --------------------------------------------------------------------------------------------------- propose


def test_propose_refuses_before_it_looks(tmp_path):
    (tmp_path / "mine.yaml").touch()
    done = meddiff("propose", str(tmp_path), "--out", str(tmp_path / "mine.yaml"))
    assert done.returncode == 2 and "is there already" in done.stderr
    done = meddiff("propose", str(tmp_path), "--entity", "desc", cwd=tmp_path)
    assert done.returncode == 2 and "expected KEY=LABEL" in done.stderr
    done = meddiff("propose", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2 and "participants.tsv" in done.stderr


def test_a_plan_tells_what_would_fail_and_an_end_where_to_look(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "cohort.csv"
    rows = "".join(f"s{i},{20 + i},s{i}.png\n" for i in range(40))
    table.write_text("subject,age,path\n" + rows)
    content = {
        "study": "plan",
        "seed": "s",
        "cohort": {"source": "table", "table": str(table), "subject_column": "subject"},
        "covariates": {"agee": {"unit": "year", "range": [0, 100]}},
        "preprocess": {"shape": [32, 32], "spacing_mm": None},
        "plan": [{"name": "a", "subjects": 2}],
    }
    study = parse_study(content, "study.yaml")
    tell_what_would_fail(study, Path("study.yaml"), [])
    said = capsys.readouterr().err
    assert "would FAIL  cohort: " in said and "Did you mean 'age'?" in said and "`meddiff check study.yaml`" in said
    tell_what_would_fail(study, Path("study.yaml"), ["shape_completion"])
    assert "would FAIL" not in capsys.readouterr().err
    assert places(study, []) == []
    for name in ("report.html", "anomaly/figures.json"):
        path = Path("results/plan", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert places(study, []) == [Path("results/plan/report.html")]
    assert places(study, ["anomaly", "quality"]) == [Path("results/plan/anomaly")]


STARTER = """
import sys
from meddiff_steps.command.run import started
sys.exit(started(["-c", sys.argv[1], *sys.argv[2:]]))
"""
#: Starts itself once more, as Snakemake does with jobs; both say what reached them.
STARTED = """
import subprocess, sys, time
from pathlib import Path
code, folder, *job = sys.argv[1:]
other = None if job else subprocess.Popen([sys.executable, "-c", code, code, folder, "job"])
try:
    Path(folder, f"began{len(job)}").touch()
    time.sleep(60)
except KeyboardInterrupt:
    Path(folder, f"stopped{len(job)}").touch()
if other is not None:
    other.wait()
sys.exit(3)
"""


@pytest.mark.parametrize("ignored", [False, True], ids=["on a terminal", "in the background of a script"])
def test_a_run_that_is_killed_ends_all_that_it_started(tmp_path, ignored):
    kept = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else signal.getsignal(signal.SIGINT)
    try:
        command = [sys.executable, "-c", STARTER, STARTED, STARTED, str(tmp_path)]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, kept)
    try:
        end = time.monotonic() + 60
        while not {"began0", "began1"} <= {path.name for path in tmp_path.iterdir()} and time.monotonic() < end:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 3
    finally:
        process.kill()
    assert {"stopped0", "stopped1"} <= {path.name for path in tmp_path.iterdir()}


# ------------------------------------------------------------------------------------------------------ docs


def sections() -> dict[str, str]:
    parts = (ROOT / "docs/commands.md").read_text().split("\n## meddiff ")[1:]
    return {part.split("\n", 1)[0]: part for part in parts}


def test_the_page_has_every_command_and_no_other():
    assert list(sections()) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_has_every_option_and_no_other(name):
    section, known = (
        sections()[name],
        {option for one in loaded(name).params for option in one.opts if option[0] == "-"},
    )
    told = {
        word for line in section.splitlines() if line.startswith("| `-") for word in re.findall(r"`(-[-\w]+)`", line)
    }
    if f"`meddiff {name} --help` lists its options" not in section:
        assert told == known
