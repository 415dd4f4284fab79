"""What a store survives, counted: random kills, damaged files, full and read-only disks, a clock set back.

`make soak` takes a few minutes and writes reports/reliability/. ARGS="--kills 100 --damages 300" gives the
full counts, "--seed 2" other draws, "--only 'bad input'" one test; "--out FOLDER" writes elsewhere. If any
count is not as promised, the exit status is 1.
"""
import argparse, json, os, random, shutil, signal, sys, tempfile, time, warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tests'))
import torch

from refine_nb.base import Cell, Robustness, ancestors, call, commit, device_name, whole
from refine_nb.attacks import pgd, salt_and_pepper
from refine_nb.refinement import Correction, Quantised, adapt
from refine_nb.runs import here
from toys import Worker, quiet, recipe, same

BASE = recipe()
SUBJECTS = {
    'a table': [Cell(replace(BASE, init=BASE, epochs=2, batch_size=16, method=call(
                    adapt, source=Correction(BASE, call(salt_and_pepper, targeted=True, steps=50))))),
                Cell(BASE, call(pgd, steps=2), n_eval=50), Cell(recipe(seed=2))],
    'AutoAttack': [Robustness(BASE, eps=.05, n_eval=30, components=('apgd-ce', 'square'))],
    'int8': [Cell(Quantised(recipe(seed=3), n_calibrate=50))]}


def make(root, specs, back=0.):
    "Run in a process of its own, which may be killed; its clock may be set `back` by some seconds"
    if back: real = time.time; time.time = lambda: real()-back
    quiet(root).run(specs, executor=here())

def alike(root, other, specs):
    "The same numbers, and the same tensors bit for bit"
    try: return all(same(root, other, s) for s in ancestors(*specs))
    except AssertionError: return False

def stamps(root): return {p: p.stat().st_mtime_ns for p in Path(root).glob('*/*/record.json')}
def leftovers(root):
    return [p for p in Path(root).rglob('*') if p.name[:1] == '.' or p.parent.name == 'running']


# ---- kills -------------------------------------------------------------------------------------------------

def kills(scratch, peace, specs, n, draw):
    "Kill a process at random moments until it has been killed n times; counts how often it completed"
    root, said, found = scratch/'kills', scratch/'said', Counter()
    begun = time.monotonic(); Worker(said, make, root, specs).end(600); span = time.monotonic()-begun
    shutil.rmtree(root); before = {}
    while found['kills'] < n:
        w = Worker(said, make, root, specs); w.process.join(draw.uniform(0, span))
        if w.process.exitcode is None: os.kill(w.process.pid, signal.SIGKILL); found['kills'] += 1
        w.process.join()
        if w.process.exitcode not in (0, -9): found['errors'] += 1
        now = stamps(root) if root.exists() else {}
        found['made again'] += sum(now.get(p) != t for p,t in before.items()); before = now
        if w.process.exitcode == 0:
            found['ended well'] += 1; found['wrong'] += not alike(peace, root, specs)
            shutil.rmtree(root); before = {}
    Worker(said, make, root, specs).end(600)
    quiet(root); found['wrong'] += not alike(peace, root, specs); found['leftovers'] += len(leftovers(root))
    shutil.rmtree(root)
    return dict(found)

def at_once(scratch, peace, specs, n=4):
    "Several processes start at the same moment; each epoch must be started only once"
    root, log = scratch/'once', scratch/'log'
    ws = [Worker(scratch/f'said{i}', make, root, specs, env={'TOY_LOG': str(log)}) for i in range(n)]
    ends = [w.end(600) for w in ws]
    lines = [line.split() for line in log.read_text().splitlines()]
    Worker(scratch/'said', make, scratch/'alone', specs, env={'TOY_LOG': str(log)+'1'}).end(600)
    wanted = len((scratch/'log1').read_text().splitlines())
    return {'processes': n, 'errors': sum(e != 0 for e in ends), 'made again': len(lines)-wanted,
            'that trained': len({pid for pid,_ in lines}), 'wrong': int(not alike(peace, root, specs)),
            'leftovers': len(leftovers(root))}


