"The house rules, as far as a machine can read them: a check yields sentences that say where and what to do."
import ast, json, os, re, shutil, socket, subprocess, sys
from collections import Counter
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import pytest
from pyflakes.checker import Checker
from pyflakes.messages import UnusedImport

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
from run_notebooks import ROOMS

COMPONENTS = ROOMS[:-2]                          # with a front door; the papers and the command have none
ACROSS = ('scoreboard', 'matrix', 'errata')      # artefacts over all papers
TOP = re.compile(rf'(?:(?:tab|fig)\d\w*|study|claims)_\w+|index|{"|".join(ACROSS)}')
LINES = 25                                       # of an export cell, without directives
CELLS, EXPORTED = 45, 250                        # of a notebook in a room: cells, exported lines
PAGE, CODE = 20, 100                             # of an artefact: cells, lines of code
COLUMNS = 110                                    # of a line of code
MEGABYTES, KILOBYTES = 10, 400                   # of all notebooks together, and of one of them
MACHINE_PATH = re.compile(r'(?<![\w.~])/(?:home|root|tmp|work|Users|var/folders)/|[A-Z]:\\\\?Users')


# artefacts that are still too long, and why: a list that gets shorter, never longer
EXCUSED = {}


@dataclass
class Notebook:
    name: str                                    # without ending
    raw: dict                                    # the JSON
    room: str = ''                               # the folder in nbs/ in which it lies; '' is the top

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
    def stem(self): return re.sub(r'^\d\d_', '', self.name)
    @property
    def is_door(self): return self.name == f'99_{self.room}'
    @property
    def is_artefact(self): return not self.room and self.name != 'index'
    @property
    def module(self):
        found = [m[1] for _,s,_ in self.code if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', s, re.M))]
        return found[0] if found else None
    @property
    def module_here(self):
        "The module that its place and name ask for"
        return f"{self.room or 'artefacts'}.{'__init__' if self.is_door else self.stem}"
    @property
    def public(self): return {n for _,s in self.exports for n in public_names(s)}
    @property
    def file(self): return f'{self.room}/{self.name}.ipynb'.lstrip('/')
    def at(self, i): return f'{self.file}, cell {i}'


@dataclass
class House:
    "What a rule about one notebook has to know of the others"
    notebooks: list

    @cached_property
    def modules(self): return {nb.module: nb for nb in self.notebooks if nb.module}
    @cached_property
    def recipes(self):
        return {n.name for nb in self.notebooks if nb.room == 'papers'
                for _,s in nb.exports for n in definitions(s)}


@lru_cache(maxsize=None)
def tree(source): return ast.parse(source)
def is_export(source): return any(re.match(r'#\|\s*export[is]?\b', line) for line in directives(source))
def directives(source):
    lines = source.splitlines()
    return lines[:next((k for k,line in enumerate(lines) if not line.startswith('#|')), len(lines))]
def body(source): return '\n'.join(source.splitlines()[len(directives(source)):]).strip('\n')
def n_lines(sources): return sum(bool(line.strip()) for s in sources for line in body(s).splitlines())
def private(name): return name.startswith('_') and not re.fullmatch('__.*__', name)
def definitions(source):
    return [n for n in tree(source).body
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and not n.name.startswith('_')]

def public_names(source):
    "What nbdev puts into `__all__`: all names without underscore but methods that are patched in"
    assigned = [t for n in tree(source).body if isinstance(n, (ast.Assign, ast.AnnAssign, ast.AugAssign))
                for t in (n.targets if isinstance(n, ast.Assign) else [n.target])]
    names = [t.id for T in assigned for t in getattr(T, 'elts', [T]) if isinstance(t, ast.Name)]
    return [n.name for n in definitions(source)
            if not any(ast.unparse(d).startswith('patch') for d in n.decorator_list)] + [
            n for n in names if not n.startswith('_')]

def imports(source):
    "What a cell imports of this package: ('attacks.loop', name), or None for the name where it is the module"
    for n in ast.walk(tree(source)):
        if isinstance(n, ast.Import):
            yield from ((a.name.partition('.')[2], None) for a in n.names if a.name.startswith('refine_nb.'))
        if isinstance(n, ast.ImportFrom) and n.module == 'refine_nb':
            yield from ((a.name, None) for a in n.names)
        if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('refine_nb.'):
            yield from ((n.module.partition('.')[2], a.name) for a in n.names)

def place(module):
    "Where the notebook of a module lies, as far as the module's name says it"
    room, _, stem = module.partition('.')
    if room == 'artefacts': return f'nbs/{stem}.ipynb'
    return f"nbs/{room}/{f'99_{room}' if stem == '__init__' else f'NN_{stem}'}.ipynb"


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

def lies_where_it_belongs(nb, _=None):
    if nb.room not in ('', *ROOMS): wrong = f'there is no room {nb.room}, only {", ".join(ROOMS)} and the top'
    elif nb.room and nb.number is None: wrong = "a room's notebooks are named NN_name, by their order"
    elif not nb.room and not TOP.fullmatch(nb.name):
        wrong = f'the top is for artefacts: tab<number>_, fig<number>_, study_, claims_, {", ".join(ACROSS)}'
    elif nb.module is None and nb.exports: wrong = f'it wants default_exp {nb.module_here}'
    elif nb.module not in (None, nb.module_here):
        wrong = f'from here default_exp would be {nb.module_here}, and it is {nb.module}'
    else: return
    home = nb.module and place(nb.module)
    yield f'{nb.file}: {wrong}' + (f': it belongs in {home}' if home else '')

def imports_keep_the_order(nb, house):
    for i,s,_ in nb.code:
        for path,name in imports(body(s)):
            if name and f'{path}.{name}' in house.modules: path, name = f'{path}.{name}', None
            if not path.startswith('_') and (wrong := out_of_order(nb, path, house)):
                yield f'{nb.at(i)}: imports {name or "all"} of refine_nb.{path}, {wrong}'

def out_of_order(nb, path, house):
    "What is wrong about importing `path`, a room or a module; None if nothing is"
    order, here = [*ROOMS, 'artefacts'], nb.room or 'artefacts'
    room, _, module = path.partition('.')
    if room not in order or module and path not in house.modules:
        return 'which no notebook exports: export it or remove the import'
    if room not in COMPONENTS and not module:
        return f'which has no front door: import its notebooks by module, refine_nb.{room}.<name>'
    if room == here:
        if not module and not nb.is_door:
            return f'its own room: inside a room import by module, refine_nb.{room}.<name>'
        if module and nb.room and (house.modules[path].number or 0) >= (nb.number or 0):
            return 'which is not from a lower number: move the shared part to one'
        return 'which is itself' if path == nb.module else None
    if here not in order or order.index(room) > order.index(here):
        above = ', '.join(order[:order.index(here)]) if here in order else ''
        return (f'a room below: from {here} only rooms above are seen ({above or "none"}): '
                'move the shared part up')
    if room in COMPONENTS and module:
        return f'past the front door: from refine_nb.{room} import ..., as it hands on every public name'

def private_names_stay_inside(nb, house):
    "A name with an underscore, imported from another room or reached through a module of one"
    here, far = nb.room or 'artefacts', {}
    for i,s,_ in nb.code:
        for n in ast.walk(tree(body(s))):
            if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('refine_nb'):
                path = n.module.split('.')[1:]
                for a in n.names:
                    if path and path[0] != here and private(a.name): yield walled(nb, i, a.name, path[0])
                    if [*path, a.name][0] != here: far[a.asname or a.name] = [*path, a.name][0]
            if isinstance(n, ast.Import):
                far |= {a.asname: a.name.split('.')[1] for a in n.names
                        if a.asname and a.name.startswith('refine_nb.') and a.name.split('.')[1] != here}
        for n in ast.walk(tree(body(s))):
            if not (isinstance(n, ast.Attribute) and private(n.attr)): continue
            of = ast.unparse(n.value)
            room = of.split('.')[1] if of.startswith('refine_nb.') else far.get(of, here)
            if room != here: yield walled(nb, i, n.attr, room)

def walled(nb, i, name, room):
    return (f'{nb.at(i)}: uses {name}, a private name of {room}: '
            'make it public there, or move it to a room above both')

def no_star_imports(nb, _=None):
    for i,s,_ in nb.code:
        if any(isinstance(n, ast.ImportFrom) and n.names[0].name == '*' for n in ast.walk(tree(body(s)))):
            yield f'{nb.at(i)}: imports a star: name what you need, a reader must see where a name is from'

def recipes_are_no_settings(nb, house):
    "Two papers may have a `baseline` each. In a key both would be 'baseline', so neither may get into one"
    for i,s,_ in nb.code:
        for n in ast.walk(tree(body(s))):
            if not (isinstance(n, ast.Call) and getattr(n.func, 'id', None) == 'call'): continue
            given = {getattr(v, 'id', None) for v in (*n.args, *(k.value for k in n.keywords))}
            for name in given & house.recipes:
                yield (f'{nb.at(i)}: {ast.unparse(n)} makes a setting of {name}, a function in papers/, '
                       'whose names need not be unique, as keys need them: move it to a room above')

def one_parameters_cell(nb, _=None):
    if not nb.is_artefact: return
    tagged = [(i,s) for i,s,c in nb.code if 'parameters' in c['metadata'].get('tags', [])]
    if len(tagged) != 1 and (tagged or nb.name not in ACROSS):
        yield f'{nb.file}: {len(tagged)} code cells are tagged "parameters": papermill wants exactly one'
    for i,s in tagged:
        if is_export(s):
            yield f'{nb.at(i)}: the parameters are exported: they belong to the run, not to the library'
        for n in tree(body(s)).body:
            try:
                plain = (isinstance(n, ast.Assign) and len(n.targets) == 1
                         and isinstance(n.targets[0], ast.Name) and (ast.literal_eval(n.value), True)[1])
            except ValueError: plain = False
            if not plain:
                yield (f'{nb.at(i)}: "{ast.unparse(n)}" is not "name = literal": '
                       'papermill replaces plain literals only')

HOW = {'preset', 'device', 'workers', 'budget'} # read by the sheet

def parameters_are_read(nb, _=None):
    "Each by name, or all of them as `asked`: one that nobody reads is a promise that is not kept"
    if not nb.is_artefact: return
    tagged = {i: body(s) for i,s,c in nb.code if 'parameters' in c['metadata'].get('tags', [])}
    read = {n.attr for i,s,_ in nb.code if i not in tagged for n in ast.walk(tree(body(s)))
            if isinstance(n, ast.Attribute)}
    for i,s in tagged.items():
        for n in tree(s).body if 'asked' not in read else ():
            if isinstance(n, ast.Assign) and (name := ast.unparse(n.targets[0])) not in read | HOW:
                yield f'{nb.at(i)}: nothing reads the parameter {name}: hand it on, or leave it out'

def kernel_is_python(nb, _=None):
    spec = nb.raw['metadata'].get('kernelspec', {})
    if (spec.get('name'), spec.get('language')) != ('python3', 'python'):
        yield f'{nb.file}: kernelspec is {spec}: papermill needs name python3 and language python'

def notebooks_are_short(nb, _=None):
    if not nb.room: return
    if (n := len(nb.cells)) > CELLS:
        yield f'{nb.file}: {n} cells, at most {CELLS}: make two notebooks of two ideas'
    if (n := n_lines(s for _,s in nb.exports)) > EXPORTED:
        yield f'{nb.file}: exports {n} lines, at most {EXPORTED}: make two notebooks of two ideas'

def artefacts_are_short(nb, _=None):
    if not nb.is_artefact: return
    if (n := len(nb.cells)) > PAGE:
        yield f'{nb.file}: {n} cells, at most {PAGE} make a page: leave to the sheet what every page does'
    if (n := n_lines(s for _,s,_ in nb.code)) > CODE:
        yield (f'{nb.file}: {n} lines of code, at most {CODE} can be read beside the table: '
               'move what others need to a room, and a question of our own to a study')

def code_lines_are_narrow(nb, _=None):
    for i,s,_ in nb.code:
        for k,line in enumerate(s.splitlines(), 1):
            if len(line) > COLUMNS: yield too_wide(f'{nb.at(i)}, line {k}', line)

def too_wide(where, line):
    return f'{where}: {len(line)} columns, at most {COLUMNS}: break it, or give a part of it a name'

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
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree(s).body}
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

