"""Table 2's protocol on generated files: a tree of CINIC-10's form, a checkpoint of Places365's form.

What it needs, what it says where that is lacking, and a whole run.
"""
import warnings
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models as tv

from refine_nb.base import Recipe, key, rewrite
from refine_nb.vision import classifier, load_data
from refine_nb.training import Engine
from refine_nb.runs import PRESETS, Preset, Store, scaled
from refine_nb.papers.adcorda import cinic_baseline, refined
from refine_nb.artefacts.tab2_adcorda import ROWS, grid, lacks, tidy

CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
TOY = Preset('toy', epochs=.05, size=32, n_eval=20, steps=10, batch_size=16)
pytestmark = pytest.mark.filterwarnings('ignore:cinic10 under .* is not the published set')


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """CINIC-10/{train,valid,test}/<class>/*.png with 80, 20 and 20 images, one of them grey.
    Beside it resnet18_places365.pth.tar"""
    top, rng = tmp_path_factory.mktemp('cinic'), np.random.default_rng(0)
    for (part, n), (k, label) in product((('train', 8), ('valid', 2), ('test', 2)), enumerate(CLASSES)):
        folder = top/'CINIC-10'/part/label; folder.mkdir(parents=True)
        for i in range(n):
            x = rng.integers(0, 120, (32,32,3), dtype=np.uint8); x[3*k:3*k+5] += 120
            image = Image.fromarray(x)
            (image.convert('L') if (part, label, i) == ('train', 'cat', 0)
             else image).save(folder/f'{["cifar10", "n01"][i%2]}-{part}-{i}.png')
    torch.manual_seed(1)
    state = {f'module.{k}': v for k,v in tv.resnet18(num_classes=365).state_dict().items()
             if not k.endswith('num_batches_tracked')}
    torch.save({'epoch': 90, 'arch': 'resnet18', 'state_dict': state, 'best_prec1': 54.},
               top/'resnet18_places365.pth.tar')
    return top

@pytest.fixture
def there(world, monkeypatch):
    monkeypatch.setenv('REFINE_DATA', str(world))
    return world


def test_the_tree_is_read(there):
    d = load_data('cinic10', size=224)
    assert ([len(s) for s in (d.train, d.valid, d.test)] == [80, 20, 20] and d.classes == tuple(CLASSES)
            and d.shape == (3,224,224))
    # shuffled by the seed, nothing moved to validation
    assert (d.train.y.bincount().tolist() == [8]*10
            and d.fingerprint != load_data('cinic10', split_seed=2).fingerprint)
    assert [len(s) for s in (lambda d: (d.train, d.valid))(load_data('cinic10', split_seed=2))] == [80, 20]

def test_settings_of_the_paper(there):
    "Section 4: batch 64 and 1e-3, then 1e-4; lambda 1/2; 20 epochs; Places365 weights; random crops"
    base = cinic_baseline('resnet50'); r = refined(base)
    assert (base.batch_size, base.optimiser['lr'], base.model['weights'], base.method['augment'],
            base.data['size']) == (64, 1e-3, 'places365', 'crop_flip', 224)
    assert (r.epochs, r.batch_size, r.optimiser['lr'], r.method['coral_weight'], r.method['augment'],
            r.init) == (20, 64, 1e-4, .5, 'crop_flip', base)
    cells = [s for row in grid('resnet50').values() for pair in row for s in pair]
    assert [scaled(c, PRESETS['paper']) for c in cells] == cells

def test_weights_that_are_not_there(there):
    "ResNet-50's: the sentence names the file, where it was looked for and where to get it"
    with pytest.raises(FileNotFoundError, match='Places365 weights of resnet50 are not there: '
                       'looked for .*resnet50_places365.pth.tar.*CSAILVision places365.*REFINE_DATA'):
        classifier('resnet50', num_classes=10, weights='places365')

def test_images_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv('REFINE_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='cinic10 is not there.*CINIC-10.*unpack its archive there'):
        load_data('cinic10')

def test_what_stands_in_says_so():
    small = scaled(grid('resnet18', 'cifar10_jpeg')['-'][0][0], PRESETS['small']).recipe
    assert (lacks(small) == 'cifar10_jpeg in place of CINIC-10, without Places365 weights'
            and lacks(cinic_baseline()) == '')
    assert key(small) != key(scaled(cinic_baseline(), PRESETS['small']))

def test_the_whole_table(there, tmp_path):
    "The published grid of ResNet-18, at toy size, from the checkpoint's weights"
    faster = lambda v: (
        replace(v, optimiser=v.optimiser.but(lr=.01)) if isinstance(v, Recipe) and v.init is None else v)
    cells = {row: rewrite(scaled(c, TOY), faster) for row,c in grid('resnet18').items()}
    store, base = Store(tmp_path, Engine(), quiet=True), cells['-'][0][0].recipe
    start = store.fresh(base).state_dict()
    assert (torch.equal(start['net.conv1.weight'],
                        torch.load(there/'resnet18_places365.pth.tar')['state_dict']['module.conv1.weight'])
            and start['net.fc.weight'].shape == (10,512))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        store.run([s for row in cells.values() for pair in row for s in pair])
    table = tidy(cells, store, 'resnet18', 'cinic10').set_index('attack')
    assert tuple(table.index) == ROWS and (table.n == 20).all() and table.total['DDN'] > 0
    # A-31: on T, and on T'
    assert table.train['-'] == pytest.approx(100*(1-table.total['DDN']/80)) and table.train_source['-'] == 100
