"""Every fault that is said to be covered has the test that is named."""

import ast

import pytest

from tests.faults import COVERED, runs

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("number", COVERED)
def test_the_test_is_there(number):
    _, name = COVERED[number]
    path, _, function = name.partition("::")
    tree = ast.parse((runs.ROOT / path).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