RULES = [parses, directives_come_first, lies_where_it_belongs, imports_keep_the_order,
         private_names_stay_inside, no_star_imports, recipes_are_no_settings, one_parameters_cell,
         parameters_are_read, kernel_is_python, notebooks_are_short, artefacts_are_short,
         code_lines_are_narrow, export_cells_are_short, one_name_per_cell, public_names_have_a_line,
         imports_stand_alone, names_are_tested_nearby, outputs_are_fit_to_publish]

def names_are_unique(notebooks):
    """Over all rooms, as keys name a function by its public name. Two papers may have a `baseline` each:
    recipes are imported by module, and are no settings. Every artefact may have a `grid` of its own"""
    where = {}
    for nb in notebooks:
        for name in sorted(nb.public) if nb.room else (): where.setdefault(name, []).append(nb)
    for name,nbs in where.items():
        if len(nbs) > 1 and any(nb.room != 'papers' for nb in nbs):
            yield (f'{name} is public in {" and ".join(nb.file for nb in nbs)}: one name, one meaning, '
                   'as a key names a function by its public name: rename one or import it')

def doors_hand_on_what_is_public(notebooks):
    for room in COMPONENTS:
        inside = [nb for nb in notebooks if nb.room == room]
        doors = [nb for nb in inside if nb.is_door]
        if not doors:
            if inside: yield f'nbs/{room}/ has no 99_{room}.ipynb, its front door'
            continue
        (door,) = doors
        wanted = {(nb.module, name) for nb in inside if nb is not door for name in nb.public}
        code = [tree(s) for _,s in door.exports]
        handed = [v.value for t in code for n in t.body
                  if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', None) == '_all_'
                  for v in n.value.elts]
        got = [found for _,s in door.exports for found in imports(s)]
        for what,names in (('imports', got), ('_all_', handed)):
            for name in (k for k,n in Counter(names).items() if n > 1):
                yield f'{door.file}: {what} has {shown(name)} twice: once is enough'
        lacking = wanted - set(got) | {(m, n) for m,n in wanted if n not in handed}
        for module in sorted({m for m,_ in lacking}):
            names = ', '.join(sorted(n for m,n in lacking if m == module))
            yield f'{door.file}: does not hand on {names} of {module}: add them to the imports and to _all_'
        if more := {n for _,n in set(got) - wanted} | set(handed) - {n for _,n in wanted}:
            yield (f'{door.file}: hands on {", ".join(sorted(more))}, which no notebook of {room} '
                   'makes public there: remove them')

