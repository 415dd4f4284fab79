"What the documents say is there: README in step with the index, commands in the Makefile, links that lead somewhere."
import json, os, re, shlex, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
from readme import from_root, readme, relinked

CODE = re.compile(r'^```.*?^```|`[^`\n]+`', re.M|re.S)
DOCUMENTS = ['README.md', 'CONTRIBUTING.md']
TARGETS = set(re.findall(r'^([a-z]+):', (ROOT/'Makefile').read_text(encoding='utf-8'), re.M))


def text(name): return (ROOT/name).read_text(encoding='utf-8')
def code(name): return '\n'.join(m.strip('`') for m in CODE.findall(text(name)))
def targets(name): return set(re.findall(r'\bmake ([a-z]+)\b', code(name)))
def index(): return json.loads(text('nbs/index.ipynb'))['cells']

def links(markdown):
    "Where the links and pictures lead, outside code"
    return [m for m in re.findall(r'\]\(([^)\s]+)\)', CODE.sub('', markdown))
            if not re.match(r'https?:|mailto:|#', m)]

def parameters(notebook):
    cells = [c for c in json.loads(text(notebook))['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    return set(re.findall(r'^(\w+)\s*=', ''.join(cells[0]['source']), re.M))


def test_readme_is_in_step_with_the_index():
    assert text('README.md') == readme(), 'README.md is not what nbs/index.ipynb says: make readme'

def test_hidden_cells_stay_hidden():
    hidden = [line for c in index() if (s := ''.join(c['source'])).startswith(('#| hide', '#| echo: false'))
              for line in s.splitlines() if len(line) > 25]
    assert hidden and not [line for line in hidden if line in text('README.md')]
    assert 'Traceback' not in text('README.md') and '#|' not in text('README.md')

@pytest.mark.parametrize('name', DOCUMENTS)
def test_make_targets_exist(name):
    assert targets(name), f'{name} names no make target: this test reads nothing'
    assert not (gone := targets(name) - TARGETS), (
        f'{name} says make {", ".join(sorted(gone))}, which the Makefile does not have')

def test_readme_names_the_test_command(): assert 'test' in targets('README.md')

@pytest.mark.parametrize('name', DOCUMENTS)
def test_links_lead_somewhere(name):
    assert not (dead := [x for x in links(text(name)) if not (ROOT/x.split('#')[0]).exists()]), (
        f'{name} links to {dead}, which is not there')

def test_links_of_the_index_lead_somewhere():
    said = '\n'.join(''.join(c['source']) for c in index() if c['cell_type'] == 'markdown')
    said += '\n'.join(''.join(o.get('data', {}).get('text/markdown', [])) for c in index()
                      for o in c.get('outputs', []))
    assert links(said), 'the index has no links: this test reads nothing'
    assert not (dead := [x for x in links(said) if not (ROOT/'nbs'/x).exists()]), (
        f'nbs/index.ipynb links to {dead}, which is not there')

@pytest.mark.parametrize('name', DOCUMENTS)
def test_papermill_commands_fit_their_notebooks(name):
    for line in re.findall(r'papermill (nbs/.*)', code(name)):
        notebook, _, *options = shlex.split(line, comments=True)
        given = {options[i+1] for i,o in enumerate(options) if o == '-p'}
        assert (ROOT/notebook).exists(), f'{name}: there is no {notebook}'
        assert given <= parameters(notebook), (
            f'{name}: {notebook} has no parameter {sorted(given - parameters(notebook))}')

def test_report_command_fits_its_notebook():
    (line,) = re.findall(r'make report (ARTEFACT=.*)', code('README.md'))
    said = dict(x.split('=', 1) for x in shlex.split(line))
    options = said['ARGS'].split()
    assert ({options[i+1] for i,o in enumerate(options) if o == '-p'}
            <= parameters(f"nbs/{said['ARTEFACT']}.ipynb"))

def test_targets_are_plain_commands():
    "No target is a file that happens to be there, and each says what it is for"
    makefile = text('Makefile')
    assert TARGETS <= set(re.search(r'^\.PHONY: (.*)', makefile, re.M)[1].split())
    assert not (silent := [t for t in TARGETS if not re.search(rf'^{t}:.*## \w', makefile, re.M)]), (
        f'the Makefile does not say what {silent} are for')

def test_an_old_python_is_told_so(tmp_path):
    done = subprocess.run(['make', 'setup', f'VENV={tmp_path}/none', 'PYTHONS=false'], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode and 'needs Python 3.10 or newer' in done.stderr and not (tmp_path/'none').exists()

def test_ci_runs_the_main_job_and_then_the_tests():
    assert os.access(ROOT/'.ci'/'run', os.X_OK)
    said = re.findall(r'\bmake (\w+)', text('.ci/run'))
    assert (set(said) <= TARGETS and said.index('demo') < said.index('test')
            and 'set -euo pipefail' in text('.ci/run'))

def test_links_are_rewritten_for_the_root_outside_code_only():
    assert [from_root(x) for x in ('../LICENSE', '00_core.ipynb')] == ['LICENSE', 'nbs/00_core.ipynb']
    assert (relinked('[a](b.ipynb) [c](https://d) ![e](../f.svg) `[g](h)` [i](#j)')
            == '[a](nbs/b.ipynb) [c](https://d) ![e](f.svg) `[g](h)` [i](#j)')
    assert relinked('```\n[a](b)\n```\n') == '```\n[a](b)\n```\n'
