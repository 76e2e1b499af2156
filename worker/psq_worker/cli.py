"""The commands `psq` and `psq-worker`. Thin: each reads its settings, calls one function, prints.

Nothing heavy is imported before a command needs it, so `--help` answers at once: torch takes a
second, and only a process that trains pays it.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import click

from psq.config import (
    DEFAULT_ENDPOINT,
    MAX_PORT,
    TABLES,
    AdviseConfig,
    DemoConfig,
    Given,
    LaunchConfig,
    ServerConfig,
    SimulateConfig,
    WorkerConfig,
    settings_of,
    stray_variables,
)
from psq.config.options import EPILOG, options, run
from psq.errors import ConfigError, UsageError
from psq_worker.ckpt import ckpt
from psq_worker.key_commands import keygen, keys

__all__ = ["main", "psq", "worker", "worker_main"]

# What the launcher itself says to each process.
SAID_BY_LAUNCHER: Final = ("connect", "rank", "world_size", "progress", "progress_every")
# What psq launch hands on to the server; the workers get every setting of theirs.
FOR_SERVER: Final = (
    *("save", "lease", "min_workers", "grace", "give_up_after"),
    *("metrics_host", "metrics_port", "keys"),
    *("durability", "checkpoint_every", "checkpoint_seconds", "keep_checkpoints", "checkpoint_url"),
)
LAUNCHER_SAYS: Final = ("timeline_filename", "state_dir")  # to each process, in its own words
# What means nothing where there is one process and no server.
ABOUT_MESSAGES: Final = (
    *("connect", "recipe", "with", "uplink", "downlink"),
    *("consistency", "overlap", "residual", "codec", "give_up_after"),
    *("timeline_filename", "keys", "state_dir"),
)
# What a simulated worker has instead of a setting: virtual machines, and one process.
NOT_SIMULATED: Final = (
    *("connect", "rank", "world_size", "overlap", "codec", "give_up_after"),
    *("progress", "progress_every", "timeline_filename", "keys", "state_dir"),
)
# A demo is over in a minute, and begins anew.
NOT_FOR_DEMO: Final = (*SAID_BY_LAUNCHER, "tree", "keys", "state_dir", "max_restarts")
TASK_ONLY: Final = ("task", "steps", "batch_size", "schedule", "eval_every", "data")
NOT_FOR_LAUNCH: Final = (
    *SAID_BY_LAUNCHER,
    *{item.key for item in settings_of(ServerConfig)}
    - {item.key for item in settings_of(WorkerConfig)}
    - set(FOR_SERVER),
)
# Everything after the script's name belongs to the script.
HELP_SETTINGS: Final = {"help_option_names": ["-h", "--help"]}
SCRIPT_SETTINGS: Final = {**HELP_SETTINGS, "allow_interspersed_args": False}


def script_arguments(function: Any) -> Any:
    """[SCRIPT [-- ARGUMENTS]], after the options."""
    take_rest = click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    return click.argument("script", required=False)(take_rest(function))


@click.group(context_settings=HELP_SETTINGS, epilog=EPILOG)
@click.version_option(package_name="psq-train", prog_name="psq")
def psq() -> None:
    """Train PyTorch models through a parameter server that speaks in a few bits."""


@click.command(context_settings=SCRIPT_SETTINGS, epilog=EPILOG)
@click.version_option(package_name="psq-train", prog_name="psq-worker")
@options(WorkerConfig)
@script_arguments
def worker(given: Given, script: str | None, arguments: tuple[str, ...]) -> None:
    """Be one worker of a job: train a task, or run SCRIPT, which makes a psq.torch.Worker.

    What comes after "--" is the script's own command line.
    """
    from psq.process import watch_parent  # noqa: PLC0415 - --help needs none of these

    launched = watch_parent()
    # Before torch is imported: threads that spin while they wait starve the other workers of a
    # machine (seen: a step 8 times as long on two busy cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    check_script(given, script)
    config = given.resolve(WorkerConfig).config
    if not launched:  # else the launcher's server says it, once
        for name, meant in stray_variables(os.environ).items():
            hint = f"did you mean {meant}?" if meant else "psq reads no such variable"
            click.echo(f"WARNING {name} has no effect: {hint}", err=True)
    need("torch", "rich")
    from psq_worker.runner import run_script, run_task  # noqa: PLC0415 - imports torch

    if script is None:
        run_task(given, config)
    else:
        run_script(given, config, script, script_words(arguments))


@psq.command(
    context_settings=SCRIPT_SETTINGS,
    epilog=EPILOG,
    short_help="Train on this machine: -s servers, -n workers.",
)
@options(LaunchConfig, WorkerConfig, ServerConfig, skip=NOT_FOR_LAUNCH)
@script_arguments
def launch(given: Given, script: str | None, arguments: tuple[str, ...]) -> None:
    """Train on this machine: -s servers and -n workers, for a task or for your own SCRIPT.

    What comes after "--" is the script's own command line.
    """
    need("torch", "rich")
    from psq_worker.launch import Commands, run_launch, server_count  # noqa: PLC0415 - needs rich
    from psq_worker.recipes import check_job  # noqa: PLC0415 - --help needs no numpy

    check_script(given, script)
    config = given.resolve(LaunchConfig).config
    told = given.resolve(WorkerConfig, rank=0, world_size=config.workers).config
    # The launcher binds, whatever address others are to bind.
    local = Given({**given.values, "bind": DEFAULT_ENDPOINT}, given.file)
    told_server = local.resolve(ServerConfig, world_size=config.workers).config
    check_elastic(config, told_server)
    servers = server_count(config.servers, config.workers)
    check_job(told)  # fails before anything is started
    words = [script, "--", *script_words(arguments)] if script is not None else []
    commands = Commands(
        config.workers,
        servers,
        fanout=config.tree or 0,
        save=told_server.save,
        timeline=told.timeline_filename or told_server.timeline_filename,
        state_dir=kept_where(config, told.state_dir or told_server.state_dir),
        max_restarts=config.max_restarts,
        min_workers=told_server.min_workers,
        metrics_port=first_metrics_port(told_server, servers),
        server_words=flag_words(given, ServerConfig, only=FOR_SERVER),
        aggregator_words=aggregator_words(told_server),
        worker_words=(*flag_words(given, WorkerConfig, without=LAUNCHER_SAYS), *words),
    )
    run_launch(commands, script or told.task, as_json=config.json)


def check_elastic(config: LaunchConfig, told: ServerConfig) -> None:
    """Refuse to go on without workers where their messages are added up on the way.

    Raises:
        ConfigError: it says why.
    """
    if config.tree is not None and told.min_workers is not None:
        msg = (
            "min_workers: in a tree every worker is waited for, since a message of an aggregator "
            "is that of all its workers: leave --tree or --min-workers out"
        )
        raise ConfigError(msg)


def kept_where(config: LaunchConfig, state_dir: str | None) -> str | None:
    """The folder in which a launched job keeps its state, if it does.

    Raises:
        ConfigError: it cannot, or nothing is kept that a process could go on from.
    """
    if config.max_restarts and state_dir is None:
        msg = (
            "max_restarts: without --state-dir a process that is started again has nothing to go "
            "on from: name a folder, or leave it out"
        )
        raise ConfigError(msg)
    if state_dir is not None and config.tree is not None:
        msg = (
            "state_dir: a tree cannot go on after a crash, since what an aggregator has added up "
            "is in its memory alone: leave --tree or --state-dir out"
        )
        raise ConfigError(msg)
    return state_dir


@psq.command(epilog=EPILOG, short_help="Train through psq and by plain Adam, compare.")
@options(LaunchConfig, DemoConfig, WorkerConfig, skip=NOT_FOR_DEMO)
def demo(given: Given) -> None:
    """Show what psq does: train a task through it and by plain Adam, compare, draw a picture."""
    need("torch", "rich")
    from psq_worker.demo import run_demo  # noqa: PLC0415 - --help needs no rich
    from psq_worker.launch import server_count  # noqa: PLC0415 - as above
    from psq_worker.recipes import (  # noqa: PLC0415 - --help needs no numpy
        check_comparison,
        check_job,
        recipe_of,
    )

    config = given.resolve(LaunchConfig).config
    told = given.resolve(WorkerConfig, rank=0, world_size=config.workers).config
    check_job(told)
    check_comparison(recipe_of(told))
    servers = server_count(config.servers, config.workers)
    run_demo(
        told,
        servers=servers,
        output=given.resolve(DemoConfig).config.output,
        words=flag_words(given, WorkerConfig, without=("timeline_filename",)),
        plain_words=flag_words(given, WorkerConfig, without=ABOUT_MESSAGES),
        as_json=config.json,
    )


@psq.command(epilog=EPILOG, short_help="Train with virtual workers on a modelled network.")
@options(SimulateConfig, WorkerConfig, skip=NOT_SIMULATED)
def simulate(given: Given) -> None:
    """Train a task with hundreds of virtual workers in this process, in virtual time.

    Workers, servers, recipes, codecs and messages are the real ones; machines and network are as
    the settings say. With two workers under bsp the losses are those of psq launch -n 2, bit for
    bit.
    """
    need("torch", "rich")
    from psq_worker.simulate.command import run_simulate  # noqa: PLC0415 - imports torch

    wanted = given.resolve(SimulateConfig).config
    run_simulate(given.resolve(WorkerConfig, rank=0, world_size=wanted.workers).config, wanted)


@psq.command(epilog=EPILOG, short_help="Train a task by plain torch Adam alone.")
@options(WorkerConfig, skip=(*ABOUT_MESSAGES, "rank"))
def baseline(given: Given) -> None:
    """Train a task in this process by plain torch Adam: what psq is to be compared with.

    The batch is that of --world-size workers together, so the samples of each step are the same.
    """
    from psq.process import watch_parent  # noqa: PLC0415 - --help needs none of these

    watch_parent()
    config = given.resolve(WorkerConfig, rank=0).config
    need("torch")
    from psq_worker.runner import run_baseline  # noqa: PLC0415 - imports torch

    run_baseline(config)


@psq.command(epilog=EPILOG, short_help="Say which codecs suit a link and a model.")
@options(AdviseConfig)
def advise(given: Given) -> None:
    """Say which codecs suit a link and a model, or that compression does not pay there.

    Measures this machine for a second or so, the link too where --connect names a server, and
    predicts seconds per step from that. Nothing is trained.
    """
    config = given.resolve(AdviseConfig).config
    need("rich", *(["torch"] if config.task else []))
    from psq_worker.advising import run_advise  # noqa: PLC0415 - --help needs no numpy

    run_advise(config)


@psq.command(epilog=EPILOG, short_help="List the recipes: parts, bits, state, traps.")
@click.argument("name", required=False)
@click.option(
    "--with",
    "changes",
    multiple=True,
    metavar="SLOT.OPTION=VALUE",
    help="Show NAME with this option, as psq launch takes it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def recipes(name: str | None, changes: tuple[str, ...], *, as_json: bool) -> None:
    """List every recipe, or show NAME with all options of its parts.

    Each with its parts, the bits it sends both ways, the state it keeps, where it is from, and when
    it fails. Nothing is trained.
    """
    from psq_worker.recipe_pages import (  # noqa: PLC0415 - --help needs no numpy
        print_recipe,
        print_recipes,
        recipe_plain,
        recipes_plain,
    )

    if changes and name is None:
        msg = "--with is for one recipe: name it, as in psq recipes qadam --with aggregate=median"
        raise UsageError(msg)
    if as_json:
        found = recipes_plain() if name is None else recipe_plain(name, changes)
        click.echo(json.dumps(found, indent=2))
    elif name is None:
        print_recipes()
    else:
        print_recipe(name, changes)


@psq.command(epilog=EPILOG, short_help="Check Adam's schedule against the known condition.")
@click.argument("recipe", default=WorkerConfig().recipe)
@click.option("--adam", metavar="NAME=VALUE,...", help="Adam's settings, as psq launch takes them.")
@click.option(
    "--lr",
    default="0.001",
    metavar="SCHEDULE",
    help="A number, or power:VALUE:EXPONENT.",
    show_default=True,
)
@click.option("--steps", default=10_000, help="Of the job.", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def schedule(recipe: str, adam: str | None, lr: str, steps: int, *, as_json: bool) -> None:
    """Say whether Adam's settings meet the known sufficient condition for convergence.

    RECIPE is psq's default where none is named. Nothing is trained.
    """
    from psq_worker.theory_pages import print_schedule  # noqa: PLC0415 - --help needs no numpy

    print_schedule(recipe, adam, lr, steps, as_json=as_json)


@psq.command(epilog=EPILOG, short_help="Say what dp-sign's noise hides: epsilon and delta.")
@click.option("--sigma", type=float, help="Standard deviation of the noise.")
@click.option("--epsilon", type=float, help="Instead of --sigma: find the noise for this.")
@click.option("--clip", default=1.0, help="Largest norm of a gradient.", show_default=True)
@click.option("--steps", type=int, required=True, help="In how many the data may take part.")
@click.option("--delta", default=1e-5, help="See docs/privacy.md.", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def privacy(  # noqa: PLR0913 - an accountant's terms
    sigma: float | None,
    epsilon: float | None,
    clip: float,
    steps: int,
    delta: float,
    *,
    as_json: bool,
) -> None:
    """Say how little the messages of one worker reveal, with the noise of recipe dp-sign."""
    from psq.theory import Release  # noqa: PLC0415 - --help needs no numpy
    from psq_worker.theory_pages import print_privacy  # noqa: PLC0415 - as above

    if (sigma is None) == (epsilon is None):
        msg = "say either --sigma, to hear the epsilon, or --epsilon, to hear the sigma it takes"
        raise UsageError(msg)
    print_privacy(Release(clip, sigma or 0.0, steps), delta, epsilon, as_json=as_json)


@psq.command("merge-weights", epilog=EPILOG, short_help="Make one file of servers' parts.")
@click.argument("parts", nargs=-1, required=True, metavar="PART...")
@click.option("-o", "--output", required=True, metavar="FILE", help="Where the weights go.")
def merge_weights(parts: tuple[str, ...], output: str) -> None:
    """Make one file of the weights that each of several servers saved of its share.

    The parts are named as NAME.server0-of-2.safetensors; all of them are needed, in any order. They
    are left as they are.
    """
    from psq_worker.merging import merge_weights as merge  # noqa: PLC0415 - --help needs no numpy

    size_bytes = merge([Path(part) for part in parts], Path(output))
    click.echo(f"{output}: {size_bytes:,} bytes, of {len(parts)} parts", err=True)


@psq.command("merge-timeline", epilog=EPILOG, short_help="Make one trace of processes' parts.")
@click.argument("parts", nargs=-1, required=True, metavar="PART...")
@click.option("-o", "--output", required=True, metavar="FILE", help="Where the trace goes.")
def merge_timeline(parts: tuple[str, ...], output: str) -> None:
    """Make one Chrome trace of the parts that a job's processes wrote, on one clock.

    The parts are named as t.rank0.json and t.server0.json, in any order; they are left as they are.
    Those of several machines need the parts of workers that talked to servers on other machines.
    """
    from psq_worker.tracing import merge_timeline as merge  # noqa: PLC0415 - as above

    events = merge([Path(part) for part in parts], Path(output))
    click.echo(f"{output}: {events:,} events of {len(parts)} processes", err=True)


@psq.command(short_help="Say whether this machine can run psq.")
@options(
    WorkerConfig,
    skip=[item.key for item in settings_of(WorkerConfig) if item.key not in {"connect", "keys"}],
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(given: Given, *, as_json: bool) -> int:
    """Say whether this machine can run psq, and what it would run with.

    Servers that a flag, a variable or the file names are tried too. Ends with 0 where nothing is
    worse than a note, 78 where this machine or its settings will not do, and else with what a
    worker would end with: 75 where a server does not answer, 77 where it refuses.
    """
    from psq_worker.doctor import examine, exit_code  # noqa: PLC0415 - not for every command
    from psq_worker.listing import print_checks  # noqa: PLC0415 - as above

    checks = examine(os.environ, given)
    code = exit_code(checks)
    if as_json:
        found = [{name: getattr(c, name) for name in c.__slots__} for c in checks]
        click.echo(json.dumps({"ok": code == 0, "checks": found}, indent=2))
    else:
        print_checks(checks)
    return code


@psq.group()
def config() -> None:
    """Look at settings."""


@config.command("show")
@options(*TABLES.values(), skip=("json",))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def config_show(given: Given, *, as_json: bool) -> None:
    """Each setting's value and who said it: a flag, a variable, the file, or the default."""
    from psq_worker.listing import print_settings  # noqa: PLC0415 - as above
    from psq_worker.recipes import recipe_of  # noqa: PLC0415 - --help needs no numpy

    tables = {name: given.resolve(cls) for name, cls in TABLES.items()}
    recipe_of(tables["worker"].config)
    if not as_json:
        print_settings(tables)
        return
    plain = {
        name: {
            item.key: {
                "value": getattr(resolved.config, item.field),
                "origin": resolved.origins[item.field],
                "variable": item.env,
            }
            for item in settings_of(TABLES[name])
        }
        for name, resolved in tables.items()
    }
    click.echo(json.dumps(plain, indent=2))


