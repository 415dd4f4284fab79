"""The whole public border.

One argument of a right call is replaced by anything: either a `ValueError` names the argument, or the value
was right and so is the result. Nothing leaks from torch or Python, nothing is let through.
"""
import math, re, warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import refine_nb.attacks as A
import refine_nb.evaluation as V
import refine_nb.training as T
import refine_nb.vision as W
from refine_nb.base import Cell, Recipe, Robustness, call, key
from refine_nb.vision import load_data
from refine_nb.refinement import Correction
from refine_nb.reporting import between, one_whole, parameters, whole_numbers

EXAMPLES = 12                          # drawn for each argument, beside those that are fixed


# ---- what may stand in an argument: value -> True, False, or None where both are fine ----------------------

def number(low=-math.inf, high=math.inf, above=-math.inf, below=math.inf, whole=False, none=False):
    def legit(v):
        if v is None: return none
        if isinstance(v, (torch.Tensor, np.ndarray)): return None if v.ndim == 0 else False
        if not isinstance(v, Real) or isinstance(v, bool) or not math.isfinite(v): return False
        if whole and v != int(v): return False
        if whole and not isinstance(v, (int, np.integer)): return None    # 2.0 for 2
        return bool(low <= v <= high and above < v < below)
    return legit

def unsure(legit): # a number whose range is the function's own affair
    return lambda v: False if legit(v) is False else None
def one_of(*choices, none=False): return lambda v: none if v is None else isinstance(v, str) and v in choices
def boolean(v): return True if isinstance(v, bool) else None if isinstance(v, np.bool_) else False
def function(v): return None if callable(v) else False
def only(kind, none=False): return lambda v: True if isinstance(v, kind) or none and v is None else False

WHOLE, SHARE, ANY = number(1, whole=True), number(above=0, below=1), unsure(number())
KINDS = {                              # by the names that arguments have in this house
    'eps': number(0, 1), 'step_size': unsure(number(above=0, none=True)), 'steps': WHOLE, 'restarts': WHOLE,
    'n_queries': WHOLE, 'n_targets': unsure(WHOLE), 'batch_size': WHOLE, 'seed': unsure(number(whole=True)),
    'decay': ANY, 'kappa': ANY, 'rho': ANY, 'alpha_max': ANY, 'eta': ANY, 'init_epsilon': number(above=0),
    'gamma': SHARE, 'p_init': number(above=0, high=1), 'norm': one_of('linf', 'l2'), 'level': SHARE,
    'objective': function, 'start': function, 'beta': number(0), 'alpha': number(0, below=.5),
    'tie': one_of(*T.TIES), 'total': one_of('mean', 'sum'), 'least': one_of('own', 'clean'),
    'warmup': number(0, below=1), 'factor': number(above=0), 'lr': number(above=0),
    'momentum': unsure(number(0)), 'weight_decay': unsure(number(0)), 'valid': unsure(SHARE),
    'size': number(1, 64, whole=True, none=True), 'split_seed': unsure(number(whole=True)),
    'epochs': WHOLE, 'n_eval': number(1, whole=True, none=True), 'clip': number(above=0, none=True),
    'progress': number(0, 1), 's': number(above=0), 'lam': number(0), 'floor': number(0),
    'slope': number(above=0), 'smoothing': number(0, below=1), 'burn_in': number(0, 1), 'shift': ANY,
    'bias': ANY, 'on': one_of('both', 'adversarial', 'clean'), 'pairing': one_of('mean', 'sum', 'norm'),
    'kind': one_of(*T.GAIRAT_KINDS), 'form': one_of('released', 'paper'), 'accuracy': one_of('sp', 'nce'),
    'robustness': one_of('sp', 'kl'),
    'split': one_of('train', 'valid', 'test'), 'select': one_of('valid', 'last', none=True)}
