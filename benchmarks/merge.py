"""Merging tables: ten methods, three models, repeated paired splits, within sites and with a site left out.

    python benchmarks/merge.py --work FOLDER      # writes benchmarks/results/merge.json; about five minutes of one core

`--splits 5 --leave-site-out` is the longer form, about fifteen minutes.

The three hospitals made from scikit-learn's breast cancer table are always there. With RDD_NB_DATA naming a folder of
data sets, six sets of real tables follow. Settings were chosen on the three hospitals, heart disease and Adult, with
other splits (seeds from 100), so the choice is not independent of their patients; the other four were not looked at.
A stopped run goes on from the rows in FOLDER.
"""
import argparse, os, subprocess, time, warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from rdd_nb.core import read_json, versions, write_json
from rdd_nb.intervals import interval
from rdd_nb.learners import default_models
from rdd_nb.merge import MergeTables
from rdd_nb.sites import (BETTER, MERGED, METHODS, compare_once, paired_sites, privacy_report, split_sites,
                          summarise_sites, verdicts)
from rdd_nb.tables import three_hospitals


# The tables. The loaders undo what would mislead: a blood pressure of 0 is missing, codes become words, copies go.

def file(name, folder):
    "A file in the folder that RDD_NB_DATA names."
    if not (root := os.environ.get('RDD_NB_DATA')):
        raise FileNotFoundError(f'{name}: set RDD_NB_DATA to the folder that holds {folder}/')
    return Path(root) / folder / name


def words(table, **codes):
    "Columns with codes replaced by words; unknown codes become missing."
    return table.assign(**{c: table[c].map(w).astype(object) for c, w in codes.items()})


def yes_no(flags): return np.where(flags, 'yes', 'no')


def split_up(table, site, columns, target, most=400, seed=0):
    "One table as several: `site` names the site of each row, `columns` what each site has; at most so many rows each."
    found = {}
    for name, own in columns.items():
        t = table[site == name]
        t = t.sample(min(most, len(t)), random_state=seed)
        found[name] = t[own.split() + [target]].reset_index(drop=True)
    return found


def heart(seed):
    "UCI Heart Disease (CC BY 4.0, doi 10.24432/C52P4X), four sites: 13 columns by name, whole columns missing at some."
    names = 'age sex cp trestbps chol fbs restecg thalach exang oldpeak slope ca thal num'.split()
    found, flag = {}, {0: 'no', 1: 'yes'}
    for site in ('cleveland', 'hungarian', 'switzerland', 'va'):
        t = pd.read_csv(file(f'processed.{site}.data', 'heart-disease'), header=None, names=names, na_values='?')
        t = t.assign(disease=yes_no(t.num > 0),
                     **{c: t[c].where(t[c] > 0) for c in ('chol', 'trestbps')}).drop(columns='num')
        found[site] = words(t, sex={0: 'female', 1: 'male'}, cp={1: 'typical', 2: 'atypical', 3: 'not anginal',
            4: 'none'}, fbs=flag, exang=flag,
                            restecg={0: 'normal', 1: 'ST-T', 2: 'hypertrophy'}, slope={1: 'up', 2: 'flat', 3: 'down'},
                            thal={3: 'normal', 6: 'fixed', 7: 'reversible'})
    return found


def hepatitis_ilpd(seed):
    "UCI Hepatitis (doi 10.24432/C5Q59J) and Indian Liver Patients (doi 10.24432/C5D02C), CC BY 4.0; unlike targets."
    names = ('class age sex steroid antivirals fatigue malaise anorexia liver_big liver_firm spleen spiders ascites '
             'varices '
             'bilirubin alk_phosphate sgot albumin protime histology').split()
    a = pd.read_csv(file('hepatitis.data', 'hepatitis'), header=None, names=names, na_values='?')
    flags = {c: {1: 'no', 2: 'yes'} for c in names[3:14] + ['histology']}
    a = words(a, sex={1: 'male', 2: 'female'}, **flags).assign(severe=yes_no(a['class'] == 1)).drop(columns='class')
    names = 'age sex bilirubin direct_bilirubin alk_phosphate sgpt sgot protein albumin ag_ratio severe'.split()
    b = pd.read_csv(file('ilpd.csv', 'ilpd'), header=0, names=names)
    return dict(hepatitis=a, ilpd=b.assign(sex=b.sex.str.lower().astype(object), severe=yes_no(b.severe == 1)))


def diabetes(seed):
    "Pima Indians Diabetes and UCI Early Stage Diabetes (CC BY 4.0, doi 10.24432/C5VG8H): the age is all they share."
    names = 'pregnancies glucose blood_pressure skin_thickness insulin bmi pedigree age diabetes'.split()
    a = pd.read_csv(file('pima-indians-diabetes.csv', 'pima-diabetes'), header=None, names=names)
    a = a.assign(**{c: a[c].where(a[c] > 0) for c in names[1:6]}, diabetes=yes_no(a.diabetes == 1))
    b = pd.read_csv(file('diabetes_data_upload.csv', 'early-diabetes')).drop_duplicates(ignore_index=True)
    b = b.rename(columns={'Age': 'age', 'Gender': 'sex', 'class': 'diabetes'}).rename(columns=str.lower)
    b = b.assign(diabetes=yes_no(b.diabetes == 'Positive')).astype({c: object for c in b if c not in ('age',
        'diabetes')})
    return dict(pima=a, early=b)


