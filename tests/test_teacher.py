"""The teacher: training, soft labels, alignment of batch-norm statistics with and without risk, patches, bad input."""
import copy, dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from rdd_nb.core import generator
from rdd_nb.data import GroupedDataset
from rdd_nb.distill import Distiller
from rdd_nb.methods import Method
from rdd_nb.matching import Batch, Clusters, Setup, within_clusters
from rdd_nb.models import Classifier, make_model
from rdd_nb.risk import CVaR, Mean, Risk
from rdd_nb.teacher import (BatchNormAlignment, alignment, kept_statistics, layer_statistics, random_crops,
                            select_patches, soft_labels, train_teacher)

F64 = torch.float64
CLASSES = 3
SHAPE = (1, 6, 6)


class Fixed(Risk, names=()):
    "Weights that were written down beforehand."
    def __init__(self, q): self.q = q
    def weights(self, losses, p=None, groups=None): return self.q[groups]


def draw(*shape, seed=0): return torch.randn(shape, generator=generator(seed), dtype=F64)


def smooth_teacher():
    "Two batch-norm layers, no kinks, double precision, running statistics that are not the trivial ones."
    body = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
                         nn.Linear(27, 5), nn.BatchNorm1d(5), nn.Tanh())
    net = Classifier(body, 5, CLASSES).double()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()): p.copy_(draw(*p.shape, seed=('t', k)) * .5)
        for m in (body[1], body[6]):
            m.running_mean.copy_(draw(*m.running_mean.shape, seed='m') * .3)
            m.running_var.copy_(draw(*m.running_var.shape, seed='v').exp())
    return net.eval().requires_grad_(False)


def objective(weight=1.):
    it = BatchNormAlignment(weight)
    it.teacher = smooth_teacher()
    return it


def problem(sizes=(4, 3, 5), ipc=2):
    y = torch.arange(CLASSES).repeat_interleave(torch.tensor(sizes))
    sy = torch.arange(CLASSES).repeat_interleave(ipc)
    return Batch(draw(len(y), *SHAPE, seed='x'), y, draw(len(sy), *SHAPE, seed='s'), sy, CLASSES)


def clusters_of(b, own=False):
    ids = b.y * 2 + torch.arange(len(b.y)) % 2
    return Clusters(ids, torch.arange(CLASSES).repeat_interleave(2), torch.arange(6) if own else None)


def np_statistics(net, x, w):
    "Mean and variance at both layers, from the definition."
    a = net.body[0](x).numpy()
    b = net.body[5](net.body[4](net.body[3](net.body[2](net.body[1](net.body[0](x)))))).numpy()
    out = []
    for v in (a, b[:, :, None, None]):
        w4 = w.numpy()[:, None, None, None] / v.shape[2] / v.shape[3]
        mean = (w4 * v).sum((0, 2, 3))
        out.append((mean, (w4 * (v - mean[:, None, None])**2).sum((0, 2, 3))))
    return out


def np_alignment(real, mine, net):
    scale = [m.running_var.numpy() + 1e-5 for m in (net.body[1], net.body[6])]
    return sum((((m - mr)**2 / s) + ((v - vr)**2 / s**2)).mean() for (mr, vr), (m, v), s in zip(real, mine, scale))


@pytest.mark.parametrize('place', [None, 'target', 'distance', 'own'])
def test_loss_from_the_definition(place):
    it, b = objective(.7), problem()
    net = it.teacher
    q = within_clusters(b.y, CLASSES, torch.rand(len(b.y), generator=generator('q'), dtype=F64))
    equal = lambda n: torch.full((n,), 1 / n, dtype=F64)
    expected = F.cross_entropy(net(b.sx), b.sy).item()
    if place in (None, 'target'):
        kept = [(m.running_mean.numpy(), m.running_var.numpy()) for m in (net.body[1], net.body[6])]
        real = np_statistics(net, b.x, q / CLASSES) if place else kept
        expected += .7 * np_alignment(real, np_statistics(net, b.sx, equal(6)), net)
        loss, weights = it.loss(None, dataclasses.replace(b, clusters=Clusters(torch.arange(len(b.y)), b.y)),
                                Fixed(q) if place else None, place)
    else:
        clusters = clusters_of(b, place == 'own')
        D = []
        for k, c in enumerate(clusters.owner):
            mine = torch.arange(6) == k if place == 'own' else b.sy == c
            own = clusters.real == k
            D.append(np_alignment(np_statistics(net, b.x[own], equal(int(own.sum()))),
                                  np_statistics(net, b.sx[mine], equal(int(mine.sum()))), net))
        expected += .7 * (.5 * np.mean(D) + .5 * max(D))
        loss, weights = it.loss(None, dataclasses.replace(b, clusters=clusters), .5 * Mean() + .5 * CVaR(1e-6),
                                'distance')
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert weights.sum().item() == pytest.approx(CLASSES, rel=1e-5)


