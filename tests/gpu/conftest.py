"""Tests of one GPU; each runs on the CPU too, so that the tests are known to work where there is no GPU. Ops and decoding are
compared with their references in tests/unit/ops."""

from tests.harness.devices import device  # noqa: F401
