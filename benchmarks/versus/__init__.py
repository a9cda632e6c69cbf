"""The parts of vs_trl.py and generate.py: inputs, a worker for each side, and the report."""
