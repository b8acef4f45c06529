"""The golden documents in ``tests/documents``: whole cards, comparisons and a leaderboard of made-up runs.

``python -m tests.support.documents`` writes them again after a wanted change; read what changed before you commit it.
A ``*_variants.diff`` holds, for each variant of a document, only the lines in which it differs from that document.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ham_hf.comparison.leaderboard import leaderboard_html
from ham_hf.comparison.pairs import FinishedRun
from ham_hf.comparison.report import comparison_csv, comparison_json, comparison_markdown
from ham_hf.comparison.table import Comparison, MissingRun, compare
from ham_hf.data.image_groups import make_groups
from ham_hf.evaluation import AttackResult
from ham_hf.evaluation.calibration import frontier_point
from ham_hf.evaluation.corruption_accuracy import CorruptionResult
from ham_hf.evaluation.verdicts import verdicts_of
from ham_hf.methods import Method, available
from ham_hf.reporting.breakdowns import corruption_report, group_report
from ham_hf.reporting.card import evaluation_document, write_card
from ham_hf.reporting.report import CalibrationReport, RunReport, ThreatModelReport, read_report
from tests.support.comparison_reports import by_seeds, even, judged_run, run
from tests.support.example_report import attack_result, make_report, with_dataset, with_model
from tests.support.leaderboard_runs import leaderboard_comparison

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests/documents"
FIGURES = ("per_class_accuracy", "confusion_cw-20", "class_treatment", "training_curves", "fairness_frontier")
OFF = {"ema_decay": None, "fawa": "auto", "fawa_decay": 0.85, "fawa_threshold": 0.2, "awp_gamma": None}
BORROWED = {
    "base_loss": "trades",
    "beta": 4.0,
    "class_margin": "cfa",
    "class_weighting": "dafa",
    "class_rule_args": {"cfa_lambda1": 0.3, "dafa_lambda": 1.5},
    "awp_gamma": 0.005,
    "awp_start_epoch": 5,
    "fawa": "on",
}
HUB_DATA = {"name": "uoft-cs/cifar10", "hub_id": "uoft-cs/cifar10", "config_name": "plain_text", "revision": "a" * 40}
ORIGIN = {"dataset": "digits", "train_split": "train", "revision": "main", "num_images": 1380}
ORIGIN |= {"fingerprint": "0123456789abcdef" * 4}
GROUP_VALUES = [["a", "b", None, "<b>*x*|</b>"][number % 7 % 4] for number in range(80)]
GROUPS = make_groups("site", GROUP_VALUES)


def config_of(kind: type[Method], **changes: object) -> dict[str, object]:
    """Settings of a run with this method, as a report has them."""
    return {"method": kind.name, **dataclasses.asdict(kind()), **OFF, "awp_start_epoch": 0, **changes}


def with_config(config: Mapping[str, object]) -> RunReport:
    """A report with exactly these settings."""
    return dataclasses.replace(make_report(), config=config)


def with_training(report: RunReport, **changes: object) -> RunReport:
    return dataclasses.replace(report, training=dataclasses.replace(report.training, **changes))


def calibration(**changes: object) -> CalibrationReport:
    points = [frontier_point(f, [20 + int(40 * f), *[60] * 8, 90 - int(60 * f)], [100] * 10) for f in (0.0, 0.5, 1.0)]
    plain = CalibrationReport(
        fairness=0.5,
        max_average_drop=None,
        shifts=tuple(0.1 * index - 0.45 for index in range(10)),
        factors=(0.94,) * 10,
        counts=(100,) * 10,
        frontier=tuple(points),
        attack={"num_steps": 10},
        images="100 images | of a split",
        seen_in_training=False,
        seconds=3.0,
        passes=1000,
        tags=("strong", "timm"),
    )
    return dataclasses.replace(plain, **changes)


def calibrated(**changes: object) -> RunReport:
    """A report of a stranger's model with shifts."""
    report = with_model(make_report(trained=False), name="strong", base_model="them/strong")
    return dataclasses.replace(report, calibration=calibration(**changes))


