"A stored notebook as a page: nbdev directives removed, code folded, public names registered, pictures named"
import ast, json, re

from .facts import MODULES, NBS, runs_of

def split(source):
    "The `#|` lines above a cell, and the cell"
    lines = source.splitlines()
    n = next((i for i,l in enumerate(lines) if not l.startswith('#|')), len(lines))
    return ' '.join(lines[:n]), '\n'.join(lines[n:]).strip('\n')

def signature(node):
    "As the index shows it: without annotations, which the code below explains"
    if isinstance(node, ast.ClassDef): return node.name
    a = node.args
    for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))): x.annotation = None
    return f'{node.name}({ast.unparse(a)})'

def objects(body, module):
    "Public names as targets that the index, the search and links find; the code below shows the rest"
    def target(kind, text):
        return f'```{{py:{kind}}} {text}\n:module: {module.name}\n:no-typesetting:\n```'
    for n in ast.parse(body).body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in module.public:
            yield target('class' if isinstance(n, ast.ClassDef) else 'function', signature(n))
        for t in n.targets if isinstance(n, ast.Assign) else ():
            for name in ast.walk(t):
                if getattr(name, 'id', None) in module.public: yield target('data', name.id)

def imports_only(body):
    try: return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(body).body)
    except SyntaxError: return False

def fold(said, body, cell, artefact):
    "What to write on a folded cell; None shows it"
    if 'parameters' in cell['metadata'].get('tags', []): return 'Parameters of this page'
    if imports_only(body): return 'Imports'
    if artefact: return 'Code'
    if 'export' in said or cell['outputs']: return None
    if re.search(r'^\s*(assert|with expect_fail)|assert_close', body, re.M):
        return f'Test ({len(body.splitlines())} lines)'

def markdown(text): return {'cell_type': 'markdown', 'id': 'made', 'metadata': {}, 'source': text}

def their_runs(artefact):
    "Where the numbers of an artefact are, each with its record"
    links = [f'[{r.label}](/{r.page}.md)' for r in runs_of(artefact)]
    if not links: return
    yield markdown(f':::{{admonition}} Our numbers, each with the record of what made it\n:class: tip\n'
                   f'{" · ".join(links)}\n:::')

REPORT = re.compile(r'\]\((?:\.\./)+reports/((?:[\w.-]+/)*?[\w.-]+?)(?:/[\w.-]+\.(?:md|json|csv)|/)?\)')

def relinked(text):
    "Links to a report go to its page; those between notebooks stand as they are"
    text = re.sub(r'\]\((?:\.\./)*CONTRIBUTING\.md', '](/CONTRIBUTING.md', text)
    return REPORT.sub(lambda m: m[0] if '.' in m[1].rpartition('/')[2] else f'](/runs/{m[1]}.md)', text)

def cell_as_page(c, said, body, title, heading, artefact):
    tags = c['metadata'].setdefault('tags', []); meta = c['metadata'].setdefault('mystnb', {})
    meta['image'] = {'alt': f'{title}: {heading}' if heading else title}
    if 'echo: false' in said: tags.append('remove-input')
    elif what := fold(said, body, c, artefact):
        tags.append('hide-input'); meta['code_prompt_show'] = what
        if what.startswith('Test'): tags.append('test')
    if 'export' in said: tags.append('export')
    c['source'] = body
    c['outputs'] = [o for o in c['outputs'] if not is_noise(o)]
    for o in c['outputs']:
        if 'class="scoreboard"' in ''.join((data := o.get('data', {})).get('text/html', '')):
            data.pop('text/markdown', None) # sorted and filtered it is HTML
        if 'text/markdown' in data:
            data['text/markdown'] = relinked(''.join(data['text/markdown']))
    return c

def is_noise(output): # progress bars and warnings
    bar = '%|#' in ''.join(output.get('data', {}).get('text/plain', ''))
    return bar or output.get('name') == 'stderr'

def page(name, text):
    "The notebook `name` (below nbs/) as a page"
    nb, module, artefact = json.loads(text), MODULES.get(name), '/' not in name
    title, heading, cells, opened = name, '', [], False
    for c in nb['cells']:
        source = ''.join(c['source'])
        if c['cell_type'] != 'code':
            for level,words in re.findall(r'^(#+) (.+)$', source, re.M):
                title, heading = (words, '') if level == '#' else (title, words)
            c['source'] = relinked(source); cells.append(c)
            continue
        said, body = split(source)
        if re.search(r'\b(hide|default_exp)\b', said) and 'export' not in said or not body: continue
        if 'export' in said and module and not artefact and (known := [*objects(body, module)]):
            cells.append(markdown('\n\n'.join(known)))
        cells.append(cell_as_page(c, said, body, title, heading, artefact))
        if artefact and not opened and c['outputs']: cells += their_runs(name); opened = True
    nb['cells'] = [dict(c, id=f'c{i}') for i,c in enumerate(cells)]
    nb['metadata'].setdefault('language_info', {'name': 'python'})
    return json.dumps(nb)

def make(write):
    "All but the index, and the front doors, whose names are on the pages of the rooms"
    for p in sorted(NBS.rglob('*.ipynb')):
        name = p.relative_to(NBS).with_suffix('').as_posix()
        if name != 'index' and '/99_' not in name and '.ipynb_checkpoints' not in p.parts:
            write(f'nbs/{name}.ipynb', page(name, p.read_text(encoding='utf-8')))
