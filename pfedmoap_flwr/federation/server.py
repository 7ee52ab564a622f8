"""The server's work: settings -> nodes -> strategy -> results."""

import logging
from collections.abc import Sequence
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.clip.load import load_clip
from pfedmoap_flwr.config import Settings
from pfedmoap_flwr.data.catalogue import BUNDLED
from pfedmoap_flwr.data.federated import federated
from pfedmoap_flwr.data.partition import manifest
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.federation.handshake import (
    Card,
    check_agreement,
    introduce,
    origins,
    say_data,
    wait_for_nodes,
)
from pfedmoap_flwr.federation.rules import replace_mean
from pfedmoap_flwr.federation.strategy import AllClientsFailed, PromptStrategy
from pfedmoap_flwr.methods.base import ServerState
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.runs.folder import RunFolder

logger = logging.getLogger("flwr.pfedmoap")


def serve(grid: Grid, context: Context) -> None:
    """Run a federation from its settings to its results, or from where an earlier run stopped."""
    settings = config.parse(context.run_config)
    if settings.resume:
        state: ServerState | None = checkpoint.load(Path(settings.resume))
        folder = RunFolder.reopen(settings, state.round)  # type: ignore[union-attr]
    else:
        state = None
        folder = RunFolder.create(settings)
    logger.info("results in %s", folder.path)
    try:
        _run(grid, settings, state, folder)
    except (UsageError, AllClientsFailed) as error:
        folder.fail(str(error))
        raise


def _run(grid: Grid, settings: Settings, state: ServerState | None, folder: RunFolder) -> None:
    clients = settings.data.num_clients
    wait_for_nodes(grid, min(settings.min_nodes, clients), clients, settings.node_timeout)
    cards = introduce(grid, sorted(grid.get_node_ids()), folder.run_id, settings.node_timeout)
    check_agreement({}, cards)
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
    method = methods.load(settings.method)(settings, settings.own, clip, cards[0].task)
    if settings.server.rule != "average":
        replace_mean(method, settings.server)
    strategy = PromptStrategy(settings, method, state or method.start(), cards, folder)
    strategy.start_all(grid)
    folder.finish(settings, [_row(card) for card in cards])


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
