"""A corpus that is just a list, and may stop in the middle."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from moesaic.data.corpus import Corpus, Document, Split


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed(Corpus):
    name: str = field(default="listed", metadata={"identity": False})
    texts: tuple[str, ...]
    error: BaseException | None = None  # raised after the last text

    def read(self, split: Split) -> Iterator[Document]:
        for number, text in enumerate(self.texts):
            yield Document(f"{split}-{number}", text)
        if self.error is not None:
            raise self.error

    def describe(self, split: Split) -> str:
        return "a list in the test"

    def fingerprint(self) -> str:
        return "0123456789"
