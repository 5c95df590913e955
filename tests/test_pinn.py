"PINN points: derivatives, walls, reference solutions, systems, gradients, rivals, files, the command, bad input."
import dataclasses
import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rdd_nb import collocation
from rdd_nb.cli import read_line
from rdd_nb.collocation import (BATCHED, Distillation, batches, best_of, break_even, causal,
    compare_points,
                                distill_points, lessons, pays, prepare, rad, rar, sample_points, solver_values, tune)
from rdd_nb.equations import (PDE, PDES, AllenCahn, AllenCahnWalls, Burgers, BurgersWalls, Heat, HeatWalls, Helmholtz,
    KdV,
                              KuramotoSivashinsky, Schroedinger, Wall, closure, inside, make_pde, outside, taylor)
from rdd_nb.pinn import PINN, Exam, _assemble, _inputs, fit, fit_adam, load_points
from rdd_nb.risk import CVaR, Mean, WorstCase
from rdd_nb.spectral import columns, relative, resolved, solve

F64 = torch.float64
linspace = lambda a, b, n: torch.linspace(a, b, n, dtype=F64)
draw = lambda *shape, seed=0: torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
everyone = pytest.mark.parametrize('name', PDES)


def coordinates(pde, n, seed=0):
    low, high = torch.tensor(pde.low, dtype=F64), torch.tensor(pde.high, dtype=F64)
    return low + (high - low) * draw(n, 2, seed=seed)


def network(pde, width=8):
    "One whose last layer is not zero."
    net = PINN.new(pde, 'test', width=width)
    net.theta[-2] = draw(len(pde.fields), width) - .5
    return net


# Residuals

@settings(max_examples=20)
@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(.2, 3), st.floats(-2, 2))
def test_residuals_agree_with_derivatives_on_paper(a, b, k, w):
    "u = a sin(kx + b) exp(wt): every derivative is known."
    q = coordinates(Burgers(), 8)
    x, t = q.T
    e, s, c = torch.exp(w * t), torch.sin(k * x + b), torch.cos(k * x + b)
    u, ux, ut, uxx, uyy = a * s * e, a * k * c * e, a * w * s * e, -a * k * k * s * e, a * w * w * s * e
    f = lambda q: a * torch.sin(k * q[:, 0] + b) * torch.exp(w * q[:, 1])
    cases = ((Heat(.3), ut - .3 * uxx), (Burgers(.02), ut + u * ux - .02 * uxx),
             (AllenCahn(.1, 2.), ut - .1 * uxx - 2 * (u - u**3)), (Helmholtz(1.5), (uxx + uyy + 2.25 * u) / math.pi**2),
             (KdV(.01), ut + u * ux - .01 * a * k**3 * c * e),
             (KuramotoSivashinsky(2., .5, .1), ut + 2 * u * ux + .5 * uxx + .1 * k**4 * u))
    for pde, paper in cases: torch.testing.assert_close(pde.residual_of(f, q, None)[:, 0], paper, rtol=1e-9, atol=1e-9)


def test_a_soliton_solves_schroedingers_equation():
    "h = sech(x) exp(it/2), a complex field as two real ones."
    q = coordinates(Schroedinger(), 12)
    h = lambda q: torch.stack([torch.cos(q[:, 1] / 2), torch.sin(q[:, 1] / 2)], -1) / torch.cosh(q[:, :1])
    assert Schroedinger().residual_of(h, q, None).abs().max() < 1e-12
    assert Schroedinger().residual_of(lambda q: h(q) * 1.1, q, None).abs().max() > .01


@everyone
def test_fast_residual_is_that_of_autograd(name):
    pde = make_pde(name)
    net, q, c = network(pde), coordinates(pde, 9), outside(pde, 9, 0)
    exact = pde.residual_of(lambda q: net(q, c), q, c)
    torch.testing.assert_close(columns(net.residual(q, c)), exact, rtol=1e-8, atol=1e-8)


def test_derivatives_by_finite_differences():
    pde = Burgers()
    net, q, c, h = network(pde), coordinates(pde, 5) * .9, inside(pde, 5, 0), 1e-4
    d = pde.derivatives(_assemble(pde, net.theta, _inputs(pde, q, c)))
    move = torch.tensor([[h, 0.]], dtype=F64)
    close = lambda a, b, tol: torch.testing.assert_close(a, b, rtol=tol, atol=tol)
    close(d.u_x, (net(q + move, c) - net(q - move, c)) / (2 * h), 1e-5)
    close(d.u_xx, (net(q + move, c) - 2 * d.u + net(q - move, c)) / h**2, 1e-4)
    close(d.u_t, (net(q + move.flip(1), c) - net(q - move.flip(1), c)) / (2 * h), 1e-5)


