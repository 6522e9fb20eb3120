"""Hosts on one machine: each has its own name, network, process numbers, shared memory and temporary folder.

A host is a process that holds its namespaces open. It ends with the pipe from the test, however the test ends, and
Linux then ends every process of the host and takes its network away. Nothing is added to the machine's own network:
the hosts' cables lead to a bridge in a namespace of its own. All hosts see `shared` of the cluster at /srv.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.harness.program import REPOSITORY, ProgramRun
from tests.harness.ranks import _context

SHARED = Path("/srv")
_MOUNT, _UTS, _IPC, _PID, _NET = 0x00020000, 0x04000000, 0x08000000, 0x20000000, 0x40000000  # CLONE_NEW...
_OF_A_HOST = _MOUNT | _UTS | _IPC | _PID | _NET
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stderr}"
    return done.stdout


@cache
def missing_means() -> str:
    """Returns what this machine does not grant that hosts are made of, or an empty string."""
    if sys.platform != "linux":
        return "namespaces are Linux's"
    for tool in ("ip", "tc", "ss", "nsenter", "unshare", "mount"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    trial = (
        "mount --make-rprivate / && mount -t tmpfs x /dev/shm && ip link add br0 type bridge && ip link add x0 type veth "
        "peer name x1 && tc qdisc add dev x0 root tbf rate 1gbit burst 128kb latency 50ms"
    )
    done = subprocess.run(
        ["unshare", "-numip", "--fork", "sh", "-c", trial], capture_output=True, text=True, timeout=20
    )
    return "" if done.returncode == 0 else f"not granted: {(done.stderr.strip() or trial).splitlines()[-1]}"


class Host:
    """One host; made by a Cluster.

    Attributes:
        pid: of its first process, as the machine counts.
        folder: what is the host's own: its outputs, and its temporary folder `tmp`.
        services: processes that belong to the host rather than to a job.
    """

    def __init__(self, name: str, address: str, cluster: Cluster):
        self.name, self.address, self._cluster = name, address, cluster
        self.folder, self.services = cluster.folder / name, set[int]()
        (self.folder / "tmp").mkdir(parents=True)
        self._pipe, there = _context.Pipe()
        self._process = _context.Process(target=_hold, args=(there, name, str(cluster.names), str(cluster.shared)))
        self._process.start()
        there.close()
        assert self._pipe.poll(60), f"{name} does not start"
        self.pid = self._pipe.recv()
        assert isinstance(self.pid, int), self.pid

    def start(self, words: Sequence[str], **environment: str) -> ProgramRun:
        """Starts torchrun on the host. It, and what it starts, are forks of a process that has everything imported: a second, not
        ten.
        """
        output = self.folder / f"output-{len(list(self.folder.glob('output-*'))):03d}.txt"
        environment = {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder / "tmp"), **environment}
        process = _context.Process(target=_enter, args=(self.pid, list(words), environment, str(output)))
        process.start()
        return ProgramRun([process], [output])

    def run(self, *words: object) -> str:
        """Runs a command of the system on the host, and returns what it printed."""
        return _run("nsenter", "-t", self.pid, "-a", *words)

    def cable(self, plugged_in: bool) -> None:
        """Pulls the host's network cable, or plugs it in again."""
        self._cluster.switch("ip", "link", "set", f"to-{self.name}", "up" if plugged_in else "down")

    def shape(self, rate: str) -> None:
        """Limits what the host sends, and what it receives, to a rate such as 1gbit. An idle link lets through at once, as no real
        one does, so little that it does not count.
        """
        limit = ("root", "tbf", "rate", rate, "burst", "32kb", "latency", "100ms")
        self.run("tc", "qdisc", "replace", "dev", "eth0", *limit)
        self._cluster.switch("tc", "qdisc", "replace", "dev", f"to-{self.name}", *limit)

    def sent_bytes(self) -> int:
        """Returns the bytes that the host has sent to others."""
        return int(Path(f"/proc/{self.pid}/net/dev").read_text().partition("eth0:")[2].split()[8])

    def listening(self) -> set[str]:
        """Returns where the host listens, as ss writes it: address:port."""
        return {line.split()[3] for line in self.run("ss", "-Hltn").splitlines()}

    def processes(self) -> list[int]:
        """Returns the processes of the host besides its first, as the machine counts."""
        here, found = os.readlink(f"/proc/{self.pid}/ns/pid"), []
        for path in Path("/proc").glob("[0-9]*/ns/pid"):
            with suppress(OSError):
                if os.readlink(path) == here and path.parts[2] != str(self.pid):
                    found.append(int(path.parts[2]))
        return found

    def lose(self) -> None:
        """Takes the host away in the middle of what it does, as a loss of its power would: others hear nothing of it."""
        if self.address and self._process.is_alive():
            self.cable(False)
        self._pipe.close()
        self._process.join(20)


