"""DAFA: class weights, radii and losses against the authors' numbers; the published double step is left out."""

from __future__ import annotations

import pytest
import torch

from ham_hf.attacks import input_gradient
from ham_hf.methods import DAFA, PGDAT, Batch
from tests.support.golden_data import exact, golden_batch, golden_net, golden_noise, golden_tensors
from tests.support.method_checks import attack_of, initial_states, rows_of, update_loss

TENSORS, HYPER = golden_tensors("dafa")
WEIGHT = TENSORS[f"out/class_weights/{HYPER['loss_table']}/lambda{HYPER['loss_lambda']}"]


def weights_from(probabilities, labels, scale, num_classes):
    """The method's own way: logits in, observed in two batches, weights out."""
    dafa = DAFA(dafa_lambda=scale, dafa_start_epoch=3)
    state = dafa.rule.initial_state(torch.ones(num_classes, dtype=torch.float64))
    for rows in torch.arange(len(labels)).chunk(2):
        sums = dafa.rule.observe(probabilities[rows].log(), labels[rows], epoch=2)
        dafa.rule.after_update(state, sums, epoch=2)
    dafa.rule.before_epoch(state, epoch=3)
    return state["weight"]


@pytest.mark.parametrize("table", ["a", "b", "c", "net"])
@pytest.mark.parametrize("scale", HYPER["lambdas"])
def test_class_weights_are_the_authors_but_for_negative_ones(table, scale):
    probabilities, labels = TENSORS[f"in/probs_{table}"], TENSORS[f"in/labels_{table}"].long()
    expected = TENSORS[f"out/class_weights/{table}/lambda{scale}"]
    found = weights_from(probabilities, labels, scale, probabilities.shape[1])
    exact(found, expected.clamp(min=0))
    assert float(expected.sum()) == pytest.approx(len(expected))


def state_with(weight, method=DAFA()):  # noqa: B008 (frozen)
    states = initial_states(method)
    states["dafa"]["weight"] = weight
    return states


def test_radii_and_sums_of_probabilities_are_the_authors():
    dafa, states, (x, y) = DAFA(dafa_start_epoch=1), state_with(WEIGHT), golden_batch(HYPER["rows"])
    batch = dafa.with_class_radii(Batch(x=x, y=y, attack=attack_of(HYPER), epoch=1, states=states))
    exact(batch.attack.threat_model.epsilon, TENSORS["out/eps_per_example"], 1e-12)
    exact(batch.attack.step_size, TENSORS["out/step_per_example"], 1e-12)
    theirs = TENSORS["out/trades/memory_probs"]
    memory = dafa.rule.observe(theirs.log(), y, epoch=0)[:, :-1]
    exact(memory, torch.zeros(10, 10, dtype=torch.float64).index_add_(0, y, theirs))


def test_pgd_variant_differs_from_the_authors_by_their_second_unweighted_step_alone():
    dafa, states, net = DAFA(base_loss="pgd_at", dafa_start_epoch=1), state_with(WEIGHT), golden_net()
    x, y = golden_batch(HYPER["rows"])
    epsilon, step = HYPER["epsilon"], HYPER["step_size"]
    eps_c, step_c = (WEIGHT[y] * value for value in (epsilon, step))
    theirs = x + 0.001 * golden_noise("normal", HYPER["rows"])
    for _ in range(HYPER["num_steps"]):
        sign = input_gradient(net, theirs, y).sign()
        for size, radius in ((step_c.view(-1, 1, 1, 1), eps_c.view(-1, 1, 1, 1)), (step, epsilon)):
            theirs = (theirs + size * sign).clamp(x - radius, x + radius).clamp(0, 1)
    assert len(theirs) == len(y)
    batch = rows_of(dafa, net, x, y, attack=attack_of(HYPER), epoch=1, states=states, seed=0)
    ours_of_theirs = type(batch)(x=theirs, y=y, weight=batch.weight)
    loss, _ = update_loss(dafa, net, ours_of_theirs, epoch=1, states=states)
    exact(loss, TENSORS["out/pgd/loss"])
    # Ours stays in the class's own ball, theirs in the common one.
    largest = (batch.x - x).abs().flatten(1).amax(1)
    assert (largest <= eps_c + 1e-12).all()
    assert (largest > epsilon + 1e-6).any()
    assert ((theirs - x).abs() <= epsilon + 1e-12).all()


def test_only_the_epoch_before_the_weights_is_observed():
    dafa = DAFA(dafa_start_epoch=5)
    assert dafa.warmup_epochs == 5
    logits, y = torch.zeros(2, 10), torch.zeros(2, dtype=torch.long)
    observed = [dafa.rule.observe(logits, y, epoch=epoch) is not None for epoch in range(7)]
    assert observed == [epoch == 4 for epoch in range(7)]
    # Logits of an attack in half precision may overflow.
    assert dafa.rule.observe(logits.fill_(torch.inf), y, epoch=4).isfinite().all()


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_weights_sum_to_the_number_of_classes_and_a_missing_class_keeps_one(num_classes):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(400, num_classes), torch.randint(1, num_classes, (400,))
    weights = weights_from(logits.softmax(1), labels, 1.0, num_classes)
    assert torch.isfinite(weights).all()
    assert float(weights[0]) == 1
    assert float(weights.sum()) == pytest.approx(num_classes)


def test_pgd_at_with_dafa_is_dafa_on_pgd_at():
    weight = torch.linspace(0.5, 1.5, 10, dtype=torch.float64)
    combined = PGDAT(class_weighting="dafa", class_margin="dafa", class_rule_args={"dafa_start_epoch": 1})
    own = DAFA(base_loss="pgd_at", dafa_start_epoch=1)
    x, y = golden_batch(16)
    net, found = golden_net(), []
    for objective in (combined, own):
        states = state_with(weight, objective)
        batch = rows_of(objective, net, x, y, attack=attack_of(HYPER), epoch=1, states=states, seed=0)
        found.append((batch.x, *objective.weigh(batch, epoch=1, states=states)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
