"""Which code made the outputs that a notebook stores

A hash over its code cells, the modules that it imports, and the numbers that it shows. `make notebooks`
writes the hashes to nbs/outputs.json; a test compares them with the current code.
"""
import ast, hashlib, io, json, sys, tokenize
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MADE = 'outputs.json' # in nbs/: notebook -> hash of what made its outputs


def code_of(notebook):
    "All code cells of a notebook as one text"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')

def bare(source):
    "Source without comments and empty lines: only what affects its behaviour"
    lines = source.splitlines()
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type == tokenize.COMMENT: lines[t.start[0]-1] = lines[t.start[0]-1][:t.start[1]]
    return '\n'.join(line.rstrip() for line in lines if line.strip()).encode()

@lru_cache(maxsize=None)
def read(path, changed): # `changed`: a time, so that a rewritten file is read again
    "A file of the package as a tree and as bare source"
    source = path.read_text(encoding='utf-8')
    return ast.parse(source), bare(source)

def module(path): return read(path, path.stat().st_mtime_ns)

def imports(tree, package):
    "Dotted names below `package` that some code imports; the caller resolves relative ones"
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from (a.name for a in n.names if a.name.partition('.')[0] == package)
        if isinstance(n, ast.ImportFrom) and n.level == 0 and (n.module or '').partition('.')[0] == package:
            yield n.module
            yield from (f'{n.module}.{a.name}' for a in n.names)

def relative(tree, module, is_package):
    "Dotted names that a module of the package imports relatively"
    parts = module.split('.') if is_package else module.split('.')[:-1]
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and n.level:
            base = parts[:len(parts)-n.level+1] + ([n.module] if n.module else [])
            yield '.'.join(base)
            yield from ('.'.join([*base, a.name]) for a in n.names)

@lru_cache(maxsize=None) # cleared before the tree is examined again
def files(dotted, root):
    "The file of a module; for a room, its front door and all of its modules; nothing if it is no module"
    path = root.joinpath(*dotted.split('.'))
    if (path/'__init__.py').exists() and '.' in dotted and path.name != 'artefacts':
        return sorted(path.glob('*.py'))
    return [path.with_suffix('.py')] if path.with_suffix('.py').exists() else []

@lru_cache(maxsize=None)
def wants(path, changed, root):
    "Dotted names that a file of the package imports from it"
    dotted, tree = '.'.join(path.relative_to(root).with_suffix('').parts), read(path, changed)[0]
    inside = relative(tree, dotted.removesuffix('.__init__'), path.name == '__init__.py')
    return frozenset({*imports(tree, 'refine_nb'), *inside})

def behind(names, root):
    "All files of the package that these names need, sorted"
    todo, seen = [f for n in names for f in files(n, root)], set()
    while todo:
        if (f := todo.pop()) in seen: continue
        seen.add(f)
        todo += [g for n in wants(f, f.stat().st_mtime_ns, root) for g in files(n, root)]
    return sorted(seen)

def shown(notebook, root):
    "The files of the numbers that a page shows: those printed, and its reports; a component has none"
    if notebook.parent.name != 'nbs': return []
    paper = notebook.stem.rpartition('_')[2]
    mine = '*' if notebook.stem in ('index', 'scoreboard', 'matrix', 'errata') else f'*_{paper}'
    kept = [*root.glob(f'reports/{mine}/**/tidy.csv'), *root.glob(f'reports/{mine}/**/run.json')]
    printed = root.glob(f'refine_nb/published/{mine}.csv')
    return sorted(printed) + sorted(f for f in kept if 'demo' not in f.parts)

def made_by(notebook, root=ROOT):
    "Hash of everything that determines a notebook's outputs"
    files.cache_clear()
    return hashed(notebook, root)

def hashed(notebook, root): # with the files found before
    h, code = hashlib.sha256(), code_of(notebook)
    h.update(bare(code))
    for f in behind(imports(ast.parse(code), 'refine_nb'), root): h.update(module(f)[1])
    for f in shown(notebook, root): h.update(f.read_bytes())
    return h.hexdigest()[:16]

def notebooks(root=ROOT):
    return sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def recorded(root=ROOT):
    "notebook, relative to nbs/ -> the hash beside its outputs"
    file = root/'nbs'/MADE
    return json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}

def record(done, root=ROOT):
    "Record what made the outputs of the notebooks just run; forget those that are gone"
    nbs = root/'nbs'
    there = {p.relative_to(nbs).as_posix(): p for p in notebooks(root)}
    known = {name: h for name,h in recorded(root).items() if name in there}
    files.cache_clear()
    known |= {p.relative_to(nbs).as_posix(): hashed(p, root) for p in done}
    (nbs/MADE).write_text(json.dumps(dict(sorted(known.items())), indent=1)+'\n', encoding='utf-8')

def stale(root=ROOT):
    "Notebooks whose stored outputs were made by other than the current code, as far as is recorded"
    known = recorded(root)
    there = {p.relative_to(root/'nbs').as_posix(): p for p in notebooks(root)}
    files.cache_clear()
    return [name for name,p in there.items() if name in known and known[name] != hashed(p, root)]

def unmarked(root=ROOT):
    "Notebooks with no recorded hash: they have not been run since hashes were introduced"
    return [n for p in notebooks(root) if (n := p.relative_to(root/'nbs').as_posix()) not in recorded(root)]


if __name__ == '__main__':
    gone = stale()
    print('\n'.join(gone) or 'no stored output is known to come from other than the current code')
    print(f'{len(unmarked())} notebooks have not been run since hashes were introduced')
    sys.exit(bool(gone))
