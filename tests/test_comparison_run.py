"""`recipes/compare.py` as a user runs it: interrupted and resumed, with failures, of runs that exist."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from huggingface_hub import constants

from ham_hf.comparison.plan import read_plan
from ham_hf.config import config_to_dict, config_to_yaml, load_train_config, parse_train_config
from ham_hf.evaluation.verdicts import write_verdicts
from ham_hf.reporting.report import read_report, write_report
from ham_hf.training.run_folder import RunLock, is_locked
from tests.conftest import ROOT
from tests.support.comparison_reports import even, judged_run, run_report
from tests.support.hub_server import Hub, use_hub
from tests.support.recipe_runs import PLAN, SMALL, finish, recipe_module, write_plan

FILES = {"comparison.json", "comparison.csv", "comparison.md", "comparison_tradeoff.png", "comparison_per_class.png"}
BASE = [*SMALL, "--num_train_epochs=1", "--mining_start_epoch=0", "--per_device_train_batch_size=16"]
BASE += ["--validation_num_steps=1"]
# Stands in for train_ham.py: copies a report that was made before, or does what its label says.
FAKE = """
import pathlib, shutil, sys, time
folder = pathlib.Path(next(word for word in sys.argv if word.startswith("--output_dir=")).split("=", 1)[1])
reports = pathlib.Path(__file__).parent / "reports"
(reports / "order").open("a").write(f"{folder.parent.name}/{folder.name} ")
print("working on", folder)
if folder.parent.name == "mined" and not (reports / "mended").exists():
    sys.exit("the disk is full")
folder.mkdir(parents=True)
(reports / f"{folder.parent.name}-{folder.name}").exists() or sys.exit("nothing planned")
shutil.copy(reports / f"{folder.parent.name}-{folder.name}", folder / "report.json")
"""


def compare(*arguments: object) -> int:
    """Exit status of the recipe, run in this process."""
    try:
        recipe_module("compare.py").main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def class_report(correct, **changes):
    """A report of three classes of 20 images with so many right under PGD."""
    results = {"clean": even([20, 18, 19]), "pgd-20": even(correct)}
    return run_report(results, class_names=("a", "b", "c"), **changes)


def empty_figures(comparison, folder):
    """Stands in for the drawing, which takes a second."""
    paths = [folder / name for name in sorted(FILES) if name.endswith(".png")]
    for path in paths:
        path.touch()
    return paths


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Path of a plan that the stand-in trainer runs."""
    plan_path = write_plan(tmp_path, PLAN, BASE)
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "reports").mkdir()
    for planned in read_plan(plan_path).runs:
        correct = [6 + planned.seed, 9, 14] if planned.label == "plain" else [9 + planned.seed, 9, 12]
        report = class_report(correct, seed=planned.seed)
        config = config_to_dict(planned.config)
        write_report(dataclasses.replace(report, config=config), tmp_path / "made")
        (tmp_path / "made" / "report.json").rename(tmp_path / "reports" / f"{planned.label}-seed{planned.seed}")
    monkeypatch.setattr("ham_hf.comparison_run.TRAIN", (str(tmp_path / "fake.py"),))
    monkeypatch.setattr("ham_hf.comparison_run.save_comparison_figures", empty_figures)
    return plan_path


@pytest.fixture
def started(tmp_path):
    """What the stand-in trainer was started for since asked."""

    def asked():
        order = tmp_path / "reports" / "order"
        words = order.read_text().split() if order.exists() else []
        order.unlink(missing_ok=True)
        return words

    return asked


