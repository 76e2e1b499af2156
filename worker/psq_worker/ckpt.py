"""The commands `psq ckpt ...`: look into what servers and workers keep, take weights out of it.

A PLACE is a state directory, a folder of checkpoints, or one checkpoint; for `ls` and `copy` also a
URL that fsspec knows. Of a folder, the newest valid checkpoint is meant where one is needed. All
but `prune` and `copy` only read, also while a server runs. Exit codes as everywhere: 65 where
something is damaged; `diff` ends with 1 where two checkpoints differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from psq.errors import EXIT_STATE, StateError, UsageError

if TYPE_CHECKING:
    from psq.durable.checkpoint import Listed

__all__ = ["ckpt"]

GAP: Final = "  "
EXIT_DIFFERENT: Final = 1
JSON_OPTION: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(short_help="Look into checkpoints, take weights out of them.")
def ckpt() -> None:
    """Look into checkpoints: list, verify, export weights, compare, copy, prune."""


# ---- what a PLACE means


def _folder(place: str) -> Path:
    """The folder of checkpoints that is meant."""
    from psq.durable.directory import is_state_directory  # noqa: PLC0415 - --help needs no numpy

    path = Path(place)
    if not path.is_dir():
        msg = f"there is no folder {place}: name a state directory, or a folder of checkpoints"
        raise StateError(msg)
    return path / "checkpoints" if is_state_directory(path) else path


def _is_one(place: str) -> bool:
    from psq.durable.checkpoint import parse_name  # noqa: PLC0415 - as above
    from psq.durable.manifest import MANIFEST  # noqa: PLC0415 - as above

    path = Path(place)
    return parse_name(path.resolve().name) is not None or (path / MANIFEST).exists()


def _listed(place: str) -> list[Listed]:
    """The checkpoints that are meant, newest first.

    Raises:
        StateError: there is none.
    """
    from psq.durable.checkpoint import (  # noqa: PLC0415 - as above
        Listed,
        list_checkpoints,
        parse_name,
    )
    from psq.durable.manifest import read_manifest  # noqa: PLC0415 - as above

    if _is_one(place):
        path = Path(place).resolve()
        return [Listed(path, *(parse_name(path.name) or (read_manifest(path).version, 0)))]
    listed = list_checkpoints(_folder(place))
    if not listed:
        msg = f"there is no checkpoint in {_folder(place)}{_instead(place)}"
        raise StateError(msg)
    return listed


def _instead(place: str) -> str:
    """What else to name, if this is what psq launch was given."""
    servers = sorted(str(path.parent) for path in Path(place).glob("server-*/checkpoints"))
    return f": each server has its own, name {' or '.join(servers)}" if servers else ""


def _newest(place: str) -> Path:
    """One checkpoint: what was named, or the newest whose manifest and sizes are sound."""
    from psq.durable.checkpoint import open_checkpoint  # noqa: PLC0415 - as above

    listed = _listed(place)
    problems = []
    for one in listed:
        try:
            return open_checkpoint(one.path).path
        except StateError as error:
            problems.append(str(error))
    msg = f"no checkpoint in {place} is valid: {'; '.join(problems)}"
    raise StateError(msg)


def _journal(place: str) -> Path | None:
    """The journal's folder, if a state directory was named."""
    from psq.durable.directory import is_state_directory  # noqa: PLC0415 - as above

    return Path(place) / "journal" if is_state_directory(Path(place)) else None


# ---- ls


@ckpt.command("ls", short_help="List the checkpoints at PLACE, newest first.")
@click.argument("place")
@JSON_OPTION
def list_place(place: str, *, as_json: bool) -> None:
    """List the checkpoints at PLACE, newest first, and the journal's files beside them.

    Reads manifests only; psq ckpt verify reads everything.
    """
    from psq.durable.remote import is_url, list_remote  # noqa: PLC0415 - as above

    if is_url(place):
        urls = list_remote(place)
        click.echo(json.dumps({"checkpoints": urls}, indent=2) if as_json else "\n".join(urls))
        return
    rows = [_row(one) for one in _listed(place)]
    segments = _segments(place)
    if as_json:
        click.echo(json.dumps({"checkpoints": rows, "journal": segments}, indent=2))
        return
    table = [("version", "arrays", "MB", "", "checkpoint")]
    for row in rows:
        size = "-" if row["problem"] else f"{row['bytes'] / 1e6:,.1f}"
        state = "damaged" if row["problem"] else "current" if row["current"] else ""
        table.append((str(row["version"]), str(row["arrays"] or "-"), size, state, row["name"]))
    _print_table(table)
    for row in rows:
        if row["problem"]:
            click.echo(row["problem"], err=True)
    if segments:
        size = sum(segment["bytes"] for segment in segments) / 1e6
        after = segments[0]["after_version"]
        click.echo(f"journal: {len(segments)} files, {size:,.1f} MB, after version {after}")


