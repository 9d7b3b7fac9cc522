"""Print what the image serves with, of the pyproject.toml on standard input, a line each: dependencies and pictures."""

import sys
import tomllib

project = tomllib.loads(sys.stdin.read())["project"]
print("\n".join(project["dependencies"] + project["optional-dependencies"]["pictures"]))
