"""What the documents tell a reader to type works: paths exist, commands parse, Python compiles, models load."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ham_hf.export import export_for_timm
from ham_hf.models import Preprocessing, create_backbone

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "recipes/README.md")
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
    text = (ROOT / document).read_text()
    return [
        CodeBlock(match[1], match[2], f"{document}:{text.count(chr(10), 0, match.start()) + 1}")
        for match in fence.finditer(text)
    ]


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
PYTHON = [pytest.param(block.code, id=block.place) for block in BLOCKS if block.language == "python"] + [
    pytest.param(words[words.index("-c") + 1], id=f"{place} python -c")
    for place, words in COMMANDS
    if words[0] in ("python", "python3") and "-c" in words
]


def run_recipe(script: str, *arguments: str) -> str:
    """Standard output of ``python SCRIPT ARGUMENTS``, run in this process from the root of the repository."""
    status: object = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setenv("HF_HUB_OFFLINE", "1")
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    assert status in (0, None), f"{script} {shlex.join(arguments)} stopped with {status!r}"
    return output.getvalue()


@functools.cache
def flags_of(script: str) -> frozenset[str]:
    """Every flag in the recipe's ``--help``."""
    return frozenset(re.findall(r"--\w+", run_recipe(script, "--help")))


def test_first_screen_has_the_commands_that_ci_runs() -> None:
    wanted = re.findall(r"readme_command '([^']+)'", (ROOT / ".ci/run").read_text())
    assert len(wanted) == 2
    first = next(block for block in code_blocks("README.md") if block.language in SHELL)
    for pattern in wanted:
        assert re.search(pattern, first.code, re.MULTILINE), f"no line of README.md's first block matches {pattern}"


@pytest.mark.parametrize(("script", "arguments"), RECIPE_COMMANDS)
def test_recipe_command_parses(script: str, arguments: list[str]) -> None:
    if "--print_config" in flags_of(script):
        assert isinstance(yaml.safe_load(run_recipe(script, *arguments, "--print_config")), dict)
    else:
        given = {word.split("=")[0] for word in arguments if word.startswith("--")}
        assert given <= flags_of(script)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)\s#]+)", text)
    missing = [link for link in links if not ((ROOT / document).parent / link).exists()]
    named = re.findall(r"(?<![\w./<>-])(?:recipes|ham_hf|tests|model_cards)/[\w./-]+\.(?:py|yaml|md)\b", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("code", PYTHON)
def test_python_compiles(code: str) -> None:
    compile(code, "<document>", "exec")


def test_first_loading_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as it stands, but on a model that was exported here and on images that exist."""
    block = next(block for block in code_blocks("README.md") if block.language == "python" and "timm." in block.code)
    code = re.sub(r"hf-hub:[\w.-]+/[\w.-]+", f"local-dir:{tmp_path / 'export'}", block.code)
    assert code != block.code
    preprocessing = Preprocessing(
        image_size=32, in_chans=3, interpolation="bicubic", crop_pct=1.0, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    export_for_timm(
        create_backbone("test_resnet", pretrained=False, num_classes=10, preprocessing=preprocessing, model_args={}),
        tmp_path / "export",
        preprocessing=preprocessing,
        class_names=[f"class {index}" for index in range(10)],
        metadata={},
        model_license="apache-2.0",
        tag="readme",
    )
    for name in re.findall(r"""["']([\w-]+\.(?:png|jpe?g))["']""", code):
        Image.new("RGB", (40, 48), "teal").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, block.place, "exec"), {"__name__": "__main__"})
