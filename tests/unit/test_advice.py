"""From rates to a choice and a sentence; what is said of links; what is measured."""

import math
import re

import pytest

from psq import kernels
from psq.advice import (
    CAUTION,
    DENSE,
    LOOPBACK,
    Cluster,
    Rates,
    Step,
    advise,
    candidates,
    copy_s,
    link_of_mbit,
    measure_rates,
    parse_link,
)
from psq.codec import get_codec
from psq.errors import ConfigError
from psq.plan import Plan
from psq.presets import preset

SPECS = [("a", (3000, 1000)), ("b", (1000,))]
FAST = Rates(2e9, 1e9, 5e9, 8e9)
SLOW = Rates(1e7, 1e7, 1e7, 8e9)


def weigh(link, *, few=FAST, min_bits=3, compute_s=0.0, workers=2):
    """The advice where dense float32 costs what it costs, and the others `few`."""
    choices = candidates(min_bits)
    rates = {c.name: few for c in choices} | {DENSE.name: FAST}
    step = Step(SPECS, Cluster(workers, 1, link, cores=8), compute_s=compute_s)
    return advise(step, rates, choices)


def test_on_a_slow_link_the_advice_is_to_send_few_bits_and_names_the_flags():
    advice = weigh(parse_link("100mbit", 2e-4))
    assert advice.pays
    assert advice.gain > 6
    flags = advice.chosen.candidate.flags
    assert advice.sentence.startswith(f"Use {flags}: ")
    assert "what limits it then: the link, from workers to servers" in advice.sentence


def test_where_quantizing_costs_more_than_the_link_it_says_that_compression_does_not_pay():
    advice = weigh(parse_link("100gbit", 1e-5), few=SLOW)
    assert not advice.pays
    assert advice.chosen is advice.dense
    words = r"Compression does not pay here: [\d.]+ of [\d.]+ ms a step are the link's; use fp32: "
    assert advice.sentence.startswith("Compression does not pay here")
    assert re.match(words + "--recipe fp32$", advice.sentence)


def test_a_gain_that_nobody_would_notice_is_not_worth_rounding_for():
    advice = weigh(parse_link("1gbit", 2e-4), compute_s=1000.0)
    assert advice.gain == 1.0
    assert not advice.pays


def test_of_equals_the_most_exact_is_chosen():
    advice = weigh(LOOPBACK, compute_s=1000.0)
    assert advice.chosen is advice.options[0]


def test_only_those_are_candidates_that_say_no_less_than_the_default_does():
    default = preset("server-adam")
    bits = [get_codec(d).bits for d in (default.uplink.codec, default.downlink.codec)]
    for candidate in candidates():
        assert all(own >= least for own, least in zip(candidate.bits, bits, strict=True))
        assert candidate.make().apply.kind == "adam"


def test_one_bit_has_to_be_asked_for_and_comes_with_a_word_of_caution():
    names = {c.name for c in candidates()}
    assert {c.name for c in candidates(1)} - names == {"4 + 1 bits", "qadam-1bit"}
    advice = weigh(parse_link("100mbit", 2e-4), min_bits=1)
    assert min(advice.chosen.candidate.bits) == 1
    assert advice.sentence.endswith(CAUTION)


def test_bits_are_those_of_the_plan_with_headers():
    advice = weigh(parse_link("1gbit", 2e-4))
    default = next(
        o for o in advice.options if o.candidate.uplink is None and o is not advice.dense
    )
    assert default.bits_up == pytest.approx(4.13, abs=0.01)
    assert default.bits_down == pytest.approx(3.03, abs=0.01)
    assert advice.dense.bits_up == pytest.approx(32.0, abs=0.01)


@pytest.mark.parametrize("candidate", candidates(1), ids=lambda c: c.name)
def test_a_candidate_s_flags_make_its_recipe(candidate):
    words = candidate.flags.split()
    said = dict(zip(words[::2], words[1::2], strict=True))
    made = preset(said["--recipe"]).with_codecs(
        uplink=said.get("--uplink"), downlink=said.get("--downlink")
    )
    assert made == candidate.make()
    Plan.of(SPECS, made, 2)


@pytest.mark.parametrize(
    ("text", "mbit"),
    [("100mbit", 94.15), ("2.5gbit", 2353.7), ("1GBIT", 941.5), ("64kbit", 0.0603)],
)
def test_a_link_is_what_a_program_gets_of_the_rate(text, mbit):
    link = parse_link(text, 1e-3)
    assert link.up_bit_s / 1e6 == pytest.approx(mbit, rel=1e-3)
    assert link.down_bit_s == link.up_bit_s
    assert link.round_trip_s == 1e-3


def test_loopback_has_no_rate():
    assert parse_link("loopback", 1.0) is LOOPBACK
    assert math.isinf(LOOPBACK.up_bit_s)


def test_a_measured_link_is_taken_as_it_is():
    link = link_of_mbit(940.0, 930.0, 2e-4)
    assert (link.up_bit_s, link.down_bit_s) == (940e6, 930e6)


@pytest.mark.parametrize("text", ["", "fast", "100", "100mb/s", "0mbit", "-1gbit", "1gbits"])
def test_what_is_no_link_is_refused_with_the_form(text):
    with pytest.raises(ConfigError, match="such as 100mbit or 2"):
        parse_link(text, 0.0)


class Ticks:
    """A clock that advances by itself: measuring takes the time that a test says."""

    def __init__(self, step_s):
        self.now_s = 0.0
        self.step_s = step_s

    def __call__(self):
        self.now_s += self.step_s
        return self.now_s


@pytest.mark.parametrize("lanes", [1, 2])
def test_every_candidate_is_measured_in_every_stage(lanes):
    choices = candidates(1)
    numel = 20_000
    rates = measure_rates(choices, workers=3, numel=numel, lanes=lanes, budget_s=0.0)
    assert set(rates) == {c.name for c in choices}
    for found in rates.values():
        for rate in (found.encode, found.server, found.decode, found.zero):
            assert 1e3 < rate < 1e12


def test_rates_are_values_over_seconds():
    rates = measure_rates([DENSE], workers=1, numel=1000, budget_s=0.0, clock=Ticks(0.5))
    assert rates[DENSE.name] == Rates(2000.0, 2000.0, 2000.0, 2000.0)


def test_a_model_larger_than_what_is_measured_gets_the_same_rates(monkeypatch):
    monkeypatch.setattr("psq.advice.measure.MEASURED_NUMEL", 1 << 16)
    numel = 1 << 16
    clock = Ticks(0.25)
    rates = measure_rates([DENSE], workers=1, numel=10**9, budget_s=0.0, clock=clock)
    assert rates[DENSE.name].encode == numel / 0.25


def test_the_sum_over_very_many_workers_is_taken_to_grow_with_them():
    few, many = (
        measure_rates([DENSE], workers=w, numel=1000, budget_s=0.0, clock=Ticks(0.5))[DENSE.name]
        for w in (16, 64)
    )
    assert many.server == few.server / 4
    assert many.encode == few.encode


def test_without_native_kernels_less_is_measured():
    with kernels.use("reference"):
        rates = measure_rates([DENSE], workers=1, numel=1 << 20, budget_s=0.0, clock=Ticks(0.5))
    assert rates[DENSE.name].encode == (1 << 16) / 0.5


def test_a_byte_through_a_socket_costs_something():
    assert 1e-12 < copy_s() < 1e-6
