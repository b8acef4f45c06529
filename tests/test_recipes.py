"""Every recipe is complete, in order, parses as its own header says, and holds the values it is named after."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex

import pytest
import yaml

from ham_hf.comparison.plan import read_plan
from ham_hf.config import TrainConfig, config_to_dict, config_to_yaml, load_train_config, parse_train_config
from ham_hf.config.configs import sections
from ham_hf.methods import HAM, PGDAT
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
RECIPES = [path for path in RECIPES if path.parent.name != "accelerate" and not path.name.startswith("compare")]
NAMES = [path.relative_to(ROOT).as_posix() for path in RECIPES]
HEADER = re.compile(
    r"# What:     (?P<what>.+)\n"
    r"# Run:      (?P<run>.+)\n"
    r"# Expect:   (?P<expect>.+)\n"
    r"# Differs:  (?P<differs>.+)\n"
    r"# Override: flags win over this file: (?P<flags>--.+)\n\n"
)
SELF_CONTAINED = {
    "dataset_name", "validation_fraction", "model_name", "norm", "epsilon", "step_size", "num_steps", "method",
    "output_dir", "num_train_epochs", "per_device_train_batch_size", "optimizer", "learning_rate", "weight_decay",
    "decay_norm_and_bias", "lr_scheduler_type", "seed", "selection_metric", "eval_num_steps",
}  # fmt: skip


@functools.cache
def load(name: str) -> TrainConfig:
    return load_train_config(ROOT / "recipes" / name)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_header_says_what_how_and_what_to_expect(path, monkeypatch, tmp_path):
    header = HEADER.match(path.read_text())
    assert header is not None
    assert header["run"] == f"accelerate launch recipes/train_ham.py --config {path.relative_to(ROOT).as_posix()}"
    config = load(path)
    # The flags are accepted, and the resolved recipe gives the same run.
    monkeypatch.chdir(ROOT)
    assert parse_train_config(shlex.split(header["run"])[3:] + shlex.split(header["flags"])) != config
    resolved = tmp_path / "train_config.yaml"
    resolved.write_text(config_to_yaml(config))
    assert load_train_config(resolved) == config
    # The method begins within the run, and the learning rate drops in it.
    assert config.method.warmup_epochs < config.training.num_train_epochs
    assert config.training.lr_scheduler_type != "piecewise" or all(
        drop.epoch < config.training.num_train_epochs for drop in config.training.lr_drops
    )
    # YAML 1.1 reads an unquoted 60:0.1 as 3600.1 seconds.
    assert all(isinstance(drop, str) for drop in yaml.safe_load(path.read_text()).get("lr_drops", []))


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_is_self_contained_and_in_the_order_of_the_groups(path):
    config = load(path)
    order = [name for _, values in sections(config) for name in values]
    names = re.findall(r"^(\w+):", path.read_text(), re.MULTILINE)
    assert names == sorted(names, key=order.index)
    assert set(names) >= SELF_CONTAINED
    method_options = next(values for title, values in sections(config) if title == "Method")
    options = dataclasses.fields(config.method)
    required = {one.name for one in options if one.default is one.default_factory is dataclasses.MISSING}
    assert set(names) >= set(method_options) & (required | {"mining_step", "mining_start_epoch"})
    for title, values in sections(config):
        block = re.search(rf"^# {re.escape(title)}\n((?:\w+: .*\n)+)", path.read_text(), re.MULTILINE)
        in_block = re.findall(r"^(\w+):", block[1], re.MULTILINE) if block else []
        assert [name for name in names if name in values] == in_block


def test_output_folders_differ():
    folders = [load(path).training.output_dir for path in RECIPES]
    assert len(folders) == len(set(folders))


CONTROLLED = ["digits/{}", "cifar10/preactresnet18_{}", "cifar10/resnet18_{}", "imagenet/convnext_tiny_{}"]


@pytest.mark.parametrize("stem", [*CONTROLLED, "imagenet/vit_small_patch16_{}"])
def test_control_is_alike_but_for_the_method(stem):
    ham, control = load(f"{stem.format('ham')}.yaml"), load(f"{stem.format('pgd_at')}.yaml")
    assert isinstance(ham.method, HAM)
    assert control.method == PGDAT()
    ham, control = config_to_dict(ham), config_to_dict(control)
    options = {field.name for field in dataclasses.fields(PGDAT)}
    differ = {name for name in control.keys() - options if control[name] != ham[name]} - {"method", "output_dir"}
    if stem.startswith("digits/"):
        # There mining adds steps to the control's attack; elsewhere it spares some of them.
        assert control["num_steps"] == ham["mining_step"]
        differ -= {"num_steps"}
    assert differ == set()


@pytest.mark.parametrize(
    ("name", "dataset", "mining", "start", "rate", "keep"),
    [
        ("cifar10", "uoft-cs/cifar10", 3, 49, 0.1, {}),
        ("cifar100", "uoft-cs/cifar100", 3, 59, 0.1, {"easy_weight": 1.0, "easy_fraction": 0.3}),
        ("svhn", "ufldl-stanford/svhn", 5, 49, 0.01, {}),
        ("imagenette", "frgfm/imagenette", 3, 49, 0.1, {}),
    ],
)
def test_paper_recipes_hold_the_published_values(name, dataset, mining, start, rate, keep):
    """METHODS of the authors' scripts: epochs there count from 1, here from 0."""
    config = load(f"{name}/preactresnet18_ham_paper.yaml")
    assert config.data.dataset_name == dataset
    assert config.method == HAM(mining_step=mining, mining_start_epoch=start, **keep)
    assert (config.attack.epsilon, config.attack.step_size, config.attack.num_steps) == (0.031, 0.007, 10)
    assert config.model.model_name == "preactresnet18_cifar"
    assert config.model.image_size == 32
    training = config.training
    assert training.lr_drops == ((59, 0.1), (89, 0.01), (109, 0.005))
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (120, 128)
    assert (training.learning_rate, training.momentum, training.weight_decay) == (rate, 0.9, 2e-4)
    assert (training.optimizer, training.decay_norm_and_bias) == ("momentum", True)


def test_fair_recipe_is_the_row_that_was_measured():
    recipe = config_to_dict(load("cifar10/resnet18_small_fair.yaml"))
    plan = read_plan(ROOT / "recipes/cifar10/compare_medium.yaml")
    (row,) = (run for run in plan.runs if (run.label, run.seed) == ("k2-long-hard_fraction-fair", 0))
    differ = {name for name, value in config_to_dict(row.config).items() if value != recipe.get(name)}
    assert differ == {"output_dir", "autoattack", "autoattack_examples"}


def test_the_default_run_needs_no_network():
    config = load("digits/ham.yaml")
    assert config.data.dataset_name == "digits"
    assert config.hub.push_to_hub is False
    assert config.model.pretrained is False
    assert config.model.model_args["in_chans"] == 1
