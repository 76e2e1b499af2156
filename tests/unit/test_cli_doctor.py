"""The doctor: what it finds, what it advises, and when it says no."""

from __future__ import annotations

import socket

import pytest
import zmq

from psq import kernels, link
from psq.config import Given
from psq.errors import EXIT_GAVE_UP
from psq.keys import load_server_keys
from psq_worker import doctor
from psq_worker.doctor import Check, examine, exit_code
from psq_worker.keys import make_keys


def found(environ=None):
    return {check.name: check for check in examine(environ or {})}


def test_this_machine_can_run_psq():
    checks = examine({})
    assert exit_code(checks) == 0, checks
    assert {c.name for c in checks} >= {
        "python",
        "psq",
        "torch",
        "kernels",
        "libzmq",
        "loopback",
        "cores",
        "settings",
    }


def test_a_finding_that_psq_cannot_live_with_is_code_78():
    assert exit_code([Check("a", "note", "")]) == 0
    assert exit_code([Check("a", "ok", ""), Check("b", "fail", "")]) == 78


def test_a_server_that_does_not_answer_has_the_code_that_a_worker_would_end_with():
    away = Check("server", "fail", "", code=75)
    assert exit_code([Check("a", "note", ""), away]) == 75
    assert exit_code([away, Check("b", "fail", "")]) == 78, "this machine comes first"


def test_a_wrong_variable_is_found_before_it_stops_a_job():
    check = found({"PSQ_LEASE": "-1"})["settings"]
    assert check.verdict == "fail"
    assert "lease (from PSQ_LEASE): expected a number > 0" in check.found


def test_known_variables_are_shown_and_strange_ones_get_a_hint():
    checks = found({"PSQ_RANK": "0", "PSQ_WORLDSIZE": "2", "PSQ_XYZZY": "1"})
    assert checks["PSQ_RANK"] == Check("PSQ_RANK", "ok", "0")
    assert checks["PSQ_WORLDSIZE"].advice == "did you mean PSQ_WORLD_SIZE?"
    assert checks["PSQ_XYZZY"].verdict == "note"


def test_a_missing_package_fails_and_a_missing_extra_is_a_note(monkeypatch):
    real = doctor._version
    missing = {"msgpack", "torch"}
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name in missing else real(name))
    checks = found()
    assert checks["msgpack"].verdict == "fail"
    assert checks["torch"] == Check(
        "torch", "note", "not installed", "workers need it: install psq-train[worker]"
    )


def test_a_recipe_that_does_not_exist_fails():
    check = found({"PSQ_ADAM": "betta=0.9"})["settings"]
    assert check.verdict == "fail"
    assert "did you mean beta?" in check.found


def test_an_old_libzmq_fails(monkeypatch):
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: (4, 3, 4))
    check = found()["libzmq"]
    assert (check.verdict, check.found) == ("fail", "4.3.4")
    assert "4.3.5" in check.advice


def test_a_port_that_is_taken_is_a_note_with_a_way_out(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(doctor, "DEFAULT_PORT", port)
        check = found()[f"port {port}"]
    assert check.verdict == "note"
    assert "--bind tcp://127.0.0.1:0" in check.advice


@pytest.mark.parametrize("forced", [True, False])
def test_the_reference_kernels_are_a_note_that_says_why(monkeypatch, forced):
    monkeypatch.setattr(kernels, "level", lambda: "reference")
    monkeypatch.setattr(kernels, "available", lambda: ("reference",))
    environ = {"PSQ_KERNEL": "reference"} if forced else {}
    check = found(environ)["kernels"]
    assert check.verdict == "note"
    assert ("PSQ_KERNEL" in check.found) == forced
    assert ("compiler" in check.advice) != forced


def test_a_connection_that_never_comes_about_fails(monkeypatch):
    monkeypatch.setattr(link.WorkerLink, "wait_room", lambda *_: False)
    assert found()["loopback"].verdict == "fail"


def test_each_server_that_is_named_is_tried_and_says_which_one_is_not_there(monkeypatch, serve):
    monkeypatch.setattr(doctor, "ANSWER_TIMEOUT_S", 1.0)
    server = serve()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, and nobody listens
        silent = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
        checks = found({"PSQ_CONNECT": f"{server.endpoint},{silent}"})
    assert checks["server 0"].verdict == "ok"
    assert f"{server.endpoint} answers: " in checks["server 0"].found
    assert "Mbit/s up" in checks["server 0"].found
    assert checks["server 1"].verdict == "fail"
    assert f"{silent}: no answer within 1 s" in checks["server 1"].found
    assert exit_code(list(checks.values())) == EXIT_GAVE_UP


def test_a_server_that_cannot_be_heard_with_these_keys_may_be_another_one(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ANSWER_TIMEOUT_S", 0.5)
    for job in ("ours", "theirs"):
        make_keys(tmp_path / job, 1)
    wrong = tmp_path / "theirs" / "rank0"
    with link.ServerLink("tcp://127.0.0.1:0", keys=load_server_keys(tmp_path / "ours")) as server:
        check = found({"PSQ_CONNECT": server.endpoint, "PSQ_KEYS": str(wrong)})["server"]
    assert (check.verdict, check.code) == ("fail", EXIT_GAVE_UP)
    assert f"{wrong} may have the key of another server" in check.advice


def test_the_only_server_has_no_number_and_a_flag_names_it(serve):
    endpoint = serve().endpoint
    checks = {c.name: c for c in examine({}, Given({"connect": endpoint}))}
    assert checks["server"].verdict == "ok"


def test_no_server_is_tried_that_nobody_named():
    assert not [name for name in found() if name.startswith("server")]


def test_wrong_addresses_are_a_matter_of_settings():
    checks = found({"PSQ_CONNECT": "tcp://a:1,tcp://a:1"})
    assert "stands there twice" in checks["settings"].found
    assert "server 0" not in checks
