"""Every fault that is said to be covered has the test that is named."""

import ast

import pytest

from tests.faults import COVERED, runs

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("name", [name for _, *names in COVERED.values() for name in names])
def test_the_test_is_there(name):
    path, _, function = name.partition("::")
    tree = ast.parse((runs.ROOT / path).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_all_are_covered():
    assert sorted(COVERED) == list(range(1, 27))
    assert all(names for _, *names in COVERED.values())
