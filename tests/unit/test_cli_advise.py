"""`psq advise` on the command line: what it asks, what it prints, what it refuses. No network."""

import functools
import json

import pytest

from psq.advice import CAUTION, LOOPBACK, candidates, measure_rates
from psq.client import LinkRates
from psq.config import AdviseConfig
from psq.config.options import run
from psq_worker import advising
from psq_worker.cli import psq

SMALL = ("--numel", "300000")


@pytest.fixture
def advise(capsys, monkeypatch):
    """Run `psq advise`: (exit code, stdout, stderr). It measures as short as can be."""
    quick = functools.partial(measure_rates, budget_s=0.0)
    monkeypatch.setattr(advising, "measure_rates", quick)
    monkeypatch.setenv("COLUMNS", "140")

    def calling(*words):
        with pytest.raises(SystemExit) as ended:
            run(psq, "psq", ["advise", *words])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return calling


def test_it_shows_every_candidate_and_says_what_to_use_on_a_slow_link(advise):
    code, out, _ = advise(*SMALL, "--link", "10mbit", "-n", "4")
    assert code == 0
    for candidate in candidates():
        assert candidate.name in out
    assert "300,000 values; 4 workers, 1 server, 9 Mbit/s up, 9 down, 0.2 ms there" in out
    assert "Use --recipe server-adam" in out
    assert "times as fast; what limits it then: the link, from workers to servers." in out


def test_a_step_that_is_all_compute_gets_the_advice_not_to_compress(advise):
    code, out, _ = advise(*SMALL, "--compute-ms", "60000")
    assert code == 0
    assert "Compression does not pay here: " in out
    assert "use fp32: --recipe fp32" in out
    assert "compute 60000.0 ms" in out


def test_json_has_the_question_every_prediction_and_the_answer(advise):
    code, out, _ = advise(*SMALL, "--link", "10mbit", "--round-trip-ms", "3", "-s", "1", "--json")
    said = json.loads(out)
    assert code == 0
    assert said["numel"] == 300_000
    assert said["link"]["round_trip_s"] == 0.003
    assert said["link"]["measured"] is False
    assert [option["name"] for option in said["options"]] == [c.name for c in candidates()]
    chosen = next(o for o in said["options"] if o["name"] == said["chosen"])
    assert chosen["flags"] == said["flags"]
    assert chosen["step_s"] <= 1.01 * min(option["step_s"] for option in said["options"])
    assert all(option["up_s"] > 0 and option["rates"]["encode"] > 0 for option in said["options"])


def test_loopback_has_no_rate_in_json(advise):
    _, out, _ = advise(*SMALL, "--json")
    said = json.loads(out)
    assert said["one_machine"] is True
    assert said["link"]["up_mbit_s"] is None


def test_one_bit_is_offered_where_it_is_asked_for_with_a_word_of_caution(advise):
    _, without, _ = advise(*SMALL, "--link", "10mbit")
    code, out, _ = advise(*SMALL, "--link", "10mbit", "--min-bits", "1")
    assert code == 0
    assert "qadam-1bit" in out
    assert "qadam-1bit" not in without
    assert CAUTION in " ".join(out.split())
    assert CAUTION not in " ".join(without.split())


def test_dense_gradients_stay_in_the_table_whatever_the_fewest_bits(advise):
    _, out, _ = advise(*SMALL, "--min-bits", "32", "--json")
    assert [option["name"] for option in json.loads(out)["options"]] == ["fp32"]


def test_a_task_brings_its_model_and_the_time_it_computes(advise):
    code, out, _ = advise("--task", "char-lm", "--json", "--link", "1gbit")
    said = json.loads(out)
    assert code == 0
    assert said["numel"] == 623_824
    assert all(option["compute_s"] > 0 for option in said["options"])
    _, out, _ = advise("--task", "char-lm", "--json", "--link", "1gbit", "--compute-ms", "7")
    assert all(option["compute_s"] == 0.007 for option in json.loads(out)["options"])


def test_a_link_is_measured_where_a_server_is_named(advise, monkeypatch):
    asked = []

    def probe(endpoint, rank, *, keys):
        assert (rank, keys) == (0, None)
        asked.append(endpoint)
        return LinkRates(round_trip_s=0.002, up_mbit_s=50.0, down_mbit_s=40.0 + len(asked))

    monkeypatch.setattr("psq.client.probe_link", probe)
    servers = "tcp://10.0.0.1:5555,tcp://10.0.0.2:5555"
    code, out, _ = advise(*SMALL, "--connect", servers, "--json")
    said = json.loads(out)
    assert code == 0
    assert asked == servers.split(",")
    assert said["servers"] == 2
    link = {"measured": True, "up_mbit_s": 50.0, "down_mbit_s": 41.0, "round_trip_s": 0.002}
    assert said["link"] == link


def test_a_server_on_loopback_means_one_machine(serve):
    asked = advising.ask(AdviseConfig(connect=serve().endpoint, numel=1000))
    assert asked.measured
    assert asked.step.cluster.one_machine
    assert asked.step.cluster.link is LOOPBACK


def test_servers_auto_is_one_beside_each_worker(advise):
    _, out, _ = advise(*SMALL, "--link", "1gbit", "-n", "3", "-s", "auto", "--json")
    said = json.loads(out)
    assert (said["servers"], said["beside"]) == (3, True)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--link", "fast"), "such as 100mbit or 2.5gbit"),
        (("--link", "1gbit", "--connect", "tcp://a:1"), "connect says that already"),
        (("--task", "char-lm", "--numel", "7"), "task says that already"),
        (("--link", "1gbit", "--beside", "-s", "4"), "4 servers cannot be beside 2 workers"),
        (("--task", "nothing"), "no task 'nothing'"),
        (("--numel", "0"), "expected a whole number >= 1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(advise, words, complaint):
    code, out, err = advise(*words)
    assert (code, out) == (78, "")
    assert complaint in err
    assert err.count("\n") == 1
