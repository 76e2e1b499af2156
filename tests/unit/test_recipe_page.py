"""docs/recipes.md and docs/gan.md: what they say of recipes is what psq says, and what it takes."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from psq_worker.cli import psq

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs" / name for name in ("recipes.md", "gan.md")]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        yield importlib.import_module("recipe_page")


@pytest.fixture(scope="module")
def listed(script):
    return list(script.own())


def commands(page):
    """Every `psq launch` of a page's shell blocks that needs no other package."""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["psq", "launch"] and "fedgen" not in words and "..." not in words:
                yield pytest.param(words[1:], id=" ".join(words[2:])[:60])


def test_bits_state_traps_and_the_example_are_those_of_now(script, listed):
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.renewed(page, listed) == page, "run python bench/recipe_page.py"


def test_another_figure_would_be_put_right(script, listed):
    page = script.PAGE.read_text(encoding="utf-8")
    spoilt = page.replace("1.03 bits up", "1.04 bits up").replace("| 1.28 |", "| 1.27 |", 1)
    assert spoilt.count("1.04 bits up") > 3
    assert script.renewed(spoilt, listed) == page


def test_a_recipe_without_a_section_is_named(script, listed):
    page = script.PAGE.read_text(encoding="utf-8").replace("### `ef21`", "### EF21")
    with pytest.raises(ValueError, match="look at ef21"):
        script.renewed(page, listed)


@pytest.mark.parametrize("words", [each for page in PAGES for each in commands(page)])
def test_a_command_that_the_pages_show_is_one_that_psq_starts(words, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr("psq_worker.launch.run_launch", lambda *given, **_: started.append(given))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    result = CliRunner().invoke(psq, words)
    assert not result.exception, result.output or result.exception
    assert len(started) == 1


def test_links_of_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
