"The generated pages: the front page, one for each document, room and run, and what the documents leave open"
import json, re

from .facts import (ARTEFACTS, KEY, LIBRARY, NBS, PAPERS, REPORTS, ROOMS, ROOT, RUNS,
                    conflicts, notebook, outputs, rooms, rows_of, runs_of, text_of)
from .notebooks import markdown, page, relinked

FRAME = ROOT/'docs'
SHORT = {'adcorda': 'AdCorDA', 'spat': 'SPAT', 'dra': 'DRA', 'mixture': 'Mixture'}

def escaped(value): return str(value).replace('|', '\\|').replace('\n', ' ')
def table(head, rows, css=''):
    lines = ['|'+'|'.join(head)+'|', '|'+'|'.join([':--']*len(head))+'|',
             *('|'+'|'.join(map(escaped, r))+'|' for r in rows)]
    return '\n'.join([':::{table}', f':class: {css}', '', *lines, ':::'] if css else lines)

def toctree(entries, caption='', depth=1):
    said = [f':caption: {caption}'] if caption else []
    return '\n'.join(['```{toctree}', ':hidden:', f':maxdepth: {depth}', *said, '', *entries, '```', ''])

def top(name): return (NBS/f'{name}.ipynb').exists()
def title_of(name):
    first = ''.join(notebook(name)['cells'][0]['source'])
    return first.splitlines()[0].lstrip('# '), (re.search(r'^> (.+)$', first, re.M) or ['', ''])[1]

# ---- the front page -----------------------------------------------------------------------------
def front(write):
    "The scoreboard as it is stored, without its code; the index where there is none"
    name = 'scoreboard' if top('scoreboard') else 'index'
    nb = json.loads(page(name, text_of(NBS/f'{name}.ipynb')))
    cells = [c for c in nb['cells'] if c['cell_type'] == 'markdown' or c['outputs']]
    if name == 'index': # what was found; the README says how to install and use it
        end = next((i for i,c in enumerate(cells) if c['source'].startswith('## Installation')), len(cells))
        cells = cells[:end]
    for c in cells:
        if c['cell_type'] == 'markdown': c['source'] = from_top(c['source'])
        else: c['metadata']['tags'] = ['remove-input']
        for o in c.get('outputs', []):
            for mime in ('text/markdown', 'text/html') if 'data' in o else ():
                if mime in o['data']: o['data'][mime] = from_top(''.join(o['data'][mime]))
    start = next(i for i,c in enumerate(cells) if c['source'].startswith('## '))
    opening = re.sub(r'^[#>] .*$', '', cells[0]['source'], flags=re.M) # without its title
    for c in cells[start:]: # findings first; the words are explained where they are used
        if c['source'].startswith('## All of them'): c['source'] += f'\n\n{opening}'; opening = ''
    nb['cells'] = [dict(markdown(f"{text_of(FRAME/'front.md')}\n{opening}"), id='hello'), *cells[start:],
                   dict(markdown(front_tree()), id='tree')]
    write('index.ipynb', json.dumps(nb))

def from_top(text):
    "Links of a notebook in nbs/, seen from the top"
    text = re.sub(r'(\]\(|href="|src=")(?!https?:|#|/|\.\./|data:)([\w/.-]+\.ipynb)', r'\1/nbs/\2', text)
    return re.sub(r'(\]\(|src=")\.\./reports/', r'\1/reports/', text)

def front_tree():
    return toctree([*(f'{SHORT.get(p, p)} <papers/{p}>' for p in PAPERS), 'All four <across>',
                    'Library <library/index>', 'Contributing <CONTRIBUTING>', 'Cite <cite>'])

# ---- a document ---------------------------------------------------------------------------------
def found(artefact):
    "What its page says was found in its largest run, or ''"
    for text in outputs(artefact):
        for part in text.split('\n\n'):
            if part.startswith('**What we found**') and 'nothing yet' not in part:
                return relinked(part.partition('**: ' if '**: ' in part else '): ')[2])
    return ''

def run_links(artefact):
    return ' · '.join(f'[{r.label}](/{r.page}.md)' for r in runs_of(artefact)) or 'none yet'

def artefact_rows(its):
    for a in its:
        said = f'. *Found:* {f}' if (f := found(a.id)) else ''
        yield f'[{a.name}](/nbs/{a.id}.ipynb)', a.title + said, run_links(a.id)

