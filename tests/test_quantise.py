"An int8 network is integers all the way: its arithmetic, files, gradients, and place among a store's specs."
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.ao.quantization.observer import ObserverBase
from torch.nn.utils import prune, weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.testing import assert_close

from refine_nb.base import Cell, Recipe, call, key
from refine_nb.attacks import attacking, bih, salt_and_pepper
from refine_nb.evaluation import predict, verdicts
from refine_nb.refinement import (BACKENDS, Correction, Int8, Quantised, Simulation, StraightThrough, adapt,
                                  calibrate, integers, mebibytes, prepared, quantise, restored, through_int8)
from refine_nb.runs import PRESETS, scaled
from refine_nb.vision import cosine_head, dual_norms
from refine_nb.papers.adcorda import baseline, control_int8, refined_int8
from toys import Worker, images, net, quiet, recipe, teach, work

HERE = [b for b in torch.backends.quantized.supported_engines if b in BACKENDS]
# without it oneDNN's int8 sums saturate: torch warns
VNNI = getattr(torch.cpu, '_is_vnni_supported', lambda: True)()
BASE = recipe()
SP = call(salt_and_pepper, targeted=True, steps=50)



def int8(attack=SP):
    "A corrected set of the int8 network, and the adaptation from it through int8"
    q = Quantised(BASE, n_calibrate=100)
    method = call(through_int8,
                  method=call(adapt, source=Correction(q, attack), coral_weight=.1), n_calibrate=100)
    return Quantised(replace(BASE, init=BASE, method=method, epochs=2, batch_size=16), n_calibrate=100)

def trained(seed=0):
    "A toy network whose running statistics are not those of a new one"
    torch.manual_seed(seed); model = net(num_classes=10); data = images()
    for _ in range(3): model.train()(data.train.x[:64].float()/255)
    return model.eval(), data


@pytest.mark.parametrize('backend', HERE)
def test_a_convolution_by_hand_in_whole_numbers(backend):
    "round(s_x s_w/s_y (sum (x_q-z_x) w_q + b_q)) + z_y, which no floating-point network gives"
    torch.manual_seed(1); data = images(); model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten())
    net8 = quantise(model, data, backend=backend, observer='minmax', n_calibrate=100); t = integers(net8)
    x = data.test.x[:20].float()/255
    s_x, z_x = (next(v for k,v in t.items() if k.endswith(e)).item() for e in ('_scale_0', '_zero_point_0'))
    x_q = (x/s_x+z_x).round().clamp(0, 255)-z_x
    unit = (s_x*t['0.weight_scale'].double()).view(1,-1,1,1)
    total = (nn.functional.conv2d(x_q.double(), t['0.weight'].double())
             + (t['0.bias'].view(1,-1,1,1)/unit).round())
    assert torch.equal(total, total.round())
    y_q = (total*unit/t['0.scale']).round()+t['0.zero_point']
    y_8 = (net8(x)/t['0.scale']).round().view_as(y_q)+t['0.zero_point']
    # some backends do not round the bias
    assert (y_q.clamp(0, 255)-y_8).abs().max() <= 1 and (y_q.clamp(0, 255)==y_8).double().mean() > .99


@pytest.mark.parametrize('backend', HERE)
def test_through_a_file_without_pickles(backend):
    model, data = trained(); net8 = quantise(model, data, backend=backend, n_calibrate=100)
    x = data.test.x.float()/255
    state = integers(net8)
    assert ({t.dtype for t in state.values()} == {torch.int8, torch.float32, torch.int64}
            and not any(t.is_quantized for t in state.values()))
    again = restored(trained(seed=1)[0], load(save(state)), backend=backend)
    assert torch.equal(again(x), net8(x)) and len(net8(x).unique()) <= 256
    assert not torch.equal(restored(model, {**state, '5.weight': -state['5.weight']},
                                    backend=backend)(x), net8(x))


class Wide(nn.Module):
    "A block of WideResNet and PreActResNet: norms come first, no convolution has a bias"
    def __init__(self):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.short, self.last = nn.Conv2d(1, 4, 1, bias=False), nn.Linear(256, 10, bias=False)
    def forward(self, x):
        h = self.bn1(x).relu()
        return self.last((self.conv2(self.bn2(self.conv1(h)).relu()) + self.short(h)).flatten(1))

class Scaled(nn.Module):
    "A parameter of the network itself, beside its layers"
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(256, 10)
        self.by = nn.Parameter(torch.ones(1, 4, 1, 1))
    def forward(self, x): return self.last((self.conv(x)*self.by).relu().flatten(1))

