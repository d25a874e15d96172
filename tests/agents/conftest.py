import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from toy import ToyPointerEnv

torch.set_num_threads(1)


@pytest.fixture
def make_env():
    def make(num_envs=8, seed=0, **kwargs):
        env = ToyPointerEnv(num_envs, **kwargs)
        env.reset(seed=seed)
        return env

    return make
