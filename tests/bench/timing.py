"""How the rows of the benchmark are timed, and shown in full by a module that runs alone."""

import time
from contextlib import contextmanager

import cv2
import numpy as np
import torch


def best_times(functions, repeats):
    """Best processor time of each function, run in turns after one warm-up of the first (compilation)."""
    functions[0]()
    best = [np.inf] * len(functions)
    for _ in range(repeats):
        for which, function in enumerate(functions):
            start = time.process_time()
            function()
            best[which] = min(best[which], time.process_time() - start)
    return best


def rates(row, peer_name, n, ours, peer, **more):
    """One row: how many of `n` a second, from the seconds of both."""
    return {"row": row, "peer_name": peer_name, "ours": n / ours, "peer": n / peer, "ratio": peer / ours, **more}


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(-1)


def show(rows):
    """Print each row as soon as it is there."""
    with one_thread():
        for row in rows:
            difference = row.get("largest_difference")
            print(
                f"{row['row']:<48} ours {row['ours']:>12.4g}  peer {row['peer']:>10.4g}  ratio {row['ratio']:>7.2f}  "
                f"({row['peer_name']})" + (f"  largest difference {difference:.1e}" if difference is not None else ""),
                flush=True,
            )
