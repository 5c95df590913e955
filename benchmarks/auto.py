"""How well a choice without group labels does: all portfolio members distilled, all criteria held against the truth.

    python benchmarks/auto.py --work runs/auto            # all tasks; about half an hour on one core
    python benchmarks/auto.py --work runs/auto --only digits --minutes 8       # a slice; the same command goes on
    python benchmarks/auto.py --work runs/auto --minutes 0                     # only score what is there

A piece is a task and a seed: the seed redraws training and validation data and seeds the distillations. Members are
distilled at a quarter of their steps, as `auto.choose` does, and whole. Criteria see the answers of networks on the
validation data; the truth are other networks on the test data. The default criterion was developed on the tasks in
DEVELOPMENT, with their test sets in view (about 85 criteria compared); the other tasks were read once, after that.
"""
import itertools, json, re, time

from scipy.stats import spearmanr

from rdd_nb.auto import CRITERION, PORTFOLIO, Answers, Evidence, answers, distill_together, judge
from rdd_nb.core import read_tensors, write_tensors
from rdd_nb.training import Training
from rdd_nb.evaluation import evaluate
from rdd_nb.intervals import interval
from rdd_nb.methods import as_method
from rdd_nb.sources import load_data

from common import options, write

MNIST = dict(name='mnist', share=.05, size=16, limit=2400, val=400, test=500)
TASKS = {
    'digits, minority': dict(name='digits', shift='minority'),
    'mnist, minority': MNIST | dict(shift='minority'),
    'digits, blur': dict(name='digits', shift='blur'),
    'mnist, colour': MNIST | dict(shift='colour'),
    'digits, long tail': dict(name='digits', shift='long-tail', share=.1),
    'mnist, blur': MNIST | dict(shift='blur'),
}
DEVELOPMENT = 'digits, minority', 'mnist, minority'
FREE = 'k-center', 'kmeans', 'random', 'stratified', 'herding'      # selections without a step
SMALL = dict(batch='random(64)', network=dict(width=32))           # a quarter of the default real batch
CHANGES = dict(digits=SMALL, mnist=SMALL | dict(steps=60))         # MNIST: 60 of 200 steps, so that two cores can
EPOCHS = dict(digits=(60, 60), mnist=(30, 40))                     # of networks for a criterion and for the truth
IPC = 10


def members(data, part=1):
    "The portfolio as it is distilled on a data set, with a part of the steps."
    made = {k: as_method(m, **CHANGES[data]) if m.objective else m for k, m in PORTFOLIO.items()}
    return {k: as_method(m, steps=max(1, round(m.steps * part))) if m.objective else m for k, m in made.items()}


def piece(work, task, seed): return work / f'{task.replace(", ", "-").replace(" ", "-")}-{seed}.safetensors'


def collect(path, task, seed):
    "Distil, train and ask; writes answers on validation data, rows of the truth, and seconds of processor time."
    where, (short, long) = TASKS[task], EPOCHS[TASKS[task]['name']]
    splits, seconds = load_data(**where, data_seed=seed), {}
    begun = time.process_time()

    def lap(name):
        nonlocal begun
        seconds[name], begun = round(time.process_time() - begun, 2), time.process_time()

    def together(methods, name):
        made = distill_together(splits.train, methods, IPC, seed, 'cpu', False)
        lap(name)
        return made

    whole = members(where['name'])
    if seed == 0:      # the unit of the price
        together({'rdd-distance': whole['rdd-distance']}, 'one distillation')
    short_sets = together({k: m for k, m in members(where['name'], .25).items() if m.objective}, 'a quarter, together')
    sets = together(whole, 'whole, together')
    free = together({k: as_method(k) for k in FREE if k not in sets}, 'free')
    recipe = Training(width=32, epochs=short)
    tensors = {f'quarter/{k}': answers(s, splits.val, 2, recipe, seed, 'cpu').scores for k, s in short_sets.items()}
    lap('networks, a quarter')
    tensors |= {f'whole/{k}': answers(s, splits.val, 2, recipe, seed, 'cpu').scores for k, s in sets.items()}
    lap('networks, whole')
    truth = {k: evaluate(s, splits.test, Training(width=32, epochs=long), 2, seed, device='cpu', progress=False)
             for k, s in (sets | free).items()}
    lap('networks, truth')
    write_tensors(path, tensors, dict(auto=json.dumps(dict(task=task, seed=seed, seconds=seconds, truth=truth))))


# Scoring

PIXELS, ERRORS = 'worstcluster(pixels, 8, 0.03, doubt)', 'worstcluster(errors, 16, 0.03, doubt)'
CRITERIA = (
    'mean', 'mean(error)', 'tail(0.05)', 'tail(0.1)', 'tail(0.2)', 'tail(0.1, doubt)', 'tail(0.1, error)',
    'sharedtail(0.1, doubt)', 'sharedtail(0.1, error)', 'forgotten(0.1, doubt)',
    PIXELS, ERRORS, 'worstcluster(features, 16, 0.03, doubt)', 'worstcluster(pixels, 4, 0.1, error)',
    'worstcluster(pixels, 2, 0.1, error)', 'worstcluster(pixels, 2, 0.1, error, classes)',
    'worstcluster(pixels, 1, 0.1, error, classes)',       # the worst classes
    f'{PIXELS} + {ERRORS}', f'{PIXELS} + tail(0.1, doubt)', f'{PIXELS} + {ERRORS} + tail(0.1, doubt)',
    f'{PIXELS} + sharedtail(0.1, doubt)')
TOLD = 'told the groups of the validation data'
ALWAYS = tuple(f'always {k}' for k in PORTFOLIO)


