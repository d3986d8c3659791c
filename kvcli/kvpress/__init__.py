"""Presses of NVIDIA's kvpress as methods: a worker in kvpress's own environment says which KV pairs a press keeps."""
