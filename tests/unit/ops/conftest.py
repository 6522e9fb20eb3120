"""What tests of ops share: where they run."""

from tests.harness.devices import device, emulated, library, library_file  # noqa: F401
