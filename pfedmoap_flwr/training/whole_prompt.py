"""A check before a run: does a method learn and send all that makes a prompt, not `ctx` alone?

With some settings a prompt has more parameters than `ctx` (`PromptHead.prompt`). A method that
names `ctx` in its phases, at the server or in a message would leave the others as they start, or
behind. Two clients' first round on made-up images shows it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pfedmoap_flwr.clip.features import read_shape
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Method, PromptHead, Split, Tensors, Upload
from pfedmoap_flwr.training import local
from pfedmoap_flwr.training.exchange import check_tensors, make_work
from pfedmoap_flwr.training.rehearsal import made_up, one_epoch

CLIENTS = (0, 1)


def check_whole_prompt(method: Method[Any, Any]) -> None:
    """Raise UsageError where some of a prompt is not trained, or not sent, averaged and received.

    Where settings leave a prompt `ctx` alone, or the method has none, there is nothing to check.
    """
    setting = method.settings.prompt.beyond_ctx
    if not setting or not issubclass(type(method).head, PromptHead):
        return
    try:
        said = _what_is_left(method)
    except UsageError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if said:
        name = type(method).__name__
        raise UsageError(f"setting {setting}: {name} works with ctx alone ({said})")


def _what_is_left(method: Method[Any, Any]) -> str:
    """Return in a few words what happens to a part of the prompt that must not; "" if nothing."""
    state = method.start()
    before = dict(state.shared)
    sent = method.send(state, CLIENTS, train=True)
    uploads = {i: _trained(method, i, sent[i]) for i in CLIENTS}
    names = method.build().prompt
    shared = [name for name in names if not method.is_personal(name)]
    for started, tensors, after in uploads.values():
        for name in names:
            if name not in after:
                return f"its head has no {name}"
            if torch.equal(started[name], after[name]) and started[name].numel():
                return f"it does not train {name}"
        if missing := [name for name in shared if name not in tensors]:
            return f"it does not upload {missing[0]}"
    method.merge(state, {i: Upload(tensors, 1) for i, (_, tensors, _) in uploads.items()})
    state.round = 1
    for train in (True, False):
        later = method.send(state, CLIENTS, train=train)
        for name in shared:
            if any(name not in later[i] for i in CLIENTS):
                return f"it does not send {name} again"
            if any(torch.equal(later[i][name].cpu(), before[name]) for i in CLIENTS):
                return f"the server leaves {name} as it was"
    return ""


def _trained(
    method: Method[Any, Any], client_id: int, sent: Mapping[str, Tensor]
) -> tuple[Tensors, dict[str, Tensor], Tensors]:
    """Return a client's head before it trained an epoch, what it uploads, and its head after."""
    reading = type(method).reads(method.own)

    def images(split: str) -> Split:
        shape = read_shape(method.clip, reading.of(split))
        return made_up(method, method.settings.batch_size, shape)

    work = make_work(method, client_id, 1, images, sent, sent)
    started = work.head.state()
    local.train(method, [work], one_epoch(method, work.head))
    tensors = {name: tensor.detach().cpu() for name, tensor in method.upload(work).items()}
    check_tensors(tensors, method.expected(method.start(), sent))
    return started, tensors, work.head.state()
