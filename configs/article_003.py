"""The article's run with learning rate 0.00002: model ID 003 of its table.

Reproduces   row 003 of "AdamW Optimizer": 88.37 % of 1,066 test reviews (the article's figure)
Hardware     eight TPU chips as mesh 1,4,2;  Time  not known;  Result  not measured here: no TPU was at hand
Command      as in configs/article_001.py, with --config=configs/article_003.py
"""
from configs import article_001


def get_config() -> dict:
    adamw = 'optimizer.adamw_optimizer.'
    return article_001.get_config() | {adamw + 'lr': 2e-5, adamw + 'end_lr': 2e-5}
