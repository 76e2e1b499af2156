import numpy as np


def test_h_is_the_sum_of_all_that_was_said(model):
    rule = model.rule("ef21")
    h = np.zeros(model.layout.numel, np.float32)
    for step in range(3):
        gradients = model.values(step)
        message = model.write(rule, gradients)
        assert message.tobytes() == (model.flat(gradients) - h).tobytes()
        said = np.sign(message)  # some codec
        for shard in model.layout.shards:
            rule.said(shard.index, step + 1, said[shard.offset : shard.offset + shard.numel])
        h += said
        assert rule.state_arrays()["h"].tobytes() == h.tobytes()


def test_what_was_not_applied_is_said_again(model):
    rule, gradients = model.rule("ef21"), model.values(0)
    message = model.write(rule, gradients)
    for shard in model.layout.shards:
        part = message[shard.offset : shard.offset + shard.numel]
        rule.said(shard.index, 1, part)
        rule.unsaid(shard.index, part)
    assert model.write(rule, gradients).tobytes() == message.tobytes()
