"""Rules that keep the code readable, counted. `python tests/test_style.py` prints the offenders in all files.

An exported cell has at most 20 lines with its directives, and nine of ten have at most 15 of code. A line has at
most 120 characters, a module at most 500 lines. A cell imports or does something else. A public name is used outside
the cell that defines it.
"""
import ast, importlib, json, re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from rdd_nb.parts import Part

ROOT = Path(__file__).resolve().parents[1]
LINES, USUAL, WIDTH, MODULE = 20, 15, 120, 500


class Cell(NamedTuple):
    "A code cell of a notebook, or a whole file of Python."
    file: str    # relative to the repository
    id: str      # '' for a file
    source: str

    @property
    def place(self): return f'{self.file} {self.id}'.strip()

    @property
    def exported(self): return bool(re.search(r'^#\| *exports?\b', self.source, re.M))

    @property
    def lines(self): return sum(bool(line.strip()) and not line.startswith('#|') for line in self.source.splitlines())

    @property
    def length(self):
        "Lines with directives, as a reader of the notebook sees them."
        return sum(bool(line.strip()) for line in self.source.splitlines())

    @property
    def body(self):
        try: return ast.parse(self.source).body
        except SyntaxError: return []      # a magic command


@cache
def notebooks():
    "File -> its code cells."
    found = {}
    for p in sorted((ROOT/'nbs').rglob('*.ipynb')):
        name = p.relative_to(ROOT).as_posix()
        if re.search(r'/[._]', name): continue
        content = json.loads(p.read_text(encoding='utf-8'))['cells']
        found[name] = [Cell(name, c['id'], ''.join(c['source'])) for c in content if c['cell_type'] == 'code']
    return found


def module_of(cells):
    "The module that a notebook exports to, or None."
    found = (re.search(r'^#\| *default_exp +(\w+)', c.source, re.M) for c in cells)
    return next((m[1] for m in found if m), None)


def cells_of(modules): return [c for cells in notebooks().values() if module_of(cells) in modules for c in cells]


def files(folder):
    paths = sorted((ROOT/folder).glob('*.py'))
    return [Cell(p.relative_to(ROOT).as_posix(), '', p.read_text(encoding='utf-8')) for p in paths]


@cache
def scripts(): return [f for folder in ('tests', 'benchmarks', 'tools') for f in files(folder)]


# The rules: each gives a line for every offender

def long_cells(cells):
    return [f'{c.place}: an exported cell of {c.length} lines' for c in cells if c.exported and c.length > LINES]


