"""What a person sees while a job runs: a live table on a terminal, plain lines anywhere else.

A view shows a `Board`; it decides nothing and keeps no numbers of its own. Everything goes to
stderr, so that stdout holds results only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from psq_worker.board import Board, RankState, metric_words, saved_bytes

__all__ = [
    "LiveView",
    "PlainView",
    "QuietView",
    "View",
    "format_bytes",
    "format_ms",
    "format_rate",
    "format_score",
    "format_seconds",
    "make_view",
]

REDRAWS_PER_S: Final = 8
PLAIN_EVERY_S: Final = 5.0
MINUTE_S: Final = 60
HOUR_S: Final = 3600
WIRE_COLUMNS: Final = ("sent", "received", "saved")
EXPOSED_WIDTH: Final = 92  # a narrower terminal has no room for one column more
STATE_STYLES: Final = {
    "training": "green",
    "evaluating": "cyan",
    "done": "bold green",
    "waiting": "yellow",
}


class View(Protocol):
    """Shows a board."""

    def __enter__(self) -> Self:
        """Begin to show."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Show the last state and leave the terminal as it was."""
        ...

    def refresh(self, board: Board) -> None:
        """Show the board's present state, if it is time."""
        ...

    def say(self, name: str, text: str) -> None:
        """Show a line that a process printed, or words of our own (with an empty name)."""
        ...


def make_view(title: str, *, quiet: bool = False) -> View:
    """The view that fits stderr: live on a terminal, else plain lines, or none at all."""
    if quiet:
        return QuietView()
    console = Console(stderr=True)
    return LiveView(console, title) if console.is_terminal else PlainView(console, title)


class QuietView:
    """Shows nothing but what the processes print."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def refresh(self, board: Board) -> None:
        """Nothing to show."""

    def say(self, name: str, text: str) -> None:
        """A process's line, with its name; words of our own are left out."""
        if name:
            self._console.print(_said(name, text))