def corrupted(generator: torch.Generator) -> list[CorruptionResult]:
    """Two corruptions of 80 images, fewer right the more severe."""
    found = []
    for name, severity in itertools.product(("fog", "snow"), (1, 5)):
        flags = torch.rand(80, generator=generator) < 0.9 - severity / 10
        found.append(CorruptionResult(name=name, severity=severity, flags=flags, seconds=2.0))
    return found


def grouped_results(generator: torch.Generator, names: Sequence[str]) -> dict[str, AttackResult]:
    """Evaluations of 80 images of ten classes; a share of 0.7 is right."""
    labels, results = torch.arange(80) % 10, {}
    for name in names:
        flags = torch.rand(80, generator=generator) < 0.7
        results[name] = attack_result(name, {}, torch.where(flags, labels, (labels + 1) % 10), labels)
    return results


def with_breakdowns() -> RunReport:
    """A report of an evaluation by groups and on corrupted images."""
    generator = torch.Generator().manual_seed(0)
    results = grouped_results(generator, ("clean", "pgd-20"))
    labels, constants = results["clean"].labels, "CIFAR-10-C (meant for 32 px)"
    return dataclasses.replace(
        with_model(make_report(trained=False, verdict=True), name="/secret/home/strong"),
        groups=group_report(verdicts_of(results, tuple(map(str, range(10))), GROUPS)),
        corruptions=corruption_report(corrupted(generator), labels, 10, constants=constants),
    )


def card_variants() -> dict[str, RunReport]:
    """Reports whose cards differ from the plain one, by what is different."""
    plain, known = make_report(), available()
    ham, early = {**plain.config, **OFF}, make_report(config={"mining_start_epoch": 8, "base_loss": "trades"})
    everything = ("clean", "pgd-20", "cw-20", "autoattack")
    never = tuple({**record, "averaged": False} for record in plain.training.history)
    cfa = with_config(ham | {"method": "cfa", "fawa_threshold": 0.9})
    return {
        "verdict, AutoAttack on a part": make_report(attacks=everything, num_autoattack=100, verdict=True),
        "AutoAttack on all": make_report(attacks=everything),
        "clean alone": make_report(attacks=("clean",)),
        "PGD alone": make_report(attacks=("clean", "pgd-20")),
        "a part of the test images, a class without": make_report(
            num_test=60, missing=(4,), config={"limit_test_examples": 60}
        ),
        "data and weights of the Hub": with_model(
            with_dataset(plain, **HUB_DATA, trained_on=ORIGIN, num_test_in_train=4, notes=("3 rows | were empty",)),
            base_model="timm/resnet18.a1_in1k",
        ),
        "classes in an assumed order": with_dataset(plain, class_order="assumed", num_test_in_train=0),
        "some classes of the model": with_dataset(plain, class_order="subset", num_model_classes=20),
        "a local folder": with_dataset(plain, name="/secret/place/cats"),
        "weights that are no repository": with_model(plain, base_model="resnet18"),
        "gray": with_model(plain, in_chans=1, upsample=1, mean=(0.5,), std=(0.25,)),
        "an architecture of ham_hf": with_model(
            plain, architecture="preactresnet18_cifar", needs_ham_hf=True, upsample=1
        ),
        "squashed": with_model(plain, crop_mode="squash", crop_pct=0.9, interpolation="bilinear"),
        "with borders": with_model(plain, crop_mode="border", crop_pct=0.9),
        "L2": dataclasses.replace(plain, threat_model=ThreatModelReport(norm="l2", epsilon=0.5)),
        "combined": with_config(config_of(known["ham"], **BORROWED)),
        "CFA": with_config(config_of(known["cfa"])),
        "CFA without its averaging": with_config(config_of(known["cfa"], fawa="off", ema_decay=0.999)),
        "CFA, no epoch let in": with_training(cfa, history=never),
        "averaged": with_config(config_of(known["pgd_at"], ema_decay=0.999)),
        "FAT": with_config(config_of(known["fat"])),
        "a method of a later version": with_config({"method": "of a later version"}),
        "easy examples, coarser attacks": with_config(
            ham | {"easy_weight": 0.5, "easy_fraction": 0.3, "attack_precision": "bf16"}
        ),
        "another schedule": with_config(ham | {"easy_fraction": 0.3, "lr_scheduler_type": "cosine"}),
        "began after the last epoch": make_report(config={"mining_start_epoch": 12}),
        "began after the selected epoch": with_training(early, selected_epoch=7),
        "began with the selected epoch": with_training(early, selected_epoch=8),
        "changed on the way": with_training(plain, changes=("After update 4, from epoch 2 on, it was changed.",)),
        "the last weights, images skipped": with_training(with_dataset(plain, num_skipped=3), selection_metric="last"),
        "selected by the verdict": with_training(plain, selection_metric="verdict", passes=1e6),
        "notes": dataclasses.replace(plain, notes=("3 images were left out.", "a | <b> `c`\n# d")),
        "calibrated": dataclasses.replace(with_training(plain, passes=2e6), calibration=calibration()),
    }


