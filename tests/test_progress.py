"""What `meddiff run` shows: lines of jobs, a bar, and what is said when it is over."""

import io
from pathlib import Path

import pytest
import yaml
from test_command import meddiff
from tiny_study import STUDY

from meddiff_steps.command.progress import GO_ON, Job, Progress, done_of, duration, plain, planned


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def announced(number: int, rule: str, log: str | None = None) -> dict:
    return {"jobid": number, "rule_name": rule, "rule_msg": f"Doing {rule}", "log": [log] if log else []}


def run(progress: Progress, clock: Clock) -> None:
    """Two jobs after each other."""
    progress.happened("run_info", {"stats": {"cohort": 1, "diffusion": 2, "total": 3}})
    progress.happened("job_info", announced(1, "cohort"))
    clock.now += 60
    progress.happened("job_finished", {"job_id": 1})
    progress.happened("job_info", announced(2, "diffusion"))


def test_a_file_gets_whole_lines():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream, clock=clock)
    run(progress, clock)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "3 jobs: 1 cohort, 2 diffusion",
        "begins  cohort: Doing cohort",
        "done    cohort: Doing cohort (00:01:00)",
        "[##########--------------------] 1 of 3 jobs, 00:01:00",
        "begins  diffusion: Doing diffusion",
        "1 of 3 jobs done in 00:01:00",
    ]
    assert "\r" not in stream.getvalue() and "\033" not in stream.getvalue()


def test_a_file_hears_from_a_long_job_every_minute_and_after_hours_every_ten():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream, clock=clock)
    run(progress, clock)

    def written(seconds):
        before = len(stream.getvalue().splitlines())
        for _ in range(seconds):
            clock.now += 1
            progress.tick()
        return len(stream.getvalue().splitlines()) - before

    assert written(540) == 9
    assert stream.getvalue().endswith("1 of 3 jobs, 00:10:00; running: diffusion\n")
    assert written(3 * 3600) > 18
    assert written(36000) == 60


def test_a_terminal_shows_running_jobs_with_their_last_words_and_one_bar(tmp_path):
    clock, stream = Clock(), Terminal()
    progress = Progress(stream, clock=clock)
    run(progress, clock)
    log = tmp_path / "diffusion.log"
    log.write_text("loading\rdiffusion: 12%")
    progress.happened("job_info", announced(3, "diffusion", str(log)))
    clock.now += 30
    progress.tick()
    shown = stream.getvalue().rpartition("\033[J")[2].splitlines()
    assert len(shown) == 3 and shown[2] == "[##########--------------------] 1 of 3 jobs, 00:01:30"
    assert "00:00:30: diffusion: 12%" in shown[1]
    assert stream.getvalue().count("\n") - stream.getvalue().count("A\033[J") < 20
    progress.close()
    assert stream.getvalue().endswith("\033[J1 of 3 jobs done in 00:01:30\n")


def test_time_that_is_left_is_told_where_it_is_known():
    clock = Clock()
    progress = Progress(io.StringIO(), clock=clock, expected={"diffusion": 2.0})
    run(progress, clock)
    clock.now += 3600
    assert progress.remaining() == pytest.approx(3 * 3600, rel=0.02)
    assert "about 03:00:00 left" in progress.bar() or "about 02:5" in progress.bar()
    assert Progress(io.StringIO()).remaining() is None
    assert duration(59.9) == "00:00:59"


@pytest.mark.parametrize(("slower", "at_a_time"), [(1.0, 1), (4.0, 1), (0.5, 1), (1.0, 2), (3.0, 2)])
def test_time_that_is_left_follows_how_long_jobs_take(slower, at_a_time):
    """A machine that is slower than was expected, and jobs side by side."""
    clock, hours = Clock(), 0.5
    progress = Progress(io.StringIO(), clock=clock, expected={"generate": hours})
    progress.happened("run_info", {"stats": {"generate": 8}})
    for begun in range(0, 4, at_a_time):
        for number in range(begun, begun + at_a_time):
            progress.happened("job_info", announced(number, "generate"))
        clock.now += 3600 * hours * slower
        for number in range(begun, begun + at_a_time):
            progress.happened("job_finished", {"job_id": number})
    left = 4 * 3600 * hours * slower / at_a_time
    assert progress.remaining() == pytest.approx(left, rel=0.15)


