"""A worker's conversation with its server: joining, pushing rounds, taking weights, leaving.

`machine` decides (pure), `client` is the shell around it; `round`, `replica`, `waits` and `frames`
are what the machine is made of. Frames hold bytes: what they mean as numbers is `psq.torch`'s and
the codecs' business.
"""

from psq.client.client import Client
from psq.client.machine import Hooks
from psq.client.round import RoundResult
from psq.client.waits import Patience

__all__ = ["Client", "Hooks", "Patience", "RoundResult"]
