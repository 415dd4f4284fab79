"What a store, its commands and its keys do at their edges: foreign files, damage, equal values"
import json, os, shutil
from pathlib import Path

import pytest
import torch

from refine_nb.base import Cell, Recipe, call, clear, key, whole
from refine_nb.vision import classifier, load_data
from refine_nb.training import fine_tune, sgd
from refine_nb.runs import Store, export_results, import_results
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
    assert f'2 of 2 results' in (said := refine('store', 'prune').output) and str(tmp_path/'reports') in said
    assert 'With --yes' not in said
    assert f"nothing is removed: there is no report in {tmp_path/'reports'}" in error('store', 'prune', '--yes')
    assert kept.find(BASE) and kept.find(Cell(BASE))

def test_prune_leaves_what_another_process_holds(kept, tmp_path):
    reported(tmp_path, json.dumps({'made': [{'key': key(BASE)}]}))
    with kept.claimed(Cell(BASE)):
        assert '0 removed, 1 left to other processes' in refine('store', 'prune', '--yes').output
    assert kept.find(Cell(BASE)) and '1 removed.' in refine('store', 'prune', '--yes').output
    assert not kept.find(Cell(BASE)) and kept.find(BASE)
    assert not list(kept.root.glob('cell/.*')) and not list(kept.root.glob('cell/*'))

def test_one_damaged_record_spoils_no_other_answer(kept, tmp_path):
    (kept.folder(Cell(BASE))/'record.json').write_text('{"kind": "Cell"')
    r = refine('explain', key(BASE))
    assert r.exit_code == 0 and 'fine_tune' in r.output and f'cell {key(Cell(BASE))} is damaged' in r.output
    reported(tmp_path, json.dumps({'made': [{'key': key(Cell(BASE))}]}))
    assert f'cell {key(Cell(BASE))} is damaged (record.json cannot be read' in error('store', 'prune', '--yes')
    assert kept.find(BASE)

def test_numbers_alone_are_no_damage(kept, tmp_path, monkeypatch):
    export_results(kept, [Cell(BASE)], tmp_path/'n.tar', numbers_only=True)
    monkeypatch.setenv('REFINE_HOME', str(tmp_path/'other'))
    import_results(Store(quiet=True), tmp_path/'n.tar')
    r = refine('store', 'verify')
    assert r.exit_code == 0 and '1 of 2 results are whole. 1 came as numbers alone' in r.output
