"""SmolLM2-135M-Instruct on 1,024 Rotten Tomatoes snippets: the article's task in minutes, on the CPU of a laptop.

Command      make quickstart            (or: python train.py --config=configs/quickstart.py, with the two paths below)
Hardware     2 CPU cores, 6 GB
"""


def get_config() -> dict:
    adamw = 'optimizer.adamw_optimizer.'
    return {
        'train_dataset.text_processor.fields': '[prompt],answer',  # loss on the label and on the eos token after it
        'train_dataset.text_processor.add_bos_token': False,  # SmolLM2 was trained without one
        'train_dataset.json_dataset.batching': 'rows',
        'train_dataset.json_dataset.seq_length': 128,
        'train_dataset.json_dataset.batch_size': 16,
        'total_steps': 0,
        'epochs': 1,
        adamw + 'lr': 5e-5,
        adamw + 'end_lr': 0.0,
        adamw + 'lr_warmup_steps': 6,
        adamw + 'lr_decay_steps': 0,
        adamw + 'b2': 0.999,
        adamw + 'weight_decay': 0.01,
        'log_freq': 1,
    }