class Viewed(nn.Module):
    "Flattens as LeNet, VGG and TRADES' network were written, once by each of their ways"
    def __init__(self):
        super().__init__()
        self.conv, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.mid, self.last = nn.Linear(256, 16), nn.Linear(16, 10)
    def forward(self, x):
        h = self.second(self.conv(x).relu()).relu().view(-1, 256)
        return self.last(self.mid(h).relu().view(h.size(0), -1))

def behind(*parts):
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *parts, nn.Flatten(), nn.Linear(256, 10))

class Turns(nn.Module): # its path hangs on its input
    def __init__(self): super().__init__(); self.last = nn.Linear(64, 10)
    def forward(self, x): return self.last(x.flatten(1) if x.sum() > 0 else -x.flatten(1))

def bent(layer, by): by(layer); return layer
def half(layer): prune.l1_unstructured(layer, 'weight', .5)

class Keeps(nn.Module): # its last activation, with the graph, and a lock
    def __init__(self): super().__init__(); self.lock, self.kept = threading.Lock(), None
    def forward(self, x): self.kept = x.relu(); return self.kept

KINDS = {'prelu': lambda: behind(nn.PReLU()), 'prelu a channel': lambda: behind(nn.PReLU(4)),
         'elu': lambda: behind(nn.ELU()), 'hard swish': lambda: behind(nn.Hardswish()),
         'leaky': lambda: behind(nn.LeakyReLU(.1)), 'sigmoid': lambda: behind(nn.Sigmoid()),
         'gelu': lambda: behind(nn.GELU()), 'norm after relu': lambda: behind(nn.ReLU(), nn.BatchNorm2d(4)),
         'group norm': lambda: behind(nn.GroupNorm(2, 4), nn.ReLU()),
         'layer norm': lambda: behind(nn.LayerNorm([4, 8, 8])),
         'instance norm': lambda: behind(nn.InstanceNorm2d(4, affine=True)),
         'transposed': lambda: behind(nn.ConvTranspose2d(4, 4, 3, padding=1)),
         'eight transposed': lambda: nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
             nn.ConvTranspose2d(8, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(648, 10)),
         'padded alike': lambda: behind(nn.Conv2d(4, 4, 3, padding='same', dilation=2)),
         'cosine head': lambda: cosine_head(behind()), 'wide': Wide, 'scaled': Scaled,
         'viewed': Viewed,
         'weight norm': lambda: behind(bent(nn.Conv2d(4, 4, 3, padding=1), weight_norm)),
         'spectral norm': lambda: behind(bent(nn.Conv2d(4, 4, 3, padding=1), spectral_norm)),
         'pruned': lambda: behind(bent(nn.Conv2d(4, 4, 3, padding=1), half)),
         'kept': lambda: behind(Keeps())}

def random(make, seed):
    "Weights and statistics that no other seed has"
    torch.manual_seed(seed); model = make().eval()
    for p in model.parameters(): p.data.normal_(std=.3)
    for b in model.buffers():
        if b.is_floating_point(): b.uniform_(.5, 1.5)
    return model

@pytest.mark.parametrize('backend', [b for b in ('x86', 'qnnpack') if b in HERE]) # a scale a channel, and one
@pytest.mark.parametrize('kind', KINDS)
def test_stored_and_fresh_are_one_network(kind, backend):
    "Bit for bit, into other weights; and near the float network: a wrong kernel was 25 % off and more"
    model, data = random(KINDS[kind], 0), images(); x = data.test.x[:100].float()/255
    net8 = quantise(model, data, backend=backend, n_calibrate=100)
    again = restored(random(KINDS[kind], 1), load(save(integers(net8))), backend=backend)
    assert torch.equal(again(x), net8(x)) and torch.equal(net8(x), net8(x))
    assert_close(integers(again), integers(net8), rtol=0, atol=0)
    assert (net8(x)-model(x)).square().mean() < .1**2*model(x).square().mean()

@pytest.mark.parametrize('kind', ['prelu', 'group norm', 'layer norm', 'scaled'])
def test_the_simulation_follows_what_no_kernel_takes_over(kind):
    model, data = random(KINDS[kind], 0), images(); x = data.test.x[:50].float()/255
    watched = calibrate(prepared(model), data, 100); moved = random(KINDS[kind], 1)
    sim, fresh = (Simulation(model, watched).follow(m) for m in (moved, model))
    whole = Simulation(moved, calibrate(prepared(moved), data, 100)).follow(moved)
    assert not torch.equal(sim(x), fresh(x))
    floats = lambda s: {k: v for k,v in s.graph.state_dict().items() if not k.startswith('activation_post')}
    assert_close(floats(sim), floats(whole), rtol=0, atol=0)


def test_a_network_that_flattens_by_view_is_one_like_others():
    "Evaluated, and trained through: its twin, which reshapes, gives the same bits"
    class Flat(Viewed):
        def forward(self, x):
            h = self.second(self.conv(x).relu()).relu().reshape(-1, 256)
            return self.last(self.mid(h).relu().reshape(h.size(0), -1))
    data = images(); a, b = (random(kind, 0) for kind in (Viewed, Flat)); x = data.test.x[:100]
    for m in (a, b): m.to(memory_format=torch.channels_last)
    net8, twin = (quantise(m, data, n_calibrate=100) for m in (a, b))
    assert torch.equal(predict(net8, x), predict(twin, x)) and torch.equal(net8(x/255.), twin(x/255.))
    sims = [Simulation(m, calibrate(prepared(m), data, 100)).follow(m)(x/255.) for m in (a, b)]
    assert torch.equal(*sims)

@pytest.mark.parametrize('pool', [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(4), nn.MaxPool2d(2)], ids=str)
def test_the_simulation_rounds_behind_a_pooling(pool):
    "Before and behind it stands one and the same observer; a mean of rounded numbers is rounded again"
    torch.manual_seed(0); data = images(); x = data.test.x.float()/255
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), pool, nn.Flatten(),
                          nn.Linear(64, 10)).eval()
    watched = calibrate(prepared(model), data, 100); sim = Simulation(model, watched).follow(model)
    assert not any(isinstance(m, ObserverBase) for m in sim.graph.modules())
    net8 = Int8(watched); steps = ((sim(x)-net8(x))/integers(net8)['5.scale']).round()
    assert (steps==0).double().mean() > .85 # .78 without; what is left are ties

def test_training_through_int8_wants_a_weight_that_is_there():
    net, data = nn.Sequential(nn.Flatten(), old_weight_norm(nn.Linear(64, 10))), images()
    with pytest.raises(ValueError, match='the weight of 1 is made by a hook.*and lags a step'):
        Simulation(net, calibrate(prepared(net), data, 100))


def test_the_gradient_is_the_counterpart_s_and_the_value_is_not():
    model, data = trained(); both = StraightThrough(quantise(model, data, n_calibrate=100), model)
    x = (data.test.x[:30].float()/255).requires_grad_(); way = torch.randn(30, 10)
    of = lambda m: torch.autograd.grad((m(x)*way).sum(), [x, *model.parameters()])
    assert_close(of(both), of(model), rtol=0, atol=0)
    assert_close(both(x), both.quantised(x), rtol=1e-5, atol=1e-6)
    assert (both(x)-model(x)).abs().max() > 1e-3


def test_an_attack_gives_the_network_back():
    model, data = trained(); model.train()
    both = StraightThrough(quantise(model, data, n_calibrate=100), model)
    before = ([p.requires_grad for p in both.parameters()], [m.training for m in both.modules()],
              integers(both.quantised))
    x, y = data.train.x[:20].float()/255, data.train.y[:20]
    x_adv = bih(both, x, y, eps=.1)
    assert not torch.equal(x_adv, x) and (x_adv-x).abs().max() <= .1+1e-6
    assert before[:2] == ([p.requires_grad for p in both.parameters()], [m.training for m in both.modules()])
    assert_close(integers(both.quantised), before[2], rtol=0, atol=0)
    with attacking(both): assert not both.counterpart.training


@pytest.mark.parametrize('backend', HERE)
def test_the_simulation_is_the_int8_network(backend):
    if backend == 'onednn' and not VNNI:
        pytest.skip("oneDNN's int8 kernels saturate on a processor without VNNI")
    model, data = trained(); watched = calibrate(prepared(model, backend=backend), data, 100)
    x = data.test.x.float()/255
    sim = Simulation(model, watched, backend=backend).follow(model)
    unit = integers(Int8(watched, backend=backend))['5.scale']
    steps = ((sim(x)-Int8(watched, backend=backend)(x))/unit).round().abs()
    assert steps.max() <= 2 and (steps==0).double().mean() > .95


@pytest.mark.parametrize('norm', ['frozen', 'batch'])
def test_statistics_stay_only_where_they_are_frozen(norm):
    model, data = trained(); was = model[1].running_mean.clone(); model.train()
    method = through_int8(data, method=call(teach), batch_size=32, seed=1, n_calibrate=100, norm=norm)
    loss, _ = method.step(model, next(method.batches(0)), 0.); loss.backward()
    assert (torch.equal(model[1].running_mean, was) == (norm=='frozen')
            and all(p.grad.abs().sum() > 0 for p in model.parameters()))


def test_mistakes():
    model, data = trained()
    with pytest.raises(ValueError,
                       match="cannot be traced for the backend 'onednn', so it cannot be quantised"):
        if 'onednn' not in HERE: pytest.skip('no such kernels here')
        quantise(Turns(), data, backend='onednn', n_calibrate=100)
    with pytest.raises(ValueError, match="no int8 kernels here: choose one of "):
        quantise(model, data, backend='cuda')
    with pytest.raises(ValueError, match='must be at least 50, the images of a batch, got 20'):
        quantise(model, data, n_calibrate=20)
    with pytest.raises(ValueError, match='n_calibrate 1000 is more than the 128 training images'):
        quantise(model, data)
    with pytest.raises(ValueError, match='does not follow a convolution'):
        Simulation(odd := nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)),
                   calibrate(prepared(odd), data, 50))


