"""SmolLM2-135M-Instruct on all 8,485 Rotten Tomatoes training snippets, one epoch: the quickstart's longer run.

Command      make quickstart-full
Hardware     2 CPU cores, 6 GB; checkpoints every 100 steps, so that --resume=True (which the command gives) goes on
after a stop
"""
import importlib.util
import pathlib


def get_config() -> dict:
    spec = importlib.util.spec_from_file_location('quickstart', pathlib.Path(__file__).with_name('quickstart.py'))
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    return quickstart.get_config() | {
        'optimizer.adamw_optimizer.lr_warmup_steps': 30,
        'save_model_freq': 100,
        'checkpointer.save_optimizer_state': True,
    }
