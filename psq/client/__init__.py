"""A worker's conversation with its servers: joining, pushing rounds, taking weights, leaving.

`machine` decides (pure, one for each server), `client` and `channel` are the shell around it;
`round`, `replica`, `waits` and `frames` are what the machine is made of; `probe` asks a server
before joining. Frames hold bytes: what they mean as numbers is `psq.torch`'s and the codecs'
business.
"""

from psq.client.client import Client
from psq.client.hooks import Hooks
from psq.client.identity import Attempt, Identity, Kept, Pending
from psq.client.probe import LinkRates, ask_job, probe_link
from psq.client.round import RoundResult
from psq.client.waits import Patience

__all__ = [
    "Attempt",
    "Client",
    "Hooks",
    "Identity",
    "Kept",
    "LinkRates",
    "Patience",
    "Pending",
    "RoundResult",
    "ask_job",
    "probe_link",
]
