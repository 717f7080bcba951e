"""Run many jobs in processes, with progress; a stop or an error keeps what is finished."""

import concurrent.futures
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from vlm_reward._jobs import BAR_SECONDS


def run_jobs(
    function: Callable[[Any], object], jobs: Sequence[Any], *, workers: int, unit: str, done: int = 0
) -> None:
    """Call `function(job)` for each job in `workers` spawned processes (a forked GL context would hang).

    Args:
        function: importable; it writes its own result, atomically, so that a later call can skip it.
        jobs: what is left to do.
        workers: processes, at least 1.
        unit: what a job is called in the progress bar.
        done: jobs that an earlier call finished.

    Raises:
        The first error of a job, once the running ones have ended; the others are not started.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(1, workers), mp_context=context) as pool:
        running = [pool.submit(function, job) for job in jobs]
        bar = tqdm(
            concurrent.futures.as_completed(running),
            total=done + len(jobs),
            initial=done,
            unit=unit,
            mininterval=BAR_SECONDS,
        )
        try:
            for future in bar:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            print(f"\nstopping; each finished {unit} is kept, and the same command goes on", file=sys.stderr)
            raise