ROWS = ('z', 'z_adv', 'z_again', 'cos', 'cos_adv') # what is a table of logits
NAMED = {'x': 'image', 'y': 'label', **dict.fromkeys(ROWS, 'logits'), 'f_s': 'features', 'f_t': 'features',
         'shift': 'shift|weights', 'right': 'verdict', 'images': 'image', 'right_a': 'verdict',
         'right_b': 'verdict', 'split_seed': 'seed', 'recipe': 'Recipe',
         'correct': 'correct', 'split': 'split|image|label', 'w': 'weight|w ', 'name': 'data set'}


# ---- what is put in its place ------------------------------------------------------------------------------

class Wrong(nn.Module): # a model of another output
    def __init__(self, f): super().__init__(); self.f, self.w = f, nn.Parameter(torch.zeros(1))
    def forward(self, x): return self.f(x.flatten(1)[:,:5]+self.w)

SPECIAL = [None, True, False, '', '8/255', 'x', math.nan, math.inf, -math.inf, -1, 0, .5, 2.9, [], [1], (1,2),
           {}, np.nan, np.float32(.25), np.int64(2), np.bool_(True), np.array([1.,2.]), torch.ones(3),
           object(), b'1', 1j]
FLOATS, LABELS = torch.full((3,1,4,4), .5), torch.tensor([0,1,2])
FEWER = FLOATS[:2]                     # wrong beside three labels, right without
IMAGES = [None, 'x', 1., [1], FLOATS.numpy(), FLOATS*255, FLOATS*3-2, FLOATS*math.nan, FLOATS+math.inf,
          FLOATS[:,0,0,0], FEWER, (FLOATS*2).int(), FLOATS > 0, FLOATS.to(torch.complex64), {}]
TARGETS = [None, 'x', 1, [0,1,2], LABELS.numpy(), LABELS.float(), LABELS-1, LABELS+50, LABELS[:2],
           LABELS[:,None], LABELS > 0, LABELS*math.nan, {}]
LOGITS = [None, 'x', 1., [1.], torch.ones(3), torch.ones(2,5), torch.ones(3,5,1), torch.ones(3,5).numpy(),
          torch.ones(3,5).long(), torch.ones(3,5) > 0, {}]
MODELS = [None, 'x', 1, [], Wrong(lambda z: (z,z)), Wrong(lambda z: {'z': z}), Wrong(lambda z: z[:,:1]),
          Wrong(lambda z: z[:,:,None]), Wrong(lambda z: z[:,0]), Wrong(lambda z: z.detach()),
          Wrong(lambda z: z*math.nan), Wrong(lambda z: None)]
BITS = [None, 'x', 1, [], [True], torch.ones(3), LABELS, torch.ones(2,2) > 0, torch.ones(0) > 0, {}]
FEATURES = [v for v in LOGITS if not torch.is_tensor(v) or v.shape != (2,5)]
KAPPAS = [None, 'x', 1, [1], LABELS.numpy(), LABELS-1, LABELS+50, LABELS[:,None], LABELS*math.nan, {}]
WEIGHTS = [None, 'x', [1.], torch.ones(3,1), torch.ones(2), torch.ones(3)*math.nan, {}]

def never(v): return False
def maybe(v): return None if isinstance(v, nn.Module) else False # a kind of model that may be taken
OTHERS = {'x': (IMAGES, never), 'y': (TARGETS, never), **dict.fromkeys(ROWS, (LOGITS, never)),
          'f_s': (FEATURES, never), 'f_t': (FEATURES, never), 'steps_to_flip': (KAPPAS, never),
          'model': (MODELS, maybe), 'right': (BITS, never), 'right_a': (BITS, never),
          'right_b': (BITS, never), 'w': (WEIGHTS, never), 'predicted': (TARGETS, never)}
