"""Which method for which task: every surrogate as a ranking of candidate sets and as a method of distillation.

    # some four minutes of one core a seed; writes results/faithfulness.json
    python benchmarks/faithfulness.py --work DIR

For each task of `rdd_nb.tasks.TASKS` and each seed, which draws the population or divides the table, and the start:

- every surrogate is minimised from the same random subset, with equally many steps of the same size, and the true risk
  of the set it ends with is read once, on the test sample;
- every surrogate orders candidate sets: subsets (random ones, half of them with noise), and distilled ones (those that
  the descents of all surrogates ended with).

In tasks with a risk over environments the surrogates use it. Three of them are also run `pooled`, without environments.
How far the budget is from convergence is in the rows too: `value` is the surrogate at the end, `doubled` the true risk
after twice as many steps, for the surrogates in DOUBLED and the first seed.
"""
import re, time
from dataclasses import replace

from common import Rows, TimeIsUp, options, write

from rdd_nb.surrogates import SURROGATES, faithfulness, surrogates
from rdd_nb.tasks import TASKS, descend, optimum, random_subsets

CONFIG = dict(steps=200, lr=.1, subsets=10, noise=1., optimum_steps=400)
POOLED = 'moments', 'gradient', 'exact'
DOUBLED = 'distribution', 'moments', 'quantisation', 'parameters', 'exact'
SIZES = {'density': 15}     # synthetic samples; 10 elsewhere


def accuracy(task, small):
    "On the test sample: of all, or in the worst environment; None without classes."
    if not task.has_classes: return None
    right = replace(task, loss=lambda scores, y: -(scores.argmax(1) == y.argmax(1)).double())
    return -right.truth(small)


def made_for(task, seed):
    "Name -> surrogate."
    found = surrogates(task, seed)
    if task.risk is None: return found
    plain = surrogates(replace(task, risk=None), seed, POOLED)
    return found | {f'{name}, pooled': s for name, s in plain.items()}


def references(task, size, seed):
    "What the numbers of a row are compared with, and the subsets with their true risks."
    half, everything = CONFIG['subsets'] // 2, task.train.as_set()
    subsets = random_subsets(task, size, half, seed)
    subsets += random_subsets(task, size, half, seed + 1000, CONFIG['noise'])
    truth = [task.truth(s) for s in subsets]
    row = dict(size=size, real=len(task.train.x), subsets=sum(truth[:half]) / half, best_subset=min(truth[:half]),
               full=task.truth(everything), full_accuracy=accuracy(task, everything))
    if all(l.parametric for l in task.learners):
        best = optimum(task, CONFIG['optimum_steps'])
        row['optimum'] = task._risk(task.values(best, task.test)).item()
    return row, subsets, truth


def ended(name, surrogate, task, start, seed):
    "The set that a surrogate leads to, and what is measured of it."
    began, steps, lr = time.process_time(), CONFIG['steps'], CONFIG['lr']
    small = descend(surrogate, start, task, steps, lr)
    found = dict(truth=task.truth(small), accuracy=accuracy(task, small), value=surrogate(small).item(),
                 seconds=time.process_time() - began)
    if name in DOUBLED and seed == 0: found['doubled'] = task.truth(descend(surrogate, start, task, 2 * steps, lr))
    return small, found


def run(name, seed):
    "One row: a task, a seed."
    began, task = time.process_time(), TASKS[name](seed)
    row, subsets, truth = references(task, SIZES.get(name, 10), seed)
    start, made = random_subsets(task, row['size'], 1, seed + 2000)[0], made_for(task, seed)
    ends = {m: ended(m, s, task, start, seed) for m, s in made.items()}
    distilled = [small for small, _ in ends.values()]
    methods = {m: found for m, (_, found) in ends.items()}
    reached = [found['truth'] for found in methods.values()]
    for m, s in made.items():
        methods[m] |= dict(on_subsets=faithfulness(s, subsets, truth), on_distilled=faithfulness(s, distilled, reached))
    return dict(task=name, seed=seed, start=task.truth(start), start_accuracy=accuracy(task, start), **row,
                methods=methods, cpu_seconds=time.process_time() - began)


def main():
    args = options('faithfulness', __doc__, seeds=3, work=True).parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows, found = Rows(args.work / 'rows.json', lambda r: (r['task'], r['seed']), args.minutes), []
    for name, seed in ((name, seed) for seed in range(args.seeds) for name in TASKS if re.search(args.only, name)):
        try: found.append(rows.row((name, seed), lambda: run(name, seed)))
        except TimeIsUp: print(f'{name}, seed {seed}: time is up, left out')
    settings = {name: repr(s) for name, s in surrogates(TASKS['classification']()).items()}
    write(args.out, config=CONFIG | dict(seeds=args.seeds), surrogates=settings,
          cpu_seconds=sum(r['cpu_seconds'] for r in found), rows=found)


if __name__ == '__main__': main()
