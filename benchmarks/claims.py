"""The tables of the reproduction report (`nbs/reproduction.ipynb`), each from result files. Measures nothing.

Every function returns a data frame of text. A number is a mean over distillation seeds with the 95 % interval in
brackets; without brackets there was one seed. Differences are in points and paired by seed.
"""
import statistics

import pandas as pd

from rdd_nb.core import read_json
from rdd_nb.intervals import interval

from common import RESULTS

FREE = 'random', 'stratified', 'herding', 'k-center', 'kmeans'      # selections without a step
NAMES = {'DM, mean': 'distribution', 'DM, mean, density weights': 'density', 'DM, true groups, distance': 'fairdd*',
         'DM, true groups, target': 'cobra*', 'group-balanced': 'group-balanced*',
         'DM, CVaR, distance': 'CVaR over clusters', 'DM, CVaR, distance, k-centre start': 'the same from k-center'}


def result(name): return read_json(RESULTS / f'{name}.json')
def exists(name): return (RESULTS / f'{name}.json').exists()


def spread(v, scale=1, sign='', digits=3):
    "An interval as text: 0.851 [0.842, 0.860]."
    mean, *ends = (f'{scale * x:{sign}.{digits}f}' for x in (v['mean'], v['low'], v['high']) if x is not None)
    return f'{mean} [{ends[0]}, {ends[1]}]' if ends else mean


def share(v): return spread(v | {k: min(max(v[k], 0), 1) for k in ('low', 'high') if v[k] is not None})   # in [0, 1]
def points(values): return spread(interval(values), 100, '+', 1)


def rows(where):
    "{method: {seed: row}} of the digits or of coloured MNIST."
    grid = result('grid')['rows']
    found = [r for r in grid if r['set'] == where] + (result('digits')['rows'] if where == 'digits' else [])
    table = {}
    for r in found: table.setdefault(NAMES.get(r['method'], r['method']), {})[r['seed']] = r
    return table


def minority(row): return min(row['group_accuracy'].values())


def best_free(table, value=minority):
    "The selection without a step that is best in the mean, known in hindsight."
    return max(FREE, key=lambda k: statistics.mean(map(value, table[k].values())))


def above(table, a, b, value=minority):
    "The differences of two methods, paired by seed."
    return [value(table[a][s]) - value(table[b][s]) for s in sorted(table[a].keys() & table[b].keys())]


def home(where, methods):
    "The tasks on which everything was developed: groups, worst class and group, and two differences in the minority."
    table = rows(where)
    best, found = best_free(table), {}
    for m in (*FREE, *methods):
        own = table[m].values()
        groups = {g: share(interval([r['group_accuracy'][g] for r in own])) for g in next(iter(own))['group_accuracy']}
        worst = share(interval([r['worst_class_group_accuracy'] for r in own]))
        found[m] = groups | {'worst class and group': worst, 'n of it': min(r['worst_class_group']['n'] for r in own),
                             'minority, above plain': points(above(table, m, 'distribution')),
                             f'minority, above {best}': points(above(table, m, best))}
    return pd.DataFrame(found).T


def places():
    "What the risk adds at each place, on the digits: the minority against the same method without it."
    pairs = [('rdd-network', 'gradient'), ('network, as in the paper', 'gradient'), ('rdd-target', 'gradient'),
             ('rdd-distance', 'distribution'), ('distance, mean over clusters', 'distribution'),
             ('rdd-distance', 'distance, mean over clusters')]
    table = rows('digits')
    best = best_free(table)
    return pd.DataFrame([{'method': a, 'without': b, 'minority': points(above(table, a, b)),
                          f'minority, above {best}': points(above(table, a, best)), 'seeds': len(above(table, a, b))}
                         for a, b in pairs]).set_index(['method', 'without'])


def shapes():
    "Equal weights, CVaR, mean + CVaR and the maximum over the same distances: worst-group accuracy by task."
    table = result('ablation')
    found = {}
    for task, own in table['summary'].items():
        best = max(FREE, key=lambda k: own[k]['worst_group_accuracy']['mean'])
        for name, start in (('hard and easy', 'balanced, density, losses'), ('pixels', 'kcenter, uniform, pixels')):
            found[task, name] = {r: share(own[f'{start}, {r}']['worst_group_accuracy']) for r in table['risks']} | {
                'best free': f'{share(own[best]["worst_group_accuracy"])} ({best})', 'seeds': own[best]['seeds']}
    return pd.DataFrame(found).T.rename_axis(['task', 'clusters'])


