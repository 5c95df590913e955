"""The report: what stands on the page, and what does not."""
import itertools, json, re, shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from rdd_nb import blocks, pictures, plots
from rdd_nb.blocks import Items, section
from rdd_nb.core import write_json
from rdd_nb.data import GroupedDataset
from rdd_nb.findings import (accuracy_table, all_differences, best, chance_minimum, difference, findings, frame,
                             headline, is_free, plain_of, uses_groups)
from rdd_nb.intervals import paired, summarise
from rdd_nb.report import damage_table, page_of, severity_charts, to_html, to_markdown, write_report
from rdd_nb.runs import Comparison, read_comparison
from rdd_nb.synthetic import SyntheticDataset, save

METHODS = ('random', 'gradient', 'rdd-target')
GROUPS = ('majority', 'minority')
CLASSES = ('0', '1', '2')
FREE = ('random', 'kmeans', 'k-center')


# A comparison made up in a moment: methods x seeds, tiny images

def row(method, seed, gain=0., n=50):
    "A row with subgroups of 3 classes x 2 groups; `gain` is added to the minority."
    rng = np.random.default_rng(hash_of(method, seed))
    level = dict(majority=.9, minority=.6 + gain)
    parts = {f'{c}|{g}': float(np.clip(level[g] + rng.normal(0, .02), 0, 1)) for c in CLASSES for g in GROUPS}
    groups = {g: float(np.mean([parts[f'{c}|{g}'] for c in CLASSES])) for g in GROUPS}
    worst = min(parts, key=parts.get)
    return dict(method=method, seed=seed, accuracy=float(np.mean(list(groups.values()))), group_accuracy=groups,
                worst_group_accuracy=min(groups.values()), group_counts=dict.fromkeys(GROUPS, 3 * n),
                class_group_accuracy=parts, class_group_counts=dict.fromkeys(parts, n),
                worst_class_group_accuracy=parts[worst], worst_class_group=dict(name=worst, n=n, low=.4, high=.7),
                cluster_min_accuracy=float(rng.uniform(.3, .5)), seconds=float(rng.uniform(1, 9)),
                peak_mb=float(rng.uniform(50, 90)), steps=0 if method in FREE else 40, images=6, bytes=6 * 64 * 4)


def hash_of(*keys): return sum((i + 1) * ord(c) for i, c in enumerate(repr(keys)))


def synthetic(method, seed, shape=(1, 8, 8), risk=True):
    g = torch.Generator().manual_seed(hash_of(method, seed))
    x, initial = torch.randn(6, *shape, generator=g), torch.randn(6, *shape, generator=g)
    share = torch.rand(6, generator=g).view(3, 2)
    mass = (share / share.sum(1, keepdim=True)).flatten()
    extra = dict(initial=x.clone())
    if risk: extra = dict(initial=initial, mass=mass, weight=mass.view(3, 2).flip(1).flatten())
    made = dict(method=method, seed=seed, data='made up')
    return SyntheticDataset(x, torch.arange(3).repeat_interleave(2), [.3] * shape[0], [.4] * shape[0],
                            classes=list(CLASSES), provenance=made, **extra)


def comparison(folder, methods=METHODS, seeds=(0, 1), gains=(-.2, 0., .2), **config):
    "Write a comparison folder; the last method is the best on the minority."
    rows = [row(m, s, gain) for m, gain in zip(methods, gains) for s in seeds]
    config = dict(data='made up', data_hash='ab' * 32, command=['rdd-nb', 'demo', '--out', 'x y'], **config)
    write_json(folder/'report.json', dict(config=config, rows=rows, summary=summarise(rows), paired=paired(rows)))
    losses = ''.join(json.dumps(dict(step=i + 1, loss=3 / (i + 1) + .1)) + '\n' for i in range(40))
    for m, s in itertools.product([m for m in methods if m != 'full'], seeds):
        run = folder/'runs'/f'{m}-seed{s}'
        save(synthetic(m, s, risk=m.startswith('rdd')), run/'synthetic.safetensors')
        write_json(run/'config.json', dict(data='made up', method=dict(steps=40), versions=dict(python='3.x')))
        (run/'metrics.jsonl').write_text('' if m == 'random' else losses)
    return folder


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "A comparison with its report. Not to be changed."
    folder = comparison(tmp_path_factory.mktemp('written')/'comparison')
    write_report(folder)
    return folder


@pytest.fixture
def folder(tmp_path): return comparison(tmp_path/'comparison')


