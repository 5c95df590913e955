"""Data sets and splits under adversarial input and against simple oracles."""
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

from rdd_nb.core import Cost, generator
from rdd_nb.data import GroupedDataset, channel_stats, found_in, from_arrays, overlap, split, stratified
from rdd_nb.shifts import as_shift


def images(n=40, classes=2, shape=(1, 6, 6), seed=0):
    x = torch.rand(n, *shape, generator=generator('images', seed))
    return from_arrays(x, torch.arange(n) % classes, normalise=False)


def one_line(f, *parts, error=ValueError):
    "`f` raises exactly `error` (None: either of the two that we raise), in one line that contains all `parts`."
    with pytest.raises(error or (ValueError, FileNotFoundError)) as caught: f()
    assert caught.type is error or not error
    said = str(caught.value)
    assert '\n' not in said and len(said) <= 300, said
    for part in parts: assert part in said, said


# ---- splits -------------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(.02, .98), st.integers(0, 99))
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
    few = (torch.arange(200) % 20 == 0).long()
    given_groups = from_arrays(x, torch.arange(200) % 2, few, groups=['many', 'few'])
    s = split(given_groups, val=.1, test=.5)
    assert s.test.counts()['few'].tolist() == [5, 0] and s.train.groups == ['many', 'few']
    minority = as_shift('minority')
    one_line(lambda: split(given_groups, shift=minority), 'already have groups (many, few)')
    blind = given_groups.without_groups()
    one_line(lambda: split(blind, test=given_groups, shift=minority), 'already have groups (many, few)')
    one_line(lambda: split(blind, shift='minority'), 'what as_shift returns', "'minority'")


def test_given_parts_are_taken_as_they_are():
    whole, test, val = images(60), images(20, seed=1), images(10, seed=2)
    s = split(whole, val=val, test=test, shift=as_shift('minority', .2))
    assert [len(p) for p in s] == [60, 10, 40] and overlap(s.test.subset(s.test.group == 0), test) == 20
    assert s.val.group.sum() == 2 and s.test.mean == s.val.mean == s.train.mean
    one_line(lambda: split(whole, test=images(20, shape=(1, 5, 5))), 'test has samples of shape (1, 5, 5)')
    one_line(lambda: split(whole, val=images(20, classes=4)), 'val has other classes')


@pytest.mark.parametrize('amount', [40, -1, 1., 1.5, False, True, 'half', float('nan')])
def test_amounts_out_of_range(amount):
    for part in ('val', 'test'):
        one_line(lambda: split(images(40), **{part: amount}), f'{part} must be a fraction in (0, 1), a number in 1..39')
    one_line(lambda: split(images(40), test=0), 'test must be a fraction')


def test_no_validation_part():
    s = split(images(40), val=0, test=10, shift=as_shift('minority', .2))
    assert [len(p) for p in s] == [30, 0, 20] and s.train.group.sum() == 6 and s.val.groups == s.train.groups


def test_copies_between_given_parts_are_refused():
    whole = images(60)
    test = images(30, seed=1)
    test.x[:26] = whole.x[30:56]
    one_line(lambda: split(whole, test=test), 'test: 26 of its 30 samples also occur in the training data', 'found_in')
    one_line(lambda: split(whole, test=test.renormalise()), 'test: 26 of its 30')           # also after normalisation
    one_line(lambda: split(whole, val=test), 'val: 26 of its 30')
    one_line(lambda: split(images(60, seed=2), val=whole, test=test), 'val: 26 of its 60', 'in the test data')
    clean = whole.subset(~found_in(whole, test))
    assert len(clean) == 34 and overlap(split(clean, test=test).train, test) == 0
    table = from_arrays(torch.arange(40).view(20, 2) % 7, torch.arange(20) % 2)          # people can share a row
    with pytest.warns(UserWarning, match='test: 20 of its 20 samples also occur'): split(table, test=table)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        split(whole, val=images(10, seed=3), test=images(10, seed=4))


