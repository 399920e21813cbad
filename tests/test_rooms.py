from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports


def test_each_room_imports_only_from_those_after_it():
    assert lint_imports(no_cache=True) == EXIT_STATUS_SUCCESS
