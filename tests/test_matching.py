"""Matching against numpy, finite differences and linear programs; and the two ways in which a risk gets lost:
no gradient, no small clusters."""
import dataclasses

import cvxpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rdd_nb.distill
import rdd_nb.matching
from rdd_nb.coresets import KMeansSelection, class_kmeans_ids
from rdd_nb.kmeans import assign_nearest
from rdd_nb.data import GroupedDataset
from rdd_nb.distill import Distiller
from rdd_nb.clustering import NearestClustering
from rdd_nb.matching import (Batch, Clusters, DistributionMatching, GradientMatching, blocks, class_weights,
                             cluster_gradients, within_clusters)
from rdd_nb.models import Classifier, convnet
from rdd_nb.methods import METHODS, Method, Network, RandomBatch, as_method, idle
from rdd_nb.priors import Pixels
from rdd_nb.risk import CVaR, Mean, Risk, TwoLevel, WorstCase


def clusters_for(kind, risk, place):
    "The clustering, where the risk looks at clusters; anywhere else a method refuses it."
    return kind if risk is not None and (place == 'distance' or risk.needs_groups) else None


def matching_loss(matcher, net, x, y, sizes, sx, sy, risk=None, risk_at=None, clusters=None):
    return matcher.loss(net, Batch(x, y, sx, sy, len(sizes), clusters=clusters), risk, risk_at)

F64 = torch.float64
MATCHERS = [DistributionMatching(), GradientMatching('cosine'), GradientMatching('l2'), GradientMatching('l1')]
MEAN_CVAR = .5 * Mean() + .5 * CVaR(.3)
AT_TARGET = TwoLevel(CVaR(.5), .5 * Mean() + .5 * WorstCase())
IPC, CLASSES, SHAPE = 2, 3, (1, 6, 6)
every_matcher = pytest.mark.parametrize('matcher', MATCHERS, ids=repr)
every_clustering = pytest.mark.parametrize('kind', ['nearest', 'nearest(moving=False)', 'kmeans(3)', 'groups'])


# Small problems

def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def smooth_net(seed=0):
    "A small convolutional network in float64 without kinks."
    body = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.GroupNorm(3, 3), nn.Softplus(), nn.AvgPool2d(2),
                         nn.Flatten())
    net = Classifier(body, 27, CLASSES).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()): p.copy_(draw(*p.shape, seed=100 * seed + i) * .5)
    return net


def linear_net(n_classes=CLASSES, shape=SHAPE, seed=0):
    "Features are the pixels, so that everything can be written down in numpy."
    net = Classifier(nn.Flatten(), int(np.prod(shape)), n_classes).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()): p.copy_(draw(*p.shape, seed=seed + i) * .3)
    return net


def problem(sizes=(7, 5, 3), seed=0):
    "Real samples ordered by class, sizes, synthetic samples."
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    sy = torch.arange(len(sizes)).repeat_interleave(IPC)
    shift = draw(len(sizes), *SHAPE, seed=seed + 1)
    x, s = draw(len(y), *SHAPE, seed=seed + 2), draw(len(sy), *SHAPE, seed=seed + 3)
    return x + shift[y], y, list(sizes), s + shift[sy], sy


def clusters_of(kind, x, y, sx, sy):
    "The four kinds of clusters that a method can ask for; for groups, one that nobody is in."
    own = Clusters(assign_nearest(x, sx if kind == 'nearest' else sx.flip(1) * .5, y, sy)[0], sy, torch.arange(len(sy)))
    if kind in ('nearest', 'nearest(moving=False)'): return own
    if kind == 'kmeans(3)': return Clusters(class_kmeans_ids(x, y, 3, 0), torch.arange(CLASSES).repeat_interleave(3))
    return Clusters(y * 4 + torch.arange(len(y)) % 3, torch.arange(CLASSES).repeat_interleave(4))


def slope(f, at, direction, eps=1e-5): return (f(at + eps * direction) - f(at - eps * direction)) / (2 * eps)


# Gradients

@every_matcher
@every_clustering
@pytest.mark.parametrize('risk, place', [(None, None), (AT_TARGET, 'target'), (MEAN_CVAR, 'distance')],
                         ids=['plain', 'target', 'distance'])