def comparison_runs() -> list[FinishedRun]:
    """Two rows with predictions of two seeds each, and one from before there were predictions."""
    counts = {"base": ([20, 50, 60, 70], [20, 50, 60, 71]), "own": ([40, 60, 70, 80], [41, 60, 70, 80])}
    runs = [judged_run(label, right, seed=seed) for label, rows in counts.items() for seed, right in enumerate(rows)]
    return [*runs, judged_run("older", [50, 60, 70, 80], kept=False)]


def changed(of: FinishedRun, **parts: Mapping[str, object]) -> FinishedRun:
    """A run with other values in the given parts of its report."""
    report = of.report
    for part, values in parts.items():
        report = dataclasses.replace(report, **{part: dataclasses.replace(getattr(report, part), **values)})
    return dataclasses.replace(of, report=report)


def comparison_variants() -> dict[str, Comparison]:
    """Comparisons that differ from the plain one, by what is different."""
    runs = comparison_runs()
    base, last = runs[:2], runs[-1]
    part = {"clean": even([18] * 10), "pgd-20": even([11] * 10), "autoattack": ([2] * 10, [10] * 10)}
    evaluated = dataclasses.replace(last, report=dataclasses.replace(last.report, training=None))
    averaging = by_seeds("cfa", [5] * 3, method="cfa", fawa="auto", fawa_decay=0.85)
    cheap = [*by_seeds("base", [9] * 3, passes=2000.0), *by_seeds("half", [9] * 3, passes=1000.0)]
    half = judged_run("half", [40, 50, 50, 50], seen=50)
    budget = changed(last, threat_model={"epsilon": 0.031}, training={"num_train_epochs": 50})
    elsewhere = changed(last, environment={"commit": "feedbeef", "device": "H100"})
    failed = MissingRun(label="new", seed=0, reason="out of memory | *really* at /secret/home/x.py", state="failed")
    return {
        "no baseline": compare(runs),
        "one seed": compare(by_seeds("own", [10, 12, 4])),
        "no predictions": compare([*by_seeds("other", [10] * 3, [12] * 3), *by_seeds("own", [16] * 3, [18] * 3)]),
        "nothing right": compare([*by_seeds("base", [0] * 3), *by_seeds("own", [5] * 3)], baseline="base"),
        "failed and absent": compare([*runs, *by_seeds("few", [1, 2, 3])], baseline="base", missing=[failed]),
        "another budget": compare([*base, budget], baseline="base"),
        "another optimizer": compare([*by_seeds("one", [5] * 3), *by_seeds("other", [5] * 3, weight_decay=0.3)]),
        "another average of weights": compare([*by_seeds("one", [5] * 3, fawa="auto"), *averaging]),
        "other data": compare([*base, changed(last, dataset={"name": "imagenet | tiny"})], baseline="base"),
        "other code and hardware": compare([*base, elsewhere], baseline="base"),
        "prices": compare(cheap, baseline="base"),
        "a part of the images": compare([run("a", part), run("b", part)]),
        "judged on half of the images": compare([*runs[:4], half], baseline="base"),
        "evaluated alone": compare([*base, evaluated], baseline="base"),
        "names": compare(
            [one for end in "23" for one in by_seeds(f"a | <b> **long** name of a method (with {end})", [5] * 3)]
        ),
    }


