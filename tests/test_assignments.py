"""The graded course: students' versions, points, the whole way through nbgrader, wrong and hostile submissions."""
import ast, contextlib, csv, importlib.util, io, json, os, re, shutil, socket, subprocess, sys, time
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COURSE = ROOT/'nbs'/'assignments'
NAMES = sorted(p.name for p in (COURSE/'_source').iterdir() if p.is_dir() and p.name[0] not in '._')
sys.path.insert(0, str(Path(__file__).parent))
from kernels import Forked
from wrong_solutions import WRONG


def read(path): return json.loads(path.read_text(encoding='utf-8'))
def write(path, nb): path.parent.mkdir(parents=True, exist_ok=True); path.write_text(json.dumps(nb), encoding='utf-8')
def source_of(cell): return ''.join(cell['source'])
def grading(cell): return cell['metadata'].get('nbgrader', {})
def notebook(name, kind='_source'): return read(COURSE/kind/name/f'{name}.ipynb')
def cells(name): return [c for c in notebook(name)['cells'] if c['cell_type'] == 'code']
def points(name): return {c['id']: grading(c)['points'] for c in notebook(name)['cells'] if 'points' in grading(c)}
def automatic(name): return {c['id']: grading(c)['points'] for c in cells(name) if grading(c).get('grade')}


# Without nbgrader: the cells in one process

def run(cell, scope):
    "Execute a cell; a number in its last line is returned, as nbgrader takes it for a part of the points."
    tree = ast.parse(source_of(cell))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, cell['id'], 'exec'), scope)
    return eval(compile(ast.Expression(last.value), cell['id'], 'eval'), scope) if last else None


def grade(name, changed=()):
    "Points of each test cell where the solutions are those of the source but for `changed`: id -> code."
    torch.manual_seed(0)
    scope, found = {}, {}
    last = max(i for i, cell in enumerate(cells(name)) if grading(cell).get('grade'))
    for cell in cells(name)[:last + 1]:
        cell = cell | dict(source=[dict(changed).get(cell['id'], source_of(cell))])
        most, errors = grading(cell).get('points', 0), io.StringIO()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors): value = run(cell, scope)
        except Exception: value, most = None, 0
        if grading(cell).get('grade'):
            partly = isinstance(value, (int, float)) and not isinstance(value, bool)
            found[cell['id']] = 0 if errors.getvalue() else value if partly and most else most
    plt.close('all')
    return found


@pytest.mark.parametrize('name', NAMES)
def test_the_reference_has_full_marks(name): assert grade(name) == automatic(name)


@pytest.mark.parametrize('name, cell, what, old, new, lost', WRONG, ids=[f'{row[0]}: {row[2]}' for row in WRONG])
def test_a_wrong_solution_loses_its_points_and_no_others(name, cell, what, old, new, lost):
    reference = {c['id']: source_of(c) for c in cells(name)}[cell]
    assert reference.count(old) == 1, f'{old!r} does not occur once in the reference'
    expected = automatic(name)
    for test in lost.split():
        test, _, left = test.partition('=')
        expected[test] = float(left or 0)
    assert grade(name, {cell: reference.replace(old, new)}) == expected


def test_each_assignment_has_five_wrong_solutions():
    assert all(sum(row[0] == name for row in WRONG) >= 5 for name in NAMES)


# The students' versions

