"""The commands `psq keygen` and `psq keys`: words only; `psq_worker.keys` does the work."""

from __future__ import annotations

import json
from pathlib import Path

import click

from psq.config.options import EPILOG
from psq.errors import UsageError

__all__ = ["keygen", "keys"]


@click.command(epilog=EPILOG, short_help="Make the keys of a job's server and workers.")
@click.option("-n", "--workers", type=click.IntRange(1, 4096), required=True, help="Ranks.")
@click.option(
    "-o", "--output", default="keys", metavar="FOLDER", help="Where they go.", show_default=True
)
@click.option(
    "--aggregators", metavar="RANK-LAST,...", help="Ranks that an aggregator speaks for, each."
)
@click.option("--tree", metavar="FANOUT", type=click.IntRange(2), help="As psq launch --tree.")
@click.option("--keep", is_flag=True, help="If they are all there, leave them.")
def keygen(
    workers: int, output: str, aggregators: str | None, tree: int | None, *, keep: bool
) -> None:
    """Make the keys of a job: a folder for the server, one for each rank, one per aggregator.

    Each folder belongs on one machine, and on no other. psq-server --keys FOLDER and psq-worker
    --keys FOLDER take it, or the folder of all of them where every machine sees that.
    """
    from psq.keys import parse_ranks  # noqa: PLC0415 - --help needs no zmq
    from psq_worker.aggregators import plan_tree  # noqa: PLC0415 - as above
    from psq_worker.keys import make_keys  # noqa: PLC0415 - as above

    if aggregators is not None and tree is not None:
        msg = "--tree says which aggregators there are: leave one of both out"
        raise UsageError(msg)
    planned = plan_tree(workers, tree).aggregators if tree is not None else ()
    listed = [one.leaves for one in planned] or (aggregators.split(",") if aggregators else [])
    made = make_keys(Path(output), workers, [parse_ranks(text) for text in listed], keep=keep)
    for folder in made:
        click.echo(str(folder))
    if not made:
        click.echo(f"{output}: keys of {workers} ranks are there and stay", err=True)


@click.group(short_help="List, add or revoke the keys that a server takes.")
def keys() -> None:
    """Say whose keys a server takes, and change it while it runs."""


@keys.command("list")
@click.argument("folder", default="keys")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def keys_list(folder: str, *, as_json: bool) -> None:
    """Whose keys the server of FOLDER takes: names, ranks, fingerprints."""
    from psq_worker.keys import list_keys  # noqa: PLC0415 - --help needs no zmq

    found, faults = list_keys(Path(folder))
    if as_json:
        plain = [{name: getattr(one, name) for name in one.__slots__} for one in found]
        click.echo(json.dumps({"keys": plain, "faults": faults}, indent=2))
        return
    for one in found:
        click.echo(f"{one.name:<20} ranks {one.ranks:<10} {one.fingerprint}")
    for fault in faults:
        click.echo(f"lets nobody in: {fault}", err=True)


@keys.command("add")
@click.argument("folder")
@click.argument("ranks", nargs=-1, required=True, type=click.IntRange(0, 4095))
def keys_add(folder: str, ranks: tuple[int, ...]) -> None:
    """Make keys of more RANKS in FOLDER, and let them in."""
    from psq_worker.keys import add_workers  # noqa: PLC0415 - --help needs no zmq

    for made in add_workers(Path(folder), ranks):
        click.echo(str(made))


@keys.command("revoke")
@click.argument("folder")
@click.argument("names", nargs=-1, required=True)
def keys_revoke(folder: str, names: tuple[str, ...]) -> None:
    """Let these keys in no more, as in psq keys revoke keys rank3; ends their connections too."""
    from psq_worker.keys import revoke  # noqa: PLC0415 - --help needs no zmq

    click.echo(revoke(Path(folder), names), err=True)
