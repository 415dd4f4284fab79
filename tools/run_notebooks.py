"Run the notebooks of nbs/ in place: numbered ones, artefacts, the index; a notebook that fails keeps its old outputs"
import os, re, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NBS = Path(__file__).resolve().parents[1]/'nbs'


def rank(name): return (name == 'index', not name[0].isdigit(), name)

def run(path):
    "Execute one notebook in its own kernel, then replace it as a whole"
    nb = nbformat.read(path, as_version=4)
    meta = dict(nb.metadata)
    NotebookClient(nb, timeout=None, kernel_name='python3', resources={'metadata': {'path': str(NBS)}}).execute()
    nb.metadata = nbformat.from_dict(meta)
    new = path.with_suffix('.running')
    nbformat.write(nb, new)
    os.replace(new, path)

def main(names):
    os.environ.setdefault('REFINE_PRESET', 'demo')
    there = {p.stem: p for p in NBS.glob('*.ipynb')}
    if unknown := sorted(set(names) - set(there)): sys.exit(f'nbs/ has no {", ".join(unknown)}: choose from {", ".join(sorted(there, key=rank))}')
    for name in sorted(names or there, key=rank):
        start = time.monotonic()
        try: run(there[name])
        except CellExecutionError as e: sys.exit(f'{name}: ' + re.sub(r'\x1b\[[\d;]*m', '', str(e)))
        print(f'{name}: {time.monotonic()-start:.0f} s', flush=True)


if __name__ == '__main__': main(sys.argv[1:])
