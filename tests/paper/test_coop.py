"""CoOp, local: nothing travels, and every client goes on from its own prompt."""

import torch
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Split
from pfedmoap_flwr.runs import checkpoint
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, kept_head, make_method, make_work
from support.tiny import NUM_CLIENTS


def test_16_nothing_travels(federate: Federate, wire: list[Exchange]) -> None:
    run = federate(method="coop")
    assert len(wire) == 5 * NUM_CLIENTS
    assert all(exchange.down == exchange.up == {} for exchange in wire)
    assert checkpoint.load(run.path).shared == {}
    records = run.rounds()
    assert all(set(record.bytes_up.values()) == {0} for record in records[1:])
    # The global model is what nobody trained
    for record in records:
        for client_id, measured in record.clients.items():
            start = records[0].clients[client_id]["global-accuracy"]
            assert measured["global-accuracy"] == start


def test_16_two_rounds_of_one_epoch_are_two_epochs(federate: Federate) -> None:
    options = {"method": "coop", "batch_size": 96}  # one batch, whose order does not matter
    twice = federate("twice", num_server_rounds=2, local_epochs=1, **options)
    once = federate("once", num_server_rounds=1, local_epochs=2, **options)
    fresh = make_method("coop").build().ctx.detach()
    prompts = []
    for client_id in range(NUM_CLIENTS):
        after = kept_head(twice, client_id)["ctx"]
        torch.testing.assert_close(after, kept_head(once, client_id)["ctx"], rtol=0, atol=1e-5)
        # A second round that began anew would end where the first one did
        assert (after - kept_head(twice, client_id, after=1)["ctx"]).abs().max() > 1e-3
        assert (after - fresh).abs().max() > 1e-3
        prompts.append(after)
    for i in range(NUM_CLIENTS):
        assert all((prompts[i] - prompts[j]).abs().max() > 1e-3 for j in range(i))


def test_16_the_loss_is_the_cross_entropy_of_cosines_over_tau() -> None:
    method = make_method("coop", local_epochs=1, batch_size=8)
    generator = torch.Generator().manual_seed(0)
    data = Split(torch.randn(8, 64, generator=generator), torch.arange(8) % 4)
    head = method.build()
    cosines = F.normalize(data.features.double(), dim=-1) @ head.encode().double().t()
    logits = head.logit_scale * cosines
    right = logits[torch.arange(8), data.labels] - logits.logsumexp(-1)
    losses = local.train(method, [make_work(method, head, data)])
    torch.testing.assert_close(losses[0], -right.mean().item(), rtol=1e-4, atol=1e-5)
