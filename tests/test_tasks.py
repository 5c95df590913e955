"Tasks: derivatives of learners against finite differences, exact solutions against cvxpy and scikit-learn, what a surrogate may not be blind to."
import cvxpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression, Ridge

from rdd_nb.risk import CVaR, Mean, WorstCase
from rdd_nb.tasks import (SURROGATES, TASKS, ConvexLearner, Density, Exact, Fourier, KernelLearner, Logistic, NetworkLearner, Quadratic, Quantiles, RidgeLearner, Sample, SmallSet,
                          Task, by_environment, classification, descend, faithfulness, optimum, random_subsets, ranking, regression, spearman)

F64 = torch.float64
ONE = lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
def squared(p, y): return (p - y).square().sum(1)


def small_task(n=30, risk=None, learner=None, seed=0, **more):
    "Three environments with different slopes."
    env = torch.arange(n) % 3
    x = draw(n, 3, seed=seed)
    y = x[:, :1] * (env[:, None] - .5) + .3 * draw(n, 1, seed=seed + 1)
    return Task(Sample(x, y, env), Sample(x + .1, y, env), learner or RidgeLearner(.1), squared, risk, free_y=True, **more)


def whole(task): return SmallSet(task.train.x, task.train.y)


# Learners

LEARNERS = [RidgeLearner(.1), RidgeLearner(.1, Quadratic()), KernelLearner(.3, .01), Logistic(.1), Logistic(.1, Fourier(3, 6, .3)), Quantiles((.2, .7), .05), NetworkLearner(ONE, 4, .2)]


@pytest.mark.parametrize('learner', LEARNERS, ids=repr)
def test_derivative_of_learning_is_that_of_finite_differences(learner):
    "On samples, targets and weights, through what the model predicts."
    x, y, w, new = draw(6, 3).requires_grad_(), torch.sigmoid(draw(6, 1, seed=1)).requires_grad_(), (draw(6, seed=2).abs() + .2).requires_grad_(), draw(4, 3, seed=3)
    assert torch.autograd.gradcheck(lambda *s: learner.predict(learner.fit(*s), new), (x, y, w))


def test_derivative_of_a_density():
    x, w = draw(4, 2).requires_grad_(), (draw(4, seed=1).abs() + .1).requires_grad_()
    kde = Density(.4)
    assert torch.autograd.gradcheck(lambda x, w: kde.predict(kde.fit(x, None, w), draw(5, 2, seed=2)), (x, w))


@pytest.mark.parametrize('k', [1, 3])
def test_logistic_regression_is_that_of_scikit_learn(k):
    x = draw(60, 4)
    label = (x[:, 0] + draw(60, seed=1) > 0).long() + (0 if k == 1 else (x[:, 1] > .5).long())
    y = label[:, None].double() if k == 1 else torch.nn.functional.one_hot(label, k).double()
    theta = Logistic(.02).fit(x, y)
    reference = LogisticRegression(C=1 / (.02 * 60), tol=1e-12, max_iter=1000).fit(x, label)
    probability = torch.sigmoid(Logistic(.02).predict(theta, x)) if k == 1 else Logistic(.02).predict(theta, x).softmax(1)
    np.testing.assert_allclose(probability[:, -1], reference.predict_proba(x)[:, -1], atol=1e-5)


def test_soft_labels_are_a_mixture_of_hard_ones():
    x, p = draw(8, 2), torch.sigmoid(draw(8, 1, seed=1))
    both = torch.cat([x, x]), torch.cat([torch.ones(8, 1), torch.zeros(8, 1)]).double(), torch.cat([p, 1 - p])[:, 0]
    torch.testing.assert_close(Logistic(.1).fit(x, p), Logistic(.1).fit(*both))


