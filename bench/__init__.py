"""Benchmarks of fastrnn against torch.nn and other libraries, on named cases."""

import os

# The profiler that measures peak memory prints its progress unless it is told not to; it reads
# this when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
