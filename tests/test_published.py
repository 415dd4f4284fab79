"Published numbers are data: each is as printed, each oddity of the paper is known and noted, and no other."
from decimal import Decimal
from importlib import resources

import pytest

from refine_nb.reporting import published

BLOCK = ['model', 'dataset']
ATTACKS = ['-', 'None', 'LL', 'BIH', 'VBI', 'DDN', 'SP']
# from the paper's text, by a separate scan
SUMS = {'accuracy': 5028.06, 'std': 12.17, 'delta': 120.52, 'corrected': 10499, 'total': 21080}


@pytest.fixture(scope='module')
def tab1(): return published('tab1_adcorda')


def mismatches(table):
    "Rows whose printed delta is not accuracy minus baseline: {row: (printed, recomputed)}, exact decimals"
    exact = lambda x: Decimal(f'{x:.2f}')
    found = {}
    for key,block in table.groupby(BLOCK, sort=False):
        base = exact(block.accuracy[block.attack=='-'].item())
        for _,r in block[block.delta.notna()].iterrows():
            ours, printed = exact(r.accuracy)-base, exact(r.delta)
            if ours != printed: found[(*key, r.attack)] = (str(printed), str(ours))
    return found


def test_every_row_of_the_table_is_there_once_in_the_printed_order(tab1):
    assert [k for k,_ in tab1.groupby(BLOCK, sort=False)] == [(m, d) for m in (
        'resnet18', 'resnet34', 'resnet50', 'efficientnet_v2_m') for d in ('cifar10', 'cifar100')]
    for _,block in tab1.groupby(BLOCK, sort=False):
        assert block.attack.tolist() == ATTACKS                        # None is the second (open-A6)
        assert block.approach.tolist() == ['BL'] + ['BL-IST']*6


def test_as_many_numbers_as_the_paper_prints(tab1):
    assert tab1.accuracy.count() == tab1['std'].count() == 56
    assert tab1.delta.count() == 48 and tab1.delta.isna().equals(tab1.attack.eq('-'))
    assert tab1.corrected.count() == tab1.total.count() == 40
    assert tab1.corrected.isna().equals(tab1.attack.isin(['-', 'None']))
    assert dict(zip(tab1.model, tab1.params_printed)) == {'resnet18': '11.19M', 'resnet34': '21.30M',
                                                          'resnet50': '23.57M', 'efficientnet_v2_m': '52.99M'}


def test_sums_of_the_columns(tab1):
    "A digit that changes anywhere changes a sum"
    assert round(tab1.accuracy.sum(), 2) == SUMS['accuracy'] and round(tab1['std'].sum(), 2) == SUMS['std']
    assert (round(tab1.delta.sum(), 2) == SUMS['delta'] and int(tab1.corrected.sum()) == SUMS['corrected']
            and int(tab1.total.sum()) == SUMS['total'])


def test_printed_deltas_are_wrong_exactly_where_we_know(tab1):
    assert mismatches(tab1) == {
        ('resnet18', 'cifar10', 'LL'): ('2.64', '2.58'),               # open-A1
        ('resnet50', 'cifar10', 'None'): ('1.99', '2.29'),             # open-A2
        ('resnet18', 'cifar100', 'LL'): ('3.90', '3.89'),              # open-A5, and the next four
        ('resnet18', 'cifar100', 'BIH'): ('3.96', '3.95'),
        ('resnet18', 'cifar100', 'DDN'): ('3.79', '3.78'),
        ('resnet18', 'cifar100', 'SP'): ('3.86', '3.85'),
        ('efficientnet_v2_m', 'cifar10', 'BIH'): ('0.68', '0.67')}


def test_the_check_of_deltas_can_fail(tab1):
    changed = tab1.copy()
    changed.loc[(changed.model=='resnet34') & (changed.attack=='DDN') & (changed.dataset=='cifar100'),
                'accuracy'] = 83.46
    assert mismatches(changed)['resnet34', 'cifar100', 'DDN'] == ('5.23', '5.05')


def test_a_block_has_one_count_of_misclassified_images_but_for_one_cell(tab1):
    fractions = tab1[tab1.total.notna()]
    usual = fractions.groupby(BLOCK).total.agg(lambda t: t.mode().item())
    odd = fractions[fractions.total != fractions.set_index(BLOCK).index.map(usual)]
    assert (odd[[*BLOCK, 'attack', 'corrected', 'total']].values.tolist()
            == [['resnet50', 'cifar10', 'BIH', 69, 141]])  # open-A3
    assert usual.to_dict() == {('resnet18', 'cifar10'): 176, ('resnet18', 'cifar100'): 451,
                               ('resnet34', 'cifar10'): 80, ('resnet34', 'cifar100'): 2538,
                               ('resnet50', 'cifar10'): 131, ('resnet50', 'cifar100'): 775,
                               ('efficientnet_v2_m', 'cifar10'): 9, ('efficientnet_v2_m', 'cifar100'): 54}


