"""Run many jobs in processes or on a Ray cluster, with progress; a stop or an error keeps what is finished."""

import concurrent.futures
import functools
import multiprocessing
import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm_reward._jobs import BAR_SECONDS

RETRIES = 3
"""How often Ray does a job again whose worker died."""

_PROBE_SECONDS = 3.0
# Variables that say where data is, and how many threads Mesa's software renderer takes beside its caller's.
_KEPT = ("MINARI_DATASETS_PATH", "VLM_REWARD_CACHE", "LP_NUM_THREADS")


def run_jobs(
    function: Callable[[Any], object],
    jobs: Sequence[Any],
    *,
    workers: int,
    unit: str,
    done: int = 0,
    ray: str | None = None,
    gpu: bool = False,
) -> None:
    """Call `function(job)` for each job, in `workers` spawned processes (a forked GL context would hang).

    With `ray` the jobs are tasks of a Ray cluster, one CPU each; what they come to is the same. A job whose
    worker or node dies is done again, up to 3 times. The cluster's nodes need what this package needs, the
    same Python and Ray, and must see the current folder and that of the results at the same paths, on a shared
    file system.

    Args:
        function: importable; it writes its own result, atomically, so that a later call can skip it and doing
            a job twice changes nothing.
        jobs: what is left to do; picklable.
        workers: processes, at least 1; with ray="local", CPUs of that cluster. Other clusters use theirs.
        unit: what a job is called in the progress bar.
        done: jobs that an earlier call finished.
        ray: None for processes, "local" for a Ray cluster on this machine that ends with the call, or the
            address of one that runs: HOST:PORT from one of its nodes, ray://HOST:PORT from anywhere.
        gpu: whether a job wants a GPU to itself where the Ray cluster has any.

    Raises:
        ValueError: `ray` is no address.
        ConnectionError: nobody answers at that address.
        RuntimeError: Ray is not installed; a worker died each time it did a job.
        The first error of a job. The others are not started; processes end those that run, Ray drops them.
    """
    if not jobs:
        return
    workers = max(1, workers)
    finished = _on_ray(function, jobs, workers, ray, gpu) if ray else _in_processes(function, jobs, workers)
    bar = tqdm(total=done + len(jobs), initial=done, unit=unit, mininterval=BAR_SECONDS)
    with bar, closing(finished):
        try:
            for _ in finished:
                bar.update()
        except BaseException:
            if bar.n:
                print(f"\nstopping; each finished {unit} is kept, the same command goes on", file=sys.stderr)
            raise


def _in_processes(function: Callable[[Any], object], jobs: Sequence[Any], workers: int) -> Generator[object]:
    """Yields whenever a job is done."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            futures = [pool.submit(_in_worker, function, job) for job in jobs]
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _in_worker(function: Callable[[Any], object], job: Any) -> object:
    """Do a job in a process that ends with its parent."""
    _end_with_parent()
    return function(job)


@functools.cache
def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, whatever killed that."""
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_ray(
    function: Callable[[Any], object], jobs: Sequence[Any], workers: int, address: str, gpu: bool
) -> Generator[object]:
    """Yields whenever a job is done."""
    try:
        import ray
        from ray import cloudpickle, exceptions
    except ImportError as error:
        raise RuntimeError('Ray is not installed: pip install "vlm-reward[ray]"') from error
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":  # results go through files, so there is little to store; Ray would be nice by 15
        quiet |= {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 100 * 2**20}
        quiet |= {"_system_config": {"worker_niceness": 0}}
    else:
        _probe(address)
    ray.init(address, **quiet)
    try:
        # The workers find this package by `here`, so the function that reads it must not need the package.
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        gpus = int(gpu and ray.cluster_resources().get("GPU", 0) >= 1)
        work = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_work)
        here = _here()
        left = {work.remote(pickle.dumps((function, job)), here): job for job in jobs}
        while left:
            (task,), _ = ray.wait(list(left))
            job = left.pop(task)
            try:
                yield ray.get(task)
            except exceptions.RayTaskError as error:
                raise error.cause from error
            except exceptions.RayError as error:
                raise RuntimeError(
                    f"Ray gave up on {job}; a job whose worker dies is tried {RETRIES + 1} times ({error})"
                ) from error
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """ConnectionError unless Ray answers there: `ray.init` would ask for minutes."""
    import grpc

    client, where = address.startswith("ray://"), address.removeprefix("ray://")
    host, _, port = where.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(f"ray must be 'local', HOST:PORT or ray://HOST:PORT, got {address!r}")
    code, said = grpc.StatusCode.OK, "it is the cluster's own port, leave out ray://"
    with grpc.insecure_channel(where, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=_PROBE_SECONDS)
        except grpc.RpcError as error:
            answer: Any = error
            code, said = answer.code(), answer.details()
    # A cluster knows how it is; the server for Ray's clients knows no such question.
    if code != (grpc.StatusCode.UNIMPLEMENTED if client else grpc.StatusCode.OK):
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({said}): `ray start --head` starts one and prints its "
            "address, ray:// goes to its port for clients (10001); or use local"
        )


def _here() -> dict[str, Any]:
    """What a process on another machine must know to import and find what this one can."""
    spawned = spawn.get_preparation_data("ray")
    kept = ("sys_path", "sys_argv", "dir", "init_main_from_name", "init_main_from_path")
    environment = {"LP_NUM_THREADS": "0"} | {name: os.environ[name] for name in _KEPT if name in os.environ}
    return {key: spawned[key] for key in kept if key in spawned} | {"environment": environment}


def _work(parcel: bytes, here: dict[str, Any]) -> None:
    """Make a Ray worker what a spawned process is, then do the job."""
    if not Path(here["dir"]).is_dir():
        raise FileNotFoundError(
            f"the Ray worker on {socket.gethostname()} has no folder {here['dir']}: the nodes of a cluster must "
            "see the checkout and the results at the same paths"
        )
    os.environ.update(here["environment"])
    own = [path for path in sys.path if path not in here["sys_path"]]
    spawn.prepare(here | {"sys_path": own + here["sys_path"]})
    function, job = pickle.loads(parcel)
    function(job)
