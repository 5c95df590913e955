"""Lessons are written to be learned from, counted. `python tests/test_lessons.py` prints the counts of every lesson.

The bibliography and the glossary are checked too: what is cited exists, and every entry is used.
"""
import ast, json, re, statistics
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS, TUTORIALS = ROOT/'nbs', ROOT/'nbs'/'tutorials'
LESSONS = sorted(p.stem for p in TUTORIALS.glob('*.ipynb'))
WORDS, MEDIAN, USUAL, CELLS_PER_PICTURE, WIDTH, WORKING = 3, 5, 12, 12, 100, .6
FIRST_SCREEN = ('**What you will be able to do**', '**What you need**', '**How long it takes**', '**The result**')


@cache
def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])
def prose(path): return [source(c) for c in cells(path) if c['cell_type'] == 'markdown']
def code(path): return [source(c) for c in cells(path) if c['cell_type'] == 'code' and lines(source(c))]
def lines(text): return [l for l in text.splitlines() if l.strip() and not l.startswith('#|')]


def plain(text):
    "Prose alone: without code, mathematics and the targets of links."
    text = re.sub(r'```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$', ' ', text, flags=re.S)
    return re.sub(r'\]\([^)]*\)', '] ', text)


def words(path): return sum(len(re.findall(r"[^\W\d_][\w'-]*", plain(t))) for t in prose(path))


def pictures(path):
    outs = [o for c in cells(path) for o in c.get('outputs', [])]
    shown = [o.get('data', {}) for o in outs]
    return sum('image/png' in d or 'image/svg+xml' in d or '<svg' in ''.join(d.get('text/html', '')) for d in shown)


HELPERS = {'read_json', 'plots', 'pictures', 'image_grid', 'show', 'NoiseWarning'}    # they read and draw


def working(path):
    """Share of the code cells, imports aside, that call the package or build the idea: that use torch, a name of the
    package other than `HELPERS`, a function that does so, or what such a cell has computed."""
    known, found = {'torch', 'F'}, []
    for text in code(path):
        tree = ast.parse(text)
        if all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in tree.body):
            ours = (s for s in tree.body if 'rdd_nb' in ast.unparse(s))
            known |= {a.asname or a.name for s in ours for a in s.names} - HELPERS
            continue
        found.append(False)
        for s in tree.body:
            names = [n for n in ast.walk(s) if isinstance(n, ast.Name)]
            if not known & {n.id for n in names if isinstance(n.ctx, ast.Load)}: continue
            found[-1] = True
            known |= {n.id for n in names if isinstance(n.ctx, ast.Store)} | {getattr(s, 'name', 'torch')}
    return sum(found) / max(len(found), 1)


