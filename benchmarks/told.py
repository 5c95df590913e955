"""The rivals that see group labels on every task of `benchmarks/auto.py`, with the fairness measures beside them.

    python benchmarks/told.py --work runs/told --minutes 8     # a slice; the same command goes on

FairDD and COBRA in form (`fairdd`, `cobra`), the selections without a step, plain matching and `rdd-hard`, under the
settings of that benchmark. Rows of a task and a seed share data, networks and real batches. **All test sets had been
read before**, for `results/auto.json`; nothing was chosen after looking at these rows.
"""
import itertools, re, time

from rdd_nb.auto import distill_together
from rdd_nb.evaluation import evaluate
from rdd_nb.intervals import interval
from rdd_nb.methods import as_method
from rdd_nb.sources import load_data
from rdd_nb.training import Training

from auto import CHANGES, EPOCHS, FREE, IPC, TASKS
from common import Rows, TimeIsUp, commit, options, write

OWN, TOLD = ('distribution', 'rdd-hard'), ('fairdd', 'cobra')
NUMBERS = 'accuracy', 'worst_group_accuracy', 'worst_class_group_accuracy', 'deo_m', 'deo_a'


def make(task, seed):
    "The row of a task and a seed: what the evaluation says of every set."
    where, begun = TASKS[task], time.process_time()
    splits, data = load_data(**where, data_seed=seed), where['name']
    methods = {k: as_method(k) for k in FREE} | {k: as_method(k, **CHANGES[data]) for k in OWN + TOLD}
    sets = distill_together(splits.train, methods, IPC, seed, 'cpu', False)
    recipe = Training(width=32, epochs=EPOCHS[data][1])
    rows = {k: evaluate(s, splits.test, recipe, 2, seed, device='cpu', progress=False) for k, s in sets.items()}
    keep = *NUMBERS, 'group_accuracy', 'worst_class_group'
    rows = {k: {n: r[n] for n in keep if n in r} for k, r in rows.items()}
    return dict(task=task, seed=seed, seconds=round(time.process_time() - begun, 1), commit=commit(), rows=rows)


def summary(found):
    "Per task: the best selection in hindsight, every method's numbers, and `rdd-hard` against three rows, by seed."
    table = {}
    for task in TASKS:
        own = [f['rows'] for f in found if f['task'] == task]
        if not own: continue
        def worst(k): return [r[k]['worst_group_accuracy'] for r in own]
        def above(k): return interval([a - b for a, b in zip(worst('rdd-hard'), worst(k))])
        best = max(FREE, key=lambda k: sum(worst(k)))
        rows = {k: {n: interval([r[k][n] for r in own]) for n in NUMBERS if n in own[0][k]} for k in own[0]}
        table[task] = dict(seeds=len(own), best_free=best, methods=rows,
                           rdd_hard_above={k: above(k) for k in ('distribution', best, *TOLD)})
    return table


def main():
    args = options('told', __doc__, 3, work=True).parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    found = Rows(args.work/'rows.json', lambda r: (r['task'], r['seed']), args.minutes)
    todo = [(t, s) for s, t in itertools.product(range(args.seeds), TASKS)]
    try:
        for task, seed in todo:
            if not re.search(args.only, task): continue
            print(task, seed, found.row((task, seed), lambda: make(task, seed))['seconds'])
    except TimeIsUp: print('time is up')
    absent = dict.fromkeys(t for t, s in todo if (t, s) not in found.index)
    command = 'python benchmarks/told.py --work runs/told'
    write(args.out, command=command, tasks=TASKS, changes=CHANGES, epochs=EPOCHS, ipc=IPC, rows=found.rows,
          summary=summary(found.rows), not_run=[f'{command} --only "{t}"' for t in absent])


if __name__ == '__main__': main()
