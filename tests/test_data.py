"""The data module under adversarial input, across seeds and against simple oracles."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torchvision import datasets as tv_datasets, transforms

from rdd_nb import data
from rdd_nb.core import generator
from rdd_nb.data import (GroupedDataset, SHIFTS, as_shift, blur, channel_stats, data_root, exact_share, from_arrays, from_folder, from_torch,
                         invert_transpose, load, overlap, split, stratified, two_looks)

DATA = os.environ.get('RDD_NB_DATA')


def rows(x):
    "Each image as bytes, in the sixteenths that the digits come in."
    return [r.tobytes() for r in x.mul(16).round().byte().numpy()]


def images(n=40, classes=2, shape=(1, 6, 6), seed=0):
    x = torch.rand(n, *shape, generator=generator('images', seed))
    return from_arrays(x, torch.arange(n) % classes, normalise=False)


def one_line(f, *parts, error=ValueError):
    "`f` raises exactly `error`, in one line that contains all `parts`."
    with pytest.raises(error) as caught: f()
    assert caught.type is error
    said = str(caught.value)
    assert '\n' not in said and len(said) < 400, said
    for part in parts: assert part in said, said


# ---- digits -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def seeds():
    return [load('digits', seed=s) for s in range(6)]


def test_digits_against_sklearn(seeds):
    "Every image of the whole is in exactly one part, with its own label; the test set holds each of its images in both looks."
    raw = load_digits()
    label = {x.astype(np.uint8).tobytes(): y for x, y in zip(raw.images, raw.target)}
    for s in seeds:
        assert [len(p) for p in s] == [1097, 200, 1000]
        met = []
        for part in s:
            undone = torch.where((part.group == 1)[:, None, None, None], (1 - part.pixels()).transpose(2, 3), part.pixels())
            keys = rows(undone)
            assert [label[k] for k in keys] == part.y.tolist()
            met += keys if part is not s.test else keys[:500]
            if part is s.test: assert keys[:500] == keys[500:]
        assert len(met) == len(set(met)) == 1797 and set(met) == set(label)


def test_no_test_image_is_ever_trained_on(seeds):
    tested = set().union(*(rows(s.test.pixels()) for s in seeds))
    assert len(tested) == 1000
    for s in seeds: assert not tested & (set(rows(s.train.pixels())) | set(rows(s.val.pixels())))
    assert len({frozenset(rows(s.val.pixels())) for s in seeds}) == len(seeds)


def test_minority_moves_with_the_seed(seeds):
    "The same images are in the minority for one seed and in the majority for another, about as often as chance has it."
    minority = [set(rows((1 - s.train.pixels()[s.train.group == 1]).transpose(2, 3))) for s in seeds[:2]]
    assert len(minority[0]) == 110 and len(minority[0] & minority[1]) < 40


def test_shares_are_exact(seeds):
    for share in (0., .05, .1, 1 / 3, .5, 1.):
        s = load('digits', share=share)
        for part in s[:2]:
            for c in range(10):
                group = part.group[part.y == c]
                k = int(group.sum())
                assert abs(k - share * len(group)) <= .5 or (k == 1 and share * len(group) < .5), (share, c)
    assert all(s.test.counts().to_numpy().tolist() == seeds[0].test.counts().to_numpy().tolist() for s in seeds)
    assert seeds[0].test.counts()['majority'].equals(seeds[0].test.counts()['minority'])


def test_normalised_with_training_statistics(seeds):
    for s in seeds:
        raw = s.train.pixels().double()
        for part in s:
            assert abs(part.mean.item() - raw.mean()) < 1e-6 and abs(part.std.item() - raw.std(correction=0)) < 1e-6
        assert abs(s.train.x.double().mean()) < 1e-5 and abs(s.test.x.double().mean()) > .1


def test_nothing_but_the_attribute_tells_the_group(seeds):
    train = seeds[0].train.without_groups()
    assert train.group is None and train.groups is None and train.counts().columns.tolist() == ['all']
    assert all(len(item) == 2 for item in (train[0], seeds[0].train[0], next(iter(DataLoader(seeds[0].train, 7)))))
    group = seeds[0].train.group.double()
    halves = group[:548].mean(), group[549:].mean()
    assert all(.05 < h < .15 for h in halves)             # the minority is neither first nor last


def test_same_seed_same_bytes_in_another_process():
    code = "from rdd_nb.data import load; s = load('digits', shift='colour', seed=3); print(*[p.hash() for p in s])"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env={**os.environ, 'PYTHONHASHSEED': '7'}).stdout.split()
    assert out == [p.hash() for p in load('digits', shift='colour', seed=3)]
    assert out != [p.hash() for p in load('digits', shift='colour', seed=4)]


# ---- splits -------------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), fraction=st.floats(.02, .98), seed=st.integers(0, 99))
def test_stratified_is_within_one_of_the_quota(sizes, fraction, seed):
    strata = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    n = round(fraction * len(strata))
    picked = stratified(strata, n, generator(seed))
    got = strata[picked].bincount(minlength=len(sizes))
    assert len(picked) == len(picked.unique()) == n
    for k, size in zip(got.tolist(), sizes): assert abs(k - n * size / len(strata)) < 1 + 1e-9


@settings(deadline=None, max_examples=25)
@given(n=st.integers(30, 90), pairs=st.integers(0, 8), seed=st.integers(0, 20))
def test_copies_never_fall_apart(n, pairs, seed):
    base = images(n, 3, seed=seed)
    where = torch.randperm(n, generator=generator('pairs', seed))
    base.x[where[:pairs]] = base.x[where[pairs:2 * pairs]]
    s = split(base, val=.2, test=.3, seed=seed)
    assert sum(len(p) for p in s) == n
    assert overlap(s.train, s.val) == overlap(s.train, s.test) == overlap(s.val, s.test) == 0
    assert abs(len(s.test) - .3 * n) <= pairs + 1 and abs(len(s.val) - .2 * n) <= pairs + 1


def test_split_by_class_and_known_group():
    x = torch.rand(200, 1, 4, 4, generator=generator(0))
    given_groups = from_arrays(x, torch.arange(200) % 2, group=(torch.arange(200) % 20 == 0).long(), groups=['many', 'few'])
    s = split(given_groups, val=.1, test=.5)
    assert s.test.counts()['few'].tolist() == [5, 0] and s.train.groups == ['many', 'few']
    one_line(lambda: split(given_groups, shift='minority'), 'already has groups (many, few)')
    one_line(lambda: split(given_groups.without_groups(), test=given_groups, shift='minority'), 'already has groups (many, few)')


def test_given_parts_are_taken_as_they_are():
    whole, test, val = images(60), images(20, seed=1), images(10, seed=2)
    s = split(whole, val=val, test=test, shift='minority', share=.2)
    assert [len(p) for p in s] == [60, 10, 40] and overlap(s.test.subset(s.test.group == 0), test) == 20
    assert s.val.group.sum() == 2 and s.test.mean == s.val.mean == s.train.mean
    one_line(lambda: split(whole, test=images(20, shape=(1, 5, 5))), 'test has samples of shape (1, 5, 5)')
    one_line(lambda: split(whole, val=images(20, classes=4)), 'val has other classes')


@pytest.mark.parametrize('amount', [0, 40, -1, 1., 0., 1.5, True, 'half', float('nan')])
def test_amounts_out_of_range(amount):
    one_line(lambda: split(images(40), val=amount), 'val must be a fraction in (0, 1), a number in 1..39')


def test_a_class_that_ends_up_without_training_samples():
    lonely = from_arrays(torch.rand(10, 1, 4, 4), [0] * 9 + [1])
    one_line(lambda: split(images(40), test=20, val=30), 'val=30 of 40 samples leaves none for training')
    one_line(lambda: split(from_arrays(torch.zeros(40, 1, 4, 4), [0, 1] * 20)), 'test=0.25', 'identical samples stay together')
    one_line(lambda: split(from_arrays(torch.zeros(40, 1, 4, 4), [0, 1] * 20), test=.75), 'test=0.75', 'none for training')
    with pytest.raises(ValueError, match="no training samples are left for class 1 \\('1'\\)"):
        for seed in range(20): split(lonely, val=5, test=4, seed=seed)


def test_overlap_sees_through_normalisation_and_labels():
    a = images(30, 3, (3, 5, 5))
    assert overlap(a, a.renormalise()) == overlap(a.renormalise(.3, .2), a) == 30
    assert overlap(a, a._with(y=a.y.roll(1))) == 30 and overlap(a.subset(slice(0, 7)), a) == 7
    assert overlap(a, images(30, 3, (3, 5, 5), seed=1)) == 0
    assert overlap(from_arrays([[0., 1.], [2., 3.]], [0, 1], normalise=False), from_arrays([[-0., 1.], [5., 5.]], [0, 1], normalise=False)) == 1
    assert overlap(from_arrays(torch.zeros(2, 1, 2, 8), [0, 1]), from_arrays(torch.zeros(2, 1, 4, 4), [0, 1])) == 0


# ---- shifts -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', sorted(set(SHIFTS) - {'long-tail'}))
@pytest.mark.parametrize('shape', [(1, 8, 8), (3, 9, 9)])
def test_two_looks_of_the_same_images(name, shape):
    base = images(60, 3, shape)
    train, val, test = split(base, val=.2, test=.2, shift=name, share=.25)
    n = len(test) // 2
    assert test.group.tolist() == [0] * n + [1] * n and test.y[:n].equal(test.y[n:])
    assert not test.x[:n].equal(test.x[n:]) and 0 <= train.pixels().min() and train.pixels().max() <= 1
    assert train.counts().iloc[:, 1].tolist() == [round(.25 * k) for k in train.y.bincount().tolist()]
    fixed = split(base, val=.2, test=.2, shift=name, share=.25, seed=9).test
    assert torch.allclose(fixed.pixels(), test.pixels(), atol=1e-6)          # every pixel and colour of the test set stays


def test_invert_transpose_is_its_own_inverse():
    x = torch.rand(4, 3, 7, 7)
    assert torch.allclose(invert_transpose(invert_transpose(x)), x, atol=1e-6)
    assert torch.allclose(invert_transpose(x)[2, 1, 5, 3], 1 - x[2, 1, 3, 5])


def test_colour_goes_with_the_class_in_just_so_many():
    s = split(images(400, 4, (1, 6, 6)), shift='colour', share=.1)
    hues = data.class_colours(4)
    for part in (s.train, s.test):
        shade = part.pixels().amax((2, 3))
        nearest = (shade / shade.amax(1, keepdim=True))[:, None].sub(hues[None] / hues.amax(1, keepdim=True)).abs().sum(2).argmin(1)
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
    s = split(base, val=.1, test=.2, shift='long-tail', share=.1)
    kept = s.train.y.bincount().tolist()
    assert kept == [round(70 * .1 ** (c / (classes - 1))) for c in range(classes)]
    assert s.test.y.bincount().tolist() == [20] * classes and overlap(s.train, base) == len(s.train)
    assert s.train.group[s.train.y == 0].eq(0).all() and s.train.group[s.train.y == classes - 1].eq(2).all()
    order = [int(s.test.group[s.test.y == c][0]) for c in range(classes)]
    assert order == sorted(order)
    one_line(lambda: split(base, shift='long-tail', share=0), 'share must be in (0, 1]', 'got 0')


def test_shifts_of_ones_own():
    night = two_looks(lambda x, *_: x * .2, groups=('day', 'night'))
    assert split(images(), shift=night).train.groups == ['day', 'night']
    s = split(images(), shift=lambda x: x.flip(3), share=.5)
    half = len(s.test) // 2
    assert torch.allclose(s.test.x[half:], s.test.x[:half].flip(3)) and s.test.groups == ['majority', 'minority']
    for bad, words in ((lambda x: x[:, :, 1:], 'must keep the shape'), (lambda x: x - 1, 'raw values in [0, 1]'),
                       (lambda x: x / 0, 'raw values in [0, 1]'), (lambda x: x.numpy(), 'got ndarray')):
        one_line(lambda: split(images(), shift=bad), 'shift', words)
    SHIFTS['mirror'] = two_looks(lambda x, *_: x.flip(2))
    try: assert load(shift='mirror').train.group.sum() == 110
    finally: del SHIFTS['mirror']


def test_the_users_arrays_are_left_alone():
    x = np.random.default_rng(0).random((40, 1, 5, 5)).astype('float32')
    kept, base = x.copy(), from_arrays(x, np.arange(40) % 2, normalise=False)
    for shift in (*SHIFTS, None): split(base, shift=shift, share=.5)
    for shift in SHIFTS.values(): shift(base.x, base.y, 2, .5, generator(0))
    base.renormalise().pixels()
    overlap(base, base)
    assert (x == kept).all() and (base.x.numpy() == kept).all()


@pytest.mark.parametrize('share', [-.1, 1.1, float('nan'), float('inf'), '0.1', None, True, 1j])
def test_share_out_of_range(share):
    one_line(lambda: load(share=share), 'share must be a number in [0, 1]', repr(share))


def test_shifts_that_cannot_be():
    table = from_arrays(torch.rand(40, 3), torch.arange(40) % 2)
    for name in ('minority', 'colour', 'blur'): one_line(lambda: split(table, shift=name), name)
    assert split(table, shift='long-tail').train.groups == ['head', 'medium', 'tail']
    one_line(lambda: split(images(shape=(1, 4, 6)), shift='minority'), 'square images', '1 x 4 x 6')
    one_line(lambda: split(images(shape=(2, 4, 4)), shift='colour'), '1 or 3 channels', '(2, 4, 4)')
    one_line(lambda: load(shift='Minority'), "'Minority'", 'minority, colour, blur, long-tail')
    one_line(lambda: load(shift=3), 'shift 3 is unknown')


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_exact_share(sizes, share, seed):
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    chosen = exact_share(y, len(sizes), share, generator(seed))
    for c, n in enumerate(sizes):
        k = int(chosen[y == c].sum())
        assert abs(k - share * n) <= .5 or (n > 1 and k in (1, n - 1)) or n == 1
        if 0 < share < 1 and n > 1: assert 0 < k < n


# ---- the data set -------------------------------------------------------------------------------------------------

def test_hash_changes_with_any_change():
    base = GroupedDataset(torch.rand(4, 1, 2, 8, generator=generator(0)), [0, 1, 0, 1], [0, 0, 1, 1], mean=.5, std=.25)
    nudged = base.x.clone()
    nudged[3, 0, 1, 7] = torch.nextafter(nudged[3, 0, 1, 7], torch.tensor(9.))
    variants = [base, base._with(x=nudged), base._with(x=base.x.view(4, 1, 4, 4)), base._with(x=base.x.flip(0)), base._with(y=base.y.flip(0)),
                base._with(y=base.y.int()), base._with(group=base.group.flip(0)), base.without_groups(), base._with(mean=base.mean + .1),
                base._with(std=base.std * 2), base.subset([0, 1, 2]), base._with(group=base.y, y=base.group)]
    assert len({d.hash() for d in variants}) == len(variants)
    strided = base._with(x=base.x.transpose(2, 3).contiguous().transpose(2, 3))
    assert not strided.x.is_contiguous() and strided.hash() == base.hash() == base._with(name='other', classes=['a', 'b']).hash()


def test_subset_forms_agree():
    d = images(20, 4)
    want = d.x[[1, 3, 5]]
    mask = torch.zeros(20, dtype=torch.bool)
    mask[[1, 3, 5]] = True
    for idx in ([1, 3, 5], torch.tensor([1, 3, 5]), np.array([1, 3, 5]), mask, mask.numpy(), slice(1, 6, 2)): assert d.subset(idx).x.equal(want)
    assert len(d.subset([])) == 0 and len(d.subset(4)) == 1 and d.subset([1]).n_classes == 4
    with pytest.raises(IndexError): d.subset([20])


def test_class_indices_follow_the_part():
    d = images(21, 4)
    assert [d.class_indices(c).tolist() for c in range(4)] == [(d.y == c).nonzero().flatten().tolist() for c in range(4)]
    part = d.subset(d.y > 1)
    assert part.class_indices(0).tolist() == [] and part.class_indices(2).tolist() == (part.y == 2).nonzero().flatten().tolist()


def test_counts_against_a_loop():
    d = GroupedDataset(torch.rand(50, 2), torch.arange(50) % 3, torch.arange(50) % 4, classes=list('abc'), groups=list('wxyz'))
    for c, name in enumerate('abc'):
        for g, group in enumerate('wxyz'): assert d.counts().loc[name, group] == sum(1 for i in range(50) if i % 3 == c and i % 4 == g)


def test_html_escapes_names_and_show_copes():
    d = GroupedDataset(torch.rand(6, 3, 4, 4), [0, 1, 2] * 2, [0, 0, 0, 2, 2, 2], classes=['<script>', '&', 'c'], groups=['a', 'nobody', '<b>'], name='<i>')
    page = d._repr_html_()
    assert '<script>' not in page and '<i>' not in page and '&lt;script&gt;' in page
    import matplotlib
    matplotlib.use('agg')
    assert d.show(5).shape == (3, 5) and d.without_groups().show(2).shape == (1, 2) and images(shape=(2, 4, 4)).show(3).shape == (1, 3)
    one_line(lambda: from_arrays(torch.rand(4, 3), [0, 1, 0, 1]).show(), '3 columns')


def test_statistics_are_exact_enough():
    x = torch.rand(500, 3, 6, 6, generator=generator(3)) * torch.tensor([1., 1e-3, 1e3]).view(1, 3, 1, 1) + torch.tensor([0., 5, -70]).view(1, 3, 1, 1)
    mean, std = channel_stats(x)
    exact = x.double().transpose(0, 1).flatten(1)
    assert np.allclose(mean, exact.mean(1), rtol=2e-6) and np.allclose(std, exact.std(1, correction=0), rtol=2e-4)
    assert channel_stats(torch.full((7, 2), .1))[1] == [1., 1.] and channel_stats(torch.tensor([[1e-9], [3e-9]]))[1] == [1e-9]


def test_arrays_in_every_form():
    rgb = np.random.default_rng(0).integers(0, 256, (12, 7, 5, 3), dtype=np.uint8)
    y = np.arange(12, dtype=np.uint16) % 3
    want = torch.from_numpy(rgb.transpose(0, 3, 1, 2) / 255.).float()
    frozen = rgb.copy()
    frozen.flags.writeable = False
    for x, last in ((rgb, True), (torch.from_numpy(rgb), True), (frozen, True), (rgb[::-1][::-1], True), (rgb / 255, True),
                    (rgb.transpose(0, 3, 1, 2), False), (want.double(), False), (want.clone().requires_grad_(), False)):
        for labels in (y, y.tolist(), torch.from_numpy(y.astype('int32'))):
            d = from_arrays(x, labels, channels_last=last)
            assert torch.allclose(d.pixels(), want, atol=1e-6) and d.y.tolist() == y.tolist() and not d.x.requires_grad
    assert from_arrays(rgb[..., 0], y).x.shape == (12, 1, 7, 5) and from_arrays(rgb[..., :1], y, channels_last=True).x.shape == (12, 1, 7, 5)
    table = from_arrays(np.arange(24).reshape(12, 2) * 1000, y)
    assert torch.allclose(table.pixels(), torch.arange(24.).view(12, 2) * 1000, rtol=1e-5) and table.x.std() < 1.1


def test_from_torch_takes_what_torchvision_gives():
    rgb = np.random.default_rng(0).integers(0, 256, (9, 7, 5, 3), dtype=np.uint8)
    pil = [(Image.fromarray(x), i % 3) for i, x in enumerate(rgb)]
    want = torch.from_numpy(rgb.transpose(0, 3, 1, 2) / 255.).float()
    tensors = TensorDataset(want, torch.arange(9) % 3)
    for source, options in ((pil, {}), (tensors, {}), (Subset(tensors, range(9)), {}), ([(x, np.int64(i % 3)) for i, x in enumerate(rgb)], dict(channels_last=True)),
                            ([(transforms.ToTensor()(x), y, 'more') for x, y in pil], {})):
        assert torch.allclose(from_torch(source, normalise=False, **options).x, want, atol=1e-6)
    assert from_torch([(im.convert('L'), y) for im, y in pil]).x.shape[1] == 1 and from_torch([(im.convert('RGBA'), y) for im, y in pil]).x.shape[1] == 3
    assert from_torch(tensors, group=[0, 1, 2] * 3, groups=list('abc')).counts().loc['1', 'b'] == 3


# ---- bad input ----------------------------------------------------------------------------------------------------

class Stream(IterableDataset):
    def __iter__(self): return iter([])


x8 = torch.rand(6, 1, 8, 8, generator=generator('x8'))
y8 = [0, 1, 2, 0, 1, 2]


def spoilt(value):
    x = x8.clone()
    x[4, 0, 3, 3] = value
    return x


@pytest.mark.parametrize('make, words', [
    (lambda: from_arrays(spoilt(float('nan')), y8), ('NaN', 'sample 4')),
    (lambda: from_arrays(spoilt(float('inf')), y8), ('infinity', 'sample 4')),
    (lambda: from_arrays(spoilt(float('-inf')), y8), ('infinity',)),
    (lambda: from_arrays(spoilt(1.5), y8), ('1.5', '[0, 1]')),
    (lambda: from_arrays(spoilt(-.1), y8), ('-0.1', '[0, 1]')),
    (lambda: from_arrays(torch.tensor([[1., float('nan')], [1, 2]]), [0, 1]), ('NaN', 'sample 0')),
    (lambda: from_arrays(x8.mul(255).long(), y8), ('int64', 'uint8')),
    (lambda: from_arrays(x8[0, 0, 0], y8), ('(8,)',)),
    (lambda: from_arrays(x8[None], y8), ('(1, 6, 1, 8, 8)',)),
    (lambda: from_arrays(x8[:0], []), ('(0, 1, 8, 8)',)),
    (lambda: from_arrays([[1, 2], [3]], [0, 1]), ('x must be an array', 'list')),
    (lambda: from_arrays('photos', [0, 1]), ('x must be an array', 'str')),
    (lambda: from_arrays(None, [0, 1]), ('x must be an array', 'NoneType')),
    (lambda: from_arrays(torch.zeros(6, 8, 8, 3), y8), ('channels_last=True', '(6, 8, 8, 3)')),
    (lambda: from_arrays(torch.zeros(6, 3, 8, 8), y8, channels_last=True), ('channels_last=False',)),
    (lambda: from_arrays(x8, y8[:5]), ('y has shape (5,)', '6 samples')),
    (lambda: from_arrays(x8, [[i] for i in y8]), ('y has shape (6, 1)',)),
    (lambda: from_arrays(x8, [1, 2, 3] * 2), ('0..C-1', '[1, 2, 3]')),
    (lambda: from_arrays(x8, [0, 2, 5] * 2), ('0..C-1', '[0, 2, 5]')),
    (lambda: from_arrays(x8, [0, -1, 1] * 2), ('0..C-1', '[-1, 0, 1]')),
    (lambda: from_arrays(x8, [0, 1, 10 ** 15] * 2), ('0..C-1', '1000000000000000')),
    (lambda: from_arrays(x8, [0., 1., 2.] * 2), ('y has dtype float64',)),
    (lambda: from_arrays(x8, ['cat', 'dog', 'owl'] * 2), ('y must be 6 integers',)),
    (lambda: from_arrays(x8, [True, False, True] * 2), ('y has dtype bool',)),
    (lambda: from_arrays(x8, None), ('y must be 6 integers', 'NoneType')),
    (lambda: from_arrays(x8, y8, classes=['a', 'b']), ('y must lie in 0..1, got 2',)),
    (lambda: from_arrays(x8, y8, classes=['a', 'b', 'c', 'd']), ("class 3 ('d')",)),
    (lambda: from_arrays(x8, y8, group=[0, 1]), ('group has shape (2,)',)),
    (lambda: from_arrays(x8, y8, group=[0, 1, 2] * 2, groups=['a', 'b']), ('group must lie in 0..1, got 2',)),
    (lambda: from_arrays(x8, y8, group=[0, 0, -3] * 2), ('group must lie in', 'got -3')),
    (lambda: from_arrays(x8, y8, group=[0, 0, 10 ** 15] * 2), ('group must lie in', 'got 1000000000000000')),
    (lambda: GroupedDataset(x8, y8, std=0.), ('std must be positive', '0.0')),
    (lambda: GroupedDataset(x8, y8, mean=[1., 2.]), ('1 or 1 numbers, got 2',)),
    (lambda: GroupedDataset(x8.mul(255).byte(), y8), ('uint8', 'from_arrays')),
    (lambda: from_torch(Stream()), ('map-style', 'Stream')),
    (lambda: from_torch(iter([])), ('map-style',)),
    (lambda: from_torch([]), ('empty',)),
    (lambda: from_torch([(x8[0], 0), (x8[1], 'one')]), ('dataset[1]', 'integer label')),
    (lambda: from_torch([x8[0]]), ('dataset[0]', 'integer label')),
    (lambda: from_torch([(x8[0], 0), (x8[1, :, :5], 1)]), ('dataset[1]', '(1, 5, 8)', '(1, 8, 8)')),
    (lambda: from_torch([(x - .5, i % 2) for i, x in enumerate(x8)]), ('not normalised',)),
    (lambda: load('mnits'), ("'mnits'", 'digits, mnist, fashion-mnist, cifar10, cifar100, svhn')),
    (lambda: load(None), ('None is unknown',)),
    (lambda: load(['digits']), ("['digits'] is unknown",)),
    (lambda: load(size=0), ('size', '0')),
    (lambda: load(val=5000), ('val must be', '5000')),
    (lambda: load('mnist', test=.5), ('test=0.5', 'mnist has a test set of its own')),
])
def test_bad_input(make, words):
    one_line(make, *words)


# ---- folders of images --------------------------------------------------------------------------------------------

def write_folder(root, sizes=((8, 8),) * 6, mode='RGB', classes=('ant', 'bee')):
    rng = np.random.default_rng(0)
    for i, (h, w) in enumerate(sizes):
        path = Path(root, classes[i % len(classes)], f'{i:03}.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).convert(mode).save(path)
    return Path(root)


def test_folder_round_trip(tmp_path):
    d = split(images(60, 3, (3, 8, 8))._with(classes=['x', 'y', 'z']), val=.2, test=.2)
    for part, name in zip(d, d._fields):
        for i, pixels in enumerate(part.pixels()):
            path = tmp_path / name / part.classes[part.y[i]] / f'{i:03}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).numpy()).save(path)
    (tmp_path / 'train' / '.ipynb_checkpoints').mkdir()
    back = load(tmp_path, shift=None)
    assert [len(p) for p in back] == [36, 12, 12] and back.test.classes == ['x', 'y', 'z'] and back.train.name == f'{tmp_path.name}/train'
    for was, now in zip(d, back):
        assert overlap(was, now) == len(was) and was.y.bincount().equal(now.y.bincount())
        assert (was.pixels()[was.y.argsort(stable=True)] - now.pixels()).abs().max() <= .5 / 255 + 1e-6
    oracle = tv_datasets.ImageFolder(tmp_path / 'test', transforms.ToTensor())
    assert torch.allclose(back.test.pixels(), torch.stack([x for x, _ in oracle]), atol=1e-6) and back.test.y.tolist() == oracle.targets
    flat = load(str(tmp_path / 'train'), shift='minority', share=.25, val=6, test=12)
    assert [len(p) for p in flat] == [18, 6, 24] and flat.test.groups == ['majority', 'minority']


def test_folder_sizes_and_greys(tmp_path):
    mixed = write_folder(tmp_path / 'mixed', [(8, 8), (8, 8), (12, 9), (8, 20), (30, 31), (16, 16)])
    one_line(lambda: from_folder(mixed), '002.png', '9 x 12 pixels', 'size=')
    assert from_folder(mixed, size=8).x.shape == (6, 3, 8, 8) and from_folder(mixed, size=8, grey=True).x.shape == (6, 1, 8, 8)
    grey = write_folder(tmp_path / 'grey', mode='L')
    assert from_folder(grey).x.shape[1] == 1 and from_folder(grey, grey=False).x.shape[1] == 3
    one_line(lambda: from_folder(mixed, size='8'), "size must be a whole number", "'8'")


def test_bad_folders(tmp_path):
    one_line(lambda: load(tmp_path / 'none'), 'none', 'there is no such folder', error=FileNotFoundError)
    one_line(lambda: load(str(tmp_path / 'none')), 'there is no such folder', error=FileNotFoundError)
    one_line(lambda: load(tmp_path), str(tmp_path), 'no class folders', error=FileNotFoundError)
    (tmp_path / 'a').mkdir()
    one_line(lambda: load(tmp_path), str(tmp_path), 'a', error=FileNotFoundError)
    root = write_folder(tmp_path / 'half')
    (root / 'wasp').mkdir()
    one_line(lambda: load(root), 'wasp', error=FileNotFoundError)
    (root / 'wasp' / 'fake.png').write_bytes(b'\x89PNG\r\n\x1a\n not really')
    one_line(lambda: load(root), 'fake.png', 'not a readable image')
    whole = (root / 'ant' / '000.png').read_bytes()
    (root / 'wasp' / 'fake.png').write_bytes(whole[:len(whole) // 2])
    one_line(lambda: load(root), 'fake.png', 'not a readable image')
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(root / 'wasp' / 'fake.png')
    one_line(lambda: load(root), 'fake.png', '8 bits')
    file = root / 'ant' / '000.png'
    one_line(lambda: load(file), 'is not a folder', error=FileNotFoundError)
    write_folder(tmp_path / 'two' / 'train')
    write_folder(tmp_path / 'two' / 'test', classes=('ant', 'moth'))
    one_line(lambda: load(tmp_path / 'two'), "'moth'", 'training')
    one_line(lambda: load(tmp_path / 'two', test=.5), 'test=0.5', 'test set of its own')


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_folder_without_permission(tmp_path):
    root = write_folder(tmp_path / 'closed')
    root.chmod(0)
    try:
        one_line(lambda: load(root), 'closed', 'permission denied')
        one_line(lambda: load('mnist', root=root), 'closed', 'permission denied')
    finally: root.chmod(0o755)
    inner = root / 'ant' / '000.png'
    inner.chmod(0)
    try: one_line(lambda: load(root), '000.png', 'not a readable image')
    finally: inner.chmod(0o644)


# ---- torchvision's sets -------------------------------------------------------------------------------------------

def idx(path, array):
    "A file in the format of MNIST."
    head = bytes([0, 0, 8, array.ndim]) + b''.join(n.to_bytes(4, 'big') for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def tiny_mnist(root, folder='MNIST', n=200):
    rng = np.random.default_rng(0)
    for part, k in (('train', n), ('t10k', n // 2)):
        idx(root / folder / 'raw' / f'{part}-images-idx3-ubyte', rng.integers(0, 256, (k, 28, 28)))
        idx(root / folder / 'raw' / f'{part}-labels-idx1-ubyte', np.arange(k) % 10)
    return root


def test_torchvision_layout(tmp_path):
    root = tiny_mnist(tmp_path)
    s = load('mnist', root=root, cache=tmp_path / 'cache')
    assert [len(p) for p in s] == [180, 20, 200] and not (tmp_path / 'cache').exists()
    oracle = tv_datasets.MNIST(root, train=False, transform=transforms.ToTensor())
    assert torch.allclose(s.test.pixels()[:100], torch.stack([x for x, _ in oracle]), atol=1e-6) and s.test.y[:100].tolist() == [y for _, y in oracle]
    assert load('mnist', root=root, size=14, shift='colour', cache=tmp_path / 'cache').train.x.shape[1:] == (3, 14, 14)


def test_torchvision_absent_or_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv('RDD_NB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('RDD_NB_DATA', raising=False)
    one_line(lambda: load('mnist'), 'mnist', 'MNIST/raw', 'download=True', 'RDD_NB_DATA', error=FileNotFoundError)
    one_line(lambda: load('cifar10', root=tmp_path), 'cifar-10-batches-py', str(tmp_path), 'download=True', error=FileNotFoundError)
    one_line(lambda: load('mnist', root=tmp_path / 'no'), "root", 'no such folder', error=FileNotFoundError)
    monkeypatch.setenv('RDD_NB_DATA', str(tmp_path / 'gone'))
    one_line(lambda: load('mnist'), 'RDD_NB_DATA', 'gone', 'no such folder', error=FileNotFoundError)
    raw = tiny_mnist(tmp_path / 'torn') / 'MNIST' / 'raw'
    whole = (raw / 'train-images-idx3-ubyte').read_bytes()
    for torn in (whole[:1000], whole[:3], b'', b'<html>not found</html>'):
        (raw / 'train-images-idx3-ubyte').write_bytes(torn)
        one_line(lambda: load('mnist', root=tmp_path / 'torn'), 'mnist', 'incomplete or damaged', 'torn')
    (raw / 'train-images-idx3-ubyte').unlink()
    one_line(lambda: load('mnist', root=tmp_path / 'torn'), 'mnist', 'incomplete or damaged', 'torn')
    (tmp_path / 'cifar-10-batches-py').mkdir()
    one_line(lambda: load('cifar10', root=tmp_path), 'cifar10', 'incomplete or damaged')


def test_packed_folder_is_unpacked_once_into_the_cache(tmp_path):
    packed, cache = tmp_path / 'packed', tmp_path / 'cache'
    (packed / 'mnist').mkdir(parents=True)
    made = tiny_mnist(tmp_path / 'made')
    script = packed / 'unpack.py'
    script.write_text(f'import shutil, sys\nassert sys.argv[2:] == ["mnist"]\nshutil.copytree({str(made / "MNIST")!r}, sys.argv[1] + "/MNIST")\n')
    assert data_root('mnist', packed, cache=cache) == cache and len(load('mnist', root=packed, cache=cache).train) == 180
    assert sorted(p.name for p in cache.iterdir()) == ['MNIST'] and sorted(p.name for p in packed.iterdir()) == ['mnist', 'unpack.py']
    script.write_text('raise SystemExit("must not run again")')
    assert len(load('mnist', root=packed, cache=cache).train) == 180
    script.write_text('import sys, pathlib\npathlib.Path(sys.argv[1], "MNIST").mkdir()\nraise ValueError("md5 is wrong")')
    one_line(lambda: load('mnist', root=packed, cache=tmp_path / 'other'), 'unpack.py failed', 'md5 is wrong')
    assert not list((tmp_path / 'other').iterdir())
    one_line(lambda: load('svhn', root=packed, cache=cache), 'svhn', 'train_32x32.mat', error=FileNotFoundError)
    (tmp_path / 'file').write_text('')
    one_line(lambda: load('mnist', root=packed, cache=tmp_path / 'file'), 'mnist', 'cache=')


def test_download_that_fails(tmp_path, monkeypatch):
    def offline(self): raise OSError('no route to host\nsecond line')
    monkeypatch.setattr(tv_datasets.MNIST, 'download', offline)
    one_line(lambda: load('mnist', root=tmp_path, download=True), 'could not be downloaded', 'no route to host')


@pytest.mark.skipif(not DATA, reason='set RDD_NB_DATA to a folder with MNIST, Fashion-MNIST and CIFAR-10 to test them')
@pytest.mark.parametrize('name, loader, shape', [('mnist', 'MNIST', (1, 28, 28)), ('fashion-mnist', 'FashionMNIST', (1, 28, 28)), ('cifar10', 'CIFAR10', (3, 32, 32))])
def test_real_sets(name, loader, shape):
    s = load(name, shift=None)
    assert s.train.x.shape[1:] == shape and len(s.test) == 10000 and len(s.train) == 9 * len(s.val)
    oracle = getattr(tv_datasets, loader)(data_root(name), train=False, transform=transforms.ToTensor())
    for i in (0, 1, 4567, 9999):
        x, y = oracle[i]
        assert torch.allclose(s.test.pixels()[i], x, atol=1e-6) and s.test.y[i] == y
    assert overlap(s.train, s.val) == 0 and s.test.classes == [str(c) for c in oracle.classes]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_the_gpu():
    on_cpu, on_gpu = load(), load().train.to('cuda')
    assert on_gpu.hash() == on_cpu.train.hash() and on_gpu.pixels().is_cuda and on_gpu.class_indices(3).is_cuda
    for shift in SHIFTS:
        cpu, gpu = (split(d.without_groups(), shift=shift) for d in (on_cpu.train, on_gpu))
        assert all(a.y.equal(b.y.cpu()) and a.group.equal(b.group.cpu()) and torch.allclose(a.x, b.x.cpu(), atol=.05) for a, b in zip(cpu, gpu)), shift
    assert on_gpu.subset([1, 2]).x.is_cuda and overlap(on_gpu, on_cpu.train) == len(on_gpu)
