"""Which failures end a run, and how they are told: one error with its cause, not a wall of tracebacks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train import ControllerError, UserCallback, WorkerGroupError

from raycomp.errors import ClusterError, RaycompError, StorageError
from raycomp.storage.explain import explain


class StopOnOurErrors(UserCallback):
    """Ends a run at once where a worker raised an error of raycomp's: what is wrong there would be wrong again.

    Everything else (a killed worker, a lost node, a broken connection, storage that is away) is left to Ray's failure
    policy, which retries.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises the first of raycomp's errors in the controller, which Ray doesn't retry."""
        error = first_of_ours(worker_exceptions)
        if error is not None and not (isinstance(error, StorageError) and error.passing):
            raise error


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
    quiet = [logging.getLogger(name) for name in ("ray.train", "ray.data", "ray")]
    levels = [logger.level for logger in quiet]
    for logger in quiet:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except WorkerGroupError as error:
        raise first_of_ours(error.worker_failures) or _lost(error, where) from None
    except ControllerError as error:
        raise _ours(error) or _of_ray(error.controller_failure, where) from None
    except ray.exceptions.RayError as error:
        raise _ours(error) or _of_ray(error, where) from None
    finally:
        for logger, level in zip(quiet, levels, strict=True):
            logger.setLevel(level)


def _of_ray(error: BaseException, where: str) -> RaycompError:
    """Ray's controller keeps the list of checkpoints in storage itself."""
    return explain(error, where) if isinstance(error, OSError) else ClusterError(_first_line(error), where=where)


def _lost(error: WorkerGroupError, where: str) -> RaycompError:
    rank, failure = sorted(error.worker_failures.items())[0]
    return ClusterError(
        f"worker {rank} failed: {_first_line(failure)}",
        where=where,
        remedy="raise scaling.max_failures, or run again with --resume to go on from the last checkpoint",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, ray.exceptions.RayActorError) and "creation task" in lines[0]:
        return f"a process of Ray's could not start: {lines[-1].strip()}"
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