class Page(HTMLParser):
    "What a test wants to know of a page. Also checks that tags are closed in order."
    VOID = {'meta', 'link', 'img', 'br', 'path', 'use', 'image', 'rect'}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.ids, self.numbers = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len({k for k, _ in attrs}) == len(attrs), (tag, attrs)
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in self.VOID: self.open.append(tag)
        if 'id' in attrs: self.ids.append(attrs['id'])
        if tag == 'data': self.numbers.append(float(attrs['value']))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID: self.open.pop()

    def handle_endtag(self, tag):
        if tag in self.VOID: return
        assert self.open and self.open[-1] == tag, f'</{tag}> closes {self.open[-3:]}'
        self.open.pop()

    def handle_data(self, data):
        if not {'style', 'script'} & set(self.open): self.text.append(data)

    def all(self, tag): return [a for t, a in self.tags if t == tag]


def page_of_folder(folders): return Page(to_html(read_comparison(folders)))


def section_texts(c):
    "{id: HTML} of the sections of a page."
    return {s.id: ''.join(b.render('html') for b in found) for s, found in blocks.sections(c)}


@pytest.fixture(scope='module')
def page(written): return Page((written/'report.html').read_text(encoding='utf-8'))


# The page

def test_page_is_well_formed_and_self_contained(page):
    assert page.all('html') == [{'lang': 'en'}]
    assert len(page.ids) == len(set(page.ids))
    assert page.all('script') == [] and page.all('iframe') == []
    images, charts = page.all('img'), [a for a in page.all('svg')]
    assert len(images) > 3 and len(charts) > 3
    assert all(a['src'].startswith('data:image/png;base64,') and a['alt'].strip() for a in images)
    assert all(a['role'] == 'img' and len(a['aria-label']) > 20 for a in charts)
    for tag, attrs in page.tags:
        for k, v in attrs.items():
            if k in ('src', 'href', 'xlink:href', 'srcset', 'action'): assert v.startswith(('data:', '#')), (tag, k, v)
            if 'url(' in (v or ''): assert 'url(#' in v
    targets = [a['href'][1:] for a in page.all('a')] + [a['xlink:href'][1:] for a in page.all('use')]
    assert {*targets, *re.findall(r'url\(#([^)]+)\)', str(page.tags))} <= set(page.ids)


def test_headings_form_a_tree(page):
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch(r'h\d', t)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:]))


def test_numbers_are_those_of_report_json(written, page):
    report, numbers = json.loads((written/'report.json').read_text()), page.numbers
    for s in report['summary']:
        for key in ('accuracy', 'worst_group_accuracy', 'worst_class_group_accuracy', 'cluster_min_accuracy'):
            assert s[key]['mean'] in numbers
        for g in GROUPS: assert s['group_accuracy'][g]['mean'] in numbers
        assert np.mean([r['seconds'] for r in report['rows'] if r['method'] == s['method']]) in numbers
    c = read_comparison(written)
    assert all(p['difference'] in numbers for p in all_differences(c))
    mean = report['summary'][1]['group_accuracy']['minority']['mean']
    assert frame(c).loc['gradient', 'minority'] == mean
    line = next(l for l in (written/'report.md').read_text().splitlines() if l.startswith('| gradient |'))
    assert f'{100 * mean:.1f} (' in line and 'to' in line


def test_an_edited_summary_cannot_disagree_with_its_rows(folder):
    report = json.loads((folder/'report.json').read_text())
    mean = report['summary'][0]['accuracy']['mean']
    report['summary'][0]['accuracy'] = dict(mean=.123456, low=.1, high=.2)
    write_json(folder/'report.json', report)
    page = page_of_folder(folder)
    assert .123456 not in page.numbers and mean in page.numbers
    assert 'does not fit its rows (random)' in ' '.join(page.text)


def test_summary_says_what_the_numbers_say(written, page):
    c = read_comparison(written)
    assert headline(c)[0].startswith('rdd-target is best for the hardest group (minority)')
    found = {f.claim: f for f in findings(c)}
    d = difference(c, 'rdd-target', 'gradient', 'group_accuracy|minority')
    on = lambda m, s, gain: row(m, s, gain)['group_accuracy']['minority']
    by_hand = np.mean([on('rdd-target', s, .2) - on('gradient', s, 0.) for s in (0, 1)])
    assert d['difference'] == pytest.approx(by_hand)
    assert found['better than plain matching (gradient)'].difference['difference'] == d['difference']
    assert f'{100 * by_hand:+.1f}' in ' '.join(page.text)


