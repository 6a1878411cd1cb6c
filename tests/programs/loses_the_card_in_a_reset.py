"""Before a server: the first wait of a reset finds that the card is lost.

What ran out of memory did so because a kernel had failed, or the other way round.
"""

import mlx.core as mx

from mlx_safe import _thread_state, testing

LAUNCH_FAILED = 719  # cudaErrorLaunchFailure


class Waits:
    def __getattr__(self, name):
        return getattr(mx, name)

    def synchronize(self):
        raise RuntimeError(testing.cuda_message(LAUNCH_FAILED))


_thread_state.mx = Waits()