def _row(one: Listed) -> dict[str, Any]:
    from psq.durable.checkpoint import current, open_checkpoint  # noqa: PLC0415 - as above

    row: dict[str, Any] = {"name": one.path.name, "path": str(one.path), "version": one.version}
    try:
        opened = open_checkpoint(one.path)
        row |= {"arrays": len(opened.arrays), "bytes": opened.nbytes, "problem": None}
    except StateError as error:
        row |= {"arrays": None, "bytes": None, "problem": str(error)}
    try:
        row["current"] = current(one.path.parent) == one.path
    except StateError:
        row["current"] = False  # a pointer that is damaged points nowhere; psq ckpt verify says so
    return row


def _segments(place: str) -> list[dict[str, Any]]:
    from psq.durable.reader import list_segments  # noqa: PLC0415 - as above

    folder = _journal(place)
    return [
        {
            "name": info.path.name,
            "bytes": info.path.stat().st_size,
            "after_version": info.header.after_version if info.header else None,
        }
        for info in (list_segments(folder) if folder else [])
    ]


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        numbers = [f"{cell:>{width}}" for cell, width in zip(row[:3], widths[:3], strict=True)]
        words = [f"{cell:<{width}}" for cell, width in zip(row[3:], widths[3:], strict=True)]
        click.echo(GAP.join((*numbers, *words)).rstrip())


# ---- verify


@ckpt.command(short_help="Read every byte, and say what is wrong.")
@click.argument("place")
@JSON_OPTION
def verify(place: str, *, as_json: bool) -> int:
    """Read every byte of the checkpoints at PLACE, and of the journal, and say what is wrong.

    Ends with 65 if anything is. A torn tail of the journal is a note: nobody was promised it.
    """
    from psq.durable.checkpoint import current, verify  # noqa: PLC0415 - as above

    problems: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    for one in _listed(place):
        problems[one.path.name] = verify(one.path)
    if not _is_one(place):
        problems["CURRENT"] = _problem_of(lambda: current(_folder(place)))
    if folder := _journal(place):
        problems["journal"] = _problem_of(lambda: notes.extend(_read_journal(folder)))
    bad = [text for found in problems.values() for text in found]
    if as_json:
        click.echo(json.dumps({"ok": not bad, "problems": problems, "notes": notes}, indent=2))
    else:
        for name, found in problems.items():
            click.echo(f"{'bad' if found else 'ok':<4}{name}")
        for text in (*bad, *notes):
            click.echo(text, err=True)
    return EXIT_STATE if bad else 0


def _problem_of(look: Any) -> tuple[str, ...]:
    try:
        look()
    except StateError as error:
        return (str(error),)
    return ()


def _read_journal(folder: Path) -> Iterable[str]:
    """Read a journal from its beginning to its end; returns what is worth a note."""
    from psq.durable.reader import list_segments, read_journal  # noqa: PLC0415 - as above

    headers = [info.header for info in list_segments(folder) if info.header]
    reader = read_journal(folder, headers[0].after_version if headers else 0)
    records = sum(1 for _ in reader)
    notes = [f"journal: {records} records"]
    if torn := reader.torn:
        notes.append(
            f"{torn.path}: torn at byte {torn.offset}, {torn.lost_bytes} bytes: {torn.why}"
        )
    return notes


# ---- export, diff


@ckpt.command(short_help="Write the weights as safetensors.")
@click.argument("place")
@click.option("-o", "--output", required=True, metavar="FILE", help="Where the weights go.")
def export(place: str, output: str) -> None:
    """Write the weights of a server's checkpoint as safetensors, which plain PyTorch loads.

    Of a server that shares its job with others they are its part; see psq merge-weights.
    """
    from psq.durable.export import export_safetensors  # noqa: PLC0415 - as above

    path = _newest(place)
    try:
        size_bytes = export_safetensors(path, Path(output))
    except StateError as error:
        msg = f"{error}{_another(path, output)}"
        raise StateError(msg) from error
    click.echo(f"{output}: {size_bytes:,} bytes, of {path.name}", err=True)