def thyroid(seed):
    "UCI Thyroid Disease (CC BY 4.0, doi 10.24432/C5D010), sites by source of referral; each lacks one of the hormones."
    flags = ('thyroxine query antithyroid sick pregnant surgery i131 query_hypo query_hyper lithium goitre tumor '
             'hypopituitary psych').split()
    hormones = [c for h in ('TSH', 'T3', 'TT4', 'T4U', 'FTI', 'TBG') for c in (f'{h}_measured', h)]
    t = pd.read_csv(file('thyroid0387.data', 'thyroid'), header=None, na_values='?', names=['age', 'sex', *flags,
        *hormones, 'source', 'diagnosis'])
    t = t.assign(abnormal=yes_no(~t.diagnosis.str.startswith('-')), age=t.age.where(t.age < 100))
    columns = dict(SVI='age sex thyroxine TSH TT4 FTI', SVHC='age sex thyroxine TSH T3 T4U',
                   other='age sex thyroxine T3 TT4 query_hypo')
    return split_up(t, t.source, columns, 'abnormal', seed=seed)


def adult(seed):
    "UCI Adult (CC BY 4.0, doi 10.24432/C5XW20), sites by employer and age; the young are nearly all below 50,000."
    names = ('age workclass fnlwgt education schooling marital occupation relationship race sex gain loss hours '
             'country income').split()
    t = pd.read_csv(file('adult.data', 'adult'), names=names, na_values='?', skipinitialspace=True)
    site = np.select([t.workclass.astype(str).str.endswith('-gov'), t.workclass.astype(str).str.startswith('Self'),
                      t.age < 28], ['government', 'self', 'young'], 'rest')
    columns = dict(government='age schooling sex marital hours gain',
                   self='age schooling sex occupation relationship gain loss',
                   young='age schooling sex race hours occupation')
    return split_up(t, site, columns, 'income', seed=seed)


def compas(seed):
    "COMPAS (ProPublica 2016), sites by ethnic group: counts of earlier offences, each site lacks some."
    t = pd.read_csv(file('compas-scores-two-years-deidentified.csv', 'compas'))
    t = t[t.days_b_screening_arrest.abs() <= 30].assign(again=lambda t: yes_no(t.two_year_recid == 1))
    columns = {'African-American': 'age sex priors_count juv_fel_count',
               'Caucasian': 'age sex priors_count c_charge_degree',
               'Hispanic': 'age sex juv_misd_count juv_other_count c_charge_degree'}
    return split_up(t, t.race, columns, 'again', seed=seed)


# load(seed), target, load(seed) without holes, columns to accept, splits with a site left out
Part = namedtuple('Part', 'load target complete accept left_out')
PARTS = dict(
    hospitals=Part(three_hospitals, 'diagnosis', lambda seed: three_hospitals(seed, complete=True), (), 2),
    heart=Part(heart, 'disease', None, (), 2), adult=Part(adult, 'income', None, ('gain',), 0),
    compas=Part(compas, 'again', None, (), 0), thyroid=Part(thyroid, 'abnormal', None, (), 0),
    hepatitis_ilpd=Part(hepatitis_ilpd, 'severe', None, (), 0), diabetes=Part(diabetes, 'diabetes', None, (), 0))
COLUMNS = ['method', 'model', 'site', 'seed', 'held_out', 'n', 'n_positive', 'seconds', *BETTER]
FAIR = ('own columns', 'merged, cvar', 'drawn')


# The work

def by_group(y, p, group, threshold=.5):
    "Of every group: size, positives, AUROC, and the shares of positives and negatives that are called positive."
    found = {}
    for g in sorted(set(group)):
        i = group == g
        n1, yes = int(y[i].sum()), p[i] >= threshold
        found[g] = dict(n=int(i.sum()), n_positive=n1, auroc=float(roc_auc_score(y[i], p[i])) if 0 < n1 < i.sum()
                        else None,
                        tpr=float(yes[y[i] == 1].mean()) if n1 else None, fpr=float(yes[y[i] == 0].mean())
                        if n1 < i.sum() else None)
    return found


def groups_of(rows, test):
    "Who is served how on heart disease, by sex and age, under logistic regression."
    found = []
    for method in FAIR:
        used = [r for r in rows if r['method'] == method and r['model'] == 'logistic']
        t = pd.concat([test[r['site']].assign(p=r['p']) for r in used])
        for by, g in dict(sex=t.sex, age=np.where(t.age < 55, 'below 55', '55 and more')).items():
            found.append(dict(method=method, by=by, groups=by_group((t.disease == 'yes').to_numpy().astype(int),
                t.p.to_numpy(), np.asarray(g))))
    return found


