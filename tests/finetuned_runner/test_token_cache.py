"""The cache of tokens after a loss of power: what is damaged is not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetuned_runner.token_store import Index, TokenCache, pack

KEY = "k" * 64


def kept(folder: Path) -> tuple[TokenCache, Path]:
    """A cache that holds the tokens of one sample, and the file that says where they are."""
    cache = TokenCache(folder)
    store = cache.begin()
    index = Index.empty([1])
    index.starts[0] = store.append(pack([5, 6, 7], None))
    index.lengths[0] = 3
    cache.keep(KEY, store, index, 7)
    store.close()
    return cache, folder / KEY / "index.npz"


def test_whole_tokens_are_found_again(tmp_path: Path) -> None:
    cache, _ = kept(tmp_path)
    found = cache.find(KEY)
    assert found is not None
    assert found[0].read(0, 3)[0].tolist() == [5, 6, 7]
    found[0].close()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("zeros", [False, True])
def test_an_index_of_which_a_part_is_left_is_made_anew(
    tmp_path: Path, share: float, zeros: bool
) -> None:
    cache, index = kept(tmp_path)
    whole = index.read_bytes()
    left = whole[: int(share * len(whole))]
    index.write_bytes(left + bytes(len(whole) - len(left)) if zeros else left)
    assert cache.find(KEY) is None
    assert not index.exists()


def test_torn_tokens_are_made_anew(tmp_path: Path) -> None:
    cache, index = kept(tmp_path)
    np.zeros(3, np.int32).tofile(index.with_name("tokens"))
    assert cache.find(KEY) is None