def test_a_training_that_is_slower_than_expected_is_believed_before_it_ends(tmp_path):
    """By its bar; and where it has none, once it has taken longer than was expected."""
    clock, log = Clock(), tmp_path / "diffusion.log"
    progress = Progress(io.StringIO(), clock=clock, expected={"diffusion": 1.0, "generate": 1.0})
    progress.happened("run_info", {"stats": {"diffusion": 1, "generate": 1}})
    progress.happened("job_info", announced(1, "diffusion", str(log)))
    log.write_text("loading\rdiffusion:   1%|1 \rdiffusion:  50%|##5  | 500/1000")
    clock.now += 2 * 3600
    assert progress.remaining() == pytest.approx(2 * 3600 + 4 * 3600, rel=0.1)
    log.write_text("diffusion:  50%|##5  | 500/1000\nvalidation")
    assert progress.remaining() == pytest.approx(2 * 3600, rel=0.1)


def test_who_stops_a_run_is_answered():
    stream = io.StringIO()
    progress = Progress(stream, quiet=True)
    progress.said("INFO", "Will exit after finishing currently running jobs (scheduler).")
    progress.said("INFO", "Something else")
    assert stream.getvalue() == "Will exit after finishing currently running jobs (scheduler).\n"


def test_jobs_of_a_run_that_somebody_stops_have_not_failed():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream, clock=clock)
    run(progress, clock)
    progress.said("INFO", "Terminating processes on user request, this might take some time.")
    progress.said("ERROR", "RuleException:\nCalledProcessError ... died with <Signals.SIGINT: 2>.")
    progress.happened("job_error", {"jobid": 2, "rule_name": "diffusion"})
    progress.happened("error", {"message": "At least one job did not complete successfully."})
    progress.close()
    said = stream.getvalue()
    assert "stopped diffusion" in said and "1 of 3 jobs done, stopped in 00:01:00" in said
    assert "FAILED" not in said and "SIGINT" not in said and "At least" not in said
    assert said.endswith(f"{GO_ON}\n")


def test_an_answer_that_snakemake_repeats_is_given_once():
    stream = io.StringIO()
    progress = Progress(stream)
    for _ in range(5):
        progress.said("INFO", "Will exit after finishing currently running jobs (scheduler).")
    assert stream.getvalue().count("Will exit") == 1


@pytest.mark.parametrize(
    "message",
    [
        'InputFunctionException in rule release in file "/a/rules/release.smk", line 5:\nError:\n  WorkflowError:\n'
        '    release: off.\n    Set it.\nWildcards:\n  shard=1\nTraceback:\n  File "/a/rules/common.smk", line 5, in f',
        'WorkflowError in file "/a/rules/common.smk", line 41:\nrelease: off.\nSet it.\n'
        '  File "/a/Snakefile", line 3, in <module>',
        'WorkflowError in file "/a/rules/common.smk", line 41:\nrelease: off.\nSet it.',
    ],
)
def test_what_the_workflow_says_is_told_without_where_it_stands_in_it(message):
    assert plain(message) == "error: release: off.\nSet it."


def test_other_messages_are_left_as_they_are():
    assert plain("MissingInputException in rule a in file F, line 3:\nMissing input") == (
        "MissingInputException in rule a in file F, line 3:\nMissing input"
    )


def test_a_plan_says_per_rule_how_many_jobs_what_they_need_and_why():
    first = {"rule_name": "generate", "threads": 2, "resources": {"mem_mb": 4000, "runtime": 480, "gpu": 1}}
    second = first | {"resources": {"mem_mb": 5000, "runtime": 60, "disk_mb": "<TBD>"}}
    reason = "Missing output files: a; Input files updated by another job: b"
    said = planned([first | {"reason": reason}, second | {"reason": "Code has changed since last execution"}])
    assert said.splitlines()[-1].split(maxsplit=6) == [
        *("2", "generate", "2", "1", "5000", "480"),
        "code has changed since last execution, missing output files",
    ]
    elsewhere = {**first, "resources": first["resources"] | {"slurm_partition": "gpu"}, "reason": reason}
    assert planned([elsewhere]).endswith("  missing output files; partition gpu")
    everything = planned([{"rule_name": "all", "threads": 1, "resources": {}, "reason": reason.rpartition("; ")[2]}])
    assert everything.endswith("  input files updated by another job")


