"""The wire: DEALERs for a worker, a ROUTER for a server, one ZeroMQ frame per message.

Only the modules named link, `psq.curve` and `psq.connections` import zmq. A link moves frames and
counts bytes; it never looks inside a frame, keeps no protocol state and starts no thread. It
belongs to one thread at a time: who shares one brings a lock.

What the options are for (all measured against libzmq 4.3.5):

- No ZMTP heartbeats: a busy peer past its receive limit aborts the process. TCP keepalive finds
  dead hosts, and the protocol's own heartbeats find dead processes.
- `IMMEDIATE`: nothing queues for a server that is not connected, and what was queued for a
  connection that broke is dropped with it. A `send` that finds no connection says so, and a
  restarted server meets no stale frames. The price: what came just before the connection broke, and
  was not taken yet, is dropped as well; a goodbye may never be read.
- `ROUTER_MANDATORY`, and sends that never block: a full or vanished worker is an answer.
- `MAXMSGSIZE` and the high-water marks bound one frame and one queue. They do not bound a message
  of many frames, so psq's messages have exactly one: any other is dropped and counted in `refused`.
- `LINGER` is explicit, because the default waits for ever at exit.
- With keys everything is encrypted, and only keys that the server knows get in (`psq.curve`); each
  frame then says whose it is, see `ServerLink.key`. A worker that is turned away hears of it.
- libzmq bounds neither connections nor messages that never end: `psq.connections` does.

Bytes are counted as they are on the wire: a frame with its header, plus the framing ZMTP puts
before it, which is 2 bytes up to 255 and 9 bytes above, and the 33 bytes of encryption. Not
counted: TCP/IP headers, and the greeting of about 200 bytes per connection.
"""

from psq.link_base import (
    DRAIN_LIMIT,
    QUEUE_FRAMES,
    SERVER_LINGER_S,
    WORKER_LINGER_S,
    ZERO_COPY_BYTES,
    Buffer,
    Sent,
    check_libzmq,
    libzmq_version,
    wire_bytes,
)
from psq.link_server import ServerLink, connection_limit
from psq.link_worker import WorkerLink, WorkerLinks
from psq_proto.frames import MAX_FRAME_BYTES

__all__ = [
    "DRAIN_LIMIT",
    "MAX_FRAME_BYTES",
    "QUEUE_FRAMES",
    "SERVER_LINGER_S",
    "WORKER_LINGER_S",
    "ZERO_COPY_BYTES",
    "Buffer",
    "Sent",
    "ServerLink",
    "WorkerLink",
    "WorkerLinks",
    "check_libzmq",
    "connection_limit",
    "libzmq_version",
    "wire_bytes",
]
