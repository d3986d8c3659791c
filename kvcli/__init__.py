"""kvcli: measures what KV cache compression does to language models. Importing it imports nothing heavy."""

__version__ = "0.1.0"
