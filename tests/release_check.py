"""All of a release but the upload: build, check, install where the checkout cannot be seen, run every command once.

    make release-check
    python -m tests.release_check --download

The virtual environment is new. Left alone, it borrows the packages of this Python, but for ours; with ``--download``
it installs them from the registry, as a user's does (some 6 GB with the accelerator libraries of torch).
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ham_hf.commands import COMMANDS
from tests.support.hub_server import Hub, hub_environment

ROOT = Path(__file__).resolve().parents[1]
# A few updates of a narrow network; enough held-out images of each class to calibrate on.
TINY = shlex.split(
    "--config digits/ham --max_steps 2 --mining_start_epoch 0 --mining_step 1 --num_steps 2 --eval_num_steps 2 "
    "--per_device_train_batch_size 32 --validation_fraction 0.4 --limit_train_examples 600 --limit_test_examples 40 "
    "--use_cpu --disable_tqdm"
)
PLAN = """
recipe: {recipe}
output_dir: planned
seeds: [0]
settings: {{max_steps: 2, num_steps: 2, eval_num_steps: 2, limit_train_examples: 200, limit_test_examples: 40,
           use_cpu: true}}
runs: {{ham: {{mining_start_epoch: 0, mining_step: 1}}}}
"""
# What is run of each command, in order. One that is not here is only asked for its help.
RUNS = {
    "recipes": [["recipes"]],
    "train": [["train", *TINY, "--output_dir", "run"]],
    "evaluate": [
        shlex.split("evaluate run --dataset_name digits --limit_test_examples 20 --use_cpu"),
        shlex.split(
            "evaluate run --dataset_name digits --limit_test_examples 20 --use_cpu --output_dir corrupted "
            "--eval_num_steps 2 --corruptions gaussian_noise --severities 1 --group_column label"
        ),
    ],
    "calibrate": [["calibrate", "run", "--fairness", "0.5", "--eval_num_steps", "2", "--use_cpu"]],
    "compare": [["compare", "--config", "plan.yaml"], shlex.split("compare run planned --output_dir compared --page")],
    "page": [["page", "run"], ["page", "run", "evaluation/run", "--output", "both.html"]],
    "push": [["push", "run", "--hub_model_id", "me/robust"], ["push", "me/robust", "--repair"]],
}
LEFT_BEHIND = shlex.split(
    "run/model.safetensors run/README.md run/report.html both.html launched/report.json evaluation/run/report.json "
    "planned/ham/seed0/report.json corrupted/report.json compared/comparison.md compared/leaderboard.html"
)
WHERE = "import ham_hf, sys; sys.stdout.write(f'{ham_hf.__file__} {ham_hf.__version__}')"


def main() -> None:
    """Check, and say how long each step took; the first that fails ends it with status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--download", action="store_true", help="install the dependencies from the registry")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ham_hf-release-") as temporary, Hub() as hub:
        folder = Path(temporary).resolve()
        wheel = build(folder)
        binaries = install(wheel, folder / "venv", download=options.download)
        work = folder / "work"
        work.mkdir()
        environment = hub_environment(hub, folder, token="hf_test")
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            environment.pop(name, None)
        run_commands(binaries, work, environment)
        missing = [name for name in LEFT_BEHIND if not (work / name).is_file()]
        missing += [] if "model.safetensors" in hub.model("me/robust").tree() else ["model.safetensors on the Hub"]
        if missing:
            sys.exit(f"release-check: the commands left no {', '.join(missing)}")
    print("release-check: all of it passed. Nothing was uploaded; docs/releasing.md says what comes next")


def build(folder: Path) -> Path:
    """Make the sdist, from it the wheel, and let twine check both."""
    step(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT, cwd=folder)
    files = sorted((folder / "dist").iterdir())
    step(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=folder)
    (wheel,) = (path for path in files if path.suffix == ".whl")
    return wheel


def install(wheel: Path, venv: Path, *, download: bool) -> Path:
    """A new virtual environment with the wheel; its folder of commands."""
    step(sys.executable, "-m", "venv", venv, cwd=venv.parent)
    binaries = venv / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / "python"
    if not download:
        site = step(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv).strip()
        # A folder that is named in a .pth file is searched, but its own .pth files, such as that of an editable
        # install, are not read.
        borrowed = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
        Path(site, "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    alone = [] if download else ["--no-deps", "--no-index", "--ignore-installed"]
    step(python, "-m", "pip", "install", "--quiet", *alone, wheel, cwd=venv)
    place, version = step(python, "-c", WHERE, cwd=venv, env=clean_environment()).split()
    if not Path(place).resolve().is_relative_to(venv.resolve()):
        sys.exit(f"release-check: ham_hf {version} is imported from {place}, not from the wheel")
    return binaries


def run_commands(binaries: Path, work: Path, environment: dict[str, str]) -> None:
    """Every command in the folder ``work``, by its name, as a module, and through the launcher."""
    program, python = binaries / "ham-hf", binaries / "python"
    step(program, "--help", cwd=work, env=environment)
    step(python, "-m", "ham_hf", "--version", cwd=work, env=environment)
    listed = step(program, "recipes", cwd=work, env=environment)
    recipes = Path(listed.partition("\n")[0].removeprefix("in ").strip())
    (work / "plan.yaml").write_text(PLAN.format(recipe=recipes / "digits" / "ham.yaml"), encoding="utf-8")
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--cpu"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    step(python, *launch, "-m", "ham_hf", "train", *TINY, "--output_dir", "launched", cwd=work, env=environment)
    for name in [*RUNS, *(name for name in COMMANDS if name not in RUNS)]:
        step(program, name, "--help", cwd=work, env=environment)
        for words in RUNS.get(name, []):
            step(program, *words, cwd=work, env=environment)


def clean_environment() -> dict[str, str]:
    """This process's environment, without what leads Python back to the checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def step(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command and return what it printed; its failure ends the check."""
    words, start = [*map(str, command)], time.monotonic()
    done = subprocess.run(words, cwd=cwd, env=env or clean_environment(), capture_output=True, text=True)
    shown = shlex.join([Path(words[0]).name, *words[1:]])
    print(f"{time.monotonic() - start:6.1f} s  {shown if len(shown) < 120 else f'{shown[:117]}...'}", flush=True)
    if done.returncode:
        sys.exit(f"release-check: status {done.returncode} of {shlex.join(words)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
