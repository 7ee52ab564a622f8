"""The setting prompt.calibrate: what an image without content says is taken off, when measured."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pfedmoap_flwr.clip.features import Kind, Reading, read_blank, read_shape
from pfedmoap_flwr.methods.base import Split
from pfedmoap_flwr.training import local
from support.federation import Federate, make_method, rounds, tensor_files
from support.tiny import frozen_clip


def test_it_is_the_quotient_of_probabilities() -> None:
    # Both rows are p = (0.75, 0.25), one of them shifted; without content it is (0.9, 0.1)
    logits = torch.tensor([[6.0, 2.0], [0.75, 0.25]]).log()
    found = local.calibrated(logits, torch.tensor([[9.0, 1.0]]).log())
    torch.testing.assert_close(found.exp(), torch.tensor([[0.75 / 0.9, 2.5]]).expand(2, 2))


def test_a_prompt_that_prefers_a_class_is_put_right_when_it_is_measured() -> None:
    head = make_method("promptfl").build()
    text = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    head.encode = lambda: text
    head.logit_scale = 10.0
    # Logits of x: 6, 9.6, 8; of x0: 4.472, 8.944, 8.944. So of both: 1.528, 0.656, -0.944
    x, blank = torch.tensor([[0.6, 0.8]]), torch.tensor([1.0, 2.0])
    splits = {name: Split(x, torch.tensor([label])) for label, name in enumerate("abc")}
    assert local.accuracies(head, splits) == {"a": 0.0, "b": 1.0, "c": 0.0}
    assert local.accuracies(head, splits, blank) == {"a": 1.0, "b": 0.0, "c": 0.0}
    # An image without content says nothing of its class
    logits = head.predict(blank[None], text)
    torch.testing.assert_close(local.calibrated(logits, logits), torch.zeros(1, 3))
    assert math.isclose(logits[0, 0], 10 / math.sqrt(5), rel_tol=1e-6)


@pytest.mark.parametrize("kind", ["features", "tokens", "pixels"])
def test_the_image_without_content_is_of_the_mean_colour(kind: Kind) -> None:
    clip = frozen_clip()
    colour = np.array(clip.preprocessing.mean) * 255
    image = Image.fromarray(np.full((40, 30, 3), colour.round(), dtype=np.uint8))
    pixels = clip.preprocess(image)
    found = read_blank(clip, kind)
    assert tuple(found.shape) == read_shape(clip, Reading(kind))
    if kind == "pixels":
        # A colour is a whole number of 255
        torch.testing.assert_close(found, pixels, rtol=0, atol=0.5 / 255 / 0.26)
        return
    own = found if kind == "features" else found[0]
    with clip.image_tower() as tower, torch.no_grad():
        expected: Tensor = tower(torch.zeros(1, *pixels.shape))[0]
        near: Tensor = tower(pixels[None])[0]
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    assert torch.cosine_similarity(own, near, dim=0) > 0.99


def test_a_run_trains_as_without_it(federate: Federate) -> None:
    options = {"method": "promptfl", "num_server_rounds": 1}
    plain = federate("plain", **options)
    run = federate("calibrated", **options, flat={"prompt.calibrate": True})
    assert tensor_files(run) == tensor_files(plain)
    (*_, one), (*_, other) = plain.rounds(), run.rounds()
    assert one.train_loss == other.train_loss
    assert rounds(run) != rounds(plain)
    said = [
        {i: each["zeroshot-accuracy"] for i, each in r.rounds()[0].clients.items()}
        for r in (plain, run)
    ]
    assert said[0] == said[1]
