"""Make README.md from nbs/index.ipynb, and HTML pages of all notebooks in _docs/, with pandoc and without Quarto.

    python tools/make_docs.py                            # README.md and _docs/
    python tools/make_docs.py --readme                   # README.md and nbs/references.ipynb only
    python tools/make_docs.py --out DIR nbs/25_risk.ipynb # pages of some notebooks, elsewhere

No cell of a notebook is executed. What the functions of a module look like is read from the module.

Links between notebooks are written as they work in Jupyter, relative to the notebook: `[risk](25_risk.ipynb)`.
Here they become links to pages in HTML, and paths from the repository's root in README.md.

The pages need no network and no server: mathematics is MathML, pictures are inside the pages, and the search reads
`search-index.js`, which is written beside them.
"""
import argparse, json, os, posixpath, re, shutil, sys, tempfile
from html import escape, unescape
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import nbdev.doclinks
import pypandoc
import yaml
from execnb.nbio import nb2str, read_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from nbdev.processors import add_links, exec_show_docs, FilterDefaults

FROM = 'ipynb+fenced_divs+bracketed_spans+link_attributes+pipe_tables+tex_math_dollars'


class ShowDocs(exec_show_docs):
    "Run `show_doc` for what a notebook exports, on its module; nbdev would execute cells of the notebook."
    def begin(self):
        super().begin()
        found = (c.directives_.get('default_exp') for c in self.nb.cells if c.cell_type == 'code')
        module = next((m[0] for m in found if m), None)
        if module: self.k.run_cell(f'import {get_config().lib_path.name}.{module} as _m; globals().update(vars(_m))')

    def __call__(self, cell):
        if cell.cell_type != 'code' or not cell.source or not re.search(r'^show_doc\(', cell.source, re.M): return
        self.k.cell(cell)
        if self.k.exc: raise SystemExit(f'{self.nb.path_}: {cell.source!r} fails: {self.k.exc}')


class Pages(FilterDefaults):
    "nbdev's processing, with `ShowDocs` in the place of what executes cells."
    def base_procs(self): return [ShowDocs if p is exec_show_docs else p for p in super().base_procs()]


class OnlyText(FilterDefaults):
    "nbdev's processing without running code and without links to pages: the same result in every environment."
    def base_procs(self): return [p for p in super().base_procs() if p not in (add_links, exec_show_docs)]


def relink(text, change):
    "Replace the relative targets of the Markdown links in `text` by `change(target)`."
    def new(match):
        target = match[2]
        if target[0] == '#': return match[1] + target.lower() + ')'      # Jupyter keeps capitals, pandoc does not
        return match[0] if re.match(r'\w+:|/', target) else match[1] + change(target) + ')'
    return re.sub(r'(\]\()([^)\s]+)\)', new, text)


def split_front(nb):
    "Front matter of a processed notebook and the notebook without it."
    first = ''.join(nb['cells'][0]['source']) if nb['cells'] else ''
    if nb['cells'] and nb['cells'][0]['cell_type'] == 'raw' and first.startswith('---'):
        return yaml.safe_load(first.strip().strip('-')), dict(nb, cells=nb['cells'][1:])
    return {}, nb


def readable(nb, change):
    "Bring the processed notebook `nb` into the form that pandoc reads, with its relative links changed."
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown': cell['source'] = relink(source, change)
        if cell['cell_type'] != 'code': continue
        cell['execution_count'] = 0
        hidden = re.search(r'^#\|\s*echo:\s*false', source, re.M)
        cell['source'] = '' if hidden else '\n'.join(line for line in source.splitlines() if not line.startswith('#|'))
        for out in cell['outputs']:
            if out['output_type'] == 'execute_result': out['execution_count'] = 0
            if out['output_type'] in ('execute_result', 'display_data'): out.setdefault('metadata', {})
        documentation = [o['data']['text/markdown'] for o in cell['outputs'] if 'text/markdown' in o.get('data', {})]
        if hidden and documentation:  # a show_doc cell: its output is Markdown to be read as such
            text = ''.join(''.join(part) for part in documentation)
            cell.update(cell_type='markdown', source=text)
            for key in ('outputs', 'execution_count'): del cell[key]
    return json.dumps(nb)


def readme_text(path):
    "The README.md that the notebook at `path` stands for."
    cfg, nb = get_config(), read_nb(path)
    OnlyText()(nb)
    front, nb = split_front(json.loads(nb2str(nb)))
    if any('image/png' in out.get('data', {}) for cell in nb['cells'] for out in cell.get('outputs', [])):
        raise SystemExit(f'{path}: a stored picture cannot go into README.md; save it to a file and link to it')
    folder = cfg.nbs_path.relative_to(cfg.config_path).as_posix()
    source = readable(nb, lambda target: posixpath.normpath(posixpath.join(folder, target)))
    body = pypandoc.convert_text(source, 'gfm-raw_html', format=FROM, extra_args=['--wrap=none'])
    return f"# {front['title']}\n\n> {front['description']}\n\n{body.strip()}\n"


