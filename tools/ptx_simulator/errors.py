"""What goes wrong in a simulated kernel."""


class UnsupportedError(NotImplementedError):
    """The simulator does not know this, and will not guess."""


class KernelFaultError(RuntimeError):
    """The kernel did what a GPU forbids or leaves undefined: out of bounds, misaligned, a divergent barrier."""
