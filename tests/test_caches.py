"""Cache sizes as Linux lists them, and what is assumed where it does not."""

from __future__ import annotations

import pytest

from bnfast.backends import caches


@pytest.fixture
def listed(tmp_path):
    """Return a function that writes such a listing for every CPU and returns what is read."""

    def write(*entries):
        for cpu in range(4096):
            folder = tmp_path / f"cpu{cpu}" / "cache"
            for number, entry in enumerate(entries):
                index = folder / f"index{number}"
                index.mkdir(parents=True)
                for name, text in zip(("level", "type", "size"), entry, strict=False):
                    (index / name).write_text(f"{text}\n")
            if cpu == min(caches.os.sched_getaffinity(0)):
                break
        return caches.sizes(str(tmp_path))

    return write


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (
            [
                (1, "Data", "48K"),
                (1, "Instruction", "32K"),
                (2, "Unified", "1024K"),
                (3, "Unified", "32768K"),
            ],
            (1 << 20, 32 << 20),
        ),
        ([(1, "Data", "64K"), (2, "Unified", "4M")], (4 << 20, 4 << 20)),
        ([(2, "Unified", "512K"), (3, "Unified", "1G")], (512 << 10, 1 << 30)),
        ([(2, "Instruction", "9M"), (2, "Data", "256K")], (256 << 10, 256 << 10)),
    ],
)
def test_listed_sizes(listed, entries, expected):
    assert listed(*entries) == expected


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [(1, "Data", "48K")],
        [(2, "Unified", "many")],
        [(2, "Unified")],
        [("two", "Unified", "1M")],
    ],
)
def test_default_where_nothing_is_listed(listed, entries):
    assert listed(*entries) == caches.DEFAULT


def test_a_missing_listing_gives_the_default(tmp_path):
    assert caches.sizes(str(tmp_path / "nowhere")) == caches.DEFAULT


def test_sizes_of_this_machine():
    core, last = caches.sizes()
    assert 0 < core <= last