def shown(name): return name if isinstance(name, str) else name[1]

def doors_hide_no_module(notebooks):
    for nb in notebooks:
        for other in notebooks if nb.room in COMPONENTS and not nb.is_door else ():
            if other.room == nb.room and nb.stem in other.public:
                yield (f'{nb.file} has the name of {nb.stem}, which is public in {other.file}: '
                       'the front door would hide one of them: rename the notebook')

def modules_are_unique(notebooks):
    where = {}
    for nb in notebooks:
        if nb.module: where.setdefault(nb.module, []).append(nb.file)
    for module,nbs in where.items():
        if len(nbs) > 1:
            yield (f'{" and ".join(nbs)} both have default_exp {module}: '
                   'the later one silently wins: rename one')

def excuses_are_needed(notebooks, excused=None):
    excused = EXCUSED if excused is None else excused
    for name in excused:
        found = [nb for nb in notebooks if nb.is_artefact and nb.name == name]
        if not found: yield f'EXCUSED names {name}, which is not there: remove its line'
        elif not list(artefacts_are_short(*found)):
            yield f'{name} is short enough now: remove its line in EXCUSED'


# ---- the notebooks of this checkout ------------------------------------------------------------------------

def read(nbs):
    "Of a folder and all folders in it but those that nbdev skips, such as .ipynb_checkpoints and _proc"
    files = sorted(p.relative_to(nbs) for p in nbs.rglob('*.ipynb'))
    return [Notebook(p.stem, json.loads((nbs/p).read_text(encoding='utf-8')), '/'.join(p.parts[:-1]))
            for p in files if not any(part[0] in '._' for part in p.parts)]

