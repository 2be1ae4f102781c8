"""Folded convolutions are those of the plain formulation: values, gradients, folded once or every time."""

import pytest
import torch
from torch.nn import functional

from ddmd.models.fused_convolution import PatchConv2d, UpConv2d, concat_upsampled, prepare


@pytest.mark.parametrize(
    "sizes",
    [(6, 4, 5, 3, 1), (6, 0, 9, 3, 3), (1, 1, 1, 3, 1), (6, 4, 5, 1, 1)],
    ids=["joined", "grouped", "one channel", "1x1"],
)
@pytest.mark.parametrize("height", [1, 2, 7])
def test_it_is_the_plain_convolution(sizes, height):
    coarse, fine, channels, kernel, groups = sizes
    conv = UpConv2d(coarse, fine, channels, kernel, groups).double()
    x = torch.randn(2, coarse, height, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, fine, 2 * height, 10, dtype=torch.float64, requires_grad=True) if fine else None
    enlarged = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    whole = torch.cat((enlarged, y), 1) if fine else enlarged
    by_hand = functional.conv2d(whole, conv.weight, conv.bias, padding=kernel // 2, groups=groups)
    torch.testing.assert_close(conv.forward_plain(concat_upsampled(x, y)), by_hand)
    leaves = [conv.weight, conv.bias, x] + ([y] if fine else [])
    ours, wanted = conv(x, y), conv.forward_plain(concat_upsampled(x, y))
    torch.testing.assert_close(ours, wanted)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (ours, wanted)), strict=True):
        torch.testing.assert_close(a, b)
    before = set(conv.state_dict())
    prepare(torch.nn.Sequential(conv))
    torch.testing.assert_close(conv(x, y), wanted)
    conv.load_state_dict({key: 2 * value for key, value in conv.state_dict().items()})
    torch.testing.assert_close(conv(x, y), 2 * wanted, msg="folded weights of others than those it has now")
    conv.load_state_dict({key: value / 2 for key, value in conv.state_dict().items()})
    conv.folded_on = ()
    assert torch.equal(conv(x, y), wanted)
    assert set(conv.state_dict()) == before == {"weight", "bias"}, "folded weights are not saved"


@pytest.mark.parametrize("inputs", [[(3, 2)], [(5, 2), (4, 1), (1, 4)], [(1, 1), (2, 3)]], ids=str)
def test_a_convolution_of_patches_is_the_plain_one(inputs):
    conv = PatchConv2d(inputs, 7).double()
    images = [torch.randn(2, c, 6 * p, 5 * p, dtype=torch.float64, requires_grad=True) for c, p in inputs]
    patches = torch.cat(
        [functional.pixel_unshuffle(x, p) for x, (_, p) in zip(images, inputs, strict=True)], 1
    )
    by_hand = functional.conv2d(patches, conv.weight, conv.bias, padding=1)
    leaves = [conv.weight, conv.bias, *images]
    ours = conv(*images)
    torch.testing.assert_close(ours, by_hand)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (ours, by_hand)), strict=True):
        torch.testing.assert_close(a, b)
    prepare(torch.nn.Sequential(conv))
    torch.testing.assert_close(conv(*images), by_hand)
    with torch.no_grad():
        conv.weight.mul_(2)
        conv.bias.mul_(2)
    prepare(conv)
    torch.testing.assert_close(
        conv(*images), 2 * by_hand, msg="prepared anew, of the weights as they are now"
    )
    conv.folded_on = ()
    torch.testing.assert_close(conv(*images), 2 * by_hand)
    assert set(conv.state_dict()) == {"weight", "bias"}
