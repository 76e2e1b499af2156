"""The commands: help at once, one-line errors, documented codes, nothing typed is ignored."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from psq.codec import codec_specs
from psq.config import DemoConfig, Given, LaunchConfig, ServerConfig, WorkerConfig, settings_of
from psq.config.options import run
from psq.errors import ConfigError
from psq_worker.cli import (
    ABOUT_MESSAGES,
    FOR_SERVER,
    SAID_BY_LAUNCHER,
    first_metrics_port,
    flag_words,
    psq,
    script_words,
    worker,
)
from psq_worker.demo import verdict
from psq_worker.tasks import TASK_NAMES

DEADLINE_S = 60.0


@pytest.fixture
def call(capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def calling(command, *words):
        with pytest.raises(SystemExit) as ended:
            run(command, command.name or "psq", list(words))
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return calling


def keys(*classes):
    return {item.flag for cls in classes for item in settings_of(cls)}


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - {"--help", "--config"}


def positive(flags):
    return {flag for flag in flags if not flag.startswith("--no-")}


def test_help_says_what_there_is_and_which_codes_a_command_ends_with(call):
    code, out, _ = call(psq, "--help")
    assert code == 0
    for words in ("launch", "demo", "doctor", "config", "baseline", "75 gave up", "130 Ctrl-C"):
        assert words in " ".join(out.split())


def test_the_worker_takes_every_setting_of_a_worker(call):
    code, out, _ = call(worker, "--help")
    assert code == 0
    assert positive(flags_in(out)) >= keys(WorkerConfig)


def test_the_worker_s_help_names_every_task_and_family_of_codecs_and_where_recipes_are(call):
    _, out, _ = call(worker, "--help")
    words = set(re.findall(r"[a-z][a-z0-9-]+", re.sub(r"-\n\s+", "-", out)))
    assert "psq recipes lists them all" in " ".join(out.split())
    assert words >= set(TASK_NAMES)
    assert words >= {spec.partition(":")[0] for spec in codec_specs()}


def test_launch_takes_the_settings_of_all_but_what_it_says_itself(call):
    _, out, _ = call(psq, "launch", "--help")
    taken = positive(flags_in(out))
    own = {"--" + key.replace("_", "-") for key in SAID_BY_LAUNCHER}
    server = {"--" + key.replace("_", "-") for key in FOR_SERVER}
    assert taken >= keys(LaunchConfig) | server | (keys(WorkerConfig) - own)
    assert not taken & (own | {"--bind", "--insecure-plaintext"})


def test_the_demo_takes_its_folder_beside_the_settings_of_launch_and_worker(call):
    _, out, _ = call(psq, "demo", "--help")
    without = {"--tree", "--max-restarts"}
    assert positive(flags_in(out)) >= keys(DemoConfig, LaunchConfig) - without
    assert not without.intersection(flags_in(out))


@pytest.mark.parametrize("words", [["--help"], ["launch", "--help"], ["doctor", "--json"]])
def test_torch_is_not_imported_by_what_trains_nothing(words):
    code = (
        "import sys; from psq_worker.cli import psq; "
        f"psq.main({words!r}, standalone_mode=False); "
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_flag_that_does_not_exist_is_wrong_use(call):
    code, _, err = call(worker, "--rnak", "1")
    assert code == 64
    assert "No such option '--rnak'" in err


def test_a_wrong_value_is_one_line_with_the_flag_and_what_was_expected(call):
    code, out, err = call(worker, "--rank", "one")
    assert (code, out) == (78, "")
    assert err == (
        "psq-worker: error: rank (from --rank): expected a whole number >= 0 and <= 4095, "
        "got 'one'\n"
    ).replace("psq-worker", worker.name)


def test_a_script_that_is_not_there_is_wrong_use(call):
    code, _, err = call(worker, "nowhere.py")
    assert code == 64
    assert "no script 'nowhere.py'" in err


@pytest.mark.parametrize("flag", ["--task", "--steps", "--batch-size", "--eval-every", "--data"])
def test_a_flag_for_tasks_is_refused_beside_a_script(call, tmp_path, flag):
    script = tmp_path / "train.py"
    script.write_text("")
    code, _, err = call(psq, "launch", flag, "3", str(script))
    assert code == 64
    assert f"{flag} is for built-in tasks" in err


def test_a_file_with_a_wrong_key_is_refused_by_every_command(call, tmp_path):
    file = tmp_path / "psq.toml"
    file.write_text("[worker]\nlearning_rate = 1\n")
    for words in (["launch"], ["demo"], ["baseline"], ["worker"], ["config", "show"]):
        code, _, err = call(psq, *words, "--config", str(file))
        assert code == 78, words
        assert "[worker] has no key 'learning_rate'" in err


@pytest.mark.parametrize("command", ["launch", "demo"])
@pytest.mark.parametrize(
    ("flag", "value", "complaint"),
    [
        ("--recipe", "qadm", "no recipe 'qadm'; there are: server-adam"),
        ("--uplink", "sgn", "codec 'sgn'"),
        ("--downlink", "mean:sgn", "codec 'sgn'"),
        ("--adam", "betta=0.9", "adam: no setting 'betta'; did you mean beta?"),
        ("--consistency", "ssp", "bsp[,quorum=Q]"),
        ("--consistency", "bsp,quorum=3", "a quorum of 3 is more than the 2 workers"),
    ],
)
def test_a_recipe_that_does_not_exist_is_refused_before_anything_starts(
    call, command, flag, value, complaint
):
    code, _, err = call(psq, command, flag, value)
    assert code == 78
    assert complaint in err
    assert "1 server" not in err


def test_debug_lets_the_error_itself_through():
    with pytest.raises(Exception, match="expected a whole number"):
        run(worker, "psq-worker", ["--rank", "one", "--debug"])


def test_config_show_says_where_each_value_came_from(call, monkeypatch, tmp_path):
    file = tmp_path / "psq.toml"
    file.write_text("[server]\nlease = 3\n")
    monkeypatch.setenv("PSQ_SEED", "5")
    code, out, _ = call(psq, "config", "show", "--config", str(file), "--lr", "0.5", "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["worker"]["lr"] == {"value": 0.5, "origin": "--lr", "variable": "PSQ_LR"}
    assert shown["worker"]["seed"] == {"value": 5, "origin": "PSQ_SEED", "variable": "PSQ_SEED"}
    assert shown["server"]["lease"]["origin"] == f"{file} [server] lease"
    assert shown["launch"]["workers"]["origin"] == "default"


def test_config_show_prints_tables(call):
    code, out, _ = call(psq, "config", "show")
    assert code == 0
    assert "[worker]" in out
    assert "PSQ_GIVE_UP_AFTER" in out


def test_doctor_ends_with_what_it_found(call, monkeypatch):
    code, out, _ = call(psq, "doctor", "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (0, True)
    assert {"name", "verdict", "found", "advice", "code"} == set(found["checks"][0])
    monkeypatch.setenv("PSQ_RANK", "-1")
    code, out, _ = call(psq, "doctor")
    assert code == 78
    assert "rank (from PSQ_RANK)" in out


def test_what_was_typed_is_handed_on_as_it_was_typed():
    given = Given(
        {
            "lr": "0.5",
            "recipe": "qadam",
            "debug": False,
            "workers": "3",
            "json": True,
            "lease": "2",
        },
        "psq.toml",
    )
    assert flag_words(given, WorkerConfig) == (
        "--config",
        "psq.toml",
        "--recipe",
        "qadam",
        "--lr",
        "0.5",
        "--no-debug",
    )
    assert flag_words(given, ServerConfig, only=FOR_SERVER) == (
        "--config",
        "psq.toml",
        "--lease",
        "2",
    )


def test_only_the_first_double_dash_is_the_commands():
    assert script_words(("--", "--epochs", "--", "3")) == ("--epochs", "--", "3")
    assert script_words(("--epochs", "3")) == ("--epochs", "3")


def test_settings_that_no_worker_could_have_are_not_shown(call):
    code, _, err = call(psq, "config", "show", "--recipe", "qadm")
    assert code == 78
    assert "no recipe 'qadm'" in err


def test_every_command_says_what_it_is_for_in_one_whole_line(call):
    _, out, _ = call(psq, "--help")
    assert "..." not in out.partition("Commands:")[2]


def test_a_comparison_with_what_torch_does_not_have_is_refused_before_anything_starts(call):
    code, _, err = call(psq, "demo", "--recipe", "server-adam", "--adam", "eps_placement=inside")
    assert code == 78
    assert "torch.optim.Adam has no eps_placement=inside" in err


def test_plain_adam_gets_what_was_typed_but_nothing_about_messages(call):
    typed = {"recipe": "qadam", "lr": "1", "debug": True, "uplink": "sign", "overlap": True}
    given = Given({**typed, "residual": "bf16", "consistency": "ssp:2"}, "f")
    words = flag_words(given, WorkerConfig, without=ABOUT_MESSAGES)
    assert words == ("--config", "f", "--lr", "1", "--debug")
    _, out, _ = call(psq, "baseline", "--help")
    assert not flags_in(out) & {"--" + key.replace("_", "-") for key in ABOUT_MESSAGES}


def test_each_server_has_a_metrics_port_and_there_must_be_so_many():
    assert first_metrics_port(ServerConfig(), 4) == 0
    assert first_metrics_port(ServerConfig(metrics_port=65532), 4) == 65532
    with pytest.raises(ConfigError, match="4 servers take 4 ports from 65533 on"):
        first_metrics_port(ServerConfig(metrics_port=65533), 4)


@pytest.mark.parametrize(
    ("metric", "difference", "words"),
    [
        ("accuracy", -0.0012, "test accuracy differs by -0.12 points."),
        ("val_loss", 0.01, "test loss differs by +0.0100."),
        ("", None, "fewer bytes than fp32."),
    ],
)
def test_the_demos_verdict_is_a_sentence(metric, difference, words):
    ours = {"metric": metric, "wire": {"compression_ratio": 12.44}}
    said = verdict({"psq": ours, "score_difference": difference})
    assert said.startswith("psq sent 12.4 times fewer bytes than fp32")
    assert said.endswith(words)
