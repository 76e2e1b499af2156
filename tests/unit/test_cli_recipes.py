"""psq recipes: what is listed is what the recipes are."""

import json

import pytest

from psq.config.options import run
from psq.parts import kinds
from psq.presets import PRESETS, preset
from psq.recipe import Recipe
from psq_worker.cli import psq

MAX_WIDTH = 100


@pytest.fixture
def recipes(capsys):
    """Run psq recipes in this process: (exit code, stdout, stderr)."""

    def calling(*words):
        with pytest.raises(SystemExit) as ended:
            run(psq, "psq", ["recipes", *words])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return calling


def test_every_recipe_is_listed_with_its_parts_its_source_and_its_trap(recipes):
    code, out, _ = recipes()
    assert code == 0
    text = " ".join(out.split())
    for name, known in PRESETS.items():
        recipe = preset(name)
        assert f" {name} " in f" {text}"
        assert f"{recipe.uplink.codec} " in text
        assert f"Trap: {known.trap}." in text
        assert known.source[1:] in text
    assert max(map(len, out.splitlines())) <= MAX_WIDTH
    line = next(line for line in out.splitlines() if line.startswith("server-adam "))
    assert line.split()[1:] == ["4.12", "3.03", "4", "16"]


def test_as_json_the_parts_are_those_of_the_plan(recipes):
    code, out, _ = recipes("--json")
    assert code == 0
    found = {each["name"]: each for each in json.loads(out)}
    assert list(found) == list(PRESETS)
    for name, each in found.items():
        assert Recipe.from_plain(each["parts"]) == preset(name)
        assert (each["source"], each["trap"]) == (PRESETS[name].source, PRESETS[name].trap)
        assert bool(each["fault"]) == (each["bits"] is None)
    assert found["server-adam"]["bits"] == {"up": 4.125, "down": 3.03125}
    assert found["server-adam"]["bytes"] == {"worker": 4.0, "server": 16.0}


def test_one_recipe_shows_every_option_and_what_may_stand_in_its_place(recipes):
    code, out, _ = recipes("dist-ef-sgdm")
    assert code == 0
    for words in ("--with direction.beta=0.9", "--with apply.momentum=0.0", "a number >= 0"):
        assert words in out
    text = " ".join(out.split())
    for kind in set(kinds("aggregate")) - {"mean"}:
        assert kind in text
    downlink = text[text.index("--with downlink.choice=KIND:") :]
    assert "periodic" in downlink
    assert "dq" not in downlink


def test_one_recipe_is_shown_as_its_options_make_it(recipes):
    code, out, _ = recipes("ef-sgd", "--with", "apply.momentum=0.9", "--json")
    assert code == 0
    assert json.loads(out)["parts"]["apply"]["options"]["momentum"] == 0.9
    assert json.loads(out)["bytes"]["server"] == 12.0
    _, shown, _ = recipes("ef-sgd", "--with", "apply.momentum=0.9")
    assert "--with apply.momentum=0.9" in shown


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["adamw"], 78, "no recipe 'adamw'; there are: server-adam"),
        (["ef-sgd", "--with", "apply.speed=1"], 78, "sgd has no option 'speed'; there are:"),
        (["--with", "apply.rate=1"], 64, "--with is for one recipe: name it"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(recipes, words, code, said):
    ended, out, err = recipes(*words)
    assert (ended, out) == (code, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_recipe_that_cannot_be_made_here_is_listed_with_the_reason(recipes, monkeypatch):
    monkeypatch.setattr("psq.presets.entry_names", lambda _: ("broken",))
    monkeypatch.setattr("psq.presets.entry", lambda *_: None)
    code, out, _ = recipes()
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("broken"))
    assert "no recipe 'broken'" in line
    _, out, _ = recipes("--json")
    assert "no recipe 'broken'" in json.loads(out)[-1]["fault"]
