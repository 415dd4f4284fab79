"""The published protocol, every stage of it, at a size that a test can afford.

What runs for days must not fail on its second day.
"""
import hashlib, math, shutil, warnings
from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision import models as tv

import refine_nb.vision.models, refine_nb.runs.prices
from refine_nb.base import Cell, Recipe, ancestors, key, nested, rewrite
from refine_nb.vision import classifier, load_data, to_input
from refine_nb.evaluation import predict, verdicts
from refine_nb.training import Engine, fine_tune, sgd, train_epoch
from refine_nb.refinement import Corrected, Correction, adapt, paired_batches
from refine_nb.refinement.refine import _plain
from refine_nb.runs import PRESETS, Preset, Store, images, preset, price, scaled
from refine_nb.reporting import announce
from refine_nb.papers.adcorda import ATTACKS, DATASETS, MODELS, SEEDS, baseline, control, refined
from refine_nb.artefacts.tab1_adcorda import ROWS, grid, tidy
from toys import net

BLOCKS = list(product(MODELS, DATASETS))
TOY = Preset('toy', epochs=.05, size=32, n_eval=20, steps=10) # five epochs and one; pretrained weights stay


def tiny(cells):
    "Cells at toy size; a hundred epochs at 1e-4 become five at a rate at which five teach something"
    faster = lambda v: (
        replace(v, optimiser=v.optimiser.but(lr=.02)) if isinstance(v, Recipe) and v.init is None else v)
    return rewrite(scaled(cells, TOY), faster)

def all_cells(*args, **kwargs): return [c for row in grid(*args, **kwargs).values() for c in row]


# ---- the plan ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('model,dataset', BLOCKS)
def test_the_paper_s_preset_changes_nothing(model, dataset):
    for choices in ({}, {'augment': 'crop_flip', 'storage': 'uint8', 'pairing': 'aligned'}):
        cells = all_cells(model, dataset, SEEDS, **choices)
        assert len(cells) == 24 and [scaled(c, preset('paper')) for c in cells] == cells
        assert [key(scaled(c, preset('paper'))) for c in cells] == [key(c) for c in cells]

def test_the_paper_s_preset_caps_nothing():
    "Every cap is off, those that are yet to come too: a new field of `Preset` that is on in 'paper' fails"
    assert {k: v for k,v in vars(preset('paper')).items() if k not in ('name','says')} == {
        k: v for k,v in vars(Preset('x')).items() if k not in ('name','says')}

@pytest.mark.parametrize('model,dataset', BLOCKS)
def test_plan_of_the_paper(tmp_path, model, dataset):
    """Three seeds: 3 baselines, 3 controls, 18 adaptations from 18 corrected sets (None's too), 24 cells.
    Parents first, each once"""
    cells = all_cells(model, dataset, SEEDS)
    plan = Store(tmp_path, Engine(), quiet=True).plan(cells)
    bases = [s for s in plan if isinstance(s, Recipe) and s.init is None]
    second = [s for s in plan if isinstance(s, Recipe) and s.init is not None]
    assert (Counter(s.method.name for s in second) == {'fine_tune': 3, 'adapt': 18}
            and {s.init for s in second} == set(bases) and len(bases) == 3)
    assert (Counter(type(s).__name__ for s in plan) == {'Recipe': 24, 'Correction': 18, 'Cell': 24}
            and len(set(plan)) == len(plan))
    assert Counter(s.attack.name if s.attack else None for s in plan if isinstance(s, Correction)) == {
        a: 3 for a in (None, 'll', 'bih', 'vbi', 'ddn', 'salt_and_pepper')}
    at = {s: i for i,s in enumerate(plan)}
    assert all(at[p] < at[s] for s in plan for p in nested(s)) and set(plan) == set(ancestors(*cells))

def test_keys_of_the_paper():
    "No two results of the whole table have one key; two notebooks that ask for the same baseline have"
    every = ancestors(*(c for m,d in BLOCKS for c in all_cells(m, d, SEEDS)))
    assert len(every) == 66*len(BLOCKS) == len({key(s) for s in every})
    assert key(baseline('resnet18', 'cifar10', 1)) in {key(s) for s in every}