def test_a_class_that_ends_up_without_training_samples():
    lonely = from_arrays(torch.rand(10, 1, 4, 4), [0] * 9 + [1])
    one_line(lambda: split(images(40), test=20, val=30), 'val=30 of 40 samples leaves none for training')
    black = from_arrays(torch.zeros(40, 1, 4, 4), [0, 1] * 20)
    one_line(lambda: split(black), 'test=0.25', 'copies stay together')
    one_line(lambda: split(black, test=.75), 'test=0.75', 'none for training')
    with pytest.raises(ValueError, match="no training samples are left for class 1 \\('1'\\)"):
        for seed in range(20): split(lonely, val=5, test=4, seed=seed)


def test_overlap_sees_through_normalisation_and_labels():
    a = images(30, 3, (3, 5, 5))
    assert overlap(a, a.renormalise()) == overlap(a.renormalise(.3, .2), a) == 30
    assert overlap(a, a._with(y=a.y.roll(1))) == 30 and overlap(a.subset(slice(0, 7)), a) == 7
    assert overlap(a, images(30, 3, (3, 5, 5), seed=1)) == 0
    a, b = (from_arrays(rows, [0, 1], normalise=False) for rows in ([[0., 1.], [2., 3.]], [[-0., 1.], [5., 5.]]))
    assert overlap(a, b) == 1
    assert overlap(from_arrays(torch.zeros(2, 1, 2, 8), [0, 1]), from_arrays(torch.zeros(2, 1, 4, 4), [0, 1])) == 0


# ---- the data set -------------------------------------------------------------------------------------------------

def test_hash_changes_with_any_change():
    base = GroupedDataset(torch.rand(4, 1, 2, 8, generator=generator(0)), [0, 1, 0, 1], [0, 0, 1, 1], mean=.5, std=.25)
    nudged = base.x.clone()
    nudged[3, 0, 1, 7] = torch.nextafter(nudged[3, 0, 1, 7], torch.tensor(9.))
    changes = [dict(), dict(x=nudged), dict(x=base.x.view(4, 1, 4, 4)), dict(x=base.x.flip(0)), dict(y=base.y.flip(0)),
               dict(y=base.y.int()), dict(group=base.group.flip(0)), dict(mean=base.mean + .1), dict(std=base.std * 2),
               dict(group=base.y, y=base.group)]
    variants = [base._with(**change) for change in changes] + [base.without_groups(), base.subset([0, 1, 2])]
    assert len({d.hash() for d in variants}) == len(variants)
    strided = base._with(x=base.x.transpose(2, 3).contiguous().transpose(2, 3))
    renamed = base._with(name='other', classes=['a', 'b'])
    assert not strided.x.is_contiguous() and strided.hash() == base.hash() == renamed.hash()


def test_subset_forms_agree():
    d = images(20, 4)
    want = d.x[[1, 3, 5]]
    mask = torch.zeros(20, dtype=torch.bool)
    mask[[1, 3, 5]] = True
    for idx in ([1, 3, 5], torch.tensor([1, 3, 5]), np.array([1, 3, 5]), mask, mask.numpy(), slice(1, 6, 2)):
        assert d.subset(idx).x.equal(want)
    assert len(d.subset([])) == 0 and len(d.subset(4)) == 1 and d.subset([1]).n_classes == 4
    with pytest.raises(IndexError): d.subset([20])


def test_class_indices_follow_the_part():
    d = images(21, 4)
    for c in range(4): assert d.class_indices(c).tolist() == (d.y == c).nonzero().flatten().tolist()
    part = d.subset(d.y > 1)
    assert part.class_indices(0).tolist() == []
    assert part.class_indices(2).tolist() == (part.y == 2).nonzero().flatten().tolist()


def test_counts_against_a_loop():
    d = GroupedDataset(torch.rand(50, 2), torch.arange(50) % 3, torch.arange(50) % 4, list('abc'), list('wxyz'))
    for c, name in enumerate('abc'):
        for g, group in enumerate('wxyz'):
            assert d.counts().loc[name, group] == sum(1 for i in range(50) if i % 3 == c and i % 4 == g)