# numbers that are right stay small: a thousand restarts are legitimate, and take their time
DRAWN = st.one_of(st.none(), st.booleans(), st.floats(-4, 4), st.integers(-4, 4), st.text(max_size=4),
                  st.lists(st.integers(0, 3), max_size=2), st.floats(0, 1), st.integers(-2**70, -1),
                  st.sampled_from([math.nan, math.inf, -math.inf, -1e300]))


# ---- right calls -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    fn: Callable
    args: dict                         # of a right call
    right: Callable                    # (result, arguments) -> bool
    kinds: dict                        # argument -> legit, where `KINDS` does not say it
    name: str = ''
    def legit(self, arg):
        if arg in self.kinds: return SPECIAL, self.kinds[arg]
        if arg == 'x' and 'y' not in self.args: return IMAGES, lambda v: v is FEWER
        if arg in OTHERS: return OTHERS[arg]
        return SPECIAL, boolean if isinstance(self.args[arg], bool) else KINDS[arg]

def case(fn, right, kinds={}, called='', /, **args):
    return Case(fn, args, right, kinds, called or fn.__name__)

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).eval()
X = torch.linspace(.1, .9, 48).reshape(3,1,4,4)
SEEN = dict(model=net(), x=X, y=LABELS)
def attacked(out, args):
    inside = out.shape == X.shape and bool(((out >= 0) & (out <= 1)).all())
    if not inside or 'eps' not in args or args.get('norm') == 'l2': return inside
    return bool((out-X).abs().max() <= float(args['eps'])+1e-5)
def per_example(out, args): return out.shape == (3,) and bool(out.isfinite().all())
def factor(out, args): return 0 <= out < math.inf
def finite(out, args): return bool(np.isfinite(np.array(list(out), dtype=float)).all())
def named(out, args): return len(key(out)) == 20
def shares(v): return None if isinstance(v, (list,tuple)) and not len(v) else False
def any_(out, args): return True

Z = torch.tensor([[2.,1.,0.,-1.,.5]]).repeat(3,1)+torch.arange(3.)[:,None]*torch.tensor([0.,1.,.3,.1,.2])
L, COS = dict(z=Z, y=LABELS), Z/4
RIGHT = LABELS > 0
BASE = dict(data=call(load_data, name='digits'), model=call(T.clean), method=call(T.fine_tune),
            optimiser=call(T.sgd), epochs=1, batch_size=2, seed=0, init=None, clip=None, select=None)
RECIPE = Recipe(**BASE)
CALLS = {k: only(type(BASE['data'])) for k in ('data', 'model', 'method', 'optimiser')}
SIGNED = number(0, whole=True)

