"""Points for PINNs across boundary conditions: distilled, sampled, adaptive, and rivals with the same solver values.

    python benchmarks/pinn.py --minutes 15                   # continues benchmarks/results/pinn.json
    python benchmarks/pinn.py --only values mixed grid       # these methods first, or alone
    python benchmarks/pinn.py --show                         # the tables, without computing

All rows: about an hour of one CPU core. The result file is written after each row, and rows that it holds are not
computed again, so the benchmark may be stopped at any time. Each row names the commit it was made with.

The samplers' damping is chosen first, for each equation, such that Sobol points do best on tuning seeds; distilled sets
train with the default of `Distillation`. Seeds are the units: points, networks and training conditions are drawn anew
for each; the test conditions are the same for all. Ablations are run on one equation.
"""
import argparse, dataclasses, subprocess, time
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from rdd_nb.collocation import METHODS, Distillation, break_even, compare_points, prepare, sample_points
from rdd_nb.core import read_json, versions, write_json
from rdd_nb.equations import inside, make_pde, outside
from rdd_nb.pinn import Exam, fit, fit_adam
from rdd_nb.risk import CVaR, Mean

OUT = Path(__file__).parent / 'results' / 'pinn.json'
EQUATIONS = 'heat', 'helmholtz', 'burgers', 'allen-cahn'           # the profile, or one edge, varies
DRIVEN = 'heat-walls', 'burgers-walls', 'allen-cahn-walls'         # the walls vary
POINTS, LABELS, STEPS, ABLATED, SEEDS, ABLATION_SEEDS = 64, 8, 100, 'burgers', 5, 3
GRID, TUNING = (.03, .1, .3, 1.), range(1000, 1003)                # last damping, the first is 10
SAMPLING = 'uniform', 'lhs', 'sobol', 'grid', 'rar', 'rad', 'rar at once', 'rad at once', 'causal'
INFORMED = 'best of 50', 'values', 'mixed'
ABLATIONS = {
    'exact derivative': dict(unroll=15), 'mean instead of CVaR': dict(risk=Mean()),
    'points only': dict(learn=('points',)), 'with targets': dict(learn=('points', 'weights', 'targets')),
        'residual, no solver': dict(objective='residual')}


# What to compute

def variants():
    "Rows on one equation: parts of the distillation exchanged, labels, other trainings, more steps."
    for name, changes in ABLATIONS.items(): yield f'distilled, {name}', dict(method='distilled', changes=changes)
    for m in 'sobol', 'distilled':
        yield f'{m}, {LABELS} labels', dict(method=m, labels=LABELS)
        yield f'{m}, Adam', dict(method=m, fitter=lambda pde, points, *keys, **_: fit_adam(pde, points, *keys))
    for m in 'sobol', 'grid', 'dense', 'distilled': yield f'{m}, 60 steps', dict(method=m, steps=60)


def plan(seeds):
    "(equation, row name, seed, arguments), seed by seed."
    for seed in range(seeds):
        for name in (*EQUATIONS, *DRIVEN):
            timed = make_pde(name).coordinates[1] == 't'
            yield from ((name, m, seed, dict(method=m)) for m in METHODS if m != 'causal' or timed)
        if seed < ABLATION_SEEDS: yield from ((ABLATED, label, seed, job) for label, job in variants())


@cache
def exams(name):
    "Exams inside, outside, and outside along each component."
    pde = make_pde(name)
    found = {'inside': Exam(pde, inside(pde, 64, 'exam')), 'outside': Exam(pde, outside(pde, 64, 'exam'))}
    return found | {k: Exam(pde, outside(pde, 24, 'exam', k, along=k)) for k in pde.family}


def tune(name):
    "The last damping with which Sobol points have the least CVaR over validation conditions, and what was seen."
    pde = make_pde(name)
    exam = Exam(pde, torch.cat([inside(pde, 32, 'tuning'), outside(pde, 32, 'tuning')]))
    errors = lambda s, d: exam.errors(fit(pde, sample_points(pde, POINTS, 'sobol', s), s, damping=(10., d)))
    risk = lambda s, d: CVaR(.2)(errors(s, d)).item()
    seen = {str(d): float(np.mean([risk(s, d) for s in TUNING])) for d in GRID}
    return dict(chosen=float(min(seen, key=seen.get)), seen=seen)


def row(name, label, seed, damping, method, changes={}, labels=0, fitter=fit, steps=None, distil_steps=STEPS):
    "One row, with process seconds for making the points, for one training, and for all the rest."
    pde, start = make_pde(name), time.process_time()
    how = dataclasses.replace(Distillation(steps=distil_steps), **changes)
    points, kwargs = prepare(pde, method, POINTS, seed, labels, how, (10., damping))
    made = time.process_time() - start
    if steps: kwargs = kwargs | dict(steps=steps)
    found = compare_points(pde, {label: (points, kwargs)}, exams(name), seed, fitter=fitter)[0]
    numbers = sum(getattr(points, f).numel() for f in ('q', 'c', 'weight', 'target'))
    rest = time.process_time() - start - made
    return found | dict(seconds_points=made, seconds_rest=rest, numbers=numbers, commit=commit())


@cache
def commit():
    git = subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True, cwd=Path(__file__).parent)
    return git.stdout.strip()


# What came out

