"""Windows over several payloads."""

from __future__ import annotations

import numpy as np

from psq.layout import SPLIT_NUMEL
from psq.rules.windows import WINDOW_NUMEL, Windows


def test_windows_show_the_decoded_values_once_and_in_order(make_bench, spec):
    bench = make_bench((WINDOW_NUMEL + 300, 5, 3 * SPLIT_NUMEL, 2 * WINDOW_NUMEL + 1, 9))
    messages = [None if v is None else bench.say(v, spec) for v in (bench.values(1)[0], None)]
    messages.append(bench.say(bench.values(2)[1], spec))
    whole = [bench.decoded(messages[0]), np.zeros(bench.shard.numel), bench.decoded(messages[2])]
    seen = 0
    for at, rows in Windows(bench.shard).rows(messages):
        assert at.start == seen
        assert 0 < at.stop - at.start <= WINDOW_NUMEL
        np.testing.assert_array_equal(rows, [values[at] for values in whole])
        rows.fill(np.nan)  # a consumer may write them
        seen = at.stop
    assert seen == bench.shard.numel
