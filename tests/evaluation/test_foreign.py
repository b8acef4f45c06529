"""Attacks of other libraries through the adapter: what counts, what is refused, and what is left as it was."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import ham_hf
from ham_hf.attacks import Attack, ThreatModel
from ham_hf.evaluation import Workplace, evaluate, standard_attacks
from ham_hf.evaluation.foreign import ForeignAttackError, foreign_attack, load_foreign_attack, load_foreign_attacks
from tests.conftest import ROOT
from tests.support.nets import TensorImages, Watched, batch_norm_net, group_norm_net, labeled_for
from tests.support.tables import cases

EPSILON = 0.05


def sign_step(model, x, y, epsilon=EPSILON):
    """One step of the sign of the gradient, by ``backward()``, which fills gradients of parameters too."""
    x = x.clone().requires_grad_(True)
    F.cross_entropy(model(x), y, reduction="sum").backward()
    return (x + epsilon * x.grad.sign()).clamp(0, 1).detach()


def l2_step(model, x, y):
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return (x + 0.5 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)


def split(net, num=30):
    x = torch.rand(num, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return TensorImages(x, labeled_for(net, x, [i % 6 == 0 for i in range(num)]))


def run(net, images, attacks, *, threat=None, folder=None, seed=2):
    threat_model = threat or ThreatModel("linf", EPSILON)
    place = Workplace(accelerator=Accelerator(cpu=True), batch_size=8, seed=seed, output_dir=folder)
    return evaluate(net, images, [replace(attack, threat_model=threat_model) for attack in attacks], place)


@pytest.mark.parametrize(("norm", "function"), [("linf", sign_step), ("l2", l2_step)])
def test_flags_are_those_of_the_attack_run_by_hand(norm, function):
    net = group_norm_net().float()
    images = split(net)
    threat = ThreatModel(norm, EPSILON if norm == "linf" else 0.5)
    found = run(net, images, [foreign_attack("mine", function)], threat=threat)
    assert list(found) == ["clean", "mine"]
    with torch.no_grad():
        clean = net(images.x).argmax(1) == images.labels
    x_adv = function(net, images.x, images.labels)
    with torch.no_grad():
        attacked = net(x_adv).argmax(1) == images.labels
    assert torch.equal(found["clean"].flags, clean)
    assert torch.equal(found["mine"].flags, clean & attacked)
    assert 0 < found["mine"].flags.sum() < clean.sum()
    settings = found["mine"].settings
    assert settings["norm"] == norm
    assert settings["epsilon"] == pytest.approx(threat.epsilon)
    assert settings["function"].endswith(f"test_foreign:{function.__name__}")
    assert len(settings["sha256"]) == 64


def test_model_gradients_and_random_states_are_left_as_they_were():
    net = batch_norm_net().float().train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[6].weight.grad = torch.ones_like(net[6].weight)
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    seen = []

    def rude(model, x, y):
        seen.append((model.training, all(not module.training for module in model.modules())))
        random.random()
        np.random.rand()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        found = sign_step(model, x, y)
        return (found + 1e-7 * torch.randn_like(found)).clamp(0, 1)

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    results = run(net, split(batch_norm_net().float()), [foreign_attack("rude", rude)])
    assert seen
    assert all(mode == (False, True) for mode in seen)
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == [False, *[True] * 6]
    assert torch.equal(net[6].weight.grad, torch.ones_like(net[6].weight))
    assert [name for name, parameter in net.named_parameters() if parameter.grad is not None] == ["6.weight"]
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert results["rude"].flags.any()


def test_random_attack_is_the_same_again_and_another_with_another_seed():
    net = group_norm_net().float()
    images = split(net, 64)

    def noise(model, x, y):
        signs = torch.randn_like(x).sign() * torch.tensor(np.random.rand(len(x), 1, 1, 1), dtype=x.dtype)
        return (x + EPSILON * signs * (0.5 + random.random() / 2)).clamp(0, 1)

    first, again, other = (
        run(net, images, [foreign_attack("n", noise)], seed=seed)["n"].margins for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def outside_box(model, x, y):
    return x + EPSILON * torch.where(x > 0.5, 1, -1) * 1.0


def nan(model, x, y):
    x = x.clone()
    x[0, 0, 0, 0] = torch.nan
    return x


BAD = {
    "too far": (lambda model, x, y: (x + 0.2).clamp(0, 1), r"6 of 6 .* outside the linf ball of radius 0.05 \(12.75/"),
    "outside": (outside_box, r"\d of 6 attacked images have pixels outside \[0, 1\], the largest distance is 0\.0\d+"),
    "nan": (nan, "1 of 6 attacked images hold pixels that are not finite"),
    "shape": (lambda model, x, y: x[:, :1], r"floating-point tensor \(6, 3, 6, 6\), got torch.float32 \(6, 1, 6, 6\)"),
    "bytes": (lambda model, x, y: (x * 255).byte(), "got torch.uint8"),
    "nothing": (lambda model, x, y: None, "got NoneType"),
    "a tuple": (lambda model, x, y: (x, x), "got tuple"),
}


@pytest.mark.parametrize("kind", BAD)
def test_results_that_are_no_attack_are_refused_with_their_number(kind):
    function, message = BAD[kind]
    net = group_norm_net().float()
    x = torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = net(x).argmax(1)
    with pytest.raises(ForeignAttackError, match=f"foreign attack bad .*{message}"):
        run(net, TensorImages(x, y), [foreign_attack("bad", function)])


def test_largest_distance_is_named_and_rounding_is_forgiven():
    net, x = group_norm_net().float(), torch.full((4, 3, 6, 6), 0.5)
    y = torch.zeros(4, dtype=torch.long)
    threat = ThreatModel("linf", EPSILON)

    def far(model, x, y):
        return x + torch.tensor([0.01, 0.06, 0.05, 0.25]).view(-1, 1, 1, 1)

    with pytest.raises(ForeignAttackError, match=r"2 of 4 .*the largest distance is 0\.25; give it the radius"):
        replace(foreign_attack("far", far), threat_model=threat).perturb(net, x, y, seed=0)
    nearly = foreign_attack("nearly", lambda model, x, y: x + EPSILON + 5e-6)
    found = replace(nearly, threat_model=threat).perturb(net, x, y, seed=0)
    assert torch.equal(found, threat.project(x + EPSILON + 5e-6, x))
    assert (found - x).abs().max() <= EPSILON + 1e-7


def test_attack_that_changes_the_model_is_refused_and_buffers_are_restored():
    net = batch_norm_net().float()
    state = {name: value.clone() for name, value in net.state_dict().items()}

    def trains(model, x, y):
        model.train()
        model(x)
        return x

    with pytest.raises(ForeignAttackError, match=r"changed the model \(model.1.running_mean"):
        run(net, split(batch_norm_net().float()), [foreign_attack("trains", trains)])
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())

    def tunes(model, x, y):
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        return x

    with pytest.raises(ForeignAttackError, match=r"changed the model \(.*0.weight"):
        run(net, split(batch_norm_net().float()), [foreign_attack("tunes", tunes)])


def test_out_of_memory_halves_the_batch_and_finished_batches_are_kept(tmp_path):
    net = group_norm_net().float()
    images, calls = split(net), []

    def counted(model, x, y):
        calls.append(len(x))
        return sign_step(model, x, y)

    attack = foreign_attack("mine", counted)
    expected = run(net, images, [attack])["mine"]
    found = run(Watched(net, limit=3, limit_always=3), images, [attack])["mine"]
    assert torch.equal(found.predictions, expected.predictions)
    calls.clear()
    run(net, images, [attack], folder=tmp_path)
    first = len(calls)
    again = run(net, images, [attack], folder=tmp_path)["mine"]
    assert len(calls) == first > 0
    assert torch.equal(again.margins, expected.margins)


def test_loaded_from_a_file_or_an_installed_package(tmp_path, monkeypatch):
    file = tmp_path / "my attack.py"
    file.write_text("class Attacks:\n    @staticmethod\n    def none(model, x, y):\n        return x\n")
    found = load_foreign_attack(f"{file}:Attacks.none")
    assert (found.name, found.source) == ("my_attack.Attacks.none", f"{file}:Attacks.none")
    x = torch.rand(2, 3, 4, 4)
    assert found.function(None, x, None) is x
    digest = found.sha256
    file.write_text(file.read_text() + "# changed\n")
    assert load_foreign_attack(f"{file}:Attacks.none").sha256 != digest
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").touch()
    (tmp_path / "a_package" / "attacks.py").write_text("def strong(model, x, y):\n    return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_foreign_attack("a_package.attacks:strong").name == "attacks.strong"


@pytest.mark.parametrize(("place", "message"), cases(__file__, "bad_attack_places.yaml"))
def test_places_that_hold_no_attack(place, message):
    with pytest.raises(ValueError, match=message):
        load_foreign_attack(place)


def test_two_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text("def attack(model, x, y):\n    return x\n")
    places = [f"{tmp_path / folder / 'mine.py'}:attack" for folder in ("a", "b")]
    assert [attack.name for attack in load_foreign_attacks(places[:1])] == ["mine.attack"]
    with pytest.raises(ValueError, match=r"two are called mine.attack; rename a function"):
        load_foreign_attacks(places)


def test_file_that_is_not_python_is_refused(tmp_path):
    (tmp_path / "broken.py").write_text("def attack(model, x, y)\n")
    with pytest.raises(ValueError, match=r"cannot be imported \(SyntaxError"):
        load_foreign_attack(f"{tmp_path / 'broken.py'}:attack")


@pytest.mark.parametrize("name", ["clean", "verdict", "autoattack", "", "a b", "-x", "x/y", "é", "x" * 62])
def test_names_that_an_attack_cannot_have(name):
    with pytest.raises(ValueError, match="expected a name of letters"):
        foreign_attack(name, sign_step)


def test_python_interface_counts_functions_in_the_verdict():
    net = group_norm_net().float()
    images = split(net)
    loader = DataLoader(TensorDataset(images.x, images.labels), batch_size=8)
    options = {"threat_model": ThreatModel("linf", EPSILON), "num_steps": 2}
    report = ham_hf.evaluate(net, loader, attacks={"signs": sign_step}, **options)
    assert list(report.attacks) == ["pgd-2", "cw-2", "signs"]
    rights = [report.verdicts.right(name) for name in report.attacks]
    assert torch.equal(report.verdicts.withstood, torch.stack(rights).all(0))
    assert "signs" in str(report)
    alone = ham_hf.evaluate(net, loader, attacks=[foreign_attack("signs", sign_step)], **options)
    assert list(alone.attacks) == ["signs"]
    assert torch.equal(alone.verdicts.withstood, alone.verdicts.right("signs"))
    with torch.inference_mode():
        again = ham_hf.evaluate(net, loader, attacks={"signs": sign_step}, **options)
    assert torch.equal(again.verdicts.withstood, report.verdicts.withstood)
    with pytest.raises(ValueError, match="outside the linf ball"):
        ham_hf.evaluate(net, loader, attacks={"far": lambda model, x, y: (x + 0.3).clamp(0, 1)}, **options)
    with pytest.raises(ValueError, match="two attacks are called pgd-2"):
        ham_hf.evaluate(net, loader, attacks={"pgd-2": sign_step}, **options)


@pytest.mark.parametrize(
    ("package", "name"),
    [("torchattacks", "torchattacks_pgd"), ("foolbox", "foolbox_pgd"), ("adv_lib.attacks", "adv_lib_apgd")],
)
def test_attacks_of_other_libraries_count_like_ours(package, name, monkeypatch):
    """The example of the documentation; needs the library, which is in no extra of ours."""
    pytest.importorskip(package, reason=f"{package.split('.')[0]} is not installed")
    attack = load_foreign_attack(f"{ROOT / 'docs/examples/foreign_attacks.py'}:{name}")
    assert attack.name == f"foreign_attacks.{name}"
    monkeypatch.setitem(attack.function.__globals__, "EPSILON", EPSILON)
    net = group_norm_net().float()
    images = split(net, 60)
    ours = Attack(threat_model=ThreatModel("linf", EPSILON), num_steps=20, step_size=EPSILON / 4)
    found = run(net, images, [*standard_attacks(ours), attack])
    ours, theirs = found["pgd-20"], found[attack.name]
    assert theirs.flags.sum() < found["clean"].flags.sum()
    assert abs(int(theirs.flags.sum()) - int(ours.flags.sum())) <= 6
    assert all(weight.requires_grad and weight.grad is None for weight in net.parameters())
    monkeypatch.setitem(attack.function.__globals__, "EPSILON", 2 * EPSILON)
    with pytest.raises(ForeignAttackError, match=r"outside the linf ball of radius 0\.05"):
        run(net, images, [attack])
