"""Input from outside may say anything: it is data, or rejected with an error that names it. It is never executed."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from markdown_it import MarkdownIt
from PIL import Image as PILImage
from safetensors.torch import save_file

from ham_hf.comparison.existing import label_runs, read_runs
from ham_hf.comparison.report import write_comparison
from ham_hf.comparison.table import compare
from ham_hf.config import ThreatConfig
from ham_hf.fitting import threat_model_of
from ham_hf.models import create_backbone, input_defaults, load_pixel_model
from ham_hf.reporting.card import write_card
from ham_hf.reporting.report import read_report, write_report
from ham_hf.training.checkpoint import load_checkpoint
from tests.conftest import ROOT
from tests.support.example_report import make_report
from tests.support.hub_server import Hub, hub_environment, use_hub
from tests.support.recipe_runs import SMALL, recipe_module, refused

pytestmark = pytest.mark.faults(quick=True)

ROGUE = (
    "<script>alert(1)</script>",
    "a | b | c\n| d |",
    "&anchor *alias !!python/object/apply:os.system ['touch owned']",
    "---\nlicense: other\n---",
    "{{ 7 * 7 }}{% for x in ().__class__.__base__.__subclasses__() %}",
    "../../../../../../escaped",
    "/etc/passwd",
    "C:\\windows\\system32",
    "x" * 10_000,
    "\u202edesrever\u2066 \u200bzero",
    "line\nbreak\r\n\x1b[31mred\x07",
)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).state_dict()


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    return path


def write_config(folder: Path, changes: dict[str, Any], cfg: dict[str, Any]) -> None:
    pretrained_cfg = {"input_size": [3, 32, 32], "num_classes": 3, **cfg}
    config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": pretrained_cfg, **changes}
    (folder / "config.json").write_text(json.dumps(config))


def form(**changes: object) -> dict[str, Any]:
    record = {"architecture": "test_resnet", "model_args": {}, "image_size": 32, "interpolation": "bilinear"}
    return {"ham_hf": {"trained_form": record | {"crop_pct": 1.0, "upsample": 1, **changes}}}


def test_the_honest_configuration_loads(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    write_config(folder, form(), {"label_names": ["a", "b", "c"]})
    loaded = load_pixel_model(str(folder))
    assert torch.equal(loaded.model.backbone.fc.weight, weights["fc.weight"])
    assert loaded.class_names == ("a", "b", "c")


BAD = 10**9
NO_ARCHITECTURES = ("../../evil", "hf-hub:evil/model", "local-dir:/tmp", "__class__")
FORBIDDEN = {"checkpoint_path": "bomb.bin", "pretrained_strict": False, "features_only": True, "device": "meta"}
FORBIDDEN |= {name: {"file": "bomb.bin"} for name in ("pretrained_cfg", "pretrained_cfg_overlay")}
HUGE = ({"layers": [1, 1, 1, 10**6]}, {"channels": [10**6] * 4}, {"stem_width": 10**6})
HOSTILE_CONFIGS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    *(({"architecture": name}, {}, f"no architecture '{name}'") for name in NO_ARCHITECTURES),
    ({"architecture": "reznet18"}, {}, "no architecture 'reznet18'; nearest"),
    ({"architecture": "x" * 10_000}, {}, "no architecture 'xxx"),
    ({"architecture": "\u202e\x1b[31m\x00"}, {}, r"no architecture '\\u202e\\x1b\[31m\\x00'"),
    ({"architecture": ["resnet18"]}, {}, "architecture should be the name"),
    ({"architecture": None}, {}, "architecture should be the name"),
    *(({"model_args": {name: value}}, {}, f"model_args {name} cannot be set") for name, value in FORBIDDEN.items()),
    ({"model_args": {"__class__": "os.system"}}, {}, "__class__"),
    ({"model_args": {"unknown": 1}}, {}, "unknown"),
    ({"model_args": [1, 2]}, {}, "model_args should be an object"),
    ({"model_args": {"num_classes": BAD}}, {}, "model_args num_classes should hold numbers up to 1000000"),
    ({"model_args": {"layers": [1, 1, 1, BAD]}}, {}, "model_args layers should hold numbers up to 1000000"),
    *(({"model_args": args}, {}, "cannot be built .*weights do not fill") for args in HUGE),
    ({"num_classes": 10**6}, {}, "cannot be built .*(weights do not fill|size mismatch)"),
    *(({"num_classes": number}, {}, "num_classes should be a whole number") for number in (BAD, "3", -1, 3.5)),
    ({"num_classes": float("nan")}, {}, "NaN is not a JSON number"),
    *(({"label_names": names}, {}, "label_names should be") for names in (3, [1, 2, 3])),
    ({"pretrained_cfg": 3}, {}, "pretrained_cfg should be an object"),
    ({}, {"input_size": None}, "input_size"),
    ({}, {"input_size": [3, BAD, BAD]}, "input_size should be channels, height and width"),
    *(({}, {"input_size": size}, "input_size should be channels") for size in ([3, 32], "332")),
    ({}, {"mean": [float("inf")] * 3}, "Infinity is not a JSON number"),
    ({}, {"mean": "zero"}, "mean should be"),
    *(({}, {"std": value}, "std should be") for value in ([0, 1, 1], [])),
    ({}, {"crop_pct": "all"}, "crop_pct should be"),
    ({}, {"test_crop_pct": ["1"]}, "test_crop_pct should be"),
    ({}, {"test_input_size": 256}, "test_input_size should be"),
    ({}, {"interpolation": "__import__('os')"}, "interpolation should be one of"),
    ({}, {"first_conv": {"a": 1}}, "first_conv should be"),
    ({}, {"nested": 1}, "nested"),
    ({"ham_hf": [1]}, {}, "is not one of a timm model"),
    *(({"ham_hf": {"epsilon": value}}, {}, "epsilon should be a number") for value in ("8/255", -1)),
    *(({"ham_hf": {"norm": value}}, {}, "norm should be linf or l2") for value in ("l0; rm", ["linf"])),
    ({"ham_hf": {"test_fraction": True}}, {}, "test_fraction should be"),
    ({"ham_hf": {"dataset": {}}}, {}, "dataset should be a name"),
    ({"ham_hf": {"trained_form": 3}}, {}, "damaged ham_hf.trained_form"),
    ({"ham_hf": {"trained_form": {"architecture": "resnet18"}}}, {}, "damaged ham_hf.trained_form"),
    (form(architecture="hf-hub:evil/model"), {}, "damaged .*no architecture"),
    (form(architecture=7), {}, "damaged .*architecture should be"),
    (form(model_args={"checkpoint_path": "bomb.bin"}), {}, "damaged .*checkpoint_path"),
    (form(model_args=None), {}, "damaged .*model_args should be"),
    (form(image_size=BAD), {}, "damaged .*image_size should be"),
    *((form(upsample=factor), {}, "damaged .*upsample should be") for factor in (BAD, 0)),
    (form(crop_pct=[]), {}, "damaged .*crop_pct should be"),
    (form(crop_mode="stretch"), {}, r"damaged ham_hf\.trained_form .*crop_mode should be one of"),
]


@pytest.mark.parametrize(("changes", "cfg", "message"), HOSTILE_CONFIGS)
def test_a_hostile_configuration_is_refused_by_name(folder, changes, cfg, message):
    (folder / "bomb.bin").write_bytes(pickle.dumps(Bomb(folder / "unpickled")))
    write_config(folder, changes, cfg)
    since = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        load_pixel_model(str(folder))
    assert time.process_time() - since < 30  # not for minutes, not until the memory is full
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert not (folder / "unpickled").exists()


def test_a_configuration_of_another_depth_encoding_or_size_is_refused(folder: Path) -> None:
    def refuse(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_pixel_model(str(folder))

    for text in ("[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000):
        (folder / "config.json").write_text(f'{{"architecture": "test_resnet", "model_args": {{"x": {text}}}}}')
        refuse("nested too deeply")
    for data in (b"\xff\xfe{}", b"{", b"{}"):
        (folder / "config.json").write_bytes(data)
        refuse("is not one of a timm model")
    with (folder / "config.json").open("wb") as file:
        file.truncate(10**9)
    refuse("1000000000 bytes")


def test_training_from_a_hostile_configuration_is_refused_too(folder: Path) -> None:
    """Without weights of the source, what its configuration says is built all the same."""
    write_config(folder, {"model_args": {"channels": [200_000] * 4}}, {})
    inputs = input_defaults(f"local-dir:{folder}", model_args={})
    with pytest.raises(ValueError, match=r"cannot be built .*weights do not fill"):
        create_backbone(f"local-dir:{folder}", pretrained=False, num_classes=3, preprocessing=inputs, model_args={})


def test_places_of_other_weights_are_ignored(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """timm would load the pickle if any of these keys reached it."""
    bomb = folder / "bomb.bin"
    bomb.write_bytes(pickle.dumps(Bomb(folder / "unpickled")))
    places = {"url": bomb.as_uri(), "file": str(bomb), "hf_hub_id": "evil/model", "hf_hub_filename": "bomb.bin"}
    for source in ("", "hf-hub", "local-dir"):
        for custom in (True, False, "hf"):
            write_config(folder, {}, {**places, "source": source, "custom_load": custom, "state_dict": {"fc.bias": 1}})
            loaded = load_pixel_model(str(folder))
            assert torch.equal(loaded.model.backbone.fc.weight, weights["fc.weight"])
    assert not (folder / "unpickled").exists()


NUMBERS = st.integers(-(10**30), 10**30) | st.floats()
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(ROGUE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("architecture", "num_classes", "num_features", "model_args", "label_names", "label_descriptions", "ham_hf")
CFG_KEYS = (
    *("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "num_classes", "label_offset"),
    *("first_conv", "classifier", "pool_size", "fixed_input_size", "url", "file", "source", "custom_load", "tag"),
    *("test_input_size", "min_input_size", "test_crop_pct", "license", "paper_ids", "state_dict", "hf_hub_id"),
)
ARGUMENTS = ("layers", "channels", "stem_width", "act_layer", "global_pool", "drop_rate", "in_chans", "num_classes")


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, max_size=2),
    st.dictionaries(st.sampled_from(CFG_KEYS), JSON_VALUES, max_size=2),
    st.dictionaries(st.sampled_from(ARGUMENTS), JSON_VALUES, max_size=2),
)
def test_any_configuration_is_loaded_or_refused(folder, changes, cfg, arguments):
    write_config(folder, {"model_args": arguments, **changes}, cfg)
    try:
        loaded = load_pixel_model(str(folder))
    except ValueError as error:
        named = str(folder) in str(error)
        assert named, error  # noqa: PT017 (either is right)
    else:
        assert loaded.model.backbone.num_classes <= 1_000_000
        threat_model_of(ThreatConfig(), loaded)


# Weights


def header(entries: dict[str, Any], *, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


TENSOR = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
HOSTILE_WEIGHTS = {
    "empty": b"",
    "a pickle": pickle.dumps({"fc.bias": [1, 2, 3]}),
    "header of 2**63 bytes": header({"fc.bias": TENSOR}, length=2**63) + bytes(12),
    "header longer than the file": header({"fc.bias": TENSOR}, length=10**9) + bytes(12),
    "no header": header({}, length=0),
    "no JSON": struct.pack("<Q", 4) + b"abcd",
    "offsets outside": header({"fc.bias": {**TENSOR, "data_offsets": [0, 10**12]}}) + bytes(12),
    "offsets backwards": header({"fc.bias": {**TENSOR, "data_offsets": [12, 0]}}) + bytes(12),
    "huge shape": header({"fc.bias": {**TENSOR, "shape": [2**40, 2**40]}}) + bytes(12),
    "negative shape": header({"fc.bias": {**TENSOR, "shape": [-3]}}) + bytes(12),
    "unknown type": header({"fc.bias": {**TENSOR, "dtype": "__reduce__"}}) + bytes(12),
    "nested": struct.pack("<Q", 20_000) + b"[" * 20_000,
    "rogue name": header({"../../x\x1b[31m": TENSOR}) + bytes(12),
    "one tensor of many": header({"fc.bias": TENSOR}) + bytes(12),
}


@pytest.mark.parametrize("content", HOSTILE_WEIGHTS.values(), ids=HOSTILE_WEIGHTS)
def test_hostile_weights_are_refused_by_name(folder: Path, content: bytes) -> None:
    write_config(folder, {}, {})
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=str(folder)):
        load_pixel_model(str(folder))


OTHER_WEIGHTS = {"fc.weight": torch.zeros(5, 7), "conv1.0.weight": torch.zeros(1, dtype=torch.bool)}
OTHER_WEIGHTS |= {"fc.bias": None, "fc.extra": torch.zeros(3)}


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_weights_of_another_network_are_refused(folder: Path, weights: dict[str, torch.Tensor], name: str) -> None:
    write_config(folder, {}, {})
    changed = weights | {name: OTHER_WEIGHTS[name]}
    save_file({key: value for key, value in changed.items() if value is not None}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be built from its configuration"):
        load_pixel_model(str(folder))


@pytest.mark.parametrize("pickled", ["model.pth", "model.pt", "pytorch_model.pth.tar", "w.npz"])
def test_a_folder_of_pickles_is_refused_by_name(folder: Path, tmp_path: Path, pickled: str) -> None:
    write_config(folder, {}, {"file": pickled, "hf_hub_filename": pickled, "custom_load": "hf"})
    (folder / "model.safetensors").unlink()
    (folder / pickled).write_bytes(pickle.dumps(Bomb(tmp_path / "unpickled")))
    with pytest.raises(ValueError, match=r"has no model\.safetensors; pickled weights .* are never loaded"):
        load_pixel_model(str(folder))
    assert not (tmp_path / "unpickled").exists()


def test_a_repository_of_pickles_is_refused_by_name(folder, tmp_path, monkeypatch, capsys):
    """Through the recipe and over HTTP, as somebody would who evaluates a model by its id."""
    pickled = "pytorch_model.bin"
    write_config(folder, {}, {"file": pickled, "hf_hub_filename": pickled, "custom_load": "hf"})
    mark = tmp_path / "unpickled"
    with Hub({"hf_test": "me"}) as hub:
        files = {"config.json": (folder / "config.json").read_bytes(), pickled: pickle.dumps(Bomb(mark))}
        hub.add("model", "evil/model", files)
        use_hub(hub, monkeypatch, tmp_path / "hf_home", "hf_test")
        words = ["evil/model", "--dataset_name=digits", "--use_cpu", f"--output_dir={tmp_path / 'out'}"]
        said = refused(capsys, "evaluate.py", *words)
        assert "could not get model.safetensors of evil/model" in said
        assert "pickled weights are never loaded" in said
        assert not [entry for entry in hub.log if pickled in entry.path]
    assert not mark.exists()


def test_a_checkpoint_that_holds_a_bomb_is_refused_with_a_message(tmp_path, capsys):
    output = tmp_path / "run"
    command = [*SMALL, "--max_steps=2", "--per_device_train_batch_size=16", f"--output_dir={output}"]
    recipe_module("train_ham.py").main(command)
    mark, checkpoint = tmp_path / "unpickled", output / "checkpoint-2"
    torch.save(Bomb(mark), checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer\.pt holds something other than tensors .* never loaded"):
        load_checkpoint(checkpoint)
    capsys.readouterr()
    words = [*command, "--max_steps=3", f"--resume_from_checkpoint={checkpoint}"]
    assert str(checkpoint) in refused(capsys, "train_ham.py", *words)
    assert not mark.exists()


# Datasets


@pytest.mark.slow
def test_images_of_this_machine_cannot_be_asked_for(tmp_path: Path) -> None:
    """A dataset of the Hub whose rows name files, which training would read and a figure would publish."""
    private = tmp_path / "private.png"
    PILImage.fromarray(np.zeros((8, 8, 3), dtype="uint8")).save(private)
    (tmp_path / "home").mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    own = {"bytes": private.read_bytes(), "path": None}
    for name, last in (("honest", own), ("rogue", {"bytes": None, "path": str(private)})):
        rows = {"image": [*([own] * 9), last], "label": [0, 1] * 5}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    # The card of this one says images, its file has names of files.
    texts = pa.table({"image": [str(private)] * 10, "label": [0, 1] * 5})
    pq.write_table(texts, tmp_path / "liar.parquet")
    card = yaml.safe_dump({"dataset_info": {"features": features._to_yaml_list()}})
    with Hub({"hf_test": "me"}) as hub:
        for name in ("honest", "rogue", "liar"):
            files = {"data/train-0.parquet": (tmp_path / f"{name}.parquet").read_bytes()}
            if name == "liar":
                files["README.md"] = f"---\n{card}---\n".encode()
            hub.add("dataset", f"evil/{name}", files)
        script = (
            "from ham_hf.data import DataConfig\n"
            "from ham_hf.data.sources import open_source, open_streamed_source\n"
            "for name, row in (('honest', None), ('rogue', 9), ('liar', 0)):\n"
            "    source = open_streamed_source(DataConfig(dataset_name=f'evil/{name}')).splits['train']\n"
            "    try:\n"
            "        print(len(list(source.rows(['image', 'label'], 0, 0, None))))\n"
            "    except ValueError as error:\n"
            "        print(name, f'data/train-0.parquet, row {row} holds no image' in str(error))\n"
            "print(len(open_source(DataConfig(dataset_name='evil/honest')).splits['train']))\n"
            "open_source(DataConfig(dataset_name='evil/rogue'))"
        )
        env = hub_environment(hub, tmp_path / "home", token=None) | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["10", "rogue True", "liar True", "10"], done.stderr[-2000:]
    said = "--dataset_name evil/rogue: split 'train', row 9 holds no image, it names the file"
    assert f"ValueError: {said}" in done.stderr


def test_a_run_on_rogue_names_stays_in_its_folder_and_its_card(tmp_path, capsys, monkeypatch):
    """Class names, column names, the folder and the card of the dataset: nothing of it reaches beyond its place."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "<b>rogue | (x) {{ 7 * 7 }} &a"
    (source / "data").mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(ROGUE))})
    random = np.random.default_rng(0)
    images = [PILImage.fromarray(random.integers(0, 256, (8, 8, 3), dtype="uint8")) for _ in range(10 * len(ROGUE))]
    rows = {"image": images, "label": list(range(len(ROGUE))) * 10}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(source / "data/train-0.parquet")
    rogue = "license: &a [*a]\nconfigs: !!python/object/apply:os.system ['touch owned']"
    (source / "README.md").write_text(f"---\n{rogue}\n---")
    command = [word for word in SMALL if not word.startswith(("--dataset_name", "in_chans", "--limit"))]
    command += ["--max_steps=2", "--per_device_train_batch_size=16", "--save_total_limit=1"]
    before = set(tmp_path.rglob("*"))
    command += [f"--dataset_name={source}", "--output_dir=run"]
    # A card that is no YAML is an error that names the dataset.
    assert "error: --dataset_name" in refused(capsys, "train_ham.py", *command)
    card = "license: '../../x'\nconfigs:\n- config_name: default\n  data_dir: data"
    (source / "README.md").write_text(f"---\n{card}\n---\n<script>")
    recipe_module("train_ham.py").main(command)
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "\u202e" not in said.out + said.err
    made = set(tmp_path.rglob("*")) - before
    assert {path.relative_to(tmp_path).parts[0] for path in made} == {"run"}
    figures = {path.name for path in (tmp_path / "run/figures").iterdir()}
    assert all(re.fullmatch(r"[a-z_]+(-\d+)?\.png", name) for name in figures), figures
    card = (tmp_path / "run/README.md").read_text()
    metadata = yaml.safe_load(card.split("\n---\n")[0])
    assert metadata["license"] == "apache-2.0"
    assert set(metadata) <= {"library_name", "pipeline_tag", "tags", "license", "metrics", "model-index"}
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.split("\n---\n", 1)[1])
    inside = [child for token in tokens for child in token.children or []]
    html = "".join(token.content for token in (*tokens, *inside) if token.type in ("html_block", "html_inline"))
    own = r"<details><summary>\d+ settings</summary>|</details>|<!-- (images of the dataset|end of the images) -->"
    assert re.sub(own, "", html).strip() == ""
    links = {child.attrs["href"] for child in inside if child.type == "link_open"}
    assert links == {
        "https://github.com/huggingface/pytorch-image-models",
        "https://github.com/huggingface/transformers",
        "https://arxiv.org/abs/2308.01823",
        "https://arxiv.org/abs/1706.06083",  # PGD
        "https://arxiv.org/abs/1608.04644",  # CW
    }
    assert "`<b>rogue | (x) {{ 7 * 7 }} &a`" in card
    # What was written loads, under the names that it was given.
    assert load_pixel_model("run").class_names == ROGUE
    # And compared with itself it is a table.
    recipe_module("compare.py").main(["run", "--output_dir=compared"])
    text = (tmp_path / "compared/comparison.md").read_text()
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert tables
    assert all(len({line.count("|") - line.count("\\|") for line in lines}) == 1 for lines in tables)
    assert "<" not in text
    names = {path.name for path in (tmp_path / "compared").iterdir()}
    assert all(re.fullmatch(r"comparison(_[a-z_]+)?\.[a-z]+", name) for name in names), names


