"AutoAttack in the store: what the function says is kept, and a run that dies goes on with its survivors."
from dataclasses import replace

import pytest
import torch

import refine_nb.runs.makers as makers_module
from refine_nb.base import Robustness, key
from refine_nb.vision import to_input
from refine_nb.attacks import autoattack
from refine_nb.training import Engine
from refine_nb.runs import Store
from toys import recipe

TRAINED = replace(recipe(), epochs=6)
ASKED = Robustness(TRAINED, eps=.1, n_eval=60, components=('apgd-ce', 'apgd-t'))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A store with the weights"
    store = Store(tmp_path_factory.mktemp('store'), Engine(), quiet=True, every=0.)
    store.get(TRAINED)
    return store

def direct(store, **settings):
    data, model = store.data(TRAINED.data), store.model(TRAINED)
    return autoattack(model, to_input(data.test.x[:60], data.size), data.test.y[:60], eps=.1,
                      components=ASKED.components, seed=TRAINED.seed, **settings)


def test_what_is_kept_is_what_the_attack_found(trained):
    found, r = trained.get(ASKED), direct(trained)
    # it broke some, not all: neither the identity nor everything
    assert 0 < found.result['correct'] < found.result['survivors']['clean'] < 60
    assert torch.equal(found.tensors()['breaker'], r.breaker) and found.result['survivors'] == r.survivors
    assert (found.result['accuracy'] == pytest.approx(r.robust)
            and found.result['low'] < r.robust < found.result['high'])
    assert (found.result['label'] == 'upper bound (APGD-CE, APGD-T)'
            and torch.equal(trained.value(ASKED).right, r.breaker == -1))
    assert not (trained.root/'running'/key(ASKED)).exists()


def test_a_run_that_dies_goes_on(trained, monkeypatch):
    "Killed in its first component; the second run asks only about the survivors, and ends as an unbroken one"
    asked, calls = replace(ASKED, n_eval=59), []
    def counted(model, x, y, *, save, state, **settings):
        calls.append(None if state is None else int((state['breaker'] == -1).sum()))
        def dying(known):
            save(known)
            if len(calls) == 1: raise KeyboardInterrupt
        return autoattack(model, x, y, save=dying, state=state, batch_size=20, **settings)
    monkeypatch.setattr(makers_module, 'autoattack', counted)
    with pytest.raises(KeyboardInterrupt): trained.get(asked)
    assert trained.find(asked) is None and (trained.root/'running'/key(asked)).exists()
    done = trained.get(asked)
    assert calls[0] is None and 0 < calls[1] < 59
    # an image's verdict does not depend on its company
    assert torch.equal(done.tensors()['breaker'], trained.get(ASKED).tensors()['breaker'][:59])


def test_what_another_model_left_is_not_gone_on_from(trained, monkeypatch):
    "Killed half way, and the weights are others when it is asked again: it says so, and begins anew"
    asked, left = replace(ASKED, n_eval=58), []
    def dying(model, x, y, *, save, **settings):
        def once(known): save(known); left.append(1); raise KeyboardInterrupt
        return autoattack(model, x, y, save=once, **settings)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(makers_module, 'autoattack', dying); trained.get(asked)
    model = trained.model(TRAINED)
    with torch.no_grad(): model[0].weight *= 1.001
    monkeypatch.setattr(type(trained), 'model', lambda self, spec: model)
    with pytest.warns(UserWarning, match='not of the model given.*begins again'): done = trained.get(asked)
    assert left and torch.equal(done.tensors()['breaker'], direct(trained).breaker[:58])


def test_the_cheap_and_the_whole_are_two_results(trained):
    assert (
        len({key(r) for r in (ASKED, replace(ASKED, components=('apgd-ce',)), replace(ASKED, eps=.2),
                              replace(ASKED, reference=True), Robustness(TRAINED, eps=.1, n_eval=60))}) == 5)
    with pytest.raises(ValueError, match="unknown component 'pgd'"):
        trained.get(replace(ASKED, components=('pgd',)))