class Everything(PDE):
    "A source, a variable coefficient, a coefficient from the condition, and a mixed derivative."
    name, default = 'everything', dict(amplitude=(.5, 1.), rate=(0., 2.))
    def initial(self, z, c): return c[:, 0] * torch.sin(math.pi * z)
    def residual(self, d, q, c): return d.u_t - (1 + q[:, 0]) * d.u_xx + c[:, 1] * d.u * d.u_xt - torch.sin(q[:, 1])


def test_coordinates_conditions_and_mixed_derivatives_reach_the_residual():
    pde = Everything()
    assert pde.index == closure([(2, 0), (1, 1)])
    net, q, c = network(pde), coordinates(pde, 7), inside(pde, 7, 0)
    torch.testing.assert_close(net.residual(q, c), pde.residual_of(lambda q: net(q, c), q, c)[:, 0])
    d = dict(zip(pde.index, taylor(lambda q: net(q, c), q, pde.index)))
    paper = d[0, 1] - (1 + q[:, 0]) * 2 * d[2, 0] + c[:, 1] * d[0, 0] * d[1, 1] - torch.sin(q[:, 1])
    torch.testing.assert_close(net.residual(q, c), paper)


# Conditions built in

def ends(pde, q):
    "The points q moved to the left, the right, the first and the last edge."
    for axis in (0, 1):
        for edge in (pde.low, pde.high):
            moved = q.clone()
            moved[:, axis] = edge[axis]
            yield moved


def wall_residual(wall, net, q, c):
    index = ((0, 0), (1, 0))
    u, ux = taylor(lambda q: columns(net(q, c)), q, index)
    value = wall.at(q[:, 1], c)
    return wall.a * u + wall.b * ux - (columns(value) if torch.is_tensor(value) else value)


@everyone
def test_conditions_hold_for_any_weights(name):
    pde = make_pde(name)
    net, q, c = network(pde), coordinates(pde, 20), outside(pde, 20, 1)
    left, right, first, last = ends(pde, q)
    if pde.walls is None: torch.testing.assert_close(net(left, c), net(right, c), rtol=0, atol=1e-12)
    else:
        for wall, edge in zip(pde.walls, (left, right)): assert wall_residual(wall, net, edge, c).abs().max() < 1e-10
    at = pde.initial(pde.position(q), c)
    if pde.coordinates[1] == 'y':
        assert net(first, c).abs().max() < 1e-12
        torch.testing.assert_close(net(last, c), at, rtol=0, atol=1e-12)
    else: torch.testing.assert_close(net(first, c), at, rtol=0, atol=1e-12)


WALLS = {'dirichlet neumann': (Wall(), Wall(0, 1)), 'neumann dirichlet': (Wall(0, 2), Wall(3, 0)),
         'robin robin': (Wall(1, .5), Wall(2, -.7)), 'driven robin': (Wall(1, .3, lambda t, c: c[:, 0] * t),
             Wall(0, 1))}


@pytest.mark.parametrize('walls', WALLS.values(), ids=WALLS)
def test_walls_hold_for_any_weights_and_in_the_solver(walls):
    flat = lambda z, c: 0 * z
    bump = lambda z, c: c[:, 0] * (z * (1 - z))**2                      # no value and no slope at either end
    pde = Heat(initial=bump, walls=walls)
    net, q, c = network(pde), coordinates(pde, 12), outside(pde, 12, 1)
    left, right, *_ = ends(pde, q)
    for wall, edge in zip(walls, (left, right)): assert wall_residual(wall, net, edge, c).abs().max() < 1e-10
    x, t = linspace(0, 1, 201), linspace(0, 1, 5)
    u = pde.reference(x, t, c[:2])
    slopes = (-3 * u[:, 0] + 4 * u[:, 1] - u[:, 2]) * 100, (3 * u[:, -1] - 4 * u[:, -2] + u[:, -3]) * 100
    for wall, value, slope in zip(walls, (u[:, 0], u[:, -1]), slopes):
        wanted = torch.stack([wall.value(s.expand(2), c[:2]) for s in t], 1) if wall.value else 0
        assert (wall.a * value + wall.b * slope - wanted).abs().max() < 2e-3
    assert u[..., -1].abs().max() > 1e-4 and Heat(initial=flat, walls=(Wall(), Wall())).reference(x, t,
        c[:1]).abs().max() == 0


