"""Every file in conf/data is a corpus; a new file is a new test."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from moesaic.config.strict import strict_object
from moesaic.data.corpus import Corpus

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_file_builds_the_corpus_of_its_name(path: Path) -> None:
    node = OmegaConf.load(path)
    for key in OmegaConf.missing_keys(node):
        node[key] = "some/path"
    corpus = strict_object(Corpus, OmegaConf.to_container(node, resolve=True), "data")
    assert corpus.name == path.stem
    assert path.read_text().startswith("# ")
