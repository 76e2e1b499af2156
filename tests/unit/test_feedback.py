from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from psq.codec import ShardCodec, get_codec
from psq.errors import ConfigError, UsageError
from psq.feedback import SERVER_RANK, Compressor, stream_seed
from psq.optim import Adam
from psq.plan import Plan
from psq.presets import preset
from psq.recipe import AdamConfig

SPECS = [("conv", (40, 7, 5, 5)), ("bias", (40,)), ("table", (600, 500)), ("head", (3, 3))]
LR = 1e-3


def make_plan(recipe="server-adam", adam=None, world_size=2, **codecs):
    return Plan.of(SPECS, preset(recipe, adam).with_codecs(**codecs), world_size)


def gradients_of(plan, seed=0):
    """Per shard, per segment: views into one array per tensor, as a model's gradients are."""
    rng = np.random.default_rng(seed)
    layout = plan.layout
    tensors = [rng.standard_normal(t.numel, dtype=np.float32) for t in layout.tensors]
    return [
        [tensors[s.tensor][s.start : s.start + s.numel] for s in shard.segments]
        for shard in layout.shards
    ]


def compress_all(compressor, plan, gradients, **options):
    payloads = []
    for shard in plan.layout.shards:
        payload = np.empty(compressor.nbytes(shard.index), np.uint8)
        compressor.compress(shard.index, gradients[shard.index], LR, payload, **options)
        payloads.append(payload)
    return payloads


def decode_all(plan, payloads):
    out = np.empty(plan.layout.numel, np.float32)
    codec = get_codec(plan.recipe.uplink.codec)
    for shard, payload in zip(plan.layout.shards, payloads, strict=True):
        part = out[shard.offset : shard.offset + shard.numel]
        ShardCodec(codec, shard).decode(payload, part)
    return out


def flat(gradients):
    return np.concatenate([values for shard in gradients for values in shard])


def test_the_layout_under_test_has_split_tensors_and_shared_shards():
    shards = make_plan(uplink="fp32").layout.shards
    assert len(shards) > 1
    assert max(len(shard.segments) for shard in shards) > 1


def test_a_gradient_recipe_says_the_gradient_and_keeps_the_rest():
    plan = make_plan(uplink="sign")
    compressor, gradients = Compressor(plan, 0), gradients_of(plan)
    said = decode_all(plan, compress_all(compressor, plan, gradients))
    residual = compressor.state_arrays()["residual"]
    np.testing.assert_allclose(said + residual, flat(gradients), atol=1e-6)


def test_a_gradient_recipe_has_no_moments_and_leaves_the_gradients_alone():
    plan = make_plan()
    compressor, gradients = Compressor(plan, 0), gradients_of(plan)
    before = flat(gradients)
    compress_all(compressor, plan, gradients)
    assert set(compressor.state_arrays()) == {"residual"}
    assert flat(gradients).tobytes() == before.tobytes()


def test_without_error_feedback_there_is_no_residual():
    plan = make_plan("fp32")
    compressor, gradients = Compressor(plan, 0), gradients_of(plan)
    payloads = compress_all(compressor, plan, gradients)
    assert compressor.state_arrays() == {}
    assert decode_all(plan, payloads).tobytes() == flat(gradients).tobytes()
    compressor.restore(0, payloads[0])  # nowhere to keep it: nothing happens


@pytest.mark.parametrize("error_feedback", [False, True])
def test_an_adam_recipe_says_adams_direction(error_feedback):
    plan = make_plan("efficient-adam", uplink="fp32")
    uplink = dataclasses.replace(plan.recipe.uplink, error_feedback=error_feedback)
    plan = Plan.of(SPECS, dataclasses.replace(plan.recipe, uplink=uplink), 2)
    compressor, adam = Compressor(plan, 0), Adam(AdamConfig(), plan.layout.numel)
    out = np.empty(plan.layout.numel, np.float32)
    for step in range(3):
        gradients = gradients_of(plan, seed=step)
        payloads = compress_all(compressor, plan, gradients)
        adam.direction(flat(gradients), LR, out)
        assert decode_all(plan, payloads).tobytes() == out.tobytes()
    expected = {"m", "v"} | ({"residual"} if error_feedback else set())
    assert set(compressor.state_arrays()) == expected


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_of_worker_moments_uses_the_weights_given(decoupled):
    config = AdamConfig(weight_decay=0.1, decoupled=decoupled)
    plan = make_plan("efficient-adam", config, uplink="fp32")
    compressor, gradients = Compressor(plan, 0), gradients_of(plan)
    weights = gradients_of(plan, seed=9)
    out = np.empty(plan.layout.numel, np.float32)
    Adam(config, plan.layout.numel).direction(flat(gradients), LR, out, x=flat(weights))
    payloads = []
    for shard in plan.layout.shards:
        payload = np.empty(compressor.nbytes(shard.index), np.uint8)
        segments = gradients[shard.index]
        compressor.compress(shard.index, segments, LR, payload, weights=weights[shard.index])
        payloads.append(payload)
    assert decode_all(plan, payloads).tobytes() == out.tobytes()


