"""Engines and settings that cannot attack are errors that name them; without sharding its functions change nothing."""

from __future__ import annotations

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin

from ham_hf.config import TrainConfig, TrainingConfig
from ham_hf.methods import CFA, PGDAT
from ham_hf.training.run_folder import RunLock
from ham_hf.training.sharding import (
    check_sharded_settings,
    gathered,
    load_model,
    load_optimizer,
    sharding_plugin,
    whole_state,
)
from ham_hf.training_run import start_accelerator
from tests.conftest import ROOT
from tests.support.nets import group_norm_net
from tests.support.recipe_runs import CONFIGURED

pytestmark = pytest.mark.faults(quick=True)

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "10",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def test_nothing_is_sharded_unless_the_launcher_says_so(monkeypatch):
    assert sharding_plugin({}) is None
    assert sharding_plugin({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}) is None
    # accelerate reads its own part from the environment of the process.
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    plugin = sharding_plugin()
    assert isinstance(plugin, FullyShardedDataParallelPlugin)
    assert plugin.fsdp_version == 2
    assert plugin.min_num_params == 10


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["DeepSpeed", "ddp.yaml", "fsdp.yaml"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["Megatron-LM", "ddp.yaml"]),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, ["tensor, context or sequence", "ddp.yaml"]),
        ({"ACCELERATE_USE_FSDP": "true"}, ["FSDP 1", "fsdp_version: 2"]),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, ["fsdp_offload_params", "false"]),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, ["fsdp_activation_checkpointing", "false"]),
        (FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, ["fsdp_cpu_ram_efficient_loading", "false"]),
        (FSDP2 | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["dynamo_backend INDUCTOR", "--torch_compile"]),
    ],
)
def test_what_cannot_attack_is_refused_by_name(environment, named):
    with pytest.raises(ValueError) as error:
        sharding_plugin(environment)
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(
    ("changes", "method", "named"),
    [
        ({"ema_decay": 0.9}, PGDAT(), "--ema_decay 0.9"),
        ({"awp_gamma": 0.01}, PGDAT(), "--awp_gamma 0.01"),
        ({"torch_compile": True}, PGDAT(), "--torch_compile"),
        ({"fawa": "on"}, PGDAT(), "(--fawa)"),
        ({}, CFA(), "(--fawa)"),
    ],
)
def test_settings_that_need_whole_weights_are_refused_by_name(changes, method, named):
    check_sharded_settings(TrainingConfig(max_grad_norm=1.0), uses_fawa=False)
    config = TrainingConfig(**changes)
    with pytest.raises(ValueError) as error:
        check_sharded_settings(config, uses_fawa=config.uses_fawa(method))
    assert named in str(error.value)
    assert "recipes/accelerate/ddp.yaml" in str(error.value)


def test_a_run_refuses_them_before_it_loads_data_or_model(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    training = TrainingConfig(ema_decay=0.9, use_cpu=True, output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"--ema_decay 0\.9 needs whole weights"):
        start_accelerator(TrainConfig(method=PGDAT(), training=training), RunLock(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_without_sharding_states_are_as_they_are():
    net = group_norm_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with gathered(Accelerator(cpu=True), net):
        net(torch.rand(2, 3, 6, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    model, state = whole_state(net.state_dict()), whole_state(optimizer.state_dict())
    again = group_norm_net(seed=1)
    other = torch.optim.SGD(again.parameters(), lr=0.5)
    load_model(again, model)
    load_optimizer(other, state)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())
    for parameter, value in zip(again.parameters(), net.parameters(), strict=True):
        assert torch.equal(other.state[parameter]["momentum_buffer"], optimizer.state[value]["momentum_buffer"])
    assert other.param_groups[0]["lr"] == 0.1
    with pytest.raises(RuntimeError, match="extra"):
        load_model(again, model | {"extra": torch.ones(1)})


def test_every_launch_configuration_says_what_it_is_for():
    assert sorted(CONFIGURED) == ["cpu.yaml", "ddp.yaml", "fsdp.yaml", "multi_node.yaml", "single_gpu.yaml"]
    for name in CONFIGURED:
        text = (ROOT / "recipes/accelerate" / name).read_text()
        assert f"accelerate launch --config_file recipes/accelerate/{name}" in text
        settings = yaml.safe_load(text)
        # The precision is a setting of the recipe, which wins; another one here would only mislead.
        assert settings["mixed_precision"] == "no"
