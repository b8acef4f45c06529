"""Prove that a change changed no number: train with another commit and with this tree, and compare bit for bit.

    python -m tests.same COMMIT [--only LABEL ...] [--keep FOLDER] [--resume]

Every method and combination of `tests.support.method_checks`, streaming, and two processes, each for three epochs of
four updates of a small network on digits. Compared are, of each run, the weights, averages, class state and optimizer
of every checkpoint, the log and the trainer's state without times, the report without times and environment, and the
settings. With ``--resume`` this tree does not train anew: it resumes the commit's runs from a checkpoint in their
middle, and the weights, averages and class state at the end are compared. Prints one line per label; status 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import yaml

from tests.conftest import ROOT
from tests.support.method_checks import every_method
from tests.support.recipe_runs import LAUNCH, PROCESSES, finish

BASE = {
    "dataset_name": "digits",
    "model_name": "resnet18_cifar",
    "model_args": {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
    "epsilon": 0.2,
    "step_size": 0.08,
    "num_steps": 3,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 12,
    "gradient_accumulation_steps": 2,
    "limit_train_examples": 120,
    "limit_test_examples": 20,
    "validation_fraction": 0.2,
    "validation_num_steps": 2,
    "eval_num_steps": 2,
    "learning_rate": 0.1,
    "lr_scheduler_type": "cosine",
    "lr_step_unit": "step",
    "logging_steps": 1,
    "save_steps": 3,
    "save_total_limit": None,
    "use_cpu": True,
    "disable_tqdm": True,
}
TWO_PROCESSES = ("ham-cfa", "ham-easy-packed", "faal", "wat")
TIMES = {"seconds", "images_per_second", "created", "environment", "peak_memory_bytes"}
"""Keys of logs, states and reports that no two runs share."""


def runs(folder: Path) -> dict[str, dict[str, object]]:
    """The settings of every run by its label; what a stream needs is written to ``folder``."""
    found = {}
    for label, (method, changes) in every_method().items():
        own = json.loads(json.dumps({"method": method.name, **asdict(method)}))
        found[label] = BASE | own | changes
    found |= {f"{label}-2-processes": found[label] | {"per_device_train_batch_size": 6} for label in TWO_PROCESSES}
    streamed = {"dataset_name": stream_of_digits(folder / "digits-parquet"), "dataset_streaming": True}
    left_out = {"limit_train_examples": None}
    found["ham-streamed"] = {**found["ham"], **streamed, **left_out, "shuffle_buffer_size": 40}
    return found


def stream_of_digits(folder: Path) -> str:
    """Some of the digits as parquet files, two of train and one of test."""
    from PIL import Image
    from sklearn.datasets import load_digits

    from tests.support.example_images import dataset

    if folder.exists():
        return str(folder)
    (folder / "data").mkdir(parents=True)
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * 15).astype("uint8")
    parts = {"train-00000-of-00002": (0, 80), "train-00001-of-00002": (80, 150), "test-00000-of-00001": (150, 200)}
    for name, (first, last) in parts.items():
        rows = dataset([Image.fromarray(one) for one in pixels[first:last]], labels[first:last].tolist())
        rows.to_parquet(folder / "data" / f"{name}.parquet")
    return str(folder)


def train(tree: Path, folder: Path, settings: Mapping[str, Mapping[str, object]], flag: str) -> None:
    """Make the runs in ``folder`` with the package of ``tree``, each with this flag more."""
    for processes in (1, 2):
        labels = [label for label in settings if label.endswith("-2-processes") == (processes == 2)]
        labels = [label for label in labels if not (folder / label / "report.json").exists()]
        if not labels:
            continue
        for label in labels:
            (folder / f"{label}.yaml").write_text(yaml.safe_dump(dict(settings[label])))
        launcher = [*LAUNCH, *PROCESSES[2]] if processes == 2 else [sys.executable]
        # One process for all labels, as importing takes as long as a run; a process group serves one run alone.
        for together in [[label] for label in labels] if processes == 2 else [labels]:
            (folder / "runs.json").write_text(json.dumps(together))
            command = [*launcher, str(ROOT / "tests/same/train.py"), str(tree), str(folder / "runs.json"), flag]
            done = subprocess.run(command, cwd=folder, env=environment(tree), capture_output=True, text=True)
            if done.returncode:
                ended = f"{' '.join(command)} in {folder} ended with status {done.returncode}"
                sys.exit(f"{ended}:\n{done.stderr[-4000:]}")


def environment(tree: Path) -> dict[str, str]:
    """One thread, on the CPU, offline, with the package of ``tree``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ACCELERATE_"))}
    return kept | {
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "ACCELERATE_USE_CPU": "true",
    }


