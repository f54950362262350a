"""Tensors arrive as they were sent, by either way, and their memory is let go."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from ivl.data import transport

shared = pytest.mark.skipif(not transport._readable(os.getpid()), reason="no shared memory without a name here")


def large(n: int) -> torch.Tensor:
    return torch.full((2, 200, 300), n, dtype=torch.uint8)


def serve(pipe, parent: int) -> None:
    torch.set_num_threads(1)  # as workers do: threads do not survive a fork
    for n in range(5):
        pipe.send(transport.send(large(n), parent))
        assert pipe.recv() == "fetched"
    pipe.send(len(transport._waiting))
    pipe.recv()


@shared
def test_from_another_process():
    here, there = multiprocessing.get_context("fork").Pipe()
    worker = multiprocessing.get_context("fork").Process(target=serve, args=(there, os.getpid()))
    worker.start()
    fetched = []
    for _ in range(5):
        message = here.recv()
        assert isinstance(message, transport.Parcel)
        fetched.append(transport.receive(message))
        here.send("fetched")
    assert here.recv() == 1, "all but the last were let go"
    here.send("end")
    worker.join()
    assert worker.exitcode == 0
    assert all(tensor.equal(large(n)) for n, tensor in enumerate(fetched)), "they outlive the worker"
    fetched[0][:] = 7
    assert not fetched[1].eq(7).any()


@shared
def test_memory_is_freed():
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:ivl")

    before, open_files = mapped(), len(list(Path("/proc/self/fd").iterdir()))
    received = [transport.receive(transport.send(large(n), os.getpid())) for n in range(20)]
    assert mapped() > before
    del received
    transport.send(large(0)[:0], os.getpid())  # sending lets go of what was fetched
    assert mapped() == before and len(list(Path("/proc/self/fd").iterdir())) == open_files


def test_by_value():
    for tensor, receiver in ((large(1), None), (large(1)[0, :5], os.getpid()), (torch.arange(10**5), os.getpid())):
        message = transport.send(tensor, receiver)
        assert not isinstance(message, transport.Parcel) and transport.receive(message).equal(tensor)
