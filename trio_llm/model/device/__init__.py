"""Where a model runs: CPU or CUDA, copies to the device, and the guard against hidden host synchronisation."""
