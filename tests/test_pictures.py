"What a picture shows, and what it must leave out."
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from refine_nb.artefacts import fig2_2_spat, fig3_dra, tab3_9_spat
from refine_nb.papers.spat_tables import panels


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def drawn(fig): # every image in it
    return [np.asarray(i.get_array(), dtype=float) for ax in fig.axes for i in ax.images]

def holds(fig, x): # whether an image [C,H,W] is among them, as it is
    x = x.permute(1, 2, 0).numpy()
    return any(shown.shape == x.shape and np.allclose(shown, x, atol=1e-6) for shown in drawn(fig))

@pytest.mark.parametrize('whole', [True, False])
def test_a_cat_can_be_left_out(whole):
    "Figure 2.2 of the thesis: what is added is shown either way"
    x = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))*.5+.25
    images = torch.stack([x, x+1/255, x-8/255])
    ours = pd.DataFrame({'predicted': ['cat','cat','dog'], 'confidence': 90., 'budget': [0., 1/255, 8/255],
                         'accuracy': 80., 'low': 70., 'high': 90., 'true': 75., 'n': 10})
    fig = fig2_2_spat.picture(ours, images, 'a title', whole)
    assert [holds(fig, i) for i in images] == [whole]*3 and len(drawn(fig)) == 6
    assert holds(fig, torch.ones_like(x)) and holds(fig, torch.zeros_like(x)) # +1/255 and -8/255, scaled

@pytest.mark.parametrize('whole', [True, False])
def test_images_can_be_left_out_beside_their_noise(whole):
    "Figure 3 of DRA: saliency and the noise of two attacks are shown either way"
    torch.manual_seed(0); x, y = torch.rand(2, 3, 8, 8), torch.tensor([1, 2])
    fig = fig3_dra.picture(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), x, y, 'a title', whole)
    assert [holds(fig, i) for i in x] == [whole]*2 and len(drawn(fig)) == 6+2*whole
    heads = [ax.get_title('left') for ax in fig.axes if ax.images and ax.get_title('left')]
    assert heads == ['image']*whole + ['saliency', 'PGD, 2.55/255', 'DRA, 1/255']

def unread(fig): # panels with nothing below them and no numbers on their axis
    fig.canvas.draw(); shown = [ax for ax in fig.axes if ax.get_visible()]
    def place(ax): at = ax.get_subplotspec(); return at.colspan.start, at.rowspan.start
    lowest = {column: row for column,row in sorted(map(place, shown))}
    def numbers(ax): return [t for t in ax.get_xticklabels() if t.get_visible() and t.get_text()]
    return [ax.get_title('left') for ax in shown if place(ax) in lowest.items() and not numbers(ax)]

def test_every_column_of_panels_has_an_axis():
    "Seven panels in rows of five: the third to fifth of the first row have none below"
    names = [f'attack {i}' for i in range(7)]
    one = {'accuracy': 50., 'low': 40., 'high': 60., 'n': 10}
    rows = [{'method': m, 'attack': a, 'label': a, **one} for a in names for m in ('TRADES','SPAT')]
    t = pd.DataFrame(rows)
    fig = panels(t, 'a title'); assert unread(fig) == []
    fig.axes[3].tick_params(labelbottom=False); assert unread(fig) == ['attack 3\nn = 10'] # it is seen
    assert unread(tab3_9_spat.picture(t.rename(columns={'attack': 'corruption'}), 'a title')) == []
