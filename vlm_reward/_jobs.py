"""What every long job needs: a bar, a clean stop, files that are whole or as before, memory that stays fast."""

import ctypes
import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

BAR_SECONDS = 0.1 if sys.stderr.isatty() else 30
"""Between updates of a progress bar (tqdm's `mininterval`): a log file gets a line now and then."""


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C (or SIGTERM) was pressed since. The second one interrupts at once."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set  # Python delivers signals to the main thread alone
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def press(number: int, _: object) -> None:
        pressed.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in signals:
        signal.signal(number, press)
    try:
        yield pressed.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yields a path beside `file` that takes its place if the block ends well; else `file` stays."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield fresh
        os.replace(fresh, file)
    except (SafetensorError, OSError) as error:  # safetensors has an error of its own for a full disk
        raise OSError(f"could not write {file} ({error}); what was saved before is unchanged") from error
    finally:
        fresh.unlink(missing_ok=True)


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, the settings of `now` that had another value, or none, `then`; empty when there are none."""
    return "; ".join(f"{k}: {then.get(k)} then, {now[k]} now" for k in now if then.get(k) != now[k])


def keep_settings(config: Any, *free: str, otherwise: str) -> None:
    """Note in `config.output` what its results are made with, and refuse to go on there with other settings.

    Args:
        config: a dataclass of the settings.
        free: those that may change, beside `output` and `workers`.
        otherwise: what the error says of a folder of other settings, e.g. `was begun with other settings`.

    Raises:
        ValueError: what is there was made with other settings, and would be taken for these.
    """
    now = json.loads(json.dumps(asdict(config), default=str))
    now = {name: value for name, value in now.items() if name not in ("output", "workers", *free)}
    file = config.output / "settings.json"
    if file.exists() and (differ := changes(json.loads(file.read_text()), now)):
        raise ValueError(f"{config.output} {otherwise} ({differ}); give another --output")
    config.output.mkdir(parents=True, exist_ok=True)
    with replacing(file) as fresh:
        fresh.write_text(json.dumps(now, indent=2) + "\n")


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for itself.

    Each step frees and allocates the same few hundred megabytes. By default glibc hands large blocks back
    to the kernel, which zeroes them page by page when they return. The same as starting with
    MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ set high. Nothing happens with
    another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # from malloc.h
    libc = ctypes.CDLL(None)
    for parameter, size in ((mmap_threshold, 2**30), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
        libc.mallopt(parameter, size)
