import warnings

import pytest
import torch

# PyLops and SciPy warn on import about their own dependencies; that is not ours to fail on.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pylops  # noqa: F401
    import torch._decomp.decompositions_for_jvp


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
