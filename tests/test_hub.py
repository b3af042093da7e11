"""Whether the hub is asked: not when it does not answer, not when HF_HUB_OFFLINE says so, and by
the library alone behind a proxy.
"""

import socket
import time

import pytest
from huggingface_hub import constants

from taxa.runtime import hub


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    proxies = (
        "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY",
    )
    for name in proxies:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.cache_only.cache_clear()
    yield
    hub.cache_only.cache_clear()


def test_a_hub_that_answers(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert hub.cache_only() is False


def test_a_hub_that_refuses(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert hub.cache_only() is True


def test_a_name_that_is_looked_up_for_ever(monkeypatch):
    def for_ever(*_):
        time.sleep(2)
        raise OSError

    monkeypatch.setattr(hub, "LIMIT", 0.1)
    monkeypatch.setattr(socket, "create_connection", for_ever)
    began = time.monotonic()
    assert hub.cache_only() is True and time.monotonic() - began < 1


@pytest.mark.parametrize("offline", [False, True])
def test_behind_a_proxy_and_offline(offline, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert hub.cache_only() is offline
