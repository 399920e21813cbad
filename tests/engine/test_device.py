"""Machines that would not find each other."""
import socket

import pytest

from timm_vpl.engine.device import check_name
from timm_vpl.errors import UsageError


@pytest.mark.parametrize('variable', ['GROUP_WORLD_SIZE', 'SLURM_NNODES'])
def test_a_name_that_others_can_not_reach(variable, monkeypatch):
    monkeypatch.setattr(socket, 'gethostname', lambda: 'localhost')
    for name in ('GLOO_SOCKET_IFNAME', 'GROUP_WORLD_SIZE', 'SLURM_NNODES'):
        monkeypatch.delenv(name, raising=False)
    check_name()
    monkeypatch.setenv(variable, '2')
    with pytest.raises(UsageError, match='the name of this machine, localhost, is .*; set GLOO_SOCKET_IFNAME to the'):
        check_name()
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'eth0')
    check_name()
