"""A training run: state, step, optimizer, resolved config, loop, evaluation, logging."""