def figures(its):
    "The figure of the largest run of each artefact"
    cards = []
    for a in its:
        if (r := next((r for r in runs_of(a.id) if r.file('figure.svg')), None)) is None: continue
        cards += [f':::{{grid-item-card}} {a.name}: {a.title}', f':link: /nbs/{a.id}', ':link-type: doc',
                  f'```{{image}} /reports/{"/".join(r.parts)}/figure.svg',
                  f':alt: {a.name}, {a.title} ({r.label})', '```', r.label, ':::']
    if not cards: return []
    return ['## Figures', '', 'Each figure is drawn from our largest run of its page.', '',
            '::::{grid} 1 1 2 2', ':gutter: 3', '', *cards, '::::', '']

def ledger(paper):
    "The claims of a document as their page has them: code, sentence, source, where, on its numbers, on ours"
    its = {a.name: f'[{a.name}](/nbs/{a.id}.ipynb)' for a in pages_of(paper)}
    for text in outputs(f'claims_{paper}') if top(f'claims_{paper}') else ():
        lines = [[c.strip() for c in re.split(r'(?<!\\)\|', l)[1:-1]]
                 for l in text.splitlines() if l.startswith('|')]
        if len(lines) > 2 and lines[0][:3] == ['claim', 'text', 'source'] and 'ours' in lines[0]:
            own, ours = (lines[0].index(c) for c in ("the paper's own table", 'ours'))
            return [[*l[:3], its.get(l[3], in_nbs(l[3])), l[own], l[ours]] for l in lines[2:]]
    return []

def claims(paper):
    if not (rows := ledger(paper)): return []
    n, own = len(rows), [r[4] for r in rows]
    body = [[code, text.replace('\\|', '|') + f'<br><small>{source}</small>', *rest]
            for code,text,source,*rest in rows]
    return ['## Claims', '', f"{n} sentences, tested against the document's own numbers and against "
            f'ours: on its own numbers {own.count("holds")} hold and {own.count("fails")} fail. '
            f'[With all numbers](/nbs/claims_{paper}.ipynb).', '',
            table(['claim', 'sentence', 'page', 'on its own numbers', 'on ours'], body,
                  'scoreboard'), '']

def in_nbs(text): return re.sub(r'\]\(([\w/]+\.ipynb)', r'](/nbs/\1', text)

def pages_of(paper): return [a for a in ARTEFACTS.values() if a.paper == paper and top(a.id)]

def tree_of(runs, name):
    return toctree([f'{name(r)}, {r.short} </{r.page}>' for r in runs], 'Our runs') if runs else ''

def document(write, paper):
    p, its = PAPERS[paper], pages_of(paper)
    runs = [r for a in its for r in runs_of(a.id)]
    text = [f'# {p.short[0].upper()+p.short[1:]}', '', f'{p.citation}.', '',
            text_of(FRAME/'papers'/f'{paper}.md'), '', '## Tables, figures, studies', '',
            table(['page', 'what it shows, and what we found', 'our runs'], artefact_rows(its), 'cards'), '',
            *figures(its), *claims(paper),
            toctree([*(f'{a.name} </nbs/{a.id}>' for a in its), f'Open points <{paper}_open>'], 'Pages'),
            tree_of(runs, lambda r: ARTEFACTS[r.artefact].name)]
    write(f'papers/{paper}.md', '\n'.join(text))

def left_open(write, paper):
    rows = [r for p,r in conflicts().values() if p == paper]
    of = f'of {PAPERS[paper].short}' if paper in PAPERS else 'between the documents'
    text = [f'# Open points {of}', '',
            'Where a document contradicts itself or leaves something out, we had to decide.', '']
    for r in rows:
        where = ', '.join(f'`{n}`' for n in r['notebook'].split())
        note = [f"**Note**: {r['note']}.", ''] if r.get('note') else []
        text += [f"## {r['conflict']}", '', f"**Open**{weight(r)}: {r['open']}.", '',
                 f"**We**: {r['decision']}.", '', *note, f"{where}: {named(r['name'])} · {r['source']}", '']
    write(f'papers/{paper}_open.md', '\n'.join(text))

def weight(row): return f" ({row['weight']})" if row.get('weight') else ''
def named(names): return ' '.join(f'`{n}`' for n in names.split())

