"The house rules, as far as a machine can read them. Each check yields sentences that say where and what to do; none is what we want."
import ast, json, os, re, shutil, socket, subprocess, sys
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyflakes.checker import Checker
from pyflakes.messages import UnusedImport

from refine_nb.reporting import ARTEFACTS

ROOT = Path(__file__).resolve().parents[1]
LINES = 25                                       # of an export cell, without directives
MEGABYTES = 5                                    # of all notebooks together
MACHINE_PATH = re.compile(r'(?<![\w.~])/(?:home|root|tmp|work|Users|var/folders)/|[A-Z]:\\\\?Users')


@dataclass
class Notebook:
    name: str                                    # without ending
    raw: dict                                    # the JSON

    @property
    def cells(self):
        return [(i, c['cell_type'], ''.join(c['source']), c) for i,c in enumerate(self.raw['cells'])]
    @property
    def code(self): return [(i, s, c) for i,kind,s,c in self.cells if kind == 'code']
    @property
    def exports(self): return [(i, body(s)) for i,s,_ in self.code if is_export(s)]
    @property
    def number(self): return int(m[1]) if (m := re.match(r'(\d\d)_', self.name)) else None
    @property
    def is_artefact(self): return bool(re.match(r'(tab|fig|study|claims)', self.name))
    @property
    def module(self):
        found = [m[1] for _,s,_ in self.code if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', s, re.M))]
        return found[0] if found else None
    def at(self, i): return f'{self.name}.ipynb, cell {i}'


def is_export(source): return any(re.match(r'#\|\s*export[is]?\b', line) for line in directives(source))
def directives(source):
    lines = source.splitlines()
    return lines[:next((k for k,line in enumerate(lines) if not line.startswith('#|')), len(lines))]
def body(source): return '\n'.join(source.splitlines()[len(directives(source)):]).strip('\n')
def definitions(source):
    return [n for n in ast.parse(source).body
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and not n.name.startswith('_')]

def public_names(source):
    targets = [t for n in ast.parse(source).body if isinstance(n, (ast.Assign, ast.AnnAssign))
               for t in (n.targets if isinstance(n, ast.Assign) else [n.target])]
    return [n.name for n in definitions(source)] + [t.id for t in targets
                                                    if isinstance(t, ast.Name) and not t.id.startswith('_')]

def imported(source):
    "Modules of this package that a cell imports, and '*' for a star"
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.Import):
            yield from (a.name.split('.')[1] for a in n.names if a.name.startswith('refine_nb.'))
        if isinstance(n, ast.ImportFrom):
            if any(a.name == '*' for a in n.names): yield '*'
            if n.module == 'refine_nb': yield from (a.name for a in n.names)
            elif (n.module or '').startswith('refine_nb.'): yield n.module.split('.')[1]


# ---- the rules: notebook(s) -> sentences -------------------------------------------------------------------

def parses(nb, _=None):
    for i,s,_ in nb.code:
        try: ast.parse(body(s))
        except SyntaxError as e:
            yield f'{nb.at(i)}: not plain Python ({e.msg}): no magics, no "!", one language'

def directives_come_first(nb, _=None):
    for i,s,_ in nb.code:
        for line in s.splitlines()[len(directives(s)):]:
            if re.match(r'#\s?\|\s*(export|default_exp|hide|slow|notest|eval)', line):
                yield f'{nb.at(i)}: "{line}" is not at the top, so nbdev does not see it: move it up'

def imports_point_down(nb, numbers):
    "`numbers`: module -> number of its notebook, None for an artefact's"
    if nb.number is None: return
    for i,s,_ in nb.code:
        for m in imported(body(s)):
            if m == '*' or m.startswith('_'): continue
            if m not in numbers:
                yield (f'{nb.at(i)}: imports refine_nb.{m}, which no notebook exports: '
                       'export it or remove the import')
            elif numbers[m] is None or numbers[m] >= nb.number:
                yield (f'{nb.at(i)}: imports {m}, which is not from a lower number than {nb.number:02d}: '
                       'move the shared part down')