def test_a_wall_does_not_bind_the_network_more_than_it_says():
    "At a Neumann wall the second and third derivative are free of each other."
    pde, c = Heat(initial=lambda z, c: 0 * z, walls=(Wall(0, 1), Wall(0, 1))), inside(Heat(), 1, 0)
    q = torch.tensor([[0., .5]], dtype=F64)
    index = closure([(3, 0)])
    pairs = []
    for seed in range(2):
        net = network(pde)
        net.theta[-2] = draw(1, 8, seed=seed) - .5
        d = taylor(lambda q: net(q, c), q, index)[:, 0]
        pairs.append(torch.stack([d[2], d[3]]))
    assert torch.linalg.det(torch.stack(pairs)).abs() > 1e-4


# Reference solutions

@settings(max_examples=10)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=5), st.floats(.01, .5))
def test_heat_against_a_sum_of_modes(b, k):
    modes = lambda z, c: sum(v * torch.sin((i + 1) * math.pi * z) for i, v in enumerate(b))
    x, t = linspace(0, 1, 13), linspace(0, 1, 5)
    exact = sum(v * torch.sin((i + 1) * math.pi * x)[:, None] * torch.exp(-k * ((i + 1) * math.pi)**2 * t) for i,
        v in enumerate(b))
    torch.testing.assert_close(Heat(k, initial=modes).reference(x, t, torch.zeros(1, 3, dtype=F64))[0], exact, rtol=0,
        atol=1e-10)


def test_solver_and_cole_hopf_agree():
    pde = Burgers()
    x, t, c = linspace(-1, 1, 15), linspace(0, .8, 5), inside(pde, 3, 0)
    exact = pde.cole_hopf(x, t, c, 2048)
    coarse, fine = (relative(solve(pde, x, t, c, n, 2 * n), exact).max() for n in (16, 48))
    assert fine < 1e-4 and fine < coarse / 100


SMOOTH = [Heat(), Helmholtz(), Burgers(), AllenCahn(), HeatWalls(), BurgersWalls(), AllenCahnWalls(), Schroedinger()]


@pytest.mark.parametrize('pde', SMOOTH, ids=lambda p: p.name)
def test_references_satisfy_the_equation(pde):
    "By finite differences of the reference itself; conditions outside included."
    h, c = 1e-2, torch.cat([inside(pde, 2, 3), outside(pde, 2, 3)])
    x0, y0 = pde.low[0] + .37 * (pde.high[0] - pde.low[0]), .43
    x, y = (torch.tensor([v - h, v, v + h], dtype=F64) for v in (x0, y0))
    if pde.coordinates[1] == 't': y = torch.cat([torch.zeros(1, dtype=F64), y])
    u = pde.reference(x, y, c)[:, :, -3:]
    u = u if u.dim() == 4 else u[..., None]
    centre = u[:, 1, 1]
    by = {(0, 0): centre, (1, 0): (u[:, 2, 1] - u[:, 0, 1]) / (2 * h), (0, 1): (u[:, 1, 2] - u[:, 1, 0]) / (2 * h),
          (2, 0): (u[:, 2, 1] - 2 * centre + u[:, 0, 1]) / h**2 / 2,
              (0, 2): (u[:, 1, 2] - 2 * centre + u[:, 1, 0]) / h**2 / 2}
    stacked = torch.stack([by.get(e, torch.zeros_like(centre)) for e in pde.index])
    assert pde.residuals(stacked, torch.tensor([[x0, y0]], dtype=F64).expand(4, 2), c).abs().max() < .03


def test_a_thin_allen_cahn_layer_is_refined():
    "With 64 points, once used for every diffusion, the solution is wrong by several percent without a word."
    pde = AllenCahn(1e-4, 5.)
    x, t, c = linspace(-1, 1, 41), linspace(0, 1, 5), pde.check([[.8, 0., .3]])
    best = solve(pde, x, t, c, 1024, 2048)
    assert relative(solve(pde, x, t, c, 64, 128), best) > .01
    assert relative(pde.reference(x, t, c), best) < 1e-3


@pytest.mark.parametrize('pde', [AllenCahn(1e-7, 50.), Heat(1e-6, initial=lambda z,
    c: torch.tanh(4e4 * z) * torch.tanh(4e4 * (1 - z)))],
                         ids=lambda p: p.name)
def test_what_cannot_be_resolved_is_refused_in_one_line(pde):
    few = lambda n: solve(pde, linspace(pde.low[0], pde.high[0], 41), linspace(0, .2, 3), inside(pde, 1, 0), n, n)
    with pytest.raises(ValueError,
        match='reference is not resolved: grids of .* points differ by') as e:        resolved(pde, few, most=128)
    assert '\n' not in str(e.value) and len(str(e.value)) < 300