def test_html_escapes_names_and_show_copes():
    classes, groups = ['<script>', '&', 'c'], ['a', 'nobody', '<b>']
    d = GroupedDataset(torch.rand(6, 3, 4, 4), [0, 1, 2] * 2, [0, 0, 0, 2, 2, 2], classes, groups, name='<i>')
    page = d._repr_html_()
    assert '<script>' not in page and '<i>' not in page and '&lt;script&gt;' in page
    import matplotlib
    matplotlib.use('agg')
    assert len(d.show(5)) == 2 and len(d.without_groups().show(2)) == len(images(shape=(2, 4, 4)).show(3)) == 1
    assert [text.get_text() for text in d.show(2)[1].get_xticklabels()] == ['<script>', '&']
    one_line(lambda: from_arrays(torch.rand(4, 3), [0, 1, 0, 1]).show(), '3 columns')


def test_statistics_are_exact_enough():
    scale, shift = torch.tensor([[1., 1e-3, 1e3], [0., 5, -70]]).view(2, 3, 1, 1)
    x = torch.rand(500, 3, 6, 6, generator=generator(3)) * scale + shift
    mean, std = channel_stats(x)
    exact = x.double().transpose(0, 1).flatten(1)
    assert np.allclose(mean, exact.mean(1), rtol=2e-6) and np.allclose(std, exact.std(1, correction=0), rtol=2e-4)
    assert channel_stats(torch.full((7, 2), .1))[1] == [1., 1.]
    assert channel_stats(torch.tensor([[1e-9], [3e-9]]))[1] == [1e-9]
    for big in (1e20, 1e30, 3e38):                                            # their squares are no float32
        table = from_arrays(torch.tensor([[big], [-big], [big], [-big]]), [0, 1, 0, 1])
        assert table.std.item() == pytest.approx(big, rel=1e-5) and table.x.abs().sub(1).abs().max() < 1e-5


def test_arrays_in_every_form():
    rgb = np.random.default_rng(0).integers(0, 256, (12, 7, 5, 3), dtype=np.uint8)
    y = np.arange(12, dtype=np.uint16) % 3
    want = torch.from_numpy(rgb.transpose(0, 3, 1, 2) / 255.).float()
    frozen = rgb.copy()
    frozen.flags.writeable = False
    lasts = [rgb, torch.from_numpy(rgb), frozen, rgb[::-1][::-1], rgb / 255]
    firsts = [rgb.transpose(0, 3, 1, 2), want.double(), want.clone().requires_grad_()]
    for x, last in [*((x, True) for x in lasts), *((x, False) for x in firsts)]:
        for labels in (y, y.tolist(), torch.from_numpy(y.astype('int32'))):
            d = from_arrays(x, labels, channels_last=last)
            assert torch.allclose(d.pixels(), want, atol=1e-6) and d.y.tolist() == y.tolist() and not d.x.requires_grad
    assert from_arrays(rgb[..., 0], y).x.shape == (12, 1, 7, 5)
    assert from_arrays(rgb[..., :1], y, channels_last=True).x.shape == (12, 1, 7, 5)
    for order in '<>':                                                        # any byte order
        x, a, b = (rgb / 255).astype(f'{order}f8'), y.astype(f'{order}i4'), y.astype(f'{order}i2')
        swapped = from_arrays(x, a, b, channels_last=True)
        assert torch.allclose(swapped.pixels(), want, atol=1e-6) and swapped.group.tolist() == y.tolist()
    table = from_arrays(np.arange(24).reshape(12, 2) * 1000, y)
    assert torch.allclose(table.pixels(), torch.arange(24.).view(12, 2) * 1000, rtol=1e-5) and table.x.std() < 1.1


# ---- bytes --------------------------------------------------------------------------------------------------------

