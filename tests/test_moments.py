"""Moments, characteristic functions and kernel means against their definitions in numpy and finite differences; weights
as copies, the risk at target and distance, bad input."""
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from rdd_nb.core import generator
from rdd_nb.data import GroupedDataset
from rdd_nb.distill import Distiller
from rdd_nb.methods import Method
from rdd_nb.matching import Batch, Clusters, DistributionMatching, within_clusters
from rdd_nb.models import Classifier, make_model
from rdd_nb.moments import CharacteristicMatching, KernelMatching, MomentMatching, feature_spread
from rdd_nb.risk import CVaR, Mean, Risk, TwoLevel

F64 = torch.float64
CLASSES = 3
BIASED = [MomentMatching(), MomentMatching(.3, diagonal=True), CharacteristicMatching(16),
          CharacteristicMatching(16, scale=2., amplitude=.8),
          KernelMatching(), KernelMatching('polynomial', degree=2), KernelMatching('linear')]
MATCHERS = [*BIASED, KernelMatching(unbiased=True)]
every = pytest.mark.parametrize('matcher', MATCHERS, ids=repr)
every_biased = pytest.mark.parametrize('matcher', BIASED, ids=repr)


class Fixed(Risk, names=()):
    "Weights that were written down beforehand."
    def __init__(self, q): self.q = q
    def weights(self, losses, p=None, groups=None): return self.q[groups]


def draw(*shape, seed=0): return torch.randn(shape, generator=generator(seed), dtype=F64)


def smooth_net(d=4):
    body = nn.Sequential(nn.Flatten(), nn.Linear(4, d), nn.Tanh())
    net = Classifier(body, d, CLASSES).double()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()): p.copy_(draw(*p.shape, seed=('net', k)) * .7)
    return net


def problem(sizes=(7, 5, 6), ipc=3):
    y = torch.arange(CLASSES).repeat_interleave(torch.tensor(sizes))
    x = draw(len(y), 4, seed='x') + draw(CLASSES, 4, seed='m')[y]
    sy = torch.arange(CLASSES).repeat_interleave(ipc)
    return smooth_net(), Batch(x, y, draw(len(sy), 4, seed='s'), sy, CLASSES, generator=None)


def clusters_of(batch, k=2):
    return Clusters(batch.y * k + torch.arange(len(batch.y)) % k, torch.arange(CLASSES).repeat_interleave(k))


# Against the definitions, with loops in numpy

def np_distance(m, f, q, g, r, s, t):
    "One cluster: features and weights of both sides, the spread, the frequencies."
    f, q, g, r = (np.asarray(a, dtype=float) for a in (f, q, g, r))
    if isinstance(m, MomentMatching):
        mf, mg = q @ f, r @ g
        cf = sum(w * np.outer(v - mf, v - mf) for w, v in zip(q, f))
        cg = sum(w * np.outer(v - mg, v - mg) for w, v in zip(r, g))
        if m.diagonal: cf, cg = np.diag(cf), np.diag(cg)
        return ((mf - mg)**2).sum() + m.weight / s**2 * ((cf - cg)**2).sum()
    if isinstance(m, CharacteristicMatching):
        a, b = q @ np.exp(1j * f @ t * m.scale / s), r @ np.exp(1j * g @ t * m.scale / s)
        phase = 2 * abs(a) * abs(b) * (1 - np.cos(np.angle(a) - np.angle(b)))
        return (m.amplitude * (abs(a) - abs(b))**2 + (1 - m.amplitude) * phase).mean()
    def k(u, v):
        if m.kernel == 'linear': return u @ v
        if m.kernel == 'polynomial': return (2 * u @ v / s**2 + 1)**m.degree
        return np.mean([np.exp(-((u - v)**2).sum() / (2 * b**2 * s**2)) for b in m.widths])
    def within(f, q):
        if not m.unbiased: return sum(a * b * k(u, v) for a, u in zip(q, f) for b, v in zip(q, f))
        if len(f) == 1: return k(f[0], f[0])
        return sum(q[i] * q[j] * k(f[i], f[j]) for i in range(len(f)) for j in range(len(f))
                   if i != j) / (1 - (q**2).sum())
    return within(f, q) - 2 * sum(a * b * k(u, v) for a, u in zip(q, f) for b, v in zip(r, g)) + within(g, r)


def np_spread(f):
    d = ((f[:, None] - f[None])**2).sum(-1)
    return np.sqrt(d.mean())


