"""A made-up but consistent RunReport for the tests of reports, figures, cards and pushes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from ham_hf.evaluation import AttackResult
from ham_hf.intervals import intervals_of
from ham_hf.metrics import summarize_counts
from ham_hf.reporting.class_examples import ClassExample, ClassExamples
from ham_hf.reporting.figures import ExampleStrip
from ham_hf.reporting.report import (
    AttackReport,
    DatasetReport,
    Environment,
    ModelReport,
    RunReport,
    ThreatModelReport,
    TrainingReport,
)
from ham_hf.reporting.run_report import attack_report

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def attack_result(
    name: str, settings: Mapping[str, object], predictions: torch.Tensor, labels: torch.Tensor
) -> AttackResult:
    """One evaluation of N images, without margins."""
    return AttackResult(
        name=name,
        settings=dict(settings),
        predictions=predictions,
        margins=torch.zeros(len(labels)),
        labels=labels,
        indices=torch.arange(len(labels)),
        seconds=1.5,
    )


def make_attack(
    name: str, accuracy: float, *, num_classes: int, num_examples: int, missing: Sequence[int] = ()
) -> AttackReport:
    """Random predictions that are right with a probability falling from class to class."""
    generator = torch.Generator().manual_seed(num_classes + len(name))
    present = torch.tensor([index for index in range(num_classes) if index not in missing])
    labels = present[torch.arange(num_examples) % len(present)]
    chance = (accuracy * (1.3 - 0.6 * labels / num_classes)).clamp(max=1.0)
    flags = torch.rand(num_examples, generator=generator) < chance
    wrong = (labels + torch.randint(1, num_classes, (num_examples,), generator=generator)) % num_classes
    settings = {} if name == "clean" else {"norm": "linf", "epsilon": 8 / 255, "num_steps": 20, "step_size": 2 / 255}
    predictions = torch.where(flags, labels, wrong)
    return attack_report(attack_result(name, {**settings, "seed": 0}, predictions, labels), num_classes)


def make_verdict(results: Mapping[str, AttackReport]) -> AttackReport:
    """Each class loses a little more than under its strongest attack; of the images of the last attack."""
    attacks = [attack for attack in results.values() if attack.name != "clean"]
    last = [entry.count for entry in attacks[-1].summary.per_class]
    correct = [
        max(0, int(count * min(attack.summary.per_class[index].accuracy or 0.0 for attack in attacks)) - 1)
        for index, count in enumerate(last)
    ]
    summary, settings = summarize_counts(correct, last), {"attacks": [attack.name for attack in attacks]}
    parts = {"settings": settings, "summary": summary, "intervals": intervals_of(summary)}
    return AttackReport(name="verdict", confusion=None, seconds=4.5, **parts)


def make_history(
    num_epochs: int, *, num_classes: int = 10, treatment: Mapping[str, int] | None = None
) -> list[dict[str, object]]:
    """A validation record for each epoch.

    ``treatment`` has the first 0-based epoch of each per-class quantity; None is of before there were any.
    """
    names = ("hard_per_class", "class_weight", "class_kl_weight", "class_epsilon") if treatment is not None else ()
    records: list[dict[str, object]] = []
    for epoch in range(num_epochs):
        record: dict[str, object] = {
            "type": "validation",
            "step": 10 * (epoch + 1),
            "epoch": epoch,
            "clean_accuracy": 0.9 - 0.5 / (epoch + 1),
            "robust_accuracy": 0.6 - 0.4 / (epoch + 1),
            "worst_class": 0.4 - 0.4 / (epoch + 1),
            "averaged": epoch > 0,
        }
        for name in names:
            values = [class_quantity(name, index, epoch, num_classes) for index in range(num_classes)]
            record[name] = values if epoch >= treatment.get(name, num_epochs) else None
        records.append(record)
    return records


def class_quantity(name: str, index: int, epoch: int, num_classes: int) -> float | None:
    """A made-up value that grows from class to class and changes with the epoch; none of the last one's weights."""
    place = index / (num_classes - 1)
    if name == "hard_per_class":
        return (0.1 + 0.6 * place) / (1 + 0.1 * epoch)
    if name == "class_epsilon":
        return 8 / 255 * (0.6 + 0.5 * place)
    return None if index == num_classes - 1 else 0.5 + place + 0.02 * epoch


