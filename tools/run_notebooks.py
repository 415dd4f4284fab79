"""Run the notebooks of nbs/ in place: the rooms in their order, artefacts, the index

A notebook that fails keeps its old outputs.
"""
import base64, io, os, re, sys, time
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from outputs import record

NBS = Path(__file__).resolve().parents[1]/'nbs'
# a room imports only from those before it
ROOMS = ('base', 'vision', 'attacks', 'evaluation', 'training', 'refinement', 'runs', 'reporting', 'papers',
         'command')

def rank(path):
    "Rooms from the ground up, a room's notebooks by number, then artefacts, the index last"
    room = path.parent.name
    return (path.stem == 'index', ROOMS.index(room) if room in ROOMS else len(ROOMS), path.stem)

PHOTOGRAPH = 10_000 # colours; antialiased lines and text make at most some thousand

def lean(
    png:str, # base64, as a notebook keeps it
)->str:      # the same on white in 256 colours, a third of the size; a photograph unchanged
    "A drawing as a notebook should store it"
    drawing = Image.open(io.BytesIO(base64.b64decode(png)))
    if drawing.mode == 'P': return png
    drawing = drawing.convert('RGBA')
    drawing = Image.alpha_composite(Image.new('RGBA', drawing.size, 'white'), drawing).convert('RGB')
    if len(np.unique(np.asarray(drawing).reshape(-1, 3), axis=0)) >= PHOTOGRAPH: return png
    few, kept = drawing.quantize(256, kmeans=2, dither=Image.Dither.NONE), io.BytesIO()
    few.save(kept, 'PNG', optimize=True)
    return base64.b64encode(kept.getvalue()).decode()

def tidy(nb):
    "Shrink drawings; remove warnings, which name this machine's folders, and return them"
    told = []
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        told += [o.text for o in cell.outputs if o.get('name') == 'stderr']
        cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
        for data in (o.data for o in cell.outputs if 'image/png' in o.get('data', ())):
            data['image/png'] = lean(data['image/png'])
    return told

# for drawings saved as text: no date, and reproducible names of their parts
STEADY = {'SOURCE_DATE_EPOCH': '0', 'MATPLOTLIBRC': str(Path(__file__).resolve().with_name('matplotlibrc'))}

def run(path):
    "Execute one notebook in its own kernel, then replace it as a whole; returns what it wrote to stderr"
    nb = nbformat.read(path, as_version=4)
    meta = dict(nb.metadata)
    NotebookClient(nb, timeout=None, kernel_name='python3',
                   resources={'metadata': {'path': str(path.parent)}}).execute(env=os.environ | STEADY)
    nb.metadata = nbformat.from_dict(meta)
    told, new = tidy(nb), path.with_suffix('.running')
    nbformat.write(nb, new)
    os.replace(new, path)
    return told

def notebooks(nbs=NBS):
    "Name -> path, in the order in which they run; a name is the path below nbs/ without its ending"
    there = [p for p in sorted(nbs.rglob('*.ipynb'), key=rank) if '.ipynb_checkpoints' not in p.parts]
    return {p.relative_to(nbs).with_suffix('').as_posix(): p for p in there}

def chosen(names, there):
    "The notebooks named, in full or by their last part; all if no name is given"
    ways = {n: {n, n.rpartition('/')[2]} for n in there}
    if unknown := sorted(set(names) - set().union(*ways.values())):
        sys.exit(f'nbs/ has no {", ".join(unknown)}: choose from {", ".join(there)}')
    return [n for n in there if not names or ways[n] & set(names)]

def main(names):
    os.environ.setdefault('REFINE_PRESET', 'demo')
    there = notebooks()
    for name in chosen(names, there):
        start = time.monotonic()
        try: told = run(there[name])
        except CellExecutionError as e: sys.exit(f'{name}: ' + re.sub(r'\x1b\[[\d;]*m', '', str(e)))
        record([there[name]])
        print(f'{name}: {time.monotonic()-start:.0f} s', *told, sep='\n', flush=True)


if __name__ == '__main__': main(sys.argv[1:])
