"""DQ-SGD's choice of bits: the closed form, its budget, and what a worker does with it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from psq import kernels
from psq.codec import ShardCodec, get_codec
from psq.codec.registry import all_codecs
from psq.codec_text import WIDTHS, widths_of
from psq.errors import ConfigError
from psq.feedback import Compressor
from psq.layout import cut
from psq.plan import Plan
from psq.presets import preset
from psq.rules.bit_budget import bits_of, solve
from psq.rules.dynamic import HORIZON, Dynamic
from psq.rules.norms import ShardNorm

USUAL = {"bits": 4.0, "steps": 0, "norm": "max", "contraction": 1.0, "least": 2, "most": 8}
LAYOUT = cut([("a", (3000,)), ("b", (700,)), ("c", (1300,))], [lambda n: n])
LARGE = cut([("a", (1 << 20,)), ("b", (1 << 20,)), ("c", (5000,))], [lambda n: n])


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def message_of(shard):
    """Values whose sizes differ along the vector."""
    rng = np.random.default_rng(3)
    sizes = np.exp(2 * rng.standard_normal(shard.numel // 64 + 1)).repeat(64)[: shard.numel]
    return (rng.standard_normal(shard.numel) * sizes).astype(np.float32)


def made(layout=LARGE, spec="uniform:bits=4,stochastic=true", **options):
    options = USUAL | options
    specs = widths_of(spec, options["least"], options["most"])
    choice = Dynamic(options, codecs=specs, layout=layout)
    choice.bind([[ShardCodec(get_codec(each), shard) for each in specs] for shard in layout.shards])
    return choice


def said(choice, norms_of, steps, *, layout=LARGE):
    """Bits of every shard in every step: i64[steps, shards]."""
    bits = [get_codec(spec).bits for spec in choice.codecs]
    return np.array(
        [
            [
                bits[choice.choose(shard.index, t, lambda s=shard, t=t: norms_of(s.index, t))]
                for shard in layout.shards
            ]
            for t in range(1, steps + 1)
        ]
    )


def cost(bits, layout=LARGE):
    return float((bits * [shard.numel for shard in layout.shards]).sum())


def total(layout=LARGE):
    return sum(shard.numel for shard in layout.shards)


# ---- the closed form -----------------------------------------------------------------------------


def loss(norms, numels, bits):
    return float(np.sum(numels * (norms / (2.0 ** (bits - 1) - 1)) ** 2))


def best_bits(norms, numels, budget):
    """Lagrange's condition s^3 / (s + 1) = c n^2 for each, c by bisection: no closed form."""

    def levels(target):
        low, high = 1e-9, 1e9
        for _ in range(200):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if middle**3 / (middle + 1) <= target else (low, middle)
        return low

    low, high = 1e-12, 1e12
    for _ in range(200):
        c = math.sqrt(low * high)
        bits = np.array([math.log2(levels(c * n * n) + 1) + 1 for n in norms])
        low, high = (c, high) if (numels * bits).sum() <= budget else (low, c)
    return bits


@pytest.mark.parametrize("average", [3.0, 4.0, 5.0, 6.0])
@pytest.mark.parametrize(("spread", "more"), [(0.1, 1e-3), (0.2, 1e-3), (0.5, 6e-3), (1.0, 3e-2)])
def test_the_closed_form_is_close_to_the_smallest_loss(average, spread, more, rng):
    norms = np.exp(spread * rng.standard_normal(40))
    numels = rng.integers(10, 10_000, 40).astype(np.float64)
    budget = average * numels.sum()
    ours = bits_of(solve(norms, numels, budget), norms)
    best = best_bits(norms, numels, budget)
    assert (numels * ours).sum() == pytest.approx(budget, rel=1e-6)
    assert (numels * best).sum() == pytest.approx(budget, rel=1e-6)
    least = loss(norms, numels, best)
    assert least * (1 - 1e-9) <= loss(norms, numels, ours) <= (1 + more) * least
    if spread >= 0.5:  # and it matters: the same bits for all would lose more
        assert loss(norms, numels, np.full(40, average)) > 1.05 * least


