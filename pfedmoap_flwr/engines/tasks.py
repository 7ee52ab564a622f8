"""Functions that run side by side in processes of Ray's, which Flower brings."""

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from pfedmoap_flwr.errors import UsageError, last_line, reason_of

K = TypeVar("K")
T = TypeVar("T")


def ray_environment() -> dict[str, str]:
    """Return the variables with which Ray neither calls home nor works for whoever asks it.

    It listens on all interfaces: without its token anybody who reaches them could give it work.
    """
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Otherwise Ray warns of what it will do one day where a task has no GPU
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def side_by_side(
    work: Callable[[T], str], arguments: Mapping[K, T], jobs: int, address: str
) -> Iterator[tuple[K, str]]:
    """Yield each key with what `work` returned for its argument, as they end.

    Each has one core, and one GPU if there are any. Where its process died, the reason is yielded.

    address: of a cluster that is up ("auto": the one of this machine); "": Ray is started here for
    `jobs` at once, and ended. Raises UsageError where Ray cannot be reached.
    """
    # Before Ray is imported, which reads them then
    os.environ |= {**ray_environment(), **os.environ}
    import ray

    gpus = 1 if torch.cuda.is_available() else 0
    with _ray(jobs, address):
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(work)
        waiting = {task.remote(argument): key for key, argument in arguments.items()}
        while waiting:
            (ended,), _ = ray.wait(list(waiting), num_returns=1)
            key = waiting.pop(ended)
            try:
                yield key, ray.get(ended)
            except ray.exceptions.RayError as error:
                yield key, reason_of(error)


@contextmanager
def _ray(jobs: int, address: str) -> Iterator[None]:
    import ray

    where: dict[str, Any] = {"address": address} if address else {"num_cpus": jobs}
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **where)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"--ray-address {address}: {last_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()
