"""Out of memory: the message names the batch size and the accumulation that keep the update."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
from safetensors.torch import load_file

from ham_hf import training_run
from ham_hf.faults import FaultError, smaller_batch
from ham_hf.methods import WAT
from tests.faults.same_runs import before_updates
from tests.support.recipe_runs import SMALL, refused
from tests.support.training import HAM_FROM_1, resumed, trainer

pytestmark = pytest.mark.faults(quick=True)


def of_the_allocator():
    torch.empty(2**60, dtype=torch.uint8)


def of_python():
    raise MemoryError


def of_the_accelerator():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 2 GiB\nof it")


@pytest.mark.parametrize("exhaust", [of_the_allocator, of_python, of_the_accelerator])
def test_training_names_settings_that_need_less_and_go_on(tmp_path, exhaust):
    folder = tmp_path / "run"
    run = trainer(folder)
    before_updates(run, {6: exhaust})
    with pytest.raises(FaultError, match="out of memory") as error:
        run.fit()
    assert "of it" not in str(error.value)
    flags = re.search(r"use (--per_device.*?),.*with (--resume_from_checkpoint latest)", str(error.value))
    words = shlex.split(flags[1])
    changes = {name.removeprefix("--"): int(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    assert changes == {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    again = resumed(folder, **changes)
    assert again.progress.step == 4
    assert again.fit().step == 18
    assert load_file(folder / "checkpoint-18" / "model.safetensors")


@pytest.mark.parametrize(
    ("method", "part", "advice"),
    [
        (HAM_FROM_1, "_held_out", "lower --per_device_eval_batch_size 256; --resume_from_checkpoint latest continues"),
        (
            WAT(),
            "_held_out_sums",
            "the images of --per_device_eval_batch_size 256 share .* start again with a smaller",
        ),
    ],
)
def test_validation_names_its_own_batch_size(tmp_path, monkeypatch, method, part, advice):
    run = trainer(tmp_path / "run", method)
    monkeypatch.setattr(run, part, lambda *args, **options: of_the_allocator())
    with pytest.raises(FaultError, match=advice):
        run.fit()


@pytest.mark.parametrize(
    ("batch", "accumulation", "words"),
    [
        (128, 1, "--per_device_train_batch_size 64 --gradient_accumulation_steps 2"),
        (9, 4, "--per_device_train_batch_size 3 --gradient_accumulation_steps 12"),
        (7, 1, "--per_device_train_batch_size 1 --gradient_accumulation_steps 7"),
        (1, 8, "--mixed_precision bf16"),
    ],
)
def test_suggestion_keeps_the_images_of_an_update(batch, accumulation, words):
    assert words in smaller_batch(batch, accumulation, may_change=True)


def test_suggestion_for_a_method_whose_batches_may_not_change():
    advice = smaller_batch(128, 1, may_change=False)
    assert "batches of 128" in advice
    assert "--gradient_accumulation_steps" not in advice


def test_other_errors_keep_their_own_words(tmp_path):
    def other():
        raise RuntimeError("shapes do not match")

    run = trainer(tmp_path / "run")
    before_updates(run, {0: other})
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        run.fit()


def test_recipe_ends_with_the_message(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training_run.Trainer, "_one_update", lambda *args, **kwargs: of_the_allocator())
    arguments = [*SMALL, f"--output_dir={tmp_path / 'run'}", "--per_device_train_batch_size=16"]
    message = refused(capsys, "train_ham.py", *arguments)
    assert "--per_device_train_batch_size 8 --gradient_accumulation_steps 2" in message
