"""Everything worth running while a GPU is at hand, in one command and within a time budget

`make gpu ARGS="--budget 25m --data ~/data.tar --out gpu_out"` runs the tests that need a GPU, the bench, then
tools/gpu_queue.json: real runs, the most valuable first, each at the largest preset that fits. It needs
Python, torch and this checkout, but no Jupyter. However it ends, the output folder holds what was done.
"""
import argparse, ast, contextlib, hashlib, importlib.util, json, lzma, os, pickle, shutil, signal, subprocess
import sys, tarfile, time, traceback, zipfile, zlib
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
NEEDED = {'torch': 'torch', 'torchvision': 'torchvision', 'numpy': 'numpy', 'PIL': 'pillow',
          'pandas': 'pandas', 'matplotlib': 'matplotlib', 'sklearn': 'scikit-learn', 'scipy': 'scipy',
          'safetensors': 'safetensors', 'filelock': 'filelock', 'platformdirs': 'platformdirs',
          'tqdm': 'tqdm', 'fastcore': 'fastcore', 'click': 'click'} # module -> as the registry names it
LIMIT = 16_000_000 # bytes of an output file: larger ones are split into pieces
LEAST = 10.        # seconds that must be left for a run to be started
GRACE = 20.        # seconds for a run that is told to stop to reach its next snapshot


# ---- what is there -----------------------------------------------------------------------------------------

def there(name):
    "Whether a module can be imported, found out without importing it"
    try: return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError): return False

# because such a machine has no Jupyter, and pages only write files
_SHOWN = '''class Markdown:
    def __init__(self, data=None, **options): self.data = data
Image = Markdown
def display(*shown, **options): pass
'''

def stand_in(site):
    "A package named IPython, for where there is none, whose `display` shows nothing"
    (folder := Path(site)/'IPython').mkdir(parents=True, exist_ok=True)
    (folder/'__init__.py').write_text('version_info = (0, 0)\ndef get_ipython(): pass\n')
    (folder/'display.py').write_text(_SHOWN)

def carried(folder, site):
    "Install all wheels of a folder below `site`, without a network"
    found = sorted(map(str, Path(folder).expanduser().glob('*.whl')))
    if not found: raise ValueError(f"{folder} has no .whl file: fill it with pip download")
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--upgrade']
    done = subprocess.run([*pip, '--target', str(site), *found], capture_output=True, text=True)
    if done.returncode:
        said = ' '.join(done.stderr.split())[-300:]
        raise ValueError(f"pip could not install the wheels in {folder}: {said}")

def equipped(site, wheels=None):
    "Checks what a run imports, or `ValueError` says what to bring; returns the missing optional packages"
    sys.path.insert(1, str(site)); importlib.invalidate_caches()
    optional = 'foolbox', 'pyautoattack'
    if wheels and not all(map(there, (*NEEDED, *optional))): carried(wheels, site)
    importlib.invalidate_caches()
    if lacking := [d for m,d in NEEDED.items() if not there(m)]:
        raise ValueError(f"this Python ({sys.executable}) lacks {', '.join(lacking)}. Where there is a "
                         f"network: pip download -d wheels --no-deps {' '.join(lacking)} (for this "
                         "Python and processor), then copy the folder here and add --wheels wheels")
    if not there('IPython'): stand_in(site); importlib.invalidate_caches()
    return [m for m in optional if not there(m)]


# ---- data --------------------------------------------------------------------------------------------------

def _names_checked(path, files, links): # (name, bytes) of an archive
    for name,_ in files:
        parts = Path(name.replace('\\', '/')).parts
        if name.startswith(('/', '\\')) or '..' in parts or ':' in parts[:1]:
            raise ValueError(f"nothing was unpacked: {path} holds {name!r}, which lies outside its folder")
    if links:
        raise ValueError(f"nothing was unpacked: {path} holds {links[0]!r}, a link or device: pack files")

