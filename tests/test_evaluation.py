"""What an evaluation promises: images attacked once for all models, the worst case image by image.

Pairs are compared as pairs, and a number is never without n.
"""
import math, shutil, signal, warnings
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, product

import pytest
import torch
from torch.testing import assert_close

from refine_nb.base import Adversarials, Cell, Worst, against, ancestors, call, key, nested
from refine_nb.vision import Split, load_data
from refine_nb.attacks import fgsm, pgd
from refine_nb.evaluation import (EVAL_BATCH, Outcome, adversarial_images, classify,
                                  confusion, first_broken, mcnemar, newcombe, proportion, robustness_curve,
                                  survivors, verdicts, wilson)
from refine_nb.runs import PRESETS, images, scaled, write_entry
from refine_nb.papers.adcorda import baseline
from test_recovery import DAMAGE, flip, entries
from toys import Worker, quiet, recipe, same, work

SOURCE, LEFT, RIGHT = recipe(seed=7, epochs=1), recipe(epochs=1), recipe(seed=2, epochs=1)
CALLS = []                                       # what `spoil` was called with in this process

def spoil(model, x, y, *, half=0, eps=.3, generator=None): # -> x_adv
    "Invert the images of one half of the positions in a batch, blur the others a little"
    CALLS.append(model)
    x_adv = (x + eps*torch.rand(x.shape, generator=generator).to(x)).clamp(0, 1)
    mine = torch.arange(len(x)) % 2 == half
    x_adv[mine] = 1-x[mine]
    return x_adv

def black(target, **settings): return Cell(target, call(spoil, **settings), n_eval=60, surrogate=SOURCE)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A store with three toy models, a transfer cell and a worst case"
    store = quiet(tmp_path_factory.mktemp('made'), every=3600.)
    store.run([black(LEFT), WORST, Cell(RIGHT, n_eval=60)])
    return store

@pytest.fixture
def kept(made, tmp_path):
    shutil.copytree(made.root, tmp_path/'store')
    return quiet(tmp_path/'store')

WORST = against(Cell(LEFT, n_eval=60), call(spoil), call(spoil, half=1))


# ---- keys --------------------------------------------------------------------------------------------------

def test_keys_of_old_cells_are_unchanged():
    "Literals of store format 2: no later field or setting may rename these"
    base = baseline('resnet18', 'cifar10', 1)
    assert key(Cell(base)) == '5a4504331824c6dd4de2'
    assert (key(Cell(base, call(pgd, eps=4/255, step_size=2/255), split='valid', n_eval=500))
            == 'ff3c6a88b1e5713a2fb2')
    # a step of eps/4 by default is another attack
    assert key(Cell(base, call(pgd, eps=4/255), split='valid', n_eval=500)) != 'ff3c6a88b1e5713a2fb2'

def test_no_two_evaluations_share_a_key():
    a = call(pgd)
    specs = [Cell(LEFT), Cell(LEFT, a), Cell(LEFT, a, surrogate=SOURCE), Cell(LEFT, a, surrogate=RIGHT),
             Cell(RIGHT, a, surrogate=SOURCE), Cell(LEFT, a, surrogate=LEFT),
             Adversarials(SOURCE, a), Adversarials(SOURCE, a, n_eval=5), against(Cell(LEFT), a),
             against(Cell(LEFT), a, call(fgsm)), against(Cell(LEFT), call(fgsm), a)]
    assert len({key(s) for s in specs}) == len(specs)


# ---- transfer ----------------------------------------------------------------------------------------------

def test_the_plan_makes_the_surrogates_images_once():
    cells = [black(LEFT), black(RIGHT)]
    plan = ancestors(*cells)
    assert (plan == [LEFT, SOURCE, cells[0].adversarials, cells[0], RIGHT, cells[1]]
            and cells[0].adversarials == cells[1].adversarials)
    assert list(nested(cells[0])) == [LEFT, cells[0].adversarials]