def timeless(value: object) -> object:
    """JSON without the keys of `TIMES`."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if key not in TIMES}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def content(path: Path) -> object:
    """The part of a file that has to be the same."""
    if path.suffix == ".jsonl":
        return [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    return timeless(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def compared(folder: Path) -> set[str]:
    """Files of a run that are compared, by their path in it."""
    paths = [path for kind in ("safetensors", "jsonl") for path in folder.rglob(f"*.{kind}")]
    paths += [*folder.glob("checkpoint-*/trainer_state.json"), *folder.glob("report.json"), *folder.glob("*.yaml")]
    return {str(path.relative_to(folder)) for path in paths}


def differences(old: Path, new: Path) -> list[str]:
    """Files of two runs that differ or that only one of them has."""
    ours, theirs = compared(new), compared(old)
    if not ours & theirs:
        refusals = [Path(f"{folder}-refused") for folder in (old, new)]
        return ["no run to compare", *(path.read_text().strip() for path in refusals if path.exists())]
    only = sorted(ours ^ theirs)
    return only + [name for name in sorted(ours & theirs) if content(old / name) != content(new / name)]


def cut_in_the_middle(old: Path, copy: Path) -> None:
    """Copy a run as it stood after its middle checkpoint."""
    shutil.copytree(old, copy)
    steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in copy.glob("checkpoint-[0-9]*"))
    for step in steps[len(steps) // 2 :]:
        shutil.rmtree(copy / f"checkpoint-{step}")
    (copy / "report.json").unlink()


def weights_that_differ(old: Path, new: Path) -> list[str]:
    """Safetensors files of the checkpoints of two runs that differ or that only one of them has."""
    names = {path.relative_to(run) for run in (old, new) for path in run.glob("checkpoint-*/*.safetensors")}
    same = {name for name in names if (old / name).exists() and (new / name).exists()}
    return sorted(map(str, names - same)) + [
        str(name) for name in sorted(same) if (old / name).read_bytes() != (new / name).read_bytes()
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare the working tree with")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="these runs alone")
    parser.add_argument("--resume", action="store_true", help="resume the commit's runs with the working tree")
    kept = "leave the runs there; runs of COMMIT that are there are not repeated"
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help=kept)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    git = ["git", "-C", str(ROOT)]
    commit = finish([*git, "rev-parse", args.commit], None).stdout.strip()
    with tempfile.TemporaryDirectory() as scratch:
        kept = (args.keep or Path(scratch)).resolve()
        old, new = kept / commit, kept / ("resumed" if args.resume else "new")
        shutil.rmtree(new, ignore_errors=True)
        old.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        settings = runs(kept)
        unknown = sorted(set(args.only or ()) - settings.keys())
        if unknown:
            sys.exit(f"--only {' '.join(unknown)}: expected some of {' '.join(settings)}")
        settings = {label: settings[label] for label in args.only or settings}
        tree = Path(scratch).resolve() / "tree"
        subprocess.run([*git, "worktree", "add", "--detach", "--quiet", str(tree), commit], check=True)
        try:
            train(tree, old, settings, "--overwrite_output_dir")
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)
        if args.resume:
            settings = {label: own for label, own in settings.items() if (old / label / "report.json").exists()}
            for label in settings:
                cut_in_the_middle(old / label, new / label)
        train(ROOT, new, settings, "--resume_from_checkpoint=latest" if args.resume else "--overwrite_output_dir")
        status = 0
        for label in settings:
            compare = weights_that_differ if args.resume else differences
            found = compare(old / label, new / label)
            status |= bool(found)
            verdict = f"DIFFERS: {', '.join(found)}" if found else "same"
            print(f"{label:28} {verdict}")
    return status


if __name__ == "__main__":
    sys.exit(main())
