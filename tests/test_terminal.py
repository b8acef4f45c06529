"""Output of commands where the terminal cannot show it, or there is none."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import datasets
import pytest
from huggingface_hub.utils import enable_progress_bars
from PIL import Image

from ham_hf import terminal
from ham_hf.reporting.report import read_report
from tests.conftest import ROOT
from tests.support.recipe_runs import SMALL, finish, launch_command, recipe_module, refused

pytestmark = pytest.mark.slow

NAMES = ("Eule 🦉", "狐", "ś\u2028b")
QUICK = ["--mining_start_epoch=0", "--num_train_epochs=1", "--per_device_train_batch_size=8", "--image_size=8"]
QUICK += ["--limit_train_examples=none", "--limit_test_examples=none", "--validation_fraction=0.25"]


@pytest.fixture(scope="module")
def owls(tmp_path_factory):
    """Images of classes whose names few encodings have."""
    folder = tmp_path_factory.mktemp("data") / "owls"
    for split, count in (("train", 12), ("test", 4)):
        for level, name in enumerate(NAMES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("L", (8, 8), 60 * level + number)
                image.save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def finished(owls, tmp_path_factory, subprocess_env):
    """A run on them in a terminal that lacks their names, and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = [*SMALL, *QUICK, f"--dataset_name={owls}", f"--output_dir={folder}"]
    (folder.parent / "printed").write_bytes(run("train_ham.py", *words, env=subprocess_env))
    return folder, owls


def run(script, *arguments, env):
    """Output of a recipe, to its successful end."""
    command = [sys.executable, str(ROOT / "recipes" / script), *arguments]
    done = subprocess.run(command, env=env | {"PYTHONIOENCODING": "cp1252:strict"}, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_names_that_the_terminal_lacks_lose_nothing(finished, tmp_path, subprocess_env):
    """Training, evaluation and comparison print tables of class names; the last file is written, the status is 0."""
    folder, owls = finished
    said = (folder.parent / "printed").read_text(encoding="cp1252")
    assert "?" in said
    assert not {"狐", "🦉", "ś"} & set(said)
    assert f"everything is in {folder}" in said
    assert set(read_report(folder).dataset.class_names) == set(NAMES)
    out = f"--output_dir={tmp_path / 'evaluation'}"
    words = [str(folder), f"--dataset_name={owls}", "--use_cpu", "--disable_tqdm", out]
    assert b"everything is in" in run("evaluate.py", *words, env=subprocess_env)
    words = [str(folder), f"--output_dir={tmp_path / 'compared 狐'}"]
    assert b"compared ?" in run("compare.py", *words, env=subprocess_env)


def test_standard_output_that_takes_nothing_is_told_and_what_follows_is_done(tmp_path):
    code = (
        "import logging\n"
        "from ham_hf.terminal import show\n"
        "logging.basicConfig()\n"
        "show('a table\\n' * 9)\n"
        "show('pushed')\n"
        f"open({str(tmp_path / 'after')!r}, 'w').close()\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    for stdout in (writer, os.open("/dev/full", os.O_WRONLY)):
        options = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True, "timeout": 60}
        done = subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, **options)
        os.close(stdout)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("standard output takes no text") == 1
        assert "Exception ignored" not in done.stderr
        (tmp_path / "after").unlink()


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_a_process_without_a_console_and_a_closed_stream_go_on(stream, monkeypatch, caplog):
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.replace_what_cannot_be_shown()
    terminal.show("text")
    terminal.show("text")
    assert caplog.text.count("standard output takes no text") == (stream is not None)


def test_other_processes_repeat_no_warning_and_no_bar(owls, tmp_path, subprocess_env):
    """Messages that both processes have are logged once, by the main one."""
    folder = tmp_path / "run"
    # Reaches less than epsilon: a warning.
    arguments = [*SMALL, *QUICK, "--step_size=0.001", f"--dataset_name={owls}", f"--output_dir={folder}"]
    command = launch_command("train_ham.py", *arguments, "--per_device_train_batch_size=4", processes=2)
    done = finish(command, subprocess_env)
    assert done.stderr.count("the attack cannot leave the neighborhood of its random start") == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith(("WARNING", "INFO"))]
    assert len(lines) == len(set(lines))
    assert not [line for line in lines if "process 1" in line]


@pytest.mark.parametrize("hidden", [False, True])
def test_disable_tqdm_reaches_the_bars_of_an_evaluation(hidden, finished, tmp_path, quick_autoattack, capfd):
    """Those of PGD and of AutoAttack too."""
    folder, owls = finished
    words = [str(folder), f"--dataset_name={owls}", "--use_cpu", f"--output_dir={tmp_path / 'evaluation'}"]
    words += ["--autoattack", "--eval_num_steps=1", *(["--disable_tqdm"] if hidden else [])]
    try:
        recipe_module("evaluate.py").main(words)
    finally:
        datasets.enable_progress_bars()
        enable_progress_bars()
    bars = [line for line in capfd.readouterr().err.splitlines() if "%|" in line]
    assert bool(bars) == (not hidden)
    assert hidden or "autoattack" in {word for line in bars for word in re.split(r"\W", line)}


def test_bars_of_libraries_are_off_afterwards():
    code = (
        "from ham_hf.terminal import hide_progress_bars\n"
        "hide_progress_bars()\n"
        "import datasets, huggingface_hub.utils as hub\n"
        "print(datasets.are_progress_bars_disabled(), hub.are_progress_bars_disabled())\n"
        "data = datasets.Dataset.from_dict({'a': [1, 2]}).map(lambda row: row)\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = finish([sys.executable, "-c", code], env | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == ["True", "True"]
    assert "%|" not in done.stderr


@pytest.mark.parametrize("script", ["train_ham.py", "compare.py"])
def test_an_output_folder_that_cannot_be_written_is_named_with_what_to_do(script, finished, tmp_path, capsys):
    folder, owls = finished
    (tmp_path / "file").write_text("")
    words = [str(folder)] if script == "compare.py" else [*SMALL, *QUICK, f"--dataset_name={owls}"]
    said = refused(capsys, script, *words, f"--output_dir={tmp_path / 'file' / 'run'}")
    error = said.strip().splitlines()[-1]
    assert error.startswith(f"error: --output_dir {tmp_path}/file/run cannot be written (")
    assert "name a folder that can" in error
    datasets.enable_progress_bars()
    enable_progress_bars()