def test_twice_the_norm_is_one_bit_more():
    few = bits_of(10.0, np.array([1.0, 2.0, 4.0]))
    np.testing.assert_allclose(np.diff(few), 1.0, atol=2e-3)
    assert bits_of(3.0, np.array([0.0])).tolist() == [1.0]


# ---- the budget ----------------------------------------------------------------------------------


def falling(shard, t):
    """Norms that fall, differ by shard, and jump about."""
    noise = np.random.default_rng((shard, t)).standard_normal()
    return (1 + shard) ** 2 * t**-0.3 * math.exp(0.5 * noise)


@pytest.mark.parametrize("bits", [2.0, 2.5, 3.0, 4.0, 5.5, 7.9, 8.0])
@pytest.mark.parametrize("steps", [1, 7, 200])
def test_no_bit_more_than_the_budget_is_spent_and_nearly_all_of_it(bits, steps):
    spent = cost(said(made(bits=bits, steps=steps), falling, steps))
    budget = bits * total() * steps
    assert spent <= budget
    if steps == 200:
        assert spent >= 0.995 * budget


@pytest.mark.parametrize("hostile", ["rising", "spike", "zero", "huge"])
def test_a_budget_holds_against_norms_made_to_break_it(hostile):
    norms = {
        "rising": lambda _, t: 2.0**t,
        "spike": lambda _, t: 1e30 if t % 10 == 0 else 1e-30,
        "zero": lambda *_: 0.0,
        "huge": lambda *_: 1e300,
    }[hostile]
    spent = cost(said(made(bits=3.0, steps=60), norms, 60))
    assert 2.0 * total() * 60 <= spent <= 3.0 * total() * 60


def test_after_the_last_step_the_least_bits_are_said():
    bits = said(made(bits=4.0, steps=20), falling, 25)
    assert (bits[20:] == 2).all()
    assert (bits[:20] > 2).any()


@pytest.mark.parametrize("bits", [2.0, 3.3, 6.0])
def test_without_an_end_the_average_is_the_budgets_and_little_is_drawn_ahead(bits):
    found = said(made(bits=bits), falling, 400)
    spent, earned = cost(found), bits * total() * 400
    assert spent == pytest.approx(earned, rel=0.02)
    worst = said(made(bits=bits), lambda _, t: 2.0**t, 400)
    ahead = np.cumsum(worst * [shard.numel for shard in LARGE.shards]) - bits * np.cumsum(
        np.tile([shard.numel for shard in LARGE.shards], 400)
    )
    assert ahead.max() <= (bits - 2) * HORIZON * total()


def test_a_shard_of_larger_norms_says_more_bits():
    bits = said(made(bits=4.0, steps=100), lambda shard, _: 4.0 if shard == 2 else 1.0, 100)
    assert bits[50:, 2].mean() == pytest.approx(bits[50:, 0].mean() + 2, abs=0.3)


def test_a_step_of_larger_norm_says_more_bits():
    bits = said(made(bits=4.0, steps=200), lambda _, t: 4.0 if t % 20 == 0 else 1.0, 150)
    others = np.delete(bits, np.s_[19::20], axis=0)
    assert bits[39::20].mean() > others[30:].mean() + 1.5


def test_fewer_bits_are_lost_than_by_any_fixed_number_of_them():
    steps, layout = 300, LARGE
    bits = said(made(bits=4.0, steps=steps), falling, steps)
    norms = np.array([[falling(s.index, t) for s in layout.shards] for t in range(1, steps + 1)])
    numels = np.array([shard.numel for shard in layout.shards], np.float64)
    assert cost(bits) <= 4.0 * total() * steps
    assert loss(norms, numels, bits) < 0.8 * loss(norms, numels, np.full(bits.shape, 4.0))