def differences(plain: str, variants: Mapping[str, str]) -> str:
    """The lines in which each variant differs from the plain document."""
    parts = []
    for name, text in variants.items():
        lines = difflib.unified_diff(plain.splitlines(), text.splitlines(), n=0, lineterm="")
        changed_lines = [line for line in lines if not re.match(r"(---|\+\+\+|@@)( |$)", line)]
        parts.append("\n".join([f"=== {name}", *changed_lines]))
    return "\n\n".join(parts) + "\n"


def example_card() -> str:
    """The card in ``model_cards``, of the report beside it; its code for Transformers is as ruff formats it."""
    example = ROOT / "model_cards/digits-ham"
    report = read_report(example)
    with TemporaryDirectory() as name:
        (Path(name) / "figures").symlink_to(example / "figures")
        (Path(name) / "rgb").mkdir()
        (Path(name) / "rgb/config.json").touch()
        path = write_card(report, name, repo_id=None, model_license=str(report.config["model_license"]))
        text = path.read_text(encoding="utf-8")
    committed = (example / "README.md").read_text(encoding="utf-8")
    block = re.compile(r"```py\n.*?```", flags=re.DOTALL)
    return block.sub(lambda _: block.findall(committed)[0], text)


def documents() -> dict[str, str]:
    """Every golden document by its path from the root of the repository."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "figures").mkdir()
        for figure in FIGURES:
            (folder / f"figures/{figure}.png").touch()

        def card(report: RunReport, repo_id: str | None = "me/robust") -> str:
            return write_card(report, folder, repo_id=repo_id, model_license="apache-2.0").read_text(encoding="utf-8")

        cards = {"card.md": card(make_report()), "card_calibrated.md": card(calibrated(), None)}
        cards["card_variants.diff"] = differences(
            cards["card.md"], {title: card(report) for title, report in card_variants().items()}
        )
        cards["evaluation.md"] = evaluation_document(with_breakdowns(), folder, command="python recipes/evaluate.py x")
    runs, command = comparison_runs(), "python recipes/compare.py x"
    plain = compare(runs, baseline="base")
    figures = ["comparison_tradeoff.png", "comparison_per_class.png"]
    markdown = comparison_markdown(plain, command=command, figures=figures)
    comparisons = {
        "comparison.json": comparison_json(plain, command=command, jobs=2),
        "comparison.csv": comparison_csv(plain),
        "comparison.md": markdown,
        "comparison_variants.diff": differences(
            markdown,
            {title: comparison_markdown(one, command=command) for title, one in comparison_variants().items()},
        ),
    }
    page = leaderboard_html(leaderboard_comparison(), command=command)
    bare = re.sub(r"<(style|script)>.*?</\1>|'sha256-[^']*'|sha256-[\w+/=]*", "", page, flags=re.DOTALL)
    found = {
        f"tests/documents/{name}": text for name, text in (cards | comparisons | {"leaderboard.html": bare}).items()
    }
    found["model_cards/digits-ham/README.md"] = example_card()
    return found


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, content in documents().items():
        (ROOT / path).write_text(content, encoding="utf-8")
