"""Whatever somebody writes or brings: a run, or a refusal that names what is wrong. Never a traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from PIL import Image as PILImage

from ham_hf.config import TrainConfig, config_to_yaml, parse_evaluate_config, parse_train_config
from ham_hf.config.assembly import group_settings, method_settings
from ham_hf.reporting.report import write_report
from tests.support.example_report import make_report
from tests.support.recipe_runs import SMALL, recipe_module, refused

SETTINGS = [one for group in group_settings(TrainConfig).values() for one in group]
SETTINGS += [one for options in method_settings().values() for one in options]
NAMES = sorted({one.name for one in SETTINGS})


def examples(few: int, many: int) -> pytest.MarkDecorator:
    """Run a test with few generated examples, and with many in ``make faults``."""
    full = pytest.param(many, marks=pytest.mark.faults)
    return pytest.mark.parametrize("count", [pytest.param(few, marks=pytest.mark.faults(quick=True)), full])


def run_examples(test: Callable[..., None], count: int, **strategies: st.SearchStrategy[Any]) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    phases = [Phase.generate]  # a run is too long to look for the smallest one that fails
    profile = settings(max_examples=count, deadline=None, database=None, suppress_health_check=quiet, phases=phases)
    profile(given(**strategies)(test))()


# Configurations

WORDS = st.sampled_from(
    [
        *("", "none", "null", "~", "true", "False", "yes", "off", "NaN", ".nan", "inf", "-inf", "1e400", "-1e400"),
        *("8/255", "8/0", "0/0", "1/", "/", "1/2/3", "nan/1", "1e-400", "0x1F", "010", "1_000", "-0", "-1", "0"),
        *("١٢", "½", "²", "1" * 5000, "9" * 400, "1e" + "9" * 50, "60:0.1", "1:", ":", "a:b", "1:1e400", "-1:0.5"),
        *("*", "&a", "!!python/object/apply:os.system [x]", "{", "[", "}", "%", "@", "`", "- a", "a: b", "# c"),
        *("\x00", "\x85", "\u202e", "\ud800", "\ufeff", "x" * 3000, "../..", "/", "~root", "hf-hub:", "digits"),
        *("linf", "l2", "latest", "ham", "trades", "cfa", "auto", "main", "me/model", "resnet18_cifar", "adamw"),
        *("[1, 2]", "{a: 1}", "{a: {a: {a: [1]}}}", "[[[[]]]]", "{a: 1, a: 2}", "'quoted'", '"quoted"'),
    ]
)
NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(-(10**40), 10**40)).map(str)
MARKS = st.text(alphabet="[]{}:,-&*!|>'\"#%@` \n\t?ab1e.", max_size=12)
VALUES = st.one_of(WORDS, NUMBERS, MARKS, st.text(max_size=12))
NEAR = st.sampled_from([near for name in NAMES for near in (name[:-1], name.upper(), f"{name}s", f"no_{name}")])
KEYS = st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES), NEAR, st.text(max_size=8))
FLAGS = st.one_of(
    st.tuples(KEYS, VALUES).map(lambda pair: [f"--{pair[0]}={pair[1]}"]),
    st.tuples(KEYS, VALUES, VALUES).map(lambda words: [f"--{words[0]}", *words[1:]]),
    KEYS.map(lambda key: [f"--{key.replace('_', '-')}"]),
    VALUES.map(lambda word: [word]),
)
NESTED = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)


def dumped(values: object) -> str:
    return yaml.safe_dump(values, allow_unicode=True)


LINES = st.lists(st.tuples(KEYS, VALUES), max_size=5).map(lambda pairs: "\n".join(f"{k}: {v}" for k, v in pairs))
DUMPED = st.one_of(NESTED, st.dictionaries(KEYS, NESTED, max_size=4)).map(dumped)
FILES = st.one_of(LINES, DUMPED, DUMPED, st.text(max_size=60), st.binary(max_size=60))


def outcome(parse: Callable[[list[str]], object], argv: list[str], named: str = "") -> object:
    """Outcome of a command line; a refusal must be status 2 with a message that says where to look: at ``named``."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            return parse(argv)
        except SystemExit as stop:
            code = stop.code
    assert code in (0, 2)
    message = said.getvalue()
    assert code == 0 or ("error: " in message and named in message)
    assert code == 0 or any(word in message for word in ("--", "setting", "unexpected word", "recipe.yaml")), message
    return None