class Coupled(PDE):
    "Rotation: v_t = w, w_t = -v, with a little diffusion; solved by cos and sin of time."
    name, fields, walls, default = 'coupled', ('v', 'w'), None, dict(amplitude=(.5, 1.))
    def initial(self, z, c): return torch.stack([c[:, 0] * torch.cos(2 * math.pi * z), 0 * z], -1)
    def residual(self, d, q, c): return d.v_t - d.w - .01 * d.v_xx, d.w_t + d.v - .01 * d.w_xx


def test_a_system_of_the_user():
    pde = Coupled()
    x, t, c = linspace(0, 1, 9), linspace(0, 1, 5), pde.check([[.7]])
    size = .7 * torch.cos(2 * math.pi * x)[:, None] * torch.exp(-.01 * 4 * math.pi**2 * t)
    exact = torch.stack([size * torch.cos(t), -size * torch.sin(t)], -1)[None]
    assert relative(pde.reference(x, t, c), exact) < 1e-4
    exam = Exam(pde, inside(pde, 4, 0))
    untrained, trained = (exam.errors(fit(pde, sample_points(pde, 40), 0, steps=k)).mean() for k in (0, 15))
    assert trained < .3 * untrained


def test_an_exact_network_would_have_error_zero():
    pde = Heat(initial=lambda z, c: c[:, 0] * torch.sin(math.pi * z))
    exam = Exam(pde, inside(pde, 4, 0))
    assert exam.errors(lambda q, c: c[:, 0] * torch.sin(math.pi * q[:, 0]) * torch.exp(-.1 * math.pi**2 * q[:,
        1])).max() < 1e-10
    torch.testing.assert_close(exam.errors(lambda q, c: 0 * q[:, 0]), torch.ones(4, dtype=F64))


needs_data = pytest.mark.skipif(
    'RDD_NB_DATA' not in os.environ or not Path(os.environ.get('RDD_NB_DATA', '.'), 'pinn-references').is_dir(),
    reason='needs published solutions: set RDD_NB_DATA to a folder that holds pinn-references')


ONE = torch.tensor([[1., 0, 0]], dtype=F64)


def published(file):
    from scipy.io import loadmat
    mat = loadmat(Path(os.environ['RDD_NB_DATA'])/'pinn-references'/file)
    u, x, t = (torch.from_numpy(np.ascontiguousarray(mat[k])) for k in (('usol', 'x',
        't') if 'usol' in mat else ('uu', 'x', 'tt')))
    return (torch.view_as_real(u) if u.is_complex() else u), x.ravel(), t.ravel()


@needs_data
@pytest.mark.parametrize('file, tolerance', [('burgers_shock.mat', 1e-4), ('AC.mat', 1e-3), ('KdV.mat', 1e-4),
    ('KS.mat', 1e-4), ('NLS.mat', 1e-3)])
def test_published_solutions(file, tolerance):
    wavy = lambda z, c: (2 * z - 1)**2 * torch.cos(math.pi * (2 * z - 1))
    pde = {'burgers_shock.mat': Burgers(.01 / math.pi), 'AC.mat': AllenCahn(1e-4, 5., initial=wavy), 'KdV.mat': KdV(),
           'KS.mat': KuramotoSivashinsky(), 'NLS.mat': Schroedinger()}[file]
    u, x, t = published(file)
    c = ONE if file != 'NLS.mat' else torch.tensor([[2., 1, 0]], dtype=F64)
    found = pde.reference(x[::8], t[::33], c)
    assert relative(found.flatten(1), u[::8, ::33].reshape(1, -1)) < tolerance


# The family

@everyone
def test_inside_and_outside(name):
    pde = make_pde(name)
    assert pde.distance(inside(pde, 40, 0)).max() == 0
    assert pde.distance(outside(pde, 40, 0)).min() > 0 and pde.distance(outside(pde, 40, 0, reach=.3)).max() <= .3
    torch.testing.assert_close(pde.unscaled(pde.scaled(outside(pde, 5, 0))), outside(pde, 5, 0))
    assert not torch.equal(inside(pde, 8, 'train'), inside(pde, 8, 'validation'))


# Training and its derivative

def test_training_reaches_the_points():
    pde = Heat()
    points = sample_points(pde, 20, labels=5)
    net = fit(pde, points, 0, steps=25, damping=(10., 1e-7))
    assert net.residual(points.q, points.c)[5:].abs().max() < 1e-6
    torch.testing.assert_close(net(points.q, points.c)[:5], points.target[:5], rtol=0, atol=1e-6)


def test_a_heavy_point_is_fitted_more_closely():
    pde = Burgers()
    points = sample_points(pde, 30)
    heavy = dataclasses.replace(points, weight=torch.where(torch.arange(30) < 3, 1e4, 1.).double())
    close = lambda p: fit(pde, p, 0, damping=(10., 1.)).residual(points.q, points.c)[:3].abs().max()
    assert close(heavy) < .1 * close(points)


