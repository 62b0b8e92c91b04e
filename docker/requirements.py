"""The requirements of resfeat and of some of its extras, one a line: an image installs them before
the code comes, so that code that changes does not have torch installed again.

    python docker/requirements.py cluster faiss
"""

import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
for needs in (project["dependencies"], *(extras[extra] for extra in sys.argv[1:])):
    print(*needs, sep="\n")
