"""The claims of AdCorDA: each table as two runs of ours, and Table 4's clean accuracy.

Besides: every conflict of a document is decided somewhere.
"""
import ast, json, re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from refine_nb.reporting import (ARTEFACTS, Claim, cell, judge, our_tables, ours_of, published, report_folder,
                                 stored, weigh)
from refine_nb.papers.adcorda_tables import robust_table
from refine_nb.papers.adcorda_text import CLAIMS, FOUND, known_losses, known_points
from refine_nb.artefacts.claims_adcorda import tidy as adcorda_page
from refine_nb.artefacts.claims_dra import tidy as dra_page
from refine_nb.artefacts.claims_mixture import tidy as mixture_page
from refine_nb.artefacts.fig2_adcorda import picture, view as points
from refine_nb.artefacts.claims_spat import tidy as spat_page
from refine_nb.artefacts.tab4_adcorda import BUDGETS, ROWS, SAME, tidy

ROOT = Path(__file__).resolve().parents[1]
TABLES = ['tab1_adcorda', 'tab2_adcorda', 'tab3_adcorda', 'tab4_adcorda']
OWN = "the paper's own table"


def as_ours(name):
    "A published table in the form of our reports: its rows, and those that stand in each report"
    t = published(name).drop(columns=['source', 'note'])
    if name == 'tab3_adcorda': return t[t.stands_in=='table'], t[t.stands_in=='text'] # sizes
    if name == 'tab4_adcorda':
        t = pd.concat([t.assign(budget=b, accuracy=t[c])[['model','dataset','attack','budget','accuracy']]
                       for b,c in (('clean','clean'), (SAME,'clean'), ('5e-4','robust'))])
    return t, t[:0]

@pytest.fixture
def reported(tmp_path, monkeypatch):
    """The printed tables as reports at the paper's scale, a run for each network and data set.
    Sizes stand beside each of Table 3's"""
    monkeypatch.setenv('REFINE_REPORTS', str(tmp_path))
    for name in TABLES:
        table, each = as_ours(name)
        for (m,d),rows in table.groupby(['model','dataset'], sort=False):
            folder = report_folder(name, 'paper', f'{m}_{d}'); folder.mkdir(parents=True)
            pd.concat([rows, each]).to_csv(folder/'tidy.csv', index=False)
    return tmp_path

def test_several_runs_of_every_table_are_judged_as_the_paper_is(reported):
    "As our own results, the printed numbers get the paper's verdicts; those of the text count as ours"
    assert all(len(list((reported/t/'paper').iterdir())) >= 2 and len(our_tables(t)[1]) == 1
               and our_tables(t)[0] == 'paper' for t in TABLES)
    page = adcorda_page().query('artefact in @TABLES')
    same = page.ours.where(page[OWN]!='stands in the text only',
                           page.ours.map({'holds': 'stands in the text only'}))
    judged = page[OWN] != 'cannot be read from it'
    assert judged.sum() >= 20 and same[judged].tolist() == page[OWN][judged].tolist()
    assert page.ours[~judged].str.startswith('not judged: needs').all()

def test_sizes_of_several_runs_count_once(reported):
    "They stand beside each run, and A10 reads them from all runs together"
    (t,) = our_tables('tab3_adcorda')[1].values()
    assert (t.approach=='size').sum() == 4 == (t.model=='resnet152').sum() and len(t) == 20+4*2
    row = adcorda_page().query('artefact=="tab3_adcorda"').set_index('claim').loc['A10']
    assert row.ours == 'holds' and row.numbers.endswith('20.76 and 223.49 MiB (print: MB)')

def test_runs_of_a_figure_are_judged_each_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv('REFINE_REPORTS', str(tmp_path))
    flat = known_points().assign(accuracy=80.)
    for name,t in (('resnet34_cifar100', known_points()),
                   ('resnet18_cifar100', flat.assign(model='resnet18')), ('resnet34_other', flat)):
        folder = report_folder('fig2_adcorda', 'paper', name)
        folder.mkdir(parents=True); t.to_csv(folder/'tidy.csv', index=False)
    row = adcorda_page().query('artefact=="fig2_adcorda"').set_index('claim').loc['A11']
    assert (row.ours == 'resnet18_cifar100: not judged: needs model resnet34, dataset cifar100; '
            'resnet34_cifar100: holds; resnet34_other: fails')
    assert row.numbers.split('; ')[1:] == [
        'resnet34_cifar100: no correction over baseline at 20 epochs +7.09',
        'resnet34_other: no correction over baseline at 20 epochs +0.00']


def test_a_network_that_the_text_does_not_speak_of_is_not_judged():
    "Section 5.3 is about ResNet-34 on CIFAR-100, the loss of section 5.1 about CIFAR-100"
    other = known_points().assign(model='resnet18', dataset='cifar10')
    said = judge(CLAIMS['fig2_adcorda'], known_points(), other, 'small')
    assert set(said.ours[said.claim!='A20, short']) == {'not judged: needs model resnet34, dataset cifar100'}
    said = judge(CLAIMS['study_adcorda'], known_losses(), known_losses().assign(dataset='cifar10'), 'paper')
    assert said.ours.tolist()[:2] == ['not judged: needs dataset cifar100']*2

