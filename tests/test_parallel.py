"""Jobs in processes and on a real Ray cluster of two CPUs: the same results, whatever dies."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import minari
import numpy as np
import pytest
from ray.cluster_utils import Cluster

from eval import benchmark
from tests.pieces import Piece, do
from training import collect
from vlm_reward import _parallel
from vlm_reward._parallel import run_jobs


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray cluster."""
    settings = {"num_cpus": 2, "include_dashboard": False, "_system_config": {"worker_niceness": 0}}
    cluster = Cluster(head_node_args=settings, initialize_head=True)
    yield cluster.address
    cluster.shutdown()


def results(folder: Path) -> list[list[str]]:
    return sorted(path.read_text().split() for path in folder.glob("*.txt"))


@pytest.mark.parametrize("where", ["processes", "ray"])
def test_every_job_is_done_once_where_the_caller_is(where, request, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MINARI_DATASETS_PATH", "data")
    monkeypatch.delenv("LP_NUM_THREADS", raising=False)
    ray = request.getfixturevalue("cluster") if where == "ray" else None
    run_jobs(do, [Piece(tmp_path, number) for number in range(5)], workers=2, unit="piece", ray=ray)
    # Workers render in their own thread: a renderer's own ones would fight over the cores.
    assert results(tmp_path) == [[str(number), str(tmp_path / "here"), "data", "0"] for number in range(5)]
    assert sorted((tmp_path / "attempts").read_text().split()) == ["0", "1", "2", "3", "4"]


def test_the_piece_of_a_killed_worker_is_done_again_and_counted_once(cluster, tmp_path, capsys):
    pieces = [Piece(tmp_path, number, deaths=int(number == 1)) for number in range(3)]
    run_jobs(do, pieces, workers=2, unit="piece", done=4, ray=cluster)
    assert [number for number, *_ in results(tmp_path)] == ["0", "1", "2"]
    assert sorted((tmp_path / "attempts").read_text().split()) == ["0", "1", "1", "2"]
    assert "7/7" in capsys.readouterr().err


def test_a_piece_that_always_kills_its_worker_is_an_error(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(_parallel, "RETRIES", 1)
    with pytest.raises(RuntimeError, match=r"gave up on Piece\(.*number=7.*is tried 2 times"):
        run_jobs(do, [Piece(tmp_path, 7, deaths=9)], workers=1, unit="piece", ray=cluster)
    assert (tmp_path / "attempts").read_text().split() == ["7", "7"]
    assert results(tmp_path) == []


@pytest.mark.parametrize("where", ["processes", "ray"])
def test_the_error_of_a_job_is_raised_and_what_is_finished_kept(where, request, tmp_path):
    ray = request.getfixturevalue("cluster") if where == "ray" else None
    pieces = [Piece(tmp_path, 3), Piece(tmp_path, -1, after=3)]
    with pytest.raises(ValueError, match=r"^piece -1 is negative$"):
        run_jobs(do, pieces, workers=2, unit="piece", ray=ray)
    assert [number for number, *_ in results(tmp_path)] == ["3"]


def test_the_worker_of_a_killed_caller_ends(tmp_path):
    call = "run_jobs(do, [Piece(Path(sys.argv[1]), -1)], workers=1, unit='piece')"  # waits for ever
    lines = ["import sys", "from pathlib import Path", "from tests.pieces import Piece, do"]
    lines += ["from vlm_reward._parallel import run_jobs", f"if __name__ == '__main__': {call}"]
    script = tmp_path / "call.py"
    script.write_text("\n".join(lines))
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    caller = subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "attempts").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "attempts").read_text() == "-1\n"
    caller.kill()
    assert caller.communicate(timeout=20) == (b"", None)  # ends when nobody can write to it any more


def test_ctrl_c_leaves_the_cluster_and_what_is_finished(cluster, tmp_path, monkeypatch, capsys):
    import ray

    class Pressed(_parallel.tqdm):
        def update(self, n=1):
            super().update(n)
            raise KeyboardInterrupt

    monkeypatch.setattr(_parallel, "tqdm", Pressed)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(do, [Piece(tmp_path, number) for number in range(3)], workers=1, unit="piece", ray=cluster)
    assert not ray.is_initialized()
    assert len(results(tmp_path)) >= 1
    assert "each finished piece is kept" in capsys.readouterr().err


@pytest.mark.parametrize(("form", "silent"), [("{}", False), ("ray://{}", False), ("{}", True)])
def test_an_address_that_nobody_answers_is_an_error_within_seconds(form, silent, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = form.format(f"127.0.0.1:{server.getsockname()[1]}")
        if not silent:
            server.close()
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=rf"no Ray cluster answers at {address}.*ray start --head"):
            run_jobs(do, [Piece(tmp_path, 0)], workers=1, unit="piece", ray=address)
        assert time.monotonic() - start < 5


def test_the_port_of_the_cluster_is_not_that_for_clients(cluster, tmp_path):
    with pytest.raises(ConnectionError, match="leave out ray://"):
        run_jobs(do, [Piece(tmp_path, 0)], workers=1, unit="piece", ray=f"ray://{cluster}")


@pytest.mark.parametrize("address", ["auto", "6379", "node:", "ray://node", ":6379", "http://node:6379"])
def test_what_is_no_address_is_refused(address, tmp_path):
    with pytest.raises(ValueError, match=rf"'local', HOST:PORT or ray://HOST:PORT, got '{address}'"):
        run_jobs(do, [Piece(tmp_path, 0)], workers=1, unit="piece", ray=address)


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match=r'pip install "vlm-reward\[ray\]"'):
        run_jobs(do, [Piece(tmp_path, 0)], workers=1, unit="piece", ray="local")
    run_jobs(do, [], workers=1, unit="piece", ray="local")  # nothing to do needs nothing


def test_a_node_that_does_not_share_the_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"on {socket.gethostname()} has no folder {tmp_path}/gone"):
        _parallel._work(b"", {"dir": f"{tmp_path}/gone"})


# What is built on it


def test_a_collection_on_a_local_cluster_equals_one_without(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    config = collect.Config(
        "eval-rollouts",
        dataset="test/plain-v0",
        tasks=("drawer-close-v3",),
        episodes=1,
        horizon=4,
        cameras=("corner", "topview"),
        size=32,
        workers=2,
    )
    collect.collect(replace(config, dataset="test/ray-v0", ray="local"))
    monkeypatch.setattr(collect, "run_jobs", lambda function, jobs, **_: [function(job) for job in jobs])
    collect.collect(config)
    plain, distributed = minari.load_dataset("test/plain-v0"), minari.load_dataset("test/ray-v0")
    assert (plain.total_episodes, plain.total_steps) == (3, 12)
    assert distributed.total_steps == 12
    for a, b in zip(plain.iterate_episodes(), distributed.iterate_episodes(), strict=True):
        for key in ("state", "corner", "topview"):
            np.testing.assert_array_equal(a.observations[key], b.observations[key])
        np.testing.assert_array_equal(a.actions, b.actions)
        np.testing.assert_array_equal(a.rewards, b.rewards)


def test_benchmark_rows_are_those_without_ray(cluster, tiny_benchmark, tmp_path):
    config = tiny_benchmark
    plain = benchmark.main(config)
    distributed = benchmark.main(replace(config, ray=cluster, out=tmp_path / "ray.json"))
    assert distributed["rows"] == plain["rows"]
    assert [entry["checkpoint"] for entry in distributed["provenance"]] == [
        *config.zero_shot,
        "control",
        *config.checkpoint,
    ]
    assert not list(tmp_path.glob(".*.part"))