@every
@pytest.mark.parametrize('place', [None, 'target', 'distance'])
def test_loss_from_the_definition(matcher, place):
    net, b = problem()
    weights = torch.rand(len(b.y), generator=generator('q'), dtype=F64)
    weights = within_clusters(b.y, CLASSES, weights)
    clusters = Clusters(torch.arange(len(b.y)), b.y) if place == 'target' else clusters_of(b)
    loss, q = matcher.loss(net, dataclasses.replace(b, clusters=clusters),
                           Fixed(weights) if place == 'target' else .5 * Mean() + .5 * CVaR(.3) if place else None,
                           place)
    f, g = (net.features(v).detach().numpy() for v in (b.x, b.sx))
    s, t = np_spread(f), torch.randn(4, getattr(matcher, 'frequencies', 1), generator=generator('frequencies', 0),
                                     dtype=F64).numpy()
    if place == 'distance': ids, owner = clusters.real.numpy(), clusters.owner.numpy()
    else: ids, owner = b.y.numpy(), np.arange(CLASSES)
    distances = []
    for k, c in enumerate(owner):
        mine, own = ids == k, b.sy.numpy() == c
        w = weights.numpy()[mine] if place == 'target' else np.full(mine.sum(), 1 / mine.sum())
        distances.append(np_distance(matcher, f[mine], w, g[own], np.full(own.sum(), 1 / own.sum()), s, t))
    distances = np.array(distances)
    if place == 'distance':
        worst = np.sort(distances)[::-1]
        m = .3 * len(worst)
        tail = (worst[:int(m)].sum() + (m - int(m)) * worst[int(m)]) / m
        expected = CLASSES * (.5 * distances.mean() + .5 * tail)
    else: expected = distances.sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-9)      # equal weights are float32
    assert q.sum().item() == pytest.approx(CLASSES, rel=1e-5)


@every
@pytest.mark.parametrize('place', [None, 'distance'])
def test_gradient_against_finite_differences(matcher, place):
    net, b = problem((4, 3, 3), 2)
    b = dataclasses.replace(b, clusters=clusters_of(b))
    f = lambda s: matcher.loss(net, dataclasses.replace(b, sx=s), CVaR(.5) if place else None, place)[0]
    assert torch.autograd.gradcheck(f, b.sx.clone().requires_grad_(), atol=1e-6)


@every
@settings(max_examples=10)
@given(st.lists(st.integers(0, 6), min_size=4, max_size=4).filter(lambda s: sum(s) > 0), st.integers(0, 3))
def test_batched_equals_cluster_by_cluster(matcher, sizes, seed):
    "Padded blocks, with clusters of all sizes and empty ones, against one call for each cluster."
    net = smooth_net()
    ids = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    ids = ids[torch.randperm(len(ids), generator=generator(seed))]
    x, w = draw(len(ids), 4, seed=seed), within_clusters(ids, 4,
                                                         torch.rand(len(ids), generator=generator(seed), dtype=F64))
    other = draw(8, 4, seed='o')
    oy = torch.arange(4).repeat_interleave(2)
    answer = matcher.statistic(net, other, oy, within_clusters(oy, 4), oy, 4)
    found = matcher.distance(matcher.statistic(net, x, ids, w, ids, 4), answer)
    for k in range(4):
        own = ids == k
        if not own.any(): continue
        one = matcher.statistic(net, x[own], ids[own] * 0, w[own], ids[own] * 0, 1)
        two = matcher.statistic(net, other[2 * k:2 * k + 2], oy[:2] * 0, torch.tensor([.5, .5], dtype=F64),
                                oy[:2] * 0, 1)
        torch.testing.assert_close(found[k:k + 1], matcher.distance(one, two), rtol=1e-8, atol=1e-10)


# What must be zero, and what must not matter

@every_biased
def test_zero_with_zero_slope_where_both_sides_agree(matcher):
    net, b = problem()
    s = b.x.clone().requires_grad_()
    loss, _ = matcher.loss(net, dataclasses.replace(b, sx=s, sy=b.y))
    slope, = torch.autograd.grad(loss, s)
    assert abs(loss.item()) < 1e-12 and slope.abs().max() < 1e-7


@every_biased
def test_never_negative(matcher):
    net, b = problem()
    for seed in range(5): assert matcher.loss(net, dataclasses.replace(b, sx=draw(9, 4, seed=('s', seed))))[0] > 0