def across(write):
    "The page of what covers all documents"
    known = [a.id for a in ARTEFACTS.values() if a.paper in PAPERS]
    its = [n.stem for n in sorted(NBS.glob('*.ipynb')) if n.stem not in (*known, 'index')]
    bench = sorted(REPORTS.glob('bench/*/bench.md'))
    runs = [r for n in its for r in runs_of(n)]
    rows = [(f'[{title_of(n)[0]}](/nbs/{n}.ipynb)',
             title_of(n)[1] + (f' *Found:* {f}' if (f := found(n)) else ''), run_links(n)) for n in its]
    shown = [table(['page', 'what it shows', 'our runs'], rows), ''] if rows else []
    text = ['# All four documents', '', *shown,
            '- [Open points between documents](papers/across_open.md)',
            *(f'- [Our speed beside that of other codes: {b.parent.name}](runs/bench/{b.parent.name}.md)'
              for b in bench), '',
            toctree([*(f'{title_of(n)[0]} </nbs/{n}>' for n in its), 'Open points </papers/across_open>',
                     *(f'Speed: {b.parent.name} </runs/bench/{b.parent.name}>' for b in bench)], 'Pages'),
            tree_of(runs, lambda r: title_of(r.artefact)[0])]
    write('across.md', '\n'.join(text))
    for b in bench: write(f'runs/bench/{b.parent.name}.md', untitled(text_of(b), f'Speed: {b.parent.name}'))

# ---- a run --------------------------------------------------------------------------------------
def untitled(markdown, title):
    "A saved table below a heading of its own"
    first, _, rest = markdown.partition('\n')
    body = f'{first.strip("*")}\n{rest}' if first.startswith('**') else markdown
    return f'# {title}\n\n{body}'

def table_of(run, name):
    "A saved table without its title and notes, which the page says once"
    lines = [l for l in text_of(run.folder/f'{name}.md').splitlines() if l.startswith('|')]
    if name in ('table', 'side_by_side') and not any(map(KEY.search, lines)):
        tidy = [r for r in rows_of(run.folder/'tidy.csv') if KEY.match(r.get('key') or '')]
        lines[2:] = ['|'.join(led_to(cells, tidy)) for cells in (l.split('|') for l in lines[2:])]
    css = ['', ':::{table}', ':class: scoreboard', ''] if name == 'claims' else []
    return in_nbs('\n'.join([*css, *lines, *([':::'] if css else [])]))

def led_to(cells, tidy):
    "Link a row's numbers to the one run whose tidy rows hold them; a number that several have gets no link"
    its = [r for r in tidy if set(filter(None, cells)) & set(r.values())] or tidy
    for c in cells:
        number = re.match(r'[+-]?\d+(?:\.(\d+))?', c)
        keys = {r['key'] for r in its if number and has(r, number[0], len(number[1] or ''))}
        yield f'<a class="number" href="#run-{keys.pop().split()[0]}">{c}</a>' if len(keys) == 1 else c

def has(row, text, digits):
    for k,v in row.items():
        try:
            if k != 'key' and f'{float(v):+.{digits}f}'.lstrip('+') == text.lstrip('+'): return True
        except (TypeError, ValueError): pass # a word

def value(v):
    if isinstance(v, list): return ', '.join(map(str, v))
    return ', '.join(f'{k} {x}' for k,x in v.items()) if isinstance(v, dict) else str(v)

def made_by(record):
    source = record.get('source', {})
    facts = {'preset': record['preset'], 'device': record['device'], 'compute': spent(record['seconds']),
             'commit': f"`{str(source.get('commit', 'not known'))[:12]}`"
                       + (' with uncommitted changes' if source.get('dirty') else ''),
             'versions': value(record['versions']),
             **{k: value(v) for k,v in record['settings'].items() if v is not None and k != 'preset'}}
    return table(['', ''], facts.items())

def spent(seconds):
    if seconds < 120: return f'{seconds:.0f} s'
    return f'{seconds/60:.0f} min' if seconds < 7200 else f'{seconds/3600:.1f} h'

def anchor(key): return f'<span id="run-{key}">{key}</span>'

