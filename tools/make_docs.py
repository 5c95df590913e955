"""Make README.md from nbs/index.ipynb, and HTML pages of all notebooks in _docs/, with pandoc and without Quarto.

    python tools/make_docs.py            # README.md and _docs/
    python tools/make_docs.py --readme   # README.md only

Links between notebooks are written as they work in Jupyter, relative to the notebook: `[risk](25_risk.ipynb)`.
Here they become links to pages in HTML, and paths from the repository's root in README.md.
"""
import argparse, json, os, posixpath, re, sys
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import nbdev.doclinks
import pypandoc
import yaml
from execnb.nbio import nb2str, read_nb
from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc
from nbdev.processors import add_links, exec_show_docs, FilterDefaults
from nbdev.serve import proc_nbs

FROM = 'ipynb+fenced_divs+bracketed_spans+link_attributes+pipe_tables+tex_math_dollars'


class OnlyText(FilterDefaults):
    "nbdev's processing without running code and without links to pages: the same result in every environment."
    def base_procs(self): return [p for p in super().base_procs() if p not in (add_links, exec_show_docs)]


def relink(text, change):
    "Replace the relative targets of the Markdown links in `text` by `change(target)`."
    def new(match):
        target = match[2]
        return match[0] if re.match(r'\w+:|[#/]', target) else match[1] + change(target) + ')'
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


def navigation(titles, depth):
    "HTML list of all pages, seen from a page `depth` folders down."
    links = [f'<a href="{"../" * depth}{page.as_posix()}">{title}</a>' for page, title in titles.items()]
    return '<nav class="pages">\n' + '\n'.join(links) + '\n</nav>\n'


def make_pages():
    "Write one self-contained HTML page for each notebook."
    cfg = get_config()
    nbdev.doclinks._build_modidx()
    cache = proc_nbs(cfg.nbs_path, n_workers=0, force=True)
    notebooks = {path.relative_to(cache): split_front(json.loads(path.read_text(encoding='utf-8')))
                 for path in sorted(cache.rglob('*.ipynb'))}
    pages = {path: page_name(path, front) for path, (front, _) in notebooks.items()}
    order = sorted(pages, key=lambda p: (p.name != cfg.readme_nb, len(p.parts), p))
    titles = {pages[p]: notebooks[p][0].get('title', p.stem) for p in order}
    site, code = f"{cfg.doc_host}{cfg.doc_baseurl}/", f"{cfg.git_url}/blob/{cfg.branch}/"
    to_root = Path(os.path.relpath(cfg.config_path, cfg.doc_path)).as_posix() + '/'
    css, nav = cfg.nbs_path/'styles.css', cache/'navigation.html'
    for path, (front, nb) in notebooks.items():
        up, target = '../' * (len(path.parts) - 1), cfg.doc_path/pages[path]
        nav.write_text(navigation(titles, len(path.parts) - 1), encoding='utf-8')

        def to_page(link):
            file, _, anchor = link.partition('#')
            other = Path(os.path.normpath(path.parent/file))
            if other not in pages: return link
            return posixpath.relpath(pages[other].as_posix(), path.parent.as_posix()) + ('#' + anchor if anchor else '')
        options = ['-s', '--toc', '--mathml', '--embed-resources', '-M', f"title={titles[pages[path]]}", '-B', str(nav),
                   '--resource-path', str((cache/path).parent)]
        if front.get('description'): options += ['-M', f"subtitle={front['description']}"]
        if css.exists(): options += ['--css', str(css)]
        html = pypandoc.convert_text(readable(nb, to_page), 'html5', format=FROM, extra_args=options)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(html.replace(code, up + to_root).replace(site, up), encoding='utf-8')
    print(f'{len(notebooks)} pages in {cfg.doc_path}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--readme', action='store_true', help='make README.md only')
    args = parser.parse_args()
    cfg = get_config()
    sys.path.insert(0, str(cfg.config_path))
    (cfg.config_path/'README.md').write_text(readme_text(cfg.nbs_path/cfg.readme_nb), encoding='utf-8')
    if not args.readme: make_pages()


if __name__ == '__main__': main()
