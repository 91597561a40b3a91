"""A method from outside the package: one module, one YAML, no edit anywhere. The README shows the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
MODULE, YAML = "my_package/scores.py", "my_conf/method/my_method.yaml"


def block_after(text: str, first_line: str) -> str:
    """The fenced block of the README that begins with `first_line`, without its fence."""
    start = text.index(first_line)
    return text[start : text.index("```", start)]


def test_a_method_is_added_with_one_module_and_one_yaml(overrides, tmp_path):
    readme = README.read_text()
    for name in (MODULE, YAML):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block_after(readme, f"# {name}"))
    command = [str(Path(sys.executable).parent / "moesaic"), "--config-dir", str(tmp_path / "my_conf")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, *overrides, "method=my_method", "method.budgets=[2]"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(next((tmp_path / "runs" / "record").rglob("record.json")).read_text())
    assert record["method"]["name"] == "my_method"
    assert {point["arm"] for point in record["points"]} >= {"adapted", "oracle_router", "random_router"}
