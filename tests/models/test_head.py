"""A shift of the logits in the bias of every head that timm names, or a refusal by name."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from ham_hf.models import PixelModel
from ham_hf.models.head import HeadError, check_foldable, fold_shifts, read_biases, write_biases
from tests.support.exports import FAMILIES

# One of each kind of head that get_classifier() gives: side of the images, and what builds the network small.
HEADS = {
    **{name: (32, arguments | ({"img_size": 32} if "window" in name else {})) for name, arguments in FAMILIES.items()},
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}),
    "pit_ti_distilled_224": (64, {"img_size": 64}),
    "levit_128s": (64, {"img_size": 64, "depth": [1, 1, 1]}),
    "crossvit_9_240": (240, {"depth": [[1, 1, 0]], "embed_dim": [8, 16], "num_heads": [1, 1]}),
    "repvit_m0_9": (32, {"embed_dim": [8, 8, 16, 16], "depth": [0, 0, 1, 0]}),
    "caformer_s18": (32, {}),
    "resnetv2_18": (32, {}),
    "inception_next_atto": (32, {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]}),
    "efficientvit_b0": (32, {}),
}


def built(name, model_args):
    torch.manual_seed(0)
    return PixelModel(timm.create_model(name, num_classes=10, **model_args), (0.5,) * 3, (0.25,) * 3).eval()


@pytest.mark.parametrize("name", HEADS)
def test_the_bias_shifts_the_logits(name):
    size, arguments = HEADS[name]
    model = built(name, arguments)
    check_foldable(model, num_classes=10, image_size=size)
    shifts = torch.linspace(-0.7, 0.9, 10)
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    before = read_biases(model.backbone, 10)
    with torch.no_grad():
        plain = model(x)
        fold_shifts(model.backbone, shifts)
        torch.testing.assert_close(model(x), plain + shifts, rtol=1e-5, atol=1e-5)
        write_biases(model.backbone, before)
        assert torch.equal(model(x), plain)
    assert read_biases(model.backbone, 10) == before


def test_a_shift_of_zero_is_the_identity_bit_for_bit():
    model = built("test_resnet", {})
    with torch.no_grad():
        model.backbone.fc.bias[:2] = torch.tensor([-0.0, 1e-40])
    before = model.backbone.fc.bias.clone()
    fold_shifts(model.backbone, torch.zeros(10))
    assert torch.equal(model.backbone.fc.bias.view(torch.int32), before.view(torch.int32))


class Tempered(nn.Module):
    """A head whose logits are scaled after its last layer."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return 4 * self.linear(x)


class TestRefusals:
    @pytest.mark.parametrize(
        ("head", "message"),
        [
            (
                lambda linear: nn.Linear(linear.in_features, 10, bias=False),
                "the Linear that makes its logits has no bias",
            ),
            (Tempered, "with a shift in its bias the logits differ by"),
            (lambda _: nn.Identity(), "its head, Identity, does not end in a Linear or Conv of 10 outputs"),
            (lambda linear: nn.Sequential(linear, nn.Linear(10, 7)), "does not end in a Linear or Conv of 10 outputs"),
        ],
        ids=["no-bias", "scaled", "identity", "other-outputs"],
    )
    def test_by_name(self, head, message):
        model = built("test_resnet", {})
        model.backbone.fc = head(model.backbone.fc)
        with pytest.raises(HeadError, match=f"test_resnet: .*{message}"):
            check_foldable(model, num_classes=10, image_size=32)

    def test_a_recorded_bias_of_another_model(self):
        model = built("test_resnet", {})
        with pytest.raises(HeadError, match=r"\[10, 10\] numbers does not fit the model's of \[10\]"):
            write_biases(model.backbone, [[0.0] * 10, [0.0] * 10])