# ---- damages -----------------------------------------------------------------------------------------------

def flip(p, draw):
    raw = bytearray(p.read_bytes())
    if raw: raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8); p.write_bytes(raw)
def cut(p, draw): raw = p.read_bytes(); p.write_bytes(raw[:draw.randrange(len(raw)+1)])
def delete(p, draw): p.unlink()
def swap(p, draw):
    p.write_bytes(draw.choice([q for q in p.parent.parent.rglob('*') if q.is_file()]).read_bytes())
def zero(p, draw): p.write_bytes(bytes(p.stat().st_size))
def lock(p, draw): p.chmod(0)
HARMS = (flip, cut, delete, swap, zero, lock)

def asked_again(root, peace, specs):
    "What becomes of a harmed store: 'whole' (again), 'refused with a sentence', 'wrong' or 'errors'"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            for s in ancestors(*specs): quiet(root).tensors(s)
        except (OSError, ValueError) as e: # of its format, or a file that may not be read: a person decides
            return 'refused with a sentence' if str(root) in str(e) else 'errors'
        except Exception as e: print(repr(e)); return 'errors'
    return 'whole' if alike(peace, root, specs) else 'wrong'

def damages(scratch, peace, specs, n, draw):
    "Damage a random file of a store in a random way, then read everything: the same bits, or a message"
    found = Counter()
    for i in range(n):
        root = scratch/'damaged'; shutil.copytree(peace, root)
        file, harm = draw.choice(sorted(p for p in root.rglob('*') if p.is_file())), draw.choice(HARMS)
        harm(file, draw); found['damages'] += 1; found[f'{harm.__name__}'] += 1
        found[asked_again(root, peace, specs)] += 1
        for p in root.rglob('*'): p.chmod(0o755)
        shutil.rmtree(root)
    return dict(found)


# ---- disks, clocks -----------------------------------------------------------------------------------------

def short_of_room(scratch, peace, specs, n, draw):
    "No file may grow beyond a random size; then the limit is lifted"
    found = Counter()
    for _ in range(n):
        root, limit = scratch/'full', draw.randrange(50, 40_000)
        said = Path(os.devnull) if limit < 2000 else scratch/'said' # its output does not fit either
        code = Worker(said, limited, root, specs, limit).end(600)
        found['full disks'] += 1; found['errors'] += code not in (0, 1)
        Worker(scratch/'said', make, root, specs).end(600); found['wrong'] += not alike(peace, root, specs)
        shutil.rmtree(root, ignore_errors=True)
    return dict(found)

def limited(root, specs, limit):
    import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); make(root, specs)

def read_only(scratch, peace, specs):
    "A read-only store returns what is there"
    shared = Path(tempfile.mkdtemp())
    try:
        shutil.copytree(peace, shared/'store')
        for p in [shared, *shared.rglob('*')]: p.chmod(0o555 if p.is_dir() else 0o444)
        code = Worker(scratch/'said', looked, shared/'store', specs).end(600)
        return {'read-only stores': 1, 'errors': int(code != 0)}
    finally:
        for p in [shared, *shared.rglob('*')]: p.chmod(0o755)
        shutil.rmtree(shared)

def looked(root, specs):
    if os.geteuid() == 0: os.setuid(65534)
    for s in specs: quiet(root).get(s, make=False).tensors()

def clock_back(scratch, peace, specs):
    "A run starts, is killed, and resumes with the clock set a day back"
    root = scratch/'clock'
    w = Worker(scratch/'said', make, root, specs); w.process.join(1.); w.process.kill(); w.process.join()
    code = Worker(scratch/'said', make, root, specs, back=86400.).end(600)
    return {'clocks set back': 1, 'errors': int(code != 0), 'wrong': int(not alike(peace, root, specs))}


# ---- bad input ---------------------------------------------------------------------------------------------

