"""Pretrain a GPT: `torchrun --nproc-per-node N -m megatron_samoe.cli.pretrain --config FILE.yaml [flags]`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence

import torch.distributed as dist

from megatron_samoe.config.cli import Asked, parse
from megatron_samoe.dist_checkpointing.store import newest_in_words
from megatron_samoe.errors import HostRefusedError, JobEndedError, MegatronSamoeError, ToldToLeaveError
from megatron_samoe.log import configure_logging
from megatron_samoe.parallel_state import backend, launcher
from megatron_samoe.training.hook import Hook
from megatron_samoe.training.run import resolve, train
from megatron_samoe.training.setup import Extensions

#: How long ranks with the same fault leave each other to say so.
SPEAKING_S = 2.0


def main(argv: Sequence[str] | None = None, extensions: Extensions | None = None, hooks: Sequence[Hook] = ()) -> int:
    """Runs the program and returns its exit status.

    Args:
        extensions: parts of the model and rules of the optimizer that come from outside the package.
        hooks: to be called after the configuration's own.
    """
    rank = launcher.rank()
    configure_logging(rank)
    asked: Asked | None = None
    try:
        with backend.telling_other_hosts():
            asked = parse(sys.argv[1:] if argv is None else argv, quiet=launcher.local_rank() > 0)
        run = resolve(asked, extensions)
        if run is not None:
            train(run, hooks)
    except ToldToLeaveError as error:
        _tell_launcher(str(error))
        return error.exit_status
    except MegatronSamoeError as error:
        return _report(error, rank)
    except SystemExit as error:
        _let_first_speak(error)
        if error.code and not dist.is_initialized():  # the parser's, which has said why
            launcher.stop_torchrun_restarts()
        return int(error.code or 0)
    except KeyboardInterrupt:
        if launcher.local_rank() == 0:
            left = "" if asked is None else f": {newest_in_words(asked.config.with_run_dir().checkpoint.save)}"
            print(f"interrupted before the step was done{left}", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            backend.leave_distributed()
    return 0


def _report(error: MegatronSamoeError, rank: int) -> int:
    """Says what went wrong, on the first rank of every host at least: each host has a log of its own."""
    _let_first_speak(error)
    is_first = launcher.local_rank() == 0
    if is_first or not error.collective:
        message = f"error{f' (rank {rank})' if rank else ''}: {error}"
        print(message, file=sys.stderr, flush=True)
        _tell_launcher(message)
    _let_other_hosts_speak(error)
    if error.permanent and (is_first or not error.collective):
        launcher.stop_torchrun_restarts()
    return error.exit_status


def _tell_launcher(message: str) -> None:
    """Leaves the message where torchrun looks for it, so that its own report shows it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError), open(path, "w") as file:
            details = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
            json.dump({"message": details}, file)


def _let_first_speak(error: BaseException) -> None:
    """Waits a little on other ranks of a host: a launcher stops them all when the first leaves, so one of many equal messages is
    shown. A host that the job continues without leaves first, or the job would begin anew with it.
    """
    if launcher.local_rank() > 0 or isinstance(error, HostRefusedError):
        time.sleep(SPEAKING_S)


def _let_other_hosts_speak(error: MegatronSamoeError) -> None:
    """Waits a little where other hosts have the same fault: this one's launcher may hold the store without which theirs end."""
    is_theirs = error.ends_job and (error.collective or isinstance(error, JobEndedError))
    if is_theirs and launcher.has_other_hosts():
        time.sleep(SPEAKING_S)


if __name__ == "__main__":
    sys.exit(main())