def test_unbiased_has_expectation_zero_between_samples_of_one_population():
    plain = Classifier(nn.Flatten(), 2, 1).double()
    zeros = torch.zeros(10, dtype=torch.long)
    found = {}
    for unbiased in (True, False):
        m = KernelMatching(unbiased=unbiased)
        pairs = [[draw(10, 2, seed=(side, k)) for side in 'ab'] for k in range(300)]
        found[unbiased] = torch.stack([m.loss(plain, Batch(x, zeros, s, zeros, 1))[0] for x, s in pairs])
    error = found[True].std() / 300**.5
    assert abs(found[True].mean()) < 4 * error < found[False].mean()


@every
def test_order_of_classes_and_samples(matcher):
    net, b = problem()
    loss = matcher.loss(net, b)[0]
    new = torch.tensor([2, 0, 1])
    order, sorder = (torch.argsort(new[v], stable=True) for v in (b.y, b.sy))
    other = dataclasses.replace(b, x=b.x[order], y=new[b.y][order], sx=b.sx[sorder], sy=new[b.sy][sorder])
    torch.testing.assert_close(matcher.loss(net, other)[0], loss)
    mixed = torch.randperm(9, generator=generator(3))
    torch.testing.assert_close(matcher.loss(net, dataclasses.replace(b, sx=b.sx[mixed], sy=b.sy[mixed]))[0], loss)


@every
def test_uniform_weights_are_the_plain_loss(matcher):
    net, b = problem()
    plain, q = matcher.loss(net, b)
    equal = within_clusters(b.y, CLASSES).double()
    weighted, q2 = matcher.loss(net, dataclasses.replace(b, clusters=Clusters(torch.arange(len(b.y)), b.y)),
                                Fixed(equal), 'target')
    torch.testing.assert_close(plain, weighted); torch.testing.assert_close(q.double(), q2.double())
    torch.testing.assert_close(matcher.loss(net, dataclasses.replace(b, p=equal))[0], plain)


@every_biased
@settings(max_examples=10)
@given(st.lists(st.integers(1, 4), min_size=18, max_size=18))
def test_integer_weights_are_copies(matcher, copies):
    net, b = problem()
    counts = torch.tensor(copies, dtype=F64)
    again = torch.arange(18).repeat_interleave(torch.tensor(copies))
    def distances(x, y, w):
        real = matcher.statistic(net, x, y, within_clusters(y, CLASSES, w), y, CLASSES)
        return matcher.distance(real, matcher.statistic(net, b.sx, b.sy, within_clusters(b.sy, CLASSES), b.sy, CLASSES))
    torch.testing.assert_close(distances(b.x, b.y, counts),
                               distances(b.x[again], b.y[again], torch.ones(len(again), dtype=F64)), rtol=1e-6,
                               atol=1e-9)


@every
def test_the_size_of_the_features_is_of_no_matter_beyond_their_unit(matcher):
    "Features a thousand times as large: the same loss, or a million times as much where it is a squared length."
    net, b = problem()
    wide = smooth_net()
    wide.body = nn.Sequential(wide.body, Times(1000.))
    ratio = matcher.loss(wide, b)[0] / matcher.loss(net, b)[0]
    squared = isinstance(matcher, MomentMatching) or getattr(matcher, 'kernel', '') == 'linear'
    assert ratio.item() == pytest.approx(1e6 if squared else 1., rel=1e-6)


class Times(nn.Module):
    def __init__(self, c): super().__init__(); self.c = c
    def forward(self, x): return self.c * x


def test_linear_kernel_is_distribution_matching():
    net, b = problem()
    torch.testing.assert_close(KernelMatching('linear').loss(net, b)[0], DistributionMatching().loss(net, b)[0])
    torch.testing.assert_close(MomentMatching(1e-12).loss(net, b)[0], DistributionMatching().loss(net, b)[0])


def test_frequencies_are_those_of_the_step():
    net, b = problem()
    m = CharacteristicMatching(8)
    with_stream = lambda k: m.loss(net, dataclasses.replace(b, generator=generator('step', k)))[0].item()
    assert with_stream(1) == with_stream(1) != with_stream(2)
    assert (m.key, m.spread) == (0, 1.)                                     # the matcher itself keeps nothing of a step


@every
def test_settings_are_in_the_text_form(matcher):
    assert repr(eval(repr(matcher))) == repr(matcher)


@every
def test_nothing_flows_into_the_real_side(matcher):
    net, b = problem()
    x, s = b.x.clone().requires_grad_(), b.sx.clone().requires_grad_()
    loss, _ = matcher.loss(net, dataclasses.replace(b, x=x, sx=s))
    gx, gs = torch.autograd.grad(loss, [x, s], allow_unused=True)
    assert gx is None and gs.abs().sum() > 0


