"""psq.parts: what there is, what another package brings, and what is said where nobody does."""

import importlib
import sys
from importlib.metadata import entry_points

import msgpack
import pytest

from psq.catalogue import CATALOGUE
from psq.errors import ConfigError, RemotePlanError
from psq.parts import GROUPS, Option, Part, kinds, load_rule, options, part, parts, register
from psq.plan import Plan
from psq.presets import find_preset, names, preset
from psq.recipe import AdamConfig, Aggregate, Named, Recipe
from psq.rules import make_aggregate
from psq.rules.base import AggregateRule

OWN = [(slot, each.kind) for slot, listed in CATALOGUE.items() for each in listed]

MODULE = '''
import numpy as np
from psq.parts import Option, Part
from psq.presets import Preset
from psq.recipe import Aggregate, Apply, Direction, Downlink, Recipe, Uplink
from psq.rules.base import AggregateRule

class Largest(AggregateRule):
    """The value of the largest magnitude, times an option."""

    def combine(self, shard, said, out):
        part = np.empty_like(out)
        out.fill(0.0)
        for one in said:
            one.codec.decode(one.payload, part)
            np.copyto(out, part, where=abs(part) > abs(out))
        np.multiply(out, np.float32(self.options["gain"]), out=out)

class Moody(AggregateRule):
    """Cannot be made."""

    def __init__(self, options, **job):
        raise RuntimeError("not today")

MOODY = Part("moody", (), Moody, summary="never", takes=("gradient",))

LARGEST = Part("largest", (Option("gain", 1.0, "times this", low=0.0),), Largest,
               summary="the largest", takes=("gradient",))
MISNAMED = Part("smallest", takes=("gradient",))
NOTHING = 3

def linear(t, steps):
    return 0.9 * min(1.0, t / steps)

def table(t):
    return [0.9, 0.8][t - 1]

def make(adam):
    return Recipe("largest-sgd", Direction(), Uplink("sign"), Apply("sgd"),
                  Downlink("delta", "sign"), Aggregate("largest"))

RECIPE = Preset("largest-sgd", make, "Summary.", "nobody", "never", "none")
'''

ENTRIES = """\
[psq.aggregates]
largest = {module}:LARGEST
misnamed = {module}:MISNAMED
nothing = {module}:NOTHING
gone = {module}:GONE
nowhere = {module}_that_is_not:PART
broken = {module}_broken:PART
moody = {module}:MOODY

[psq.schedules]
{module}-linear = {module}:linear
{module}-table = {module}:table

[psq.recipes]
largest-sgd = {module}:RECIPE
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution on the path, as pip leaves it; gone again after the test."""
    module = f"plugin_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{module}.py").write_text(MODULE)
    (tmp_path / f"{module}_broken.py").write_text("raise RuntimeError('no such device')")
    info = tmp_path / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES.format(module=module))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.setattr("psq.parts._ADDED", {})
    assert "largest" in entry_points(group="psq.aggregates").names
    yield module
    sys.modules.pop(module, None)


def test_every_slot_has_parts_of_different_kinds():
    assert set(GROUPS) == set(CATALOGUE)
    assert len(set(OWN)) == len(OWN)
    for slot in CATALOGUE:
        assert [each.kind for each in parts(slot)] == list(kinds(slot))


@pytest.mark.parametrize(("slot", "kind"), OWN)
def test_a_part_says_what_it_is_and_what_each_option_means(slot, kind):
    found = part(slot, kind)
    assert found.summary
    assert all(option.help for option in found.options)
    assert bool(found.says) == (slot == "direction" or kind == "majority")
    assert bool(found.takes) == (slot in ("aggregate", "apply"))


def test_an_unknown_kind_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"aggregate must be one of mean, majority, .*'best'"):
        part("aggregate", "best")


def test_an_option_takes_what_its_default_is():
    assert Option("x", 1.0).check(2) == 2.0
    assert type(Option("x", 1.0).check(2)) is float
    assert Option("x", 1).parse("7") == 7
    assert Option("x", default=False).parse("True") is True
    assert Option("x", "a", choices=("a", "b")).parse("b") == "b"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        (Option("x", 1, low=0, high=1_000_000), -1, "a whole number >= 0 and <= 1,000,000, got -1"),
        (Option("x", 1), True, "a whole number, got True"),
        (Option("x", 1.0), "1", "a number, got '1'"),
        (Option("x", 1.0), float("inf"), "a number, got inf"),
        (Option("x", default=True), 1, "true or false, got 1"),
        (Option("x", "a", choices=("a", "b")), "c", "one of a, b, got 'c'"),
        (Option("x", "a"), "y" * 201, "a text, got"),
    ],
)
def test_a_value_that_an_option_does_not_take_is_refused_with_what_it_expects(option, value, words):
    with pytest.raises(ConfigError, match=words):
        option.check(value)