@pytest.fixture(scope="module")
def compared(tmp_path_factory, subprocess_env):
    """A real comparison, interrupted in its second run and taken up again; the folder and what the two calls said."""
    place = tmp_path_factory.mktemp("compare")
    plan, folder = write_plan(place, PLAN, BASE), place / "out"
    command = [sys.executable, str(ROOT / "recipes/compare.py"), "--config", str(plan)]
    # Tests that a shell runs in the background ignore Ctrl-C, and so would what they start.
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first = subprocess.Popen(command, env=subprocess_env, **pipes, **options)
    second_run = folder / "mined" / "seed0"
    deadline = time.monotonic() + 300
    while not (second_run / "checkpoint-2").exists() and time.monotonic() < deadline:
        assert first.poll() is None, first.communicate()
        time.sleep(0.005)
    first.send_signal(signal.SIGINT)
    interrupted = first.communicate(timeout=60)
    assert first.returncode == 130, interrupted
    assert not is_locked(second_run)
    running = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in running if f"--output_dir={second_run}" in words]
    assert not (second_run / "report.json").exists()
    before = (folder / "plain" / "seed0" / "report.json").stat().st_mtime_ns
    again = finish([*command, "--jobs", "2"], subprocess_env)
    assert (folder / "plain" / "seed0" / "report.json").stat().st_mtime_ns == before
    return plan, folder, interrupted, again.stdout


@pytest.mark.slow
def test_interrupted_comparison_goes_on_where_it_was(compared):
    _, folder, (printed, complaint), again = compared
    assert "done plain seed 0 in" in printed
    assert "start mined seed 0" in printed
    assert "the same command resumes each run" in complaint
    assert "4 runs: 1 done already, 3 to go" in again
    log = (folder / "mined" / "seed0.log").read_text()
    commands = [line for line in log.splitlines() if line.startswith("$")]
    assert [line.endswith("--resume_from_checkpoint=latest") for line in commands] == [False, True]
    assert "resuming from" in log
    assert read_report(folder / "mined" / "seed0").training.steps == 11


@pytest.mark.slow
def test_a_real_comparison_holds_the_numbers_of_its_runs(compared):
    _, folder, _, _ = compared
    assert {path.name for path in folder.iterdir()} == {*FILES, "plain", "mined"}
    values = json.loads((folder / "comparison.json").read_text())
    assert values["evaluations"] == ["verdict", "clean", "pgd-2", "cw-2"]
    assert values["missing"] == values["unequal"] == []
    for row in values["rows"]:
        reports = [read_report(folder / run["source"]) for run in row["runs"]]
        for name, numbers in row["attacks"].items():
            found = [{entry.name: entry for entry in report.entries()}[name] for report in reports]
            assert numbers["average"]["values"] == [entry.summary.average for entry in found]
        assert row["peak_memory_bytes"]["values"] == [report.training.peak_memory_bytes for report in reports]
        assert all(100e6 < report.training.peak_memory_bytes < 10e9 for report in reports)
    plain, mined = (read_report(folder / label / "seed1").config for label in ("plain", "mined"))
    assert plain["method"] == "pgd_at"
    assert "mining_step" not in plain
    assert (mined["method"], mined["mining_step"], mined["seed"], mined["save_steps"]) == ("ham", 2, 1, 2)


def test_finished_comparison_is_not_run_again_and_another_one_not_mixed_in(plan, started, tmp_path, capsys):
    (tmp_path / "reports" / "mended").touch()
    assert compare("--config", plan) == 0
    started()
    path = tmp_path / "out" / "plain" / "seed0" / "report.json"
    values = json.loads(path.read_text())
    assert values["config"].pop("awp_gamma", 0) is None  # as if from before there was this setting
    path.write_text(json.dumps(values))
    assert compare("--config", plan) == 0
    assert "4 done already, 0 to go" in capsys.readouterr().out
    changed = plan.with_name("changed.yaml")
    changed.write_text(plan.read_text().replace("save_steps: 2", "weight_decay: 0.1"))
    assert compare("--config", changed) == 2
    complaint = capsys.readouterr().err
    folder = tmp_path / "out" / "plain" / "seed0"
    assert f"{folder} holds a run with other settings (weight_decay 0.0005 -> 0.1)" in complaint
    assert "--output_dir" in complaint
    assert started() == []


