"""Many messages answered at once in one process: how the in-process engine uses its machine.

On the CPU clients run side by side in threads, each on one core: exactly what they compute one by
one. On CUDA the heads of many clients are stacked and move in the same steps (`together`).
"""

import logging
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch
from flwr.app import Context, Message, MessageType

from pfedmoap_flwr import config
from pfedmoap_flwr.clip.load import FrozenClip, resolve_device
from pfedmoap_flwr.federation import client
from pfedmoap_flwr.federation.client import Client
from pfedmoap_flwr.methods.base import Method
from pfedmoap_flwr.training import local, stacked
from pfedmoap_flwr.training.local import Training

Answer = Callable[[Message, Context], Message]
Request = tuple[Message, Context]

MOST_STACKED = 64  # a GPU is busy by then
MEMORY_SHARE = 0.5  # of the device's, for what steps keep for their backward pass

logger = logging.getLogger("flwr.pfedmoap")


def answer_all(answer: Answer, requests: Sequence[Request]) -> list[Message]:
    """Return the answers to messages of one type, in their order."""
    asked = requests[0][0].metadata.message_type if len(requests) > 1 else ""
    settings = config.parse(requests[0][1].run_config) if requests else config.Settings()
    on_cpu = resolve_device(settings.device).type == "cpu"
    if asked == MessageType.TRAIN:
        at_once = settings.clients_at_once or _fitting(requests[0])
        if on_cpu:
            return _side_by_side(answer, requests, at_once)
        slices = [requests[i : i + at_once] for i in range(0, len(requests), at_once)]
        return [reply for part in slices for reply in train_stacked(answer, part)]
    if asked == MessageType.EVALUATE and on_cpu:
        return _side_by_side(answer, requests, settings.clients_at_once or cores())
    return [answer(*request) for request in requests]


def train_stacked(answer: Answer, requests: Sequence[Request]) -> list[Message]:
    """Return the answers to train messages of one round, clients of one kind stacked.

    Where clients cannot be stacked, or one of them fails, they answer one by one.
    """
    replies: dict[int, Message] = {}
    groups: dict[Hashable, dict[int, tuple[Client, Training]]] = {}
    for i, (message, context) in enumerate(requests):
        try:
            awake = client.awake(message, context)
            training = awake.training(message)
        except Exception:
            replies[i] = answer(message, context)
            continue
        kind = stacked.kind(training.head, training.received)
        groups.setdefault(kind, {})[i] = awake, training
    for group in groups.values():
        try:
            replies |= _train_group(group, requests)
        except Exception as error:
            logger.info("%d clients train one by one: %s", len(group), error or repr(error))
            replies |= {i: answer(*requests[i]) for i in group}
    return [replies[i] for i in range(len(requests))]


def _train_group(
    group: dict[int, tuple[Client, Training]], requests: Sequence[Request]
) -> dict[int, Message]:
    clients, trainings = zip(*group.values(), strict=True)
    method, server_round = clients[0].method, client.round_of(requests[0][0])
    if len(group) > 1:
        pair = trainings[:2]
        stacked.check_stackable(local.stacked(method, pair), *local.first_images(pair, 2))
    losses = local.train(method, trainings, server_round)
    replies = {}
    for i, (one, training) in group.items():
        content = one.trained(training, losses[one.id], server_round)
        replies[i] = Message(content, reply_to=requests[i][0])
    return replies


def _side_by_side(answer: Answer, requests: Sequence[Request], at_once: int) -> list[Message]:
    if at_once == 1:
        return [answer(*request) for request in requests]
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,))
    try:
        return list(pool.map(answer, *zip(*requests, strict=True)))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _fitting(request: Request) -> int:
    try:
        awake = client.awake(*request)
        training = awake.training(request[0])
    except Exception:
        return 1  # the client will say what is wrong when it is asked
    return fitting(awake.method, awake.clip, training)


def fitting(method: Method, clip: FrozenClip, training: Training) -> int:
    """Return how many clients like this one train at once: what memory and cores allow.

    From the device's whole memory, not from what is free, so that a repeat chooses the same.
    """
    frozen = {p.untyped_storage().data_ptr() for p in clip.model.parameters()}
    stack = local.stacked(method, [training])
    batch = local.first_images([training], method.settings.batch_size)
    needed = stacked.saved_bytes(stack, *batch, without=frozen)
    fits = int(MEMORY_SHARE * memory(clip.device)) // max(1, needed)
    return max(1, min(fits, cores() if clip.device.type == "cpu" else MOST_STACKED))


def memory(device: torch.device) -> int:
    """Return the bytes of memory that a device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