def one(name, seed, held_out):
    "Rows of one split, the privacy report (within sites), and who was served how (heart disease)."
    part, began = PARTS[name], time.process_time()
    tables = part.load(seed)
    rows = compare_once(tables, part.target, seed, held_out, complete=part.complete and part.complete(seed),
                        accept=part.accept)
    found, (train, test) = {}, split_sites(tables, part.target, seed)
    if name == 'heart' and held_out is None: found['groups'] = groups_of(rows, test)
    if held_out is None and name in ('hospitals', 'heart'):
        m = MergeTables(seed=seed, accept=part.accept, progress=False).fit(train, part.target)
        found['privacy'] = [privacy_report(m.synthetic_, m.codec_, train, test, seed)]
    rows = [{k: v for k, v in r.items() if k != 'p'} for r in rows]
    return found | dict(rows=rows, cpu_seconds=round(time.process_time() - began, 1))


def analyse(rows):
    "Summary of one protocol, and all differences between merged tables and others, with verdicts over the whole table."
    bases = ('own columns', 'iterative', 'random rows', 'per site')
    have = {(r['method'], r['model']) for r in rows}
    pairs = [paired_sites(rows, method, base, model, metric, over) for method in ('merged, cvar', 'drawn')
             for base in bases
             for model in default_models() for metric in ('auroc', 'brier') for over in ('mean', 'worst') if (base,
                 model) in have]
    pairs += [paired_sites(rows, 'merged, cvar', 'merged, mean', model, 'auroc', over) for model in default_models()
              for over in ('mean', 'worst')]
    return dict(summary=summarise_sites(rows), paired=verdicts(pairs).replace({np.nan: None}).to_dict('records'))


def rounded(x):
    "Floats with four decimals, at all depths."
    if isinstance(x, float): return None if np.isnan(x) else round(x, 4)
    if isinstance(x, dict): return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list) else x


def collect(work, commit):
    "The result file, from all complete splits in the work folder."
    results, total = {}, 0.
    for name, part in PARTS.items():
        read = lambda names: [read_json(p) for p in names] if all(p.exists() for p in names) else []
        done = {'within': [d for seed in range(99) for d in read([work / f'{name}-{seed}-within.json'])]}
        if not done['within']: continue
        sites = sorted({r['site'] for d in done['within'] for r in d['rows']})
        done['leave site out'] = [d for seed in range(99)
                                  for d in read([work / f'{name}-{seed}-{site}.json' for site in sites])]
        total += sum(d['cpu_seconds'] for v in done.values() for d in v)
        result = dict(target=part.target, sizes={k: len(t) for k, t in part.load(0).items()}, protocols={})
        for protocol, chosen in done.items():
            if rows := [r for d in chosen for r in d['rows']]:
                lines = pd.DataFrame(rows)[COLUMNS].round(4).to_csv(index=False).splitlines()
                result['protocols'][protocol] = dict(analyse(rows), n_splits=len({r['seed'] for r in rows}), rows=lines)
        privacy = [p for d in done['within'] for p in d.get('privacy', [])]
        result['privacy'] = {k: interval([p[k] for p in privacy]) for k in privacy[0]} if privacy else None
        result['groups'] = mean_groups([g for d in done['within'] for g in d.get('groups', [])])
        results[name] = rounded(result)
    settings = {k: v for k, v in MergeTables().get_params().items() if k not in ('seed', 'device', 'progress')}
    config = dict(settings=settings, methods=METHODS, merged=MERGED, models={k: repr(m) for k,
        m in default_models().items()}, test=.3, command='python benchmarks/merge.py')
    return dict(config=config, versions=versions(), commit=commit, cpu_seconds=round(total, 1), parts=results)


def mean_groups(found):
    "Means and intervals over the splits of what `by_group` says."
    rows = [dict(method=f['method'], by=f['by'], group=g, **v) for f in found for g, v in f['groups'].items()]
    if not rows: return []
    return [dict(zip(('method', 'by', 'group'), key),
                 **{k: interval(t[k].dropna().astype(float)) for k in ('n', 'auroc', 'tpr', 'fpr')})
            for key, t in pd.DataFrame(rows).groupby(['method', 'by', 'group'])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work', type=Path, default=Path('merge-work'),
                        help='folder for the rows; a stopped benchmark goes on from there (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results' / 'merge.json')
    parser.add_argument('--splits', type=int, default=3, help='splits within sites (default: %(default)s)')
    parser.add_argument('--leave-site-out', action='store_true', help='also leave out each site, twice')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=root, capture_output=True, text=True).stdout.strip()
    used = [p for p in PARTS if p == 'hospitals' or os.environ.get('RDD_NB_DATA')]
    within = [(p, s, None) for s in range(args.splits) for p in used]
    left_out = [(p, s, site) for p in used for s in range(PARTS[p].left_out) for site in PARTS[p].load(0)]
    for part, seed, held_out in within + left_out * args.leave_site_out:
        path = args.work / f'{part}-{seed}-{held_out or "within"}.json'
        if path.exists(): continue
        write_json(path, one(part, seed, held_out))
        print(path.name, read_json(path)['cpu_seconds'], flush=True)
    write_json(args.out, collect(args.work, commit))


if __name__ == '__main__': main()
