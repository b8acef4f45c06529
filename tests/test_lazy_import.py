"""`import ham_hf` is light, offers its names when used, and registers our networks in any order of imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ham_hf
from ham_hf.imports import _AfterTimm, register_networks

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "timm", "numpy", "accelerate", "datasets", "matplotlib", "huggingface_hub")
MAKE = "timm.create_model('preactresnet18_cifar')"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, ham_hf; print([name for name in {HEAVY} if name in sys.modules], ham_hf.__version__)"
    assert python(code).startswith("[] ")


@pytest.mark.parametrize("words", [["--help"], ["recipes"], ["compare", "--help"]], ids=" ".join)
def test_what_needs_no_network_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys, contextlib, io\nfrom ham_hf.__main__ import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    main({words})\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert python(code) == "[]"


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