CASES = [
    case(A.fgsm, attacked, **SEEN, eps=.1, targeted=False),
    case(A.bim, attacked, {'steps': number(1, whole=True, none=True)}, **SEEN, eps=.1, step_size=.05, steps=2,
         targeted=False, early_stop=False),
    case(A.pgd, attacked, **SEEN, eps=.1, step_size=.05, steps=2, norm='linf', objective=A.ce,
         start=A.uniform, clamp_start=True, restarts=1, targeted=False, early_stop=False),
    case(A.mim, attacked, **SEEN, eps=.1, step_size=.05, steps=2, decay=1., targeted=False, early_stop=False),
    case(A.kl_pgd, attacked, **SEEN, eps=.1, step_size=.05, steps=2),
    case(A.cw_linf, attacked, **SEEN, eps=.1, step_size=.05, steps=2, kappa=50., restarts=1, targeted=False),
    *(case(f, attacked, {'steps': number(1, whole=True, none=True)}, **SEEN, eps=.1, step_size=.05, steps=2)
      for f in (A.bi, A.bih, A.vbi, A.ll)),
    case(A.ddn, attacked, **SEEN, steps=2, init_epsilon=1., gamma=.05, targeted=False),
    case(A.salt_and_pepper, attacked, **SEEN, steps=2, across_channels=True, targeted=False),
    case(A.apgd, attacked, {'objective': one_of('ce', 'dlr', 'dlr_t')}, **SEEN, eps=.1, steps=2,
         objective='ce', n_targets=3, restarts=1, rho=.75, early_stop=True),
    case(A.fab_t, attacked, {'beta': ANY}, **SEEN, eps=.1, steps=2, n_targets=3, alpha_max=.1, eta=1.05,
         beta=.9, early_stop=True),
    case(A.square, attacked, **SEEN, eps=.1, n_queries=2, p_init=.8, seed=0),
    case(A.autoattack, any_, {'eps': unsure(number(0, 1)), 'norm': one_of('linf')}, **SEEN, eps=.1,
         norm='linf', seed=0, batch_size=2, steps=2, n_queries=2, n_targets=3, folded=True),
    case(T.clean, per_example, **L), case(T.weighted_ce, per_example, z_adv=Z, y=LABELS, w=torch.ones(3)),
    case(T.halves, per_example, **L, z_adv=Z, total='mean'),
    case(T.trades, per_example, **L, z_adv=Z-1, w=torch.ones(3), beta=6.),
    case(T.als, per_example, **L, alpha=.1, tie='next'),
    case(T.als_halves, per_example, **L, z_adv=Z, alpha=.1, tie='next', least='own', total='mean'),
    case(T.trades_as_coded, per_example, **L, z_adv=Z-1, z_again=Z, w=torch.ones(3), beta=6.),
    case(T.alp, per_example, {'weight': number(0)}, **L, z_adv=Z-1, weight=.5, on='both', pairing='mean',
         smoothing=.1),
    case(T.boosted_ce, per_example, z_adv=Z, y=LABELS, floor=1e-4),
    case(T.mart, per_example, **L, z_adv=Z-1, w=torch.ones(3), beta=5., floor=1e-4),
    case(T.als_target, any_, **L, alpha=.1, tie='next'),
    case(T.nce, per_example, cos=COS, y=LABELS, s=5.),
    case(T.pace, any_, cos=COS, y=LABELS, beta=.2, through=True),
    case(T.self_paced_nce, per_example, cos=COS, y=LABELS, s=5., beta=.2, through=True, shifted=False),
    case(T.self_paced_ce, per_example, **L, cos=COS, beta=.2, through=True),
    case(T.spat, per_example, {'alpha': number(0)}, cos=COS, cos_adv=-COS, y=LABELS, s=5., alpha=.2, beta=.2,
         lam=6., accuracy='sp', robustness='sp', through=True, shifted=False),
    case(T.spat_plain, per_example, {'alpha': number(0)}, **L, z_adv=Z-1, cos=COS, alpha=.2, beta=.2, lam=6.,
         robustness='sp'),
    case(T.gairat, per_example, {'steps': number(2, whole=True)}, steps_to_flip=LABELS, progress=.7,
         kind='tanh', steps=10, shift=-1., burn_in=.5),
    case(T.probability_margin, per_example, **L),
    *(case(f, per_example, **{z: Z}, y=LABELS, progress=.7, slope=10., bias=-.5, form='released', burn_in=.5)
      for f,z in ((T.mail, 'z_adv'), (T.mail_clean, 'z'))),
    case(T.coral, lambda c, args: 0 <= c, f_s=Z, f_t=Z-1),
    case(T.piecewise, factor, {'at': shares}, progress=.5, at=(.5,.75), factor=.1, warmup=0.),
    case(T.cosine, factor, progress=.5, warmup=0.),
    case(T.linear, factor, progress=.5, warmup=0.),
    case(lambda **k: T.sgd([nn.Parameter(torch.ones(1))], **k), any_, {}, 'sgd', lr=.1, momentum=.9,
         weight_decay=1e-4),
    case(V.predict, any_, {'size': unsure(number(1, 64, whole=True, none=True))}, x=X, size=None,
         model=nn.Sequential(nn.AdaptiveAvgPool2d(4), net())), # of any size
    case(lambda **k: V.wilson(**k), finite, {'correct': number(0, 5, whole=True), 'n': number(3, whole=True)},
         'wilson', correct=3, n=5, level=.95),
    case(V.proportion, any_, right=RIGHT, level=.95),
    case(V.newcombe, finite, {k: number(0, whole=True) for k in ('both', 'b', 'c', 'neither')}, both=3, b=1,
         c=2, neither=1, level=.95),
    case(V.mcnemar, any_, right_a=RIGHT, right_b=RIGHT, level=.95),
    case(V.confusion, any_, {'num_classes': number(3, 50, whole=True)}, y=LABELS, predicted=LABELS,
         num_classes=3),
    case(load_data, lambda d, a: len(d.train) > 0,
         {'name': one_of('digits'), 'n_train': number(1, 1400, whole=True, none=True)}, name='digits',
         size=None, split_seed=1, valid=.1, n_train=20),
    case(Recipe, named, {**CALLS, 'seed': SIGNED, 'init': only(Recipe, none=True)}, **BASE),
    case(Cell, named, {'recipe': only(Recipe), 'attack': only(type(BASE['data']), none=True)}, recipe=RECIPE,
         attack=None, split='test', n_eval=None),
    case(Robustness, named, {'recipe': only(Recipe), 'eps': number(above=0, high=1)}, recipe=RECIPE, eps=.1,
         split='test', n_eval=None, reference=False),
    case(Correction, named, {'recipe': only(Recipe), 'attack': only(type(BASE['data']), none=True),
                             'storage': one_of('float32', 'uint8')}, recipe=RECIPE, attack=None,
         storage='float32'),
    case(lambda **k: call(A.pgd, **k), named, {}, 'call_pgd', eps=.1, steps=2, norm='linf', restarts=1,
         targeted=False),
    case(lambda **k: call(T.trades, **k), named, {}, 'call_trades', beta=6.),
    case(lambda **k: call(T.sgd, **k), named, {}, 'call_sgd', lr=.1),
]

