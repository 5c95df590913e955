"""How well a choice without group labels does: all portfolio members distilled, all criteria held against the truth.

    python benchmarks/auto.py --work runs/auto            # all tasks; about half an hour on one core
    python benchmarks/auto.py --work runs/auto --only digits --minutes 8       # a slice, without scores
    python benchmarks/auto.py --work runs/auto --minutes 0                     # only score what is there
    python benchmarks/auto.py --work runs/auto --later         # tasks added later, into results/auto-later.json

A piece is a task and a seed: the seed redraws training and validation data and seeds the distillations. Members are
distilled whole and, as `auto.choose` does it, at a quarter of their steps; a piece that lacks members gets them later.
Criteria see the answers of networks on the validation data; the truth are other networks on the test data.

Criterion and portfolio were developed on the tasks in DEVELOPMENT, with their test sets in view. Those in READ_BEFORE
had been read for an earlier criterion (`results/auto-first.json`) and were read again after the changes. The rest was
read once, after the criterion and the portfolio had been frozen. Those in LATER were added when all these had been
read, to test what they had shown: is `rdd-hard` alone, or the worst cluster of errors, better than the default?
"""
import itertools, json, re, time

from scipy.stats import spearmanr

from rdd_nb.auto import CRITERION, PORTFOLIO, Answers, Evidence, answers, choose, distill_together, judge
from rdd_nb.core import read_json, read_tensors, write_json, write_tensors
from rdd_nb.distill import distill
from rdd_nb.training import Training
from rdd_nb.evaluation import evaluate
from rdd_nb.intervals import interval
from rdd_nb.methods import as_method
from rdd_nb.sources import load_data

from common import Rows, commit, options, write

MNIST = dict(name='mnist', share=.05, size=16, limit=2400, val=400, test=500)
FASHION = MNIST | dict(name='fashion-mnist')
TASKS = {
    'digits, minority': dict(name='digits', shift='minority'),
    'mnist, minority': MNIST | dict(shift='minority'),
    'digits, blur': dict(name='digits', shift='blur'),
    'mnist, colour': MNIST | dict(shift='colour'),
    'digits, long tail': dict(name='digits', shift='long-tail', share=.1),
    'mnist, blur': MNIST | dict(shift='blur'),
    'fashion, minority': FASHION | dict(shift='minority'),
    'fashion, colour': FASHION | dict(shift='colour'),
    'cifar, half-grey': MNIST | dict(name='cifar10', shift='half-grey'),
    'fashion, noise': FASHION | dict(shift='noise-5'),
    'mnist, contrast': MNIST | dict(shift='contrast-5'),
    'fashion, long tail': FASHION | dict(shift='long-tail', share=.1),
}
LATER = 'fashion, noise', 'mnist, contrast', 'fashion, long tail'     # fixed before any of them was read
DEVELOPMENT = 'digits, minority', 'mnist, colour'
READ_BEFORE = 'mnist, minority', 'digits, blur', 'digits, long tail', 'mnist, blur'
FREE = 'k-center', 'kmeans', 'random', 'stratified', 'herding'      # selections without a step
SMALL = dict(batch='random(64)', network=dict(width=32))           # a quarter of the default real batch
SHORT = SMALL | dict(steps=60)                                     # 60 of 200 steps, so that two cores can
CHANGES = dict.fromkeys(('mnist', 'fashion-mnist', 'cifar10'), SHORT) | dict(digits=SMALL)
EPOCHS = dict.fromkeys(CHANGES, (30, 40)) | dict(digits=(60, 60))  # of networks for a criterion and for the truth
IPC = 10


def members(data, part=1):
    "The portfolio as it is distilled on a data set, with a part of the steps."
    made = {k: as_method(m, **CHANGES[data]) if m.objective else m for k, m in PORTFOLIO.items()}
    return {k: as_method(m, steps=max(1, round(m.steps * part))) if m.objective else m for k, m in made.items()}


def piece(work, task, seed): return work / f'{task.replace(", ", "-").replace(" ", "-")}-{seed}.safetensors'


def missing(path, data):
    "The members and the free selections that a piece does not hold yet, and what it holds: tensors and the record."
    tensors, about = read_tensors(path) if path.exists() else ({}, dict(auto=json.dumps(dict(truth={}))))
    about, whole = json.loads(about['auto']), members(data)
    new = {k: m for k, m in whole.items() if f'quarter/{k}' not in tensors or k not in about['truth']}
    free = {k: as_method(k) for k in FREE if k not in whole and k not in about['truth']}
    return new, free, tensors, about


