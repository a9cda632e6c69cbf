"""A tokenization worker process.

Reads a pickled encoder and then chunks of records from standard input, writes the encoded chunks to
standard output (tokenize_parallel.py is the other end).
"""

import io
import os
import pickle

from jaxdpo.data.tokenize_parallel import encode_chunk


def main() -> None:
    """Serve until the input ends."""
    requests, results = io.BufferedReader(io.FileIO(0)), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with the results
    encoder = pickle.load(requests)
    while requests.peek(1):
        records, source = pickle.load(requests)
        pickle.dump(encode_chunk(encoder, records, source), results)
        results.flush()


if __name__ == "__main__":
    main()
