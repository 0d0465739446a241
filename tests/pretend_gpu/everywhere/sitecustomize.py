"""Python imports this when it starts, where its folder is on the path (`pretend_gpu.environment`)."""
import sys

# the helper that multiprocessing starts for its own books needs no torch
if "resource_tracker" not in sys.orig_argv[-1]:
    import pretend_gpu
    pretend_gpu.install()
    whole_life = pretend_gpu.present()
    whole_life.__enter__()