def text(v): return v.strip() if isinstance(v, str) else v
def asked(kind, legit, value):         # a parameter of a notebook: text of a number is a number
    def read(v):
        try: return legit(int(text(v)) if re.fullmatch('-?[0-9]+', text(v)) else float(text(v)))
        except (TypeError, ValueError, AttributeError): return legit(v)
    return case(lambda p: parameters({'p': p}, p=kind).p, lambda out, args: out is not None, {'p': read},
                f'parameter_{getattr(kind, "__qualname__", "x").split(".")[0]}', p=value)
def several(v):
    if isinstance(v, (list, tuple)):
        good = len(v) and all(isinstance(a, (int, str)) and not isinstance(a, bool) for a in v)
        return None if good else False
    return None if isinstance(v, str) else number(0, whole=True)(v)
CASES += [asked(one_whole(1), number(1, whole=True), 3), asked(between(0, 1), number(0, 1), .5),
          case(lambda p: parameters({'p': p}, p=whole_numbers).p, lambda out, args: len(out) > 0,
               {'p': several}, 'parameter_whole_numbers', p='1,2')]



# ---- the property ------------------------------------------------------------------------------------------

def outcome(c, arg, bad, legit):
    "'refused' or 'right'; anything else is a hole in the border"
    legit, names = legit(bad), rf'\b{arg}\b|{NAMED.get(arg, arg)}'
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter('ignore'); out = c.fn(**{**c.args, arg: bad})
    except ValueError as e:
        if legit is True: return f'refused though right: {bad!r:.40} ({e!s:.80})'
        return 'refused' if re.search(names, str(e)) else f'not named: {bad!r:.40} ({e!s:.80})'
    except Exception as e: return f'leaked: {bad!r:.40} ({type(e).__name__}: {e!s:.60})'
    if legit is False: return f'let through: {bad!r:.40}'
    return 'right' if legit is None or c.right(out, {**c.args, arg: bad}) else f'wrong: {bad!r:.40}'