def test_gradient_on_pixels_is_that_of_finite_differences(matcher, kind, risk, place):
    net, (x, y, sizes, sx, sy) = smooth_net(), problem()
    clusters = clusters_of(kind, x, y, sx, sy)
    def loss(s): return matching_loss(matcher, net, x, y, sizes, s, sy, risk, place, clusters)[0]
    s = sx.clone().requires_grad_(True)
    gradient, = torch.autograd.grad(loss(s), s)
    # at least one image of every class is told where to go
    assert (gradient.flatten(1).norm(dim=1) > 1e-8).sum() >= CLASSES
    for k in range(3):
        v = draw(*s.shape, seed=50 + k)
        with torch.no_grad(): expected = slope(loss, sx, v)
        torch.testing.assert_close((gradient * v).sum(), expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize('risk', [Mean(), MEAN_CVAR, AT_TARGET, TwoLevel(Mean(), Mean())], ids=repr)
@every_clustering
def test_gradient_on_the_network_is_that_of_finite_differences(kind, risk, monkeypatch):
    "What `Distiller` does to the network under `risk_at='network'` is a step along the slope of the losses' risk."
    monkeypatch.setattr(rdd_nb.distill, 'make_model', lambda *a, **k: smooth_net())
    x, y, *_ = problem()
    data = GroupedDataset(x.float(), y, group=torch.arange(len(y)) % 2, groups=['a', 'b'])
    run = Distiller(data, Method(GradientMatching(), clusters_for(kind, risk, 'network'), risk, 'network', steps=5,
                                 network=Network(life=5, steps=1, lr=.1, batch=12)), IPC, 0, 'cpu')
    run.x, seen, clusters = run.x.double(), [], run.clusters
    run.stored = Pixels().begin(run.images.double())
    run._network_risk = lambda losses, index: (seen.append(index), Distiller._network_risk(run, losses, index))[1]
    before = [p.detach().clone() for p in run.network.parameters()]
    run._train_network()
    step = [(b - p.detach()) / .1 for b, p in zip(before, run.network.parameters())]
    (index,), net = seen, smooth_net()
    assert len(index) == 12
    ids = clusters(index) if risk.needs_groups else None
    def value(parameters):
        scores = torch.func.functional_call(net, dict(zip(dict(net.named_parameters()), parameters)), (run.x[index],))
        return risk(torch.nn.functional.cross_entropy(scores, run.y[index], reduction='none'), groups=ids)
    for k in range(3):
        v = [draw(*p.shape, seed=10 * k + i) for i, p in enumerate(before)]
        with torch.no_grad():
            up, down = (value([b + e * d for b, d in zip(before, v)]) for e in (1e-5, -1e-5))
            expected = (up - down) / 2e-5
        torch.testing.assert_close(sum((s * d).sum() for s, d in zip(step, v)), expected, rtol=1e-5, atol=1e-8)


# Numpy, written from the papers: features are the pixels, the classifier is a linear softmax

def np_risk(losses, tail):
    "Weights of half mean, half CVaR: the worst first, until the tail is full."
    n, q, left = len(losses), np.zeros(len(losses)), 1.
    for i in np.argsort(-losses):
        q[i] = min(left, 1 / (n * tail))
        left -= q[i]
    return .5 / n + .5 * q


def np_statistic(matcher, net, x, y, weights, clusters, k):
    x, W, b = x.reshape(len(x), -1), net.head.weight.detach().numpy(), net.head.bias.detach().numpy()
    scores = x @ W.T + b
    p = np.exp(scores - scores.max(1, keepdims=True))
    delta = p / p.sum(1, keepdims=True) - np.eye(len(W))[y]
    found = []
    for k in range(k):
        own = np.where(clusters == k)[0]
        w = weights[own][:, None]
        found.append([(w * x[own]).sum(0)] if isinstance(matcher, DistributionMatching)
                     else [(w * delta[own]).T @ x[own], (w * delta[own]).sum(0)])
    return found


def np_distance(matcher, real, synthetic):
    if isinstance(matcher, DistributionMatching): return ((real[0] - synthetic[0]) ** 2).sum()
    if matcher.metric == 'l2': return sum(((a - b) ** 2).sum() for a, b in zip(real, synthetic))
    if matcher.metric == 'l1': return sum(abs(a - b).sum() for a, b in zip(real, synthetic))
    a, b = real[0], synthetic[0]
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return (1 - cosine)[np.abs(a).sum(1) > 0].sum()


def np_distances(matcher, net, x, y, clusters, sx, sy):
    "One distance for each cluster with samples, and the numbers of those clusters."
    equal = lambda ids, k: 1 / np.maximum(np.bincount(ids, minlength=k), 1)[ids]
    k = len(clusters.owner)
    real = np_statistic(matcher, net, x, y, equal(clusters.real.numpy(), k), clusters.real.numpy(), k)
    if clusters.answer is None:
        by_class = np_statistic(matcher, net, sx, sy, equal(sy, CLASSES), sy, CLASSES)
        synthetic = [by_class[c] for c in clusters.owner.tolist()]
    else: synthetic = np_statistic(matcher, net, sx, sy, equal(clusters.answer.numpy(), k), clusters.answer.numpy(), k)
    present = np.unique(clusters.real.numpy())
    return np.array([np_distance(matcher, real[i], synthetic[i]) for i in present]), present


@every_matcher
@every_clustering
def test_value_and_weights_at_the_distance_are_those_of_numpy(matcher, kind):
    net, (x, y, sizes, sx, sy) = linear_net(), problem()
    clusters = clusters_of(kind, x, y, sx, sy)
    loss, q = matching_loss(matcher, net, x, y, sizes, sx.clone().requires_grad_(True), sy, MEAN_CVAR, 'distance',
                            clusters)
    distances, present = np_distances(matcher, net, x.numpy(), y.numpy(), clusters, sx.numpy(), sy.numpy())
    weights = np_risk(distances, .3)
    assert loss.item() == pytest.approx(CLASSES * weights @ distances, rel=1e-6)
    np.testing.assert_allclose(np.bincount(clusters.real, q.numpy(), minlength=len(clusters.owner))[present],
                               CLASSES * weights, rtol=1e-6, atol=1e-12)
    for k in present: assert q[clusters.real == k].unique().numel() == 1      # alike inside a cluster


@every_matcher
@pytest.mark.parametrize('place', [None, 'target'])
def test_value_at_the_target_is_that_of_numpy(matcher, place):
    net, (x, y, sizes, sx, sy) = linear_net(), problem()
    clusters = clusters_of('groups', x, y, sx, sy)
    loss, q = matching_loss(matcher, net, x, y, sizes, sx, sy, MEAN_CVAR, place, clusters)
    if place:
        scores = x.numpy().reshape(len(x), -1) @ net.head.weight.detach().numpy().T + net.head.bias.detach().numpy()
        losses = np.log(np.exp(scores).sum(1)) - scores[np.arange(len(y)), y.numpy()]
        expected = np.concatenate([np_risk(losses[y.numpy() == c], .3) for c in range(CLASSES)])
    else: expected = np.repeat(1 / np.array(sizes), sizes)
    np.testing.assert_allclose(q.numpy(), expected, rtol=1e-6)
    real = np_statistic(matcher, net, x.numpy(), y.numpy(), expected, y.numpy(), CLASSES)
    synthetic = np_statistic(matcher, net, sx.numpy(), sy.numpy(), np.full(len(sy), 1 / IPC), sy.numpy(), CLASSES)
    assert loss.item() == pytest.approx(sum(np_distance(matcher, a, b) for a, b in zip(real, synthetic)), rel=1e-6)


# One cluster at a time, or all at once

@st.composite
def cluster_sizes(draw_): return draw_(st.lists(st.integers(0, 6), min_size=2, max_size=5).filter(lambda s: sum(s) > 0))


def shuffled_clusters(sizes, seed=0):
    ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]