@pytest.mark.parametrize('settings, sees, free', [
    (dict(labels='HardLabels()', start='KCenterSelection()'), False, True),
    (dict(labels='hard', init='stratified'), False, True),
    (dict(labels='TeacherLabels()', start='PatchSelection()'), False, False),
    (dict(labels='HardLabels()', start='GroupBalancedSelection()'), True, False),
    (dict(clustering='GroupClustering()', risk='Mean()', labels='HardLabels()'), True, False),
    (dict(cells='groups', risk=None), False, True),       # clusters without a risk are not used
    (dict(cells='groups', risk='mean'), True, False)], ids=str)
def test_free_selections_and_group_labels_by_settings(settings, sees, free):
    c = Comparison([row('mine', s) | dict(steps=0) for s in (0, 1)], dict(methods={'mine': settings}))
    assert (uses_groups(c, 'mine'), is_free(c, 'mine')) == (sees, free)


def test_methods_with_group_labels_do_not_compete(tmp_path):
    folder = comparison(tmp_path, ('kmeans', 'gradient', 'told'), gains=(0, 0, .3))
    told = dict(method=dict(cells='groups', risk='mean', steps=40))
    for s in (0, 1): write_json(folder/f'runs/told-seed{s}/config.json', told)
    assert headline(read_comparison(folder))[0].split()[0] in ('kmeans', 'gradient')


def test_same_files_same_page(written):
    assert to_html(read_comparison(written)) == (written/'report.html').read_text(encoding='utf-8')


def test_pictures_of_the_markdown_are_there(written):
    targets = re.findall(r'!\[[^\]]*\]\(<?([^)>]+)', (written/'report.md').read_text())
    assert len(targets) >= 3 and all((written/t).is_file() for t in targets)
    assert all((written/t).read_bytes()[:4] == b'\x89PNG' for t in targets)


def test_with_training_data_the_real_samples_are_shown(written):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 1, 8, 8, generator=g), torch.arange(3).repeat(20)
    data = GroupedDataset(x, y, (torch.arange(60) % 5 == 0).long(), list(CLASSES), list(GROUPS))
    without, with_data = section_texts(read_comparison(written)), section_texts(read_comparison(written, data))
    assert 'map' not in without and 'map' in with_data
    assert 'real samples' in with_data['weights'] and 'of minority' in with_data['weights']
    other = GroupedDataset(torch.randn(60, 1, 9, 9, generator=g), y, classes=list(CLASSES))
    assert 'map' not in section_texts(read_comparison(written, other))   # another shape: left out


def test_colour_images_and_confusion_matrices(folder):
    report = json.loads((folder/'report.json').read_text())
    for r in report['rows']: r['confusion'] = [[40, 5, 5], [0, 50, 0], [9, 1, 40]]
    write_json(folder/'report.json', report)
    save(synthetic('gradient', 0, (3, 12, 12), risk=False), folder/'runs/gradient-seed0/synthetic.safetensors')
    parts = section_texts(read_comparison(folder))
    assert '2 taken for 0, 18 % of class 2' in parts['confusion']
    assert 'gradient, seed 0' in parts['images']


# Names are text, never markup

EVIL = '<script>alert(1)</script>"\'&|`*'


def test_names_are_escaped(tmp_path):
    rows = [row('m', 0), row('m', 1)]
    for r in rows:
        r['method'] = EVIL
        r['group_accuracy'] = {EVIL: .5, 'b': .6}
        r['class_group_accuracy'] = {f'{EVIL}|{EVIL}': .5, '1|b': .4}
        r['class_group_counts'] = {f'{EVIL}|{EVIL}': 9, '1|b': 9}
    write_json(tmp_path/'report.json', dict(config={EVIL: EVIL, 'command': '</pre>' + EVIL}, rows=rows))
    run = tmp_path/'runs'/'x-seed0'
    s = synthetic('x', 0)
    s.classes = [EVIL, 'b', 'c']
    save(s, run/'synthetic.safetensors')
    page = page_of_folder(tmp_path)
    assert page.all('script') == []
    assert EVIL in ''.join(page.text)
    md = to_markdown(read_comparison(tmp_path))
    assert '<script' not in re.sub(r'```.*?```', '', md, flags=re.S)
    # every line of a table has as many entries as its head
    table = [l for l in md.splitlines() if l.startswith('|')]
    heads = [i for i, l in enumerate(table) if set(l) <= set('|-: ')]
    for i in heads:
        for line in [table[i - 1], table[i + 1]]:
            assert len(re.findall(r'(?<!\\)\|', line)) == table[i].count('|')


# Half-finished folders

def test_no_report_is_one_clear_line(tmp_path):
    for bad in (tmp_path, tmp_path/'nowhere'):
        with pytest.raises(FileNotFoundError) as e: write_report(bad)
        assert '\n' not in str(e.value) and str(bad) in str(e.value)


