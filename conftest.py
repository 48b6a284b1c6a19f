"""Fixtures of test_all.py and tests/ alike."""
import pytest

from tests.helpers import make_world


def pytest_collection_modifyitems(items):
    """-k "not world" leaves out what needs the stages to have run, and so takes seconds."""
    for item in items:
        if "world" in item.fixturenames:
            item.extra_keyword_matches.add("world")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """(folder, {stage: its output}): a world of a few dozen drawings taken through every stage.
    Tests may add folders of their own to it and change nothing else (tests/helpers.py)."""
    return make_world(tmp_path_factory.mktemp("world"))
