"The site: notebooks and reports as they are stored, and what a reader needs around them. `make site`"
import importlib.util, sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
ini = ConfigParser(delimiters=['='])
ini.read(HERE.parent/'settings.ini', encoding='utf-8')
ini = ini['DEFAULT']

project, author, version, copyright = ini['title'], ini['author'], ini['version'], ini['copyright']
language, root_doc = 'en', 'index'
extensions = ['myst_nb', 'sphinx.ext.mathjax', 'sphinx_design', 'sphinx_copybutton', 'companion']
exclude_patterns = ['reports/**.md']

nb_execution_mode = 'off'          # stored outputs: nothing is run
nb_merge_streams = True
nb_mime_priority_overrides = [('html', 'text/markdown', 5), ('html', 'image/svg+xml', 10),
                              ('html', 'image/png', 20), ('html', 'text/html', 30)]
nb_render_markdown_format = 'myst' # outputs too: links, mathematics and tables in them
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_inline', 'deflist']
myst_heading_anchors, myst_dmath_double_inline = 3, True
suppress_warnings = ['mystnb.mime_priority', 'misc.highlighting_failure']

# one file that draws mathematics as SVG, with its fonts in it; the default is on another machine
offline = Path(importlib.util.find_spec('sphinx-mathjax-offline').origin).parent
html_static_path = ['static', str(offline/'static'/'mathjax'/'tex-svg.js')]
mathjax_path = 'tex-svg.js'
mathjax3_config = {'options': {'enableMenu': False}}
html_css_files, html_js_files = ['site.css'], [('site.js', {'defer': 'defer'})]
html_copy_source = html_show_sourcelink = False
html_title, html_favicon = project, 'static/favicon.svg'
html_theme = 'pydata_sphinx_theme'
html_context = {'default_mode': 'auto'} # else the theme complains to the console
html_sidebars = {'index': [], 'search': [], 'genindex': []}
html_theme_options = dict(
    logo={'text': project}, header_links_before_dropdown=7, navigation_depth=2, show_nav_level=1,
    show_toc_level=2, navbar_align='left', navbar_persistent=['search-button'], navbar_end=['theme-switcher'],
    # beside tables, which need the width, there is none
    secondary_sidebar_items={p: ['page-toc'] for p in ('nbs/*/*', 'library/*', 'CONTRIBUTING')},
    show_prev_next=True, back_to_top_button=True,
    pygments_light_style='a11y-high-contrast-light', pygments_dark_style='a11y-high-contrast-dark',
    search_bar_text='Search notebooks, functions, claims', footer_start=['copyright'], footer_end=[])
