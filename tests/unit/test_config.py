"""Settings: one list makes flags, variables and TOML keys; the sources win in the stated order."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from psq.config import (
    CONFIG_ENV,
    TABLES,
    Given,
    LaunchConfig,
    Resolved,
    ServerConfig,
    Setting,
    WorkerConfig,
    known_variables,
    resolve,
    settings_of,
    stray_variables,
    use_given,
    worker_config,
)
from psq.config.options import options
from psq.config.setting import setting
from psq.errors import ConfigError, UsageError

EVERY_SETTING = [
    pytest.param(name, item, id=f"{name}-{item.key}")
    for name, cls in TABLES.items()
    for item in settings_of(cls)
]
# Values that are no default and that fit together with the defaults of everything else.
SPECIAL = {
    "bind": "tcp://127.0.0.1:7001",
    "connect": "tcp://10.0.0.1:7001",
    "parent": "tcp://10.0.0.1:7002",
    "world_size": 7,
    "rank": 0,
    "servers": "auto",
    "schedule": "power:1:0.5",
}


def other_value(item: Setting) -> Any:
    if item.key in SPECIAL and (SPECIAL[item.key] != "auto" or item.words):
        return SPECIAL[item.key]
    if item.choices:
        return item.choices[-1]
    number = 2.5 if item.high is None else min(2.5, item.high / 2)
    return {bool: not item.default, int: 3, float: number, str: "something"}[item.kind]


def toml_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).replace("'", '"')


def ask(
    cls: type[Any],
    *,
    environ: dict[str, str] | None = None,
    arguments: dict[str, Any] | None = None,
    **given: Any,
) -> Resolved[Any]:
    file = given.pop("file", None)
    return resolve(cls, arguments or {}, given=Given(given, file), environ=environ or {})


def run_flags(cls: type[Any], words: list[str], environ: dict[str, str]) -> Resolved[Any]:
    seen: list[Resolved[Any]] = []

    @click.command()
    @options(cls)
    def command(given: Given) -> None:
        seen.append(given.resolve(cls))

    result = CliRunner().invoke(command, words, env=environ, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


GOES_WITH = {"grace": {"PSQ_MIN_WORKERS": "1"}}
"""What a setting makes no sense without."""


@pytest.mark.parametrize(("table", "item"), EVERY_SETTING)
def test_every_setting_can_be_said_by_flag_variable_file_and_argument(
    table: str, item: Setting, tmp_path: Path
) -> None:
    cls, value = TABLES[table], other_value(item)
    file = tmp_path / "psq.toml"
    file.write_text(f"[{table}]\n{item.key} = {toml_text(value)}\n")
    words = [item.flag] if item.kind is bool else [item.flag, str(value)]
    others = GOES_WITH.get(item.key, {})

    said = [
        (run_flags(cls, words, others), item.flag),
        (ask(cls, environ={**others, item.env: str(value)}), item.env),
        (ask(cls, environ=others, file=str(file)), f"{file} [{table}] {item.key}"),
        (ask(cls, environ={**others, CONFIG_ENV: str(file)}), f"{file} [{table}] {item.key}"),
        (ask(cls, environ=others, arguments={item.field: value}), f"argument {item.field}"),
    ]

    for resolved, origin in said:
        assert getattr(resolved.config, item.field) == value
        assert resolved.origins[item.field] == origin


@pytest.mark.parametrize(("table", "item"), EVERY_SETTING)
def test_every_setting_has_a_help_text_a_variable_and_a_default_of_its_own_type(
    table: str, item: Setting
) -> None:
    assert len(item.help) > 5
    assert re.fullmatch(r"PSQ_[A-Z_]+", item.env)
    assert item.flag == "--" + item.key.replace("_", "-")
    assert item.env in known_variables()
    assert getattr(TABLES[table](), item.field) == item.check(item.default)


def test_a_key_that_two_tables_share_means_the_same_kind_of_thing() -> None:
    kinds: dict[str, set[type]] = {}
    for cls in TABLES.values():
        for item in settings_of(cls):
            kinds.setdefault(item.key, set()).add(item.kind)
    assert all(len(kind) == 1 for kind in kinds.values())


@pytest.mark.parametrize(
    ("silent", "expected", "origin"),
    [
        ((), 1.0, "--lr"),
        (("flag",), 2.0, "argument lr"),
        (("flag", "argument"), 3.0, "PSQ_LR"),
        (("flag", "argument", "variable"), 4.0, "psq.toml [worker] lr"),
        (("flag", "argument", "variable", "file"), None, "default"),
    ],
)
def test_the_first_source_that_speaks_wins(
    silent: tuple[str, ...], expected: float | None, origin: str, tmp_path: Path
) -> None:
    file = tmp_path / "psq.toml"
    file.write_text("[worker]\n" + ("" if "file" in silent else "lr = 4\n"))
    resolved = ask(
        WorkerConfig,
        environ={} if "variable" in silent else {"PSQ_LR": "3"},
        arguments={"lr": None if "argument" in silent else 2},
        file=str(file),
        **({} if "flag" in silent else {"lr": "1"}),
    )
    assert resolved.config.lr == expected
    assert resolved.origins["lr"].endswith(origin)


@pytest.mark.parametrize(
    ("environ", "rank", "world_size", "origin"),
    [
        ({"RANK": "2", "WORLD_SIZE": "4"}, 2, 4, "RANK"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "3"}, 1, 3, "SLURM_PROCID"),
        ({"RANK": "2", "WORLD_SIZE": "4", "SLURM_PROCID": "1"}, 2, 4, "RANK"),
        ({"PSQ_RANK": "0", "RANK": "2", "WORLD_SIZE": "4"}, 0, 4, "PSQ_RANK"),
    ],
)
def test_torchrun_and_slurm_say_the_rank(
    environ: dict[str, str], rank: int, world_size: int, origin: str
) -> None:
    resolved = ask(WorkerConfig, environ=environ)
    assert (resolved.config.rank, resolved.config.world_size) == (rank, world_size)
    assert resolved.origins["rank"] == origin


def test_a_file_beats_the_cluster_variables(tmp_path: Path) -> None:
    file = tmp_path / "psq.toml"
    file.write_text("[worker]\nrank = 1\n")
    resolved = ask(WorkerConfig, environ={"RANK": "0", "WORLD_SIZE": "2"}, file=str(file))
    assert resolved.config.rank == 1


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [("node7", "tcp://node7:5555"), ("fe80::1", "tcp://[fe80::1]:5555")],
)
def test_the_master_address_gives_a_host_but_never_torchruns_port(
    address: str, endpoint: str
) -> None:
    environ = {"MASTER_ADDR": address, "MASTER_PORT": "29500"}
    assert ask(WorkerConfig, environ=environ).config.connect == endpoint


def test_an_empty_variable_says_nothing() -> None:
    assert ask(WorkerConfig, environ={"PSQ_LR": "", "RANK": ""}).origins["lr"] == "default"


@pytest.mark.parametrize("text", ["1", "true", "Yes", "ON"])
def test_a_switch_is_turned_on_by_these_words(text: str) -> None:
    assert ask(ServerConfig, environ={"PSQ_JSON": text}).config.json is True


@pytest.mark.parametrize("text", ["0", "false", "No", "OFF"])
def test_a_switch_is_turned_off_by_these_words(text: str) -> None:
    assert ask(ServerConfig, environ={"PSQ_JSON": text}).config.json is False


def test_a_switch_that_a_variable_turned_on_can_be_turned_off_by_a_flag() -> None:
    assert run_flags(ServerConfig, ["--no-json"], {"PSQ_JSON": "1"}).config.json is False


@pytest.mark.parametrize(
    ("environ", "complaint"),
    [
        ({"PSQ_LR": "fast"}, "lr (from PSQ_LR): expected a number > 0 and <= 1e+06, got 'fast'"),
        ({"PSQ_LR": "nan"}, "lr (from PSQ_LR): expected a number > 0"),
        ({"PSQ_RANK": "1.5"}, "rank (from PSQ_RANK): expected a whole number >= 0"),
        ({"PSQ_JSON": "maybe"}, "json (from PSQ_JSON): expected true or false, got 'maybe'"),
        ({"PSQ_PROGRESS": "loud"}, "expected one of text, json, none, got 'loud'"),
        ({"RANK": "x"}, "rank (from RANK): expected a whole number"),
        ({"PSQ_RANK": "2"}, "expected 0 to 0 in a job of world_size 1, got 2 (from PSQ_RANK)"),
        ({"PSQ_CONNECT": "host:5555"}, "expected tcp://HOST:PORT with a port of 1 to 65535"),
        ({"PSQ_CONNECT": "tcp://host:0"}, "got 'tcp://host:0' (from PSQ_CONNECT)"),
    ],
)
def test_a_wrong_variable_is_refused_with_its_name_what_was_expected_and_what_came(
    environ: dict[str, str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        ask(WorkerConfig, environ=environ)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[worker]\nlearning_rate = 1\n", "[worker] has no key 'learning_rate'; there are: adam"),
        ("[worker]\nbatchsize = 1\n", "[worker] has no key 'batchsize'; did you mean batch_size?"),
        ("[workers]\nlr = 1\n", "got 'workers'; did you mean worker?"),
        (
            "lr = 1\n",
            "[server], [worker], [launch], [demo], [advise], [simulate], got 'lr'",
        ),
        ('[worker]\nlr = "1"\n', "[worker] lr): expected a number > 0 and <= 1e+06, got '1'"),
        ("[worker]\nrank = true\n", "expected a whole number >= 0 and <= 4095, got True"),
        ("[worker]\njson = 1\n", "expected true or false, got 1"),
        ("[server]\nbnd = 1\n", "[server] has no key 'bnd'; did you mean bind?"),
        ("[worker\n", "is not TOML"),
        ("\x00", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_the_key(
    text: str, complaint: str, tmp_path: Path
) -> None:
    file = tmp_path / "psq.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(complaint)) as caught:
        ask(WorkerConfig, file=str(file))
    assert str(file) in str(caught.value)


def test_a_file_that_is_missing_or_huge_is_refused_with_who_named_it(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"none\.toml' named by PSQ_CONFIG: No such file"):
        ask(WorkerConfig, environ={CONFIG_ENV: missing})
    huge = tmp_path / "huge.toml"
    huge.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="has at most 1048576"):
        ask(WorkerConfig, file=str(huge))


def test_a_config_made_in_code_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"lease_s: expected a number > 0 and <= 3600, got -1\.0"):
        ServerConfig(lease_s=-1.0)
    with pytest.raises(ConfigError, match="rank: expected a whole number"):
        WorkerConfig(rank="1")  # type: ignore[arg-type]
    assert type(ServerConfig(lease_s=3).lease_s) is float


TWO = "tcp://a:7001,tcp://b:7002"


def test_the_servers_of_a_job_are_a_list_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "psq.toml"
    file.write_text('[worker]\nconnect = ["tcp://a:7001", "tcp://b:7002"]\n')
    said = [
        run_flags(WorkerConfig, ["--connect", TWO], {}),
        ask(WorkerConfig, environ={"PSQ_CONNECT": "tcp://a:7001, tcp://b:7002"}),
        ask(WorkerConfig, file=str(file)),
        ask(WorkerConfig, arguments={"connect": ["tcp://a:7001", "tcp://b:7002"]}),
        ask(WorkerConfig, arguments={"connect": TWO}),
    ]
    for resolved in said:
        assert resolved.config.endpoints == ("tcp://a:7001", "tcp://b:7002")
    assert said[2].config.connect == TWO


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tcp://a:1,tcp://a:1", "connect: tcp://a:1 stands there twice"),
        ("tcp://a:1,", "expected tcp://HOST:PORT with a port of 1 to 65535, got ''"),
        ("tcp://a:1;tcp://b:1", "expected tcp://HOST:PORT"),
    ],
)
def test_a_list_of_servers_is_checked_part_by_part(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        ask(WorkerConfig, environ={"PSQ_CONNECT": text})


def test_a_list_may_be_longer_than_a_text_and_has_an_end() -> None:
    ports = [f"tcp://node-with-a-name.example:{port}" for port in range(10_000, 10_256)]
    assert ask(WorkerConfig, environ={"PSQ_CONNECT": ",".join(ports)}).config.endpoints[255]
    with pytest.raises(ConfigError, match=r"connect \(from PSQ_CONNECT\): expected text"):
        ask(WorkerConfig, environ={"PSQ_CONNECT": "t" * 65_537})


def test_a_list_of_what_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "psq.toml"
    file.write_text("[worker]\nconnect = [5555]\n")
    with pytest.raises(ConfigError, match=r"connect\): expected text, got \[5555\]"):
        ask(WorkerConfig, file=str(file))
    with pytest.raises(ConfigError, match=r"task\): expected text, got \['a', 'b'\]"):
        ask(WorkerConfig, arguments={"task": ["a", "b"]})


def test_a_word_may_stand_in_place_of_a_number() -> None:
    @dataclasses.dataclass(frozen=True)
    class Sample:
        count: int | Literal["auto"] = setting(1, "how many", low=1)

    (item,) = settings_of(Sample)
    assert [item.parse("3"), item.parse("auto"), item.check("auto")] == [3, "auto", "auto"]
    for wrong in ("0", "automatic", "1.5"):
        with pytest.raises(ValueError, match="expected a whole number >= 1 or auto, got"):
            item.parse(wrong)
    with pytest.raises(ValueError, match="expected a whole number"):
        item.check("3")


def test_how_many_servers_is_a_number_or_auto() -> None:
    assert ask(LaunchConfig, environ={"PSQ_SERVERS": "auto"}).config.servers == "auto"
    assert ask(LaunchConfig, servers="3").config.servers == 3
    with pytest.raises(ConfigError, match="expected a whole number >= 1 and <= 64 or auto, got"):
        ask(LaunchConfig, servers="65")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "localhost", "[::1]"])
def test_a_loopback_address_needs_no_permission(host: str) -> None:
    assert ServerConfig(bind=f"tcp://{host}:0").bind.endswith(":0")


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "10.1.2.3", "[::]", "node7"])  # noqa: S104
def test_an_address_others_can_reach_needs_permission(host: str) -> None:
    with pytest.raises(ConfigError, match="--insecure-plaintext"):
        ServerConfig(bind=f"tcp://{host}:5555")
    assert ServerConfig(bind=f"tcp://{host}:5555", insecure_plaintext=True).bind


def test_a_script_gets_the_flags_of_psq_worker_before_its_own_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PSQ_SEED", "11")
    with use_given(Given({"lr": "0.5", "rank": "1", "world_size": "2"})):
        config = worker_config({"lr": 0.1, "recipe": "fp32", "seed": None})
    assert (config.lr, config.rank, config.recipe, config.seed) == (0.5, 1, "fp32", 11)
    assert worker_config({"lr": 0.1}).lr == 0.1


def test_a_flag_for_what_a_script_settles_itself_is_refused_not_ignored() -> None:
    with (
        use_given(Given({"lr": "0.5"})),
        pytest.raises(UsageError, match=r"--lr 0\.5 would have no effect"),
    ):
        worker_config(settled=["lr"])
    with use_given(Given({"seed": "5"})):
        assert worker_config(settled=["lr"]).seed == 5


def test_an_argument_that_is_no_setting_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"has no setting 'world'.*did you mean"):
        worker_config({"world": 3})


def test_stray_variables_are_found_with_what_was_likely_meant() -> None:
    strays = stray_variables({"PSQ_WORLDSIZE": "2", "PSQ_XYZZY": "", "PSQ_RANK": "0", "RANK": "1"})
    assert strays == {"PSQ_WORLDSIZE": "PSQ_WORLD_SIZE", "PSQ_XYZZY": ""}


def test_a_literal_an_optional_and_a_unit_are_read_from_the_annotation() -> None:
    @dataclasses.dataclass(frozen=True)
    class Sample:
        wait_s: float | None = setting(None, "how long", key="wait", above=0)

    (item,) = settings_of(Sample)
    assert (item.kind, item.optional, item.flag, item.env) == (float, True, "--wait", "PSQ_WAIT")


# ---- a setting that is said several times


def test_options_of_a_recipe_are_given_one_by_one_and_add_up():
    words = ["--with", "aggregate=krum", "--with", "aggregate.f=2"]
    found = run_flags(WorkerConfig, words, {})
    assert found.config.changes == ("aggregate=krum", "aggregate.f=2")
    assert found.origins["options"] == "--with"


def test_options_of_a_recipe_are_a_list_in_a_file_and_spaces_in_a_variable(tmp_path):
    path = tmp_path / "psq.toml"
    path.write_text('[worker]\nwith = ["aggregate=krum", "aggregate.f=2"]\n')
    assert ask(WorkerConfig, file=str(path)).config.changes == ("aggregate=krum", "aggregate.f=2")
    environ = {"PSQ_WITH": "aggregate=krum  aggregate.f=2"}
    assert ask(WorkerConfig, environ=environ).config.changes == ("aggregate=krum", "aggregate.f=2")
    assert ask(WorkerConfig).config.changes == ()


def test_automatic_codecs_and_options_of_a_recipe_exclude_each_other():
    with pytest.raises(ConfigError, match="auto chooses the recipe's options, which is given as"):
        WorkerConfig(codec="auto", options="apply.rate=1")
