"""Sessions: who may say what when, for both ends of a connection, without I/O.

Theory of operation
===================

One conversation runs over one connection between a worker and the server. Each end keeps a session,
`WorkerSession` or `ServerSession`; both run the automaton of `transitions`. `send` and `seal` make
frames, if they are legal now; `receive` takes one and gives its header and body, if it was legal.
Three more things are theirs.

Three-way join. A HELLO may be old: held up in a queue, or sent by a process that is dead. It binds
nobody. The server answers with a COOKIE that hands out an incarnation, and only the JOIN that bears
this incarnation takes the rank over. An old HELLO's owner never answers, so it cannot fence a
living worker. A repeated HELLO (same nonce) gets the same incarnation again.

Identity. A session fills run_id, epoch, incarnation, rank and plan into what it sends and checks
them in what it receives; its caller handles neither.

Stale frames. Connections break and come back while messages are queued, so a frame of an earlier
epoch, incarnation or connection is ordinary. It raises StaleFrameError and changes nothing. A
worker drops it. A server answers it with STALE_EPOCH, which tells the worker, if it still is that
incarnation, to join again with the same lineage: this is also how a worker whose connection was
replaced finds its way back.

A receive that raises leaves the session as it was, except at a worker that was fenced (then FENCED)
or refused, or that finds another run at its server's address (then CLOSED).

Never here: clocks, sockets, threads, randomness. Nonces, lineages and incarnations are arguments. A
session is not thread-safe.
"""

from psq_proto.conversation import HeaderFields, Message
from psq_proto.server_session import ServerSession
from psq_proto.transitions import TRANSITIONS, State
from psq_proto.worker_session import WorkerSession

__all__ = ["TRANSITIONS", "HeaderFields", "Message", "ServerSession", "State", "WorkerSession"]