@every
def test_extreme_features(matcher):
    "Real samples that are all alike, and an empty cluster: finite loss and gradient."
    net, b = problem()
    s = b.sx.clone().requires_grad_()
    alike = dataclasses.replace(b, x=torch.ones_like(b.x), sx=s,
                                clusters=Clusters(b.y * 2, torch.arange(CLASSES).repeat_interleave(2)))
    for batch in (alike, dataclasses.replace(alike, x=b.x)):
        loss, _ = matcher.loss(net, batch, Mean(), 'distance')
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, s)[0]).all()


# Refusals

def test_one_synthetic_sample_where_two_are_needed():
    net, b = problem(ipc=1)
    for m in (MomentMatching(), KernelMatching(unbiased=True)):
        with pytest.raises(ValueError, match='at least 2 synthetic samples in a class, got 1: choose a larger ipc'):
            m.loss(net, b)
    net, b = problem(ipc=2)
    own = dataclasses.replace(b, clusters=Clusters(b.y * 2 + torch.arange(18) % 2, b.sy, torch.arange(6)))
    for m in (MomentMatching(), KernelMatching(unbiased=True)):
        with pytest.raises(ValueError, match="in a cluster, got 1: choose clustering='kmeans'"):
            m.loss(net, own, CVaR(.5), 'distance')
        m.loss(net, own, CVaR(.5), 'target')
    for m in (CharacteristicMatching(8), KernelMatching()): m.loss(net, own, CVaR(.5), 'distance')


@every
def test_a_network_without_features(matcher):
    _, b = problem()
    with pytest.raises(ValueError, match='Linear has no method features'):
        matcher.loss(nn.Linear(4, CLASSES).double(), b)


@pytest.mark.parametrize('make, message', [
    (lambda: MomentMatching(-1), 'weight=-1'), (lambda: MomentMatching(0), 'weight=0'),
    (lambda: MomentMatching(float('nan')), 'weight=nan'), (lambda: CharacteristicMatching(0), 'frequencies=0'),
    (lambda: CharacteristicMatching(2.5), 'frequencies=2.5'), (lambda: CharacteristicMatching(scale=0), 'scale=0'),
    (lambda: CharacteristicMatching(amplitude=1.2), 'amplitude=1.2'),
    (lambda: KernelMatching('gauss'), 'rbf, polynomial, linear'), (lambda: KernelMatching(widths=()), 'widths=()'),
    (lambda: KernelMatching(widths=(1, 0)), 'widths=0'),
    (lambda: KernelMatching('polynomial', degree=0), 'degree=0')])
def test_settings_that_cannot_be_meant(make, message):
    with pytest.raises(ValueError) as error: make()
    assert message in str(error.value) and '\n' not in str(error.value)


@every
def test_on_a_convnet_in_single_precision(matcher):
    net = make_model('convnet', (1, 8, 8), CLASSES, width=8)
    y = torch.arange(CLASSES).repeat_interleave(10)
    x = torch.randn(30, 1, 8, 8, generator=generator(0))
    s = torch.randn(12, 1, 8, 8, generator=generator(1)).requires_grad_()
    sy = torch.arange(CLASSES).repeat_interleave(4)
    clusters = Clusters(y * 2 + torch.arange(30) % 2, torch.arange(CLASSES).repeat_interleave(2))
    b = Batch(x, y, s, sy, CLASSES, clusters=clusters, generator=generator(2))
    for risk, place in ((None, None), (TwoLevel(Mean(), Mean()), 'target'), (CVaR(.5), 'distance')):
        loss, q = matcher.loss(net, b, risk, place)
        slope, = torch.autograd.grad(loss, s)
        assert torch.isfinite(loss) and torch.isfinite(slope).all() and slope.abs().sum() > 0


@every
@pytest.mark.parametrize('place', [None, 'target', 'distance'])
def test_in_the_loop(matcher, place):
    y = torch.arange(CLASSES).repeat_interleave(8)
    data = GroupedDataset(draw(24, 1, 8, 8).float(), y)
    method = Method(matcher, 'kmeans(2)' if place == 'distance' else None, CVaR(.5) if place else None, place,
                    steps=2, lr=.1, optimizer='adam', network='convnet(width=4)')
    runs = [Distiller(data, method, 2, 0, 'cpu') for _ in range(2)]
    for run in runs: run.step(), run.step()
    assert torch.equal(runs[0].images, runs[1].images) and (runs[0].images - runs[0].initial).abs().max() > .01
