"""The documentation is true: its examples and code run, its commands are taken, its links lead somewhere.

A block of code is run by a test, or a comment before it says why it is not: `<!-- not run: ... -->`. A block of YAML
begins with `# NAME.yaml`, the file that it stands in. Blocks of a page run in their order, with tiny models and images.
"""
import doctest
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest

import timm_vpl
from timm_vpl.options.commands import COMMANDS, command_parser
from timm_vpl.options.train import build_parser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(DOCS.rglob('*.md'))]
BLOCK = re.compile(r'^(?:<!-- not run: ([^\n]+) -->\n)?```([^\n]*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
CODE, OTHER = ('python', 'sh', 'yaml'), ('',)  # of no kind: what a command prints, or a tree of files


class Block(NamedTuple):
    """A block of code of a page, and why it is not run."""
    page: Path
    kind: str
    text: str
    reason: str | None


FENCED = [Block(page, match[2], match[3], match[1])
          for page in PAGES for match in BLOCK.finditer(page.read_text(encoding='utf-8'))]
BLOCKS = [block for block in FENCED if not block.kind.startswith('{')]  # directives of the site


def name_of(page):
    return str(page.relative_to(ROOT))


# Examples of the public names


def test_the_api_pages_have_every_public_name():
    documented = re.findall(r'^\.\. auto\w+:: timm_vpl\.(?:core\.\w+\.)?(\w+)$',
                            ''.join(page.read_text() for page in (DOCS / 'api').glob('*.md')), re.MULTILINE)
    assert set(timm_vpl.__all__) <= set(documented)


@pytest.mark.parametrize('name', timm_vpl.__all__)
def test_the_example_of_a_public_name(name):
    import timm
    import torch
    thing = getattr(timm_vpl, name)
    if isinstance(thing, dict):  # a table: that of its rows' class
        thing = type(next(iter(thing.values())))
    prelude = {'timm': timm, 'torch': torch, **{each: getattr(timm_vpl, each) for each in timm_vpl.__all__}}
    [example] = doctest.DocTestFinder(recurse=False).find(thing, name, globs=prelude)
    assert example.examples
    doctest.DebugRunner().run(example)


# Blocks of code


def test_every_block_is_of_a_known_kind():
    assert {block.kind for block in BLOCKS} == {*CODE, *OTHER}
    assert 2 * len(FENCED) == sum(len(re.findall('^```', page.read_text(), re.MULTILINE)) for page in PAGES)


def commands_of(text):
    """Yield each command line of a block, as words."""
    for line in text.replace('\\\n', ' ').splitlines():
        for command in re.split(r'\s(?:&&|\|)\s', line):
            words = shlex.split(command, comments=True)
            if words:
                yield words


def own_part(words):
    """Return (command, arguments) of a line that runs this package, None of another."""
    if 'train_vpl.py' in words:
        return 'train', words[words.index('train_vpl.py') + 1:]
    if 'timm_vpl' in words or words[0] == 'timm-vpl':
        name, *rest = words[words.index('timm_vpl') + 1:] if 'timm_vpl' in words else words[1:]
        return name, rest
    return None


def test_every_command_has_options_that_there_are():
    parsers = {'train': build_parser(), **{name: command_parser(name) for name in COMMANDS}}
    seen, recipes = set(), set()
    for block in BLOCKS:
        for words in commands_of(block.text) if block.kind == 'sh' else ():
            found = own_part(words)
            if found and found[1] != ['...']:
                given = parsers[found[0]].parse(found[1])
                seen.add(found[0])
                recipes.add(given.get('config'))
    assert seen == set(parsers)
    written = [re.match(r'# (\w+)\.yaml\n', block.text)[1] for block in BLOCKS if block.kind == 'yaml']
    known = {*written, 'NAME', 'args', *(path.stem for path in (ROOT / 'hparams').iterdir())}
    assert {Path(recipe).stem for recipe in recipes if recipe} <= known


def test_the_batch_script_is_bash_and_its_command_is_taken():
    script = ROOT / 'examples' / 'slurm.sh'
    assert subprocess.run(['bash', '-n', script]).returncode == 0
    text = script.read_text()
    [recipe] = re.findall(r'RECIPE:-(\w+)', text)
    assert (ROOT / 'hparams' / f'{recipe}.yaml').is_file()
    [command] = [words for words in commands_of(text) if 'timm_vpl' in words]
    given = build_parser().parse(own_part(command)[1][:-2])  # without "$@" and the ampersand
    assert given['resume'] == 'auto' and given['config'] == '$RECIPE'


# Blocks that are run, a page's in their order, in a folder as the pages suppose one

TINY = [
    (r'\b(?:resnet18|resnet50)\b', 'test_resnet'),
    (r'\bvit_(?:tiny|base)_patch16_224\b', 'test_vit'),
    (r'--pretrained\b', ''),
    (r'--nproc-per-node 8', '--nproc-per-node 2'),
    (r'(?<![\w/])/imagenet\b', 'DIR'),
    (r'^.*PATH/TO.*$', ''),  # tests/tools/test_timm_script.py runs timm's own script
    (r'seeds: .*', 'seeds: [1]'),
    (r'epochs: \d+', 'epochs: 1'),
]
SMALL = '--epochs 2 --warmup-epochs 0 --img-size 32 -b 8 -j 0 --device cpu --no-amp --no-pin-mem'


def made_small(text):
    """Return commands with tiny models, images of this machine and few epochs."""
    for pattern, small in TINY:
        text = re.sub(pattern, small, text, flags=re.MULTILINE)
    lines = []
    for line in text.replace('\\\n', ' ').splitlines():
        found = own_part(shlex.split(line, comments=True) or [''])
        if found and found[0] == 'train':
            models = '--model-a test_resnet --model-b test_vit ' if '--config' in line else ''
            line = f"{re.sub('  +#.*', '', line)} {models}{SMALL}"
        lines.append(line)
    return '\n'.join(lines)


def run_shell(text, folder):
    environ = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1',
               'PATH': os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])}
    result = subprocess.run(['bash', '-euo', 'pipefail', '-c', text], cwd=folder, env=environ, capture_output=True,
                            text=True, timeout=1800)
    assert result.returncode == 0, f'{text}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}'