def test_weight_decay_of_worker_moments_asks_for_the_weights():
    plan = make_plan("efficient-adam", AdamConfig(weight_decay=0.1))
    with pytest.raises(UsageError, match="current weights"):
        compress_all(Compressor(plan, 0), plan, gradients_of(plan))


def test_the_variance_correction_knows_the_number_of_workers():
    four = Compressor(make_plan("qadam-1bit", world_size=4), 0)
    alone = Compressor(make_plan("qadam-1bit", world_size=1), 0)
    assert set(four.state_arrays()) == {"residual", "m", "v", "s"}
    assert set(alone.state_arrays()) == {"residual", "m", "v"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_seen_in_any_segment(value):
    plan = make_plan()
    gradients = gradients_of(plan)
    assert all(Compressor.finite(shard) for shard in gradients)
    gradients[-1][-1][-1] = value
    assert not all(Compressor.finite(shard) for shard in gradients)


@pytest.mark.parametrize("uplink", ["sign", "log:k=2", "fp32"])
def test_a_rejected_payload_folds_back_into_the_residual(uplink):
    plan = make_plan(uplink=uplink)
    compressor, gradients = Compressor(plan, 0), gradients_of(plan)
    payloads = compress_all(compressor, plan, gradients)
    for shard, payload in enumerate(payloads):
        compressor.restore(shard, payload)
    np.testing.assert_allclose(compressor.state_arrays()["residual"], flat(gradients), atol=1e-6)


@pytest.mark.parametrize("uplink", ["sign", "log:k=2", "uniform:bits=2", "fp32", "bf16"])
def test_a_payload_that_no_server_takes_is_given_up_with_its_shards_residual(uplink):
    """Folded back it would be said, and refused, for ever."""
    plan = make_plan(uplink=uplink)
    compressor, gradients = Compressor(plan, 0), gradients_of(plan)
    gradients[0][0][3] = np.float32(1e30)
    payloads = compress_all(compressor, plan, gradients)
    kept = [compressor.restore(shard, payload) for shard, payload in enumerate(payloads)]
    assert kept == [False] + [True] * (len(payloads) - 1)
    residual = compressor.state_arrays()["residual"]
    assert not residual[: plan.layout.shards[0].numel].any()
    rest = flat(gradients)[plan.layout.shards[0].numel :]
    np.testing.assert_allclose(residual[plan.layout.shards[0].numel :], rest, atol=1e-6)


def test_segments_that_are_not_the_layouts_are_refused_before_anything_changes():
    plan = make_plan()
    compressor, gradients = Compressor(plan, 0), gradients_of(plan)
    payload = np.empty(compressor.nbytes(0), np.uint8)
    with pytest.raises(UsageError, match="shard 0 has segments of"):
        compressor.compress(0, gradients[0][:-1], LR, payload)
    assert not compressor.state_arrays()["residual"].any()


def test_segments_that_are_not_the_layouts_do_not_reach_the_moments():
    plan = make_plan("efficient-adam")
    compressor, gradients = Compressor(plan, 0), gradients_of(plan)
    payload = np.empty(compressor.nbytes(0), np.uint8)
    for wrong in (gradients[0][:-1], [g[:-1] for g in gradients[0]]):
        with pytest.raises(UsageError, match="shard 0 has segments of"):
            compressor.compress(0, wrong, LR, payload)
    assert not compressor.state_arrays()["m"].any()


@pytest.mark.parametrize("recipe", ["server-adam", "efficient-adam", "qadam-1bit"])
def test_what_is_said_and_what_waits_is_the_sum_of_all_directions(recipe):
    plan = make_plan(recipe, uplink="log:k=6")
    compressor, said = Compressor(plan, 0), np.zeros(plan.layout.numel, np.float32)
    meant = np.zeros(plan.layout.numel)
    adam = plan.recipe.direction.adam
    adam = Adam(adam, plan.layout.numel, workers=2) if adam else None
    for step in range(6):
        gradients = gradients_of(plan, seed=step)
        direction = flat(gradients)
        if adam is not None:
            adam.direction(flat(gradients), LR, direction)
        meant += direction
        if step % 3 == 2:
            said += decode_all(plan, compress_all(compressor, plan, gradients))
            continue
        before = compressor.state_arrays()["residual"].copy()
        absorb_all(compressor, plan, gradients)
        after = compressor.state_arrays()["residual"]
        assert after.tobytes() == (before + direction).tobytes()
    assert compressor.steps == 6
    residual = compressor.state_arrays()["residual"]
    np.testing.assert_allclose(said + residual, meant, atol=1e-5 * np.abs(meant).max())


def absorb_all(compressor, plan, gradients):
    for shard in plan.layout.shards:
        compressor.absorb(shard.index, gradients[shard.index], LR)


def test_a_step_that_waited_draws_no_number_twice():
    plan = make_plan(uplink="uniform:bits=2,stochastic=true")
    gradients = gradients_of(plan)
    waited, resumed = Compressor(plan, 0), Compressor(plan, 0)
    absorb_all(waited, plan, gradients)
    resumed.state_arrays()["residual"][:] = waited.state_arrays()["residual"]
    resumed.resume(1)
    ours = compress_all(waited, plan, gradients)
    theirs = compress_all(resumed, plan, gradients)
    assert [p.tobytes() for p in ours] == [p.tobytes() for p in theirs]


def test_without_error_feedback_no_step_can_wait():
    plan = make_plan("fp32")
    with pytest.raises(UsageError, match="without error feedback a step cannot wait"):
        absorb_all(Compressor(plan, 0), plan, gradients_of(plan))


def test_a_wait_with_other_segments_changes_nothing():
    plan = make_plan("efficient-adam")
    compressor, gradients = Compressor(plan, 0), gradients_of(plan)
    with pytest.raises(UsageError, match="shard 0 has segments of"):
        compressor.absorb(0, gradients[0][:-1], LR)
    assert not any(array.any() for array in compressor.state_arrays().values())


@pytest.mark.parametrize("recipe", ["server-adam", "efficient-adam"])
@pytest.mark.parametrize("uplink", ["sign", "lloyd-max:bits=4,block=256"])
def test_a_bf16_residual_conserves_what_is_meant_up_to_its_rounding(recipe, uplink):
    plan = make_plan(recipe, uplink=uplink)
    wide, narrow = Compressor(plan, 0), Compressor(plan, 0, residual_dtype="bf16")
    gradients = gradients_of(plan)
    said = [compress_all(compressor, plan, gradients) for compressor in (wide, narrow)]
    assert [p.tobytes() for p in said[0]] == [p.tobytes() for p in said[1]]
    kept, rounded = (c.state_arrays()["residual"] for c in (wide, narrow))
    assert rounded.dtype == np.uint16
    np.testing.assert_allclose(values_of(rounded), kept, rtol=2.0**-8)
    assert (values_of(rounded) != kept).any()


def values_of(residual):
    return (residual.astype(np.uint32) << 16).view(np.float32)


def test_a_rejected_payload_folds_back_into_a_bf16_residual():
    plan = make_plan(uplink="sign")
    compressor, gradients = Compressor(plan, 0, residual_dtype="bf16"), gradients_of(plan)
    payloads = compress_all(compressor, plan, gradients)
    assert all(compressor.restore(shard, payload) for shard, payload in enumerate(payloads))
    residual = values_of(compressor.state_arrays()["residual"])
    meant = flat(gradients)  # rounded twice
    np.testing.assert_allclose(residual, meant, atol=2.0**-7 * np.abs(meant).max())


def test_a_residual_that_cannot_be_had_is_refused():
    with pytest.raises(ConfigError, match="has no error feedback"):
        Compressor(make_plan("fp32"), 0, residual_dtype="bf16")
    with pytest.raises(ConfigError, match="choose f32 or bf16"):
        Compressor(make_plan(), 0, residual_dtype="f16")


def test_a_resumed_worker_makes_the_same_payloads():
    plan = make_plan("efficient-adam", uplink="uniform:bits=4,stochastic=true")
    first = Compressor(plan, 1, seed=7)
    for step in range(3):
        compress_all(first, plan, gradients_of(plan, seed=step))
    second = Compressor(plan, 1, seed=7)
    for name, array in second.state_arrays().items():
        array[:] = first.state_arrays()[name]
    second.resume(first.steps)
    expected = compress_all(first, plan, gradients_of(plan, seed=3))
    came = compress_all(second, plan, gradients_of(plan, seed=3))
    assert [p.tobytes() for p in came] == [p.tobytes() for p in expected]


def test_ranks_steps_shards_and_jobs_draw_different_numbers():
    plan = make_plan(uplink="uniform:bits=2,stochastic=true")
    gradients = gradients_of(plan)

    def payload(rank, seed, step):
        compressor = Compressor(plan, rank, seed=seed)
        compressor.resume(step)
        return compress_all(compressor, plan, gradients)[0].tobytes()

    streams = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({payload(*stream) for stream in streams}) == len(streams)
    assert payload(0, 0, 0) == payload(0, 0, 0)


def test_stream_seeds_are_fixed_for_ever():
    """Golden values: a replay of an old job must find its random numbers again."""
    assert stream_seed(0, 0, 0, 0) == 0x2130748AAAC80268
    assert stream_seed(1, 2, 3, 4) == 0xD55CCD4AEB3CCAFB
    seeds = {
        stream_seed(job, rank, step, shard)
        for job in range(4)
        for rank in (0, 1, 2, SERVER_RANK)
        for step in range(8)
        for shard in range(8)
    }
    assert len(seeds) == 4 * 4 * 8 * 8


@pytest.mark.parametrize("codec", ["sign", "lloyd-max:bits=4", "log:k=3", "bf16", "fp32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_payload_tells_of_a_gradient_that_is_not_finite(codec, value):
    plan = Plan.of(SPECS, preset("server-adam").with_codecs(uplink=codec), 1)
    worker = Compressor(plan, 0)
    for shard in plan.layout.shards:
        payload = np.zeros(worker.nbytes(shard.index), np.uint8)
        segments = [np.full(segment.numel, 0.5, np.float32) for segment in shard.segments]
        worker.compress(shard.index, segments, LR, payload)
        assert worker.payload_finite(shard.index, payload)
        segments[-1][-1] = value
        worker.compress(shard.index, segments, LR, payload)
        assert not worker.payload_finite(shard.index, payload)


def test_of_a_shard_that_is_not_finite_what_is_finite_waits_in_the_residual():
    plan = Plan.of([("a", (3000,))], preset("server-adam").with_codecs(uplink="sign"), 1)
    worker = Compressor(plan, 0)
    payload = np.zeros(worker.nbytes(0), np.uint8)
    gradient = np.random.default_rng(0).standard_normal(3000, np.float32)
    worker.compress(0, [gradient], LR, payload)
    before = worker.state_arrays()["residual"].copy()
    sick = gradient.copy()
    sick[1500] = np.nan  # in the second of three blocks
    worker.compress(0, [sick], LR, payload)
    assert worker.restore(0, payload)
    after = worker.state_arrays()["residual"]
    np.testing.assert_array_equal(after[1024:2048], before[1024:2048])
    for block in (slice(0, 1024), slice(2048, 3000)):
        np.testing.assert_allclose(after[block], (before + gradient)[block], atol=1e-6)


def test_a_shard_forgets_its_residual_alone():
    plan = Plan.of([("a", (600, 600))], preset("server-adam").with_codecs(uplink="fp32"), 1)
    worker = Compressor(plan, 0)
    residual = worker.state_arrays()["residual"]
    residual.fill(1.0)
    worker.forget(0)
    first = plan.layout.shards[0].numel
    assert not residual[:first].any()
    assert (residual[first:] == 1.0).all()
