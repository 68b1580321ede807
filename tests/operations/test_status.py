import io
import json
import os
import re
import time
from pathlib import Path

import pytest
from tiny_study import STUDY

from meddiff_steps import config
from meddiff_steps.command.progress import Progress
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import hold
from meddiff_steps.operations import status as progress
from meddiff_steps.operations.machine import Machine
from meddiff_steps.steps.status import run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """A study of two shards: one done, one with a log that the test ends as it likes."""
    monkeypatch.setattr(progress, "this_machine", lambda: Machine(2, 24000, 1))
    folder = tmp_path / "results/tiny"
    config.freeze(config.parse_study(STUDY, "test"), None, folder / "config")
    job(folder, "plan", "planned\n", seconds=36)
    job(folder, "generate/0000", "done\n", seconds=7200)
    job(folder, "generate/0001", "generating:  10%\rgenerating:  50%")
    return folder


def job(folder: Path, name: str, log: str, seconds: float | None = None) -> None:
    for kind, suffix, text in (("logs", ".log", log), ("benchmarks", ".tsv", f"s\th:m:s\n{seconds}\t-\n")):
        path = (folder / kind / name).with_suffix(suffix)
        if kind == "logs" or seconds is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            os.utime(path, (time.time() - 120,) * 2)


def stage(folder: Path, active: bool) -> progress.Stage:
    return {stage.name: stage for stage in progress.read_stages(folder, active)}["generate"]


def test_done_running_and_hours(results):
    found = stage(results, active=True)
    assert (found.done, len(found.running), len(found.failed), found.total, found.hours) == (1, 1, 0, 2, 2.0)


def test_where_no_run_works_what_said_nothing_was_stopped(results):
    found = stage(results, active=False)
    assert (len(found.running), len(found.stopped), len(found.failed)) == (0, 1, 0)


@pytest.mark.parametrize(
    "words, state",
    [
        ("error: shard.arrow is truncated\n", "failed"),
        ("Traceback (most recent call last):\n ...", "failed"),
        ("autoencoder: asked to stop; saved step 3\n", "stopped"),
        ("Traceback (most recent call last):\n ...\nKeyboardInterrupt\n", "stopped"),
    ],
)
@pytest.mark.parametrize("active", [True, False])
def test_last_words_tell_a_failure_from_a_stop(results, words, state, active):
    job(results, "generate/0001", words)
    found = stage(results, active)
    assert [len(getattr(found, one)) for one in progress.NOT_DONE] == [one == state for one in progress.NOT_DONE]


def test_a_job_that_runs_again_is_not_done(results):
    (results / "logs/generate/0000.log").write_text("again")
    found = stage(results, active=True)
    assert (found.done, len(found.running)) == (0, 2)


def test_the_table_says_who_works_where_the_log_is_and_its_last_line(results, capsys):
    run(results)
    assert "no run works here" in capsys.readouterr().out
    with hold(results / ".lock"):
        run(results)
    text = capsys.readouterr().out
    assert f"a run works here, process {os.getpid()} on " in text
    assert re.search(r"^generate +1 +2 +1 +0 +0 +2\.00 +2\.00 +4\.00$", text, re.M)
    assert re.search(r"^plan +1 +1 +0 +0 +0 +0\.01 +0\.00 +0\.00$", text, re.M)
    assert re.search(r"^together +2 +2\.01 +2\.00 +4\.00$", text, re.M)
    assert f"running: {results}/logs/generate/0001.log, last line 2 min ago: generating:  50%" in text


