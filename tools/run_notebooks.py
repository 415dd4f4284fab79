"Run the notebooks of nbs/ in place: the rooms in their order, artefacts, the index; a notebook that fails keeps its old outputs"
import os, re, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NBS = Path(__file__).resolve().parents[1]/'nbs'


ROOMS = ('base', 'vision', 'attacks', 'evaluation', 'training', 'refinement', 'runs', 'reporting', 'papers')

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

def main(names):
    os.environ.setdefault('REFINE_PRESET', 'demo')
    there = {p.stem: p for p in sorted(NBS.rglob('*.ipynb'), key=rank) if '.ipynb_checkpoints' not in p.parts}
    if unknown := sorted(set(names) - set(there)):
        sys.exit(f'nbs/ has no {", ".join(unknown)}: choose from {", ".join(there)}')
    for name in (n for n in there if n in names or not names):
        start = time.monotonic()
        try: run(there[name])
        except CellExecutionError as e: sys.exit(f'{name}: ' + re.sub(r'\x1b\[[\d;]*m', '', str(e)))
        print(f'{name}: {time.monotonic()-start:.0f} s', flush=True)


if __name__ == '__main__': main(sys.argv[1:])
