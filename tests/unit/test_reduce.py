from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from psq.codec import ShardCodec, get_codec
from psq.errors import RemotePayloadError, UsageError
from psq.layout import PART_NUMEL
from psq.optim import Adam
from psq.plan import Plan
from psq.presets import preset
from psq.recipe import AdamConfig
from psq_server.reduce import Reducer

SPECS = [("table", (700, 600)), ("bias", (40,)), ("head", (10, 30))]
LR = 1e-3


def make_plan(recipe="server-adam", adam=None, world_size=2, **codecs):
    return Plan.of(SPECS, preset(recipe, adam).with_codecs(**codecs), world_size)


def random_values(numel, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, numel).astype(np.float32)


def started(plan, job_seed=0):
    """A reducer with random weights, and a copy of them."""
    reducer = Reducer(plan, seed=job_seed)
    x = random_values(plan.layout.numel, seed=99)
    for shard in plan.layout.shards:
        values = x[shard.offset : shard.offset + shard.numel]
        for part, start in enumerate(range(0, shard.numel, PART_NUMEL)):
            reducer.init(
                shard.index, part, memoryview(values[start : start + PART_NUMEL]).cast("B")
            )
    return reducer, x


def pushed(plan, shard, values, seed=0):
    codec = ShardCodec(get_codec(plan.recipe.uplink.codec), shard)
    payload = bytearray(codec.nbytes)
    part = np.ascontiguousarray(values[shard.offset : shard.offset + shard.numel])
    codec.encode(part, payload, seed=seed)
    return memoryview(payload)


def run_round(reducer, plan, messages, lr=LR):
    """Reduce every shard; messages: f32[numel] per contributing rank."""
    return [
        reducer.reduce(shard.index, [pushed(plan, shard, m) for m in messages], lr)
        for shard in plan.layout.shards
    ]


def decoded(plan, answers):
    out = np.empty(plan.layout.numel, np.float32)
    codec = get_codec(plan.recipe.downlink.codec)
    for shard, answer in zip(plan.layout.shards, answers, strict=True):
        ShardCodec(codec, shard).decode(answer, out[shard.offset : shard.offset + shard.numel])
    return out


def flat(weights):
    return np.concatenate([array.ravel() for array in weights.values()])


def test_weights_come_in_parts_and_go_out_by_name():
    plan = make_plan(downlink="delta:sign", uplink="sign")
    assert plan.layout.shards[0].numel > PART_NUMEL
    reducer, x = started(plan)
    weights = reducer.weights()
    assert [(name, array.shape) for name, array in weights.items()] == SPECS
    assert flat(weights).tobytes() == x.tobytes()


def test_there_are_no_weights_until_the_last_part():
    plan = make_plan("fp32")
    reducer = Reducer(plan)
    for shard in plan.layout.shards:
        assert not reducer.has_weights
        reducer.init(shard.index, 0, random_values(shard.numel).tobytes())
    assert reducer.has_weights


@pytest.mark.parametrize(
    ("shard", "part", "values", "message"),
    [
        (9, 0, b"", "which this server does not have"),
        (0, 5, b"", "part 5 of shard 0: it has 1"),
        (0, 0, bytes(12), "has 12 bytes, the layout says"),
        (1, 0, b"\x00\x00\xc0\x7f" * 158_196, "hold NaN or Inf"),
    ],
)
def test_initial_weights_that_do_not_fit_are_refused(shard, part, values, message):
    plan = make_plan("fp32")
    assert [s.numel for s in plan.layout.shards] == [262_144, 158_196]
    reducer = Reducer(plan)
    with pytest.raises(RemotePayloadError, match=message):
        reducer.init(shard, part, values)
    assert not flat(reducer.weights()).any()


@pytest.mark.parametrize(
    "config", [AdamConfig(), AdamConfig(weight_decay=0.1), AdamConfig(amsgrad=True)]
)
def test_the_servers_adam_steps_on_the_mean_gradient(config):
    plan = make_plan("fp32", config)
    reducer, x = started(plan)
    adam, out = Adam(config, x.size), np.empty_like(x)
    for step in range(3):
        gradients = [random_values(x.size, seed=10 * step + rank) for rank in range(2)]
        run_round(reducer, plan, gradients)
        adam.direction((gradients[0] + gradients[1]) * np.float32(0.5), LR, out, x=x)
        x -= out
    assert flat(reducer.weights()).tobytes() == x.tobytes()


def test_updates_of_worker_moments_are_averaged_and_subtracted():
    plan = make_plan("qadam", uplink="fp32")
    reducer, x = started(plan)
    updates = [random_values(x.size, seed=rank) for rank in range(3)]
    answers = run_round(reducer, plan, updates, lr=None)
    expected = x - (updates[0] + updates[1] + updates[2]) * np.float32(1 / 3)
    assert flat(reducer.weights()).tobytes() == expected.tobytes()
    np.testing.assert_allclose(decoded(plan, answers), expected, atol=4e-3)
    assert set(reducer.state_arrays()) == {"x"}