def parts(run):
    "All results that make up this run, and the keys in its tables that have no record, listed as such"
    made = run.record.get('made', [])
    rows = [(m['kind'], anchor(m['key']), spent(m['seconds']), m.get('precision') or '',
             f"`{(m.get('commit') or 'not known')[:8]}`{' (changed)' if m.get('dirty') else ''}", m['device'])
            for m in made]
    there = {m['key'] for m in made}
    lost = [k for k in dict.fromkeys(KEY.findall(text_of(run.folder/'tidy.csv'))) if k not in there]
    columns = ['what', 'key', 'time', 'precision', 'commit', 'device']
    text = ['### Each result', '', table(columns, rows), ''] if made else []
    return [*text, '### Without a record', '',
            'These keys are named in the tables, but this run has no record of them.', '',
            *(f'- {anchor(k)}' for k in lost), ''] if lost else text

HEADING = {'claims': 'Claims', 'side_by_side': 'Beside what is printed', 'table': 'Our numbers'}

def run_page(write, run):
    record, path = run.record, '/reports/' + '/'.join(run.parts)
    title = record.get('title', run.page)
    names = sorted((f.stem for f in run.folder.glob('*.md')), key=lambda n: (n != 'table', n == 'claims', n))
    up = f'Its page: [{title_of(run.artefact)[0]}](/nbs/{run.artefact}.ipynb).' if top(run.artefact) else ''
    text = [f'# {title}', '', *(f'*{n}*\n' for n in record.get('notes', [])), up, '']
    for f in sorted(run.folder.glob('*.svg')):
        alt = title if f.stem == 'figure' else f'{title}: {f.stem}'
        text += [f'```{{image}} {path}/{f.name}', f':alt: {alt}', ':class: report', '```', '']
    for n in names:
        text += [f"## {HEADING.get(n, n.replace('_', ' ').capitalize())}", '', table_of(run, n), '']
    text += ['## What made it', '', made_by(record), '', *parts(run), '## Files', '',
             ' · '.join(f'{{download}}`{f.name} <{path}/{f.name}>`' for f in sorted(run.folder.iterdir())
                        if f.suffix in ('.json', '.csv', '.svg', '.png')), '']
    write(f'{run.page}.md', '\n'.join(text))
    for f in run.folder.iterdir():
        if f.suffix in ('.json', '.csv', '.svg', '.png'): write(f'{path[1:]}/{f.name}', f.read_bytes())

# ---- the library --------------------------------------------------------------------------------
def library(write):
    about = {r: title_of(ROOMS[r].notebook)[1] for r in rooms() if r in ROOMS}
    of = {r: [m for m in LIBRARY if m.room == r] for r in rooms()}
    text = ['# Library', '',
            'A room is a folder of notebooks and a sub-package; it builds only on the rooms above it. '
            'Every public name is in the {ref}`index <genindex>` and in the search.', '',
            table(['room', 'what it holds', 'public names'],
                  [(f'[{r}]({r}.md)', about.get(r, ''), sum(len(m.public) for m in ms))
                   for r,ms in of.items()]), '',
            toctree([f'{r} <{r}>' for r in of], 'Rooms', 2)]
    write('library/index.md', '\n'.join(text))
    for r,ms in of.items(): write(f'library/{r}.md', '\n'.join(room(r, ms, about.get(r, ''))))

def room(r, modules, about):
    names = [(f'`{m.name}.{n}`' if r == 'papers' else f'`{n}`', m.docs.get(n, '').partition('\n')[0],
              f'`{m.notebook}`') for m in modules for n in m.public]
    books = [(f'[{title}](/nbs/{m.notebook}.ipynb)', what)
             for m in modules for title,what in [title_of(m.notebook)]]
    return [f'# {r}', '', about, '', '## Notebooks', '',
            table(['notebook', 'what it is'], books), '',
            '## Public names', '', f'`from refine_nb.{r} import ...`' if r in ROOMS else '', '',
            table(['name', 'what it does', 'notebook'], sorted(names, key=lambda n: n[0].lower())), '',
            toctree([f'/nbs/{m.notebook}' for m in modules])]

def cite(write):
    text = ['# How to cite', '', 'This companion, from `CITATION.cff`:', '', '```yaml',
            text_of(ROOT/'CITATION.cff').strip(), '```', '', 'The four documents:', '', '```bibtex',
            text_of(FRAME/'references.bib').strip(), '```', '']
    write('cite.md', '\n'.join(text))

def make(write):
    "All of them, through `write(path, text)`"
    front(write); across(write); left_open(write, 'across'); library(write); cite(write)
    for paper in PAPERS: document(write, paper); left_open(write, paper)
    for run in RUNS: run_page(write, run)
    write('CONTRIBUTING.md', text_of(ROOT/'CONTRIBUTING.md'))