def test_a_part_cannot_have_two_options_of_one_name():
    with pytest.raises(ConfigError, match="options of different names"):
        Part("x", (Option("a", 1), Option("a", 2)))


def test_options_are_complete_and_sorted():
    made = Part("x", (Option("b", 1), Option("a", 2)))
    assert options(made, {"b": 3}) == (("a", 2), ("b", 3))


# ---- by hand


def test_a_part_is_registered_once_and_never_in_place_of_another(monkeypatch):
    monkeypatch.setattr("psq.parts._ADDED", {})
    mine = Part("mine", rule=AggregateRule, summary="the mean again", takes=("gradient",))
    assert register("aggregate", mine) is mine
    assert register("aggregate", Part("mine", rule=AggregateRule, **_words(mine))) == mine
    assert part("aggregate", "mine") is mine
    assert load_rule(mine) is AggregateRule
    for other in (Part("mine"), Part("mean")):
        with pytest.raises(ConfigError, match=f"called '{other.kind}' already"):
            register("aggregate", other)
    with pytest.raises(ConfigError, match="slot must be one of"):
        register("uplink", mine)


def _words(made):
    return {"summary": made.summary, "takes": made.takes}


@pytest.mark.parametrize("rule", ["", "psq", "psq.no_such:Rule", "psq.plan:Rule"])
def test_a_rule_that_cannot_be_imported_is_named(rule):
    with pytest.raises(ConfigError, match=r"strange: its rule .* cannot be imported"):
        load_rule(Part("strange", rule=rule))


# ---- from another package


def test_an_installed_package_brings_a_part_that_is_imported_when_it_is_named(installed):
    assert "largest" in kinds("aggregate")
    assert part("aggregate", "median").kind == "median"
    assert installed not in sys.modules
    found = part("aggregate", "largest")
    assert installed in sys.modules
    assert (found.kind, found.package) == ("largest", installed)
    recipe = preset("ef-sgd").with_options("aggregate=largest", "aggregate.gain=2")
    plan = Plan.of([("w", (10,))], recipe, 2)
    assert Plan.parse(plan.body).recipe.aggregate == Aggregate("largest", (("gain", 2.0),))
    assert type(make_aggregate(recipe, layout=plan.layout, world_size=2)).__name__ == "Largest"


def test_a_recipe_and_a_schedule_of_an_installed_package_go_by_name(installed):
    assert "largest-sgd" in names()
    assert find_preset("largest-sgd").package == installed
    assert preset("largest-sgd").aggregate.kind == "largest"
    adam = AdamConfig(beta=Named(f"{installed}-linear", (10.0,)))
    recipe = preset("server-adam", adam)
    assert Recipe.from_plain(recipe.to_plain()) == recipe


def test_a_plan_that_names_a_part_of_a_package_that_is_not_here_says_which(
    installed, monkeypatch, tmp_path
):
    body = Plan.of([("w", (10,))], preset("largest-sgd"), 2).body
    monkeypatch.setattr("psq.parts._ADDED", {})
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    words = f"'largest'; install the package {installed} on every machine of the job"
    with pytest.raises(RemotePlanError, match=words):
        Plan.parse(body)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("misnamed", "calls a aggregate 'misnamed' that calls itself 'smallest'"),
        ("nothing", "'nothing' of the package .* is no Part: .* is 3"),
        ("gone", "'gone' of the package .* cannot be imported: .*mend that package"),
        ("nowhere", "'nowhere' of the package .* cannot be imported: No module named"),
        ("broken", "'broken' of the package .* cannot be imported: no such device"),
    ],
)
def test_a_package_that_does_not_keep_its_word_is_named(installed, kind, words):
    assert kind in kinds("aggregate")
    with pytest.raises(ConfigError, match=words) as caught:
        part("aggregate", kind)
    assert installed in str(caught.value)


def test_a_plan_whose_rule_raises_anything_is_refused_by_who_reads_it(installed):
    body = Plan.of([("w", (10,))], preset("largest-sgd"), 2).body
    plain = msgpack.unpackb(body)
    plain["recipe"]["aggregate"] |= {"kind": "moody", "options": {}}
    words = f"moody of the package {installed} cannot run .* RuntimeError\\('not today'\\)"
    with pytest.raises(RemotePlanError, match=words):
        Plan.parse(msgpack.packb(plain))


def test_a_schedule_that_raises_anything_is_refused_by_its_name(installed):
    with pytest.raises(ConfigError, match=f"'{installed}-table' cannot be computed at t=3: Index"):
        AdamConfig(beta=Named(f"{installed}-table"))