def make_train_log(num_epochs: int, *, mining_start_epoch: int | None) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for step in range(10 * num_epochs):
        mined = mining_start_epoch is not None and step // 10 >= mining_start_epoch
        hard = 0.7 - 0.3 * step / (10 * num_epochs) if mined else None
        loss = 2.3 / (1 + 0.05 * step)
        lines.append({"type": "train", "step": step, "epoch": step // 10, "loss": loss, "hard_fraction": hard})
    return lines


def make_report(
    *,
    class_names: Sequence[str] = DIGITS,
    attacks: Sequence[str] = ("clean", "pgd-20", "cw-20"),
    num_test: int = 360,
    num_autoattack: int | None = None,
    missing: Sequence[int] = (),
    num_epochs: int = 12,
    trained: bool = True,
    treatment: Mapping[str, int] | None = None,
    config: Mapping[str, object] | None = None,
    verdict: bool = False,
) -> RunReport:
    """A report; see `make_history` for ``treatment``; ``config`` is added to the settings.

    Without ``verdict`` it is one from before there were verdicts.
    """
    accuracy = {"clean": 0.8, "pgd-20": 0.5, "cw-20": 0.47, "autoattack": 0.44}
    seen = {"autoattack": num_autoattack or num_test}
    common = {"num_classes": len(class_names), "missing": missing}
    results = {
        name: make_attack(name, accuracy[name], num_examples=seen.get(name, num_test), **common) for name in attacks
    }
    model = ModelReport(
        name="resnet18_cifar",
        architecture="resnet18",
        base_model=None,
        needs_ham_hf=False,
        num_parameters=11_220_132,
        image_size=32,
        in_chans=3,
        upsample=4,
        interpolation="nearest",
        crop_pct=1.0,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    dataset = DatasetReport(
        name="digits",
        hub_id=None,
        config_name=None,
        revision=None,
        class_names=tuple(class_names),
        num_train=1380,
        num_validation=57,
        num_test=num_test,
        test_split_origin="held out of train (20 %, stratified, seed 0)",
        num_skipped=0,
        augmentation="none",
    )
    training = TrainingReport(
        num_train_epochs=num_epochs,
        steps=10 * num_epochs,
        skipped_updates=1,
        seconds=93.25,
        selection_metric="robust_accuracy",
        selected_step=10 * num_epochs,
        selected_epoch=num_epochs - 1,
        history=tuple(make_history(num_epochs, num_classes=len(class_names), treatment=treatment)),
    )
    settings = {
        "dataset_name": "digits",
        "model_name": "resnet18_cifar",
        "method": "ham",
        "epsilon": 8 / 255,
        "step_size": 2 / 255,
        "num_steps": 10,
        "mining_step": 3,
        "mining_start_epoch": 4,
        "num_train_epochs": num_epochs,
        "per_device_train_batch_size": 128,
        "optimizer": "momentum",
        "learning_rate": 0.1,
        "seed": 0,
        "ema_decay": None,
        "model_args": {"drop_rate": 0.1},
        "lr_drops": ("6:0.1", "9:0.01"),
    }
    environment = Environment(
        python="3.11.9",
        platform="Linux-x86_64",
        versions={"ham_hf": "0.1.0", "torch": "2.14.1", "timm": "1.0.31"},
        device="cpu",
        num_processes=1,
        num_threads=2,
        commit="0123456789abcdef0123456789abcdef01234567-dirty",
    )
    return RunReport(
        model=model,
        dataset=dataset,
        config={**settings, **(config or {})},
        threat_model=ThreatModelReport(norm="linf", epsilon=8 / 255),
        results=results,
        training=training if trained else None,
        environment=environment,
        seeds={"seed": 0},
        created="2026-11-22T17:33:00+00:00",
        verdict=make_verdict(results) if verdict else None,
    )


def with_model(report: RunReport, **changes: object) -> RunReport:
    return dataclasses.replace(report, model=dataclasses.replace(report.model, **changes))


def with_dataset(report: RunReport, **changes: object) -> RunReport:
    return dataclasses.replace(report, dataset=dataclasses.replace(report.dataset, **changes))


def make_examples(num_images: int, *, in_chans: int, num_classes: int) -> ExampleStrip:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(num_images, in_chans, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = (torch.rand(clean.shape, generator=generator) * 2 - 1).sign() * 8 / 255
    labels = torch.arange(num_images) % num_classes
    return ExampleStrip(
        clean=clean,
        adversarial=(clean + noise).clamp(0, 1),
        labels=labels,
        clean_predictions=labels,
        adversarial_predictions=(labels + torch.arange(num_images) % 2) % num_classes,
        attack="PGD-20",
    )


def one_example(image: bytes = b"image") -> ClassExamples:
    """One image of class 0 that an attack broke."""
    example = ClassExample(
        label=0,
        position=7,
        kind="weak",
        margin=-0.5,
        clean_prediction=0,
        attacked_prediction=1,
        enlargement=16.0,
        clean=image,
        attacked=image,
        difference=image,
    )
    return ClassExamples(attack="PGD-20", examples=(example,))