def test_corrected_images(tab1):
    wide = tab1.pivot(index=BLOCK, columns='attack', values='corrected')
    # DDN corrects all
    assert wide.DDN.equals(tab1[tab1.attack=='DDN'].set_index(BLOCK).total.sort_index().rename('DDN'))
    assert wide.index[wide.LL > wide.BIH].tolist() == [('resnet18', 'cifar100')]  # open-A8
    assert (tab1.corrected.dropna() <= tab1.total.dropna()).all()


def test_oddities_are_noted_at_their_cells(tab1):
    where = lambda code: set(map(tuple,
                                 tab1.loc[tab1.note.str.contains(rf'\b{code}:'), [*BLOCK, 'attack']].values))
    assert where('open-A1') | where('open-A2') | where('open-A5') == set(mismatches(tab1))
    assert (where('open-A3') == {('resnet50', 'cifar10', 'BIH')}
            and where('open-A8') == {('resnet18', 'cifar100', 'LL')})
    assert (len(where('open-A7')) == 4 and {a for _,_,a in where('open-A6')} == {'None', 'SP'}
            and len(where('open-A9')) == 1)
    assert where('open-A4') == set()  # that is table 3


@pytest.mark.parametrize('name', sorted(f.name for f in (resources.files('refine_nb')/'published').iterdir()
                                        if f.name.endswith('.csv')))
def test_every_published_file_is_tidy_and_carries_its_source(name):
    table = published(name[:-4])
    assert table.source.notna().all() and table.source.str.contains(r'\d').all(), (
        f'{name}: give each row its document and table or line in `source`')
    assert list(table.columns[-2:]) == ['source', 'note'], f'{name}: the last two columns are source and note'
    raw = (resources.files('refine_nb')/'published'/name).read_bytes()
    assert b'\r' not in raw and raw.endswith(b'\n') and not raw.startswith(b'\xef\xbb\xbf'), (
        f'{name}: UTF-8 without mark, line ends \\n')
    assert not table.drop(columns=['source', 'note']).duplicated().any(), f'{name}: two rows are the same'


# ---- AdCorDA, Table 4 --------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def tab4(): return published('tab4_adcorda')


def test_table_4_is_whole(tab4):
    assert tab4[['clean', 'clean_std', 'robust', 'robust_std']].count().sum() == 96 and len(tab4) == 24
    assert ([round(tab4[c].sum(), 2) for c in ('clean', 'clean_std', 'robust', 'robust_std')]
            == [2151.76, 4.94, 710.6, 39.23])
    assert set(tab4.eps_printed) == {5e-4}


def test_clean_accuracies_of_table_4_are_those_of_table_1(tab1, tab4):
    "Baselines, None, DDN and SP: the same models, the same numbers"
    keys = [*BLOCK, 'attack']
    both = tab4.merge(tab1, on=keys, validate='one_to_one')
    assert len(both) == 24 and (both.clean == both.accuracy).all() and (both.clean_std == both['std']).all()


# ---- AdCorDA, Table 2, figures and text --------------------------------------------------------------------

def test_table_2():
    """20 numbers; deltas are the differences.
    A training accuracy of the baseline is its count of misclassified images, out of 90,000"""
    t = published('tab2_adcorda')
    assert ([t[c].count() for c in ('train', 'accuracy', 'delta', 'corrected', 'total')] == [6, 6, 4, 2, 2]
            and [round(t[c].sum(), 2) for c in ('train', 'accuracy', 'delta')] == [571.29, 515.74, 3.67])
    assert mismatches(t) == {} and t.corrected.dropna().equals(t.total.dropna().rename('corrected'))
    for _,b in t.groupby('model'): assert round(100*(1-int(b.total.max())/90_000), 2) == b.train.iloc[0]
    below = [(r.model, r.attack) for _,b in t.groupby('model')
             for r in b.itertuples() if r.train < b.train.iloc[0]]
    assert below == [('resnet18', 'None'), ('resnet50', 'None'), ('resnet50', 'DDN')] == [
        (r.model, r.attack) for r in t[t.note.str.contains('below BL|Below BL')].itertuples()]  # open-A31


def test_figures_of_adcorda():
    """Of Figure 2 the text has three accuracies, two of which end panel b.
    Figure 1 has no number but the 100 % of its text"""
    f = published('fig2_adcorda')
    assert (f[f.panel=='a'].accuracy.tolist() == [73.48, 80.57, 83.51] and f[f.panel=='b']
            .accuracy.tolist() == [80.57, 83.51] and f[f.panel=='b'].note.str.contains('open-A24').all())
    assert (published('fig1_adcorda').set.tolist() == ['T', 'T_c', 'T_w', 'T_a', "T'"]
            and published('fig1_adcorda').accuracy.sum() == 100)


def test_numbers_of_the_text_of_adcorda():
    t = published('claims_adcorda')
    assert (len(t) == 10 and round(t.value.sum(), 3) == 5619.437 and t.value[:2].tolist() == [.254, .173]
            and t.note.str.contains('open-A23|open-A18').sum() == 4)


# ---- the mixture document ----------------------------------------------------------------------------------

