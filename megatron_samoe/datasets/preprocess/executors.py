"""Where workers run: in this process, in processes of this machine, or as actors of a Ray cluster."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import deque
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from megatron_samoe import children
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.datasets.preprocess.worker import TokenizerFacts, Worker
from megatron_samoe.errors import DataError, optional_import

Answer = tuple[Any, ...]


class Executor(Protocol):
    """Workers numbered from 0. Every message sent to one is answered once, unless it dies."""

    num_workers: int

    def start(self) -> TokenizerFacts:
        """Starts the workers and returns what they say of the tokenizer."""
        ...

    def send(self, worker: int, message: Answer) -> None:
        """Hands a message to a worker."""
        ...

    def receive(self, timeout_s: float) -> list[tuple[int, Answer]]:
        """Returns the answers that are there, waiting for one at most `timeout_s`; ("died", why) if a worker died."""
        ...

    def restart(self, worker: int) -> None:
        """Replaces a dead worker by a new one."""
        ...

    def close(self) -> None:
        """Ends the workers."""
        ...


class InlineExecutor:
    """One worker inside this process: for tests, debugging, and small inputs."""

    num_workers = 1

    def __init__(self, options: PreprocessOptions):
        self._options = options
        self._answers: deque[tuple[int, Answer]] = deque()

    def start(self) -> TokenizerFacts:
        self._worker = Worker(self._options)
        return self._worker.facts()

    def send(self, worker: int, message: Answer) -> None:
        self._answers.append((0, self._worker.handle(message)))

    def receive(self, timeout_s: float) -> list[tuple[int, Answer]]:
        answers = list(self._answers)
        self._answers.clear()
        return answers

    def restart(self, worker: int) -> None:
        raise AssertionError("an inline worker cannot die alone")

    def close(self) -> None:
        if hasattr(self, "_worker"):
            self._worker.close()


class ProcessExecutor:
    """Worker processes joined by socket pairs. A death shows as a closed connection at once; nothing hangs."""

    def __init__(self, options: PreprocessOptions, num_workers: int):
        self._options, self.num_workers = options, num_workers
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []

    def _launch(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = socket.socketpair()
        # It finds packages where this process does.
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if isinstance(path, str)),
        }
        program = "import sys; from megatron_samoe.datasets.preprocess.worker import main; main(int(sys.argv[1]))"
        command = [sys.executable, "-c", program, str(theirs.fileno())]
        process = children.start(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        connection = Connection(ours.detach())
        connection.send(self._options)
        return process, connection

    def _greet(self, worker: int) -> TokenizerFacts:
        try:
            answer = self._connections[worker].recv()
        except (EOFError, OSError):
            raise DataError(f"A worker could not start: {self._how_it_died(worker)}.") from None
        if answer[0] != "ready":
            raise DataError(answer[1])
        return answer[1]

    def start(self) -> TokenizerFacts:
        for _ in range(self.num_workers):
            process, connection = self._launch()
            self._processes.append(process)
            self._connections.append(connection)
        facts = [self._greet(worker) for worker in range(self.num_workers)]
        return facts[0]

    def send(self, worker: int, message: Answer) -> None:
        try:
            self._connections[worker].send(message)
        except (BrokenPipeError, ConnectionResetError):
            pass  # its death is reported by receive

    def receive(self, timeout_s: float) -> list[tuple[int, Answer]]:
        answers: list[tuple[int, Answer]] = []
        for ready in wait(self._connections, timeout_s):
            worker = self._connections.index(ready)  # type: ignore[arg-type]
            try:
                answers.append((worker, ready.recv()))  # type: ignore[union-attr,call-arg,arg-type]
            except (EOFError, OSError):
                answers.append((worker, ("died", self._how_it_died(worker))))
        return answers

    def _how_it_died(self, worker: int) -> str:
        code = self._processes[worker].wait()
        if code >= 0:
            return f"it exited with status {code}"
        name = signal.Signals(-code).name
        return f"it was ended by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")

    def restart(self, worker: int) -> None:
        self._connections[worker].close()
        self._processes[worker], self._connections[worker] = self._launch()
        self._greet(worker)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class RayExecutor:
    """Actors on a Ray cluster: the one of RAY_ADDRESS, or one started on this machine.

    Inputs and outputs must lie on a file system that all nodes share.
    """

    def __init__(self, options: PreprocessOptions, num_workers: int):
        ray = optional_import("ray", "ray", "--executor ray")
        self._ray, self._options, self.num_workers = ray, options, num_workers
        self._actors: list[Any] = []
        self._pending: dict[Any, int] = {}
        self._started_ray = False

    def _actor(self) -> Any:
        return self._ray.remote(num_cpus=1)(Worker).remote(self._options)

    def start(self) -> TokenizerFacts:
        if not self._ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS")
            local: dict[str, Any] = {} if address else {"num_cpus": self.num_workers, "include_dashboard": False}
            self._ray.init(address=address, log_to_driver=False, configure_logging=False, **local)
            self._started_ray = True
        self._actors = [self._actor() for _ in range(self.num_workers)]
        try:
            return self._ray.get([actor.facts.remote() for actor in self._actors])[0]
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            raise DataError(str(cause if isinstance(cause, DataError) else error)) from error

    def send(self, worker: int, message: Answer) -> None:
        self._pending[self._actors[worker].handle.remote(message)] = worker

    def receive(self, timeout_s: float) -> list[tuple[int, Answer]]:
        if not self._pending:
            return []
        ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=timeout_s)
        answers: list[tuple[int, Answer]] = []
        for reference in ready:
            worker = self._pending.pop(reference)
            try:
                answers.append((worker, self._ray.get(reference)))
            except self._ray.exceptions.RayError as error:
                self._pending = {ref: other for ref, other in self._pending.items() if other != worker}
                answers.append((worker, ("died", f"Ray reports {type(error).__name__}")))
        return answers

    def restart(self, worker: int) -> None:
        self._actors[worker] = self._actor()

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started_ray:
            self._ray.shutdown()


def make_executor(options: PreprocessOptions) -> Executor:
    """Returns the executor that the options name, not started."""
    if options.executor == "inline":
        return InlineExecutor(options)
    if options.executor == "ray":
        return RayExecutor(options, options.workers)
    return ProcessExecutor(options, options.workers)