def test_runs_that_exist_are_compared(plan, tmp_path, capsys):
    (tmp_path / "reports" / "mended").touch()
    folder = tmp_path / "out"
    assert compare("--config", plan) == 0
    sources = [folder / label / f"seed{seed}" for label in ("mined", "plain") for seed in (0, 1)]
    assert compare(*sources, "--output_dir", tmp_path / "some", "--baseline", "plain") == 0
    assert compare(folder, "--output_dir", tmp_path / "all", "--baseline", "plain") == 0
    capsys.readouterr()
    rows, all_rows, planned = (
        {row["label"]: row for row in json.loads((where / "comparison.json").read_text())["rows"]}
        for where in (tmp_path / "some", tmp_path / "all", folder)
    )
    assert list(rows) == ["mined", "plain"]
    assert list(all_rows) == ["plain", "mined"]
    for row in (*rows.values(), *all_rows.values(), *planned.values()):
        for one in row["runs"]:
            assert one.pop("source").endswith(f"{row['label']}/seed{one['seed']}")
    assert rows == all_rows == planned
    assert {path.name for path in (tmp_path / "some").iterdir()} == FILES


def test_a_failed_run_is_listed_and_does_not_stop_the_others(plan, started, tmp_path, capsys):
    assert compare("--config", plan, "--output_dir", tmp_path / "out") == 1
    assert started() == ["plain/seed0", "mined/seed0", "plain/seed1", "mined/seed1"]
    printed = capsys.readouterr()
    assert "FAILED mined seed 0: status 1" in printed.out
    assert "2 of 4 runs failed" in printed.err
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {*FILES, "plain", "mined"}
    text = (folder / "comparison.md").read_text()
    assert "- mined, seed 1: failed. status 1; the end of" in text
    assert "the disk is full" in text
    values = json.loads((folder / "comparison.json").read_text())
    assert values["command"].endswith("--config compare.yaml --output_dir out")
    assert values["jobs"] == 1
    assert values["rows"][0]["runs"][0]["source"] == "plain/seed0"
    missing = [(one["label"], one["seed"], one["failed"]) for one in values["missing"]]
    assert missing == [("mined", 0, True), ("mined", 1, True)]
    assert values["missing"][0]["reason"].startswith("status 1; the end of mined/seed0.log:")
    assert not [name for name in FILES if str(tmp_path).encode() in (folder / name).read_bytes()]
    (tmp_path / "reports" / "mended").touch()
    assert compare("--config", plan) == 0
    assert started() == ["mined/seed0", "mined/seed1"]
    assert "missing" not in (folder / "comparison.md").read_text()
    assert (folder / "mined" / "seed0.log").read_text().count("working on") == 2


def test_runs_of_a_comparison_without_a_report_are_missing_and_its_order_and_baseline_stay(plan, tmp_path):
    plan.write_text(plan.read_text() + "  early: {mining_step: 1}\n")
    assert compare("--config", plan, "--seeds", "0") == 1
    (tmp_path / "out" / "early" / "seed4").mkdir(parents=True)
    source = tmp_path / "out"
    assert compare(source, f"{source}/../out", source / "plain/seed0", "--output_dir", tmp_path / "again") == 0
    values = json.loads((tmp_path / "again" / "comparison.json").read_text())
    assert values["baseline"] == "plain"
    assert [(row["label"], row["seeds"]) for row in values["rows"]] == [("plain", [0])]
    assert {one["state"] for one in values["missing"]} == {"not finished"}
    assert {(one["label"], one["seed"]) for one in values["missing"]} == {("mined", 0), ("early", 0), ("early", 4)}


def test_an_unreadable_report_is_a_failed_run_and_all_problems_are_said_at_once(plan, started, tmp_path, capsys):
    (tmp_path / "reports" / "mended").touch()
    assert compare("--config", plan) == 0
    started()
    report = tmp_path / "out" / "mined" / "seed1" / "report.json"
    report.write_text("{")
    out, again = tmp_path / "out", tmp_path / "again"
    for words, folder in ((["--config", plan], out), ([out, "--output_dir", again], again)):
        assert compare(*words) == 1
        assert started() == []
        text = (folder / "comparison.md").read_text()
        assert "- mined, seed 1: failed." in text
        assert "is not a report of ham\\_hf" in text
    report.unlink()
    original = plan.read_text()
    plan.write_text(original.replace("save_steps: 2", "weight_decay: 0.1"))
    capsys.readouterr()
    assert compare("--config", plan, "--only", "plain") == 2
    complaint = capsys.readouterr().err
    assert complaint.count("holds a run with other settings") == 2
    assert "mined" not in complaint
    plan.write_text(original.replace("mining_step: 2", "mining_step: 1"))
    assert compare("--config", plan, "--only", "plain") == 0
    sentence = "- mined, seed 0: not run. seed0 holds a run with other settings"
    assert sentence in (tmp_path / "out" / "comparison.md").read_text()