@pytest.mark.parametrize('place', [None, 'target', 'distance'])
def test_gradient_against_finite_differences(place):
    it, b = objective(), problem()
    b = dataclasses.replace(b, clusters=clusters_of(b))
    f = lambda s: it.loss(None, dataclasses.replace(b, sx=s), CVaR(.5) if place else None, place)[0]
    assert torch.autograd.gradcheck(f, b.sx.clone().requires_grad_())


@settings(max_examples=10)
@given(st.lists(st.integers(1, 4), min_size=12, max_size=12))
def test_integer_weights_are_copies(copies):
    net, b = smooth_teacher(), problem()
    counts, again = torch.tensor(copies, dtype=F64), torch.arange(12).repeat_interleave(torch.tensor(copies))
    one = layer_statistics(net, b.x, within_clusters(b.y, CLASSES, counts), b.y, CLASSES)[1]
    two = layer_statistics(net, b.x[again], within_clusters(b.y[again], CLASSES, torch.ones(len(again), dtype=F64)),
                           b.y[again], CLASSES)[1]
    for a, c in zip(one, two):
        for u, v in zip(a, c): torch.testing.assert_close(u, v)


def test_clusters_together_are_clusters_one_by_one():
    net, ids = smooth_teacher(), torch.tensor([2, 0, 2, 2, 0])                # cluster 1 is empty
    x, w = draw(5, *SHAPE), within_clusters(ids, 3, torch.rand(5, dtype=F64, generator=generator(0)))
    found = layer_statistics(net, x, w, ids, 3)[1]
    for k in (0, 2):
        alone = layer_statistics(net, x[ids == k], w[ids == k], ids[ids == k] * 0, 1)[1]
        for a, c in zip(found, alone): torch.testing.assert_close(a[k:k + 1], c)
    assert all(not layer[1].any() for layer in found)


def test_nothing_left_to_align_where_both_sides_are_the_same():
    it, b = objective(100.), problem((3, 3, 3), 3)
    s = b.x.clone().requires_grad_()
    b = dataclasses.replace(b, sx=s, sy=b.y, clusters=clusters_of(b))
    plain = F.cross_entropy(it.teacher(s), b.y)
    loss, q = it.loss(None, b, Mean(), 'target')
    assert loss.item() == pytest.approx(plain.item(), abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, s)[0], torch.autograd.grad(plain, s)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(q.double(), torch.full((9,), 1 / 3, dtype=F64))


def test_order_of_classes_and_samples():
    it, b = objective(), problem()
    new = torch.tensor([1, 2, 0])
    for risk, place in ((None, None), (Mean(), 'target'), (CVaR(.5), 'distance')):
        loss = it.loss(None, dataclasses.replace(b, clusters=clusters_of(b)), risk, place)[0]
        order, sorder, other = new[b.y].argsort(stable=True), new[b.sy].argsort(stable=True), copy.deepcopy(it)
        rows = torch.argsort(new)
        other.teacher.head.weight.data, other.teacher.head.bias.data = it.teacher.head.weight[
            rows], it.teacher.head.bias[rows]
        clusters = Clusters(clusters_of(b).real[order], new[clusters_of(b).owner])
        renamed = dataclasses.replace(b, x=b.x[order], y=new[b.y][order], sx=b.sx[sorder], sy=new[b.sy][sorder],
                                      clusters=clusters)
        torch.testing.assert_close(other.loss(None, renamed, risk, place)[0], loss)


def test_the_risk_reaches_the_pixels():
    it, b = objective(), problem()
    b = dataclasses.replace(b, clusters=clusters_of(b))
    slopes = {}
    for place in ('target', 'distance'):
        for risk in (Mean(), CVaR(.2)):
            s = b.sx.clone().requires_grad_()
            loss, _ = it.loss(None, dataclasses.replace(b, sx=s), risk, place)
            slopes[place, str(risk)], = torch.autograd.grad(loss, s)
        mean, cvar = (v for (p, _), v in slopes.items() if p == place)
        assert (mean - cvar).norm() > .05 * mean.norm()