def photos(n=40, classes=2, shape=(3, 6, 6), seed=0):
    pixels = torch.randint(256, (n, *shape), dtype=torch.uint8, generator=generator('photos', seed))
    return from_arrays(pixels, torch.arange(n) % classes)


def test_bytes_and_floats_are_the_same_data():
    "Kept as bytes or as floats: the same samples, statistics, hash, parts and copies."
    d = photos()
    f = from_arrays(d.bytes / 255, d.y)
    assert d.bytes.dtype == torch.uint8 and d._x is None and f.bytes is None
    assert d.mean.equal(f.mean) and d.std.equal(f.std) and d.hash() == f.hash() and overlap(d, f) == 40
    assert d.batch([3, 1]).equal(f.x[[3, 1]]) and d.batch(d.y == 1).equal(f.x[d.y == 1]) and d.batch(5).equal(f.x[5])
    assert d[7][0].equal(f[7][0]) and next(iter(DataLoader(d, 5)))[0].equal(f.x[:5])
    raw = from_arrays(d.bytes / 255, d.y, normalise=False)
    assert [p.hash() for p in split(d, seed=3)] == [p.hash() for p in split(raw, seed=3)]
    assert d._x is None                                     # none of this has converted the whole set
    assert d.subset([4, 2]).x.equal(f.x[[4, 2]]) and d.x.equal(f.x) and d.x is d.x
    assert d.renormalise(.5, .25).x.equal(d.pixels().sub(.5).div(.25)) and d.renormalise().hash() == d.hash()


def test_bytes_stay_bytes_in_memory():
    with Cost() as cost:
        d = photos(20000, 2, (3, 32, 32))
        s = split(d)
    mb = 20000 * 3072 / 2**20
    assert s.train._x is None and cost.peak_mb < 7 * mb, cost.peak_mb / mb     # as floats: 12


# ---- bad input ----------------------------------------------------------------------------------------------------

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
    (lambda: from_arrays(np.array(['a', 'b']), [0, 1]), ('x must be an array', 'ndarray')),
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
    (lambda: from_arrays(x8, ['cat', 'dog', 'owl'] * 2), ('y must be an array of integers', 'list')),
    (lambda: from_arrays(x8, [True, False, True] * 2), ('y has dtype bool',)),
    (lambda: from_arrays(x8, None), ('y must be an array of integers', 'NoneType')),
    (lambda: from_arrays(x8, y8, classes=['a', 'b']), ('y must lie in 0..1, got 2',)),
    (lambda: from_arrays(x8, y8, classes=['a', 'b', 'c', 'd']), ("class 3 ('d')",)),
    (lambda: from_arrays(x8, y8, group=[0, 1]), ('group has shape (2,)',)),
    (lambda: from_arrays(x8, y8, group=[0, 1, 2] * 2, groups=['a', 'b']), ('group must lie in 0..1, got 2',)),
    (lambda: from_arrays(x8, y8, group=[0, 0, -3] * 2), ('group must lie in', 'got -3')),
    (lambda: from_arrays(x8, y8, group=[0, 0, 10 ** 15] * 2), ('group must lie in', 'got 1000000000000000')),
    (lambda: GroupedDataset(x8, y8, std=0.), ('std must be positive', '0.0')),
    (lambda: GroupedDataset(x8, y8, mean=[1., 2.]), ('1 or 1 numbers, got 2',)),
    (lambda: GroupedDataset(x8.mul(255).int(), y8), ('int32', 'uint8 images')),
    (lambda: GroupedDataset(torch.ones(6, 3, dtype=torch.uint8), y8), ('uint8', 'expected floating point')),
    (lambda: from_arrays(np.ma.masked_less(x8.numpy(), .1), y8), ('x is a masked array with', 'fill them')),
    (lambda: from_arrays(x8, np.ma.masked_equal(y8, 2)), ('y is a masked array with 2 values masked',)),
    (lambda: from_arrays((x8 > .5).byte(), y8), ('uint8 with values 0 and 1 only', 'x * 255')),
])
def test_bad_input(make, words):
    one_line(make, *words)
