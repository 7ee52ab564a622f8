"""FedSPA: prototypes at the clients, text features trained at the server, the round that pools."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pfedmoap_flwr.methods.base import Split, Upload
from pfedmoap_flwr.methods.parts.alignment import align, info_nce
from pfedmoap_flwr.methods.parts.moments import class_means, class_sums, pooled_means
from pfedmoap_flwr.training import local
from support.federation import Exchange, Federate, make_method, make_work
from support.oracle import numbers, oracle
from support.tiny import CLASSNAMES, NUM_CLIENTS

OVERFITTING = {"fedspa.lr": 0.05}
VECTOR = oracle("fedspa_prototypes")
SETTINGS = VECTOR["settings"]
IMAGES = [numbers(images) for images in VECTOR["inputs"]["few_shot"]]
LABELS = [torch.tensor(labels) for labels in VECTOR["inputs"]["few_shot_labels"]]
TEXT = numbers(VECTOR["inputs"]["text"])
CLOSE: Any = {"rtol": 1e-6, "atol": 1e-6}


def oracle_method() -> Any:
    own = {"alpha": SETTINGS["alpha"], "beta": SETTINGS["beta"], "lr": SETTINGS["local_lr"]}
    return make_method("fedspa", local_epochs=1, **{f"fedspa.{k}": v for k, v in own.items()})


def oracle_head(method: Any) -> Any:
    head = method.build().double()
    head.logit_scale = 100.0
    head.prototypes = nn.Parameter(numbers(VECTOR["initial_prototypes"]))
    head.text_features = TEXT.clone()
    return head


def test_16_the_start_is_the_pooled_class_means_whichever_client_has_what() -> None:
    counts, means = [], []
    for images, labels in zip(IMAGES, LABELS, strict=True):
        images = images[: len(labels)]
        n, sums = class_sums(images, labels, 3)
        counts.append(n)
        means.append(class_means(n, sums))
    sent = zip(counts, means, strict=True)
    pooled = pooled_means([{"counts": n, "prototypes": mean} for n, mean in sent])
    torch.testing.assert_close(pooled, numbers(VECTOR["initial_prototypes"]), **CLOSE)


def test_16_logits_loss_and_one_epoch_of_a_client() -> None:
    method = oracle_method()
    head, expected = oracle_head(method), VECTOR["client0"]
    logits = head(IMAGES[0])
    torch.testing.assert_close(logits, numbers(expected["logits_before"]), rtol=1e-4, atol=1e-3)
    loss = F.cross_entropy(logits, LABELS[0])
    torch.testing.assert_close(loss, numbers(expected["loss_before"]), rtol=1e-3, atol=1e-5)
    for number, key in ((0, "client0"), (1, "client1_from_clean_copy")):
        head = oracle_head(method)
        images = Split(IMAGES[number][: len(LABELS[number])], LABELS[number])
        local.train(method, [make_work(method, head, images)])
        after = VECTOR[key] if number else expected["prototypes_after_one_full_batch_epoch"]
        torch.testing.assert_close(head.prototypes.detach(), numbers(after), rtol=0, atol=1e-4)


def test_16_one_epoch_of_the_server() -> None:
    prototypes = [
        numbers(VECTOR["client0"]["prototypes_after_one_full_batch_epoch"]),
        numbers(VECTOR["client1_from_clean_copy"]),
    ]
    expected = VECTOR["server"]
    rows = torch.cat(prototypes)
    loss = info_nce(rows, TEXT.repeat(2, 1))
    torch.testing.assert_close(loss, numbers(expected["infonce"]), rtol=1e-5, atol=1e-6)
    draws = [torch.Generator().manual_seed(i) for i in range(2)]
    lr, pull = SETTINGS["global_lr"], SETTINGS["lam_reg"]
    text = align(TEXT, TEXT, prototypes, draws, 1, lr, pull)
    after = numbers(expected["semantic_after_one_epoch"])
    torch.testing.assert_close(text, after, rtol=1e-4, atol=1e-4)


def test_the_alignment_is_a_loop_over_shuffled_batches_of_eight() -> None:
    generator = torch.Generator().manual_seed(0)
    text, anchors = (F.normalize(torch.randn(4, 6, generator=generator), dim=-1) for _ in "ta")
    prototypes = [torch.randn(4, 6, generator=generator) for _ in range(3)]
    draws = [torch.Generator().manual_seed(i) for i in range(3)]
    found = align(text, anchors, prototypes, draws, 2, 0.05, 0.3)
    trained = text.clone().requires_grad_()
    optimizer = torch.optim.AdamW([trained], lr=0.05, eps=1e-4, weight_decay=0.01)
    places = [torch.rand(2, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    step = 0
    for epoch in range(2):
        order = torch.cat([p[epoch] for p in places]).argsort()
        for start in (0, 8):
            loss = -0.3 * (trained * anchors).sum() / 4
            chosen = [(int(r) // 4, int(r) % 4) for r in order[start : start + 8]]
            for client, label in chosen:
                near = [
                    F.cosine_similarity(prototypes[client][label], trained[c], dim=0) / 0.01
                    for _, c in chosen
                ]
                own = F.cosine_similarity(prototypes[client][label], trained[label], dim=0) / 0.01
                loss = loss + (torch.stack(near).logsumexp(0) - own) / len(chosen)
            optimizer.param_groups[0]["lr"] = (
                0.05 * (1 + torch.cos(torch.tensor(torch.pi * step / 4)).item()) / 2
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    torch.testing.assert_close(found, F.normalize(trained.detach(), dim=-1), rtol=1e-4, atol=1e-4)
    assert (found - text).abs().max() > 1e-2


def test_a_client_without_prototypes_is_zero_shot_clip() -> None:
    method: Any = make_method("fedspa")
    head = method.build()
    images = torch.randn(5, 64)
    plain = make_method("zeroshot").build()(images)
    torch.testing.assert_close(head(images).softmax(-1), plain.softmax(-1))


def test_the_rate_falls_in_a_cosine() -> None:
    method = make_method("fedspa", **{"fedspa.lr": 0.4})
    assert [method.lr("prototypes", e, 4) for e in (0, 2)] == [0.4, pytest.approx(0.2)]


def test_round_1_pools_and_later_rounds_keep_and_align() -> None:
    method: Any = make_method("fedspa", **{"fedspa.server-epochs": 2})
    state = method.start()
    n_classes, width = state.shared["prototypes"].shape
    assert method.send(state, [0], train=True)[0].keys() == {"prototypes"}

    def upload(value: float, *counts: int) -> Upload:
        sent = {"prototypes": torch.full((n_classes, width), value)}
        return Upload(sent | {"counts": torch.tensor(counts).float()}, sum(counts))

    method.merge(state, {0: upload(1.0, 1, 0, 3, 0), 1: upload(5.0, 3, 2, 1, 0)})
    state.round = 1
    # 0 where nobody has an image of the class
    assert state.shared["prototypes"][:, 0].tolist() == [4, 5, 2, 0]
    assert state.pool == {}
    assert state.extra == {}
    pooled = state.shared["prototypes"].clone()
    trained = {i: upload(0.0, 1, 1, 1, 1) for i in (0, 1)}
    for i, each in trained.items():
        each.tensors["prototypes"] = torch.randn(n_classes, width, generator=torch.manual_seed(i))
    method.merge(state, trained)
    state.round = 2
    assert torch.equal(state.shared["prototypes"], pooled)
    sent = method.send(state, [0, 9], train=True)
    assert sent[0].keys() == {"text_features"}
    assert sent[9].keys() == {"text_features", "prototypes"}
    assert method.expected(state, sent[0]).keys() == {"prototypes", "counts"}
    assert method.send(state, [0], train=False)[0].keys() == {"text_features", "prototypes"}
    torch.testing.assert_close(state.extra["text_features"].norm(dim=-1), torch.ones(n_classes))
    assert (state.extra["text_features"] - method.build().text_features).abs().max() > 1e-4


def test_a_client_goes_on_from_its_own_prototypes(federate: Federate, wire: list[Exchange]) -> None:
    federate(method="fedspa", num_server_rounds=4, flat={"fedspa.server-epochs": 2})
    by_round: dict[int, list[Exchange]] = {r: [] for r in range(1, 5)}
    for exchange in wire:
        if exchange.kind == "train":
            by_round[exchange.round].append(exchange)
    shape = (len(CLASSNAMES), 64)
    assert all(len(exchanges) == NUM_CLIENTS for exchanges in by_round.values())
    for exchange in by_round[1]:
        # Means of unit-norm features, 0 without an image
        empty = exchange.up["counts"] == 0
        assert (exchange.up["prototypes"].norm(dim=1) <= 1 + 1e-6).all()
        assert ((exchange.up["prototypes"] == 0).all(1) == empty).all()
    pooled = by_round[2][0].down["prototypes"]
    counts = torch.stack([e.up["counts"] for e in by_round[1]]).double()
    means = torch.stack([e.up["prototypes"] for e in by_round[1]]).double()
    expected = torch.einsum("nc,ncd->cd", counts / counts.sum(0), means)
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=1e-6)
    for server_round in (2, 3, 4):
        for exchange in by_round[server_round]:
            assert exchange.up.keys() == {"prototypes", "counts"}
            assert exchange.up["prototypes"].shape == shape
            assert ("prototypes" in exchange.down) == (server_round == 2)
            assert ("text_features" in exchange.down) == (server_round > 2)
    # Each round leads further away from where all began; a client that began anew would not
    apart = [
        sum((e.up["prototypes"] - pooled).norm().item() for e in by_round[r]) for r in (2, 3, 4)
    ]
    assert apart[0] > 0
    assert apart[1] > 1.2 * apart[0]
    assert apart[2] > 1.2 * apart[1]