# Many tasks

def kind(task, study):
    "How often the test set of a task had been read when the methods were fixed."
    if task in study['development']: return 'development'
    return 'read again' if task in study['read_before'] else 'read once'


def studies():
    "(task, what it is, rows, name of the criterion) of the study of `auto` and of the tasks added later."
    for name in ('auto', 'auto-later'):
        if not exists(name): continue
        study = result(name)
        for task in dict.fromkeys(r['task'] for r in study['rows']):
            label = 'added later' if name == 'auto-later' else kind(task, study)
            yield task, label, [r for r in study['rows'] if r['task'] == task], study['criterion']


def chosen(row, criterion): return min(row['scores'][criterion], key=row['scores'][criterion].get)


def many():
    "Worst-group accuracy on every task, against the selection that is best there in hindsight."
    found = {}
    for task, label, own, criterion in studies():
        table = {k: {r['seed']: r['truth'][k] for r in own} for k in (*FREE, 'distribution', 'rdd-hard')}
        table['auto'] = {r['seed']: r['truth'][chosen(r, criterion)] for r in own}
        value = lambda r: r['worst_group_accuracy']
        best = best_free(table, value)
        numbers = {k: share(interval(map_values(table[k], value))) for k in (best, 'distribution', 'rdd-hard', 'auto')}
        found[task] = {'test set': label, 'seeds': len(own), 'best free': f'{numbers[best]} ({best})',
                       'plain matching': numbers['distribution'], 'rdd-hard': numbers['rdd-hard'],
                       'auto': numbers['auto'], 'rdd-hard, above free': points(above(table, 'rdd-hard', best, value)),
                       'auto, above free': points(above(table, 'auto', best, value))}
    return pd.DataFrame(found).T


def map_values(d, f): return [f(v) for v in d.values()]


def means(part):
    "The mean over the tasks of one kind: regret, gain over the best free selection, and the least gain, by rule."
    study = result('auto-later' if part == 'added later' else 'auto')
    own = study['summary']['mean'].get('others' if part == 'added later' else part, {})
    keep = [study['criterion'], 'always rdd-hard', 'worstcluster(errors, 16, 0.03, doubt)', 'always k-center',
            'told the groups of the validation data']
    return pd.DataFrame({k: dict(regret=100 * own[k]['regret']['mean'], gain=100 * own[k]['gain']['mean'],
                                 least=100 * own[k]['least_gain'], on=own[k]['least_gain_on'],
                                 seeds=own[k]['seeds']) for k in keep if k in own}).T


def told():
    "`rdd-hard`, which sees no labels, beside the rivals that see them: worst group and DEO_M (less is better)."
    study, found = result('told'), {}
    for task, own in study['summary'].items():
        m = own['methods']
        def pair(k): return f'{m[k]["worst_group_accuracy"]["mean"]:.3f}' + (
            f' / {m[k]["deo_m"]["mean"]:.2f}' if 'deo_m' in m[k] else '')
        best = own['best_free']
        found[task] = {'seeds': own['seeds'], 'best free': f'{pair(best)} ({best})',
                       **{k: pair(k) for k in ('distribution', 'rdd-hard')}, **{f'{k}*': pair(k) for k in
                                                                               ('fairdd', 'cobra')},
                       'rdd-hard, above fairdd*': spread(own['rdd_hard_above']['fairdd'], 100, '+', 1)}
    return pd.DataFrame(found).T


def cifar():
    "The columns of CIFAR-10, by task and method."
    found = {}
    for task, own in result('cifar-columns')['summary'].items():
        for k, m in own['methods'].items():
            groups = ', '.join(f'{g} {v["mean"]:.3f}' for g, v in m['groups'].items())
            n = min(m['n_worst_class_group'])
            found[task, k] = {'accuracy': share(m['accuracy']), 'groups': groups,
                              'worst class and group': f'{m["worst_class_group_accuracy"]["mean"]:.3f} (n = {n})',
                              'DEO_M': f'{m["deo_m"]["mean"]:.3f}', 'DEO_A': f'{m["deo_a"]["mean"]:.3f}',
                              'worst group, above free': spread(m['above_best_free'], 100, '+', 1),
                              'best free': own['best_free'], 'seeds': len(own['seeds'])}
    return pd.DataFrame(found).T