def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_students_versions_are_what_nbgrader_makes_of_the_sources(home, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['make_assignments.py', '--out', str(tmp_path)])
    monkeypatch.chdir(ROOT)
    load(ROOT/'tools'/'make_assignments.py').main()
    made, ours = ({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*.*')}
                  for folder in (tmp_path, COURSE/'release'))
    assert made.keys() == ours.keys() == {f'{name}/{name}.ipynb' for name in NAMES}
    assert [name for name in made if made[name] != ours[name]] == [], 'run python tools/make_assignments.py'


ANSWER = r'### BEGIN (SOLUTION|HIDDEN TESTS|MARK SCHEME)\n(.*?)### END \1'


@pytest.mark.parametrize('name', NAMES)
def test_students_versions_hold_no_answers(name):
    source = [source_of(c) for c in notebook(name)['cells']]
    secret = {line.strip() for text in source for _, part in re.findall(ANSWER, text, re.S)
              for line in part.splitlines()}
    secret -= {line.strip() for text in source for line in re.sub(ANSWER, '', text, flags=re.S).splitlines()}
    given = {line.strip() for c in notebook(name, 'release')['cells'] for line in source_of(c).splitlines()}
    assert len(secret) > 10 and secret & given == set() and not any('### BEGIN' in line for line in given)
    assert all(not c.get('outputs') for kind in ('release', '_source') for c in notebook(name, kind)['cells'])


@pytest.mark.parametrize('name', NAMES)
def test_every_solution_is_tested_and_every_test_has_a_hidden_part(name):
    tests = [c for c in cells(name) if grading(c).get('grade')]
    assert tests and all('### BEGIN HIDDEN TESTS' in source_of(c) and 'assert' in source_of(c) for c in tests)
    stubs = [c for c in notebook(name, 'release')['cells'] if grading(c).get('solution') and c['cell_type'] == 'code']
    assert stubs and all('# your code here\n' in source_of(c) and 'still to be written' in source_of(c) for c in stubs)
    ids = [c['id'] for c in notebook(name)['cells']]
    assert len(set(ids)) == len(ids)
    assert all(grading(c).get('grade_id', c['id']) == c['id'] for c in notebook(name)['cells'])


def test_sources_are_clean(tmp_path):
    from nbdev.clean import nbdev_clean
    for name in NAMES:
        copied = tmp_path/f'{name}.ipynb'
        shutil.copy(COURSE/'_source'/name/copied.name, copied)
        nbdev_clean(fname=str(copied))
        assert copied.read_bytes() == (COURSE/'_source'/name/copied.name).read_bytes(), 'run tools/make_assignments.py'


# The pages

def test_the_syllabus_says_what_the_notebooks_say():
    text = '\n'.join(source_of(c) for c in read(COURSE/'00_syllabus.ipynb')['cells'])
    table = dict(re.findall(r'\[(\d_\w+)\]\(release/\S+\) \| (\d+) \|', text))
    assert {name: int(n) for name, n in table.items()} == {name: sum(points(name).values()) for name in NAMES}
    assert sum(map(int, table.values())) == 100 and 'There are 100 points' in text


@pytest.mark.parametrize('name', NAMES)
def test_an_assignment_says_what_it_is_worth(name):
    text = '\n'.join(source_of(c) for c in notebook(name)['cells'])
    assert int(re.search(r'There are (\d+) points', text)[1]) == sum(points(name).values())
    rows = re.findall(r'^\| \d [^|]*\|(?: [^|]*\|)? (\d+) \|$|^\| \d [^|]* \| (\d+) \|$', text, re.M)
    assert sum(int(a or b) for a, b in rows) == sum(points(name).values())


def test_answers_are_not_among_the_notebooks_of_the_site():
    from nbdev.doclinks import nbglob
    found = {p.relative_to(COURSE).as_posix() for p in nbglob(COURSE, as_path=True)}
    assert found == {'00_syllabus.ipynb', '90_teacher.ipynb', *(f'release/{name}/{name}.ipynb' for name in NAMES)}


# The whole way, with the commands of the teachers' page

def commands(heading):
    "The shell commands of a section of the page for teachers."
    text = '\n\n'.join(source_of(c) for c in read(COURSE/'90_teacher.ipynb')['cells'])
    section = re.search(rf'^## {heading}\n(.*?)(?=^## |\Z)', text, re.M | re.S)[1]
    return [line for block in re.findall(r'^```sh\n(.*?)^```', section, re.M | re.S) for line in block.splitlines()]


def nbgrader(line, folder):
    "Run a command of nbgrader in this process, in `folder`; returns what it logs and its exit code."
    from jupyter_core.application import NoStart
    from nbgrader.apps.nbgraderapp import NbGraderApp
    app, code, before = NbGraderApp(), 0, Path.cwd()
    os.chdir(folder)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            app.initialize(line.split()[1:])
            app.start()
    except NoStart: pass
    except SystemExit as e: code = e.code or 0
    finally:
        os.chdir(before)
        if app.subapp: type(app.subapp).clear_instance()
    return code, errors.getvalue()


def follow(line, folder, home):
    "Run a command of the page; `~` is `home`."
    if line.startswith('nbgrader '):
        code, log = nbgrader(line, folder)
        assert code == 0, log
    else: subprocess.run(line, shell=True, check=True, cwd=folder, env=os.environ | {'HOME': str(home)})


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A home with the folder of a course, made as the page says; the environment is put back in the end."
    from nbgrader import api
    with pytest.MonkeyPatch.context() as patch:
        for name in ('JUPYTER_PATH', 'RDD_NB_KERNEL_CPU_SECONDS'): patch.setenv(name, os.environ.get(name, ''))
        patch.setenv('PYTHONPATH', str(ROOT))
        patch.setattr(api, 'get_alembic_version', cache(api.get_alembic_version))   # takes three seconds
        home = tmp_path_factory.mktemp('home')
        copy, enter = commands('Once: make the folder of your course')
        assert enter == 'cd ~/course'
        follow(copy, ROOT, home)
        yield home


def fill(name, changed=()):
    "A submission: the students' version with the solutions written into it."
    nb, solved = notebook(name, 'release'), {c['id']: source_of(c) for c in notebook(name)['cells']} | dict(changed)
    for cell in nb['cells']:
        if grading(cell).get('solution'): cell['source'] = solved[cell['id']]
    return nb


def grades(course): return {(r['assignment'], r['student_id']): r for r in csv.DictReader((course/'grades.csv').open())}


def scores(course, name, student):
    "What nbgrader's gradebook says: id of the test cell -> points."
    from nbgrader.api import Gradebook
    with Gradebook(f'sqlite:///{course}/gradebook.db') as book:
        return {g.name: g.auto_score for g in book.find_submission(name, student).notebooks[0].grades}


def wrong(name): return next({c: (old, new)} for n, c, _, old, new, _ in WRONG if n == name)


@pytest.fixture(scope='module')
def quick():
    "Kernels start as forks; one test does without."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('jupyter_client.provisioning.local_provisioner.launch_kernel', Forked)
        yield


@pytest.fixture(scope='module')
def graded(home, quick):
    "The folder of a course in which ada handed in the reference of everything, and bob one wrong solution."
    course, mistake = home/'course', {c['id']: source_of(c) for c in cells('1_cvar')}
    (cell, (old, new)), = wrong('1_cvar').items()
    lines = commands('With a plain folder')
    lines.remove('nbgrader validate 1_cvar.ipynb')
    write(course/'submitted'/'bob'/'1_cvar'/'1_cvar.ipynb', fill('1_cvar', {cell: mistake[cell].replace(old, new)}))
    for name in NAMES:
        write(course/'inbox'/'ada.ipynb', fill(name))
        for line in lines:
            if 'feedback' in line: by_hand(course, name)
            follow(line.replace('1_cvar', name), course, home)
    return course


def by_hand(course, name):
    "Give ada the points that a person gives, and a comment."
    from nbgrader.api import Gradebook
    with Gradebook(f'sqlite:///{course}/gradebook.db') as book:
        submission = book.find_submission(name, 'ada').notebooks[0]
        for g in submission.grades:
            if g.needs_manual_grade: g.manual_score, g.needs_manual_grade = g.max_score, False
        for comment in submission.comments: comment.manual_comment = 'well argued'
        book.db.commit()


def test_the_way_through_nbgrader(graded):
    "One test, so that parallel workers do not both grade everything."
    for name in NAMES:
        row = grades(graded)[name, 'ada']
        assert float(row['score']) == float(row['max_score']) == sum(points(name).values()) > 0
        page = (graded/'feedback'/'ada'/name/f'{name}.html').read_text(encoding='utf-8')
        assert f"Score: {float(row['score'])} / {float(row['max_score'])}" in re.sub(r'\s+', ' ', page)
        assert 'well argued' in page
    (cell, (old, new)), = wrong('1_cvar').items()
    reference = {c['id']: source_of(c) for c in cells('1_cvar')}[cell]
    expected = grade('1_cvar', {cell: reference.replace(old, new)})
    assert scores(graded, '1_cvar', 'bob') == expected != automatic('1_cvar')    # the same as without nbgrader
    assert float(grades(graded)['1_cvar', 'bob']['score']) == sum(expected.values())


def test_validate_tells_a_student_what_is_missing(home, quick, monkeypatch):
    from nbgrader.validator import Validator
    name, = NAMES[:1]
    monkeypatch.setattr(Validator, 'stream', said := io.StringIO())
    shutil.copy(COURSE/'release'/name/f'{name}.ipynb', home)
    line = next(line for line in commands('With a plain folder') if 'validate' in line)
    code, log = nbgrader(line, home)
    assert code == 0, log
    said = said.getvalue()
    assert f'VALIDATION FAILED ON {len(automatic(name))} CELL(S)!' in said
    assert said.count('NotImplementedError: still to be written') == len(automatic(name))
    first = next(c for c in notebook(name, 'release')['cells'] if grading(c).get('grade'))
    assert source_of(first).splitlines()[0] in said and 'HIDDEN' not in said


# A small course with submissions that mean harm

def code(id, source, points=0, solution=False):
    marks = dict(grade=bool(points), grade_id=id, locked=bool(points), schema_version=3, solution=solution, task=False)
    if points: marks['points'] = points
    return dict(cell_type='code', id=id, execution_count=None, outputs=[], source=source, metadata=dict(nbgrader=marks))


HARMFUL = {  # each tries something on the file TARGET or on the rest of the machine
    'write': 'open("mine.txt", "w").write("allowed")\nopen(TARGET, "w").write("harm")',
    'delete': 'import os\nos.remove(TARGET)',
    'rename': 'import os\nos.rename(TARGET, "taken")',
    'link': 'import os\nos.symlink(TARGET, "link")\nopen("link", "w").write("harm")',
    'child': 'import subprocess\nsubprocess.run(f"echo harm > {TARGET}", shell=True, check=True)',
    'compiled': 'import ctypes\nassert ctypes.CDLL(None).truncate(TARGET.encode(), 0) == 0',
    'thread': 'from concurrent.futures import ThreadPoolExecutor as Pool\nPool().submit(open, TARGET, "w").result()',
    'kill': 'import os\nos.kill(PID, 15)',
    'network': 'import socket\nsocket.create_connection(("127.0.0.1", PORT), 2)',
    'file': 'f = open("big", "wb")\nfor _ in range(200): f.write(bytes(1 << 20))',
    'memory': 'a = bytearray(8 << 30)',
}


def small(answers, **known):
    "A notebook with a solution cell and a test cell for each of `answers`."
    start = code('start', '\n'.join(['done = []', *(f'{k} = {v!r}' for k, v in known.items())])) | dict(metadata={})
    pairs = [(code(f'answer-{i}', text + f'\ndone.append("{i}")', solution=True),
              code(f'test-{i}', f'assert "{i}" in done', points=1)) for i, text in answers.items()]
    return dict(nbformat=4, nbformat_minor=5, metadata=notebook(NAMES[0])['metadata'],
                cells=[start, *(cell for pair in pairs for cell in pair)])


@pytest.fixture
def little(home, tmp_path):
    "A course with the settings of ours, of one assignment without torch, and with short limits."
    for part in '_kernel', 'nbgrader_config.py':
        (shutil.copytree if part == '_kernel' else shutil.copy)(COURSE/part, tmp_path/part)
    with (tmp_path/'nbgrader_config.py').open('a', encoding='utf-8') as f:
        f.write("\nc.Execute.timeout = 1\nc.Execute.iopub_timeout = 5\n")
        f.write("os.environ['RDD_NB_KERNEL_CPU_SECONDS'] = '30'\n")
    return tmp_path


def hand_in(course, source, **students):
    "Release `source` as `little`, hand in everybody's notebooks, and grade: exit code, log and the seconds."
    write(course/'_source'/'little'/'little.ipynb', source)
    code, log = nbgrader('nbgrader generate_assignment little', course)
    assert code == 0, log
    for student, nb in students.items(): write(course/'submitted'/student/'little'/'little.ipynb', nb)
    start = time.time()
    return *nbgrader('nbgrader autograde little', course), time.time() - start


LOOPS = {
    'loop': 'import time\nwhile True: time.sleep(.01)',
    'output': 'while True: print("x" * 100_000)',
}
STUBBORN = 'while True:\n    try:\n        while True: sum(range(999))\n    except BaseException: pass'


def contained():
    "Whether this machine has Landlock, with rules for network and signals."
    guard = load(COURSE/'_kernel'/'kernels'/'guarded'/'guard.py')
    try: return guard.call(guard.CREATE_RULESET, None, 0, 1) >= 6
    except OSError: return False


guarded = pytest.mark.skipif(not contained(), reason='this machine has no Landlock of version 6 (Linux 6.12)')


@guarded
def test_hostile_submissions_end_in_time_and_change_nothing(little):
    (target := little/'target.txt').write_text('precious')
    victim = subprocess.Popen(['sleep', '600'])
    with socket.create_server(('127.0.0.1', 0)) as server:
        known = dict(TARGET=str(target), PID=victim.pid, PORT=server.getsockname()[1])
        harm = small(LOOPS | HARMFUL | {'harmless': 'open("mine.txt").read()'}, **known)
        tests = [c | dict(source='pass') if 'points' in grading(c) else c for c in harm['cells']]
        code, log, seconds = hand_in(little, harm, bob=harm | dict(cells=tests))
    alive = victim.poll() is None
    victim.kill(), victim.wait()
    assert alive and target.read_text() == 'precious'
    assert scores(little, 'little', 'bob') == {f'test-{i}': 0 for i in LOOPS | HARMFUL} | {'test-harmless': 1}
    left = {p.name: p.stat().st_size for p in (little/'autograded'/'bob'/'little').iterdir()}
    assert left.keys() == {'little.ipynb', 'mine.txt', 'link', 'big'}      # and no temporary folder
    assert left['little.ipynb'] < 2_500_000 and left['big'] <= 100 << 20
    assert code == 0 and seconds < 300


@guarded
def test_a_submission_that_cannot_be_interrupted_spares_the_others(little):
    with (little/'nbgrader_config.py').open('a', encoding='utf-8') as f:
        f.write("\nos.environ['RDD_NB_KERNEL_CPU_SECONDS'] = '3'\n")
    fine = small({'stubborn': ''})
    code, log, seconds = hand_in(little, fine, eve=small({'stubborn': STUBBORN}), zoe=fine)
    assert code == 1 and 'eve' in log and not (little/'autograded'/'eve'/'little').exists()
    assert scores(little, 'little', 'zoe') == {'test-stubborn': 1} and seconds < 300


def test_the_commands_for_a_classroom_server(little, monkeypatch):
    from jupyter_client.launcher import launch_kernel      # a real process
    monkeypatch.setattr('jupyter_client.provisioning.local_provisioner.launch_kernel', launch_kernel)
    (exchange := little/'exchange').mkdir()
    exchange.chmod(0o777)
    (student := little/'home-of-ada').mkdir()
    with (little/'nbgrader_config.py').open('a') as f: f.write(f'\nc.Exchange.root = {str(exchange)!r}\n')
    (student/'nbgrader_config.py').write_text(f'c = get_config()\nc.Exchange.root = {str(exchange)!r}\n')
    write(little/'_source'/'1_cvar'/'1_cvar.ipynb', small({'one': ''}))
    for line in commands('With a classroom server'):
        if 'submit' in line: write(student/'1_cvar'/'1_cvar.ipynb', small({'one': ''}))
        if line.startswith('nbgrader'): follow(line, student if '--course' in line else little, student)
    row, = csv.DictReader((little/'grades.csv').open())
    assert (row['score'], row['max_score']) == ('1.0', '1.0')
    assert list(student.rglob('feedback/*/1_cvar.html')) != []
