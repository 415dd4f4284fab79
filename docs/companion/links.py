"Names, codes and keys become links: in prose, in code, in tables"
import re

from docutils import nodes
from sphinx import addnodes

from .facts import HOME, KEY, LIBRARY, MODULES, NBS, PAGE_OF, ROOMS, conflicts

CONFLICTS = conflicts()
OPEN = re.compile(r'\b(open-[A-Z]\d{1,3})\b')
LEFT_ALONE = (nodes.reference, nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.title,
              nodes.raw, addnodes.pending_xref)
QUALIFIED = {f'{m.name}.{n}' for m in LIBRARY for n in m.public}

def target_of(text):
    "What a backticked name names: (reftype, target), or None"
    bare = re.sub(r'\(.*\)$', '', text).removesuffix('.ipynb')
    if (room := bare.strip('/')) in ROOMS: return 'doc', f'/library/{room}'
    if bare.startswith('99_') or '/99_' in bare: return None
    if re.fullmatch(r'[\w/]+', bare) and (NBS/f'{bare}.ipynb').is_file() and bare != 'index':
        return 'doc', f'/nbs/{bare}'
    if bare in HOME: return 'obj', f'{HOME[bare].name}.{bare}'
    full = bare if bare.startswith('refine_nb.') else f'refine_nb.{bare}'
    return ('obj', full) if full in QUALIFIED else None

def names(app, doctree):
    "Backticked names, and codes of open points"
    doc = app.env.docname
    for lit in [*doctree.findall(nodes.literal)]:
        inside, found = {type(p) for p in parents(lit)}, target_of(lit.astext())
        if not found or inside & {nodes.reference, nodes.title, addnodes.pending_xref}: continue
        kind, target = found
        ref = addnodes.pending_xref('', refdomain='std' if kind=='doc' else 'py', reftype=kind,
                                    reftarget=target, refdoc=doc, refexplicit=True, refwarn=True)
        lit.replace_self(ref); ref += lit
    for text in [*doctree.findall(nodes.Text)]:
        if any(isinstance(p, LEFT_ALONE) for p in parents(text)) or not OPEN.search(text): continue
        text.parent.replace(text, [*coded(app, doc, text.astext())])

def parents(node):
    while node.parent is not None: node = node.parent; yield node

def coded(app, doc, text):
    for part in OPEN.split(text):
        if part in CONFLICTS:
            paper, row = CONFLICTS[part]
            uri = f"{app.builder.get_relative_uri(doc, f'papers/{paper}_open')}#{part.lower()}"
            yield nodes.reference('', part, refuri=uri, internal=True, reftitle=row['open'],
                                  classes=['open-point'])
        elif part: yield nodes.Text(part)

# ---- in the page as it is written ---------------------------------------------------------------
ROW = re.compile(r'<tr\b.*?</tr>', re.S)
CELL = re.compile(r'(<td\b[^>]*>)(.*?)(</td>)', re.S)
NUMBER = re.compile(r'\s*(?:<p>)?\s*([+\u2212-]?\d[^<]*?)\s*(?:</p>)?\s*', re.S)

KEYED = re.compile(rf'<[^>]*>|{KEY.pattern}')  # a key, where it is not in a tag

def keys(app, page, text):
    "Link the numbers of a row to the record of its run; a key without one says so"
    def uri(key):
        there = PAGE_OF[key]
        return f"{'' if there == page else app.builder.get_relative_uri(page, there)}#run-{key}"
    def linked(m):
        key = m[0]
        if key[0] == '<': return key
        if key not in PAGE_OF: return NO_RECORD.format(key=key, short=key[:8])
        return f'<a class="run" href="{uri(key)}" title="The record of run {key}">{key[:8]}</a>'
    def row(m):
        if 'id="run-' in m[0]: return m[0] # the record itself
        known = [k for k in KEYED.findall(m[0]) if k in PAGE_OF]
        def cell(c):
            if known and not KEY.search(c[2]) and (n := NUMBER.fullmatch(c[2])):
                return f'{c[1]}<a class="number" href="{uri(known[0])}">{n[1]}</a>{c[3]}'
            return c[1] + KEYED.sub(linked, c[2]) + c[3]
        return CELL.sub(cell, m[0])
    return ROW.sub(row, text)

