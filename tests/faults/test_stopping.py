"""SIGTERM, SIGUSR1, a time limit and the end of the launcher: saved, status 75, and resumed bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ham_hf import training_run
from ham_hf.reporting.report import read_report
from ham_hf.training.checkpoint import list_checkpoints
from ham_hf.training.stopping import EXIT_REQUEUE, SIGNALS, TrainingStopped, stop_requests
from tests.conftest import ROOT
from tests.faults.same_runs import FINAL, assert_same_weights, before_updates, timeless_log
from tests.support.recipe_runs import SMALL, recipe_module, refused
from tests.support.training import resumed, trainer

pytestmark = pytest.mark.faults(quick=True)


@pytest.mark.parametrize(("at", "number"), list(zip([3, 4, 16, 17], SIGNALS * 2, strict=True)))
def test_signal_saves_after_the_update_and_the_run_goes_on_bit_for_bit(undisturbed, tmp_path, capsys, number, at):
    folder = tmp_path / "run"
    run = trainer(folder)
    before_updates(run, {at: lambda: os.kill(os.getpid(), number)})
    with pytest.raises(SystemExit) as exit_, stop_requests(folder) as stop, stop.deferred():
        run.fit(stop)
    stopped_at = at + 1
    assert exit_.value.code == EXIT_REQUEUE
    message = capsys.readouterr().err
    assert f"stopped by {number.name}" in message
    assert "--resume_from_checkpoint latest" in message
    assert list_checkpoints(folder)[-1].name == f"checkpoint-{stopped_at}"
    again = resumed(folder)
    assert again.progress.step == stopped_at
    progress = again.fit()
    assert_same_weights(folder, undisturbed[0], *FINAL)
    assert progress.history == undisturbed[1].history
    assert progress.best == undisturbed[1].best
    assert progress.passes == undisturbed[1].passes
    assert timeless_log(folder) == timeless_log(undisturbed[0])


def test_stop_at_the_end_of_an_epoch_leaves_validation_to_the_next_job(undisturbed, tmp_path, monkeypatch):
    run = trainer(tmp_path / "run")
    monkeypatch.setattr(run, "_validate", lambda epoch: pytest.fail("there may be no time for it"))
    with pytest.raises(TrainingStopped):
        run.fit(lambda: "a test" if run.progress.step == 5 else None)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-6"]
    again = resumed(tmp_path / "run")
    assert again.fit().history == undisturbed[1].history
    assert_same_weights(tmp_path / "run", undisturbed[0], *FINAL)


def test_kill_after_a_validation_that_was_due_does_not_log_it_twice(undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run = trainer(folder)
    with pytest.raises(TrainingStopped):
        run.fit(lambda: "a test" if run.progress.step == 5 else None)

    def killed(*_):
        raise KeyboardInterrupt

    run = resumed(folder)
    monkeypatch.setattr(run, "_train_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-4", "checkpoint-6"]
    assert timeless_log(folder)[-1]["type"] == "validation"
    run = resumed(folder)
    run.fit()
    assert timeless_log(folder) == timeless_log(undisturbed[0])


def test_signal_in_the_last_validation_leaves_before_the_evaluation(undisturbed, tmp_path, monkeypatch):
    run = trainer(tmp_path / "run")
    validate = run._validate

    def signaled(epoch):
        if epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        validate(epoch)

    monkeypatch.setattr(run, "_validate", signaled)
    with pytest.raises(SystemExit) as exit_, stop_requests(tmp_path) as stop, stop.deferred():
        run.fit(stop)
    assert exit_.value.code == EXIT_REQUEUE
    again = resumed(tmp_path / "run")
    assert again.progress.history == undisturbed[1].history


def test_time_limit_stops_and_counts_this_job_only(undisturbed, tmp_path, monkeypatch, capsys):
    folder, clock = tmp_path / "run", [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def pass_time():
        clock[0] += 1800

    # Half an hour per update: four in two hours.
    for job in range(5):
        run = resumed(folder)
        before_updates(run, dict.fromkeys(range(18), pass_time))
        status = None
        try:
            with stop_requests(folder, 2.0) as stop, stop.deferred():
                progress = run.fit(stop)
        except SystemExit as exit_:
            status = exit_.code
        assert status == (EXIT_REQUEUE if job < 4 else None)
        assert ("--max_train_hours 2" in capsys.readouterr().err) == (job < 4)
    # What a job did before it was stopped counts, once.
    assert progress.seconds == 18 * 1800
    assert_same_weights(folder, undisturbed[0], *FINAL)


def test_wall_clock_that_goes_back_changes_nothing(undisturbed, tmp_path, monkeypatch):
    now = [2e9]

    def backwards():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    with stop_requests(tmp_path, 1.0) as stop, stop.deferred():
        progress = trainer(tmp_path / "run").fit(stop)
    assert 0 < progress.seconds < 600
    speeds = [json.loads(line).get("images_per_second", 1) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert min(speeds) > 0
    assert_same_weights(tmp_path / "run", undisturbed[0], *FINAL)


def test_signal_outside_of_training_leaves_at_once(tmp_path, capsys):
    reached = []

    def interrupted():
        with stop_requests(tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            reached.append("after it")

    with pytest.raises(SystemExit) as exit_:
        interrupted()
    assert exit_.value.code == EXIT_REQUEUE
    assert not reached
    said = capsys.readouterr().err
    assert f"stopped by SIGTERM outside of training: nothing in {tmp_path} is lost; the same" in said
    # The handler stays: the same request may signal again.
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_handler_of_the_calling_program_comes_back(tmp_path):
    own = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit), stop_requests(tmp_path):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, own)


def test_signal_in_the_final_evaluation_leads_the_next_job_straight_there(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    arguments = [*SMALL, "--max_steps=3", "--per_device_train_batch_size=16", f"--output_dir={folder}"]
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "evaluate_on_test", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
        refused(capsys, "train_ham.py", *arguments, status=EXIT_REQUEUE)
    assert not (folder / "report.json").exists()
    monkeypatch.setattr(training_run.Trainer, "_one_update", lambda *args, **kwargs: pytest.fail("it trains again"))
    recipe_module("train_ham.py").main([*arguments, "--resume_from_checkpoint=latest"])
    assert read_report(folder / "report.json").training.steps == 3
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    capsys.readouterr()


# stopping.py needs nothing else of the package: these processes start in a fraction of a second.
PROGRAM = f"""
import atexit, importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("stopping", {str(ROOT / "ham_hf/training/stopping.py")!r})
stopping = importlib.util.module_from_spec(spec); spec.loader.exec_module(stopping)
stopping.SAME_REQUEST_SECONDS = float(sys.argv[1])
atexit.register(lambda: print("ending", flush=True) or time.sleep(0.3))
with stopping.stop_requests(Path("out")) as stop, stop.deferred():
    print("ready", flush=True)
    for _ in range(2000):
        time.sleep(0.005)
        if sys.argv[2] == "obey" and stop():
            raise stopping.TrainingStopped(f"stopped by {{stop()}}")
"""


def program(window, mode, launcher=(), **options):
    command = [*launcher, sys.executable, "-c", PROGRAM, str(window), mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    assert process.stdout.readline() == "ready\n"
    return process


def test_second_signal_stops_at_once():
    process = program(0.2, "ignore")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=5) == -signal.SIGUSR1


def test_signals_of_one_request_are_one():
    process = program(30, "obey")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "ending\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == EXIT_REQUEUE


def test_end_of_the_launcher_is_a_request_to_stop(tmp_path):
    # What accelerate launch does with one process: it starts it and waits.
    starts = [sys.executable, "-c", "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"]
    launcher = program(3, "obey", starts, env={**os.environ, "ACCELERATE_MIXED_PRECISION": "no"})
    launcher.kill()
    # Its standard error ends when the run does.
    said = launcher.stderr.read()
    assert "stopped by the end of its launcher" in said
    assert "--resume_from_checkpoint latest" in said
    launcher.wait()
    launcher.stdout.close()
    launcher.stderr.close()
