import numpy as np
import pytest

from psq import kernels
from psq.codec import ShardCodec, get_codec
from psq.errors import ConfigError, UsageError
from psq.kernels import ServerStep
from psq.layout import cut
from psq.parts import Part, load_rule
from psq.presets import preset
from psq.recipe import Choice, Downlink, Uplink
from psq.rules import (
    AggregateRule,
    Judgement,
    Said,
    is_linear,
    make_aggregate,
    make_apply,
    make_choice,
    make_direction,
)

LAYOUT = cut([("a", (3000,)), ("b", (70, 30))], [lambda n: 4 * n])
SHARD = LAYOUT.shards[0]


def said_by(workers, spec="log:k=2", weights=None):
    codec, said = ShardCodec(get_codec(spec), SHARD), []
    for rank in range(workers):
        payload = np.empty(codec.nbytes, np.uint8)
        values = np.random.default_rng(rank).standard_normal(SHARD.numel, dtype=np.float32)
        codec.encode(values, payload)
        said.append(Said(rank, codec, payload, weight=weights[rank] if weights else 1.0))
    return said


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_the_mean_has_the_bits_of_the_kernels(workers):
    """x = 0 loses, with apply add, just the mean."""
    said = said_by(workers)
    out = np.empty(SHARD.numel, np.float32)
    AggregateRule({}, layout=LAYOUT, world_size=workers).combine(0, said, out)
    form, x = said[0].codec.codec.format, np.zeros(SHARD.numel, np.float32)
    kernels.active().server_step(
        ServerStep(
            uplink=form,
            downlink=form,
            segments=[segment.numel for segment in SHARD.segments],
            payloads=[one.payload for one in said],
            x=x,
            scratch=np.empty(SHARD.numel, np.float32),
            answer=None,
            delta=False,
            starts=[0] * len(SHARD.segments),
        )
    )
    np.testing.assert_array_equal(x, -out)
    assert out.any()


def test_a_weighted_mean_counts_each_by_its_weight():
    weights = [3.0, 1.0, 0.0]
    said = said_by(3, weights=weights)
    out, part = (np.empty(SHARD.numel, np.float32) for _ in range(2))
    AggregateRule({}, layout=LAYOUT, world_size=3).combine(0, said, out)
    expected = np.zeros(SHARD.numel)
    for one in said:
        one.codec.decode(one.payload, part)
        expected += one.weight * part / sum(weights)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_a_mean_of_messages_that_count_nothing_is_nothing():
    out = np.full(SHARD.numel, np.nan, np.float32)
    rule = AggregateRule({}, layout=LAYOUT, world_size=2)
    rule.combine(0, said_by(2, weights=[0.0, 0.0]), out)
    assert not out.any()


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_judgement_with_which_no_mean_can_be_made_is_refused(weight):
    with pytest.raises(UsageError, match="weight must be a finite number >= 0"):
        Judgement(weight)


def test_messages_of_different_codecs_have_one_mean():
    said = [said_by(2, "sign")[0], said_by(2, "fp32")[1]]
    out, parts = np.empty(SHARD.numel, np.float32), np.empty((2, SHARD.numel), np.float32)
    AggregateRule({}, layout=LAYOUT, world_size=2).combine(0, said, out)
    for one, part in zip(said, parts, strict=True):
        one.codec.decode(one.payload, part)
    np.testing.assert_array_equal(out, (parts[0] + parts[1]) * np.float32(0.5))


def test_a_rule_works_on_the_vectors_it_is_given():
    recipe = preset("dist-ef-sgdm")
    where = {"layout": LAYOUT, "world_size": 1, "rank": 0, "seed": 0}
    given = {"m": np.ones(LAYOUT.numel, np.float32)}
    rule = make_direction(recipe, **where, state=given)
    assert rule.state_arrays()["m"] is given["m"]
    assert not make_direction(recipe, **where).state_arrays()["m"].any()


def test_the_rules_of_a_recipe_are_those_its_parts_name():
    recipe = preset("dist-ef-sgdm")
    assert type(make_aggregate(recipe, layout=LAYOUT, world_size=1)).__name__ == "AggregateRule"
    assert type(make_apply(recipe, layout=LAYOUT, world_size=1)).__name__ == "Sgd"
    assert is_linear(recipe)
    assert not is_linear(preset("server-adam"))


@pytest.mark.parametrize("link", [Uplink, Downlink])
def test_a_links_choice_knows_its_codecs(link):
    choice = Choice("first", (("codec", "fp32"), ("steps", 3)))
    kind = ("delta",) if link is Downlink else ()
    made = make_choice(link(*kind, "sign", choice=choice), LAYOUT)
    assert made.codecs == ("sign", "fp32")


def test_a_rule_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"rule 'psq\.rules\.none:Nothing' cannot be imported"):
        load_rule(Part("nothing", rule="psq.rules.none:Nothing"))