NOTEBOOKS = read(ROOT/'nbs')
HOUSE = House(NOTEBOOKS)
TOGETHER = [names_are_unique, modules_are_unique, doors_hand_on_what_is_public, doors_hide_no_module,
            excuses_are_needed]

def no(sentences):
    sentences = list(sentences)
    if sentences: pytest.fail('\n'.join(sentences), pytrace=False)

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda nb: nb.file.removesuffix('.ipynb'))
def test_notebook(nb):
    no(parses(nb))
    rules = [rule for rule in RULES if rule is not artefacts_are_short or nb.name not in EXCUSED]
    no(sentence for rule in rules for sentence in rule(nb, HOUSE))

@pytest.mark.parametrize('rule', TOGETHER, ids=lambda r: r.__name__)
def test_notebooks_together(rule): no(rule(NOTEBOOKS))

def test_there_are_notebooks():
    empty = {'', *ROOMS} - {nb.room for nb in NOTEBOOKS}
    assert not empty, f'rooms without notebooks, whose checks pass for nothing: {empty}'

def test_notebooks_are_small():
    each = {p.name: p.stat().st_size for p in (ROOT/'nbs').rglob('*.ipynb')}
    large = [n for n,size in each.items() if size > 1e3*KILOBYTES]
    assert not large, f'{large} take over {KILOBYTES} kB each: show smaller figures, or fewer'
    size = sum(each.values())/1e6
    assert size < MEGABYTES, (f'the notebooks take {size:.1f} MB, at most {MEGABYTES}: '
                              'keep outputs only for small figures and tables')

def settings():
    ini = ConfigParser(delimiters=['=']); ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

def test_nbdev_clean_keeps_the_parameters_tag():
    assert 'tags' in settings().get('allowed_cell_metadata_keys', '').split(), (
        'settings.ini needs allowed_cell_metadata_keys = tags: without it a "paper" run silently is the demo')

def test_nbdev_enters_the_rooms():
    assert settings().get('recursive') == 'True', (
        'settings.ini needs recursive = True: without it nbdev sees the top of nbs/ only')