COLUMNS = ['clean', 'fgsm_0.1', 'pgd_0.1', 'fgsm_0.5', 'pgd_0.5']

@pytest.mark.parametrize('name, methods, sums', [
    ('tab1_mixture', ['Traditional', 'Adversarial', 'AdvProp', 'ALS', 'SAT', 'ALS + SAT', 'SAT + AdvProp',
                      'ALS + AdvProp', 'ALS + SAT + AdvProp'], [829.7, 556.16, 533.41, 461.84, 195.19]),
    ('tab2_mixture', ['SAT', 'AdvProp', 'Adversarial'], [273.28, 181.88, 136.04, 170.28, 176.75])])
def test_tables_of_the_mixture_document(name, methods, sums):
    wide = published(name).pivot(index='method', columns='attack', values='accuracy')
    assert (published(name).method.drop_duplicates().tolist() == methods
            and published(name).attack[:5].tolist() == COLUMNS)
    assert wide.notna().all(axis=None) and [round(wide[c].sum(), 2) for c in COLUMNS] == sums


def test_oddities_of_the_mixture_document():
    "A larger eps that looks weaker (open-M5), and an undefended network that resists (open-M16)"
    one, two = (published(n).pivot(index='method', columns='attack', values='accuracy')
                for n in ('tab1_mixture', 'tab2_mixture'))
    assert set(two.index[two['pgd_0.5'] > two['fgsm_0.1']]) == {'SAT', 'Adversarial'}
    assert set(one.index[one['pgd_0.1'] > one['fgsm_0.1']]) == {'Adversarial', 'SAT', 'ALS + SAT'}  # open-M2
    improved = [(m, a) for m in two.index for a in COLUMNS[1:] if two.loc[m, a] > one.loc[m, a]]
    # open-M4
    assert sorted(improved) == [('Adversarial', 'fgsm_0.5'), ('Adversarial', 'pgd_0.5'), ('SAT', 'pgd_0.5')]


# ---- Table 3 of AdCorDA ------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def tab3():
    "What is printed in the table; the last two rows of the file are from the text"
    table = published('tab3_adcorda')
    return table[table.source.str.contains('Table 3')]


def int8_mismatches(table):
    "As `mismatches`; deltas of Table 3 are over PTSQ"
    exact, found = lambda x: Decimal(f'{x:.2f}'), {}
    for key,block in table.groupby(BLOCK, sort=False):
        base = exact(block.accuracy[block.approach=='PTSQ'].item())
        for _,r in block[block.delta.notna()].iterrows():
            ours, printed = exact(r.accuracy)-base, exact(r.delta)
            if ours != printed: found[(*key, r.attack)] = (str(printed), str(ours))
    return found


def test_table_3_is_whole(tab3):
    assert [k for k,_ in tab3.groupby(BLOCK, sort=False)] == [
        (m, d) for m in ('resnet18', 'resnet34') for d in ('cifar10', 'cifar100')]
    for _,block in tab3.groupby(BLOCK, sort=False):
        assert list(zip(block.approach, block.attack)) == [('BL', '-'), ('PTSQ', '-'), ('PTSQ-IST', 'None'),
                                                           ('PTSQ-IST', 'BIH'), ('PTSQ-IST', 'SP')]
    assert (tab3.accuracy.count() == tab3['std'].count() == 20 and tab3.delta.count() == 12
            and tab3['size'].count() == 0)
    assert (round(tab3.accuracy.sum(), 2), round(tab3['std'].sum(), 2),
            round(tab3.delta.sum(), 2)) == (1740.55, 5.23, 41.78)


def test_numbers_beside_table_3():
    rest = published('tab3_adcorda').query('~source.str.contains("Table 3")')
    assert (rest[['model', 'accuracy', 'size']].fillna(0)
            .values.tolist() == [['resnet152', 81.52, 223.49], ['resnet34', 0, 20.76]]
            and rest.note.str.contains('open-A29:').all())


def test_printed_deltas_of_table_3_are_over_ptsq_but_for_two(tab3):
    wrong = {('resnet18', 'cifar10', 'BIH'): ('3.07', '3.06'),
             ('resnet18', 'cifar10', 'SP'): ('2.93', '2.87')}
    assert int8_mismatches(tab3) == wrong
    over_full_precision = tab3.assign(approach=tab3.approach.replace({'BL': 'PTSQ', 'PTSQ': 'BL'}))
    assert len(int8_mismatches(over_full_precision)) == 12
    where = lambda code: set(map(tuple,
                                 tab3.loc[tab3.note.str.contains(rf'\b{code}:'), [*BLOCK, 'attack']].values))
    assert where('open-A4') | where('open-A5') == set(wrong) and {a for _,_,a in where('open-A6')} == {'None'}


def test_baselines_of_table_3_are_those_of_table_1(tab1, tab3):
    base = lambda t: t[t.approach=='BL'].set_index(BLOCK)[['accuracy', 'std']]
    assert base(tab3).equals(base(tab1).loc[base(tab3).index])
