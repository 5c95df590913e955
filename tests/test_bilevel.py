"The direct objectives against numpy, scikit-learn and finite differences: values, all gradients, weights, memory."
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.kernel_ridge import KernelRidge as SkKernelRidge
from sklearn.linear_model import Ridge
from torch import nn

from rdd_nb.bilevel import Bilevel, KernelRidge, Unrolled, kernel_ridge, median_gamma, rbf, ridge_fit
from rdd_nb.core import Cost
from rdd_nb.data import GroupedDataset
from rdd_nb.distill import Distiller
from rdd_nb.methods import Method
from rdd_nb.matching import Batch, Clusters, Setup, within_clusters
from rdd_nb.models import Classifier, make_model
from rdd_nb.risk import CVaR, Entropic, Mean, TwoLevel, WorstCase

F64 = torch.float64
IPC, CLASSES, SHAPE = 2, 3, (1, 4, 4)
MEAN_CVAR = .5 * Mean() + .5 * CVaR(.3)
PLACES = [(None, None), (TwoLevel(CVaR(.5), .5 * Mean() + .5 * WorstCase()), 'target'), (Entropic(1.), 'target'),
          (MEAN_CVAR, 'distance')]
OBJECTIVES = [KernelRidge(), KernelRidge('linear'), KernelRidge('rbf'), KernelRidge('rbf', gamma=.1),
              KernelRidge(criterion='cross-entropy'), Unrolled(2, .3), Unrolled(2, .3, False)]
every_objective = pytest.mark.parametrize('objective', OBJECTIVES, ids=repr)


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def smooth_net(seed=0):
    body = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.GroupNorm(2, 2), nn.Softplus(), nn.AvgPool2d(2),
                         nn.Flatten())
    net = Classifier(body, 8, CLASSES).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()): p.copy_(draw(*p.shape, seed=100 * seed + i) * .5)
    return net


def problem(sizes=(7, 5, 3), soft=False, seed=0, **more):
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    sy = torch.arange(len(sizes)).repeat_interleave(IPC)
    shift = draw(len(sizes), *SHAPE, seed=seed + 1)
    labels = torch.softmax(draw(len(sy), CLASSES, seed=9), 1) if soft else None
    clusters = Clusters(y * 2 + torch.arange(len(y)) % 2, torch.arange(CLASSES).repeat_interleave(2))
    return Batch(draw(len(y), *SHAPE, seed=seed + 2) + shift[y], y, draw(len(sy), *SHAPE, seed=seed + 3) + shift[sy],
                 sy, CLASSES, soft=labels, clusters=clusters, **more)


def changed(batch, **new): return Batch(**{**batch.__dict__, **new})


# Closed forms

@settings(max_examples=15)
@given(st.integers(2, 9), st.integers(1, 9), st.integers(0, 99))
def test_ridge_is_that_of_scikit_learn(m, d, seed):
    f, y, w = draw(m, d, seed=seed), draw(m, 2, seed=seed + 1), draw(m, seed=seed + 2).abs() + .1
    W, b = ridge_fit(f, y, w, .05, relative=False)
    reference = Ridge(alpha=.05 * w.sum().item()).fit(f, y, w.numpy())
    np.testing.assert_allclose(W.T, reference.coef_, atol=1e-8)
    np.testing.assert_allclose(b, reference.intercept_, atol=1e-8)


@settings(max_examples=15)
@given(st.integers(2, 7), st.integers(1, 9), st.integers(0, 99))
def test_kernel_form_is_the_feature_form(m, d, seed):
    f, new, y = draw(m, d, seed=seed), draw(4, d, seed=seed + 3), draw(m, 2, seed=seed + 1)
    w = draw(m, seed=seed + 2).abs() + .1
    W, b = ridge_fit(f, y, w, .01)
    torch.testing.assert_close(kernel_ridge(f @ f.T, new @ f.T, y, w, .01), new @ W + b, rtol=1e-7, atol=1e-8)


def test_rbf_regression_is_that_of_scikit_learn():
    "Whose kernel regression has no intercept: so on centred targets and a centred kernel."
    s, x, y = draw(6, 2), draw(9, 2, seed=1), draw(6, 1, seed=2)
    H, K = np.eye(6) - 1 / 6, rbf(s, s, .7).numpy()
    O = rbf(x, s, .7).numpy()
    reference = SkKernelRidge(alpha=.1 * 6, kernel='precomputed').fit(H @ K @ H, y - y.mean())
    expected = reference.predict((O - K.mean(0)) @ H) + y.mean().item()
    np.testing.assert_allclose(kernel_ridge(torch.tensor(K), torch.tensor(O), y, None, .1, relative=False), expected,
                               atol=1e-10)