def test_adversarials_are_made_once_for_two_targets(tmp_path):
    store, cells = quiet(tmp_path), [black(LEFT), black(RIGHT)]
    CALLS.clear(); store.run(cells)
    assert len(CALLS) == 1                       # 60 images are one batch
    assert_close(CALLS[0].state_dict(), store.model(SOURCE).state_dict(), rtol=0, atol=0)
    store.run([black(SOURCE)]); quiet(tmp_path).run(cells)
    assert len(CALLS) == 1
    store.run([Cell(LEFT, call(spoil), n_eval=60)])
    assert len(CALLS) == 2                       # white box: its own

def test_what_a_target_is_shown(made):
    "The stored images, the labels of the split, the target's own weights: by hand"
    cell, data = black(LEFT), load_data('digits', n_train=128)
    x = made.value(cell.adversarials)
    assert x.shape == (60,1,8,8) and x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    clean = data.test.x[:60].float()/255
    assert_close(x[::2], 1-clean[::2]); assert not torch.equal(x[1::2], clean[1::2])
    with torch.no_grad(): classes = made.model(LEFT)(x).argmax(1)
    o = made.value(cell)
    assert_close(o.predicted, classes); assert_close(o.right, classes == data.test.y[:60])
    assert made.get(cell).result['correct'] == int((classes == data.test.y[:60]).sum())

def test_shown_to_itself_a_surrogate_gives_the_white_box_result(made):
    white = Cell(SOURCE, call(pgd, eps=.1, step_size=.05, steps=2), n_eval=60)
    mirror = replace(white, surrogate=SOURCE)
    assert_close(made.value(mirror).predicted, made.value(white).predicted)
    assert 0 < made.get(white).result['correct'] < made.get(Cell(SOURCE, n_eval=60)).result['correct']

