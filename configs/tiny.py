"""A random model of two layers on 200 made-up reviews: the whole of train.py in seconds, for those who edit the code.

Hardware     2 CPU cores, 1 GB;  Time  9 seconds
Result       loss 6.50 -> 0.32, next-token accuracy 0.9 % -> 89.8 % (its own training text; 2026-11-24)
Command      python train.py --config=configs/tiny.py --logger.output_dir=runs/tiny
"""


def get_config() -> dict:
    return {
        'load_llama_config': 'debug',
        'update_llama_config': 'dict(vocab_size=640)',  # the tokenizer's
        'tokenizer.vocab_file': 'tests/golden/easylm/tokenizer.model',
        'train_dataset.type': 'json',
        'train_dataset.text_processor.fields': 'text',
        'train_dataset.json_dataset.path': 'tests/golden/easylm/train_200.jsonl',
        'train_dataset.json_dataset.seq_length': 128,
        'train_dataset.json_dataset.batch_size': 8,
        'total_steps': 100,
        'optimizer.adamw_optimizer.lr': 0.003,
        'optimizer.adamw_optimizer.lr_warmup_steps': 10,
        'optimizer.adamw_optimizer.lr_decay_steps': 0,
        'log_freq': 10,
    }
