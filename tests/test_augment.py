"Augmentations against numpy and torchvision, the strengths of the field, and CutMix by loops."
import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tvf

from rdd_nb.augment import AUGMENTATIONS, augment, colour, crop, cutmix, cutout, flip, rotate, scale
from rdd_nb.core import generator


def numbers(seed): return torch.rand(4, generator=generator('r', seed))


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('share', [.125, .143, .5])
def test_crop_is_a_shift_that_repeats_the_border(seed, share):
    x, r = torch.randn(2, 3, 28, 28, generator=generator(seed)), numbers(seed)
    most = max(1, round(share * 28))
    down, right = (int(v * (2 * most + 1)) - most for v in r[:2])
    rows, columns = (np.clip(np.arange(28) + d, 0, 27) for d in (down, right))
    assert torch.equal(crop(x, r, share), x[:, :, rows][..., columns]) and max(abs(down), abs(right)) <= most


@pytest.mark.parametrize('seed', range(5))
def test_colour_by_numpy(seed):
    "DSA's brightness, saturation and contrast with its strengths 1, 2 and .5."
    x, r = torch.randn(3, 3, 8, 8, generator=generator(seed)).double(), numbers(seed).numpy().astype(float)
    expected = x.numpy() + (r[0] - .5)
    expected = (expected - expected.mean(1, keepdims=True)) * (2 * r[1]) + expected.mean(1, keepdims=True)
    mean = expected.mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(colour(x, torch.tensor(r)), (expected - mean) * (r[2] + .5) + mean, rtol=1e-6)


@pytest.mark.parametrize('degrees', [15, 45])
@pytest.mark.parametrize('seed', range(4))
def test_rotate_is_that_of_torchvision(degrees, seed):
    x, r = torch.rand(2, 1, 33, 33, generator=generator(seed)), numbers(seed)
    angle = (2 * float(r[0]) - 1) * degrees
    expected = tvf.rotate(x, angle, interpolation=tvf.InterpolationMode.BILINEAR)
    inside = slice(8, 25)      # outside, borders are filled in other ways
    assert torch.allclose(rotate(x, r, degrees)[..., inside, inside], expected[..., inside, inside], atol=1e-4)


def test_the_largest_strengths_are_those_of_dsa():
    most, middle, ones = torch.full((4,), 1 - 1e-7), torch.full((4,), .5), torch.ones(1, 1, 32, 32)
    ramp = torch.linspace(-1, 1, 101).expand(1, 1, 101, 101)
    slope = lambda x: float(x[0, 0, 50, 60] - x[0, 0, 50, 40]) / .4
    assert slope(scale(ramp, most)) == pytest.approx(1.2, abs=1e-3) == 1 / slope(scale(ramp, 0 * most))
    assert math.degrees(math.acos(slope(rotate(ramp, most)))) == pytest.approx(15, abs=.05)
    assert cutout(ones, middle).mean() == .75 and (colour(ones, most) - 1).mean() == pytest.approx(.5, abs=1e-5)
    assert [torch.equal(flip(ramp, torch.full((4,), v)), ramp) for v in (.49, .51)] == [False, True]


def test_names_of_the_field():
    "The string in DSA's code, 'color' for 'colour', and strengths after an equals sign."
    x = torch.randn(2, 3, 16, 16, generator=generator(0))
    for k in range(12):
        dsa, = augment(x, names='color_crop_cutout_flip_scale_rotate', generator=generator(k))
        ours, = augment(x, names='colour crop cutout flip scale rotate', generator=generator(k))
        assert torch.equal(dsa, ours)
    for name, given in (('crop', 'crop=.125'), ('scale', 'scale=1.2'), ('rotate', 'rotate=15'),
                        ('cutout', 'cutout=0.5')):
        results = [augment(x, names=n, generator=generator(1))[0] for n in (name, given)]
        assert torch.equal(*results)
    far, near = (augment(x, names=n, generator=generator(4))[0] for n in ('rotate=45', 'rotate'))
    assert not torch.equal(far, near)


@pytest.mark.parametrize('names', ['swirl', 'crop=', 'crop=x', 'crop=nan', 'rotate=-1', 'scale=inf', 'flip=1',
                                   'colour=2', 'crop=0',
                                   'a' * 10**5, '\x1b[31m'], ids=lambda n: ascii(n)[:20])
def test_names_that_are_refused(names):
    with pytest.raises(ValueError, match='augmentation') as e: augment(names=names, generator=generator(0))
    assert str(e.value).isprintable() and len(str(e.value)) < 300


def test_every_name_is_drawn_about_equally_often():
    x, names = torch.randn(1, 3, 16, 16, generator=generator(0)), ['crop', 'scale', 'cutout']
    found = [augment(x, names=' '.join(names), generator=generator('draw', k))[0] for k in range(600)]
    black = np.mean([bool((f == 0).sum() > 50) for f in found])
    assert .27 < black < .4


@pytest.mark.parametrize('seed', range(20))
def test_cutmix_by_loops(seed):
    x, y = torch.arange(5.).view(5, 1, 1, 1).expand(5, 1, 9, 7), torch.tensor([0, 1, 2, 0, 1])
    mixed, targets = cutmix(x, y, 3, generator(seed), probability=1.)
    for i, (image, target) in enumerate(zip(mixed, targets)):
        others = {int(v) for v in image.unique()} - {i}
        share = {c: sum(float((image == j).float().mean()) for j in {i, *others} if y[j] == c) for c in range(3)}
        assert len(others) <= 1 and target.tolist() == pytest.approx(list(share.values()), abs=1e-6)


def test_all_transformations_are_listed():
    assert set(AUGMENTATIONS) == {'flip', 'crop', 'scale', 'rotate', 'cutout', 'colour', 'color'}
