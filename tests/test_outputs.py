"Stored outputs are of this code: made by the cells, the package and the reports that lie beside them."
import base64, io, json, sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
from outputs import made_by, notebooks, record, recorded, stale, unmarked
from run_notebooks import PHOTOGRAPH, lean, run, tidy

def test_outputs_are_of_this_code():
    gone = stale()
    assert not gone, (f'outputs of {", ".join(gone)} were made by other code: make notebooks, '
                      'or tools/run_notebooks.py with their names')

def test_what_made_outputs_is_noted_of_every_notebook():
    assert not (new := unmarked()), f'{", ".join(new)} were not run in place: make notebooks'

def test_outputs_say_nothing_of_the_machine():
    "No environment, no folder of whoever ran them; and no warnings, which name such folders"
    def told(path):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        return json.dumps([o for c in cells for o in c.get('outputs', ())])
    words = ("'PATH': ", str(ROOT), sys.prefix, '/site-packages/', '"name": "stderr"')
    texts = {p.name: told(p) for p in notebooks()}
    assert not (bad := {name: w for name,text in texts.items() for w in words if w in text}), bad

def pictures(cells):
    outputs = [o for c in cells for o in c.get('outputs', ())]
    return [o['data']['image/png'] for o in outputs if 'image/png' in o.get('data', ())]

def test_drawings_are_kept_lean():
    "Three times as many figures find room in the megabytes that notebooks may take"
    def heavy(path): return [p for p in pictures(json.loads(path.read_text(encoding='utf-8'))['cells'])
                             if lean(''.join(p)) != ''.join(p)]
    bad = [p.name for p in notebooks() if heavy(p)]
    assert not bad, f'{", ".join(bad)}: tools/run_notebooks.py with their names'

def png(pixels):
    Image.fromarray(pixels).save(kept := io.BytesIO(), 'PNG')
    return base64.b64encode(kept.getvalue()).decode()

def pixels(image):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert('RGB')).astype(int)

def test_a_drawing_in_few_colours_is_the_same_drawing():
    "No difference that is seen, transparent is white, twice is as once, and a photograph is left alone"
    drawing = np.full((60,80,4), 255, dtype=np.uint8)
    drawing[:40,:,0] = np.arange(80)*2; drawing[:40,:,1] = np.arange(40)[:,None]*6; drawing[50:] = 0
    said = lean(png(drawing))
    assert abs(pixels(said)-np.where(drawing[...,3:]==0, 255, drawing[...,:3])).max() <= 12 # of 255
    assert (pixels(said)[55:] == 255).all() and lean(said) == said
    photograph = png(np.random.default_rng(0).integers(0, 256, (120,120,3), dtype=np.uint8))
    assert lean(photograph) == photograph and PHOTOGRAPH < 120*120

def test_warnings_are_told_and_not_kept():
    kept = nbformat.v4.new_output('stream', name='stdout', text='7')
    told = nbformat.v4.new_output('stream', name='stderr', text='/a/folder/b.py:3: UserWarning: so')
    red = png(np.full((40,40,3), (200,0,0), np.uint8))
    drawn = nbformat.v4.new_output('display_data', {'image/png': red})
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('f()', outputs=[told, kept, drawn])])
    assert tidy(nb) == [told.text]
    assert [o.get('text') for o in nb.cells[0].outputs] == ['7', None] and pictures(nb.cells) == [lean(red)]

def test_a_drawing_of_the_same_is_the_same_text(tmp_path):
    "Else a page that was run again differs in hundreds of lines"
    draw = ("%config InlineBackend.figure_formats = ['svg']\nimport matplotlib.pyplot as plt\n"
            "plt.plot([1, 2], [0, 1], 's');")
    twice, file = [nbformat.v4.new_code_cell(draw) for _ in range(2)], tmp_path/'drawn.ipynb'
    nbformat.write(nbformat.v4.new_notebook(cells=twice), file); run(file)
    a, b = (o.data['image/svg+xml'] for c in nbformat.read(file, 4).cells
            for o in c.outputs if 'image/svg+xml' in o.get('data', ()))
    assert a == b and 'xlink:href' in a and '1970-01-01' in a

def test_nothing_is_recorded_that_is_not_there():
    assert set(recorded()) <= {p.relative_to(ROOT/'nbs').as_posix() for p in notebooks()}

@pytest.fixture
def house(tmp_path):
    "A room of one module, a second room that uses it, a page with a report"
    def notebook(path, *cells):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = ([{'cell_type': 'code', 'source': s} for s in cells]
                + [{'cell_type': 'markdown', 'source': 'words'}])
        path.write_text(json.dumps({'cells': made}))
    for path, text in {'refine_nb/__init__.py': '', 'refine_nb/base/__init__.py': 'from .core import f',
                       'refine_nb/base/core.py': 'def f():\n    "One line"\n    return 1',
                       'refine_nb/vision/__init__.py': 'from .eye import g',
                       'refine_nb/vision/eye.py': 'from ..base import f\ndef g(): return f()',
                       'refine_nb/vision/other.py': '',
                       'refine_nb/published/tab1_x.csv': 'a', 'refine_nb/published/tab1_y.csv': 'a',
                       'reports/tab1_x/small/v/tidy.csv': '1',
                       'reports/tab1_x/demo/v/tidy.csv': '1', 'reports/tab1_y/small/v/tidy.csv': '1'}.items():
        (tmp_path/path).parent.mkdir(parents=True, exist_ok=True); (tmp_path/path).write_text(text)
    notebook(tmp_path/'nbs'/'base'/'00_core.ipynb', 'x = 1')
    notebook(tmp_path/'nbs'/'vision'/'00_eye.ipynb', 'from refine_nb.base import f', 'f()')
    notebook(tmp_path/'nbs'/'tab1_x.ipynb', 'from refine_nb.vision import g', 'g()')
    record(notebooks(tmp_path), tmp_path)
    assert stale(tmp_path) == unmarked(tmp_path) == []
    return tmp_path

@pytest.mark.parametrize('path, text, gone', [
    # through two doors
    ('refine_nb/base/core.py', 'def f():\n    "One line"\n    return 2',
     ['tab1_x.ipynb', 'vision/00_eye.ipynb']),
    ('refine_nb/base/core.py', '# a comment\ndef f():\n    "One line"\n    return 1', []),
    ('refine_nb/vision/eye.py', 'def g(): return 3', ['tab1_x.ipynb']),
    ('reports/tab1_x/small/v/tidy.csv', '2', ['tab1_x.ipynb']), ('reports/tab1_x/demo/v/tidy.csv', '2', []),
    ('reports/tab1_y/small/v/tidy.csv', '2', []), ('refine_nb/published/tab1_x.csv', 'b', ['tab1_x.ipynb']),
    ('refine_nb/published/tab1_y.csv', 'b', [])])
def test_what_makes_outputs_stale(house, path, text, gone):
    (house/path).write_text(text)
    assert stale(house) == gone

def test_a_changed_cell_is_noticed_and_prose_is_free(house):
    path = house/'nbs'/'base'/'00_core.ipynb'
    before = made_by(path, house)
    nb = json.loads(path.read_text())
    nb['cells'][1]['source'] = 'other words'; path.write_text(json.dumps(nb))
    assert made_by(path, house) == before
    nb['cells'][0]['source'] = 'x = 2'; path.write_text(json.dumps(nb))
    assert stale(house) == ['base/00_core.ipynb']
