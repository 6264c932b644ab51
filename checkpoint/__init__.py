"""checkpoint.open('TYPE::PATH') -> Source: configuration, tokenizer, prompt template and weights (source.py); with an
adapter -> AdaptedSource, which has the same (adapter.py).
"""
from checkpoint.adapter import open as open
from checkpoint.source import Source as Source