def test_unfinished_runs_are_named_and_the_rest_is_shown(folder):
    runs = folder/'runs'
    (runs/'gradient-seed0'/'synthetic.safetensors').unlink()
    (runs/'gradient-seed0'/'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    cut = runs/'gradient-seed1'/'synthetic.safetensors'
    cut.write_bytes(cut.read_bytes()[:200])
    (runs/'rdd-target-seed1'/'config.json').write_text('{"a": ')
    shutil.rmtree(runs/'random-seed1')
    save(synthetic('rdd-target', 7), runs/'rdd-target-seed7'/'synthetic.safetensors')
    (runs/'empty-seed0').mkdir()
    notes = ' '.join(read_comparison(folder).notes)
    for said in ('gradient seed 0: not finished', 'stopped at step 1 of 40', '1 line of metrics.jsonl',
                 'gradient seed 1: synthetic.safetensors could not be read',
                 'rdd-target seed 1: config.json could not be read',
                 'random: there is no run folder for seed 1', 'rdd-target seed 7: distilled but not evaluated',
                 'empty seed 0: not finished', 'before its first step'):
        assert said in notes, said
    page = page_of_folder(folder)
    assert 'What is missing' in ''.join(page.text) and 'rdd-target, seed 0' in ''.join(page.text)
    assert str(folder) not in notes


def test_interrupted_comparison_is_gathered_from_its_runs(folder):
    report = json.loads((folder/'report.json').read_text())
    (folder/'report.json').unlink()
    for r in report['rows'][:4]:
        write_json(folder/'runs'/f"{r['method']}-seed{r['seed']}"/'report.json', dict(rows=[r]))
    (folder/'runs'/'rdd-target-seed0'/'report.json').write_text('{"rows": ')
    c = read_comparison(folder)
    assert c.methods == ['gradient', 'random'] and 'not finished; shown are the 4 rows' in c.notes[0]
    page_of_folder(folder)


def test_rows_without_groups_seconds_or_intervals(tmp_path):
    other = [dict(method='kmeans', seed=0, accuracy=.4),
             dict(method='kmeans', seed=1, accuracy=.6, group_accuracy={'g': .5})]
    write_json(tmp_path/'report.json', dict(rows=[dict(method='mine', seed=0, accuracy=.5, seconds=None), *other]))
    page = page_of_folder(tmp_path)
    text = ' '.join(page.text)
    assert 'mine' in text and .5 in page.numbers and 'single seed' in text
    assert 'NaN' not in text and 'nan' not in text.split() and 'None' not in text


def test_many_groups_show_the_hardest(tmp_path):
    names = [f'g{i:02}' for i in range(15)]
    def at(s): return {n: .9 - .03 * i + .001 * s for i, n in enumerate(names)}
    rows = [dict(method=m, seed=s, accuracy=.7, group_accuracy=at(s), worst_group_accuracy=.48)
            for m in ('kmeans', 'gradient') for s in (0, 1)]
    write_json(tmp_path/'report.json', dict(rows=rows))
    c = read_comparison(tmp_path)
    assert [h for h in accuracy_table(c) if h.startswith('g')] == names[-6:]
    assert 'Of 15 groups the 6 hardest' in ''.join(page_of_folder(tmp_path).text)


# Several folders

def test_several_folders(tmp_path):
    a, b = comparison(tmp_path/'a'), comparison(tmp_path/'b', ('random', 'rdd-distance'), gains=(-.2, .3))
    text = ''.join(Page(write_report([a, b], tmp_path/'both').read_text(encoding='utf-8')).text)
    assert 'random @ a' in text and 'random @ b' in text and 'rdd-distance @' not in text
    c = read_comparison([a, b])
    names = {'random @ a', 'random @ b', 'gradient', 'rdd-target', 'rdd-distance'}
    assert len(c.rows) == 10 and {r.method for r in c.runs} == names
    assert (tmp_path/'both'/'report.md').is_file() and not (a/'report.html').exists()
    assert len(c.of('random @ b')) == 2


def test_single_run_folders(tmp_path):
    paths = []
    for m in ('gradient', 'rdd-target'):
        run = tmp_path/f'{m}-run'
        save(synthetic(m, 0), run/'synthetic.safetensors')
        write_json(run/'config.json', {})
        write_json(run/'report.json', dict(rows=[row(m, 0)]))
        paths.append(run)
    c = read_comparison(paths)
    assert [(r.method, r.seed) for r in c.runs] == [('gradient', 0), ('rdd-target', 0)] and c.notes == []
    page_of_folder(paths)


def test_several_folders_need_a_place(tmp_path):
    with pytest.raises(ValueError, match='out: got None'): write_report([tmp_path, tmp_path])


# The minimum by chance

def test_chance_minimum_against_simulation():
    rng = np.random.default_rng(1)
    for p, counts in ((.8, [50] * 20), (.3, [5, 9, 200]), (.97, [30] * 7)):
        simulated = (rng.binomial(counts, p, (40000, len(counts))) / counts).min(1)
        expected, low = chance_minimum(p, counts)
        assert expected == pytest.approx(simulated.mean(), abs=.004)
        assert (simulated >= low).mean() >= .945


def test_dominated_by_noise_is_said(folder):
    assert 'noise would look the same' in to_markdown(read_comparison(folder))   # they differ by .02 with n = 50
    report = json.loads((folder/'report.json').read_text())
    for r in report['rows']: r['class_group_accuracy']['2|minority'] = .05
    write_json(folder/'report.json', report)
    assert 'noise would look the same' not in to_markdown(read_comparison(folder))


# Charts draw what they are given

def test_bars_dots_and_reference():
    rows = [row('kmeans', s) for s in range(3)] + [row('full', s, .3) for s in range(3)]
    fig = Figure()
    axes = plots.group_bars(summarise(rows), rows=rows, fig=fig)
    minority = next(a for a in axes if a.get_title() == 'minority')
    means = [s['group_accuracy']['minority']['mean'] for s in summarise(rows)]
    assert sorted(p.get_width() for p in minority.patches) == pytest.approx(sorted(means))
    dots = sorted(line.get_xdata()[0] for line in minority.lines if line.get_marker() == 'o')
    assert dots == pytest.approx(sorted(r['group_accuracy']['minority'] for r in rows))
    dashed = [line.get_xdata()[0] for line in minority.lines if line.get_linestyle() == '--']
    assert dashed == pytest.approx([summarise(rows)[1]['group_accuracy']['minority']['mean']])


def test_sheet_of_ragged_classes():
    x, y = torch.rand(5, 1, 3, 4), torch.tensor([2, 0, 0, 0, 2])
    picture = pictures.sheet(x, y, columns=3, gap=1)
    assert picture.shape == (2 * 4 + 1, 3 * 5 + 1, 4)
    assert np.allclose(picture[1:4, 1:5, 0], x[1, 0]) and np.allclose(picture[5:8, 6:10, 0], x[4, 0])
    assert picture[5:8, 11:15, 3].sum() == 0           # class 2 has two images only


def test_forest_marks_what_excludes_zero():
    entry = dict(method='gradient', baseline='kmeans', difference=.05)
    ends = dict(low=.01, high=.09), dict(low=-.01, high=.11), dict(low=None, high=None)
    ax = plots.forest([entry | e for e in ends], ax=Figure().subplots())
    fills = [line.get_markerfacecolor() for line in ax.lines if len(line.get_xdata()) == 1]
    assert [f == 'none' for f in fills] == [False, True, True]


# What was found by looking at pages

def two_seeds(gain):
    "Two seeds with exactly the same difference."
    rows = [dict(method=m, seed=s, accuracy=.5 + .1 * s + g, group_accuracy={'a': .9, 'b': .5 + .1 * s + g})
            for m, g in (('gradient', 0.), ('rdd-target', gain)) for s in (0, 1)]
    return dict(rows=rows)


def test_agreement_of_two_seeds_is_no_certainty(tmp_path):
    write_json(tmp_path/'report.json', two_seeds(.125))
    c = read_comparison(tmp_path)
    d = findings(c)[0].difference
    assert d['low'] == d['high'] > 0 and findings(c)[0].answer == 'open'


def test_intervals_of_accuracies_stay_in_bounds(tmp_path):
    rows = [dict(method='gradient', seed=s, accuracy=a, group_accuracy={'x': a, 'y': a})
            for s, a in enumerate((.1, .9))]
    write_json(tmp_path/'report.json', dict(rows=rows))
    entry = accuracy_table(read_comparison(tmp_path))['accuracy'].iloc[0]
    assert 0 <= entry.low < .01 and .99 < entry.high <= 1
    assert '95 % interval 0.0 to 100.0' in headline(read_comparison(tmp_path))[1]


def test_sets_with_different_labels_are_shown_and_not_compared(tmp_path):
    for name, classes in (('a', ('0', '1', '2')), ('b', ('cat', 'dog'))):
        second = 'rdd-target' if name == 'a' else 'kmeans'
        rows = [row(m, s, g) for m, g in (('gradient', 0.), (second, .2)) for s in (0, 1)]
        for r, k in itertools.product(rows, ('class_group_accuracy', 'class_group_counts')):
            r[k] = {f'{c}|{g}': r[k][f'{i}|{g}'] for i, c in enumerate(classes) for g in GROUPS}
        write_json(tmp_path/name/'report.json', dict(rows=rows))
    c = read_comparison([tmp_path/'a', tmp_path/'b'])
    assert 'different labels' in c.notes[0] and 'cat, dog' in c.notes[0]
    assert findings(c) == [] and 'none of them can be called the best' in headline(c)[0]
    assert difference(c, 'rdd-target', 'kmeans') is None and difference(c, 'rdd-target', 'gradient @ a') is not None
    assert all(m in to_html(c) and m in to_markdown(c) for m in ('rdd-target', 'kmeans'))


def test_rows_of_different_recipes_are_told(tmp_path):
    epochs = dict(gradient=10, kmeans=20)
    rows = [row(m, s) | dict(training=dict(epochs=e), networks=1) for m, e in epochs.items() for s in (0, 1)]
    write_json(tmp_path/'report.json', dict(rows=rows))
    assert any('Not all rows were evaluated alike' in n and 'epochs' in n for n in read_comparison(tmp_path).notes)


def test_whatever_was_measured_is_shown(tmp_path):
    more = dict(ece=.25, group_ece={'majority': .125}, worst_class=dict(name='1', n=3),
                corruptions={'fog': dict(accuracy=.375, group_accuracy={'majority': .5})})
    write_json(tmp_path/'report.json', dict(rows=[row('gradient', s) | more for s in (0, 1)]))
    page = page_of_folder(tmp_path)
    assert {.25, .125, .375} <= set(page.numbers)
    text = ' '.join(page.text)
    assert 'group ece, majority' in text and 'fog' in text and 'worst group 50.0' in text
    assert '| fog | 37.5 (worst group 50.0) |' in to_markdown(read_comparison(tmp_path))


def on_damaged(r, names, fall):
    "A row with accuracies under corruptions that fall by `fall` with each severity."
    def at(name): return 1 - fall * int(name[-1]) if name[-1].isdigit() else .5
    def level(n): return {k: r[k] * at(n) for k in ('accuracy', 'worst_group_accuracy')} | dict(group_accuracy={})
    return r | dict(corruptions={n: level(n) for n in names})


def test_the_ladder_of_corruptions_is_drawn(tmp_path):
    names = [f'{k}-{s}' for k in ('noise', 'blur') for s in range(1, 6)] + ['reference-invert', 'shot-2']
    rows = [on_damaged(row(m, s), names, fall) for m, fall in (('kmeans', .15), ('rdd-target', .1)) for s in (0, 1)]
    write_json(tmp_path/'report.json', dict(rows=[*rows, row('full', 0)]))
    c = read_comparison(tmp_path)
    average, each = (chart.alt for chart in severity_charts(c))
    clean = np.mean([r['accuracy'] for r in c.of('kmeans')])
    levels = f'{100 * clean:.0f} % clean, {25 * clean:.0f} % at severity 5'
    assert f'averaged over noise, blur. all samples: kmeans {levels}, rdd-target' in average
    assert 'worst group: kmeans' in average
    assert 'noise: kmeans' in each and 'blur: kmeans' in each and 'shot' not in each and 'full' not in each
    table = damage_table(c)
    assert list(table.index) == ['clean', *names] and list(table) == ['kmeans', 'rdd-target']
    assert [table['kmeans'].iloc[k].mean for k in (0, 5)] == pytest.approx([clean, .25 * clean])
    page, text = Page(to_html(c)), to_markdown(c, pictured=True)
    assert 'damage' in page.ids and sum('against severity' in a['aria-label'] for a in page.all('svg')) == 2
    assert '(report_files/damage-0.png)' in text and '## Damaged images' in text and 'corruptions, noise-1' not in text
    fig = severity_charts(c)[0].figure
    assert [ax.get_title() for ax in fig.axes] == ['all samples', 'worst group']
    assert fig.axes[0].lines[0].get_ydata()[[0, 5]] == pytest.approx([clean, .25 * clean])


@pytest.mark.parametrize('names, charts', [
    ((), 0), (('fog',), 0), (('noise-3', 'blur-3'), 0), (('noise-1', 'noise-3'), 1),
    (('noise-1', 'noise-2', 'blur-1', 'blur-3'), 1)], ids=str)
def test_corruptions_without_a_whole_ladder(tmp_path, names, charts):
    write_json(tmp_path/'report.json', dict(rows=[on_damaged(row('kmeans', 0), names, .1)]))
    c = read_comparison(tmp_path)
    assert len(severity_charts(c)) == charts and ('Damaged images' in to_html(c)) == bool(names)
    assert 'nan' not in ''.join(chart.alt for chart in severity_charts(c))


def test_a_failed_run_keeps_its_name_and_its_reason(folder):
    runs = folder/'runs'
    (runs/'gradient-seed1').rename(run := runs/'gradient_at_its_best-123abc-seed1')
    for f in ('synthetic.safetensors', 'metrics.jsonl'): (run/f).unlink()
    (run/'error.txt').write_text('Traceback (most recent call last):\n  File "x"\nRuntimeError: out of <memory>\n')
    write_json(folder/'cells.json', {'gradient_at_its_best-123abc-seed1': ['gradient at its best', 1]})
    notes = read_comparison(folder).notes
    assert any(n.startswith('gradient at its best seed 1: failed (RuntimeError: out of <memory>)') for n in notes)
    assert '&lt;memory&gt;' in to_html(read_comparison(folder)) and not any('not finished' in n for n in notes)


def test_pictures_are_drawn_for_a_few_of_many_methods(tmp_path):
    rows = [row(f'method {k:02}', 0, k / 100) | dict(confusion=[[9, 1], [2, 8]]) for k in range(14)]
    write_json(tmp_path/'report.json', dict(rows=rows))
    page = to_html(read_comparison(tmp_path))
    assert page.count('Confusion matrix.') <= 8 and 'Without pictures here' in page and len(page) < 400_000


def test_map_says_who_is_near_whom(written):
    g = torch.Generator().manual_seed(0)
    data = GroupedDataset(torch.rand(40, 1, 8, 8, generator=g), torch.arange(40) % 3, group=torch.arange(40) % 2,
                          groups=list(GROUPS), classes=list(CLASSES))
    first, again = (to_html(read_comparison(written, data)) for _ in range(2))
    assert first == again and 't-SNE' in first
    assert 'are nearest (in pixels) to a real sample of minority, the group of 50 %' in first


# Sections of a user

@pytest.fixture
def one_more():
    "A section of a user, taken out of the list again."
    before = list(blocks.SECTIONS)

    @section('Mine & <yours>', after='Comparison')
    def mine(c):
        yield 'About <b>methods</b> of $group_1$.'
        yield Items([f'{m}: {len(c.of(m))} | rows' for m in c.methods])
    yield
    blocks.SECTIONS[:] = before


def test_a_section_of_a_user_is_in_both_forms(written, one_more):
    c = read_comparison(written)
    html, md = to_html(c), to_markdown(c)
    titles = ''.join(Page(html).text)
    assert 'Mine & <yours>' in titles and 'About <b>methods</b> of $group_1$.' in titles
    assert html.index('Mine &amp;') < html.index('Accuracy per group') and 'id="mine"' in html
    assert '## Mine &amp; &lt;yours&gt;' in md and 'About &lt;b&gt;methods&lt;/b&gt; of \\$group\\_1\\$.' in md
    assert '- gradient: 2 \\| rows' in md


def test_both_forms_have_the_same_sections(written):
    c = read_comparison(written)
    assert re.findall('<h2 id="[^"]+">([^<]+)', to_html(c)) == re.findall('^## (.*)', to_markdown(c), re.M)


def test_a_replaced_section_stays_one(one_more):
    section('Other', after='Cost')(type('', (), dict(__name__='mine', __call__=lambda self, c: ()))())
    assert [s.title for s in blocks.SECTIONS if s.id == 'mine'] == ['Other']


# Names of a hostile author

HOSTILE = ('<script>alert(1)</script>', 'income $20_$30', '$\\frac{$', '"quoted" \'name\'', 'left\u202eright',
           'clear\x1b[2Jscreen', 'a*b*c_d`e[f](g)', '&amp;', '{{ 7 * 7 }}', 'nul\x00l', 'x' * 300)


@pytest.mark.parametrize('name', HOSTILE, ids=ascii)
def test_names_of_methods_classes_and_groups(tmp_path, name):
    for s in (0, 1):
        s_ = synthetic('gradient', s)
        s_.classes = [name, 'b', 'c']
        save(s_, tmp_path/'runs'/f'gradient-seed{s}'/'synthetic.safetensors')
    confusion = [[5, 1, 0], [0, 5, 0], [0, 0, 5]]
    rows = [row(m, s) | dict(confusion=confusion) for m in ('gradient', 'kmeans') for s in (0, 1)]
    for r in rows:
        r['method'] = {'gradient': name, 'kmeans': 'b'}[r['method']]
        for k in ('group_accuracy', 'group_counts'): r[k] = {name: r[k]['minority'], 'b': r[k]['majority']}
        for k in ('class_group_accuracy', 'class_group_counts'):
            r[k] = {f'{name}|{name}': r[k]['0|minority'], f'{name}|b': r[k]['0|majority']}
        r['corruptions'] = {f'{name}-{s}': dict(accuracy=.5) for s in (1, 2)}
    write_json(tmp_path/'report.json', dict(rows=rows, config=dict(data=name, command=name)))
    path = write_report(tmp_path)
    page, text = Page(path.read_text(encoding='utf-8')), (tmp_path/'report.md').read_text(encoding='utf-8')
    assert page.all('script') == [] and '49' not in name
    shown = ''.join(c if c not in '\u202e\x1b\x00' else f'\\u{ord(c):04x}' for c in name)
    assert f'class {shown}, {shown}' in ' '.join(page.text)
    assert not set('\x1b\x00\u202e') & set(text + ''.join(page.text))


def test_a_set_without_groups_has_classes_only(tmp_path):
    rows = [dict(method='gradient', seed=s, accuracy=.8, group_accuracy={'all': .8}, group_counts={'all': 100},
                 worst_group_accuracy=.8, worst_class_group_accuracy=.5,
                 worst_class_group=dict(name='5 - five|all', n=9),
                 class_group_accuracy={'5 - five|all': .5, '4 - four|all': .9},
                 class_group_counts={'5 - five|all': 9, '4 - four|all': 91}) for s in (0, 1)]
    write_json(tmp_path/'report.json', dict(rows=rows))
    text = ' '.join(page_of_folder(tmp_path).text) + to_markdown(read_comparison(tmp_path))
    assert 'class 5 - five' in text and '|all' not in text and ', all' not in text and 'worst group' not in text


# Metrics of a user

def test_a_metric_of_a_user_is_summarised_compared_and_shown(tmp_path):
    more = dict(kmeans=0., gradient=.25)
    rows = [row(m, s) | dict(metrics={'recall gap': .125 * (s + 1) + e}) for m, e in more.items() for s in (0, 1)]
    write_json(tmp_path/'report.json', dict(rows=rows))
    c = read_comparison(tmp_path)
    assert {s['method']: s['recall gap']['mean'] for s in c.summary} == {'kmeans': .1875, 'gradient': .4375}
    assert [p['difference'] for p in all_differences(c) if p['metric'] == 'recall gap'] == [.25]
    page, md = page_of_folder(tmp_path), to_markdown(c)
    assert {.1875, .4375, .25} <= set(page.numbers) and '| recall gap |' in md


# The headline

def test_the_headline_compares_with_the_best_free_selection(tmp_path):
    names = 'random', 'k-center', 'kmeans', 'gradient', 'rdd-target'
    folder = comparison(tmp_path/'c', names, gains=(-.2, .15, 0., 0., .2))
    c = read_comparison(folder)
    assert best(c) == 'rdd-target' and 'The best free selection, k-center, has' in headline(c)[1]
    assert any(f.claim == 'better than the best free selection (k-center)' for f in findings(c))
    assert 'n = 150 test samples, 2 seeds' in headline(c)[1]
    told = ' '.join(Page(to_html(c)).text)
    for said in ('All seeds share one test set', 'comparisons between two methods', 'No method saw group labels'):
        assert said in told


def test_a_selection_has_no_plain_matching():
    gains = {'random': 0., 'k-center': .2, 'rdd-target': .1, 'gradient': 0.}
    c = Comparison([row(m, s, g) for m, g in gains.items() for s in (0, 1)])
    assert [plain_of(c, m) for m in c.methods] == [None, None, 'gradient', None]


def test_methods_of_a_user_are_described_by_their_settings(tmp_path):
    mine = dict(objective='GradientMatching(cosine)', risk='CVaR(tail=0.2)', risk_at='target', steps=40)
    folder = comparison(tmp_path/'c', ('kmeans', 'my own'), gains=(0, .1))
    report = json.loads((folder/'report.json').read_text())
    report['config']['methods'] = {'my own': mine}
    write_json(folder/'report.json', report)
    for text in (to_html(read_comparison(folder)), to_markdown(read_comparison(folder))):
        assert 'GradientMatching' in text and 'CVaR' in text and 'no description' not in text


def test_the_page_is_drawn_once_and_pictures_have_names(written):
    page = page_of(read_comparison(written))
    keys = [b.key for b in page.pictures()]
    assert len(keys) == len(set(keys)) > 3 and all(re.fullmatch(r'[a-z]+-\d+', k) for k in keys)
