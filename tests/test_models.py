"""Networks against the definitions of the field (`networks.py` of VICO-UoE/DatasetCondensation), layer by layer."""
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from rdd_nb.core import seeded
from rdd_nb.models import MODELS, make_model

GREY, COLOUR = (1, 28, 28), (3, 32, 32)


def conv(a, b, size, bias=True): return b * a * size**2 + (b if bias else 0)
def norm(c): return 2 * c
def linear(a, b): return a * b + b


def block(a, b, shrinks):
    "Parameters of a block of ResNet-18: two filters of 3x3, and one of 1x1 where it shrinks."
    beside = conv(a, b, 1, False) + norm(b) if shrinks else 0
    return conv(a, b, 3, False) + conv(b, b, 3, False) + 2 * norm(b) + beside


def stages(c):
    pairs = ((64, 64), (64, 128), (128, 256), (256, 512))
    return conv(c, 64, 3, False) + norm(64) + sum(block(a, b, a != b) + block(b, b, False) for a, b in pairs)


VGG = (64, 128, 256, 256, 512, 512, 512, 512)
# number of parameters as the source defines the layers, from the channels c of an image and its number of pixels n
COUNTS = {
    'convnet': lambda c, n: conv(c, 128, 3) + 2 * conv(128, 128, 3) + 3 * norm(128) + linear(128 * 4 * 4, 10),
    'mlp': lambda c, n: linear(n, 128) + linear(128, 128) + linear(128, 10),
    'lenet': lambda c, n: conv(c, 6, 5) + conv(6, 16, 5) + linear(16 * 5 * 5, 120) + linear(120, 84) + linear(84, 10),
    'alexnet': lambda c, n: conv(c, 128, 5) + conv(128, 192, 5) + conv(192, 256, 3) + conv(256, 192, 3)
                            + conv(192, 192, 3)
                            + linear(192 * 4 * 4, 10),
    'vgg11': lambda c, n: sum(conv(a, b, 3) + norm(b) for a, b in zip((c, *VGG), VGG)) + linear(512, 10),
    'resnet18': lambda c, n: stages(c) + linear(512, 10),
}
MAPS = {  # side of the maps after every filter, for grey images of 28 pixels and for colour images of 32
    'convnet': ([32, 16, 8], [32, 16, 8]), 'lenet': ([28, 10], [28, 10]), 'alexnet': ([32, 16, 8, 8, 8],) * 2,
    'vgg11': ([32, 16, 8, 8, 4, 4, 2, 2],) * 2,
    'resnet18': tuple([a] * 5 + [b] * 5 + [c] * 5 + [d] * 5 for a, b, c, d in ((28, 14, 7, 4), (32, 16, 8, 4))),
}


@pytest.mark.parametrize('name', COUNTS)
@pytest.mark.parametrize('shape', [GREY, COLOUR], ids=str)
def test_parameters_of_the_field(name, shape):
    net = make_model(name, shape, 10)
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name](shape[0], math.prod(shape))


@pytest.mark.parametrize('name', MAPS)
@pytest.mark.parametrize('k, shape', [(0, GREY), (1, COLOUR)], ids=str)
def test_maps_of_the_field(name, k, shape):
    net, sides = make_model(name, shape, 10), []
    for m in net.modules():
        if isinstance(m, nn.Conv2d): m.register_forward_hook(lambda m, i, o: sides.append(o.shape[-1]))
    net(torch.randn(2, *shape))
    assert sides == MAPS[name][k]


@pytest.mark.parametrize('name', ['convnet', 'alexnet', 'vgg11'])
def test_padding_of_grey_images_is_a_frame_of_zeros(name):
    net, framed = make_model(name, GREY, 10), make_model(name, (1, 32, 32), 10)
    framed.load_state_dict(net.state_dict())
    x = torch.randn(3, *GREY)
    torch.testing.assert_close(net(x), framed(nn.functional.pad(x, (2, 2, 2, 2))), rtol=1e-3, atol=1e-4)


def test_filters_of_resnet_are_drawn_as_pytorch_draws_them():
    "The code of DC leaves them alone; torchvision would draw from a normal distribution."
    net = make_model('resnet18', COLOUR, 10)
    for m in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        bound = 1 / math.sqrt(m.weight[0].numel())
        assert .9 * bound < m.weight.abs().max() <= bound


@pytest.mark.parametrize('shape', [(1, 8, 8), (3, 8, 8), (1, 16, 16), (3, 28, 28)], ids=str)
def test_convnet_is_as_it_was_for_other_images(shape):
    "To the bit: blocks with a padding of 1, drawn from the same stream."
    width, depth = (32, 2) if shape[1] < 16 else (128, 3)
    with seeded('model', 5):
        layers, c = [], shape[0]
        for _ in range(depth):
            layers += [nn.Conv2d(c, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
            c = width
        old = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (shape[1] >> depth)**2, 10))
    net, x = make_model('convnet', shape, 10, seed=5), torch.randn(4, *shape)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), old.parameters(), strict=True))
    torch.testing.assert_close(net(x), old(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', MODELS)
def test_networks_can_be_differentiated_twice(name):
    "Gradient matching does; fast attention kernels cannot."
    net, x = make_model(name, (1, 8, 8), 3), torch.randn(4, 1, 8, 8, requires_grad=True)
    loss = nn.functional.cross_entropy(net(x), torch.tensor([0, 1, 2, 0]))
    first = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    second, = torch.autograd.grad(sum(g.square().sum() for g in first), x)
    assert torch.isfinite(second).all() and second.abs().max() > 0


def test_torchvision_is_imported_late():
    code = ("import sys, rdd_nb.models as m; assert not {'torchvision', 'torch._dynamo'} & set(sys.modules); "
            "m.make_model('resnet18', (1, 9, 9), 2); assert 'torchvision' in sys.modules")
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)


@pytest.mark.parametrize(
    'name, options',
    [
        ('convnet', dict(width=True)),
        ('convnet', dict(width=10**9)),
        ('mlp', dict(depth=0)),
        ('vit', dict(patch=3)),
        ('lenet', dict(width=3)),
    ],
    ids=str,
)
def test_settings_that_make_no_network(name, options):
    with pytest.raises(ValueError) as e: make_model(name, (1, 8, 8), 10, **options)
    assert '\n' not in str(e.value) and len(str(e.value)) < 300
