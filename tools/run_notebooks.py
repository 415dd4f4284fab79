"""Run the notebooks of nbs/ in place: the rooms in their order, artefacts, the index

A notebook that fails keeps its old outputs.
"""
import os, re, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from outputs import record

NBS = Path(__file__).resolve().parents[1]/'nbs'
# a room imports from those before it only
ROOMS = ('base', 'vision', 'attacks', 'evaluation', 'training', 'refinement', 'runs', 'reporting', 'papers',
         'command')

def rank(path):
    "Rooms from the ground up, a room's notebooks by number, then artefacts, the index last"
    room = path.parent.name
    return (path.stem == 'index', ROOMS.index(room) if room in ROOMS else len(ROOMS), path.stem)

def run(path):
    "Execute one notebook in its own kernel, then replace it as a whole"
    nb = nbformat.read(path, as_version=4)
    meta = dict(nb.metadata)
    NotebookClient(nb, timeout=None, kernel_name='python3',
                   resources={'metadata': {'path': str(path.parent)}}).execute()
    nb.metadata = nbformat.from_dict(meta)
    new = path.with_suffix('.running')
    nbformat.write(nb, new)
    os.replace(new, path)

def notebooks(nbs=NBS):
    "Name -> path, in the order in which they run; a name is the path below nbs/ without its ending"
    there = [p for p in sorted(nbs.rglob('*.ipynb'), key=rank) if '.ipynb_checkpoints' not in p.parts]
    return {p.relative_to(nbs).with_suffix('').as_posix(): p for p in there}

def chosen(names, there):
    "Those that are named, in full or by their last part; all where no name is given"
    ways = {n: {n, n.rpartition('/')[2]} for n in there}
    if unknown := sorted(set(names) - set().union(*ways.values())):
        sys.exit(f'nbs/ has no {", ".join(unknown)}: choose from {", ".join(there)}')
    return [n for n in there if not names or ways[n] & set(names)]

def main(names):
    os.environ.setdefault('REFINE_PRESET', 'demo')
    there = notebooks()
    for name in chosen(names, there):
        start = time.monotonic()
        try: run(there[name])
        except CellExecutionError as e: sys.exit(f'{name}: ' + re.sub(r'\x1b\[[\d;]*m', '', str(e)))
        record([there[name]])
        print(f'{name}: {time.monotonic()-start:.0f} s', flush=True)


if __name__ == '__main__': main(sys.argv[1:])