def _extract(path, new):
    free = shutil.disk_usage(new).free
    def room(n):
        if n <= free: return
        raise ValueError(f"{path} holds {n/1e9:.1f} GB, and {new.parent} has {free/1e9:.1f} GB left")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            its = z.infolist()
            links = [i.filename for i in its if (i.external_attr >> 16) & 0o170000 == 0o120000]
            _names_checked(path, [(i.filename, i.file_size) for i in its], links)
            room(sum(i.file_size for i in its)); z.extractall(new)
    else:
        with tarfile.open(path) as t:
            its = t.getmembers()
            _names_checked(path, [(m.name, m.size) for m in its],
                           [m.name for m in its if not (m.isreg() or m.isdir())])
            room(sum(m.size for m in its))
            t.extractall(new, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))

_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError,
           NotImplementedError)

def unpacked(path, work):
    "The folder of an archive's files, whole or not at all; an archive unpacked before is reused"
    about = path.stat()
    mark = hashlib.sha256(f'{path.resolve()} {about.st_size} {about.st_mtime_ns}'.encode()).hexdigest()[:12]
    kept = work/'data'/mark
    if kept.exists(): return kept
    shutil.rmtree(new := kept.with_name(f'.{mark}'), ignore_errors=True); new.mkdir(parents=True)
    try: _extract(path, new)
    except _BROKEN as e:
        shutil.rmtree(new, ignore_errors=True)
        raise ValueError(f"{path} is no whole .tar, .tar.gz, .tar.xz or .zip ({type(e).__name__}: {e}): "
                         "copy it again") from e
    except ValueError: shutil.rmtree(new, ignore_errors=True); raise
    os.replace(new, kept)
    return kept

def data_folder(given, work):
    "The folder of the given data, unpacked if it is an archive; None: as REFINE_DATA says"
    if given is None: return None
    if not (path := Path(given).expanduser()).exists():
        raise ValueError(f"there is no data at {path}: give a folder or an archive")
    folder = path if path.is_dir() else unpacked(path, work)
    from refine_nb.vision import data_names, data_place
    def holds(f): return any((p := data_place(n, f)) and p.exists() for n in data_names)
    inside = [d for d in folder.iterdir() if d.is_dir() and holds(d)] if not holds(folder) else []
    return (inside[0] if len(inside) == 1 else folder).resolve()


# ---- the queue ---------------------------------------------------------------------------------------------

_KEYS = {'artefact': str, 'why': str, 'parameters': dict, 'datasets': list, 'rows': list, 'presets': list,
         'share': (int, float)}

def _entry(at, e): # one of the queue, checked
    from refine_nb.base import choose, number
    from refine_nb.runs import PRESETS
    from refine_nb.command.pages import catalogued, parameters_of
    if not isinstance(e, dict): raise ValueError(f"{at} must be an object with an artefact, got {e!r:.40}")
    for k,v in e.items():
        if not isinstance(v, _KEYS[choose(k, _KEYS, f'key of {at}')]):
            raise ValueError(f"{at}: {k} must be {getattr(_KEYS[k], '__name__', 'a number')}, got {v!r:.40}")
    ready = [i for i,a in catalogued().items() if a['ready']]
    choose(e.get('artefact'), ready, f'artefact of {at}')
    if not e.get('presets'): raise ValueError(f"{at} has no presets: name some of {', '.join(PRESETS)}")
    for p in e['presets']: choose(p, PRESETS, f'preset of {at}')
    number(f'share of {at}', e.get('share', 1.), above=0, high=1)
    pairs = [(k, str(v)) for k,v in e.get('parameters', {}).items()]
    pairs += [('dataset', str(d)) for d in e.get('datasets', ())[:1]]
    parameters_of(e['artefact'], pairs) # a usage error if it has no parameter of that name
    return e

def queue_of(path):
    "The runs listed in a file, all checked before anything starts"
    import click
    try: found = json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError) as e: raise ValueError(f"the queue {path} cannot be read ({e})") from e
    if not isinstance(found, list): raise ValueError(f"the queue {path} must be a list of objects")
    try: return [_entry(f'{path}, entry {i}', e) for i,e in enumerate(found, 1)]
    except click.UsageError as e: raise ValueError(f"the queue {path}: {e.message}") from e

def settled(entry):
    "(values, presets) of an entry for the data that is present; `ValueError` says what is missing"
    from refine_nb.runs import PRESETS
    from refine_nb.vision import data_place, data_root
    values, presets, names = dict(entry.get('parameters', {})), entry['presets'], entry.get('datasets', [])
    found = [d for d in names if (p := data_place(d)) is None or p.exists()]
    if names and not found: presets = [p for p in presets if PRESETS[p].data]
    if not presets:
        from refine_nb.reporting import NEEDS
        raise ValueError(f"none of {', '.join(names)} is in {data_root()}: provide {NEEDS[names[0]]}")
    return values | ({'dataset': (found or names)[0]} if names else {}), presets