def collect(path, task, seed):
    "Distil, train and ask what a piece lacks: answers on validation data, rows of the truth, seconds."
    where, (short, long) = TASKS[task], EPOCHS[TASKS[task]['name']]
    splits, seconds = load_data(**where, data_seed=seed), {}
    new, others, tensors, about = missing(path, where['name'])
    begun = time.process_time()

    def lap(name):
        nonlocal begun
        seconds[name], begun = round(time.process_time() - begun, 2), time.process_time()

    def together(methods, name):
        made = distill_together(splits.train, methods, IPC, seed, 'cpu', False)
        lap(name)
        return made

    part = {k: m for k, m in members(where['name'], .25).items() if k in new}
    short_sets = together(part, 'a quarter, together')
    sets, free = together(new, 'whole, together'), together(others, 'free')
    recipe = Training(width=32, epochs=short)
    tensors |= {f'quarter/{k}': answers(s, splits.val, 2, recipe, seed, 'cpu').scores for k, s in short_sets.items()}
    lap('networks, a quarter')
    truth = {k: evaluate(s, splits.test, Training(width=32, epochs=long), 2, seed, device='cpu', progress=False)
             for k, s in (sets | free).items()}
    lap('networks, truth')
    about = dict(task=task, seed=seed, truth=about['truth'] | truth,
                 runs=about.get('runs', []) + [dict(members=list(sets | free), seconds=seconds, commit=commit())])
    write_tensors(path, tensors, dict(auto=json.dumps(about)))


# Scoring

PIXELS, ERRORS = 'worstcluster(pixels, 8, 0.03, doubt)', 'worstcluster(errors, 16, 0.03, doubt)'
CRITERIA = (
    'mean', 'mean(error)', 'tail(0.05)', 'tail(0.1)', 'tail(0.2)', 'tail(0.05, doubt)', 'tail(0.1, doubt)',
    'sharedtail(0.05)', 'sharedtail(0.1, doubt)', PIXELS, ERRORS, 'worstcluster(losses, 4, 0.03, doubt)',
    f'{PIXELS} + tail(0.1, doubt)',      # the default of the first study
    *(f'mistakes({power}, 80, 3, {of})' for power in (1, 2) for of in ('loss', 'doubt')), CRITERION)
TOLD = 'told the groups of the validation data'
ALWAYS = tuple(f'always {k}' for k in PORTFOLIO)


def told(val, found):
    "The worst group's error of each candidate on validation data: a choice with labels."
    return {k: float(1 - min((a.scores.argmax(2) == a.y)[:, val.group == g].float().mean() for g in val.group.unique()))
            for k, a in found.items()}


def scored(path):
    "The row of one piece: truth, and the scores of all criteria on the sets of a quarter of the steps."
    tensors, about = read_tensors(path)
    about = json.loads(about['auto'])
    where = TASKS[about['task']]
    splits = load_data(**where, data_seed=about['seed'])
    train, val = splits.train.without_groups(), splits.val.without_groups()
    said = {k: Answers(tensors[f'quarter/{k}'], val.y) for k in PORTFOLIO}
    e = Evidence(train, val, said, about['seed'], 'cpu', Training(width=32, epochs=EPOCHS[where['name']][0]))
    scores = {c: judge(e, c, 20)[0] for c in CRITERIA} | {TOLD: told(splits.val, said)}
    keep = 'accuracy', 'worst_group_accuracy', 'worst_class_group_accuracy', 'group_accuracy'
    truth = {name: {k: row[k] for k in keep} for name, row in about['truth'].items()}
    found = {k: about[k] for k in ('task', 'seed', 'runs')}
    return found | dict(validation=len(val), scores=scores, truth=truth)


def outcome(row, rule):
    "The member that a rule chooses, and the rank correlation of its scores with the truth, or None."
    worst = {k: row['truth'][k]['worst_group_accuracy'] for k in PORTFOLIO}
    if rule in ALWAYS: return rule.removeprefix('always '), None
    s = row['scores'][rule]
    rho = spearmanr([-s[k] for k in PORTFOLIO], list(worst.values())).statistic if len(set(s.values())) > 1 else 0.
    return min(s, key=s.get), float(rho)


def compared(rows, rule, free):
    "What a rule does on the rows of a task: one dict of numbers for each seed."
    for row in rows:
        truth, (name, rho) = row['truth'], outcome(row, rule)
        worst = truth[name]['worst_group_accuracy']
        best = max(truth[k]['worst_group_accuracy'] for k in PORTFOLIO)
        largest = max(truth['distribution']['group_accuracy'], key=truth['distribution']['group_accuracy'].get)
        majority = truth[name]['group_accuracy'][largest] - truth['distribution']['group_accuracy'][largest]
        yield dict(chosen=name, rank_correlation=rho, worst_group_accuracy=worst, regret=best - worst,
                   gain=worst - truth[free]['worst_group_accuracy'], majority=majority,
                   worst_class_group_accuracy=truth[name]['worst_class_group_accuracy'])


def over_seeds(found):
    "Mean and 95 % interval over the seeds of each number; every choice by name."
    numbers = [k for k, v in found[0].items() if isinstance(v, float)]
    chosen = dict(chosen=[f['chosen'] for f in found], seeds=len(found))
    return {k: interval([f[k] for f in found]) for k in numbers} | chosen


