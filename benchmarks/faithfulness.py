"""Which method for which task: every surrogate of `rdd_nb.tasks` as a ranking of candidate sets and as a method of distillation, on eight small tasks.

    OMP_NUM_THREADS=1 python benchmarks/faithfulness.py --work /tmp/faithfulness     # about two minutes on one core; writes benchmarks/results/faithfulness.json

For each task and seed (a seed draws the population or divides the table, and draws the start):

- every surrogate is minimised from the same random subset, with the same number of steps of the same size, and the true risk of the set it ends with is read once, on the test sample;
- every surrogate orders candidate sets, separately for subsets (random ones, half of them with noise) and distilled ones (those that the descents of all surrogates ended with).

In tasks with a risk over environments all surrogates use it: over environments, they take the task's risk of their distances. Four of them are also run `pooled`, without environments, as they were published.
Finished rows are kept in the folder `--work` and not computed again.
"""
import argparse
import os
import subprocess
import time
from pathlib import Path

for name in ('OMP', 'MKL', 'OPENBLAS'): os.environ[f'{name}_NUM_THREADS'] = '1'

import torch
from tqdm.auto import tqdm

from rdd_nb.core import read_json, versions, write_json
from rdd_nb.tasks import SURROGATES, TASKS, SmallSet, descend, faithfulness, optimum, random_subsets

SIZES = {'density': 15, 'ranking': 20}     # synthetic samples; 10 elsewhere
CONFIG = dict(seeds=5, steps=20, lr=.1, subsets=10, noise=1., snapshots=(), optimum_steps=400)
POOLED = 'moments', 'gradient', 'exact'
SAME = {**{(name, 'training loss'): 'exact' for name in TASKS if name not in ('quantiles', 'effect', 'ranking')},          # surrogates that are the same function
        **{(name, 'ridge'): 'training loss' for name in ('regression', 'regression, worst group', 'effect', 'ranking')}}   # up to a factor
HERE = Path(__file__).resolve().parent


def metric(task, small):
    "The task's metric on the test sample: over everybody and in the worst environment (None where it has none)."
    if task.metric is None: return None
    with torch.no_grad(): scores = task.learners[0].predict(task.fit(small)[0], task.test.x)
    parts = [torch.ones(len(task.test.x), dtype=torch.bool)] + ([] if task.risk is None else [task.test.env == e for e in task.test.env.unique()])
    found = [task.metric(scores[i], task.test.y[i]) for i in parts]
    return found[0] if task.risk is None else min(found[1:])


def surrogates(key, task, seed):
    "Name -> surrogate, for all that this task admits."
    found = {}
    for name, make in SURROGATES.items():
        if make.needs_theta and not all(l.parametric for l in task.learners) or (key, name) in SAME: continue
        found[name] = make(task, seed=seed)
        if task.risk is not None and name in POOLED: found[f'{name}, pooled'] = make(task, pooled=True, seed=seed)
    return found


def run(name, seed, config):
    "One row: a task, a seed."
    task, size = TASKS[name](seed), SIZES.get(name, 10)
    everything = SmallSet(task.train.x, task.train.y)
    half = config['subsets'] // 2
    subsets = random_subsets(task, size, half, seed) + random_subsets(task, size, half, seed + 1000, config['noise'])
    start = random_subsets(task, size, 1, seed + 2000)[0]
    truth = [task.truth(c) for c in subsets]
    row = dict(task=name, seed=seed, size=size, real=len(task.train.x), start=task.truth(start), start_metric=metric(task, start),
               subsets=sum(truth[:half]) / half, best_subset=min(truth[:half]), full=task.truth(everything), full_metric=metric(task, everything), methods={})
    if name != 'ranking' and all(l.parametric for l in task.learners): row['optimum'] = task._risk(task.values(optimum(task, config['optimum_steps']), task.test)).item()
    ends, made = {}, surrogates(name, task, seed)
    for method, surrogate in made.items():
        began = time.process_time()
        small, path = descend(surrogate, start, task, config['steps'], config['lr'], config['snapshots'])
        ends[method] = path + [small]
        row['methods'][method] = dict(truth=task.truth(small), metric=metric(task, small), seconds=time.process_time() - began)
        with torch.no_grad(): row['methods'][method]['objective'] = task.objective(small).item()
    distilled = [s for some in ends.values() for s in some]
    distilled_truth = [task.truth(c) for c in distilled]
    for method, surrogate in made.items():
        row['methods'][method]['on_subsets'] = faithfulness(surrogate, subsets, truth)
        row['methods'][method]['on_distilled'] = faithfulness(surrogate, distilled, distilled_truth)
    for method in ('training loss', 'ridge'):
        if (name, method) in SAME: row['methods'][method] = row['methods'][SAME[name, method]]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--work', default='faithfulness-work', help='folder for finished rows')
    parser.add_argument('--out', default=HERE / 'results' / 'faithfulness.json')
    parser.add_argument('--tasks', nargs='*', default=list(TASKS), choices=list(TASKS))
    for key in ('seeds', 'steps', 'subsets'): parser.add_argument(f'--{key}', type=int, default=CONFIG[key])
    args = parser.parse_args()
    config = dict(CONFIG, seeds=args.seeds, steps=args.steps, subsets=args.subsets)
    rows = []
    for seed in range(args.seeds):
        for name in tqdm(args.tasks, desc=f'seed {seed}'):
            path = Path(args.work) / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}-{config['steps']}-{config['subsets']}.json"
            if not path.exists():
                start = time.process_time()
                write_json(path, dict(run(name, seed, config), cpu_seconds=time.process_time() - start))
            rows.append(read_json(path))
        commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=HERE, capture_output=True, text=True).stdout.strip()
        write_json(args.out, dict(config=dict(config, seeds=seed + 1), versions=versions(), commit=commit, cpu_seconds=sum(r['cpu_seconds'] for r in rows), rows=rows))


if __name__ == '__main__': main()
