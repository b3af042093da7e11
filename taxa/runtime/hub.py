"""Is the Hugging Face hub there? Asked once, since its library asks five times, for half a minute, before it says no."""

import functools
import socket
import threading
import urllib.parse
import urllib.request

LIMIT = 5.0  # seconds


@functools.cache
def cache_only():
    """Must files come from the hub's cache on this machine? So it is with HF_HUB_OFFLINE=1, and where the hub does not answer in 5 s."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():  # a proxy is asked by the library alone
        return constants.HF_HUB_OFFLINE
    url, answered = urllib.parse.urlsplit(constants.ENDPOINT), threading.Event()

    def connect():
        try:
            socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), LIMIT).close()
        except OSError:
            return
        answered.set()

    asking = threading.Thread(target=connect, daemon=True)  # looking up a name has no limit of its own
    asking.start()
    asking.join(LIMIT)
    return not answered.is_set()
