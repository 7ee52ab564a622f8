"""The first rounds of a run with one client, on made-up images, without any message.

What a method cannot do with these settings shows here in seconds: before images are read and before
Flower starts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pfedmoap_flwr.methods.base import Head, Method, Phase, ServerState, Split, Upload, Work
from pfedmoap_flwr.randomness import torch_generator
from pfedmoap_flwr.training import local
from pfedmoap_flwr.training.exchange import check_tensors, make_work, personal_work

Images = Callable[[str], Split]


def rehearse(method: Method[Any, Any], client_ids: Sequence[int], images: Images) -> Work[Any]:
    """Measure, train one epoch, merge, and measure again, as the first client.

    Return its work in round 2, when every client has uploaded once.

    Raises whatever the method raises, and ValueError for logits or an upload of a wrong shape.
    """
    client_id = client_ids[0]
    state = method.start()
    _measure(method, state, client_ids, images, kept=None)

    sent = method.send(state, client_ids, train=True)
    work = make_work(method, client_id, 1, images, sent[client_id], sent[client_id])
    local.train(method, [work], one_epoch(method, work.head))
    # Tensors travel as NumPy's arrays, which bfloat16 cannot
    upload = {n: torch.tensor(t.detach().cpu().numpy()) for n, t in method.upload(work).items()}
    check_tensors(upload, method.expected(state, sent[client_id]))
    kept = work.head.state()

    expected = {i: method.expected(state, sent[i]) for i in client_ids}
    uploads = {i: {n: upload.get(n, like) for n, like in of.items()} for i, of in expected.items()}
    method.merge(state, {i: Upload(tensors, 1) for i, tensors in uploads.items()})
    state.round = 1
    _measure(method, state, client_ids, images, kept)

    received = method.send(state, client_ids, train=True)[client_id]
    return make_work(method, client_id, 2, images, received, kept, received)


def one_epoch(method: Method[Any, Any], head: Head) -> list[Phase]:
    """Return a method's phases with one epoch of each."""
    phases = method.schedule(head, method.settings.local_epochs)
    return [(min(1, epochs), names) for epochs, names in phases]


def made_up(method: Method[Any, Any], count: int, shape: Sequence[int]) -> Split:
    """Return noise in place of what is read of images, with the classes in turn as labels."""
    device, classes = method.clip.device, len(method.task.classnames)
    noise = torch.randn(count, *shape, generator=torch_generator(0, "made-up images"))
    return Split(noise.to(device), torch.arange(count, device=device) % classes)


def _measure(
    method: Method[Any, Any],
    state: ServerState,
    client_ids: Sequence[int],
    images: Images,
    kept: Mapping[str, Tensor] | None,
) -> None:
    """Predict as the evaluation does: with what was received, and with the client's own head."""
    client_id = client_ids[0]
    received = method.send(state, client_ids, train=False)[client_id]
    work = make_work(method, client_id, state.round, images, received, received)
    _predict(method, work.head, images("test"))
    own = personal_work(method, client_id, state.round, images, received, kept)
    _predict(method, own.head, images("test"))


def _predict(method: Method[Any, Any], head: Head, images: Split) -> None:
    logits = local.classifier(head)(images.features)
    expected = (len(images), len(method.task.classnames))
    if logits.shape != expected:
        raise ValueError(f"the head gives logits {tuple(logits.shape)}, not (B, C) = {expected}")