def no_star_imports(nb, _=None):
    for i,s,_ in nb.code:
        if '*' in imported(body(s)):
            yield f'{nb.at(i)}: imports a star: name what you need, a reader must see where a name is from'

def one_parameters_cell(nb, _=None):
    if not nb.is_artefact: return
    tagged = [(i,s) for i,s,c in nb.code if 'parameters' in c['metadata'].get('tags', [])]
    if len(tagged) != 1:
        yield (
            f'{nb.name}.ipynb: {len(tagged)} code cells are tagged "parameters": papermill wants exactly one')
    for i,s in tagged:
        if is_export(s):
            yield f'{nb.at(i)}: the parameters are exported: they belong to the run, not to the library'
        for n in ast.parse(body(s)).body:
            try:
                plain = (isinstance(n, ast.Assign) and len(n.targets) == 1
                         and isinstance(n.targets[0], ast.Name) and (ast.literal_eval(n.value), True)[1])
            except ValueError: plain = False
            if not plain:
                yield (f'{nb.at(i)}: "{ast.unparse(n)}" is not "name = literal": '
                       'papermill replaces plain literals only')

def kernel_is_python(nb, _=None):
    spec = nb.raw['metadata'].get('kernelspec', {})
    if (spec.get('name'), spec.get('language')) != ('python3', 'python'):
        yield f'{nb.name}.ipynb: kernelspec is {spec}: papermill needs name python3 and language python'

def export_cells_are_short(nb, _=None):
    for i,s in nb.exports:
        if (n := len(s.splitlines())) > LINES:
            yield (f'{nb.at(i)}: {n} lines are exported, at most {LINES} fit a screen: '
                   'make two cells of two ideas')

def one_name_per_cell(nb, _=None):
    for i,s in nb.exports:
        if len(names := [n.name for n in definitions(s)]) > 1:
            yield f'{nb.at(i)}: defines {", ".join(names)}: one public name a cell'

def public_names_have_a_line(nb, _=None):
    for i,s in nb.exports:
        for n in definitions(s):
            doc = ast.get_docstring(n)
            if not doc or '\n' in doc:
                yield (f'{nb.at(i)}: {n.name} has {"a docstring of many lines" if doc else "no docstring"}: '
                       'say in one line what it does and where it is from')

def imports_stand_alone(nb, _=None):
    for i,s in nb.exports:
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(s).body}
        if kinds == {True, False}:
            yield f'{nb.at(i)}: an export cell has imports and other code: imports have a cell of their own'

def names_are_tested_nearby(nb, _=None):
    for i,s in nb.exports:
        after = [body(t) for j,t,_ in nb.code if j > i and not is_export(t)][:2]
        words = set(re.findall(r'\w+', '\n'.join(after)))
        for n in definitions(s):
            if n.name not in words:
                yield (
                    f'{nb.at(i)}: {n.name} is not in the next two code cells: show that it works right there')

def outputs_are_fit_to_publish(nb, _=None):
    for i,_,c in nb.code:
        for o in c.get('outputs', []):
            if o['output_type'] == 'error':
                yield f'{nb.at(i)}: keeps the error {o.get("ename")}: mend it and run again'
            if o.get('name') == 'stderr':
                yield f'{nb.at(i)}: keeps a warning on stderr: mend its cause, then run again'
            texts = [o.get('text', '')] + [v for k,v in o.get('data', {}).items()
                                           if not k.startswith('image/') or k == 'image/svg+xml']
            for text in texts:
                text = (text if isinstance(text, str) else ''.join(map(str, text)) if isinstance(text, list)
                        else json.dumps(text))
                if m := MACHINE_PATH.search(text):
                    yield (f'{nb.at(i)}: an output shows a path of a machine, '
                           f'"{text[m.start():m.start()+30]}": print names, not paths')

RULES = [parses, directives_come_first, imports_point_down, no_star_imports, one_parameters_cell,
         kernel_is_python, export_cells_are_short, one_name_per_cell,
         public_names_have_a_line, imports_stand_alone, names_are_tested_nearby, outputs_are_fit_to_publish]