def test_a_contraction_saves_bits_for_the_end():
    bits = said(made(bits=4.0, steps=100, contraction=0.95), lambda *_: 1.0, 100)
    assert bits[:20].mean() < 3.3
    assert bits[-20:].mean() > 4.7
    assert cost(bits) <= 4.0 * total() * 100
    assert cost(bits) >= 0.97 * 4.0 * total() * 100


def test_a_worker_that_resumes_chooses_as_it_would_have():
    whole = made(bits=4.5, steps=60)
    expected = said(whole, falling, 60)
    first, second = made(bits=4.5, steps=60), made(bits=4.5, steps=60)
    before = said(first, falling, 30)
    for name, array in second.state_arrays().items():
        array[:] = first.state_arrays()[name]
    second.resume(30)
    after = said(second, lambda shard, t: falling(shard, t + 30), 30)
    assert np.array_equal(np.concatenate([before, after]), expected)


def test_a_message_that_is_not_finite_leaves_no_trace_in_the_norms():
    choice = made(bits=4.0, steps=50)
    said(choice, lambda *_: 1.0, 10)
    sums = choice.state_arrays()["sums"].copy()
    assert choice.codecs[choice.choose(0, 11, lambda: math.nan)].startswith("uniform:bits=2")
    assert np.array_equal(choice.state_arrays()["sums"], sums)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contraction": 0.9}, "needs the number of steps"),
        ({"bits": 2.0, "least": 3}, "at least 3"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        made(**options)


# ---- norms and widths ----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["uniform:bits=4", "uniform:bits=4,block=256", "log:block=0"])
def test_norms_are_what_they_say(spec):
    shard = LAYOUT.shards[0]
    message, codec = message_of(shard), ShardCodec(get_codec(spec), shard)
    wide, block = abs(message.astype(np.float64)), codec.codec.format.block
    largest = []
    for segment in shard.segments:
        part = wide[segment.offset : segment.offset + segment.numel]
        for at in range(0, part.size, block or part.size):
            one = part[at : at + (block or part.size)]
            largest += [one.max()] * one.size
    expected = {"l2": np.sqrt((wide**2).sum()), "max": np.sqrt(np.mean(np.square(largest)))}
    for kind in ("l2", "max"):
        norm = ShardNorm(kind, codec)
        assert norm.of(message) == pytest.approx(expected[kind], rel=1e-6)
        assert norm.of(message * np.float32(0.25), message * np.float32(0.75)) == norm.of(message)
        assert math.isnan(norm.of(message * np.float32(np.nan)))


@pytest.mark.parametrize("kind", ["l2", "max"])
def test_a_norm_is_the_same_number_on_every_level(kind):
    shard = LAYOUT.shards[0]
    norm = ShardNorm(kind, ShardCodec(get_codec("uniform:bits=4"), shard))
    found = set()
    for level in kernels.available():
        with kernels.use(level):
            found.add(norm.of(message_of(shard)))
    assert len(found) == 1


@pytest.mark.parametrize("name", sorted(WIDTHS))
def test_the_widths_of_a_codec_are_those_it_has(name):
    specs = widths_of(name, 1, 16)
    bits = [get_codec(spec).bits for spec in specs]
    option = WIDTHS[name].option
    every = {codec.bits for codec in all_codecs() if codec.spec.startswith(f"{name}:{option}=")}
    assert bits == sorted(every)
    assert name in specs  # the default keeps its text
    assert widths_of(f"{name}:block=256", 1, 16)[0].startswith(f"{name}:block=256,")


def test_a_codec_of_one_width_is_refused():
    with pytest.raises(ConfigError, match="'sign' has no bits to change: choose one of log"):
        widths_of("sign", 2, 8)
    with pytest.raises(ConfigError, match="none of them from 5 to 8"):
        widths_of("lloyd-max:bits=2", 5, 8)


# ---- in a worker ---------------------------------------------------------------------------------

PLAIN = (preset("dq-sgd"), {})
FED_BACK = (preset("server-adam").with_codecs(uplink="uniform:bits=4"), {})
ADAM = (preset("qadam"), {"bits": 3.5, "steps": 40})  # log: 2, 3 or 4 bits


def worker(recipe, choice):
    """A worker's compressor of several shards, and its plan."""
    texts = [f"uplink.choice.{name}={value}" for name, value in choice.items()]
    recipe = recipe.with_options("uplink.choice=dq", *texts)
    plan = Plan.of([("a", (1200, 900)), ("b", (77,))], recipe, 2)
    assert len(plan.layout.shards) > 1
    return Compressor(plan, 0, seed=5), plan


def gradients_of(plan, step):
    """As if a step in five were ten times as steep, and the last shard always."""
    rng = np.random.default_rng(step)
    sizes = [
        (10.0 if step % 5 == 0 else 1.0) * (8.0 if s.index else 1.0) for s in plan.layout.shards
    ]
    return [
        [(size * rng.standard_normal(part.numel)).astype(np.float32) for part in shard.segments]
        for shard, size in zip(plan.layout.shards, sizes, strict=True)
    ]


def pushed(compressor, plan, steps):
    """Payload and bits of each shard in each step."""
    found = []
    for step in steps:
        for shard, gradients in enumerate(gradients_of(plan, step)):
            payload = np.zeros(compressor.nbytes(shard), np.uint8)
            codec = compressor.codec(shard, compressor.compress(shard, gradients, 0.1, payload))
            found.append((shard, codec, payload[: codec.nbytes].copy()))
    return found


@pytest.mark.parametrize("asked", [PLAIN, FED_BACK])
def test_a_worker_says_more_bits_where_norms_are_larger(asked):
    compressor, plan = worker(*asked)
    bits = np.array([codec.codec.bits for _, codec, _ in pushed(compressor, plan, range(1, 31))])
    of_first = bits[:: len(plan.layout.shards)]
    assert of_first[14::5].mean() > np.delete(of_first, np.s_[4::5])[12:].mean()


def test_a_worker_with_adam_keeps_to_its_budget():
    compressor, plan = worker(*ADAM)
    said = [(c.codec.bits, c.shard.numel) for _, c, _ in pushed(compressor, plan, range(1, 41))]
    assert {bits for bits, _ in said} == {3, 4}
    spent = sum(bits * numel for bits, numel in said)
    assert 0.99 * 3.5 * 40 * plan.layout.numel <= spent <= 3.5 * 40 * plan.layout.numel


def test_with_error_feedback_all_is_said_in_the_end_whatever_the_bits():
    compressor, plan = worker(*FED_BACK)
    said = np.zeros(plan.layout.numel)
    wanted = np.zeros(plan.layout.numel)
    for step in range(1, 13):
        for shard, codec, payload in pushed(compressor, plan, [step]):
            cut_ = plan.layout.shards[shard]
            out = np.empty(cut_.numel, np.float32)
            codec.decode(payload, out)
            said[cut_.offset :][: cut_.numel] += out
        wanted += np.concatenate([part for each in gradients_of(plan, step) for part in each])
    left = compressor.state_arrays()["residual"]
    np.testing.assert_allclose(said + left, wanted, atol=1e-3)


def test_a_resumed_worker_makes_the_same_payloads():
    whole, plan = worker(*ADAM)
    expected = pushed(whole, plan, range(1, 21))
    first, second = worker(*ADAM)[0], worker(*ADAM)[0]
    pushed(first, plan, range(1, 11))
    for name, array in second.state_arrays().items():
        array[...] = first.state_arrays()[name]
    second.resume(10)
    resumed = pushed(second, plan, range(11, 21))
    for ours, theirs in zip(resumed, expected[-len(resumed) :], strict=True):
        assert ours[1].codec.spec == theirs[1].codec.spec
        assert ours[2].tobytes() == theirs[2].tobytes()