@pytest.mark.filterwarnings("ignore")
@examples(30, 500)
def test_any_configuration_is_read_or_refused(count: int, tmp_path: Path) -> None:
    recipe, again = tmp_path / "recipe.yaml", tmp_path / "again.yaml"
    accepted = 0

    def check(flags: list[list[str]], file: str | bytes | None) -> None:
        nonlocal accepted
        argv = [word for group in flags for word in group]
        if file is not None:
            recipe.write_bytes(file if isinstance(file, bytes) else file.encode("utf-8", "surrogatepass"))
            argv = [f"--config={recipe}", *argv]
        for parse in (parse_train_config, parse_evaluate_config):
            config = outcome(parse, argv)
            if isinstance(config, TrainConfig):
                accepted += 1
                again.write_text(config_to_yaml(config), encoding="utf-8")
                assert outcome(parse_train_config, [f"--config={again}"]) == config

    run_examples(check, count, flags=st.lists(FLAGS, max_size=3), file=st.none() | FILES)
    assert accepted > 0  # not everything was refused


@examples(30, 500)
def test_any_value_of_a_setting_is_read_or_refused(count: int) -> None:
    """One flag that there is, with one value: a refusal names it."""

    def check(name: str, value: str) -> None:
        outcome(parse_train_config, [f"--{name}={value}"], named=name)

    run_examples(check, count, name=st.sampled_from(NAMES), value=VALUES)


@pytest.mark.faults(quick=True)
def test_bombs_of_aliases_and_nesting_do_not_hang(tmp_path: Path) -> None:
    names = [chr(97 + place) for place in range(21)]
    laughs = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise(names))
    bombs = {
        "laughs": laughs,
        "recursive": "model_args: &a {a: *a}",
        "lists": "model_args: " + "[" * 50_000,
        "maps": "model_args: " + "{a: " * 5_000 + "1" + "}" * 5_000,
        "keys": "\n".join("? " * 2000 + "a: 1" for _ in range(3)),
        "long": "model_name: " + "x" * 3_000_000,
        "merge": "<<: [*a]\nmethod: ham",
        "documents": "---\nmethod: ham\n---\nmethod: ham\n",
        "tag": "method: !!python/name:os.system ham",
    }
    for name, text in bombs.items():
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text)
        since = time.process_time()
        found = outcome(parse_train_config, [f"--config={recipe}"])
        assert found is None
        assert time.process_time() - since < 30, name


@pytest.mark.faults(quick=True)
def test_a_folder_that_is_no_published_run_is_refused_by_name(tmp_path, capsys):
    """Each of these was a traceback."""
    full = make_report()
    unlicensed = dataclasses.replace(full, config={k: v for k, v in full.config.items() if k != "model_license"})
    for report, named in ((make_report(trained=False), "holds no training"), (unlicensed, "--model_license")):
        write_report(report, tmp_path)
        for file in ("model.safetensors", "config.json"):
            (tmp_path / file).touch()
        assert named in refused(capsys, "push.py", str(tmp_path), "--hub_model_id=me/x")


# Datasets

MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "LA", "I", "F", "YCbCr")
LABELS: dict[str, Callable[[int, int], Any]] = {
    "int": lambda label, row: label,
    "sparse": lambda label, row: 1000 * label - 1,
    "negative": lambda label, row: -label,
    "str": lambda label, row: f"class {label}",
    "empty": lambda label, row: "x" * label,
    "bool": lambda label, row: label % 2 == 0,
    "float": lambda label, row: label / 2,
    "none": lambda label, row: None if row == 1 else label,
    "all none": lambda label, row: None,
    "list": lambda label, row: [label],
    "bytes": lambda label, row: bytes([label]),
    "ClassLabel": lambda label, row: label,
    "ClassLabel, unlabeled": lambda label, row: -1 if row == 0 else label,
}


def encode(mode: str, size: tuple[int, int], seed: int, kind: str) -> bytes:
    """An image of the given mode as a file, or something that is none."""
    if kind == "broken":
        return b"\x89PNG\r\n\x1a\n" + bytes(20)
    random = np.random.default_rng(seed)
    if mode in ("I", "F", "I;16"):
        dtype = {"I": "int32", "F": "float32", "I;16": "uint16"}[mode]
        image = PILImage.fromarray(random.integers(0, 1000, size[::-1]).astype(dtype))
    else:
        image = PILImage.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype="uint8")).convert(mode)
    file = io.BytesIO()
    deep = mode in ("CMYK", "F", "I", "YCbCr")
    image.save(file, format="TIFF" if deep else "PNG")
    return file.getvalue()