def test_batches_and_their_draws(made):
    "More images than a batch: each batch draws by its position, made at once or judged at once"
    g, model = torch.Generator().manual_seed(0), made.model(SOURCE)
    split = Split(torch.rand(EVAL_BATCH+3, 1, 8, 8, generator=g),
                  torch.randint(10, (EVAL_BATCH+3,), generator=g))
    x = adversarial_images(model, split, call(spoil), seed=3)
    assert_close(classify(model, Split(x, split.y)), classify(model, split, attack=call(spoil), seed=3))
    assert_close(verdicts(model, split, attack=call(spoil), seed=3),
                 classify(model, split, attack=call(spoil), seed=3) == split.y)
    drawn = (x-split.x)[1::2]; assert not torch.equal(drawn[0], drawn[EVAL_BATCH//2])

def test_other_images_are_refused(kept, monkeypatch):
    "Surrogate and target of different splits; and images that changed since the surrogate's were made"
    other = recipe(epochs=1, data=SOURCE.data.but(split_seed=2))
    with pytest.raises(ValueError, match=r'surrogate and judged weights have different data \(fingerprints '
                       r'\w{12} and \w{12}\): give both recipes the same data call'):
        kept.get(black(other))
    assert kept.get(black(other), make=False) is None
    monkeypatch.setenv('TOY_INK', '1')
    changed, fresh = quiet(kept.root), recipe(seed=5, epochs=1)
    with pytest.raises(ValueError, match='surrogate and judged weights have different data'):
        changed.get(black(fresh))

def test_other_sizes_are_refused(kept, monkeypatch):
    real = kept.value
    monkeypatch.setattr(kept, 'value',
                        lambda s: real(s)[..., :4, :4] if isinstance(s, Adversarials) else real(s))
    with pytest.raises(ValueError,
                       match=r'the surrogate takes images \(1, 4, 4\), the judged weights \(1, 8, 8\)'):
        kept.get(black(RIGHT))

def test_too_many_images(made):
    with pytest.raises(ValueError, match='n_eval 361 is more than the 360 test images of digits'):
        made.get(replace(black(LEFT).adversarials, n_eval=361))


# ---- worst cases -------------------------------------------------------------------------------------------

def by_hand(rights):
    "The first verdict that is wrong, image by image, in plain Python"
    return [next((i for i,r in enumerate(rights) if not r[k]), -1) for k in range(len(rights[0]))]

def test_two_attacks_that_each_break_a_half():
    "The worst case is 0; the minimum of the averages is a half"
    clean, one, two = torch.ones(8, dtype=torch.bool), torch.arange(8) < 4, torch.arange(8) >= 4
    breaker = first_broken([clean, one, two])
    assert min(r.float().mean() for r in (one, two)) == .5 and proportion(breaker==-1)['accuracy'] == 0
    assert (breaker.tolist() == [2]*4+[1]*4 and survivors(breaker, 2) == [8,4,0]
            and breaker.dtype == torch.int8)

@pytest.mark.parametrize('seed', range(5))
def test_first_broken_is_that_of_plain_python(seed):
    rights = list(torch.rand(6, 50, generator=torch.Generator().manual_seed(seed)) < .8)
    breaker = first_broken(rights)
    assert breaker.tolist() == by_hand(rights)
    left = [int(torch.stack(rights[:i+1]).all(0).sum()) for i in range(6)]
    assert survivors(breaker, 5) == left

def test_a_stored_worst_case(made):
    cells = [made.value(c).right for c in WORST.cells]
    o, r = made.value(WORST), made.get(WORST).result
    assert o.breaker.tolist() == by_hand(cells) and o.breaker.dtype == torch.int8 and o.predicted is None
    assert_close(o.right, torch.stack(cells).all(0))
    assert ((r['n'], r['correct'], r['accuracy']) == (60, int(o.right.sum()), int(o.right.sum())/60)
            and (r['low'], r['high']) == wilson(r['correct'], 60))
    assert r['survivors'] == survivors(o.breaker, 2) and r['correct'] < min(int(c.sum()) for c in cells), (
        'the halves differ, so the worst case is below each')

def test_a_worst_case_shares_its_cells(made, tmp_path):
    store = quiet(tmp_path); CALLS.clear()
    store.run([WORST, *WORST.cells]); store.run([against(Cell(LEFT, n_eval=60), call(spoil, half=1))])
    assert len(CALLS) == 2

def test_a_worst_case_over_white_and_black_box(made):
    both = Worst((*WORST.cells, black(LEFT)))
    made.run([both])
    assert made.get(both).result['correct'] == int(
        (made.value(WORST).right & made.value(black(LEFT)).right).sum())

def test_worst_cases_of_different_things_are_refused():
    clean, hit = Cell(LEFT), Cell(LEFT, call(spoil))
    for other in (replace(hit, recipe=RIGHT), replace(hit, split='valid'), replace(hit, n_eval=9)):
        with pytest.raises(ValueError, match='Worst wants cells of one recipe, split and n_eval'):
            Worst((clean, other))

def test_cells_of_different_data_are_refused(kept):
    "A cell that was measured before the images changed is not mixed with one after"
    cell = WORST.cells[1]; e = kept.get(cell)
    record = {k: v for k,v in e.record.items() if k != 'tensors'}
    write_entry(kept.folder(cell), record | {'result': e.result | {'data': 'of other images'}}, e.tensors())
    spec = Worst(WORST.cells[:2])
    with pytest.raises(ValueError, match='cells of this worst case were measured on different images'):
        kept.get(spec)


# ---- what a store keeps ------------------------------------------------------------------------------------

def test_what_a_cell_keeps(made):
    "n, interval, a bit and a byte an image"
    entry = made.get(Cell(RIGHT, n_eval=60)); t, r = entry.tensors(), entry.result
    assert (t['right'].dtype == t['predicted'].dtype == torch.uint8 and len(t['right']) == 8
            and len(t['predicted']) == 60)
    assert (r['n'] == 60 and r['accuracy'] == r['correct']/60
            and (r['low'], r['high']) == wilson(r['correct'], 60))

def old(store, cell):
    "Rewrite a cell as it was stored before classes and intervals were kept"
    e = store.get(cell); bits = {'right': e.tensors()['right']}
    result = {k: v for k,v in e.result.items() if k not in ('low', 'high')}
    write_entry(store.folder(cell),
                {k: v for k,v in e.record.items() if k != 'tensors'} | {'result': result}, bits)

def test_old_cells_are_read(kept, made):
    for c in (*WORST.cells, Cell(RIGHT, n_eval=60)): old(kept, c)
    o = kept.value(WORST.cells[1])
    assert isinstance(o, Outcome) and o.predicted is None
    assert_close(o.right, made.value(WORST.cells[1]).right)
    assert kept.plan([WORST]) == []
    again = Worst(WORST.cells[:2]); kept.run([again])
    assert kept.get(again).result['survivors'] == made.get(WORST).result['survivors'][:2]
    assert kept.compare(Cell(RIGHT, n_eval=60), WORST.cells[0])['n'] == 60
    with pytest.raises(ValueError, match='stored before classes were kept'):
        confusion(load_data('digits').test.y[:60], o.predicted, 10)

@pytest.mark.parametrize('spec', [black(LEFT).adversarials, black(LEFT), WORST],
                         ids=['adversarials', 'transfer', 'worst'])
@pytest.mark.parametrize('file,harm', [DAMAGE[0], DAMAGE[1], DAMAGE[3], DAMAGE[5]],
                         ids=lambda x: getattr(x, '__name__', x))
def test_damage(made, kept, spec, file, harm):
    "Named, set aside, made again with the same bits, and nothing else is"
    harm(kept.folder(spec)/file); before = entries(kept.root)
    with pytest.warns(UserWarning, match=f'{type(spec).__name__.lower()} {key(spec)} is damaged') as heard:
        kept.value(spec)
    assert len(heard) == 1 and same(made.root, kept.root, spec) and set(before) <= set(entries(kept.root))

def test_damaged_images_do_not_reach_a_target(kept):
    flip(kept.folder(black(LEFT).adversarials)/'tensors.safetensors')
    with pytest.warns(UserWarning, match='adversarials .* is damaged'): kept.get(black(RIGHT))
    seen = Split(kept.value(black(LEFT).adversarials), load_data('digits').test.y[:60])
    assert_close(kept.value(black(RIGHT)).right, verdicts(kept.model(RIGHT), seen))

@pytest.mark.parametrize('spec', [black(LEFT).adversarials, WORST], ids=['adversarials', 'worst'])
def test_killed_while_it_is_made(made, kept, tmp_path, spec):
    """Early, in the middle, and late: nothing half is taken for a result.
    The second try ends with the same bits"""
    for n in (1, 4, 6):
        shutil.rmtree(kept.folder(spec))
        assert (Worker(tmp_path/f'said{n}', work, kept.root, spec, kill=(n, kept.root)).end()
                == -signal.SIGKILL), (tmp_path/f'said{n}').read_text()
        with warnings.catch_warnings():
            warnings.simplefilter('error')       # a kill is not damage
            quiet(kept.root).get(spec)
        assert same(made.root, kept.root, spec)


# ---- numbers -----------------------------------------------------------------------------------------------

def exact(b, c):
    """McNemar's p in rational numbers:
    the chance, over all ways that b+c coins can fall, of a split that is no more likely"""
    n = b+c; chance = [Fraction(math.comb(n, k), 2**n) for k in range(n+1)]
    return float(sum(p for p in chance if p <= chance[b]))

def test_mcnemar_is_the_exact_binomial():
    for b,c in product(range(15), repeat=2):
        one = torch.tensor([True]*b + [False]*c + [True,False])
        two = torch.tensor([False]*b + [True]*c + [True,False])
        m = mcnemar(one, two)
        assert ((m['b'], m['c'], m['n']) == (b, c, b+c+2)
                and math.isclose(m['p'], exact(b, c), rel_tol=1e-9)), (b, c)
        assert m['difference'] == (b-c)/(b+c+2) and -1 <= m['low'] <= m['difference'] <= m['high'] <= 1

def test_mcnemar_in_print():
    "statsmodels' documentation, mcnemar([[101, 121], [59, 33]], exact=True): 59, p 4.43e-6"
    one = torch.tensor([True]*222 + [False]*92)
    two = torch.tensor([True]*101 + [False]*121 + [True]*59 + [False]*33)
    m = mcnemar(one, two)
    assert min(m['b'], m['c']) == 59 and f"{m['p']:.2e}" == '4.43e-06'

def test_wilson_solves_its_equation():
    """The ends are the shares p at which |k/n - p| is z standard errors of p.
    Checked by substitution, to nine digits"""
    z = 1.959963984540054
    for n in (1, 7, 100, 10_000):
        for k in {0, 1, n//3, n-1, n}:
            for p in wilson(k, n): assert math.isclose((k/n-p)**2, z*z*p*(1-p)/n, rel_tol=1e-9, abs_tol=1e-15)

def test_newcombe_narrows_with_agreement():
    "Same accuracies, the more the models agree the narrower; without agreement wider than with"
    width = lambda *t: newcombe(*t)[1]-newcombe(*t)[0]
    widths = [width(60-k, 20+k, 10+k, 10-k) for k in range(0, 10, 3)]
    assert widths == sorted(widths)

def test_a_pair_is_a_pair(made):
    a, b = Cell(LEFT, n_eval=60), Cell(RIGHT, n_eval=60)
    m = made.compare(a, b)
    assert m == mcnemar(made.value(a).right, made.value(b).right) and m['n'] == 60
    assert (made.compare(a, WORST)['b'] == made.get(a).result['correct'] - made.get(WORST).result['correct']
            and made.compare(a, WORST)['c'] == 0)
    for other in (replace(b, n_eval=50), replace(b, split='train'),
                  Cell(recipe(epochs=1, data=LEFT.data.but(split_seed=2)), n_eval=60)):
        with pytest.raises(ValueError, match='a paired comparison wants the same images'):
            made.compare(a, other)

def test_every_number_has_n_and_interval(made):
    budgets = ({e: made.value(Cell(LEFT, call(fgsm, eps=e), n_eval=60)).right for e in (.1, .3)}
               | {0: made.value(WORST.cells[0]).right})
    t = robustness_curve(budgets)
    assert (t.eps.tolist() == [0,.1,.3] and (t.n == 60).all() and t.accuracy.is_monotonic_decreasing
            and t.accuracy.nunique() == 3)
    assert all((row.low, row.high) == wilson(row.correct, 60) for row in t.itertuples())

def test_confusion_is_that_of_the_stored_classes(made):
    y, o = load_data('digits', n_train=128).test.y[:60], made.value(WORST.cells[1])
    c = confusion(y, o.predicted, 10)
    plain = torch.zeros(10, 10, dtype=torch.int64)
    for i,j in zip(y.tolist(), o.predicted.tolist()): plain[i,j] += 1
    assert_close(c, plain); assert c.trace() == o.right.sum()


# ---- presets and prices ------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', PRESETS)
def test_presets_keep_evaluations_together(name):
    "Surrogate and target, clean and attacked: one number of images, at every scale; no two scales meet"
    base, p = baseline('resnet18', 'cifar10', 1), PRESETS[name]
    grid = (Cell(base, call(pgd), surrogate=baseline('resnet34', 'cifar10', 1)),
            against(Cell(base), call(pgd), call(pgd, steps=200)))
    cell, worst = scaled(grid, p)
    assert (len({c.n_eval for c in (cell, *worst.cells)}) == 1
            and {cell.recipe} == {c.recipe for c in worst.cells})
    assert (cell.adversarials == scaled(grid[0].adversarials, p)
            and worst.cells[1] == scaled(grid[1].cells[1], p))
    if name == 'paper': assert (cell, worst) == grid

@pytest.mark.parametrize('a,b', list(combinations(PRESETS, 2)))
def test_scales_of_evaluations_never_mix(a, b):
    base = baseline('resnet18', 'cifar10', 1)
    grid = (Cell(base, call(pgd), surrogate=baseline('resnet34', 'cifar10', 1)),
            against(Cell(base), call(pgd)))
    at = lambda p: {key(s) for s in ancestors(*scaled(grid, PRESETS[p]))}
    assert not at(a) & at(b)

def test_the_attack_of_a_black_box_table_is_priced_once():
    base, a = baseline('resnet18', 'cifar10', 1), call(pgd, steps=20)
    cells = [Cell(replace(base, seed=s), a, surrogate=base) for s in (2,3)]
    todo = [s for s in ancestors(*cells) if isinstance(s, (Cell, Adversarials))]
    assert (sum((images(s)['attack'] for s in todo)) == 20*10_000
            and sum(images(s)['forward'] for s in todo) == 2*10_000)