class PlainView:
    """One line every few seconds, for logs and pipes."""

    def __init__(
        self,
        console: Console,
        title: str,
        *,
        every_s: float = PLAIN_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._title = title
        self._every_s = every_s
        self._clock = clock
        self._said_s = clock()
        self._said_step = 0
        self._said = ""
        self._board = Board(0)

    def __enter__(self) -> Self:
        self._print(self._title)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        last = plain_line(self._board)
        if self._board.step and last != self._said:
            self._print(last)

    def refresh(self, board: Board) -> None:
        """A line, if the last one is old enough and a step was made since."""
        self._board = board
        now_s = self._clock()
        if now_s - self._said_s >= self._every_s and board.step != self._said_step:
            self._said_s, self._said_step, self._said = now_s, board.step, plain_line(board)
            self._print(self._said)

    def say(self, name: str, text: str) -> None:
        """The line as it came, with the name of who said it."""
        self._console.print(_said(name, text), soft_wrap=True)

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


class LiveView:
    """A table that is redrawn in place, and what the processes print above it."""

    def __init__(
        self, console: Console, title: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._title = title
        self._clock = clock
        self._began_s = clock()
        self._drawn_s = self._began_s
        self._board = Board(0)
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.update(self._draw(), refresh=True)
        self._live.transient = self._board.step == 0
        self._live.stop()

    def refresh(self, board: Board) -> None:
        """Redraw, a few times a second at most."""
        self._board = board
        now_s = self._clock()
        if now_s - self._drawn_s >= 1 / REDRAWS_PER_S:
            self._drawn_s = now_s
            self._live.update(self._draw(), refresh=True)

    def say(self, name: str, text: str) -> None:
        """The line, above the table."""
        self._console.print(_said(name, text))

    def _draw(self) -> RenderableType:
        now_s = self._clock()
        table = _worker_table(self._board, now_s, width=self._console.width)
        return draw_board(self._board, self._title, table, elapsed_s=now_s - self._began_s)


def draw_board(
    board: Board, title: str, table: RenderableType, *, elapsed_s: float
) -> RenderableType:
    """The live picture: title, a row per worker, the bar, the last scores."""
    parts: list[RenderableType] = [Text(title, style="bold"), table]
    if board.steps:
        parts.append(_bar(board, elapsed_s))
    if board.evaluations:
        parts.append(Text("  " + _score_words(board), style="cyan"))
    return Group(*parts)


def plain_line(board: Board) -> str:
    """The board in one line."""
    total = f"/{board.steps}" if board.steps else ""
    words = [
        f"step {board.step}{total}",
        f"loss {format_loss(mean_loss(board))}",
    ]
    if board.samples_per_s:  # not known before the second report
        words.append(f"{board.samples_per_s:,.0f} samples/s")
    if board.saved_bytes > 0 and not board.alone:
        words.append(f"{format_bytes(board.saved_bytes)} saved")
    if board.exposed_s is not None and not board.alone:
        words.append(f"{format_ms(board.exposed_s)} exposed")
    if board.consistency != "bsp":
        words.append(f"{max(s.progress.staleness_max for s in board.ranks)} rounds stale at most")
    if board.evaluations:
        words.append(_score_words(board))
    return "  ".join(words)


def mean_loss(board: Board) -> float | None:
    """The workers' last losses, averaged; None before the first."""
    losses = [s.progress.loss for s in board.ranks if s.progress.loss is not None]
    return sum(losses) / len(losses) if losses else None


def format_rate(per_s: float) -> str:
    """Whole samples per second; a dash where a script says nothing of samples."""
    return f"{per_s:,.0f}" if per_s else "-"


def format_loss(loss: float | None) -> str:
    """Four digits, or a dash."""
    return "-" if loss is None else f"{loss:.4f}"


def format_bytes(count: float) -> str:
    """Decimal units with three digits, as in "81.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:  # noqa: PLR2004 - the next unit begins where this one rounds to 1000
            digits = 0 if unit == "B" or abs(count) >= 100 else 1  # noqa: PLR2004 - three digits
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_ms(seconds: float | None) -> str:
    """Milliseconds with three digits, as in "0.42 ms", "12.5 ms" or "300 ms"; else a dash."""
    if seconds is None:
        return "-"
    value = 1000 * seconds
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0  # noqa: PLR2004 - three digits
    return f"{value:.{digits}f} ms"


def format_seconds(seconds: float) -> str:
    """As in "0:07", "2:31" or "1:02:31"."""
    whole = round(seconds)
    hours, rest = divmod(whole, HOUR_S)
    minutes, seconds = divmod(rest, MINUTE_S)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_score(metric: str, value: float) -> str:
    """An accuracy in percent, any other score as it is."""
    return f"{100 * value:.2f} %" if metric == "accuracy" else f"{value:.4f}"


def _said(name: str, text: str) -> Text:
    line = Text()
    if name:
        line.append(f"{name} | ", style="dim")
        # Processes may print colours of their own.
        return line.append_text(Text.from_ansi(text))
    return line.append(text, style="dim")


def _score_words(board: Board) -> str:
    last = board.evaluations[-1]
    shown = format_score(last.metric, last.scores.get(last.metric, float("nan")))
    return f"{metric_words(last.metric)} {shown} at step {last.step}"


def _worker_table(board: Board, now_s: float, *, width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    wire = [] if board.alone else [*WIRE_COLUMNS, *(["exposed"] * (width >= EXPOSED_WIDTH))]
    table.add_column("  process" if board.alone else "  worker", no_wrap=True)
    for name in ("step", "loss", "samples/s", *wire):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for state in board.ranks:
        cells = [_wire_cells(state)[name] for name in wire]
        table.add_row(*_worker_row(state, now_s, cells, alone=board.alone))
    return table


def _worker_row(
    state: RankState, now_s: float, wire: list[str], *, alone: bool
) -> list[RenderableType]:
    progress = state.progress
    words = state.state(now_s)
    style = STATE_STYLES.get(words.split()[0], "dim")
    total = f"/{progress.steps}" if progress.steps else ""
    return [
        "  one" if alone else f"  rank {state.rank}",
        f"{progress.step}{total}",
        format_loss(progress.loss),
        format_rate(state.samples_per_s),
        *wire,
        Text(words, style=style),
    ]


def _wire_cells(state: RankState) -> dict[str, str]:
    progress = state.progress
    return {
        "sent": format_bytes(progress.sent_bytes),
        "received": format_bytes(progress.received_bytes),
        "saved": format_bytes(max(0, saved_bytes(progress))),
        "exposed": format_ms(state.exposed_s),
    }


def _bar(board: Board, elapsed_s: float) -> Table:
    share = board.step / board.steps
    training_s = max((state.progress.elapsed_s for state in board.ranks), default=0.0)
    left = format_seconds(training_s * (1 - share) / share) if share else "-:--"
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_row(
        Text(" "),
        ProgressBar(total=board.steps, completed=board.step, width=40),
        Text(f"{share:4.0%}", style="bold"),
        Text(f"{format_seconds(elapsed_s)} elapsed, {left} left", style="dim"),
    )
    return row
