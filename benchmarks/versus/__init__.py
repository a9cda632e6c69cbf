"""The parts of vs_trl.py and generate.py: what both sides are given, a worker for each side, and the report."""
