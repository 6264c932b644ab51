"""SmolLM2-135M-Instruct on all 8,485 Rotten Tomatoes training snippets, one epoch: the quickstart's longer run.

Command      make quickstart-full
Hardware     2 CPU cores, 6 GB; a checkpoint every 100 steps, from which the same command goes on after a stop
"""
from configs import quickstart


def get_config() -> dict:
    return quickstart.get_config() | {
        'optimizer.adamw_optimizer.lr_warmup_ratio': 0.0,
        'optimizer.adamw_optimizer.lr_warmup_steps': 30,
        'save_model_freq': 100,
    }
