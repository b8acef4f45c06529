"""The files of a run's folder: each is replaced in one step, so that a crash leaves the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ham_hf.config import TrainConfig
from ham_hf.reporting.class_examples import RunExamples
from ham_hf.reporting.report import RunReport
from ham_hf.reporting.run_report import write_config, write_evaluation, write_run
from tests.support.example_report import attack_result, make_examples, make_report, one_example, with_dataset

LABELS = torch.arange(40) % 10


def written(report: RunReport, folder: Path, kind: str) -> None:
    predictions = {"clean": LABELS, "pgd-20": (LABELS + LABELS % 2) % 10}
    results = {name: attack_result(name, {}, found, LABELS) for name, found in predictions.items()}
    examples = RunExamples(strip=make_examples(4, in_chans=3, num_classes=10), of_classes=one_example())
    report = with_dataset(report, hub_id="uoft-cs/cifar10")
    if kind == "evaluation":
        write_evaluation(report, folder, results=results, examples=examples, command="ham-hf evaluate")
        return
    write_config(TrainConfig(), folder)
    write_run(report, folder, results=results, examples=examples)


@pytest.mark.parametrize(
    ("kind", "most"), [("run", ("README.md", "train_config.yaml", "image.png")), ("evaluation", ("EVALUATION.md",))]
)
def test_every_file_is_renamed_into_its_place_after_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, most: tuple[str, ...]
) -> None:
    placed, rename = list[Path](), os.replace

    def noted(old: Path, new: Path) -> None:
        placed.append(Path(new))
        rename(old, new)

    monkeypatch.setattr(os, "replace", noted)
    written(make_report(config={"model_license": "mit"}), tmp_path, kind)
    found = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {tmp_path / name for name in (*most, "figures/per_class_accuracy.png")} <= found
    assert found == set(placed)