@pytest.mark.parametrize('m', [3, 12])
def test_integer_weights_are_replication(m):
    f, y, new, counts = draw(m, 5), draw(m, 2, seed=1), draw(4, 5, seed=2), torch.arange(m) % 3
    twice = torch.arange(m).repeat_interleave(counts)
    for a, b in zip(ridge_fit(f, y, counts), ridge_fit(f[twice], y[twice])): torch.testing.assert_close(a, b)
    torch.testing.assert_close(kernel_ridge(rbf(f, f), rbf(new, f), y, counts),
                               kernel_ridge(rbf(f[twice], f[twice]), rbf(new, f[twice]), y[twice]))


def test_gradients_of_the_closed_forms():
    f, y, w = (t.requires_grad_() for t in (draw(4, 3), draw(4, 2, seed=1), draw(4, seed=2).abs() + .1))
    new = draw(5, 3, seed=3)
    assert torch.autograd.gradcheck(lambda *a: ridge_fit(*a), (f, y, w))
    assert torch.autograd.gradcheck(lambda f, y, w: kernel_ridge(rbf(f, f, .5), rbf(new, f, .5), y, w), (f, y, w))


@pytest.mark.parametrize('weights', [torch.tensor([1., -1, 1]), torch.zeros(3), torch.ones(2)])
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match='^weights: .*expected 3 non-negative numbers'):
        ridge_fit(draw(3, 2), draw(3, 1), weights)


# Gradients

@every_objective
@pytest.mark.parametrize('risk, place', PLACES, ids=['plain', 'target', 'entropic', 'distance'])
def test_gradient_on_images_and_labels_is_that_of_finite_differences(objective, risk, place):
    net, batch = smooth_net(), problem(soft=True)
    if isinstance(objective, Unrolled): objective = objective.begin(batch)
    sx, soft = batch.sx.clone().requires_grad_(True), batch.soft.clone().requires_grad_(True)
    def loss(sx, soft): return objective.loss(net, changed(batch, sx=sx, soft=soft), risk, place)[0]
    gradients = torch.autograd.grad(loss(sx, soft), (sx, soft))
    assert all(g.norm() > 1e-6 for g in gradients)
    for k in range(2):
        u, v = draw(*sx.shape, seed=50 + k), draw(*soft.shape, seed=60 + k)
        with torch.no_grad():
            expected = (loss(sx + 1e-5 * u, soft + 1e-5 * v) - loss(sx - 1e-5 * u, soft - 1e-5 * v)) / 2e-5
        torch.testing.assert_close((gradients[0] * u).sum() + (gradients[1] * v).sum(), expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize('checkpoint', [True, False])
def test_gradient_on_the_step_size(checkpoint):
    net, batch = smooth_net(), problem()
    objective = Unrolled(3, .2, checkpoint).begin(changed(batch, x=batch.x))
    log_lr, = objective.learnable
    log_lr.data = log_lr.data.double()
    slope, = torch.autograd.grad(objective.loss(net, batch)[0], log_lr)
    values = []
    for step in 1e-5, -1e-5:
        with torch.no_grad():
            log_lr += step
            values.append(objective.loss(net, batch)[0])
            log_lr -= step
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-9)


def test_checkpointing_changes_nothing():
    net, batch = smooth_net(), problem(soft=True)
    found = []
    for checkpoint in True, False:
        objective = Unrolled(4, .3, checkpoint).begin(batch)
        sx = batch.sx.clone().requires_grad_(True)
        loss, q = objective.loss(net, changed(batch, sx=sx), MEAN_CVAR, 'distance')
        found.append((loss, q, *torch.autograd.grad(loss, (sx, *objective.learnable))))
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_unrolling_is_training():
    "The parameters at the end are those of torch.optim.SGD; the network itself is left alone."
    net, batch = smooth_net(), problem()
    before = [p.detach().clone() for p in net.parameters()]
    theta = Unrolled(3, .2).trained(net, batch)
    for p, b in zip(net.parameters(), before): assert torch.equal(p, b) and p.grad is None
    optimiser = torch.optim.SGD(net.parameters(), lr=.2)
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(batch.sx), batch.sy).backward()
        optimiser.step()
    for name, p in net.named_parameters(): torch.testing.assert_close(theta[name], p.detach(), rtol=1e-6, atol=1e-9)


# Values and weights