def table(rows, column):
    "Mean and standard deviation over seeds, with their number where it is not five; methods by equations."
    found = pd.DataFrame(rows).groupby(['method', 'pde'], sort=False)[column].agg(['mean', 'std', 'count'])
    def text(r):
        spread = '' if np.isnan(r['std']) else f' ± {r["std"]:.3f}'
        return f'{r["mean"]:.3f}{spread}' + ('' if r['count'] == SEEDS else f' (n={r["count"]:.0f})')
    return found.apply(text, axis=1).unstack('pde').fillna('')


def against(rows, column, rivals):
    "Distilled beside the best of `rivals` for each equation, paired by seed: ratio, difference, 95 % t-interval."
    from scipy.stats import t as student
    found, frame = {}, pd.DataFrame(rows)
    for name in frame.pde.unique():
        wide = frame[frame.pde == name].pivot_table(index='seed', columns='method', values=column)
        here = [r for r in rivals if r in wide and 'distilled' in wide]
        if not here: continue
        best = wide[here].mean().idxmin()
        pair = wide[['distilled', best]].dropna()
        d = pair['distilled'] - pair[best]
        half = student.ppf(.975, len(d) - 1) * d.std() / np.sqrt(len(d)) if len(d) > 1 else np.nan
        ours, theirs = pair['distilled'].mean(), pair[best].mean()
        found[name] = {'best rival': best, 'rival': theirs, 'distilled': ours, 'ratio': ours / theirs,
                       'difference': d.mean(), 'low': d.mean() - half, 'high': d.mean() + half, 'pairs': len(d)}
    return pd.DataFrame(found).T.map(lambda v: round(v, 3) if isinstance(v, float) else v)


def prices(rows, column='inside worst', rivals=('grid', 'dense', 'best of 50', 'values', 'mixed')):
    "Worst error, seconds to make the points and to train once; trainings from which distilled points are cheaper."
    frame = pd.DataFrame(rows)
    frame = frame[~frame.method.str.contains(',')].copy()
    alike = frame.groupby(['pde', 'points']).seconds_training.transform('mean')      # for rows that did not measure it
    frame['seconds_training'] = frame.seconds_training.fillna(alike)
    frame = frame[frame.seconds_training.notna() & frame.method.isin(['distilled', *rivals])]
    mean = frame.groupby(['pde', 'method'], sort=False)[[column, 'seconds_points', 'seconds_training']].mean()
    def after(key):
        ours = mean.loc[key[0], 'distilled'] if (key[0], 'distilled') in mean.index else None
        if key[1] == 'distilled' or ours is None: return ''
        if mean.loc[key, column] <= ours[column]: return 'never: it is better'
        k = break_even(*ours.iloc[1:], *mean.loc[key].iloc[1:])
        return 'never: it costs as little' if np.isinf(k) else f'{np.ceil(k):.0f}'
    return mean.round(3).assign(pays_after=[after(k) for k in mean.index])


def missing(result):
    "Rows of the plan that the file does not hold, counted by equation and method."
    have = {(r['pde'], r['method'], r['seed']) for r in result['rows']}
    left = [(n, m) for n, m, s, _ in plan(result['config']['seeds']) if (n, m, s) not in have]
    return pd.DataFrame(left, columns=['pde', 'method']).value_counts(sort=False).unstack('pde').fillna(0).astype(int)


def show(result):
    for column in 'inside worst', 'outside worst': print(f'\n{column}\n{table(result["rows"], column)}')
    for title, rivals in ('sampling rules', SAMPLING), ('rivals with the same information', INFORMED):
        for column in 'inside worst', 'outside worst':
            print(f'\ndistilled against {title}, {column}\n{against(result["rows"], column, rivals).to_string()}')
    print(f'\nprice\n{prices(result["rows"]).to_string()}\n\nnot yet run\n{missing(result).to_string()}')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=OUT, help='result file; rows that it holds are kept')
    parser.add_argument('--seeds', type=int, default=SEEDS)
    parser.add_argument('--minutes', type=float, default=60, help='start no further row after so many minutes')
    parser.add_argument('--only', nargs='*', help='names of methods or rows; none: all')
    parser.add_argument('--equations', nargs='*', help='names of equations; none: all')
    parser.add_argument('--show', action='store_true', help='print the tables only')
    args = parser.parse_args()
    result = read_json(args.out) if args.out.exists() else dict(rows=[], damping={})
    if args.show: return show(result)
    torch.set_num_threads(1)
    have = {(r['pde'], r['method'], r['seed']) for r in result['rows']}
    end = time.time() + 60 * args.minutes
    for name, label, seed, job in plan(args.seeds):
        wanted = (not args.only or label in args.only) and (not args.equations or name in args.equations)
        if not wanted or (name, label, seed) in have or time.time() > end: continue
        if name not in result['damping']: result['damping'][name] = tune(name)
        result['rows'].append(row(name, label, seed, result['damping'][name]['chosen'], **job))
        write(args, result)
    write(args, result)


def write(args, result):
    rows, planned = result['rows'], len(list(plan(args.seeds)))
    config = dict(points=POINTS, labels=LABELS, distillation=repr(Distillation(steps=STEPS)), seeds=args.seeds,
        networks=2,
                  conditions=64, reach=.5, rows=len(rows), rows_planned=planned, ablated=ABLATED,
                  ablations={k: {a: repr(b) for a, b in v.items()} for k, v in ABLATIONS.items()})
    write_json(args.out, dict(command='python benchmarks/pinn.py', config=config, damping=result['damping'], rows=rows,
                              seconds=sum(r['seconds_points'] + r['seconds_rest'] for r in rows), versions=versions()))


if __name__ == '__main__': main()
