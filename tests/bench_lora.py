"""What DoRA costs over LoRA: whole training steps in turn, on a model of SmolLM2-135M's shape.

    python tests/bench_lora.py                          135M random weights, rank 16, float32
    python tests/bench_lora.py --dtype bfloat16         the base in bf16, adapters in float32
    python tests/bench_lora.py --profile                and the operations that took longest

A step is forward, backward and AdamW on one row of `--tokens`. After a warm-up the two run
`--repeats` times, alternating; the ratio is that of the medians. Goal: at most 1.15. Seconds are
those of the clock on a GPU, and those of all processors on a CPU: other work disturbs them less.
Measured with one thread of a busy machine: 1.04 in float32, 1.07 in bfloat16.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

import lora  # noqa: E402


def random_model(args) -> LlamaForCausalLM:
    """SmolLM2-135M's shape with random weights."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=args.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).train()


def stepper(model: LlamaForCausalLM, adapter: lora.Adapter, tokens: int) -> Callable[[], float]:
    """A function that takes one training step and gives its seconds."""
    optimizer = torch.optim.AdamW(lora.attach(model, adapter), lr=1e-4)
    ids = torch.randint(49152, (1, tokens), device=model.device)

    def clock() -> float:
        if model.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> float:
        start = clock()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return clock() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    steps = {
        name: stepper(random_model(args), lora.Adapter(args.rank, dora=dora), args.tokens)
        for name, dora in (("LoRA", False), ("DoRA", True))
    }
    seconds = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm-up: allocations, the optimizer's state
    for _ in range(args.repeats):
        for name, step in steps.items():
            seconds[name].append(step())
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, taken in seconds.items():
        print(f"{name} {median[name]:.3f} s  ({', '.join(f'{s:.3f}' for s in taken)})")
    print(f"DoRA over LoRA {median['DoRA'] / median['LoRA']:.3f}")
    for name, step in steps.items() if args.profile else ():
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device == "cuda")
        with profile(activities=activities) as found:
            step()
        print(name, found.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))


if __name__ == "__main__":
    main()
