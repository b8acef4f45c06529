"""Checkpoints are complete or absent, are found by step, and never execute code."""

from __future__ import annotations

import pytest
import torch

from ham_hf.training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_best,
    load_checkpoint,
    replace_folder,
    rewind,
    save_best,
    save_checkpoint,
)
from tests.support.checkpoints import make


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_a_folder_is_flushed_with_what_lies_deep_in_it_before_it_gets_its_name(tmp_path, monkeypatch):
    part, final = tmp_path / "part", tmp_path / "final"
    (part / "inner").mkdir(parents=True)
    (part / "inner" / "weights").touch()
    flushed = []
    monkeypatch.setattr("ham_hf.training.checkpoint.flush", lambda path: flushed.append((path, final.exists())))
    replace_folder(part, final)
    before = {path for path, renamed in flushed if not renamed}
    assert before == {part / "inner" / "weights", part / "inner", part}
    assert (final / "inner" / "weights").is_file()
    assert flushed[-1] == (tmp_path, True)


def test_what_is_saved_comes_back(tmp_path):
    path = save_checkpoint(tmp_path, make(7), keep=None)
    back = load_checkpoint(path)
    assert torch.equal(back.model["w"], torch.ones(2, 3, 4, 4))
    assert torch.equal(back.optimizer["state"][0]["m"], torch.ones(2))
    assert back.state == {"step": 7}
    assert back.averaged is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-7"]


def test_newest_are_kept_by_number_not_by_name(tmp_path):
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, make(step), keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, make(3), keep=2)
    path = save_checkpoint(tmp_path, make(3, value=2.0), keep=2)
    assert float(load_checkpoint(path).model["w"].mean()) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("broken", ["save_file", "torch.save", "rename"])
def test_an_interrupted_save_leaves_the_earlier_checkpoints(tmp_path, monkeypatch, broken):
    save_checkpoint(tmp_path, make(1), keep=1)

    def stop(*args, **kwargs):
        raise OSError("no space left on device")

    target = {
        "save_file": "ham_hf.training.checkpoint.save_file",
        "torch.save": "torch.save",
        "rename": "pathlib.Path.rename",
    }[broken]
    with monkeypatch.context() as patch:
        patch.setattr(target, stop)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(tmp_path, make(2), keep=1)
    assert names(tmp_path) == ["checkpoint-1"]
    load_checkpoint(tmp_path / "checkpoint-1")
    save_checkpoint(tmp_path, make(2), keep=1)
    assert names(tmp_path) == ["checkpoint-2"]


def test_folder_without_its_last_file_is_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, make(1), keep=None)
    half = save_checkpoint(tmp_path, make(2), keep=None)
    (half / "trainer_state.json").unlink()
    assert names(tmp_path) == ["checkpoint-1"]
    with pytest.raises(ValueError, match=r"--resume_from_checkpoint .*checkpoint-2 holds no complete.*checkpoint-1"):
        find_checkpoint(tmp_path, str(half))
    with pytest.raises(ValueError, match=rf"checkpoints in {tmp_path}: {tmp_path / 'checkpoint-1'};"):
        find_checkpoint(tmp_path / "new run", str(tmp_path))
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-1")) == tmp_path / "checkpoint-1"
    assert find_checkpoint(tmp_path / "empty", "latest") is None


def test_a_pickle_in_place_of_the_optimizer_is_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("executed",))

    path = save_checkpoint(tmp_path, make(1), keep=None)
    torch.save({"state": Payload()}, path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer.pt .*never loaded: it could be code"):
        load_checkpoint(path)


def test_best_weights_and_their_state_are_one_file(tmp_path):
    save_best(tmp_path, {"w": torch.ones(2)}, {"score": 0.25, "step": 4})
    save_best(tmp_path, {"w": torch.zeros(2)}, {"score": 0.5, "step": 8})
    weights, state = load_best(tmp_path)
    assert torch.equal(weights["w"], torch.zeros(2))
    assert state == {"score": 0.5, "step": 8}
    assert [entry.name for entry in (tmp_path / "checkpoint-best").iterdir()] == ["model.safetensors"]


def test_rewinding_restores_the_best_weights_of_that_moment(tmp_path, caplog):
    for step in (1, 2, 3):
        save_best(tmp_path, {"w": torch.full((2,), float(step))}, {"step": step})
        save_checkpoint(tmp_path, make(step), keep=None)
    rewind(tmp_path, tmp_path / "checkpoint-2")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert (tmp_path / "checkpoint-3.abandoned").is_dir()
    assert "checkpoint-3" in caplog.text
    assert load_best(tmp_path)[1] == {"step": 2}
    other = tmp_path / "other"
    rewind(other, tmp_path / "checkpoint-1")
    assert load_best(other)[1] == {"step": 1}


def test_rewinding_to_before_the_first_validation_forgets_the_best(tmp_path):
    path = save_checkpoint(tmp_path, make(1), keep=None)
    save_best(tmp_path, {"w": torch.ones(2)}, {"step": 2})
    rewind(tmp_path, path)
    assert not (tmp_path / "checkpoint-best" / "model.safetensors").exists()