@pytest.mark.parametrize("downlink", ["delta:sign", "delta:uniform:bits=4", "delta:fp32"])
def test_a_delta_moves_the_weights_by_what_was_sent_and_keeps_the_rest(downlink):
    plan = make_plan("efficient-adam", uplink="fp32", downlink=downlink)
    reducer, x = started(plan)
    update = random_values(x.size, seed=5)
    sent = decoded(plan, run_round(reducer, plan, [update]))
    assert flat(reducer.weights()).tobytes() == (x + sent).tobytes()
    np.testing.assert_allclose(reducer.state_arrays()["residual"], -update - sent, atol=1e-7)


def test_a_delta_without_error_feedback_forgets_the_rest():
    recipe = preset("efficient-adam").with_codecs(uplink="fp32", downlink="delta:sign")
    downlink = dataclasses.replace(recipe.downlink, error_feedback=False)
    plan = Plan.of(SPECS, dataclasses.replace(recipe, downlink=downlink), 2)
    reducer, x = started(plan)
    sent = decoded(plan, run_round(reducer, plan, [random_values(x.size, seed=5)]))
    assert flat(reducer.weights()).tobytes() == (x + sent).tobytes()
    assert set(reducer.state_arrays()) == {"x"}


@pytest.mark.parametrize("downlink", ["delta:sign", "delta:fp32", "weights:uniform:bits=8"])
def test_a_round_without_contributions_changes_nothing(downlink):
    plan = make_plan(downlink=downlink)
    reducer, x = started(plan)
    first = run_round(reducer, plan, [random_values(x.size, seed=5)])
    before = {name: array.copy() for name, array in reducer.state_arrays().items()}
    answers = run_round(reducer, plan, [], lr=None)
    for name, array in reducer.state_arrays().items():
        assert array.tobytes() == before[name].tobytes()
    if downlink.startswith("delta"):
        assert not decoded(plan, answers).any()
    else:
        assert [a.tobytes() for a in answers] == [a.tobytes() for a in first]


@pytest.mark.parametrize("downlink", ["sign", "log:k=2", "lloyd-max:bits=3", "bf16", "fp32"])
def test_a_round_without_contributions_changes_no_bit_of_a_negative_zero(downlink):
    plan = make_plan(downlink=f"delta:{downlink}")
    reducer, x = started(plan)
    reducer.init(0, 0, np.full(min(x.size, PART_NUMEL), -0.0, np.float32).tobytes())
    before = reducer.state_arrays()["x"].tobytes()
    run_round(reducer, plan, [], lr=None)
    assert reducer.state_arrays()["x"].tobytes() == before


def test_adams_bias_correction_does_not_count_rounds_without_contributions():
    plan = make_plan("fp32")
    reducer, x = started(plan)
    run_round(reducer, plan, [], lr=LR)
    run_round(reducer, plan, [np.ones(x.size, np.float32)])
    np.testing.assert_allclose(x - flat(reducer.weights()), LR, rtol=1e-4)


def test_a_learning_rate_of_zero_moves_nothing():
    plan = make_plan("fp32", AdamConfig(weight_decay=0.1))
    reducer, x = started(plan)
    run_round(reducer, plan, [random_values(x.size, seed=5)], lr=0.0)
    assert flat(reducer.weights()).tobytes() == x.tobytes()
    assert reducer.state_arrays()["m"].any()


@pytest.mark.parametrize("lr", [None, -1.0, float("nan")])
def test_the_servers_adam_insists_on_a_learning_rate(lr):
    plan = make_plan("fp32")
    reducer, x = started(plan)
    with pytest.raises(UsageError, match="learning rate"):
        run_round(reducer, plan, [random_values(x.size)], lr=lr)
    assert flat(reducer.weights()).tobytes() == x.tobytes()


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_an_impossible_rate_from_a_worker_is_the_workers_fault(rate):
    with pytest.raises(RemotePayloadError, match="learning rate"):
        Reducer(make_plan("server-adam")).check_rate(rate)
    Reducer(make_plan("qadam")).check_rate(rate)  # the rate is inside the message


def test_a_payload_of_another_length_is_refused():
    plan = make_plan()
    reducer = Reducer(plan)
    reducer.check(0, pushed(plan, plan.layout.shards[0], random_values(plan.layout.numel)))
    with pytest.raises(RemotePayloadError, match="must have"):
        reducer.check(0, memoryview(bytes(17)))


def test_a_payload_with_a_scale_that_is_not_finite_is_refused():
    plan = make_plan()
    shard = plan.layout.shards[0]
    payload = pushed(plan, shard, random_values(plan.layout.numel))
    payload[:4] = np.float32(np.inf).tobytes()
    with pytest.raises(RemotePayloadError, match="NaN or Inf"):
        Reducer(plan).check(0, payload)


