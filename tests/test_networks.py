"The trained networks in reports/networks/: whole, of the page in their name, and as good as recorded."
import os
from importlib import import_module
from pathlib import Path

import pytest

from refine_nb.base import Cell, ancestors, key
from refine_nb.evaluation import predict
from refine_nb.reporting import leaves
from refine_nb.runs import Store, import_results, preset, scaled
from refine_nb.training import Engine
from refine_nb.vision import data_place, load_data

FOLDER = Path(__file__).resolve().parents[1]/'reports'/'networks'
ARCHIVES = {p.stem: p for p in sorted(FOLDER.glob('*.tar'))}


@pytest.fixture(scope='module', params=ARCHIVES)
def archive(request, tmp_path_factory):
    "(store with its results, results that the page asks for at its preset, row -> cells)"
    page, _, at = request.param.rpartition('_')
    rows = import_module(f'refine_nb.artefacts.{page}').grid()
    rows = {k: [scaled(c, preset(at)) for c in leaves(v)] for k,v in rows.items()}
    store = Store(tmp_path_factory.mktemp('store'), Engine('cpu'), quiet=True)
    return store, import_results(store, ARCHIVES[request.param]), rows


def test_each_archive_is_described():
    told = (FOLDER/'README.md').read_text(encoding='utf-8')
    assert ARCHIVES and all(f'`{p.name}`' in told for p in ARCHIVES.values())
    assert sum(p.stat().st_size for p in ARCHIVES.values()) < 4e6


def test_it_holds_whole_rows_of_its_page_and_nothing_else(archive):
    store, found, rows = archive
    assert found['new'] and not found['different']
    done = [cells for cells in rows.values() if not store.plan(cells)]
    asked = {f'{type(s).__name__.lower()}/{key(s)}': s for s in ancestors(*sum(done, []))}
    assert done and asked.keys() >= set(found['new'])
    for name in found['new']:
        entry = store.find(asked[name])
        assert entry.whole and not entry.made['dirty'] and entry.made['commit']
        assert all(t.isfinite().all() for t in entry.tensors().values())


def test_its_networks_still_answer_as_recorded(archive):
    store, _, rows = archive
    there = [c for cells in rows.values() for c in cells if not store.plan([c])]
    cells = [c for c in there if isinstance(c, Cell) and c.attack is None]
    assert cells
    for c in cells:
        name = c.recipe.data['name']
        if not os.environ.get('REFINE_DATA') or not data_place(name).exists():
            pytest.skip(f'REFINE_DATA has no {name}')
        test = load_data(name).test
        right = store.value(c).right[:1000]
        now = predict(store.model(c.recipe), test.x[:1000])==test.y[:1000]
        assert right.float().mean() > .9 and int((now!=right).sum()) <= 1 # another processor rounds otherwise
