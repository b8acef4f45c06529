"""Going on with other batches or processes: the accumulation makes up for it, or what works is named."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from ham_hf.data import UpdateLayout
from ham_hf.methods import HAM
from ham_hf.training.checkpoint import list_checkpoints
from tests.support.training import log_of, resumed, trainer

pytestmark = pytest.mark.faults(quick=True)

KEEPS_EASY = HAM(mining_start_epoch=1, mining_step=1, easy_weight=1, easy_fraction=0.3)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with updates of 8 examples, stopped after 4 of its 18; the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    trainer(folder, max_steps=4).fit()
    return list_checkpoints(folder)[-1]


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    """Learning rates in the log of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    trainer(folder).fit()
    return [record["learning_rate"] for record in log_of(folder) if record["type"] == "train"]


@pytest.mark.parametrize(("batch_size", "asked_for", "needed"), [(4, 1, 2), (2, 1, 4), (8, 4, 1), (4, 2, 2)])
def test_accumulation_keeps_the_size_of_an_update(stopped, rates, tmp_path, caplog, batch_size, asked_for, needed):
    changes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": asked_for}
    with caplog.at_level(logging.INFO, "ham_hf"):
        run = trainer(tmp_path / "run", resume_from_checkpoint=str(stopped), **changes)
    assert run.config.gradient_accumulation_steps == needed
    said = f"--gradient_accumulation_steps {needed} instead of {asked_for}"
    assert (said in caplog.text) == (needed != asked_for)
    run.resume()
    assert (run.progress.step, run.total_steps) == (4, 18)
    run.fit()
    log = [*log_of(stopped.parent), *log_of(tmp_path / "run")]
    assert [record["learning_rate"] for record in log if record["type"] == "train"] == rates


def test_a_new_run_takes_what_it_is_given_and_starts_from_the_beginning(tmp_path, caplog):
    run = resumed(tmp_path / "run", gradient_accumulation_steps=3)
    assert run.config.gradient_accumulation_steps == 3
    assert run.layout.per_update == 24
    assert run.progress.step == 0
    assert "starting from the beginning" in caplog.text


@pytest.mark.parametrize("batch_size", [3, 16])
def test_batches_that_cannot_are_refused_with_those_that_can(stopped, tmp_path, batch_size):
    with pytest.raises(ValueError) as error:
        trainer(tmp_path / "run", resume_from_checkpoint=str(stopped), per_device_train_batch_size=batch_size)
    assert "updates of 8 examples" in str(error.value)
    assert "take --per_device_train_batch_size 1, 2, 4 or 8" in str(error.value)


def test_number_of_processes_that_cannot_is_refused_with_those_that_can(stopped, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda self: 3))
    with pytest.raises(ValueError) as error:
        trainer(tmp_path / "run", resume_from_checkpoint=str(stopped), per_device_train_batch_size=1)
    assert "batches of 1 on 3 process(es) cannot; start 1, 2, 4 or 8 processes" in str(error.value)


def test_method_that_depends_on_the_split_says_why_it_cannot(tmp_path):
    trainer(tmp_path / "run", KEEPS_EASY, max_steps=4).fit()
    run = trainer(tmp_path / "run", KEEPS_EASY, resume_from_checkpoint="latest", per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="depends on how its examples are split into batches"):
        run.resume()


def test_damaged_newest_checkpoint_does_not_hide_the_size(tmp_path):
    trainer(tmp_path / "run", max_steps=8).fit()
    older, newest = list_checkpoints(tmp_path / "run")
    (newest / "trainer_state.json").write_text("{")
    run = trainer(tmp_path / "run", resume_from_checkpoint="latest", per_device_train_batch_size=4)
    assert run.config.gradient_accumulation_steps == 2
    run.resume()
    assert run.progress.step == json.loads((older / "trainer_state.json").read_text())["step"]
    assert load_file(older / "model.safetensors").keys() == run.module.state_dict().keys()


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_update_trains_on_the_same_examples_however_they_are_dealt_out(world, batch_size):
    order = torch.randperm(101, generator=torch.Generator().manual_seed(0))
    steps = 32 // (world * batch_size)
    for update in range(3):
        dealt = []
        for rank in range(world):
            layout = UpdateLayout(batch_size=batch_size, accumulation=steps, world=world, rank=rank, seed=0)
            requests = layout.requests(order, epoch=0)
            assert len(requests) == 3 * steps
            for request in requests[update * steps : (update + 1) * steps]:
                dealt += request.indices.tolist()
        assert sorted(dealt) == sorted(order[update * 32 : (update + 1) * 32].tolist())