def test_quiet_tells_failures_with_the_end_of_their_log(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("\n".join(f"line {n}" for n in range(30)))
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream, quiet=True, clock=clock)
    run(progress, clock)
    assert stream.getvalue() == ""
    progress.happened("job_info", announced(3, "diffusion", str(log)))
    progress.happened("job_error", {"jobid": 3, "rule_name": "diffusion"})
    progress.said("INFO", "something")
    progress.close()
    said = stream.getvalue()
    assert said.startswith(f"FAILED  diffusion\n  {log}:\n    line 20\n") and "line 29" in said
    assert "1 of 3 jobs done, 1 failed in 00:01:00\n" in said and "something" not in said
    assert said.endswith("run the same command again: what is done is not done again.\n")


def test_a_run_shows_its_jobs_and_tells_whom_it_was_asked_to(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    target = "results/tiny/cohort/simulated/participants.tsv"
    done = meddiff(
        *("run", "tiny.yaml", target, "--cores", "1"),
        cwd=tmp_path,
        MEDDIFF_ON_SUCCESS='echo "$MEDDIFF_NAME $MEDDIFF_RESULTS" > told; exit 3',
        MEDDIFF_ON_ERROR="touch failed",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / target).is_file()
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"$ snakemake {target} --snakefile ")
    assert "begins  simulate: Simulating a brain cohort" in lines
    assert any(line.startswith("1 of 1 jobs done in ") for line in lines)
    assert "it/s" not in done.stderr + done.stdout, "what the job writes is in its log"
    assert (tmp_path / "told").read_text() == "tiny results/tiny\n"
    assert any("MEDDIFF_ON_SUCCESS: ended with 3" in line for line in lines)
    assert not (tmp_path / "failed").exists()


def test_a_dry_run_shows_the_plan_and_a_target_that_is_off_what_to_write(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    done = meddiff("run", "tiny.yaml", "-n", "--cores", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "jobs would run" in done.stdout.splitlines()[0] and " simulate " in done.stdout
    assert not list(tmp_path.glob("results/*/cohort")), "nothing was made"
    off = meddiff("run", "tiny.yaml", "translation", "--cores", "1", cwd=tmp_path)
    assert off.returncode == 1
    assert "error: translation.target: not set" in off.stderr and "Traceback" not in off.stderr


def test_a_run_that_fails_says_which_log_and_why(tmp_path):
    (tmp_path / "empty").mkdir()
    study = STUDY | {"cohort": {"source": "bids", "root": "empty"}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(study))
    done = meddiff(
        *("run", "tiny.yaml", "results/tiny/cohort/manifest.parquet", "--cores", "1", "--quiet"),
        cwd=tmp_path,
        MEDDIFF_ON_SUCCESS="touch told",
        MEDDIFF_ON_ERROR='grep -c . "$MEDDIFF_LOG" > failed',
    )
    assert done.returncode == 1
    assert "FAILED  cohort\n  results/tiny/logs/cohort.log:\n" in done.stderr
    assert "participants.tsv" in done.stderr and "begins" not in done.stderr and "RuleException" not in done.stderr
    assert int((tmp_path / "failed").read_text()) > 0 and not Path(tmp_path, "told").exists()


def test_a_folder_that_another_run_holds_is_told_in_our_words():
    stream = io.StringIO()
    progress = Progress(stream, quiet=True)
    progress.said("ERROR", "LockException:\nError: Directory cannot be locked. Please make sure ... --unlock argument.")
    assert "Another run works in this folder" in stream.getvalue() and "Please" not in stream.getvalue()


@pytest.mark.parametrize(
    ("rule", "line", "share"),
    [
        ("shape_completion_train", "shape_completion_train:  40%|####      | 600/1500", 0.4),
        ("registration_train", "registration_train, score:  40%|####      | 8/20", 0.4),
        ("mask_diffusion", "diffusion:   7%|7         | 7/100", 0.07),
        ("filter", "scans:  40%|####      | 4/10", None),
    ],
)
def test_a_training_is_believed_by_its_own_bar(tmp_path, rule, line, share):
    log = tmp_path / "job.log"
    log.write_text(f"loading\n{line}")
    assert done_of(Job(rule, rule, [str(log)], 0.0)) == share
