"""Files and folders that are whole or not there.

What is being written lies beside its place under a name that begins with a dot and ends in ``.partial``, and takes its
name in one step. While it is written it is locked, so that what a killed process left behind is known, and removed by
the next that writes there.
"""

import contextlib
import glob
import os
import secrets
import shutil
import signal
import time
from collections.abc import Generator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["Place"]

_UNFINISHED: set[Path] = set()
_taken = False  # whether the last file has its name, or is just taking it


class Place:
    """Where a file or folder will be.

    Attributes:
        path: Its name to be.
        temporary: Where it is made meanwhile, an empty file or folder at first.

    Raises:
        FileExistsError: If something is there already, unless `overwrite`.
        OSError: If nothing can be made there, naming `path`.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, folder: bool = False
    ) -> None:
        self.path, self._overwrite = Path(path), overwrite
        check_absent(self.path, overwrite)
        _remove_stale(self.path)
        self.temporary = self._beside("partial")
        global _taken
        _taken = False
        _UNFINISHED.add(self.temporary)  # before it is there: a signal may come in between
        with naming(self.path):
            self.temporary.mkdir() if folder else self.temporary.touch(exist_ok=False)
            self._lock = os.open(self.temporary, os.O_RDONLY) if fcntl else None
        if fcntl and self._lock is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(f".{self.path.name[:200]}.{secrets.token_hex(4)}.{ending}")

    def publish(self) -> None:
        """Give it its name, in one step, and see to it that the entry is on the disk.

        Raises:
            FileExistsError: If something has come there meanwhile, unless `overwrite`.
        """
        global _taken
        _taken = True
        try:
            with naming(self.path):
                self._take_name()
        except BaseException:
            _taken = False
            raise
        with contextlib.suppress(OSError):  # not every system can open a folder
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _take_name(self) -> None:
        if self.temporary.is_dir():
            old = self._beside("old")
            if self._overwrite and os.path.lexists(self.path):
                os.rename(self.path, old)
            try:
                check_absent(self.path, overwrite=False)
                os.rename(self.temporary, self.path)
            except OSError:
                if old.exists():
                    os.rename(old, self.path)
                raise
            _remove(old)
        elif self._overwrite:
            os.replace(self.temporary, self.path)
        else:
            try:
                os.link(self.temporary, self.path)  # unlike a rename, fails where another has come
            except FileExistsError:
                check_absent(self.path, overwrite=False)
                raise
            except OSError:  # a file system without links
                check_absent(self.path, overwrite=False)
                os.replace(self.temporary, self.path)

    @contextlib.contextmanager
    def settled(self) -> Generator[None]:
        """After an error, wait until nobody writes there any more: what is removed stays away."""
        try:
            yield
        except BaseException:
            for _ in range(100):
                _remove(self.temporary)
                time.sleep(0.05)
                if not self.temporary.exists():
                    break
            raise

    def discard(self) -> None:
        """Remove what is not published. Always to be called."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        _remove(self.temporary)
        _UNFINISHED.discard(self.temporary)


def check_absent(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError if something is at the path and may not be overwritten, before any work is done.

    An empty folder is in nobody's way.
    """
    empty = path.is_dir() and not any(path.iterdir())
    if not overwrite and os.path.lexists(path) and not empty:
        raise FileExistsError(
            f"{path} exists already. Choose another name, or pass overwrite=True."
        )


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Generator[None]:
    """Name a file in the system's errors: the one asked for, which a full disk does not, and not its temporary name."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from None


def write_text(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a text file."""
    place = Place(path, overwrite=overwrite)
    try:
        with naming(path):
            place.temporary.write_text(text, encoding="utf-8")
        place.publish()
    finally:
        place.discard()


def unfinished() -> list[Path] | None:
    """What has been begun; None where the last of it has taken its name, or is just taking it, and should be let."""
    return None if _taken else list(_UNFINISHED)


def remove_and_exit(paths: list[Path], code: int) -> None:
    """Remove files and folders, and end the process.

    Threads (Orbax has some) would go on writing meanwhile: they end where another program takes the process over.
    """
    if any(path.is_dir() for path in paths) and os.name == "posix":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        script = f'rm -rf -- "$@"; exit {code}'
        os.execv("/bin/sh", ["sh", "-c", script, "sh", *map(str, paths)])
    for path in paths:
        _remove(path)
    os._exit(code)


def _remove_stale(path: Path) -> None:
    """Remove what killed processes left. What is locked is another's work."""
    for name in glob.glob(
        f".{glob.escape(path.name[:200])}.????????.partial", root_dir=path.parent
    ):
        if fcntl is None:
            return
        with contextlib.suppress(OSError):
            lock = os.open(path.parent / name, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path.parent / name)
            finally:
                os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
