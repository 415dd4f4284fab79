"Install refine_nb from the facts in settings.ini."
from configparser import ConfigParser
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['=']); ini.read('settings.ini', encoding='utf-8'); c = ini['DEFAULT']
setup(name=c['lib_name'], version=c['version'], description=c['description'], author=c['author'],
      license='Apache-2.0', python_requires=f">={c['min_python']}",
      packages=find_packages(include=[c['lib_name'], c['lib_name']+'.*']),
      include_package_data=True, package_data={c['lib_name']: ['published/*.csv']},
      long_description=open('README.md', encoding='utf-8').read(),
      long_description_content_type='text/markdown', install_requires=c['requirements'].split(),
      extras_require={'dev': [*c['dev_requirements'].split(), *c['docs_requirements'].split()],
                      'docs': c['docs_requirements'].split(),
                      'cluster': c['cluster_requirements'].split()},
      entry_points={'console_scripts': c.get('console_scripts', '').split()})
