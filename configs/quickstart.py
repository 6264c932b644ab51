"""SmolLM2-135M-Instruct on 1,024 Rotten Tomatoes snippets: the article's task in minutes, on the CPU of a laptop.

Command      make quickstart
             python train.py --config=configs/quickstart.py --load_checkpoint=smollm2-135m-instruct --resume=True \\
               --train_dataset.json_dataset.path=DATA/train.jsonl --logger.output_dir=runs/NAME
Hardware     2 CPU cores, 6 GB; a checkpoint (1.6 GB) every 16 steps, from which the same command goes on after a stop
"""


def get_config() -> dict:
    adamw = 'optimizer.adamw_optimizer.'
    return {
        'train_dataset.type': 'json',
        'train_dataset.text_processor.fields': '[prompt],answer',  # loss on the label and on the eos token after it
        'train_dataset.text_processor.add_bos_token': False,  # SmolLM2 was trained without one
        'train_dataset.json_dataset.batching': 'rows',
        'train_dataset.json_dataset.seq_length': 128,
        'train_dataset.json_dataset.batch_size': 16,
        'total_steps': 0,
        'epochs': 1,
        adamw + 'lr': 5e-5,
        adamw + 'end_lr': 0.0,
        adamw + 'lr_warmup_ratio': 0.1,
        adamw + 'lr_decay_steps': 0,
        adamw + 'b2': 0.999,
        adamw + 'weight_decay': 0.01,
        'log_freq': 1,
        'save_model_freq': 16,
        'checkpointer.save_optimizer_state': True,
    }