def names_are_unique(notebooks):
    "Over component notebooks: every artefact may have a `grid` of its own"
    where = {}
    for nb in notebooks:
        for name in {n for _,s in nb.exports for n in public_names(s)} if not nb.is_artefact else ():
            where.setdefault(name, []).append(nb.name)
    for name,nbs in where.items():
        if len(nbs) > 1:
            yield f'{name} is public in {" and ".join(nbs)}: one name, one meaning: rename one or import it'

def modules_are_unique(notebooks):
    where = {}
    for nb in notebooks:
        if nb.module: where.setdefault(nb.module, []).append(nb.name)
    for module,nbs in where.items():
        if len(nbs) > 1:
            yield (f'{" and ".join(nbs)} both have default_exp {module}: '
                   'the later one silently wins: rename one')


# ---- the notebooks of this checkout ------------------------------------------------------------------------

NOTEBOOKS = [Notebook(p.stem, json.loads(p.read_text(encoding='utf-8')))
             for p in sorted((ROOT/'nbs').glob('*.ipynb'))]
NUMBERS = {nb.module: nb.number for nb in NOTEBOOKS if nb.module}

def no(sentences):
    sentences = list(sentences)
    if sentences: pytest.fail('\n'.join(sentences), pytrace=False)

@pytest.mark.parametrize('rule', RULES, ids=lambda r: r.__name__)
@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda nb: nb.name)
def test_notebook(nb, rule): no(rule(nb, NUMBERS))

@pytest.mark.parametrize('rule', [names_are_unique, modules_are_unique], ids=lambda r: r.__name__)
def test_notebooks_together(rule): no(rule(NOTEBOOKS))

def test_there_are_notebooks(): assert NOTEBOOKS, 'nbs/ has no notebook: every check above passed for nothing'

def test_notebooks_are_small():
    size = sum(p.stat().st_size for p in (ROOT/'nbs').glob('*.ipynb'))/1e6
    assert size < MEGABYTES, (f'the notebooks take {size:.1f} MB, at most {MEGABYTES}: '
                              'keep outputs only for small figures and tables')

def test_nbdev_clean_keeps_the_parameters_tag():
    ini = ConfigParser(delimiters=['=']); ini.read(ROOT/'settings.ini', encoding='utf-8')
    assert 'tags' in ini['DEFAULT'].get('allowed_cell_metadata_keys', '').split(), (
        'settings.ini needs allowed_cell_metadata_keys = tags: without it a "paper" run silently is the demo')


# ---- the package and its data ------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the checkout's sources; `copy(tool)` runs one of nbdev's tools there and returns the folder"
    folder = tmp_path_factory.mktemp('checkout')
    shutil.copytree(ROOT/'nbs', folder/'nbs', ignore=shutil.ignore_patterns('.*', '_proc'))
    shutil.copytree(ROOT/'refine_nb', folder/'refine_nb', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('settings.ini', 'setup.py', 'README.md'): shutil.copy(ROOT/name, folder/name)
    def run(tool):
        command = Path(sys.executable).parent/tool
        if not command.exists():
            pytest.fail(f'{tool} is not installed beside this Python: pip install -e ".[dev]"', pytrace=False)
        done = subprocess.run([str(command)], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f'{tool} failed:\n{done.stdout}{done.stderr}'
        return folder
    return run

def differing(folder, other, pattern):
    mine, theirs = ({p.name: p.read_bytes() for p in f.glob(pattern)} for f in (folder, other))
    return sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))

def test_package_is_in_step_with_the_notebooks(copy):
    stale = ({p.stem for p in (ROOT/'refine_nb').glob('*.py')} - {nb.module for nb in NOTEBOOKS}
             - {'__init__', '_modidx'})
    assert not stale, f'no notebook exports {sorted(stale)}: remove the files of renamed notebooks'
    assert (out := differing(copy('nbdev_export')/'refine_nb', ROOT/'refine_nb', '*.py')) == [], (
        f'{out} differ from the notebooks: run nbdev_export; never edit the package by hand')