@pytest.fixture(scope='module')
def workplace(digits_folder, tmp_path_factory):
    """The folder of a reader: the files of the repository, images, a run."""
    folder = tmp_path_factory.mktemp('reader')
    for name in ('train_vpl.py', 'hparams', 'examples', 'benchmarks'):
        (folder / name).symlink_to(ROOT / name)
    for name in ('flowers', 'DIR', 'photos'):
        shutil.copytree(digits_folder, folder / name)
    run_shell(made_small('timm-vpl train DIR --model-a test_resnet --model-b test_vit --experiment RUN'), folder)
    return folder


RUN = [page for page in PAGES if any(block.kind in CODE and not block.reason for block in BLOCKS if block.page == page)]


@pytest.mark.slow
@pytest.mark.parametrize('page', RUN, ids=name_of)
def test_the_code_of_a_page_runs(page, workplace, monkeypatch):
    import timm
    import torch

    from timm_vpl import PairWrapper, VPLLoss
    monkeypatch.chdir(workplace)
    # What a block of README takes as given.
    given = {'timm': timm, 'torch': torch, 'PairWrapper': PairWrapper, 'VPLLoss': VPLLoss, 'epoch': 0,
             'images': torch.randn(4, 3, 224, 224), 'target': torch.tensor([0, 1, 2, 3])}
    for block in BLOCKS:
        if block.page != page or block.reason or block.kind not in CODE:
            continue
        if block.kind == 'python':
            text = re.sub(r'(?<=export/vpl-)\w+', lambda match: made_small(match[0]), block.text)
            exec(compile(text, name_of(page), 'exec'), given)
        elif block.kind == 'sh':
            run_shell(made_small(block.text), workplace)
        else:
            Path(re.match(r'# (\w+\.yaml)\n', block.text)[1]).write_text(made_small(block.text))


# Links and drawings

LINK = re.compile(r'(?:\]\(|^```{(?:image|literalinclude|include)} |src=")([^)\s"]+)', re.MULTILINE)
FILES = [*PAGES, *(ROOT / name for name in (
    'CHANGELOG.md', 'SECURITY.md', 'benchmarks/study/README.md', 'tests/proof/README.md', 'timm_vpl/assets/digits.md'))]


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r'^```.*?^```', '', page.read_text(encoding='utf-8'), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', FILES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    for match in LINK.finditer(page.read_text(encoding='utf-8')):
        target = match[1]
        if re.match(r'https?://', target):
            continue
        path, _, anchor = target.partition('#')
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


def test_drawings_are_those_of_the_script():
    drawn = runpy.run_path(str(DOCS / 'drawings.py'))['drawings']()
    assert {name: (DOCS / 'images' / name).read_text(encoding='utf-8') for name in drawn} == drawn


class Page(HTMLParser):
    """Ids of a page of the site, and what it links to and loads."""

    def __init__(self, file):
        super().__init__()
        self.ids, self.links, self.loaded = set(), set(), set()
        self.feed(file.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get('id'))
        if tag == 'a' and given.get('href'):
            self.links.add(given['href'])
        elif tag in ('link', 'script', 'img') and (given.get('href') or given.get('src')):
            self.loaded.add(given.get('href') or given.get('src'))


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_needs_no_network(tmp_path):
    pytest.importorskip('furo', reason="no furo: pip install -e '.[docs]'")
    result = subprocess.run([sys.executable, '-m', 'sphinx', '-W', '-q', '-d', str(tmp_path / 'trees'), 'docs',
                             str(tmp_path / 'site')], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    pages = {file: Page(file) for file in (tmp_path / 'site').rglob('*.html')}
    assert len(pages) > len(PAGES) - 2
    for file, page in pages.items():
        for target in {*page.links, *page.loaded}:
            if re.match(r'https?://', target):
                assert target not in page.loaded, (file, target)
                continue
            path, _, anchor = target.partition('#')
            linked = (file.parent / unquote(path.partition('?')[0])).resolve() if path else file
            assert linked.is_file(), (file, target)
            assert not anchor or linked not in pages or unquote(anchor) in pages[linked].ids, (file, target)