@every_objective
def test_losses_become_the_objective(objective):
    "By numpy, from the losses alone: mean of class means, risk of classes, risk of clusters."
    net, p = smooth_net(), draw(15, seed=4).abs()
    batch = problem(p=within_clusters(problem().y, CLASSES, p))
    losses, y, clusters = objective.losses(net, batch).detach().numpy(), batch.y.numpy(), batch.clusters.real.numpy()
    p = p.numpy()
    mean = lambda rows: (p[rows] * losses[rows]).sum() / p[rows].sum()
    loss, q = objective.loss(net, batch)
    assert loss.item() == pytest.approx(np.mean([mean(y == c) for c in range(CLASSES)]))
    np.testing.assert_allclose(q.numpy(), batch.p.numpy(), rtol=1e-12)
    loss, q = objective.loss(net, batch, WorstCase(), 'distance')
    worst = max(range(6), key=lambda k: mean(clusters == k))
    assert loss.item() == pytest.approx(mean(clusters == worst))
    np.testing.assert_allclose(q.numpy(), np.where(clusters == worst, CLASSES * p / p[clusters == worst].sum(), 0),
                               rtol=1e-9)
    loss, q = objective.loss(net, batch, WorstCase(), 'target')
    assert loss.item() == pytest.approx(np.mean([losses[y == c].max() for c in range(CLASSES)]))
    hardest = sum((y == c) * (losses == losses[y == c].max()) for c in range(CLASSES))
    np.testing.assert_allclose(q.numpy(), hardest.astype(float))
    torch.testing.assert_close(objective.loss(net, batch, Mean(), 'network')[0], objective.loss(net, batch)[0])


@every_objective
def test_uniform_weights_change_nothing_and_integer_weights_are_replication(objective):
    if objective == OBJECTIVES[2]: objective = KernelRidge('rbf', gamma=.1)
    net, batch = smooth_net(), problem()
    plain = objective.loss(net, batch)[0]
    torch.testing.assert_close(objective.loss(net, changed(batch, p=within_clusters(batch.y, CLASSES).double()))[0],
                               plain)
    counts = torch.arange(len(batch.y)) % 3 + 1
    twice = torch.arange(len(batch.y)).repeat_interleave(counts)
    replicated = changed(batch, x=batch.x[twice], y=batch.y[twice],
                         clusters=Clusters(batch.clusters.real[twice], batch.clusters.owner))
    weighted = changed(batch, p=within_clusters(batch.y, CLASSES, counts.double()))
    for risk, place in (None, None), (CVaR(.4), 'target'), (MEAN_CVAR, 'distance'):
        torch.testing.assert_close(objective.loss(net, weighted, risk, place)[0],
                                   objective.loss(net, replicated, risk, place)[0])


@every_objective
def test_names_of_classes_do_not_matter(objective):
    net, batch = smooth_net(), problem()
    new = torch.tensor([2, 0, 1])
    order, s_order = new[batch.y].argsort(stable=True), new[batch.sy].argsort(stable=True)
    other = smooth_net()
    with torch.no_grad():
        for p in other.head.parameters(): p[new] = p.clone()
    renamed = Batch(batch.x[order], new[batch.y][order], batch.sx[s_order], new[batch.sy][s_order], CLASSES)
    if isinstance(objective, KernelRidge) and objective.kernel == 'rbf': objective = KernelRidge('rbf', gamma=.1)
    torch.testing.assert_close(objective.loss(other, renamed)[0], objective.loss(net, batch)[0])


@every_objective
def test_blocks_of_a_cpu_are_the_whole(objective, monkeypatch):
    import rdd_nb.bilevel
    net, batch = smooth_net(), problem()
    whole = objective.loss(net, batch)[0]
    monkeypatch.setattr(rdd_nb.bilevel, 'in_chunks', lambda f, x: torch.cat([f(x[i:i + 1]) for i in range(len(x))]))
    torch.testing.assert_close(objective.loss(net, batch)[0], whole)


@pytest.mark.parametrize('kernel', ['features', 'linear', 'rbf'])
def test_an_interpolating_learner_at_the_real_set(kernel):
    "Seven samples, eight features: without regularisation no mistakes; with it, the more the larger."
    net, batch = smooth_net(), problem((3, 2, 2))
    batch = changed(batch, sx=batch.x, sy=batch.y)
    losses = [KernelRidge(kernel, r).loss(net, batch)[0].item() for r in (1e-13, 1e-3, 1e-1)]
    assert losses[0] < 1e-10 and losses[0] < losses[1] < losses[2]


def test_features_of_a_linear_network_are_the_linear_kernel():
    net, batch = Classifier(nn.Flatten(), 16, CLASSES).double(), problem()
    torch.testing.assert_close(KernelRidge().loss(net, batch)[0], KernelRidge('linear').loss(None, batch)[0])


def test_half_of_float64_is_enough():
    "In float32 the value is that of float64, and everything comes back in float32."
    net, batch = smooth_net(), problem()
    single = Batch(batch.x.float(), batch.y, batch.sx.float(), batch.sy, CLASSES)
    for kernel in 'linear', 'rbf':
        loss = KernelRidge(kernel).loss(None, single)[0]
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(KernelRidge(kernel).loss(None, batch)[0].item(), rel=1e-4)


