"""The config groups on disk and their options, found without Hydra, so that help comes at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["conf_folder", "config_folders", "config_groups"]

FOLDER_FLAGS = ("--config-dir", "-cd", "--config-path", "-cp")


def conf_folder() -> Path:
    """Return the folder of the shipped configs: inside an installed package, at the root of a repository.

    Raises: FileNotFoundError where it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parents[1] / "conf"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no folder conf in {package} or {package.parents[1]}: install moesaic again")


def config_folders(conf: Path, arguments: Sequence[str]) -> list[Path]:
    """Return `conf` and the folders that `arguments` add with `--config-dir` or `--config-path`."""
    folders = [conf]
    for flag, following in itertools.pairwise([*arguments, ""]):
        name, equals, inline = flag.partition("=")
        if name in FOLDER_FLAGS:
            folders.append(Path(inline if equals else following))
    return folders


def config_groups(folders: Iterable[Path]) -> dict[str, dict[str, str]]:
    """Return each group ("method", "method/score") with its options and the first comment line of each."""
    groups: dict[str, dict[str, str]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            group = path.parent.relative_to(folder).as_posix()
            if group != ".":
                groups.setdefault(group, {})[path.stem] = _about(path)
    return dict(sorted(groups.items()))


def _about(path: Path) -> str:
    """The first comment of a config that is not a Hydra directive."""
    with path.open(encoding="utf-8") as lines:
        comments = (line[1:].strip() for line in lines if line.startswith("#"))
        return next((comment for comment in comments if not comment.startswith("@package")), "")