def test_all_runs_failing_leaves_no_table(plan, tmp_path, capsys):
    assert compare("--config", plan, "--only", "mined") == 1
    assert "nothing to compare" in capsys.readouterr().err
    assert not (tmp_path / "out" / "comparison.md").exists()


def test_only_and_seeds_choose_what_is_run(plan, started, tmp_path, capsys):
    assert compare("--config", plan, "--only", "plain", "--jobs", "2") == 0
    assert sorted(started()) == ["plain/seed0", "plain/seed1"]
    assert "- mined, seed 1: not run. not started: left out by --only" in (tmp_path / "out/comparison.md").read_text()
    (tmp_path / "reports" / "mended").touch()
    assert compare("--config", plan, "--seeds", "1", "--output_dir", tmp_path / "elsewhere") == 0
    assert started() == ["plain/seed1", "mined/seed1"]
    rows = json.loads((tmp_path / "elsewhere" / "comparison.json").read_text())["rows"]
    assert [(row["label"], row["seeds"]) for row in rows] == [("plain", [1]), ("mined", [1])]
    assert rows[1]["attacks"]["pgd-20"]["rho"] == pytest.approx((9 - 7) / 7 + (31 - 30) / 30)
    assert compare("--config", plan, "--seeds", "0", "--only", "mined") == 0
    assert started() == ["mined/seed0"]
    values = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [(row["label"], row["seeds"]) for row in values["rows"]] == [("plain", [0, 1]), ("mined", [0])]
    assert [(one["label"], one["state"], one["failed"]) for one in values["missing"]] == [("mined", "not run", False)]
    capsys.readouterr()
    plan.write_text(plan.read_text().replace("mining_step: 2", "mining_step: 2, seeds: [0]"))
    assert compare("--config", plan, "--seeds", "5", "--only", "mined") == 2
    assert "--only mined: it has the seeds 0 in" in capsys.readouterr().err


def test_dry_run_prints_commands_that_give_the_planned_configuration(plan, started, tmp_path, capsys):
    assert compare("--config", plan, "--dry_run", "--launch_args=--num_processes 1 --cpu") == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == 4
    for command, planned in zip(commands, read_plan(plan).runs, strict=True):
        script = command.index(str(tmp_path / "fake.py"))
        launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
        assert command[:script] == [sys.executable, *launch]
        ours, theirs = config_to_dict(parse_train_config(command[script + 1 :])), config_to_dict(planned.config)
        assert ours == theirs | {"disable_tqdm": True}
    assert started() == []
    assert not (tmp_path / "out").exists()


def test_a_run_that_another_process_is_at_is_not_started(plan, started, tmp_path, capsys):
    with RunLock(tmp_path / "out" / "plain" / "seed0") as lock:
        lock.acquire()
        assert compare("--config", plan, "--only", "plain") == 0
        assert started() == ["plain/seed1"]
        assert f"RUNNING plain seed 0: another process is running it: {lock.path} is locked" in capsys.readouterr().out
        assert "- plain, seed 0: running." in (tmp_path / "out" / "comparison.md").read_text()
        assert compare(tmp_path / "out", "--output_dir", tmp_path / "again") == 0
        assert "- plain, seed 0: running." in (tmp_path / "again" / "comparison.md").read_text()


def test_a_run_that_another_process_takes_while_it_starts_is_running_and_not_failed(plan, tmp_path, capsys):
    # What the trainer does: it finds the folder locked, and ends with status 2.
    (tmp_path / "fake.py").write_text(
        "import pathlib, sys, time\n"
        f"while not pathlib.Path({str(tmp_path / 'taken')!r}).exists(): time.sleep(0.01)\n"
        "sys.exit(2)\n"
    )
    lock = RunLock(tmp_path / "out" / "plain" / "seed0")

    def take() -> None:
        while not (tmp_path / "out" / "plain" / "seed0.log").exists():
            time.sleep(0.01)
        lock.acquire()
        (tmp_path / "taken").touch()

    other = threading.Thread(target=take)
    other.start()
    try:
        compare("--config", plan, "--only", "plain", "--seeds", "0")
    finally:
        other.join()
        lock.release()
    assert "RUNNING plain seed 0: another process is running it" in capsys.readouterr().out


