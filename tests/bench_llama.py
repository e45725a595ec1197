"""Milliseconds a token, for all rows together: ours beside llama.cpp's, which reads 4-bit weights.

    pip install xllamacpp==2026.10.11549
    python tests/bench_llama.py                 needs the packages of qwen2.5-coder-0.5b, see data/

Both sample at temperature 1 behind the same short prompt, each side in a process of its own, in
turn. Ours has bf16 weights (`--dtype auto`) and no drafts. The time of the prompt is taken off by
a second run with fewer tokens.
"""

import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
NAME, PROMPT, SHORT, LONG = "qwen2.5-coder-0.5b", "def fibonacci(n):", 8, 72  # tokens


def ours(rows: int):
    import torch

    from policy import load

    policy = load(NAME, "cpu", "auto")
    policy.eos_ids = [policy.model.config.vocab_size - 1]  # which no answer has
    prompt = policy.tokenizer.encode(PROMPT)

    def sample(tokens: int) -> None:
        how = {"group_size": rows, "max_new_tokens": tokens, "plain": True}
        with policy.decoding():  # packed, and `plain` leaves the drafts away
            policy.sample([prompt], generator=torch.Generator().manual_seed(0), **how)

    return sample


def theirs(rows: int):
    import xllamacpp

    import weights

    where = weights.located(NAME)
    params = xllamacpp.CommonParams()
    params.model.path = str(Path(*where.values()))
    params.n_parallel, params.n_ctx, params.verbosity = rows, 256 * rows, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    server = xllamacpp.Server(params)

    def sample(tokens: int) -> None:
        how = {"prompt": PROMPT, "n_predict": tokens, "ignore_eos": True, "temperature": 1.0}
        asked = [
            threading.Thread(target=server.handle_completions, args=[how | {"seed": i}])
            for i in range(rows)
        ]
        for thread in asked:
            thread.start()
        for thread in asked:
            thread.join()

    return sample


def measured(side: str, rows: int) -> float:
    command = [sys.executable, __file__, side, str(rows)]
    return float(subprocess.run(command, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    if len(sys.argv) == 3:
        sample = {"ours": ours, "theirs": theirs}[sys.argv[1]](int(sys.argv[2]))
        sample(SHORT)
        times = []
        for tokens in (SHORT, LONG):
            begin = time.perf_counter()
            sample(tokens)
            times.append(time.perf_counter() - begin)
        print(1e3 * (times[1] - times[0]) / (LONG - SHORT))
        return
    print("| rows | ours | llama.cpp |\n|---|---|---|")
    for rows in (1, 8, 32):
        found = [(measured("ours", rows), measured("theirs", rows)) for _ in range(3)]
        cells = (f"{statistics.median(x):.0f} ms" for x in zip(*found, strict=True))
        print(f"| {rows} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