@settings(max_examples=12)
@given(cluster_sizes())
def test_all_clusters_at_once_are_the_clusters_one_by_one(sizes):
    net, clusters = smooth_net(), shuffled_clusters(sizes)
    n, k = len(clusters), len(sizes)
    x, y = draw(n, *SHAPE).requires_grad_(True), torch.arange(n) % CLASSES
    w = within_clusters(clusters, k, torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=F64) + .1)
    by_hand = []
    for c in range(k):
        own = clusters == c
        if own.any():
            value = (w[own] * nn.functional.cross_entropy(net(x[own]), y[own], reduction='none')).sum()
            by_hand.append(torch.autograd.grad(value, list(net.parameters()), create_graph=True))
        else: by_hand.append([torch.zeros_like(p) for p in net.parameters()])
    by_hand = [torch.stack(g) for g in zip(*by_hand)]
    target = [draw(*g.shape, seed=7) for g in by_hand]
    score = lambda gs: sum((g * t).sum() for g, t in zip(gs, target))
    slopes, = torch.autograd.grad(score(by_hand), x)
    for batched in (True, False):
        found = cluster_gradients(net, x, y, w, clusters, k, batched=batched)
        for a, b in zip(found, by_hand): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(score(found), x)[0], slopes, rtol=1e-9, atol=1e-12)
    means, = DistributionMatching().statistic(net, x, y, w, clusters, k)
    features = net.features(x)
    for c in range(k):
        torch.testing.assert_close(means[c], (w[clusters == c, None] * features[clusters == c]).sum(0), rtol=1e-9,
                                   atol=1e-12)