def test_looking_leaves_the_network_alone():
    net = make_model('convnet', (1, 8, 8), CLASSES, width=4, norm='batch')
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(9, 1, 8, 8)
    soft_labels(net, x); select_patches(net, x, torch.arange(3).repeat_interleave(3), 1, 1, 2)
    net.eval(); layer_statistics(net, x, torch.full((9,), 1 / 9), torch.zeros(9).long(), 1); net.train()
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in net.modules())


# Training, labels

def small_setup(risk=None, risk_at=None, seed=0):
    y = torch.arange(CLASSES).repeat_interleave(20)
    means = torch.randn(CLASSES, 1, 8, 8, generator=generator('means'))
    x = torch.randn(60, 1, 8, 8, generator=generator('x')) * .5 + means[y]
    def train(net, steps, *keys, lr=None):
        assert net.training
        opt, g = torch.optim.SGD(net.parameters(), lr, momentum=.9), generator(seed, *keys)
        for _ in range(steps):
            i = torch.randint(60, (32,), generator=g)
            losses = F.cross_entropy(net(x[i]), y[i], reduction='none')
            opt.zero_grad(); (risk(losses) if risk_at == 'network' else losses.mean()).backward(); opt.step()
    def network(*keys): return make_model('convnet', (1, 8, 8), CLASSES, seed=(seed, *keys), width=4)
    return Setup(x, y, CLASSES, seed, network, train, None, None, risk, risk_at)


def test_training_is_seeded_and_under_the_risk():
    def first(**k):
        net = train_teacher(small_setup(**k), 25)
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        return torch.cat([p.flatten() for p in net.parameters()])
    assert torch.equal(first(), first())
    assert not torch.equal(first(), first(seed=1))
    assert (first() - first(risk=CVaR(.2), risk_at='network')).norm() > .01


@pytest.mark.parametrize('steps', [1, 7, 10, 23])
def test_as_many_steps_as_asked_for(steps):
    setup, taken = small_setup(), []
    train_teacher(dataclasses.replace(setup, train=lambda net, n, *keys, lr: taken.append((n, lr, keys))), steps)
    assert sum(n for n, *_ in taken) == steps and all(n > 0 for n, *_ in taken)
    assert [lr for _, lr, _ in taken] == sorted((lr for _, lr, _ in taken), reverse=True)
    assert len({k for *_, k in taken}) == len(taken)


def test_objective_from_begin_to_descent():
    setup = small_setup()
    it = BatchNormAlignment(steps=60, width=4)
    begun = it.begin(setup)
    assert it.teacher is None and begun.teacher is not None and repr(it) == repr(begun) == repr(eval(repr(it)))
    assert begun.learnable == () and not it.uses_labels
    s, sy = torch.randn(6, 1, 8, 8, generator=generator(1)).requires_grad_(), torch.arange(CLASSES).repeat_interleave(2)
    optimizer, losses = torch.optim.Adam([s], .1), []
    for _ in range(60):
        loss, _ = begun.loss(None, Batch(setup.x, setup.y, s, sy, CLASSES))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < .2 * losses[0] and (begun.teacher(s).argmax(1) == sy).all()


@settings(max_examples=20)
@given(st.floats(.1, 50))
def test_temperature(t):
    net, x = smooth_teacher(), draw(4, *SHAPE)
    p, plain = soft_labels(net, x, t), soft_labels(net, x)
    torch.testing.assert_close(p, (net(x) / t).softmax(1))
    assert (p.amax(1) <= plain.amax(1) + 1e-9).all() == (t >= 1) or t == pytest.approx(1)


@pytest.mark.parametrize('place', [None, 'network', 'target', 'distance'])
def test_in_the_loop(place):
    y = torch.arange(CLASSES).repeat_interleave(8)
    data = GroupedDataset(draw(24, 1, 8, 8).float(), y)
    method = Method(BatchNormAlignment(steps=3, width=4), 'kmeans(2)' if place == 'distance' else None,
                    CVaR(.5) if place else None, place, steps=2, lr=.1, optimizer='adam')
    run = Distiller(data, method, 2, 0, 'cpu')
    assert np.isfinite([run.step(), run.step()]).all() and (run.images - run.initial).abs().max() > .01


# Patches

def blank(n_classes):
    "A network whose confidence for every class is the mean brightness: the best patches are the bright ones."
    class Bright(nn.Module):
        def forward(self, x): return torch.stack([x.mean((1, 2, 3)), *[torch.zeros(len(x))] * (n_classes - 1)], 1)
    return Bright()