# Other networks, known numbers, the second paper

def architectures():
    "A set distilled with a ConvNet, evaluated with other models: the minority against k-means medoids."
    table = [r for r in result('architectures')['table'] if 'minority' in r]
    return pd.DataFrame([dict(architecture=r['architecture'], seeds=r['n_seeds'], **{
        k: f'{r["minority"][k]["mean"]:.3f}' for k in ('kmeans', 'rdd-distance')}, difference=spread(
        r['minority']['difference'], 100, '+', 1)) for r in table]).set_index('architecture')


def known():
    "Published accuracies of known methods, measured again, in percent."
    return pd.DataFrame([{'method': r['method'], 'set': r['set'], 'ipc': r['ipc'], 'runs': r['runs'], 'ours': r['ours'],
                          'sd': r['sd'], 'published': r['published'], 'source': r['source'],
                          'source seen': None if r['from_memory'] is None else not r['from_memory']}
                         for r in result('reproduce')['table']]).set_index(['method', 'set', 'ipc'])


def foreign():
    "Distilled sets of others, evaluated by us: their accuracy and ours."
    table = result('foreign')['table']
    return pd.DataFrame([{'file': r['file'], 'architecture': r['architecture'], 'theirs': f'{r["theirs"]:.4f}',
                          'sd': f'{r["theirs_sd"]:.4f}', 'ours': f'{r["ours"]:.4f}' if r['n'] else 'not run',
                          'networks': r['n'], 'within one sd': r.get('agrees', '')} for r in table
                         ]).set_index(['file', 'architecture'])


def faithful():
    "Rank correlation of surrogates with the true risk, over the sets that descents end with; mean over the tasks."
    tasks = result('faithfulness')['rows']
    def mean(m, on): return statistics.mean(r['methods'][m][on]['rank_correlation'] for r in tasks)
    names = [m for m in tasks[0]['methods'] if all(m in r['methods'] for r in tasks)]
    found = {m: {'on distilled sets': mean(m, 'on_distilled'), 'on subsets': mean(m, 'on_subsets')} for m in names}
    return pd.DataFrame(found).T.sort_values('on distilled sets', ascending=False).round(2)


def equations():
    "Worst error outside the family of conditions: distilled points, and the best rule that needs no solver."
    table, found = result('pinn')['rows'], {}
    for pde in dict.fromkeys(r['pde'] for r in table):
        by = {}
        for r in table:
            if r['pde'] == pde: by.setdefault(r['method'], []).append(r['outside worst'])
        if 'distilled' not in by: continue
        rules = [k for k in ('uniform', 'lhs', 'sobol', 'rar', 'rar at once', 'rad', 'rad at once') if k in by]
        best = min(rules, key=lambda k: statistics.mean(by[k]))
        found[pde] = {'distilled': spread(interval(by['distilled'])),
                      'best rule': f'{spread(interval(by[best]))} ({best})',
                      'untrained': spread(interval(by['untrained'])), 'seeds': len(by['distilled'])}
    return pd.DataFrame(found).T


def hospitals():
    "AUROC at the worst site: merged tables beside each site's own columns and beside the columns that all share."
    found = {}
    for name, part in result('merge')['parts'].items():
        own = {s['method']: s for s in part['protocols']['within']['summary']
               if (s['model'], s['metric'], s['over']) == ('logistic', 'auroc', 'worst')}
        shown = 'merged, cvar', 'merged, mean', 'own columns', 'intersection'
        found[name] = {k: f'{own[k]["mean"]:.3f}' for k in shown}
        found[name]['splits'] = own['merged, cvar']['n_splits']
    return pd.DataFrame(found).T


def absent():
    "The commands that would fill what has not run."
    found = [c for name in ('auto', 'auto-later', 'told', 'cifar-columns') if exists(name)
             for c in result(name)['not_run']]
    left = [r for r in result('foreign')['table'] if not r['n']]
    return found + [f"{result('foreign')['command']} --only \"{r['data']} {r['architecture']}\"" for r in left]
