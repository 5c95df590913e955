"""Points for PINNs across boundary conditions: distilled, sampled, adaptive; tested inside and outside of the training family.

    python benchmarks/pinn.py --work DIR      # writes benchmarks/results/pinn.json; about twenty minutes of one CPU core

All methods train for the same number of steps. The samplers' damping is chosen first, for each equation, so that Sobol points do best on tuning seeds;
distilled sets train with the default of `Distillation`. Seeds are the units: points, networks and training conditions are drawn anew for each; test conditions are the same for all and are used
once. Rows are kept in DIR, and a stopped benchmark goes on from there. The ablations are run on one equation.
"""
import argparse, dataclasses, subprocess, tempfile, time
from pathlib import Path

import numpy as np
import torch

from rdd_nb.core import read_json, versions, write_json
from rdd_nb.pinn import METHODS, Distillation, Exam, compare_points, fit, fit_adam, inside, make_pde, outside, prepare, sample_points
from rdd_nb.risk import CVaR, Mean

EQUATIONS = 'heat', 'helmholtz', 'burgers', 'allen-cahn'
POINTS, LABELS, STEPS, ABLATED, ABLATION_SEEDS = 64, 8, 100, 'burgers', 3
GRID = .03, .1, .3, 1.                       # last damping, the first is 10
TUNING, SEEDS = range(1000, 1003), 5
ABLATIONS = {'exact derivative': dict(unroll=15), 'mean instead of CVaR': dict(risk=Mean()), 'points only': dict(learn=('points',)), 'with targets': dict(learn=('points', 'weights', 'targets')),
             'residual, no solver': dict(objective='residual')}


def tests(pde):
    "Exams inside, outside, and outside along each component."
    exams = {'inside': Exam(pde, inside(pde, 64, 'exam')), 'outside': Exam(pde, outside(pde, 64, 'exam'))}
    return exams | {name: Exam(pde, outside(pde, 24, 'exam', name, along=name)) for name in pde.family}


def tune(pde):
    "The last damping with which Sobol points have the least CVaR over validation conditions, and what was seen."
    exam = Exam(pde, torch.cat([inside(pde, 32, 'tuning'), outside(pde, 32, 'tuning')]))
    seen = {d: float(np.mean([CVaR(.2)(exam.errors(fit(pde, sample_points(pde, POINTS, 'sobol', s), s, damping=(10., d)))).item() for s in TUNING])) for d in GRID}
    return min(seen, key=seen.get), seen


def timed(pde, method, exams, seed, name=None, settings=None, fitter=None, **kwargs):
    "One row, with process seconds for making the points and for training and testing."
    start = time.process_time()
    ready = prepare(pde, method, POINTS, seed, how=settings, **kwargs)
    made = time.process_time() - start
    if fitter: ready = (ready[0], {})
    row = compare_points(pde, {name or method: ready}, exams, seed, fitter=fitter)[0]
    return row | dict(seconds_points=made, seconds_rest=time.process_time() - start - made, numbers=sum(getattr(ready[0], f).numel() for f in ('q', 'c', 'weight', 'target')))


def jobs(pde):
    "Names and arguments of the main rows of an equation."
    for m in METHODS:
        if not (m == 'causal' and pde.coordinates[1] != 't'): yield m, dict(method=m)


def ablations():
    for name, changes in ABLATIONS.items(): yield f'distilled, {name}', dict(method='distilled', changes=changes)
    for m in 'sobol', 'distilled': yield f'{m}, {LABELS} labels', dict(method=m, labels=LABELS)
    for m in 'sobol', 'distilled': yield f'{m}, Adam', dict(method=m, fitter=fit_adam)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work', type=Path, help='folder for the rows; a stopped benchmark goes on from there (default: a temporary one)')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results' / 'pinn.json')
    parser.add_argument('--seeds', type=int, default=SEEDS)
    parser.add_argument('--steps', type=int, default=STEPS)
    parser.add_argument('--minutes', type=float, default=60, help='start no further row after so many minutes of wall time; the result file then holds what there is')
    args = parser.parse_args()
    work, end = args.work or Path(tempfile.mkdtemp()), time.time() + 60 * args.minutes
    torch.set_num_threads(1)
    rows, tuned = [], {}
    pdes = {name: make_pde(name) for name in EQUATIONS}
    for name, pde in pdes.items():
        path = work / f'{name}-damping.json'
        if not path.exists(): write_json(path, tune(pde))
        tuned[name] = read_json(path)
    exams, plan = {}, [(seed, name, job) for seed in range(args.seeds) for name in EQUATIONS for job in jobs(pdes[name])]
    plan += [(seed, ABLATED, job) for seed in range(min(args.seeds, ABLATION_SEEDS)) for job in ablations()]
    for seed, name, (label, job) in plan:
        path = work / f'{name}-{seed}-{label}.json'
        if not path.exists():
            if time.time() > end: continue
            if name not in exams: exams[name] = tests(pdes[name])
            job = dict(job)
            settings = dataclasses.replace(Distillation(steps=args.steps), **job.pop('changes', {}))
            write_json(path, timed(pdes[name], exams=exams[name], seed=seed, name=label, settings=settings, damping=(10., tuned[name][0]), **job))
        rows.append(read_json(path))
    if len(rows) < len(plan): print(f'{len(rows)} of {len(plan)} rows; the same command goes on')
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    config = dict(points=POINTS, labels=LABELS, distillation=repr(Distillation(steps=args.steps)), seeds=args.seeds, networks=2, conditions=64, reach=.5, rows=len(rows), rows_planned=len(plan),
                  ablated=ABLATED, ablations={k: {a: repr(b) for a, b in v.items()} for k, v in ABLATIONS.items()})
    write_json(args.out, dict(command='python benchmarks/pinn.py', config=config, damping={k: dict(chosen=v[0], seen=v[1]) for k, v in tuned.items()}, rows=rows,
                              seconds=sum(r['seconds_points'] + r['seconds_rest'] for r in rows), commit=commit, versions=versions()))


if __name__ == '__main__': main()
