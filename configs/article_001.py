"""The article's fine-tuning run, model ID 001 of its table: OpenLLaMA 3B v2 on 8,530 Rotten Tomatoes reviews.

Reproduces   row 001 of "AdamW Optimizer": learning rate 0.002, 87.24 % of 1,066 test reviews (the article's figure)
Hardware     eight TPU chips as mesh 1,4,2 (the article does not say which)
Time         not known: the article gives none
Result       not measured here: no TPU was at hand.  The flags are the article's printed command (tests/test_article.py)
Command      python train.py --config=configs/article_001.py --load_checkpoint=params::open_llama_3b_v2_easylm \\
               --tokenizer.vocab_file=tokenizer.model --train_dataset.json_dataset.path=runs/reviews/train.jsonl \\
               --logger.output_dir=runs/article_001
"""


def get_config() -> dict:
    adamw = 'optimizer.adamw_optimizer.'
    return {
        'load_llama_config': '3b',
        'mesh_dim': '1,4,2',
        'total_steps': 1846,  # of 8 x 1,024 tokens: 40 passes over the article's 378 thousand
        'save_model_freq': 1846,
        'train_dataset.type': 'json',
        'train_dataset.text_processor.fields': 'text',
        'train_dataset.json_dataset.seq_length': 1024,
        adamw + 'lr': 0.002,
        adamw + 'end_lr': 0.002,  # equal to lr: constant after the warmup
        adamw + 'lr_warmup_steps': 184,
        adamw + 'lr_decay_steps': 100_000_000,
        adamw + 'b1': 0.9,
        adamw + 'b2': 0.9,
        adamw + 'weight_decay': 0.001,
        adamw + 'multiply_by_parameter_scale': True,
        adamw + 'bf16_momentum': True,
    }