def test_settings_of_the_paper():
    """Section 4, by hand: 100 epochs at 1e-4, batch 128 (EfficientNet 64); 224 pixels; lambda.
    Adaptation: 20 epochs at 1e-3, batch 16 (EfficientNet on CIFAR-100 32)"""
    for (model, dataset), seed in product(BLOCKS, SEEDS):
        wide = model == 'efficientnet_v2_m'
        base, weight = baseline(model, dataset, seed), 1/25 if dataset == 'cifar100' else 1/750
        assert (base.epochs, base.batch_size, base.optimiser['lr'], base.data['size'],
                base.data['split_seed'], base.data['n_train'], base.model['weights'], base.seed) == (
                    100, 64 if wide else 128, 1e-4, 224, seed, None, 'imagenet', seed)
        for r in (refined(base, 'DDN'), refined(base, 'None'), control(base)):
            assert (r.epochs, r.batch_size, r.optimiser['lr'], r.init, r.data, r.model, r.seed) == (
                20, 32 if wide and dataset == 'cifar100' else 16, 1e-3, base, base.data, base.model, seed)
        assert (refined(base, 'DDN').method['coral_weight'] == weight
                and refined(base, 'DDN').method['source'] == Correction(base, ATTACKS['DDN']))

@pytest.mark.parametrize('a,b', list(combinations(PRESETS, 2)))
def test_scales_never_mix(a, b):
    "No result of one preset is taken for one of another, parents and corrected sets included"
    at = lambda p: {
        key(s) for s in ancestors(*(scaled(c, PRESETS[p]) for c in all_cells('resnet18', 'cifar10', SEEDS)))}
    assert len(at(a)) == len(at(b)) == 66 and not at(a) & at(b)


# ---- the price ---------------------------------------------------------------------------------------------

@pytest.fixture
def nothing_there(tmp_path, monkeypatch):
    "Neither images nor weights, and nothing that could be measured in a test's time"
    for name in ('REFINE_DATA', 'TORCH_HOME'): monkeypatch.setenv(name, str(tmp_path/name.lower()))
    monkeypatch.delenv('REFINE_DOWNLOAD', raising=False)
    monkeypatch.setattr(refine_nb.runs.prices, 'speed',
                        lambda *args: {'forward': .001, 'attack': .003, 'train': .004})
    return tmp_path

@pytest.mark.parametrize('model,dataset', BLOCKS)
def test_price_of_the_paper(nothing_there, model, dataset):
    store = Store(engine=Engine(), quiet=True)
    table = price(store.plan([c for c in all_cells(model, dataset, SEEDS)]), store.engine)
    assert (table.seconds.map(math.isfinite).all() and (table.seconds > 0).all()
            and (table.time.str.len() > 0).all())
    assert table.runs.iloc[-1] == table.runs[:-1].sum() == 66
    assert_close(float(table.seconds.iloc[-1]), float(table.seconds[:-1].sum()))
    assert not (nothing_there/'refine_data').exists() and not (nothing_there/'torch_home').exists()

def test_price_by_hand(nothing_there):
    """A baseline: 100 epochs of 45,000 images to train and 5,000 to validate.
    Its adaptation: 20 epochs, source and target. A cell: 10,000 test images"""
    base = baseline('resnet18', 'cifar10', 1)
    assert images(base) == {'train': 4_500_000, 'forward': 500_000}
    assert (images(refined(base)) == {'train': 1_800_000, 'forward': 100_000}
            and images(control(base)) == {'train': 900_000, 'forward': 100_000})
    table = price([base, Cell(base)])
    assert_close(float(table.seconds.iloc[-1]), 4_500_000*.004 + 500_000*.001 + 10_000*.001)

def test_the_demo_prices_the_paper_with_nothing_there(nothing_there, tmp_path):
    p = SimpleNamespace(preset=PRESETS['demo'], model='efficientnet_v2_m', dataset='cifar100')
    said = announce('tab1_adcorda', p, Store(tmp_path, Engine()), all_cells(p.model, p.dataset, SEEDS)).banner
    assert ('**small**' in said and '**paper**' in said and '-p preset paper -p model efficientnet_v2_m -p '
            'dataset cifar100' in said and 'nan' not in said and ' days on this machine' in said)