WITHOUT_POSIX = """
import sys, os, signal
import accelerate, datasets, filelock, huggingface_hub, matplotlib, timm, torch
sys.modules["fcntl"] = None
for module, names in ((os, ("killpg", "setsid", "fork")), (signal, ("SIGHUP", "SIGKILL"))):
    for name in names:
        delattr(module, name)
import ham_hf.comparison_run
"""


@pytest.mark.slow
def test_comparisons_need_nothing_that_windows_lacks(subprocess_env):
    finish([sys.executable, "-c", WITHOUT_POSIX], subprocess_env)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_stopped_comparison_leaves_no_child_behind(plan, tmp_path, number):
    handler = signal.getsignal(number)
    if handler is signal.SIG_IGN:
        pytest.skip("the tests were started with this signal ignored, as nohup does, and so is the comparison")
    told = f"print('child', os.getpid(), flush=True); os.kill({os.getpid()}, {int(number)})"
    (tmp_path / "fake.py").write_text(f"import os, time; {told}; time.sleep(600)")
    assert compare("--config", plan) == 130
    child = int((tmp_path / "out" / "plain" / "seed0.log").read_text().split("child ")[1].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert signal.getsignal(number) == handler
    assert not (tmp_path / "out" / "plain" / "seed1.log").exists()


def test_a_signal_while_a_run_is_being_started_leaves_no_child_behind(plan, tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text("import time; time.sleep(600)")
    started, popen = [], subprocess.Popen

    def interrupted(*words, **options):
        started.append(popen(*words, **options))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        return started[-1]

    monkeypatch.setattr("ham_hf.comparison.execution.subprocess.Popen", interrupted)
    assert compare("--config", plan) == 130
    assert [process.poll() is not None for process in started] == [True]


def test_unfinished_run_with_other_settings_is_refused(plan, started, tmp_path, capsys):
    folder = tmp_path / "out" / "plain" / "seed1"
    folder.mkdir(parents=True)
    config = load_train_config(plan.with_name("base.yaml"))
    (folder / "train_config.yaml").write_text(config_to_yaml(config))
    assert compare("--config", plan) == 2
    complaint = capsys.readouterr().err
    assert f"{folder} holds a run with other settings" in complaint
    assert "method ham -> pgd_at" in complaint
    assert "seed 0 -> 1" in complaint
    assert started() == []


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in Hub that this process talks to, without a login."""
    monkeypatch.setattr("ham_hf.comparison_run.save_comparison_figures", empty_figures)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Hub({}) as server:
        use_hub(server, monkeypatch, tmp_path / "hf_home", "none")
        monkeypatch.delenv("HF_TOKEN")
        yield server


def publish(hub, name, report, tmp_path):
    return hub.add("model", name, {"report.json": write_report(report, tmp_path / "published").read_bytes()})


def test_models_on_the_hub_are_compared_with_folders(hub, tmp_path, capsys):
    write_report(class_report([6, 9, 14], method="plain"), tmp_path / "runs" / "mine" / "seed0")
    repo = publish(hub, "me/robust", class_report([6, 9, 14], seed=3, method="other"), tmp_path)
    repo.tags["v1"] = repo.refs["main"]
    out = tmp_path / "out"
    folder = tmp_path / "runs" / "mine" / "seed0"
    assert compare(folder, "me/robust@v1", "--output_dir", out, "--baseline", "mine") == 0
    values = json.loads((out / "comparison.json").read_text())
    assert [(row["label"], row["seeds"]) for row in values["rows"]] == [("mine", [0]), ("other", [3])]
    assert values["rows"][1]["runs"][0]["source"] == "me/robust@v1"
    capsys.readouterr()
    assert compare("me/nothing", "--output_dir", tmp_path / "none") == 2
    complaint = capsys.readouterr().err
    assert "there is no folder me/nothing" in complaint
    assert "report.json of me/nothing" in complaint
    assert not (tmp_path / "none").exists()


def test_a_leaderboard_is_refreshed_from_a_list_of_models(hub, tmp_path, capsys):
    publish(hub, "me/robust", class_report([6, 9, 14], method="other"), tmp_path)
    publish(hub, "you/net", class_report([7, 8, 9], method="third"), tmp_path)
    hub.add("model", "you/broken", {"report.json": b"{}"})
    models, out = tmp_path / "models.txt", tmp_path / "out"
    models.write_text("# ours\nme/robust\nnet of you=you/net\nyou/gone\nyou/broken\n")
    words = ["--models", models, "--output_dir", out, "--page"]
    assert compare(*words) == 1
    printed = capsys.readouterr()
    assert f"wrote {out / 'leaderboard.html'}" in printed.out
    assert "2 of 4 runs failed" in printed.err
    page, text = (out / "leaderboard.html").read_text(), (out / "comparison.md").read_text()
    for name in ("you/gone", "you/broken"):
        assert f"{name}: failed. there is no folder {name}, and" in text.replace("\\_", "_")
        assert f"<b>{name}</b>: failed." in page
    assert 'data-label="net of you"' in page
    assert "30.0" in page
    # What is on the Hub now counts, not what was fetched before.
    publish(hub, "me/robust", class_report([1, 9, 14], method="other"), tmp_path)
    assert compare(*words) == 1
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    worst = {row["label"]: row["attacks"]["pgd-20"]["worst_class"]["mean"] for row in rows}
    assert worst == {"other": 0.05, "net of you": 0.35}
    models.write_text("you/gone\n")
    capsys.readouterr()
    assert compare("--models", models, "--output_dir", tmp_path / "none") == 2
    assert "report.json of you/gone" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_predictions_of_models_on_the_hub_are_paired_and_nothing_huge_is_fetched(hub, tmp_path, capsys, monkeypatch):
    for label, right in (("base", [20, 50, 60, 70]), ("own", [40, 60, 70, 80])):
        judged = judged_run(label, right)
        publish(hub, f"me/{label}", judged.report, tmp_path)
        table = write_verdicts(judged.verdicts, tmp_path / "published").read_bytes()
        hub.commit(f"me/{label}", {"predictions.parquet": table})
    words = ["base=me/base", "own=me/own", "--baseline", "base", "--output_dir", tmp_path / "out"]
    assert compare(*words) == 0
    values = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert values["paired"]["own"]["verdict"]["differences"]["average"]["mean"] > 0
    monkeypatch.setattr("ham_hf.hub.MAX_RESULT_BYTES", 1000)
    capsys.readouterr()
    assert compare(*words) == 2
    assert "bytes, more than 1,000" in capsys.readouterr().err


def test_what_no_figure_can_show_is_said(tmp_path, capsys):
    for name, attack in (("a", "pgd-20"), ("b", "cw-20")):
        report = run_report({"clean": even([20, 18]), attack: even([9, 9])}, class_names=("x", "y"), method=name)
        write_report(report, tmp_path / name)
    words = [f"{name}={tmp_path / name}" for name in "ab"]
    assert compare(*words, "--output_dir", tmp_path / "out") == 0
    sentence = "There are no figures, as no attack was run on every row (PGD-20 on a; CW-20 on b)."
    assert sentence in capsys.readouterr().out
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert sentence in text.replace("\\", "")
    assert text.index("| a | 1 |") < text.index("- Dataset:")


@pytest.mark.slow
def test_peak_memory_is_the_process_own_not_its_parents(subprocess_env):
    """A child of a large process: getrusage would count what the parent held."""
    code = "import torch; from ham_hf.training import launch; print(launch.peak_memory_bytes(torch.device('cpu')))"
    parent = f"import subprocess, sys; x = bytearray(2 * 2**30); subprocess.run([sys.executable, '-c', {code!r}])"
    done = finish([sys.executable, "-c", parent], subprocess_env)
    assert 50e6 < int(done.stdout) < 1.8e9
