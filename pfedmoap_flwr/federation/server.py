"""The server's work: settings -> nodes -> strategy -> results."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid

from pfedmoap_flwr import config, logs, methods
from pfedmoap_flwr.clip.load import load_clip
from pfedmoap_flwr.clip.weights import get_weights
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.data.catalogue import BUNDLED
from pfedmoap_flwr.data.federated import federated
from pfedmoap_flwr.data.partition import manifest
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation.exporter import exporter
from pfedmoap_flwr.federation.handshake import (
    Card,
    first_cards,
    introduce,
    origins,
    say_data,
    say_left_out,
    wait_for_nodes,
)
from pfedmoap_flwr.federation.privacy import check_privacy
from pfedmoap_flwr.federation.rules import replace_mean
from pfedmoap_flwr.federation.strategy import PromptStrategy
from pfedmoap_flwr.methods.base import Method, ServerState
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import RunFolder
from pfedmoap_flwr.runs.place import held
from pfedmoap_flwr.tracking import Tracked, Tracker
from pfedmoap_flwr.training.elsewhere import OtherSet
from pfedmoap_flwr.training.whole_prompt import check_whole_prompt

logger = logging.getLogger("flwr.pfedmoap")


def serve(grid: Grid, context: Context) -> None:
    """Run a federation from its settings to its results, or from where an earlier run stopped."""
    settings = config.parse(context.run_config)
    logs.set_up(settings.log_format)
    get_weights(settings.clip.model, settings.clip.pretrained)
    folder = RunFolder.find(settings)
    with held(folder.path):
        logger.info("results in %s", folder.path)
        try:
            state = None
            if settings.resume:
                state = folder.reopen(settings)
            else:
                folder.start(settings)
            _run(grid, settings, state, folder)
        except Exception as error:
            folder.fail(error)
            raise


def _run(grid: Grid, settings: Settings, state: ServerState | None, folder: RunFolder) -> None:
    clients = settings.data.num_clients
    wait_for_nodes(grid, min(settings.min_nodes, clients), clients, settings.node_timeout)
    node_ids = sorted(grid.get_node_ids())
    introduced, left_out = introduce(grid, node_ids, folder.run_id, clients, settings.node_timeout)
    clients_by_id, others = first_cards(introduced)
    left_out |= others
    cards = list(clients_by_id.values())
    _check_enough(cards, left_out, min(settings.min_nodes, clients))
    _check_measured(settings, cards)
    _save_partition(settings, cards, folder)
    say_data(cards)
    folder.save_data([{"clients": clients, **said} for clients, said in origins(cards)])
    if len(cards) < clients:
        logger.warning(
            "%d of %d clients are connected; a simulation of all is started with "
            '--federation-config "num-supernodes=%d"',
            len(cards),
            clients,
            clients,
        )
    # In one process the same object as the clients'. "auto" where they want CUDA: a server without
    # a GPU can serve clients that have one.
    clip = load_clip(settings.clip, "cpu" if settings.device == "cpu" else "auto")
    method = methods.make(settings.method, settings, settings.own, clip, cards[0].task)
    check_whole_prompt(method)
    check_privacy(method, settings.server.rule)
    if settings.server.rule != "average":
        replace_mean(method, settings.server)
    elsewhere = _others(settings, method)
    if state:
        checkpoint.check_like(state, method.start(), clients)
    tracked = Tracked.of(folder, settings, first=state.round + 1 if state else 0)
    begun = state or method.start()
    metrics = exporter(settings.server.metrics_port, settings.num_server_rounds)
    with closing(metrics), closing(Tracker(settings.tracker, tracked)) as tracker:
        told = (metrics, tracker)
        strategy = PromptStrategy(
            settings, method, begun, clients_by_id, left_out, folder, told, elsewhere
        )
        strategy.check_budget()
        if state:
            # All that a resumed run needs is there: now the ending of before can go
            folder.go_on(state.round)
        strategy.start_all(grid)
    folder.save_scores(cards[0].task.classnames, settings.eval.min_count)
    folder.finish(settings, [_row(strategy.cards[i]) for i in sorted(strategy.cards)])


def _others(settings: Settings, method: Method[Any, Any]) -> list[OtherSet]:
    """Return the data sets of eval.on. Raises UsageError for one that is not to be had."""
    reading, dtype = type(method).reads(settings.own), settings.clip.features_dtype
    split = settings.eval.split
    return [
        OtherSet(method, name, path, reading, dtype, split)
        for name, path in settings.eval.others().items()
    ]


def _check_enough(cards: Sequence[Card], left_out: Mapping[int, str], at_least: int) -> None:
    """Name the nodes that take no part. Raises UsageError where too few are left."""
    for node_id, reason in left_out.items():
        say_left_out(node_id, reason)
    if len(cards) < at_least:
        first = next(iter(left_out.values()), "no more are connected")
        raise UsageError(
            f"{len(cards)} of {len(cards) + len(left_out)} nodes can take part, "
            f"min-nodes={at_least}: {first}"
        )


def _check_measured(settings: Settings, cards: Sequence[Card]) -> None:
    """Raise UsageError where validation images are to be measured and nobody has any."""
    if settings.eval.split == "validation" and not any(c.sizes["validation"] for c in cards):
        raise UsageError(
            "setting eval.split='validation': nobody has validation images; "
            f"data.validation={settings.data.validation:g} is the share of train held out for it"
        )


def _save_partition(settings: Settings, cards: Sequence[Card], folder: RunFolder) -> None:
    """Write down who holds what, if this machine can tell: nodes may have images of their own.

    The server of a deployment (no run-dir is set) downloads no data set for it.
    """
    data = settings.data
    if not (data.name == BUNDLED or data.path or settings.run_dir):
        return
    try:
        held = federated(data, settings.seed)
    except UsageError as error:
        logger.info("no partition.json: %s", error)
        return
    rows = {i: (c.domain, {s: len(r) for s, r in c.rows.items()}) for i, c in held.clients.items()}
    if all(rows.get(card.client_id) == (card.domain, card.sizes) for card in cards):
        folder.save_partition(manifest(held.images, data, settings.seed, [*held.clients.values()]))


def _row(card: Card) -> dict[str, int | str]:
    return {"client": card.client_id, "domain": card.domain, **card.sizes}