@pytest.mark.parametrize('metric', ['cosine', 'l2', 'l1'])
@pytest.mark.parametrize('kind', ['synthetic', 'groups'])
def test_the_matching_loss_does_not_depend_on_the_strategy(metric, kind, monkeypatch):
    net, (x, y, sizes, sx, sy) = smooth_net(), problem((9, 2, 1))
    clusters, found = clusters_of('groups' if kind == 'groups' else 'nearest', x, y, sx, sy), []
    for batched in (True, False):
        monkeypatch.setattr(rdd_nb.matching, '_batched', lambda *_: batched)
        s = sx.clone().requires_grad_(True)
        for place, risk in (('distance', MEAN_CVAR), ('target', AT_TARGET)):
            loss, q = matching_loss(GradientMatching(metric), net, x, y, sizes, s, sy, risk, place, clusters)
            found += [loss.detach(), q, torch.autograd.grad(loss, s)[0]]
    for a, b in zip(found[:6], found[6:]): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@settings(max_examples=40)
@given(cluster_sizes())
def test_blocks_hold_every_sample_once(sizes):
    clusters = shuffled_clusters(sizes, 3)
    index, mask = blocks(clusters, len(sizes))
    assert index.shape == mask.shape == (len(sizes), max(sizes))
    assert mask.sum(1).tolist() == sizes and sorted(index[mask].tolist()) == list(range(len(clusters)))
    assert all((clusters[i[m]] == c).all() for c, (i, m) in enumerate(zip(index, mask)))


# Where the loss must be zero, and what it must not depend on

@every_matcher
def test_no_distance_where_the_synthetic_samples_are_the_real_ones(matcher):
    net, (x, y, sizes, *_) = smooth_net(), problem()
    s = x.clone().requires_grad_(True)
    alone = Clusters(torch.arange(len(x)), y, torch.arange(len(x)))
    classes = Clusters(y, torch.arange(CLASSES))
    for risk, place, clusters in ((None, None, None), (Mean(), 'target', classes), (MEAN_CVAR, 'distance', alone),
                                  (MEAN_CVAR, 'distance', classes)):
        assert abs(matching_loss(matcher, net, x, y, sizes, s, y, risk, place, clusters)[0].item()) < 1e-5
    # the others have a kink or a division there
    if isinstance(matcher, DistributionMatching) or matcher.metric == 'l2':
        gradient, = torch.autograd.grad(matching_loss(matcher, net, x, y, sizes, s, y, MEAN_CVAR, 'distance',
                                                      alone)[0], s)
        assert gradient.abs().max() < 1e-6
    other = matching_loss(matcher, net, x, y, sizes, (x + .5 * draw(*x.shape, seed=9)), y, MEAN_CVAR, 'distance',
                          alone)[0]
    assert other.item() > 1e-3


@every_matcher
@every_clustering
@pytest.mark.parametrize('risk, place', [(None, None), (AT_TARGET, 'target'), (MEAN_CVAR, 'distance')],
                         ids=['plain', 'target', 'distance'])