def usual_length(cells):
    "The length that nine of ten exported cells keep to."
    lengths = sorted(c.lines for c in cells if c.exported)
    return lengths[-(-9 * len(lengths) // 10) - 1] if lengths else 0


def wide_lines(cells):
    return [f'{c.place}, line {i}: {len(line)} characters' for c in cells
            for i, line in enumerate(c.source.splitlines(), 1) if len(line) > WIDTH]


def long_modules(cells):
    sizes = {c.place: len(c.source.splitlines()) for c in cells}
    return [f'{name}: {n} lines' for name, n in sizes.items() if n > MODULE]


def mixed_cells(cells):
    "An import beside other statements; nbdev executes such cells while it builds documentation."
    mixed = [c for c in cells if 'nbdev_export()' not in c.source
             and len({isinstance(s, (ast.Import, ast.ImportFrom)) for s in c.body}) == 2]
    return [f'{c.place}: an import and other code in one cell' for c in mixed]


def unused_names(modules):
    found = []
    for module in modules:
        source = (ROOT/'rdd_nb'/f'{module}.py').read_text(encoding='utf-8')
        public = re.search(r'^__all__ = (\[.*?\])', source, re.M | re.S)
        own = cells_of([module])
        home = {name: c for c in own if c.exported for name in defined(c)}
        here = {n.id: {c for c in own if n.id in names(c)} for c in own for n in walk(c) if isinstance(n, ast.Name)}
        for name in ast.literal_eval(public[1]) if public else []:
            if is_part(module, name): continue
            if not used().get(name, set()) | here.get(name, set()) - {home.get(name)}: found.append(f'{module}.{name}')
    return found


def is_part(module, name):
    "Whether this is a part of a method, which people use by the name in its text form."
    found = getattr(importlib.import_module(f'rdd_nb.{module}'), name, None)
    return isinstance(found, type) and issubclass(found, Part) and found in found.known.values()


def defined(cell):
    "Names that a cell defines at its top level."
    for s in cell.body:
        if hasattr(s, 'name'): yield s.name
        for target in getattr(s, 'targets', []): yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


@cache
def used():
    "Name -> the cells and files that import it from the package or reach it through a module, and code in the README."
    found = {}
    for cells in [*notebooks().values(), *([f] for f in scripts())]:
        parts = aliases(cells)
        for c in cells:
            for name in uses(c, parts): found.setdefault(name, set()).add(c)
    code = re.findall(r'```.*?```|`[^`\n]+`', (ROOT/'README.md').read_text(encoding='utf-8'), re.S)
    for name in re.findall(r'\w+', ' '.join(code)): found.setdefault(name, set()).add('README')
    return found


@cache
def walk(cell): return [n for s in cell.body for n in ast.walk(s)]


@cache
def names(cell): return {n.id for n in walk(cell) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def of_package(node): return (getattr(node, 'module', None) or node.names[0].name).split('.')[0] == 'rdd_nb'


def aliases(cells):
    "Names under which parts of the package are imported."
    nodes = [n for c in cells for n in walk(c) if isinstance(n, (ast.Import, ast.ImportFrom)) and of_package(n)]
    return {a.asname or a.name.split('.')[0] for n in nodes for a in n.names}


def uses(cell, parts):
    "Names imported from the package, attributes of its modules, and words of texts that hold code about the package."
    for n in walk(cell):
        if isinstance(n, ast.ImportFrom) and of_package(n): yield from (a.name for a in n.names)
        elif isinstance(n, ast.Attribute) and ast.unparse(n.value).split('.')[0] in parts: yield n.attr
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and 'rdd_nb' in n.value:
            yield from re.findall(r'\w+', n.value)


def others():
    "File -> its cells, of all scripts and of notebooks that export nothing."
    lessons = {name: cells for name, cells in notebooks().items() if not module_of(cells)}
    return {f.file: [f] for f in scripts()} | lessons


def offenders(modules, others):
    "Rule -> its offenders."
    cells = cells_of(modules)
    return dict(long_cells=long_cells(cells), wide_lines=wide_lines(cells + others),
                mixed_cells=mixed_cells(c for c in cells + others if c.id),
                long_modules=long_modules(f for f in files('rdd_nb') if Path(f.file).stem in modules),
                unused_names=unused_names(modules))


@cache
def modules(): return sorted({module_of(cells) for cells in notebooks().values()} - {None})


@cache
def all_offenders(): return offenders(modules(), [c for cells in others().values() for c in cells])


@pytest.mark.parametrize('rule', offenders([], []))
def test_rules_hold(rule): assert all_offenders()[rule] == []


def test_nine_of_ten_exported_cells_are_short():
    assert usual_length([c for cells in notebooks().values() for c in cells]) <= USUAL


# The rules find what they are for

def test_the_rules_find_offenders():
    long, fits = (Cell('a.ipynb', 'x', '#| export\n' + '\n\n'.join(['a = 1'] * n)) for n in (20, 19))
    assert len(long_cells([long, fits, Cell('a', 'y', 'a = 1\n' * 30)])) == 1
    assert usual_length([fits] * 9 + [long]) == 19 and usual_length([fits] * 8 + [long] * 2) == 20
    assert wide_lines([Cell('a', '', 'x' * 120 + '\n' + 'y' * 121)]) == ['a, line 2: 121 characters']
    assert len(long_modules([Cell('a', '', '\n' * 501), Cell('b', '', '\n' * 500)])) == 1
    fine = ['import os\nfrom a import b', 'def f():\n    import os', 'import nbdev; nbdev.nbdev_export()']
    assert len(mixed_cells(Cell('a', 'x', s) for s in ['import os\nx = 1', *fine])) == 1


def test_uses_and_definitions_are_recognised():
    imports = 'from rdd_nb import risk as r\nfrom rdd_nb.core import seeded\n'
    cell = Cell('a', '', imports + 'r.CVaR(x)\nplt.show()\n"rdd_nb.a; b()"')
    found = set(uses(cell, aliases([cell])))
    assert {'CVaR', 'seeded', 'b'} <= found and not {'show', 'x'} & found and 'x' in names(cell)
    assert set(defined(Cell('a', '', 'def f(y): z = 1\nclass G: pass\na, b = 1, 2'))) == {'f', 'G', 'a', 'b'}


if __name__ == '__main__':
    for rule, found in all_offenders().items():
        print(f'{rule}: {len(found)}', *found, sep='\n    ')
    print('Nine of ten exported cells have at most')
    for name, cells in notebooks().items():
        if module_of(cells): print(f'{usual_length(cells):6} lines in {name}')