@pytest.mark.parametrize('learner', LEARNERS[:6], ids=repr)
def test_integer_weights_are_replication(learner):
    x, y, counts, new = draw(7, 3), torch.sigmoid(draw(7, 1, seed=1)), torch.arange(7) % 3, draw(4, 3, seed=3)
    twice = torch.arange(7).repeat_interleave(counts)
    torch.testing.assert_close(learner.predict(learner.fit(x, y, counts.double()), new), learner.predict(learner.fit(x[twice], y[twice]), new), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('learner', [RidgeLearner(.1), Logistic(.1), Quantiles((.2, .7), .05)], ids=repr)
def test_what_is_learned_is_a_minimum_of_the_training_loss(learner):
    x, y = draw(20, 3), torch.sigmoid(draw(20, 1, seed=1))
    theta = learner.fit(x, y)
    best = learner.training_loss(theta, x, y)
    for k in range(5): assert learner.training_loss(theta + .01 * draw(*theta.shape, seed=k), x, y) > best
    leaf = theta.detach().requires_grad_()
    assert torch.autograd.grad(learner.training_loss(leaf, x, y), leaf)[0].abs().max() < 1e-7


@pytest.mark.parametrize('learner', [Logistic(.1), Quantiles((.2, .7), .05)], ids=repr)
@pytest.mark.parametrize('k', [1, 3])
def test_formulas_of_slopes_are_those_of_autograd(learner, k):
    if isinstance(learner, Quantiles): z, y = draw(6, 2), draw(6, 1, seed=1)
    else: z, y = draw(6, k), torch.rand(6, k, generator=torch.Generator().manual_seed(1), dtype=F64)
    for a, b in zip(learner.slopes(z, y), ConvexLearner.slopes(learner, z.clone(), y)): torch.testing.assert_close(a, b)


def test_newton_survives_a_bad_start():
    "Separable, far apart, hardly regularised: plain Newton steps would run away."
    x = torch.tensor([[-30.], [-29], [40], [60]], dtype=F64)
    theta = Logistic(1e-4).fit(x, torch.tensor([[0.], [0], [1], [1]], dtype=F64))
    assert theta.isfinite().all() and theta[0] > 0
    far = Quantiles((.1, .5), 1e-3, beta=.1).fit(torch.zeros(5, 1, dtype=F64), torch.tensor([[-200.], [300], [301], [302], [900]], dtype=F64))      # a straight line between the kinks
    assert -200 <= far[-1, 0] < 300 and abs(far[-1, 1] - 301) < .5


def test_quantiles_of_a_sample():
    "Without features the quantiles are those of numpy, up to the rounding of the kink."
    y = draw(2000, 1)
    theta = Quantiles((.1, .5, .9), 1e-6, beta=.01).fit(torch.zeros(2000, 1, dtype=F64), y)
    np.testing.assert_allclose(theta[-1], np.quantile(y, [.1, .5, .9]), atol=.03)


def test_fourier_features_are_a_kernel():
    x = draw(5, 2) * .5
    f = Fourier(2, 20000, .7)(x)
    np.testing.assert_allclose(f @ f.T, torch.exp(-.7 * torch.cdist(x, x).square()), atol=.04)


# The task

def test_values_by_hand():
    task = small_task(risk=WorstCase())
    theta = task.fit(whole(task))
    reference = Ridge(alpha=.1 * 30).fit(task.train.x, task.train.y)
    errors = (reference.predict(task.train.x).reshape(-1) - task.train.y[:, 0].numpy()) ** 2
    expected = [errors[task.train.env == e].mean() for e in range(3)]
    np.testing.assert_allclose(task.values(theta, task.train), expected, rtol=1e-9)
    assert task.objective(whole(task)).item() == pytest.approx(max(expected))
    assert task.objective(whole(task), pooled=True).item() == pytest.approx(errors.mean())
    assert small_task().objective(whole(task)).item() == pytest.approx(errors.mean())


@pytest.mark.parametrize('risk', [None, CVaR(.5), .5 * Mean() + .5 * WorstCase()], ids=repr)
@pytest.mark.parametrize('learner', [RidgeLearner(.1), KernelLearner(.3, .01), NetworkLearner(ONE, 3, .1)], ids=repr)
def test_gradient_of_the_objective(risk, learner):
    task = small_task(risk=risk, learner=learner)
    s = draw(5, 3, seed=5).requires_grad_(), draw(5, 1, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: task.objective(SmallSet(x, y)), s)


def test_several_learners_are_averaged():
    a, b = RidgeLearner(.1), RidgeLearner(5.)
    values = [small_task(learner=l).objective(whole(small_task())).item() for l in (a, b, (a, b))]
    assert values[2] == pytest.approx((values[0] + values[1]) / 2)


@pytest.mark.parametrize('risk', [None, WorstCase(), CVaR(.5)], ids=repr)
def test_the_optimum_is_that_of_cvxpy(risk):
    task = small_task(risk=risk)
    f, y, env = np.c_[task.train.x.numpy(), np.ones(30)], task.train.y[:, 0].numpy(), task.train.env.numpy()
    theta = cvxpy.Variable(4)
    means = [cvxpy.sum_squares(f[env == e] @ theta - y[env == e]) / 10 for e in range(3)]
    if risk is None: value = sum(means) / 3
    elif isinstance(risk, WorstCase): value = cvxpy.maximum(*means)
    else:
        level = cvxpy.Variable()
        value = level + sum(cvxpy.pos(m - level) for m in means) / (3 * .5)
    expected = cvxpy.Problem(cvxpy.Minimize(value)).solve()
    found = task._risk(task.values(optimum(task), task.train)).item()
    assert expected - 1e-6 <= found <= expected + 2e-3
    for s in random_subsets(task, 6, 5) + [whole(task)]: assert task.objective(s) >= expected - 1e-9


@settings(max_examples=10)
@given(st.integers(0, 99), st.floats(.001, 1.), st.integers(1, 6))
def test_two_points_teach_any_linear_model(seed, l2, d):
    w, b, a = draw(d, seed=seed), draw(1, seed=seed + 1), .7
    c = (a * a * w @ w + l2) / a
    theta = RidgeLearner(l2).fit(torch.stack([a * w, -a * w]), torch.stack([b + c, b - c]))
    torch.testing.assert_close(theta[:, 0], torch.cat([w, b]))


@settings(max_examples=10)
@given(st.integers(0, 99), st.floats(.003, 1.))
def test_the_margin_bound_behind_two_points_of_logistic_regression(seed, l2):
    "l2 * |w|^2 is the mean of u * sigmoid(-u) over the margins, and never above its maximum."
    x, y = draw(40, 3, seed=seed), (draw(40, 1, seed=seed + 1) > .3).double()
    y[0], y[1] = 0, 1
    theta = Logistic(l2).fit(x, y)
    u = (2 * y - 1) * Logistic(l2).predict(theta, x)
    norm = l2 * theta[:-1].square().sum()
    assert norm.item() == pytest.approx((u * torch.sigmoid(-u)).mean().item(), abs=1e-8)
    assert norm < .27847


def test_descend_changes_what_is_free():
    task = TASKS['effect']()
    start = random_subsets(task, 8, 1)[0]
    end, kept = descend(task.objective, start, task, steps=15, snapshots=(0, 5))
    assert torch.equal(kept[0].x, start.x) and len(kept) == 2 and not torch.equal(kept[1].x, start.x)
    assert torch.equal(end.x[:, -1], start.x[:, -1]) and (end.x[:, :-1] != start.x[:, :-1]).all() and (end.y != start.y).all()
    assert task.objective(end) < task.objective(start)
    labels = classification()
    start = random_subsets(labels, 10, 1)[0]
    assert torch.equal(descend(labels.objective, start, labels, steps=2)[0].y, start.y)


# Surrogates

@pytest.mark.parametrize('name', SURROGATES)
@pytest.mark.parametrize('risk', [None, WorstCase()], ids=repr)
def test_gradient_of_a_surrogate(name, risk):
    surrogate = SURROGATES[name](small_task(risk=risk))
    s = draw(4, 3, seed=5).requires_grad_(), draw(4, 1, seed=6).requires_grad_()
    with torch.no_grad(): assert surrogate(SmallSet(*s)).isfinite()            # may be asked without gradients
    if name == 'trajectory': surrogate.rate = .01                              # (its step size depends on the set, which the derivative leaves out)
    assert torch.autograd.gradcheck(lambda x, y: surrogate(SmallSet(x, y)), s, fast_mode=True)


@pytest.mark.parametrize('name', ['quantisation', 'moments', 'covariances', 'MMD', 'characteristic', 'gradient', 'cosine', 'parameters'])
def test_a_distance_is_zero_at_the_real_set_and_knows_environments(name):
    task = small_task(risk=WorstCase())
    assert abs(SURROGATES[name](task, pooled=True)(whole(task))) < 1e-12
    if name != 'quantisation': assert SURROGATES[name](task)(whole(task)) > 1e-3      # the whole is not any of its parts
    one = small_task(risk=WorstCase(), seed=3)
    same = Task(*(Sample(s.x, s.y, torch.zeros(30, dtype=torch.long)) for s in (one.train, one.test)), one.learners, squared, WorstCase(), free_y=True)
    few = SmallSet(draw(4, 3, seed=5), draw(4, 1, seed=6))
    torch.testing.assert_close(SURROGATES[name](same)(few), SURROGATES[name](one, pooled=True)(few))      # one environment is none


@pytest.mark.parametrize('name', SURROGATES)
def test_order_of_samples_does_not_matter(name):
    task, few = small_task(), SmallSet(draw(5, 3, seed=5), draw(5, 1, seed=6))
    surrogate = SURROGATES[name](task)
    torch.testing.assert_close(surrogate(few), surrogate(SmallSet(few.x.flip(0), few.y.flip(0))))


def test_moments_are_blind_where_the_exact_objective_is_not():
    "Two sets with the same moments, one of which teaches the opposite curvature."
    x = torch.tensor([[-1.], [0], [1]], dtype=F64)
    task = Task(Sample(x, x.square()), Sample(x, x.square()), RidgeLearner(1e-3, Quadratic()), squared, free_y=True)
    class Plain(SURROGATES['moments']):
        def _mean(self, learner, x, y): return torch.cat([x, y, x * y], 1).mean(0)
    good, bad = SmallSet(x, x.square()), SmallSet(x, 4 / 3 - x.square())
    assert Plain(task)(good) == pytest.approx(0, abs=1e-12) and Plain(task)(bad) == pytest.approx(0, abs=1e-12)
    assert task.objective(good) < .01 < task.objective(bad)


def test_ridge_and_training_loss_are_exact_for_ridge():
    task, few = regression(), random_subsets(regression(), 10, 1)[0]
    exact = Exact(task)(few)
    for name in 'ridge', 'training loss': torch.testing.assert_close(2 * SURROGATES[name](task)(few), exact)


# Faithfulness

def test_spearman_is_that_of_scipy():
    a, b = np.random.default_rng(0).integers(0, 5, (2, 30))
    assert spearman(a, b) == pytest.approx(spearmanr(a, b)[0]) and spearman(a, np.ones(30)) == 0


def test_regret():
    candidates, truth = [SmallSet(torch.full((1, 1), float(v)), torch.zeros(1, 1)) for v in range(5)], [0., 1, 2, 3, 4]
    at = lambda i: faithfulness(lambda s: (s.x[0, 0] - i).abs(), candidates, truth)
    assert at(0) == {'rank_correlation': pytest.approx(1), 'regret': 0}
    assert at(2)['regret'] == pytest.approx(1) and at(4)['regret'] == pytest.approx(2) and at(4)['rank_correlation'] == pytest.approx(-1)


@pytest.mark.parametrize('name', TASKS)
def test_example_tasks(name):
    "Same seed, same task; training and test samples share nobody; subsets have every class."
    task, again, other = TASKS[name](3), TASKS[name](3), TASKS[name](4)
    assert torch.equal(task.train.x, again.train.x) and not torch.equal(task.train.x, other.train.x)
    assert torch.cdist(task.train.x, task.test.x).min() > 1e-9 or name == 'density'
    few = random_subsets(task, 10, 2, noise=1.)
    assert all(np.isfinite(task.truth(s)) for s in few)
    if name.startswith('classification'): assert all((s.y.sum(0) == 2).all() for s in few)
    s = few[0].x.clone().requires_grad_()
    assert torch.autograd.grad(task.objective(SmallSet(s, few[0].y)), s)[0].isfinite().all()


def test_ranking_of_the_full_set_is_perfect():
    task = ranking()
    assert task.objective(whole(task)) == pytest.approx(0, abs=1e-12) and task.truth(whole(task)) == pytest.approx(0, abs=1e-9)
    assert task.objective(random_subsets(task, 10, 1)[0]) > .01


def test_environments_that_differ_in_size_count_alike():
    torch.testing.assert_close(by_environment(torch.tensor([1., 1, 1, 5]), torch.tensor([0, 0, 0, 1])), torch.tensor([1., 5]))


@pytest.mark.parametrize('make, message', [
    (lambda: RidgeLearner(0), '^l2: got 0, expected a number above 0$'),
    (lambda: Task(Sample(draw(3, 2), draw(3)), Sample(draw(3, 2), draw(3)), RidgeLearner(), squared), r'^train: got x \(3, 2\) and y \(3,\), expected'),
    (lambda: Task(*[Sample(draw(3, 2), draw(3, 1))] * 2, RidgeLearner(), squared, WorstCase()), '^train: no environments'),
    (lambda: optimum(small_task(learner=KernelLearner())), '^learners: .*expected parametric'),
    (lambda: SURROGATES['gradient'](TASKS['density']()), '^Gradient: Density.* has no parameters of its own$'),
    (lambda: faithfulness(lambda s: 0, [1, 2], [1, 2]), '^candidates: got 2 with 2 true risks'),
])
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message) as e: make()
    assert '\n' not in str(e.value)