def test_the_loss_has_to_fall_as_far_as_the_text_says():
    a7, t = CLAIMS['study_adcorda'][0], known_losses()
    assert a7.verdict(t) == (True, '0.2540 to 0.1730')
    assert a7.verdict(t.assign(loss=[.3002, .3])) == (False, '0.3002 to 0.3000')

def test_every_seed_has_to_gain():
    claim = next(c for c in CLAIMS['study_adcorda'] if c.id=='L245, removal')
    seeds = pd.DataFrame({'contrast': 'removal, with CORAL', 'difference': [3.,1.], 'holm': [.001,.01]})
    assert (claim.verdict(seeds)[0] is True and claim.verdict(seeds.assign(difference=[3.,-1.]))[0] is False
            and claim.verdict(seeds.assign(holm=[.001,.06]))[0] is False)

def test_numbers_of_the_text_are_marked():
    assert published('tab3_adcorda').groupby('stands_in').size().to_dict() == {'table': 20, 'text': 2}
    assert (set(published('fig2_adcorda').stands_in) == {'text'}
            and known_points().groupby('stands_in').size().to_dict() == {'table': 3, 'text': 5})
    assert published('fig1_adcorda').query('stands_in=="text"').set.tolist() == ["T'"]
    page = adcorda_page()
    assert (page.claim[page[OWN]=='stands in the text only'].tolist()
            == ['A9', 'A10', 'A18', 'A11', 'A11, DDN', 'A13', 'A13, None', 'A7'])
    page = spat_page()                                 # of the thesis, those that captions alone print
    assert page.claim[page[OWN]=='stands in the text only'].tolist() == ['T1, clean', 'T1, cats']


def test_robust_accuracy_stands_beside_the_clean_one_of_the_same_images():
    """Of 10,000 images 48 % are right, of the 10 attacked ones 6, then 5 and 0.
    Beside all of them, 50 % would look like a gain"""
    found = lambda a, n, **more: SimpleNamespace(result={'accuracy': a, 'n': n, **more})
    of = {'all': found(.48, 10_000), **{b: found(a, 10, label='AutoAttack (standard)', survivors={'clean': 6})
                                        for b,a in zip(BUDGETS, (.5, .5, 0.))}}
    store = SimpleNamespace(get=lambda spec, make: of[spec])
    t = tidy({row: {'clean': ('all',), **{b: (b,) for b in BUDGETS}} for row in ROWS}, store,
             'resnet18', 'cifar10')
    one = t[t.attack=='DDN'].set_index('budget')
    assert (one.accuracy.to_dict() == {'clean': 48., SAME: 60., **dict(zip(BUDGETS, (50., 50., 0.)))}
            and one.n[SAME] == 10 and one.low[SAME] < 60 < one.high[SAME])
    assert robust_table(t).robust.tolist() == [50.]*4


# ---- conflicts ---------------------------------------------------------------------------------------------

def names(notebook):
    "What a notebook defines: functions, arguments, classes, assigned names"
    cells = json.loads((ROOT/'nbs'/f'{notebook}.ipynb').read_text(encoding='utf-8'))['cells']
    nodes = [n for c in cells if c['cell_type']=='code' for n in ast.walk(ast.parse(''.join(c['source'])))]
    return {getattr(n, 'name', None) or getattr(n, 'arg', None) or n.id for n in nodes
            if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.arg)) or isinstance(n, ast.Name)
            and isinstance(n.ctx, ast.Store)}

DOCUMENTS = {'adcorda': ('A', 32, adcorda_page), 'mixture': ('M', 18, mixture_page),
             'spat': ('T', 32, spat_page), 'dra': ('D', 25, dra_page), 'across': ('X', 9, None)}
# a decision of these is put down before it is carried out: once the claims are ready, each has its place
WAITING = {d for d,pages in {'spat': ['spat'], 'dra': ['dra'], 'across': ['spat', 'dra']}.items()
           if not all(ARTEFACTS[f'claims_{p}'].ready for p in pages)}
PAGES = [d for d,(_,_,page) in DOCUMENTS.items() if page]
DECISIONS = [(d, r) for d in DOCUMENTS for r in published(f'conflicts_{d}').fillna('').itertuples()]

@pytest.mark.parametrize('document', DOCUMENTS)
def test_every_conflict_is_decided_once(document):
    letter, n, page = DOCUMENTS[document]; conflicts = published(f'conflicts_{document}').fillna('')
    assert conflicts.conflict.tolist() == [f'open-{letter}{i}' for i in range(1, n+1)]
    filled = conflicts[['open','decision','notebook','name','source']].map(lambda v: bool(str(v).strip()))
    assert filled[['open','decision','source']].all(axis=None) and filled.notebook.equals(filled.name)
    assert filled.notebook.all() or document in WAITING, f'{document}: where is each decision carried out?'
    assert page or document in WAITING or document == 'across', f'{document}: name its page of claims here'

