"""What every test runs under."""

from __future__ import annotations

import signal

# A shell that starts us in the background has SIGINT ignored, and that is inherited: programs under
# test could not be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)
