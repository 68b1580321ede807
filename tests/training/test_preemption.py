"""SIGTERM, as a cluster sends it, and SIGINT, as a terminal: to every process of a rule's shell command."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_step import OUTPUTS, prepare

from meddiff_steps.core.errors import EXIT_PREEMPTED
from meddiff_steps.training import loop

ROOT = Path(__file__).parents[2]
#: What rules/common.smk puts before every shell command.
PREFIX = "set -euo pipefail; trap '' TERM INT; "


def start(folder: Path, command: list[str]) -> subprocess.Popen:
    line = f"{PREFIX} {' '.join(command)} 2>&1 | tee log"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["bash", "-c", line], cwd=folder, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )


def test_the_prefix_is_that_of_the_rules():
    assert f'shell.prefix("{PREFIX}")' in (ROOT / "rules/common.smk").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_is_asked_to_stop_saves_leaves_and_goes_on_to_the_same_bytes(tmp_path, number):
    straight, preempted = tmp_path / "straight", tmp_path / "preempted"
    commands = {}
    for folder in (straight, preempted):
        folder.mkdir()
        commands[folder] = prepare(folder)
    assert start(straight, commands[straight]).wait(300) == 0

    process = start(preempted, commands[preempted])
    deadline = time.monotonic() + 300
    while not list(preempted.glob("state/*/step-*.safetensors")):
        assert process.poll() is None, (preempted / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)
    assert process.wait(300) == EXIT_PREEMPTED
    log = (preempted / "log").read_text()
    assert "autoencoder: asked to stop; saved step" in log
    assert "Traceback" not in log
    assert not any((preempted / name).exists() for name in OUTPUTS)

    assert start(preempted, commands[preempted]).wait(300) == 0
    assert "resuming after step" in (preempted / "log").read_text()
    for name in OUTPUTS:
        assert (preempted / name).read_bytes() == (straight / name).read_bytes(), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_step_that_is_no_training_ends_at_once(tmp_path, number):
    """That the shell ignores signals must not be inherited, or nobody could stop a job gently."""
    line = f"""{PREFIX} {sys.executable} -c '
import signal, sys
from unittest import mock
from meddiff_steps import __main__
sys.argv = ["meddiff_steps", "schema"]
with mock.patch("meddiff_steps.steps.schema.run", lambda: signal.raise_signal(signal.{number.name})):
    __main__.main()
' | cat"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert (
        subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True).returncode
        == 128 + number
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_previous_handler_comes_back(number):
    previous = signal.getsignal(number)
    with loop.stop_request() as asked:
        os.kill(os.getpid(), number)
        assert asked.wait(5)
    assert signal.getsignal(number) is previous
    with pytest.raises(ZeroDivisionError), loop.stop_request():
        1 / 0  # noqa: B018
    assert signal.getsignal(number) is previous


def test_who_presses_ctrl_c_twice_does_not_wait():
    with pytest.raises(KeyboardInterrupt), loop.stop_request() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked.is_set()
        signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_signals_are_left_alone():
    found = []

    def work():
        with loop.stop_request() as asked:
            found.append(asked.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
