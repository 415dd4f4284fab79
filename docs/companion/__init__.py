"The site's own part of Sphinx: links by name and by key. `pages` and `notebooks` make what Sphinx reads"
from . import links

def setup(app):
    app.connect('doctree-read', links.names)
    app.connect('html-page-context', links.in_page)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
