"""Prints the oldest versions that pyproject.toml allows of every core dependency, as pip requirements."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    lowest = re.match(r"([\w-]+)(?:\[[\w,]+\])?\s*>=\s*([\w.]+)", requirement)
    if lowest is None:
        raise SystemExit(f"{requirement}: names no lowest version")
    print(f"{lowest[1]}=={lowest[2]}" if lowest[2].count(".") else f"{lowest[1]}~={lowest[2]}.0")
