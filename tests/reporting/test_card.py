"""The card says what the report says, parses as Markdown and as Hub metadata, and runs nothing it is given."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import pkgutil
import re
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given, settings, strategies as st
from jinja2 import UndefinedError
from markdown_it import MarkdownIt

from ham_hf import methods
from ham_hf.config import TrainConfig
from ham_hf.config.assembly import group_settings, method_settings
from ham_hf.reporting import card
from ham_hf.reporting.card import write_card
from ham_hf.reporting.formats import code, fraction_text, literal, markdown_text, plain_text
from ham_hf.reporting.method_text import (
    CITATIONS,
    exchange_sentence,
    option_text,
    selected_too_early,
    training_images_note,
)
from ham_hf.reporting.report import RunReport
from tests.support.documents import calibration, config_of, with_config
from tests.support.example_report import make_report, with_dataset, with_model

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
    """The structure that a renderer finds in a text, without the text itself: kinds of blocks and of inline parts."""
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


def test_every_method_is_named_and_cited(tmp_path: Path) -> None:
    for name, kind in every_method().items():
        text = written(with_config(config_of(kind)), tmp_path)
        title = kind.summary if kind.summary.lower().startswith(f"{name}:") else f"{name}: {kind.summary}"
        sentence = " ".join(text.split("\n# ", 1)[1].split("## How to use")[0].split())
        assert f"by ham_hf's method {markdown_text(title, 200)}, " in sentence
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


@pytest.mark.parametrize("split", ["validation", "held out of train (20 %, stratified, seed 0)"])
def test_metadata_parses_back_with_huggingface_hub(tmp_path: Path, split: str) -> None:
    report = with_dataset(make_report(), hub_id="uoft-cs/cifar10", config_name="plain_text", test_split_origin=split)
    written(report, tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.license, data.datasets) == ("timm", "apache-2.0", ["uoft-cs/cifar10"])
    found = {(entry.metric_type, entry.metric_args["attack"]): entry for entry in data.eval_results}
    assert len(found) == len(data.eval_results) == 9
    summary, entry = report.results["cw-20"].summary, found["accuracy", "cw-20"]
    place = (entry.dataset_type, entry.dataset_config, entry.dataset_split)
    assert place == ("uoft-cs/cifar10", "plain_text", split)
    assert entry.metric_args["epsilon"] == 8 / 255
    assert entry.metric_value == pytest.approx(summary.average, abs=1e-6)
    assert found["worst_class_accuracy", "cw-20"].metric_value == pytest.approx(summary.worst_class, abs=1e-6)
    assert found["class_accuracy_gap", "cw-20"].metric_value == pytest.approx(summary.gap, abs=1e-6)


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
    return dataclasses.replace(report, config=config, seeds={names[10]: 1}, created=names[11], notes=(*names[:12],))


@functools.cache
def harmless_card(num_names: int) -> str:
    with TemporaryDirectory() as folder:
        return written(hostile_report([f"name{index}" for index in range(num_names)]), Path(folder), repo_id=None)


def check_hostile(names: list[str], folder: Path) -> None:
    text = written(hostile_report(names), folder, repo_id=None)
    benign = harmless_card(len(names))
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
@settings(max_examples=10, deadline=None)
@example([*["a"] * 5, "=", "1.", "- -", "+ b", "2) c", "---", "-"])
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


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://example.org", r"https\://example.org"),
        ("www.example.org", r"www\.example.org"),
        ("a: 1.5 & <b>", "a: 1.5 &amp; &lt;b&gt;"),
    ],
)
def test_text_breaks_autolinks_and_html(value: str, shown: str) -> None:
    assert markdown_text(value) == shown


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


def test_weights_from_before_the_method_began_are_told() -> None:
    early = make_report(config={"method": "ham", "mining_start_epoch": 8, "base_loss": "trades"})
    assert selected_too_early(early.config, dataclasses.replace(early.training, selected_epoch=7)) == (
        "The weights were selected in epoch 8, and mining (ham) begins with epoch 9 (--mining_start_epoch 8): it had "
        "no part in them, and these are weights of trades alone.",
    )
    for selected in (8, None):
        assert selected_too_early(early.config, dataclasses.replace(early.training, selected_epoch=selected)) == ()


def test_a_calibration_without_effect_and_one_on_training_images_are_told() -> None:
    assert "leaves the model unchanged" in exchange_sentence(calibration(fairness=0.0))
    assert training_images_note(calibration()) is None
    assert "images that the model was trained on" in training_images_note(calibration(seen_in_training=True))


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


def test_a_thousand_classes_are_cut_to_the_worst(tmp_path: Path) -> None:
    report = make_report(class_names=[f"class {index}" for index in range(1000)], num_test=4000)
    text = written(report, tmp_path)
    (per_class,) = (table for table in tables(body(text)) if table[0][0] == "Class")
    assert len(per_class) == 51
    assert "The 50 worst classes are shown, the other 950 are in `report.json`." in text
    assert "<details><summary>50 classes</summary>" in text


def test_an_evaluation_alone_has_no_card(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training or calibration"):
        written(make_report(trained=False), tmp_path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(8 / 255, "8/255"), (0.031, "0.031"), (128 / 255, "128/255"), (0.5, "0.5"), (0.0, "0"), (1 / 510, "0.00196078")],
)
def test_fractions_of_255_are_written_as_such(value: float, expected: str) -> None:
    assert fraction_text(value) == expected


def test_literals_stay_inside_their_quotes() -> None:
    assert literal(0.875) == "0.875"
    assert ast.literal_eval(literal('bi"cubic\\')) == 'bi"cubic\\'
    assert "`" not in literal("```")
    assert code("a`b") == "`a'b`"