class Cluster:
    """Hosts at one switch; a context.

    Args:
        folder: an empty folder for the hosts' own and shared files.
    """

    def __init__(self, folder: Path):
        self.folder, self.shared, self.names = folder, folder / "shared", folder / "names"
        self.hosts: list[Host] = []

    def __enter__(self) -> Cluster:
        self.shared.mkdir(parents=True)
        addresses = [f"10.77.0.{number + 1} host{number}" for number in range(16)]
        self.names.write_text("\n".join(["127.0.0.1 localhost", *addresses]) + "\n")
        self._switch = Host("switch", "", self)
        self.switch("ip", "link", "add", "bridge", "mtu", 9000, "type", "bridge")
        self.switch("ip", "link", "set", "bridge", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in [*self.hosts, self._switch]:
            host.lose()

    def switch(self, *words: object) -> str:
        """Runs a command where the switch is."""
        return _run("nsenter", "-t", self._switch.pid, "-n", *words)

    def add(self) -> Host:
        """Adds the next host: host0 is 10.77.0.1, and so on."""
        number = len(self.hosts)
        host = Host(f"host{number}", f"10.77.0.{number + 1}", self)
        self.hosts.append(host)
        port = f"to-{host.name}"
        ends = f"{port} mtu 9000 type veth peer name eth0 mtu 9000 netns {host.pid}"
        self.switch("ip", "link", "add", *ends.split())
        self.switch("ip", "link", "set", port, "master", "bridge", "up")
        for link in (("lo", "up"), ("eth0", "up")):
            host.run("ip", "link", "set", *link)
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        return host


def _hold(pipe: Connection, name: str, names: str, shared: str) -> None:
    """Makes a host's namespaces and keeps them until the pipe is closed; the host's first process is a fork."""
    try:
        _checked(_libc.unshare(_OF_A_HOST))
    except OSError as error:
        pipe.send(str(error))
        raise
    made, making = os.pipe()
    pid = os.fork()
    if pid:
        os.close(making)
        pipe.send(pid if os.read(made, 1) else "the host's folders cannot be mounted")
        with suppress(EOFError):
            pipe.recv()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os._exit(0)
    pipe.close()
    _die_with_parent()
    import socket

    socket.sethostname(name)
    for words in (
        ["--make-rprivate", "/"],
        ["-t", "proc", "proc", "/proc"],
        ["-t", "tmpfs", "tmpfs", "/dev/shm"],
        ["--bind", names, "/etc/hosts"],
        ["--bind", shared, str(SHARED)],
    ):
        subprocess.run(["mount", *words], check=True)
    os.write(making, b"1")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for orphans
    while True:
        signal.pause()


def _die_with_parent() -> None:
    set_parent_death_signal = 1
    _libc.prctl(set_parent_death_signal, int(signal.SIGKILL))


def _enter(host: int, words: list[str], environment: dict[str, str], output: str) -> None:
    """Runs a command on a host, passes SIGTERM on to it, and ends as it does."""
    _die_with_parent()
    _checked(_libc.setns(os.pidfd_open(host), _OF_A_HOST))
    pid = os.fork()  # which is in the host's process numbers; this process stays outside
    if pid == 0:
        _die_with_parent()
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        _become(words, environment, handle)
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(pid, number))
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _become(words: list[str], environment: dict[str, str], handle: int) -> None:
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    status: Any = 1
    try:
        status = _call(words)
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def _call(words: list[str]) -> Any:
    """Runs torchrun, or a module of ours, in this process."""
    import importlib

    if Path(words[0]).name == "torchrun":
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

        SubprocessHandler._popen = lambda _, args, env: _Fork(list(args), env)  # type: ignore[method-assign, assignment]
        return run.main(words[1:])
    assert words[:3] == [sys.executable, "-u", "-m"], words
    from megatron_samoe.start import die_with_torchrun

    die_with_torchrun()
    return importlib.import_module(words[3]).main(words[4:])


class _Fork:
    """A rank as torchrun starts it, with the methods of a Popen; a fork in place of a new interpreter."""

    def __init__(self, words: list[str], environment: dict[str, str]):
        sys.stdout.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.environ.clear()
            _become(words, environment, 1)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode
