"""Bad input at every door that people use: a sane result, or a sentence that this project raised.

`test_border` asks more of fewer functions: that the argument is named. Here one or two arguments of a
right call of nearly every public function are replaced. REFINE_TRIES=5000 tries for
longer, and tools/soak.py counts.
"""
import dis, math, os, random, warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import refine_nb.attacks as A
import refine_nb.evaluation as V
import refine_nb.refinement as R
import refine_nb.reporting as P
import refine_nb.runs as S
import refine_nb.training as T
from refine_nb.base import Cell, Recipe, call
from refine_nb.vision import Data, Split, cosine_head, load_data
from test_border import CASES, SPECIAL, Wrong, net

ROOMS = {'attacks': A, 'evaluation': V, 'training': T, 'refinement': R, 'runs': S, 'reporting': P}


# ---- right calls -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Door:
    room: str
    name: str
    fn: Callable
    args: dict                         # of a right call, made anew by `fresh`
    odd: tuple = ()                    # arguments in which nan is legitimate

X = torch.linspace(.1, .9, 48).reshape(3,1,4,4)
Y = torch.tensor([0,1,2])
Z = torch.tensor([[2.,1.,0.,-1.,.5]]).repeat(3,1)+torch.arange(3.)[:,None]*torch.tensor([0.,1.,.3,.1,.2])
PART = Split((torch.arange(20*64)%256).reshape(20,1,8,8).to(torch.uint8), torch.arange(20)%10)
MANY = Split(PART.x.repeat(3,1,1,1), PART.y.repeat(3))
DIGITS = Data('digits', tuple('0123456789'), PART, PART, PART, 'toy')
SIXTY = Data('digits', tuple('0123456789'), MANY, PART, PART, 'toy')
def digit_net(*, num_classes=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64, num_classes)).eval()
RECIPE = Recipe(data=call(load_data, name='digits', n_train=64), model=call(digit_net),
                method=call(T.fine_tune),
                optimiser=call(T.sgd), epochs=1, batch_size=32)
FAST = call(A.fgsm, eps=.1)
TABLE = pd.DataFrame({'method': ['Madry', 'ALP'], 'attack': ['pgd', 'pgd'], 'model': 'm', 'dataset': 'd',
                      'accuracy': [50., 60.], 'low': [40., 50.], 'high': [60., 70.], 'std': [1., 2.],
                          'n': 100,
                      'key': ['k1', 'k2']})
CLAIM = P.Claim('A1', 'a is below b', 'section 1',
                lambda t: P.cell(t, method='Madry') < P.cell(t, method='ALP'))
CORRECTED = R.Corrected(right=torch.arange(20) > 2, index=torch.arange(3), x=PART.x[:3].float()/255,
                        linf=torch.ones(3)*.1, l2=torch.ones(3)*.1)
RIGHT = Y > 0
@dataclass(frozen=True)
class Made:                            # stands for what it makes, anew for each call
    make: Callable
NET, DIGIT = Made(net), Made(digit_net)
TAUGHT = [digit_net()]                 # the last one is what the optimiser is of
PUPIL = Made(lambda: TAUGHT.append(digit_net()) or TAUGHT[-1])
OPT = Made(lambda: T.sgd(TAUGHT[-1].parameters()))
SEEN = dict(model=NET, x=X, y=Y)

class Bright(nn.Module):               # right about X: the first pixels say which
    def __init__(self): 
        super().__init__(); self.w = nn.Parameter(torch.zeros(1)); self.b = X.flatten(1).mean(1)
    def forward(self, x):
        m = x.flatten(1).mean(1, keepdim=True)
        return 100*torch.cat([-(m-self.b)**2+self.w, -torch.ones(len(m), 2)], 1)
LINEAR = Made(Bright)

# Slots and parts of loops: they get what the attack or the step around them has checked, thousands of times.
# A store is the object itself.
INSIDE = {'ce', 'dlr', 'dlr_t', 'kl', 'margin', 'gaussian', 'uniform', 'zero', 'linf', 'l2', 'signed',
          'unit_l2',
          'random_signs', 'significant', 'worst', 'logits_of', 'mean_loss', 'step_logits', 'leaves'}

def doors():
    def d(room, fn, called='', /, **args): found.append(Door(room, called or fn.__name__, fn, args))
    def each(room, *fns, **args):
        for f in fns: d(room, f, **args)
    found = []
    # attacks
    each('attacks', A.ce, A.dlr, z_adv=Z, y=Y); d('attacks', A.dlr_t, z_adv=Z, y=Y, aim=(Y+1))
    d('attacks', A.kl, z_adv=Z, z=Z-1); d('attacks', A.margin, z_adv=Z, y=Y, kappa=50., targeted=False)
    each('attacks', A.gaussian, A.uniform, A.zero, x=X, eps=.1, norm='linf')
    each('attacks', A.linf, A.l2, x_adv=X, x=X, eps=.1)
    each('attacks', A.signed, A.unit_l2, grad=X-.5); d('attacks', A.momentum, decay=1.)
    d('attacks', A.random_signs, **SEEN, eps=.1); d('attacks', A.kurakin_steps, eps=.1)
    d('attacks', A.logits_of, model=NET, x=X, last=2)
    d('attacks', lambda model, mode: list(A.attacking(model, mode).__enter__().children()), 'attacking',
      model=NET, mode='eval')
    d('attacks', A.iterate, **SEEN, eps=.1, step_size=.05, steps=2, objective=A.ce)
    d('attacks', A.worst, **SEEN, x_adv=X, other=X, objective=A.ce, targeted=False)
    d('attacks', A.dra, **SEEN, eps=.1, p=.3, steps=2, norm='mean')
    d('attacks', A.significant, grad=X-.5, p=.3, rank='magnitude', per='value')
    d('attacks', A.unit_l1, norm='mean')
    d('attacks', A.apgd_checkpoints, steps=10)
    d('attacks', A.apgd_best, **SEEN, eps=.1, steps=2, n_targets=2, restarts=1)
    d('attacks', A.square_side, query=3, height=4, width=4, p_init=.8)
    d('attacks', A.autoattack_images, **SEEN, eps=.1, components=('apgd-ce',))
    d('attacks', A.sharpened_attack, **SEEN, attack=FAST, factor=2.)
    # evaluation
    d('evaluation', V.adversarial_images, model=DIGIT, split=PART, attack=FAST, size=None, seed=0)
    d('evaluation', V.classify, model=DIGIT, split=PART, attack=FAST, size=None, seed=0)
    d('evaluation', V.verdicts, model=DIGIT, split=PART, attack=FAST)
    d('evaluation', V.first_broken, rights=[RIGHT, ~RIGHT])
    d('evaluation', V.narrow, classes=Y, num_classes=5)
    d('evaluation', V.pack, right=RIGHT); d('evaluation', V.unpack, bits=V.pack(RIGHT), n=3)
    d('evaluation', V.survivors, breaker=torch.tensor([-1,0,1]), m=2)
    d('evaluation', V.pushes, counts=torch.ones(2,2).long(), classes=['a', 'b'], level=.95)
    d('evaluation', V.robustness_curve, verdicts={0.: RIGHT, .1: RIGHT}, level=.95)
    d('evaluation', V.eps_curve, **SEEN, eps=.1, steps=2)
    d('evaluation', V.evidence, model=LINEAR, x=X, y=Y, eps=.1)
    d('evaluation', V.audit, model=LINEAR, x=X, y=Y, eps=.1, n=3)
    # training
    d('training', T.inconsistency, z_adv=Z, z=Z-1, inside=True)
    d('training', T.self_paced_kl, z_adv=Z, z=Z-1, alpha=.2)
    d('training', T.als_trades, z=Z, z_adv=Z-1, y=Y, alpha=.1, beta=6.); d('training', T.covariance, f=Z)
    d('training', T.spat_pgd, model=Made(lambda: cosine_head(net())), x=X, y=Y, eps=.1, step_size=.05,
      steps=2, s=5., alpha=.2)
    d('training', T.Engine, device='cpu', precision='float32', compiled=False, graphs=False)
    d('training', T.engine, device='cpu'); d('training', T.set_rate, optimiser=OPT, factor=.5)
    d('training', T.fine_tune, data=DIGITS, batch_size=4, seed=0, augment='none')
    method = T.fine_tune(DIGITS, batch_size=4, seed=0)
    d('training', T.fit, model=PUPIL, method=method, optimiser=OPT, epochs=1, seed=0,
      validate=lambda m: .5)
    d('training', T.train_epoch, model=PUPIL, method=method, optimiser=OPT, epoch=0, epochs=1, seed=0)
    d('training', T.attacker, attack=FAST, mode='eval'); d('training', T.counting, attack=A.pgd)
    d('training', T.mean_loss, loss=Z[:,0], y=Y)
    d('training', T.step_logits, model=NET, x=X)
    d('training', T.adversarial, attack=FAST, objective=T.halves, weight=None, mode='eval')
    d('training', T.adversarial_training, data=DIGITS, batch_size=4, seed=0, attack=FAST, objective=T.halves)
    d('training', T.defence, name='trades', eps=.1, step_size=.05, steps=2, mode='eval', augment='none')
    d('training', T.fading, progress=.5, to=.25, until=.8)
    d('training', T.regulated, attack=call(A.dra), fade=T.fading, total='mean')
    d('training', T.regulated_training, data=DIGITS, batch_size=4, seed=0, attack=call(A.dra), total='mean')
    d('training', T.advprop, data=DIGITS, batch_size=4, seed=0, attack=FAST, attacked='auxiliary')
    d('training', T.advprop_step, attack=FAST, objective=T.halves, attacked='auxiliary')
    # refinement
    d('refinement', R.Corrected, right=torch.arange(20) > 2, index=torch.arange(3), x=CORRECTED.x,
      linf=torch.ones(3), l2=torch.ones(3))
    d('refinement', R.adapt, data=DIGITS, source=CORRECTED, batch_size=2, seed=0, coral_weight=.1,
      pairing='independent')
    d('refinement', R.correct, model=DIGIT, data=DIGITS, attack=FAST, storage='float32', seed=0)
    d('refinement', R.of_this, data=DIGITS, source=CORRECTED)
    d('refinement', lambda **k: next(R.paired_batches(**k)), 'paired_batches', data=DIGITS,
      source=CORRECTED, batch_size=2,
      seed=0, epoch=0, augment='none', pairing='independent')
    d('refinement', R.equal_steps, data=DIGITS, source=CORRECTED, batch_size=2, seed=0, part="T'",
      coral_weight=.1)
    d('refinement', R.on_source, model=DIGIT, data=DIGITS, source=CORRECTED)
    d('refinement', R.part_of, data=DIGITS, source=CORRECTED, part="T'", seed=0)
    d('refinement', R.share_of, full=CORRECTED, rate=.5, seed=0)
    d('refinement', R.Share, full=R.Correction(RECIPE, FAST), rate=.5, seed=0)
    d('refinement', R.OnSource, recipe=RECIPE, source=R.Correction(RECIPE, FAST))
    d('refinement', R.Quantised, recipe=RECIPE, backend='x86', observer='histogram', n_calibrate=50)
    d('refinement', R.affine, alpha=-1., beta=1., alpha_q=0, beta_q=255)
    d('refinement', R.to_integers, w=Z, s=.1, z=3, alpha_q=0, beta_q=255)
    d('refinement', R.mebibytes, tensors={'a': Z})
    d('refinement', R.prepared, model=DIGIT, backend='x86', observer='minmax')
    d('refinement', R.quantise, model=DIGIT, data=SIXTY, backend='x86', observer='minmax',
      n_calibrate=50)
    d('refinement', R.through_int8, data=DIGITS, method=call(T.fine_tune), batch_size=4, seed=0,
      n_calibrate=5)
    # runs
    cell = Cell(RECIPE); store = Made(lambda: S.Store('store', T.Engine(), quiet=True))
    d('runs', S.Until, seconds=5.)
    d('runs', S.home_folder, root='home')
    d('runs', S.Store, root='store', engine=T.Engine(), quiet=True, every=1.)
    d('runs', lambda specs: store.make().plan(specs), 'Store.plan', specs=[cell])
    d('runs', lambda specs, budget: store.make().run(specs, budget=budget), 'Store.run', specs=[], budget=5.)
    d('runs', lambda spec: store.make().get(spec, make=False), 'Store.get', spec=cell)
    d('runs', S.passed, specs=[RECIPE]); d('runs', S.tasks, plan=[RECIPE, cell])
    d('runs', S.Audited, recipe=RECIPE, attack=FAST, split='test', n_eval=5, seed=0)
    d('runs', S.Brief, says='x', epochs=1, n_train=5, n_eval=5, steps=.5)
    d('runs', S.at_preset, value=cell, p=S.PRESETS['demo'])
    d('runs', S.scaled, value=cell, p=S.PRESETS['demo'])
    d('runs', S.preset, name='demo'); d('runs', S.rooted, spec=cell)
    each('runs', S.cost, S.priced, spec=cell); d('runs', S.fits, spec=cell, left=5.)
    each('runs', S.images, S.priceable, S.speed_of, spec=cell); d('runs', S.price, specs=[cell])
    d('runs', S.whats_left, specs=[cell])
    d('runs', S.duration, seconds=5.)
    d('runs', S.sizes_of, name='digits')
    d('runs', S.workers, n=1, threads=1); d('runs', S.Given, data=RECIPE.data, model=RECIPE.model, seed=0)
    d('runs', S.export_results, store=store, specs=[], path='out.tar', numbers_only=False)
    d('runs', S.import_results, store=store, path='out.tar')
    d('runs', S.makespan, todo=S.tasks([RECIPE, cell]), cost=lambda t: 1., hands=2)
    d('runs', S.scaling, todo=S.tasks([RECIPE, cell]), cost=lambda t: 1., hands=(1, 2))
    # reporting
    d('reporting', P.between, low=0., high=1.); d('reporting', P.one_whole, low=0, high=5)
    d('reporting', P.dot_interval, table=TABLE, label='method', title='t')
    d('reporting', P.dot_panels, table=TABLE.assign(attack='a'), heads={'a': 'A'}, title='t', by='attack',
      label='method', across=2)
    d('reporting', P.method_colour, name='DDN')
    d('reporting', P.method_style, name='DDN'); d('reporting', P.named, methods=['DDN'])
    d('reporting', P.plot_confusion, counts=torch.ones(2,2).long(), classes=['a', 'b'], title='t')
    d('reporting', P.cell, table=TABLE, column='accuracy', method='ALP')
    d('reporting', P.judge, claims=[CLAIM], published=TABLE, ours=TABLE, preset='paper')
    d('reporting', P.on_its_own, claim=CLAIM, table=TABLE)
    d('reporting', P.difference, ours=50., published=49.)
    d('reporting', P.mean_std, values=[1., 2.])
    d('reporting', P.over_seeds, results=[{'accuracy': .5, 'n': 100}])
    d('reporting', P.percent, fraction=.5, digits=2); d('reporting', P.published, artefact='tab1_adcorda')
    d('reporting', P.show_table, table=TABLE, title='t', notes=('a',))
    d('reporting', P.side_by_side, ours=TABLE, published=TABLE, keys=('method',))
    d('reporting', P.with_interval, value=.5, low=.4, high=.6, std=.1)
    d('reporting', P.health, history=[{'loss': 1.}, {'loss': .5}], accuracy=.9, num_classes=10)
    d('reporting', P.marked, table=TABLE, digits=2)
    d('reporting', P.said_once, table=TABLE, columns=('model',))
    d('reporting', P.worded, table=TABLE, columns=('method',)); d('reporting', P.catalogue, paper='dra')
    d('reporting', P.report_folder, artefact='tab1_dra', preset='demo', variant='')
    d('reporting', P.run_record, preset='demo', settings={}, seconds=1., device='cpu')
    d('reporting', P.save_table, table=TABLE, folder='tables', title='t', notes=('a',), name='table')
    d('reporting', P.save_report, folder='report', tables={'table': TABLE}, tidy=TABLE, run={}, title='t')
    d('reporting', P.stored, artefact='tab1_dra', own=False); d('reporting', P.leaves, grid={'a': [cell]})
    d('reporting', P.rows_behind, claim=CLAIM, table=TABLE); d('reporting', P.plain, table=TABLE)
    d('reporting', P.weigh, claim=CLAIM, table=TABLE); d('reporting', P.drawn, table=TABLE, times=3)
    d('reporting', P.quoted, text='"a" and b'); d('reporting', P.as_named, table=TABLE)
    for c in CASES: # with the right calls of `test_border`
        its = next((r for r,m in ROOMS.items() if c.name in m.__all__), None)
        if its: found.append(Door(its, c.name, c.fn, dict(c.args)))
    return [d for d in found if d.name not in INSIDE]

def fresh(v): return v.make() if isinstance(v, Made) else v


# ---- what is put in its place ------------------------------------------------------------------------------

def like(t): # tensors that are wrong beside others of the right call, or in themselves
    f = t.float()
    return [f*math.nan, f+math.inf, -f-1, f*300, t[:0], t[:1], t[None], t.flatten(), t[..., None], t > 0,
            f, f.double(),
            t.long(), t.to(torch.complex64), t.numpy(), t.tolist(), f.half()]
NETS = [Wrong(lambda z: (z,z)), Wrong(lambda z: {'z': z}), Wrong(lambda z: z[:,:1]), Wrong(lambda z: z[:,0]),
        Wrong(lambda z: z[:,:,None]), Wrong(lambda z: z.detach()), Wrong(lambda z: z*math.nan),
        Wrong(lambda z: None),
        Wrong(lambda z: z[:1]), Wrong(lambda z: z.long()), nn.Identity(), lambda x: x, nn.Linear(2, 2)]
CALLABLES = [lambda: None, lambda *a, **k: None, lambda *a, **k: 'x', lambda *a, **k: 7., print,
             nn.Identity()]
TABLES = [TABLE[:0], TABLE.drop(columns='accuracy'), TABLE.assign(accuracy='x'),
          TABLE.assign(accuracy=math.nan),
          TABLE.assign(n=-1), pd.DataFrame()]
OTHERS = [RECIPE, FAST, DIGITS, PART, TABLE, CLAIM, X, Y, net(), Cell(RECIPE), [None], ['x'], ('x', 1),
          {'x': 1}, {1: None},
          Path('none')]
PLAIN = SPECIAL + [[math.nan], -10**30, 1e-300, '\0', 'é'*3, range(0)]

def instead(v):
    "Values for an argument whose right one is `v`"
    if isinstance(v, torch.Tensor): return like(v) + PLAIN + OTHERS
    if isinstance(v, (nn.Module, torch.optim.Optimizer)): return NETS + CALLABLES + PLAIN + OTHERS
    if isinstance(v, pd.DataFrame): return TABLES + PLAIN + OTHERS
    if callable(v): return CALLABLES + PLAIN + OTHERS
    return PLAIN + OTHERS


# ---- the property ------------------------------------------------------------------------------------------

def raised_here(e):
    "A `raise` of this project's own code made it, not Python or a library in the middle of some work"
    tb = e.__traceback__
    while tb.tb_next: tb = tb.tb_next
    own = f'{os.sep}refine_nb{os.sep}' in tb.tb_frame.f_code.co_filename
    return own and dis.opname[tb.tb_frame.f_code.co_code[tb.tb_lasti]] == 'RAISE_VARARGS'

def sane(v, depth=0): # no nan where nobody asked for one
    if isinstance(v, torch.Tensor): return not v.is_floating_point() or bool(v.isfinite().all())
    if isinstance(v, dict): return all(sane(w, depth+1) for w in v.values())
    if isinstance(v, (list, tuple)) and depth < 3: return all(sane(w, depth+1) for w in v)
    return True

def outcome(door, bad):
    "'right', 'sentence', or what is wrong"
    args = {k: fresh(v) for k,v in door.args.items()} | bad
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter('ignore'); out = door.fn(**args)
            spoilt = door.room == 'training' and not all(map(sane,
                bad.values())) # said by the loop: `Diverged`
            return 'right' if spoilt or sane(out) else 'a nan came out'
    except (ValueError, OSError) as e:
        if not raised_here(e): return f'leaked {type(e).__name__}: {e!s:.70}'
        return 'sentence' if len(str(e)) >= 20 else f'too short: {e}'
    except Exception as e: # such as `Missing`, whose text ends a sentence of its caller
        own = type(e).__module__.startswith('refine_nb') and raised_here(e)
        # of the network or function that was given
        theirs = any(callable(v) for v in bad.values()) and not isinstance(e, AttributeError)
        return 'sentence' if own or theirs else f'leaked {type(e).__name__}: {e!s:.70}'

