"""Write the front doors: nbs/<room>/99_<room>.ipynb re-exports every public name of its room's notebooks.

A new name needs only `make doors`; the rest of the page is left unchanged.
"""
import ast, re, sys

import nbformat
from run_notebooks import NBS, ROOMS

WIDTH = 104 # of a line of names


def exported(path):
    "Module and public names of a notebook, in order; no module if it exports nothing"
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code']
    module = next((m[1] for s in cells if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', s, re.M))), None)
    own = [n for s in cells if re.search(r'^#\|\s*export\b', s, re.M) for n in ast.parse(s).body]
    return module, sorted({name for n in own for name in names(n) if not name.startswith('_')})

def names(node):
    "What a statement defines; a patched method or a registered case defines nothing of its own"
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        patched = any(getattr(d, 'id', getattr(d, 'attr', '')) in ('patch', 'register')
                      for d in node.decorator_list)
        return [] if patched else [node.name]
    targets = (node.targets if isinstance(node, ast.Assign)
               else [node.target] if isinstance(node, ast.AnnAssign) else [])
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]

def filled(head, items, indent, end):
    "A head followed by items, as many on a line as fit"
    lines = [head]
    for i,item in enumerate(items):
        piece = item + (', ' if i < len(items)-1 else end)
        if len(lines[-1]+piece) > WIDTH and lines[-1].strip(): lines.append(indent)
        lines[-1] += piece
    return '\n'.join(line.rstrip() for line in lines)

def imports(module, found):
    plain = f'from refine_nb.{module} import {", ".join(found)}'
    return plain if len(plain) <= WIDTH else filled(f'from refine_nb.{module} import (', found, '    ', ')')

def write(room):
    "Bring the exported cells of a room's front door up to date"
    door = NBS/room/f'99_{room}.ipynb'
    found = [exported(p) for p in sorted((NBS/room).glob('*.ipynb')) if p != door]
    found = [(module, ns) for module,ns in found if module and ns]
    nb = nbformat.read(door, as_version=4)
    def cells(start): return [c for c in nb.cells if c.cell_type == 'code'
                              and c.source.startswith(f'#| export\n{start}')]
    froms = cells('from') # a room of many modules has two such cells
    for i,c in enumerate(froms):
        part = found[i*len(found)//len(froms):(i+1)*len(found)//len(froms)]
        c.source = '#| export\n'+'\n'.join(imports(*f) for f in part)
    every = [repr(n) for _,ns in found for n in ns]
    for c in cells('_all_'): c.source = '#| export\n'+filled('_all_ = [', every, ' '*9, ']')
    nbformat.write(nb, door)


if __name__ == '__main__':
    for room in sys.argv[1:] or [r for r in ROOMS if (NBS/r/f'99_{r}.ipynb').exists()]: write(room)
