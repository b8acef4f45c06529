"""The yardsticks of the benchmarks make the passes they are said to make; every benchmark starts."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace

import pytest
import torch

from tests.benchmarks import common
from tests.benchmarks.workload import batch_of, labels, network, num_hard
from tests.benchmarks.yardsticks import Attack, Floor, PassCounter, careful_step, ordinary_step, published_step

pytestmark = pytest.mark.slow

BATCH, K, M = 10, 10, 3
ATTACK = Attack(epsilon=8 / 255, step_size=2 / 255, num_steps=K, mining_step=M)
SCRIPTS = ("step", "epoch", "evaluation", "memory", "profile", "scaling", "streaming", "gpu")


@pytest.fixture(scope="module")
def tiny():
    model = network(common.DEFAULT_MODEL, {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8)
    return SimpleNamespace(model=model, optimizer=optimizer, floor=Floor(model))


def counted(tiny, function):
    counter = PassCounter(tiny.model)
    try:
        result = function()
    finally:
        counter.close()
    return counter.passes(BATCH), result


@pytest.mark.parametrize("hard_fraction", [0.3, 0.5, 0.7, 1.0])
def test_mining_yardsticks_make_the_passes_of_the_arithmetic(tiny, hard_fraction):
    batch, hard = batch_of(BATCH, hard_fraction, torch.device("cpu")), num_hard(BATCH, hard_fraction)
    h = hard / BATCH
    assert counted(tiny, lambda: published_step(tiny.model, tiny.optimizer, batch.x, batch.y, ATTACK)) == (
        pytest.approx(2 + 4 * M + 4 * (K - M) * h + 3 * h),
        hard,
    )
    assert counted(tiny, lambda: careful_step(tiny.model, tiny.optimizer, batch.x, batch.y, ATTACK)) == (
        pytest.approx(3 * M + 1 + 3 * (K - M) * h + 3 * h),
        hard,
    )
    passes, _ = counted(tiny, lambda: tiny.floor.ham(batch.x, batch.x[:hard], ATTACK))
    assert passes == pytest.approx(2 * M + 1 + 2 * (K - M) * h + 3 * h)


def test_passes_of_what_mines_nothing(tiny):
    batch = batch_of(BATCH, 0.5, torch.device("cpu"))
    expected = {
        23.0: lambda: tiny.floor.pgd_at(batch.x, ATTACK),
        41.0: lambda: tiny.floor.evaluation(batch.x, 20),
        3.0: lambda: ordinary_step(tiny.model, tiny.optimizer, batch.x, batch.y),
    }
    assert [counted(tiny, function)[0] for function in expected.values()] == pytest.approx(list(expected))


def test_the_floor_leaves_parameters_trainable(tiny):
    tiny.floor.pgd_at(batch_of(2, 0.5, torch.device("cpu")).x, ATTACK)
    assert all(parameter.requires_grad for parameter in tiny.model.parameters())


def test_labels_hold_as_many_hard_rows_as_asked_for():
    for num, hard_fraction in ((32, 0.3), (32, 0.5), (128, 0.7), (8, 1.0)):
        y = labels(num, hard_fraction)
        assert (y != 0).sum() == num_hard(num, hard_fraction) == round(hard_fraction * num)
        assert 0 <= y.min() <= y.max() < 10


def test_turns_are_interleaved_and_warm_ups_do_not_count():
    calls, checked = [], []
    seconds = common.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        device=torch.device("cpu"),
        repeats=3,
        warmup=1,
        check=lambda name, result: checked.append(name),
    )
    assert calls == checked == ["a", "b"] * 4
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_ratios_are_taken_within_turns():
    # A machine that is ten times slower in the second turn changes seconds, and no ratio.
    spread = common.ratio([1.0, 10.0, 3.0], [2.0, 20.0, 4.0])
    assert (spread.min, spread.median, spread.max) == (0.5, 0.5, 0.75)


def test_commands_are_written_without_the_folders_of_this_machine(tmp_path):
    argv = ["--data", str(tmp_path / "cifar10"), f"--out={tmp_path / 'a.json'}", "--model_args", "layers=[1, 1]"]
    written = common.command_line("epoch", argv)
    assert written == "python -m tests.benchmarks.epoch --data cifar10 --out=a.json --model_args layers=[1, 1]"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_reads_a_command_line(name):
    module = importlib.import_module(f"tests.benchmarks.{name}")
    words = ["--quick", "--model_args", "depth=2", "--training", "torch_compile=true", "--precision", "bf16"]
    args = common.parse(module.options(), words)
    assert (args.batch_size, args.model_args["depth"], args.training) == (8, 2, {"torch_compile": True})
    with pytest.raises(SystemExit):
        module.options().parse_args(["--no_such_option"])


def test_step_measures_ours_against_all_yardsticks(tmp_path, capsys):
    out = tmp_path / "step.json"
    importlib.import_module("tests.benchmarks.step").main(
        ["--quick", "--use_cpu", "--batch_size=4", "--repeats=1", "--model_args", "channels=[4,4,4,4]", f"--out={out}"]
    )
    record = json.loads(out.read_text())
    ratios = record["figures"]["by_batch_size"][0]["ratios"]
    names = {"pgd_at / floor", *(f"ham / {other}, 0.5" for other in ("published", "careful", "floor", "pgd_at"))}
    assert set(ratios) == names
    assert all(0 < spread["min"] <= spread["median"] <= spread["max"] for spread in ratios.values())
    assert record["quick"] is True
    assert record["environment"]["device"] == "cpu"
    assert str(tmp_path) not in out.read_text()
    assert "HAM, 0.5 hard" in capsys.readouterr().out


def test_profile_counts_passes_and_waits(tmp_path, capsys):
    main = importlib.import_module("tests.benchmarks.profile").main
    found = {}
    for of in ("published 0.5", "ham 0.5"):
        out = tmp_path / "profile.json"
        main(["--quick", "--use_cpu", "--batch_size=4", "--of", of, f"--out={out}"])
        found[of] = json.loads(out.read_text())["figures"]
    assert found["published 0.5"]["passes"] == pytest.approx(29.5, abs=0.3)
    assert found["published 0.5"]["waits"] == {"index with a mask": 3}
    assert found["ham 0.5"]["passes"] < 22
    capsys.readouterr()


def test_a_wrong_number_of_hard_rows_is_refused():
    contestants = importlib.import_module("tests.benchmarks.step").Contestants
    with pytest.raises(RuntimeError, match=r"ham 0\.5: 3 rows were hard, 2 were meant to be"):
        contestants.check(SimpleNamespace(hard={"ham 0.5": 2}), "ham 0.5", SimpleNamespace(hard=3))


def test_epochs_without_data_are_skipped(monkeypatch, capsys):
    monkeypatch.delenv("HAM_HF_CIFAR10", raising=False)
    importlib.import_module("tests.benchmarks.epoch").main(["--quick"])
    assert "skipped" in capsys.readouterr().out


def test_gpu_benchmark_refuses_a_machine_without_one(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    gpu = importlib.import_module("tests.benchmarks.gpu")
    monkeypatch.setattr(gpu, "create_accelerator", lambda **_: SimpleNamespace(device=torch.device("cpu")))
    with pytest.raises(SystemExit, match="--rehearse"):
        gpu.main(["--parts", "2", f"--work={tmp_path}"])
