"""What is known to fail is refused before the first epoch, most of it before the data are read."""
import pytest
from runs import PAIR, SMALL, error_line


@pytest.mark.parametrize('options, line', [
    (['--opt', 'adamww'], '--opt adamww: timm has no optimizer of this name, did you mean adamw, radamw or nadamw?'),
    (['--opt', 'bnbadamw'], '--opt bnbadamw: needs the package bitsandbytes, which is not installed'),
    (['--opt', 'fusedadam'], '--opt fusedadam: needs the package apex, which is not installed'),
    (['--opt-betas', '0.9'], '--opt-betas 0.9: --opt adamw has 2 betas'),
    (['--opt', 'lookahead_adan', '--opt-betas', '0.9', '0.99'], '--opt-betas 0.9 0.99: --opt lookahead_adan has 3 '
     'betas'),
], ids=' '.join)
def test_optimizers_that_can_not_be(options, line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('timm_vpl.engine.optim.find_spec', lambda package: None)  # as where it is not installed
    assert error_line(capsys, tmp_path, *PAIR, *SMALL, *options) == line  # not that this folder holds no data
