"""Which part of a method does what: start, base weights, clusters and the risk over distances, side by side.

    python benchmarks/ablation.py --work runs/ablation --minutes 8     # a slice; the same command goes on

The two tasks of the development (`DEVELOPMENT` in `benchmarks/auto.py`), under its settings. All rows of a seed share
data, networks and real batches, so that they are paired. The test set was in view.
"""
import itertools, re, time

from rdd_nb.auto import distill_together
from rdd_nb.training import Training
from rdd_nb.evaluation import evaluate
from rdd_nb.intervals import interval
from rdd_nb.methods import as_method
from rdd_nb.sources import load_data

from auto import CHANGES, DEVELOPMENT, EPOCHS, FREE, IPC, TASKS
from common import Rows, TimeIsUp, options, write

RISKS = {'equal': 'mean', 'CVaR': 'cvar(0.5)', 'mean + CVaR': '0.5*mean + 0.5*cvar(0.5)', 'max': 'max'}
CLUSTERS = dict(pixels='kmeans(4)', errors='kmeans(4, errors)', losses='kmeans(2, losses, 40)')
ROWS = [  # start, base weights, clusters, risk over the distances of the clusters
    ('kmeans', 'uniform'), ('kmeans', 'density'), ('kcenter', 'density'), ('balanced', 'uniform'),
    ('balanced', 'density'), ('balanced', 'uniform', 'losses', 'equal'), ('balanced', 'density', 'losses', 'equal'),
    ('kmeans', 'density', 'losses', 'equal'), ('kcenter', 'density', 'losses', 'equal'),
    ('balanced', 'density', 'losses', 'mean + CVaR'), ('balanced', 'density', 'losses', 'CVaR'),
    ('balanced', 'density', 'losses', 'max'), ('kmeans', 'uniform', 'pixels', 'mean + CVaR'),
    *(('kcenter', 'uniform', 'pixels', r) for r in RISKS), ('balanced', 'uniform', 'errors', 'mean + CVaR'),
    ('kcenter', 'uniform', 'errors', 'mean + CVaR')]
TOLD = 'fairdd', 'cobra'         # these see group labels


def method(data, start, base, clusters=None, risk=None):
    "A row of `ROWS` as a method, distilled as `benchmarks/auto.py` does."
    m = as_method('distribution', start=start, base=base, **CHANGES[data])
    if risk: m = as_method(m, clustering=CLUSTERS[clusters], risk=RISKS[risk], risk_at='distance')
    return m


def make(task, seed):
    "The row of a task and a seed: what the evaluation says of every set."
    where, begun = TASKS[task], time.process_time()
    splits, data = load_data(**where, data_seed=seed), where['name']
    methods = {k: as_method(k) for k in FREE} | dict(balanced=as_method('kmeans', start='balanced'))
    methods |= {', '.join(row): method(data, *row) for row in ROWS}
    methods |= {f'{k}*': as_method(k, **CHANGES[data]) for k in TOLD}
    sets = distill_together(splits.train, methods, IPC, seed, 'cpu', False)
    recipe = Training(width=32, epochs=EPOCHS[data][1])
    truth = {k: evaluate(s, splits.test, recipe, 2, seed, device='cpu', progress=False) for k, s in sets.items()}
    keep = 'accuracy', 'worst_group_accuracy', 'worst_class_group_accuracy', 'group_accuracy'
    rows = {k: {name: r[name] for name in keep} for k, r in truth.items()}
    return dict(task=task, seed=seed, seconds=round(time.process_time() - begun, 1), rows=rows)


def summary(found):
    "Per task, for every row: mean and interval over seeds, and the difference to `rdd-distance`, paired by seed."
    numbers, base = ('worst_group_accuracy', 'worst_class_group_accuracy'), 'kmeans, uniform, pixels, mean + CVaR'
    table = {}
    for task in DEVELOPMENT:
        own = [f['rows'] for f in found if f['task'] == task]
        if not own: continue
        def best(row): return max(row['group_accuracy'].values())
        def above(k): return interval([r[k][numbers[0]] - r[base][numbers[0]] for r in own])
        table[task] = {k: {n: interval([r[k][n] for r in own]) for n in numbers} | dict(
            best_group=interval([best(r[k]) for r in own]), above_rdd_distance=above(k), seeds=len(own))
            for k in own[0]}
    return table


def main():
    args = options('ablation', __doc__, 4, work=True).parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    found = Rows(args.work/'rows.json', lambda r: (r['task'], r['seed']), args.minutes)
    try:
        for seed, task in itertools.product(range(args.seeds), DEVELOPMENT):
            if re.search(args.only, task):
                print(task, seed, found.row((task, seed), lambda: make(task, seed))['seconds'], flush=True)
    except TimeIsUp: pass
    write(args.out, development=DEVELOPMENT, tasks={t: TASKS[t] for t in DEVELOPMENT}, changes=CHANGES, ipc=IPC,
          clusters=CLUSTERS, risks=RISKS, rows=found.rows, summary=summary(found.rows))


if __name__ == '__main__': main()
