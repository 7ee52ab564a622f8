"""Zero-shot CLIP: open_clip's own logits of images and sentences, and nothing that is learned."""

import open_clip
import torch

from pfedmoap_flwr import config
from pfedmoap_flwr.assets import asset
from pfedmoap_flwr.clip.features import Reading, read_images
from pfedmoap_flwr.data.images import load_images
from support.federation import Exchange, Federate, make_method
from support.models import whole
from support.tiny import CLASSNAMES, TINY


def test_16_logits_are_open_clips_own() -> None:
    method = make_method("zeroshot")
    images = load_images(config.parse(TINY).data).splits["test"]
    model = whole("tiny", asset("clip/tiny.safetensors"))
    pixels = torch.stack([method.clip.preprocess(row["image"]) for row in images])
    sentences = [f"a drawing of {name.replace('_', ' ')}." for name in CLASSNAMES]
    with torch.no_grad():
        expected, _ = model.get_logits(pixels, open_clip.get_tokenizer("tiny")(sentences))
    logits = method.build()(read_images(method.clip, images, Reading()))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected.max(1).values - expected.min(1).values).min() > 0.1


def test_16_nothing_is_learned_or_sent(federate: Federate, wire: list[Exchange]) -> None:
    run = federate(method="zeroshot")
    assert list(make_method("zeroshot").build().parameters()) == []
    assert all(exchange.down == exchange.up == {} for exchange in wire)
    first, *others = run.rounds()
    for record in others:
        assert record.train_loss is None
        for client_id, measured in record.clients.items():
            for split in ("", "validation-"):
                same = first.clients[client_id][f"zeroshot-{split}accuracy"]
                assert measured[f"personal-{split}accuracy"] == same
                assert measured[f"global-{split}accuracy"] == same