def told(val, found):
    "The worst group's error of each candidate on validation data: a choice with labels."
    return {k: float(1 - min((a.scores.argmax(2) == a.y)[:, val.group == g].float().mean() for g in val.group.unique()))
            for k, a in found.items()}


def scored(path):
    "The row of one piece: truth, and the scores of all criteria on the short and on the whole sets."
    tensors, about = read_tensors(path)
    about = json.loads(about['auto'])
    where = TASKS[about['task']]
    splits = load_data(**where, data_seed=about['seed'])
    train, val = splits.train.without_groups(), splits.val.without_groups()
    recipe = Training(width=32, epochs=EPOCHS[where['name']][0])
    rows = {k: about[k] for k in ('task', 'seed', 'seconds')} | dict(validation=len(val), scores={})
    reference = None
    for part in ('quarter', 'whole'):
        found = {k: Answers(tensors.get(f'{part}/{k}', tensors[f'whole/{k}']), val.y) for k in PORTFOLIO}
        e = Evidence(train, val, found, about['seed'], 'cpu', recipe)
        if reference is not None: vars(e)['reference'] = reference
        rows['scores'][part] = {c: judge(e, c, 20)[0] for c in CRITERIA} | {TOLD: told(splits.val, found)}
        reference = e.reference
    keep = 'accuracy', 'worst_group_accuracy', 'worst_class_group_accuracy', 'group_accuracy', 'group_n'
    rows['truth'] = {name: {k: row[k] for k in keep if k in row} for name, row in about['truth'].items()}
    return rows


def outcome(row, part, rule):
    "The member that a rule chooses, and the rank correlation of its scores with the truth, or None."
    worst = {k: row['truth'][k]['worst_group_accuracy'] for k in PORTFOLIO}
    if rule in ALWAYS: return rule.removeprefix('always '), None
    s = row['scores'][part][rule]
    rho = spearmanr([-s[k] for k in PORTFOLIO], list(worst.values())).statistic if len(set(s.values())) > 1 else 0.
    return min(s, key=s.get), float(rho)


def compared(rows, part, rule, free):
    "What a rule does on the rows of a task: one dict of numbers for each seed."
    for row in rows:
        truth, (name, rho) = row['truth'], outcome(row, part, rule)
        worst = truth[name]['worst_group_accuracy']
        best = max(truth[k]['worst_group_accuracy'] for k in PORTFOLIO)
        others = [v for k, v in truth[name]['group_accuracy'].items()]
        plain = max(truth['distribution']['group_accuracy'].values())
        yield dict(chosen=name, rank_correlation=rho, worst_group_accuracy=worst, regret=best - worst,
                   gain=worst - truth[free]['worst_group_accuracy'], majority=max(others) - plain,
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
    "Per task and over tasks, for every rule on the short and the whole sets."
    def mean(own, name): return sum(r['truth'][name]['worst_group_accuracy'] for r in own) / len(own)
    by_task = {t: own for t in tasks if (own := [r for r in rows if r['task'] == t])}
    free, found = {t: max(FREE, key=lambda name: mean(own, name)) for t, own in by_task.items()}, {}
    for part in ('quarter', 'whole'):
        tables = {t: {rule: list(compared(own, part, rule, free[t])) for rule in (*CRITERIA, TOLD, *ALWAYS)}
                  for t, own in by_task.items()}
        found[part] = dict(tasks={t: {rule: over_seeds(f) for rule, f in table.items()} for t, table in tables.items()},
                           mean={rule: over_tasks(tables, rule) for rule in (*CRITERIA, TOLD, *ALWAYS)})
    return dict(best_free=free, **found)


def show(part):
    "Rules in the order of their mean regret."
    for rule, m in sorted(part['mean'].items(), key=lambda f: f[1]['regret']['mean']):
        rho = f'{m["rank_correlation"]["mean"]:6.2f}' if 'rank_correlation' in m else ''
        print(f'{rule:96}{rho:>6} regret {m["regret"]["mean"]:.3f} gain {m["gain"]["mean"]:+.3f} '
              f'least {m["least_gain"]:+.3f} ({m["least_gain_on"]})')


def main():
    parser = options('auto', __doc__, 3, work=True)
    parser.add_argument('--development', action='store_true', help='score only the tasks of the development')
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stop = time.perf_counter() + 60 * args.minutes
    for tasks in (DEVELOPMENT, [t for t in TASKS if t not in DEVELOPMENT]):
        for seed, task in itertools.product(range(args.seeds), tasks):
            path = piece(args.work, task, seed)
            if path.exists() or not re.search(args.only, task) or time.perf_counter() > stop: continue
            collect(path, task, seed)
            print(task, seed, json.loads(read_tensors(path)[1]['auto'])['seconds'], flush=True)
    tasks = DEVELOPMENT if args.development else tuple(TASKS)
    rows = [scored(p) for t in tasks for s in range(args.seeds) if (p := piece(args.work, t, s)).exists()]
    command = 'python benchmarks/auto.py --work runs/auto --only'
    missing = [f'{command} "{t}"' for t in tasks if sum(r['task'] == t for r in rows) < args.seeds]
    found = summary(rows, tasks)
    settings = {d: {k: m.describe() for k, m in members(d).items()} for d in CHANGES}
    write(args.out, criterion=CRITERION, development=DEVELOPMENT, tasks=TASKS, ipc=IPC, epochs=EPOCHS, members=settings,
          not_run=missing, rows=rows, summary=found)
    show(found['quarter'])


if __name__ == '__main__': main()