NO_RECORD = ('<span class="no-record" title="{key}: no report has a record of this run '
             '(those of a demo are not kept)">{short}</span>')

SPAN = re.compile(r'<span class="(n[a-z]?)">(\w+)</span>')

def code(app, page, text):
    "Names of the package inside code, where the page imports or defines them"
    source = (NBS/f'{page[4:]}.ipynb').read_text(encoding='utf-8')
    imported = re.findall(r'from refine_nb[\w.]* import ([\w, ]+)', source)
    here = MODULES.get(page[4:])
    used = {n for names in imported for n in re.findall(r'\w+', names)} | set(here.public if here else ())
    known, objects = {n: f'{HOME[n].name}.{n}' for n in used if n in HOME}, app.env.get_domain('py').objects
    def link(m):
        if (full := known.get(m[2])) not in objects: return m[0]
        o = objects[full]
        uri = f"{'' if o.docname == page else app.builder.get_relative_uri(page, o.docname)}#{o.node_id}"
        return f'<a class="code-name" href="{uri}" title="{full}">{m[0]}</a>'
    return re.sub(r'<pre>.*?</pre>', lambda b: SPAN.sub(link, b[0]), text, flags=re.S)

def html_links(app, page, text):
    "Links inside HTML outputs, which Sphinx passes on unchanged"
    def there(m):
        path = re.sub(r'^(?:\.\./)*(?:nbs/)?', '', m[2])
        if path.startswith('reports/'): doc = '/'.join(['runs', *path.split('/')[1:]]).removesuffix('/')
        elif path.endswith('.ipynb'): doc = f'nbs/{path[:-6]}'
        else: return m[0]
        doc = re.sub(r'/[\w.-]+\.(md|json|csv)$', '', doc)
        if doc in app.env.found_docs: return f'{m[1]}{app.builder.get_relative_uri(page, doc)}{m[3] or ""}"'
        return f'<a class="no-record" title="{path} is not stored"' if doc.startswith('runs/') else m[0]
    return HREF.sub(there, text)

HREF = re.compile(r'(<a\b[^>]*?href=")(?!https?:)([^"#]+?\.ipynb|(?:\.\./)*reports/[^"#]+)(#[^"]*)?"')

VERDICT = re.compile(r'(<td\b[^>]*>\s*(?:<p>)?[^\w<]*)(holds|fails|with|against|undecided|not judged|'
                     r'not carried|not run|stands in the text only|is the print itself|'
                     r'cannot be read from it)\b'
                     r'(?=[^<]*(?:</p>)?\s*</td>)')
TONE = {'holds': 'good', 'with': 'good', 'fails': 'bad', 'against': 'bad'}

def boards(text):
    "Scoreboards: the theme's style, room to scroll, each verdict in colour and in words"
    def board(m):
        return f'<table class="table {m[1]}"{VERDICT.sub(badge, m[2])}</table>'
    def badge(v): return f'{v[1]}<span class="verdict {TONE.get(v[2], "open")}">{v[2]}</span>'
    return BOARD.sub(board, text)

BOARD = re.compile(r'<table\b[^>]*?class="((?:[\w -]* )?scoreboard(?: [\w -]*)?)"(.*?)</table>', re.S)

MARKS = {'\U0001f7e6': ('good', '\u25a0'), '\U0001f7e7': ('bad', '\u25a0'), '\u2b1c': ('', '\u25a0'),
         '\U0001f539': ('good', '\u25aa'), '\U0001f538': ('bad', '\u25aa'), '\u25ab': ('', '\u25aa')}

def marks(text):
    "Coloured squares that need no emoji font"
    def mark(m): return '<span class="tone {}" aria-hidden="true">{}</span>'.format(*MARKS[m[1]])
    return re.sub(f"([{''.join(MARKS)}])\ufe0f?", mark, text)

def in_page(app, page, template, context, doctree):
    "Sphinx's `html-page-context`"
    if 'body' not in context: return
    text = marks(boards(keys(app, page, html_links(app, page, context['body']))))
    context['body'] = code(app, page, text) if page.startswith('nbs/') else text
