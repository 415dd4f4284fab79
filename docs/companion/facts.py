"What the repository says about itself, read from its files; nothing is imported, so torch is not needed"
import ast, csv, json, re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS, REPORTS, PACKAGE = ROOT/'nbs', ROOT/'reports', ROOT/'refine_nb'
SCALES = ('paper', 'gpu', 'small')  # the largest first; a demo is no result
KEY = re.compile(r'\b[0-9a-f]{20}\b')

def text_of(path): return path.read_text(encoding='utf-8')
def rows_of(path):
    with open(path, encoding='utf-8', newline='') as f: return list(csv.DictReader(f))

@cache
def notebook(name): # below nbs/, without ending
    return json.loads(text_of(NBS/f'{name}.ipynb'))

def outputs(name, mime='text/markdown'):
    "What the cells of a notebook show, in order"
    for cell in notebook(name)['cells']:
        for o in cell.get('outputs', []):
            if mime in o.get('data', {}): yield ''.join(o['data'][mime])

# ---- the library --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Module:
    "A module of the package, and the notebook that it is exported from"
    name: str     # 'refine_nb.attacks.gradient'
    notebook: str # 'attacks/20_gradient', below nbs/
    public: tuple
    docs: dict    # public name -> its docstring

    @property
    def room(self): return self.notebook.rpartition('/')[0]

def module(path):
    text = text_of(path); tree = ast.parse(text)
    made = re.search(r'File to edit: (?:\.\./)+nbs/(\S+)\.ipynb', text)
    if not made: return None
    public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)
                   and getattr(n.targets[0], 'id', '') == '__all__'), ())
    docs = {n.name: ast.get_docstring(n) or '' for n in tree.body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    return Module(name, made[1], tuple(public), docs)

MODULES = {m.notebook: m for m in map(module, sorted(PACKAGE.rglob('*.py'))) if m}
ROOMS = {n.rpartition('/')[0]: m for n,m in MODULES.items() if '/99_' in n} # room -> its front door
LIBRARY = [MODULES.get(n) or Module('', n, (), {})  # some are examples only
           for p in sorted(NBS.glob('*/[0-9]*.ipynb')) if '/99_' not in (n := f'{p.parent.name}/{p.stem}')]
_homes = {}
for m in LIBRARY:
    for n in m.public: _homes.setdefault(n, []).append(m)
HOME = {n: ms[0] for n,ms in _homes.items() if len(ms) == 1} # names that have one meaning

def rooms(): # in the order of the imports, as the house has them
    order = re.findall(r'^\| `(\w+)/` \|', text_of(ROOT/'CONTRIBUTING.md'), re.M)
    return sorted({m.room for m in LIBRARY}, key=lambda r: order.index(r) if r in order else len(order))

# ---- the documents ------------------------------------------------------------------------------
def catalogue():
    "PAPERS and ARTEFACTS, by running only the statements of the module that define them"
    path = next(p for p in sorted(PACKAGE.rglob('*.py')) if re.search(r'^ARTEFACTS = ', text_of(p), re.M))
    plain = (ast.Assign, ast.AugAssign, ast.ClassDef)
    body = [n for n in ast.parse(text_of(path)).body if isinstance(n, plain)]
    names = {'dataclass': dataclass, '__name__': __name__}
    for n in body:
        try: exec(compile(ast.Module([n], []), str(path), 'exec'), names)
        except NameError: pass # needs what is imported: not of the catalogue
    return names['PAPERS'], names['ARTEFACTS']

PAPERS, ARTEFACTS = catalogue()

def conflicts():
    "Open points: code -> (paper or 'across', row)"
    return {r['conflict']: (f.stem.removeprefix('conflicts_'), r)
            for f in sorted((PACKAGE/'published').glob('conflicts_*.csv')) for r in rows_of(f)}

# ---- reports ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    "A report that is stored"
    folder: Path

    @property
    def parts(self): return self.folder.relative_to(REPORTS).parts
    @property
    def artefact(self): return self.parts[0]
    @property
    def preset(self): return self.parts[1]
    @property
    def variant(self): return ' '.join(self.parts[2:])
    @property
    def label(self):
        return self.preset + (f": {' on '.join(self.parted)}" if self.variant else '')
    @property
    def parted(self): # network and data set; the name of either may have an underscore
        known = re.fullmatch(r'(.+?)_((?:cifar10|cifar100|cinic10|mnist|digits)(?:_.+)?)', self.variant)
        return known.groups() if known else (self.variant,)
    @property
    def short(self): # the data set's name where another run of this scale is there
        beside = sum((r.artefact, r.preset) == (self.artefact, self.preset) for r in RUNS) > 1
        return self.preset + (f", {self.parted[-1]}" if beside and self.variant else '')
    @property
    def page(self): return '/'.join(('runs', *self.parts))
    @property
    def record(self): return record(self.folder)
    @property
    def keys(self): return [m['key'] for m in self.record.get('made', [])]
    def file(self, name):
        return f if (f := self.folder/name).exists() else None

@cache
def record(folder): return json.loads(text_of(folder/'run.json'))

def runs():
    "All stored runs, the largest scale first; of one artefact, the JPEG edition last"
    def rank(p): return p.relative_to(REPORTS).parts[0], 'jpeg' in p.parent.name, p
    found = [p for scale in SCALES for p in sorted(REPORTS.glob(f'*/{scale}/**/run.json'), key=rank)]
    return [Run(p.parent) for p in found
            if not any(part.startswith('.') for part in p.relative_to(REPORTS).parts)]

RUNS = runs()
PAGE_OF = {}  # key -> page of the largest run that has its record
for r in RUNS:
    for k in r.keys: PAGE_OF.setdefault(k, r.page)

def runs_of(artefact): return [r for r in RUNS if r.artefact == artefact]