def tries(n, number=1):
    "(door, what was replaced, outcome) of n draws, the same for the same number"
    draw = random.Random(number); there = doors()
    for i in range(n):
        door = there[i%len(there)]
        names = draw.sample(sorted(door.args), min(len(door.args), draw.choice((1, 1, 1, 2))))
        bad = {k: draw.choice(instead(fresh(door.args[k]))) for k in names}
        yield door, bad, outcome(door, bad)

def counted(n, number=1):
    "What came of n draws, room by room: tries, and failures that are no sentence; and each failure in words"
    tried, failed, words = Counter(), Counter(), []
    for door, bad, how in tries(n, number):
        tried[door.room] += 1
        if how in ('right', 'sentence'): continue
        failed[door.room] += 1
        words.append(f'{door.name}({", ".join(f"{k}={v!r:.30}" for k,v in bad.items())}): {how}')
    return tried, failed, words

@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "What a call writes goes to a folder of the test"
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('REFINE_REPORTS', str(tmp_path/'reports'))
    import matplotlib
    matplotlib.use('agg')

TRIES = int(os.environ.get('REFINE_TRIES', 600))
# of what hypothesis makes up beside the fixed values
MADE_UP = st.one_of(st.none(), st.booleans(), st.floats(), st.integers(-2**40, 4), st.text(max_size=5),
                    st.binary(max_size=3), st.lists(st.floats(0, 1), max_size=2), st.just(...))

def test_right_calls_are_right():
    assert [f'{d.name}: {how}' for d in doors() if (how := outcome(d, {})) != 'right'] == []

def test_what_is_bad_gives_a_sentence_or_a_sane_result():
    tried, failed, words = counted(TRIES)
    assert sum(tried.values()) == TRIES and set(tried) == set(ROOMS)
    assert not words, '\n'.join(words)

def test_what_hypothesis_makes_up_does_so_too():
    there, failed = doors(), Counter()
    @settings(derandomize=True, max_examples=max(150, TRIES//5), deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(there)-1), st.integers(0, 9), MADE_UP)
    def draw(i, k, value):
        door = there[i]; name = sorted(door.args)[k%len(door.args)]
        if (how := outcome(door, {name: value})) not in ('right',
            'sentence'): failed[f'{door.name}.{name}: {how}'] += 1
    draw()
    assert not failed, failed

def test_the_property_sees_leaks():
    def says(x): raise ValueError('x')
    for fn, how in ((lambda x: x+1, 'leaked TypeError'), (says, 'leaked ValueError'),
        (lambda x: torch.tensor(math.nan), 'a nan'),
                    (lambda x: T.clean(x, x), 'sentence')):
        assert outcome(Door('attacks', 'f', fn, {'x': 1}), {'x': 'text'}).startswith(how)
