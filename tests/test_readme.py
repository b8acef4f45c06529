"""Commands and code in the documents work: paths exist, commands parse, Python runs."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import runpy
import shlex
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

import ham_hf.commands
from ham_hf.__main__ import main as ham_hf_command
from ham_hf.config import load_train_config
from tests.support.exports import export, preprocessing, trained

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "recipes/README.md", *DOCS)
SHELL = ("bash", "sh", "shell")
SEPARATORS = {"&&", "||", ";", "|", "&"}


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block: its language, its code, and where it starts."""

    language: str
    code: str
    place: str


def code_blocks(document: str) -> list[CodeBlock]:
    fence = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text, blocks = (ROOT / document).read_text(), []
    for match in fence.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        blocks.append(CodeBlock(match[1], match[2], f"{document}:{line}"))
    return blocks


def commands(block: CodeBlock) -> Iterator[list[str]]:
    """Each command of a shell block as its words; chained commands come one by one."""
    for line in block.code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in SEPARATORS:
                words.append(word)
            elif words:
                yield words
                words = []


BLOCKS = [block for document in DOCUMENTS for block in code_blocks(document)]
COMMANDS = [(block.place, words) for block in BLOCKS if block.language in SHELL for words in commands(block)]
RECIPE_COMMANDS = [
    pytest.param(word, words[index + 1 :], id=f"{place} {word}")
    for place, words in COMMANDS
    for index, word in enumerate(words)
    if re.fullmatch(r"recipes/\w+\.py", word)
]
INSTALLED_COMMANDS = [
    pytest.param(" ".join(words[:2]), words[2:], id=f"{place} {' '.join(words[:2])}")
    for place, words in COMMANDS
    if words[0] == "ham-hf"
]
LAUNCHES = [
    pytest.param(words[words.index("launch") + 1 :], id=place) for place, words in COMMANDS if "launch" in words
]
PYTHON_BLOCKS = [pytest.param(block, id=block.place) for block in BLOCKS if block.language == "python"]


def run_recipe(script: str, *arguments: str) -> str:
    """Standard output of a script, or of ``ham-hf NAME``, run in this process from the root of the repository."""
    status: object = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [*script.split(), *arguments])
        patch.setenv("HF_HUB_OFFLINE", "1")
        try:
            if script.startswith("ham-hf "):
                ham_hf_command()
            else:
                runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    assert status in (0, None), f"{script} {shlex.join(arguments)} stopped with {status!r}"
    return output.getvalue()


@functools.cache
def flags_of(script: str) -> frozenset[str]:
    """Every flag in the ``--help`` of a script, or of ``ham-hf NAME``."""
    return frozenset(re.findall(r"--\w+", run_recipe(script, "--help", "all")))


def test_first_screen_has_the_commands_that_ci_runs() -> None:
    wanted = re.findall(r"readme_command '([^']+)'", (ROOT / ".ci/run").read_text())
    assert len(wanted) == 2
    first = next(block for block in code_blocks("README.md") if block.language in SHELL)
    for pattern in wanted:
        assert re.search(pattern, first.code, re.MULTILINE), f"no line of README.md's first block matches {pattern}"


@pytest.mark.parametrize(("script", "arguments"), RECIPE_COMMANDS + INSTALLED_COMMANDS)
def test_recipe_command_parses(script: str, arguments: list[str]) -> None:
    if "--print_config" in flags_of(script):
        assert isinstance(yaml.safe_load(run_recipe(script, *arguments, "--print_config")), dict)
    else:
        given = {word.split("=")[0] for word in arguments if word.startswith("--")}
        assert given <= flags_of(script)


def test_commands_of_the_installed_package_are_read_from_the_documents() -> None:
    assert "ham-hf push" in [command.values[0] for command in INSTALLED_COMMANDS]
    named = {name for document in DOCUMENTS for name in re.findall(r"`ham-hf (\w+)", (ROOT / document).read_text())}
    assert {"train", "page", "recipes"} <= named <= set(ham_hf.commands.COMMANDS)


@pytest.mark.parametrize("words", LAUNCHES)
def test_launcher_takes_its_flags(words: list[str]) -> None:
    launch = launch_command_parser().parse_args(words)
    assert (ROOT / launch.training_script).is_file()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)\s#]+)", text)
    missing = [link for link in links if not ((ROOT / document).parent / link).exists()]
    named = re.findall(r"(?<![\w./<>-])(?:recipes|ham_hf|tests|model_cards)/[\w./-]+\.(?:py|yaml|md)\b", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the main command has "run": a model of one step where the recipe puts it."""
    folder = tmp_path_factory.mktemp("run")
    config = load_train_config(ROOT / "recipes/digits/ham.yaml")
    settings = preprocessing(8, 1)
    backbone = trained(config.model.model_name, 8, **config.model.model_args)
    digits = [str(digit) for digit in range(10)]
    export(backbone, folder / config.training.output_dir, settings, class_names=digits)
    return folder


def test_readme_shows_how_to_load_a_model() -> None:
    assert "timm.create_model(" in next(block.code for block in code_blocks("README.md") if block.language == "python")


@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_python_block_runs_after_the_main_command(block, digits_run, monkeypatch):
    monkeypatch.chdir(digits_run)
    monkeypatch.setattr(socket, "socket", None)  # nothing is fetched
    exec(compile(block.code, block.place, "exec"), {"__name__": "__main__"})


def test_readme_can_be_read_with_a_coffee() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1300


def test_make_faults_runs_every_file_of_the_fault_table() -> None:
    table = (ROOT / "docs/unattended.md").read_text().partition("## Faults")[2].partition("\n## ")[0]
    files = set(re.findall(r"\btests/[\w/]+\.py", table))
    assert len(files) > 20
    assert [file for file in sorted(files) if "pytest.mark.faults" not in (ROOT / file).read_text()] == []
