"""checkpoint.open('TYPE::PATH') -> Source: configuration, tokenizer, prompt template and weights (source.py)."""
from checkpoint.source import Source as Source
from checkpoint.source import open as open
