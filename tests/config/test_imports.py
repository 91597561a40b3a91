"""The configuration package starts in a blink: no torch behind it."""

import subprocess
import sys


def test_importing_config_does_not_import_torch() -> None:
    code = "import moesaic.config.strict, moesaic.config.identity, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
