"""Measured choices: remembered per machine, shared by threads and processes, whatever is in the cache file."""

import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flextok_hf.utils import tuning


WAYS, LONG = ("library", "other"), 1000
FASTER = {"library": 2.0, "other": 1.0}


@pytest.fixture(autouse=True)
def own_cache(take):
    """No choices so far."""


def never():
    pytest.fail("timed again")


def as_new_process():
    tuning.measured.clear()
    tuning.stored.cache_clear()


def test_another_way_must_be_faster_by_a_margin():
    assert tuning.fastest("kind", WAYS, {"library": 1.0, "other": 0.94}) == "other"
    assert tuning.fastest("kind", WAYS, {"library": 1.0, "other": 0.96}) == "library"
    assert tuning.fastest("kind", WAYS, {"library": 1.0, "unknown": 0.1}) == "library"
    assert tuning.fastest("kind", WAYS, None, default="other") == "other"


def test_times_are_remembered_in_the_process_and_the_file():
    assert tuning.loop_times("choice", 2, LONG, lambda: FASTER) == FASTER
    assert tuning.loop_times("choice", 2, LONG, never) == FASTER
    assert tuning.stored_times("choice") is None  # a process keeps to what it saw first
    as_new_process()
    assert tuning.stored_times("choice") == FASTER
    assert tuning.loop_times("choice", 2, 1, never) == FASTER


def test_short_loops_are_not_timed():
    assert tuning.loop_times("choice", 2, 10, never) is None


def test_another_number_of_threads_is_another_machine():
    tuning.loop_times("choice", 2, LONG, lambda: FASTER)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert tuning.loop_times("choice", 2, LONG, lambda: {"library": 1.0}) == {"library": 1.0}
    finally:
        torch.set_num_threads(threads)
    assert tuning.loop_times("choice", 2, LONG, never) == FASTER
    assert len(json.loads(tuning.cache_file().read_text())) == 2


def test_refresh_ignores_the_file_and_replaces_its_entries(monkeypatch):
    tuning.loop_times("choice", 2, LONG, lambda: FASTER)
    as_new_process()
    monkeypatch.setenv("FLEXTOK_TUNING", "refresh")
    assert tuning.stored_times("choice") is None
    tuning.loop_times("choice", 2, LONG, lambda: {"library": 3.0})
    assert tuning.loop_times("choice", 2, LONG, never) == {"library": 3.0}
    as_new_process()
    monkeypatch.setenv("FLEXTOK_TUNING", "on")
    assert tuning.stored_times("choice") == {"library": 3.0}


def test_off_times_nothing_and_uses_nothing(monkeypatch):
    tuning.loop_times("choice", 2, LONG, lambda: FASTER)
    as_new_process()
    monkeypatch.setenv("FLEXTOK_TUNING", "off")
    assert tuning.stored_times("choice") is None and tuning.loop_times("choice", 2, LONG, never) is None


def test_an_unknown_mode_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("FLEXTOK_TUNING", "fast")
    with pytest.raises(ValueError, match="FLEXTOK_TUNING is 'fast'; set it to on, off, refresh"):
        tuning.mode()


DAMAGED = {
    "empty": b"",
    "half of it": b'{"machine": {"choice": {"libra',
    "not text": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "numbers for choices": b'{"machine": 3}',
    "text for seconds": b'{"machine": {"choice": {"library": "fast"}}}',
    "deeply nested": b"[" * 100_000,
    "too large": b'{"machine": {}}' + b" " * tuning.MAX_FILE_BYTES,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_holds_nothing_and_is_replaced(content):
    tuning.cache_file().write_bytes(content)
    assert tuning.stored_times("choice") is None
    tuning.loop_times("choice", 2, LONG, lambda: FASTER)
    as_new_process()
    assert tuning.stored_times("choice") == FASTER


@pytest.mark.parametrize("seconds", ["NaN", "-1", "Infinity", "0"])
def test_times_that_no_call_takes_are_ignored(seconds):
    place = json.dumps(tuning.machine())
    tuning.cache_file().write_text(f'{{{place}: {{"choice": {{"library": 1.0, "other": {seconds}}}}}}}')
    assert tuning.stored_times("choice") is None


@pytest.mark.parametrize("problem", ["a file in place of the folder", "no home"])
def test_without_a_place_for_the_file_every_process_measures(problem, monkeypatch, tmp_path):
    (tmp_path / "file").touch()

    def cache_file():
        if problem == "no home":
            raise PermissionError(13, "Permission denied")
        return tmp_path / "file" / "times.json"

    monkeypatch.setattr(tuning, "cache_file", cache_file)
    assert tuning.loop_times("choice", 2, LONG, lambda: FASTER) == FASTER
    as_new_process()
    assert tuning.loop_times("choice", 2, LONG, lambda: {"library": 1.0}) == {"library": 1.0}


def test_threads_wait_for_the_first_one_and_choose_alike():
    timed = []

    def time_ways():
        timed.append(len(timed))
        return {"library": float(len(timed))}

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: tuning.loop_times("choice", 2, LONG, time_ways), range(16)))
    assert timed == [0] and all(times == {"library": 1.0} for times in found)


def measure_many(number):
    for index in range(20):
        tuning.loop_times(f"choice {number} {index}", 2, LONG, lambda: FASTER)


def test_processes_that_measure_at_once_leave_a_whole_file():
    processes = [
        multiprocessing.get_context("fork").Process(target=measure_many, args=(number,)) for number in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    stored = json.loads(tuning.cache_file().read_text())[tuning.machine()]
    assert len(stored) >= 20 and all(times == FASTER for times in stored.values())
    assert os.listdir(tuning.cache_file().parent) == ["times.json"]