def test_the_best_recognised_samples_are_taken():
    x = torch.linspace(0, 1, 12)[torch.randperm(12, generator=generator(0))][:, None, None, None].expand(12, 1, 4, 4)
    images, y, rows = select_patches(blank(1), x, torch.zeros(12).long(), 2, 2, crops=1, n_classes=1)
    # one class: all losses are 0, ties by order
    assert rows.flatten().tolist() == list(range(8))
    labels = torch.zeros(12).long()
    images, y, rows = select_patches(blank(2), torch.cat([x, x]), torch.cat([labels, labels + 1]), 2, 2, crops=2)
    # class 0: the bright ones
    assert set(rows[:2].flatten().tolist()) == set(x[:, 0, 0, 0].argsort(descending=True)[:8].tolist())
    # class 1: the dark ones
    assert set((rows[2:] - 12).flatten().tolist()) == set(x[:, 0, 0, 0].argsort()[:8].tolist())
    assert images.shape == (4, 1, 4, 4) and y.tolist() == [0, 0, 1, 1]
    values = torch.cat([x, x])[:, 0, 0, 0]
    # the patches are where the rows say
    for image, own in zip(images, rows):
        for k, r in enumerate(own):
            torch.testing.assert_close(image[0, 2 * (k // 2):2 * (k // 2) + 2, 2 * (k % 2):2 * (k % 2) + 2],
                                       values[r].expand(2, 2))


@settings(max_examples=20)
@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.integers(0, 9))
def test_slots_are_dealt_to_the_clusters_in_turn(clusters, seed):
    x = torch.rand(12, 1, 4, 4, generator=generator(seed))
    _, _, rows = select_patches(blank(1), x, torch.zeros(12).long(), 2, 2, clusters=torch.tensor(clusters), n_classes=1)
    taken = np.bincount(np.array(clusters)[rows.flatten().numpy()], minlength=4)
    size = np.bincount(clusters, minlength=4)
    assert taken.sum() == 8 and (taken <= size).all()
    # a cluster that still had samples got about as many slots as any other
    short = taken[taken < size]
    assert len(short) == 0 or short.min() >= taken.max() - 1


def test_more_crops_are_never_worse():
    net = make_model('convnet', (1, 8, 8), CLASSES, width=4, norm='batch').eval()
    setup = small_setup()
    def confidence(crops):
        torch.manual_seed(0)
        g, best = generator(0, 'patches'), torch.full((60,), np.inf)
        for _ in range(crops):
            loss = F.cross_entropy(net(random_crops(setup.x, g)), setup.y, reduction='none')
            best = torch.minimum(best, loss.detach())
        return best
    assert (confidence(4) <= confidence(1)).all()
    same = [select_patches(net, setup.x, setup.y, 2, 2, seed=s) for s in (0, 0, 1)]
    assert torch.equal(same[0][0], same[1][0]) and not torch.equal(same[0][0], same[2][0])


@settings(max_examples=20)
@given(st.floats(.2, 1), st.integers(0, 20))
def test_crops_stay_inside(least, seed):
    ramp = torch.linspace(-1, 1, 16).expand(5, 1, 16, 16)
    cut = random_crops(ramp, generator(seed), least)
    span = cut.amax((1, 2, 3)) - cut.amin((1, 2, 3))
    assert (span >= 2 * least * 14 / 15 - .15).all() and (span <= 2 + 1e-5).all() and cut.abs().max() <= 1 + 1e-5


# Refusals

def test_refusals():
    x, y = torch.randn(12, 1, 8, 8), torch.arange(3).repeat_interleave(4)
    net = make_model('convnet', (1, 8, 8), 3, width=4)
    with pytest.raises(ValueError, match='no batch-norm layer'):
        layer_statistics(net, x, torch.full((12,), 1 / 12), y * 0, 1)
    with pytest.raises(ValueError, match='model mlp has no norm'):
        BatchNormAlignment(network='mlp').begin(small_setup())
    with pytest.raises(ValueError, match='model=.nothing. is not known'):
        BatchNormAlignment(network='nothing').begin(small_setup())
    with pytest.raises(ValueError, match='begin'): BatchNormAlignment().loss(net, problem())
    for change in (dict(weight=0), dict(lr=-1), dict(lr=float('inf')), dict(steps=0), dict(steps=2.5)):
        with pytest.raises(ValueError, match=f'^{next(iter(change))}='): BatchNormAlignment(**change)
    for factor in (0, 3, 16):
        with pytest.raises(ValueError, match=f'factor={factor}'): select_patches(net, x, y, 1, factor)
    with pytest.raises(ValueError, match='class 0 has 4 samples: expected at least 8'): select_patches(net, x, y, 2, 2)
    for t in (0, -1, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='temperature='): soft_labels(net, x, t)
