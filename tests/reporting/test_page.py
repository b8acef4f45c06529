"""report.html: what it says, that nothing in it can run, its images, and the command that makes it again."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from ham_hf.attacks import ThreatModel
from ham_hf.commands import page as page_command
from ham_hf.config import EvaluationConfig
from ham_hf.evaluation.verdicts import Verdicts, verdicts_of, write_verdicts
from ham_hf.reporting.class_examples import (
    MAX_CLASSES,
    MAX_TOTAL_BYTES,
    ClassExamples,
    ExampleStrip,
    choose_images,
    encode_examples,
    read_examples,
    run_examples,
    write_examples,
)
from ham_hf.reporting.page import MAX_PAGE_BYTES, PageRun, has_images, page_html, without_images
from ham_hf.reporting.report import RunReport, write_report
from tests.support.example_report import attack_result, make_report, with_dataset, with_model
from tests.support.nets import TensorImages, Watched

HOSTILE = "</script><script>alert(1)</script><!-- & \u2028"


def numbers_of(text: str) -> dict:
    return json.loads(re.search(r'id="numbers">(.*?)</script>', text, flags=re.DOTALL)[1])


def images_of(text: str) -> list:
    return json.loads(re.search(r'id="images">(.*?)</script>', text, flags=re.DOTALL)[1])


def made_up_verdicts(num_images: int = 60, num_classes: int = 10, *, seed: int = 0) -> Verdicts:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % num_classes
    results = {}
    for name in ("clean", "pgd-20", "cw-20"):
        wrong = torch.rand(num_images, generator=generator) < 0.3
        other = (labels + torch.randint(1, num_classes, (num_images,), generator=generator)) % num_classes
        margins = torch.randn(num_images, generator=generator)
        found = attack_result(name, {}, torch.where(wrong, other, labels), labels)
        results[name] = dataclasses.replace(found, margins=margins)
    return verdicts_of(results, [str(index) for index in range(num_classes)])


def plain_report(**changes: object) -> RunReport:
    """A report of the classes and images of `made_up_verdicts`."""
    return make_report(class_names=[str(index) for index in range(10)], num_test=60, **changes)


def made_up_examples(verdicts: Verdicts, *, side: int = 8, channels: int = 1) -> ClassExamples:
    chosen = choose_images(verdicts)
    clean = torch.rand(len(chosen), channels, side, side, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([row for row, _ in chosen])
    images = ExampleStrip(
        clean=clean,
        adversarial=(clean + 0.1).clamp(0, 1),
        labels=verdicts.labels[rows],
        clean_predictions=verdicts.clean[rows],
        adversarial_predictions=torch.zeros(len(chosen), dtype=torch.long),
        attack="PGD-20",
    )
    return encode_examples(images, chosen, verdicts)


def test_names_are_data_and_only_our_script_may_run() -> None:
    report = make_report(class_names=[HOSTILE, "b", "c"], verdict=True)
    report = with_model(with_dataset(report, hub_id=None, name="/secret/data"), name="/secret/model")
    text = page_html([PageRun(label=HOSTILE, report=report)])
    assert "secret" not in text
    assert text.count("<script") == text.count("</script>") == 3
    assert "<script>alert" not in text
    assert numbers_of(text)["runs"][0]["names"][0] == HOSTILE.replace("\u2028", "").strip()
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for kind in ("style", "script"):
        (own,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not re.search(r"(src|href)=.?(https?:|//)", text)


def test_taken_for_counts_what_the_first_evaluation_that_broke_an_image_made_of_it() -> None:
    verdicts, report = made_up_verdicts(), plain_report(verdict=True)
    entries = numbers_of(page_html([PageRun(label="run", report=report, verdicts=verdicts)]))["runs"][0]["entries"]
    found = {entry["name"]: entry["taken"] for entry in entries}
    for name, order in {"clean": [], "pgd-20": ["pgd-20"], "cw-20": ["cw-20"], "verdict": ["pgd-20", "cw-20"]}.items():
        expected = [dict[int, int]() for _ in range(10)]
        for row, label in enumerate(verdicts.labels.tolist()):
            said = [int(verdicts.clean[row]), *(int(verdicts.attacked[attack][row]) for attack in order)]
            wrong = [value for value in said if value != label]
            if wrong:
                expected[label][wrong[0]] = expected[label].get(wrong[0], 0) + 1
        pairs = [dict(zip(row[::2], row[1::2], strict=True)) for row in found[name]]
        assert pairs == expected
        assert all(row[1::2] == sorted(row[1::2], reverse=True) for row in found[name])


def test_an_older_report_without_predictions_gives_a_page() -> None:
    report = make_report(num_epochs=200, treatment={"hard_per_class": 3})
    (run,) = numbers_of(page_html([PageRun(label="old", report=report)]))["runs"]
    clean = next(entry for entry in run["entries"] if entry["name"] == "clean")
    confusion = report.results["clean"].confusion
    for label, row in enumerate(clean["taken"]):
        assert sum(row[1::2]) == sum(confusion[label]) - confusion[label][label]
    assert len(run["curves"]["steps"]) <= 60
    assert run["curves"]["steps"][-1] == 2000
    assert len(run["curves"]["hard"][-1]) == 10
    assert run["frontier"] is None


def test_the_weakest_and_the_strongest_of_each_class_are_chosen() -> None:
    verdicts = made_up_verdicts(200)
    chosen = choose_images(verdicts)
    for label in range(10):
        rows = [row for row in range(200) if verdicts.labels[row] == label and verdicts.clean[row] == label]
        rows.sort(key=lambda row: float(verdicts.margins_attacked[row]))
        own = [(row, kind) for row, kind in chosen if verdicts.labels[row] == label]
        assert [row for row, kind in own if kind == "weak"] == rows[:3]
        assert [row for row, kind in own if kind == "strong"] == rows[:-4:-1]
    many = made_up_verdicts(800, 40)
    shown = {int(many.labels[row]) for row, _ in choose_images(many)}
    share = [float(many.withstood[many.labels == label].float().mean()) for label in range(40)]
    assert len(shown) == MAX_CLASSES
    assert max(share[label] for label in shown) <= min(share[label] for label in range(40) if label not in shown)


def test_images_are_kept_and_read_back(tmp_path: Path) -> None:
    examples = made_up_examples(made_up_verdicts(), channels=3)
    write_examples(examples, tmp_path)
    assert read_examples(tmp_path) == examples
    assert read_examples(tmp_path / "none") is None
    first = examples.examples[0]
    clean = Image.open(io.BytesIO(first.clean))
    assert (clean.size, clean.mode, clean.format) == ((8, 8), "RGB", "PNG")
    assert first.enlargement == pytest.approx(5, rel=1e-4)
    (tmp_path / "examples.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"examples.parquet holds no images .* remove it"):
        read_examples(tmp_path)


def test_large_images_are_made_smaller_until_they_fit() -> None:
    examples = made_up_examples(made_up_verdicts(), side=224, channels=3).examples
    sizes = {Image.open(io.BytesIO(example.clean)).size for example in examples}
    assert len(sizes) == 1
    assert 48 <= sizes.pop()[0] < 224
    assert {Image.open(io.BytesIO(example.attacked)).format for example in examples} == {"JPEG"}
    assert sum(len(e.clean) + len(e.attacked) + len(e.difference) for e in examples) <= MAX_TOTAL_BYTES


def test_a_page_stays_below_its_limit_and_gives_images_up_for_it() -> None:
    examples = made_up_examples(made_up_verdicts(), side=64, channels=3)
    text = page_html([PageRun(label=str(index), report=plain_report(), examples=examples) for index in range(8)])
    assert len(text.encode()) <= MAX_PAGE_BYTES
    shown = [entry is not None for entry in images_of(text)]
    assert shown[0]
    assert not shown[-1]


def test_images_can_be_taken_out_of_a_page() -> None:
    verdicts, report = made_up_verdicts(), plain_report()
    text = page_html([PageRun(label="run", report=report, examples=made_up_examples(verdicts))])
    bare = without_images(text)
    assert has_images(text)
    assert not has_images(bare)
    assert "iVBORw0KGgo" not in bare
    assert bare == page_html([PageRun(label="run", report=report)])


def test_a_run_makes_images_of_its_own_model() -> None:
    labels = torch.arange(40) % 4
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    images = TensorImages(torch.rand(40, 1, 4, 4), labels)
    with torch.no_grad():
        predictions = net(images.x).argmax(1)
    results = {name: attack_result(name, {}, predictions, labels) for name in ("clean", "pgd-2")}
    config = EvaluationConfig(eval_num_steps=2)
    found = run_examples(net, images, config, results, threat_model=ThreatModel("linf", 0.1), seed=0).of_classes
    assert found is not None
    assert found.attack == "PGD-2"
    assert {e.label for e in found.examples} == set(predictions[predictions == labels].tolist())
    assert all(e.clean_prediction == e.label == int(labels[e.position]) for e in found.examples)
    small = Watched(net, limit=3, limit_always=3)
    pieces = run_examples(small, images, config, results, threat_model=ThreatModel("linf", 0.1), seed=0).of_classes
    assert pieces == found, "in pieces that fit into memory"
    only_clean = {"clean": results["clean"]}
    clean = run_examples(net, images, config, only_clean, threat_model=ThreatModel("linf", 0.1), seed=0)
    assert clean.of_classes is None


def stored(folder: Path, verdicts: Verdicts, **config: object) -> str:
    """The folder of a run with these settings."""
    write_report(plain_report(config=config), folder)
    write_verdicts(verdicts, folder)
    return str(folder)


def test_the_command_makes_a_page_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = made_up_verdicts()
    folders = [stored(tmp_path / f"seed{seed}", verdicts, seed=seed) for seed in (0, 1)]
    for folder in folders:
        write_examples(made_up_examples(verdicts), folder)
    page_command.main(folders[:1])
    assert f"wrote {folders[0]}/report.html" in capsys.readouterr().out
    text = (tmp_path / "seed0" / "report.html").read_text(encoding="utf-8")
    assert has_images(text)
    page_command.main([*folders[:1], "--no_images", "--output", str(tmp_path / "bare.html")])
    assert not has_images((tmp_path / "bare.html").read_text(encoding="utf-8"))
    with pytest.raises(SystemExit):
        page_command.main(folders)
    assert "2 folders make one page: name it with --output FILE" in capsys.readouterr().err


def test_several_runs_are_compared_on_the_same_images(tmp_path: Path) -> None:
    base, ham = (
        stored(tmp_path / method, made_up_verdicts(seed=len(method)), method=method) for method in ("pgd_at", "ham")
    )
    for number in range(2):  # two comparisons whose baselines have one name, and other settings
        stored(tmp_path / f"c{number}" / "a" / "seed0", made_up_verdicts(), method="pgd_at", num_steps=4 + number)
        (tmp_path / f"c{number}" / "comparison.json").write_text('{"rows": [{"label": "a"}], "baseline": "a"}')
    page_command.main([str(tmp_path / "c0"), str(tmp_path / "c1"), "--output", str(tmp_path / "two.html")])
    page_command.main([base, f"mined={ham}", "--output", str(tmp_path / "both.html")])
    values = numbers_of((tmp_path / "both.html").read_text(encoding="utf-8"))
    assert [run["label"] for run in values["runs"]] == ["pgd_at, seed 0", "mined, seed 0"]
    assert values["comparison"]["baseline"] == "pgd_at"
    base, other = values["comparison"]["rows"]["Clean"]
    assert base["differences"] == {}
    mean, low, high = other["differences"]["average"]
    assert low <= mean <= high
    assert other["note"].startswith("on ")
    assert other["seeds"] == [0]
