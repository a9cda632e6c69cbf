"""Devices and processes: the mesh, shardings, the processes of a run, offload to host memory."""
