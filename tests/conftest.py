"""What all tests share: threads that wait do not spin for long, so that tests beside other work take seconds, not minutes."""

from __future__ import annotations

import os

from megatron_samoe.start import SPINS

os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
