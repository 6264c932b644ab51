"""The article's run with learning rate 0.000002: model ID 004 of its table.

Reproduces   row 004 of "AdamW Optimizer": 88.74 % of 1,066 test reviews (the article's figure)
Hardware     eight TPU chips as mesh 1,4,2;  Time  not known;  Result  not measured here: no TPU was at hand
Command      as in configs/article_001.py, with --config=configs/article_004.py
"""
from configs import article_001


def get_config() -> dict:
    adamw = 'optimizer.adamw_optimizer.'
    return article_001.get_config() | {adamw + 'lr': 2e-6, adamw + 'end_lr': 2e-6}
