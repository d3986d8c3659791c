"""kvcli as a model of lm-evaluation-harness (the package lm-eval): docs/lm-eval.md."""
