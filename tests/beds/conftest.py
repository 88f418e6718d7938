"""Data that beds are made of, fetched once a session through pip's index."""

import pytest

from workbench.errors import InputError
from workbench.lib import data

CORE = {"mnist-5k", "movielens-100k"}
"""Small archives that most beds need: where they cannot be fetched a test fails. Those of others are skipped."""


@pytest.fixture(scope="session")
def fetched():
    """`fetched(name)` brings a data set to the session's home."""

    def get(name: str) -> None:
        try:
            data.get(name)
        except InputError as error:
            if name in CORE:
                raise
            pytest.skip(f"{name} cannot be fetched: {error}")

    return get
