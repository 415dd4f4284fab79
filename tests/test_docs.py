"What the documents say is there: README in step with the index, commands in the Makefile, links with an end."
import json, os, re, shlex, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
from readme import from_root, readme, relinked
from run_notebooks import ROOMS, chosen, notebooks

CODE = re.compile(r'^```.*?^```|`[^`\n]+`', re.M|re.S)
DOCUMENTS = ['README.md', 'CONTRIBUTING.md']
NOTEBOOKS = [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
# what names notebooks as room/NN_name: documents, notebooks, tests, tools, notes to what is printed
SAYING = [*(ROOT/name for name in DOCUMENTS), *NOTEBOOKS, *sorted((ROOT/'tests').glob('*.py')),
          *sorted((ROOT/'tools').glob('*.py')), *sorted((ROOT/'refine_nb'/'published').glob('*.csv'))]
MAKE_UP = ('test_docs.py', 'test_house.py', 'test_outputs.py') # notebooks of their own
NAMED = re.compile(rf'(?<![\w./])((?:{"|".join(ROOMS)})/\d\d_\w+)')
TARGETS = set(re.findall(r'^([a-z]+):', (ROOT/'Makefile').read_text(encoding='utf-8'), re.M))


def text(name): return (ROOT/name).read_text(encoding='utf-8')
def code(name): return '\n'.join(m.strip('`') for m in CODE.findall(text(name)))
def targets(name): return set(re.findall(r'\bmake ([a-z]+)\b', code(name)))
def index(): return json.loads(text('nbs/index.ipynb'))['cells']

def links(markdown):
    "Where the links and pictures lead, outside code"
    return [m for m in re.findall(r'\]\(([^)\s]+)\)', CODE.sub('', markdown))
            if not re.match(r'https?:|mailto:|#', m)]

def shown(notebook):
    "What a reader sees as Markdown: prose and stored outputs"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return '\n'.join([*(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown'),
                      *(''.join(o.get('data', {}).get('text/markdown', []))
                        for c in cells for o in c.get('outputs', []))])

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

FINDINGS = re.findall(r'^- \*\*\[.*?\]\(nbs/(\w+)\.ipynb\)', text('README.md'), re.M)

@pytest.mark.parametrize('artefact', FINDINGS)
def test_findings_are_those_of_the_reports(artefact):
    from refine_nb.papers.documents import finding
    assert finding(artefact).partition('** (')[2] in text('README.md'), ( # its link is from another folder
        f'README.md says of {artefact} what its largest report does not: run nbs/index.ipynb, make readme')

def test_the_readme_says_what_the_scoreboard_found():
    from refine_nb.papers.documents import on_ours, on_print
    from refine_nb.reporting import stored
    rows = stored('scoreboard')[0].tidy.astype(object).fillna('')
    assert all(f'- {s}' in text('README.md') for s in (on_print(rows), *on_ours(rows)))

def test_the_readme_is_short_begins_with_findings_and_cites_all_documents():
    from refine_nb.reporting import PAPERS
    said = text('README.md'); heads = re.findall(r'^## (.*)', said, re.M)
    assert len(said.splitlines()) < 150 and heads[0] == 'What was found' and FINDINGS
    assert all(p.citation in said and f'title={{{p.title}}}' in said for p in PAPERS.values())
    assert said.count('@misc{') == len(PAPERS)

def test_every_page_that_is_ready_is_listed():
    "On the scoreboard, which the README leads to"
    from refine_nb.reporting import ARTEFACTS
    said = shown(ROOT/'nbs'/'scoreboard.ipynb')
    listed = {i for i in ARTEFACTS if f'|[{i}]({i}.ipynb)|ready|' in said}
    assert listed == {i for i,a in ARTEFACTS.items() if a.ready}
    assert '](nbs/scoreboard.ipynb)' in text('README.md') and '](nbs/errata.ipynb)' in text('README.md')

def test_the_three_commands_stand_word_for_word():
    assert ('```\npapermill nbs/tab1_adcorda.ipynb out.ipynb -p model resnet34\nnbdev_test\n'
            'jupyter lab nbs\n```') in text('README.md')

def test_how_long_the_demo_takes_is_said_in_one_way():
    (took,) = re.findall(r'^demo:.*?, in about (.*?) on a CPU', text('Makefile'), re.M)
    assert all(f'about {took}' in text(name) for name in DOCUMENTS)

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

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_links_of_a_notebook_lead_somewhere(notebook):
    found = links(shown(notebook))
    assert found or notebook.stem != 'index', 'the index has no links: this test reads nothing'
    assert not (dead := [x for x in found if not (notebook.parent/x.split('#')[0]).exists()]), (
        f'{notebook.relative_to(ROOT)} links to {dead}, which is not there: '
        'a link begins at the folder of its notebook')

def test_notebooks_that_are_named_are_there():
    there = {p.relative_to(ROOT/'nbs').with_suffix('').as_posix() for p in NOTEBOOKS}
    named = {f.relative_to(ROOT).as_posix(): set(NAMED.findall(f.read_text(encoding='utf-8')))
             for f in SAYING if f.name not in MAKE_UP}
    assert any(named.values()), 'nothing names a notebook: this test reads nothing'
    gone = {f: sorted(names - there) for f,names in named.items() if names - there}
    assert not gone, f'these name notebooks that are not there: {gone}'

@pytest.mark.parametrize('name', DOCUMENTS)
def test_notebooks_in_commands_are_there(name):
    gone = [x for x in re.findall(r'nbs/[\w/]+\.ipynb', code(name)) if not (ROOT/x).exists()]
    assert not gone, f'{name} names {gone}, which is not there'

def test_contributing_lists_the_rooms_in_their_order():
    rows = re.findall(r'^\| `(\w+)/` \|', text('CONTRIBUTING.md'), re.M)
    assert tuple(rows) == ROOMS, "CONTRIBUTING.md's table of rooms is not tools/run_notebooks.py's ROOMS"

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

def test_notebooks_run_in_the_order_of_the_rooms(tmp_path):
    for file in ('index', 'tab1_a', 'papers/00_a', 'base/20_b', 'base/10_c', 'vision/10_c', 'claims_a',
                 'base/.ipynb_checkpoints/10_c-checkpoint'):
        (tmp_path/file).parent.mkdir(parents=True, exist_ok=True); (tmp_path/f'{file}.ipynb').write_text('')
    there = notebooks(tmp_path)
    assert list(there) == ['base/10_c', 'base/20_b', 'vision/10_c', 'papers/00_a',
                           'claims_a', 'tab1_a', 'index']
    assert chosen([], there) == list(there)
    assert chosen(['index', '10_c', 'base/20_b'], there) == ['base/10_c', 'base/20_b', 'vision/10_c', 'index']
    with pytest.raises(SystemExit, match='nbs/ has no 20_c, vision/20_b: choose from base/10_c'):
        chosen(['vision/20_b', '20_c'], there)

def test_links_are_rewritten_for_the_root_outside_code_only():
    assert ([from_root(x) for x in ('../LICENSE', 'tab1_adcorda.ipynb', 'base/00_core.ipynb')]
            == ['LICENSE', 'nbs/tab1_adcorda.ipynb', 'nbs/base/00_core.ipynb'])
    assert (relinked('[a](b.ipynb) [c](https://d) ![e](../f.svg) `[g](h)` [i](#j)')
            == '[a](nbs/b.ipynb) [c](https://d) ![e](f.svg) `[g](h)` [i](#j)')
    assert relinked('```\n[a](b)\n```\n') == '```\n[a](b)\n```\n'

def test_no_stored_report_shows_images_of_a_data_set():
    "They are their makers' to hand on: a page that could draw them is told `-p images False` first"
    records = [p for scale in ('small', 'gpu', 'paper')
               for p in (ROOT/'reports').glob(f'*/{scale}/**/run.json')]
    can = {p: json.loads(p.read_text())['settings'].get('images') for p in records}
    assert not [p.parts[-4:] for p,shown in can.items() if shown is True] and False in can.values()
