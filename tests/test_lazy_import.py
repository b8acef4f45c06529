"""`import ham_hf` is light, offers its names when used, and registers our networks in any order of imports."""

from __future__ import annotations

import sys

import pytest

import ham_hf
from ham_hf.imports import _AfterTimm, register_networks
from tests.conftest import ROOT
from tests.support.recipe_runs import finish

HEAVY = ("torch", "timm", "numpy", "pyarrow", "accelerate", "datasets", "matplotlib", "huggingface_hub", "sklearn")
MAKE = "timm.create_model('preactresnet18_cifar')"
# What a user types before anything is to be computed, right or wrong.
WORDS = """
--help|--version|trian|recipes|compare --help|train --help|evaluate --help|evaluate --help all|evaluate m --nope 1
evaluate m --dataset_name digits --print_config|evaluate m --dataset_name digits --epsilon 0|calibrate --help
calibrate m --fairness 2|push --help|push --nope|page --help|page|page a --nope|page a b|page a --output /
page a --output /none/a.html|compare|compare --only ham|compare a
compare --config digits/compare a|compare --config digits/compare --jobs 0|compare a --output_dir b --dry_run
compare a --output_dir b --seeds 0|compare a --output_dir b --jobs 2|compare a --output_dir b --launch_args=--cpu
"""


def python(code: str) -> str:
    return finish([sys.executable, "-c", code], None, cwd=ROOT).stdout.strip()


AFTER = (
    "import sys, contextlib, io, ham_hf\nfrom ham_hf.__main__ import main\n"
    "assert not {heavy} & sys.modules.keys(), 'import ham_hf'\n"
    "for line in {lines}:\n"
    "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
    "        with contextlib.suppress(SystemExit):\n            main(line.split())\n"
    "    assert not {heavy} & sys.modules.keys(), line\n"
    "print(ham_hf.__version__)"
)


def test_help_and_wrong_flags_import_nothing_heavy() -> None:
    lines = [line for group in WORDS.split("\n") for line in group.split("|") if line]
    assert len(lines) > 15
    assert python(AFTER.format(heavy=set(HEAVY), lines=lines)) == ham_hf.__version__


@pytest.mark.slow
def test_a_wrong_flag_of_training_imports_torch_alone() -> None:
    """Methods, whose options it has to know, need torch."""
    lines = ["train --nope 1", "train --help all", "train --help ham", "train --print_config", "train --epsilon 0"]
    heavy = set(HEAVY) - {"torch", "numpy"}
    assert python(AFTER.format(heavy=heavy, lines=lines)) == ham_hf.__version__


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        f"import ham_hf; import timm; {MAKE}",
        f"import timm; import ham_hf; {MAKE}",
        "import ham_hf, importlib.util; importlib.reload(ham_hf); assert importlib.util.find_spec('timm'); "
        f"from timm.models import create_model; import timm; importlib.reload(timm); {MAKE}",
        f"import ham_hf.models.cifar_nets; import timm; {MAKE}",
    ],
    ids=["ours first", "timm first", "reloaded and looked for", "our module first"],
)
def test_our_networks_are_registered_in_any_order(code: str) -> None:
    check = "import sys; assert 'RegisteringLoader' not in repr((timm.__loader__, timm.__spec__.loader))"
    assert python(f"{code}; {check}; print('made')") == "made"


@pytest.mark.slow
def test_a_spawned_process_unpickles_one_of_our_networks() -> None:
    code = (
        "import ham_hf, timm, pickle, subprocess, sys\n"
        "data = pickle.dumps(timm.create_model('resnet18_cifar', layers=(1, 1, 1, 1), channels=(8, 8, 8, 8)))\n"
        "child = 'import pickle, sys; print(type(pickle.load(sys.stdin.buffer)).__name__)'\n"
        "print(subprocess.run([sys.executable, '-c', child], input=data, capture_output=True).stdout.decode())\n"
    )
    assert python(code) == "CifarResNet"


def test_without_timm_the_import_fails_as_it_would() -> None:
    code = (
        "import ham_hf, sys\n"
        "sys.path[:] = [place for place in sys.path if 'site-packages' not in place]\n"
        "try:\n    import timm\nexcept ModuleNotFoundError as error:\n    print(error)\n"
    )
    assert python(code) == "No module named 'timm'"


def test_every_name_is_offered_and_none_is_a_module_of_the_package() -> None:
    for name in ham_hf.__all__:
        assert getattr(ham_hf, name) is not None
        assert name in dir(ham_hf)
        assert not (ROOT / "ham_hf" / name).exists()
        assert not (ROOT / "ham_hf" / f"{name}.py").exists()
    with pytest.raises(AttributeError, match="no attribute 'adversarial_los'"):
        _ = ham_hf.adversarial_los


def test_registering_again_adds_no_second_finder() -> None:
    before = sum(isinstance(finder, _AfterTimm) for finder in sys.meta_path)
    register_networks()
    assert sum(isinstance(finder, _AfterTimm) for finder in sys.meta_path) == before <= 1
