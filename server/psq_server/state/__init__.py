"""The server's state machine: pure, and all of the server's decisions.

`machine` dispatches, `joining`, `training` and `presence` handle, `world` is what they share;
`events` is the vocabulary. `round`, `members`, `job` and `waits` are its nouns.
"""

from psq_server.state.branches import Branches, parse_branches
from psq_server.state.events import (
    Action,
    Adopt,
    Broadcast,
    Committed,
    Echo,
    EndedAbove,
    Event,
    FrameReceived,
    Initialize,
    Judge,
    Judged,
    Log,
    PeerBehind,
    PeerGone,
    Pushed,
    Reduce,
    Save,
    Send,
    SendFull,
    ShardReduced,
    Stop,
    StopRequested,
    Tick,
    WaitsAbove,
    WeightsAbove,
)
from psq_server.state.machine import ServerState, Snapshot
from psq_server.state.world import Counts, Settings

__all__ = [
    "Action",
    "Adopt",
    "Branches",
    "Broadcast",
    "Committed",
    "Counts",
    "Echo",
    "EndedAbove",
    "Event",
    "FrameReceived",
    "Initialize",
    "Judge",
    "Judged",
    "Log",
    "PeerBehind",
    "PeerGone",
    "Pushed",
    "Reduce",
    "Save",
    "Send",
    "SendFull",
    "ServerState",
    "Settings",
    "ShardReduced",
    "Snapshot",
    "Stop",
    "StopRequested",
    "Tick",
    "WaitsAbove",
    "WeightsAbove",
    "parse_branches",
]
