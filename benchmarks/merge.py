"""Merging tables: every method, three models, repeated paired splits, within sites and with a site left out.

    python benchmarks/merge.py --work FOLDER      # writes benchmarks/results/merge.json; about twelve minutes on one core

The three hospitals made from scikit-learn's breast cancer table are always there. With RDD_NB_DATA naming a folder of data sets the four sites
of UCI heart disease and two pairs of tables follow. Settings were chosen on other splits (other seeds) of the three hospitals, with
a look at such splits of heart disease; the patients are the same, so that the choice is not independent of them. A stopped run goes on from the rows in FOLDER.
"""
import argparse, os, subprocess, time, warnings
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning

from rdd_nb.core import read_json, versions, write_json
from rdd_nb.evaluation import interval
from rdd_nb.merge import (BETTER, IMPUTERS, METHODS, MERGED, MergeTables, by_group, compare_once, default_models, load_diabetes, load_heart, load_hepatitis_ilpd,
                          paired_sites, per_split, privacy_report, split_sites, summarise_sites, three_hospitals)

# name: tables for a seed, target, complete tables for a seed, splits within sites, splits with a site left out
PARTS = dict(
    hospitals=(lambda seed: three_hospitals(seed), 'diagnosis', lambda seed: three_hospitals(seed, complete=True), 5, 5),
    heart=(lambda seed: load_heart(), 'disease', None, 5, 5),
    hepatitis_ilpd=(lambda seed: load_hepatitis_ilpd(), 'severe', None, 5, 0),
    diabetes=(lambda seed: load_diabetes(), 'diabetes', None, 5, 0),
)
COLUMNS = ['method', 'model', 'site', 'seed', 'held_out', 'n', 'n_positive', 'seconds', *BETTER]
FAIR = ('iterative', 'merged, mean', 'merged, cvar')


def one(part, seed, held_out):
    "Rows of one split, the privacy report (within sites), and who was served how (heart disease)."
    tables, target, complete, *_ = PARTS[part]
    began, tables, groups = time.process_time(), tables(seed), []

    def keep(row, y, p, t):
        if part == 'heart' and held_out is None and row['method'] in FAIR and row['model'] == 'logistic':
            groups.append(pd.DataFrame(dict(method=row['method'], y=y, p=p, sex=t.sex.to_numpy(), age=np.where(t.age < 55, 'below 55', '55 and more'))))

    rows = compare_once(tables, target, seed, held_out, complete=complete and complete(seed), keep=keep)
    found = dict(rows=rows)
    if groups:
        g = pd.concat(groups)
        found['groups'] = [dict(method=m, by=by, seed=seed, groups=by_group(v.y, v.p, v[by])) for m, v in g.groupby('method') for by in ('sex', 'age')]
    if held_out is None and seed < 5 and PARTS[part][4]:
        train, test = split_sites(tables, target, seed)
        m = MergeTables(seed=seed, progress=False).fit(train, target)
        found['privacy'] = [privacy_report(m.synthetic_, m.codec_, train, test, seed)]
    return found | dict(cpu_seconds=round(time.process_time() - began, 1))


def best_imputation(rows, metric, over, model=None):
    "The imputation pipeline (imputer, model) with the best mean over the splits: chosen with the test rows in view, in favour of the competitor."
    t = per_split(rows, metric)[over].groupby(level=[0, 1]).mean() * BETTER[metric]
    t = t[[k for k in t.index if k[0] in IMPUTERS and model in (None, k[1])]]
    return t.idxmax()


def analyse(rows):
    "Summary of one protocol, and merged tables against the best imputation, model by model and best against best."
    pairs = []
    for metric in BETTER:
        for over in ('mean', 'worst'):
            for method in MERGED:
                for model in default_models(): pairs.append(paired_sites(rows, method, best_imputation(rows, metric, over, model)[0], model, metric, over))
                base, base_model = best_imputation(rows, metric, over)
                pairs.append(paired_sites(rows, method, base, 'logistic', metric, over, base_model) | dict(best=True))
            for model in default_models(): pairs.append(paired_sites(rows, 'merged, cvar', 'merged, mean', model, metric, over))
    return dict(summary=summarise_sites(rows), paired=pairs)


def rounded(x):
    "Floats with four decimals, at all depths."
    if isinstance(x, float): return round(x, 4)
    if isinstance(x, dict): return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list) else x


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work', type=Path, default=Path('merge-work'), help='folder for the rows; a stopped benchmark goes on from there (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results' / 'merge.json')
    parser.add_argument('--splits', type=int, default=99, help='at most so many splits of everything')
    args = parser.parse_args()
    warnings.simplefilter('ignore', ConvergenceWarning)
    warnings.filterwarnings('ignore', message='.*(has no value|is constant|are the units)')
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=root, capture_output=True, text=True).stdout.strip()
    used = [p for p in PARTS if p == 'hospitals' or os.environ.get('RDD_NB_DATA')]
    for stage in (0, 1):                       # all within-site splits first; the file is written after every part
        for part in used:
            for seed in range(min(PARTS[part][3 + stage], args.splits)):
                for held_out in [None] if stage == 0 else PARTS[part][0](0):
                    path = args.work / f'{part}-{seed}-{held_out or "within"}.json'
                    if path.exists(): continue
                    write_json(path, one(part, seed, held_out))
                    print(path.name, read_json(path)['cpu_seconds'], flush=True)
            write_json(args.out, collect(used, args.work, commit))


def collect(used, work, commit):
    "The result file, from all complete splits in the work folder."
    results, total = {}, 0.
    for part in used:
        load, target, *_ = PARTS[part]
        sites, read = list(load(0)), lambda names: [read_json(p) for p in names] if all(p.exists() for p in names) else []
        splits = {'within': [read([work / f'{part}-{seed}-within.json']) for seed in range(99)],
                  'leave site out': [read([work / f'{part}-{seed}-{site}.json' for site in sites]) for seed in range(99)]}
        done = {k: [d for split in v for d in split] for k, v in splits.items()}
        if not done['within']: continue
        total += sum(d['cpu_seconds'] for v in done.values() for d in v)
        result = dict(target=target, protocols={})
        for protocol, chosen in done.items():
            if rows := [r for d in chosen for r in d['rows']]:
                lines = pd.DataFrame(rows)[COLUMNS].round(4).to_csv(index=False).splitlines()
                result['protocols'][protocol] = dict(analyse(rows), n_splits=len({r['seed'] for r in rows}), rows=lines)
        privacy = [p for d in done['within'] for p in d.get('privacy', [])]
        result['privacy'] = {k: interval([p[k] for p in privacy]) for k in privacy[0]} if privacy else None
        groups = [g for d in done['within'] for g in d.get('groups', [])]
        result['groups'] = [dict(method=m, by=by, group=g, **{k: interval(v) for k in ('n', 'auroc', 'tpr', 'fpr')
                                 if (v := [x['groups'][g][k] for x in groups if (x['method'], x['by']) == (m, by) and x['groups'].get(g, {}).get(k) is not None])})
                            for m in FAIR for by in ('sex', 'age') for g in sorted({g for x in groups if x['by'] == by for g in x['groups']})]
        results[part] = rounded(result)
    config = dict(settings={k: v for k, v in MergeTables().get_params().items() if k not in ('seed', 'device', 'progress')}, methods=METHODS, merged=MERGED,
                  models={k: repr(m) for k, m in default_models().items()}, test=.3, command='python benchmarks/merge.py')
    return dict(config=config, versions=versions(), commit=commit, cpu_seconds=round(total, 1), parts=results)


if __name__ == '__main__': main()
