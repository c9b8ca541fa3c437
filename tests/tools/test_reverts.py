"""The entries of reverts.toml fit the code: each text occurs once in its file, each test exists."""

from pathlib import Path

import pytest
import tomllib

TESTS = Path(__file__).parents[1]
FOUND = tomllib.loads(Path(__file__).with_name("reverts.toml").read_text())["revert"]


@pytest.mark.parametrize("entry", FOUND, ids=lambda entry: f"{entry['commit']} {entry['what']}")
def test_a_revert_can_be_applied(entry):
    source = TESTS.parent / "src/batchnorm" / entry["file"]
    assert source.read_text().count(entry["now"]) == 1
    for test in entry["tests"]:
        path, _, name = test.partition("::")
        assert (TESTS / path).exists()
        assert not name or f"def {name.partition('[')[0]}(" in (TESTS / path).read_text()
