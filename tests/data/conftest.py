"""A copy of the digits for each test of the data room to spoil."""
import shutil

import pytest


@pytest.fixture
def folder(digits_folder, tmp_path):
    return shutil.copytree(digits_folder, tmp_path / 'data')