def test_a_study_that_was_only_planned_has_no_table(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    config.freeze(config.parse_study(STUDY, "test"), None, tmp_path / "config")
    run(tmp_path)
    assert capsys.readouterr().out.splitlines()[1:] == ["no job has run yet"]


def test_gpu_hours_count_the_gpus_of_a_job_and_what_is_not_known_is_said(results):
    job(results, "latents/0000", "encoding")
    job(results, "autoencoder", "done", seconds=3600)
    study = config.parse_study(STUDY | {"compute": {"devices": 4}}, "test")
    config.freeze(study, None, results / "config")
    stages = progress.read_stages(results, active=True)
    lines = list(progress.table(stages, time.time()))
    assert any(re.search(r"^autoencoder .* 1\.00 +4\.00 +4\.00$", line) for line in lines)
    assert any(re.search(r"^latents .* 0\.00 +0\.00 +\?$", line) for line in lines)
    assert any(re.search(r"^together .* 6\.00 +>8\.00$", line) for line in lines)
    assert any(
        re.search(r"^latents .* 0\.00 +3\.00$", line) for line in progress.table(stages, time.time(), {"latents": 3.0})
    )
    processor = study.model_copy(update={"compute": config.Compute(device="cpu")})
    assert {progress.gpus_of(stage, processor) for stage in progress.GPU_STAGES} == {0}


def test_stages_that_have_a_gpu_are_those_whose_rules_ask_for_one():
    rules = "\n".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    blocks = re.findall(
        r"^ *(?:use )?rule (\w+)(?: as (\w+) with)?:\n(.*?)(?=^ *(?:use )?rule |\Z)", rules, re.M | re.S
    )
    asking = {name for name, heir, body in blocks if not heir and re.search(r"^ +gpu=", body, re.M)}
    found = {
        re.search(r"benchmarks/(.+?)(?:/\{\{[^/]+)?\.tsv", body).group(1)
        for name, _, body in blocks
        if name in asking and "benchmark:" in body
    }
    assert found == progress.GPU_STAGES


@pytest.mark.parametrize("gpu", [None, "NVIDIA A100"])
def test_hours_of_a_processor_are_not_taken_for_hours_of_a_gpu(results, gpu, capsys, monkeypatch):
    for gpus in (0, 1):
        monkeypatch.setattr(progress, "this_machine", lambda gpus=gpus: Machine(2, 24000, gpus))
        run(results)
        assert ("GPU-hours" in capsys.readouterr().out) is (gpus > 0), "before anything was trained, as it is here"
    record = results / "records/autoencoder/model.safetensors.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"environment": {"torch": {"version": "2.13.0"} | ({"gpu": gpu} if gpu else {})}}))
    run(results)
    assert ("GPU-hours" in capsys.readouterr().out) is (gpu is not None)


def test_jobs_of_the_run_are_told_where_it_wrote_them(results, capsys):
    run(results)
    assert "jobs of the" not in capsys.readouterr().out
    stream = Progress(io.StringIO(), jobs_file=results / progress.JOBS)
    stream.happened("run_info", {"stats": {"cohort": 1, "diffusion": 2, "total": 3}})
    stream.happened("job_info", {"rule_name": "cohort", "jobid": 1})
    stream.happened("job_finished", {"job_id": 1})
    run(results)
    assert "1 of 3 jobs of the last run are done; the same `meddiff run` goes on" in capsys.readouterr().out
    again = Progress(io.StringIO(), jobs_file=results / progress.JOBS)
    again.happened("run_info", {"stats": {"evaluate": 5, "total": 5}})
    run(results)
    assert "0 of 5 jobs of the last run" in capsys.readouterr().out


def test_what_a_job_took_is_not_its_last_word(tmp_path):
    log = tmp_path / "filter.log"
    took = "12:00:00 meddiff_steps.command.ending: filter: 3.75 s of the processor, 612 MB at most"
    log.write_text(f"error: no image is left\n{took}\n")
    assert progress.last_line(log) == "error: no image is left"


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="no study was started here"):
        run(tmp_path)


def test_every_rule_has_a_log_and_a_benchmark_of_the_same_name_and_known_shards():
    for path in (ROOT / "rules").glob("*.smk"):
        text = path.read_text()
        logs, benchmarks = (
            re.findall(rf'RESULTS}}/{kind}/([^"]+)\.{suffix}"', text)
            for kind, suffix in (("logs", "log"), ("benchmarks", "tsv"))
        )
        assert logs == benchmarks, path
        many = {name.partition("/{{")[0] for name in logs if "{{" in name}
        assert many == {progress.stage_of(Path(f"{name}/0000.log")) for name in many}, path
