"""The file behind a checkpoint: the zip that torch.save writes, sealed.

The seal is the zip's comment, which stands at its end: the SHA-256 of all the bytes before it. So
one file carries its own proof, and torch.load still reads it. A byte that changed on a disk, and a
copy that was cut short, are seen before anything is used. Files hold tensors, numbers, strings,
lists and dicts only, and are read with weights_only.
"""

import hashlib
import os
import zipfile

import torch

from taxa.errors import InputError
from taxa.runtime.files import UNREADABLE, replacing

SEAL = b"taxa sha256 "  # what the comment begins with; the digest in hex follows
SEAL_BYTES = len(SEAL) + 64
BLOCK = 1 << 20  # bytes read at a time


def write(path, content):
    """torch.save `content` under a temporary name, seal the file, and rename it to `path`."""
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:
                # torch's own, of a stream that lost count; what the disk said is behind it
                raise error.__context__ if isinstance(error.__context__, OSError) else error
        seal(temporary)


def read(path):
    """What write() wrote.

    Raises InputError, in one line, for a file that is damaged or not one of write()'s; OSError for
    one that is missing, and for a folder.
    """
    try:
        check_seal(path)
        # torch refuses a storage that claims more numbers than the file holds for it.
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise
    except (zipfile.BadZipFile, *UNREADABLE) as error:
        kind = type(error).__name__
        raise InputError(f"{path}: not a checkpoint of train.py (reading it: {kind})") from None


def seal(path):
    """End a zip file that has no comment with one: the SHA-256 of every byte before it."""
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(SEAL_BYTES.to_bytes(2, "little"))  # a zip's last field: its comment's length
        size = file.tell()
        file.write(SEAL + _digest(file, size))


def check_seal(path):
    """Raise InputError unless a file is sealed and whole, and unpacks to no more than its size."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END) - SEAL_BYTES
        file.seek(max(size, 0))
        comment = file.read()
        if not comment.startswith(SEAL) or size < 0:
            raise InputError(
                f"{path}: not a checkpoint of train.py, or cut short "
                "(it does not end in its digest)"
            )
        if comment != SEAL + _digest(file, size):
            raise InputError(
                f"{path}: damaged: its bytes are not those that were written (SHA-256)"
            )
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        packed = any(member.compress_type for member in members)  # torch.save packs nothing
        if packed or unpacked > size + SEAL_BYTES:
            raise InputError(
                f"{path}: not a checkpoint of train.py: it unpacks to more than its own size"
            )


def _digest(file, size):
    """SHA-256, in hex, of the first `size` bytes of an open file, which is then at their end."""
    file.seek(0)
    digest = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, BLOCK))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest().encode()