# ---- a page ------------------------------------------------------------------------------------------------

class Page:
    "An artefact's notebook, run in this process up to where it makes something; then to its end"
    def __init__(self, artefact, values):
        from refine_nb.reporting import Sheet
        Sheet.plan = lambda sheet: None # nobody sees the plan, and pricing it takes time
        raw = json.loads((ROOT/'nbs'/f'{artefact}.ipynb').read_text(encoding='utf-8'))
        self.artefact, self.names = artefact, {'__name__': '__main__'}
        self.rest = [(''.join(c['source']), c['metadata'].get('tags', [])) for c in raw['cells']
                     if c['cell_type'] == 'code']
        with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
            self._go(values, until='.make(')
        self.sheet, self.cells = self.names['sheet'], self.names['cells']
    def _go(self, values={}, until=None):
        while self.rest and not (until and until in self.rest[0][0]):
            source, tags = self.rest.pop(0)
            exec(compile(source, f'<{self.artefact}>', 'exec'), self.names)
            if 'parameters' in tags: self.names |= values
    def report(self): self._go()
    def of(self, rows): # the specs of some rows; of all rows if none are named
        from refine_nb.base import choose
        from refine_nb.reporting import leaves
        if not rows: return self.sheet.cells
        return [s for r in rows for s in leaves(self.cells[choose(r, self.cells, f'row of {self.artefact}')])]
    def price(self, specs): # seconds
        from refine_nb.runs import price
        todo = self.sheet.store.plan(specs)
        return float(price(todo, self.sheet.engine).seconds.iloc[-1]) if todo else 0.

def largest(entry, values, presets, left):
    "The page at the first preset whose rows fit, and what each preset costs; no page if none fits"
    import gc
    from refine_nb.runs import duration
    costs = {}
    for p in presets:
        page = Page(entry['artefact'], values | {'preset': p})
        costs[p] = page.price(page.of(entry.get('rows')))
        print(f'{p}: about {duration(costs[p])}', flush=True)
        if costs[p] <= left: return page, costs
        del page; gc.collect()
    return None, costs

def entry_run(job, answer):
    "Run one entry of the queue in a process of its own; `answer` is told what became of it, step by step"
    import matplotlib
    matplotlib.use('agg')
    from refine_nb.runs import duration, whats_left
    end, entry = time.monotonic()+job['seconds'], job['entry']
    said = {'artefact': entry['artefact'], 'values': job['values'], 'state': 'failed'}
    def note(**more):
        said.update(more); answer.with_suffix('.new').write_text(json.dumps(said))
        os.replace(answer.with_suffix('.new'), answer)
    def left(): return max(1., end-time.monotonic())
    try:
        page, costs = largest(entry, job['values'], job['presets'], left()*entry.get('share', 1.))
        priced = ', '.join(f'{p} about {duration(c)}' for p,c in costs.items())
        if page is None:
            return note(state='skipped', says=f'no preset fits into its share of the time, '
                                              f'{duration(left()*entry.get("share", 1.))}: {priced}')
        answer.with_suffix('.cells').write_bytes(pickle.dumps(page.cells)) # for `gathered`
        note(preset=list(costs)[-1], state='unfinished', says=f'stopped before its end; estimates: {priced}')
        store, rows = page.sheet.store, page.of(entry.get('rows'))
        if todo := store.run(rows, budget=left()):
            return note(says=f'the time was up: {whats_left(todo, store.engine)} left')
        if (more := page.price(page.sheet.cells)) > left():
            return note(state='rows', says=f"its rows are made; the whole page takes {duration(more)} more")
        os.environ['REFINE_BUDGET'] = f'{left():.1f}s'
        page.report(); note(state='report', says='its report is written')
    except Exception as e:
        state = 'unfinished' if type(e).__name__ == 'Unfinished' else 'failed'
        note(state=state, says=f"{type(e).__name__}: {' '.join(str(e).split())[:600]}")
        traceback.print_exc()


