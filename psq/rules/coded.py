"""Fractional repetition: the mean over groups of workers, each group heard once.

Ranks r k .. r k + r - 1 (r replicas) are group k. They compute the same message from the same data,
residual included, so any one of them speaks for all, and a round needs one of each group. The
coefficients of the code are 0 and 1: nothing is amplified, whatever the codec leaves out (after
gradient coding, Tandon et al., 1612.03301).

Which replica speaks is the server's state machine's to decide (`psq_server.state.replicas`); what
it hands over is one message of each group, and this rule takes their mean.
"""

from __future__ import annotations

from typing import Final

from psq.rules.base import AggregateRule

__all__ = ["MAX_LAG", "Coded"]

MAX_LAG: Final = 16
"""How many rounds a replica may be behind its group and still keep in step with it.

So many answers may wait for it, on the server and on its own side, each a round's weights.
"""


class Coded(AggregateRule):
    """The mean of what is handed over: see the module's docstring."""
