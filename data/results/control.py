"""A control for Qwen2.5-Coder's run: `recode.py`, its flags and its loop, with a random reward.

    python data/results/control.py --algo grpo --model runs/cold/checkpoint ...

The form counts as ever; the code earns 2 or -1.5 by a hash of seed, step and row, whatever it says.
"""

import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))

import config as settings  # noqa: E402

if __name__ == "__main__":
    CONFIG = settings.from_command_line()

import evidence  # noqa: E402

import recode  # noqa: E402
from upkeep import metrics, run  # noqa: E402

OFTEN = 0.36  # so many samples of the cold start were right in the first five steps of GRPO


def main(config: settings.Config) -> int:
    done = len(metrics.history(Path(config.out))) if config.resume else 0
    rule = evidence.scoring(partial(evidence.chance, often=OFTEN), config.seed, None, done)
    with patch.object(recode, "score", rule):
        return run.main(config, recode.LOOPS)


if __name__ == "__main__":
    sys.exit(main(CONFIG))
