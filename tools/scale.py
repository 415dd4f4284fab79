"""How the plan of all artefacts scales: their runs at the published settings, priced here, for 1 to 64 hands.

`make scale` writes reports/scale/. Prices are measured on this machine: with a GPU the hours are those of
that GPU; without one only their ratios count. A demo table is run with one worker and with two.
ARGS="--only tab1_adcorda,tab3_4_spat" takes only these pages, "--preset small" another scale, "--simulated"
runs nothing, "--out FOLDER" writes elsewhere.
"""
import argparse, contextlib, io, json, os, sys, tempfile, time, warnings
from pathlib import Path

from refine_nb.base import ancestors, commit, device_name, whole
from refine_nb.training import engine
from refine_nb.runs import Store, at_preset, duration, priced, scaling, tasks, weights_of_ways, workers
from refine_nb.reporting import ARTEFACTS, Sheet, leaves

NBS = Path(__file__).resolve().parents[1]/'nbs'


class Asked(BaseException):
    "Raised when a page has said what it needs; the rest of it is not run"

def wants(name, preset):
    "The cells that a page needs at a preset; none if it runs nothing"
    cells = json.loads((NBS/f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    space, found = {'__name__': f'page_{name}'}, []
    def ask(self, wanted, shares={}, instead=None):
        all_of = leaves(wanted if instead is None else instead)
        found.extend(at_preset(s, self.p.preset, shares) for s in all_of); raise Asked
    real, Sheet.ask = Sheet.ask, ask
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for c in cells:
                if c['cell_type'] != 'code': continue
                exec(compile(''.join(c['source']), name, 'exec'), space)
                if 'parameters' in c['metadata'].get('tags', []): space['preset'] = preset
                if 'sheet.drawn(' in ''.join(c['source']): return []
    except Asked: pass
    finally: Sheet.ask = real
    return found

def plan_of(pages):
    "All tasks of some pages' cells in one plan, each included once however many pages need it"
    return tasks(ancestors(*dict.fromkeys(s for cells in pages.values() for s in cells)))

def chain_of(todo, ways):
    "The longest chain of tasks, from its start"
    behind = {t: [] for t in todo}
    for t in todo:
        for p in t.needs: behind[p].append(t)
    chain = [max(ways, key=ways.get)]
    while behind[chain[-1]]: chain.append(max(behind[chain[-1]], key=ways.get))
    return chain

def measured(name='tab1_adcorda', hands=(1, 2)):
    "Seconds that a demo table takes with each number of workers, each time into an empty store"
    cells, took = wants(name, 'demo'), {}
    for n in hands:
        with tempfile.TemporaryDirectory() as d:
            begun = time.monotonic(); Store(d, engine(), quiet=True).run(cells, executor=workers(n))
            took[n] = time.monotonic()-begun
    return took

def said_of(took):
    if not took: return []
    lines = [f"{n} worker{'s'*(n > 1)} {duration(t)}, {3600/t:.0f} tables an hour" for n,t in took.items()]
    return [f"**Run here**, not simulated: Table 1 of AdCorDA at the demo preset takes {'; '.join(lines)}, "
            f"each with one thread: {took[1]/took[2]:.2f} times as many with two. Starting a "
            f"process is included."]

def shown(table):
    "The table as a reader sees it"
    named = {'hours': 'hours', 'plan_order': "hours in the plan's order", 'hand_hours': 'hand-hours'}
    t = table[['hands', *named, 'efficiency']].rename(columns=named).round(1)
    return t.assign(efficiency=[f'{100*e:.0f} %' for e in table.efficiency]).to_markdown(index=False)

def summary(table, todo, price, pages, about):
    "The page: what was tested, the table, and what limits the speed"
    ways = weights_of_ways(todo, price); chain = chain_of(todo, ways)
    gain = (1 - table.hours/table.plan_order).max()
    unread = f" Not read: {', '.join(about['unread'])}." if about['unread'] else ''
    return '\n\n'.join([
        '# How the plan scales',
        f"The runs of {sum(map(bool, pages.values()))} pages at the preset {about['preset']}, with the "
        f"parameters written in them: {sum(len(t.specs) for t in todo)} results in {len(todo)} tasks, "
        f"{duration(sum(map(price, todo)))} of work for one hand. Simulated from prices measured on "
        f"{about['device']}, not run. A hand is a GPU, or a process, that does one task at a time; a free "
        f"hand takes the ready task with the longest chain of work behind it.{unread}",
        shown(table), '![Hours with many hands](figure.png)',
        *said_of(about['measured']),
        f"**What limits** is the longest chain, {duration(ways[chain[0]])}: no number of hands beats that.",
        '\n'.join(f'1. {t}: {duration(price(t))}' for t in chain),
        f"**What was changed because of it**: with more than one worker, the task with the longest way goes "
        f"first. Compared with the plan's own order this saves up to {gain:.0%} of the time.",
        "**Whose hours these are**: those of the machine above. If another machine is faster by the same "
        "factor for all runs, its hours are fewer by that factor and its efficiencies are the same; "
        "`make scale` there measures them."]) + '\n'

def picture(table, path):
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(5, 3.2), layout='constrained')
    ax.plot(table.hands, table.hours[0]/table.hands, ':', color='.6', label='all hands always busy')
    ax.plot(table.hands, table.plan_order, 's--', ms=4, color='C1', label="in the plan's order")
    ax.plot(table.hands, table.hours, 'o-', ms=4, color='C0', label='longest way first')
    ax.axhline(table.longest_way[0], color='.3', lw=.8, label='longest chain')
    ax.set(xscale='log', yscale='log', xlabel='hands (GPUs)', ylabel='hours')
    ax.set_xticks(table.hands, map(str, table.hands)); ax.minorticks_off(); ax.legend(frameon=False)
    fig.savefig(path, dpi=150); plt.close(fig)

def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument('--only'); ask.add_argument('--simulated', action='store_true', help='run nothing')
    ask.add_argument('--preset', default='paper')
    ask.add_argument('--out', default=str(NBS.parent/'reports'/'scale'))
    said = ask.parse_args()
    names = said.only.split(',') if said.only else [i for i,a in ARTEFACTS.items() if a.ready]
    here, pages, unread = engine(), {}, []
    for name in names:
        try: pages[name] = wants(name, said.preset)
        except Exception as e: unread.append(name); print(f'{name} was not read: {e}', file=sys.stderr)
        else: print(f'{name}: {len(pages[name])} cells', flush=True)
    todo = plan_of(pages)
    prices = {t: priced(t.head, here) or 0. for t in todo}
    table = scaling(todo, prices.get)
    about = {'preset': said.preset, 'device': device_name(here.device), **(commit() or {}),
             'pages': {n: len(c) for n,c in pages.items()}, 'tasks': len(todo), 'unread': unread,
             'measured': {} if said.simulated else measured()}
    with whole(said.out) as new:
        new.mkdir(); table.to_csv(new/'table.csv', index=False); picture(table, new/'figure.png')
        (new/'README.md').write_text(summary(table, todo, prices.get, pages, about), encoding='utf-8')
        (new/'run.json').write_text(json.dumps(about, indent=1)+'\n')
    print(table.round(2).to_string(index=False))


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as d: # pages open a store, which must not be the user's
        os.environ['REFINE_HOME'] = d; main()
