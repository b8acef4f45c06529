"""The card says what the report says, parses as Markdown and as Hub metadata, and runs nothing it is given."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
import re
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markdown_it import MarkdownIt
from PIL import Image

from ham_hf import methods
from ham_hf.config import TrainConfig
from ham_hf.config.assembly import group_settings, method_settings
from ham_hf.data.decoding import EvalTransform
from ham_hf.models import Preprocessing, create_backbone, load_pixel_model
from ham_hf.models.export import export_for_timm
from ham_hf.reporting import card
from ham_hf.reporting.card import evaluation_section, write_card
from ham_hf.reporting.figures import save_figures
from ham_hf.reporting.method_text import CITATIONS, option_text, selected_too_early
from ham_hf.reporting.report import RunReport, ThreatModelReport, fraction_text, plain_text
from tests.support.example_report import DIGITS, make_report, with_dataset, with_model

HEADINGS = [
    "How to use",
    "With Transformers",
    "Preprocessing",
    "Evaluation",
    "Per class",
    "Training",
    "Limits",
    "License",
    "Citation",
]
HOSTILE = (
    "<script>alert(1)</script>",
    "<!-- comment",
    "a | b | c",
    "`code` ``` fence",
    "{{ 7 * 7 }}{% raw %}",
    "&anchor *alias !!python/object",
    "---\nlicense: other\n---",
    "# heading\n\n- list\r\n> quote",
    "[link](javascript:alert(1)) ![image](https://example.org/x.png)",
    "https://example.org www.example.org",
    "**bold** _it_ ~~no~~ \\",
    "$x^2$ :smile: @user",
    "\u202edesrever\u2066 \u200bzero",
    "x" * 10_000,
    "\x00\x1b[31m\ud800",
    "",
)


def every_setting() -> list:
    groups = [*group_settings(TrainConfig).values(), *method_settings().values()]
    return [known for group in groups for known in group]


COUNTED_FROM_0 = {known.name for known in every_setting() if "0-based" in known.help}


def written(report: RunReport, folder: Path, *, repo_id: str | None = "me/robust-digits") -> str:
    return write_card(report, folder, repo_id=repo_id, model_license="apache-2.0").read_text(encoding="utf-8")


def front_matter(text: str) -> dict:
    found = re.match(r"---\n(.*?)\n---\n\n# ", text, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def tokens(markdown: str) -> list:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown)


def structure(markdown: str) -> list[tuple[str, ...]]:
    """What a renderer makes of a text, without the text itself: kinds of blocks and of what is inside each line."""
    return [(token.type, *(child.type for child in token.children or [])) for token in tokens(markdown)]


def tables(markdown: str) -> list[list[list[str]]]:
    """Text of every cell of every table, as a renderer shows it."""
    found: list[list[list[str]]] = []
    for before, token in pairwise(tokens(markdown)):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif before.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(child.content for child in token.children))
    return found


def body(text: str) -> str:
    return text.split("\n---\n", 1)[1]


def test_card_of_a_digits_run(tmp_path: Path) -> None:
    report = make_report()
    save_figures(report, tmp_path, examples=None, train_log=())
    text = written(report, tmp_path)
    assert re.findall(r"^##+ (.*)$", text, re.MULTILINE) == HEADINGS
    opening = text.split("\n---\n")[1].splitlines()
    assert opening[1] == r"# resnet18\_cifar, trained on digits with ham"
    clean, worst = report.results["clean"].summary, report.results["cw-20"].summary
    assert opening[3] == (
        f"**Robust accuracy {100 * worst.average:.1f} % · worst class {100 * worst.worst_class:.1f} % "
        f"({DIGITS[worst.worst_class_index]}) · clean accuracy {100 * clean.average:.1f} %**"
    )
    # The strongest attack makes the headline.
    cw = report.results["cw-20"].summary
    assert cw.average < report.results["pgd-20"].summary.average
    assert f"On 360 test images it classifies {100 * cw.average:.1f} % correctly under CW-20" in text
    for line in (
        'model = timm.create_model("hf-hub:me/robust-digits", pretrained=True).eval()',
        "Plain [timm](https://github.com/huggingface/pytorch-image-models) loads it; ham_hf is not needed.",
        "**Threat model:** L-infinity, ε = 8/255, on pixels in [0, 1]; white box.",
        "| Network input | 128 × 128: every pixel repeated 4 × 4 times (nearest neighbor) |",
        "| Attack step size | 2/255 |",
        "| Method | ham: hard adversarial example mining (Lin et al., 2025) |",
        r"| Method option mining\_step | 3 |",
        r"| Method option mining\_start\_epoch | epoch 5 (--mining\_start\_epoch 4) |",
        r"| Learning rate drops | × 0.1 from epoch 7, × 0.01 from epoch 10 (--lr\_drops 6\:0.1 9\:0.01) |",
        "| Seeds | seed 0 |",
        "![Clean and robust accuracy per class](figures/per_class_accuracy.png)",
        "![Confusion under CW-20](figures/confusion_cw-20.png)",
        "accelerate launch recipes/train_ham.py \\",
        "    --config train_config.yaml --output_dir outputs/again",
        "- AutoAttack was not run: accuracy under PGD and CW is an upper bound on robust accuracy.",
        "apache-2.0. The dataset has a license of its own.",
        "  title   = {Hard Adversarial Example Mining for Improving Robust Fairness},",
    ):
        assert line in text.splitlines(), line
    assert "The weights are those of epoch 12 with the highest robust accuracy on 57 images held out" in text
    assert "adversarial_examples.png" not in text
    assert text.index("lin2025ham") < text.index("@software{ham_hf")
    assert max(map(len, re.findall(r"\n{2,}", text))) == 2
    assert "class_treatment.png" not in text
    assert text.endswith("-dirty`.\n")


def test_what_training_did_to_each_class_is_shown(tmp_path: Path) -> None:
    report = make_report(treatment={"hard_per_class": 4})
    save_figures(report, tmp_path, examples=None, train_log=())
    shown = re.findall(r"^!\[(.*)\]\((.*)\)$", written(report, tmp_path), re.MULTILINE)
    assert shown == [
        ("Clean and robust accuracy per class", "figures/per_class_accuracy.png"),
        ("Confusion under CW-20", "figures/confusion_cw-20.png"),
        ("What training did to each class", "figures/class_treatment.png"),
        ("Training curves", "figures/training_curves.png"),
    ]


def training_table(text: str) -> dict[str, str]:
    """Rows of the training table, as a renderer shows them."""
    rows = tables(body(text))[-1]
    assert len({row[0] for row in rows}) == len(rows)
    return dict(rows[1:])


def cited(text: str) -> list[str]:
    """Keys of the BibTeX entries, of which each must be whole."""
    (block,) = re.findall(r"```bibtex\n(.*?)```", text, re.DOTALL)
    entries = block.strip().split("\n\n")
    for entry in entries:
        assert re.fullmatch(r"@\w+\{\w+,\n(  \w+ *= .*,\n)*  \w+ *= .*\n\}", entry), entry
        assert entry.count("{") == entry.count("}")
    return [re.match(r"@\w+\{(\w+),", entry)[1] for entry in entries]


def every_method() -> dict[str, type[methods.Method]]:
    for module in pkgutil.walk_packages(methods.__path__, "ham_hf.methods."):
        importlib.import_module(module.name)
    return {name: kind for name, kind in methods.available().items() if kind.__module__.startswith("ham_hf.")}


def config_of(kind: type[methods.Method], **changes: object) -> dict[str, object]:
    """Settings of a run with this method, as a report has them."""
    options = {
        field.name: field.default_factory() if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(kind)
    }
    off = {"ema_decay": None, "fawa": "auto", "fawa_decay": 0.85, "fawa_threshold": 0.2}
    off |= {"awp_gamma": None, "awp_start_epoch": 0}
    return {"method": kind.name, **options, **off, **changes}


def with_config(config: dict[str, object]) -> RunReport:
    """A report with exactly these settings."""
    return dataclasses.replace(make_report(), config=config)


def test_every_method_is_named_and_cited(tmp_path: Path) -> None:
    for name, kind in every_method().items():
        text = written(with_config(config_of(kind)), tmp_path)
        title = kind.summary if kind.summary.lower().startswith(f"{name}:") else f"{name}: {kind.summary}"
        sentence = " ".join(text.split("\n# ", 1)[1].split("## How to use")[0].split())
        assert f"by ham_hf's method {card.text(title, 200)}, " in sentence
        rows = training_table(text)
        assert rows["Method"] == title
        hidden = {"none", "", "{}", "[]", "None"}
        assert not [label for label, value in rows.items() if value in hidden]
        assert {tag for tag in front_matter(text)["tags"] if tag in every_method()} == {name}
        if kind.summary.endswith("(ours)"):
            # Its base loss is cited, and nothing else.
            assert cited(text) == ["madry2018towards", "ham_hf"]
            continue
        own = re.match(r"@\w+\{(\w+),", CITATIONS[name])[1]
        assert cited(text)[0] == own
        assert cited(text)[-1] == "ham_hf"
        year, first_author = re.search(r"\((\w+).* (\d{4})\)$", kind.summary).group(2, 1)
        assert re.search(rf"author *= \{{{first_author},", CITATIONS[name])
        assert re.search(rf"year *= \{{{year}\}}", CITATIONS[name])


def test_the_paper_of_ham_is_cited_for_ham_alone(tmp_path: Path) -> None:
    methods = every_method()
    assert cited(written(with_config(config_of(methods["trades"])), tmp_path)) == ["zhang2019theoretically", "ham_hf"]
    assert cited(written(with_config({"method": "of a later version"}), tmp_path)) == ["ham_hf"]
    assert "method of a later version, and" in written(with_config({"method": "of a later version"}), tmp_path)


def test_what_a_method_borrows_is_named_and_cited(tmp_path: Path) -> None:
    config = config_of(
        every_method()["ham"],
        base_loss="trades",
        beta=4.0,
        class_margin="cfa",
        class_weighting="dafa",
        class_rule_args={"cfa_lambda1": 0.3, "dafa_lambda": 1.5},
        awp_gamma=0.005,
        awp_start_epoch=5,
        fawa="on",
    )
    text = written(with_config(config), tmp_path)
    sentence = (
        "hard adversarial example mining (Lin et al., 2025), combined with the class radii of cfa, the class weights "
        "of dafa, adversarial weight perturbation and fairness-gated averaging of weights, and evaluated class by "
        "class."
    )
    assert sentence in " ".join(text.split())
    rows = training_table(text)
    assert (
        rows.items()
        >= {
            "Base loss": "TRADES: clean cross-entropy and KL regularization (Zhang et al., 2019)",
            "Method option beta": "4.0",
            "Class radii": "cfa: class-wise calibrated fair adversarial training (Wei et al., 2023)",
            "Class weights": "dafa: distance-aware fair adversarial training (Lee et al., 2024)",
            "Options of class radii and weights": "cfa_lambda1=0.3, dafa_lambda=1.5",
            "Adversarial weight perturbation": "gamma 0.005, from epoch 6 (--awp_start_epoch 5) on (Wu et al., 2020)",
            "Averaged weights": (
                "fairness-gated, once per epoch: decay 0.85, worst class at least 0.2 (Wei et al., 2023)"
            ),
        }.items()
    )
    assert "Method option class_margin" not in rows
    keys = ["lin2025ham", "zhang2019theoretically", "wei2023cfa", "lee2024dafa", "wu2020adversarial", "ham_hf"]
    assert cited(text) == keys


@pytest.mark.parametrize(
    ("method", "changes", "averaged"),
    [
        ("cfa", {}, "fairness-gated"),
        ("cfa", {"fawa": "off", "ema_decay": 0.999}, "exponential moving average, decay 0.999 per update"),
        ("pgd_at", {"ema_decay": 0.999}, "exponential moving average, decay 0.999 per update"),
        ("pgd_at", {"fawa": "on"}, "fairness-gated"),
        ("pgd_at", {}, None),
    ],
)
def test_averaged_weights_are_told(
    tmp_path: Path, method: str, changes: dict[str, object], averaged: str | None
) -> None:
    text = written(with_config(config_of(every_method()[method], **changes)), tmp_path)
    rows = training_table(text)
    assert rows.get("Averaged weights", "").startswith(averaged or "")
    assert ("Averaged weights" in rows) == ("combined with" in text) == (averaged is not None)
    assert ("wei2023cfa" in cited(text)) == (method == "cfa" or averaged == "fairness-gated")


def test_options_without_effect_are_left_out(tmp_path: Path) -> None:
    rows = training_table(written(with_config(config_of(every_method()["ham"])), tmp_path))
    assert {label for label in rows if label.startswith("Method option")} == {
        f"Method option {name}" for name in ("mining_step", "mining_start_epoch")
    }
    assert not {"Class radii", "Class weights", "Adversarial weight perturbation", "Averaged weights"} & rows.keys()
    rows = training_table(written(with_config(config_of(every_method()["fat"])), tmp_path))
    assert rows["Method option fat_tau_epochs"] == "epochs 51, 91 (--fat_tau_epochs 50 90)"


def test_the_verdict_is_the_headline(tmp_path: Path) -> None:
    report = make_report(attacks=("clean", "pgd-20", "cw-20", "autoattack"), num_autoattack=100, verdict=True)
    text = written(report, tmp_path)
    summary, (low, high) = report.verdict.summary, report.verdict.intervals.worst_class
    assert (
        f"Of 100 test images it classifies {100 * summary.average:.1f} % correctly both as they are and under every "
        f"attack that was run\n(PGD-20, CW-20, AutoAttack; L-infinity, ε = 8/255); in the worst class "
        f"{100 * summary.worst_class:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f} %)."
    ) in text
    _, results, per_class, _ = tables(body(text))
    assert [row[0] for row in results[1:]] == ["Verdict", "Clean", "PGD-20", "CW-20", "AutoAttack"]
    assert results[1][1] == "100 of 360"
    assert per_class[0][:3] == ["Class", "Images", "Verdict"]
    shown = [float(row[2].split()[0]) for row in per_class[1:]]
    assert shown == sorted(shown)
    assert "on the 100 images that every\nattack saw" in card.evaluation_section(report)
    entries = ModelCard(text).data.eval_results
    found = {(entry.metric_type, entry.metric_args["attack"]): entry for entry in entries}
    assert found["accuracy", "verdict"].metric_value == pytest.approx(summary.average, abs=1e-6)


def test_coarser_attacks_in_training_are_told(tmp_path: Path) -> None:
    for precision in ("training", "bf16"):
        config = config_of(every_method()["ham"], attack_precision=precision)
        rows = training_table(written(with_config(config), tmp_path))
        assert rows["Precision of the attack in training"] == precision


def test_tables_hold_the_numbers_of_the_report(tmp_path: Path) -> None:
    report = make_report(missing=(4,))
    _, results, per_class, _ = tables(body(written(report, tmp_path)))
    clean = report.results["clean"].summary
    assert results[0][:3] == ["Evaluation", "Images", "Average"]
    assert results[1][0:2] == ["Clean", "360"]
    low, high = report.results["clean"].intervals.worst_class
    interval = f"({100 * low:.1f}–{100 * high:.1f})"
    assert results[1][4] == f"{100 * clean.worst_class:.1f} {interval} ({DIGITS[clean.worst_class_index]})"
    robust = report.results["cw-20"].summary.per_class
    order = sorted((index for index in range(10) if index != 4), key=lambda index: robust[index].accuracy)
    assert [row[0] for row in per_class[1:]] == [DIGITS[index] for index in order]
    worst = robust[order[0]]
    assert per_class[0][4].startswith("CW-20")
    assert per_class[1][4] == f"{100 * worst.accuracy:.1f} ({100 * worst.low:.1f}–{100 * worst.high:.1f})"
    assert "Without test images, hence without numbers: four." in written(report, tmp_path)


def test_metadata_parses_back_with_huggingface_hub(tmp_path: Path) -> None:
    report = with_dataset(make_report(), hub_id="uoft-cs/cifar10", name="uoft-cs/cifar10", config_name="plain_text")
    report = with_model(report, base_model="timm/resnet18.a1_in1k")
    written(report, tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", "apache-2.0")
    assert (data.datasets, data.base_model, data.metrics) == (
        ["uoft-cs/cifar10"],
        "timm/resnet18.a1_in1k",
        ["accuracy"],
    )
    assert {"timm", "adversarial-robustness", "robust-fairness", "ham_hf", "ham", "safetensors"} <= set(data.tags)
    found = {(entry.metric_type, entry.metric_args["attack"]): entry for entry in data.eval_results}
    assert len(found) == len(data.eval_results) == 9
    summary = report.results["cw-20"].summary
    entry = found["accuracy", "cw-20"]
    assert entry.metric_value == pytest.approx(summary.average, abs=1e-6)
    assert (entry.dataset_type, entry.dataset_config, entry.dataset_split) == (
        "uoft-cs/cifar10",
        "plain_text",
        "train",
    )
    assert entry.metric_args["epsilon"] == 8 / 255
    assert entry.metric_name == "Robust accuracy (CW-20)"
    assert found["worst_class_accuracy", "cw-20"].metric_value == pytest.approx(summary.worst_class, abs=1e-6)
    assert found["class_accuracy_gap", "cw-20"].metric_value == pytest.approx(summary.gap, abs=1e-6)


def test_base_model_must_be_a_repository(tmp_path: Path) -> None:
    assert "base_model" not in front_matter(written(with_model(make_report(), base_model="resnet18"), tmp_path))


def test_local_data_is_no_hub_dataset_and_its_path_stays_private(tmp_path: Path) -> None:
    text = written(with_dataset(make_report(), name="/secret/place/cats"), tmp_path)
    assert "datasets" not in front_matter(text)
    assert "base_model" not in front_matter(text)
    assert "secret" not in text
    assert "`cats`" in text


def hostile_report(names: list[str]) -> RunReport:
    """A report with ``names`` wherever a user or a dataset can put text."""
    report = make_report(class_names=names, missing=(0,), num_test=60)
    names = [name or "?" for name in names]  # an empty configuration, revision or method is left out, rightly
    report = with_dataset(
        report,
        name=names[0],
        config_name=names[1],
        revision=names[2],
        augmentation=names[3],
        test_split_origin=names[4],
    )
    report = with_model(report, name=names[5], architecture=names[6], interpolation=names[7])
    config = {**report.config, "method": names[8], "optimizer": names[9]}
    return dataclasses.replace(report, config=config, seeds={names[10]: 1}, created=names[11])


def check_hostile(names: list[str], folder: Path) -> None:
    text = written(hostile_report(names), folder, repo_id=None)
    benign = written(hostile_report([f"name{index}" for index in range(len(names))]), folder, repo_id=None)
    assert structure(body(text)) == structure(body(benign))
    assert front_matter(text).keys() == front_matter(benign).keys()
    metadata = front_matter(text)
    assert metadata["license"] == "apache-2.0"
    assert len(metadata["model-index"][0]["results"][0]["metrics"]) == 9
    (per_class,) = (table for table in tables(body(text)) if table[0][0] == "Class")
    shown = {row[0] for row in per_class[1:]}
    assert shown == {plain_text(name, 40) for name in names[1:]}
    assert all(len(row) == 5 for row in per_class)


@pytest.mark.faults(quick=True)
def test_hostile_names_change_nothing_but_text(tmp_path: Path) -> None:
    for shift in range(len(HOSTILE)):
        check_hostile([*HOSTILE[shift:], *HOSTILE[:shift]], tmp_path)


@pytest.mark.faults(quick=True)
@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        # hypothesis also tries words of our sources; the name of a method adds the method's own text.
        st.text(st.one_of(st.sampled_from("|`*_[]()<>!#-:&\\\n{}%$~'\" "), st.characters())).filter(
            lambda name: name not in methods.available()
        ),
        min_size=12,
        max_size=12,
    )
)
def test_any_names_change_nothing_but_text(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    check_hostile(names, tmp_path_factory.mktemp("card"))


def test_text_breaks_autolinks_and_html() -> None:
    assert card.text("https://example.org") == r"https\://example.org"
    assert card.text("www.example.org") == r"www\.example.org"
    assert card.text("a: 1.5 & <b>") == "a: 1.5 &amp; &lt;b&gt;"
    assert card.code("a`b") == "`a'b`"


@pytest.mark.faults(quick=True)
def test_template_expressions_must_be_escaped_and_defined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_template_source", lambda: "{{ title }}")
    with pytest.raises(TypeError, match="unescaped"):
        written(make_report(), tmp_path)
    monkeypatch.setattr(card, "_template_source", lambda: "{{ titel | text }}")
    with pytest.raises(UndefinedError, match="titel"):
        written(make_report(), tmp_path)


@pytest.mark.parametrize("repo_id", ["robust", "a b", "me/x/y", '"); import os #', "me/x\n---"])
def test_impossible_repository_ids_are_refused(tmp_path: Path, repo_id: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)repo"):
        written(make_report(), tmp_path, repo_id=repo_id)


def test_architectures_of_ham_hf_say_import_ham_hf(tmp_path: Path) -> None:
    text = written(
        with_model(make_report(), architecture="preactresnet18_cifar", needs_ham_hf=True, upsample=1), tmp_path
    )
    assert "import ham_hf  # registers the architecture with timm\nimport timm\n" in text
    assert "is not needed" not in text
    assert "Network input" not in text
    assert "scale_factor" not in text


@pytest.mark.parametrize(
    ("attacks", "num_autoattack", "present", "absent"),
    [
        (("clean",), None, ["AutoAttack was not run", "Not run: PGD, CW."], ["under PGD-20"]),
        (("clean", "pgd-20"), None, ["AutoAttack was not run", "Not run: CW."], ["subset"]),
        (("clean", "pgd-20", "cw-20", "autoattack"), 100, ["on a stratified subset of 100 of 360"], ["Not run"]),
        (("clean", "pgd-20", "cw-20", "autoattack"), None, ["under AutoAttack"], ["Not run", "not run", "subset"]),
    ],
)
def test_limits_name_what_was_not_run(
    tmp_path: Path, attacks: tuple[str, ...], num_autoattack: int | None, present: list[str], absent: list[str]
) -> None:
    text = written(make_report(attacks=attacks, num_autoattack=num_autoattack), tmp_path)
    assert [line for line in present if line not in text] == []
    assert [line for line in absent if line in text] == []


def test_average_that_let_no_epoch_in_is_told(tmp_path: Path) -> None:
    report = with_config(
        make_report().config | {"method": "cfa"} | {"fawa": "auto", "fawa_decay": 0.85, "fawa_threshold": 0.9}
    )
    assert report.passed_gate()
    never = tuple({**record, "averaged": False} for record in report.training.history)
    report = dataclasses.replace(report, training=dataclasses.replace(report.training, history=never))
    row = training_table(written(report, tmp_path))["Averaged weights"]
    assert row.endswith("; no epoch up to the selected one passed, so these weights are no average")


@pytest.mark.parametrize(
    ("origin", "split"),
    [
        ("validation", "validation"),
        ("held out of train (20 %, stratified, seed 0)", "train"),
        ("held out of train (x) (12.5 %, stratified, seed 0)", "train (x)"),
    ],
)
def test_metadata_names_the_split_of_the_test_images(tmp_path: Path, origin: str, split: str) -> None:
    written(with_dataset(make_report(), test_split_origin=origin), tmp_path)
    assert {entry.dataset_split for entry in ModelCard.load(tmp_path / "README.md").data.eval_results} == {split}


def test_drops_of_another_schedule_and_options_that_are_off_are_not_listed(tmp_path: Path) -> None:
    ham = {"method": "ham", "easy_weight": 0.0, "easy_fraction": 0.3, "lr_drops": ["60:0.1"]}
    rows = training_table(written(with_config(make_report().config | ham | {"lr_scheduler_type": "cosine"}), tmp_path))
    assert not {"Learning rate drops", "Method option easy_fraction"} & set(rows)
    assert "Method option easy_weight" not in rows
    ham |= {"easy_weight": 0.5, "lr_scheduler_type": "piecewise"}
    rows = training_table(written(with_config(make_report().config | ham), tmp_path))
    assert rows["Learning rate drops"] == "× 0.1 from epoch 61 (--lr_drops 60:0.1)"
    assert (rows["Method option easy_weight"], rows["Method option easy_fraction"]) == ("0.5", "0.3")


@pytest.mark.parametrize(("start", "said"), [(12, True), (11, False)])
def test_a_method_that_never_began_is_told(tmp_path: Path, start: int, said: bool) -> None:
    config = {"method": "ham", "mining_start_epoch": start}
    card = write_card(make_report(config=config), tmp_path, repo_id="me/robust", model_license="mit").read_text()
    assert ("The run ended before ham began, so its numbers say nothing about that" in card) == said


def test_weights_from_before_the_method_began_are_not_credited_to_it(tmp_path: Path) -> None:
    early = make_report(config={"method": "ham", "mining_start_epoch": 8, "base_loss": "trades"})
    training = dataclasses.replace(early.training, selected_epoch=7)
    early = dataclasses.replace(early, training=training)
    text = written(early, tmp_path)
    assert "**These weights are from before that method began, and owe nothing to it.**" in text
    assert selected_too_early(early.config, training) == (
        "The weights were selected in epoch 8, and mining (ham) begins with epoch 9 (--mining_start_epoch 8): it had "
        "no part in them, and these are weights of trades alone.",
    )
    for selected in (8, None):
        training = dataclasses.replace(early.training, selected_epoch=selected)
        text = written(dataclasses.replace(early, training=training), tmp_path)
        assert selected_too_early(early.config, training) == ()
        assert "before that method began" not in text


def test_what_is_combined_and_began_later_is_told_with_its_flag() -> None:
    config = {"method": "ham", "mining_start_epoch": 0, "mining_step": 1, "awp_gamma": 0.005, "awp_start_epoch": 9}
    config |= {"class_margin": "cfa", "class_rule_args": {"cfa_start_epoch": 8}}
    training = make_report().training
    sentences = selected_too_early(config, dataclasses.replace(training, selected_epoch=7))
    assert sentences == (
        "The weights were selected in epoch 8, and cfa begins with epoch 9 (--class_rule_args cfa_start_epoch=8): it "
        "had no part in them.",
        "The weights were selected in epoch 8, and awp begins with epoch 10 (--awp_start_epoch 9): it had no part in "
        "them.",
    )


@pytest.mark.parametrize("name", sorted(COUNTED_FROM_0 - {"lr_drops"}))
def test_cards_count_epochs_from_1_and_name_the_flag_beside_it(name: str) -> None:
    several = name.endswith("_epochs")
    shown = option_text(name, [12, 20] if several else 12)
    assert shown == (f"epochs 13, 21 (--{name} 12 20)" if several else f"epoch 13 (--{name} 12)")


def test_settings_that_count_from_0_are_all_known() -> None:
    assert {"lr_drops", "mining_start_epoch", "awp_start_epoch", "cfa_start_epoch", "fat_tau_epochs"} <= COUNTED_FROM_0
    assert {known.name for known in every_setting() if known.name.endswith("_start_epoch")} <= COUNTED_FROM_0


def test_a_run_that_was_changed_on_the_way_is_not_said_to_be_repeatable(tmp_path: Path) -> None:
    report = make_report()
    assert "; this repeats the run:" in written(report, tmp_path)
    training = dataclasses.replace(report.training, changes=("After update 4, from epoch 2 on, it was changed.",))
    text = written(dataclasses.replace(report, training=training), tmp_path)
    assert "this repeats the run" not in text
    assert "Some were changed on the way" in text


def test_a_limited_test_split_is_told_and_only_its_classes_are_counted(tmp_path: Path) -> None:
    report = make_report(num_test=60, missing=(4,), config={"limit_test_examples": 60})
    card = write_card(report, tmp_path, repo_id="me/robust", model_license="mit").read_text()
    assert "of which a stratified part was taken (`--limit_test_examples`)" in card
    assert "it is the smallest of 9 estimates" in card
    whole = write_card(make_report(), tmp_path, repo_id="me/robust", model_license="mit").read_text()
    assert "stratified part was taken" not in whole


def test_selection_of_the_last_step_and_skipped_images_are_told(tmp_path: Path) -> None:
    report = with_dataset(make_report(), num_skipped=3)
    report = dataclasses.replace(report, training=dataclasses.replace(report.training, selection_metric="last"))
    by_verdict = dataclasses.replace(report.training, selection_metric="verdict")
    assert "right as they are and under both PGD and CW on 57 images held out" in written(
        dataclasses.replace(report, training=by_verdict), tmp_path
    )
    text = written(report, tmp_path)
    assert "The weights are those after the last step." in text
    assert "3 corrupt images of the dataset were skipped." in text


def test_notes_are_listed_in_card_and_evaluation_as_text_alone(tmp_path: Path) -> None:
    plain = make_report()
    assert "Notes on this run" not in written(plain, tmp_path)
    report = dataclasses.replace(plain, notes=("3 images were left out.", *HOSTILE))
    text = written(report, tmp_path)
    assert "### Notes on this run\n\n- 3 images were left out.\n" in text
    harmless = dataclasses.replace(plain, notes=("3 images were left out.", *("word" for _ in HOSTILE)))
    assert structure(body(text)) == structure(body(written(harmless, tmp_path)))
    assert "- 3 images were left out." in evaluation_section(report)


def test_a_thousand_classes_are_cut_to_the_worst(tmp_path: Path) -> None:
    report = make_report(class_names=[f"class {index}" for index in range(1000)], num_test=4000)
    text = written(report, tmp_path)
    (per_class,) = (table for table in tables(body(text)) if table[0][0] == "Class")
    assert len(per_class) == 51
    assert "The 50 worst classes are shown, the other 950 are in `report.json`." in text
    assert "<details><summary>50 classes</summary>" in text


def test_evaluation_section_is_the_middle_of_the_card(tmp_path: Path) -> None:
    report = make_report(trained=False)
    section = evaluation_section(report)
    assert section.startswith("**Threat model:** L-infinity, ε = 8/255")
    assert len(tables(section)) == 2
    assert "create_model" not in section
    assert section in written(make_report(), tmp_path)
    with pytest.raises(ValueError, match="no training or calibration"):
        written(report, tmp_path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(8 / 255, "8/255"), (0.031, "0.031"), (128 / 255, "128/255"), (0.5, "0.5"), (0.0, "0"), (1 / 510, "0.00196078")],
)
def test_fractions_of_255_are_written_as_such(value: float, expected: str) -> None:
    assert fraction_text(value) == expected


def test_l2_threat_model(tmp_path: Path) -> None:
    report = dataclasses.replace(make_report(), threat_model=ThreatModelReport(norm="l2", epsilon=0.5))
    assert "**Threat model:** L2, ε = 0.5, on pixels" in written(report, tmp_path)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_loading_lines_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], in_chans: int
) -> None:
    """The card's Python block, executed in the folder of a tiny export."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=in_chans).eval()
    timm.models.save_for_hf(
        model,
        tmp_path,
        safe_serialization=True,
        model_config={"label_names": list(DIGITS)},
        data_config={"input_size": (in_chans, 32, 32), "crop_pct": 1.0, "interpolation": "nearest"},
    )
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "image.png")
    text = written(with_model(make_report(), in_chans=in_chans, upsample=1), tmp_path, repo_id=None)
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    variables: dict[str, object] = {}
    exec(block, variables)
    assert variables["transform"](variables["image"]).shape == (in_chans, 32, 32)
    name, probability = capsys.readouterr().out.split()
    assert name in DIGITS
    assert 0 < float(probability) <= 1