def test_the_order_of_points_does_not_matter():
    pde, order = Heat(), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    points = sample_points(pde, 16)
    mixed = dataclasses.replace(points, **{f: getattr(points, f)[order] for f in ('q', 'c', 'value', 'target',
        'weight')})
    for a, b in zip(fit(pde, points, 0).theta, fit(pde, mixed, 0).theta): torch.testing.assert_close(a, b, rtol=1e-6,
        atol=1e-8)


@pytest.mark.parametrize('name', ['heat', 'helmholtz', 'burgers', 'allen-cahn', 'allen-cahn-walls', 'schroedinger',
    'kdv'])
@pytest.mark.parametrize('risk', [Mean(), CVaR(.5)], ids=repr)
def test_gradient_of_the_distillation_objective(name, risk):
    pde = make_pde(name)
    start, exam = sample_points(pde, 5, seed=2, labels=1), Exam(pde, inside(pde, 4, 'g'), 6, 4)
    names = 'q', 'c', 'target', 'weight'
    leaves = [getattr(start, f).clone().requires_grad_() for f in names]
    how = dict(steps=3, damping=(10., 1.), width=4, unroll=3)
    value = lambda leaves: risk(exam.errors(fit(pde, dataclasses.replace(start, **dict(zip(names, leaves))), 'g',
        **how)))
    grads = torch.autograd.grad(value(leaves), leaves)
    for i, leaf in enumerate(leaves):
        v = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(i), dtype=F64)
        shifted = lambda s: value([l.detach() + s * v if j == i else l.detach() for j, l in enumerate(leaves)])
        numeric = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
        assert (grads[i] * v).sum().item() == pytest.approx(numeric.item(), rel=1e-4, abs=1e-7), names[i]


def test_tail_one_is_the_mean():
    quick = lambda risk: distill_points('heat', 6, how=Distillation(steps=2, risk=risk, conditions=4), progress=False)
    a, b, c = quick('cvar(tail=1)'), quick(Mean()), quick(WorstCase())
    torch.testing.assert_close(a.q, b.q)
    assert not torch.equal(a.q, c.q)


# Distillation

@pytest.mark.parametrize('changes', [{}, dict(objective='residual'), dict(learn='points targets'), dict(unroll=15)],
    ids=str)
def test_distillation_is_a_function_of_its_seed(changes):
    make = lambda seed: distill_points('burgers', 8, seed, labels=2,
        how=Distillation(steps=2, conditions=4, **changes), progress=False)
    a, b, other = make(1), make(1), make(2)
    for f in ('q', 'c', 'target', 'weight'): assert torch.equal(getattr(a, f), getattr(b, f))
    assert not torch.equal(a.q, other.q)
    assert a.value.sum() == 2 and len(a) == 8


def test_distilled_conditions_stay_in_the_family_and_honest_targets_stay_zero():
    pde = Burgers()
    made = distill_points(pde, 12, how=Distillation(steps=12, lr=2., conditions=4), progress=False)
    assert pde.distance(made.c).max() == 0 and (made.weight > 0).all()
    assert made.target.abs().max() == 0
    history = [h['risk'] for h in made.provenance['history']]
    assert [h['step'] for h in made.provenance['history']] == [0, 10, 12] and min(history) <= history[0]


def test_residual_objective_never_solves(monkeypatch):
    "The references of the exams are computed but the solution has no say: another one gives the same points."
    run = lambda: distill_points('heat', 6, how=Distillation(steps=2, objective='residual', conditions=4),
        progress=False)
    before = run()
    monkeypatch.setattr(Heat, 'reference', lambda self, x, t, c: torch.ones(len(c), len(x), len(t), dtype=F64))
    torch.testing.assert_close(before.q, run().q, rtol=0, atol=0)


def test_an_exam_on_another_device_is_the_same():
    pde = AllenCahn()
    a, b = Exam(pde, inside(pde, 4, 0), 7, 5), Exam(pde, inside(pde, 4, 0), 7, 5).to('cpu')
    assert a.report(network(pde)) == b.report(network(pde))
    moved = Exam(pde, inside(pde, 4, 0), 7, 5).to('meta')
    still = {k for k, v in vars(moved).items() if torch.is_tensor(v) and not v.is_meta}
    assert still == {'x', 'y'}                                           # of these two only the spacing is used


# Competitors

