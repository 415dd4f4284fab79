"""Networks that nobody here trained, in a store: fetched once, then read without their file"""
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.testing import assert_close

from refine_nb.attacks import fgsm
from refine_nb.base import Cell, Worst, call
from refine_nb.runs import PRESETS, Given, Store, price, scaled
from refine_nb.training import Engine
from refine_nb.vision import classifier, load_data, shipped
from refine_nb.papers.protocols import grid, undefended

DIGITS = call(load_data, name='digits', size=8, n_train=10)
FRESH = call(classifier, name='resnet20', stem='cifar')


@pytest.fixture
def store(tmp_path): return Store(tmp_path, Engine('cpu'), quiet=True)

def test_weights_are_kept_and_judged(store):
    torch.manual_seed(3)
    clean = Cell(Given(DIGITS, FRESH), n_eval=30)
    attacked = replace(clean, attack=call(fgsm, eps=.3))
    both = Worst((clean, attacked))
    assert [type(s).__name__ for s in store.plan([both])] == ['Given', 'Cell', 'Cell', 'Worst']
    store.run([both])
    first, kept = store.model(clean.recipe), store.tensors(clean.recipe)
    torch.manual_seed(4) # another network would come now: the one that was judged is read
    again = Store(store.root, Engine('cpu'), quiet=True).value(clean.recipe)
    for k, v in first.state_dict().items():
        assert_close([again.state_dict()[k], kept[k]], [v, v], atol=0, rtol=0)
    assert store.get(clean).result['correct'] == store.value(clean).right.sum()

def test_a_stored_network_needs_its_file_no_more(store):
    given = Given(DIGITS, call(shipped))
    weights = shipped(num_classes=10, weights=None).state_dict()
    store.keep(given, {'data': store.data(DIGITS).fingerprint}, weights, 0.)
    with patch('refine_nb.vision.shipping.shipped_file', side_effect=FileNotFoundError('the file has gone')):
        assert_close(store.model(given).state_dict()['net.fc.weight'], weights['net.fc.weight'])
        with pytest.raises(FileNotFoundError, match='has gone'): store.get(replace(given, seed=1))

def test_reading_costs_nothing():
    given = Given(DIGITS, FRESH)
    table = price([given, Cell(given)]).set_index('what')
    assert table.seconds['read (classifier)'] == 0 < table.seconds['evaluate (clean)']

@pytest.mark.parametrize('name', ['small', 'gpu', 'paper'])
def test_protocols_are_the_same_at_every_real_scale(name):
    cells = tuple(grid().values())
    assert scaled(cells, PRESETS[name]) == cells
    assert all(c.recipe == undefended() for c in cells)