# Reports


def places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Every place in a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return found + [place for key, item in items for place in places(item, (*path, key))]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("report")
    return json.loads(write_report(make_report(num_epochs=1), folder).read_text())


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_report_is_compared_or_refused(report: dict[str, Any], tmp_path: Path, data: st.DataObject) -> None:
    """``recipes/compare.py`` reads reports of the Hub: one changed at one place is read, or rejected with its name."""
    changed = json.loads(json.dumps(report))
    *path, last = data.draw(st.sampled_from(places(report)))
    holder = changed
    for key in path:
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[last] = data.draw(JSON_VALUES)
    else:
        del holder[last]
    (tmp_path / "report.json").write_text(json.dumps(changed))
    try:
        runs = label_runs(read_runs([str(tmp_path)], download=lambda *_: tmp_path).found)
        write_comparison(compare(runs), tmp_path / "compared", command="x")
        write_card(runs[0].report, tmp_path, repo_id="me/x", model_license="mit")
    except ValueError as error:
        assert str(error)  # noqa: PT017 (either is right)


def test_a_report_whose_method_has_impossible_settings_is_refused(report: dict[str, Any], tmp_path: Path) -> None:
    """Found by the test above: a card counts epochs from a setting that was no number."""
    config = report["config"] | {"mining_start_epoch": None}
    (tmp_path / "report.json").write_text(json.dumps(report | {"config": config}))
    with pytest.raises(ValueError, match="the settings of ham in the report: --mining_start_epoch None: expected"):
        write_card(read_report(tmp_path), tmp_path, repo_id=None, model_license="mit")


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "a\\b", "", ".", "x" * 300, "clean\n", "\u202e"])
def test_the_name_of_an_evaluation_is_no_path(name: str) -> None:
    attack = make_report().results["clean"]
    with pytest.raises(ValueError, match="an evaluation is called by letters"):
        replace(attack, name=name)
