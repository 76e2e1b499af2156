"""The server's step on every native level, against the same passes one after another in NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from psq import kernels
from psq.codec import codec_specs, get_codec
from psq.kernels import ServerStep
from psq.optim import Adam
from psq.recipe import AdamConfig

NATIVE = [name for name in kernels.available() if name != kernels.REFERENCE]
SIZES = (1, 15, 16, 511, 1024, 1025, 4099, 8192, 20_001)
ADAMS = {
    "add": None,
    "adam": AdamConfig(),
    "paper": AdamConfig(bias_correction=False, eps_placement="inside", beta=0.3),
    "no-momentum": AdamConfig(beta=0.0),
    "amsgrad": AdamConfig(amsgrad=True),
    "decay": AdamConfig(weight_decay=0.1),
    "l2": AdamConfig(weight_decay=0.1, decoupled=False),
    "amsgrad-decay": AdamConfig(amsgrad=True, weight_decay=0.1),
}
UPLINKS = ("sign", "log:k=6,block=256", "uniform:bits=4,block=8192", "bf16", "fp32", "log:block=0")
HALVES = ("log:k=0", "log:k=2", "uniform:bits=8", "lloyd-max:bits=1", "lloyd-max:bits=3")
ANSWERS = ("none", "weights", "delta", "delta-ef")


def values(numel, seed):
    """As gradients and weights have them: sizes differ, some are 0."""
    rng = np.random.default_rng([seed, numel])
    array = rng.standard_normal(numel) * np.exp(rng.uniform(-6, 1, numel))
    array[::11] = 0.0
    return array.astype(np.float32)


def encoded(codec, segments, seed):
    payload, at = bytearray(), 0
    flat = values(sum(segments), seed)
    for numel in segments:
        part = np.empty(codec.nbytes(numel), np.uint8)
        codec.encode(flat[at : at + numel], part, seed=seed)
        payload += part.tobytes()
        at += numel
    return payload


def make_step(  # noqa: PLR0913 - one argument per part of a recipe
    segments, *, uplink="sign", downlink="sign", answer="delta-ef", adam=None, count=2
):
    up, down = get_codec(uplink), get_codec(downlink)
    numel = sum(segments)
    optimizer, state = None, {}
    if adam is not None:
        optimizer = Adam(adam, numel)
        optimizer.advance(1e-2)
        names = enumerate(optimizer.state_arrays(), start=50)
        state = {name: np.abs(values(numel, seed)) for seed, name in names}
    if answer == "delta-ef":
        state["residual"] = values(numel, 60) * np.float32(0.1)
    sent = sum(down.nbytes(n) for n in segments)
    return ServerStep(
        uplink=up.format,
        downlink=down.format,
        segments=segments,
        payloads=[encoded(up, segments, seed) for seed in range(count)],
        x=values(numel, 70),
        scratch=np.full(max(segments, default=0), np.nan, np.float32),
        answer=None if answer == "none" else np.full(sent, 0xA5, np.uint8),
        delta=answer.startswith("delta"),
        starts=[down.start(seed) for seed in range(len(segments))],
        adam=None if optimizer is None else optimizer.coefficients,
        **state,
    )


def outcome(level, step, rounds=2):
    """The bytes of everything a step writes, after some rounds of the same payloads."""
    names = ("x", "m", "v", "vmax", "residual", "answer")
    kept = {name: getattr(step, name) for name in names}
    copies = {name: None if array is None else array.copy() for name, array in kept.items()}
    step = dataclasses.replace(step, **copies)
    for _ in range(rounds):
        kernels.get(level).server_step(step)
    return {name: None if array is None else array.tobytes() for name, array in copies.items()}


def assert_same(step):
    expected = outcome(kernels.REFERENCE, step)
    for level in NATIVE:
        assert outcome(level, step) == expected, level


@pytest.mark.parametrize("answer", ["weights", "delta", "delta-ef"])
@pytest.mark.parametrize("downlink", [*codec_specs(), "sign:block=256", "sign:norm=l2,block=4096"])
def test_every_downlink_is_answered_with_the_bits_of_the_definition(downlink, answer):
    step = make_step((4099, 16, 20_001), downlink=downlink, answer=answer, adam=AdamConfig())
    assert_same(step)


@pytest.mark.parametrize("uplink", [*codec_specs(), "log:k=6,block=256", "uniform:bits=8,block=0"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_uplink_is_summed_with_the_bits_of_the_definition(uplink, count):
    assert_same(make_step((4099, 3, 9000), uplink=uplink, count=count, answer="none"))


@pytest.mark.parametrize("block", [0, 256, 512, 2048, 8192])
@pytest.mark.parametrize("kind", ["sign", "lloyd-max:bits=2", "uniform:bits=3,stochastic=true"])
def test_blocks_of_any_size_and_whole_segments_share_a_scale_as_defined(kind, block):
    downlink = f"{kind}{',' if ':' in kind else ':'}block={block}"
    for uplink in ("log:k=6,block=256", "sign:block=0"):
        assert_same(make_step((20_001, 511), uplink=uplink, downlink=downlink))


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("adam", ADAMS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_every_optimizer_and_answer_at_odd_sizes(numel, adam, answer):
    assert_same(make_step((numel,), adam=ADAMS[adam], answer=answer))


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("count", range(1, 9))
def test_one_to_eight_contributions(uplink, count):
    downlink = "uniform:bits=8"
    assert_same(make_step((2500, 40), uplink=uplink, count=count, downlink=downlink))


@pytest.mark.parametrize("uplink", UPLINKS)
def test_a_crowd_of_contributions(uplink):
    assert_same(make_step((9001, 40), uplink=uplink, count=17, adam=AdamConfig()))


@pytest.mark.parametrize("uplink", [*codec_specs(), *(f"{name},block=256" for name in HALVES)])
@pytest.mark.parametrize("count", [4, 6, 13])
def test_however_many_are_summed_together_the_order_is_that_of_ranks(uplink, count):
    assert_same(make_step((9100, 300), uplink=uplink, count=count, answer="none"))


def test_the_sum_is_taken_by_rank_and_multiplied_by_the_rounded_inverse():
    """1e8 + -1e8 + 1 keeps the 1, 1e8 + 1 + -1e8 loses it."""
    base = make_step((20,), uplink="fp32", answer="none")
    big, minus, one = (np.full(20, value, np.float32) for value in (1e8, -1e8, 1.0))
    for level in kernels.available():
        for order, expected in (((big, minus, one), 1.0), ((big, one, minus), 0.0)):
            x = np.zeros(20, np.float32)
            payloads = [array.tobytes() for array in order]
            kernels.get(level).server_step(dataclasses.replace(base, x=x, payloads=payloads))
            assert np.all(x == -np.float32(expected) * np.float32(1 / 3))


@pytest.mark.parametrize("level", NATIVE)
def test_the_inverse_of_any_count_is_rounded_as_the_definition_rounds_it(level):
    base = make_step((1,), uplink="fp32", answer="none")
    three = np.full(1, 3.0, np.float32).tobytes()
    for count in (3, 7, 49, 98, 161, 1000):
        step = dataclasses.replace(base, payloads=[three] * count)
        assert outcome(level, step) == outcome(kernels.REFERENCE, step)


@pytest.mark.parametrize("level", kernels.available())
def test_without_error_feedback_nothing_is_kept_of_what_a_delta_leaves_out(level):
    step = make_step((3000,), answer="delta")
    came = np.empty(3000, np.float32)
    before = step.x.copy()
    kernels.get(level).server_step(step)
    get_codec("sign").decode(step.answer, came)
    assert step.x.tobytes() == (before + came).tobytes()


@pytest.mark.parametrize("level", NATIVE)
def test_unaligned_payloads_and_answers_are_welcome(level):
    step = make_step((5000,), uplink="log:k=6,block=256", adam=AdamConfig())
    expected = outcome(level, step)
    frames = [np.frombuffer(b"\0" + bytes(payload), np.uint8)[1:] for payload in step.payloads]
    answer = np.empty(len(step.answer) + 1, np.uint8)[1:]
    assert outcome(level, dataclasses.replace(step, payloads=frames, answer=answer)) == expected


@pytest.mark.parametrize("level", kernels.available())
def test_a_shard_without_segments_is_a_step_of_nothing(level):
    kernels.get(level).server_step(make_step((), answer="weights"))


REFUSED = {
    "x has 99 elements, must have 100": {"x": np.zeros(99, np.float32)},
    "m has 99 elements, must have 100: one for each value": {"m": np.zeros(99, np.float32)},
    "residual has 1 elements": {"residual": np.zeros(1, np.float32)},
    "payload has 5 elements, must have 68: the uplink's exact size": {"payloads": [bytes(5)]},
    "answer has 5 elements, must have 68: the downlink's exact size": {"answer": bytearray(5)},
    "scratch has 99 elements, must have at least 100": {"scratch": np.zeros(99, np.float32)},
    "there must be at least one payload": {"payloads": []},
    "starts must be one for each segment": {"starts": [0, 0]},
    "adam, m and v go together": {"v": None},
    "only with them": {"adam": None, "m": None, "v": None, "vmax": np.zeros(100, np.float32)},
    "only a delta has a residual": {"delta": False},
}


@pytest.mark.parametrize("level", kernels.available())
@pytest.mark.parametrize("message", REFUSED)
def test_fields_that_do_not_fit_are_named_before_anything_is_touched(level, message):
    step = make_step((100,), adam=AdamConfig())
    before = {name: getattr(step, name).tobytes() for name in ("x", "m", "v", "residual")}
    with pytest.raises(ValueError, match=message):
        kernels.get(level).server_step(dataclasses.replace(step, **REFUSED[message]))
    assert {name: getattr(step, name).tobytes() for name in before} == before


@pytest.mark.parametrize("level", NATIVE)
def test_what_is_no_writable_float32_vector_is_named(level):
    step = make_step((100,), adam=AdamConfig())
    kernel = kernels.get(level).server_step
    with pytest.raises(TypeError, match="m must be a writable, C-contiguous 1-D float32 array"):
        kernel(dataclasses.replace(step, m=step.m.astype(np.float64)))
    with pytest.raises(TypeError, match="answer must be a writable"):
        kernel(dataclasses.replace(step, answer=bytes(68)))
    with pytest.raises(ValueError, match="no format of family 9"):
        kernel(dataclasses.replace(step, uplink=step.uplink._replace(family=9)))
