"""Memory, time and compiled programs of a run, before a machine is rented."""
