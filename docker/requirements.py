"""Print the serving dependencies of the pyproject.toml on standard input, a line each."""

import sys
import tomllib

print("\n".join(tomllib.loads(sys.stdin.read())["project"]["dependencies"]))
