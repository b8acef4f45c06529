"""Fairness-gated weight averaging against the authors' sequence and by its definition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ham_hf.training.averaging import GatedAverage
from tests.support.golden_data import TOLERANCE, golden_tensors, group
from tests.support.nets import batch_norm_net

PASSING = [0.5, 0.3]


class TinyNet(nn.Module):
    """The network of the authors' sequence."""

    def __init__(self, state):
        super().__init__()
        self.lin, self.bn = nn.Linear(3, 2), nn.BatchNorm1d(2)
        self.double().load_state_dict(state)


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


def moved(model, seed):
    """The same network with other parameters and statistics."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    for tensor in [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]:
        tensor.data.copy_(torch.rand_like(tensor))
    return model


def assert_same_state(model, state, **tolerance):
    assert model.state_dict().keys() == state.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_average_is_the_authors_from_the_first_epoch_that_passes():
    tensors, hyper = golden_tensors("cfa")
    initial, sequence = group(tensors, "in/tiny_init/"), group(tensors, "in/tiny_seq/")
    expected, initialised = group(tensors, "out/averaging/fawa/"), tensors["out/averaging/fawa_initialised"]
    accuracies = tensors["in/valid_class_robust"].tolist()
    assert {False, True} == {bool(value) for value in initialised}

    average = GatedAverage(TinyNet(initial), hyper["decay_rate"], hyper["threshold"])
    passes = 0
    for epoch, class_accuracies in enumerate(accuracies):
        current = {name: value[epoch] for name, value in sequence.items()}
        theirs = {name: value[epoch] for name, value in expected.items()}
        passed = average.update(TinyNet(current), class_accuracies)
        assert passed == all(accuracy >= hyper["threshold"] for accuracy in class_accuracies)
        passes += passed
        assert average.updates == passes
        if initialised[epoch]:
            assert_same_state(average.module, theirs, **TOLERANCE)
        else:  # The one difference: until then the authors keep the initial weights, and we follow the model.
            assert_same_state(TinyNet(initial), theirs, **TOLERANCE)
            assert_same_state(average.module, current, rtol=0, atol=0)
    assert 2 <= passes < len(accuracies)


def test_the_threshold_itself_passes_and_a_class_without_example_does_not_count():
    model = batch_norm_net()
    average = GatedAverage(model, decay=0.5, threshold=0.3)
    assert average.update(model, [None, 0.3, 0.8])
    assert not average.update(model, [0.29999, None, 0.8])


def test_the_average_is_a_frozen_copy_and_the_model_is_left_alone():
    model = batch_norm_net().train()
    average = GatedAverage(model, decay=0.5, threshold=0.3)
    average.update(model, PASSING)
    other = moved(model, 1)
    before = copy.deepcopy(other.state_dict())
    average.update(other, PASSING)
    assert_same_state(other, before, rtol=0, atol=0)
    assert other.training
    assert all(parameter.requires_grad for parameter in other.parameters())
    assert not any(module.training for module in average.module.modules())
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert not {p.data_ptr() for p in average.module.parameters()} & {p.data_ptr() for p in other.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("averaged_layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("model_layout", [torch.channels_last, torch.contiguous_format])
def test_layouts_and_dtypes_are_kept(dtype, averaged_layout, model_layout):
    first = batch_norm_net().to(dtype=dtype, memory_format=averaged_layout)
    second = moved(first, 1).to(memory_format=model_layout)
    average = GatedAverage(first, decay=0.75, threshold=0.3)
    for model in (first, second):
        average.update(model, PASSING)
    for name, value in average.module.state_dict().items():
        a, b = first.state_dict()[name], second.state_dict()[name]
        assert (value.dtype, value.stride()) == (a.dtype, a.stride())
        if value.is_floating_point():
            expected = (0.75 * a.double() + 0.25 * b.double()).to(value.dtype)
            torch.testing.assert_close(value, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_tied_weights_move_once():
    first, second = Tied(), Tied()
    average = GatedAverage(first, decay=0.88, threshold=0.3)
    for model in (first, second):
        average.update(model, PASSING)
    assert average.module.first.weight is average.module.second.weight
    torch.testing.assert_close(average.module.first.weight, 0.88 * first.first.weight + 0.12 * second.first.weight)


def test_entries_that_agree_stay_exact():
    model = nn.Linear(100, 100)
    model.register_buffer("table", torch.arange(1000))
    average = GatedAverage(model, decay=0.3, threshold=0.3)
    for _ in range(3):
        average.update(model, PASSING)
    assert_same_state(average.module, model.state_dict(), rtol=0, atol=0)


def test_large_counts_are_averaged_exactly_and_truncated():
    model = nn.BatchNorm1d(2)
    average = GatedAverage(model, decay=0.5, threshold=0.3)
    for count in (100_000_001, 100_000_004):
        model.num_batches_tracked.fill_(count)
        average.update(model, PASSING)
    assert average.module.num_batches_tracked.dtype == torch.long
    assert average.module.num_batches_tracked == 100_000_002
