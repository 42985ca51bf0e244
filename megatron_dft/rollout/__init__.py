"""Prompts → samples → rewards → training rows, and the scores of a model's answers.

torch and transformers are imported by `transformers_backend` alone, vLLM by `vllm_backend`.
"""