def page_name(path, front):
    "Name of the page of the notebook at `path`, relative to the notebooks' folder: `25_risk.ipynb` is on `risk.html`."
    return path.with_name(front.get('output-file') or re.sub(r'^\d+[a-z]?_', '', path.stem) + '.html')


def kind(page):
    "The part of the site that a page belongs to."
    if 'solutions' in page.parts: return 'Solutions'
    if page.parts[0] != page.name: return page.parts[0].replace('tutorials', 'lessons').capitalize()
    return dict.fromkeys(('index', 'reproduction', 'glossary', 'references'), 'Start').get(page.stem, 'Modules')


def navigation(titles, page):
    "HTML of the search and of the list of all pages by kind, seen from `page`; lessons also link to their neighbours."
    depth, kinds = len(page.parts) - 1, dict.fromkeys(map(kind, titles))
    def link(other): return f'<a href="{"../" * depth}{other.as_posix()}">{escape(titles[other])}</a>'
    def part(k):
        links = '\n'.join(link(other) for other in titles if kind(other) == k)
        return links if k == 'Start' else f'<details><summary>{k}</summary>\n{links}\n</details>'
    parts = '\n'.join(map(part, kinds))
    box = '<input id="search" type="search" placeholder="Search" aria-label="Search all pages" autocomplete="off">'
    return f'<nav class="pages">\n{parts}\n{box}\n<ol id="found" hidden></ol>\n</nav>\n{steps(titles, page, link)}'


def steps(titles, page, link):
    "Links to the lesson before and after this one."
    lessons = [other for other in titles if kind(other) == 'Lessons']
    if page not in lessons: return ''
    i = lessons.index(page)
    before, after = (lessons[j] if 0 <= j < len(lessons) else None for j in (i - 1, i + 1))
    return (f'<nav class="steps"><span>{f"← {link(before)}" if before else ""}</span>'
            f'<span>{f"{link(after)} →" if after else ""}</span></nav>\n')


def front_matter(path):
    nb = read_nb(path)
    NBProcessor(nb=nb, procs=FrontmatterProc).process()
    return getattr(nb, 'frontmatter_', {})


def page_link(target, path, pages, out):
    "The relative link from the page of `path` to that of the notebook `target`, or to another file of the project."
    file, _, anchor = target.partition('#')
    other = Path(os.path.normpath(path.parent/file))
    anchor = '#' + anchor.lower() if anchor else ''
    if other in pages: return posixpath.relpath(pages[other].as_posix(), path.parent.as_posix()) + anchor
    found = get_config().nbs_path/other
    return Path(os.path.relpath(found, (out/pages[path]).parent)).as_posix() if found.exists() else target


def drop_dead_anchors(folder):
    "Let links to a place that a page lacks lead to the page: what is private has no documentation of its own."
    texts = {p.resolve(): p.read_text(encoding='utf-8') for p in folder.rglob('*.html')}
    names = {p: set(re.findall(r'\bid="([^"]+)"', text)) for p, text in texts.items()}
    for p, text in texts.items():
        def mended(match):
            other = (p.parent/match[1]).resolve()
            return f'href="{match[1]}"' if other in names and match[2] not in names[other] else match[0]
        new = re.sub(r'href="([\w./-]+\.html)#([^"]+)"', mended, text)
        if new != text: p.write_text(new, encoding='utf-8')


def make_pages(some, out):
    "Write self-contained HTML pages of the notebooks `some` (none: of all) to the folder `out`."
    cfg = get_config()
    nbdev.doclinks._build_modidx()
    fronts = {p.relative_to(cfg.nbs_path): front_matter(p) for p in sorted(nbglob(cfg.nbs_path, as_path=True))}
    pages = {path: page_name(path, front) for path, front in fronts.items()}
    first = ['references.ipynb', 'glossary.ipynb', 'reproduction.ipynb', cfg.readme_nb]
    order = sorted(pages, key=lambda p: (-first.index(p.name) - 1 if p.name in first else 0, len(p.parts) != 2,
                                         len(p.parts), p))
    titles = {pages[p]: fronts[p].get('title', p.stem) for p in order}
    chosen = [p.resolve().relative_to(cfg.nbs_path.resolve()) for p in some] or order
    found = [s for path in chosen for s in sections(make_page(path, fronts[path], pages, titles, out), pages[path])]
    drop_dead_anchors(out)
    write_index(found, {pages[path].as_posix(): titles[pages[path]] for path in chosen}, out)
    print(f'{len(chosen)} pages in {out}')