@pytest.mark.parametrize(("in_chans", "crop_pct"), [(3, 1.0), (3, 0.875), (1, 1.0)])
def test_loading_lines_of_an_enlarged_network_take_any_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_chans: int, crop_pct: float
) -> None:
    """An image that is not of the training size, through the card's Python block and through our own pipeline."""
    torch.manual_seed(0)
    preprocessing = Preprocessing(
        image_size=16,
        in_chans=in_chans,
        interpolation="bicubic",
        crop_pct=crop_pct,
        mean=(0.5, 0.4, 0.3)[:in_chans],
        std=(0.2, 0.25, 0.3)[:in_chans],
    )
    backbone = create_backbone(
        "resnet18_cifar",
        pretrained=False,
        num_classes=10,
        preprocessing=preprocessing,
        model_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
    )
    info = export_for_timm(
        backbone,
        tmp_path,
        preprocessing=preprocessing,
        class_names=DIGITS,
        metadata={},
        model_license="mit",
        tag="ham_test",
    )
    pixels = torch.randint(0, 256, (29, 41, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    report = with_model(make_report(), upsample=info.upsample, **dataclasses.asdict(preprocessing))
    text = written(report, tmp_path, repo_id=None)
    assert "`resolve_model_data_config` gives all of this" not in text
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    exec(block, variables)
    image = Image.open("image.png").convert("L" if in_chans == 1 else "RGB")
    x = EvalTransform(16, crop_pct, "bicubic")(image)[None] / 255
    with torch.inference_mode():
        expected = load_pixel_model(str(tmp_path)).model(x).softmax(dim=1)[0]
    assert expected.max() - expected.min() > 1e-3
    torch.testing.assert_close(variables["probabilities"], expected, rtol=0, atol=1e-6)


def test_literals_stay_inside_their_quotes() -> None:
    assert card.literal(0.875) == "0.875"
    assert ast.literal_eval(card.literal('bi"cubic\\')) == 'bi"cubic\\'
    assert "`" not in card.literal("```")


@pytest.mark.parametrize(
    ("crop_mode", "row"),
    [
        ("center", "| Resize | bilinear, center crop 0.9 |"),
        ("squash", "| Resize | bilinear, both sides to the same length (the aspect ratio is not kept), crop 0.9 |"),
        ("border", "| Resize | bilinear, the longer side (borders of the mean color make it square), crop 0.9 |"),
    ],
)
def test_crop_mode_is_said(tmp_path: Path, crop_mode: str, row: str) -> None:
    report = with_model(make_report(), crop_mode=crop_mode, crop_pct=0.9, interpolation="bilinear")
    assert row in written(report, tmp_path).splitlines()
