"""The worker's side of a push: direction + residual -> payload, shard by shard.

    gradient recipes   c = g + e          straight from the tensors' own memory, no copy
    Adam recipes       c = u + e          u from this worker's moments, in the cache
    other directions   c = rule(g) + e    the rule of the part (`psq.rules`), by way of scratch
    local steps        x <- x - u         H - 1 times, said to nobody (`descend`); then
                       c = x0 - x + u + e                     x0: where the replica stands
    all                d = C(c);  e <- c - d;  push d         (no e without error feedback)

The residual e is what the codec could not say this time, and is said later: the sum of all decoded
pushes plus e is the sum of all directions, up to float32 addition. A push that the server did not
apply is sent again byte for byte, or folded back with `restore`; d is lost only where no server
would ever take it (`MAX_SCALE`). A step may also say nothing at all (`absorb`): e <- u + e.
With local steps the same holds of x0 - x + u, which is the sum of the local directions as far as
the weights have taken it: float32 rounds x in every step.

The residual may be kept in bf16: 2 bytes a value instead of 4. What stays in it is then rounded to
nearest, and the sum above holds up to 2^-8 of each residual there was; a direction below 2^-9 of
the residual is lost by `absorb`.

Which codec C is may change from push to push (`Uplink.choice`): `compress` says which it took.

Each shard is compressed once in a step. A gradient with NaN or Inf must not reach the server, nor
what a worker keeps. Two ways to see to that, shard by shard:
- `finite` before `compress`: nothing is touched, e, m and v stay as they were; one more read. What
  `Compressor.reads_first` asks for.
- `payload_finite` after it, for gradient recipes: nearly free. A block that is not finite has left
  its part of e alone; the others are folded back with `restore`, so c waits in e for the next step.

Weight decay acts where the direction is formed: here for Adam on the worker, else on the server.

The units of the residual may change. Where the server's step is the learning rate times something
linear in the messages (SGD), the residual is rescaled when the rate changes, e <- e rate_before /
rate_now, so that what it still holds has the weight of its own step (after Zheng 2019). With a rate
of 0, as at the start of a warm-up, the message counts for nothing and the residual is left alone:
sum rate d + rate e is sum rate c. Where the server has Adam or a rate of its own, nothing of this
is done.
Where all nodes hold a unit for each value and change it (`ApplyRule.rescale`), `rescale` follows.
"""

from __future__ import annotations

from psq.feedback.compressor import Compressor
from psq.feedback.counts import ShardCounts
from psq.feedback.residual import ResidualType
from psq.seeds import SERVER_RANK, stream_seed

__all__ = ["SERVER_RANK", "Compressor", "ResidualType", "ShardCounts", "stream_seed"]
