"""Imports torch once and forks a process per worker: a real process with a pid of its own, started
in milliseconds instead of seconds.

One JSON object a line on stdin, {"id", "argv", "env", "cwd", "stdout", "stderr"}; one a line on
stdout: {"id", "pid"} when it is started, {"pid", "code"} when it has ended. End of input ends it.
"""

import atexit
import json
import os
import runpy
import selectors
import signal
import sys

import torch

import psq.torch  # noqa: F401 - imported here so that the children have it


def main() -> list[str]:
    """Serve; returns only in a child, with its argv."""
    torch.set_num_threads(1)
    warm_up()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    say({"ready": os.getpid()})
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(reader, selectors.EVENT_READ)
        pending = b""
        while True:
            for key, _ in selector.select():
                if key.fd == reader:
                    os.read(reader, 4096)
                    reap()
                    continue
                data = os.read(0, 65536)
                if not data:
                    os._exit(0)
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    order = json.loads(line)
                    pid = os.fork()
                    if pid == 0:
                        become(order)
                        return order["argv"]
                    say({"id": order["id"], "pid": pid})


def warm_up() -> None:
    """The first optimizer of a process imports half of torch."""
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.zeros(1)
    torch.optim.Adam([parameter]).step()


def become(order: dict) -> None:
    """In the child: a session, streams, a folder and an environment of its own."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    with open(os.devnull) as nothing:  # noqa: PTH123 - a descriptor is wanted
        os.dup2(nothing.fileno(), 0)
    for fd, path in ((1, order["stdout"]), (2, order["stderr"])):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(target, fd)
        os.close(target)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.stdout.reconfigure(line_buffering=True)


def reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        say({"pid": pid, "code": os.waitstatus_to_exitcode(status)})


def say(message: dict) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def run(argv: list[str]) -> int:
    """Run a script as `python script` would; an error ends this process just as it would there."""
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


code = run(main())
# The script is over: what it left for the end runs now. Taking down an interpreter that shares its
# memory with the zygote would take seconds, for nothing.
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