def bad_input(scratch, n, number):
    "Bad values for one or two arguments of public functions; counts what gives no message and no sane result"
    import matplotlib
    from test_bad_input import counted, doors
    matplotlib.use('agg'); before = os.getcwd()
    os.environ['REFINE_REPORTS'] = str(scratch/'reports'); os.chdir(scratch)
    try: tried, failed, words = counted(n, number)
    finally: os.chdir(before)
    print('\n'.join(words), flush=True)
    rooms = {f'tries in {room}': k for room,k in tried.items()}
    return {'functions': len(doors()), **rooms, 'no sentence': sum(failed.values())}


# ---- the report --------------------------------------------------------------------------------------------

BAD = 'wrong', 'errors', 'made again', 'leftovers', 'no sentence'

def page(found, about):
    def row(f, bad):
        return ', '.join(f'{n} {what}' for what,n in f.items() if (what in BAD) == bad and (n or not bad))
    lines = [f'| {what} | {row(f, False)} | {row(f, True) or "nothing"} |' for what,f in found.items()]
    return (f"# What a store survives\n\nToy runs on {about['device']}, seed {about['seed']}, "
            f"{about['minutes']:.0f} minutes. *Wrong*: results whose numbers or bits differ from those of an "
            "undisturbed store. *Made again*: finished results that were recomputed. *Leftovers*: files of a "
            "killed process that remain after the next start. *No sentence*: bad input that gave neither an "
            "error message nor a sane result. A file that may not be read, and a store in another "
            "format, are refused with a message.\n\n"
            "| test | what was done | what went wrong |\n|---|---|---|\n" + '\n'.join(lines) +
            "\n\n`make soak` repeats this on another machine.\n")

def trials(scratch, said, draw):
    "Each test by its name, to be called"
    peace, table, every = scratch/'peace', SUBJECTS['a table'], sum(SUBJECTS.values(), [])
    share = -(-said.kills//len(SUBJECTS))
    return {**{f'SIGKILL, {what}': lambda specs=specs: kills(scratch, peace, specs, share, draw)
               for what,specs in SUBJECTS.items()},
            'four at once': lambda: at_once(scratch, peace, table),
            'damaged files': lambda: damages(scratch, peace, every, said.damages, draw),
            'no room': lambda: short_of_room(scratch, peace, table, said.full, draw),
            'read only': lambda: read_only(scratch, peace, table),
            'clock set back': lambda: clock_back(scratch, peace, table),
            'bad input': lambda: bad_input(scratch, said.tries, said.seed)}

def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name,n in (('kills', 30), ('damages', 60), ('full', 5), ('tries', 5000), ('seed', 1)):
        ask.add_argument(f'--{name}', type=int, default=n)
    ask.add_argument('--only', help='run one test, by its name; the report keeps the others as they are')
    ask.add_argument('--out', default=str(ROOT/'reports'/'reliability'))
    said = ask.parse_args(); draw = random.Random(said.seed); begun = time.monotonic()
    torch.set_num_threads(1); old = Path(said.out)/'run.json'
    before = json.loads(old.read_text()) if said.only and old.exists() else {}
    found, parts, minutes = before.get('found', {}), before.get('parts', {}), before.get('minutes', 0)
    with tempfile.TemporaryDirectory() as d:
        tests = trials(Path(d), said, draw)
        if said.only and said.only not in tests:
            sys.exit(f"no test {said.only!r}: choose from {', '.join(tests)}")
        for specs in SUBJECTS.values(): quiet(Path(d)/'peace', 3600.).run(specs, executor=here())
        for what in [said.only] if said.only else tests:
            found[what], parts[what] = tests[what](), commit() or {}
            print(f'{what}: {found[what]}', flush=True)
    about = {'seed': said.seed, 'minutes': minutes+(time.monotonic()-begun)/60, 'device': device_name(),
             **(commit() or {}), 'parts': parts}
    with whole(said.out) as new:
        new.mkdir(); (new/'README.md').write_text(page(found, about), encoding='utf-8')
        (new/'run.json').write_text(json.dumps({**about, 'found': found}, indent=1)+'\n')
    if any(f.get(k) for f in found.values() for k in BAD[:-1]): sys.exit('some counts are not as promised')


if __name__ == '__main__': main()
