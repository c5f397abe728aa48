"""Which failures end a run, and how they are told: one error with its cause, not a wall of tracebacks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train import ControllerError, UserCallback, WorkerGroupError

from raycomp.errors import ClusterError, RaycompError, StorageError
from raycomp.pipeline.user_code import is_of_communication
from raycomp.storage.explain import explain

# Deep in what Ray tells of a lost actor.
_DEATH = re.compile(r"The actor (?:is dead|died) because (its [^.]*)\.")
# Where a file that Ray has put into the storage is no longer there.
_AWAY = re.compile(r"Unable to set up cluster storage .*storage_fs_path='([^']*)'", re.DOTALL)


class StopOnOurErrors(UserCallback):
    """Ends a run at once where a worker raised an error of raycomp's: what is wrong there would be wrong again.

    Everything else (a killed worker, a lost node, a broken connection, storage that is away) is left to Ray's failure
    policy, which retries, and is told.

    Args:
        sink: the actor that hears of progress.
    """

    def __init__(self, sink: ActorHandle) -> None:
        self._sink = sink

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises the first of raycomp's errors in the controller, which Ray doesn't retry."""
        error = first_of_ours(worker_exceptions)
        if error is not None and not (isinstance(error, StorageError) and error.passing):
            raise error
        self._sink.push.remote(replacement(worker_exceptions))


def replacement(failures: Mapping[int, Exception]) -> str:
    """What to tell of workers that failed and are replaced."""
    return f"{_who_and_why(failures)}: new workers go on from the last checkpoint"


def _who_and_why(failures: Mapping[int, Exception]) -> str:
    """The death of a worker, or another's error, is the cause of the broken connections that its neighbours tell."""
    rank, failure = min(failures.items(), key=lambda item: (is_of_communication(item[1]), item[0]))
    return f"worker {rank} failed: {_first_line(failure)}"


def first_of_ours(failures: dict[int, Exception]) -> RaycompError | None:
    """The error of raycomp's with the lowest rank, looking through the causes of each."""
    for _, failure in sorted(failures.items()):
        found = _ours(failure)
        if found is not None:
            return found
    return None


def _ours(error: BaseException | None) -> RaycompError | None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, RaycompError):
            return error
        nested = getattr(error, "controller_failure", None) or getattr(error, "_base_exc", None)
        error = nested or error.__cause__ or error.__context__
    return None


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turns what a fit raises into one error of raycomp's.

    Raises:
        RaycompError: what a worker raised, or a ClusterError for lost workers.
    """
    try:
        yield
    except WorkerGroupError as error:
        raise first_of_ours(error.worker_failures) or _lost(error, where) from None
    except ControllerError as error:
        raise _ours(error) or _of_ray(error.controller_failure, where) from None
    except ray.exceptions.RayError as error:
        raise _ours(error) or _of_ray(error, where) from None


def _of_ray(error: BaseException, where: str) -> RaycompError:
    """Ray's controller keeps the list of checkpoints in storage itself."""
    if isinstance(error, OSError):
        return explain(error, where)
    remedy = "run again with --resume to go on from the last checkpoint"
    return ClusterError(_first_line(error), where=where, remedy=remedy)


def _lost(error: WorkerGroupError, where: str) -> RaycompError:
    return ClusterError(
        _who_and_why(error.worker_failures),
        where=where,
        remedy="raise scaling.max_failures, or run again with --resume to go on from the last checkpoint",
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    if found := _DEATH.search(text):
        return f"{found[1]} (killed, out of memory, or crashed)" if "process" in found[1] else found[1]
    if found := _AWAY.search(text):
        return f"the storage at {found[1]} is away from its node, or is not the one that the run began with"
    lines = text.splitlines()
    if isinstance(error, ray.exceptions.RayActorError) and "creation task" in lines[0]:
        return f"a process of Ray's could not start: {lines[-1].strip()}"
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
