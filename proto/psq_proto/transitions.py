"""The automaton of one conversation, as a table that serves both ends.

A state is how far an end has seen the conversation come; a message, sent or received, moves it on.
A type names its sender (workers' types are below 64), so the table need not say which end says
what.

    IDLE -HELLO-> GREETED -COOKIE-> COOKIED -PLAN-> PLANNED -JOIN-> JOINING -WELCOME-> JOINED
    JOINED -INIT PUSH PULL HEARTBEAT CKPT_OK DRAW VERDICT WEIGHTS CKPT STATUS RANGE-> JOINED
    JOINED -RECALL AGAIN-> JOINED
    JOINED -LEAVE-> LEAVING -BYE-> CLOSED

PROBE and its ECHO measure the link and move nobody, from COOKIED until LEAVING. JOB, which answers
a PLAN without a body, leaves a COOKIED worker so.

HELLO starts over from every open state: that is how a worker joins again. FENCED is the end of a
worker's claim to its rank, CLOSED the end of the conversation; neither is left again.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from psq_proto.messages import MessageType

__all__ = ["OVER", "TRANSITIONS", "State"]


class State(Enum):
    """How far this end has seen the conversation come."""

    IDLE = "idle"
    GREETED = "greeted"
    COOKIED = "cookied"
    PLANNED = "planned"
    JOINING = "joining"
    JOINED = "joined"
    LEAVING = "leaving"
    FENCED = "fenced"
    CLOSED = "closed"

    __hash__ = object.__hash__  # as in MessageType: the table is asked twice a frame


OVER: Final = frozenset({State.FENCED, State.CLOSED})
"""The states that nothing leads out of."""

_Table = dict[State, dict[MessageType, State]]


def _table() -> _Table:
    m, s = MessageType, State
    join: _Table = {
        s.IDLE: {},
        s.GREETED: {m.COOKIE: s.COOKIED},
        s.COOKIED: {m.PLAN: s.PLANNED, m.JOB: s.COOKIED},
        s.PLANNED: {m.JOIN: s.JOINING},
        s.JOINING: {m.WELCOME: s.JOINED},
    }
    work: _Table = {
        s.JOINED: {
            **dict.fromkeys((m.INIT, m.PUSH, m.PULL, m.HEARTBEAT), s.JOINED),
            **dict.fromkeys((m.VERDICT, m.WEIGHTS, m.CKPT, m.STATUS), s.JOINED),
            **dict.fromkeys((m.CKPT_OK, m.DRAW, m.RANGE, m.RECALL, m.AGAIN), s.JOINED),
            m.LEAVE: s.LEAVING,
        },
        # A worker that left still hears the end of its last round, proves it lives until BYE, and
        # says again what a server that came back meanwhile lacks.
        s.LEAVING: {
            **dict.fromkeys((m.HEARTBEAT, m.LEAVE, m.CKPT_OK, m.AGAIN), s.LEAVING),
            **dict.fromkeys((m.VERDICT, m.WEIGHTS, m.CKPT, m.STATUS), s.LEAVING),
            **dict.fromkeys((m.RANGE, m.RECALL), s.LEAVING),
        },
    }
    table = join | work
    for state in (s.COOKIED, s.PLANNED, s.JOINING, s.JOINED):
        table[state] |= dict.fromkeys((m.PROBE, m.ECHO), state)
    for state, row in table.items():
        row |= {m.HELLO: s.GREETED, m.STALE_EPOCH: state, m.ERROR: state}
        row |= {m.FENCED: s.FENCED, m.BYE: s.CLOSED}
    over: _Table = {s.FENCED: {m.FENCED: s.FENCED, m.BYE: s.CLOSED}, s.CLOSED: {}}
    return table | over


TRANSITIONS: Final = _table()
"""TRANSITIONS[state][type sent or received] -> next state; a type that is not there is illegal.

Three moves depend on more than the type: a fatal ERROR leads to CLOSED, a PLAN without a body moves
nobody, and the worker that receives STALE_EPOCH goes back to IDLE (the server that sends it stays
where it is).
"""