@pytest.mark.parametrize('row', [r for _,r in DECISIONS], ids=lambda r: r.conflict)
def test_a_decision_is_where_it_says(row):
    books, wanted = row.notebook.split(), row.name.split()
    if not books: return                               # its document is waiting: see above
    if wanted == ['published']:
        assert all(published(b).note.str.contains(rf'\b{row.conflict}\b').any() for b in books), (
            f'{row.conflict}: no note of {books} names it')
        return
    defined = {b: names(b) for b in books}
    assert not (gone := [n for n in wanted if not any(n in d for d in defined.values())]), (
        f'{row.conflict}: {books} do not define {gone}')
    assert not (idle := [b for b,d in defined.items() if not d & set(wanted)]), (
        f'{row.conflict}: {idle} define none of {wanted}')

@pytest.mark.parametrize('document', PAGES)
def test_claims_named_in_a_decision_are_there(document):
    letter, _, claims = DOCUMENTS[document]
    said = {''.join(c) for d in published(f'conflicts_{document}').decision
            for c in re.findall(rf'"({letter}\d[^"]*)"|(?<!-)\b({letter}\d+)\b(?!, )|[Cc]laim (L\d+)', d)}
    assert said and said <= set(claims().claim)


@pytest.mark.parametrize('rates', [(25,75), (50,), (0,), (100,), (0,25,50,75,100)], ids=str)
def test_figure_2_of_adcorda_at_any_rates(rates):
    "Without its ends, too: the self-check of the page, its table, picture, finding and claims"
    ours = pd.read_csv(ROOT/'reports/fig2_adcorda/small/resnet18_cifar10_jpeg/tidy.csv',
                       keep_default_na=False, na_values='')
    ours = ours[(ours.panel=='a') | ours.rate.isin(rates)].assign(model='resnet34', dataset='cifar100')
    page = nbformat.read(ROOT/'nbs/fig2_adcorda.ipynb', as_version=4)
    check, = [line for c in page.cells for line in c.source.splitlines() if line.startswith('assert')]
    exec(check, {'ours': ours})
    shown = points(ours)
    assert [p for p in shown.point if p.startswith('(b)')] == [f'(b) {r} % corrected' for r in rates]
    assert len(picture(ours, 'a title').axes) == 2
    assert ('A straight line fitted' in FOUND['fig2_adcorda'](ours)) == (len(rates) > 2)
    said = judge(CLAIMS['fig2_adcorda'], known_points(), ours, 'paper').set_index('claim').ours
    assert ('not judged' in said['A12']) == (len(rates) < 3)


# ---- across documents --------------------------------------------------------------------------------------

def test_the_stored_scoreboard_is_what_the_reports_say():
    "Each row as the code makes it from the reports of today, and in the ledger's words where it is judged"
    from refine_nb.papers.documents import scoreboard
    now, then = scoreboard().fillna(''), stored('scoreboard')[0].tidy.astype(object).fillna('')
    same = [c for c in now if c != 'share']
    pd.testing.assert_frame_equal(now[same].astype(str), then[same].astype(str))
    pages = pd.concat([adcorda_page(), spat_page(), dra_page(), mixture_page()])
    assert len(now) == len(pages)
    both = now.merge(pages.rename(columns={'ours': 'said'}), on=['artefact','claim','source'])
    both = both[[q in t for q,t in zip(both.sentence.str.strip('“”'), both.text)]]
    assert (both.on_print == both[OWN]).all()
    judged = both[both.verdict.isin(['holds','fails'])]
    assert len(judged) and (judged.verdict == judged.said).all()
    assert not both[both.scale != 'paper'].said.isin(['holds','fails']).any()

def test_a_direction_needs_more_than_luck():
    "The same difference on 50 and on 10,000 images"
    claim = Claim('A1', 'a is above b', 'made up', lambda t: cell(t, attack='a') > cell(t, attack='b'))
    few = pd.DataFrame({'attack': ['a','b'], 'accuracy': [52., 50.], 'n': 50, 'key': ['k','l']})
    assert (weigh(claim, few).word, weigh(claim, few.assign(n=10_000)).word) == ('undecided', 'with')
    assert weigh(claim, few.assign(n=10_000, accuracy=[50., 52.])).word == 'against'

def test_what_stands_in_gets_no_verdict_at_any_scale():
    claim = Claim('A1', 'on CIFAR-10', 'made up', lambda t: cell(t, attack='a') > 0,
                  about={'dataset': 'cifar10'})
    jpeg = pd.DataFrame({'attack': ['a'], 'accuracy': [50.], 'n': 10_000, 'key': 'k',
                         'dataset': 'cifar10_jpeg'})
    assert ours_of(claim, {'x': jpeg}, 'paper')['verdict'] == 'with'
    assert ours_of(claim, {'x': jpeg.assign(dataset='cifar10')}, 'paper')['verdict'] == 'holds'