def test_order_does_not_matter(matcher, kind, risk, place):
    "Neither that of the classes nor that of samples and clusters."
    net, (x, y, sizes, sx, sy) = smooth_net(), problem()
    clusters = clusters_of(kind, x, y, sx, sy)
    loss, q = matching_loss(matcher, net, x, y, sizes, sx, sy, risk, place, clusters)
    g = torch.Generator().manual_seed(4)
    # new numbers of classes and clusters
    label, name = torch.tensor([2, 0, 1]), torch.randperm(len(clusters.owner), generator=g)
    other = smooth_net()
    with torch.no_grad():
        for p, old in zip(other.head.parameters(), net.head.parameters()): p[label] = old
    mixed = torch.randperm(len(y), generator=g)
    # by new class, shuffled inside
    order = mixed[label[y][mixed].argsort(stable=True)]
    s_order = torch.randperm(len(sy), generator=g)
    renamed = Clusters(name[clusters.real][order], label[clusters.owner][name.argsort()],
                       None if clusters.answer is None else name[clusters.answer][s_order])
    new, new_q = matching_loss(matcher, other, x[order], label[y][order],
                               [sizes[c] for c in label.argsort().tolist()], sx[s_order], label[sy][s_order], risk,
                               place, renamed)
    torch.testing.assert_close(new, loss, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(new_q, q[order], rtol=1e-6, atol=1e-9)


# Weights and copies

class Fixed(Risk, names=()):
    "Weights that are given, one set for each class in turn."
    def __init__(self, weights): self.given = list(weights)
    def weights(self, losses, p=None, groups=None): return self.given.pop(0)


@every_matcher
def test_equal_weights_are_plain_matching(matcher):
    net, (x, y, sizes, sx, sy) = smooth_net(), problem()
    def run(risk, place, clusters=None):
        s = sx.clone().requires_grad_(True)
        loss, q = matching_loss(matcher, net, x, y, sizes, s, sy, risk, place, clusters)
        return loss.detach(), torch.autograd.grad(loss, s)[0], q.double()
    plain, groups = run(None, None), clusters_of('groups', x, y, sx, sy)
    for risk, place, clusters in ((Mean(), 'target', groups),
                                  (TwoLevel(Mean(), Mean(), 'proportional'), 'target', groups),
                                  (Fixed([torch.full((s,), 1 / s) for s in sizes]), 'target', groups),
                                  (Mean(), 'distance', Clusters(y, torch.arange(CLASSES)))):
        for a, b in zip(run(risk, place, clusters), plain): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    for a, b in zip(run(CVaR(.4), 'target', groups)[:2], plain): assert not torch.allclose(a, b, rtol=1e-2)


@every_matcher
@settings(max_examples=8)
@given(copies=st.lists(st.integers(0, 4), min_size=15, max_size=15)
       .filter(lambda c: sum(c[:7]) and sum(c[7:12]) and sum(c[12:])))
def test_whole_weights_are_copies(matcher, copies):
    net, (x, y, sizes, sx, sy) = smooth_net(), problem()
    copies = torch.tensor(copies)
    again = torch.arange(len(y)).repeat_interleave(copies)
    weights = copies.double()
    q = [w / w.sum() for w in weights.split(sizes)]
    def run(x, y, sizes, risk, place):
        s = sx.clone().requires_grad_(True)
        loss, _ = matching_loss(matcher, net, x, y, sizes, s, sy, risk, place, Clusters(y, torch.arange(CLASSES)))
        return loss.detach(), torch.autograd.grad(loss, s)[0]
    weighted = run(x, y, sizes, Fixed(q), 'target')
    copied = run(x[again], y[again], torch.bincount(y[again], minlength=CLASSES).tolist(), None, None)
    for a, b in zip(weighted, copied): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    # clusters for the statistic itself
    ids = torch.arange(len(y)) % 4
    one = matcher.statistic(net, x, y, within_clusters(ids, 4, weights), ids, 4)
    equal = within_clusters(ids[again], 4, torch.ones(len(again), dtype=F64))
    two = matcher.statistic(net, x[again], y[again], equal, ids[again], 4)
    for a, b in zip(one, two): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@settings(max_examples=40)
@given(cluster_sizes(), st.integers(0, 5))
def test_weights_inside_clusters_add_up_to_one(sizes, seed):
    clusters = shuffled_clusters(sizes, seed)
    for weights in (None, torch.rand(len(clusters), generator=torch.Generator().manual_seed(seed))):
        total = torch.zeros(len(sizes)).index_add_(0, clusters, within_clusters(clusters, len(sizes), weights))
        assert all(t == pytest.approx(float(s > 0), abs=1e-5) for t, s in zip(total.tolist(), sizes))
    # a cluster without weight: no NaN
    assert (within_clusters(clusters, len(sizes), torch.zeros(len(clusters))) == 0).all()


# The adversary against linear programs

def solve(variables, objective, constraints):
    exact = dict(tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    cvxpy.Problem(cvxpy.Maximize(objective), constraints).solve(solver=cvxpy.CLARABEL, **exact)
    return variables.value


def losses_of(net, x, y):
    with torch.no_grad(): return nn.functional.cross_entropy(net(x), y, reduction='none')


@pytest.mark.parametrize('tail', [.1, .37, .5, 1.])
def test_cvar_weights_at_the_target_solve_the_linear_program(tail):
    net, (x, y, sizes, *_) = smooth_net(), problem((11, 8, 1))
    q = class_weights(net, Batch(x, y, x, y, CLASSES, clusters=Clusters(y, torch.arange(CLASSES))), CVaR(tail))
    for l, found in zip(losses_of(net, x, y).split(sizes), q.split(sizes)):
        v = cvxpy.Variable(len(l), nonneg=True)
        expected = solve(v, v @ l.numpy(), [cvxpy.sum(v) == 1, v <= 1 / (len(l) * tail)])
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize('tail', [.3, .5, 1.])
def test_two_level_weights_at_the_target_solve_the_linear_program(tail):
    "CVaR inside clusters, then half the mean and half the maximum over the clusters: Eq. 2 of the paper."
    net, (x, y, sizes, sx, sy) = smooth_net(), problem((11, 8, 4))
    clusters = clusters_of('groups', x, y, sx, sy)
    q = class_weights(net, Batch(x, y, x, y, CLASSES, clusters=clusters),
                      TwoLevel(CVaR(tail), .5 * Mean() + .5 * WorstCase()))
    for l, ids, found in zip(losses_of(net, x, y).split(sizes), clusters.real.split(sizes), q.split(sizes)):
        present = ids.unique().tolist()
        v, r = cvxpy.Variable(len(l), nonneg=True), cvxpy.Variable(len(present), nonneg=True)
        rules = [cvxpy.sum(r) == 1]
        for j, k in enumerate(present):
            own = np.where(ids.numpy() == k)[0]
            mass = .5 / len(present) + .5 * r[j]
            rules += [cvxpy.sum(v[own]) == mass, v[own] <= mass / (len(own) * tail)]
        np.testing.assert_allclose(found.numpy(), solve(v, v @ l.numpy(), rules), atol=1e-6)


@every_matcher
def test_weights_over_the_distances_solve_the_linear_program(matcher):
    net, (x, y, sizes, sx, sy) = linear_net(), problem()
    clusters = clusters_of('kmeans(3)', x, y, sx, sy)
    loss, q = matching_loss(matcher, net, x, y, sizes, sx, sy, CVaR(.35), 'distance', clusters)
    distances, present = np_distances(matcher, net, x.numpy(), y.numpy(), clusters, sx.numpy(), sy.numpy())
    v = cvxpy.Variable(len(present), nonneg=True)
    expected = solve(v, v @ distances, [cvxpy.sum(v) == 1, v <= 1 / (len(present) * .35)])
    np.testing.assert_allclose(np.bincount(clusters.real, q.numpy(),
                                           minlength=len(clusters.owner))[present] / CLASSES, expected, atol=1e-6)
    assert loss.item() == pytest.approx(CLASSES * expected @ distances, rel=1e-6)


# The released code's two mistakes, end to end through `Distiller.step`: a risk without gradient, and small clusters
# that are dropped

RARE = 3.      # how far the one rare sample of each class is from the others
PLACES = {'target': (GradientMatching('l2'), .05), 'distance': (DistributionMatching(), .1)}


def rare_data(n=24, rare=RARE):
    "Two classes; the first sample of each is the only one of its kind."
    y = torch.arange(2).repeat_interleave(n)
    x = draw(2 * n, *SHAPE, seed=1) * .3 + draw(2, *SHAPE, seed=2)[y]
    group = torch.zeros_like(y)
    for i in (0, n):
        x[i] += rare * draw(*SHAPE, seed=3)
        group[i] = 1
    return GroupedDataset(x.float(), y, group=group, groups=['many', 'one'])


def first_step(monkeypatch, data, risk, place, kind, ipc=3):
    "A `Distiller` with the linear network after one step, and its images before."
    monkeypatch.setattr(rdd_nb.distill, 'make_model', lambda *a, **k: linear_net(2).float())
    matcher, lr = PLACES.get(place, PLACES['target'])
    network = Network(life=10, steps=1, batch=1000) if place == 'network' else Network()
    method = Method(matcher, clusters_for(kind, risk, place), risk, place if risk else None, steps=10, lr=lr,
                    batch=RandomBatch(1000), network=network)
    run = Distiller(data, method, ipc, 0, 'cpu')
    before = run.images.detach().clone()
    run.step()
    return run, before


def np_matching_loss(run, data, images, risk_weights, place):
    "The loss that `Distiller.step` should go down, from the definition, in numpy float64."
    net, y, sy, m = linear_net(2), data.y.numpy(), run.sy.numpy(), run.method
    x, s = data.x.double().numpy(), images.reshape(len(sy), -1)
    if m.clustering != NearestClustering(): ids = run.clusters(torch.arange(len(y))).numpy()
    else: ids = assign_nearest(data.x, run.initial, data.y, run.sy)[0].numpy()
    class_equal = lambda labels: 1 / np.bincount(labels)[labels]
    if place == 'target':
        q = np.concatenate([risk_weights(None, ids[y == c]) for c in range(2)])
        real = np_statistic(m.objective, net, x, y, q, y, 2)
        synthetic = np_statistic(m.objective, net, s, sy, class_equal(sy), sy, 2)
        return sum(np_distance(m.objective, a, b) for a, b in zip(real, synthetic))
    answer = np.arange(len(sy)) if isinstance(m.clustering, NearestClustering) else None
    distances = []
    for k in np.unique(ids):
        own, mine = ids == k, sy == run.assigned.owner[k].item() if answer is None else answer == k
        distances.append(((x[own].reshape(own.sum(), -1).mean(0) - s[mine].mean(0)) ** 2).sum())
    distances = np.array(distances)
    return 2 * risk_weights(distances, None) @ distances


def over_clusters(losses, ids):
    "TwoLevel(Mean, Mean) for samples with ids, or half mean, half CVaR(.3) for distances."
    if ids is None: return np_risk(losses, .3)
    present, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    return 1 / (len(present) * counts[inverse])


@every_clustering
@pytest.mark.parametrize('place, risk', [('target', TwoLevel(Mean(), Mean())), ('distance', MEAN_CVAR)])
def test_the_risk_reaches_the_pixels(monkeypatch, place, risk, kind):
    "The step's gradient is the slope of the loss with the risk, as numpy has it, and not that of plain matching."
    data = rare_data()
    run, before = first_step(monkeypatch, data, risk, place, kind)
    # plain SGD: the first step has no momentum yet
    step = ((before - run.images.detach()) / run.method.lr).double().numpy()
    f = lambda s: np_matching_loss(run, data, s, over_clusters, place)
    at, scale = before.double().numpy(), np.abs(step).max()
    assert scale > 1e-4
    rng = np.random.default_rng(0)
    for _ in range(4):
        v = rng.standard_normal(at.shape)
        expected = (f(at + 1e-5 * v) - f(at - 1e-5 * v)) / 2e-5
        assert (step * v).sum() == pytest.approx(expected, rel=1e-3, abs=1e-3 * np.sqrt((step ** 2).sum()))
    plain, before = first_step(monkeypatch, data, None, place, kind)
    plain_step = ((before - plain.images.detach()) / plain.method.lr).double().numpy()
    assert np.linalg.norm(step - plain_step) > .1 * np.linalg.norm(plain_step)


def test_the_risk_reaches_the_network(monkeypatch):
    "Under `risk_at='network'` the network moves elsewhere than under the mean; the images move as in plain matching."
    moved, images = {}, {}
    for risk in (TwoLevel(Mean(), Mean()), Mean()):
        run, before = first_step(monkeypatch, rare_data(), risk, 'network', 'groups')
        moved[repr(risk)] = torch.cat([(p - q).flatten() for p,
                                       q in zip(run.network.parameters(), linear_net(2).float().parameters())]).detach()
        images[repr(risk)] = run.images.detach() - before
    one, two = moved.values()
    assert two.norm() > 1e-4 and (one - two).norm() > .1 * two.norm()
    assert torch.equal(*images.values())                                            # it has no say in what is matched


@every_clustering
@pytest.mark.parametrize('place', ['network', 'target'])
def test_a_cluster_of_one_counts_as_much_as_one_of_many(monkeypatch, place, kind):
    "Uniform over clusters: each cluster with samples gets the same weight, also the one with a single rare sample."
    data = rare_data()
    run, _ = first_step(monkeypatch, data, TwoLevel(Mean(), Mean()), place, kind)
    # the network is trained after the images have moved, the target is made before
    moved = kind == 'nearest' and place == 'target'
    ids = assign_nearest(data.x, run.initial, data.y, run.sy)[0] if moved else run.clusters(torch.arange(len(data)))
    counts = torch.bincount(ids, minlength=len(run.assigned.owner))
    if place == 'target': assert counts[ids[0]] == counts[ids[24]] == 1                 # the rare ones are alone
    # what the risk gave to each cluster
    tally = torch.zeros(len(run.assigned.owner)).index_add_(0, ids, run.weight)
    # the batch is drawn with replacement over all classes
    if place == 'network':
        tally = tally[tally > 0]
        assert len(tally) >= 4
        torch.testing.assert_close(tally, torch.full_like(tally, 1 / len(tally)), rtol=1e-5, atol=1e-7)
    else:
        for c in range(2):
            own = (run.assigned.owner == c) & (counts > 0)
            torch.testing.assert_close(tally[own], torch.full((int(own.sum()),), 1 / int(own.sum())), rtol=1e-5,
                                       atol=1e-7)


@pytest.mark.parametrize('kind', ['kmeans', 'groups'])
@pytest.mark.parametrize('place, risk', [('target', TwoLevel(Mean(), Mean())), ('distance', Mean())])
def test_the_step_follows_a_cluster_of_one(monkeypatch, place, risk, kind):
    "Nudge the rare sample: with equal weight for every cluster the step follows it, in plain matching it hardly does."
    # none of the rare ones
    monkeypatch.setattr(KMeansSelection, 'rows', lambda self, d: torch.tensor([1, 2, 3, 25, 26, 27]))
    def effect(risk):
        steps = []
        for rare in (RARE, RARE + .05):
            run, before = first_step(monkeypatch, rare_data(rare=rare), risk, place, kind)
            steps.append(before - run.images.detach())
        return (steps[0] - steps[1]).norm().item()
    assert effect(risk) > 2 * effect(None) > 0


def test_an_empty_cluster_is_ignored():
    net, (x, y, sizes, sx, sy) = smooth_net(), problem()
    for matcher in MATCHERS:
        # synthetic samples 1, 3 and 5 stay alone
        real = torch.where(y == 0, 0, torch.where(y == 1, 2, 4))
        s = sx.clone().requires_grad_(True)
        loss, q = matching_loss(matcher, net, x, y, sizes, s, sy, .5 * Mean() + .5 * WorstCase(), 'distance',
                                Clusters(real, sy, torch.arange(6)))
        gradient, = torch.autograd.grad(loss, s)
        assert (gradient[1::2] == 0).all() and (gradient[0::2].flatten(1).norm(dim=1) > 0).all()
        fewer = matching_loss(matcher, net, x, y, sizes, sx[0::2], sy[0::2], .5 * Mean() + .5 * WorstCase(),
                              'distance', Clusters(y, torch.arange(3), torch.arange(3)))[0]
        torch.testing.assert_close(loss.detach(), fewer, rtol=1e-6, atol=1e-9)
        assert q.sum().item() == pytest.approx(CLASSES)


# Corners

@pytest.mark.parametrize('metric', ['cosine', 'l2', 'l1'])
def test_dead_units_give_no_nan(metric):
    "A filter whose ReLU never opens has a gradient of zero on both sides, and a black image has one on its side."
    net = convnet(SHAPE, CLASSES, width=4, depth=1).double()
    with torch.no_grad(): net.body[1].bias[1] = -100.
    x, y, sizes, sx, sy = problem()
    sx[0] = 0
    s = sx.requires_grad_(True)
    loss, _ = matching_loss(GradientMatching(metric), net, x, y, sizes, s, sy, MEAN_CVAR, 'distance',
                            Clusters(assign_nearest(x, sx, y, sy)[0], sy, torch.arange(6)))
    gradient, = torch.autograd.grad(loss, s)
    assert loss.isfinite() and gradient.isfinite().all()
    alike, _ = matching_loss(GradientMatching(metric), net, x, y, sizes, x.clone().requires_grad_(True), y)
    # a row of zeros on both sides is no distance
    assert abs(alike.item()) < 1e-4


def test_real_samples_and_network_get_no_gradient():
    "The real side is a constant: nothing flows into it, and the network keeps no gradient of the matching loss."
    for matcher in MATCHERS:
        net, (x, y, sizes, sx, sy) = smooth_net(), problem()
        x.requires_grad_(True)
        s = sx.clone().requires_grad_(True)
        matching_loss(matcher, net, x, y, sizes, s, sy, MEAN_CVAR, 'distance',
                      clusters_of('groups', x, y, sx, sy))[0].backward()
        assert x.grad is None and s.grad is not None
        if isinstance(matcher, GradientMatching): assert all(p.grad is None for p in net.parameters())


def test_unknown_metric():
    with pytest.raises(ValueError, match='cosine, l2, l1'): GradientMatching('angle')


def shrunk(m):
    "A method for few small images; settings that cannot act stay as they are."
    small = dict(steps=3)
    if m.objective.uses_batch(m.risk_at): small['batch'] = dict(size=5)
    if 'network.width' not in idle(m): small['network'] = dict(width=4)
    return as_method(m, **small)


# (on equal ranks nothing moves: those of rows are tested in test_table_data)
@pytest.mark.parametrize('name', [k for k, m in METHODS.items() if m.objective and k not in ('rows', 'rdd-rows')])
def test_named_methods_step_on_three_channels(name):
    "Every named method on colour images with classes of different sizes, one of them smaller than the batch."
    y = torch.arange(3).repeat_interleave(torch.tensor([9, 5, 4]))
    data = GroupedDataset(draw(18, 3, 8, 8).float(), y, torch.arange(18) % 2, groups=['a', 'b'])
    packed = METHODS[name].prior.per_sample > 1
    run = Distiller(data, shrunk(METHODS[name]), 1 if packed else 2, 0, 'cpu')
    losses = [run.step() for _ in range(3)]
    moved = (run.images.detach() - run.initial).flatten(1).norm(dim=1).view(3, -1)
    assert all(np.isfinite(losses)) and (moved.amax(1) > 0).all()
