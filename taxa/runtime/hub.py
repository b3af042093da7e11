"""Does the Hugging Face hub answer?

It is asked once, since its library asks five times, for half a minute, before it says no.
"""

import functools
import socket
import threading
import urllib.parse
import urllib.request

LIMIT = 5.0  # seconds


@functools.cache
def cache_only():
    """Must files come from the hub's cache on this machine?

    It is so with HF_HUB_OFFLINE=1, and where the hub does not answer in 5 s.
    """
    from huggingface_hub import constants

    # A proxy is asked by the library alone.
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return constants.HF_HUB_OFFLINE
    url = urllib.parse.urlsplit(constants.ENDPOINT)
    answered = threading.Event()

    def connect():
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            socket.create_connection((url.hostname, port), LIMIT).close()
        except OSError:
            return
        answered.set()

    # In a thread: looking up a name has no time limit of its own.
    asking = threading.Thread(target=connect, daemon=True)
    asking.start()
    asking.join(LIMIT)
    return not answered.is_set()