def over_tasks(tables, rule):
    "The mean over the tasks of each number, its interval over seeds, and the worst task."
    seeds = range(min(len(t[rule]) for t in tables.values()))
    names = [k for k, v in next(iter(tables.values()))[rule][0].items() if isinstance(v, float)]
    each = {k: [sum(t[rule][s][k] for t in tables.values()) / len(tables) for s in seeds] for k in names}
    least = {task: sum(f['gain'] for f in t[rule]) / len(t[rule]) for task, t in tables.items()}
    worst = min(least, key=least.get)
    found = {k: interval(v) for k, v in each.items()}
    return found | dict(seeds=len(seeds), least_gain=least[worst], least_gain_on=worst)


def summary(rows, tasks):
    "Per task, and over all tasks, the development's and the others, for every rule."
    def mean(own, name): return sum(r['truth'][name]['worst_group_accuracy'] for r in own) / len(own)
    by_task = {t: own for t in tasks if (own := [r for r in rows if r['task'] == t])}
    free = {t: max(FREE, key=lambda name: mean(own, name)) for t, own in by_task.items()}
    rules = *CRITERIA, TOLD, *ALWAYS
    tables = {t: {rule: list(compared(own, rule, free[t])) for rule in rules} for t, own in by_task.items()}
    parts = dict(all=list(tables), development=[t for t in tables if t in DEVELOPMENT],
                 others=[t for t in tables if t not in DEVELOPMENT],
                 unread=[t for t in tables if t not in DEVELOPMENT + READ_BEFORE])
    means = {part: {rule: over_tasks({t: tables[t] for t in own}, rule) for rule in rules}
             for part, own in parts.items() if own}
    return dict(best_free=free, tasks={t: {r: over_seeds(f) for r, f in table.items()} for t, table in tables.items()},
                mean=means)


def show(means):
    "Rules in the order of their mean regret."
    for rule, m in sorted(means.items(), key=lambda f: f[1]['regret']['mean']):
        rho = f'{m["rank_correlation"]["mean"]:6.2f}' if 'rank_correlation' in m else ''
        print(f'{rule:70}{rho:>6} regret {m["regret"]["mean"]:.3f} gain {m["gain"]["mean"]:+.3f} '
              f'least {m["least_gain"]:+.3f} ({m["least_gain_on"]})')


def price():
    "Processor seconds of a choice and of one distillation of the default method on the digits, in one run."
    splits, seconds = load_data('digits'), {}
    for name, make in [('choice', lambda: choose(splits.train, splits.val, IPC, device='cpu', progress=False)),
                       ('one distillation', lambda: distill(splits.train, 'rdd-distance', IPC, device='cpu',
                                                            progress=False))]:
        begun = time.process_time()
        make()
        seconds[name] = round(time.process_time() - begun, 2)
    return seconds | dict(ratio=round(seconds['choice'] / seconds['one distillation'], 2))


def main():
    parser = options('auto', __doc__, 3, work=True)
    parser.add_argument('--development', action='store_true', help='only the tasks of the development')
    parser.add_argument('--later', action='store_true', help='only the tasks that were added later')
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stop = time.perf_counter() + 60 * args.minutes
    tasks = DEVELOPMENT if args.development else LATER if args.later else tuple(t for t in TASKS if t not in LATER)
    for seed, task in itertools.product(range(args.seeds), tasks):
        path = piece(args.work, task, seed)
        if not re.search(args.only, task) or time.perf_counter() > stop: continue
        if any(missing(path, TASKS[task]['name'])[:2]):
            collect(path, task, seed)
            print(task, seed, json.loads(read_tensors(path)[1]['auto'])['runs'][-1]['seconds'], flush=True)
    if 0 < args.minutes < float('inf'): return
    paths = {(t, s): piece(args.work, t, s) for t in tasks for s in range(args.seeds)}
    whole = {k for k, p in paths.items() if not any(missing(p, TASKS[k[0]]['name'])[:2])}
    command = f'python benchmarks/auto.py --work runs/auto{" --later" if args.later else ""} --only'
    not_run = [f'{command} "{t}"' for t in tasks if any((t, s) not in whole for s in range(args.seeds))]
    kept = Rows(args.work/'scores.json', lambda r: (r['task'], r['seed'], len(r['runs']), *r['scores']))
    rows = []
    for k in sorted(whole, key=list(paths).index):
        runs = len(json.loads(read_tensors(paths[k])[1]['auto'])['runs'])
        rows.append(kept.row((*k, runs, *CRITERIA, TOLD), lambda: scored(paths[k])))
    found, cost = summary(rows, tasks), args.work/'price.json'
    if not cost.exists() and not args.later: write_json(cost, price())
    settings = {d: {k: m.describe() for k, m in members(d).items()} for d in CHANGES}
    out = args.out.with_stem('auto-later') if args.later else args.out
    write(out, criterion=CRITERION, development=DEVELOPMENT, read_before=READ_BEFORE,
          tasks={t: TASKS[t] for t in tasks}, ipc=IPC, epochs=EPOCHS, members=settings, not_run=not_run,
          price=read_json(cost) if cost.exists() else None, rows=rows, summary=found)
    for part, means in found['mean'].items():
        print(part)
        show(means)


if __name__ == '__main__': main()
