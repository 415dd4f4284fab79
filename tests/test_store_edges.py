"What a store, its commands and its keys do at their edges: foreign files, damage, equal values"
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from refine_nb.base import Cell, Recipe, call, clear, key, loaded_commit, whole
from refine_nb.vision import classifier, load_data
from refine_nb.attacks import kl, pgd
from refine_nb.training import fine_tune, sgd
from refine_nb.runs import Given, Store, export_results, here, import_results, seconds_spent
from refine_nb.reporting import run_record
from test_command import error, refine

BASE = Recipe(data=call(load_data, name='digits'), model=call(classifier, name='resnet18'),
              method=call(fine_tune), optimiser=call(sgd), epochs=1, batch_size=16)


@pytest.fixture
def kept(refine_home, monkeypatch, tmp_path):
    "A store of a network and a cell, and an empty folder of reports"
    monkeypatch.setenv('REFINE_REPORTS', str(tmp_path/'reports'))
    store = Store(quiet=True)
    store.keep(BASE, {'best_accuracy': .5}, {'w': torch.ones(3)}, 1.)
    store.keep(Cell(BASE), {'accuracy': .25}, {}, 1.)
    return store

def reported(tmp_path, text, name='x'):
    folder = tmp_path/'reports'/'tab1_adcorda'/'small'/name; folder.mkdir(parents=True, exist_ok=True)
    (folder/'run.json').write_text(text)
    return folder/'run.json'


# ---- what is not the store's ------------------------------------------------------------------------

def test_hidden_folders_of_a_users_stay(tmp_path):
    own = [tmp_path/p for p in ('.vim.original', 'recipe/.a.original', 'notes/.a.refine-original',
                                '.out.original', 'recipe/.b.refine-original')]
    for p in own: p.mkdir(parents=True); (p/'x').write_text('mine')
    Store(tmp_path, quiet=True)
    with whole(tmp_path/'out') as new: new.write_text('1')
    clear(tmp_path); clear(tmp_path/'recipe')
    assert all((p/'x').read_text() == 'mine' for p in own)

