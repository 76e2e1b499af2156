import math

import numpy as np
import pytest

from psq.errors import UsageError


def norm(values):
    return math.sqrt(np.sum(np.square(values, dtype=np.float64)))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_whole_gradient_is_clipped_to_its_bound(model, scale):
    rule = model.rule("gaussian", clip=0.7, sigma=0.0)
    gradients = model.values(0, scale)
    said, g = model.write(rule, gradients), model.flat(gradients)
    assert norm(said) <= 0.7
    if norm(g) <= 0.69:
        assert said.tobytes() == g.tobytes()
    else:
        assert norm(said) > 0.699
        np.testing.assert_allclose(said * (norm(g) / 0.7), g, rtol=1e-4, atol=1e-6 * scale)


def test_the_noise_has_the_variance_that_was_asked_for(model):
    rule = model.rule("gaussian", clip=1e-9, sigma=0.3)
    said = model.write(rule, model.values(0)).astype(np.float64)
    n = said.size
    assert abs(said.mean()) < 5.0 * 0.3 / math.sqrt(n)
    assert abs(said.var() / 0.09 - 1.0) < 5.0 * math.sqrt(2.0 / n)
    within = (np.abs(said) < 0.3).mean()
    assert abs(within - 0.6827) < 5.0 * 0.5 / math.sqrt(n)


def test_noise_is_never_used_twice_nor_shared_by_the_jobs_seed(model):
    first, second = (model.rule("gaussian", clip=1e-9) for _ in range(2))
    zeros = model.values(0, 0.0)
    drawn = [model.write(first, zeros), model.write(first, zeros), model.write(second, zeros)]
    first.resume(0)
    drawn.append(model.write(first, zeros))
    assert len({values.tobytes() for values in drawn}) == len(drawn)
    shards = model.layout.shards
    least = min(shard.numel for shard in shards)
    parts = {drawn[0][s.offset : s.offset + least].tobytes() for s in shards}
    assert len(parts) == len(shards)


def test_the_secret_is_no_part_of_the_state(model):
    assert model.rule("gaussian").state_arrays() == {}


def test_with_a_known_secret_a_run_can_be_repeated(model):
    payloads = []
    for _ in range(2):
        rule = model.rule("gaussian")
        rule.use_secret(5)
        payloads.append([model.write(rule, model.values(step)).tobytes() for step in range(2)])
    assert payloads[0] == payloads[1]


def test_a_shard_is_not_written_before_all_gradients_were_seen(model):
    rule, gradients = model.rule("gaussian"), model.values(0)
    out = np.empty(model.layout.shards[0].numel, np.float32)
    arguments = (0, 1, 0.1, gradients[0], out)
    with pytest.raises(UsageError, match="call prepare"):
        rule.write(*arguments, weights=None, shared={})
    model.write(rule, gradients)
    with pytest.raises(UsageError, match="call prepare"):  # the factor is another step's
        rule.write(*arguments, weights=None, shared={})
