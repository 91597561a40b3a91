"""The text of `moesaic --help`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping

__all__ = ["help_text"]

USAGE = """\
moesaic makes the feed-forward layers of a dense language model sparse by a published method, adapts the result,
and measures quality and speed beside the dense model. What is finished already is not computed again.

Usage: moesaic [group=option | key=value]...          one experiment
       moesaic -m [group=a,b | key=1,2,3]...          every combination, one after the other

Examples:
  moesaic method=moefication
  moesaic method=factorllm method.select.k=1 seed=3
  moesaic -m method=moefication,factorllm seed=0,1,2
  moesaic method=moefication dry_run=true             list the stages, and which exist; compute nothing
  moesaic --config-dir my_configs method=mine         options of your own, in my_configs/method/mine.yaml

Flags:
  -m, --multirun      run all combinations; keep_going=false stops at the first failure
  -cd, --config-dir   folder with more options for the groups below
  -c, --cfg job       print the composed config and stop
  --hydra-help        flags of Hydra, which composes the config
  --version           print the version and stop

Exit codes: 0 done, 1 something failed, 2 the config was refused, 130 interrupted (the same command continues).

Groups and their options:
"""


def help_text(groups: Mapping[str, Mapping[str, str]]) -> str:
    """Return the whole help; `groups` are those of `config_groups`."""
    columns = max(80, shutil.get_terminal_size((120, 24)).columns)
    return USAGE + "\n".join(_group_lines(name, options, columns) for name, options in groups.items())


def _group_lines(name: str, options: Mapping[str, str], columns: int) -> str:
    width = max(18, *(len(option) for option in options))
    hang = " " * (width + 4)
    rows = (f"  {option:<{width}}  {about}".rstrip() for option, about in options.items())
    return "\n".join([name, *(textwrap.fill(row, columns, subsequent_indent=hang) for row in rows)])