@st.composite
def generated_datasets(draw: st.DrawFn) -> dict[str, Any]:
    sides = st.sampled_from([1, 2, 3, 8, 8, 8, 8, 17])
    square = draw(st.booleans())
    splits = {}
    for name in draw(st.sampled_from([("train",), ("train", "test"), ("train", "validation"), ("a", "b"), ("test",)])):
        counts = draw(st.lists(st.sampled_from([0, 1, 1, 2, 7, 30, 30, 30]), min_size=1, max_size=4))
        side = draw(sides)
        splits[name] = (counts, (side, side if square else draw(sides)))
    return {
        "splits": splits,
        "modes": draw(st.lists(st.sampled_from(MODES), min_size=1, max_size=2)),
        "labels": draw(st.sampled_from([*LABELS, *(["int", "str", "ClassLabel"] * 4)])),
        "names": draw(
            st.sampled_from([("image", "label")] * 4 + [("img", "fine_label"), ("image", "image "), ("x", "y")])
        ),
        "kind": draw(st.sampled_from(["fine"] * 6 + ["broken", "missing"])),
        "twice": draw(st.sampled_from([False] * 6 + [True])),
        "extra": draw(st.sampled_from(["", "", "", "second image", "second label"])),
    }


HONEST = {"splits": {"train": ([30, 30], (8, 8)), "test": ([7, 1], (8, 8))}, "modes": ["RGB", "L"]}
HONEST |= {"labels": "ClassLabel", "names": ("image", "label"), "kind": "fine", "twice": False, "extra": ""}


def write_dataset(folder: Path, made: dict[str, Any]) -> None:
    image_name, label_name = made["names"]
    (folder / "data").mkdir()
    for split, (counts, size) in made["splits"].items():
        labels = [label for label, count in enumerate(counts) for _ in range(count)]
        labels = [labels[index] for index in torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
        images = [
            {"bytes": encode(made["modes"][row % len(made["modes"])], size, row, made["kind"]), "path": None}
            for row in range(len(labels))
        ]
        if made["kind"] == "missing" and images:
            images[0] = None
        values = [LABELS[made["labels"]](label, row) for row, label in enumerate(labels)]
        columns = {image_name: images, label_name: values}
        features = {image_name: datasets.Image()}
        if made["labels"].startswith("ClassLabel"):
            features[label_name] = datasets.ClassLabel(names=[f"c{label}" for label in range(4)])
        else:
            kinds = {"str": "string", "empty": "string", "bool": "bool", "float": "float32", "bytes": "binary"}
            value = datasets.Value(kinds.get(made["labels"], "int64"))
            features[label_name] = datasets.List(value) if made["labels"] == "list" else value
        if made["extra"] == "second image":
            columns["other"], features["other"] = images, datasets.Image()
        elif made["extra"] == "second label":
            columns["target"], features["target"] = labels, datasets.ClassLabel(names=["a", "b", "c", "d"])
        file = folder / f"data/{split}-0.parquet"
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(file)
        if made["twice"]:
            table = pa.parquet.read_table(file)
            columns, names = [*table.columns, table.column(0)], [*table.column_names, image_name]
            pa.parquet.write_table(pa.Table.from_arrays(columns, names), file)


RUN = [*SMALL, "--model_args", "layers=[1,1,1,1]", "channels=[8,8,8,8]", "--step_size=0.1", "--num_steps=2"]
RUN += ["--limit_train_examples=none", "--limit_test_examples=none", "--validation_fraction=0.04"]
RUN += ["--mining_start_epoch=0", "--max_steps=1", "--num_train_epochs=1", "--per_device_train_batch_size=2"]
RUN += ["--validation_num_steps=1", "--eval_num_steps=1", "--dataloader_num_workers=0", "--image_size=8"]


@pytest.mark.filterwarnings("ignore")
@examples(4, 200)
def test_any_dataset_trains_a_step_or_is_refused_by_name(count, monkeypatch, tmp_path):
    """Through the recipe: from the files to a report, or status 2 and a message that names a setting."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    recipe, ends = recipe_module("train_ham.py"), {"trained": 0, "refused": 0}
    logging.getLogger("datasets").setLevel(logging.CRITICAL)

    def check(made: dict[str, Any]) -> None:
        said = io.StringIO()
        with tempfile.TemporaryDirectory(dir=tmp_path) as place, contextlib.redirect_stderr(said):
            write_dataset(Path(place), made)
            command = [*RUN, f"--dataset_name={place}", f"--output_dir={place}/run"]
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    recipe.main(command)
            except SystemExit as stop:
                message = said.getvalue()
                assert stop.code == 2  # noqa: PT017 (either is right)
                assert "error: " in message
                assert "--" in message, message
                ends["refused"] += 1
            else:
                assert (Path(place) / "run/report.json").is_file()
                ends["trained"] += 1

    check(HONEST)
    assert ends["trained"] == 1
    run_examples(check, count, made=generated_datasets())
    assert count < 100 or min(ends.values()) > count // 10, ends  # neither everything nor nothing is refused
