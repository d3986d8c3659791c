"""The embedded testbed: a tiny trained Llama, its language and its eight task families (docs/testbed.md)."""