def counts(path):
    "What the rules look at."
    sizes = sorted(len(lines(t)) for t in code(path))
    return dict(words=words(path) / sum(sizes), median=statistics.median(sizes),
                p90=sizes[-(-9 * len(sizes) // 10) - 1],
                cells_per_picture=len(cells(path)) / max(pictures(path), 1), working=working(path),
                width=max(len(l) for t in code(path) for l in t.splitlines()))


def faults(path):
    "The rules that a lesson breaks, with what it counts."
    n, text = counts(path), '\n'.join(prose(path))
    last = text[text.find('## Exercises'):] if '## Exercises' in text else ''
    exercises = len(re.findall(r'^\d+\. ', last, re.M))
    rules = dict(words=n['words'] >= WORDS, median=n['median'] <= MEDIAN, p90=n['p90'] <= USUAL,
                 cells_per_picture=n['cells_per_picture'] <= CELLS_PER_PICTURE, working=n['working'] >= WORKING,
                 width=n['width'] <= WIDTH, exercises=4 <= exercises <= 8, read_next='**Read next**' in last,
                 solutions=(path.parent/'solutions'/path.name).exists(), not_linked=not unlinked(path),
                 first_screen=all(part in prose(path)[1] for part in FIRST_SCREEN))
    seen = n | dict(exercises=exercises, not_linked=unlinked(path))
    return {rule: seen.get(rule, 'missing') for rule, holds in rules.items() if not holds}


def lesson(name): return TUTORIALS/f'{name}.ipynb'


@pytest.mark.parametrize('name', LESSONS)
def test_lesson_keeps_to_the_rules(name): assert faults(lesson(name)) == {}


@pytest.mark.parametrize('name', LESSONS)
def test_every_exercise_has_a_solution(name):
    exercises = re.findall(r'^(\d+)\. ', '\n'.join(prose(lesson(name))).split('## Exercises')[1], re.M)
    text = '\n'.join(prose(TUTORIALS/'solutions'/f'{name}.ipynb'))
    said = re.findall(r'^## (\d+)\. ', text, re.M) + re.findall(r'Exercise (\d+) .* has no solution', text)
    assert said == exercises


def test_reading_and_drawing_are_no_work(tmp_path):
    texts = ['import json\nfrom rdd_nb.risk import CVaR', 'rows = json.loads(text)', 'def best(r): return max(r)',
             'best(rows)', 'q = CVaR(.2).weights(rows)', 'plt.plot(q)']
    path = tmp_path/'report.ipynb'
    path.write_text(json.dumps(dict(cells=[dict(cell_type='code', source=[t]) for t in texts])), encoding='utf-8')
    assert working(path) == 2 / 5


# The glossary

@cache
def glossary():
    "{term: anchor}, from its headings; those after the notation are no terms."
    headings = re.findall(r'^## (.+)$', '\n'.join(prose(NBS/'glossary.ipynb')), re.M)
    return {h: h.replace(' ', '-') for h in headings if h != 'Notation'}


def pattern(term): return re.compile(rf'(?<![\w-]){re.escape(term)}s?(?![\w-])', 0 if term[1:].isupper() else re.I)


def text_of(path):
    "The prose of a lesson after its title, without headings, code, mathematics and the rows of tables."
    text = '\n\n'.join(prose(path)[1:])
    return re.sub(r'^(#[^\n]*|\|[^\n]*)$|```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$', ' ', text, flags=re.M | re.S)


def unlinked(path):
    "Terms of the glossary that are used before they are linked. The text of other links is skipped."
    text, found = text_of(path), []
    for term, anchor in glossary().items():
        marked = re.sub(rf'\[[^\]]*\]\(\.\./glossary\.ipynb#{anchor}\)', '\0', text)
        rest = re.sub(r'\[[^\]]*\]\([^)]*\)', ' ', marked)
        first = pattern(term).search(rest)
        if first and not '\0' in rest[:first.start()]: found.append(term)
    return found


def test_a_term_without_a_link_is_found(monkeypatch, tmp_path):
    def nb(text):
        path = tmp_path/f'{abs(hash(text))}.ipynb'
        made = [dict(cell_type='markdown', source=[t]) for t in ('# Title\n\n> CVaR', text)]
        path.write_text(json.dumps(dict(cells=made)), encoding='utf-8')
        return unlinked(path)
    assert nb('First CVaR, then [CVaR](../glossary.ipynb#CVaR).') == ['CVaR']
    assert nb('## CVaR\n\nHere is CVaR [CVaR](../glossary.ipynb#CVaR)') == ['CVaR']
    assert nb('[CVaR](../glossary.ipynb#CVaR) and CVaR, `CVaR`, [on CVaR](25_x.ipynb)') == []
    assert nb('no term') == [] and nb('[about CVaR](25_x.ipynb)') == []


# The bibliography

@cache
def bibliography():
    import sys
    sys.path.insert(0, str(ROOT/'tools'))
    from make_docs import entries
    return entries((NBS/'references.bib').read_text(encoding='utf-8'))


@cache
def package():
    "The docstrings and records of the package, where sources are named."
    return '\n'.join(p.read_text(encoding='utf-8') for p in sorted((ROOT/'rdd_nb').glob('*.py')) if p.stem[0] != '_')


def by_name():
    "{(surname of the first author, year): key}, of the last names without accents of case."
    return {(f['author'].split(',')[0].lower(), f['year']): key for key, f in bibliography().items()}


def cited(text):
    "(surname, year) of everything that is cited by name and year."
    name = r"[A-ZŠŁ][\w'-]+"
    found = re.findall(rf"({name})(?: et al\.?| (?:&|and) {name})?,? \(?((?:19|20)\d\d)\b", text)
    return {(n.lower(), y) for n, y in found} - {(v.lower(), y) for v in ('NeurIPS', 'CVPR', 'ICLR', 'ICML', 'November')
                                                 for y in map(str, range(2018, 2030))}


def linked():
    "Keys that notebooks link to."
    texts = '\n'.join('\n'.join(prose(p)) for p in NBS.rglob('*.ipynb') if p.name != 'references.ipynb')
    return set(re.findall(r'references\.ipynb#(\w+)', texts))


def test_everything_cited_is_in_the_bibliography():
    assert cited(package()) - by_name().keys() == set()
    assert linked() - bibliography().keys() == set()
    numbers = {f.get('eprint') for f in bibliography().values()}
    assert set(re.findall(r'arXiv:? ?(\d{4}\.\d{5})', package())) - numbers == set()


def test_every_entry_is_used():
    used = {by_name().get(c) for c in cited(package())} | linked()
    used |= {k for k, f in bibliography().items() if f.get('eprint', '-') in package()}
    assert [k for k in bibliography() if k not in used and not by_name_again(k)] == []


def by_name_again(key):
    "Whether a key shares its author and year with another entry; the text of the package cannot tell the two apart."
    f = bibliography()[key]
    return by_name()[f['author'].split(',')[0].lower(), f['year']] != key


def test_entries_are_complete_and_named_after_author_and_year():
    for key, f in bibliography().items():
        assert {'author', 'title', 'year'} <= f.keys() and f['year'] in key, key


def test_the_bibliography_is_made_from_the_file():
    import sys
    sys.path.insert(0, str(ROOT/'tools'))
    from make_docs import references_notebook
    made = references_notebook((NBS/'references.bib').read_text(encoding='utf-8'))
    assert made == (NBS/'references.ipynb').read_text(encoding='utf-8'), 'run python tools/make_docs.py --readme'


def test_citations_are_recognised():
    text = 'DC, Zhao et al. 2021, then Duchi & Namkoong (2021) and Wilson 1927; NeurIPS 2025'
    assert cited(text) == {('zhao', '2021'), ('duchi', '2021'), ('wilson', '1927')}


# Links between notebooks

def anchors(path): return {h.strip().replace(' ', '-') for t in prose(path) for h in re.findall(r'^#+ (.+)$', t, re.M)}


def dead_links(path):
    for text in prose(path):
        for target in re.findall(r'\]\(([^)\s]+)\)', re.sub(r'```.*?```|`[^`\n]*`', ' ', text, flags=re.S)):
            if re.match(r'\w+:', target): continue
            file, _, anchor = target.partition('#')
            other = (path.parent/file).resolve() if file else path
            if not other.exists(): yield target
            elif anchor and other.suffix == '.ipynb' and anchor not in anchors(other): yield target


def test_links_between_notebooks_lead_somewhere():
    dead = {p.relative_to(NBS).as_posix(): found for p in NBS.rglob('*.ipynb')
            if not re.search(r'/[._]', p.as_posix().removeprefix(NBS.as_posix())) and (found := list(dead_links(p)))}
    assert dead == {}


if __name__ == '__main__':
    for path in sorted(TUTORIALS.glob('*.ipynb')):
        print(path.stem, {k: round(v, 2) for k, v in counts(path).items()}, faults(path) or 'keeps to the rules')