def check_script(given: Given, script: str | None) -> None:
    """Refuse what makes no sense for a script: nothing that was typed is ignored.

    Raises:
        UsageError: the script is not there, or a flag is for tasks only.
    """
    if script is None:
        return
    if not os.path.isfile(script):  # noqa: PTH113 - one look at one name
        msg = f"no script {script!r}: expected a Python file, after it -- and its own arguments"
        raise UsageError(msg)
    wrong = [key for key in TASK_ONLY if key in given.values]
    if wrong:
        flag = "--" + wrong[0].replace("_", "-")
        msg = f"{flag} is for built-in tasks: give it to {script} after --, if it takes it"
        raise UsageError(msg)


def need(*modules: str) -> None:
    """Refuse a command of workers where only the server is installed.

    Raises:
        ConfigError: a package is not there; it says what brings it.
    """
    for name in modules:
        if importlib.util.find_spec(name) is None:
            msg = (
                f"{name} is not installed: this command needs the extra psq-train[worker] "
                "(psq-server, psq doctor and psq config show do without)"
            )
            raise ConfigError(msg)


def aggregator_words(told: ServerConfig) -> tuple[str, ...]:
    """What aggregators are told of the servers' settings: the rest is the root's alone."""
    waits = ("--lease", str(told.lease_s), "--give-up-after", str(told.give_up_after_s))
    keys = ("--keys", told.keys) if told.keys is not None else ()
    return (*waits, *keys, "--metrics-host", told.metrics_host)