def test_adaptive_rules():
    pde = Burgers()
    seen = []
    watch = lambda change: lambda k, net, points: seen.append(change(k, net, points)) or seen[-1]
    fit(pde, sample_points(pde, 10), 0, change=watch(rar(pde, 20, 0)))
    assert len(seen[0]) == 10 and len(seen[-1]) == 20 and torch.equal(seen[-1].q[:10], seen[0].q)
    seen.clear()
    fit(pde, sample_points(pde, 20, labels=3), 0, change=watch(rad(pde, 20, 0)))
    assert len(seen[-1]) == 20 and torch.equal(seen[-1].q[:3], seen[0].q[:3]) and not torch.equal(seen[-1].q[3:],
        seen[0].q[3:])
    points = sample_points(pde, 20)
    weight = causal(pde)(0, PINN.new(pde, 0), points).weight
    order = points.q[:, 1].argsort()
    assert weight[order][0] == 1 and (weight[order].diff() <= 0).all() and weight.min() < 1


def test_best_of_is_the_best_of_what_was_tried():
    pde, how = Heat(), Distillation(conditions=4)
    exam = lessons(pde, 7, how)[0]
    tried = [sample_points(pde, 8, 'sobol', (7, i)) for i in range(3)]
    risks = [how.risk(exam.errors(fit(pde, p, 7, 'try', i, damping=how.damping))).item() for i, p in enumerate(tried)]
    assert torch.equal(best_of(pde, 8, 7, tries=3, how=how).q, tried[int(np.argmin(risks))].q)


def test_rivals_see_exactly_what_distillation_saw(monkeypatch):
    "Every condition that the solver is asked for while distilling is in the values, and no other."
    pde, how, asked = Heat(), Distillation(steps=1, conditions=4), []
    solver = Heat.reference
    monkeypatch.setattr(Heat, 'reference', lambda self, x, t, c: (asked.append(c), solver(self, x, t, c))[1])
    distill_points(pde, 6, 3, how=how, progress=False)
    values = solver_values(pde, 3, how)
    assert {tuple(c) for c in values.c.tolist()} == {tuple(c) for c in torch.cat(asked[:2]).tolist()}
    assert len(asked) == 4 and values.value.all() and len(values) == 8 * 13 * 8
    assert (pde.bubble(values.q) > 0).all()


def test_values_teach_without_an_equation(monkeypatch):
    monkeypatch.setitem(BATCHED, 'steps', 12)
    pde, how = Heat(), Distillation(conditions=8)
    exam = Exam(pde, inside(pde, 16, 'x'))
    def error(method):
        points, kwargs = prepare(pde, method, how=how)
        return exam.errors(fit(pde, points, 0, **kwargs)).mean()
    assert error('values') < .5 * error('untrained')
    mixed = prepare(pde, 'mixed', how=how)[0]
    assert mixed.value.double().mean() == .5 and mixed.target[~mixed.value].abs().max() == 0


def test_batches_are_parts_and_differ():
    points, change = sample_points(Heat(), 20, labels=3), None
    change = batches(points, 0, 8)
    a, b = change(0, None, points), change(1, None, points)
    rows = {tuple(r) for r in points.q.tolist()}
    assert len(a) == len(b) == 8 and {tuple(r) for r in a.q.tolist()} < rows and not torch.equal(a.q, b.q)
    assert BATCHED['steps'] > 15


def test_tuning_finds_the_least_risk():
    seen = tune(Heat(), n=16, grid=(1e-4, .1, 10.), seeds=(0, 1))
    assert set(seen) == {1e-4, .1, 10.} and list(seen.values()) == sorted(seen.values())
    assert next(iter(seen)) != 1e-4                                       # a fit to the last digit is not the best


@given(st.floats(0, 50), st.floats(.01, 5), st.floats(0, 50), st.floats(.01, 5))
def test_break_even_is_where_the_totals_meet(made, each, rival_made, rival_each):
    k = break_even(made, each, rival_made, rival_each)
    if math.isinf(k): assert each >= rival_each
    elif k > 0: assert made + k * each == pytest.approx(rival_made + k * rival_each, rel=1e-6, abs=1e-6)
    else: assert made <= rival_made or each >= rival_each or made == pytest.approx(rival_made)


def test_pays_names_better_rivals_and_prices_the_others():
    row = lambda m, worst, made, each: dict(method=m, seconds_points=made,
        seconds_training=each) | {'inside worst': worst}
    text = pays([row('distilled', .3, 14., .25), row('values', .1, 2., 6.), row('dense', .4, 0., 2.25)])
    assert text == 'smaller worst error than distilled: values; distilled pays after 7 trainings (dense)'


