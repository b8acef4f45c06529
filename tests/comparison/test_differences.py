"""In what two runs differ, and which differences forbid to compare them."""

from __future__ import annotations

import dataclasses

import pytest

from ham_hf.comparison.differences import run_settings
from ham_hf.comparison.table import compare
from tests.support.comparison_reports import by_seeds
from tests.support.documents import changed


def test_batch_size_and_accumulation_count_by_their_product():
    ours = {"method": "ham", "per_device_train_batch_size": 64, "ddp_timeout": 1800}
    assert run_settings(ours) == run_settings(
        {"method": "ham", "per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "ddp_timeout": 60}
    )
    assert run_settings(ours) != run_settings(ours | {"gradient_accumulation_steps": 2})
    assert run_settings(ours) != run_settings(ours | {"per_device_train_batch_size": 32})


def test_averaged_weights_are_another_budget():
    """CFA averages by itself: no setting differs, and yet its row is of other weights."""
    rows = [
        *by_seeds("one", [5] * 3, fawa="auto"),
        *by_seeds("cfa", [5] * 3, method="cfa", fawa="auto", fawa_decay=0.85),
        *by_seeds("ema", [5] * 3, fawa="auto", ema_decay=0.99),
    ]
    assert compare(rows).unequal["Weight averaging"] == {
        "none": ("one",),
        "fairness-gated per epoch, decay 0.85": ("cfa",),
        "per update, decay 0.99": ("ema",),
    }
    history = [{**record, "averaged": False} for record in rows[1].report.training.history]
    never = changed(rows[1], training={"history": history})
    found = compare([rows[0], never]).unequal["Weight averaging"]
    assert found == {"none": ("one",), "none (no epoch passed the gate)": ("cfa",)}


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("dataset", {"name": "other", "hub_id": "me/other"}),
        ("dataset", {"test_split_origin": "test"}),
        ("threat_model", {"epsilon": 0.1}),
    ],
)
def test_different_evaluations_have_no_rho_and_no_bold(part, changes):
    base, own = by_seeds("base", [5] * 3, [5] * 3), by_seeds("own", [19] * 3, [19] * 3)
    assert compare([*base, *own], baseline="base").best("pgd-20", "average") == "own"
    comparison = compare([*base, *(changed(one, **{part: changes}) for one in own)], baseline="base")
    assert comparison.best("pgd-20", "average") is None
    assert [row.attacks["pgd-20"].rho for row in comparison.rows] == [0, None]
    assert all(comparison.unlike(name) == ["own"] for name in comparison.attacks)


def test_only_the_attack_with_other_settings_is_not_compared():
    base, own = by_seeds("base", [5] * 3, [5] * 3), by_seeds("own", [19] * 3, [19] * 3)
    attack = dataclasses.replace(own[0].report.results["pgd-20"], settings={"num_steps": 3, "seed": 7})
    results = {**own[0].report.results, "pgd-20": attack}
    own[0] = dataclasses.replace(own[0], report=dataclasses.replace(own[0].report, results=results))
    comparison = compare([*base, *own], baseline="base")
    assert {name: comparison.unlike(name) for name in comparison.attacks} == {"clean": [], "pgd-20": ["own"]}
    assert comparison.rows[1].attacks["clean"].rho == 0