@pytest.mark.parametrize('odd,says', [({'padding': 1, 'padding_mode': 'circular'}, "1 pads by 'circular'"),
                                      ({'padding': 'same', 'kernel_size': 2}, '1 pads more on one side')])
def test_padding_that_no_kernel_has_is_told_by_its_layer(odd, says):
    with pytest.raises(ValueError, match=says):
        quantise(behind(nn.Conv2d(4, 4, **{'kernel_size': 3, **odd})), images(), n_calibrate=100)

def test_training_through_int8_names_what_it_cannot_follow():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__(); self.mix, self.last = nn.MultiheadAttention(8, 2), nn.Linear(64, 10)
        def forward(self, x): return self.last(self.mix(x[:, 0], x[:, 0], x[:, 0])[0].flatten(1))
    for odd, says in ((Attends(), 'cannot be traced, so it cannot be trained'),
                      (dual_norms(net(num_classes=10)), 'train single_norms')):
        watched = calibrate(prepared(odd), images(), 100)
        with pytest.raises(ValueError, match=says): Simulation(odd, watched)

def test_tied_weights_count_once_on_disk():
    layer = nn.Linear(64, 64); one, two = nn.Sequential(layer), nn.Sequential(layer, layer)
    assert mebibytes(one.state_dict()) == mebibytes(two.state_dict())

def test_a_backend_of_another_machine(monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), 'supported_engines', ['none', 'qnnpack'])
    model, data = trained()
    with pytest.raises(ValueError,
                       match="the backend 'x86' has no int8 kernels here: choose one of 'qnnpack'$"):
        quantise(model, data)
    assert Quantised(BASE).backend == 'x86' # a value may be read anywhere


# ---- in the store ------------------------------------------------------------------------------------------

def test_specs_of_an_int8_network(tmp_path):
    store, last = quiet(tmp_path, every=3600.), Cell(int8())
    assert [type(s).__name__ for s in store.plan([last])] == [
        'Recipe', 'Quantised', 'Correction', 'Recipe', 'Quantised', 'Cell']
    store.run([last, Cell(int8().recipe), Cell(Quantised(BASE, n_calibrate=100))])
    data, q = store.data(BASE.data), Quantised(BASE, n_calibrate=100)
    right = verdicts(store.model(q), data.train)
    assert (torch.equal(store.value(Correction(q, SP)).right, right) and right.tolist()
            == verdicts(quantise(store.model(BASE), data, n_calibrate=100), data.train).tolist())
    tuned = store.get(int8().recipe).result
    # chosen by what is deployed
    assert tuned['best_accuracy'] == verdicts(store.model(int8()), data.valid).float().mean().item()
    assert (key(q) != key(Quantised(BASE, n_calibrate=101))
            and store.get(q).result['mebibytes'] < .5*store.get(q).result['float_mebibytes'])


@pytest.mark.parametrize('when', ['kill:1:0', 'kill:2:3'])
def test_a_killed_run_through_int8(tmp_path, when):
    "It goes on from the snapshot to the bits of a run left in peace: ranges are a function of the weights"
    run = replace(BASE, method=call(through_int8, method=call(teach), n_calibrate=100))
    peace, root = tmp_path/'peace', tmp_path/'root'
    quiet(peace, every=3600.).get(run)
    assert Worker(tmp_path/'said', work, root, run, env={'TOY_DO': when}).end() == -9
    assert Worker(tmp_path/'again', work, root, run).end() == 0
    a, b = (quiet(r).get(run, make=False) for r in (peace, root))
    assert ([h['loss'] for h in a.result['history']] == [h['loss'] for h in b.result['history']]
            and a.result['best_epoch'] == b.result['best_epoch'])
    assert_close(a.tensors(), b.tensors(), rtol=0, atol=0)


def test_recipes_of_table_3():
    base = baseline('resnet34', 'cifar100', 5)
    for q in (refined_int8(base, 'BIH'), control_int8(base)):
        assert (isinstance(q, Quantised) and isinstance(q.recipe, Recipe)
                and (q.recipe.epochs, q.recipe.batch_size, q.recipe.init, q.seed) == (20, 16, base, 5))
        assert scaled(Cell(q), PRESETS['paper']) == Cell(q)
    source = refined_int8(base, 'SP').recipe.method['method']['source']
    assert (source.recipe == Quantised(base) and source.attack.name == 'salt_and_pepper'
            and source.attack['targeted'])
