"""Fused convolutions are the plain ones: values and gradients, and never with kernels of other weights."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional

from ddmd.models.fused_convolution import PatchConv2d, UpConv2d, concat_upsampled, freeze


@pytest.mark.parametrize(
    "sizes",
    [(6, 4, 5, 3, 1), (6, 0, 9, 3, 3), (1, 1, 1, 3, 1), (6, 4, 5, 1, 1)],
    ids=["two images", "grouped", "one channel", "1x1"],
)
@pytest.mark.parametrize("height", [1, 2, 7])
def test_it_is_the_plain_convolution(sizes, height):
    coarse, fine, channels, kernel, groups = sizes
    conv = UpConv2d(coarse, fine, channels, kernel, groups).double()
    x = torch.randn(2, coarse, height, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, fine, 2 * height, 10, dtype=torch.float64, requires_grad=True) if fine else None
    upsampled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    whole = torch.cat((upsampled, y), 1) if fine else upsampled
    by_hand = functional.conv2d(whole, conv.weight, conv.bias, padding=kernel // 2, groups=groups)
    torch.testing.assert_close(conv.forward_plain(concat_upsampled(x, y)), by_hand)
    leaves = [conv.weight, conv.bias, x] + ([y] if fine else [])
    ours, wanted = conv(x, y), conv.forward_plain(concat_upsampled(x, y))
    torch.testing.assert_close(ours, wanted)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (ours, wanted)), strict=True):
        torch.testing.assert_close(a, b)
    before = set(conv.state_dict())
    freeze(torch.nn.Sequential(conv))
    torch.testing.assert_close(conv(x, y), wanted)
    conv.load_state_dict({key: 2 * value for key, value in conv.state_dict().items()})
    torch.testing.assert_close(conv(x, y), 2 * wanted, msg="kernels of other weights than those it has now")
    conv.load_state_dict({key: value / 2 for key, value in conv.state_dict().items()})
    conv.fused_on = ()
    assert torch.equal(conv(x, y), wanted)
    assert set(conv.state_dict()) == before == {"weight", "bias"}, "fused kernels are not saved"


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
    freeze(torch.nn.Sequential(conv))
    torch.testing.assert_close(conv(*images), by_hand)
    with torch.no_grad():
        conv.weight.mul_(2)
        conv.bias.mul_(2)
    freeze(conv)
    torch.testing.assert_close(conv(*images), 2 * by_hand, msg="frozen anew, of the weights as they are now")
    conv.fused_on = ()
    torch.testing.assert_close(conv(*images), 2 * by_hand)
    assert set(conv.state_dict()) == {"weight", "bias"}


def make(kind):
    """A frozen convolution, its input, and the same input for `forward_plain`."""
    if kind == "upsampled":
        conv = UpConv2d(6, 4, 5)
        inputs = (torch.randn(2, 6, 4, 5), torch.randn(2, 4, 8, 10))
        whole = concat_upsampled(*inputs)
    else:
        conv = PatchConv2d([(3, 2), (1, 4)], 7)
        inputs = (torch.randn(2, 3, 8, 10), torch.randn(2, 1, 16, 20))
        whole = torch.cat([functional.pixel_unshuffle(x, p) for x, p in zip(inputs, (2, 4), strict=True)], 1)
    conv.requires_grad_(False)
    conv.freeze()
    assert conv.fused_kernels()[0] is conv.fused_kernels()[0], "frozen: computed once"
    return conv, inputs, whole


def double_in_place(conv):
    with torch.no_grad():
        conv.weight.mul_(2)


def double_data(conv):
    conv.weight.data.mul_(2)  # which no version counter sees


def double_through_numpy(conv):
    conv.weight.detach().numpy()[:] *= 2


def double_by_a_new_parameter(conv):
    conv.weight = torch.nn.Parameter(conv.weight * 2, requires_grad=False)


def double_by_loading(conv):
    conv.load_state_dict({key: value * 2 for key, value in conv.state_dict().items()})


def double_in_inference_mode(conv):
    with torch.inference_mode():
        conv.weight = torch.nn.Parameter(conv.weight.clone(), requires_grad=False)
        conv.weight.mul_(2)


@pytest.mark.parametrize("kind", ["upsampled", "patches"])
@pytest.mark.parametrize("change", [
    double_in_place, double_data, double_through_numpy, double_by_a_new_parameter, double_by_loading,
    double_in_inference_mode,
])  # fmt: skip
def test_no_change_of_the_weights_leaves_stale_kernels(kind, change):
    conv, inputs, whole = make(kind)
    before = conv(*inputs)
    change(conv)
    torch.testing.assert_close(conv(*inputs), conv.forward_plain(whole))
    assert not torch.allclose(conv(*inputs), before)


@pytest.mark.parametrize("kind", ["upsampled", "patches"])
def test_other_parameters_for_one_call_are_those_it_computes_with(kind):
    conv, inputs, whole = make(kind)
    others = {key: torch.randn_like(value) for key, value in conv.named_parameters()}
    wanted = functional.conv2d(whole, others["weight"], others["bias"], padding=1)
    torch.testing.assert_close(torch.func.functional_call(conv, others, inputs), wanted, atol=1e-4, rtol=1e-4)
    grad = torch.func.grad(lambda p: torch.func.functional_call(conv, p, inputs).square().sum())(others)
    leaves = {key: value.clone().requires_grad_() for key, value in others.items()}
    functional.conv2d(whole, leaves["weight"], leaves["bias"], padding=1).square().sum().backward()
    for key, leaf in leaves.items():
        torch.testing.assert_close(grad[key], leaf.grad, atol=1e-2, rtol=1e-3)
    stacked = {key: torch.stack((value, 2 * value)) for key, value in others.items()}
    both = torch.func.vmap(lambda p: torch.func.functional_call(conv, p, inputs))(stacked)
    torch.testing.assert_close(both[1], 2 * wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["upsampled", "patches"])
def test_copies_and_other_types_compute_with_their_own_weights(kind):
    conv, inputs, whole = make(kind)
    wanted = conv(*inputs)
    torch.testing.assert_close(pickle.loads(pickle.dumps(conv))(*inputs), wanted)
    double = copy.deepcopy(conv).double()
    torch.testing.assert_close(double(*(x.double() for x in inputs)), double.forward_plain(whole.double()))
    half = copy.deepcopy(conv).bfloat16()
    assert half(*(x.bfloat16() for x in inputs)).dtype == torch.bfloat16
    torch.testing.assert_close(conv(*inputs), wanted)


def test_it_compiles_as_one_graph():
    conv, inputs, whole = make("upsampled")
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), conv.forward_plain(whole))