def make_page(path, front, pages, titles, out):
    cfg, depth, target = get_config(), len(path.parts) - 1, out/pages[path]
    nb = read_nb(cfg.nbs_path/path)
    Pages()(nb)
    _, nb = split_front(json.loads(nb2str(nb)))
    options = ['-s', '--toc', '--mathml', '--embed-resources', '-M', f"title={titles[pages[path]]}",
               '--resource-path', str((cfg.nbs_path/path).parent)]
    if front.get('description'): options += ['-M', f"subtitle={front['description']}"]
    css = cfg.nbs_path/'styles.css'
    if css.exists(): options += ['--css', str(css)]
    with tempfile.NamedTemporaryFile('w', suffix='.html', encoding='utf-8') as nav:
        nav.write(navigation(titles, pages[path]))
        nav.flush()
        source = readable(nb, lambda link: page_link(link, path, pages, out.resolve()))
        html = pypandoc.convert_text(source, 'html5', format=FROM, extra_args=[*options, '-B', nav.name])
    code, site = f"{cfg.git_url}/blob/{cfg.branch}/", f"{cfg.doc_host}{cfg.doc_baseurl}/"
    root = Path(os.path.relpath(cfg.config_path, out)).as_posix() + '/'
    html = html.replace(code, '../' * depth + root).replace(site, '../' * depth)
    scripts = ''.join(f'<script src="{"../" * depth}{name}"></script>\n' for name in ('search-index.js', 'search.js'))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(html.replace('</body>', f'{scripts}</body>'), encoding='utf-8')
    return html


# Search without a server. A page may not fetch a file from disk, but it may run a script beside it.

def sections(html, page):
    "(page, heading, anchor, words) of each section of a page."
    body = re.sub(r'<(script|style|nav|math|svg)\b.*?</\1>', ' ', html[html.index('<body'):], flags=re.S)
    parts = re.split(r'<h[1-4][^>]*?(?: id="([^"]*)")?[^>]*>(.*?)</h[1-4]>', body, flags=re.S)
    for anchor, heading, text in zip(['', *parts[1::3]], ['', *parts[2::3]], parts[0::3]):
        words = re.findall(r'\w[\w.-]+', unescape(re.sub(r'<[^>]+>', ' ', f'{heading} {text}')).lower())
        yield page.as_posix(), unescape(re.sub(r'<[^>]+>', '', heading)).strip(), anchor or '', dict.fromkeys(words)


def write_index(found, titles, out):
    "The script that the search reads: titles of pages, and the sections with their different words."
    rows = [[page, heading, anchor, ' '.join(words)] for page, heading, anchor, words in found if words]
    text = f'const TITLES = {json.dumps(titles, ensure_ascii=False)};\nconst SECTIONS = '
    text += json.dumps(rows, ensure_ascii=False, separators=(',', ':')) + ';\n'
    (out/'search-index.js').write_text(text, encoding='utf-8')
    shutil.copy(Path(__file__).with_name('search.js'), out)


# The bibliography

def entries(bib):
    "{key: fields} of a BibTeX file with one field in a line."
    found = re.findall(r'^@\w+\{(\w+),\n(.*?)^\}', bib, re.M | re.S)
    return {key: dict(re.findall(r'^ +(\w+) = \{(.*)\},?$', fields, re.M)) for key, fields in found}


def reference(fields):
    "An entry as Markdown."
    names = [n.split(',')[0].strip('{} ') for n in fields['author'].split(' and ')]
    names = [n for n in names if n != 'others'] + ['others'] * ('others' in names)
    who = f'{names[0]} et al.' if names[-1] == 'others' or len(names) > 3 else ' and '.join(
        filter(None, [', '.join(names[:-1]), names[-1]]))
    where = fields.get('booktitle') or fields.get('journal')
    link = f"[arXiv {fields['eprint']}](https://arxiv.org/abs/{fields['eprint']})" if 'eprint' in fields else None
    return f"{who} ({fields['year']}). *{fields['title']}*. " + ', '.join(filter(None, [where, link])) + '.'


def references_notebook(bib):
    "The notebook that shows the BibTeX file, a heading for each key, so that `references.ipynb#key` leads to it."
    top = ('raw', '---\ntitle: Bibliography\nskip_exec: true\nskip_showdoc: true\n---')
    said = '# Bibliography\n\n> Everything that is cited, made from `references.bib`.'
    cells = [top, ('markdown', said)]
    cells += [('markdown', f'## {key}\n\n{reference(f)}') for key, f in sorted(entries(bib).items())]
    made = [dict(cell_type=kind, id=f'entry-{i}', metadata={}, source=text.splitlines(keepends=True))
            for i, (kind, text) in enumerate(cells)]
    spec = dict(display_name='python3', language='python', name='python3')
    nb = dict(cells=made, metadata=dict(kernelspec=spec), nbformat=4, nbformat_minor=5)
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', type=Path, help='make pages of these only')
    parser.add_argument('--readme', action='store_true', help='make README.md and the bibliography only')
    parser.add_argument('--out', type=Path, help='folder of the pages (default: _docs)')
    args = parser.parse_args()
    cfg = get_config()
    sys.path.insert(0, str(cfg.config_path))
    if not args.notebooks:
        made = references_notebook((cfg.nbs_path/'references.bib').read_text(encoding='utf-8'))
        (cfg.nbs_path/'references.ipynb').write_text(made, encoding='utf-8')
        (cfg.config_path/'README.md').write_text(readme_text(cfg.nbs_path/cfg.readme_nb), encoding='utf-8')
    if not args.readme: make_pages(args.notebooks, args.out or cfg.doc_path)


if __name__ == '__main__': main()
