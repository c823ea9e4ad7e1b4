"""How a rank joins the others: what is said where it cannot."""

import socket
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch

from hift_ds.launch.errors import UserError
from hift_ds.launch.runtime import ranks


def test_a_port_that_is_in_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/system/test_launcher.py has it through the launcher."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("MASTER_PORT", str(port))

        def listen(**_: Any) -> None:
            torch.distributed.TCPStore("127.0.0.1", port, world_size=2, is_master=True)

        with mock.patch.object(deepspeed, "init_distributed", listen):
            with pytest.raises(UserError, match=f"port {port} of this machine is in use.*--master_port {port + 1}"):
                ranks.join(rank_timeout=1.0)
