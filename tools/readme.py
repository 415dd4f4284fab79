"Write README.md from the stored nbs/index.ipynb: prose and outputs, with links that work from the root"
import re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
MARK = (
    '<!-- Written by tools/readme.py from nbs/index.ipynb: change that notebook, then `make readme`. -->\n\n')
LINK = re.compile(r'(\]\()(?!https?:|mailto:|#)([^)\s]+)(\))')


def from_root(link):
    "A link relative to nbs/, relative to the root"
    return link[3:] if link.startswith('../') else f'nbs/{link}'

def relinked(markdown):
    "Links rewritten, except inside code"
    parts = re.split(r'(^```.*?^```|`[^`\n]*`)', markdown, flags=re.M|re.S)
    return ''.join(p if i%2 else LINK.sub(lambda m: m[1]+from_root(m[2])+m[3], p) for i,p in enumerate(parts))

def shown(cell):
    "The cell as a reader sees it, or None: `#| hide` hides all, `#| echo: false` the code"
    source = cell.source if cell.cell_type == 'code' else ''
    if re.search(r'^#\|\s*hide\b', source, re.M): return None
    if re.search(r'^#\|\s*echo:\s*false', source, re.M): cell.metadata['transient'] = {'remove_source': True}
    return cell

def readme():
    "The text of README.md"
    nb = nbformat.read(ROOT/'nbs'/'index.ipynb', as_version=4)
    nb.cells = [c for c in map(shown, nb.cells) if c is not None]
    nb.metadata['language_info'] = {'name': 'python'} # for the code fences
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return MARK + re.sub(r'\n{3,}', '\n\n', relinked(text)).strip() + '\n'


if __name__ == '__main__':
    file = ROOT/'README.md'
    text = readme()
    changed = not file.exists() or file.read_text(encoding='utf-8') != text
    if changed: file.write_text(text, encoding='utf-8')
    print('README.md', 'written' if changed else 'is up to date', file=sys.stderr)
