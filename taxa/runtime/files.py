"""Files that are either whole or absent."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from taxa.errors import InputError

# What reading a file of weights raises when it is cut short, damaged, or another kind of file.
UNREADABLE = (
    pickle.UnpicklingError,
    SafetensorError,
    struct.error,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    AssertionError,
)
# The error numbers with which a file system says that it has no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`.

    It is renamed to `path` when the block ends well, and removed when it does not. The bytes are on
    the disk before the name is, so that a machine that loses its power has the old file or the new
    one. An error of the disk names `path`. A device or a pipe (/dev/null, /dev/stdout) is yielded
    itself.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
        to_disk(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def to_disk(path):
    """fsync a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such call for folders
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_folder(path, overwrite=False):
    """Yield a temporary folder beside `path`.

    It is renamed to `path` when the block ends well, and removed with all in it when it does not.
    What a killed run left beside `path` is removed first. If that run was killed between moving the
    old folder away and the new one in, the old one comes back. Raises InputError when `path` exists
    and is not an empty folder, unless overwrite=True, which replaces it at the very end.
    """
    path = Path(path).resolve()
    remove_leftovers(path)
    if path.exists() and not path.is_dir() and overwrite:
        raise InputError(f"{path} is not a folder: give another --out")
    is_empty_folder = path.is_dir() and not any(path.iterdir())
    if path.exists() and not overwrite and not is_empty_folder:
        raise InputError(f"{path} exists: give another --out, or --overwrite to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        )
    except OSError as error:
        raise InputError(f"cannot write beside {path}: {error.strerror}") from None
    try:
        with locked(temporary):
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            # The safetensors library makes its files readable by their owner alone.
            for file in temporary.glob("*.safetensors"):
                file.chmod(0o666 & ~_umask())
            old = temporary.with_suffix(".old")
            with locked(path) if path.exists() else contextlib.nullcontext():
                if path.exists():
                    os.replace(path, old)
                os.replace(temporary, path)
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def lock(file, path, *, advice, inherited=False):
    """Lock an open file, or the descriptor of a folder; returns whether it is locked.

    There are two kinds of locks:

        record lock     It is this process's alone (lockf). It needs a file that is open for
                        writing, and works over NFS. It ends with the process, or when that closes
                        any of its descriptors of the file.
        inherited=True  It is the open file's (flock). The processes that inherit the descriptor
                        share it, and it ends with the last of them. A folder can have it.

    path: what a message calls it. Where the file system has no locks, a warning names the path and
    gives the advice. Raises BlockingIOError at once when another process holds the lock, and any
    other error of the system as it is.
    """
    call = fcntl.flock if inherited else fcntl.lockf
    try:
        call(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"warning: {path} cannot be locked ({error.strerror}): {advice}",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True


@contextlib.contextmanager
def locked(folder):
    """Hold a lock on a folder. The lock ends with the process, however that ends.

    Where the file system has no locks, a warning is printed. Raises InputError when another process
    holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock(descriptor, folder, advice="let no other process write it", inherited=True)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is writing it") from None
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(path):
    """Remove the temporary folders of killed runs beside `path`.

    They are those that no process has locked.
    """
    for leftover in sorted(path.parent.glob(f".{glob.escape(path.name)}.*")):
        if leftover.suffix in (".tmp", ".old") and leftover.is_dir():
            with contextlib.suppress(InputError), locked(leftover):
                if leftover.suffix == ".old" and not path.exists():
                    os.replace(leftover, path)
                else:
                    shutil.rmtree(leftover, ignore_errors=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_text(path, limit=1 << 28):
    """The text of a small file.

    Raises ValueError for one of more than `limit` bytes, which is not the file it is taken for.
    """
    with open(path, encoding="utf-8") as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise ValueError(f"more than {limit:,} bytes")
        return file.read()


def read_json(path, hint=""):
    """The value of a JSON file.

    hint: what to add to the message where the file is missing. Raises InputError, in one line, for
    a file that is missing, too large, or no JSON in UTF-8.
    """
    try:
        return json.loads(read_text(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file" + f"; {hint}" * bool(hint)) from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def write_json(path, value):
    """Write one JSON document, indented, under a temporary name and then renamed.

    Raises InputError for NaN and infinity, which JSON does not have.
    """
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise InputError(
            f"{path} is not written: a number in it is NaN or infinite, "
            "so what was measured is worth nothing"
        ) from None
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def save_tensors(path, tensors):
    """Write a safetensors file of {name: tensor} under a temporary name and then rename it.

    It never writes into a file that is there: tensors that were loaded from it may be mapped from
    its bytes, and would change with them.
    """
    # Imported late, since it imports torch, which the plan of a study does not need.
    from safetensors.torch import save

    with replacing(path) as temporary:
        # save() and not save_file(), which would make the file readable by its owner alone.
        temporary.write_bytes(save(tensors, metadata={"format": "pt"}))


def check_finite(source, tensors):
    """Raise InputError, by name, for the first tensor of {name: tensor} with a NaN or an infinity.

    source: where they were read.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise InputError(
                f"{source}: {name} is not finite: {bad:,} of its {tensor.numel():,} numbers are "
                "NaN or infinite; it comes from a run that diverged, or is damaged: "
                "take another file"
            )


def save_array(path, array):
    """np.save to a path.

    A full disk raises an OSError with its error number; np.save itself raises one without.
    """
    buffer = io.BytesIO()
    np.save(buffer, array)
    Path(path).write_bytes(buffer.getbuffer())


def sha256(path):
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