# ---- what goes out -----------------------------------------------------------------------------------------

def _sha(path):
    seen = hashlib.sha256()
    with open(path, 'rb') as f:
        while part := f.read(1<<20): seen.update(part)
    return seen.hexdigest()

def pieces(path, limit):
    "The names of a file's pieces, none larger than `limit`; a small file stays in one piece"
    if path.stat().st_size <= limit: return [path.name]
    names = []
    with open(path, 'rb') as f:
        while part := f.read(limit):
            names.append(f'{path.name}.{len(names)+1:03d}'); (path.parent/names[-1]).write_bytes(part)
    path.unlink()
    return names

def _walk(grid, path=()): # (names, spec)
    if isinstance(grid, dict):
        for k,g in grid.items(): yield from _walk(g, (*path, str(k)))
    elif isinstance(grid, (list, tuple)):
        for g in grid: yield from _walk(g, path)
    else: yield path, grid

def gathered(answers):
    "(store, specs with results, numbers) of the entries that were started"
    from refine_nb.base import ancestors, key
    from refine_nb.runs import Store
    store, specs, numbers = Store(quiet=True), {}, []
    for a in answers:
        cells = list(_walk(pickle.loads(Path(a['cells']).read_bytes())))
        specs |= {s: None for s in ancestors(*(s for _,s in cells)) if store.find(s)}
        for path,s in cells:
            if s in specs and 'accuracy' in (r := store.find(s).result):
                numbers.append({'artefact': a['artefact'], 'preset': a['preset'], 'cell': ' / '.join(path),
                                **{k: r[k] for k in ('accuracy','low','high','n') if k in r}, 'key': key(s)})
    return store, list(specs), numbers