def test_what_a_killed_writer_left_goes(tmp_path):
    for name,file in (('.a.refine-abcdefgh', 'lock'), ('.b.refine-abcdefgh', None)): # before it locked, too
        (tmp_path/name).mkdir()
        if file: (tmp_path/name/file).touch()
    clear(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- prune, explain, verify -------------------------------------------------------------------------

def test_prune_stops_at_a_report_that_cannot_be_read(kept, tmp_path):
    run = reported(tmp_path, '{"made": [{"ke')
    for args in ((), ('--yes',)):
        said = error('store', 'prune', *args)
        assert str(run) in said and 'cannot be read' in said
    assert kept.find(BASE) and kept.find(Cell(BASE))
    assert 'Not looked up in reports' in refine('explain', key(BASE)).output

def test_prune_removes_nothing_where_there_is_no_report(kept, tmp_path):
    assert '2 of 2 results' in (said := refine('store', 'prune').output) and str(tmp_path/'reports') in said
    assert 'With --yes' not in said
    said = error('store', 'prune', '--yes')
    assert f"nothing is removed: there is no report in {tmp_path/'reports'}" in said
    assert kept.find(BASE) and kept.find(Cell(BASE))

def test_prune_leaves_what_another_process_holds(kept, tmp_path):
    reported(tmp_path, json.dumps({'made': [{'key': key(BASE)}]}))
    with kept.claimed(Cell(BASE)):
        assert '0 removed, 1 left because other processes' in refine('store', 'prune', '--yes').output
    assert kept.find(Cell(BASE)) and '1 removed.' in refine('store', 'prune', '--yes').output
    assert not kept.find(Cell(BASE)) and kept.find(BASE)
    assert not list(kept.root.glob('cell/.*')) and not list(kept.root.glob('cell/*'))

def test_one_damaged_record_spoils_no_other_answer(kept, tmp_path):
    (kept.folder(Cell(BASE))/'record.json').write_text('{"kind": "Cell"')
    r = refine('explain', key(BASE))
    assert r.exit_code == 0 and 'fine_tune' in r.output and f'cell {key(Cell(BASE))} is damaged' in r.output
    reported(tmp_path, json.dumps({'made': [{'key': key(Cell(BASE))}]}))
    said = error('store', 'prune', '--yes')
    assert f'cell {key(Cell(BASE))} is damaged (record.json cannot be read' in said
    assert kept.find(BASE)

def test_numbers_alone_are_no_damage(kept, tmp_path, monkeypatch):
    export_results(kept, [Cell(BASE)], tmp_path/'n.tar', numbers_only=True)
    monkeypatch.setenv('REFINE_HOME', str(tmp_path/'other'))
    import_results(Store(quiet=True), tmp_path/'n.tar')
    r = refine('store', 'verify')
    assert r.exit_code == 0 and '1 of 2 results are whole. 1 came as numbers alone' in r.output


# ---- equal values, one key --------------------------------------------------------------------------

def asks(n:int|None=None, rate:float|None=None, at:tuple[float,...]|None=None, on=None): pass

@pytest.mark.parametrize('one,other', [(dict(n=100), dict(n=100.)), (dict(rate=1), dict(rate=1.)),
                                       (dict(at=(1, .5)), dict(at=(1., .5)))])
def test_equal_settings_have_one_key(one, other):
    one, other = (call(asks, **s) for s in (one, other))
    assert one == other and key(one) == key(other) and repr(one) == repr(other)

def test_equal_cells_have_one_key():
    one, other = (Cell(replace(BASE, data=call(load_data, name='digits', n_train=n))) for n in (100, 100.))
    assert one == other and key(one) == key(other)
    one, other = (call(pgd, step_size=s) for s in (1, 1.)); assert key(one) == key(other)
    with pytest.raises(ValueError, match=r'pgd: step_size wants a number, got True \(bool\)'):
        call(pgd, step_size=True)

def test_the_seed_of_given_weights_is_a_whole_number():
    of = (call(load_data, name='digits'), call(classifier, name='resnet18'))
    assert key(Given(*of, 1)) == key(Given(*of, 1.)) != key(Given(*of))
    for bad in (True, 'a', -1, 1.5, None):
        with pytest.raises(ValueError, match='seed wants a whole number >= 0'): Given(*of, bad)

@pytest.mark.parametrize('bad', [partial(kl), torch.ones(2), object(), {1, 2}, int])
def test_what_has_no_key_is_refused_where_it_is_given(bad):
    with pytest.raises(ValueError, match='pgd: objective wants a number, string, boolean, None, tup'):
        call(pgd, objective=bad)

def test_what_cannot_be_imported_again_is_no_call():
    with pytest.raises(ValueError, match='can be imported by name, got Linear.forward of torch.nn.modules'):
        call(torch.nn.Linear.forward)
    def inner(): pass
    with pytest.raises(ValueError, match='can be imported by name'): call(inner)


# ---- what made a number ------------------------------------------------------------------------------

def test_the_commit_is_that_of_the_code_that_was_loaded(refine_home, monkeypatch):
    "Somebody checks out another one while a result is made"
    loaded_commit.cache_clear(); was = {'commit': 'a'*40, 'dirty': False}
    monkeypatch.setattr('refine_nb.base.environment.commit', lambda: was)
    store = Store(quiet=True)
    monkeypatch.setattr('refine_nb.base.environment.commit', lambda: {'commit': 'b'*40, 'dirty': True})
    made = store.keep(BASE, {}, {}, 1.).made
    source = run_record('demo', {}, 1.)['source']
    monkeypatch.undo(); loaded_commit.cache_clear()
    assert {k: made[k] for k in was} == source == was

SMALL = replace(BASE, data=call(load_data, name='digits', n_train=40), epochs=3,
                model=call(classifier, name='resnet8', stem='cifar'))

def test_seconds_of_earlier_sessions_count(refine_home, monkeypatch):
    def slow(*args, **kwargs): # as its log says
        return {'history': [], 'best_epoch': 0, 'best_accuracy': 0., 'seconds': 900., 'other': {}}
    monkeypatch.setattr('refine_nb.runs.makers.fit', slow)
    assert Store(quiet=True).get(SMALL).made['seconds'] == 900

def test_what_is_made_on_the_way_is_not_summed_twice(refine_home):
    short, store = replace(SMALL, epochs=2), Store(quiet=True)
    store.run([short, SMALL], executor=here())
    entries = [store.get(r) for r in (short, SMALL)]
    assert entries[0].made['within'] == key(SMALL) and 'within' not in entries[1].made
    assert seconds_spent(entries) == entries[1].made['seconds']
    assert seconds_spent(entries[:1]) == entries[0].made['seconds'] > 0