# ---- the whole protocol ------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder with a JPEG tree of 150 and 20 images that have something to learn,
    and one with generated 'ImageNet' weights of a ResNet-18"""
    top, rng, seen = tmp_path_factory.mktemp('world'), np.random.default_rng(0), []
    for (part, n), (k, label) in product((('train', 15), ('test', 2)), enumerate(
            'airplane automobile bird cat deer dog frog horse ship truck'.split())):
        folder = top/'data'/'cifar-10-images'/part/label; folder.mkdir(parents=True)
        for i in range(n):
            x = rng.integers(0, 120, (32,32,3), dtype=np.uint8); x[3*k:3*k+5] += 120
            Image.fromarray(x).save(folder/f'{i:04d}.jpg'); seen.append(x)
    torch.manual_seed(3); raw, made = top/'weights.pth', tv.resnet18(num_classes=1000)
    # one pass gives running statistics that fit, as those of real weights do
    for m in made.modules(): m.momentum = 1.
    made(torch.tensor(np.stack(seen)).permute(0,3,1,2)/255*4-2)
    torch.save(made.state_dict(), raw)
    name = f'resnet18-{hashlib.sha256(raw.read_bytes()).hexdigest()[:8]}.pth'
    (top/'torch'/'hub'/'checkpoints').mkdir(parents=True)
    return SimpleNamespace(top=top, file=raw.rename(top/'torch'/'hub'/'checkpoints'/name),
                           url=f'https://download.example.org/{name}')

@pytest.fixture
def there(world, monkeypatch):
    "Everything that the paper's preset needs is there, and the published address is that of our weights"
    monkeypatch.setenv('REFINE_DATA', str(world.top/'data'))
    monkeypatch.setenv('TORCH_HOME', str(world.top/'torch'))
    monkeypatch.delenv('REFINE_DOWNLOAD', raising=False)
    monkeypatch.setattr(refine_nb.vision.models, '_published',
                        lambda name, weights: SimpleNamespace(url=world.url))
    return world

@pytest.fixture(scope='module')
def ran(world, tmp_path_factory):
    """The published grid of one model and seed, from pretrained weights, one epoch each.
    Besides: the store that made it"""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter('ignore'); torch.manual_seed(0)
        patch.setenv('REFINE_DATA', str(world.top/'data')); patch.setenv('TORCH_HOME', str(world.top/'torch'))
        patch.setattr(refine_nb.vision.models, '_published',
                      lambda name, weights: SimpleNamespace(url=world.url))
        store = Store(tmp_path_factory.mktemp('ran'), Engine(), quiet=True)
        cells = {row: tiny(c) for row,c in grid('resnet18', 'cifar10_jpeg', (1,)).items()}
        store.run([c for row in cells.values() for c in row])
    yield SimpleNamespace(store=store, cells=cells, base=cells['-'][0].recipe)
    shutil.rmtree(store.root)                     # 400 MB

pytestmark = pytest.mark.filterwarnings('ignore:cifar10_jpeg under .* is not the published set')

def test_toy_size_is_the_protocol(ran):
    """What ran is the published grid but for epochs, the baseline's rate, steps, pixels
    and the number of test images"""
    published = baseline('resnet18', 'cifar10_jpeg')
    assert replace(ran.base, epochs=100, optimiser=ran.base.optimiser.but(lr=1e-4),
                   data=ran.base.data.but(size=224)) == published
    assert ([c.recipe.epochs for cs in ran.cells.values() for c in cs] == [5]+[1]*7
            and {c.recipe.optimiser['lr'] for cs in ran.cells.values() for c in cs} == {.02, 1e-3})

def test_every_row_is_made_and_nothing_is_left_to_do(ran, there):
    assert tuple(ran.cells) == ROWS and ran.store.plan([c for cs in ran.cells.values() for c in cs]) == []
    table = tidy(ran.cells, ran.store, 'resnet18', 'cifar10_jpeg')
    assert (list(table.attack) == list(ROWS) and (table.n == 20).all()
            and table.accuracy.between(0, 100).all() and table.train_s.gt(0).all())
    assert table.corrected.notna().sum() == 5 and table.total[table.corrected.notna()].nunique() == 1

def test_the_baseline_starts_from_the_pretrained_weights(ran, there):
    state, start = torch.load(there.file), ran.store.fresh(ran.base).state_dict()
    body = [k for k in state if not k.startswith('fc.')]
    assert (len(body) > 100 and all(torch.equal(start[f'net.{k}'], state[k]) for k in body)
            and start['net.fc.weight'].shape == (10, 512))
    made = ran.store.tensors(ran.base)
    moved = (made['net.layer1.0.conv1.weight']
             -state['layer1.0.conv1.weight']).norm()/state['layer1.0.conv1.weight'].norm()
    assert 0 < moved < .2                         # five steps away: still those weights

def test_stored_weights_need_no_pretrained_ones(ran, there, monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'empty'))
    ran.store.model(ran.base)
    with pytest.raises(FileNotFoundError, match=f'imagenet weights of resnet18 are not there: '
                       f'looked for {there.file.name} in .*empty.*REFINE_DOWNLOAD=1'):
        ran.store.fresh(ran.base)

def test_damaged_pretrained_weights(ran, there, monkeypatch, tmp_path):
    folder = tmp_path/'hub'/'checkpoints'; folder.mkdir(parents=True)
    (folder/there.file.name).write_bytes(there.file.read_bytes()[:-100])
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(ValueError, match='is damaged: its sha256 does not begin with'):
        ran.store.fresh(ran.base)

@pytest.mark.parametrize('row', ROWS[2:])
def test_a_corrected_set(ran, there, row):
    """T_a: images that the baseline gets wrong, and right once they are corrected, within the budget.
    T_c is untouched"""
    t, data = ran.store.value(ran.cells[row][0].recipe.method['source']), ran.store.data(ran.base.data)
    model = ran.store.model(ran.base)
    assert_close(t.right, verdicts(model, data.train, size=32))
    assert t.n_wrong > 50 and not t.right[t.index].any() and len(t.members) == t.right.sum()+t.n_corrected
    if row == 'None': return
    assert t.x.min() >= 0 and t.x.max() <= 1 and t.x.shape[1:] == (3,32,32)
    assert_close(predict(model, _plain(t.x)), data.train.y[t.index])
    if row in ('LL','BIH','VBI') and t.n_corrected: assert 0 < t.linf.max() <= 2/255+1e-6
    if row in ('VBI','DDN','SP'): assert t.n_corrected > 0, 'an attack towards the true class corrects some'

def test_refined_weights_differ(ran, there):
    "from the baseline's, the control's and each other's where T' differs"
    heads = {row: ran.store.tensors(c[0].recipe)['net.fc.weight'] for row,c in ran.cells.items()}
    n = {row: ran.store.get(c[0].recipe.method['source']).result['corrected']
         for row,c in ran.cells.items() if row in ROWS[2:]}
    assert all(not torch.equal(heads[a], heads[b])
               for a,b in combinations(heads, 2) if n.get(a, -1) or n.get(b, -1))
    logs = ran.store.get(ran.cells['VBI'][0].recipe).result['history'][0]
    assert_close(logs['loss'], logs['class_loss'] + logs['coral_loss']/750, rtol=1e-4, atol=1e-5)

def test_uint8_storage_and_aligned_pairs(ran, there):
    "The two choices of the notebook, from the same baseline"
    cell, = tiny(grid('resnet18', 'cifar10_jpeg', (1,), storage='uint8', pairing='aligned')['VBI'])
    assert [type(s).__name__ for s in ran.store.plan([cell])] == ['Correction', 'Recipe', 'Cell']
    ran.store.get(cell)
    t = ran.store.value(cell.recipe.method['source'])
    assert t.x.dtype == torch.uint8 and t.n_corrected > 0


# ---- what only the paper's scale uses ----------------------------------------------------------------------

def test_at_224_pixels(there):
    "Stored images are resized on the way in, in training, pairing and evaluation, and the network takes them"
    data = load_data('cifar10_jpeg', size=224, n_train=4)
    assert data.shape == (3,224,224) and data.train.x.shape == (4,3,32,32)
    model = classifier('resnet18', num_classes=10, weights='imagenet')
    method = fine_tune(data, batch_size=4, seed=1)
    x, y, i = next(method.batches(0))
    assert x.shape == (4,3,224,224) and 0 <= x.min() and x.max() <= 1
    assert ((torch.nn.functional.interpolate(x, (32,32), mode='area') - to_input(data.train.x[i])).abs()
            .mean() < .05)  # the same pictures
    before = model.net.fc.weight.clone()
    log = train_epoch(model, method, sgd(model.parameters(), lr=.01), epoch=0, epochs=1, seed=1, quiet=True)
    assert math.isfinite(log['loss']) and not torch.equal(before, model.net.fc.weight)
    assert predict(model, data.train.x[:2], size=224).shape == (2,)

def test_efficientnet():
    "EfficientNetV2-M: its published size, a training step at batch 2, logits"
    with torch.device('meta'):
        assert sum(p.numel() for p in tv.efficientnet_v2_m().parameters()) == 54_139_356
    model, (x, y) = (classifier('efficientnet_v2_m', num_classes=100).train(),
                     (torch.rand(2,3,64,64), torch.tensor([3,99])))
    optimiser, head = sgd(model.parameters(), lr=.01), model.net.classifier[1]
    before = head.weight.detach().clone()
    loss = torch.nn.functional.cross_entropy(model(x), y); loss.backward(); optimiser.step()
    assert (loss.isfinite() and not torch.equal(before, head.weight)
            and all(p.grad is not None for p in model.parameters()))
    with torch.no_grad(): z = model.eval()(x)
    assert z.shape == (2,100) and z.isfinite().all() and not torch.equal(z[0], z[1])

def step_of(precision, method, seed=1):
    "Weights and loss after one epoch of a small network"
    torch.manual_seed(seed); model = net(num_classes=10)
    model[3].p = 0.                               # dropout draws differ between number types
    return train_epoch(model, method, sgd(model.parameters(), lr=.1), epoch=0, epochs=1, seed=1,
                       engine=Engine(precision=precision), quiet=True), model

@pytest.mark.parametrize('kind', ['fine_tune', 'adapt'])
def test_bfloat16(kind):
    "Autocast is on (the numbers differ), works (they differ little), and the weights stay float32"
    data = load_data('digits', n_train=128)
    right = torch.arange(128) < 96
    source = Corrected(right, torch.arange(96, 112), to_input(data.train.x[96:112]),
                       torch.zeros(16), torch.zeros(16))
    method = (fine_tune(data, batch_size=32, seed=1) if kind == 'fine_tune'
              else adapt(data, source=source, batch_size=32, seed=1, coral_weight=.5))
    (log, model), (log16, model16) = (step_of(p, method) for p in ('float32', 'bfloat16'))
    assert log['loss'] != log16['loss'] and abs(log['loss']-log16['loss']) < .05*log['loss']
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model16.parameters())
    assert_close(model16[5].weight, model[5].weight, atol=.05, rtol=.1)
    if kind == 'adapt': assert math.isfinite(log16['coral_loss']) and log16['coral_loss'] > 0

def test_bfloat16_on_a_resnet():
    torch.manual_seed(0)
    model, data = classifier('resnet18', num_classes=10), load_data('digits', n_train=16, size=32)
    log = train_epoch(Engine().place(model), fine_tune(data, batch_size=16, seed=1),
                      sgd(model.parameters()), epoch=0, epochs=1, seed=1,
                      engine=Engine(precision='bfloat16'), quiet=True)
    assert math.isfinite(log['loss']) and model.net.conv1.weight.dtype == torch.float32

def test_channels_last():
    "The layout in which networks lie: the same logits, within rounding, as in the plain one"
    torch.manual_seed(0); model = classifier('resnet18', num_classes=10).eval(); x = torch.rand(4,3,32,32)
    with torch.no_grad():
        plain = model(x)
        placed = Engine().place(model)
        assert placed.net.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
        assert_close(placed(x.contiguous(memory_format=torch.channels_last)), plain, atol=1e-4, rtol=1e-4)

def test_pairs_are_channels_last(ran, there):
    data, t = ran.store.data(ran.base.data), ran.store.value(ran.cells['VBI'][0].recipe.method['source'])
    x_s, _, x_t = next(paired_batches(data, t, batch_size=8, seed=1, epoch=0))
    assert all(x.is_contiguous(memory_format=torch.channels_last) and x.shape == (8,3,32,32)
               for x in (x_s, x_t)) and not torch.equal(x_s, x_t)
