"""The wheel holds all that the package needs and nothing else, and the repository's files are fit for strangers."""

from __future__ import annotations

import re
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from ham_hf.reporting.report import write_report
from tests.support.example_report import make_report
from tests.support.recipe_runs import finish

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = "ham_hf/templates/robust_classifier.md"

# Runs under -I (no PYTHONPATH, no current folder) and drops the checkout that an editable install puts on the path.
INSTALLED = """
import sys
from pathlib import Path

site, checkout, *words = sys.argv[1:]
sys.path[:] = [site, *(entry for entry in sys.path if Path(entry).resolve() != Path(checkout))]
"""
RENDER_CARD = f"""{INSTALLED}
import ham_hf
from ham_hf.reporting.card import write_card
from ham_hf.reporting.report import read_report

write_card(read_report(words[0]), words[1], repo_id="me/robust-digits", model_license="apache-2.0")
sys.stdout.write(ham_hf.__file__)
"""
RUN_COMMAND = f"""{INSTALLED}
from ham_hf.__main__ import main

main(words)
"""

MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|mnt|scratch|work)/")
REGISTRY_SETTING = re.compile(r"(?i)index[-_]url|find[-_]links|trusted[-_]host|pypi\.org/simple")


def run(*command: str | Path, cwd: Path) -> str:
    return finish([*map(str, command)], None, cwd=cwd).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """A folder with the installed wheel."""
    folder = wheel.parent / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=wheel.parent)
    return folder


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def repository_files() -> dict[str, str]:
    """Text of every file that is tracked or would be, by its path."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    texts = {}
    for name in filter(None, listed.split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in content:
            texts[name] = content.decode()
    return texts


def test_wheel_has_the_whole_package_and_only_that(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        package = {name for name in names if name.startswith("ham_hf/")}
        (license_name,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(license_name) == (ROOT / "LICENSE").read_bytes()
        assert archive.read(TEMPLATE) == (ROOT / "model_cards/robust_classifier.md").read_bytes()
    files = ("py", "typed", "bib", "css", "js", "jinja", "npz", "md", "yaml")
    sources = {path.relative_to(ROOT).as_posix() for end in files for path in (ROOT / "ham_hf").rglob(f"*.{end}")}
    recipes = {f"ham_hf/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").glob("*/*.yaml")}
    assert package == sources | recipes | {"ham_hf/recipes/accelerate/slurm.sh", TEMPLATE}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ham_hf"}


def test_metadata(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0 AND CC-BY-4.0"
    assert metadata.get_all("License-File") == ["LICENSE", "ham_hf/data/digits.LICENSE.md"]
    assert metadata["Requires-Python"] == ">=3.10"
    requirements = metadata.get_all("Requires-Dist")
    assert requirements
    assert not [line for line in requirements if "@" in line or "==" in line.split(";")[0]], "ranges, no URLs, no pins"


def test_one_version_everywhere(metadata: Message) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    releases = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation["version"] == metadata["Version"] == releases[0]
    assert citation["preferred-citation"]["title"].startswith("Hard Adversarial Example Mining")


@pytest.mark.slow
def test_installed_wheel_renders_a_card_without_the_checkout(site: Path, tmp_path: Path) -> None:
    mark = "<!-- this line is in the installed template alone -->"
    template = site / TEMPLATE
    template.write_text(f"{template.read_text()}\n{mark}\n")
    report = write_report(make_report(), tmp_path)

    imported = run(sys.executable, "-I", "-c", RENDER_CARD, site, ROOT, report, tmp_path, cwd=tmp_path)

    assert Path(imported).is_relative_to(site)
    card = (tmp_path / "README.md").read_text()
    assert mark in card
    assert "library_name: timm" in card
    assert "hf-hub:me/robust-digits" in card


@pytest.mark.slow
def test_installed_wheel_finds_its_recipes_without_the_checkout(site: Path, tmp_path: Path, wheel: Path) -> None:
    run_installed = [sys.executable, "-I", "-c", RUN_COMMAND, site, ROOT]
    listed = run(*run_installed, "recipes", cwd=tmp_path)
    assert listed.startswith(f"in {site / 'ham_hf/recipes'}\n")
    assert "  cifar10/preactresnet18_ham " in listed
    words = ("train", "--config", "cifar10/preactresnet18_ham", "--print_config")
    assert "preactresnet18_cifar" in run(*run_installed, *words, cwd=tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        (scripts,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert "ham-hf = ham_hf.__main__:main" in archive.read(scripts).decode()


def test_library_names_no_device() -> None:
    library = {name: text for name, text in repository_files().items() if re.match(r"ham_hf/.*\.py$", name)}
    assert library
    assert [name for name, text in library.items() if ".cuda(" in text] == []


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_SETTING], ids=["path of a machine", "registry setting"])
def test_files_hold_nothing_of_one_machine(pattern: re.Pattern[str]) -> None:
    texts = repository_files()
    assert "pyproject.toml" in texts
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []
