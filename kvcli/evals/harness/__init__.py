"""Tasks of lm-evaluation-harness (the package lm-eval) under compression: docs/lm-eval.md."""