def test_no_real_sample_of_a_class():
    batch = problem((7, 0, 3))
    for objective in OBJECTIVES:
        for risk, place in (None, None), (CVaR(.3), 'target'), (CVaR(.3), 'distance'):
            loss, q = objective.loss(smooth_net(), batch, risk, place)
            assert loss.isfinite() and len(q) == 10


# State, names, bad input

def test_begin_makes_a_fresh_state():
    setup = Setup(draw(20, *SHAPE).float(), torch.zeros(20, dtype=torch.long), 1, 0, None, None, None)
    mother = Unrolled(3, .25)
    a, b = mother.begin(setup), mother.begin(setup)
    assert mother.learnable == () and a.learnable[0] is not b.learnable[0]
    assert a.learnable[0].is_leaf and a.learnable[0].exp().item() == pytest.approx(.25)
    ready = KernelRidge('rbf').begin(setup)
    assert ready.width == median_gamma(setup.x) and repr(ready) == "KernelRidge(kernel='rbf')"
    assert KernelRidge().begin(setup).learnable == ()


@pytest.mark.parametrize('objective', [KernelRidge('rbf', .01, 'cross-entropy', .2, .5), KernelRidge(),
                                       Unrolled(7, .2, False), Unrolled()], ids=repr)
def test_the_name_says_all(objective):
    same = eval(repr(objective))
    assert vars(same) == vars(objective) and repr(same) == repr(objective)


@pytest.mark.parametrize('make, message', [
    (lambda: KernelRidge('ntk'), r"^kernel='ntk' is not known; choose from features, linear, rbf$"),
    (lambda: KernelRidge(criterion='mse'), r"^criterion='mse' is not known"),
    (lambda: KernelRidge(regularisation=0), r'^regularisation=0: expected a number in \(0, inf\)$'),
    (lambda: KernelRidge(gamma=-1.), '^gamma=-1.0'),
    (lambda: Unrolled(0), '^steps=0: expected a whole number of at least 1$'),
    (lambda: Unrolled(lr=0), '^lr=0'),
    (lambda: KernelRidge().loss(nn.Linear(16, 3), problem()), "^net: Linear has no method features"),
])
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message) as e: make()
    assert '\n' not in str(e.value)


def test_a_subclass_that_says_nothing():
    with pytest.raises(NotImplementedError, match='Nothing does not say what its losses are'):
        type('Nothing', (Bilevel,), {})().loss(None, problem())


# In the loop

@pytest.mark.parametrize('labels', ['hard', 'learned'])
@pytest.mark.parametrize('objective', [KernelRidge(), KernelRidge('rbf'), Unrolled(2, .1)], ids=repr)
def test_the_loop_optimises_images_labels_and_step_size(objective, labels):
    data = GroupedDataset(draw(24, 1, 8, 8).float(), torch.arange(24) % 2, group=torch.arange(24) // 12,
                          groups=['a', 'b'])
    network = 'mlp(width=8)' if objective.uses_network else 'convnet'
    method = Method(objective, 'groups', '0.5*mean + 0.5*cvar(0.5)', 'distance', steps=4, batch='random(8)', lr=.1,
                    optimizer='adam', network=network, labels=labels)
    run = Distiller(data, method, 2, 0, 'cpu')
    images, learned = run.images.detach().clone(), [t.detach().clone() for t in run.objective.learnable]
    soft = None if labels == 'hard' else run.soft().detach().clone()
    assert all(np.isfinite(float(run.step())) for _ in range(4))
    assert not torch.equal(run.images, images)
    if soft is not None: assert not torch.equal(run.soft(), soft)
    assert all(not torch.equal(a, b) for a, b in zip(run.objective.learnable, learned))
    assert len(learned) == isinstance(objective, Unrolled)


# Memory

@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read from /proc')
def test_memory_does_not_grow_with_the_activations_of_the_steps():
    net = make_model('convnet', (1, 16, 16), CLASSES, width=32)
    x, s = torch.randn(24, 1, 16, 16), torch.randn(60, 1, 16, 16).requires_grad_(True)
    batch = Batch(x, torch.arange(3).repeat_interleave(8), s, torch.arange(3).repeat_interleave(20), CLASSES)
    def peak(steps, checkpoint):
        with Cost() as cost: Unrolled(steps, .01, checkpoint).loss(net, batch)[0].backward()
        return cost.peak_mb
    peak(1, True)                                        # libraries loaded, buffers made
    often, kept = peak(9, True), peak(9, False)
    assert often < .5 * kept, (often, kept)
