"""One thread, no network, and a store of its own: what every test here runs under."""
import os
import socket
import pytest
import torch
from rdd_lib.data import data_root

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    "Connections to anywhere but this machine fail at once."
    real = socket.socket.connect

    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise OSError(f"a test tried to reach {address}")
        return real(self, address)
    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    "Cells and compressed sets of a test are nobody else's."
    monkeypatch.setenv("RDD_STORE", str(tmp_path / "store" / "cells"))


def needs(name):
    "Skips a test where the full data set is not at hand."
    there = all((data_root() / name / f"{split}.npz").exists() for split in ("train", "test"))
    return pytest.mark.skipif(not there, reason=f"{name} is not in {os.environ.get('RDD_DATA') and '$RDD_DATA' or 'the cache'}; set RDD_DATA to a folder with {name}/train.npz and test.npz")