def exported(course, answers, most):
    "Write results, weights if they fit, reports and gpu.json into the output folder, each file whole"
    out, new = course.out, course.work/'new'
    shutil.rmtree(new, ignore_errors=True); new.mkdir(parents=True)
    begun, numbers, weights = [a for a in answers if 'preset' in a], [], ''
    if begun:
        from refine_nb.runs import export_results
        store, specs, numbers = gathered(begun)
        if specs: export_results(store, specs, new/'results.tar', numbers_only=True)
        if specs and most:
            size = export_results(store, specs, new/'weights.tar')['bytes']
            if (n := -(-size//LIMIT)) > most:
                (new/'weights.tar').unlink()
                weights = f'left out: they need {n} files of 16 MB, and --pieces is {most}'
    if any((reports := course.work/'reports').rglob('*.*')):
        with tarfile.open(new/'reports.tar.gz', 'w:gz') as t: t.add(reports, 'reports')
    for p in list(new.iterdir()): pieces(p, LIMIT)
    for bench in reports.glob('bench/*/bench.json'): shutil.copy(bench, new/'bench.json')
    files = {p.name: {'bytes': p.stat().st_size, 'sha256': _sha(p)} for p in sorted(new.iterdir())}
    about = {'ran': course.steps, 'entries': answers, 'numbers': numbers, 'weights': weights, 'files': files,
             **course.about}
    if weights: course.say(f'weights are {weights}')
    (new/'gpu.json').write_text(json.dumps(about, indent=1, default=str)+'\n')
    for p in new.iterdir(): # the output folder may be on another disk
        shutil.move(p, half := out/f'.{p.name}'); os.replace(half, out/p.name)
    for p in out.iterdir(): # of an earlier state
        if p.name not in files and p.name.partition('.')[0] in ('results', 'weights', 'reports'): p.unlink()
    return files


# ---- the course of it --------------------------------------------------------------------------------------

class Course:
    "A time budget, a log, and child processes that are told to stop before the time is up"
    def __init__(self, out, work, seconds, about={}):
        self.out, self.work, self.about, self.steps, self.asked = out, work, about, [], 0
        self.begun = time.monotonic(); self.end = self.begun+seconds
        self.spare = min(60., seconds/10) # for the last export
        for folder in (out, work): folder.mkdir(parents=True, exist_ok=True)
    @property
    def left(self): return 0. if self.asked else max(0., self.end-self.spare-time.monotonic())
    def ask(self, number, frame=None): self.asked = number
    def say(self, text):
        line = f'[{time.strftime("%H:%M:%S")}, {time.monotonic()-self.begun:.0f} s] {text}'
        print(line, flush=True)
        with open(self.out/'log.txt', 'a', encoding='utf-8') as log: log.write(line+'\n')
    def note(self, what, state, says='', seconds=0.):
        self.steps.append({'what': what, 'state': state, 'says': says, 'seconds': round(seconds, 1)})
        self.say(f'{what}: {state}' + (f' ({says})' if says else ''))
    def child(self, command, seconds): # its status; None if it was told to stop
        end = time.monotonic()+seconds
        with open(self.out/'log.txt', 'a', encoding='utf-8') as log: # we pass Ctrl-C on ourselves
            p = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        while p.poll() is None and not self.asked and time.monotonic() < end: time.sleep(.1)
        if p.poll() is not None: return p.returncode
        p.terminate()
        with suppress(subprocess.TimeoutExpired): p.wait(min(GRACE, max(1., self.spare/2)))
        with suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
        p.wait()

def gpu_tests(course):
    import torch
    if not torch.cuda.is_available(): return course.note('tests', 'skipped', 'there is no GPU here')
    if not there('pytest'): return course.note('tests', 'skipped', 'pytest is not installed')
    files = [p for p in sorted((ROOT/'tests').glob('test_*.py'))
             if "reason='needs a GPU'" in p.read_text(encoding='utf-8')]
    def lacks(m): return not there(m) and not (ROOT/'tests'/f'{m}.py').exists()
    needs = {p: list(filter(lacks, _imported(p))) for p in files}
    for p,lacking in needs.items():
        if lacking: course.note(f'tests in {p.name}', 'skipped', f'{", ".join(lacking)} is not installed')
    if not (files := [str(p) for p in files if not needs[p]]): return
    start = time.monotonic()
    pytest = [sys.executable, '-m', 'pytest', '-q', '-rs', '-k', 'gpu', '-p', 'no:cacheprovider']
    status = course.child([*pytest, *files], min(600., course.left/3))
    how = {0: 'passed', None: 'stopped'}.get(status, 'failed')
    course.note('tests', how, 'in log.txt', time.monotonic()-start)

def _imported(path): # names of the modules that a test file imports at its top
    for n in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(n, ast.Import): yield from (a.name.partition('.')[0] for a in n.names)
        elif isinstance(n, ast.ImportFrom): yield n.module.partition('.')[0]

def bench(course):
    long = course.left >= 2400
    if course.left < 150:
        return course.note('bench', 'skipped', f'only {course.left:.0f} s are left')
    start, where = time.monotonic(), course.work/'reports'/'bench'/'gpu'
    command = [sys.executable, str(ROOT/'tools'/'bench.py'), '--out', str(where), *['--quick']*(not long)]
    status = course.child(command, min(900., course.left/2))
    course.note('bench', {0: 'done', None: 'stopped', 1: 'failed'}.get(status, 'failed'),
                'whole' if long else 'quick', time.monotonic()-start)

def runs(course, queue, most):
    answers = []
    for i,e in enumerate(queue, 1):
        what, start = f'{i}. {e["artefact"]}', time.monotonic()
        if course.left < LEAST: course.note(what, 'not begun', 'no time is left'); continue
        try: values, presets = settled(e)
        except ValueError as why: course.note(what, 'skipped', str(why)); continue
        job, answer = course.work/f'job{i}.json', course.work/f'answer{i}.json'
        answer.unlink(missing_ok=True)
        job.write_text(json.dumps({'entry': e, 'values': values, 'presets': presets, 'seconds': course.left}))
        course.say(f'{what}: starts; why: {e.get("why", "no reason is given")}')
        status = course.child([sys.executable, __file__, '--entry', str(job), str(answer)],
                              course.left+course.spare/4)
        a = {'artefact': e['artefact'], 'state': 'failed' if status else 'unfinished', 'says': ''}
        if answer.exists(): a = json.loads(answer.read_text())
        if status and a['state'] == 'unfinished': a['state'] = 'failed'
        if status: a['says'] += f' (it ended with status {status})'
        course.note(f'{what} {a.get("preset", "")}'.strip(), a['state'], a['says'], time.monotonic()-start)
        answers.append(a | {'cells': str(answer.with_suffix('.cells'))}); kept(course, answers, most)
    return answers

def kept(course, answers, most):
    begun = time.monotonic()
    try: files = exported(course, answers, most)
    except Exception as e: return course.note('export', 'failed', f'{type(e).__name__}: {e}')
    course.spare = max(course.spare, 1.5*(time.monotonic()-begun)) # the next export takes as long, or longer
    said = ', '.join(f'{n} ({f["bytes"]/1e6:.2f} MB)' for n,f in files.items())
    course.say(f"kept: {said or 'nothing yet'}")


# ---- the command -------------------------------------------------------------------------------------------

def arguments(argv):
    p = argparse.ArgumentParser(prog='gpu.py', description=__doc__.splitlines()[0])
    p.add_argument('--budget', default='25m', metavar='TIME', help='for everything, such as 25m or 2h [25m]')
    p.add_argument('--data', metavar='PATH', 
                   help='a folder like REFINE_DATA, or a .tar, .tar.gz, .tar.xz or .zip of one')
    p.add_argument('--out', type=Path, default=Path(os.environ.get('OUT') or 'gpu_out'),
                   help='folder for a few files, none above 16 MB [$OUT, or gpu_out]')
    p.add_argument('--work', type=Path,
                   help='for store and data; a second call resumes from it [OUT_work]')
    p.add_argument('--queue', type=Path, default=ROOT/'tools'/'gpu_queue.json', help='[tools/gpu_queue.json]')
    p.add_argument('--wheels', metavar='FOLDER', help='with wheels of the packages that this Python lacks')
    p.add_argument('--pieces', type=int, default=3, metavar='N',
                   help='most files for weights; if they need more, they are left out [3]')
    p.add_argument('--skip', default='', metavar='PARTS', help='any of tests,bench,runs')
    return p.parse_args(argv)

def prepared(args):
    "A course ready to start, and its queue; `ValueError` before anything is done"
    out = args.out.expanduser().resolve()
    work = (args.work or out.with_name(f'{out.name}_work')).expanduser().resolve()
    lacking = equipped(work/'site', args.wheels)
    from refine_nb.base import choose, commit, device_name, number, time_budget, versions
    seconds, most = time_budget(args.budget), number('--pieces', args.pieces, 0, whole=True)
    for part in filter(None, args.skip.split(',')): choose(part, ('tests', 'bench', 'runs'), 'part in --skip')
    path = [str(ROOT), str(work/'site'), *filter(None, [os.environ.get('PYTHONPATH')])]
    os.environ |= {'REFINE_HOME': str(work/'home'), 'REFINE_REPORTS': str(work/'reports'),
                   'MPLBACKEND': 'agg', 'PYTHONPATH': os.pathsep.join(path)}
    for name in ('REFINE_PRESET', 'REFINE_BUDGET', 'REFINE_WORKERS', 'REFINE_ON'): os.environ.pop(name, None)
    if folder := data_folder(args.data, work): os.environ['REFINE_DATA'] = str(folder)
    queue = queue_of(args.queue)
    from refine_nb.training import engine
    device = engine().device
    about = {'device': device_name(device), 'versions': versions(), 'source': commit(), 'budget': args.budget}
    course = Course(out, work, seconds, about)
    said = about['versions']
    course.say(f"on {about['device']}, Python {said['python']}, torch {said['torch']}; budget {args.budget}")
    if lacking: course.say(f"without {', '.join(lacking)}: what needs them will say so")
    return course, queue, most

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['--entry']: return entry_run(json.loads(Path(argv[1]).read_text()), Path(argv[2]))
    args = arguments(argv)
    try: course, queue, most = prepared(args)
    except ValueError as e: print(e, file=sys.stderr); return 2
    for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, course.ask)
    skip, answers = args.skip.split(','), []
    if 'tests' not in skip and course.left: gpu_tests(course)
    if 'bench' not in skip and course.left: bench(course)
    kept(course, answers, most)
    if 'runs' not in skip: answers = runs(course, queue, most)
    course.say('the end: ' + '; '.join(f'{s["what"]} {s["state"]}' for s in course.steps))
    kept(course, answers, most)
    if course.asked: course.say('it was told to stop'); return 128+course.asked
    return int(any(s['state'] == 'failed' for s in course.steps))


if __name__ == '__main__': sys.exit(main())
