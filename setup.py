"""All settings live in settings.ini (which nbdev reads too); this file only hands them to setuptools."""
import shlex, shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).resolve().parent
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
package = cfg['lib_path']
readme = root/'README.md'


class BuildWithLessons(build_py):
    """Put the tutorials and the students' versions of the assignments into the wheel, as `rdd_nb/tutorials` and
    `rdd_nb/assignments`; in the repository they stay in one place. Solutions of assignments never get there."""
    def run(self):
        super().run()
        if self.editable_mode: return
        for folder, place in dict(tutorials='tutorials', assignments='assignments/release').items():
            source = root/cfg['nbs_path']/place
            for notebook in sorted(source.rglob('*.ipynb')):
                if '.ipynb_checkpoints' in notebook.parts: continue
                target = Path(self.build_lib)/package/folder/notebook.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(notebook, target)


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    author=cfg['author'],
    url=cfg['git_url'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'],
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Intended Audience :: Education',
                 'Natural Language :: English', 'Programming Language :: Python :: 3'],
    packages=find_packages(str(root), include=[package, package + '.*']),
    python_requires='>=' + cfg['min_python'],
    install_requires=shlex.split(cfg['requirements']),
    extras_require={'dev': shlex.split(cfg['dev_requirements'])},
    entry_points={'console_scripts': [line.strip() for line in cfg['console_scripts'].splitlines() if line.strip()],
                  'nbdev': [f'{package}={package}._modidx:d']},
    cmdclass={'build_py': BuildWithLessons},
    zip_safe=False,
)