def test_the_answer_is_written_where_the_caller_wants_it():
    plan = make_plan()
    reducer, x = started(plan)
    shard = plan.layout.shards[0]
    frame = np.full(100 + reducer.payload_nbytes(0), 7, np.uint8)
    answer = reducer.reduce(0, [pushed(plan, shard, random_values(x.size))], LR, frame[100:])
    assert np.shares_memory(answer, frame)
    assert np.all(frame[:100] == 7)
    other, _ = started(plan)
    again = other.reduce(0, [pushed(plan, shard, random_values(x.size))], LR)
    assert again.tobytes() == frame[100:].tobytes()


def test_a_late_joiner_of_a_delta_job_gets_the_weights_themselves_in_parts():
    plan = make_plan(uplink="sign", downlink="delta:sign")
    reducer, x = started(plan)
    run_round(reducer, plan, [random_values(x.size, seed=5)])
    shard = plan.layout.shards[0]
    full = reducer.full(0)
    assert full.wire_id == get_codec("fp32").wire_id
    assert [part.size for part in full.parts[:-1]] == [4 * PART_NUMEL] * (len(full.parts) - 1)
    body = b"".join(part.tobytes() for part in full.parts)
    assert body == flat(reducer.weights())[: shard.numel].tobytes()


@pytest.mark.parametrize("downlink", ["uniform:bits=8", "uniform:bits=4,stochastic=true", "bf16"])
def test_a_late_joiner_of_a_weights_job_gets_the_last_broadcast(downlink):
    plan = make_plan(downlink=f"weights:{downlink}")
    reducer, x = started(plan)
    answers = run_round(reducer, plan, [random_values(x.size, seed=5)])
    for shard, answer in enumerate(answers):
        full = reducer.full(shard)
        assert full.wire_id == get_codec(downlink).wire_id
        assert [part.tobytes() for part in full.parts] == [answer.tobytes()]


def test_the_job_seed_and_the_round_choose_a_stochastic_downlinks_numbers():
    plan = make_plan(downlink="weights:uniform:bits=4,stochastic=true")
    images = []
    for job_seed in (0, 0, 1):
        reducer, _ = started(plan, job_seed)
        images += [reducer.full(0).parts[0].tobytes()]
        reducer.reduce(0, [], None)
        images += [reducer.full(0).parts[0].tobytes()]
    assert images[0] == images[2]
    assert images[1] == images[3]
    assert len(set(images)) == 4


@pytest.mark.parametrize(
    ("recipe", "adam", "names"),
    [
        ("server-adam", AdamConfig(), {"x", "m", "v", "residual"}),
        ("server-adam", AdamConfig(amsgrad=True), {"x", "m", "v", "vmax", "residual"}),
        ("efficient-adam", AdamConfig(), {"x", "residual"}),
        ("qadam", AdamConfig(), {"x"}),
        ("fp32", AdamConfig(), {"x", "m", "v"}),
    ],
)
def test_a_recipe_has_only_the_state_it_needs(recipe, adam, names):
    plan = make_plan(recipe, adam)
    state = Reducer(plan).state_arrays()
    assert set(state) == names
    assert all(array.size == plan.layout.numel for array in state.values())


def test_the_reducer_runs_without_torch():
    code = "import sys, psq_server.reduce; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- several servers


def test_servers_that_share_a_job_do_together_what_one_does():
    plans = [
        Plan.of(SPECS, preset("server-adam").with_codecs(uplink="sign"), 2, servers=2, server=s)
        for s in (0, 1)
    ]
    layout = plans[0].layout
    x = random_values(layout.numel, seed=9)
    messages = [random_values(layout.numel, seed=s) for s in (1, 2)]
    got: dict[int, bytes] = {}
    for plan in plans:
        reducer = Reducer(plan)
        assert reducer.state_arrays()["x"].size == sum(shard.numel for shard in plan.owned)
        for shard in plan.owned:
            assert shard.numel <= PART_NUMEL
            values = x[shard.offset : shard.offset + shard.numel]
            reducer.init(shard.index, 0, values.tobytes())
            payloads = [pushed(plan, shard, message) for message in messages]
            got[shard.index] = reducer.reduce(shard.index, payloads, LR).tobytes()
    assert sorted(got) == list(range(len(layout.shards))), "every shard is somebody's"
    for shard in layout.shards:
        one = Plan.of([("s", (shard.numel,))], plans[0].recipe, 2)
        if len(shard.segments) > 1:
            continue  # scales of several segments: another plan
        reducer = Reducer(one)
        reducer.init(0, 0, x[shard.offset : shard.offset + shard.numel].tobytes())
        payloads = [pushed(plans[0], shard, message) for message in messages]
        assert reducer.reduce(0, payloads, LR).tobytes() == got[shard.index]


def test_a_server_refuses_initial_weights_of_anothers_shard():
    plan = Plan.of(SPECS, preset("fp32"), 2, servers=2)
    others = next(i for i, owner in enumerate(plan.layout.owners) if owner == 1)
    with pytest.raises(RemotePayloadError, match="which this server does not have"):
        Reducer(plan).init(others, 0, bytes(4))