def test_comparison_has_equal_points():
    pde = Heat()
    methods = ['untrained', 'uniform', 'lhs', 'sobol', 'grid', 'rar', 'rad', 'causal']
    rows = compare_points(pde, methods, {'in': Exam(pde, inside(pde, 4, 0), 7, 5)}, n=8, networks=1)
    assert [r['points'] for r in rows] == [8] * 8
    at_once = [prepare(pde, m, n=8) for m in ('rar at once', 'rad at once')]
    for points, how in at_once:
        seen = [points]
        fit(pde, points, 0, change=lambda k, net, p: seen.append(how['change'](k, net, p)) or seen[-1])
        assert len(seen[-1]) == 8 and not torch.equal(seen[-1].q[-1], points.q[-1])
    assert all(math.isfinite(r[k]) for r in rows for k in ('in mean', 'in worst', 'in tail', 'in residual',
        'in energy'))
    assert all(r['in mean'] <= r['in tail'] + 1e-12 <= r['in worst'] + 2e-12 for r in rows)


def test_adam_trains_too():
    pde = Heat()
    points = sample_points(pde, 16)
    size = lambda net: net.residual(points.q, points.c).square().mean()
    assert size(fit_adam(pde, points, 0, steps=100)) < .3 * size(PINN.new(pde, 0))


# Files and the command

def test_files(tmp_path):
    points = sample_points(Burgers(), 8, labels=2)
    again = load_points(points.save(tmp_path/'p.safetensors'))
    assert all(torch.equal(getattr(points, f), getattr(again, f)) for f in ('q', 'c', 'value', 'target',
        'weight')) and again.provenance == points.provenance
    (tmp_path/'no.safetensors').write_bytes(b'nothing')
    save_file({'x': torch.zeros(2)}, tmp_path/'other.safetensors')
    bad = dataclasses.replace(points, weight=-points.weight)
    bad.save(tmp_path/'bad.safetensors')
    for name, text in (('no', 'not a readable safetensors file'), ('other', 'not a set of PINN points'),
        ('bad', 'damaged')):
        with pytest.raises(ValueError, match=text): load_points(tmp_path/f'{name}.safetensors')
    with pytest.raises(FileNotFoundError, match='no such file'): load_points(tmp_path/'none')


def command(*args):
    pinn, asked = read_line(['pinn', *map(str, args)])
    return pinn(**asked)


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(BATCHED, 'steps', 2)                               # a quick fit to the values
    monkeypatch.setattr(collocation, 'best_of', partial(best_of, tries=3))
    out = tmp_path/'new'/'run'
    command('--pde', 'poisson', '--points', 6, '--steps', 1, '--networks', 1, '--seeds', 2, '--out', out)
    assert sorted(p.name for p in out.iterdir()) == ['points.csv', 'points.png', 'points.safetensors', 'result.json']
    shown = capsys.readouterr().out
    assert all(w in shown for w in ('distilled', 'values', 'mixed', '±', 'tuned', 'pays'))
    result = json.loads((out/'result.json').read_text())
    assert {r['seed'] for r in result['rows']} == {0, 1} and result['rows'][-1]['method'] == 'distilled'
    assert all(r['seconds_training'] > 0 for r in result['rows'] if r['method'] == 'sobol')
    assert len(load_points(out/'points.safetensors')) == 6
    with pytest.raises(ValueError, match='is there already'): command('--out', out)
    assert [p.name for p in out.parent.iterdir()] == ['run']


OWN = """
import torch
from rdd_nb.equations import PDE, Wall
class Rod(PDE):
    name, walls = 'rod', (Wall(0, 1), Wall(0, 1))
    default = dict(amplitude=(.5, 1.), rate=(0., 2.))
    def initial(self, z, c): return c[:, 0] * torch.cos(torch.pi * z)
    def residual(self, d, q, c):
        return d.u_t - .1 * (1 + q[:, 0]) * d.u_xx + c[:, 1] * d.u - torch.sin(torch.pi * q[:, 1])
"""


def test_an_equation_in_the_users_own_file(tmp_path):
    (tmp_path/'mine.py').write_text(OWN)
    pde = make_pde(f'{tmp_path}/mine.py:Rod')
    exam = Exam(pde, inside(pde, 8, 0), 9, 7)
    points = distill_points(pde, 12, how=Distillation(steps=2, conditions=4), progress=False)
    assert exam.errors(fit(pde, points, 0)).mean() < .5 * exam.errors(fit(pde, points, 0, steps=0)).mean()
    with pytest.raises(ValueError, match="holds no class 'Rad'"): make_pde(f'{tmp_path}/mine.py:Rad')
    with pytest.raises(FileNotFoundError, match='there is no such file'): make_pde(f'{tmp_path}/yours.py:Rod')