def test_notebooks_are_clean(copy):
    assert (out := differing(copy('nbdev_clean')/'nbs', ROOT/'nbs', '*.ipynb')) == [], (
        f'{out}: run nbdev_clean before you commit')

def published_ids(): return {p.stem for p in (ROOT/'refine_nb'/'published').glob('*.csv')}

def test_every_artefact_notebook_has_its_published_numbers():
    lacking = sorted(nb.name
                     for nb in NOTEBOOKS if re.match('tab|fig', nb.name) and nb.name not in published_ids())
    assert not lacking, (
        f'refine_nb/published/ lacks {lacking}: write down what the paper prints, with source and notes')

def test_catalogue_and_artefacts_agree():
    "The catalogue also lists what is planned: only what it calls ready needs a notebook and the printed numbers"
    ready, there = ({i for i,a in ARTEFACTS.items() if a.ready},
                    {nb.name for nb in NOTEBOOKS if nb.is_artefact})
    assert ready, 'the catalogue calls no artefact ready'
    assert not (lacking := sorted(ready - there)), (
        f'the catalogue calls {lacking} ready, but nbs/ has no such notebook')
    assert not (lacking := sorted(i for i in ready - published_ids() if re.match('tab|fig', i))), (
        f'refine_nb/published/ lacks {lacking}, which the catalogue calls ready')
    assert not (unlisted := sorted(there - ready)), (
        f'71_catalogue.ipynb does not call {unlisted} ready: add them')

def smells(file):
    "Undefined names, unused imports and the like, as pyflakes words them"
    for m in sorted(Checker(ast.parse(file.read_text(encoding='utf-8')), file.name).messages,
                    key=lambda m: m.lineno):
        hint = ': remove it, or import it in the cell that needs it' if isinstance(m, UnusedImport) else ''
        yield f'{file.name}:{m.lineno}: {m.message % m.message_args}{hint}'

# a test file may import a fixture, which looks unused
@pytest.mark.parametrize('folder', ['refine_nb', 'tools'])
def test_names_are_defined_and_imports_used(folder):
    no(s for f in sorted((ROOT/folder).glob('*.py')) for s in smells(f))


# ---- the checks themselves can fail ------------------------------------------------------------------------

def made_up(*sources, name='30_bad', tags=(), outputs=(), kernel='python'):
    cell = lambda s: {'cell_type': 'code', 'source': s, 'metadata': {'tags': list(tags)},
                      'outputs': list(outputs)}
    return Notebook(name, {'cells': [cell(s) for s in sources],
                           'metadata': {'kernelspec': {'name': 'python3', 'language': kernel}}})

GOOD = ['#| export\nimport math\nfrom refine_nb.core import key',
        '#| export\ndef f(x):\n    "One line (source)"\n    return math.sin(x)', 'assert f(0) == 0']
LONG = '#| export\ndef f(x):\n    "One line"\n' + '    x += 1\n'*LINES
TESTLESS = ['#| export\ndef f(x):\n    "One line"\n    return x', 'g(1)', 'ff(1)', 'f(1)']
FAR = json.dumps({'a': '/home/someone/x'})
PNG = {'output_type': 'display_data', 'data': {'image/png': 'AA/tmp/AA'}}

