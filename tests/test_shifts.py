"""Planted minorities against simple oracles, and the published protocols."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from rdd_nb.core import generator
from rdd_nb.data import from_arrays, overlap, split
from rdd_nb.shifts import (COLOURS, SHIFTS, as_shift, blur, class_colours, exact_share, greyed, invert_transpose,
                           skewed_colours, two_looks)
from test_data import images, one_line, photos


# ---- shifts -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['minority', 'colour', 'blur', 'noise', 'impulse-2'])
@pytest.mark.parametrize('shape', [(1, 8, 8), (3, 9, 9)])
def test_two_looks_of_the_same_images(name, shape):
    base = images(60, 3, shape)
    train, val, test = split(base, val=.2, test=.2, shift=as_shift(name, .25))
    n = len(test) // 2
    assert test.group.tolist() == [0] * n + [1] * n and test.y[:n].equal(test.y[n:])
    assert not test.x[:n].equal(test.x[n:]) and 0 <= train.pixels().min() and train.pixels().max() <= 1
    assert train.counts().iloc[:, 1].tolist() == [round(.25 * k) for k in train.y.bincount().tolist()]
    fixed = split(base, val=.2, test=.2, shift=as_shift(name, .25), seed=9).test
    assert torch.allclose(fixed.pixels(), test.pixels(), atol=1e-6)     # every pixel and colour of the test set stays


def test_invert_transpose_is_its_own_inverse():
    x = torch.rand(4, 3, 7, 7)
    assert torch.allclose(invert_transpose(invert_transpose(x)), x, atol=1e-6)
    assert torch.allclose(invert_transpose(x)[2, 1, 5, 3], 1 - x[2, 1, 3, 5])


def test_colour_goes_with_the_class_in_just_so_many():
    s = split(images(400, 4, (1, 6, 6)), shift=as_shift('colour'))
    hues = class_colours(4)
    for part in (s.train, s.test):
        shade = part.pixels().amax((2, 3))
        apart = (shade / shade.amax(1, keepdim=True))[:, None] - hues[None] / hues.amax(1, keepdim=True)
        nearest = apart.abs().sum(2).argmin(1)
        assert (nearest == part.y).long().equal(1 - part.group)
    assert s.train.group.double().mean() == pytest.approx(.1, abs=.02) and s.train.x.shape[1] == 3


def test_blur_against_a_direct_sum():
    x = torch.rand(1, 1, 9, 9, generator=generator(1))
    sigma, k = .8, 2
    taps = torch.exp(-torch.arange(-k, k + 1.) ** 2 / (2 * sigma ** 2))
    taps /= taps.sum()
    at = sum(taps[i] * taps[j] * x[0, 0, 4 + i - k, 4 + j - k] for i in range(5) for j in range(5))
    assert abs(blur(x, sigma=sigma)[0, 0, 4, 4] - at) <= .5 / 255 + 1e-6
    assert blur(torch.ones(2, 3, 2, 2)).min() > .999                          # also on images smaller than the kernel


@pytest.mark.parametrize('classes', [2, 3, 5, 10])
def test_long_tail(classes):
    base = images(100 * classes, classes, (1, 4, 4))
    s = split(base, val=.1, test=.2, shift=as_shift('long-tail'))
    kept = s.train.y.bincount().tolist()
    assert kept == [round(70 * .1 ** (c / (classes - 1))) for c in range(classes)]
    assert s.test.y.bincount().tolist() == [20] * classes and overlap(s.train, base) == len(s.train)
    assert s.train.group[s.train.y == 0].eq(0).all() and s.train.group[s.train.y == classes - 1].eq(2).all()
    order = [int(s.test.group[s.test.y == c][0]) for c in range(classes)]
    assert order == sorted(order)
    one_line(lambda: as_shift('long-tail', 0), 'share must be in (0, 1]', 'got 0')


def test_shifts_of_ones_own():
    night = two_looks(lambda x, *_: x * .2, groups=('day', 'night'))
    assert split(images(), shift=as_shift(night)).train.groups == ['day', 'night']
    s = split(images(), shift=as_shift(lambda x: x.flip(3), .5))
    half = len(s.test) // 2
    assert torch.allclose(s.test.x[half:], s.test.x[:half].flip(3)) and s.test.groups == ['majority', 'minority']
    for bad, words in ((lambda x: x[:, :, 1:], 'must keep the shape'), (lambda x: x - 1, 'raw values in [0, 1]'),
                       (lambda x: x / 0, 'raw values in [0, 1]'), (lambda x: x.numpy(), 'got ndarray')):
        one_line(lambda: split(images(), shift=as_shift(bad)), 'shift', words)
    SHIFTS['mirror'] = two_looks(lambda x, *_: x.flip(2))
    try: assert split(images(), shift=as_shift('mirror')).train.group.sum() == 2
    finally: del SHIFTS['mirror']


def test_the_users_arrays_are_left_alone():
    x = np.random.default_rng(0).random((40, 1, 5, 5)).astype('float32')
    kept, base = x.copy(), from_arrays(x, np.arange(40) % 2, normalise=False)
    for shift in (*SHIFTS, None):
        if shift != 'half-grey': split(base, shift=as_shift(shift, .5))
    base.renormalise().pixels()
    overlap(base, base)
    assert (x == kept).all() and (base.x.numpy() == kept).all()


@pytest.mark.parametrize('share', [-.1, 1.1, float('nan'), float('inf'), '0.1', None, True, 1j])
def test_share_out_of_range(share):
    one_line(lambda: as_shift('minority', share), 'share=', 'expected a number in [0, 1]', repr(share))


def test_shifts_that_cannot_be():
    table = from_arrays(torch.rand(40, 3), torch.arange(40) % 2)
    for name in set(SHIFTS) - {'long-tail'}: one_line(lambda: split(table, shift=as_shift(name)))
    for name in ('minority', 'colour', 'blur'): one_line(lambda: split(table, shift=as_shift(name)), name)
    assert split(table, shift=as_shift('long-tail')).train.groups == ['head', 'medium', 'tail']
    one_line(lambda: split(images(shape=(1, 4, 6)), shift=as_shift('minority')), 'square images', '1 x 4 x 6')
    one_line(lambda: split(images(shape=(2, 4, 4)), shift=as_shift('colour')), '1 or 3 channels', '2 x 4 x 4')
    one_line(lambda: split(images(), shift=as_shift('half-grey')), 'half-grey', '3 channels')
    one_line(lambda: split(images(shape=(3, 6, 6)), shift=as_shift('foreground')), '1 channels')
    one_line(lambda: split(images(44, 11), shift=as_shift('background')), '10 colours for 11 classes')
    one_line(lambda: as_shift('Minority'), "'Minority'", 'minority, colour, blur, noise, long-tail')
    one_line(lambda: as_shift('noise-9'), "'noise-9'")
    one_line(lambda: as_shift('x' * 10**5), 'is unknown')
    one_line(lambda: as_shift(3), 'shift 3 is unknown')


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_exact_share(sizes, share, seed):
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    chosen = exact_share(y, len(sizes), share, generator(seed))
    for c, n in enumerate(sizes):
        k = int(chosen[y == c].sum())
        assert abs(k - share * n) <= .5 or (n > 1 and k in (1, n - 1)) or n == 1
        if 0 < share < 1 and n > 1: assert 0 < k < n


# ---- bytes and the published protocols ----------------------------------------------------------------------------

@pytest.mark.parametrize('channels, names', [(1, set(SHIFTS) - {'half-grey'}),
                                             (3, {n for n in SHIFTS if 'ground' not in n})])
def test_a_shift_of_bytes_is_the_shift_of_floats(channels, names):
    "To half a level; and bytes stay bytes."
    d = photos(60, 3, (channels, 6, 6))
    f = from_arrays(d.bytes / 255, d.y, normalise=False)
    for name in sorted(names):
        for p, q in zip(split(d, shift=as_shift(name, .2)), split(f, shift=as_shift(name, .2))):
            assert p.bytes.dtype == torch.uint8 and p.group.equal(q.group) and p.y.equal(q.y), name
            assert (p.pixels() - q.pixels()).abs().max() <= .51 / 255, name


def test_blocks_give_the_same_draws():
    "Bytes are shifted in blocks of 4,096; the random colours do not depend on that."
    d = photos(9000, 2, (1, 2, 2))
    a, b = (split(x, shift=as_shift('colour', .5)).train.pixels() for x in (d, from_arrays(d.bytes / 255, d.y)))
    assert (a - b).abs().max() <= .51 / 255


@pytest.mark.parametrize('name', ['foreground', 'background', 'shaded-foreground', 'shaded-background'])
def test_coloured_sets_against_the_published_arithmetic(name):
    "The formulas of FairDD's data sets, pixel by pixel on bytes; canvas, counts of colours, balance of the test set."
    d = photos(600, 3, (1, 28, 28))._with(classes=list('abc'))
    s = split(d, val=0, test=200, shift=as_shift(name, .1))
    for part in (s.train, s.test):
        assert part.bytes.shape[1:] == (3, 32, 32) and part.groups == list(COLOURS)
        assert part.mean.tolist() == part.std.tolist() == [.5] * 3
        table = part.counts().to_numpy()
        for c, row in enumerate(table):
            n, own = row.sum(), .1 if part is s.test else .9
            assert row[c] == int(own * n + 1e-9)
            assert np.delete(row, c).max() == -(-(n - row[c]) // 9) and np.delete(row, c).sum() == n - row[c]
    raw = split(d, val=0, test=200).train.bytes
    for i in range(0, 400, 29):
        painted(raw[i, 0].numpy(), list(COLOURS.values())[s.train.group[i]], name, s.train.bytes[i].numpy())


def painted(grey, colour, name, got):
    canvas = np.zeros((32, 32), np.uint8)
    canvas[4:, 4:] = grey
    for k, c in enumerate(colour):
        p, c = canvas.astype(np.float32), np.float32(c)
        if name == 'foreground': want = np.where(canvas >= 128, c, 0)
        if name == 'background': want = np.where(canvas < 128, c, 0)
        if name == 'shaded-foreground': want = np.floor(p / np.float32(255) * (c / np.float32(255)) * np.float32(255))
        if name == 'shaded-background':
            dark = (np.float32(255) - p) / np.float32(255)
            want = np.floor((np.float32(255) + dark * (c / np.float32(255) - np.float32(255))) * np.float32(255)) % 256
        assert (got[k] == want).all(), (name, k, np.abs(got[k] - want).max())


def test_half_grey():
    d = photos(400, 4)
    s = split(d, val=0, test=200, shift=as_shift('half-grey', .1))
    assert s.train.groups == ['grey', 'colour']
    assert s.train.counts().to_numpy().tolist() == [[45, 5], [45, 5], [5, 45], [5, 45]]
    assert s.test.counts().to_numpy().tolist() == [[50, 50]] * 4
    grey, colour = s.test.bytes[:200], s.test.bytes[200:]
    assert (greyed(colour / 255) * 255).round().byte().equal(grey)
    for a, b in zip(grey, colour):
        luma = np.asarray(Image.fromarray(b.permute(1, 2, 0).numpy()).convert('L'))
        assert (a.numpy() == luma).all()
    assert (s.train.bytes[s.train.group == 0].float().std(1) == 0).all()
    assert overlap(s.train.subset(s.train.group == 1), d) == int(s.train.group.sum())


@pytest.mark.parametrize('own', [.1, .5, .9, 1.])
def test_skewed_colours(own):
    y = torch.arange(10).repeat_interleave(100)
    colour = skewed_colours(y, 10, own, generator('skew'))
    for c in range(10):
        counts = colour[y == c].bincount(minlength=10).tolist()
        assert counts[c] == round(100 * own) and sum(counts) == 100
        assert max(counts[:c] + counts[c + 1:]) <= -(-(100 - counts[c]) // 9)
    assert not colour.equal(skewed_colours(y, 10, own, generator('other'))) or own == 1


def test_noise_moves_with_the_seed_but_not_in_the_test_set():
    a, b = (split(photos(), shift=as_shift('noise', .5), seed=s) for s in (0, 1))
    assert a.test.bytes.equal(b.test.bytes) and a.train.groups == ['clean', 'noise-3']
    assert as_shift('contrast-5').groups == ['clean', 'contrast-5']