def first_metrics_port(told: ServerConfig, servers: int) -> int:
    """The port of the first server's metrics; the next ones are the other servers'.

    Raises:
        ConfigError: there are not so many ports.
    """
    port = told.metrics_port
    if port and port + servers - 1 > MAX_PORT:
        msg = (
            f"metrics_port: {servers} servers take {servers} ports from {port} on, and there are "
            f"{MAX_PORT}: give a lower one, or 0 for free ones"
        )
        raise ConfigError(msg)
    return port


def script_words(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """A script's command line without the "--" that may come first."""
    return arguments[1:] if arguments[:1] == ("--",) else arguments


def flag_words(
    given: Given, cls: type, *, only: Collection[str] = (), without: Collection[str] = ()
) -> tuple[str, ...]:
    """What was typed for a class of settings, as words for another command line."""
    words: list[str] = ["--config", given.file] if given.file else []
    for item in settings_of(cls):
        value = given.values.get(item.key)
        if value is None or item.key in {"json", *SAID_BY_LAUNCHER, *without}:
            continue
        if only and item.key not in only:
            continue
        if item.kind is bool:
            words.append(item.flag if value else "--no-" + item.flag.removeprefix("--"))
        else:
            words += [item.flag, str(value)]
    return tuple(words)


worker.short_help = "Be one worker of a job, as psq-worker."
psq.add_command(worker, "worker")
psq.add_command(ckpt)
psq.add_command(keygen)
psq.add_command(keys)


def main() -> None:
    """The command `psq`."""
    run(psq, "psq")


def worker_main() -> None:
    """The command `psq-worker`."""
    run(worker, "psq-worker")


if __name__ == "__main__":
    main()