@pytest.mark.parametrize('rule, bad, says', [
    (parses, made_up('%matplotlib inline'), 'no magics'),
    (directives_come_first, made_up('# why\n#| export\ndef f(): pass'), 'is not at the top'),
    (imports_point_down, made_up('from refine_nb.report import wilson'), 'imports report'),
    (imports_point_down, made_up('import refine_nb.bad'), 'imports bad'),  # not even itself
    (imports_point_down, made_up('from refine_nb import report as r'), 'imports report'),
    (imports_point_down, made_up('def f():\n    from refine_nb.tab1_adcorda import grid'),
     'imports tab1_adcorda'),
    (imports_point_down, made_up('from refine_nb.gone import f'), 'no notebook exports'),
    (no_star_imports, made_up('from refine_nb.core import *'), 'imports a star'),
    (one_parameters_cell, made_up('preset = None', name='tab1_bad'), '0 code cells'),
    (one_parameters_cell, made_up('a = 1', 'b = 2', name='tab1_bad', tags=['parameters']), '2 code cells'),
    (one_parameters_cell, made_up('eps = 8/255', name='fig1_bad', tags=['parameters']),
     '"eps = 8 / 255" is not'),
    (one_parameters_cell, made_up('print(1)', name='study_bad', tags=['parameters']), '"print(1)" is not'),
    (kernel_is_python, made_up(kernel=None), 'language python'),
    (export_cells_are_short, made_up(LONG), 'lines are exported'),
    (one_name_per_cell, made_up('#| export\ndef f(): pass\nclass G: pass\ndef _h(): pass'), 'defines f, G:'),
    (public_names_have_a_line, made_up('#| export\ndef f(): pass'), 'no docstring'),
    (public_names_have_a_line, made_up('#| export\ndef f():\n    """One\n\n    two"""'), 'many lines'),
    (imports_stand_alone, made_up('#| export\nimport math\nx = 1'), 'a cell of their own'),
    (names_are_tested_nearby, made_up(*TESTLESS), 'f is not in the next two'),
    (outputs_are_fit_to_publish,
     made_up('1', outputs=[{'output_type': 'error', 'ename': 'KeyError'}]), 'KeyError'),
    (outputs_are_fit_to_publish,
     made_up('1', outputs=[{'output_type': 'stream', 'name': 'stderr', 'text': 'careful'}]), 'stderr'),
    (outputs_are_fit_to_publish, made_up('1', outputs=[
        {'output_type': 'display_data', 'data': {'text/plain': ['in ', FAR]}}]), 'a path of a machine'),
], ids=lambda x: getattr(x, '__name__', None) or (x if isinstance(x, str) else ''))
def test_a_bad_notebook_is_found(rule, bad, says):
    numbers = {'core': 0, 'report': 70, 'bad': 30, 'tab1_adcorda': None}
    assert any(says in sentence for sentence in rule(bad, numbers)), f'{rule.__name__} does not see it'

@pytest.mark.parametrize('rule', RULES, ids=lambda r: r.__name__)
def test_a_good_notebook_passes(rule):
    assert not list(rule(made_up(*GOOD, outputs=[PNG]), {'core': 0}))
    assert not list(rule(made_up('preset = None  # "demo"', name='tab1_good', tags=['parameters']),
                         {'core': 0}))

def test_two_of_a_name_are_found():
    a, b = (made_up('#| default_exp m\n#| export\ndef f(): pass', name='10_a'),
            made_up('#| default_exp m\n#| export\nf = 1', name='20_b'))
    assert list(names_are_unique([a, b])) == [
        'f is public in 10_a and 20_b: one name, one meaning: rename one or import it']
    assert (len(list(modules_are_unique([a, b]))) == 1
            and not list(names_are_unique([a])) + list(modules_are_unique([b])))

def test_a_bad_name_is_found(tmp_path):
    (tmp_path/'m.py').write_text('import os\nimport re\nre.compile(pattern)\n')
    assert list(smells(tmp_path/'m.py')) == ["m.py:1: 'os' imported but unused: remove it, or import it in "
                                             "the cell that needs it", "m.py:3: undefined name 'pattern'"]

def test_a_changed_file_is_found(tmp_path):
    for folder in ('a', 'b'):
        (tmp_path/folder).mkdir(); (tmp_path/folder/'x.py').write_text(folder)
        (tmp_path/folder/'same.py').write_text('')
    (tmp_path/'b'/'stale.py').write_text('')
    assert differing(tmp_path/'a', tmp_path/'b', '*.py') == ['stale.py', 'x.py']

def test_the_network_is_shut_and_the_cache_is_empty(refine_home):
    with pytest.raises(AssertionError, match='must not use the network'):
        socket.create_connection(('192.0.2.1', 80), timeout=1)  # RFC 5737: nobody's address
    assert os.environ['REFINE_HOME'] == str(refine_home) and not refine_home.exists()
