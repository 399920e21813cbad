"""A copy of the digits for each test of the data room to spoil."""
import shutil

import pytest
from loading import end_workers


@pytest.fixture
def folder(digits_folder, tmp_path):
    return shutil.copytree(digits_folder, tmp_path / 'data')


@pytest.fixture(autouse=True)
def no_workers_are_left():
    yield
    end_workers()