@pytest.mark.parametrize('args, text', [
    (['--pde', 'navier-stokes'], "pde: got 'navier-stokes', expected file.py:Class, or one of heat"),
        (['--points', 0], 'points=0'), (['--points', -3], 'points=-3'),
    (['--device', 'cuda:99'], "device='cuda:99' is not available"),
        (['--labels', 70], 'labels: got 70, expected at most'), (['--labels', -1], 'labels=-1'),
            (['--risk', 'worst'], 'unknown risk'), (['--risk', 'cvar(tail=2)'], 'tail'),
    (['--risk', 'twolevel(mean, max)'], 'risk: got'), (['--objective', 'beauty'], 'objective: got'),
        (['--steps', -1], 'steps=-1'), (['--networks', 0], 'networks=0'),
    (['--seed', -1], 'seed=-1'), (['--seeds', 0], 'seeds=0')])
def test_the_command_refuses_in_one_line(args, text, tmp_path):
    with pytest.raises(ValueError, match=text.replace('(', r'\(')) as e: command(*args, '--out', tmp_path/'x')
    assert '\n' not in str(e.value)
    assert not list(tmp_path.iterdir())


FAMILY = dict(amplitude=(0, 1), frequency=(0, 1), shape=(0, 1))


class Doubled(PDE):
    name = 'doubled'
    def residual(self, d, q, c): return 2 * d.u_t - d.u_xx


class Waving(PDE):
    name = 'waving'
    def residual(self, d, q, c): return d.u_tt - d.u_xx


class Stray(PDE):
    name = 'stray'
    def residual(self, d, q, c): return d.u_t - d.w_xx


def asked(pde): return pde.reference(linspace(pde.low[0], pde.high[0], 5), linspace(0, 1, 3), inside(pde, 2, 0))


BAD = [
    (lambda: make_pde('wave'), 'pde: got'), (lambda: Heat(math.inf), 'diffusivity=inf'),
        (lambda: Heat(-1), 'diffusivity'),
    (lambda: Burgers(math.nan), 'viscosity=nan'), (lambda: Burgers(True), 'viscosity'),
        (lambda: AllenCahn(reaction=0), 'reaction'),
    (lambda: Helmholtz(math.pi), 'wavenumber'), (lambda: Helmholtz(math.nan), 'wavenumber'),
    (lambda: Heat(initial=lambda z, c: 1 + 0 * z),
        '^heat, initial: is 1 at the left end .* boundary condition there is 0$'),
    (lambda: Heat(walls=(Wall(), Wall(0, 1))), r'^heat, initial: 0 u \+ 1 u_x is .* at the right end .* there is 0$'),
    (lambda: Heat(walls=(Wall(value=lambda t, c: c[:, 0]), Wall())), 'boundary condition there is 0.5$'),
    (lambda: Wall(0, 0), 'wall: a=0, b=0'), (lambda: Wall(math.nan), 'wall: a=nan'),
    (lambda: Burgers(initial=lambda z, c: z), 'right end'), (lambda: Heat(initial=lambda z, c: z * math.nan),
        'initial: is nan'),
    (lambda: AllenCahn(initial=lambda z, c: z), '^allen-cahn, initial: .* boundary condition is periodic$'),
    (lambda: Heat(family=FAMILY | dict(amplitude=(1, 1))), 'family: amplitude'),
    (lambda: Heat(family=FAMILY | dict(amplitude=(0, math.inf))), 'family'),
    (Stray, "stray, residual: asks for 'w_xx', expected a field"), (lambda: asked(Doubled()), 'expects u_t alone'),
    (lambda: asked(Waving()), 'cannot handle u_tt'),
    (lambda: asked(KdV(initial=lambda z, c: torch.sin(math.pi * z), walls=(Wall(), Wall()))), 'order 3'),
    (lambda: Heat().check([[1., 2.]]), 'conditions: got shape'),
        (lambda: Heat().check([[1., math.nan, 0]]), 'conditions: row 0'),
    (lambda: outside(Heat(), 3, 0, along='colour'), 'along='),
        (lambda: sample_points(Heat(), 2.5), 'points=2.5'),
    (lambda: sample_points(Heat(), True), 'points=True'), (lambda: prepare(Heat(), 'magic'), 'method: got'),
    (lambda: prepare(Helmholtz(), 'causal'), 'need a time'), (lambda: Distillation(conditions=1), 'conditions=1'),
    (lambda: Distillation(lr=0), 'lr=0'), (lambda: Distillation(learn=()), 'learn'),
        (lambda: Distillation(start='halton'), 'start'),
    (lambda: fit(Heat(), sample_points(Heat(), 4), steps=-1), 'steps=-1')]


@pytest.mark.parametrize('call, text', BAD)
def test_bad_input_is_refused_in_one_line(call, text):
    with pytest.raises(ValueError, match=text) as e: call()
    assert '\n' not in str(e.value) and len(str(e.value)) <= 300