# ---- the package and its data ------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """A copy of the checkout's sources; `copy(tool, *options)` runs a tool there and returns the folder.
    `within`: the folder of the copy from which it is run"""
    folder = tmp_path_factory.mktemp('checkout')
    shutil.copytree(ROOT/'nbs', folder/'nbs', ignore=shutil.ignore_patterns('.*', '_proc'))
    shutil.copytree(ROOT/'refine_nb', folder/'refine_nb', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('settings.ini', 'setup.py', 'README.md'): shutil.copy(ROOT/name, folder/name)
    def run(tool, *options, within=''):
        command = Path(sys.executable).parent/tool
        if not command.exists():
            pytest.fail(f'{tool} is not installed beside this Python: pip install -e ".[dev]"', pytrace=False)
        done = subprocess.run([str(command), *options], cwd=folder/within, capture_output=True, text=True)
        assert done.returncode == 0, f'{tool} failed:\n{done.stdout}{done.stderr}'
        return folder
    return run

def differing(folder, other, pattern):
    "Files of one folder or the other, at any depth, that are not the same in both"
    mine, theirs = ({p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob(pattern)
                     if '.ipynb_checkpoints' not in p.parts} for f in (folder, other))
    return sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))

def stale(package, notebooks):
    "Modules of a package that no notebook exports; nbdev makes an empty `__init__` in each folder of modules"
    made = {nb.module.replace('.', '/') for nb in notebooks if nb.module} | {'__init__', '_modidx'}
    made |= {f"{module.rpartition('/')[0]}/__init__" for module in made if '/' in module}
    return sorted({p.relative_to(package).with_suffix('').as_posix() for p in package.rglob('*.py')} - made)

def test_package_is_in_step_with_the_notebooks(copy):
    assert not (left := stale(ROOT/'refine_nb', NOTEBOOKS)), (
        f'no notebook exports {left}: remove the files of notebooks that moved or were renamed')
    assert (out := differing(copy('nbdev_export')/'refine_nb', ROOT/'refine_nb', '*.py')) == [], (
        f'{out} differ from the notebooks: run nbdev_export; never edit the package by hand')

def test_notebooks_are_clean(copy):
    assert (out := differing(copy('nbdev_clean')/'nbs', ROOT/'nbs', '*.ipynb')) == [], (
        f'{out}: run nbdev_clean before you commit')

# with `copy` both begin from what is in step: a file that is gone or dirty must come back
def test_export_from_a_room_is_that_from_the_top(copy):
    package = copy('nbdev_export')/'refine_nb'
    before = {p: p.read_bytes() for p in package.rglob('*.py')}
    for name in ('base/progress.py', 'attacks/__init__.py', 'artefacts/tab1_adcorda.py'):
        (package/name).unlink()
    copy('nbdev_export', within='nbs/base')
    assert before == {p: p.read_bytes() for p in package.rglob('*.py')}

def test_clean_in_a_room_is_that_at_the_top(copy):
    nbs = copy('nbdev_clean')/'nbs'
    before = {p: p.read_bytes() for p in nbs.rglob('*.ipynb')}
    for name in ('base/30_progress', 'papers/00_adcorda', 'index'):
        file = nbs/f'{name}.ipynb'
        raw = json.loads(file.read_text(encoding='utf-8')); raw['metadata']['left'] = 'behind'
        file.write_text(json.dumps(raw), encoding='utf-8')
    copy('nbdev_clean', within='nbs/base')
    assert before == {p: p.read_bytes() for p in nbs.rglob('*.ipynb')}

@pytest.mark.parametrize('tool,options', [('nbdev_test', ['--path', '30_progress.ipynb', '--n_workers', '0']),
                                          ('papermill', ['30_progress.ipynb', '../../out.ipynb'])])
def test_a_notebook_runs_from_its_room(copy, tool, options): copy(tool, *options, within='nbs/base')

def published_ids(): return {p.stem for p in (ROOT/'refine_nb'/'published').glob('*.csv')}

def test_every_artefact_notebook_has_its_published_numbers():
    lacking = sorted(nb.name for nb in NOTEBOOKS if nb.is_artefact and re.match('tab|fig', nb.name)
                     and nb.name not in published_ids())
    assert not lacking, (
        f'refine_nb/published/ lacks {lacking}: write down what the paper prints, with source and notes')

def test_catalogue_and_artefacts_agree():
    "What is planned is listed too: only what is called ready needs a notebook and the printed numbers"
    from refine_nb.reporting import ARTEFACTS  # here: the rules are for a package that is broken, too
    ready, there = ({i for i,a in ARTEFACTS.items() if a.ready},
                    {nb.name for nb in NOTEBOOKS if nb.is_artefact})
    assert ready, 'the catalogue calls no artefact ready'
    assert not (lacking := sorted(ready - there)), (
        f'the catalogue calls {lacking} ready, but nbs/ has no such notebook')
    assert not (lacking := sorted(i for i in ready - published_ids() if re.match('tab|fig', i))), (
        f'refine_nb/published/ lacks {lacking}, which the catalogue calls ready')
    assert not (unlisted := sorted(there - ready)), (
        f'the catalogue does not call {unlisted} ready: add them')

def smells(file, name=None):
    "Undefined names, unused imports and the like, as pyflakes words them"
    for m in sorted(Checker(ast.parse(file.read_text(encoding='utf-8')), file.name).messages,
                    key=lambda m: m.lineno):
        hint = ': remove it, or import it in the cell that needs it' if isinstance(m, UnusedImport) else ''
        yield f'{name or file.name}:{m.lineno}: {m.message % m.message_args}{hint}'

# a test file may import a fixture, which looks unused
@pytest.mark.parametrize('folder', ['refine_nb', 'tools'])
def test_names_are_defined_and_imports_used(folder):
    no(s for f in sorted((ROOT/folder).rglob('*.py')) for s in smells(f, f.relative_to(ROOT)))

def too_wide_lines(file, name=None):
    "Lines of code that are too wide, but for what nbdev writes: the module's docstring, `__all__`"
    text = file.read_text(encoding='utf-8')
    free = {k for n in ast.parse(text).body for k in range(n.lineno, n.end_lineno+1)
            if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', None) == '__all__'}
    if '# AUTOGENERATED' in text: free.add(1)
    for k,line in enumerate(text.splitlines(), 1):
        if len(line) > COLUMNS and k not in free and not line.startswith('# AUTOGENERATED'):
            yield too_wide(f'{name or file.name}:{k}', line)

@pytest.mark.parametrize('folder', ['refine_nb', 'tests', 'tools', '.'])
def test_code_files_are_narrow(folder):
    files = sorted((ROOT/folder).glob('*.py') if folder == '.' else (ROOT/folder).rglob('*.py'))
    assert files, f'{folder} has no file: this checks nothing'
    no(s for f in files if f.name != '_modidx.py' for s in too_wide_lines(f, f.relative_to(ROOT)))


# ---- the checks themselves can fail ------------------------------------------------------------------------

def made_up(*sources, file='runs/30_bad', tags=(), outputs=(), kernel='python'):
    cell = lambda s: {'cell_type': 'code', 'source': s, 'metadata': {'tags': list(tags)},
                      'outputs': list(outputs)}
    room, _, name = file.rpartition('/')
    return Notebook(name, {'cells': [cell(s) for s in sources],
                           'metadata': {'kernelspec': {'name': 'python3', 'language': kernel}}}, room)

def exports(file, *sources):
    "A notebook that exports to where it lies"
    module = made_up(file=file).module_here
    return made_up(f'#| default_exp {module}', *(f'#| export\n{s}' for s in sources), file=file)

AROUND = [exports('base/00_core', 'def key(): pass\ndef _short(): pass'),
          exports('runs/10_makers', 'def make(): pass'), exports('runs/70_late', 'def late(): pass'),
          exports('reporting/30_report', 'def wilson(): pass'),
          exports('papers/00_adcorda', 'def baseline(): pass'),
          exports('papers/10_mixture', 'def baseline(): pass'), exports('tab1_adcorda', 'def grid(): pass')]
GOOD = ['#| default_exp runs.good',
        '#| export\nimport math\nfrom refine_nb.base import key\nfrom refine_nb.runs.makers import make',
        '#| export\ndef f(x):\n    "One line (source)"\n    return math.sin(x)',
        'from refine_nb.runs.makers import _weights\nassert f(0) == call(key, lr=.1)']
PAGE_GOOD = ['#| default_exp artefacts.tab1_good',
             'import refine_nb\nfrom refine_nb.artefacts.tab1_adcorda import grid\n'
             'from refine_nb.papers.mixture import baseline\nfrom refine_nb.reporting import wilson']
LONG = '#| export\ndef f(x):\n    "One line"\n' + '    x += 1\n'*LINES
TESTLESS = ['#| export\ndef f(x):\n    "One line"\n    return x', 'g(1)', 'ff(1)', 'f(1)']
FAR = json.dumps({'a': '/home/someone/x'})
PNG = {'output_type': 'display_data', 'data': {'image/png': 'AA/tmp/AA'}}
BAD = 'tab1_bad'
at_home = lambda module, file: made_up(f'#| default_exp {module}', file=file)

@pytest.mark.parametrize('rule, bad, says', [
    (parses, made_up('%matplotlib inline'), 'no magics'),
    (directives_come_first, made_up('# why\n#| export\ndef f(): pass'), 'is not at the top'),
    (lies_where_it_belongs, at_home('attacks.loop', 'vision/10_loop'),
     'default_exp would be vision.loop, and it is attacks.loop: it belongs in nbs/attacks/NN_loop.ipynb'),
    (lies_where_it_belongs, at_home('attacks.loop', 'attacks/10_parts'), 'would be attacks.parts, and it is'),
    (lies_where_it_belongs, at_home('attacks.__init__', 'attacks/10_attacks'),
     'it belongs in nbs/attacks/99_attacks.ipynb'),
    (lies_where_it_belongs, at_home('attacks.attacks', 'attacks/99_attacks'), 'would be attacks.__init__'),
    (lies_where_it_belongs, at_home('attacks.loop', 'attack/10_loop'), 'there is no room attack, only base'),
    (lies_where_it_belongs, at_home('attacks.loop', 'attacks/old/10_loop'), 'there is no room attacks/old'),
    (lies_where_it_belongs, at_home('attacks.loop', 'attacks/loop'), 'are named NN_name'),
    (lies_where_it_belongs, at_home('attacks.loop', '10_loop'),
     'the top is for artefacts: tab<number>_, fig<number>_, study_, claims_, scoreboard, matrix, errata: '
     'it belongs in nbs/attacks/NN_loop.ipynb'),
    (lies_where_it_belongs, at_home('artefacts.tab1_x', 'papers/20_tab1_x'),
     'it belongs in nbs/tab1_x.ipynb'),
    (lies_where_it_belongs, at_home('tab1_x', 'tab1_x'), 'would be artefacts.tab1_x, and it is tab1_x'),
    (lies_where_it_belongs, at_home('artefacts.table', 'table'), 'the top is for artefacts'),
    (lies_where_it_belongs, made_up('#| export\nx = 1', file='base/10_a'), 'it wants default_exp base.a'),
    (imports_keep_the_order, made_up('from refine_nb.reporting import wilson'),
     'imports wilson of refine_nb.reporting, a room below: from runs only rooms above are seen (base, '),
    (imports_keep_the_order, made_up('from refine_nb.runs.late import late'),
     'imports late of refine_nb.runs.late, which is not from a lower number'),
    (imports_keep_the_order, exports('runs/70_late', 'import refine_nb.runs.late'),
     'not from a lower number'),  # not even itself
    (imports_keep_the_order, made_up('from refine_nb import reporting as r'),
     'imports all of refine_nb.reporting, a room below'),
    (imports_keep_the_order, made_up('import refine_nb.reporting.report as r'), 'a room below'),
    (imports_keep_the_order, made_up('from refine_nb.runs import make'),
     'inside a room import by module, refine_nb.runs.<name>'),
    (imports_keep_the_order, made_up('from refine_nb.runs import late'), 'refine_nb.runs.late, which is not'),
    (imports_keep_the_order, made_up('from refine_nb.base.core import key'),
     'imports key of refine_nb.base.core, past the front door: from refine_nb.base import ...'),
    (imports_keep_the_order, made_up('from refine_nb.base import core', file=BAD), 'past the front door'),
    (imports_keep_the_order, made_up('from refine_nb.papers import baseline', file=BAD), 'no front door'),
    (imports_keep_the_order, made_up('from refine_nb.papers.adcorda import baseline'), 'a room below'),
    (imports_keep_the_order, made_up('def f():\n    from refine_nb.artefacts.tab1_adcorda import grid'),
     'a room below'),
    (imports_keep_the_order, exports('tab1_adcorda', 'import refine_nb.artefacts.tab1_adcorda'), 'is itself'),
    (imports_keep_the_order, made_up('from refine_nb.runs.gone import f'), 'no notebook exports'),
    (imports_keep_the_order, made_up('from refine_nb.core import key'), 'no notebook exports'),
    (private_names_stay_inside, made_up('from refine_nb.base.core import _short as s'),
     'uses _short, a private name of base: make it public there'),
    (private_names_stay_inside, made_up('import refine_nb.base.core as m', 'm._short()'), 'uses _short'),
    (private_names_stay_inside, made_up('from refine_nb.base import core', 'core._short()'), 'uses _short'),
    (private_names_stay_inside, made_up('import refine_nb\nrefine_nb.base.core._short()'), 'uses _short'),
    (no_star_imports, made_up('from refine_nb.base import *'), 'imports a star'),
    (recipes_are_no_settings, made_up('call(baseline, n=1)', file=BAD), 'makes a setting of baseline'),
    (recipes_are_no_settings, made_up('call(f, init=baseline)', file='papers/20_a'), 'setting of baseline'),
    (one_parameters_cell, made_up('preset = None', file=BAD), '0 code cells'),
    (one_parameters_cell, made_up('a = 1', 'b = 2', file=BAD, tags=['parameters']), '2 code cells'),
    (one_parameters_cell, made_up('a = 1', 'b = 2', file='matrix', tags=['parameters']), '2 code cells'),
    (one_parameters_cell, made_up('eps = 8/255', file='fig1_bad', tags=['parameters']),
     '"eps = 8 / 255" is not'),
    (one_parameters_cell, made_up('print(1)', file='study_bad', tags=['parameters']), '"print(1)" is not'),
    (parameters_are_read, made_up('images = True', file=BAD, tags=['parameters']), 'parameter images'),
    (kernel_is_python, made_up(kernel=None), 'language python'),
    (notebooks_are_short, made_up(*['1']*(CELLS+1)), '46 cells, at most 45'),
    (notebooks_are_short, made_up(*['#| export\n\nx = 1\n']*(EXPORTED+1)), 'exports 251 lines, at most 250'),
    (artefacts_are_short, made_up(*['1']*(PAGE+1), file=BAD), '21 cells, at most 20'),
    (artefacts_are_short, made_up('#| hide\n' + '1\n\n'*(CODE+1), file='errata'), '101 lines of code'),
    (code_lines_are_narrow, made_up('#| hide\n"""\n' + 'x'*(COLUMNS+1) + '"""'), 'line 3: 114 columns'),
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
    found = list(rule(bad, House([*AROUND, bad])))
    assert any(says in sentence for sentence in found), f'{rule.__name__} does not see it: {found}'

@pytest.mark.parametrize('rule', RULES, ids=lambda r: r.__name__)
def test_a_good_notebook_passes(rule):
    good = made_up(*GOOD, file='runs/40_good', outputs=[PNG])
    page = made_up('preset = None  # "demo"', file='tab1_good', tags=['parameters'])
    more = made_up(*PAGE_GOOD, file='tab1_good', tags=['parameters'])
    assert not list(rule(good, House([*AROUND, good])))
    assert not list(rule(page, House([page])))
    if rule is not one_parameters_cell: assert not list(rule(more, House([*AROUND, more])))
    assert not list(rule(made_up('from refine_nb.runs import make', file='index'), House(AROUND)))

def test_every_rule_about_a_notebook_has_a_made_up_case():
    (cases,) = [m.args[1] for m in test_a_bad_notebook_is_found.pytestmark if m.name == 'parametrize']
    assert {rule for rule,*_ in cases} == set(RULES)

def test_a_short_notebook_passes():
    assert not list(notebooks_are_short(made_up(*['#| export\n\n1\n1\n1\n1\n1']*CELLS)))
    assert not list(artefacts_are_short(made_up(*['#| hide\n1\n\n1\n1\n1\n1']*PAGE, file=BAD)))
    assert not list(artefacts_are_short(made_up('1\n'*200, file='index')))

def test_two_of_a_name_are_found():
    a, b = (made_up('#| default_exp m\n#| export\ndef f(): pass', file='base/10_a'),
            made_up('#| default_exp m\n#| export\nf, g = 1, 2', file='runs/20_b'))
    assert list(names_are_unique([a, b])) == [
        'f is public in base/10_a.ipynb and runs/20_b.ipynb: one name, one meaning, '
        'as a key names a function by its public name: rename one or import it']
    assert (len(list(modules_are_unique([a, b]))) == 1
            and not list(names_are_unique([a])) + list(modules_are_unique([b])))

def test_only_papers_may_share_a_name():
    assert not list(names_are_unique(AROUND))  # two papers have a `baseline`
    assert len(list(names_are_unique([*AROUND, exports('runs/50_a', 'baseline = 1')]))) == 1
    assert not list(names_are_unique([*AROUND, exports('tab2_a', 'def grid(): pass\ndef key(): pass')]))

def test_public_names_are_those_of_nbdev():
    assert public_names('def f(): pass\n@patch\ndef g(self:A): pass\n@patch(as_prop=True)\ndef h(self:A): 1\n'
                        'a, _b = 1, 2\nC:int = 3\n_all_ = []\nclass D: e = 1\na.b = 2') == [
                        'f', 'D', 'a', 'C']

IN = [exports('base/00_core', 'def key(): pass\ndef _short(): pass', 'A = 1'),
      exports('base/10_more', 'def more(): pass')]
def door(imports, *names): return exports('base/99_base', imports, f'_all_ = {list(names)}')
FRONT = 'from refine_nb.base.core import A, key\nfrom refine_nb.base.more import more'

@pytest.mark.parametrize('inside,says', [
    (IN, ['nbs/base/ has no 99_base.ipynb, its front door']),
    ([*IN, door(FRONT, 'A', 'key', 'more')], []),
    ([*IN, door(FRONT, 'A', 'more')], ['does not hand on key of base.core: add them']),
    ([*IN, door(FRONT.replace(', key', ''), 'A', 'key', 'more')], ['does not hand on key of base.core']),
    ([*IN, door(FRONT, 'A', 'key', 'more', 'key')], ['_all_ has key twice']),
    ([*IN, door(FRONT+', more', 'A', 'key', 'more')], ['imports has more twice']),
    ([*IN, door(FRONT+', _short', 'A', 'key', 'more')], ['hands on _short, which no notebook of base makes']),
    ([*IN, door(FRONT, 'A', 'key', 'more', 'gone')], ['hands on gone, which no notebook']),
    ([*IN, door(FRONT.replace('core', 'more'), 'A', 'key', 'more')],
     ['does not hand on A, key of base.core', 'hands on A, key, which']),
    ([exports('papers/00_a', 'x = 1'), exports('tab1_a', 'y = 1')], [])])
def test_a_wrong_front_door_is_found(inside, says):
    found = list(doors_hand_on_what_is_public(inside))
    assert len(found) == len(says) and all(a in b for a,b in zip(says, found)), found

def test_a_hidden_module_is_found():
    (found,) = doors_hide_no_module([*IN[1:], exports('base/99_base', 'base = 1')])
    assert found.startswith('base/10_more.ipynb has the name of more, which is public in base/10_more.ipynb')
    assert not list(doors_hide_no_module([IN[0], exports('runs/10_core', 'def make(): pass'),
                                          exports('runs/20_key', 'x = 1')]))

def test_an_excuse_that_is_not_needed_is_found():
    long, short = made_up(*['1']*(PAGE+1), file='tab1_long'), made_up('1', file='tab1_short')
    excused = {'tab1_long': 'so', 'tab1_short': 'so', 'tab1_gone': 'so'}
    assert list(excuses_are_needed([long, short], excused)) == [
        'tab1_short is short enough now: remove its line in EXCUSED',
        'EXCUSED names tab1_gone, which is not there: remove its line']

def test_notebooks_of_rooms_are_found(tmp_path):
    for file in ('a.ipynb', 'base/10_b.ipynb', 'base/old/c.ipynb', 'base/.ipynb_checkpoints/d.ipynb',
                 '_proc/base/e.ipynb', '.f/g.ipynb', 'base/_h.ipynb'):
        (tmp_path/file).parent.mkdir(parents=True, exist_ok=True); (tmp_path/file).write_text('{}')
    assert [nb.file for nb in read(tmp_path)] == ['a.ipynb', 'base/10_b.ipynb', 'base/old/c.ipynb']

def test_a_bad_name_is_found(tmp_path):
    (tmp_path/'m.py').write_text('import os\nimport re\nre.compile(pattern)\n')
    assert list(smells(tmp_path/'m.py')) == ["m.py:1: 'os' imported but unused: remove it, or import it in "
                                             "the cell that needs it", "m.py:3: undefined name 'pattern'"]

def test_a_wide_line_is_found(tmp_path):
    wide = 'x'*(COLUMNS+1)
    (tmp_path/'m.py').write_text(f'"""{wide}"""\n\n# AUTOGENERATED {wide}\n'
                                 f'__all__ = ["{wide}",\n   "{wide}"]\n# {wide}\n')
    assert list(too_wide_lines(tmp_path/'m.py')) == [
        'm.py:6: 113 columns, at most 110: break it, or give a part of it a name']
    (tmp_path/'m.py').write_text(f'"""{wide}"""\n{wide[1:]}\n')
    assert [s.partition(': ')[0] for s in too_wide_lines(tmp_path/'m.py')] == ['m.py:1']

def test_a_changed_file_is_found(tmp_path):
    for folder in ('a', 'b'):
        (tmp_path/folder/'in').mkdir(parents=True); (tmp_path/folder/'in'/'x.py').write_text(folder)
        (tmp_path/folder/'same.py').write_text('')
    (tmp_path/'b'/'stale.py').write_text(''); (tmp_path/'a'/'x.py').write_text('')
    assert differing(tmp_path/'a', tmp_path/'b', '*.py') == ['in/x.py', 'stale.py', 'x.py']

def test_a_stale_module_is_found(tmp_path):
    for file in ('__init__', '_modidx', 'core', 'base/__init__', 'base/core', 'base/old', 'gone/__init__'):
        (tmp_path/file).parent.mkdir(exist_ok=True); (tmp_path/f'{file}.py').write_text('')
    assert stale(tmp_path, AROUND) == ['base/old', 'core', 'gone/__init__']

def test_the_network_is_shut_and_the_cache_is_empty(refine_home):
    with pytest.raises(AssertionError, match='must not use the network'):
        socket.create_connection(('192.0.2.1', 80), timeout=1)  # RFC 5737: nobody's address
    assert os.environ['REFINE_HOME'] == str(refine_home) and not refine_home.exists()
