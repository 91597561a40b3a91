"""The Python standard library's own source: real text that is on every machine with Python.

Tests (unless asked for) and generated tables (character maps, help topics, build settings) are left out: the tables are
near-copies of each other on both sides of the split, or differ from machine to machine.
"""

import hashlib
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moesaic.data.corpus import Corpus, DataError, Document, Split, digest_of

__all__ = ["Stdlib", "hash_of", "is_heldout"]

_THIRD_PARTY = {"site-packages", "dist-packages", "__pycache__"}
_TESTS = {"test", "tests", "idle_test"}
_TABLES = {"encodings", "pydoc_data"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stdlib(Corpus):
    """One document per module, named like the import; a hash of that name decides split and place in the order.

    So any beginning of a split is a fair sample of it, and a module keeps its side in every Python version.
    """

    name: str = field(default="stdlib", metadata={"identity": False})
    heldout_frac: float = 0.1  # share of the modules, 0..1
    include_tests: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.heldout_frac < 1:
            raise ValueError(f"heldout_frac={self.heldout_frac} must be between 0 and 1")

    def read(self, split: Split) -> Iterator[Document]:
        root = Path(sysconfig.get_paths()["stdlib"])
        modules = {_dotted(path.relative_to(root)): path for path in self._paths(root)}
        if not modules:
            raise DataError(
                f"no Python source under {root}: this Python comes without its library's source. "
                "Use another Python, or your own files: data=text data.train=... data.heldout=..."
            )
        for name in sorted(modules, key=lambda name: hash_of(f"order/{name}")):
            if is_heldout(name, self.heldout_frac) == (split == "heldout"):
                yield Document(name, _source(modules[name]))

    def describe(self, split: Split) -> str:
        return f"{sysconfig.get_paths()['stdlib']} with heldout_frac={self.heldout_frac}"

    def fingerprint(self) -> str:
        documents = (document for split in ("train", "heldout") for document in self.read(split))
        return digest_of(f"{document.id}\n{document.text}".encode() for document in documents)

    def provenance(self) -> dict[str, str]:
        return {"name": self.name, "fingerprint": self.fingerprint(), "python": platform.python_version()}

    def _paths(self, root: Path) -> Iterator[Path]:
        unwanted = _THIRD_PARTY | (set() if self.include_tests else _TESTS)
        for folder, subfolders, files in os.walk(root):
            # In place, so that the walk does not enter them: thousands of files of other people's packages.
            subfolders[:] = [name for name in subfolders if name not in unwanted and name not in _TABLES]
            for file in files:
                if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                    yield Path(folder, file)


def is_heldout(name: str, heldout_frac: float) -> bool:
    """Whether the module of that dotted name is held out: the same answer on every machine and in every version."""
    return hash_of(name) < heldout_frac * 2**64


def hash_of(text: str) -> int:
    """64 bits that look random and are the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _source(path: Path) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""  # the library's own tests hold files with a wrong encoding on purpose; empty documents are skipped
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