def _another(path: Path, output: str) -> str:
    """What else to export where this checkpoint is damaged; empty if it is not."""
    from psq.durable.checkpoint import list_checkpoints, verify  # noqa: PLC0415 - as above

    if not verify(path):
        return ""  # it is the disk that refused
    for one in list_checkpoints(path.parent):
        if one.path != path and not verify(one.path):
            words = f"psq ckpt export {one.path} -o {output}"
            return f"; the newest whole one there is of version {one.version}: {words}"
    return f"; no checkpoint in {path.parent} is whole: take one from a copy"


@ckpt.command(short_help="Say what differs between two checkpoints.")
@click.argument("a")
@click.argument("b")
@JSON_OPTION
def diff(a: str, b: str, *, as_json: bool) -> int:
    """Say what differs between two checkpoints; ends with 1 if anything does."""
    from psq.durable.difference import diff as compare  # noqa: PLC0415 - as above

    found = compare(_newest(a), _newest(b))
    if as_json:
        rows = [{name: getattr(one, name) for name in one.__slots__} for one in found]
        click.echo(json.dumps(rows, indent=2))
        return EXIT_DIFFERENT if found else 0
    for one in found:
        detail = ""
        if one.what == "values":
            detail = f": {one.differing:,} of {one.numel:,}, by up to {one.largest:g}"
        click.echo(f"{one.name}{GAP}{one.what}{detail}")
    if not found:
        click.echo("equal")
    return EXIT_DIFFERENT if found else 0


# ---- copy, prune


@ckpt.command("copy", short_help="Copy a checkpoint to a URL, or from one.")
@click.argument("source")
@click.argument("target")
def copy_place(source: str, target: str) -> None:
    """Copy a checkpoint to a folder at a URL, or from a URL into a folder.

    SOURCE or TARGET is a URL that fsspec knows, as s3://bucket/run; it needs psq-train[remote]. To
    bring one back, name it as psq ckpt ls URL does, and a state directory that nobody has open.
    """
    from psq.durable.directory import (  # noqa: PLC0415 - as above
        StateDirectory,
        is_state_directory,
    )
    from psq.durable.remote import copy_checkpoint, fetch_checkpoint, is_url  # noqa: PLC0415

    if is_url(source) == is_url(target):
        msg = "either SOURCE or TARGET is a URL, as s3://bucket/run"
        raise UsageError(msg)
    if is_url(target):
        click.echo(copy_checkpoint(_newest(source), target))
    elif is_state_directory(Path(target)):
        with StateDirectory.lock(Path(target)):
            click.echo(fetch_checkpoint(source, _folder(target)))
    else:
        click.echo(fetch_checkpoint(source, _folder(target)))


@ckpt.command(short_help="Remove old checkpoints, and their journal.")
@click.argument("directory")
@click.option("--keep", default=2, show_default=True, help="Valid checkpoints to keep, 2 or more.")
@JSON_OPTION
def prune(directory: str, keep: int, *, as_json: bool) -> None:
    """Remove old checkpoints of a state DIRECTORY, and what of the journal only they need.

    What is kept is read to the last byte first. A directory that a process has open is refused:
    that process prunes by itself.
    """
    from psq.durable.directory import StateDirectory  # noqa: PLC0415 - as above
    from psq.durable.journal import prune_journal  # noqa: PLC0415 - as above
    from psq.durable.retention import prune as prune_checkpoints  # noqa: PLC0415 - as above

    with StateDirectory.lock(Path(directory)):
        pruned = prune_checkpoints(_folder(directory), keep)
        removed = list(pruned.removed)
        journal = _journal(directory)
        if journal and pruned.oldest_version is not None:
            removed += prune_journal(journal, pruned.oldest_version)
    if as_json:
        found = {"removed": [str(p) for p in removed], "kept": [str(p) for p in pruned.kept]}
        click.echo(json.dumps(found, indent=2))
        return
    for path in removed:
        click.echo(f"removed {path}")
    click.echo(f"kept {len(pruned.kept)} checkpoints", err=True)