ALL = [(c, arg) for c in CASES for arg in c.args]

@pytest.mark.parametrize('c,arg', [pytest.param(c, a, id=f'{c.name}-{a}') for c,a in ALL])
def test_an_argument_is_right_or_named(c, arg):
    fixed, legit = c.legit(arg)
    seen = Counter(outcome(c, arg, bad, legit) for bad in fixed)
    @settings(derandomize=True, max_examples=EXAMPLES, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(DRAWN)
    def draw(bad): seen[outcome(c, arg, bad, legit)] += 1
    if fixed is SPECIAL: draw()
    holes = {k: n for k,n in seen.items() if k not in ('refused', 'right')}
    assert not holes, f'{sum(holes.values())} of {seen.total()}: {"; ".join(holes)}'

def test_right_calls_are_right():
    "What is varied above is a right call to begin with"
    for c in CASES: assert c.right(c.fn(**c.args), c.args), c.name

def test_the_property_sees_holes():
    "It would notice a function that checks nothing, one that refuses all, and one that does not say what"
    def holes(fn):
        c = case(fn, finite, {'a': SHARE}, 'f', a=.5)
        return {outcome(c, 'a', v, SHARE).split(':')[0] for v in SPECIAL}
    def says(t):
        def f(a): raise ValueError(t)
        return f
    assert holes(lambda a: [0.]) == {'let through', 'right'} and 'leaked' in holes(lambda a: [a+1])
    assert holes(says('a')) == {'refused', 'refused though right'}
    assert holes(says('?')) == {'not named', 'refused though right'}
    assert 'wrong' in holes(lambda a: [math.nan])


# ---- networks ----------------------------------------------------------------------------------------------

TAKES_A_NETWORK = {
    'fold': W.fold, 'foldable': lambda m: list(W.foldable(m)),
    'fold_if_same': lambda m: W.fold_if_same(m, torch.rand(2, 1, 8, 8)),
    'grey_convolutions': W.grey_convolutions, 'laid': lambda m: W.laid(m, torch.channels_last),
    'layout_for': lambda m: W.layout_for(m, torch.rand(2, 1, 8, 8)),
    'n_parameters': W.n_parameters, 'plain_weights': W.plain_weights,
    'suited': lambda m: W.suited(m, torch.rand(2, 1, 8, 8)),
    'suiting': lambda m: W.suiting(m).__enter__(), 'dual_norms': W.dual_norms,
    'single_norms': W.single_norms, 'auxiliary': lambda m: W.auxiliary(m).__enter__(),
    'smooth': W.smooth, 'smoothing': lambda m: W.smoothing(m).__enter__(),
    'cosine_head': W.cosine_head, 'at_scale': lambda m: W.at_scale(m, 1.).__enter__(),
    'last_layer': W.last_layer, 'embeddings': lambda m: W.embeddings(m, torch.rand(2, 1, 8, 8)),
    'logits_and_cosines': lambda m: W.logits_and_cosines(m, torch.rand(2, 1, 8, 8))}

@pytest.mark.parametrize('given', [None, 3, 'resnet18', [1]])
@pytest.mark.parametrize('name', TAKES_A_NETWORK)
def test_a_network_is_a_module(name, given):
    with pytest.raises(ValueError, match=r'model wants a module, got'): TAKES_A_NETWORK[name](given)

@pytest.mark.parametrize('given', [None, 3, np.zeros((2, 1, 8, 8))])
def test_images_are_a_tensor(given):
    y = torch.zeros(2, dtype=torch.int64)
    for f in (W.clipped, lambda x: W.check_images(x, y, 10), lambda x: A.same_shape(torch.rand(2, 1), x)):
        with pytest.raises(ValueError, match='wants a tensor'): f(given)
