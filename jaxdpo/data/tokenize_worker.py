"""A process that encodes: reads an encoder and then lots of records from standard input, writes encoded lots to standard output."""

import io
import os
import pickle

from jaxdpo.data.tokenize_parallel import encode_lot


def main() -> None:
    """Serve until the input ends."""
    questions, answers = io.BufferedReader(io.FileIO(0)), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    encoder = pickle.load(questions)
    while questions.peek(1):
        pickle.dump(encode_lot(encoder, *pickle.load(questions)), answers)
        answers.flush()


if __name__ == "__main__":
    main()
