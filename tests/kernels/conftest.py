"""What tests of several operators share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import native


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """A test that asks for a native path is skipped where there is no C compiler. That is what the path says then."""
    try:
        return (yield)
    except InputError as error:
        if native.compiler() is None and "there is no C compiler" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture
def compiler() -> None:
    """For a test that finds out in another way which path ran."""
    if native.compiler() is None:
        pytest.skip("there is no C compiler")


@pytest.fixture
def far_rows() -> Callable[[Tensor], Tensor]:
    """Spaces three rows so far apart that the last begins past element 2**31. What is between them is never touched.

    The 4 GiB between 16-bit rows are asked for and not used, so that the system gives next to no memory.
    """

    def spread(rows: Tensor) -> Tensor:
        n, width = rows.shape
        assert n == 3 and rows.element_size() == 2
        apart = 2**30 + 16
        far = torch.empty(2 * apart + width, dtype=rows.dtype).as_strided((3, width), (apart, 1))
        return far.copy_(rows)

    return spread
